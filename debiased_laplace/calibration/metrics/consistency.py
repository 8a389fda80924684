"""What the bins of confidence would show, were the confidences right: an exact law, and a test."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.metrics.binning import BinnedConfidences

BLOCK = 64  # successes multiplied out one by one before transforms pay


@dataclass(frozen=True)
class ConsistencyTest:
    """What the bins would show, were the confidences right.

    Attributes:
        p_value: share of simulated test sets with an error at least as large as the observed one.
        low: lower quantile of the accuracy in each bin, NaN in empty bins.
        high: upper quantile.
    """

    p_value: float
    low: Float[Tensor, " bins"]
    high: Float[Tensor, " bins"]


def check_consistency(
    bins: BinnedConfidences, *, n_resamples: int, confidence_level: float, seed: int
) -> ConsistencyTest:
    """Consistency resampling: each prediction is right with its own confidence, and we look again.

    The number of right predictions in a bin is a sum of independent successes. Its law is computed, not simulated, so
    that a draw costs one number per bin whatever the size of the test set. The p-value is over draws of all bins.

    Args:
        bins: the predictions, taken as independent.
        n_resamples: simulated test sets; the p-value is no finer than 1 / (n_resamples + 1).
        confidence_level: central share of the accuracies between `low` and `high`.
        seed: of the simulation.

    References:
        Bröcker and Smith (2007), doi:10.1175/WAF993.1; Vaicenavicius et al. (2019), arXiv
        1902.06977.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n_resamples, bins.n_bins, generator=generator, dtype=torch.float64)
    tail = torch.tensor([(1 - confidence_level) / 2, (1 + confidence_level) / 2], dtype=torch.float64)
    counts, expected = bins.counts, bins.sum_per_bin(bins.confidence)
    simulated = torch.zeros_like(uniform)
    band = torch.full((2, bins.n_bins), torch.nan, dtype=torch.float64)
    for b in counts.nonzero()[:, 0].tolist():
        cumulative = law_of_successes(bins.confidence[bins.bin == b]).cumsum(0)
        last = cumulative.numel() - 1  # a sum of probabilities may end a rounding error below 1
        simulated[:, b] = torch.searchsorted(cumulative, uniform[:, b].contiguous()).clamp_max(last)
        band[:, b] = torch.searchsorted(cumulative, tail).clamp_max(last) / counts[b]
    observed = (bins.sum_per_bin(bins.correct) - expected).abs().sum()
    errors = (simulated - expected).abs().sum(dim=1)
    # sums of the same terms in another order differ in the last digits; a tie counts as "as large"
    as_large = int((errors >= observed - 1e-9 * bins.n).sum())
    return ConsistencyTest((1 + as_large) / (1 + n_resamples), band[0], band[1])


def law_of_successes(chances: Float[Tensor, " n"]) -> Float[Tensor, " n+1"]:
    r"""Probabilities of 0 to n successes among independent trials of different chances.

    The coefficients of $\prod_i (1 - c_i + c_i x)$, multiplied out in a balanced tree. Cost: $O(n \log^2 n)$. Absolute
    error about 1e-15 per probability.

    Args:
        chances: of each success, in [0, 1].

    References:
        Hong (2013), doi:10.1016/j.csda.2012.10.006 (the Poisson binomial distribution).
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
