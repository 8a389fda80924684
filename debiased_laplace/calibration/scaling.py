"""The baseline corrected with a single fitted number: temperature scaling, and its counterpart for Gaussians.

A posterior that cannot beat it is not worth its cost. The number is fitted on data of its own, or cross-fitted: each
fold of the test set is scaled with the number fitted on the other folds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate, ScalingRecord
from debiased_laplace.calibration.inputs import Settings, read_labels
from debiased_laplace.calibration.intervals import Units, estimate_skewed_mean
from debiased_laplace.calibration.probabilities import ClassificationPredictions, reduce_classification
from debiased_laplace.calibration.regression import RegressionPredictions
from debiased_laplace.calibration.temperature import (
    TemperatureFit,
    choose_rows,
    cross_fit_temperature,
    draw_folds,
    estimate_temperature,
    fit_temperature,
    read_validation,
    scaled_negative_log_likelihood,
    warn_of_saturation,
)

TemperatureScaling = Literal["auto", "cross_fitted", "validation", "none"]
FEWEST_SAMPLES = 100  # below, a temperature of a fold rests on too few mistakes
# Of a loss that is quadratic around its best number, with five folds: the scaled loss exceeds the best by
# -G^2 / 2 + 9 S / 32 costs of a fit on all samples, times two, with G^2 and S chi-squared of one and four degrees of
# freedom. The deviation of that is 2.1 costs, of which the spread of the samples' differences does not know.
ERROR_PER_COST = 2.1


@dataclass(frozen=True, eq=False)
class ScalingRequest:
    """Whether and how the baseline gets a scaled row.

    "auto" is "validation" where there are such data (predictions of the baseline outside the test set, and their
    targets), else "cross_fitted" from 100 test samples on.
    """

    baseline: str
    mode: TemperatureScaling = "auto"
    validation: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(TemperatureScaling):
            expected = ", ".join(map(repr, get_args(TemperatureScaling)))
            raise ValueError(f"temperature_scaling must be one of {expected}; got {self.mode!r}.")
        if self.mode == "validation" and self.validation is None:
            raise ValueError(
                "temperature_scaling='validation' needs validation=(predictions of the baseline, targets)."
            )
        if self.mode in ("cross_fitted", "none") and self.validation is not None:
            raise ValueError(f"validation= was given, but temperature_scaling={self.mode!r} does not use it.")
        if self.validation is not None and (
            not isinstance(self.validation, (tuple, list)) or len(self.validation) != 2
        ):
            raise ValueError("validation must be a pair (predictions of the baseline, targets).")

    def cross_fits(self, units: Units) -> bool:
        """Whether numbers are fitted on folds of the test set."""
        return self.mode != "none" and units.count >= 2 and (self.mode != "auto" or units.n >= FEWEST_SAMPLES)

    def name_row(self, methods: Mapping[str, Any], quantity: str) -> str:
        """Name the row to be added, and refuse a method that has this name."""
        row = f"{self.baseline}, {quantity}-scaled"
        if self.mode != "none" and row in methods:
            raise ValueError(
                f"A method has the name of the row that is added, {row!r}: rename it, or turn the row off with "
                "temperature_scaling='none'."
            )
        return row


@dataclass(frozen=True, eq=False)
class Scaled:
    """What scaling adds to a report: the scaled row, the metrics of scaling of every method, and warnings.

    `fitting_error` is the standard error of the scaled row's loss from the fits.
    """

    record: ScalingRecord | None = None
    row: ClassificationPredictions | RegressionPredictions | None = None
    metrics: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    fitting_error: float = 0.0
    warnings: tuple[str, ...] = ()


def split_loss(
    loss: Float[Tensor, " n"], scaled_loss: Float[Tensor, " n"], units: Units, *, cost: float
) -> dict[str, Estimate]:
    """Split a loss into what one number repairs, and what remains after cross-fitted scaling.

    `cost` is the expected loss from not knowing the number better.

    References:
        Berta, Holzmüller, Jordan, Bach (2025), arXiv 2501.19195.
    """
    parts = {"nll_calibration_loss": loss - scaled_loss, "nll_refinement_loss": scaled_loss}
    return {
        name: estimate_skewed_mean(part, units, fitting_error=ERROR_PER_COST * cost) for name, part in parts.items()
    }


def scale_classification(
    read: Mapping[str, ClassificationPredictions],
    losses: Mapping[str, Float[Tensor, " n"]],
    request: ScalingRequest,
    units: Units,
    settings: Settings,
    *,
    task: Literal["binary", "multiclass"],
) -> Scaled:
    """Scale the baseline, and measure what a temperature would do for every method."""
    row, base, fits = request.name_row(read, "temperature"), read[request.baseline], {}
    if request.cross_fits(units):
        fits = {method: cross_fit_temperature(p, units, seed=settings.seed) for method, p in read.items()}
    metrics = {
        method: {
            "temperature_optimal": estimate_temperature(fit.pooled, units),
            **split_loss(
                losses[method],
                scaled_negative_log_likelihood(read[method], fit.temperature),
                units,
                cost=fit.pooled.cost,
            ),
        }
        for method, fit in fits.items()
    }
    used = {method: fit.pooled.temperature for method, fit in fits.items()}
    record, temperature, error = None, None, 0.0
    if request.validation is not None:
        one = _fit_on_validation(request, base, settings, task=task)
        record = ScalingRecord(
            row, request.baseline, "temperature", one.temperature, (), one.n, int(one.at_bound is not None)
        )
        temperature = torch.full((base.n,), one.temperature, dtype=torch.float64)
        used[request.baseline] = one.temperature
    elif request.baseline in fits:
        fit = fits[request.baseline]
        numbers = (fit.pooled.temperature, fit.per_fold, fit.pooled.n, fit.n_at_bound)
        record = ScalingRecord(row, request.baseline, "temperature", *numbers)
        temperature, error = fit.temperature, ERROR_PER_COST * fit.pooled.cost
    warnings = [w for method, T in used.items() if (w := warn_of_saturation(method, read[method], T))]
    if record is None or temperature is None:
        return Scaled(metrics=metrics, warnings=tuple(warnings))
    if record.n_at_bound:
        which = f"{record.n_at_bound} of {len(record.per_fold)} temperatures" if record.per_fold else "the temperature"
        warnings.append(
            f"{row}: {which} ended at a bound, since (nearly) all labels are the most probable class or the logits "
            "tell nothing; the scaled row then says little."
        )
    source = replace(base.source, mutual_information=None, logit_variance=None, temperature=temperature)
    scaled = reduce_classification(source, base.targets, n_bins=settings.n_bins)
    # rounding may not move a tie
    return Scaled(record, replace(scaled, predicted=base.predicted), metrics, error, tuple(warnings))


def _fit_on_validation(
    request: ScalingRequest,
    base: ClassificationPredictions,
    settings: Settings,
    *,
    task: Literal["binary", "multiclass"],
) -> TemperatureFit:
    """Fit one temperature on labelled samples outside the test set."""
    assert request.validation is not None  # for the type checker
    method, C = request.baseline, base.source.n_classes
    given = read_validation(method, request.validation[0], task=task)
    if given.n_classes != C:
        raise ValueError(
            f"The validation predictions of {method!r} must have the {C} classes of the test set; got "
            f"{given.n_classes}."
        )
    where = f"The validation predictions of {method!r}"
    labels = read_labels(request.validation[1], n=given.n, n_classes=C, where=where)
    rows = choose_rows(given, seed=settings.seed)
    logits = given.take_logits(rows)
    return fit_temperature(logits, labels.cpu()[rows].to(logits.device), Units(len(rows), settings.confidence_level))


def fit_factor(predictions: RegressionPredictions) -> float:
    r"""$\sqrt{\frac{1}{nd} \sum z^2}$: the likeliest factor of the standard deviations of independent Gaussians."""
    return sqrt(predictions.z_scores.square().mean().item())


def cross_fit_factor(
    predictions: RegressionPredictions, units: Units, *, seed: int
) -> tuple[Float[Tensor, " n"], tuple[float, ...]]:
    """Fit a factor for each of five folds on the errors of the other four.

    Returns:
        The factor of every sample, and those of the folds; 0 where all errors of the other folds are.
    """
    fold = draw_folds(units, seed=seed)
    squares = predictions.z_scores.square().mean(dim=1)
    # a mean of the others, not a difference to the total: one huge error must not leave its rounding to small ones
    factors = torch.stack([squares[fold != k].mean().sqrt() for k in range(int(fold.max()) + 1)])
    return factors[fold], tuple(factors.tolist())


def fitting_cost(predictions: RegressionPredictions, units: Units) -> float:
    """Expected loss, in nats per sample and output, from not knowing the factor better; for independent Gaussians."""
    squares = predictions.z_scores.square().mean(dim=1)
    error = units.standard_error(squares) if squares.max().item() > 0 else None
    return 0.0 if error is None else (error / squares.mean().item()) ** 2 / 4


def scale_spread(predictions: RegressionPredictions, factor: Float[Tensor, " n"]) -> RegressionPredictions:
    """Multiply every deviation from the mean by each sample's factor, noise and correlations included."""
    distribution = predictions.distribution
    return RegressionPredictions(
        distribution.scaled(factor[:, None].to(distribution.values.device)), predictions.targets
    )


