"""Neural Cleanse: the smallest trigger of every class, and the class that needs too small a one."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import TARGET, plain_images, stamped, template_victim
from unhorse.core import Bars, Classifier, Dataset, ImageGrid, Verdict
from unhorse.datasets import load_dataset, subset
from unhorse.scanners.neural_cleanse import NEURAL_CLEANSE, NeuralCleanse, anomaly_indices
from unhorse.scanners.trigger_inversion import CostSchedule, invert

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed" / "neural_cleanse.py"
SHORT = NeuralCleanse(steps=30, samples_per_step=64, learning_rate=0.2, patience=2)
SHORTER = replace(SHORT, steps=12)


@pytest.fixture(scope="module")
def twin():
    """The speed script, whose loop searches one class after the other."""
    spec = importlib.util.spec_from_file_location("speed_neural_cleanse", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return subset(load_dataset("digits", "train"), 400, seed=0)


def clean_images(model: Classifier, count: int = 150) -> Dataset:
    """Images of a template victim, without labels."""
    pixels = (plain_images(model, count) * 255).round().byte()
    return Dataset(pixels, None, model.class_names)


@pytest.fixture(scope="module")
def infected() -> Classifier:
    return template_victim(shape=(1, 12, 12), strength=20)


@pytest.fixture(scope="module")
def benign() -> Classifier:
    return template_victim(shape=(1, 12, 12))


@pytest.fixture(scope="module")
def of_the_infected(infected):
    return SHORT.scan(infected, clean_images(infected))


# --- known answers ------------------------------------------------------------------------------------------


def test_the_index_is_the_distance_below_the_median_in_scaled_median_deviations():
    norms = torch.tensor([10.0, 11, 9, 10, 12, 8, 10, 1])  # median 10, median absolute deviation 1
    wanted = torch.tensor([0, -1, 1, 0, -2, 2, 0, 9]) / 1.4826
    assert torch.allclose(anomaly_indices(norms).float(), wanted)


def test_the_median_of_an_even_number_of_norms_is_between_the_two_in_the_middle():
    norms = torch.tensor([1.0, 2, 4, 9])  # median 3, deviations 2, 1, 1, 6: 1.5
    assert anomaly_indices(norms)[0] == pytest.approx(2 / (1.4826 * 1.5))


def test_equal_norms_have_no_outlier():
    assert anomaly_indices(torch.full((10,), 7.0)).tolist() == [0] * 10
    assert anomaly_indices(torch.zeros(10)).tolist() == [0] * 10


def test_without_any_deviation_the_index_of_a_smaller_norm_is_large_but_finite():
    indices = anomaly_indices(torch.tensor([1.0] + [10.0] * 9))
    assert indices[0] == pytest.approx(900)
    assert indices[1:].tolist() == [0] * 9


def prices(schedule: CostSchedule, *successes: float) -> list[list[float]]:
    """The cost of each class after each of several steps whose norms never improve."""
    found = []
    for success in successes:
        schedule.update(torch.as_tensor(success).double().expand(2), torch.full((2,), math.nan).double())
        found.append(schedule.cost.tolist())
    return found


def test_the_price_starts_after_five_successes_and_then_doubles():
    costs = [cost for cost, _ in prices(CostSchedule(2, NeuralCleanse()), *[1.0] * 14)]
    assert costs == [0] * 4 + [1e-3] * 4 + [2e-3] * 5 + [4e-3]  # the fifth success is the first of the next


def test_the_price_falls_by_the_multiplier_to_the_power_of_one_and_a_half_after_five_failures():
    settings = replace(NeuralCleanse(), cost_from_start=True)
    costs = [cost for cost, _ in prices(CostSchedule(2, settings), *[0.9] * 5, 1.0, *[0.9] * 4)]
    assert costs[:4] == [1e-3] * 4
    assert costs[4:] == pytest.approx([1e-3 / 2**1.5] * 6)  # the success broke the row


def test_every_class_has_a_price_of_its_own():
    costs = prices(CostSchedule(2, NeuralCleanse()), *[(1.0, 0.5)] * 9)
    assert costs[-1] == [2e-3, 0]


def test_a_class_is_done_when_its_price_moved_both_ways_and_its_norm_stands_still():
    settings = replace(NeuralCleanse(), patience=1, early_stop_patience=3, cost_from_start=True)
    schedule = CostSchedule(2, settings)
    good, bad = torch.ones(2).double(), torch.zeros(2).double()
    steps = [(good, 5.0), (bad, 4.0), (good, 6.0), (good, (5.0, 4.5)), (bad, 1.0), (bad, 1.0), (bad, 1.0)]
    seen = [schedule.update(success, torch.tensor(norm).double().expand(2)) for success, norm in steps]
    assert [improved.tolist() for improved, _ in seen[:4]] == [
        [True] * 2,
        [False] * 2,
        [False] * 2,
        [False, True],
    ]
    assert [done.tolist() for _, done in seen] == [[False, False]] * 3 + [[True, False]] * 3 + [[True, True]]


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["neural-cleanse", "neural-cleanse-l2"])
def test_all_classes_at_once_find_what_one_after_the_other_finds(twin, trained, digits, preset):
    model, images = trained["infected"].model, digits.pixels()[:100]
    settings = replace(NEURAL_CLEANSE[preset], steps=14, samples_per_step=64, batch_size=16, patience=1)
    settings = replace(settings, early_stop=True, early_stop_patience=2, success=0.8, precision="fp32")
    targets = (0, TARGET, 5, 8)
    found = invert(model, images, settings, seed=3, targets=targets)
    slow = twin.class_by_class(model, images, settings, 3, targets)
    assert found.steps.tolist() == [each.steps for each in slow]
    assert len(set(found.steps.tolist())) > 1  # or no class would have left the batch early
    # Adam moves a pixel whose gradient is rounding error by a whole step: on some processors a few do
    for fast, of_class in ((found.masks, "mask"), (found.patterns, "pattern")):
        apart = (fast - torch.stack([getattr(each, of_class) for each in slow])).abs()
        assert apart.mean() < 2e-3 and apart.max() < 0.1
    assert found.reached.tolist() == pytest.approx([each.reached for each in slow])


def test_what_a_class_finds_does_not_depend_on_the_others(trained, digits):
    model, images = trained["infected"].model, digits.pixels()[:100]
    settings = replace(SHORTER, precision="fp32", steps=6)
    alone, all_of_them = (invert(model, images, settings, 0, targets=targets) for targets in ([TARGET], None))
    assert alone.norms[0] == pytest.approx(float(all_of_them.norms[TARGET]), rel=1e-3)


def test_a_class_that_stopped_leaves_the_batch(trained, digits):
    model, sizes, active = trained["infected"].model, [], []
    settings = replace(SHORTER, steps=40, success=0.5, patience=1, early_stop_patience=3)
    handle = model.network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    invert(model, digits.pixels(), settings, 0, on_step=lambda done, left: active.append(left))
    handle.remove()
    searched = [10, *active[:-1]]
    assert active[-1] == 0
    assert len(active) < 40
    assert sizes[1:] == [32 * left for left in searched for _ in range(2)]  # the first measures memory


# --- the verdict --------------------------------------------------------------------------------------------


def test_an_infected_model_is_flagged_with_its_target_and_trigger(of_the_infected, infected):
    result = of_the_infected
    assert (result.verdict, result.target) == (Verdict.INFECTED, TARGET)
    assert result.score == max(result.class_scores) > 2
    images = plain_images(infected, 60)[30:]
    trigger = result.triggers[TARGET]
    assert trigger.flip_rate >= 0.9
    assert (infected(trigger(images, torch.Generator())).argmax(1) == TARGET).float().mean() > 0.9
    mask = trigger.mask[0]
    assert mask[:3, :3].sum() > 0.5 * mask.sum()  # it is where the planted one is


def test_a_benign_model_shows_no_sign(benign):
    result = SHORT.scan(benign, clean_images(benign))
    assert (result.verdict, result.target) == (Verdict.NO_SIGN_FOUND, None)
    assert 0 <= result.score <= 2
    assert list(result.triggers) == [max(range(10), key=lambda label: result.class_scores[label])]


def test_the_trained_infected_digits_are_told_from_the_benign_ones(trained, digits):
    found = {name: SHORT.scan(victim.model, digits) for name, victim in trained.items()}
    assert (found["infected"].verdict, found["infected"].target) == (Verdict.INFECTED, TARGET)
    assert found["benign"].verdict is Verdict.NO_SIGN_FOUND


def test_the_l2_preset_never_stops_early_and_flags_the_planted_target(infected):
    preset = NEURAL_CLEANSE["neural-cleanse-l2"]
    preset = replace(preset, batch_size=32, learning_rate=0.2, patience=2)
    result = replace(preset, steps=30, samples_per_step=64).scan(infected, clean_images(infected))
    assert (result.verdict, result.target) == (Verdict.INFECTED, TARGET)
    assert set(result.facts["steps of each class"]) == {30}
    first = invert(infected, plain_images(infected, 64), replace(preset, steps=1, samples_per_step=32), 0)
    assert first.masks.min() > 0.8  # after one update; it starts at (tanh 1 + 1) / 2 = 0.88 everywhere


def test_labels_make_no_difference(infected, of_the_infected):
    clean = clean_images(infected)
    labelled = replace(clean, labels=torch.arange(len(clean)) % 10)
    assert SHORT.scan(infected, labelled).class_scores == of_the_infected.class_scores


def test_the_same_seed_gives_the_same_result_and_another_seed_another(infected, of_the_infected):
    clean = clean_images(infected)
    assert SHORT.scan(infected, clean).class_scores == of_the_infected.class_scores
    assert replace(SHORT, seed=1).scan(infected, clean).class_scores != of_the_infected.class_scores


def test_several_repeats_are_decided_by_their_median(infected):
    result = replace(SHORTER, repeats=3).scan(infected, clean_images(infected))
    indices = result.facts["index of each repeat"]
    assert len(set(indices)) == 3
    assert result.score == sorted(indices)[1]
    assert result.facts["spread of the index"] == pytest.approx(max(indices) - min(indices))


def test_a_scan_shows_the_triggers_the_norms_and_stamped_images(of_the_infected):
    grids = [exhibit for exhibit in of_the_infected.exhibits if isinstance(exhibit, ImageGrid)]
    (bars,) = (exhibit for exhibit in of_the_infected.exhibits if isinstance(exhibit, Bars))
    assert bars.marked == (TARGET,)
    assert bars.values[TARGET] < bars.threshold < min(bars.values[:TARGET])
    assert [len(grid.images) for grid in grids] == [10, 10, 20]
    assert set(grids[2].captions[10:]) == {f"as class {TARGET}"}


def test_progress_is_told_step_by_step(infected):
    told = []
    replace(SHORTER, steps=3, repeats=2).scan(
        infected, clean_images(infected), on_step=lambda *heard: told.append(heard)
    )
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1][1:] == (6, "repeat 2 of 2, 10 of 10 classes still searched")


def test_a_scan_leaves_the_model_as_found(trained, digits):
    model = trained["infected"].model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    replace(SHORTER, steps=2, precision="bf16").scan(model, digits)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.eval()


# --- what it cannot judge -----------------------------------------------------------------------------------


def test_below_eight_classes_it_is_undecided_but_shows_what_it_found():
    model = template_victim(classes=6, strength=20)
    result = SHORTER.scan(model, clean_images(model))
    assert (result.verdict, result.target) == (Verdict.UNDECIDED, None)
    assert "6 classes" in result.reason
    assert len(result.facts["norm of each mask"]) == 6
    assert TARGET in result.triggers


def test_without_clean_images_it_is_undecided(infected):
    result = NeuralCleanse().scan(infected)
    assert result.verdict is Verdict.UNDECIDED
    assert "--clean" in result.reason


class Constant(nn.Module):
    """Logits that no image changes."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(10)
        bias[0] = self.value
        return bias + 0 * images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(("value", "words"), [(5.0, "1 of 10 classes"), (math.nan, "not finite")])
