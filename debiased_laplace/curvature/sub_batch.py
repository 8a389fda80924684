"""What a set of samples can be asked about its curvature, whatever kind of curvature it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.network import Network
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

Residual = Literal["none", "trace", "diagonal"]


@dataclass(frozen=True, eq=False)
class DirectionalMoments:
    r"""What a set of samples says along given directions $u_i$, and about what they do not span.

    Attributes:
        n_samples: number n of samples.
        means: $u_i^\top H u_i$.
        standard_deviations: of the per-sample values $u_i^\top H_n u_i$ (ddof 1).
        trace: of H; only where it was asked for.
        residual_diagonal: diagonal of $(I - UU^\top) H (I - UU^\top)$, in a basis if one was given; only where it was
            asked for.
        third_moments: central ones of the per-sample values, mean of $(u_i^\top H_n u_i - u_i^\top H u_i)^3$; None
            where nobody asked for them.
        n_folds: of which they were pooled.
    """

    n_samples: int
    means: Float[Tensor, " k"]
    standard_deviations: Float[Tensor, " k"]
    trace: Float[Tensor, ""] | None = None
    residual_diagonal: Float[Tensor, " P"] | None = None
    third_moments: Float[Tensor, " k"] | None = None
    n_folds: int = 1

    @property
    def third_cumulants(self) -> Float[Tensor, " k"] | None:
        r"""Of the mean over the samples, $\frac{1}{n^2} E(q_n - q)^3$; None where nobody asked for third moments.

        Kept within what n values can have at their spread: sums of cubes of nearly equal values are mostly rounding.
        """
        if self.third_moments is None:
            return None
        n = self.n_samples
        # all values equal but one; the spread has ddof 1
        most = max(n - 2, 0) * (n - 1) / n**1.5 * self.standard_deviations.pow(3)
        return torch.minimum(torch.maximum(self.third_moments, -most), most) / n**2

    def leading(self, k: int, trace: Tensor | None, diagonal: Tensor | None) -> "DirectionalMoments":
        """Along the first k directions only, with what those leave outside."""
        third = None if self.third_moments is None else self.third_moments[:k]
        return replace(
            self,
            means=self.means[:k],
            standard_deviations=self.standard_deviations[:k],
            trace=trace,
            residual_diagonal=diagonal,
            third_moments=third,
        )


@dataclass(frozen=True, eq=False)
class Aspect:
    """What to find out about the leading ones of some directions.

    Attributes:
        rank: how many of them.
        residual: what to say about all others.
        basis: in whose coordinates the residual's diagonal is; None for the axes.
    """

    rank: int
    residual: Residual = "none"
    basis: KroneckerBasis | None = None


class SubBatchCurvature(ABC):
    """The mean curvature H of some samples, never formed unless asked for."""

    network: Network
    progress_bar: bool

    @property
    @abstractmethod
    def source(self) -> str:
        """Who computed what was asked for so far."""

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """The largest rank that H can have."""

    @property
    def is_random(self) -> bool:
        """Whether H itself is drawn (Monte Carlo), so that a sample may say something else the next time."""
        return False

    def redrawn(self) -> "SubBatchCurvature":
        """The same samples with other draws; itself where nothing is drawn."""
        return self

    @abstractmethod
    def of_samples(self, samples: SubBatch, seed: int) -> "SubBatchCurvature":
        """Return the same kind of curvature of other samples; the seed is that of Monte-Carlo draws."""

    def seen_from(self, positions: Int64[Tensor, " m"]) -> "SubBatchCurvature":  # noqa: ARG002
        """The same curvature in the coordinates that some of the samples give; itself where none depend on samples."""
        return self

    @abstractmethod
    def part(self, positions: Int64[Tensor, " m"]) -> "SubBatchCurvature":
        """The mean curvature of some of the samples, by their increasing positions among them."""

    @abstractmethod
    def moments(
        self, directions: Float[Tensor, "P k"], residual: Residual = "none", basis: KroneckerBasis | None = None
    ) -> DirectionalMoments:
        """Curvature along directions, its spread over samples, and what is left outside (its diagonal in a basis)."""

    def nested_moments(self, directions: Float[Tensor, "P k"], aspects: Sequence[Aspect]) -> list[DirectionalMoments]:
        """Moments along several numbers of leading directions."""
        return [self.moments(directions[:, : a.rank], a.residual, a.basis) for a in aspects]

    @abstractmethod
    def coordinate_moments(self, basis: KroneckerBasis) -> DirectionalMoments:
        """Curvature along every vector of a basis, and its spread over samples."""

    @abstractmethod
    def traces(self, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
        r"""$\mathrm{tr}(P^{-1} H_n)$ of every sample, in order."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "P P"]:
        """H itself in double precision; for few parameters."""

    @abstractmethod
    def linear_map(self) -> Callable[[Tensor], Tensor]:
        """Products H X for X (P, b), ready for many."""


class RunningMoments:
    """Sums of per-sample values over one pass, in double precision."""

    def __init__(self, k: int, like: Tensor):
        exact = accumulation_dtype(like)
        self.n = 0
        self.first = like.new_zeros(k, dtype=exact)
        self.second = like.new_zeros(k, dtype=exact)
        self.third = like.new_zeros(k, dtype=exact)

    def add(self, values: Float[Tensor, "n k"]) -> None:
        """Values of some more samples."""
        values = values.to(self.first.dtype)
        self.n += len(values)
        self.first += values.sum(0)
        self.second += values.square().sum(0)
        self.third += values.pow(3).sum(0)

    def moments(self, trace: Tensor | None = None, diagonal: Tensor | None = None) -> DirectionalMoments:
        """Means and spreads of what was added, with sums over the same samples of what is left outside."""
        means = self.first / self.n
        squares = (self.second - self.n * means.square()).clamp_min(0)
        cubes = self.third - 3 * means * squares - self.n * means.pow(3)
        return DirectionalMoments(
            self.n,
            means,
            (squares / max(self.n - 1, 1)).sqrt(),
            None if trace is None else trace / self.n,
            None if diagonal is None else diagonal / self.n,
            cubes / self.n,
        )
