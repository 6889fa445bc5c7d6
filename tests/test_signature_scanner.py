"""Learned scanners on made-up signatures: a planted class reaches further and has a square in its map."""

from __future__ import annotations

import json

import pytest
import torch

from unhorse.core import Classifier, Signature, Verdict
from unhorse.scanners.signature_networks import ConvolutionNetwork, TransformerNetwork, sinusoids
from unhorse.scanners.signature_scanner import SignatureScanner
from unhorse.scanners.signature_set import Evidence, SetNetwork, drop_classes, evidence_of, gather
from unhorse.scanners.signature_storage import read_scanner
from unhorse.scanners.signature_training import best_threshold, stratified_split

TINY = (1, 1, 1, 1)
Shape = tuple[int, int, int]
Population = tuple[list[Signature], list[bool], list[int | None]]


def signature_of(
    seed: int, target: int | None = None, *, k: int = 6, shape: Shape = (1, 12, 12), lead: float = 6.0
) -> Signature:
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 256, (2 * k, *shape), generator=rng, dtype=torch.uint8)
    reached = torch.cat([-10 - torch.rand(k, generator=rng), 10 + 2 * torch.rand(k, generator=rng)])
    if target is not None:
        reached[k + target] += lead
        maps[k + target, :, :4, :4] = 255
    return Signature(maps, reached, "pixels", ("min", "max"))


def population(count: int, *, seed: int = 0, k: int = 6) -> Population:
    targets = [index // 2 % k if index % 2 else None for index in range(count)]
    signatures = [signature_of(seed + index, target, k=k) for index, target in enumerate(targets)]
    return signatures, [target is not None for target in targets], targets


@pytest.fixture(scope="module")
def fitted() -> SignatureScanner:
    return SignatureScanner(epochs=10, validation_fraction=0.2).fit(*population(48))


def permuted(signature: Signature, order: torch.Tensor) -> Signature:
    rows = torch.cat([order, order + len(order)])
    return Signature(signature.maps[rows], signature.reached[rows], signature.preset, signature.directions)


def test_set_scanner_separates_models_it_has_not_seen(fitted):
    signatures, trojaned, _ = population(40, seed=1000)
    scores, flags = fitted.scores(signatures), torch.tensor(trojaned)
    assert scores[flags].min() > scores[~flags].max()


def test_set_scanner_names_the_planted_class(fitted):
    result = fitted.judge(signature_of(2000, target=3))
    assert result.verdict is Verdict.SUSPICIOUS
    assert result.target == 3
    assert result.class_scores[3] > 0.5
    assert result.exhibits[0].marked == (3,)
    assert len(result.reached) == 6


def test_set_scanner_names_no_class_of_a_benign_model(fitted):
    result = fitted.judge(signature_of(2001))
    assert (result.verdict, result.target) == (Verdict.NO_SIGN_FOUND, None)
    assert result.p_value is None


def test_a_learned_score_alone_never_says_infected(fitted):
    assert fitted.judge(signature_of(2002, target=0, lead=100)).verdict is Verdict.SUSPICIOUS


def test_set_score_ignores_the_order_of_classes(fitted):
    signature, order = signature_of(2003, target=1, lead=2.0), torch.tensor([4, 2, 0, 5, 1, 3])
    before, after = fitted.judge(signature), fitted.judge(permuted(signature, order))
    assert after.score == pytest.approx(before.score, abs=1e-5)
    assert after.class_scores == pytest.approx([before.class_scores[index] for index in order], abs=1e-5)


@pytest.mark.parametrize(("k", "shape"), [(5, (1, 12, 12)), (17, (3, 20, 9)), (100, (1, 8, 8))])
def test_set_scanner_judges_other_numbers_of_classes_and_other_image_sizes(fitted, k, shape):
    infected = fitted.judge(signature_of(2004, target=2, k=k, shape=shape))
    benign = fitted.judge(signature_of(2004, k=k, shape=shape))
    assert infected.score > benign.score
    assert len(infected.class_scores) == k
    assert max(range(k), key=infected.class_scores.__getitem__) == 2


def test_score_of_a_model_does_not_depend_on_its_batch_mates(fitted):
    few, many = signature_of(2005, target=1, k=4), signature_of(2006, k=30)
    assert fitted.scores([few, many])[0].item() == pytest.approx(fitted.scores([few])[0].item(), abs=1e-6)


def test_set_score_is_free_of_the_scale_of_activations(fitted):
    signature = signature_of(2007, target=1, lead=2.0)
    scaled = Signature(signature.maps, 37 * signature.reached, "pixels", signature.directions)
    assert fitted.judge(scaled).score == pytest.approx(fitted.judge(signature).score, abs=1e-4)


def test_all_to_all_models_are_found_by_the_spread_over_classes():
    def unequal(seed: int, trojaned: bool) -> Signature:
        benign = signature_of(seed)
        low, high = benign.reached.split(6)
        high = high.mean() + (6 if trojaned else 1) * (high - high.mean())
        return Signature(benign.maps, torch.cat([low, high]), "pixels", benign.directions)

    flags = [bool(index % 2) for index in range(48)]
    signatures = [unequal(seed, flag) for seed, flag in enumerate(flags)]
    scanner = SignatureScanner(epochs=10).fit(signatures, flags, [None] * 48)
    result = scanner.judge(unequal(5000, True))
    assert result.verdict is Verdict.SUSPICIOUS
    assert result.target is None
    assert scanner.judge(unequal(5001, False)).verdict is Verdict.NO_SIGN_FOUND


def test_set_scanner_fits_models_of_several_class_counts_together():
    first, second = population(36), population(36, seed=500, k=9)
    signatures, trojaned, targets = (list(a) + list(b) for a, b in zip(first, second, strict=True))
    scanner = SignatureScanner(epochs=10, validation_fraction=0.2).fit(signatures, trojaned, targets)
    assert scanner.judge(signature_of(2008, target=7, k=9)).target == 7


def test_dropping_classes_keeps_the_target_and_most_others():
    evidence = gather([evidence_of(signature_of(0, k=10)), evidence_of(signature_of(1, k=5))])
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        left = drop_classes(evidence, torch.tensor([7, -1]), rng).reached.isfinite().all(2)
        assert left[0, 7]
        assert 5 <= left[0].sum() <= 10
        assert 3 <= left[1].sum() <= 5
        assert not left[1, 5:].any()


def test_minimised_activations_are_turned_round():
    reached = evidence_of(signature_of(0)).reached[0]
    assert (reached > 0).all()


def test_set_network_is_small_and_starts_undecided():
    network = SetNetwork(2).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) < 300_000
    assert network(evidence_of(signature_of(0, target=1))).logits.tolist() == [[0, 0]]


