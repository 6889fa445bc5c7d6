"""Attention distillation and plain fine-tuning: known maps, a trained victim that forgets, resumption."""

import copy

import pytest
import torch
from torch import nn

from unhorse.core import Classifier, Curve, Dataset, ImageGrid
from unhorse.datasets import load_dataset, subset
from unhorse.metrics import accuracy, trojan_accuracy
from unhorse.models.classifier import weights_hash
from unhorse.models.stages import Stage
from unhorse.repairs.distill import AttentionDistillation, attention_distance, attention_map, stage_weights
from unhorse.repairs.fine_tuning import CutoutAugmentation, FineTuning

NAMES = [str(index) for index in range(10)]
SHORT = {"learning_rate": 0.03, "crop": 1, "drop_after": 2}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", "test")


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return load_dataset("digits", "train")[:640]  # ten steps an epoch


def trojan(model: Classifier, victim, data: Dataset) -> float:
    return trojan_accuracy(model, data, victim.attack, rng=torch.Generator().manual_seed(0))


# --- known answers ------------------------------------------------------------------------------------------


def test_the_attention_map_of_given_features():
    features = torch.tensor([[[[1.0, -2.0]], [[2.0, 0.0]]]])  # squares sum to 5 and 4
    assert torch.allclose(attention_map(features), torch.tensor([[[5.0, 4.0]]]) / 41**0.5, atol=1e-6)


def test_attention_does_not_depend_on_the_scale_or_the_order_of_channels():
    features = torch.rand(3, 4, 5, 5) + 0.1
    assert torch.allclose(attention_map(7 * features.flip(1)), attention_map(features), atol=1e-6)
    assert torch.allclose(attention_map(features).flatten(1).norm(dim=1), torch.ones(3), atol=1e-5)


def test_nowhere_to_look_is_no_division_by_zero():
    features = torch.zeros(1, 2, 2, 2, requires_grad=True)
    attention_map(features).sum().backward()
    assert torch.equal(attention_map(features), torch.zeros(1, 2, 2))
    assert features.grad is not None and features.grad.isfinite().all()


def test_the_distance_weighs_the_stages():
    left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])  # maps (1, 0) and (0, 1)
    student, teacher = {"a": left, "b": left}, {"a": right, "b": left}
    assert float(attention_distance(student, teacher, {"a": 3.0, "b": 5.0})) == pytest.approx(3, rel=1e-4)
    assert float(attention_distance(teacher, student, {"a": 3.0, "b": 5.0})) == pytest.approx(3, rel=1e-4)


def test_the_last_beta_is_for_the_last_stage_however_many_there_are():
    stages = [Stage(name, 1, 2, 2) for name in "wxyz"]
    betas = (5.0, 10.0, 20.0)
    assert stage_weights(stages[-3:], betas) == {"x": 5, "y": 10, "z": 20}
    assert stage_weights(stages[-1:], betas) == {"z": 20}


def test_cutout_blackens_one_square_and_nothing_else():
    images = torch.rand(200, 2, 9, 7) + 0.5
    cut = CutoutAugmentation(hole=3)(images, torch.Generator().manual_seed(0))
    black = (cut == 0).all(1)
    assert torch.equal(cut, images * ~black[:, None])
    sizes = black.flatten(1).sum(1)
    assert sizes.max() == 9 and sizes.min() >= 4
    rows, columns = black.any(2).sum(1), black.any(1).sum(1)
    assert torch.equal(rows * columns, sizes)  # a rectangle
    assert black.any(0).all()  # anywhere


# --- the cure -----------------------------------------------------------------------------------------------


def test_distillation_makes_a_trained_victim_forget_in_50_steps(trained, clean, digits):
    victim = trained["infected"]
    repair = AttentionDistillation(epochs=3, teacher_epochs=2, betas=(100.0, 100.0, 100.0), **SHORT)
    result = repair(victim.model, clean)
    assert trojan(victim.model, victim, digits) > 0.99
    assert trojan(result.model, victim, digits) < 0.6
    assert accuracy(result.model, digits) > 0.92
    assert result.facts["stages"] == ["network.features.1", "network.features.4"]  # it has two
    assert not result.model.training


def test_fine_tuning_alone_makes_it_forget_in_50_steps(trained, clean, digits):
    victim = trained["infected"]
    result = FineTuning(epochs=5, **SHORT)(victim.model, clean)
    assert trojan(result.model, victim, digits) < 0.6
    assert accuracy(result.model, digits) > 0.92
    assert result.facts["clean_accuracy_before"] == accuracy(victim.model, clean)
    assert result.facts["clean_accuracy_after"] == accuracy(result.model, clean)


