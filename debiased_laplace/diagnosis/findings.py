"""What a diagnosis found: for every size of batch, the batch's own values against unbiased ones."""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

Z = 1.96
MATTERS = 0.1
"""A bias of the leading curvature below a tenth changes a standard deviation by less than a twentieth."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of means over draws.

    Attributes:
        value: 1 where there is no bias; NaN where the denominator is not above 0.
        standard_error: over draws, to first order; NaN with one draw.
    """

    value: float
    standard_error: float

    @classmethod
    def of_means(cls, numerator: Float[Tensor, " d"], denominator: Float[Tensor, " d"]) -> "Ratio":
        """Of values that belong together draw by draw."""
        numerator, denominator = numerator.double(), denominator.double()
        mean = denominator.mean()
        if not bool(mean.abs() > 0):
            return cls(float("nan"), float("nan"))
        ratio = numerator.mean() / mean
        if len(numerator) < 2:
            return cls(float(ratio), float("nan"))
        return cls(float(ratio), float((numerator - ratio * denominator).std() / mean.abs() / len(numerator) ** 0.5))

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - Z * self.standard_error

    @property
    def high(self) -> float:
        """Upper end."""
        return self.value + Z * self.standard_error

    def __str__(self) -> str:
        if not isfinite(self.value):
            return "–"
        return f"{self.value:.2f}" + (f" ± {self.standard_error:.2f}" if isfinite(self.standard_error) else "")


@dataclass(frozen=True, eq=False)
class Pairs:
    """The same quantity twice, one row per draw.

    Attributes:
        own: as the batch that chose the directions sees it.
        unbiased: as all data have it on average, estimated with samples that had no part in the choice.
    """

    own: Float[Tensor, "d k"]
    unbiased: Float[Tensor, "d k"]

    def ratio(self, columns: slice = slice(None)) -> Ratio:
        """Own over unbiased, for the mean over some columns."""
        if self.own[:, columns].numel() == 0:
            return Ratio(float("nan"), float("nan"))
        return Ratio.of_means(self.own[:, columns].mean(1), self.unbiased[:, columns].mean(1))


@dataclass(frozen=True, eq=False)
class BatchFindings:
    """What one size of batch is like, over the draws.

    Attributes:
        batch_size: B.
        leading: curvatures along the batch's first eigenvectors.
        trailing: mean curvature along eigenvectors of the last tenth of its spectrum; no column where only leading
            ones were affordable.
        gradient: slope along its own gradient.
        conjugate: slopes along directions of conjugate gradients.
        decrease: by how much the quadratic falls on the path of conjugate gradients, in nats a sample.
        posterior: nats by which the biased posterior is further from the full batch than the debiased one, a column
            of one number per draw; None where it was not asked for.
    """

    batch_size: int
    leading: Pairs
    trailing: Pairs
    gradient: Pairs
    conjugate: Pairs
    decrease: Pairs
    posterior: Float[Tensor, " d"] | None


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured for one model.

    Attributes:
        batches: findings by increasing size of batch.
        steps: iterations of conjugate gradients at which the decrease was looked at.
        n_draws: draws of every batch.
        n_reference: samples behind the unbiased values of each draw.
        n_data: size N of the data set that the values stand for.
        n_parameters: P.
        curvature: "ggn" or "ef".
        damping: of conjugate gradients.
        prior_precision: of the posteriors that were compared; None where none were.
        seconds: wall time.
    """

    batches: tuple[BatchFindings, ...]
    steps: tuple[int, ...]
    n_draws: int
    n_reference: int
    n_data: int
    n_parameters: int
    curvature: str
    damping: float
    prior_precision: float | None
    seconds: float

    @cached_property
    def enough(self) -> int | None:
        """The smallest size of batch from which on the first curvature is not detectably a tenth too large.

        None where it is at every size, or where one draw cannot tell.
        """
        found = None
        for batch in reversed(self.batches):
            low = batch.leading.ratio(slice(0, 1)).low
            if not (isfinite(low) and low < 1 + MATTERS):
                break
            found = batch.batch_size
        return found


def weighted(own: Tensor, other: Tensor, share: float) -> Tensor:
    """The unbiased value for all data: the batch's own share of them is known exactly."""
    return share * own.double() + (1 - share) * other.double()


def stack(rows: list[tuple[Tensor, Tensor]]) -> Pairs:
    """One row per draw, as many columns as every draw has."""
    k = min(len(own) for own, _ in rows)
    return Pairs(*(torch.stack([row[i][:k].double().cpu() for row in rows]) for i in (0, 1)))
