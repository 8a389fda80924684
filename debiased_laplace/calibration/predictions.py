"""What was predicted and what came, checked once: the only way into the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Task = Literal["binary", "multiclass", "regression"]
ROW_SUM_TOLERANCE = 1e-3
ROUNDING = 1e-12


@dataclass(frozen=True)
class ClassificationPredictions:
    """Class probabilities of one method on a labelled test set.

    Attributes:
        probabilities: float64, finite, nonnegative, rows sum to 1.
        targets: labels in [0, C), on the device of the probabilities.
        smallest_probability: floor of a probability inside a logarithm.
    """

    probabilities: Float[Tensor, "n C"]
    targets: Int[Tensor, " n"]
    smallest_probability: float

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.probabilities.shape[0]

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return self.probabilities.shape[1]

    @cached_property
    def confidence(self) -> Float[Tensor, " n"]:
        """Probability of the predicted class."""
        return self.probabilities.max(dim=1).values

    @cached_property
    def correct(self) -> Float[Tensor, " n"]:
        """1 where the predicted class is the true one, else 0."""
        return (self.probabilities.argmax(dim=1) == self.targets).to(self.probabilities.dtype)

    @cached_property
    def true_class_probability(self) -> Float[Tensor, " n"]:
        """Probability given to the true class."""
        return self.probabilities.gather(1, self.targets[:, None])[:, 0]

    @property
    def n_impossible(self) -> int:
        """Samples whose true class was given probability 0, or less than a float can say."""
        return int((self.true_class_probability < self.smallest_probability).sum())


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


def read_classification(
    method: str, probabilities: Any, targets: Any, *, task: Literal["binary", "multiclass"]
) -> ClassificationPredictions:
    """Class probabilities and labels, checked and in float64.

    Args:
        method: name of the method, for messages.
        probabilities: (n, C), numpy, torch or nested lists; for a binary task also (n,) = P(class 1).
        targets: labels (n,) or one-hot rows (n, C).
        task: "binary" allows two classes only.

    Raises:
        ValueError: for anything that is not a set of distributions over classes with its labels.
    """
    where = f"Predictions of {method!r}"
    p = as_tensor(probabilities, where)
    # half precision keeps subnormals below its own tiny; float32's floor is below all of them
    floating = p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32
    p = p.to(torch.float64)
    if task == "binary" and p.ndim == 1:
        _check_probabilities(p, where)
        p = torch.stack([1 - p.clamp(max=1), p.clamp(max=1)], dim=1)
    _check_class_shape(p, where, task)
    _check_probabilities(p, where)
    sums = p.sum(dim=1)
    worst = int((sums - 1).abs().argmax())
    if abs(sums[worst].item() - 1) > ROW_SUM_TOLERANCE:
        raise ValueError(
            f"{where}: every row must sum to 1 within {ROW_SUM_TOLERANCE}; row {worst} sums to "
            f"{sums[worst].item():.6g}. Logits need a softmax first."
        )
    labels = _read_labels(targets, n=p.shape[0], n_classes=p.shape[1], where=where)
    # rows that sum to 1 up to rounding stay as they are: a last digit can move a value across a bin's edge
    sums = torch.where((sums - 1).abs() <= ROUNDING, torch.ones_like(sums), sums)
    return ClassificationPredictions(p / sums[:, None], labels.to(p.device), torch.finfo(floating).tiny)


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
            raise ValueError(f"{where}: {label} must be finite; {_first_bad(~x.isfinite())}.")
        columns.append(x[:, None] if x.ndim == 1 else x)
    mean, standard_deviation, y = columns
    if not mean.shape == standard_deviation.shape == y.shape:
        raise ValueError(
            f"{where}: mean, standard deviation and targets must have one shape; got "
            f"{tuple(mean.shape)}, {tuple(standard_deviation.shape)} and {tuple(y.shape)}."
        )
    if not bool((standard_deviation > 0).all()):
        raise ValueError(
            f"{where}: every standard deviation must be positive; {_first_bad(standard_deviation <= 0)} "
            f"(smallest: {standard_deviation.min().item():.6g})."
        )
    return RegressionPredictions(mean, standard_deviation.to(mean.device), y.to(mean.device))


def as_tensor(values: Any, where: str) -> Tensor:
    """Numpy, torch or nested lists of real numbers as a detached tensor on its own device.

    Args:
        values: the numbers.
        where: what they are, for messages.

    Raises:
        ValueError: if they are not an array of real numbers.
    """
    try:
        x = values.detach() if isinstance(values, Tensor) else torch.as_tensor(_array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: expected an array or tensor of numbers; got {type(values).__name__} ({error})."
        ) from error
    if x.is_complex():
        raise ValueError(f"{where}: expected real numbers; got {x.dtype}.")
    return x.cpu() if x.device.type == "mps" else x  # MPS has no float64


def _array(values: Any) -> np.ndarray:
    """`values` in a layout that torch takes: a copy only of read-only or strided arrays."""
    if isinstance(values, Sequence) and any(isinstance(v, Tensor) for v in values):
        values = [v.detach().cpu().numpy() if isinstance(v, Tensor) else v for v in values]
    return np.require(values, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def _check_class_shape(p: Tensor, where: str, task: str) -> None:
    expected = "(n, C) with C >= 2" if task == "multiclass" else "(n,) or (n, 2)"
    wrong = p.ndim != 2 or p.shape[1] < 2 or (task == "binary" and p.shape[1] != 2)
    if wrong:
        raise ValueError(f"{where}: task {task!r} takes probabilities of shape {expected}; got {tuple(p.shape)}.")
    if p.shape[0] == 0:
        raise ValueError(f"{where}: at least one sample is needed; got shape {tuple(p.shape)}.")


def _check_probabilities(p: Tensor, where: str) -> None:
    if not bool(p.isfinite().all()):
        raise ValueError(f"{where}: probabilities must be finite; {_first_bad(~p.isfinite())}.")
    outside = (p < 0) | (p > 1 + ROW_SUM_TOLERANCE)
    if bool(outside.any()):
        raise ValueError(
            f"{where}: probabilities must lie in [0, 1]; {_first_bad(outside)} (range "
            f"{p.min().item():.6g} to {p.max().item():.6g}). {_guess_of_scale(p)}"
        )


def _guess_of_scale(p: Tensor) -> str:
    """What numbers outside [0, 1] most likely are."""
    if p.ndim == 2 and bool(((p.exp().sum(dim=1) - 1).abs() <= ROW_SUM_TOLERANCE).all()):
        return "These look like log-probabilities: take their exponential first."
    return "If these are logits, apply a softmax (or a sigmoid) first."


def _first_bad(mask: Tensor) -> str:
    """How many entries are wrong, and where the first one is."""
    first = mask.nonzero()[0].tolist()
    place = f"row {first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")
    return f"{int(mask.sum())} of {mask.numel()} are not, the first in {place}"


def _read_labels(targets: Any, *, n: int, n_classes: int, where: str) -> Tensor:
    """Labels (n,) int64 from labels or one-hot rows."""
    y = as_tensor(targets, "Targets")
    if y.shape not in ((n,), (n, n_classes)):
        raise ValueError(
            f"{where} have {n} rows and {n_classes} classes, so targets must be labels of shape "
            f"({n},) or one-hot rows of shape ({n}, {n_classes}); got {tuple(y.shape)}."
        )
    if y.is_floating_point() and not bool((y.isfinite() & (y == y.round())).all()):
        raise ValueError(f"Targets must be whole numbers; got {y.dtype} with others among them.")
    y = y.to(torch.int64)
    if y.ndim == 2:
        if not bool(((y == 0) | (y == 1)).all() and (y.sum(dim=1) == 1).all()):
            raise ValueError("One-hot targets must have a single 1 per row and zeros elsewhere.")
        return y.argmax(dim=1)
    if int(y.min()) < 0 or int(y.max()) >= n_classes:
        raise ValueError(
            f"Labels must lie in [0, {n_classes}) for {n_classes} classes; got {int(y.min())} to {int(y.max())}."
        )
    return y
