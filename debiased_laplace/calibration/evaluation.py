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
from debiased_laplace.calibration.detection_evaluation import InsideScores, scores_of_probabilities
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.bin_sensitivity import tabulate_sensitivity
from debiased_laplace.calibration.metrics.binning import bin_confidences
from debiased_laplace.calibration.metrics.classification import (
    brier_score,
    measure_classification,
    negative_log_likelihood,
)
from debiased_laplace.calibration.metrics.classwise import tabulate_classes
from debiased_laplace.calibration.metrics.consistency import check_consistency
from debiased_laplace.calibration.metrics.curves import tabulate_bins
from debiased_laplace.calibration.metrics.debiased_error import influence_on_debiased_error
from debiased_laplace.calibration.metrics.groups import measure_groups
from debiased_laplace.calibration.metrics.risk_coverage import rank_losses
from debiased_laplace.calibration.metrics.selective import measure_selection, trace_selection
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions
from debiased_laplace.calibration.predictions.grouping import Grouping

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
        levels: of central intervals of regression, whole percents.
        groups: of samples that are judged apart too.

    Raises:
        ValueError: for values outside these ranges.
    """

    n_bins: int
    confidence_level: float
    n_resamples: int
    seed: int
    levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    groups: tuple[Grouping, ...] = ()

    def __post_init__(self) -> None:
        for name, lowest in (("n_bins", 2), ("n_resamples", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r}.")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63; got {self.seed}.")
        if self.n_bins > _MOST_BINS:
            raise ValueError(f"n_bins must be at most {_MOST_BINS}; got {self.n_bins}.")
        if not 0 < self.confidence_level < 1:
            raise ValueError(f"confidence_level must lie between 0 and 1; got {self.confidence_level!r}.")
        if any(not 0 < x < 1 or abs(100 * x - round(100 * x)) > 1e-9 for x in self.levels):
            raise ValueError(f"levels must be shares of whole percents such as 0.5 and 0.95; got {self.levels!r}.")


@dataclass(frozen=True)
class Evaluation:
    """One method's part of the report.

    Attributes:
        result: metrics and curves.
        scores: metric to per-sample scores on the CPU, for paired comparisons; of a statistic that is no mean, the
            influence of every sample around its value.
        warnings: about this method's predictions.
        inside: what sets out of distribution are told from.
        groups: metrics on every group that has samples.
    """

    result: MethodResult
    scores: Mapping[str, Float[Tensor, " n"]]
    warnings: tuple[str, ...]
    inside: InsideScores
    groups: tuple[dict[str, Estimate], ...] = ()


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
    curves = ClassificationCurves(
        tabulate_bins(bins, consistency, confidence_level=level, clusters=predictions.clusters),
        tabulate_classes(predictions, confidence_level=level),
        tabulate_sensitivity(bins.ordered),
    )
    ranked = rank_losses(1 - predictions.correct, predictions.confidence, clusters=predictions.clusters)
    metrics |= measure_selection(ranked, confidence_level=level)
    selection = trace_selection(ranked, confidence_level=level, loss="share of errors", is_share=True)
    scores = {
        "nll": negative_log_likelihood(predictions),
        "brier": brier_score(predictions),
        "error": 1 - predictions.correct,
    }
    influence = influence_on_debiased_error(bins, clusters=predictions.clusters)
    if influence is not None:
        scores["rmsce2_debiased"] = influence
    warnings = []
    if predictions.n_impossible:
        warnings.append(
            f"{method}: {predictions.n_impossible} of {predictions.n} predictions gave the true "
            "class probability 0. Their negative log-likelihood is infinite; it was counted as "
            f"{scores['nll'].max().item():.1f} nats each, so the mean is a lower bound."
        )
    inside = InsideScores(scores_of_probabilities(predictions.uncertainty), predictions.n_classes, predictions.clusters)
    groups = measure_groups(predictions, settings.groups, n_bins=settings.n_bins, confidence_level=level)
    return Evaluation(MethodResult(metrics, curves, selection=selection), scores, tuple(warnings), inside, groups)


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