def test_the_student_looks_where_the_teacher_looks(trained, clean):
    last = []
    for beta in (100.0, 1e-3):
        repair = AttentionDistillation(
            epochs=3, teacher_epochs=2, betas=(beta,), learning_rate=0.03, drop_after=2
        )
        _, curve = repair(trained["infected"].model, clean).exhibits
        assert isinstance(curve, Curve)
        epochs, distances = curve.series["attention"]
        assert tuple(epochs) == (1, 2, 3)
        last.append(distances[-1] / beta)
    assert last[0] < 0.6 * last[1]  # 1e-3 is plain fine-tuning


def test_both_are_deterministic_and_leave_the_given_model_alone(trained, clean):
    model = copy.deepcopy(trained["infected"].model).train().requires_grad_(False)
    before = weights_hash(model)
    few = clean[:100]
    for repair in (FineTuning(epochs=1), AttentionDistillation(epochs=1, teacher_epochs=1)):
        hashes = {weights_hash(repair(model, few).model) for _ in range(2)}
        assert len(hashes) == 1 and before not in hashes
    assert weights_hash(model) == before
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_killed_distillation_goes_on_where_it_was(trained, clean, tmp_path):
    model, few = trained["infected"].model, clean[:200]
    repair = AttentionDistillation(epochs=3, teacher_epochs=2)
    seen: list[int] = []
    undisturbed = repair(model, few, on_epoch=lambda entry: seen.append(entry.epoch))
    assert seen == list(range(repair.total_epochs))

    def kill(at: int):
        def on_epoch(entry) -> None:
            seen.append(entry.epoch)
            if entry.epoch == at:
                raise KeyboardInterrupt

        return on_epoch

    seen.clear()
    for at in (1, 3):  # while the teacher learns, and while the student does
        with pytest.raises(KeyboardInterrupt):
            repair(model, few, on_epoch=kill(at), checkpoint=tmp_path / "nad")
    resumed = repair(model, few, on_epoch=kill(9), checkpoint=tmp_path / "nad")
    assert seen == [0, 1, 1, 2, 3, 3, 4]
    assert weights_hash(resumed.model) == weights_hash(undisturbed.model)
    assert not list(tmp_path.iterdir())


def test_distillation_shows_where_it_looked(trained, clean):
    grid, _ = AttentionDistillation(epochs=1, teacher_epochs=1)(trained["benign"].model, clean[:64]).exhibits
    assert isinstance(grid, ImageGrid)
    assert grid.images.shape == (18, 1, 8, 8) and grid.captions.count("after") == 6
    for index in range(6, 18):
        assert grid.images[index].min() >= 0 and grid.images[index].max() <= 1


def test_the_last_batch_is_never_a_single_image(clean):
    """Batch normalisation after a linear layer would refuse it."""
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 10),
    )
    model = Classifier(nn.Sequential(*layers), image_shape=(1, 8, 8), class_names=NAMES).eval()
    few = Dataset(clean.images[:33], None, clean.class_names)
    result = AttentionDistillation(epochs=1, teacher_epochs=1, batch_size=16)(model, few)
    assert weights_hash(result.model) != weights_hash(model)


def test_images_without_labels_get_the_models_own_answers(trained, clean):
    unlabelled = Dataset(clean.images[:100], None, clean.class_names)
    result = FineTuning(epochs=1)(trained["benign"].model, unlabelled)
    assert result.facts["clean_accuracy_before"] == 1
    assert any("no labels" in warning for warning in result.warnings)


def test_a_costly_repair_warns(trained, clean):
    result = FineTuning(epochs=1, learning_rate=0.2)(trained["benign"].model, clean)
    assert result.facts["clean_accuracy_after"] < 0.8
    assert any("use a milder setting" in warning for warning in result.warnings)


# --- bad input ----------------------------------------------------------------------------------------------


def test_a_transformer_is_refused_before_anything_is_trained(clean):
    patches = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.Flatten(), nn.Linear(32, 10))
    model = Classifier(patches, image_shape=(1, 8, 8), class_names=NAMES)
    unlabelled = Dataset(clean.images[:40], None, tuple(NAMES))
    with pytest.raises(ValueError, match="this needs a convolutional classifier, and .* is a transformer"):
        AttentionDistillation()(model, unlabelled, on_epoch=lambda entry: pytest.fail(f"trained {entry}"))


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        (AttentionDistillation(betas=()), "give a weight of 0 or more per stage"),
        (AttentionDistillation(teacher_epochs=0), "at least 1 epoch"),
        (FineTuning(epochs=0), "at least 1 epoch"),
        (FineTuning(learning_rate=0), "a rate above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(trained, clean, repair, message):
    with pytest.raises(ValueError, match=message):
        repair(trained["benign"].model, clean)


def test_too_few_images_are_refused(trained, clean):
    with pytest.raises(ValueError, match="7 clean images: give at least 20"):
        FineTuning()(trained["benign"].model, subset(clean, 7, seed=0))
