"""From regression predictions in any form to metrics, curves, per-sample scores and warnings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from debiased_laplace.calibration.contents import DataSummary, MethodResult, RegressionCurves
from debiased_laplace.calibration.detection_evaluation import InsideScores, scores_of_regression
from debiased_laplace.calibration.evaluation import Evaluation, Settings
from debiased_laplace.calibration.metrics.curves import tabulate_coverage, tabulate_pit
from debiased_laplace.calibration.metrics.groups import measure_regression_groups
from debiased_laplace.calibration.metrics.regression import (
    measure_regression,
    negative_log_likelihood,
    ranked_probability_score,
)
from debiased_laplace.calibration.metrics.regression_curves import (
    MAX_OUTPUTS,
    OutputMetrics,
    choose_examples,
    tabulate_spread,
)
from debiased_laplace.calibration.metrics.selection_definitions import SELECTIVE_REGRESSION
from debiased_laplace.calibration.metrics.selective_regression import measure_selective_regression
from debiased_laplace.calibration.metrics.spread import calibrate_spread
from debiased_laplace.calibration.predictions.forms import noise_of_method
from debiased_laplace.calibration.predictions.regression import RegressionPredictions, read_regression
from debiased_laplace.calibration.provenance import digest_targets
from debiased_laplace.calibration.scaling.classification import Scaled
from debiased_laplace.calibration.scaling.regression import scale_regressions
from debiased_laplace.calibration.scaling.request import ScalingRequest

FEW_POSTERIOR_SAMPLES = 100


def evaluate_regressions(
    predictions: Mapping[str, Any],
    targets: Any,
    settings: Settings,
    request: ScalingRequest,
    *,
    observation_noise: Any,
    target_unit: str | None,
) -> tuple[Scaled, DataSummary]:
    """Every method's part of a regression report, and the test set.

    Args:
        predictions: method to predictions, in any form that `read_regression` takes.
        targets: (n,) or (n, outputs).
        settings: options of the numbers.
        request: whether and how the baseline gets a row with scaled standard deviations.
        observation_noise: a standard deviation for all methods that lack noise, or a mapping from methods to theirs.
        target_unit: unit of the targets, for labels.

    Raises:
        ValueError: for wrong predictions, or methods with different numbers of outputs.
    """
    read = {}
    for method, p in predictions.items():
        noise = noise_of_method(observation_noise, method, p, list(predictions))
        read[method] = read_regression(method, p, targets, observation_noise=noise)
    one = next(iter(read.values()))
    data = DataSummary(one.n, None, one.n_outputs, digest_targets(one.targets), None, target_unit)
    evaluations = {method: evaluate_regression(method, p, settings) for method, p in read.items()}

    def read_validation(prediction: Any, y: Any) -> RegressionPredictions:
        first = request.baseline
        noise = noise_of_method(observation_noise, first, prediction, list(predictions))
        return read_regression(f"{first}, validation", prediction, y, observation_noise=noise)

    scaled = scale_regressions(
        read, evaluations, request, settings, evaluate=evaluate_regression, read_validation=read_validation
    )
    return _drop_order(scaled), data


def _drop_order(scaled: Scaled) -> Scaled:
    """The scaled row without selection: one factor changes no order, and those of different folds only mix it."""
    if scaled.record is None:
        return scaled
    name = scaled.record.method
    result = scaled.evaluations[name].result
    metrics = {key: e for key, e in result.metrics.items() if key not in SELECTIVE_REGRESSION}
    kept = replace(scaled.evaluations[name], result=replace(result, metrics=metrics, selection=None))
    return replace(scaled, evaluations=scaled.evaluations | {name: kept})


def evaluate_regression(method: str, predictions: RegressionPredictions, settings: Settings) -> Evaluation:
    """Metrics, curves and scores of one method's predictions."""
    level = settings.confidence_level
    spread = calibrate_spread(predictions, confidence_level=level, n_resamples=settings.n_resamples, seed=settings.seed)
    metrics = measure_regression(predictions, spread, levels=settings.levels, confidence_level=level)
    areas, selection = measure_selective_regression(predictions, confidence_level=level)
    metrics |= areas
    outputs: tuple[OutputMetrics, ...] = ()
    if predictions.n_outputs > 1:
        outputs = tuple(
            OutputMetrics(
                j,
                measure_regression(
                    predictions.output(j), spread.output(j), levels=settings.levels, confidence_level=level
                ),
            )
            for j in range(min(predictions.n_outputs, MAX_OUTPUTS))
        )
    curves = RegressionCurves(
        tabulate_coverage(predictions, confidence_level=level),
        tabulate_pit(predictions, confidence_level=level),
        tabulate_spread(predictions, spread, confidence_level=level),
        choose_examples(predictions, seed=settings.seed),
        outputs,
        predictions.distribution.description,
    )
    scores = {
        "nll": negative_log_likelihood(predictions),
        "crps": ranked_probability_score(predictions).mean(dim=1),
    }
    inside = InsideScores(scores_of_regression(predictions), predictions.n_outputs)
    result = MethodResult(metrics, curves, selection=selection)
    groups = measure_regression_groups(predictions, settings.groups, confidence_level=level)
    return Evaluation(result, scores, tuple(_warn(method, predictions)), inside, groups)


def _warn(method: str, predictions: RegressionPredictions) -> list[str]:
    """What a reader must know of the form of these predictions."""
    S = predictions.distribution.samples
    warnings = []
    if S is not None and S < FEW_POSTERIOR_SAMPLES:
        warnings.append(
            f"{method}: the predictive is known by {S} samples only, so its negative log-likelihood is on average "
            "larger than that of the predictive which they stand for."
        )
    if predictions.n_outputs > MAX_OUTPUTS:
        warnings.append(
            f"{method}: only the first {MAX_OUTPUTS} of {predictions.n_outputs} outputs are shown one by one."
        )
    return warnings
