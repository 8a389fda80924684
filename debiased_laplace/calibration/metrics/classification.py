"""Metrics of class probabilities: proper scores, accuracy, calibration errors and their noise."""

from math import copysign, sqrt

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    estimate_mean,
    estimate_share,
    normal_quantile,
    without_interval,
)
from debiased_laplace.calibration.metrics.binning import (
    BinnedConfidences,
    ConsistencyTest,
    bootstrap_debiased_error,
    debiased_squared_error,
    expected_error_by_chance,
    measure_binned_errors,
    measure_positive_class_error,
)
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions

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
        n_resamples: bootstrap replicas behind the standard error of `rmsce2_debiased`.
        seed: of the bootstrap.
    """
    n, level = predictions.n, confidence_level
    errors = measure_binned_errors(bins)
    gap = predictions.confidence - predictions.correct
    metrics = {
        "nll": estimate_mean(negative_log_likelihood(predictions), confidence_level=level),
        "brier": estimate_mean(brier_score(predictions), confidence_level=level),
        "accuracy": estimate_share(predictions.correct, confidence_level=level),
        "confidence_gap": estimate_mean(gap, confidence_level=level),
        "ece": _binned(errors["ece"], bins, "expected calibration error"),
        "ece_noise_floor": without_interval(
            expected_error_by_chance(bins),
            n,
            estimator="closed form, normal sums",
            reason="it follows from the confidences alone",
        ),
        "ece_p_value": without_interval(
            consistency.p_value,
            n,
            estimator=f"consistency resampling, {n_resamples} draws",
            reason="a p-value has no interval",
        ),
        "rmsce2_debiased": estimate_debiased_error(bins, confidence_level=level, n_resamples=n_resamples, seed=seed),
        "mce": _binned(errors["mce"], bins, "maximum calibration error"),
        "ace": _binned(errors["ace"], bins, "average calibration error"),
    }
    if predictions.positive_probability is not None:
        positive = measure_positive_class_error(
            predictions.positive_probability, predictions.targets, n_bins=bins.n_bins
        )
        metrics["ece_positive"] = _binned(positive, bins, "expected calibration error of P(class 1)")
    return metrics


def estimate_debiased_error(
    bins: BinnedConfidences, *, confidence_level: float, n_resamples: int, seed: int
) -> Estimate:
    """Debiased squared calibration error with a normal interval from its bootstrap deviation.

    Args:
        bins: confidences in bins.
        confidence_level: coverage of the interval.
        n_resamples: bootstrap replicas, at least 2.
        seed: of the bootstrap.
    """
    value = debiased_squared_error(
        bins.counts, bins.sum_per_bin(bins.correct), bins.sum_per_bin(bins.confidence)
    ).item()
    if bins.counts.max().item() < 2:
        return without_interval(value, bins.n, estimator="debiased", reason="no bin holds two predictions")
    replicas = bootstrap_debiased_error(bins, n_resamples=n_resamples, seed=seed)
    standard_error = replicas.std().item()
    half_width = normal_quantile(confidence_level) * standard_error
    return Estimate(
        value,
        value - half_width,
        value + half_width,
        standard_error,
        bins.n,
        f"debiased, normal interval, {n_resamples} bootstrap replicas",
    )


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
