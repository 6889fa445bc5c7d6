"""Input filters: their terms by hand, what they take away, what they leave alone, and what is on disk."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import TARGET, plain_images, stamped, template_victim
from unhorse.core import Classifier, Dataset
from unhorse.filters.adversarial_filter import AdversarialFilter, TriggerGenerator, norms, projected
from unhorse.filters.fitting import FilterEpoch, label_share, play, stalled
from unhorse.filters.input_filter import PurifyingFilter, distance, divergence
from unhorse.filters.networks import FILTER_NETWORKS, build_filter
from unhorse.filters.registry import NETWORK_FILTERS, filter_name, load_filter, save_filter

SHAPE = (1, 8, 8)
KINDS = ("vif", "aif")


def clean_images(model: Classifier, count: int) -> Dataset:
    images = (plain_images(model, count) * 255).round().to(torch.uint8)
    return Dataset(images, torch.arange(count) % model.num_classes, model.class_names, "plain")


@pytest.fixture(scope="module")
def victim() -> Classifier:
    return template_victim(6, SHAPE, strength=20)


@pytest.fixture(scope="module")
def clean(victim) -> Dataset:
    return clean_images(victim, 60)


@pytest.fixture(scope="module")
def fitted(victim) -> dict:
    """One filter of each name after at most 40 steps, its trial included."""
    data = clean_images(victim, 160)
    options = {"batch_size": 40, "learning_rate": 5e-3}
    made = {name: short(name, epochs=6, **options) for name in NETWORK_FILTERS if name != "vif-selected"}
    made["vif-selected"] = short("vif-selected", epochs=4, tolerance=1.0, **options)
    return {name: one.fit(victim, data) for name, one in made.items()}


def short(name: str, **options):
    """A fit of a few steps."""
    return NETWORK_FILTERS[name](
        **{"epochs": 3, "batch_size": 20, "held_out": 0.0, "precision": "fp32", **options}
    )


def weights(one) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in one.network_.state_dict().values()])


def share(model: Classifier, images: Tensor, wanted: Tensor | int) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == wanted).float().mean())


class Watched(nn.Module):
    """A network that keeps what it is given: to be learned from, and to be judged only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.learned: list[Tensor] = []
        self.judged: list[Tensor] = []

    def forward(self, images):
        (self.learned if torch.is_grad_enabled() else self.judged).append(images.detach())
        return self.network(images)


def watched(model: Classifier) -> Classifier:
    return Classifier(Watched(model.network), image_shape=SHAPE, class_names=model.class_names)


# --- networks


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 36433), ("small", 927331), ("base", 6063299)])
def test_networks_have_the_sizes_that_the_tables_name(size, parameters):
    shape = (1, 28, 28) if size == "tiny" else (3, 32, 32)
    with torch.device("meta"):
        network = build_filter(size, shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (2, 4, 4)])
