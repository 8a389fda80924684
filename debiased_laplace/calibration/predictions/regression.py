"""Gaussian predictions and what came, checked once."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import as_tensor, first_bad


@dataclass(frozen=True)
class RegressionPredictions:
    """Gaussian predictions of one method on a test set, one column per output.

    Attributes:
        mean: float64, finite, in the unit of the targets.
        standard_deviation: float64, finite, positive, observation noise included.
        targets: float64, finite, on the device of the means.
    """

    mean: Float[Tensor, "n d"]
    standard_deviation: Float[Tensor, "n d"]
    targets: Float[Tensor, "n d"]

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.mean.shape[0]

    @property
    def n_outputs(self) -> int:
        """Number of outputs d."""
        return self.mean.shape[1]

    @cached_property
    def z_scores(self) -> Float[Tensor, "n d"]:
        """Errors in units of the predicted standard deviation."""
        return (self.targets - self.mean) / self.standard_deviation


def read_regression(method: str, prediction: Any, targets: Any) -> RegressionPredictions:
    """Means, standard deviations and targets, checked and in float64.

    Args:
        method: name of the method, for messages.
        prediction: a pair (mean, standard deviation), each (n,) or (n, outputs), of equal shape.
        targets: as the mean; (n,) and (n, 1) are the same.

    Raises:
        ValueError: for other shapes, numbers that are not finite, or a standard deviation of 0 or less.
    """
    where = f"Predictions of {method!r}"
    if not isinstance(prediction, (tuple, list)) or len(prediction) != 2:
        raise ValueError(
            f"{where}: regression takes a pair (mean, standard deviation); got "
            f"{type(prediction).__name__}"
            + (f" of length {len(prediction)}." if isinstance(prediction, (tuple, list)) else ".")
        )
    columns = []
    for part, label in zip([*prediction, targets], ["mean", "standard deviation", "targets"], strict=True):
        x = as_tensor(part, f"{where}, {label}").to(torch.float64)
        if x.ndim not in (1, 2) or x.numel() == 0:
            raise ValueError(
                f"{where}: {label} must have shape (n,) or (n, outputs) with at least one sample; got {tuple(x.shape)}."
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"{where}: {label} must be finite; {first_bad(~x.isfinite())}.")
        columns.append(x[:, None] if x.ndim == 1 else x)
    mean, standard_deviation, y = columns
    if not mean.shape == standard_deviation.shape == y.shape:
        raise ValueError(
            f"{where}: mean, standard deviation and targets must have one shape; got "
            f"{tuple(mean.shape)}, {tuple(standard_deviation.shape)} and {tuple(y.shape)}."
        )
    if not bool((standard_deviation > 0).all()):
        raise ValueError(
            f"{where}: every standard deviation must be positive; {first_bad(standard_deviation <= 0)} "
            f"(smallest: {standard_deviation.min().item():.6g})."
        )
    return RegressionPredictions(mean, standard_deviation.to(mean.device), y.to(mean.device))
