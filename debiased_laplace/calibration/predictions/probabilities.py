"""Class probabilities, checked, and read in portions of rows: 100,000 samples of 1,000 classes never stand twice."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import as_tensor, first_bad

ROW_SUM_TOLERANCE = 1e-3
ROUNDING = 1e-12
NUMBERS_AT_ONCE = 1_000_000  # float64 numbers of one portion: 8 MB, about a processor's cache


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Distributions over C classes of n samples, or of S posterior samples of each.

    Attributes:
        values: (n, C) or (S, n, C), in the dtype and on the device they came in; finite, nonnegative, and
            every row sums to 1 within 1e-3.
        mutual_information: between label and parameters, of a posterior that was reduced to its mean before; None
            where it is not known.
        logit_variance: total variance of the centred logits; None where it is not known.
        temperature: by which the logits of every row are divided, after posterior samples were averaged; None where the
            probabilities stand as they came. Rows are scaled when they are read.
        logits: from which the probabilities came, finite, where they are known; else these are logarithms.
    """

    values: Shaped[Tensor, "*S n C"]
    mutual_information: Float[Tensor, " n"] | None = None
    logit_variance: Float[Tensor, " n"] | None = None
    temperature: Float[Tensor, " n"] | None = None
    logits: Shaped[Tensor, "n C"] | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.values.shape[-2]

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return self.values.shape[-1]

    @property
    def n_posterior_samples(self) -> int | None:
        """Number of posterior samples S; None where the probabilities are means already."""
        return self.values.shape[0] if self.values.ndim == 3 and self.temperature is None else None

    @property
    def smallest(self) -> float:
        """Floor of a probability inside a logarithm: the smallest normal number of their dtype."""
        # half precision keeps subnormals below its own tiny; float32's floor is below all of them
        dtype = self.values.dtype
        return torch.finfo(dtype if dtype in (torch.float32, torch.float64) else torch.float32).tiny

    def portions(self) -> Iterator[tuple[slice, Float[Tensor, "*S rows C"]]]:
        """Rows in float64 that sum to 1 exactly, a portion at a time, with their place."""
        per_row = self.values.numel() // max(1, self.n)
        for rows in portions_of(self.n, per_row):
            yield rows, self._read(rows)

    def take(self, rows: Int[Tensor, " m"]) -> Float[Tensor, "*S m C"]:
        """Chosen rows, as `portions` yields them."""
        return self._read(rows.to(self.values.device))

    def take_logits(self, rows: Int[Tensor, " m"] | slice) -> Float[Tensor, "m C"]:
        """Logits of chosen rows before any temperature, in float64, the largest of each row being 0.

        A probability of 0 counts as the smallest one.
        """
        rows = rows if isinstance(rows, slice) else rows.to(self.values.device)
        if self.logits is not None:
            z = self.logits[rows].to(self.values.device, torch.float64)
        else:
            z = mean_prediction(self._normalise(self.values[..., rows, :])).clamp_min_(self.smallest).log_()
        return z - z.amax(dim=1, keepdim=True)

    def _read(self, rows: Int[Tensor, " m"] | slice) -> Float[Tensor, "*S m C"]:
        if self.temperature is None:
            return self._normalise(self.values[..., rows, :])
        temperature = self.temperature.to(self.values.device)[rows]
        return (self.take_logits(rows) / temperature[:, None]).softmax(dim=1)

    @staticmethod
    def _normalise(values: Shaped[Tensor, "*S rows C"]) -> Float[Tensor, "*S rows C"]:
        p = values.to(torch.float64).clamp_min(0.0)
        sums = p.sum(dim=-1, keepdim=True)
        # rows that sum to 1 up to rounding stay as they are: a last digit can move a value across a bin's edge
        return p.div_(torch.where((sums - 1).abs() <= ROUNDING, torch.ones_like(sums), sums))


@dataclass(frozen=True, eq=False)
class PosteriorPredictive:
    """Posterior mean of the class probabilities, with uncertainty scores that cannot be computed from it.

    Attributes:
        mean: over the posterior.
        mutual_information: between label and parameters, in nats.
        logit_variance: trace of the covariance of the centred logits; None where it is not known.
    """

    mean: Shaped[Tensor, "n C"]
    mutual_information: Float[Tensor, " n"]
    logit_variance: Float[Tensor, " n"] | None = None


def mean_prediction(p: Float[Tensor, "*S rows C"]) -> Float[Tensor, "rows C"]:
    """The mean over posterior samples, where there are any."""
    return p.mean(dim=0) if p.ndim == 3 else p