def test_a_network_keeps_shape_and_range_of_any_image(size, shape):
    network = build_filter(size, shape)
    mean, log_variance = network.encode(torch.rand(3, *shape))
    cells = (3, FILTER_NETWORKS[size].latent, -(-shape[1] // 4), -(-shape[2] // 4))
    assert mean.shape == log_variance.shape == cells
    images = network.decode(100 * mean)
    assert images.shape == (3, *shape)
    assert images.min() >= 0 and images.max() <= 1


def test_all_that_reaches_the_output_passes_the_mean_of_the_latent():
    network = build_filter("tiny", SHAPE).eval()
    images = torch.rand(2, *SHAPE)
    assert torch.equal(network(images), network.decode(network.encode(images)[0]))
    nn.init.zeros_(network.to_latent.weight)
    first, second = network(images)
    assert torch.equal(first, second)


def test_the_log_variance_is_bounded():
    network = build_filter("tiny", SHAPE).eval()
    nn.init.constant_(network.to_latent.bias, 50.0)
    assert network.encode(torch.rand(2, *SHAPE))[1].eq(8).all()


@pytest.mark.parametrize(("side", "size"), [(28, "tiny"), (31, "tiny"), (32, "small")])
def test_auto_takes_the_tiny_network_below_32_pixels(side, size):
    with torch.device("meta"):
        kinds = [str(build_filter(name, (1, side, side))) for name in ("auto", size)]
    assert kinds[0] == kinds[1]


# --- terms


def test_the_distance_is_euclidean_over_channels_and_pixels_and_not_squared():
    images = torch.zeros(2, 2, 3, 3)
    moved = images.clone()
    moved[0, 0, 0, 0], moved[0, 1, 2, 2], moved[1, 0, 1, 1] = 3, 4, 1
    assert distance(moved, images).tolist() == [5, 1]


def test_the_distance_of_equal_images_has_a_gradient():
    images = torch.zeros(1, 1, 2, 2, requires_grad=True)
    distance(images, torch.zeros(1, 1, 2, 2)).sum().backward()
    assert images.grad is not None and images.grad.eq(0).all()


def test_the_divergence_is_that_of_normal_distributions_summed_over_the_latent():
    mean, log_variance = torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)
    mean[1, 0, 0, 0], mean[1, 1, 1, 1] = 1, 2
    log_variance[2] = 1.0
    other = torch.distributions.kl_divergence(
        torch.distributions.Normal(0, torch.tensor(1.0).exp().sqrt()), torch.distributions.Normal(0, 1)
    )
    assert divergence(mean, log_variance).tolist() == pytest.approx([0, 2.5, 8 * float(other)])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ip", {"reconstruction_weight": 2.0}, {"reconstruction": 2.0}),
        ("if", {}, {"reconstruction": 1.0, "label": 1.0}),
        ("vif", {"label_weight": 3.0}, {"reconstruction": 1.0, "label": 3.0, "divergence": 0.003}),
        (
            "aif",
            {"label_weight": 2.0, "reconstruction_weight": 3.0, "robust_label_weight": 4.0},
            {"label": 2.0, "reconstruction": 3.0, "robust_label": 4.0, "robust_reconstruction": 3.0},
        ),
        (
            "aif",
            {"robust_reconstruction_weight": 0.5},
            {"label": 1.0, "reconstruction": 1.0, "robust_label": 1.0, "robust_reconstruction": 0.5},
        ),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(victim, clean, name, options, expected):
    entry = short(name, warm_up=0.0, **options).fit(victim, clean).log_[0]
    assert entry.loss == pytest.approx(sum(weight * entry.terms[term] for term, weight in expected.items()))
    assert expected.keys() == entry.terms.keys() - {"attack", "filtered_attack", "mask_norm"}


def test_the_label_term_waits_until_reconstruction_is_under_way(victim, clean):
    assert [label_share(done, 0.1) for done in (0, 0.1, 0.15, 0.2, 1)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert label_share(0, 0) == 1
    log = short("if", epochs=10, batch_size=60).fit(victim, clean).log_
    assert log[0].loss == pytest.approx(log[0].terms["reconstruction"])
    assert log[2].loss == pytest.approx(log[2].terms["reconstruction"] + log[2].terms["label"])


# --- the triggers that AIF learns from


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_is_scaled_down_to_the_bound_and_never_up(channels):
    masks = torch.rand(2, channels, 8, 8)
    masks[1] *= 0.01
    bound = float(norms(masks)[0]) / 2
    within = projected(masks, bound)
    assert norms(within)[0].item() == pytest.approx(bound)
    torch.testing.assert_close(within[0], masks[0] / 2)
    torch.testing.assert_close(within[1], masks[1])


def test_the_norm_of_a_mask_counts_pixels_and_not_channels():
    opaque = torch.zeros(1, 1, 8, 8)
    opaque[:, :, :5, :5] = 1
    assert norms(opaque).item() == pytest.approx(5)
    assert norms(opaque.expand(1, 3, 8, 8)).item() == pytest.approx(5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14), (3, 64, 64)])
