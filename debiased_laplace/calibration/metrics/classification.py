"""Metrics of class probabilities: proper scores, accuracy, calibration errors and their noise."""

from math import copysign, sqrt

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    count_units,
    estimate_mean,
    estimate_share,
    without_interval,
)
from debiased_laplace.calibration.metrics.bin_sensitivity import measure_other_bins
from debiased_laplace.calibration.metrics.binning import (
    BinnedConfidences,
    expected_error_by_chance,
    measure_binned_errors,
    measure_positive_class_error,
)
from debiased_laplace.calibration.metrics.classwise import measure_classwise
from debiased_laplace.calibration.metrics.consistency import ConsistencyTest
from debiased_laplace.calibration.metrics.debiased_error import estimate_debiased_error
from debiased_laplace.calibration.metrics.kernel_error import estimate_kernel_error
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions
from debiased_laplace.calibration.skewness import estimate_skewed_mean

NO_INTERVAL = (
    "a binned error is biased upwards, and bootstrap intervals around it miss the truth for nearly "
    "calibrated models; compare it with its noise floor and p-value"
)


def negative_log_likelihood(predictions: ClassificationPredictions) -> Float[Tensor, " n"]:
    r"""$-\log p(y)$ in nats per sample, finite also for a true class of probability 0."""
    return -predictions.true_class_probability.clamp_min(predictions.smallest_probability).log()


def brier_score(predictions: ClassificationPredictions) -> Float[Tensor, " n"]:
    r"""$\sum_c (p_c - 1[y = c])^2$ per sample, between 0 and 2.

    References:
        Brier (1950), doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    # the difference of large terms may leave a rounding error below zero
    return (predictions.squared_norm - 2 * predictions.true_class_probability + 1).clamp_min(0.0)


def measure_classification(
    predictions: ClassificationPredictions,
    bins: BinnedConfidences,
    consistency: ConsistencyTest,
    *,
    confidence_level: float,
    n_resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Every metric of one method.

    Args:
        predictions: probabilities and labels.
        bins: their confidences in bins.
        consistency: what chance would make of these bins.
        confidence_level: of all intervals.
        n_resamples: draws behind the consistency test.
        seed: of the rows that the kernel error looks at.
    """
    level, clusters = confidence_level, predictions.clusters
    gap = predictions.confidence - predictions.correct
    errors = measure_binned_errors(bins)
    metrics = {
        "nll": estimate_skewed_mean(negative_log_likelihood(predictions), confidence_level=level, clusters=clusters),
        "brier": estimate_skewed_mean(brier_score(predictions), confidence_level=level, clusters=clusters),
        "accuracy": estimate_share(predictions.correct, confidence_level=level, clusters=clusters),
        "confidence_gap": estimate_mean(gap, confidence_level=level, clusters=clusters),
        "ece": _binned(errors["ece"], bins, "expected calibration error"),
        **_describe_chance(predictions, bins, consistency, n_resamples=n_resamples),
        "rmsce2_debiased": estimate_debiased_error(bins, confidence_level=level, clusters=clusters),
        "mce": _binned(errors["mce"], bins, "maximum calibration error"),
        "ace": _binned(errors["ace"], bins, "average calibration error"),
        **measure_other_bins(bins.ordered, n_bins=bins.n_bins),
        **measure_classwise(predictions),
        "skce": estimate_kernel_error(predictions, confidence_level=level, seed=seed),
    }
    if predictions.positive_probability is not None:
        positive = measure_positive_class_error(
            predictions.positive_probability, predictions.targets, n_bins=bins.n_bins
        )
        metrics["ece_positive"] = _binned(positive, bins, "expected calibration error of P(class 1)")
    return metrics


def _describe_chance(
    predictions: ClassificationPredictions, bins: BinnedConfidences, consistency: ConsistencyTest, *, n_resamples: int
) -> dict[str, Estimate]:
    """The noise floor and the p-value of the calibration error; both take samples as independent."""
    floor_reason, p_reason = "it follows from the confidences alone", "a p-value has no interval"
    if predictions.clusters is not None:
        dependence = f"the samples come in {count_units(predictions.n, predictions.clusters)} clusters"
        floor_reason += f", as if samples were independent; {dependence}, so that the true floor is higher"
        p_reason += f"; it takes samples as independent, but {dependence}, so that it is too small"
    return {
        "ece_noise_floor": without_interval(
            expected_error_by_chance(bins),
            bins.n,
            estimator="closed form, normal sums",
            reason=floor_reason,
        ),
        "ece_p_value": without_interval(
            consistency.p_value,
            bins.n,
            estimator=f"consistency resampling, {n_resamples} draws",
            reason=p_reason,
        ),
    }


def signed_root(squared_error: float) -> float:
    """A squared error on the scale of the error, its sign kept."""
    return copysign(sqrt(abs(squared_error)), squared_error)


def _binned(value: float, bins: BinnedConfidences, name: str) -> Estimate:
    return without_interval(
        value,
        bins.n,
        estimator=f"netcal, {name}, {bins.n_bins} bins of equal width",
        reason=NO_INTERVAL,
    )
