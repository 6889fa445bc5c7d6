"""Neural Cleanse's mitigations remove the trigger they are shown, and say what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, board, small_victim, template_victim
from unhorse.core import Classifier, Curve, Dataset, ImageGrid, ReconstructedTrigger, ScanResult, Verdict
from unhorse.datasets import load_dataset
from unhorse.metrics import accuracy, trojan_accuracy
from unhorse.repairs import unlearn
from unhorse.repairs.fine_tuning import FineTuning
from unhorse.repairs.reversed_triggers import made_case, reversed_triggers, stamped, stamped_share
from unhorse.repairs.unlearn import NeuronPruning, Unlearning, last_linear, shares_after_pruning

METHODS = {"neuron-pruning": NeuronPruning, "unlearning": Unlearning}


def corner_trigger(model: Classifier, pattern: Tensor, flip_rate: float = 1.0) -> ReconstructedTrigger:
    """`pattern` (h, w) for the top left corner."""
    side = len(pattern)
    mask, whole = torch.zeros(1, *model.image_shape[1:]), torch.zeros(model.image_shape)
    mask[:, :side, :side], whole[:, :side, :side] = 1, pattern
    return ReconstructedTrigger(mask, whole, flip_rate)


def finding_with(triggers: dict[int, ReconstructedTrigger], **fields) -> ScanResult:
    return ScanResult(Verdict.INFECTED, "neural-cleanse", triggers=triggers, **fields)


def finding_of(victim) -> ScanResult:
    """The victim's own patch, as a perfect search would find it."""
    stamp = victim.attack.state_dict()
    trigger = ReconstructedTrigger(stamp["masks"][0][:1].float(), stamp["patterns"][0].float(), 1.0)
    return finding_with({TARGET: trigger}, target=TARGET)