def test_the_generator_draws_masks_within_the_bound(shape):
    generator = TriggerGenerator(AdversarialFilter(), shape, classes=4)
    masks, patterns = generator(torch.randn(5, 64), torch.tensor([0, 1, 2, 3, 3]))
    assert masks.shape == (5, 1, *shape[1:]) and patterns.shape == (5, *shape)
    assert norms(masks).max() <= 0.2 * (shape[1] * shape[2]) ** 0.5 + 1e-5
    assert not torch.equal(patterns[0], patterns[1])


@pytest.mark.parametrize("mask_channels", [1, 3])
def test_without_normalisation_only_the_hinge_bounds_a_mask(mask_channels):
    settings = AdversarialFilter(normalise_mask=False, mask_channels=mask_channels, mask_norm=0.5)
    masks, _ = TriggerGenerator(settings, (3, 8, 8), 2)(torch.randn(4, 64), torch.zeros(4).long())
    assert masks.shape[1] == mask_channels
    assert norms(masks).min() > 0.5


def test_the_hinge_pulls_masks_that_are_not_normalised(victim, clean):
    free = {"normalise_mask": False, "mask_norm": 0.5, "learning_rate": 1e-2, "epochs": 8, "batch_size": 60}
    heights = [
        short("aif", hinge_weight=weight, **free).fit(victim, clean).log_[-1].terms["mask_norm"]
        for weight in (0.0, 10.0)
    ]
    assert heights[1] < 0.7 * heights[0]


def test_the_generator_learns_to_turn_the_classifier_to_every_class(victim, clean):
    options = {"mask_norm": 6.0, "learning_rate": 1e-2, "epochs": 13}
    generator = short("aif", **options).fit(victim, clean).generator_
    images, rng = clean.pixels(), torch.Generator().manual_seed(0)
    for target in range(6):
        masks, patterns = generator(torch.randn(60, 64, generator=rng), torch.full((60,), target))
        assert share(victim, images + masks * (patterns - images), target) >= 0.9


def test_the_filter_learns_to_undo_what_the_generator_stamps(fitted):
    log = fitted["aif"].log_
    assert log[-1].terms["robust_label"] < 0.1
    assert log[-1].terms["robust_reconstruction"] < 0.6 * log[0].terms["robust_reconstruction"]


def test_a_stamped_image_is_compared_with_the_clean_one_and_its_class(victim, clean):
    model = watched(victim)
    one = clean[torch.zeros(20, dtype=torch.long)]  # twenty times the same image, in one step
    terms = short("aif", epochs=1, warm_up=0.0).fit(model, one).log_[0].terms
    (stamped_images, _), (plain, cured) = (images.split(20) for images in model.network.learned)
    assert distance(stamped_images, one.pixels()).min() > 0.1
    assert not torch.allclose(plain, cured)
    for name, images in (("", plain), ("robust_", cured)):
        expected = distance(images, one.pixels()).mean().item()
        assert terms[name + "reconstruction"] == pytest.approx(expected, rel=1e-4)
        expected = nn.functional.cross_entropy(victim(images), one.labels).item()
        assert terms[name + "label"] == pytest.approx(expected, rel=1e-4)


def test_the_generators_step_leaves_the_filters_statistics_alone(victim, clean):
    network = short("aif").fit(victim, clean).network_
    counts = {int(value) for name, value in network.state_dict().items() if "num_batches" in name}
    assert counts == {9}


@pytest.mark.parametrize(("stamped_share", "expected"), [(1.0, [40, 40]), (0.25, [10, 25])])
def test_the_classifier_sees_stamped_and_filtered_images_once_per_step(
    victim, clean, stamped_share, expected
):
    model = watched(victim)
    short("aif", epochs=1, stamped_share=stamped_share).fit(model, clean)
    assert [len(images) for images in model.network.learned] == 3 * expected


# --- what a filter does


