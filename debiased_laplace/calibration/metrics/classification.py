"""Metrics, curves and per-sample scores of the class probabilities of one method."""

from math import pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.contents import ClassCount, ClassificationCurves, MethodResult
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import (
    Units,
    estimate_mean,
    estimate_share,
    estimate_skewed_mean,
    wilson_by_cell,
    without_interval,
)
from debiased_laplace.calibration.metrics.binned import BinnedConfidences, debiased_error, measure_binned
from debiased_laplace.calibration.metrics.selective import estimate_area, rank_losses, trace_risk
from debiased_laplace.calibration.probabilities import ClassificationPredictions


def negative_log_likelihood(predictions: ClassificationPredictions) -> Float[Tensor, " n"]:
    r"""Return $-\log p(y)$ in nats per sample, from logits where they are known.

    Without logits it is finite also for a true class of probability 0.
    """
    source = predictions.source
    if source.logits is not None:
        return -source.log_probabilities(predictions.targets)
    return -predictions.true_class_probability.clamp_min(source.smallest).log()


def brier_score(predictions: ClassificationPredictions) -> Float[Tensor, " n"]:
    r"""Return $\sum_c (p_c - 1[y = c])^2$ per sample, between 0 and 2.

    References:
        Brier (1950), doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    # the difference of large terms may leave a rounding error below zero
    return (predictions.squared_norm - 2 * predictions.true_class_probability + 1).clamp_min(0.0)


def scores_of(predictions: ClassificationPredictions, units: Units, *, n_bins: int) -> dict[str, Float[Tensor, " n"]]:
    """Return the per-sample scores of paired comparisons; of `rmsce2_debiased` the influence around its value."""
    scores = {
        "nll": negative_log_likelihood(predictions),
        "brier": brier_score(predictions),
        "error": 1 - predictions.correct,
    }
    influence = debiased_error(BinnedConfidences(predictions.confidence, predictions.correct, n_bins), units)[1]
    return scores if influence is None else scores | {"rmsce2_debiased": influence}


def measure_classification(predictions: ClassificationPredictions, units: Units, settings: Settings) -> MethodResult:
    """Estimate the metrics, reliability diagram, classes and risk-coverage curve of one method."""
    bins = BinnedConfidences(predictions.confidence, predictions.correct, settings.n_bins)
    binned, table = measure_binned(bins, units, settings)
    ranked = rank_losses(1 - predictions.correct, predictions.confidence)
    classwise = measure_each_class(predictions)[0].mean().item()
    words = f"mean over {predictions.source.n_classes} classes, {settings.n_bins} bins of equal width each"
    biased = "a binned error is biased upwards; compare it with the noise floors of the classes"
    metrics = {
        "nll": estimate_skewed_mean(negative_log_likelihood(predictions), units),
        "brier": estimate_skewed_mean(brier_score(predictions), units),
        "accuracy": estimate_share(predictions.correct, units),
        "confidence_gap": estimate_mean(predictions.confidence - predictions.correct, units),
        **binned,
        "classwise_ece": without_interval(classwise, units.n, words, biased),
        "aurc": estimate_area([ranked], units, most=1.0),
    }
    curves = ClassificationCurves(table, tabulate_classes(predictions, units))
    return MethodResult(metrics, curves, selection=trace_risk([ranked], units, is_share=True))


def measure_each_class(predictions: ClassificationPredictions) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    r"""Return each class's calibration error, and that expected of right probabilities.

    $\frac1n \sum_b \lvert \sum_{i \in b} (1[y_i = c] - p_{ic}) \rvert$ over bins of equal width of $p_{ic}$, and
    $\sqrt{2/\pi}\, \frac1n \sum_b \sqrt{\sum_{i \in b} p_{ic} (1 - p_{ic})}$.

    References:
        Kull et al. (2019), arXiv 1910.12656, section 2 (classwise expected calibration error).
    """
    bins, n = predictions.class_bins, predictions.n
    error = (bins.positives - bins.confidence).abs().sum(dim=1) / n
    return error, sqrt(2 / pi) * bins.variance.sqrt().sum(dim=1) / n


def tabulate_classes(predictions: ClassificationPredictions, units: Units) -> tuple[ClassCount, ...]:
    """Return every class's samples, accuracy and calibration."""
    targets, C = predictions.targets, predictions.source.n_classes
    n = torch.bincount(targets, minlength=C).tolist()
    correct = torch.bincount(targets, weights=predictions.correct, minlength=C).tolist()
    intervals = wilson_by_cell(predictions.correct, targets, C, units)
    errors, floors = (x.tolist() for x in measure_each_class(predictions))
    return tuple(ClassCount(c, n[c], round(correct[c]), *intervals[c], errors[c], floors[c]) for c in range(C))
