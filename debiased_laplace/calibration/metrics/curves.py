"""What the figures show, as numbers: enough to draw them, and what the JSON file keeps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import normal_quantile, wilson_interval
from debiased_laplace.calibration.metrics.binning import BinnedConfidences
from debiased_laplace.calibration.metrics.cell_shares import intervals_of_shares
from debiased_laplace.calibration.metrics.consistency import ConsistencyTest
from debiased_laplace.calibration.predictions.regression import RegressionPredictions

N_COVERAGE_LEVELS = 19  # 5 % to 95 % in steps of 5 %


@dataclass(frozen=True)
class ConfidenceBin:
    """One bar of a reliability diagram; shares and means are None in an empty bin.

    Attributes:
        left: lower edge, part of the bin.
        right: upper edge, part of the last bin only.
        n: predictions in the bin.
        n_correct: how many of them were right.
        confidence: their mean confidence.
        accuracy: share that was right.
        low: lower end of the accuracy's Wilson interval.
        high: upper end.
        consistent_low: lowest accuracy that is usual for right confidences.
        consistent_high: highest such accuracy.
    """

    left: float
    right: float
    n: int
    n_correct: int
    confidence: float | None
    accuracy: float | None
    low: float | None
    high: float | None
    consistent_low: float | None
    consistent_high: float | None


@dataclass(frozen=True)
class CoverageLevel:
    """Share of targets inside central intervals of one nominal level, with its Wilson interval."""

    nominal: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class HistogramBin:
    """Count of values in [left, right), and the counts that are usual for a right predictive."""

    left: float
    right: float
    n: int
    consistent_low: float
    consistent_high: float


def tabulate_bins(
    bins: BinnedConfidences,
    consistency: ConsistencyTest,
    *,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None = None,
) -> tuple[ConfidenceBin, ...]:
    """The reliability diagram as a table; `clusters` number the samples that depend on each other."""
    intervals = intervals_of_shares(
        bins.correct, bins.bin, bins.n_bins, confidence_level=confidence_level, clusters=clusters
    )
    counts = bins.counts.tolist()
    correct = bins.sum_per_bin(bins.correct).tolist()
    confidence = bins.sum_per_bin(bins.confidence).tolist()
    table = []
    for b, n in enumerate(counts):
        edges = (b / bins.n_bins, (b + 1) / bins.n_bins)
        interval = intervals[b]
        if interval is None:
            table.append(ConfidenceBin(*edges, 0, 0, None, None, None, None, None, None))
            continue
        accuracy = correct[b] / n
        low, high = interval
        table.append(
            ConfidenceBin(
                *edges,
                n=int(n),
                n_correct=round(correct[b]),
                confidence=confidence[b] / n,
                accuracy=accuracy,
                low=low,
                high=high,
                consistent_low=consistency.low[b].item(),
                consistent_high=consistency.high[b].item(),
            )
        )
    return tuple(table)


def tabulate_coverage(predictions: RegressionPredictions, *, confidence_level: float) -> tuple[CoverageLevel, ...]:
    """Nominal against observed coverage of central intervals, averaged over outputs."""
    table = []
    for k in range(1, N_COVERAGE_LEVELS + 1):
        nominal = k / (N_COVERAGE_LEVELS + 1)
        observed = covered(predictions, nominal).mean().item()
        low, high = wilson_interval(observed, predictions.n, confidence_level=confidence_level)
        table.append(CoverageLevel(nominal, observed, low, high))
    return tuple(table)


def covered(predictions: RegressionPredictions, level: float) -> Float[Tensor, " n"]:
    """Share of a sample's outputs inside their central intervals at `level`: 0 or 1 for one output."""
    inside = predictions.normal_scores.abs() <= normal_quantile(level)
    return inside.to(torch.float64).mean(dim=1)


def tabulate_pit(predictions: RegressionPredictions, *, confidence_level: float) -> tuple[HistogramBin, ...]:
    """Histogram of the predictive distribution function at the targets: flat where it is right.

    The usual counts are those of a binomial variable over samples; several outputs of one sample
    count as one observation, which makes the band wide rather than narrow.
    """
    pit = predictions.probability_transform.flatten()
    n_bins = 10 if predictions.n < 1000 else 20
    index = (pit * n_bins).floor().clamp(0, n_bins - 1).to(torch.int64)
    counts = torch.bincount(index, minlength=n_bins).tolist()
    share, outputs = 1 / n_bins, predictions.n_outputs
    half_width = normal_quantile(confidence_level) * (predictions.n * share * (1 - share)) ** 0.5
    low = outputs * max(0.0, predictions.n * share - half_width)
    high = outputs * (predictions.n * share + half_width)
    return tuple(HistogramBin(b / n_bins, (b + 1) / n_bins, count, low, high) for b, count in enumerate(counts))
