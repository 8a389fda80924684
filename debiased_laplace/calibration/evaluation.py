"""From checked predictions to metrics, curves, per-sample scores and warnings."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.contents import (
    ClassificationCurves,
    MethodResult,
    RegressionCurves,
)
from debiased_laplace.calibration.metrics.binning import bin_confidences, check_consistency
from debiased_laplace.calibration.metrics.classification import (
    brier_score,
    measure_classification,
    negative_log_likelihood,
)
from debiased_laplace.calibration.metrics.curves import (
    count_classes,
    tabulate_bins,
    tabulate_coverage,
    tabulate_pit,
)
from debiased_laplace.calibration.metrics.regression import (
    gaussian_crps,
    gaussian_negative_log_likelihood,
    measure_regression,
)
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions
from debiased_laplace.calibration.predictions.regression import RegressionPredictions

FEW_SAMPLES = 30
FEW_RESAMPLES = 200


_MOST_BINS = 1000  # more say nothing at any size of test set, and take minutes


@dataclass(frozen=True)
class Settings:
    """Options of the numbers in a report.

    Attributes:
        n_bins: bins of confidence, at least 2.
        confidence_level: coverage of every interval, between 0 and 1.
        n_resamples: draws behind p-values and bootstrap deviations, at least 2.
        seed: of these draws.

    Raises:
        ValueError: for values outside these ranges.
    """

    n_bins: int
    confidence_level: float
    n_resamples: int
    seed: int

    def __post_init__(self) -> None:
        for name, lowest in (("n_bins", 2), ("n_resamples", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r}.")
        if self.n_bins > _MOST_BINS:
            raise ValueError(f"n_bins must be at most {_MOST_BINS}; got {self.n_bins}.")
        if not 0 < self.confidence_level < 1:
            raise ValueError(f"confidence_level must lie between 0 and 1; got {self.confidence_level!r}.")


@dataclass(frozen=True)
class Evaluation:
    """One method's part of the report.

    Attributes:
        result: metrics and curves.
        scores: metric to per-sample scores on the CPU, for paired comparisons.
        warnings: about this method's predictions.
    """

    result: MethodResult
    scores: Mapping[str, Float[Tensor, " n"]]
    warnings: tuple[str, ...]


def evaluate_classification(method: str, predictions: ClassificationPredictions, settings: Settings) -> Evaluation:
    """Metrics, reliability diagram and scores of class probabilities."""
    level, n_resamples, seed = settings.confidence_level, settings.n_resamples, settings.seed
    bins = bin_confidences(predictions.confidence, predictions.correct, n_bins=settings.n_bins)
    consistency = check_consistency(bins, n_resamples=n_resamples, confidence_level=level, seed=seed)
    metrics = measure_classification(
        predictions,
        bins,
        consistency,
        confidence_level=level,
        n_resamples=n_resamples,
        seed=seed,
    )
    curves = ClassificationCurves(tabulate_bins(bins, consistency, confidence_level=level), count_classes(predictions))
    scores = {
        "nll": negative_log_likelihood(predictions),
        "brier": brier_score(predictions),
    }
    warnings = []
    if predictions.n_impossible:
        warnings.append(
            f"{method}: {predictions.n_impossible} of {predictions.n} predictions gave the true "
            "class probability 0. Their negative log-likelihood is infinite; it was counted as "
            f"{scores['nll'].max().item():.1f} nats each, so the mean is a lower bound."
        )
    return Evaluation(MethodResult(metrics, curves), scores, tuple(warnings))


def evaluate_regression(predictions: RegressionPredictions, settings: Settings) -> Evaluation:
    """Metrics, coverage curve and scores of Gaussian predictions."""
    level = settings.confidence_level
    curves = RegressionCurves(
        tabulate_coverage(predictions, confidence_level=level),
        tabulate_pit(predictions, confidence_level=level),
    )
    scores = {
        "nll": gaussian_negative_log_likelihood(predictions),
        "crps": gaussian_crps(predictions).cpu(),
    }
    result = MethodResult(measure_regression(predictions, confidence_level=level), curves)
    return Evaluation(result, scores, ())


def warn_about_size(n: int, n_resamples: int) -> list[str]:
    """What few samples or few draws mean for the numbers."""
    warnings = []
    if n < FEW_SAMPLES:
        warnings.append(f"Only {n} test samples: normal intervals and verdicts are rough below {FEW_SAMPLES}.")
    if n_resamples < FEW_RESAMPLES:
        warnings.append(
            f"Only {n_resamples} resamples: p-values of calibration are no finer than {1 / (n_resamples + 1):.2g}."
        )
    return warnings


def warn_about_classes(curves: ClassificationCurves | RegressionCurves, names: tuple[str, ...] | None) -> list[str]:
    """Classes that the test set lacks; nothing to say about regression."""
    if isinstance(curves, RegressionCurves):
        return []
    absent = [c.label for c in curves.classes if c.n == 0]
    if not absent:
        return []
    shown = ", ".join(names[label] if names else str(label) for label in absent[:10])
    more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
    return [f"No test sample of {len(absent)} of {len(curves.classes)} classes: {shown}{more}."]
