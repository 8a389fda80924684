"""The baseline after temperature scaling as a row of its own, and what a temperature would do for every method."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.contents import MethodResult
from debiased_laplace.calibration.estimates import count_units
from debiased_laplace.calibration.evaluation import Evaluation, Settings, evaluate_classification
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions, reduce_probabilities
from debiased_laplace.calibration.predictions.labels import read_labels
from debiased_laplace.calibration.scaling.cross_fitting import (
    CrossFit,
    cross_fit_temperature,
    fit_on_validation,
    scaled_negative_log_likelihood,
    warn_about_saturation,
)
from debiased_laplace.calibration.scaling.decomposition import ERROR_PER_COST, estimate_temperature, split_loss
from debiased_laplace.calibration.scaling.records import ScalingRecord
from debiased_laplace.calibration.scaling.request import (
    ScalingRequest,
    check_agreement,
    read_logits,
    read_validation,
)


@dataclass(frozen=True, eq=False)
class Scaled:
    """All methods with what scaling adds.

    Attributes:
        evaluations: method to its part of the report, the scaled row after the baseline.
        record: how that row came about; None where there is none.
        warnings: what a reader must know of the fits.
        fitting_errors: standard error of the scaled row's loss from the fits, by the name of the row.
    """

    evaluations: dict[str, Evaluation]
    record: ScalingRecord | None
    warnings: tuple[str, ...] = ()
    fitting_errors: Mapping[str, float] = field(default_factory=dict)


def attach_logits(
    read: Mapping[str, ClassificationPredictions], request: ScalingRequest
) -> dict[str, ClassificationPredictions]:
    """Predictions that know the logits they came from, where these were given.

    Raises:
        ValueError: for logits of another shape, of unknown methods, or that do not give the probabilities.
    """
    request.check_names(read, request.row)
    known = dict(read)
    for method, logits in request.logits.items():
        shape = known[method].source.values.shape
        source = replace(known[method].source, logits=read_logits(method, logits, shape=shape))
        check_agreement(method, source)
        known[method] = replace(known[method], source=source)
    return known


def scale_classifications(
    read: Mapping[str, ClassificationPredictions],
    evaluations: Mapping[str, Evaluation],
    request: ScalingRequest,
    settings: Settings,
    *,
    task: Literal["binary", "multiclass"],
) -> Scaled:
    """Add the scaled baseline after the baseline, and the metrics of temperature to every method.

    Args:
        read: predictions of every method.
        evaluations: their parts of the report.
        request: what is wanted.
        settings: options of the numbers.
        task: of the report.

    Raises:
        ValueError: for wrong validation data or logits.
    """
    one = next(iter(read.values()))
    fits: dict[str, CrossFit] = {}
    if request.cross_fits(one.n, count_units(one.n, one.clusters)):
        fits = {method: cross_fit_temperature(p, seed=settings.seed) for method, p in read.items()}
    base = read[request.baseline]
    record, temperature = _choose(request, base, fits.get(request.baseline), settings.seed, task)
    result, warnings = {}, []
    for method, evaluation in evaluations.items():
        fit = fits.get(method)
        extra = {} if fit is None else _measure(read[method], fit, evaluation.scores["nll"], settings)
        result[method] = replace(
            evaluation, result=replace(evaluation.result, metrics={**evaluation.result.metrics, **extra})
        )
        used = record.value if record is not None and method == request.baseline else fit and fit.pooled.temperature
        warning = warn_about_saturation(method, read[method], used) if used else None
        warnings += [warning] if warning else []
        if method == request.baseline and record is not None and temperature is not None:
            result[record.method] = _evaluate_scaled(base, record, temperature, settings)
            warnings += _warn_about_bounds(record)
    errors = {}
    if record is not None and record.fitted_on == "folds":
        errors = {record.method: ERROR_PER_COST * fits[request.baseline].pooled.cost}
    return Scaled(result, record, tuple(warnings), errors)


def _choose(
    request: ScalingRequest,
    base: ClassificationPredictions,
    fit: CrossFit | None,
    seed: int,
    task: Literal["binary", "multiclass"],
) -> tuple[ScalingRecord | None, Float[Tensor, " n"] | None]:
    """How the baseline is scaled, and the temperature of every test sample."""
    from_logits = base.source.logits is not None
    if request.validation is not None:
        probabilities, targets = request.validation
        given = read_validation(request.baseline, probabilities, task=task, n_classes=base.n_classes)
        where = f"The validation predictions of {request.baseline!r}"
        labels = read_labels(targets, n=given.n, n_classes=given.n_classes, where=where)
        one = fit_on_validation(given, labels, seed=seed)
        T = one.temperature
        record = ScalingRecord(
            request.row,
            request.baseline,
            "temperature",
            T,
            (),
            "validation",
            one.n,
            int(one.at_bound is not None),
            from_logits,
        )
        return record, torch.full((base.n,), T, dtype=torch.float64)
    if fit is None:
        return None, None
    record = ScalingRecord(
        request.row,
        request.baseline,
        "temperature",
        fit.pooled.temperature,
        fit.per_fold,
        "folds",
        fit.pooled.n,
        fit.n_at_bound,
        from_logits,
    )
    return record, fit.temperature


def _measure(
    predictions: ClassificationPredictions, fit: CrossFit, loss: Float[Tensor, " n"], settings: Settings
) -> dict:
    """The metrics of temperature of one method."""
    level, clusters = settings.confidence_level, predictions.clusters
    scaled = scaled_negative_log_likelihood(predictions, fit.temperature)
    temperature = estimate_temperature(fit.pooled, confidence_level=level, clusters=clusters)
    return {
        "temperature_optimal": temperature,
        **split_loss(
            loss, scaled, confidence_level=level, clusters=clusters, fitting_error=ERROR_PER_COST * fit.pooled.cost
        ),
    }


def _evaluate_scaled(
    base: ClassificationPredictions, record: ScalingRecord, temperature: Float[Tensor, " n"], settings: Settings
) -> Evaluation:
    """The scaled row: the same reduction, its portions divided by temperatures on the way."""
    source = replace(base.source, mutual_information=None, logit_variance=None, temperature=temperature)
    scaled = replace(
        reduce_probabilities(source, base.targets, n_bins=settings.n_bins),
        predicted=base.predicted,  # rounding may not move a tie
        clusters=base.clusters,
    )
    evaluation = evaluate_classification(record.method, scaled, settings)
    described: MethodResult = replace(evaluation.result, description=record.description)
    return replace(evaluation, result=described)


def _warn_about_bounds(record: ScalingRecord) -> list[str]:
    if not record.n_at_bound:
        return []
    which = (
        f"{record.n_at_bound} of {len(record.per_fold)} temperatures of" if record.per_fold else "the temperature of"
    )
    return [
        f"{record.method}: {which} {record.baseline} ended at a bound, since (nearly) all labels are the most probable "
        "class or the logits tell nothing; the scaled row then says little."
    ]
