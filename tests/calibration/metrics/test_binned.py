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
    assert binned.netcal_errors(bins) == pytest.approx(expected, abs=1e-12)
    test = check_consistency(bins, Settings(n_resamples=5))
    for b, row in enumerate(binned.tabulate_bins(bins, test, Units(n, 0.9))):
        assert (row.left, row.right, row.n) == (b / bins.n_bins, (b + 1) / bins.n_bins, len(gaps.get(b, [])))
        if b in gaps:
            assert (abs(row.accuracy - row.confidence), row.accuracy * row.n) == pytest.approx(
                (means[b], row.n_correct)
            )
            assert row.low <= row.accuracy <= row.high
            assert (row.consistent_low, row.consistent_high) == (test.low[b].item(), test.high[b].item())
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
    test = check_consistency(bins_of([0.7] * 200, [1] * 200, 15), Settings(n_resamples=2000, confidence_level=0.9))
    assert (test.low[10].item(), test.high[10].item()) == tuple(binom.ppf([0.05, 0.95], 200, 0.7) / 200)
    assert (test.p_value, test.n_resamples) == (1 / 2001, 2000)
    for right, expected in (([1.0] * 6, 1.0), ([1.0] * 5 + [0.0], 1 / 51)):
        certain = check_consistency(bins_of([1.0] * 6, right, 7), Settings(n_resamples=50))
        assert (certain.low[-1].item(), certain.high[-1].item(), certain.p_value) == (1.0, 1.0, expected)


def test_p_value_is_uniform_under_calibration_and_small_otherwise() -> None:
    p = {}
    for shift, n_sets in ((0.0, 300), (0.12, 50)):
        sets = (draw(250, shift=shift, n_bins=6, seed=seed) for seed in range(n_sets))
        p[shift] = [check_consistency(b, Settings(n_resamples=199, seed=s)).p_value for s, b in enumerate(sets)]
    assert kstest(p[0.0], "uniform").pvalue > 1e-3
    assert kstest(np.square(p[0.0]), "uniform").pvalue < 1e-10  # the test would see it
    assert np.mean(np.array(p[0.12]) <= 0.05) > 0.7
    one, again, other = (check_consistency(draw(250), Settings(n_resamples=9999, seed=s)).p_value for s in (1, 1, 2))
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
    outcomes = [bins_of([0.55] * 9, [1] * k + [0] * (9 - k), 4) for k in range(10)]  # unbiased exactly
    mean = sum(binom.pmf(k, 9, 0.7) * debiased_error(b, Units(9, 0.9))[0] for k, b in enumerate(outcomes))
    assert mean == pytest.approx((0.7 - 0.55) ** 2, abs=1e-12)
    lonely, paired = bins_of([0.2, 0.9], [0, 1], 15), bins_of([0.3, 0.3, 0.9, 0.9], [1, 0, 1, 1], 2)
    for b, few in ((lonely, Units(2, 0.9)), (paired, Units(4, 0.9, torch.tensor([0, 0, 1, 1])))):
        e = binned.estimate_debiased_error(b, few)
        assert (e.value, e.low, e.reason) == (0.0, None, "no bin holds predictions of two independent units")


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_over_clusters_the_bias_is_removed_on_average_and_the_interval_covers(shift: float) -> None:
    n_sets, images = 250, torch.arange(30).repeat_interleave(80)
    generator, found = torch.Generator().manual_seed(4), []
    for _ in range(n_sets):
        c, u = torch.rand(2, 2400, generator=generator, dtype=torch.float64)
        effect = 0.3 * (torch.rand(30, generator=generator, dtype=torch.float64) - 0.5)  # images differ in accuracy
        bins = BinnedConfidences(0.6 + 0.35 * c, (u < 0.6 + 0.35 * c - shift + effect[images]).double(), 10)
        e = binned.estimate_debiased_error(bins, Units(2400, 0.95, images))
        found.append((e.value, debiased_error(bins, Units(2400, 0.95))[0] - e.value, e.low <= shift**2 <= e.high))
    value, too_large, covered = np.array(found).T  # the second: what dependence does to the plain estimate
    assert abs(value.mean() - shift**2) < 4 * value.std() / sqrt(n_sets)
    assert too_large.mean() > 10 * too_large.std() / sqrt(n_sets)
    assert covered.mean() > 0.95 - 3.5 * sqrt(0.95 * 0.05 / n_sets)
