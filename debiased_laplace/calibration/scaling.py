"""Baseline rescaled by one fitted number: a temperature of its logits, or a factor of its standard deviations.

A posterior that is no better is not worth its cost. The number is fitted to validation data, or cross-fitted: each fold
of the test set is scaled with the number fitted to the other folds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import ScalingRecord
from debiased_laplace.calibration.counts import CountPredictions
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.probabilities import ClassificationPredictions, Probabilities, reduce_classification
from debiased_laplace.calibration.regression import RegressionPredictions
from debiased_laplace.calibration.temperature import (
    ScaleFit,
    choose_rows,
    fit_temperature,
    read_validation,
    warn_of_saturation,
)

TemperatureScaling = Literal["auto", "cross_fitted", "validation", "none"]
N_FOLDS = 5
FEWEST_SAMPLES = 100  # below, the number of a fold rests on too few mistakes
# Standard deviation of the cross-fitted loss from its fits, in units of `ScaleFit.cost`. For a loss that is quadratic
# around its minimum and five folds, it exceeds the minimum by 2 (-G^2 / 2 + 9 S / 32) costs, where G^2 and S are
# chi-squared with one and four degrees of freedom. The spread of per-sample differences does not contain it.
ERROR_PER_COST = 2.1


@dataclass(frozen=True, eq=False)
class ScalingRequest:
    """Whether and how the baseline gets a scaled row.

    Attributes:
        baseline: name of the method.
        mode: "auto" is "validation" where there are such data, else "cross_fitted" from 100 test samples on.
        validation: predictions of the baseline outside the test set, and their targets.
    """

    baseline: str
    mode: TemperatureScaling = "auto"
    validation: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in get_args(TemperatureScaling):
            expected = ", ".join(map(repr, get_args(TemperatureScaling)))
            raise ValueError(f"temperature_scaling must be one of {expected}; got {self.mode!r}.")
        if self.validation is None:
            if self.mode == "validation":
                raise ValueError(
                    "temperature_scaling='validation' needs validation=(predictions of the baseline, targets)."
                )
            return
        if self.mode in ("cross_fitted", "none"):
            raise ValueError(f"validation= was given, but temperature_scaling={self.mode!r} does not use it.")
        if not isinstance(self.validation, (tuple, list)) or len(self.validation) != 2:
            raise ValueError("validation must be a pair (predictions of the baseline, targets).")

    def cross_fits(self, units: Units) -> bool:
        """Return whether the number is fitted to folds of the test set."""
        return self.mode != "none" and units.count >= 2 and (self.mode != "auto" or units.n >= FEWEST_SAMPLES)

    def name_row(self, methods: Mapping[str, Any], quantity: str) -> str:
        """Return the name of the scaled row, which no method may have."""
        row = f"{self.baseline}, {quantity}-scaled"
        if self.mode != "none" and row in methods:
            raise ValueError(
                f"A method has the name of the row that is added, {row!r}: rename it, or turn the row off with "
                "temperature_scaling='none'."
            )
        return row


@dataclass(frozen=True, eq=False)
class Scaled:
    """Scaled row of a report, if any, and warnings.

    `fitting_error` is the standard error of the row's loss from the fits.
    """

    record: ScalingRecord | None = None
    row: ClassificationPredictions | RegressionPredictions | None = None
    fitting_error: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scale:
    """Number that scales each sample.

    Attributes:
        fit: to all samples of the folds, or to validation data.
        folds: fits to the other folds of each fold; empty for validation data.
    """

    per_sample: Float[Tensor, " n"]
    fit: ScaleFit
    folds: tuple[ScaleFit, ...] = ()

    def record(self, row: str, baseline: str, quantity: Literal["temperature", "factor"]) -> ScalingRecord:
        """Return the record of a report."""
        n_at_bound = sum(fit.at_bound for fit in self.folds or (self.fit,))
        values = tuple(fit.value for fit in self.folds)
        return ScalingRecord(row, baseline, quantity, self.fit.value, values, self.fit.n, n_at_bound)

    @property
    def fitting_error(self) -> float:
        """Standard error of the scaled loss from the fits."""
        return ERROR_PER_COST * self.fit.cost if self.folds else 0.0


def draw_folds(units: Units, *, seed: int) -> Int[Tensor, " n"]:
    """Draw five folds of equally many units, fewer where there are fewer units; a cluster stays in one fold."""
    order = torch.randperm(units.count, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(units.count, dtype=torch.int64)
    fold[order] = torch.arange(units.count) % min(N_FOLDS, units.count)
    return fold if units.codes is None else fold[units.codes]


def cross_fit(
    fit: Callable[[Int[Tensor, " m"]], ScaleFit], rows: Int[Tensor, " rows"], units: Units, *, seed: int
) -> Scale:
    """Scale each fold with the number fitted to those of `rows` in the other folds."""
    fold = draw_folds(units, seed=seed)
    folds = tuple(fit(rows[fold[rows] != k]) for k in range(int(fold.max()) + 1))
    per_sample = torch.tensor([one.value for one in folds], dtype=torch.float64)[fold]
    return Scale(per_sample, fit(rows), folds)


def scale_all(fit: ScaleFit, n: int) -> Scale:
    """Scale all n samples with one number."""
    return Scale(torch.full((n,), fit.value, dtype=torch.float64), fit)


def scale_classification(
    read: Mapping[str, ClassificationPredictions],
    request: ScalingRequest,
    units: Units,
    settings: Settings,
    *,
    task: Literal["binary", "multiclass"],
) -> Scaled:
    """Divide the logits of the baseline by a fitted temperature."""
    first, seed = request.baseline, settings.seed
    name, base = request.name_row(read, "temperature"), read[first]

    def fit(source: Probabilities, y: Tensor, rows: Int[Tensor, " m"], own: Units) -> ScaleFit:
        logits = source.take_logits(rows)
        return fit_temperature(logits, y[rows].to(logits.device), own.take(rows))

    if request.validation is not None:
        source, y = read_validation(first, request.validation, n_classes=base.source.n_classes, task=task)
        scale = scale_all(fit(source, y, choose_rows(source, seed=seed), Units(source.n, units.level)), base.n)
    elif request.cross_fits(units):
        chosen = choose_rows(base.source, seed=seed)
        scale = cross_fit(lambda rows: fit(base.source, base.targets, rows, units), chosen, units, seed=seed)
    else:
        return Scaled()
    record, warnings = scale.record(name, first, "temperature"), warn_of_saturation(first, base, scale.fit.value)
    if record.n_at_bound:
        which = f"{record.n_at_bound} of {len(record.per_fold)} temperatures" if record.per_fold else "the temperature"
        warnings.append(
            f"{name}: {which} ended at a bound, since (nearly) all labels are the most probable class or the logits "
            "are uninformative; the scaled row then says little."
        )
    source = replace(base.source, mutual_information=None, logit_variance=None, temperature=scale.per_sample)
    row = reduce_classification(source, base.targets, n_bins=settings.n_bins)
    # rounding may not move a tie
    return Scaled(record, replace(row, predicted=base.predicted), scale.fitting_error, tuple(warnings))


def fit_factor(predictions: RegressionPredictions, rows: Int[Tensor, " m"], units: Units) -> ScaleFit:
    r"""Fit the factor of maximum likelihood to independent Gaussians, $\sqrt{\frac{1}{nd} \sum z^2}$."""
    squares = predictions.z_scores.square().mean(dim=1)[rows]
    mean, error = squares.mean().item(), units.take(rows).standard_error(squares)
    return ScaleFit(sqrt(mean), len(rows), (error / mean) ** 2 / 4 if error is not None and mean > 0 else 0.0)


def scale_regression(
    read: Mapping[str, RegressionPredictions],
    request: ScalingRequest,
    units: Units,
    settings: Settings,
    *,
    validation: RegressionPredictions | None,
) -> Scaled:
    """Multiply the standard deviations of the baseline, noise and correlations included, by a fitted factor.

    Counts have no such row, since their spread follows from their mean.
    """
    first = request.baseline
    if isinstance(read[first], CountPredictions):
        if request.mode in ("cross_fitted", "validation") or validation is not None:
            raise ValueError("Counts have no standard deviation to scale; expected no validation= and no scaling.")
        return Scaled()
    name, base = request.name_row(read, "variance"), read[first]
    if validation is not None:
        if validation.n_outputs != base.n_outputs:
            raise ValueError(
                f"The validation predictions of {first!r} must have the {base.n_outputs} outputs of the test set; got "
                f"{validation.n_outputs}."
            )
        n = validation.n
        scale = scale_all(fit_factor(validation, torch.arange(n), Units(n, units.level)), base.n)
    elif request.cross_fits(units):
        all_rows = torch.arange(base.n)
        scale = cross_fit(lambda rows: fit_factor(base, rows, units), all_rows, units, seed=settings.seed)
    else:
        return Scaled()
    if not bool((scale.per_sample > 0).all()):
        warning = f"{first}: all errors of the fit are 0, so that its standard deviations cannot be scaled."
        return Scaled(warnings=(warning,))
    row = base.scaled(scale.per_sample)
    return Scaled(scale.record(name, first, "factor"), row, scale.fitting_error)