@pytest.mark.parametrize("name", NETWORK_FILTERS)
def test_a_filter_returns_images_and_learns(fitted, victim, name):
    images = torch.rand(4, *SHAPE)
    purified = fitted[name](images)
    assert purified.shape == images.shape and purified.dtype == images.dtype
    assert purified.min() >= 0 and purified.max() <= 1
    log = fitted[name].log_
    assert log[-1].terms["reconstruction"] < 0.95 * log[0].terms["reconstruction"]


@pytest.mark.parametrize("name", ["if", "vif", "aif", "denoise"])
def test_a_filter_takes_the_planted_trigger_away_and_keeps_the_class(fitted, victim, name):
    data = clean_images(victim, 120)
    images, labels = data.pixels(), data.labels
    assert share(victim, stamped(images), TARGET) == 1
    assert share(victim, fitted[name](stamped(images)), labels) >= 0.99
    assert share(victim, fitted[name](images), labels) >= 0.99


@pytest.mark.parametrize("samples", [0, 3])
def test_the_same_image_is_purified_alike_in_every_batch(fitted, samples):
    one = replace(fitted["vif"], test_samples=samples)
    one.network_ = fitted["vif"].network_
    images = torch.rand(5, *SHAPE)
    torch.testing.assert_close(one(images)[2:3], one(images[2:3]))


def test_averaged_samples_differ_from_the_decoded_mean(fitted):
    one = replace(fitted["vif"], test_samples=8)
    one.network_ = fitted["vif"].network_
    images = torch.rand(5, *SHAPE)
    difference = (one(images) - fitted["vif"](images)).abs().mean()
    assert 1e-4 < difference < 0.1


def test_an_image_has_a_gradient_through_the_filter_and_a_weight_has_none(fitted):
    images = torch.rand(2, *SHAPE, requires_grad=True)
    fitted["vif"](images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in fitted["vif"].network_.parameters())