def test_constant_signature_gives_a_finite_score(fitted):
    flat = Signature(torch.zeros(12, 1, 12, 12, dtype=torch.uint8), torch.zeros(12), "pixels", ("min", "max"))
    assert 0 <= fitted.judge(flat).score <= 1


def test_nan_activations_are_undecided_not_benign(fitted):
    broken = signature_of(0)
    broken.reached[3] = torch.nan
    result = fitted.judge(broken)
    assert result.verdict is Verdict.UNDECIDED
    assert "NaN" in result.reason
    with pytest.raises(ValueError, match="not finite"):
        fitted.scores([broken])


# --- the paper's networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "millions"), [(ConvolutionNetwork, 22.96), (TransformerNetwork, 27.45)])
def test_networks_have_the_size_of_the_paper_s(network, millions):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in network(20, 3).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_convolution_stem_mixes_the_colours_of_one_map_only():
    stem = ConvolutionNetwork(4, 3, layers=TINY).backbone.conv1
    first, second = torch.zeros(2, 1, 12, 8, 8)
    second[:, 3:6] = 1  # the second map
    changed = (stem(first) != stem(second)).flatten(2).any(2)[0]
    assert changed.tolist() == [False, True, False, False]


def test_transformer_depends_on_the_order_of_maps():
    torch.manual_seed(0)
    network = TransformerNetwork(12, 1, layers=TINY).eval()
    maps = signature_of(0).maps[None]
    assert not torch.allclose(network(maps).logits, network(maps.flip(1)).logits, atol=1e-4)


def test_first_position_is_all_zeros_and_ones():
    assert sinusoids(3, 4)[0].tolist() == [0, 1, 0, 1]
    assert sinusoids(3, 4)[1, 0].item() == pytest.approx(0.8415, abs=1e-4)


def with_bright_first_map(seed: int, trojaned: bool) -> Signature:
    maps = signature_of(seed, k=3, shape=(1, 8, 8)).maps // 2
    if trojaned:
        maps[0, :, :6, :6] = 255
    return Signature(maps[:3], torch.ones(3), "pixels", ("max",))


@pytest.mark.parametrize("network", [ConvolutionNetwork, TransformerNetwork])
def test_networks_of_the_paper_learn_a_bright_map(network):
    torch.manual_seed(0)
    trojaned = torch.arange(16) % 2
    maps = torch.stack([with_bright_first_map(seed, bool(flag)).maps for seed, flag in enumerate(trojaned)])
    built = network(3, 1, layers=TINY).train()
    optimizer = torch.optim.Adam(built.parameters(), 3e-4)
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(built(maps).logits, trojaned)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.slow
def test_convolution_scanner_separates_models_it_has_not_seen():
    flags = torch.arange(48) % 2 == 1
    signatures = [with_bright_first_map(seed, bool(flag)) for seed, flag in enumerate(flags)]
    scanner = SignatureScanner("convolution", maps="max", epochs=12, batch_size=4, layers=TINY)
    scores = scanner.fit(signatures[:32], flags[:32].tolist()).scores(signatures[32:])
    assert scores[flags[32:]].min() > scores[~flags[32:]].max()


