"""The same metrics for every group of samples: who is served worse?"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    without_interval,
)
from debiased_laplace.calibration.metrics.classification import NO_INTERVAL, brier_score, negative_log_likelihood
from debiased_laplace.calibration.metrics.curves import covered
from debiased_laplace.calibration.metrics.partitions import (
    expected_error,
    expected_error_by_chance,
    sort_confidences,
    split_by_width,
)
from debiased_laplace.calibration.metrics.regression import INTERVAL_LEVEL, ranked_probability_score
from debiased_laplace.calibration.metrics.regression import negative_log_likelihood as negative_log_density
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions
from debiased_laplace.calibration.predictions.grouping import Grouping
from debiased_laplace.calibration.predictions.regression import RegressionPredictions
from debiased_laplace.calibration.skewness import estimate_skewed_mean

FEW_IN_GROUP = 30


@dataclass(frozen=True)
class GroupResult:
    """Metrics of every method on one group of samples.

    Attributes:
        grouping: what the samples are grouped by.
        group: name of the group.
        n: its samples.
        few: whether these are too few for normal intervals.
        metrics: method to metric name to estimate.
    """

    grouping: str
    group: str
    n: int
    few: bool
    metrics: Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True, eq=False)
class GroupScore:
    """A score of every sample whose mean, share or root mean is a metric of a group."""

    values: Float[Tensor, " n"]
    estimate: Callable[..., Estimate]


def measure_groups(
    predictions: ClassificationPredictions, groupings: tuple[Grouping, ...], *, n_bins: int, confidence_level: float
) -> tuple[dict[str, Estimate], ...]:
    """Metrics of class probabilities on every group of every grouping, one after another.

    Args:
        predictions: probabilities and labels.
        groupings: which sample belongs where.
        n_bins: bins of equal width of the calibration error.
        confidence_level: of all intervals.
    """
    scores = {
        "nll": GroupScore(negative_log_likelihood(predictions), estimate_skewed_mean),
        "brier": GroupScore(brier_score(predictions), estimate_skewed_mean),
        "accuracy": GroupScore(predictions.correct, estimate_share),
        "confidence_gap": GroupScore(predictions.confidence - predictions.correct, estimate_mean),
    }
    measured = measure_scores(scores, groupings, predictions.clusters, confidence_level=confidence_level)
    for metrics, rows in zip(measured, iterate_groups(groupings), strict=True):
        ordered = sort_confidences(predictions.confidence[rows], predictions.correct[rows])
        bounds = split_by_width(ordered, n_bins)
        words = f"{n_bins} bins of equal width"
        metrics["ece"] = without_interval(
            expected_error(ordered, bounds), ordered.n, estimator=words, reason=NO_INTERVAL
        )
        metrics["ece_noise_floor"] = without_interval(
            expected_error_by_chance(ordered, bounds),
            ordered.n,
            estimator="closed form, normal sums",
            reason="it follows from the confidences alone",
        )
    return measured


def measure_scores(
    scores: Mapping[str, GroupScore],
    groupings: tuple[Grouping, ...],
    clusters: Int[Tensor, " n"] | None,
    *,
    confidence_level: float,
) -> tuple[dict[str, Estimate], ...]:
    """The estimate of every score on every group.

    Args:
        scores: metric to its score of every sample.
        groupings: which sample belongs where.
        clusters: number of each sample's cluster, or None.
        confidence_level: of all intervals.
    """
    measured = []
    for rows in iterate_groups(groupings):
        own = None if clusters is None else torch.unique(clusters[rows], return_inverse=True)[1]
        measured.append(
            {
                name: score.estimate(score.values[rows], confidence_level=confidence_level, clusters=own)
                for name, score in scores.items()
            }
        )
    return tuple(measured)


def iterate_groups(groupings: tuple[Grouping, ...]) -> Iterator[Int[Tensor, " rows"]]:
    """The rows of every group that has any, in the order of `collect_groups`."""
    for grouping in groupings:
        for code in range(len(grouping.labels)):
            rows = (grouping.codes == code).nonzero()[:, 0]
            if rows.numel():
                yield rows


def collect_groups(
    groupings: tuple[Grouping, ...], measured: Mapping[str, tuple[dict[str, Estimate], ...]]
) -> tuple[GroupResult, ...]:
    """The groups with the metrics of all methods.

    Args:
        groupings: which sample belongs where.
        measured: method to its metrics on every group.
    """
    names = [(g.name, label, n) for g in groupings for label, n in _sizes(g) if n]
    return tuple(
        GroupResult(name, label, n, n < FEW_IN_GROUP, {method: metrics[i] for method, metrics in measured.items()})
        for i, (name, label, n) in enumerate(names)
    )


def _sizes(grouping: Grouping) -> list[tuple[str, int]]:
    counts = torch.bincount(grouping.codes, minlength=len(grouping.labels)).tolist()
    return list(zip(grouping.labels, counts, strict=True))


def measure_regression_groups(
    predictions: RegressionPredictions, groupings: tuple[Grouping, ...], *, confidence_level: float
) -> tuple[dict[str, Estimate], ...]:
    """Metrics of regression predictions on every group of every grouping; outputs are averaged within each sample.

    Args:
        predictions: predictive distributions and targets.
        groupings: which sample belongs where.
        confidence_level: of all intervals.
    """
    scores = {
        "nll": GroupScore(negative_log_density(predictions), estimate_skewed_mean),
        "crps": GroupScore(ranked_probability_score(predictions).mean(dim=1), estimate_skewed_mean),
        "rmse": GroupScore(predictions.errors.square().mean(dim=1), estimate_root_mean),
        "z_scale": GroupScore(predictions.z_scores.square().mean(dim=1), estimate_root_mean),
        "picp": GroupScore(covered(predictions, INTERVAL_LEVEL), estimate_share),
    }
    return measure_scores(scores, groupings, None, confidence_level=confidence_level)