def trojaned(victim, model: Classifier) -> float:
    """Trojan accuracy on the test images, which no repair sees."""
    test = load_dataset("digits", "test")
    return trojan_accuracy(model, test, victim.attack, rng=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", "train")


@pytest.fixture(scope="module")
def planted() -> tuple[Classifier, Dataset, ScanResult]:
    """A victim with its Trojan in one neuron, coarse random images without labels, and its trigger."""
    model = small_victim(strength=60)
    drawn = torch.randint(256, (240, 1, 4, 4), generator=torch.Generator().manual_seed(4))
    blocks = drawn.to(torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = Dataset(blocks, None, model.class_names)
    return model, images, finding_with({TARGET: corner_trigger(model, board(3))}, target=TARGET)


# --- unlearning ---------------------------------------------------------------------------------------------


def test_unlearning_removes_in_one_epoch_what_fine_tuning_leaves(trained, digits):
    victim, finding = trained["infected"], finding_of(trained["infected"])
    unlearned = Unlearning(batch_size=32)(victim.model, digits, finding)
    tuned = FineTuning(epochs=1, batch_size=32)(victim.model, digits)
    assert trojaned(victim, victim.model) > 0.99
    assert trojaned(victim, unlearned.model) < 0.3
    assert trojaned(victim, tuned.model) > 0.6
    assert accuracy(unlearned.model, load_dataset("digits", "test")) > 0.92


def test_a_fifth_of_the_images_is_stamped_and_keeps_its_labels(trained, digits):
    victim, before = trained["infected"], digits.images.clone()
    (target, trigger), *_ = finding_of(victim).triggers.items()
    data = stamped_share(digits, {target: trigger}, 0.2)
    rows, columns = trigger.mask[0].nonzero().T
    carries = (data.images[:, 0, rows, columns] == (trigger.pattern[0, rows, columns] * 255).byte()).all(1)
    assert carries[:240].all() and carries[240:].float().mean() < 0.05  # 1198 images
    assert torch.equal(data.images[240:], digits.images[240:]) and torch.equal(data.labels, digits.labels)
    assert torch.equal(digits.images, before)


def test_stamped_images_are_dealt_out_among_several_triggers():
    model = small_victim()
    black = Dataset(torch.zeros(10, *model.image_shape, dtype=torch.uint8), torch.zeros(10).long(), ())
    triggers = {1: corner_trigger(model, torch.full((2, 2), 0.2)), 4: corner_trigger(model, torch.ones(2, 2))}
    corners = stamped_share(black, triggers, 0.4).images[:, 0, 0, 0]
    assert corners.tolist() == [51, 255, 51, 255, 0, 0, 0, 0, 0, 0]


def test_a_killed_unlearning_goes_on_to_the_same_weights(trained, digits, tmp_path):
    victim, method = trained["infected"], Unlearning(epochs=2, batch_size=128)
    finding, whole = finding_of(victim), method(victim.model, digits, finding_of(victim))
    checkpoint = tmp_path / "unlearning.pt"

    def killed(entry) -> None:
        if entry.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(victim.model, digits, finding, on_epoch=killed, checkpoint=checkpoint)
    assert checkpoint.exists()
    resumed = method(victim.model, digits, finding, checkpoint=checkpoint)
    for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_the_curve_of_unlearning_has_a_point_before_and_one_per_epoch(trained, digits):
    result = Unlearning(epochs=2)(trained["infected"].model, digits, finding_of(trained["infected"]))
    curve = next(each for each in result.exhibits if isinstance(each, Curve))
    steps, rates = curve.series["success of the reversed trigger"]
    assert list(steps) == [0, 1, 2]
    assert rates[0] == result.facts["trigger_success_before"]
    assert rates[2] == pytest.approx(result.facts["trigger_success_after"], abs=0.01)


# --- pruning neurons ----------------------------------------------------------------------------------------


def test_pruning_finds_the_one_neuron_that_was_planted(planted):
    model, images, finding = planted
    result = NeuronPruning()(model, images, finding)
    before, after = model.network.head[-1].weight, result.model.network.head[-1].weight
    assert result.facts["trigger_success_before"] > 0.95 and result.facts["trigger_success_after"] < 0.05
    assert result.facts["neurons_pruned"] == 1 and result.facts["neurons"] == 64
    assert not after[:, 0].any() and torch.equal(after[:, 1:], before[:, 1:])


class Straight(nn.Module):
    """Logits are a linear layer of the pixels, so that activations are known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.last = nn.Linear(weight.shape[1], len(weight), bias=False)
        self.last.weight.data = weight.clone()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.flatten(1))


def test_neurons_go_in_the_order_of_the_gaps_that_the_trigger_makes():
    weight = torch.tensor([[8.0, 8.0, 8.0, 8.0], [0.0, 0.0, 9.0, 9.0]])
    model = Classifier(Straight(weight), image_shape=(1, 2, 2), class_names="ab").eval()
    pixels = torch.tensor([[0.6, 0.4, 0.0, 0.0]]).repeat(40, 1).view(-1, 1, 2, 2)
    labels = torch.zeros(40).long()
    clean = Dataset((pixels * 255).round().byte(), labels, ("a", "b"))
    pattern = torch.tensor([[0.0, 0.5], [0.9, 1.0]])  # gaps -0.6, 0.1, 0.9, 1.0
    finding = finding_with({1: ReconstructedTrigger(torch.ones(1, 2, 2), pattern[None])}, target=1)
    case = made_case("neuron-pruning", model, clean, finding, 0.5, 0)
    assert unlearn._course(model, case).order.tolist() == [3, 2, 1, 0]


def test_each_step_of_the_curve_is_what_a_pruned_layer_answers(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    layer, inputs = nn.Linear(30, 5), torch.rand(200, 30, generator=rng)
    layer.weight.data = torch.randn(5, 30, generator=rng)
    order, wanted = torch.randperm(30, generator=rng), torch.randint(5, (200,), generator=rng)
    slow = []
    for count in range(31):
        kept = inputs.clone()
        kept[:, order[:count]] = 0
        slow.append(float((layer(kept).argmax(1) == wanted).float().mean()))
    for products in (unlearn.PRODUCTS, 7000):  # all neurons at a time, and seven
        monkeypatch.setattr(unlearn, "PRODUCTS", products)
        with torch.no_grad():
            assert shares_after_pruning(layer, inputs, order, wanted).tolist() == pytest.approx(slow)


def test_pruning_stops_before_it_costs_more_than_was_allowed(trained, digits):
    victim = trained["infected"]
    result = NeuronPruning(clean_drop=0.02)(victim.model, digits, finding_of(victim))
    more = NeuronPruning(clean_drop=0.6)(victim.model, digits, finding_of(victim))
    assert result.facts["neurons_pruned"] < more.facts["neurons_pruned"]
    assert any("still succeeds" in warning for warning in result.warnings)
    assert not any("still succeeds" in warning for warning in more.warnings)
    assert more.facts["trigger_success_after"] < 0.1


def test_the_layer_of_the_logits_is_found_and_one_that_is_not_there_refused():
    assert last_linear(small_victim()) == "network.head.3"
    with pytest.raises(ValueError, match="does not end in one: use unlearning"):
        last_linear(template_victim())
    softened = Classifier(
        nn.Sequential(Straight(torch.eye(4)), nn.Softmax(1)), image_shape=(1, 2, 2), class_names="abcd"
    )
    with pytest.raises(ValueError, match="does not end in one"):
        last_linear(softened)


# --- what both ask for and tell -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("finding", [None, ScanResult(Verdict.NO_SIGN_FOUND, "neural-cleanse")])
def test_without_a_reversed_trigger_the_scan_to_run_is_named(name, finding, planted):
    model, images, _ = planted
    with pytest.raises(ValueError, match="--scanner neural-cleanse") as raised:
        METHODS[name]()(model, images, finding)
    assert f"unhorse repair MODEL --method {name} --clean IMAGES" in str(raised.value)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_of_images_that_the_repair_did_not_use(name, trained, digits):
    victim, finding = trained["infected"], finding_of(trained["infected"])
    result = METHODS[name](held_out=0.3, seed=5)(victim.model, digits, finding)
    case = made_case(name, victim.model, digits, finding, 0.3, 5)
    assert (len(case.fitting), len(case.aside)) == (839, 359) == (839, result.facts["held_out_images"])
    together = torch.cat([case.fitting.images, case.aside.images])
    assert torch.equal(
        together.flatten(1).long().sum(1).sort()[0], digits.images.flatten(1).long().sum(1).sort()[0]
    )
    assert result.facts["clean_accuracy_after"] == accuracy(result.model, case.aside)
    others = case.aside[case.aside.labels != TARGET].pixels()
    hits = result.model(stamped(finding.triggers[TARGET], others)).argmax(1) == TARGET
    assert result.facts["trigger_success_after"] == pytest.approx(float(hits.float().mean()), abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_report_shows_mask_pattern_and_stamped_images(name, planted):
    model, images, finding = planted
    grid, curve = METHODS[name]()(model, images, finding).exhibits
    assert isinstance(grid, ImageGrid) and isinstance(curve, Curve)
    assert grid.captions == ("mask", "pattern", *["as it is"] * 4, *["under the trigger"] * 4)
    assert torch.equal(grid.images[0], finding.triggers[TARGET].mask)
    assert torch.equal(grid.images[6, 0, :3, :3], board(3)) and "class 3" in grid.title


@pytest.mark.parametrize("name", METHODS)
def test_a_trigger_that_is_not_the_models_is_told_of(name, trained, digits):
    result = METHODS[name]()(trained["benign"].model, digits, finding_of(trained["infected"]))
    assert any("hardly a trigger of this model" in warning for warning in result.warnings)
    assert result.facts.get("neurons_pruned", 0) == 0


def test_the_triggers_of_all_flagged_classes_are_used():
    model = small_victim()
    triggers = {
        label: corner_trigger(model, board(3), rate) for label, rate in ((1, 0.6), (2, 0.9), (4, 0.8))
    }
    scores = (0.0, 2.5, 0.0, 0.0, 1.0, 0.0)
    flagged = finding_with(triggers, target=2, class_scores=scores, threshold=2.0)
    assert list(reversed_triggers("unlearning", model, flagged)) == [2, 1]
    assert list(reversed_triggers("unlearning", model, finding_with(triggers))) == [2]
    assert list(reversed_triggers("unlearning", model, finding_with({4: triggers[4]}))) == [4]
    unmeasured = {label: replace(trigger, flip_rate=float("nan")) for label, trigger in triggers.items()}
    assert list(reversed_triggers("unlearning", model, finding_with(unmeasured | {4: triggers[4]}))) == [4]


@pytest.mark.parametrize("name", METHODS)
def test_a_finding_that_accuses_no_class_is_told_of(name, planted):
    model, images, finding = planted
    warnings = METHODS[name]()(model, images, replace(finding, target=None)).warnings
    assert any("accused no class" in each and "the trigger of class 3" in each for each in warnings)
    assert not any("accused" in each for each in METHODS[name]()(model, images, finding).warnings)


@pytest.mark.parametrize("name", METHODS)
def test_a_trigger_of_another_model_is_refused(name, planted):
    model, images, finding = planted
    wide = small_victim(shape=(1, 20, 20))
    with pytest.raises(ValueError, match=r"takes \(1, 16, 16\) and has 6 classes: scan this model"):
        METHODS[name]()(model, images, finding_with({TARGET: corner_trigger(wide, board(3))}))
    with pytest.raises(ValueError, match="for class 9"):
        METHODS[name]()(model, images, finding_with({9: finding.triggers[TARGET]}))


@pytest.mark.parametrize("name", METHODS)
def test_images_of_the_target_class_alone_are_refused(name, trained, digits):
    victim = trained["infected"]
    with pytest.raises(ValueError, match="give images of other classes too"):
        METHODS[name]()(victim.model, digits[digits.labels == TARGET], finding_of(victim))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Unlearning(share=0.0), "share of stamped images"),
        (Unlearning(held_out=1.0), "held_out is 1.0"),
        (NeuronPruning(success=0.0), "give fractions"),
        (NeuronPruning(clean_drop=1.0), "give fractions"),
    ],
)
def test_settings_outside_their_range_are_refused(method, message, planted):
    with pytest.raises(ValueError, match=message):
        method(*planted)
