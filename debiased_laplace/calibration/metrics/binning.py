r"""Calibration errors over bins of confidence, and what chance alone would make of them.

All of it needs two vectors only: the confidence $c_i$ of each prediction, and whether it was
correct. They live on the CPU: netcal works there, and a generator draws the same numbers on
every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.predictions.class_bins import inner_edges

DRAWS_AT_ONCE = 4_000_000  # samples times resamples held in memory: 32 MB


@dataclass(frozen=True)
class BinnedConfidences:
    """Confidences in bins of equal width on [0, 1], closed on the left, the last on both sides.

    Attributes:
        confidence: of each prediction, in [0, 1].
        correct: 1 where the prediction was right, else 0.
        bin: index of the bin of each prediction.
        n_bins: number of bins.
    """

    confidence: Float[Tensor, " n"]
    correct: Float[Tensor, " n"]
    bin: Int[Tensor, " n"]
    n_bins: int

    @property
    def n(self) -> int:
        """Number of predictions."""
        return self.confidence.numel()

    @property
    def counts(self) -> Float[Tensor, " bins"]:
        """Predictions per bin."""
        return self.sum_per_bin(torch.ones_like(self.confidence))

    def sum_per_bin(self, values: Float[Tensor, " n"]) -> Float[Tensor, " bins"]:
        """Sums of `values` over the predictions of each bin."""
        return torch.bincount(self.bin, weights=values, minlength=self.n_bins)


def bin_confidences(confidence: Float[Tensor, " n"], correct: Float[Tensor, " n"], *, n_bins: int) -> BinnedConfidences:
    """Sort predictions into `n_bins` bins of equal width, with netcal's edges."""
    confidence, correct = confidence.cpu(), correct.cpu()
    index = torch.bucketize(confidence, inner_edges(n_bins), right=True)
    return BinnedConfidences(confidence, correct, index, n_bins)


def measure_binned_errors(bins: BinnedConfidences) -> dict[Literal["ece", "mce", "ace"], float]:
    """Expected, maximum and average calibration error as netcal computes them.

    netcal gets the two vectors, not the probabilities: for those it guesses the task from the
    labels present (and fails on a shard with two of ten classes), and keeps float32 bin edges.

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


def measure_positive_class_error(probability: Float[Tensor, " n"], targets: Int[Tensor, " n"], *, n_bins: int) -> float:
    """The expected calibration error of P(class 1) itself, netcal's convention for binary tasks."""
    from netcal.metrics.confidence import ECE

    return float(ECE(bins=n_bins).measure(probability.cpu().numpy(), targets.cpu().numpy()))


def expected_error_by_chance(bins: BinnedConfidences) -> float:
    r"""Expected calibration error that a perfectly calibrated model would show here.

    Each bin's surplus of correct predictions is nearly normal with variance $\sum_i c_i (1 - c_i)$,
    so that the mean of its absolute value is $\sqrt{2 / \pi}$ standard deviations.
    """
    variance = bins.sum_per_bin(bins.confidence * (1 - bins.confidence))
    return sqrt(2 / pi) * variance.sqrt().sum().item() / bins.n


@dataclass(frozen=True)
class ConsistencyTest:
    """What the bins would show, were the confidences right.

    Attributes:
        p_value: share of simulated test sets with an error at least as large as the observed one.
        low: lower quantile of the simulated accuracy in each bin, NaN in empty bins.
        high: upper quantile.
    """

    p_value: float
    low: Float[Tensor, " bins"]
    high: Float[Tensor, " bins"]