def test_a_variational_filter_samples_its_latent_where_others_do_not(victim, clean):
    plain, sampled = (
        weights(short(name, **options).fit(victim, clean))
        for name, options in (("if", {}), ("vif", {"kl_weight": 1e-30}))
    )
    assert not torch.allclose(plain, sampled, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_lower_precision_purifies_alike(victim, clean, name):
    full, low = (short(name, precision=one).fit(victim, clean) for one in ("fp32", "bf16"))
    assert (full(clean.pixels()) - low(clean.pixels())).abs().mean() < 0.02


def test_augmentation_changes_what_is_fitted_on(victim, clean):
    plain = weights(short("if").fit(victim, clean))
    for option in ({"crop": 1}, {"flip": True}, {"rotation": 10.0}):
        assert not torch.equal(weights(short("if", **option).fit(victim, clean)), plain)


def test_images_without_labels_get_the_models_own(victim, clean):
    predicted = victim(clean.pixels()).argmax(1)
    other = replace(clean, labels=predicted.detach())
    unlabelled = replace(clean, labels=None)
    assert torch.equal(
        weights(short("vif").fit(victim, unlabelled)), weights(short("vif").fit(victim, other))
    )


# --- what it leaves alone


@pytest.mark.parametrize("name", [*KINDS, "vif-selected"])
def test_fitting_leaves_the_classifier_as_found(clean, name):
    model = template_victim(6, SHAPE, strength=20)
    model.network = nn.Sequential(model.network, nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    model.eval()
    model.network[1].train()
    model.network[0].templates.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    short(name).fit(model, clean)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [False, False, False, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_decides_every_weight_and_global_randomness_is_kept(victim, clean, name):
    state = torch.random.get_rng_state()
    first, again, other = (weights(short(name, seed=seed).fit(victim, clean)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- stopping


def epochs(*held_out: float | None) -> list[FilterEpoch]:
    return [FilterEpoch(index, 9, 0.0, {}, value) for index, value in enumerate(held_out)]


def test_a_fit_has_stalled_when_the_clean_objective_stays_above_its_lowest():
    assert stalled(epochs(3.0, 2.0, 2.5, 2.0), patience=2)
    assert not stalled(epochs(3.0, 2.0, 2.5, 1.9), patience=2)
    assert not stalled(epochs(None, None, None), patience=1)
    assert not stalled([], patience=1)


class Scripted:
    """A game that learns nothing: its clean objective is always the same."""

    label_share = 1.0
    device = torch.device("cpu")
    networks: dict = {}
    optimizers: list = []

    def step(self, images, labels, rng):
        return {"loss": torch.zeros(())}

    def objective(self, images, labels):
        return torch.ones(())


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"warm_up": 0.0}, 4), ({"warm_up": 0.25}, 14), ({"held_out": 0.0}, 20), ({"patience": 99}, 20)],
)
def test_a_fit_stops_when_it_stalls_and_not_while_it_warms_up(clean, options, expected):
    settings = PurifyingFilter(**{"epochs": 20, "patience": 3, **options})
    assert len(play(Scripted(), clean, settings)) == expected


def test_the_held_out_share_is_not_fitted_on(victim, clean):
    model = watched(victim)
    entry = short("if", epochs=1, held_out=0.25).fit(model, clean).log_[0]
    assert sum(len(images) for images in model.network.learned) == 45
    assert entry.held_out is not None and entry.held_out > 0


# --- the choice of the KL weight


def test_the_largest_kl_weight_within_the_tolerance_is_taken_and_refitted_on_all(victim, clean):
    options = {"kl_candidates": (0.001, 0.3, 0.03)}
    lenient = short("vif-selected", tolerance=1.0, **options).fit(victim, clean)
    assert lenient.kl_weight_ == 0.3 and len(lenient.trials_) == 1
    assert torch.equal(weights(lenient), weights(short("vif", kl_weight=0.3).fit(victim, clean)))
    strict = short("vif-selected", tolerance=-2.0, **options).fit(victim, clean)
    assert [trial.kl_weight for trial in strict.trials_] == [0.3, 0.03, 0.001]
    assert strict.kl_weight_ == 0.001


def test_a_kl_weight_that_collapses_the_latent_costs_the_clean_accuracy(victim, clean):
    trial = short("vif-selected", kl_candidates=(1e3,), epochs=8).fit(victim, clean).trials_[0]
    assert 0.5 < trial.clean_drop <= 1


def test_a_trial_is_fitted_on_four_fifths_and_judged_on_the_rest(victim, clean):
    model = watched(victim)
    short("vif-selected", kl_candidates=(0.1,), epochs=1).fit(model, clean)
    assert sum(len(images) for images in model.network.learned) == 48 + 60  # the trial, then the fit
    assert [len(images) for images in model.network.judged] == [12, 12]  # without and with the filter


# --- resuming


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "after"), [("vif", 2), ("aif", 2), ("vif-selected", 1), ("vif-selected", 6)]
)
def test_a_killed_fit_goes_on_after_its_last_whole_epoch(victim, clean, tmp_path, name, after):
    options = {"crop": 1, "held_out": 0.1}
    if name == "vif-selected":
        options |= {"kl_candidates": (0.03, 0.003), "tolerance": -2.0, "epochs": 2}
    path, reports = tmp_path / "fit.pt", []

    def kill(entry):
        reports.append(entry)
        if len(reports) == after:
            raise Killed

    with pytest.raises(Killed):
        short(name, **options).fit(victim, clean, checkpoint=path, on_epoch=kill)
    resumed = short(name, **options).fit(victim, clean, checkpoint=path, on_epoch=reports.append)
    whole = short(name, **options).fit(victim, clean)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.log_ == whole.log_
    stages = [(entry.stage, entry.epoch) for entry in reports]
    assert len(stages) == len(set(stages)) + 1  # the epoch that was killed before it was stored
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_fit_is_refused(victim, clean, tmp_path):
    path = tmp_path / "fit.pt"

    def kill(entry):
        if entry.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        short("vif").fit(victim, clean, checkpoint=path, on_epoch=kill)
    with pytest.raises(ValueError, match="delete it"):
        short("vif", seed=1).fit(victim, clean, checkpoint=path)