def scale_regression(
    read: Mapping[str, RegressionPredictions],
    request: ScalingRequest,
    units: Units,
    settings: Settings,
    *,
    validation: RegressionPredictions | None,
) -> Scaled:
    """Scale the baseline's standard deviations, and measure what that would save for every method."""
    row, first = request.name_row(read, "variance"), request.baseline
    base, metrics, fits = read[first], {}, {}
    if request.cross_fits(units):
        fits = {method: cross_fit_factor(p, units, seed=settings.seed) for method, p in read.items()}
    for method, (factor, per_fold) in fits.items():
        if min(per_fold) > 0:
            loss = scale_spread(read[method], factor).negative_log_density
            cost = fitting_cost(read[method], units)
            metrics[method] = split_loss(read[method].negative_log_density, loss, units, cost=cost)
    error = 0.0
    if validation is not None:
        if validation.n_outputs != base.n_outputs:
            raise ValueError(
                f"The validation predictions of {first!r} must have the {base.n_outputs} outputs of the test set; got "
                f"{validation.n_outputs}."
            )
        value = fit_factor(validation)
        record = ScalingRecord(row, first, "factor", value, (), validation.n)
        factor = torch.full((base.n,), value, dtype=torch.float64)
    elif first in fits:
        factor, per_fold = fits[first]
        record = ScalingRecord(row, first, "factor", fit_factor(base), per_fold, base.n)
        error = ERROR_PER_COST * fitting_cost(base, units)
    else:
        return Scaled(metrics=metrics)
    if not bool((factor > 0).all()):
        warning = f"{first}: all errors of the fit are 0, so that its standard deviations cannot be scaled."
        return Scaled(metrics=metrics, warnings=(warning,))
    return Scaled(record, scale_spread(base, factor), metrics, error)
