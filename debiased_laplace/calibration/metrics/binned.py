r"""Calibration errors over bins of confidence, and the errors expected by chance alone.

They need two vectors on the CPU: the confidence $c_i$ of each prediction, and whether it was correct.
"""

from dataclasses import dataclass
from functools import cached_property
from math import pi, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import ConfidenceBin, Estimate
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import BIASED, Units, symmetric, wilson_by_cell, without_interval
from debiased_laplace.calibration.probabilities import inner_edges


@dataclass(frozen=True, eq=False)
class BinnedConfidences:
    """Confidences in bins of equal width on [0, 1], closed on the left, the last on both sides; `correct` is 0 or 1."""

    confidence: Float[Tensor, " n"]
    correct: Float[Tensor, " n"]
    n_bins: int

    @cached_property
    def bin(self) -> Int[Tensor, " n"]:
        """Bin of each prediction, by netcal's edges."""
        return torch.bucketize(self.confidence, inner_edges(self.n_bins), right=True)

    def sums(self, values: Float[Tensor, " n"]) -> Float[Tensor, " bins"]:
        """Sum values over the predictions of each bin."""
        return torch.bincount(self.bin, weights=values, minlength=self.n_bins)


def measure_binned(
    bins: BinnedConfidences, units: Units, settings: Settings
) -> tuple[dict[str, Estimate], tuple[ConfidenceBin, ...]]:
    """Estimate binned errors, their noise floor and p-value, and the debiased error; return also the bins."""
    n, words = units.n, f"netcal, {bins.n_bins} bins of equal width"
    p_value, band = check_consistency(bins, settings)
    estimates = {name: without_interval(error, n, words, BIASED) for name, error in netcal_errors(bins).items()}
    floor, draws = expected_error_by_chance(bins), f"consistency resampling, {settings.n_resamples} draws"
    reason = f"it follows from the confidences alone{units.caution}"
    estimates |= {
        "ece_noise_floor": without_interval(floor, n, "closed form, normal sums", reason),
        "ece_p_value": without_interval(p_value, n, draws, f"a p-value has no interval{units.caution}"),
        "rmsce2_debiased": estimate_debiased_error(bins, units),
    }
    return estimates, _tabulate_bins(bins, band, units)


def netcal_errors(bins: BinnedConfidences) -> dict[str, float]:
    """Return netcal's expected, maximum and average calibration error.

    References:
        Naeini, Cooper, Hauskrecht (2015), doi:10.1609/aaai.v29i1.9602 (ECE, MCE);
        Neumann, Zisserman, Vedaldi (2018) (ACE); Küppers et al. (2020), netcal.
    """
    from netcal.metrics.confidence import ACE, ECE, MCE  # two seconds that only a report costs

    # of probabilities netcal guesses the task from the labels present, and keeps float32 bin edges
    confidence, correct = bins.confidence.numpy(), bins.correct.to(torch.int64).numpy()
    kinds = {"ece": ECE, "mce": MCE, "ace": ACE}
    return {key: float(kind(bins=bins.n_bins).measure(confidence, correct)) for key, kind in kinds.items()}


def expected_error_by_chance(bins: BinnedConfidences) -> float:
    r"""Return the calibration error expected of right confidences.

    $\sqrt{2/\pi} \sum_b \sqrt{\sum_{i \in b} c_i (1 - c_i)} / n$: each bin's surplus of correct predictions is nearly
    normal with variance $\sum_i c_i (1 - c_i)$, and its absolute value $\sqrt{2 / \pi}$ standard deviations on average.
    """
    variance = bins.sums(bins.confidence * (1 - bins.confidence))
    return sqrt(2 / pi) * variance.sqrt().sum().item() / len(bins.confidence)


def check_consistency(bins: BinnedConfidences, settings: Settings) -> tuple[float, Float[Tensor, "2 bins"]]:
    """Simulate test sets on which each prediction is right with its own confidence (consistency resampling).

    A draw is one number per bin, from the computed distribution of the number of right predictions there.

    Returns:
        The share of test sets with an error at least as large as the observed one, no finer than 1 / (n_resamples + 1);
        and the quantiles of the accuracy in each bin, NaN in empty ones.

    References:
        Bröcker and Smith (2007), doi:10.1175/WAF993.1; Vaicenavicius et al. (2019), arXiv 1902.06977.
    """
    generator, level = torch.Generator().manual_seed(settings.seed), settings.confidence_level
    uniform = torch.rand(settings.n_resamples, bins.n_bins, generator=generator, dtype=torch.float64)
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    expected, simulated = bins.sums(bins.confidence), torch.zeros_like(uniform)
    band = torch.full((2, bins.n_bins), torch.nan, dtype=torch.float64)
    for b in bins.bin.unique().tolist():
        cumulative = poisson_binomial(bins.confidence[bins.bin == b]).cumsum(0)
        n = cumulative.numel() - 1  # a sum of probabilities may end a rounding error below 1
        simulated[:, b] = torch.searchsorted(cumulative, uniform[:, b].contiguous()).clamp_max(n)
        band[:, b] = torch.searchsorted(cumulative, tail).clamp_max(n).double() / n
    observed = (bins.sums(bins.correct) - expected).abs().sum()
    errors = (simulated - expected).abs().sum(dim=1)
    # sums of the same terms in another order differ in the last digits; a tie counts as "as large"
    as_large = int((errors >= observed - 1e-9 * len(bins.confidence)).sum())
    return (1 + as_large) / (1 + settings.n_resamples), band


