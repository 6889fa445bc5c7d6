"""What a sound ONNX file has that is not read, and what its owner can do about it."""

from __future__ import annotations

from unhorse.rules import LoadRefused

RUNNING = frozenset({"PythonOp", "PythonOpGrad", "PyOp", "PyCustomOp", "EPContext"})
"""Operators of ONNX Runtime that call Python, or hold compiled code or the path to it."""

_EXPORT = "export the classifier again with torch.onnx.export(..., opset_version=18), or tf2onnx --opset 18"
_UNOPTIMISED = (
    "give the file from before ONNX Runtime optimised it: save it with ORT_ENABLE_BASIC at most, "
    "or export the model again"
)
_FLOATS = "give the float model that it was made from; int8 weights and QuantizeLinear pairs are read"
_RECENT = "export it with opset_version=18, or run onnx.version_converter.convert_version(model, 18)"
_INTEGERS = ("QLinear", "Integer", "QGemm", "QAttention", "DynamicQuantize")


class Unsupported:
    """Gathers what is not read; `refuse` raises the first of it as LD235."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def __contains__(self, words: str) -> bool:
        return any(words in reason for reason in self._found)

    def add(self, reason: str, remedy: str = _EXPORT) -> None:
        """Notes a reason; what is said twice is kept once."""
        if len(self._found) < 100:
            self._found.setdefault(reason, remedy)

    def opset(self, version: int, read: range) -> None:
        """Notes a version of the standard operators that is not read."""
        reason = f"it is for operator set {version}; unhorse reads {read[0]} to {read[-1]}"
        self.add(reason, _RECENT)

    def operator(self, name: str, domain: str) -> None:
        """Notes an operator that is not on the list, or of a domain other than the standard one."""
        of = f" of {domain[:50]}" if domain else ""
        remedy = _UNOPTIMISED if domain.startswith(("com.microsoft", "com.ms.")) else _EXPORT
        if any(word in name for word in _INTEGERS):
            remedy = _FLOATS
        self.add(f"it uses the operator {name[:50]}{of}", remedy)

    def integers(self, where: str) -> None:
        """Notes arithmetic on quantised numbers."""
        self.add(f"it computes with int8 numbers ({where[:50]})", _FLOATS)

    def refuse(self) -> None:
        """LD235 if anything was noted, with the first remedy and, if there is more, two further reasons."""
        if not self._found:
            return
        reasons = list(self._found)
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise LoadRefused(
            "LD235",
            f"unhorse does not read this ONNX model: {'; '.join(reasons[:3])}{more}",
            self._found[reasons[0]],
        )
