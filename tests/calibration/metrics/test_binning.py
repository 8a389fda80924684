from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
import torch
from netcal.metrics import ACE, ECE, MCE

from debiased_laplace.calibration.metrics.binning import (
    bin_confidences,
    bootstrap_debiased_error,
    check_consistency,
    debiased_squared_error,
    expected_error_by_chance,
    measure_binned_errors,
    measure_positive_class_error,
)
from debiased_laplace.calibration.metrics.classification import estimate_debiased_error
from debiased_laplace.calibration.metrics.curves import tabulate_bins
from debiased_laplace.calibration.predictions.classification import read_classification


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reduce(p, y, n_bins=15):
    r = read_classification("net", p, y, task="multiclass")
    return bin_confidences(r.confidence, r.correct, n_bins=n_bins)


@pytest.mark.parametrize("n_bins", [2, 10, 15])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_errors_are_those_of_a_plain_netcal_call(draw_classification, n_bins: int, sharpness: float) -> None:
    p, y, _ = draw_classification(2000, sharpness=sharpness, seed=3)
    mine = measure_binned_errors(reduce(p, y, n_bins))
    for name, metric in {"ece": ECE, "mce": MCE, "ace": ACE}.items():
        assert mine[name] == pytest.approx(metric(bins=n_bins).measure(p.numpy(), y.numpy()), abs=1e-9)


def test_positive_class_error_is_netcals_binary_convention(draw_classification) -> None:
    p, y, _ = draw_classification(500, sharpness=2.0, seed=4, n_classes=2)
    top = measure_binned_errors(reduce(p, y))["ece"]
    positive = measure_positive_class_error(p[:, 1], y, n_bins=15)
    assert positive == pytest.approx(ECE(bins=15).measure(p[:, 1].numpy(), y.numpy()), abs=1e-9)
    assert abs(positive - top) > 1e-3  # the two conventions differ, so both are reported


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]], ids=["one class", "two of ten classes"])
def test_shards_that_netcal_refuses(labels: list[int]) -> None:
    p = torch.full((6, 10), 0.02, dtype=torch.float64)
    p[:, 0] = 0.82
    with pytest.raises(RuntimeError):
        ECE(bins=15).measure(p.numpy(), np.array(labels))
    accuracy = labels.count(0) / 6
    assert measure_binned_errors(reduce(p, labels))["ece"] == pytest.approx(abs(0.82 - accuracy), abs=1e-12)


def test_confidences_of_exactly_one_share_the_last_bin() -> None:
    confidence = tensor([1.0] * 10 + [0.95] * 10)
    bins = bin_confidences(confidence, torch.ones_like(confidence), n_bins=15)
    assert bins.counts.tolist() == [0.0] * 14 + [20.0]
    assert measure_binned_errors(bins)["ece"] == pytest.approx(0.025, abs=1e-12)
    assert expected_error_by_chance(bins) > 0


@pytest.mark.parametrize("n_bins", [7, 10, 15])
def test_bin_table_and_netcal_agree_on_every_edge(n_bins: int) -> None:
    edges = np.linspace(0, 1, n_bins + 1)
    values = np.concatenate([edges, np.nextafter(edges[1:], 0), np.nextafter(edges[:-1], 1), np.arange(101) / 100])
    correct = tensor(np.random.default_rng(0).integers(0, 2, len(values)))
    bins = bin_confidences(torch.from_numpy(values), correct, n_bins=n_bins)
    consistency = check_consistency(bins, n_resamples=5, confidence_level=0.9, seed=0)
    table = tabulate_bins(bins, consistency, confidence_level=0.9)
    by_hand = sum(b.n * abs(b.accuracy - b.confidence) for b in table) / len(values)
    assert by_hand == pytest.approx(measure_binned_errors(bins)["ece"], abs=1e-12)
    assert sum(b.n for b in table) == len(values)


