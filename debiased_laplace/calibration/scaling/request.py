"""What the caller of a report wants to be scaled, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import as_tensor, first_bad
from debiased_laplace.calibration.predictions.probabilities import Probabilities, mean_prediction, read_probabilities

TemperatureScaling = Literal["auto", "cross_fitted", "validation", "none"]
FEWEST_SAMPLES = 100  # below, a temperature of a fold rests on too few mistakes
_AGREEMENT = 0.02  # between given probabilities and the softmax of given logits; half precision stays below
_LOOKED_AT = 1000  # rows for that


@dataclass(frozen=True, eq=False)
class ScalingRequest:
    """Whether and how the baseline gets a scaled row.

    Attributes:
        baseline: name of the method that is scaled.
        mode: "auto" is "validation" where there are such data, else "cross_fitted" from 100 test samples on.
        validation: predictions of the baseline outside the test set and their targets.
        logits: of methods, where their probabilities are saturated.

    Raises:
        ValueError: for an unknown mode, or one that contradicts `validation`.
    """

    baseline: str
    mode: TemperatureScaling = "auto"
    validation: tuple[Any, Any] | None = None
    logits: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def row(self) -> str:
        """Name of the scaled classification row."""
        return f"{self.baseline}, temperature-scaled"

    @property
    def regression_row(self) -> str:
        """Name of the scaled regression row."""
        return f"{self.baseline}, variance-scaled"

    def cross_fits(self, n: int, units: int) -> bool:
        """Whether numbers are fitted on folds of n test samples of so many independent units."""
        return self.mode != "none" and units >= 2 and (self.mode != "auto" or n >= FEWEST_SAMPLES)

    def check_names(self, methods: Mapping[str, Any], row: str) -> None:
        """Refuse logits of unknown methods, and a method that has the name of the row to be added.

        Raises:
            ValueError: for either.
        """
        unknown = [name for name in self.logits if name not in methods]
        if unknown:
            raise ValueError(f"logits are given for {unknown}, but the methods are {list(methods)}.")
        if self.mode != "none" and row in methods:
            raise ValueError(
                f"A method has the name of the row that is added, {row!r}: rename it, or turn the row off with "
                "temperature_scaling='none'."
            )


def read_logits(method: str, logits: Any, *, shape: torch.Size) -> Tensor:
    """Finite logits of a given shape.

    Args:
        method: whose, for messages.
        logits: (n, C), for two classes also (n,) = those of class 1.
        shape: that of the probabilities, (n, C).

    Raises:
        ValueError: for another shape or values that are not finite.
    """
    where = f"Logits of {method!r}"
    z = as_tensor(logits, where)
    if not z.is_floating_point():
        z = z.to(torch.float64)
    if z.ndim == 1 and shape[-1] == 2:
        z = torch.stack([torch.zeros_like(z), z], dim=1)
    if z.shape != shape[-2:]:
        raise ValueError(f"{where} must have the shape {tuple(shape[-2:])} of its probabilities; got {tuple(z.shape)}.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"{where} must be finite; {first_bad(~z.isfinite())}.")
    return z


def check_agreement(method: str, probabilities: Probabilities) -> None:
    """Refuse logits that do not give the probabilities beside them; the first thousand rows are looked at.

    Raises:
        ValueError: if a probability differs by more than 0.02.
    """
    rows = torch.arange(min(probabilities.n, _LOOKED_AT))
    p = mean_prediction(probabilities.take(rows))
    worst = (probabilities.take_logits(rows).softmax(dim=1) - p).abs().max().item()
    if worst > _AGREEMENT:
        raise ValueError(
            f"The softmax of the logits of {method!r} must be its probabilities; they differ by up to {worst:.3g}."
        )


def read_validation(
    method: str, predictions: Any, *, task: Literal["binary", "multiclass"], n_classes: int
) -> Probabilities:
    """Validation predictions: probabilities, or logits.

    Numbers between 0 and 1 are probabilities and must sum to 1; any others are logits.

    Args:
        method: whose, for messages.
        predictions: (n, C), for two classes also (n,).
        task: of the report.
        n_classes: C of the test set.

    Raises:
        ValueError: for another number of classes, or numbers that are neither.
    """
    name = f"{method}, validation"
    values = as_tensor(predictions, f"Predictions of {name!r}")
    if values.numel() and values.isfinite().all() and not (values.min() >= 0 and values.max() <= 1):
        shape = torch.Size((values.shape[0], 2 if values.ndim == 1 else values.shape[-1]))
        logits = read_logits(name, values, shape=shape)
        read = Probabilities(logits.to(torch.float64).softmax(dim=1), logits=logits)
    else:
        read = read_probabilities(name, predictions, task=task)
    if read.n_classes != n_classes:
        raise ValueError(
            f"The validation predictions of {method!r} must have the {n_classes} classes of the test set; got "
            f"{read.n_classes}."
        )
    return read
