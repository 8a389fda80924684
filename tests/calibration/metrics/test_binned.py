"""Binned calibration errors against netcal, SciPy, loops, leaving out, and simulated calibrated test sets."""

from math import pi, sqrt

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest, poisson_binom
from torch import Tensor

from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.metrics import binned
from debiased_laplace.calibration.metrics.binned import BinnedConfidences, check_consistency, debiased_error


def bins_of(confidence, correct, n_bins: int) -> BinnedConfidences:
    return BinnedConfidences(*(torch.tensor(x, dtype=torch.float64) for x in (confidence, correct)), n_bins)


def draw(n: int, *, shift: float = 0.0, n_bins: int = 15, seed: int = 0) -> BinnedConfidences:
    """Confidences between 0.5 and 0.95 that promise `shift` too much."""
    c, u = torch.rand(2, n, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return BinnedConfidences(0.5 + 0.45 * c, (u < 0.5 + 0.45 * c - shift).double(), n_bins)


EDGES = np.concatenate([np.linspace(0, 1, 11), np.nextafter(np.linspace(0, 1, 11)[1:], 0), np.arange(101) / 100])
CASES = {
    "over-confident": draw(2000, shift=0.1),
    "on and beside the edges": bins_of(EDGES, [1.0, 0.0] * 61, 10),
    "one class, which netcal refuses as probabilities": bins_of([0.82] * 6, [1.0] * 6, 15),
    "certain ones share the last bin": bins_of([1.0] * 10 + [0.95] * 10, [1.0] * 20, 15),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_of_netcal_and_the_table_are_those_of_a_loop(case: str) -> None:
    bins, gaps = CASES[case], {}
    for c, right in zip(bins.confidence.tolist(), bins.correct.tolist(), strict=True):
        b = np.searchsorted(np.linspace(0, 1, bins.n_bins + 1), c, side="right") - 1
        gaps.setdefault(min(bins.n_bins - 1, b), []).append(right - c)
    n, means = len(bins.confidence), {b: abs(np.mean(g)) for b, g in gaps.items()}
    ece = sum(len(g) * means[b] for b, g in gaps.items()) / n
    expected = {"ece": ece, "mce": max(means.values()), "ace": np.mean(list(means.values()))}
    settings = Settings(bins.n_bins, n_resamples=5)
    _, band = check_consistency(bins, settings)
    metrics, table = binned.measure_binned(bins, Units(n, 0.9), settings)
    assert {name: metrics[name].value for name in expected} == pytest.approx(expected, abs=1e-12)
    for b, row in enumerate(table):
        assert (row.left, row.right, row.n) == (b / bins.n_bins, (b + 1) / bins.n_bins, len(gaps.get(b, [])))
        if b in gaps:
            pair = (abs(row.accuracy - row.confidence), row.accuracy * row.n)
            assert pair == pytest.approx((means[b], row.n_correct))
            assert row.low <= row.accuracy <= row.high
            assert [row.consistent_low, row.consistent_high] == band[:, b].tolist()
        else:
            assert row.accuracy is row.low is row.consistent_low is None


def test_noise_floor_is_the_mean_error_of_calibrated_test_sets() -> None:
    bins, n_sets = draw(3000, n_bins=8), 1500
    right = torch.rand(n_sets, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < bins.confidence
    surplus = torch.zeros(n_sets, 8).double().index_add_(1, bins.bin, right.double() - bins.confidence)
    simulated, floor = surplus.abs().sum(dim=1) / 3000, binned.expected_error_by_chance(bins)
    error = simulated.std().item() / sqrt(n_sets)
    assert abs(floor - simulated.mean().item()) < 4 * error
    assert floor * (sqrt(pi / 2) - 1) > 15 * error  # a root mean square would be found out


@pytest.mark.parametrize("n", [1, 3, 64, 65, 1500])
def test_number_of_successes_has_scipys_distribution(n: int) -> None:
    chances = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    chances[: n // 3] = (torch.arange(n // 3) % 2).double()
    law = binned.poisson_binomial(chances).numpy()
    np.testing.assert_allclose(law, poisson_binom.pmf(np.arange(n + 1), chances.numpy()), rtol=0, atol=1e-13)


def test_band_and_p_value_of_one_bin_are_the_binomials_and_ties_count() -> None:
    settings = Settings(n_resamples=2000, confidence_level=0.9)
    p_value, band = check_consistency(bins_of([0.7] * 200, [1] * 200, 15), settings)
    assert (p_value, tuple(band[:, 10].tolist())) == (1 / 2001, tuple(binom.ppf([0.05, 0.95], 200, 0.7) / 200))
    for right, expected in (([1.0] * 6, 1.0), ([1.0] * 5 + [0.0], 1 / 51)):
        p_value, band = check_consistency(bins_of([1.0] * 6, right, 7), Settings(n_resamples=50))
        assert (p_value, band[:, -1].tolist()) == (expected, [1.0, 1.0])


def test_p_value_is_uniform_under_calibration_and_small_otherwise() -> None:
    p = {}
    for shift, n_sets in ((0.0, 300), (0.12, 50)):
        sets = (draw(250, shift=shift, n_bins=6, seed=seed) for seed in range(n_sets))
        p[shift] = [check_consistency(b, Settings(n_resamples=199, seed=s))[0] for s, b in enumerate(sets)]
    assert kstest(p[0.0], "uniform").pvalue > 1e-3
    assert kstest(np.square(p[0.0]), "uniform").pvalue < 1e-10  # the test would see it
    assert np.mean(np.array(p[0.12]) <= 0.05) > 0.7
    one, again, other = (check_consistency(draw(250), Settings(n_resamples=9999, seed=s))[0] for s in (1, 1, 2))
    assert one == again != other


def debiased_by_hand(bins: BinnedConfidences, keep: Tensor, clusters: Tensor | None) -> float:
    """The formula, one bin and one cluster after the other, of some samples."""
    total = 0.0
    for b in range(bins.n_bins):
        inside = keep & (bins.bin == b)
        surplus, n = (bins.correct - bins.confidence)[inside], int(inside.sum())
        present = range(n) if clusters is None else clusters[inside].unique().tolist()
        if len(present) >= 2:
            delta, noise = surplus.mean().item(), bins.correct[inside].var().item() / n
            if clusters is not None:
                sums = [(surplus - delta)[clusters[inside] == g].sum().item() for g in present]
                noise = len(present) / (len(present) - 1) * sum(s**2 for s in sums) / n**2
            total += n * (delta**2 - noise)
    return total / int(keep.sum())


@pytest.mark.parametrize("clusters", [None, torch.arange(120) % 23, torch.arange(120).sqrt().long()])
def test_debiased_error_and_its_jackknife_are_those_of_leaving_out_each_unit(clusters: Tensor | None) -> None:
    bins, units = draw(120, shift=0.1, n_bins=40), Units(120, 0.9, clusters)
    unit, G = torch.arange(120) if clusters is None else clusters, units.count
    left_out = np.array([debiased_by_hand(bins, unit != g, clusters) for g in range(G)])
    value, influence = debiased_error(bins, units)
    assert value == pytest.approx(debiased_by_hand(bins, unit >= 0, clusters), abs=1e-13)
    pseudo = units.sums(influence - value).numpy() / 120
    np.testing.assert_allclose(pseudo, (left_out.mean() - left_out) * (G - 1) / G, rtol=0, atol=1e-12)
    e = binned.estimate_debiased_error(bins, units)
    half = units.quantile * sqrt((G - 1) * np.var(left_out))
    assert (e.low, e.value, e.high) == pytest.approx((value - half, value, value + half), rel=1e-8)
    lonely, paired = bins_of([0.2, 0.9], [0, 1], 15), bins_of([0.3, 0.3, 0.9, 0.9], [1, 0, 1, 1], 2)
    for b, few in ((lonely, Units(2, 0.9)), (paired, Units(4, 0.9, torch.tensor([0, 0, 1, 1])))):
        e = binned.estimate_debiased_error(b, few)
        assert (e.value, e.low, e.reason) == (0.0, None, "no bin holds predictions of two independent units")


@pytest.mark.parametrize("copies", [1, 3])
def test_the_debiased_error_is_unbiased_over_all_outcomes_of_samples_or_clusters(copies: int) -> None:
    units = Units(9 * copies, 0.9, None if copies == 1 else torch.arange(9).repeat(copies))
    outcomes = [bins_of([0.55] * 9 * copies, ([1] * k + [0] * (9 - k)) * copies, 4) for k in range(10)]
    mean = sum(binom.pmf(k, 9, 0.7) * debiased_error(b, units)[0] for k, b in enumerate(outcomes))
    assert mean == pytest.approx((0.7 - 0.55) ** 2, abs=1e-12)
