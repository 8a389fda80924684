"""The mean curvature of a set of samples: the interface that every kind of curvature implements."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
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


@dataclass(frozen=True)
class ResidualRequest:
    """Leading directions along which curvature is measured, and the residual outside their span.

    Attributes:
        rank: number of leading directions.
        residual: "trace" of the whole curvature, "diagonal" of the residual, or "none".
        basis: coordinates of the diagonal; None for the axes.
        threshold: smallest eigenvalue that counts, relative to the largest, where each fold has directions of its own.
    """

    rank: int
    residual: Residual = "none"
    basis: KroneckerBasis | None = None
    threshold: float = 0.0


@dataclass(frozen=True, eq=False)
class DirectionalMoments:
    r"""Curvature of n samples along directions $u_i$, its spread over samples, and the residual outside their span.

    Attributes:
        n_samples: number n of samples.
        means: $u_i^\top H u_i$.
        standard_deviations: of the per-sample values $u_i^\top H_n u_i$ (ddof 1).
        trace: of H; None unless requested.
        residual_diagonal: diagonal of $(I - UU^\top) H (I - UU^\top)$, in the basis of the request; None unless
            requested.
        third_moments: central moments $E(u_i^\top H_n u_i - u_i^\top H u_i)^3$ of the per-sample values; None if not
            computed.
        n_folds: number of folds that were pooled.
        n_drawn: of rows drawn from all N samples, how many might not have been drawn; the deviations are then such that
            the standard error of the mean, from the draw, is that of n samples. None otherwise.
        draw_variances: of rows drawn from some samples: variance of the means given those samples; None otherwise.
        sampled_share: share of those samples in the ones that they stand for.
        centers: means of the values that the deviations are of, where these differ from `means`.
    """

    n_samples: float
    means: Float[Tensor, " k"]
    standard_deviations: Float[Tensor, " k"]
    trace: Float[Tensor, ""] | None = None
    residual_diagonal: Float[Tensor, " P"] | None = None
    third_moments: Float[Tensor, " k"] | None = None
    n_folds: int = 1
    n_drawn: int | None = None
    draw_variances: Float[Tensor, " k"] | None = None
    sampled_share: float = 0.0
    centers: Float[Tensor, " k"] | None = None

    @property
    def third_cumulants(self) -> Float[Tensor, " k"] | None:
        r"""Third cumulants $\frac{1}{n^2} E(q_n - q)^3$ of the means; None without third moments.

        They are clamped to the range that n values with this spread can have.
        """
        if self.third_moments is None:
            return None
        n = self.n_samples
        if self.n_drawn is not None:
            return self.third_moments / n**2
        # sums of cubes of nearly equal values are mostly rounding; the extreme case is n - 1 equal values and another
        # one, and the spread has ddof 1
        most = max(n - 2, 0) * (n - 1) / n**1.5 * self.standard_deviations.pow(3)
        return torch.minimum(torch.maximum(self.third_moments, -most), most) / n**2

    def leading(self, k: int, trace: Tensor | None, diagonal: Tensor | None) -> "DirectionalMoments":
        """Return the moments along the first k directions, with the residual outside their span."""
        return replace(self.mapped(lambda values: values[:k]), trace=trace, residual_diagonal=diagonal)

    def mapped(
        self, of_values: Callable[[Tensor], Tensor], of_deviations: Callable[[Tensor], Tensor] | None = None
    ) -> "DirectionalMoments":
        """Return the moments with a function applied to what there is for each direction."""

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else of_values(values)

        return replace(
            self,
            means=of_values(self.means),
            standard_deviations=(of_deviations or of_values)(self.standard_deviations),
            third_moments=of(self.third_moments),
            draw_variances=of(self.draw_variances),
            centers=of(self.centers),
        )


def joined_directions(parts: Iterable[tuple[slice, DirectionalMoments]], k: int) -> DirectionalMoments:
    """Return the moments of the same samples along k directions, from those along some of them and their places."""
    whole: DirectionalMoments | None = None
    names = ("means", "standard_deviations", "third_moments", "draw_variances", "centers")
    for place, part in parts:
        # room for all at once: short vectors that stay would break up what the allocator has for the next part
        whole = part.mapped(lambda values: values.new_empty(k)) if whole is None else whole
        for name in names:
            if (values := getattr(part, name)) is not None:
                getattr(whole, name)[place] = values
    assert whole is not None  # for the type checker
    return whole


class SubBatchCurvature(ABC):
    """The mean curvature H of a set of samples, never formed unless `dense` is called.

    Attributes:
        network: the network.
        progress_bar: show progress.
        draw: errors of the draw, where samples stand for drawn rows; None for samples.
    """

    network: Network
    progress_bar: bool
    draw: "DrawErrors | None" = None

    @property
    @abstractmethod
    def source(self) -> str:
        """Engine or backend that computed the curvature so far."""

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Upper bound on the rank of H."""

    @property
    def is_random(self) -> bool:
        """Whether H is a Monte-Carlo estimate."""
        return False

    def redrawn(self) -> "SubBatchCurvature":
        """Return the curvature of the same samples with new Monte-Carlo draws; itself if nothing is drawn."""
        return self

    @abstractmethod
    def of_samples(self, samples: SubBatch, seed: int) -> "SubBatchCurvature":
        """Return the same kind of curvature of other samples; the seed is that of Monte-Carlo draws."""

    def in_coordinates_of(self, positions: Int64[Tensor, " m"]) -> "SubBatchCurvature":  # noqa: ARG002
        """Return the curvature in coordinates computed from a subset; itself if coordinates depend on no samples."""
        return self

    @abstractmethod
    def part(self, positions: Int64[Tensor, " m"]) -> "SubBatchCurvature":
        """Return the mean curvature of a subset, given by increasing positions among the samples."""

    def reweighted(self, factors: Float[Tensor, " n"]) -> "SubBatchCurvature":
        """Return the curvature of the same samples, each multiplied by a factor."""
        raise NotImplementedError

    def moments(
        self, directions: Float[Tensor, "P k"], residual: Residual = "none", basis: KroneckerBasis | None = None
    ) -> DirectionalMoments:
        """Measure the curvature along directions, its spread over samples, and the residual outside their span.

        Args:
            directions: orthonormal columns.
            residual: as in `ResidualRequest`.
            basis: as in `ResidualRequest`.
        """
        return self.nested_moments(directions, [ResidualRequest(directions.shape[1], residual, basis)])[0]

    @abstractmethod
    def nested_moments(
        self, directions: Float[Tensor, "P k"], requests: Sequence[ResidualRequest]
    ) -> list[DirectionalMoments]:
        """Measure the moments of several requests, each for its number of leading directions."""

    @abstractmethod
    def coordinate_moments(self, basis: KroneckerBasis) -> DirectionalMoments:
        """Measure the curvature along every vector of a basis, and its spread over samples."""

    def coordinate_means(
        self, basis: KroneckerBasis, factors: Sequence[Float[Tensor, " n"]]
    ) -> list[Float[Tensor, " P"]]:
        """Measure the curvature along every vector of a basis, with each sample multiplied by each of its factors."""
        return [self.reweighted(f).coordinate_moments(basis).means for f in factors]

    @abstractmethod
    def traces(self, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
        r"""Return $\mathrm{tr}(P^{-1} H_n)$ of every sample, in order."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "P P"]:
        """Return H as a matrix in double precision; for few parameters."""

    @abstractmethod
    def linear_map(self) -> Callable[[Tensor], Tensor]:
        """Return the map from X (P, b) to H X, prepared for repeated use."""


@dataclass(frozen=True, eq=False)
class DrawErrors:
    r"""What the errors of sums over drawn rows depend on.

    Attributes:
        left_out: $1 - \pi$, the probability that a row like this is not drawn.
        factors: weight of each row by inverse probability, relative to the weight that its value has in the sum.
        samples: number of each row's sample, where the samples are themselves a draw; None where they are all N. The
            rows of a sample are adjacent.
        n_samples: how many samples were drawn.
        sampled_share: their share in the samples that they stand for.
    """

    left_out: Float[Tensor, " n"]
    factors: Float[Tensor, " n"]
    samples: Int64[Tensor, " n"] | None = None
    n_samples: float = 0.0
    sampled_share: float = 1.0

    @classmethod
    def of(cls, probabilities: Float[Tensor, " n"]) -> "DrawErrors":
        """Return those of rows weighted by inverse probability."""
        return cls(1 - probabilities, torch.ones_like(probabilities))

    @property
    def is_exact(self) -> bool:
        """Whether nothing was left out."""
        return self.sampled_share >= 1 and not bool((self.left_out > 0).any())

    def at(self, chosen: Tensor | slice) -> "DrawErrors":
        """Return those of some rows, and of as large a share of the samples."""
        left_out = self.left_out[chosen]
        return replace(
            self,
            left_out=left_out,
            factors=self.factors[chosen],
            samples=None if self.samples is None else self.samples[chosen],
            n_samples=self.n_samples * len(left_out) / max(len(self.left_out), 1),
        )

    def reweighted(self, factors: Float[Tensor, " n"]) -> "DrawErrors":
        """Return those of rows whose values are multiplied by factors; a row without weight has no error."""
        inverse = torch.where(factors > 0, 1 / factors.clamp_min(torch.finfo(factors.dtype).tiny), 0.0)
        left_out = torch.where(factors > 0, self.left_out, 0.0)
        return replace(self, left_out=left_out, factors=self.factors * inverse.to(self.factors))


@dataclass(frozen=True, eq=False)
class OuterValues:
    r"""Values (n, k) of n samples or rows, in blocks of outer products $x_n y_n^\top$ that are not formed.

    Attributes:
        blocks: pairs of x (n, o) and y (n, i), in double precision; samples that are equal have equal y.
    """

    blocks: tuple[tuple[Float[Tensor, "n _"], Float[Tensor, "n _"]], ...]

    @classmethod
    def of(cls, values: Float[Tensor, "n k"]) -> "OuterValues":
        """Return values as they are, as one block."""
        return cls(((values, values.new_ones(len(values), 1)),))

    def __len__(self) -> int:
        return len(self.blocks[0][0])

    @property
    def n_directions(self) -> int:
        """Number k of values of a sample."""
        return sum(x.shape[1] * y.shape[1] for x, y in self.blocks)

    def summed(self, power: int, weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, " k"]:
        """Return the sum over samples of a power of the values, with weights."""
        parts = []
        for x, y in self.blocks:
            of_x, of_y = (t if power == 1 else t.square() if power == 2 else t.square().mul_(t) for t in (x, y))
            of_y = of_y if weights is None else of_y * weights[:, None]
            parts.append((of_x.T @ of_y).flatten())
        return torch.cat(parts)

    def scaled(self, factors: Float[Tensor, " n"]) -> "OuterValues":
        """Return the values of each sample multiplied by a factor."""
        return OuterValues(tuple((x * factors[:, None], y) for x, y in self.blocks))

    def totals(self, groups: Int64[Tensor, " n"], n_groups: int) -> "OuterValues":
        """Return the sums over adjacent rows of each group, which have the same y."""
        first = torch.searchsorted(groups, torch.arange(n_groups)).to(self.blocks[0][0].device)
        groups = groups.to(first.device)
        return OuterValues(
            tuple((x.new_zeros(n_groups, x.shape[1]).index_add_(0, groups, x), y[first]) for x, y in self.blocks)
        )

    def at(self, chosen: slice) -> "OuterValues":
        """Return the values of some samples."""
        return OuterValues(tuple((x[chosen], y[chosen]) for x, y in self.blocks))


class RunningMoments:
    r"""Sums of the first three powers of per-sample values, accumulated in double precision.

    Of drawn rows, errors come from the draw: rows are drawn independently, so that a sum over rows weighted by inverse
    probability has the variance $\sum (1 - \pi_r) y_r^2$. Hájek's centred form is for draws of a fixed size.
    """

    def __init__(self, k: int, like: Tensor):
        exact = accumulation_dtype(like)
        self.n = 0
        self.first = like.new_zeros(k, dtype=exact)
        self.second = like.new_zeros(k, dtype=exact)
        self.third = like.new_zeros(k, dtype=exact)
        self.drawn: _DrawnSums | None = None

    def add(self, values: Float[Tensor, "n k"] | OuterValues, draw: "DrawErrors | None" = None) -> None:
        """Add the values of n more samples; of drawn rows, with what their errors depend on."""
        if isinstance(values, Tensor):
            values = OuterValues.of(values.to(self.first.dtype))
        self.n += len(values)
        self.first += values.summed(1)
        if draw is not None:
            self.drawn = self.drawn or _DrawnSums(self.first)
            self.drawn.add(values, draw)
            return
        self.second += values.summed(2)
        self.third += values.summed(3)

    def moments(self) -> DirectionalMoments:
        """Return the moments of the values added so far."""
        means = self.first / self.n
        if self.drawn is not None:
            return self.drawn.moments(means, self.n)
        deviations, third = _central(self.n, self.first, self.second, self.third)
        return DirectionalMoments(self.n, means, deviations, third_moments=third)


def _central(n: float, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Return standard deviation (ddof 1) and third central moment of n values, from sums of their powers."""
    mean = first / n
    squares = (second - n * mean.square()).clamp_min(0)
    cubes = third - 3 * mean * squares - n * mean.pow(3)
    return (squares / max(n - 1, 1)).sqrt(), cubes / n


class _DrawnSums:
    r"""Sums over drawn rows that their errors are computed from.

    With samples that are themselves a draw, the sample totals $T_n = \sum_r y_r / \pi_r$ are independent, and their
    spread includes the draw of rows: of $f = n / N$, the variance of the mean is $(1 - f) s_T^2 / n + f V$ with the
    variance V given the samples (Särndal et al. 1992, §4.3).
    """

    def __init__(self, zeros: Tensor):
        self.n_uncertain, self.n_samples, self.sampled_share = 0, 0.0, 1.0
        self.squares, self.cubes = torch.zeros_like(zeros), torch.zeros_like(zeros)
        self.totals = [torch.zeros_like(zeros) for _ in range(3)]
        self.open: tuple[int, OuterValues] | None = None

    def add(self, values: OuterValues, draw: DrawErrors) -> None:
        """Add the values of n more rows."""
        left_out, factors = (t.to(self.squares) for t in (draw.left_out, draw.factors))
        self.n_uncertain += int((left_out > 0).sum())
        self.squares += values.summed(2, left_out * factors.square())
        self.cubes += values.summed(3, left_out * (2 * left_out - 1) * factors.pow(3))
        if draw.samples is None or len(values) == 0:
            return
        self.n_samples, self.sampled_share = self.n_samples + draw.n_samples, draw.sampled_share
        samples, which = torch.unique_consecutive(draw.samples, return_inverse=True)
        totals = values.scaled(factors).totals(which.cpu(), len(samples))
        if self.open is not None and self.open[0] == int(samples[0]):
            # the rows of a sample may come in two parts
            for (x, _), (before, _) in zip(totals.blocks, self.open[1].blocks, strict=True):
                x[0] += before[0]
        else:
            self._close()
        self._add_totals(totals.at(slice(-1)))
        self.open = int(samples[-1]), totals.at(slice(-1, None))

    def _close(self) -> None:
        if self.open is not None:
            self._add_totals(self.open[1])
            self.open = None

    def _add_totals(self, totals: OuterValues) -> None:
        for power, total in enumerate(self.totals, 1):
            total += totals.summed(power)

    def moments(self, means: Float[Tensor, " k"], n: int) -> DirectionalMoments:
        """Return the moments of n rows with these means."""
        if not self.n_samples:
            deviations = (self.squares / n).sqrt()
            return DirectionalMoments(n, means, deviations, third_moments=self.cubes / n, n_drawn=self.n_uncertain)
        self._close()
        # as values whose mean over samples is the mean over rows
        scale = self.n_samples / n
        first, second, third = (total * scale**power for power, total in enumerate(self.totals, 1))
        deviations, third = _central(self.n_samples, first, second, third)
        return DirectionalMoments(
            self.n_samples,
            means,
            deviations,
            third_moments=third,
            draw_variances=self.squares / n**2,
            sampled_share=self.sampled_share,
            centers=first / self.n_samples,
        )