def test_bin_table_by_hand() -> None:
    bins = bin_confidences(tensor([0.6, 0.7, 0.95, 0.9]), tensor([1, 0, 1, 1]), n_bins=4)
    consistency = check_consistency(bins, n_resamples=50, confidence_level=0.9, seed=0)
    empty, _, third, last = tabulate_bins(bins, consistency, confidence_level=0.9)
    assert (empty.n, empty.accuracy, empty.low, empty.consistent_low) == (0, None, None, None)
    assert (third.left, third.right, third.n, third.n_correct) == (0.5, 0.75, 2, 1)
    assert (third.accuracy, last.accuracy) == (0.5, 1.0)
    assert (third.confidence, last.confidence) == pytest.approx((0.65, 0.925))
    assert third.low < 0.5 < third.high
    assert 0 <= last.consistent_low <= last.consistent_high <= 1


def test_noise_floor_is_the_mean_of_simulated_errors(draw_classification) -> None:
    p, y, _ = draw_classification(400, sharpness=1.0, seed=5)
    bins = reduce(p, y)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(5000):
        correct = (torch.rand(400, generator=generator, dtype=torch.float64) < bins.confidence).double()
        surplus = torch.zeros(15, dtype=torch.float64).index_add_(0, bins.bin, correct - bins.confidence)
        errors.append(surplus.abs().sum() / 400)
    simulated = torch.stack(errors)
    # normal sums are exact only for many samples per bin; 1.5 % is what the approximation costs here
    assert expected_error_by_chance(bins) == pytest.approx(simulated.mean().item(), rel=0.015)
    assert simulated.std() / sqrt(5000) < 0.005 * simulated.mean()


def test_noise_floor_of_certain_predictions_is_zero() -> None:
    assert expected_error_by_chance(bin_confidences(tensor([1.0, 1.0]), tensor([1, 0]), n_bins=15)) == 0


@pytest.mark.parametrize("n", [2, 5, 9])
def test_debiased_error_is_unbiased_exactly(n: int) -> None:
    """Sum over all outcomes of one bin: the expectation is (q - c)^2, without any simulation."""
    q, c = 0.7, 0.55
    expectation = sum(
        comb(n, k) * q**k * (1 - q) ** (n - k)
        * debiased_squared_error(tensor([n]), tensor([k]), tensor([n * c])).item()
        for k in range(n + 1)
    )  # fmt: skip
    assert expectation == pytest.approx((q - c) ** 2, abs=1e-12)


def test_debiased_error_weighs_bins_and_skips_single_samples() -> None:
    value = debiased_squared_error(tensor([4, 1, 0]), tensor([2, 1, 0]), tensor([3.2, 0.1, 0.0]))
    assert value.item() == pytest.approx(4 / 5 * ((0.5 - 0.8) ** 2 - 0.25 / 3))


def test_bootstrap_deviation_on_all_resamples_of_a_tiny_set() -> None:
    bins = bin_confidences(tensor([0.6, 0.7, 0.65]), tensor([1, 0, 1]), n_bins=2)
    exact = tensor(
        [
            debiased_squared_error(
                tensor([0, 3]), tensor([0, bins.correct[i].sum()]), tensor([0, bins.confidence[i].sum()])
            ).item()
            for i in map(list, product(range(3), repeat=3))
        ]
    )
    drawn = bootstrap_debiased_error(bins, n_resamples=20_000, seed=1)
    z = (drawn.mean() - exact.mean()) / (exact.std() / sqrt(20_000))
    assert abs(z) < 4
    assert drawn.std().item() == pytest.approx(exact.std(correction=0).item(), rel=0.03)
    assert set(drawn.mul(1e9).round().tolist()) == set(exact.mul(1e9).round().tolist())


def test_without_pairs_there_is_no_interval() -> None:
    e = estimate_debiased_error(
        bin_confidences(tensor([0.2, 0.9]), tensor([0, 1]), n_bins=15), confidence_level=0.9, n_resamples=9, seed=0
    )
    assert e.value == 0
    assert e.low is None
    assert "two predictions" in e.reason


def test_draws_follow_the_seed_and_no_global_state(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=1.1, seed=6)
    bins = reduce(p, y)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    runs = [check_consistency(bins, n_resamples=500, confidence_level=0.95, seed=s) for s in (1, 1, 2)]
    boots = [bootstrap_debiased_error(bins, n_resamples=50, seed=s) for s in (1, 1, 2)]
    assert runs[0].p_value == runs[1].p_value
    assert torch.equal(boots[0], boots[1])
    assert not torch.equal(boots[0], boots[2])
    assert not torch.equal(runs[0].low.nan_to_num(), runs[2].low.nan_to_num())
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002


