"""Calibration of every class's probability, not only of the predicted one."""

from dataclasses import dataclass
from math import pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import Estimate, without_interval
from debiased_laplace.calibration.metrics.cell_shares import intervals_of_shares
from debiased_laplace.calibration.metrics.debiased_error import debiased_squared_error
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions


@dataclass(frozen=True)
class ClassCount:
    """Test samples of one class, how many a method got right, and how far the class's probability can be trusted.

    Attributes:
        label: number of the class.
        n: its samples.
        n_correct: how many of them were recognised.
        low: lower end of the accuracy's Wilson interval, None without samples.
        high: upper end.
        error: expected calibration error of the class's probability, over all samples.
        noise_floor: the same error of right probabilities.
    """

    label: int
    n: int
    n_correct: int
    low: float | None = None
    high: float | None = None
    error: float | None = None
    noise_floor: float | None = None


def measure_each_class(predictions: ClassificationPredictions) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    r"""Each class's calibration error, and the same of right probabilities.

    $\frac1n \sum_b \lvert \sum_{i \in b} (1[y_i = c] - p_{ic}) \rvert$ over bins of equal width of $p_{ic}$, and
    $\sqrt{2/\pi}\, \frac1n \sum_b \sqrt{\sum_{i \in b} p_{ic} (1 - p_{ic})}$.

    References:
        Kull et al. (2019), arXiv 1910.12656, section 2 (classwise expected calibration error).
    """
    bins, n = predictions.class_bins, predictions.n
    error = (bins.positives - bins.confidence).abs().sum(dim=1) / n
    floor = sqrt(2 / pi) * bins.variance.sqrt().sum(dim=1) / n
    return error, floor


def measure_classwise(predictions: ClassificationPredictions) -> dict[str, Estimate]:
    """Means over classes of their calibration errors, of their noise floors and of their debiased squared errors."""
    n, bins = predictions.n, predictions.class_bins
    n_bins = bins.counts.shape[1]
    error, floor = (x.mean().item() for x in measure_each_class(predictions))
    squared = debiased_squared_error(bins.counts, bins.positives, bins.confidence).mean().item()
    return {
        "classwise_ece": without_interval(
            error,
            n,
            estimator=f"mean over {predictions.n_classes} classes, {n_bins} bins of equal width each",
            reason="a binned error is biased upwards; compare it with its noise floor",
        ),
        "classwise_ece_noise_floor": without_interval(
            floor,
            n,
            estimator="closed form, normal sums",
            reason="it follows from the probabilities alone"
            + (", as if samples were independent" if predictions.clusters is not None else ""),
        ),
        "classwise_rmsce2_debiased": without_interval(
            squared,
            n,
            estimator=f"debiased, mean over {predictions.n_classes} classes, {n_bins} bins of equal width each",
            reason="every sample is in all classes' bins, so that a deviation takes a second pass over all "
            "probabilities"
            + (
                "; what it takes off is the noise of independent samples, too little for clusters"
                if predictions.clusters is not None
                else ""
            ),
        ),
    }


def tabulate_classes(predictions: ClassificationPredictions, *, confidence_level: float) -> tuple[ClassCount, ...]:
    """Every class's samples, accuracy and calibration."""
    targets, C = predictions.targets, predictions.n_classes
    n = torch.bincount(targets, minlength=C).tolist()
    correct = torch.bincount(targets, weights=predictions.correct, minlength=C).tolist()
    intervals = intervals_of_shares(
        predictions.correct, targets, C, confidence_level=confidence_level, clusters=predictions.clusters
    )
    errors, floors = (x.tolist() for x in measure_each_class(predictions))
    ends = [interval or (None, None) for interval in intervals]
    return tuple(
        ClassCount(c, n[c], round(correct[c]), low, high, errors[c], floors[c]) for c, (low, high) in enumerate(ends)
    )
