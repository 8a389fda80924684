r"""Calibration errors over bins of confidence, and what chance alone would make of them.

All of it needs two vectors only: the confidence $c_i$ of each prediction, and whether it was
correct. They live on the CPU, where netcal works.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.metrics import partitions
from debiased_laplace.calibration.metrics.partitions import SortedConfidences, sort_confidences, split_by_width
from debiased_laplace.calibration.predictions.class_bins import inner_edges


@dataclass(frozen=True, eq=False)
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

    @cached_property
    def ordered(self) -> SortedConfidences:
        """The same predictions by rising confidence."""
        return sort_confidences(self.confidence, self.correct)

    @cached_property
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
    return partitions.expected_error_by_chance(bins.ordered, split_by_width(bins.ordered, bins.n_bins))