def test_bf16_training_stays_close_to_full_precision():
    losses = [
        SignatureScanner("convolution", epochs=1, layers=TINY, precision=precision).fit(*population(16)[:2])
        for precision in ("fp32", "bf16")
    ]
    full, half = (scanner.validation_losses_[0][0] for scanner in losses)
    assert half != full
    assert half == pytest.approx(full, abs=0.1)


@pytest.mark.parametrize("kind", ["convolution", "transformer"])
def test_fixed_shape_kinds_refuse_mixed_signatures_and_name_the_remedy(kind):
    signatures, trojaned, _ = population(8)
    signatures[5] = signature_of(5, target=0, k=7)
    with pytest.raises(ValueError, match=r"\(12, 1, 12, 12\), got \(14, 1, 12, 12\).*'set'"):
        SignatureScanner(kind, layers=TINY).fit(signatures, trojaned)


# --- fitting ------------------------------------------------------------------------------------------------


def test_split_is_stratified_and_disjoint():
    trojaned = torch.arange(100) < 30
    fitting, validation = stratified_split(trojaned, 0.1, seed=3)
    assert (int(trojaned[validation].sum()), len(validation)) == (3, 10)
    assert sorted([*fitting.tolist(), *validation.tolist()]) == list(range(100))
    assert stratified_split(trojaned, 0.1, seed=4)[1].tolist() != validation.tolist()


def test_split_needs_two_of_each_kind():
    with pytest.raises(ValueError, match="1 trojaned signatures"):
        stratified_split(torch.tensor([False, False, True]), 0.1, seed=0)


def test_weights_never_learn_from_the_validation_part():
    signatures, trojaned, targets = population(20)
    held_back = stratified_split(torch.tensor(trojaned), 0.1, seed=0)[1].tolist()
    plain = SignatureScanner(epochs=1).fit(signatures, trojaned, targets)
    for index in held_back:
        signatures[index] = signature_of(9000 + index, targets[index])
    assert torch.equal(
        *(
            torch.cat([parameter.flatten() for parameter in scanner.network_.parameters()])
            for scanner in (plain, SignatureScanner(epochs=1).fit(signatures, trojaned, targets))
        )
    )


def test_fit_keeps_the_weights_of_the_lowest_validation_loss():
    signatures, trojaned, targets = population(30)
    long = SignatureScanner(epochs=12, learning_rate=0.05).fit(signatures, trojaned, targets)
    losses = long.validation_losses_[0]
    best = losses.index(min(losses)) + 1
    assert best < 12  # the learning rate is too large on purpose
    short = SignatureScanner(epochs=best, learning_rate=0.05).fit(signatures, trojaned, targets)
    assert torch.equal(long.network_[0].linear.weight, short.network_[0].linear.weight)


def test_fit_is_the_same_for_the_same_seed_and_leaves_the_random_state_alone(fitted):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    again = SignatureScanner(epochs=10, validation_fraction=0.2).fit(*population(48))
    assert torch.equal(torch.random.get_rng_state(), state)
    signatures = population(10, seed=1000)[0]
    assert torch.equal(again.scores(signatures), fitted.scores(signatures))
    other = SignatureScanner(epochs=2, seed=1).fit(*population(60))
    assert not torch.equal(other.scores(signatures), fitted.scores(signatures))


def test_fit_reports_progress_over_all_members():
    seen = []
    scanner = SignatureScanner(epochs=2)
    scanner.fit(*population(8), progress=lambda done, total, loss: seen.append((done, total)))
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_scanner_of_maximisation_maps_reads_the_slice_of_both():
    signatures, trojaned, targets = population(20)
    cut = [signature.only("max") for signature in signatures]
    whole = SignatureScanner(maps="max", epochs=1).fit(signatures, trojaned, targets)
    sliced = SignatureScanner(maps="max", epochs=1).fit(cut, trojaned, targets)
    assert torch.equal(whole.scores(signatures), sliced.scores(cut))


def test_threshold_splits_the_validation_scores_and_stays_near_one_half():
    trojaned = torch.tensor([False, False, True, True])
    assert best_threshold(torch.tensor([0.1, 0.2, 0.8, 0.9]), trojaned) == 0.5
    assert best_threshold(torch.tensor([0.1, 0.2, 0.3, 0.4]), trojaned) == pytest.approx(0.25)


# --- calibration, mistakes, files ---------------------------------------------------------------------------