def check_consistency(
    bins: BinnedConfidences, *, n_resamples: int, confidence_level: float, seed: int
) -> ConsistencyTest:
    """Consistency resampling: draw each prediction right with its own confidence, and look again.

    Args:
        bins: the predictions.
        n_resamples: simulated test sets; the p-value is no finer than 1 / (n_resamples + 1).
        confidence_level: central share of the simulated accuracies between `low` and `high`.
        seed: of the simulation.

    References:
        Bröcker and Smith (2007), doi:10.1175/WAF993.1; Vaicenavicius et al. (2019), arXiv
        1902.06977.
    """
    generator = torch.Generator().manual_seed(seed)
    expected = bins.sum_per_bin(bins.confidence)
    rows = []
    for resamples in _chunks(n_resamples, bins.n):
        uniform = torch.rand(resamples, bins.n, generator=generator, dtype=bins.confidence.dtype)
        correct = (uniform < bins.confidence).to(bins.confidence.dtype)
        sums = correct.new_zeros(resamples, bins.n_bins)
        rows.append(sums.index_add_(1, bins.bin, correct))
    simulated = torch.cat(rows)
    observed = (bins.sum_per_bin(bins.correct) - expected).abs().sum()
    errors = (simulated - expected).abs().sum(dim=1)
    # sums of the same terms in another order differ in the last digits; a tie counts as "as large"
    as_large = int((errors >= observed - 1e-9 * bins.n).sum())
    tail = (1 - confidence_level) / 2
    quantiles = torch.tensor([tail, 1 - tail], dtype=simulated.dtype)
    low, high = torch.quantile(simulated / bins.counts, quantiles, dim=0)
    return ConsistencyTest((1 + as_large) / (1 + n_resamples), low, high)


def debiased_squared_error(
    counts: Float[Tensor, "*resamples bins"],
    correct: Float[Tensor, "*resamples bins"],
    confidence: Float[Tensor, "*resamples bins"],
) -> Float[Tensor, "*resamples"]:
    r"""Squared calibration error without the share that sampling noise adds to every bin.

    $\sum_b \frac{n_b}{n} \bigl[(a_b - c_b)^2 - \frac{a_b (1 - a_b)}{n_b - 1}\bigr]$ over bins with
    two predictions or more, $a_b$ and $c_b$ being accuracy and mean confidence. It may be negative.

    Args:
        counts: predictions $n_b$ per bin.
        correct: sum of correct predictions per bin.
        confidence: sum of confidences per bin.

    References:
        Kumar, Liang, Ma (2019), arXiv 1909.10155, section 5.
    """
    usable = counts >= 2
    size = torch.where(usable, counts, torch.full_like(counts, 2.0))
    a, c = correct / size, confidence / size
    noise = a * (1 - a) / (size - 1)
    weight = torch.where(usable, counts, torch.zeros_like(counts))
    return (weight * ((a - c).square() - noise)).sum(dim=-1) / counts.sum(dim=-1)


def bootstrap_debiased_error(bins: BinnedConfidences, *, n_resamples: int, seed: int) -> Float[Tensor, " resamples"]:
    """`debiased_squared_error` of test sets drawn from this one with replacement.

    Their standard deviation serves for a normal interval; their percentiles do not cover.
    """
    generator = torch.Generator().manual_seed(seed)
    replicas = []
    for resamples in _chunks(n_resamples, bins.n):
        drawn = torch.randint(bins.n, (resamples, bins.n), generator=generator)
        # one bincount for the whole chunk: every resample has its own range of bins
        cell = bins.bin[drawn] + bins.n_bins * torch.arange(resamples)[:, None]
        sums = [
            torch.bincount(
                cell.flatten(),
                weights=values[drawn].flatten(),
                minlength=resamples * bins.n_bins,
            ).view(resamples, bins.n_bins)
            for values in (torch.ones_like(bins.confidence), bins.correct, bins.confidence)
        ]
        replicas.append(debiased_squared_error(*sums))
    return torch.cat(replicas)


def _chunks(n_resamples: int, n: int) -> Iterator[int]:
    """Sizes of portions of `n_resamples` that fit in memory with `n` samples each."""
    size = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, n_resamples, size):
        yield min(size, n_resamples - start)
