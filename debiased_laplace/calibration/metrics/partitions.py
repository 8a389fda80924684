"""Calibration errors over any partition of the sorted confidences: equal width, equal mass, a monotone sweep.

Sums over a range of sorted confidences are differences of running sums, so that fifty partitions cost little more
than one.
"""

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_SWEPT_BINS = 1000


@dataclass(frozen=True)
class SortedConfidences:
    """Confidences in rising order, with running sums that start at 0.

    Attributes:
        confidence: rising.
        correct: running number of right predictions.
        surplus: running sum of right predictions less confidence.
        variance: running sum of c (1 - c).
        tie_starts: where each distinct confidence starts.
        tie_middles: mean rank of the samples that share it.
    """

    confidence: Float[np.ndarray, " n"]
    correct: Float[np.ndarray, " n+1"]
    surplus: Float[np.ndarray, " n+1"]
    variance: Float[np.ndarray, " n+1"]
    tie_starts: Int[np.ndarray, " distinct"]
    tie_middles: Float[np.ndarray, " distinct"]

    @property
    def n(self) -> int:
        """Number of predictions."""
        return len(self.confidence)


def sort_confidences(confidence: Float[Tensor, " n"], correct: Float[Tensor, " n"]) -> SortedConfidences:
    """Sort predictions by confidence."""
    c, order = torch.sort(confidence.cpu(), stable=True)
    right = correct.cpu()[order]
    correct_sums, surplus, variance = (
        np.concatenate([[0.0], x.cumsum(0).numpy()]) for x in (right, right - c, c * (1 - c))
    )
    ordered = c.numpy()
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.concatenate([starts[1:], [len(ordered)]])
    return SortedConfidences(ordered, correct_sums, surplus, variance, starts, (starts + ends) / 2)


def split_by_width(predictions: SortedConfidences, n_bins: int) -> Int[np.ndarray, " bounds"]:
    """Ranks between which the bins of equal width lie: closed on the left, the last on both sides, netcal's edges."""
    inner = np.linspace(0.0, 1.0, n_bins + 1)[1:-1]
    return np.concatenate([[0], np.searchsorted(predictions.confidence, inner, side="left"), [predictions.n]])


def split_by_mass(predictions: SortedConfidences, n_bins: int) -> Int[np.ndarray, " bounds"]:
    """Ranks between which bins of nearly equal counts lie; equal confidences share a bin, that of their mean rank.

    There are fewer bins than asked for where many confidences are equal.
    """
    targets = np.arange(1, n_bins) * (predictions.n / n_bins)
    first = np.searchsorted(predictions.tie_middles, targets, side="left")
    starts = predictions.tie_starts[first[first < len(predictions.tie_starts)]]
    return np.unique(np.concatenate([[0], starts, [predictions.n]]))


def expected_error(predictions: SortedConfidences, bounds: Int[np.ndarray, " bounds"]) -> float:
    """Expected calibration error over the bins between `bounds`."""
    return float(np.abs(np.diff(predictions.surplus[bounds])).sum() / predictions.n)


def expected_error_by_chance(predictions: SortedConfidences, bounds: Int[np.ndarray, " bounds"]) -> float:
    r"""The same error of right confidences: $\sqrt{2/\pi} \sum_b \sqrt{\sum_{i \in b} c_i (1 - c_i)} / n$."""
    variance = np.diff(predictions.variance[bounds]).clip(min=0.0)
    return sqrt(2 / pi) * float(np.sqrt(variance).sum()) / predictions.n


def sweep_bins(predictions: SortedConfidences) -> Int[np.ndarray, " bounds"]:
    """As many bins of equal mass as leave the accuracy rising with the confidence, counted up from one.

    Counting stops at the first number of bins whose accuracies fall somewhere, and at 1,000.

    References:
        Roelofs et al. (2022), arXiv 2012.08668, algorithm 1.
    """
    best = split_by_mass(predictions, 1)
    for n_bins in range(2, min(predictions.n, MOST_SWEPT_BINS) + 1):
        bounds = split_by_mass(predictions, n_bins)
        accuracy = np.diff(predictions.correct[bounds]) / np.diff(bounds)
        if (np.diff(accuracy) < 0).any():
            break
        best = bounds
    return best
