"""The baseline with standard deviations of the right size as a row of its own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.evaluation import Evaluation, Settings
from debiased_laplace.calibration.metrics.regression import negative_log_likelihood
from debiased_laplace.calibration.predictions.regression import RegressionPredictions
from debiased_laplace.calibration.scaling.classification import Scaled
from debiased_laplace.calibration.scaling.decomposition import ERROR_PER_COST, split_loss
from debiased_laplace.calibration.scaling.records import ScalingRecord
from debiased_laplace.calibration.scaling.request import ScalingRequest
from debiased_laplace.calibration.scaling.spread_scaling import (
    cross_fit_factor,
    fit_factor,
    fitting_cost,
    scale_spread,
)


def scale_regressions(
    read: Mapping[str, RegressionPredictions],
    evaluations: Mapping[str, Evaluation],
    request: ScalingRequest,
    settings: Settings,
    *,
    evaluate: Callable[[str, RegressionPredictions, Settings], Evaluation],
    read_validation: Callable[[Any, Any], RegressionPredictions],
) -> Scaled:
    """Add the scaled baseline after the baseline, and to every method what scaling would save.

    Args:
        read: predictions of every method.
        evaluations: their parts of the report.
        request: what is wanted.
        settings: options of the numbers.
        evaluate: makes one method's part of the report.
        read_validation: reads the validation predictions of the baseline and their targets.

    Raises:
        ValueError: for wrong validation data, or logits.
    """
    if request.logits:
        raise ValueError("logits belong to classification; got them for task='regression'.")
    request.check_names(read, request.regression_row)
    base, warnings = read[request.baseline], []
    fits = {}
    if request.cross_fits(base.n, base.n):
        fits = {method: cross_fit_factor(p, seed=settings.seed) for method, p in read.items()}
    record, factor = _choose(request, base, fits.get(request.baseline), read_validation)
    result = {}
    for method, evaluation in evaluations.items():
        extra = {}
        if method in fits and min(fits[method][1]) > 0:
            scaled = scale_spread(read[method], fits[method][0])
            extra = split_loss(
                evaluation.scores["nll"],
                negative_log_likelihood(scaled),
                confidence_level=settings.confidence_level,
                fitting_error=ERROR_PER_COST * fitting_cost(read[method]),
            )
        result[method] = replace(
            evaluation, result=replace(evaluation.result, metrics={**evaluation.result.metrics, **extra})
        )
        if method != request.baseline or record is None or factor is None:
            continue
        if not bool((factor > 0).all()):
            warnings.append(f"{method}: all errors of the fit are 0, so that its standard deviations cannot be scaled.")
            record = None
            continue
        one = evaluate(record.method, scale_spread(base, factor), settings)
        result[record.method] = replace(one, result=replace(one.result, description=record.description))
    errors = {}
    if record is not None and record.fitted_on == "folds":
        errors = {record.method: ERROR_PER_COST * fitting_cost(base)}
    return Scaled(result, record, tuple(warnings), errors)


def _choose(
    request: ScalingRequest,
    base: RegressionPredictions,
    fit: tuple[Float[Tensor, " n"], tuple[float, ...]] | None,
    read_validation: Callable[[Any, Any], RegressionPredictions],
) -> tuple[ScalingRecord | None, Float[Tensor, " n"] | None]:
    """How the baseline is scaled, and the factor of every test sample."""
    row, first = request.regression_row, request.baseline
    if request.validation is not None:
        given = read_validation(*request.validation)
        if given.n_outputs != base.n_outputs:
            raise ValueError(
                f"The validation predictions of {request.baseline!r} must have the {base.n_outputs} outputs of the "
                f"test set; got {given.n_outputs}."
            )
        value = fit_factor(given)
        record = ScalingRecord(row, first, "factor", value, (), "validation", given.n)
        return record, torch.full((base.n,), value, dtype=torch.float64)
    if fit is None:
        return None, None
    return ScalingRecord(row, first, "factor", fit_factor(base), fit[1], "folds", base.n), fit[0]