def test_progress_names_epoch_and_loss(victim, clean):
    reports: list[FilterEpoch] = []
    one = short("vif").fit(victim, clean, on_epoch=reports.append)
    assert [(entry.epoch, entry.epochs) for entry in reports] == [(0, 3), (1, 3), (2, 3)]
    assert one.log_ == reports


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: replace(data, images=data.images[:, :, :4]), "resize or convert"),
        (lambda data: replace(data, images=data.images.expand(-1, 3, -1, -1)), "resize or convert"),
        (lambda data: replace(data, images=data.images.float()), "uint8"),
        (lambda data: data[:19], "at least 20"),
        (lambda data: replace(data, labels=data.labels + 1), "from 0 to 5"),
        (lambda data: replace(data, labels=data.labels - 1), "from 0 to 5"),
        (lambda data: replace(data, class_names=data.class_names[:5]), "5 classes, the model 6"),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_unusable_images_are_refused_with_the_remedy(victim, clean, name, change, message):
    with pytest.raises(ValueError, match=message):
        short(name).fit(victim, change(clean))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "huge"}, "take auto, tiny, small, base"),
        ({"precision": "fp16"}, "auto, fp32 or bf16"),
        ({"epochs": 0}, "at least 1 epoch"),
        ({"batch_size": 1}, "batch_size of 2"),
        ({"held_out": 1.0}, "held_out below 1"),
        ({"warm_up": 0.6}, "from 0 to 0.5"),
        ({"mask_channels": 2}, "give 1 or"),
        ({"stamped_share": 0.0}, "a share above 0"),
    ],
)
def test_impossible_options_are_refused_with_the_remedy(victim, clean, options, message):
    with pytest.raises(ValueError, match=message):
        short("aif", **options).fit(victim, clean)


@pytest.mark.parametrize("count", [20, 21])
def test_the_smallest_sets_can_be_fitted_on(victim, clean, count):
    assert len(short("vif", batch_size=2, epochs=1).fit(victim, clean[:count]).log_) == 1


# --- the registry, and a filter on disk


@pytest.mark.parametrize("name", NETWORK_FILTERS)
def test_a_filter_knows_its_name(name):
    assert filter_name(NETWORK_FILTERS[name]()) == name


@pytest.mark.parametrize("name", NETWORK_FILTERS)
def test_a_saved_filter_comes_back(fitted, tmp_path, name):
    path = save_filter(fitted[name], tmp_path / "filter.safetensors")
    loaded, images = load_filter(path), torch.rand(3, *SHAPE)
    assert loaded == fitted[name]
    assert not loaded.network_.training
    assert torch.equal(loaded(images), fitted[name](images))
    assert getattr(loaded, "kl_weight_", None) == getattr(fitted[name], "kl_weight_", None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["filter.safetensors"]


def test_an_unfitted_or_foreign_filter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="fit()"):
        save_filter(PurifyingFilter(), tmp_path / "filter.safetensors")
    with pytest.raises(ValueError, match="take one of ip, if, vif"):
        save_filter(nn.Identity(), tmp_path / "filter.safetensors")


def test_a_file_that_is_no_filter_is_refused(fitted, tmp_path):
    with pytest.raises(ValueError, match="no filter at"):
        load_filter(tmp_path / "missing")
    path = save_filter(fitted["vif"], tmp_path / "filter.safetensors")
    content = path.read_bytes()
    broken = {
        "short": content[:-10],
        "network": content.replace(b'\\"network\\": \\"auto\\"', b'\\"network\\": \\"none\\"'),
        "option": content.replace(b"held_out", b"held_ouT"),
        "format": content.replace(b"unhorse-filter-1", b"unhorse-filter-9"),
        "shape": content.replace(b"[1, 8, 8]", b"[3, 8, 8]"),
    }
    for name, changed in broken.items():
        assert changed != content, name
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="fit and save it again"):
            load_filter(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="fit and save it again"):
        load_filter(path)
