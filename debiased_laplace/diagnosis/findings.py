"""Findings of a diagnosis for one batch size: the batch's own values beside unbiased ones, over draws."""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

Z = 1.96  # of 95 % intervals
MISSING = "\u2013"


def grouped(number: int) -> str:
    """Format an integer with its digits in groups of three."""
    return f"{number:,}".replace(",", "\u202f")


@dataclass(frozen=True)
class Ratio:
    """Ratio of means over draws.

    Attributes:
        value: 1 without bias; NaN if the denominator is 0.
        standard_error: over draws, to first order; NaN with one draw.
    """

    value: float
    standard_error: float

    @classmethod
    def of_means(cls, numerator: Float[Tensor, " d"], denominator: Float[Tensor, " d"]) -> "Ratio":
        """Return the ratio of the means of values that are paired by draw."""
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
        """Upper end of the 95 % interval."""
        return self.value + Z * self.standard_error

    def __str__(self) -> str:
        if not isfinite(self.value):
            return MISSING
        # at least two digits of a small ratio
        small = self.value != 0 and abs(self.value) < 0.095
        value, error = (
            (f"{self.value:.2g}", f"{self.standard_error:.1g}")
            if small
            else (f"{self.value:.2f}", f"{self.standard_error:.2f}")
        )
        return f"{value} ± {error}" if isfinite(self.standard_error) else value


@dataclass(frozen=True, eq=False)
class Pairs:
    """The same quantities measured twice, one row per draw.

    Attributes:
        own: on the batch that chose the directions.
        unbiased: estimated for all data with samples that the directions do not depend on.
    """

    own: Float[Tensor, "d k"]
    unbiased: Float[Tensor, "d k"]

    @classmethod
    def stack(cls, draws: list[tuple[Tensor, Tensor]]) -> "Pairs":
        """Stack the own and the unbiased values of the draws, cut to the smallest number of columns."""
        k = min(len(own) for own, _ in draws)
        return cls(*(torch.stack([draw[i][:k].double().cpu() for draw in draws]) for i in (0, 1)))

    def ratio(self, columns: slice = slice(None)) -> Ratio:
        """Return own over unbiased values, each averaged over the columns."""
        if self.own[:, columns].numel() == 0:
            return Ratio(float("nan"), float("nan"))
        return Ratio.of_means(self.own[:, columns].mean(1), self.unbiased[:, columns].mean(1))

    def inverse_ratio(self, columns: slice = slice(None)) -> Ratio:
        """Return unbiased over own values, each averaged over the columns."""
        return Pairs(self.unbiased, self.own).ratio(columns)


@dataclass(frozen=True, eq=False)
class BatchFindings:
    """Findings for one batch size.

    Attributes:
        batch_size: number of samples in the batch.
        leading: curvatures along the batch's first eigenvectors.
        trailing: curvatures along eigenvectors from the last tenth of its spectrum; no columns if only leading
            eigenvectors were affordable.
        gradient: slope along its gradient.
        conjugate: slopes along the directions of conjugate gradients.
        decrease: decrease of the quadratic along the path of conjugate gradients, in nats per sample.
        posterior: gain of debiasing a posterior, in nats of its KL to the full batch, one per draw; None if posteriors
            were not compared.
    """

    batch_size: int
    leading: Pairs
    trailing: Pairs
    gradient: Pairs
    conjugate: Pairs
    decrease: Pairs
    posterior: Float[Tensor, " d"] | None