def portions_of(n: int, numbers_per_row: int) -> Iterator[slice]:
    """Slices of n rows that fit in memory at once."""
    size = max(1, NUMBERS_AT_ONCE // max(1, numbers_per_row))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def read_probabilities(method: str, probabilities: Any, *, task: Literal["binary", "multiclass"]) -> Probabilities:
    """Class probabilities, checked.

    Args:
        method: name of the method, for messages.
        probabilities: (n, C) or posterior samples (S, n, C), numpy, torch or nested lists; for a binary task also
            (n,) = P(class 1); or `PosteriorPredictive`.
        task: "binary" allows two classes only.

    Raises:
        ValueError: for anything that is not a set of distributions over classes.
    """
    if isinstance(probabilities, PosteriorPredictive):
        mean = read_probabilities(method, probabilities.mean, task=task)
        scores = (probabilities.mutual_information, probabilities.logit_variance)
        return Probabilities(mean.values, *(s if s is None else s.detach().to("cpu", torch.float64) for s in scores))
    where = f"Predictions of {method!r}"
    p = as_tensor(probabilities, where)
    if not p.is_floating_point():
        p = p.to(torch.float64)
    if task == "binary" and p.ndim == 1:
        _check_range(p[:, None], where)
        p = torch.stack([1 - p.clamp(max=1), p.clamp(max=1)], dim=1)
    _check_shape(p, where, task)
    _check_rows(p.reshape(-1, p.shape[-1]), where)
    return Probabilities(p)


def _check_shape(p: Tensor, where: str, task: str) -> None:
    expected = "(n, C) with C >= 2" if task == "multiclass" else "(n,) or (n, 2)"
    wrong = p.ndim not in (2, 3) or p.shape[-1] < 2 or (task == "binary" and p.shape[-1] != 2)
    if wrong:
        raise ValueError(
            f"{where}: task {task!r} takes probabilities of shape {expected}, or samples (S, n, C) of them; "
            f"got {tuple(p.shape)}."
        )
    if p.numel() == 0:
        raise ValueError(f"{where}: at least one sample is needed; got shape {tuple(p.shape)}.")


def _check_range(p: Tensor, where: str) -> None:
    """Refuse numbers that are no probabilities."""
    for rows in portions_of(p.shape[0], p.shape[1]):
        message = _outside_message(p[rows].to(torch.float64), rows.start)
        if message is not None:
            raise ValueError(f"{where}: {message}")


def _check_rows(p: Tensor, where: str) -> None:
    """Refuse rows that are no distributions. A row is looked at closely only where a quick look finds something."""
    for rows in portions_of(p.shape[0], p.shape[1]):
        low, high = torch.aminmax(p[rows])  # NaN if anything is
        sums = p[rows].sum(dim=1, dtype=torch.float64)
        fine = (low >= 0) & (high <= 1) & ((sums - 1).abs() <= ROW_SUM_TOLERANCE).all()
        if bool(fine):
            continue
        exact = p[rows].to(torch.float64)
        message = _outside_message(exact, rows.start) or _sum_message(exact, rows.start)
        if message is not None:
            raise ValueError(f"{where}: {message}")


def _outside_message(p: Tensor, first_row: int) -> str | None:
    if not bool(p.isfinite().all()):
        return f"probabilities must be finite; {_place(~p.isfinite(), first_row)}."
    low, high = p.min().item(), p.max().item()
    if low >= 0 and high <= 1 + ROW_SUM_TOLERANCE:
        return None
    outside = (p < 0) | (p > 1 + ROW_SUM_TOLERANCE)
    return (
        f"probabilities must lie in [0, 1]; {_place(outside, first_row)} (range {low:.6g} to {high:.6g}). "
        f"{_guess_of_scale(p)}"
    )


def _sum_message(p: Tensor, first_row: int) -> str | None:
    sums = p.sum(dim=1)
    worst = int((sums - 1).abs().argmax())
    if abs(sums[worst].item() - 1) <= ROW_SUM_TOLERANCE:
        return None
    return (
        f"every row must sum to 1 within {ROW_SUM_TOLERANCE}; row {first_row + worst} sums to "
        f"{sums[worst].item():.6g}. Logits need a softmax first."
    )


def _place(mask: Tensor, first_row: int) -> str:
    """Where the first wrong entry is, counted over all rows."""
    padded = mask if first_row == 0 else torch.cat([mask.new_zeros(first_row, mask.shape[1]), mask])
    return first_bad(padded)


def _guess_of_scale(p: Tensor) -> str:
    """What numbers outside [0, 1] most likely are."""
    if p.shape[1] > 1 and bool(((p.exp().sum(dim=1) - 1).abs() <= ROW_SUM_TOLERANCE).all()):
        return "These look like log-probabilities: take their exponential first."
    return "If these are logits, apply a softmax (or a sigmoid) first."