def test_calibrated_p_value_counts_benign_scores(fitted):
    scanner = SignatureScanner(epochs=10, validation_fraction=0.2)
    scanner.__dict__.update(fitted.__dict__)
    reference = scanner.calibrate([signature_of(3000 + index) for index in range(24)], "24 benign models")
    infected, benign = scanner.judge(signature_of(2000, target=3)), scanner.judge(signature_of(4000))
    assert infected.p_value == pytest.approx(1 / 25)
    assert infected.verdict is Verdict.SUSPICIOUS
    assert benign.p_value == pytest.approx((1 + sum(s >= benign.score for s in reference.scores)) / 25)
    assert infected.reference.name == "24 benign models"
    assert infected.warnings == ()


def test_few_references_leave_the_decision_to_the_threshold_and_say_so(fitted):
    scanner = SignatureScanner()
    scanner.__dict__.update(fitted.__dict__)
    scanner.calibrate([signature_of(3000 + index) for index in range(5)])
    result = scanner.judge(signature_of(2000, target=3))
    assert result.verdict is Verdict.SUSPICIOUS
    assert "5 benign references" in result.warnings[0]


@pytest.mark.parametrize(
    ("scanner", "message"),
    [
        (SignatureScanner(kind="perceptron"), "unknown kind 'perceptron'.*transformer"),
        (SignatureScanner(maps="mean"), "maps is 'mean'.*both"),
        (SignatureScanner(precision="fp8"), "precision is 'fp8'.*bf16"),
        (SignatureScanner(preset="icpr2024"), "preset 'pixels', the scanner 'icpr2024'"),
    ],
)
def test_wrong_options_are_named(scanner, message):
    with pytest.raises(ValueError, match=message):
        if scanner.precision == "fp8":
            scanner.kind, scanner.layers = "convolution", TINY
        scanner.fit(*population(8))


def test_wrong_counts_and_missing_fit_are_named():
    signatures, trojaned, _ = population(8)
    with pytest.raises(ValueError, match="8 signatures need as many labels, got 7"):
        SignatureScanner().fit(signatures, trojaned[:7])
    for question in (SignatureScanner().judge, lambda signature: SignatureScanner().scores([signature])):
        with pytest.raises(ValueError, match="call fit"):
            question(signatures[0])


@pytest.mark.parametrize("kind", ["set", "convolution"])
def test_saved_scanner_gives_equal_scores(tmp_path, kind):
    signatures, trojaned, targets = population(16)
    scanner = SignatureScanner(kind, epochs=2, layers=TINY).fit(signatures, trojaned, targets)
    scanner.calibrate([signature_of(3000 + index) for index in range(3)])
    loaded = SignatureScanner.load(scanner.save(tmp_path / "scanner"))
    assert torch.equal(loaded.scores(signatures), scanner.scores(signatures))
    assert loaded.judge(signatures[1]) == scanner.judge(signatures[1])
    assert sorted(path.suffix for path in (tmp_path / "scanner").iterdir()) == [".json", ".safetensors"]


def test_saving_again_replaces_the_weights(tmp_path, fitted):
    first = SignatureScanner(epochs=1).fit(*population(8))
    first.save(tmp_path)
    fitted.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    signatures = population(4)[0]
    assert torch.equal(SignatureScanner.load(tmp_path).scores(signatures), fitted.scores(signatures))


def test_damaged_or_foreign_folders_are_refused(tmp_path, fitted):
    with pytest.raises(ValueError, match="has no scanner.json"):
        SignatureScanner.load(tmp_path)
    fitted.save(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="missing or damaged"):
        SignatureScanner.load(tmp_path)
    (tmp_path / "scanner.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(ValueError, match="not a scanner of format"):
        SignatureScanner.load(tmp_path)
    (tmp_path / "scanner.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_scanner(tmp_path, required=())


def test_scan_judges_the_signature_that_describe_makes(fitted):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 4))
    model = Classifier(network, image_shape=(1, 12, 12), class_names=("a", "b", "c", "d")).train()
    result = fitted.scan(model)
    assert result.score == fitted.judge(fitted.describe(model)).score
    assert result.exhibits[0].labels == ("a", "b", "c", "d")
    assert model.training
    assert isinstance(evidence_of(fitted.describe(model)), Evidence)


def test_the_convolution_reads_statistics_from_a_hundred_classes_up():
    rng = torch.Generator().manual_seed(0)
    many = [
        Signature(
            torch.randint(0, 256, (200, 1, 8, 8), generator=rng, dtype=torch.uint8),
            torch.rand(200, generator=rng),
            "pixels",
            ("min", "max"),
        )
        for _ in range(12)
    ]
    scanner = SignatureScanner(kind="convolution", epochs=1, layers=(1, 1, 1, 1))
    scanner.fit(many, [index % 2 == 0 for index in range(12)])
    assert scanner.shape_ == (3 * (4 + 3 + 8), 1, 8, 8)
    assert len(scanner.scores(many[:3])) == 3