def test_a_model_that_answers_no_image_is_undecided(value, words):
    names = [str(each) for each in range(10)]
    model = Classifier(Constant(value), image_shape=(1, 12, 12), class_names=names)
    clean = Dataset(torch.randint(256, (40, 1, 12, 12), dtype=torch.uint8), None, ())
    result = replace(SHORTER, steps=2).scan(model, clean)
    assert result.verdict is Verdict.UNDECIDED
    assert words in result.reason


def test_clean_images_that_do_not_fit_are_refused_with_a_remedy(infected):
    clean = clean_images(infected)
    with pytest.raises(ValueError, match="resize or convert"):
        SHORTER.scan(infected, replace(clean, images=clean.images[:, :, :8]))
    with pytest.raises(ValueError, match="19 clean images: give at least 20"):
        SHORTER.scan(infected, clean[:19])
    wrong = replace(clean, labels=(torch.arange(len(clean)) + 1) % 10)
    with pytest.raises(ValueError, match="the classes are numbered otherwise"):
        SHORTER.scan(infected, wrong)


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"success": 0.0}, {"multiplier": 1.0}, {"cost": 0.0}, {"norm": "l3"}, {"start": "zeros"}],
)
def test_settings_that_cannot_work_are_refused(infected, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        replace(SHORTER, **options).scan(infected, clean_images(infected))


def test_the_planted_trigger_itself_works(infected):
    images = plain_images(infected, 30)
    assert (infected(stamped(images)).argmax(1) == TARGET).all()
    assert (infected(images).argmax(1) == torch.arange(30) % 10).all()
