r"""Curvatures with a root, $H = \frac1n \sum_n V_n^\top V_n$ with rows $V_n = S_n^\top J_n$: GGN, empirical Fisher.

Two engines answer: *rows* (one VJP per row) and *products* (JVPs along directions, or one JVP and one VJP per
matrix-vector product). Which one ran is chosen by what the model allows, then by cost, and is said in `source`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.derivatives import BatchProducts
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import free_memory
from debiased_laplace.curvature.network import TORCH_ROWS, Network, RowBlocks
from debiased_laplace.curvature.outside import OutsideDiagonals
from debiased_laplace.curvature.roots import MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.sub_batch import (
    Aspect,
    DirectionalMoments,
    Residual,
    RunningMoments,
    SubBatchCurvature,
)
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.gram import GramFactor, dense_curvature
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

_ROWS_WIN_ABOVE = 20  # directions per row of a sample: above, rows times directions beat one JVP per direction
_BATCH = 128  # samples pushed forward at once

NOBODY = "nobody yet"
"""The source of what was not asked for yet."""


class RowCurvature(SubBatchCurvature):
    """Mean curvature of some samples through a root of it."""

    def __init__(
        self, network: Network, samples: SubBatch, root: OutputRoot, *, seed: int = 0, progress_bar: bool = False
    ):
        self.network = network
        self.samples = samples
        self.root = root
        self.seed = seed
        self.progress_bar = progress_bar
        self._used: set[str] = set()
        self._stacked: GramFactor | None = None
        self._drawn: Tensor | None = None

    @property
    def source(self) -> str:
        """Who computed what was asked for so far."""
        return " and ".join(sorted(self._used)) if self._used else NOBODY

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def rows_per_sample(self) -> int:
        """Columns r of the root."""
        return self.root.n_columns(self.network.n_outputs)

    @property
    def n_rows(self) -> int:
        """Rows of the root: r times samples."""
        return self.n_samples * self.rows_per_sample

    @property
    def bytes_of_rows(self) -> int:
        """Memory that all rows together take."""
        return self.n_rows * self.network.n_parameters * self.network.like.element_size()

    @property
    def is_random(self) -> bool:
        """Whether targets are drawn."""
        return isinstance(self.root, MonteCarloGaussNewton)

    def redrawn(self) -> "RowCurvature":
        """The same samples with other drawn targets; itself where none are drawn."""
        if not self.is_random:
            return self
        return RowCurvature(self.network, self.samples, self.root, seed=self.seed + 1, progress_bar=self.progress_bar)

    def of_samples(self, samples: SubBatch, seed: int) -> "RowCurvature":
        """Return the same kind of curvature of other samples, with Monte-Carlo draws of their own."""
        return RowCurvature(self.network, samples, self.root, seed=seed)

    def part(self, positions: Int64[Tensor, " m"]) -> "RowCurvature":
        """The mean curvature of some of the samples, with the same draws; kept rows are shared out."""
        some = self.samples.at(positions)
        part = RowCurvature(self.network, some, self.root, seed=self.seed, progress_bar=False)
        if self._stacked is not None:
            rows = self._stacked.rows.unflatten(0, (-1, self.rows_per_sample))[positions.to(self._stacked.rows.device)]
            part._hold(rows.flatten(0, 1))
        if self.is_random:
            # whoever goes through the samples again, for factors say, must not see draws of another sample
            part._drawn = torch.cat([side for _, side in self.batches()])[positions.to(self.network.like.device)]
        part._used = self._used
        return part

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Batches, and what the root needs to know of each sample: the same draws at every pass."""
        generator = torch.Generator().manual_seed(self.seed)
        start = 0
        for batch in self.samples:
            if self._drawn is None:
                yield batch, self.root.side(batch.targets, self.network.n_outputs, generator)
            else:
                yield batch, self._drawn[start : start + len(batch)]
            start += len(batch)

    def row_groups(self, description: str = "[Computing rows]") -> Iterator[tuple[int, RowBlocks]]:
        """The rows of every sample: number of samples of each group, and their rows in one or more blocks."""
        if self._stacked is not None:
            r = self.rows_per_sample
            stacked = self._stacked.rows.unflatten(0, (-1, r))
            for rows in stacked.split(max(1, self.network.rows_per_chunk(r))):
                yield len(rows), iter([rows])
            return
        with self._progress(description) as bar:
            for batch, side in self.batches():
                for n, blocks, who in self.network.root_rows(batch, self.root, side):
                    self._used.add(who)
                    yield n, blocks
                    bar.update(n)

    def rows(self, description: str = "[Computing rows]") -> Iterator[Float[Tensor, "n r P"]]:
        """All rows, block by block."""
        for _, blocks in self.row_groups(description):
            yield from blocks

    def stacked_rows(self) -> GramFactor:
        """All rows in one matrix, kept; those of a sample are next to each other."""
        if self._stacked is None:
            rows = self.network.like.new_empty(self.n_rows, self.network.n_parameters)
            start = 0
            for block in self.rows():
                rows[start : start + len(block) * block.shape[1]] = block.flatten(0, 1)
                start += len(block) * block.shape[1]
            return self._hold(rows)
        return self._stacked

    def _hold(self, rows: Float[Tensor, "R P"]) -> GramFactor:
        owner = torch.arange(self.n_samples, device=rows.device).repeat_interleave(self.rows_per_sample)
        self._stacked = GramFactor(rows, owner, self.n_samples)
        return self._stacked

    def keep_rows(self) -> None:
        """Hold all rows in memory, where they fit into a quarter of what is free: they are needed more than once."""
        if self.bytes_of_rows <= free_memory(self.network.like.device) // 4:
            self.stacked_rows()

    def dense(self) -> Float[Tensor, "P P"]:
        """H itself in double precision."""
        H = dense_curvature(self.rows(), self.network.n_parameters, self.network.like)
        return H / self.n_samples

    def linear_map(self) -> Callable[[Tensor], Tensor]:
        """Products with H, each batch made ready once and kept."""
        return RowProducts(self)

    def moments(
        self, directions: Float[Tensor, "P k"], residual: Residual = "none", basis: KroneckerBasis | None = None
    ) -> DirectionalMoments:
        """Curvature along directions, its spread over samples, and what is left outside, in one pass.

        Args:
            directions: orthonormal columns.
            residual: what to say about the complement of the directions.
            basis: in whose coordinates the residual's diagonal is; None for the axes.

        Returns:
            The moments; sums are kept in double precision.
        """
        return self.nested_moments(directions, [Aspect(directions.shape[1], residual, basis)])[0]

    def nested_moments(self, directions: Float[Tensor, "P k"], aspects: Sequence[Aspect]) -> list[DirectionalMoments]:
        """Moments along several numbers of leading directions, in one pass."""
        U = directions[:, : max((aspect.rank for aspect in aspects), default=0)]
        if all(aspect.residual == "none" for aspect in aspects) and self._columns_are_cheaper(U.shape[1]):
            found = self._moments_by_columns(U)
            return [found.leading(aspect.rank, None, None) for aspect in aspects]
        sums = RunningMoments(U.shape[1], directions)
        with_trace = any(aspect.residual == "trace" for aspect in aspects)
        trace = sums.first.new_zeros(())
        outside = OutsideDiagonals(aspects, sums.first.new_zeros(len(directions)))
        for n, blocks in self.row_groups("[Curvature along directions]"):
            quadratics = sums.first.new_zeros(n, U.shape[1])
            for rows in blocks:
                projections = rows @ U
                quadratics += projections.to(quadratics.dtype).square().sum(1)
                if with_trace:
                    trace += rows.to(trace.dtype).square().sum()
                for k in outside.ranks:
                    outside.add(k, rows - projections[..., :k] @ U[:, :k].T)
            sums.add(quadratics)
        found = sums.moments()
        return [
            found.leading(a.rank, trace / sums.n if a.residual == "trace" else None, outside.mean(i, sums.n))
            for i, a in enumerate(aspects)
        ]

    @cached_property
    def linear_layer(self) -> LinearLayer | None:
        """The last linear layer that the parameters are of, whose rows need not be formed; None where they are not."""
        foreign = self.network.foreign
        if foreign is not None and foreign.offers_rows(self.root):
            return None
        return LinearLayer.of(self.network, next(iter(self.samples)).first(2).inputs)

    def outer_products(self, description: str) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        r"""Features (n, d) and columns (n, C, r) of a last linear layer, whose rows are $s \varphi^\top$."""
        layer = self.linear_layer
        assert layer is not None  # for the type checker
        self._used.add(TORCH_ROWS)
        with self._progress(description) as bar:
            for batch, side in self.batches():
                for some, known in zip(batch.chunks(_BATCH), side.split(_BATCH), strict=True):
                    features, outputs = layer.features(some.inputs)
                    yield features, layer.root_columns(outputs, self.root, known)
                    bar.update(len(some))

    def coordinate_moments(self, basis: KroneckerBasis) -> DirectionalMoments:
        """Curvature along every vector of a basis, and its spread over samples: the sum over rows of squares."""
        if self.linear_layer is not None:
            return self._moments_of_outer_products(basis, self.linear_layer)
        sums = RunningMoments(self.network.n_parameters, self.network.like)
        for n, blocks in self.row_groups("[Curvature along the basis]"):
            quadratics = sums.first.new_zeros(n, self.network.n_parameters)
            for rows in blocks:
                quadratics += basis.summed_squares(rows)
            sums.add(quadratics)
        return sums.moments()

    def traces(self, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
        r"""$\mathrm{tr}(P^{-1} H_n)$ of every sample, in order."""
        found = []
        for n, blocks in self.row_groups("[Held-out KL]"):
            found.append(sum((precision.variance_trace(rows) for rows in blocks), start=self.network.like.new_zeros(n)))
        return torch.cat(found)

    def _moments_of_outer_products(self, basis: KroneckerBasis, layer: LinearLayer) -> DirectionalMoments:
        r"""The same for rows $s \varphi^\top$: of a sample, $\sum (Q_L^\top s)^2 \otimes (Q_R^\top \varphi)^2$."""
        sums = RunningMoments(self.network.n_parameters, self.network.like)
        exact = sums.first.dtype
        for features, columns in self.outer_products("[Curvature along the basis]"):
            of_outputs = [features.new_zeros(len(features), self.network.n_outputs, dtype=exact) for _ in basis.blocks]
            for S in columns:
                rows = S.mT.contiguous()
                for total, block in zip(of_outputs, basis.blocks, strict=True):
                    total += (rows if block.left is None else rows @ block.left).square().sum(1)
            first, second, third = [], [], []
            for part, x, block in zip(layer.parts, of_outputs, basis.blocks, strict=True):
                y = features if block.right is None else features @ block.right
                y = y.to(exact).square() if part == "weight" else x.new_ones(len(x), 1)
                first.append((x.T @ y).flatten())
                second.append((x.square().T @ y.square()).flatten())
                third.append((x.pow(3).T @ y.pow(3)).flatten())
            sums.n += len(features)
            sums.first += torch.cat(first)
            sums.second += torch.cat(second)
            sums.third += torch.cat(third)
        return sums.moments()

    def _moments_by_columns(self, directions: Tensor) -> DirectionalMoments:
        self._used.add("torch.func products")
        sums = RunningMoments(directions.shape[1], directions)
        with self._progress("[Curvature along directions]") as bar:
            for batch, side in self.batches():
                for some, known in zip(batch.chunks(_BATCH), side.split(_BATCH), strict=True):
                    projections = self.network.root_columns(some.inputs, self.root, known, directions)
                    sums.add(projections.to(sums.first.dtype).square().sum(1))
                    bar.update(len(some))
        return sums.moments()

    def _columns_are_cheaper(self, k: int) -> bool:
        able = self.network.capabilities
        foreign = self.network.foreign
        offered = foreign is not None and foreign.offers_rows(self.root)
        if self._stacked is not None or offered or not able.columns or k == 0:
            return False
        if not able.vmapped_rows:
            return True
        return able.vmapped_columns and k <= _ROWS_WIN_ABOVE * self.rows_per_sample

    def _progress(self, description: str) -> "tqdm[None]":
        return tqdm(total=self.n_samples, disable=not self.progress_bar, desc=description)


class RowProducts:
    """The map X to H X of a set of samples, ready for many products."""

    def __init__(self, curvature: RowCurvature):
        self.curvature = curvature
        network = curvature.network
        self._batches: list[BatchProducts] = []
        if network.capabilities.columns:
            curvature._used.add("torch.func products")
            for batch, side in curvature.batches():
                network = network if self._batches else network.ready_for_products(batch.inputs)
                for some, known in zip(batch.chunks(_BATCH), side.split(_BATCH), strict=True):
                    self._batches.append(network.products(some.inputs, curvature.root, known))

    def __call__(self, X: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
        """H X."""
        exact = accumulation_dtype(X)
        total = torch.zeros_like(X, dtype=exact)
        for products in self._batches:
            total += products(X)
        if not self._batches:
            for block in self.curvature.rows():
                V = block.flatten(0, 1)
                total += V.T @ (V @ X)
        return (total / self.curvature.n_samples).to(X.dtype)
