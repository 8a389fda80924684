r"""Calibration errors over bins of confidence, and what chance alone would make of them.

All of it needs two vectors: the confidence $c_i$ of each prediction, and whether it was correct. They live on the CPU,
where netcal works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import pi, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import ConfidenceBin, Estimate
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units, symmetric, wilson_by_cell, without_interval
from debiased_laplace.calibration.probabilities import inner_edges

BLOCK = 64  # successes multiplied out one by one before transforms pay
NO_INTERVAL = (
    "a binned error is biased upwards, and bootstrap intervals around it miss the truth for nearly calibrated models; "
    "compare it with its noise floor and p-value"
)


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

    @cached_property
    def counts(self) -> Float[Tensor, " bins"]:
        """Predictions per bin."""
        return self.sums(torch.ones_like(self.confidence))

    def sums(self, values: Float[Tensor, " n"]) -> Float[Tensor, " bins"]:
        """Sum values over the predictions of each bin."""
        return torch.bincount(self.bin, weights=values, minlength=self.n_bins)


@dataclass(frozen=True)
class ConsistencyTest:
    """What the bins would show if the confidences were right.

    `p_value` is the share of simulated test sets with an error at least as large as the observed one; `low` and `high`
    are quantiles of the accuracy in each bin, NaN in empty ones.
    """

    p_value: float
    low: Float[Tensor, " bins"]
    high: Float[Tensor, " bins"]
    n_resamples: int


def measure_binned(bins: BinnedConfidences, test: ConsistencyTest, units: Units) -> dict[str, Estimate]:
    """Binned calibration errors, their noise floor and p-value, and the debiased squared error."""
    n, errors = units.n, netcal_errors(bins)
    names = {"ece": "expected", "mce": "maximum", "ace": "average"}
    estimates = {
        key: without_interval(
            errors[key],
            n,
            estimator=f"netcal, {name} calibration error, {bins.n_bins} bins of equal width",
            reason=NO_INTERVAL,
        )
        for key, name in names.items()
    }
    floor = expected_error_by_chance(bins)
    words = f"consistency resampling, {test.n_resamples} draws"
    estimates["ece_noise_floor"] = without_interval(
        floor, n, estimator="closed form, normal sums", reason=f"it follows from the confidences alone{units.caution}"
    )
    estimates["ece_p_value"] = without_interval(
        test.p_value, n, estimator=words, reason=f"a p-value has no interval{units.caution}"
    )
    estimates["rmsce2_debiased"] = estimate_debiased_error(bins, units)
    return estimates


def netcal_errors(bins: BinnedConfidences) -> dict[str, float]:
    """Expected, maximum and average calibration error as netcal computes them.

    netcal gets the two vectors, not the probabilities: for those it guesses the task from the labels present (and fails
    on a shard with two of ten classes), and keeps float32 bin edges.

    References:
        Naeini, Cooper, Hauskrecht (2015), doi:10.1609/aaai.v29i1.9602 (ECE, MCE);
        Neumann, Zisserman, Vedaldi (2018) (ACE); Küppers et al. (2020), netcal.
    """
    from netcal.metrics.confidence import ACE, ECE, MCE  # two seconds that only a report costs

    confidence, correct = bins.confidence.numpy(), bins.correct.to(torch.int64).numpy()
    return {
        "ece": float(ECE(bins=bins.n_bins).measure(confidence, correct)),
        "mce": float(MCE(bins=bins.n_bins).measure(confidence, correct)),
        "ace": float(ACE(bins=bins.n_bins).measure(confidence, correct)),
    }


def expected_error_by_chance(bins: BinnedConfidences) -> float:
    r"""Expected calibration error of right confidences: $\sqrt{2/\pi} \sum_b \sqrt{\sum_{i \in b} c_i (1 - c_i)} / n$.

    Each bin's surplus of correct predictions is nearly normal with variance $\sum_i c_i (1 - c_i)$, so that the mean of
    its absolute value is $\sqrt{2 / \pi}$ standard deviations.
    """
    variance = bins.sums(bins.confidence * (1 - bins.confidence))
    return sqrt(2 / pi) * variance.sqrt().sum().item() / len(bins.confidence)


def check_consistency(bins: BinnedConfidences, settings: Settings) -> ConsistencyTest:
    """Consistency resampling: each prediction is right with its own confidence.

    The number of right predictions in a bin is a sum of independent successes. Its distribution is computed, not
    simulated, so that a draw costs one number per bin whatever the size of the test set. The p-value is over draws of
    all bins, and no finer than 1 / (n_resamples + 1).

    References:
        Bröcker and Smith (2007), doi:10.1175/WAF993.1; Vaicenavicius et al. (2019), arXiv 1902.06977.
    """
    generator, level = torch.Generator().manual_seed(settings.seed), settings.confidence_level
    uniform = torch.rand(settings.n_resamples, bins.n_bins, generator=generator, dtype=torch.float64)
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    counts, expected = bins.counts, bins.sums(bins.confidence)
    simulated = torch.zeros_like(uniform)
    band = torch.full((2, bins.n_bins), torch.nan, dtype=torch.float64)
    for b in counts.nonzero()[:, 0].tolist():
        cumulative = poisson_binomial(bins.confidence[bins.bin == b]).cumsum(0)
        last = cumulative.numel() - 1  # a sum of probabilities may end a rounding error below 1
        simulated[:, b] = torch.searchsorted(cumulative, uniform[:, b].contiguous()).clamp_max(last)
        band[:, b] = torch.searchsorted(cumulative, tail).clamp_max(last) / counts[b]
    observed = (bins.sums(bins.correct) - expected).abs().sum()
    errors = (simulated - expected).abs().sum(dim=1)
    # sums of the same terms in another order differ in the last digits; a tie counts as "as large"
    as_large = int((errors >= observed - 1e-9 * len(bins.confidence)).sum())
    return ConsistencyTest((1 + as_large) / (1 + settings.n_resamples), band[0], band[1], settings.n_resamples)


def poisson_binomial(chances: Float[Tensor, " n"]) -> Float[Tensor, " n+1"]:
    r"""Probabilities of 0 to n successes among independent trials of different chances.

    The coefficients of $\prod_i (1 - c_i + c_i x)$, multiplied out in a balanced tree.
    Cost: $O(n \log^2 n)$, where SciPy's `poisson_binom` is quadratic.

    References:
        Hong (2013), doi:10.1016/j.csda.2012.10.006.
    """
    n = chances.numel()
    n_blocks = 1 << (max(1, -(-n // BLOCK)) - 1).bit_length()
    padded = chances.new_zeros(n_blocks * BLOCK)
    padded[:n] = chances
    law = chances.new_zeros(n_blocks, BLOCK + 1)
    law[:, 0] = 1.0
    for chance in padded.view(n_blocks, BLOCK).T:
        one_more = law[:, :-1] * chance[:, None]
        law *= 1 - chance[:, None]
        law[:, 1:] += one_more
    while law.shape[0] > 1:
        length = 2 * law.shape[1] - 1
        size = 1 << (length - 1).bit_length()
        transform = torch.fft.rfft(law, n=size)
        law = torch.fft.irfft(transform[0::2] * transform[1::2], n=size)[:, :length].clamp_min(0.0)
    return law[0, : n + 1]


def estimate_debiased_error(bins: BinnedConfidences, units: Units) -> Estimate:
    """Squared calibration error without the share that sampling noise adds, with the jackknife's standard error.

    Near calibration the standard error is too large by up to a factor of root two, and the interval covers more than it
    promises; the percentiles of a bootstrap miss the truth there.

    References:
        Kumar, Liang, Ma (2019), arXiv 1909.10155, section 5;
        Efron and Stein (1981), doi:10.1214/aos/1176345462 (the jackknife's variance is never too small on average).
    """
    value, influence = debiased_error(bins, units)
    if influence is None:
        reason = "no bin holds predictions of two independent units"
        return without_interval(value, units.n, estimator="debiased", reason=reason)
    return symmetric(value, units.standard_error(influence), units, "debiased, jackknife deviation")


def debiased_error(bins: BinnedConfidences, units: Units) -> tuple[float, Float[Tensor, " n"] | None]:
    r"""The debiased squared error, and a score of every sample whose mean it is and whose standard error is its own.

    $\sum_b \frac{n_b}{n} \bigl[(a_b - c_b)^2 - \nu_b\bigr]$ over bins that two units reach, with accuracy $a_b$ and
    mean confidence $c_b$; the noise $\nu_b$ is $a_b (1 - a_b) / (n_b - 1)$ for independent samples, and else the
    variance of the mean surplus over clusters. The scores are those of the jackknife: only the bins of the unit that is
    left out change. Differences of two methods' scores on the same samples make a paired comparison.

    Returns:
        None for the scores where no bin holds two units.
    """
    pairs, cell, unit = _sum_pairs(bins, units)
    total = pairs.new_zeros(bins.n_bins, pairs.shape[1]).index_add_(0, cell, pairs)
    noise = _independent_noise if units.codes is None else _clustered_noise
    value = _terms(total, noise).sum().item() / units.n
    if total[:, -1].max().item() < 2:
        return value, None
    change = _terms(total[cell] - pairs, noise) - _terms(total, noise)[cell]
    left_out = pairs.new_zeros(units.count).index_add_(0, unit, change) + value * units.n
    sizes = units.sums(torch.ones(units.n, dtype=torch.float64))
    left_out = left_out / (units.n - sizes).clamp_min(1)
    scores = units.n * (units.count - 1) / units.count * (left_out.mean() - left_out) / sizes
    return value, value + (scores if units.codes is None else scores[units.codes])


def _sum_pairs(
    bins: BinnedConfidences, units: Units
) -> tuple[Float[Tensor, "pairs 7"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Samples, correct ones and confidences of each unit in each bin that it reaches, with products of these.

    Returns:
        Columns n, k, s, s^2, s n, n^2 and 1 with k correct predictions and the surplus s of these over the confidences;
        the bin and the unit of each pair.
    """
    ones = torch.ones_like(bins.confidence)
    sums = torch.stack([ones, bins.correct, bins.correct - bins.confidence], dim=1)
    cell, unit = bins.bin, torch.arange(units.n)
    if units.codes is not None:
        pair, place = torch.unique(units.codes * bins.n_bins + bins.bin, return_inverse=True)
        sums = sums.new_zeros(len(pair), 3).index_add_(0, place, sums)
        cell, unit = pair % bins.n_bins, pair // bins.n_bins
    n, _, s = sums.T
    return torch.cat([sums, torch.stack([s * s, s * n, n * n, torch.ones_like(n)], dim=1)], dim=1), cell, unit


def _terms(sums: Float[Tensor, "cells 7"], noise: Callable[[Tensor], Tensor]) -> Float[Tensor, " cells"]:
    """Each bin's part of the debiased error, times n."""
    usable = sums[:, -1] >= 2
    safe = torch.where(usable[:, None], sums, torch.full_like(sums, 2.0))
    terms = safe[:, 0] * ((safe[:, 2] / safe[:, 0]).square() - noise(safe))
    return torch.where(usable, terms, torch.zeros_like(terms))


def _independent_noise(sums: Float[Tensor, "cells 7"]) -> Float[Tensor, " cells"]:
    n, accuracy = sums[:, 0], sums[:, 1] / sums[:, 0]
    return accuracy * (1 - accuracy) / (n - 1)


def _clustered_noise(sums: Float[Tensor, "cells 7"]) -> Float[Tensor, " cells"]:
    n, _, s, ss, sn, nn, reached = sums.T
    delta = s / n
    return reached / (reached - 1) * (ss - 2 * delta * sn + delta.square() * nn) / n.square()


def tabulate_bins(bins: BinnedConfidences, test: ConsistencyTest, units: Units) -> tuple[ConfidenceBin, ...]:
    """The reliability diagram as a table."""
    intervals = wilson_by_cell(bins.correct, bins.bin, bins.n_bins, units)
    table = []
    sums = zip(bins.counts.tolist(), bins.sums(bins.correct).tolist(), bins.sums(bins.confidence).tolist(), strict=True)
    for b, (n, correct, confidence) in enumerate(sums):
        edges, interval = (b / bins.n_bins, (b + 1) / bins.n_bins), intervals[b]
        if interval is None:
            table.append(ConfidenceBin(*edges, 0, 0))
            continue
        band = (test.low[b].item(), test.high[b].item())
        table.append(ConfidenceBin(*edges, int(n), round(correct), confidence / n, correct / n, *interval, *band))
    return tuple(table)