def poisson_binomial(chances: Float[Tensor, " n"]) -> Float[Tensor, " n+1"]:
    r"""Return the probabilities of 0 to n successes among independent trials of different chances.

    They are the coefficients of $\prod_i (1 - c_i + c_i x)$. Cost: $O(n \log^2 n)$; SciPy's is quadratic.

    References:
        Hong (2013), doi:10.1016/j.csda.2012.10.006.
    """
    n = chances.numel()
    law = chances.new_zeros(1 << (n - 1).bit_length(), 2)
    law[:, 0], law[:n, 1] = 1.0, chances
    law[:n, 0] -= chances
    while len(law) > 1:
        length = 2 * law.shape[1] - 1
        size = 1 << (length - 1).bit_length()
        transform = torch.fft.rfft(law, n=size)
        law = torch.fft.irfft(transform[0::2] * transform[1::2], n=size)[:, :length].clamp_min(0.0)
    return law[0, : n + 1]


def estimate_debiased_error(bins: BinnedConfidences, units: Units) -> Estimate:
    """Estimate the squared calibration error without the share that sampling noise adds, by the jackknife.

    Near calibration the standard error is too large by up to a factor of root two; a bootstrap misses the truth there.

    References:
        Kumar, Liang, Ma (2019), arXiv 1909.10155, section 5;
        Efron and Stein (1981), doi:10.1214/aos/1176345462 (the jackknife's variance is never too small on average).
    """
    value, influence = debiased_error(bins, units)
    if influence is None:
        return without_interval(value, units.n, "debiased", "no bin holds predictions of two independent units")
    return symmetric(value, units.standard_error(influence), units, "debiased, jackknife deviation")


def debiased_error(bins: BinnedConfidences, units: Units) -> tuple[float, Float[Tensor, " n"] | None]:
    r"""Return the debiased squared error, and a score of every sample with that mean and its standard error.

    $\sum_b \frac{n_b}{n} \bigl[(a_b - c_b)^2 - \nu_b\bigr]$ over bins that two units reach, with accuracy $a_b$ and
    mean confidence $c_b$. The noise $\nu_b$ is the variance of a mean over units: of the accuracy,
    $a_b (1 - a_b) / (n_b - 1)$, for independent samples, of the surplus $a_b - c_b$ for clusters. The scores are those
    of the jackknife: only the bins of the unit that is left out change. They are None where no bin holds two units.
    """
    ones, surplus = torch.ones_like(bins.confidence), bins.correct - bins.confidence
    noisy = bins.correct if units.codes is None else surplus
    of_sample = torch.arange(units.n) if units.codes is None else units.codes
    pair, place = torch.unique(of_sample * bins.n_bins + bins.bin, return_inverse=True)
    cell, unit = pair % bins.n_bins, pair // bins.n_bins
    n, s, x = torch.zeros(3, len(pair), dtype=torch.float64).index_add_(1, place, torch.stack([ones, surplus, noisy]))
    sums = torch.stack([torch.ones_like(n), n, s, x, x * x, x * n, n * n], dim=1)
    total = sums.new_zeros(bins.n_bins, 7).index_add_(0, cell, sums)
    value = _debias(total).sum().item() / units.n
    if total[:, 0].max().item() < 2:
        return value, None
    change = _debias(total[cell] - sums) - _debias(total)[cell]
    sizes = units.sums(ones)
    totals = sizes.new_zeros(units.count).index_add_(0, unit, change) + value * units.n
    left_out = totals / (units.n - sizes).clamp_min(1)
    scores = units.n * (units.count - 1) / units.count * (left_out.mean() - left_out) / sizes
    return value, value + scores[of_sample]


def _debias(sums: Float[Tensor, "cells 7"]) -> Float[Tensor, " cells"]:
    """Return each bin's part of the debiased error, times n; 0 where fewer than two units reach it.

    Columns are sums over units of 1, n, s, x, x², x n and n²: samples n, their surplus s, and the noisy quantity x.
    """
    reached, n, s, x, xx, xn, nn = sums.T
    mean = x / n
    noise = reached / (reached - 1) * (xx - 2 * mean * xn + mean.square() * nn) / n.square()
    return torch.where(reached >= 2, n * ((s / n).square() - noise), 0.0)


def _tabulate_bins(bins: BinnedConfidences, band: Float[Tensor, "2 bins"], units: Units) -> tuple[ConfidenceBin, ...]:
    """Return the bins of the reliability diagram."""
    intervals = wilson_by_cell(bins.correct, bins.bin, bins.n_bins, units)
    counts = torch.bincount(bins.bin, minlength=bins.n_bins).tolist()
    sums = zip(counts, bins.sums(bins.correct).tolist(), bins.sums(bins.confidence).tolist(), strict=True)
    table = []
    for b, (n, correct, confidence) in enumerate(sums):
        means = () if n == 0 else (confidence / n, correct / n, *intervals[b], *band[:, b].tolist())
        table.append(ConfidenceBin(b / bins.n_bins, (b + 1) / bins.n_bins, n, round(correct), *means))
    return tuple(table)
