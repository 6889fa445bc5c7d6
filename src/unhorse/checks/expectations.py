"""What a model file says of itself: image size, classes, normalisation, names; read without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Sides = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class Facts:
    """What the file says, as hostile text and numbers: nothing in it has been compared with the network.

    `image_shape` is (c, h, w), None where the file leaves a size open; `mean` and `std` are for pixels
    in 0..1. `notes` are sentences for the report, each behind the id of its rule.
    """

    image_shape: Sides | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    producer: str = ""
    operators: tuple[str, ...] = ()
    extra: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A document of plain JSON values, from which `from_json` makes equal Facts."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Facts:
        """The Facts of a document that `to_json` made, also after a trip through JSON; or ValueError."""
        try:
            shape = document.get("image_shape")
            return cls(
                image_shape=None if shape is None else _image_shape(shape),
                num_classes=_optional(document.get("num_classes"), int),
                mean=_floats(document.get("mean")),
                std=_floats(document.get("std")),
                class_names=_texts(document.get("class_names")),
                producer=_exactly(document.get("producer", ""), str),
                operators=_texts(document.get("operators", ())) or (),
                notes=_texts(document.get("notes", ())) or (),
                extra={
                    _exactly(key, str): _exactly(value, str)
                    for key, value in document.get("extra", {}).items()
                },
            )
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not the facts of a model file ({error})") from error


def _exactly(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _optional(value: object, kind: type) -> Any:
    return None if value is None else _exactly(value, kind)


def _image_shape(values: Any) -> Sides:
    channels, height, width = (_optional(value, int) for value in values)
    return channels, height, width


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(_number(value)) for value in values)


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"a {type(value).__name__} where a number belongs")
    return value  # type: ignore[return-value]


def _texts(values: Any) -> tuple[str, ...] | None:
    return None if values is None else tuple(_exactly(value, str) for value in values)