def test_many_samples_are_resampled_in_portions(monkeypatch, draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=1.0, seed=6)
    bins = reduce(p, y)
    whole = check_consistency(bins, n_resamples=40, confidence_level=0.9, seed=1)
    monkeypatch.setattr("debiased_laplace.calibration.metrics.binning.DRAWS_AT_ONCE", 300 * 7)
    parts = check_consistency(bins, n_resamples=40, confidence_level=0.9, seed=1)
    assert whole.p_value == parts.p_value
    assert len(bootstrap_debiased_error(bins, n_resamples=40, seed=1)) == 40


def test_consistency_band_is_binomial_for_equal_confidences() -> None:
    from scipy.stats import binom

    bins = bin_confidences(torch.full((200,), 0.7, dtype=torch.float64), torch.ones(200).double(), n_bins=15)
    c = check_consistency(bins, n_resamples=20_000, confidence_level=0.9, seed=0)
    low, high = c.low.nan_to_num().max().item(), c.high.nan_to_num().max().item()
    assert low == pytest.approx(binom.ppf(0.05, 200, 0.7) / 200, abs=1 / 200)
    assert high == pytest.approx(binom.ppf(0.95, 200, 0.7) / 200, abs=1 / 200)
    assert c.p_value == pytest.approx(1 / 20_001)


def test_p_value_of_a_calibrated_bin_is_exact() -> None:
    """One bin, ten samples at 1/2: the p-value of 8 right is P(|B - 5| >= 3) for a binomial B."""
    exact = sum(comb(10, k) for k in range(11) if abs(k - 5) >= 3) / 2**10
    bins = bin_confidences(tensor([0.5] * 10), tensor([1] * 8 + [0] * 2), n_bins=3)
    p = check_consistency(bins, n_resamples=20_000, confidence_level=0.9, seed=0).p_value
    assert abs(p - exact) < 4 * sqrt(exact * (1 - exact) / 20_000)


@pytest.mark.slow
def test_size_and_power_of_the_consistency_test(draw_classification) -> None:
    n_sets, level = 500, 0.05
    rejected = {}
    for sharpness in (1.0, 1.5):
        rejected[sharpness] = 0
        for seed in range(n_sets):
            p, y, _ = draw_classification(300, sharpness=sharpness, seed=1000 + seed)
            test = check_consistency(reduce(p, y), n_resamples=199, confidence_level=0.9, seed=seed)
            rejected[sharpness] += test.p_value <= level
    z = (rejected[1.0] - level * n_sets) / sqrt(level * (1 - level) * n_sets)
    assert abs(z) < 3.5
    assert rejected[1.5] > 0.95 * n_sets


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.1, 1.5])
def test_debiased_error_is_unbiased_and_its_interval_covers(draw_classification, sharpness: float) -> None:
    n_sets, level = 300, 0.95
    p, y, truth = draw_classification(1_000_000, sharpness=sharpness, seed=0)
    big = reduce(p, y)
    expected_correct = big.sum_per_bin(truth.gather(1, p.argmax(dim=1, keepdim=True))[:, 0])
    gap = expected_correct - big.sum_per_bin(big.confidence)
    population = (gap.square() / big.counts.clamp(min=1)).sum().item() / big.n
    debiased, plug_in, covered = [], [], 0
    for seed in range(n_sets):
        p, y, _ = draw_classification(500, sharpness=sharpness, seed=5000 + seed)
        bins = reduce(p, y)
        e = estimate_debiased_error(bins, confidence_level=level, n_resamples=100, seed=seed)
        surplus = bins.sum_per_bin(bins.correct - bins.confidence)
        plug_in.append((surplus.square() / bins.counts.clamp(min=1)).sum().item() / bins.n)
        debiased.append(e.value)
        covered += e.low <= population <= e.high
    z = [(np.mean(x) - population) / (np.std(x) / sqrt(n_sets)) for x in (debiased, plug_in)]
    assert abs(z[0]) < 4
    assert z[1] > 10  # the test would have seen a bias
    deviation = sqrt(level * (1 - level) / n_sets)
    assert covered / n_sets > level - 3.5 * deviation
    if sharpness == 1.5:  # near calibration the interval is wider than it need be
        assert covered / n_sets < level + 3.5 * deviation
