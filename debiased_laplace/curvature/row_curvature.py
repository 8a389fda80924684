r"""Curvatures with a root, $H = \frac1n \sum_n V_n^\top V_n$ with rows $V_n = S_n^\top J_n$: GGN, empirical Fisher.

Two engines compute them: *rows* (one VJP per row) and *products* (JVPs along directions, or one JVP and one VJP per
matrix-vector product). The model's capabilities decide first, then cost; `source` names the engine that ran.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.derivatives import BatchProducts
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import CHUNK_BYTES, free_memory
from debiased_laplace.curvature.network import TORCH_ROWS, Network, RowBlocks
from debiased_laplace.curvature.residual import ResidualDiagonal
from debiased_laplace.curvature.roots import MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.sub_batch import (
    DirectionalMoments,
    DrawErrors,
    ResidualRequest,
    RunningMoments,
    SubBatchCurvature,
)
from debiased_laplace.data.batches import Batch, joined, of_one_kind
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.gram import GramFactor, dense_curvature
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

_ROWS_WIN_ABOVE = 20  # directions per row of a sample: above, rows times directions beat one JVP per direction
_BATCH = 128  # samples pushed forward at once
_HELD = 4  # bytes of a linearized batch, in bytes of its activations: 1 for linear layers, 4 with batch normalization

UNUSED = "unused"
"""Source of a curvature that nothing was computed of yet."""


class RowCurvature(SubBatchCurvature):
    """Mean curvature of a set of samples, given a root of it.

    Attributes:
        draw: errors of the draw, where samples stand for drawn rows; None for samples.
    """

    def __init__(
        self,
        network: Network,
        samples: SubBatch,
        root: OutputRoot,
        *,
        seed: int = 0,
        progress_bar: bool = False,
        targets_or_noise: Tensor | None = None,
        draw: DrawErrors | None = None,
    ):
        self.network = network
        self.samples = samples
        self.root = root
        self.seed = seed
        self.progress_bar = progress_bar
        self.draw = draw
        self._used: set[str] = set()
        self._stacked: GramFactor | None = None
        # factors of the rows that are held; None: 1
        self._scales: Tensor | None = None
        # of all samples, where it cannot be computed from targets or seed; None: it can
        self._drawn = targets_or_noise

    @property
    def source(self) -> str:
        """Engines and backends that computed the curvature so far."""
        return " and ".join(sorted(self._used)) if self._used else UNUSED

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def rows_per_sample(self) -> int:
        """Number r of columns of the root."""
        return self.root.n_columns(self.network.n_outputs)

    @property
    def n_rows(self) -> int:
        """Number of rows of all samples, which bounds the rank of H."""
        return self.n_samples * self.rows_per_sample

    @property
    def bytes_of_rows(self) -> int:
        """Memory of all rows together, in bytes."""
        return self.n_rows * self.network.n_parameters * self.network.like.element_size()

    @property
    def is_random(self) -> bool:
        """Whether targets are drawn (Monte Carlo)."""
        return isinstance(self.root, MonteCarloGaussNewton)

    def redrawn(self) -> "RowCurvature":
        """Return the curvature of the same samples with new drawn targets; itself if none are drawn."""
        if not self.is_random:
            return self
        return RowCurvature(self.network, self.samples, self.root, seed=self.seed + 1, progress_bar=self.progress_bar)

    def of_samples(self, samples: SubBatch, seed: int) -> "RowCurvature":
        """Return the same kind of curvature of other samples; the seed is that of Monte-Carlo draws."""
        return RowCurvature(self.network, samples, self.root, seed=seed)

    def part(self, positions: Int64[Tensor, " m"]) -> "RowCurvature":
        """Return the mean curvature of a subset, with the same draws; rows held in memory are reused."""
        part = RowCurvature(self.network, self.samples.at(positions), self.root, seed=self.seed)
        if self._stacked is not None:
            rows = self._stacked.rows.unflatten(0, (-1, self.rows_per_sample))[positions.to(self._stacked.rows.device)]
            part._hold(rows.flatten(0, 1))
            part._scales = None if self._scales is None else self._scales[positions]
        if self.is_random or self._drawn is not None:
            # a later pass over the part, such as for Kronecker factors, must have the draws of its samples
            drawn = torch.cat([noise for _, noise in self.batches()])
            part._drawn = drawn[positions.to(self.network.like.device)]
        part.draw = None if self.draw is None else self.draw.at(positions)
        part._used = self._used
        return part

    def reweighted(self, factors: Float[Tensor, " n"]) -> "RowCurvature":
        """Return the curvature of the same samples, each multiplied by a factor; rows held in memory are shared."""
        weights = self.samples.weights
        weights = factors if weights is None else weights * factors
        other = RowCurvature(self.network, self.samples.weighted(weights), self.root, seed=self.seed)
        other._drawn, other._used = self._drawn, self._used
        other.draw = None if self.draw is None else self.draw.reweighted(factors)
        if self._stacked is not None:
            scales = factors.sqrt()
            other._stacked = self._stacked
            other._scales = scales if self._scales is None else self._scales * scales.to(self._scales)
        return other

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches with the targets or noise that the root needs; every pass has the same draws."""
        generator = torch.Generator().manual_seed(self.seed)
        start = 0
        for batch in self.samples:
            if self._drawn is None:
                yield batch, self.root.targets_or_noise(batch.targets, self.network.n_outputs, generator)
            else:
                yield batch, self._drawn[start : start + len(batch)]
            start += len(batch)

    def row_groups(self, description: str = "[Computing rows]") -> Iterator[tuple[int, RowBlocks]]:
        """Yield groups of samples: their number, and their rows in one or more blocks."""
        if self._stacked is not None:
            r = self.rows_per_sample
            stacked = self._stacked.rows.unflatten(0, (-1, r))
            size = max(1, self.network.rows_per_chunk(r))
            for start in range(0, len(stacked), size):
                rows = stacked[start : start + size]
                if self._scales is not None:
                    rows = rows * self._scales[start : start + size].to(rows)[:, None, None]
                yield len(rows), iter([rows])
            return
        with self._progress(description) as bar:
            for batch, targets_or_noise in self.batches():
                for n, blocks, source in self.network.root_rows(batch, self.root, targets_or_noise):
                    self._used.add(source)
                    yield n, blocks
                    bar.update(n)

    def rows(self, description: str = "[Computing rows]") -> Iterator[Float[Tensor, "n r P"]]:
        """Yield all rows, block by block."""
        for _, blocks in self.row_groups(description):
            yield from blocks

    def stacked_rows(self) -> GramFactor:
        """Return all rows as one matrix, held in memory; the rows of a sample are adjacent."""
        if self._stacked is not None and self._scales is not None:
            scales = self._scales.repeat_interleave(self.rows_per_sample).to(self._stacked.rows)
            self._scales = None
            return self._hold(self._stacked.rows * scales[:, None])
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
        """Hold all rows in memory for repeated use, if they fit into a quarter of the free memory."""
        if self.bytes_of_rows <= free_memory(self.network.like.device) // 4:
            self.stacked_rows()

    def dense(self) -> Float[Tensor, "P P"]:
        """Return H as a matrix in double precision."""
        H = dense_curvature(self.rows(), self.network.n_parameters, self.network.like)
        return H / self.n_samples

    def linear_map(self) -> Callable[[Tensor], Tensor]:
        """Return the map from X to H X, with batches linearized once and kept as far as memory allows."""
        return RowProducts(self)

    def nested_moments(
        self, directions: Float[Tensor, "P k"], requests: Sequence[ResidualRequest]
    ) -> list[DirectionalMoments]:
        """Measure the moments of several requests in one pass; sums are kept in double precision."""
        U = directions[:, : max((request.rank for request in requests), default=0)]
        if all(request.residual == "none" for request in requests) and self._columns_are_cheaper(U.shape[1]):
            moments = self._moments_by_columns(U)
            return [moments.leading(request.rank, None, None) for request in requests]
        sums = RunningMoments(U.shape[1], directions)
        with_trace = any(request.residual == "trace" for request in requests)
        trace = sums.first.new_zeros(())
        residual = ResidualDiagonal(requests, sums.first.new_zeros(len(directions)))
        for n, blocks in self.row_groups("[Curvature along directions]"):
            quadratics = sums.first.new_zeros(n, U.shape[1])
            for rows in blocks:
                projections = rows @ U
                quadratics += projections.to(quadratics.dtype).square().sum(1)
                if with_trace:
                    trace += rows.to(trace.dtype).square().sum()
                for k in residual.ranks:
                    residual.add(k, rows - projections[..., :k] @ U[:, :k].T)
            sums.add(quadratics, self._draw_of(sums.n, n))
        moments = sums.moments()
        return [
            moments.leading(r.rank, trace / sums.n if r.residual == "trace" else None, residual.mean(r, sums.n))
            for r in requests
        ]

    @cached_property
    def linear_layer(self) -> LinearLayer | None:
        """Last linear layer that all parameters belong to, whose rows need not be formed; None if there is none."""
        backend = self.network.backend
        if backend is not None and backend.offers_rows(self.root):
            return None
        return LinearLayer.of(self.network, next(iter(self.samples)).first(2).inputs)

    def outer_products(self, description: str) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        r"""Yield features (n, d) and root columns (n, C, r) of a last linear layer, whose rows are $s \varphi^\top$."""
        layer = self.linear_layer
        assert layer is not None  # for the type checker
        self._used.add(TORCH_ROWS)
        with self._progress(description) as bar:
            for batch, targets_or_noise in self.batches():
                for chunk, part in zip(batch.chunks(_BATCH), targets_or_noise.split(_BATCH), strict=True):
                    features, outputs = layer.features(chunk.inputs)
                    columns = layer.root_columns(outputs, self.root, part)
                    yield features, (chunk.scaled(S, 0.5) for S in columns)
                    bar.update(len(chunk))

    def coordinate_moments(self, basis: KroneckerBasis) -> DirectionalMoments:
        """Measure the curvature along every vector of a basis, and its spread over samples."""
        # outer products are not held in memory
        if self.linear_layer is not None and self.draw is None:
            return self._moments_of_outer_products(basis, self.linear_layer)
        sums = RunningMoments(self.network.n_parameters, self.network.like)
        for n, blocks in self.row_groups("[Curvature along the basis]"):
            quadratics = sums.first.new_zeros(n, self.network.n_parameters)
            for rows in blocks:
                quadratics += basis.summed_squares(rows)
            sums.add(quadratics, self._draw_of(sums.n, n))
        return sums.moments()

    def traces(self, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
        r"""Return $\mathrm{tr}(P^{-1} H_n)$ of every sample, in order."""
        zeros = self.network.like.new_zeros
        groups = [
            sum((precision.variance_trace(rows) for rows in blocks), start=zeros(n))
            for n, blocks in self.row_groups("[Held-out KL]")
        ]
        return torch.cat(groups)

    def _moments_of_outer_products(self, basis: KroneckerBasis, layer: LinearLayer) -> DirectionalMoments:
        r"""Measure the curvature of rows $s \varphi^\top$ as $\sum (Q_L^\top s)^2 \otimes (Q_R^\top \varphi)^2$."""
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
            for batch, targets_or_noise in self.batches():
                for chunk, part in zip(batch.chunks(_BATCH), targets_or_noise.split(_BATCH), strict=True):
                    projections = self.network.root_columns(chunk, self.root, part, directions)
                    squares = projections.to(sums.first.dtype).square().sum(1)
                    sums.add(squares, self._draw_of(sums.n, len(squares)))
                    bar.update(len(chunk))
        return sums.moments()

    def _draw_of(self, start: int, n: int) -> DrawErrors | None:
        return None if self.draw is None else self.draw.at(slice(start, start + n))

    def _columns_are_cheaper(self, k: int) -> bool:
        capabilities, backend = self.network.capabilities, self.network.backend
        offered = backend is not None and backend.offers_rows(self.root)
        if self._stacked is not None or offered or not capabilities.columns or k == 0:
            return False
        if not capabilities.vmapped_rows:
            return True
        return capabilities.vmapped_columns and k <= _ROWS_WIN_ABOVE * self.rows_per_sample

    def _progress(self, description: str) -> "tqdm[None]":
        return tqdm(total=self.n_samples, disable=not self.progress_bar, desc=description)


class RowProducts:
    """The map from X to H X of a set of samples, prepared for repeated use.

    As many batches as fit into a quarter of the free memory are linearized and kept; the others are differentiated
    again at every product.
    """

    def __init__(self, curvature: RowCurvature):
        self.curvature = curvature
        self._kept: list[BatchProducts] = []
        self._rest: RowCurvature | None = None
        self._by_columns = curvature.network.capabilities.columns and curvature.n_samples > 0
        if not self._by_columns:
            return
        curvature._used.add("torch.func products")
        inputs = next(iter(curvature.samples)).inputs
        network = curvature.network.ready_for_products(inputs)
        self._network = network.unlinearized()
        n_bytes = network.activation_bytes(inputs)
        budget = free_memory(network.like.device) // 4
        self._size = max(1, min(_BATCH, budget // n_bytes), CHUNK_BYTES // n_bytes)
        n_kept, held = 0, n_bytes * (_HELD if network.capabilities.linearized else 1)
        for batch, targets_or_noise in self._batches(curvature):
            if (n_kept + len(batch)) * held > budget:
                # kept are whole leading batches
                self._rest = curvature.part(torch.arange(n_kept, curvature.n_samples))
                return
            self._kept.append(network.products(batch, curvature.root, targets_or_noise))
            n_kept += len(batch)

    def _batches(self, curvature: RowCurvature) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches of as many samples as a product takes at once, which may be more than the loader's."""
        waiting: list[tuple[Batch, Tensor]] = []
        for batch, targets_or_noise in curvature.batches():
            for pair in zip(batch.chunks(self._size), targets_or_noise.split(self._size), strict=True):
                n_waiting = sum(len(other) for other, _ in waiting)
                if waiting and (n_waiting + len(pair[0]) > self._size or not of_one_kind(waiting[0][0], pair[0])):
                    yield _joined(waiting)
                    waiting = []
                waiting.append(pair)
        yield _joined(waiting)

    def __call__(self, X: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
        """Return H X."""
        total = torch.zeros_like(X, dtype=accumulation_dtype(X))
        for products in self._kept:
            total += products(X)
        if self._rest is not None:
            for batch, targets_or_noise in self._batches(self._rest):
                total += self._network.products(batch, self.curvature.root, targets_or_noise)(X)
        if not self._by_columns:
            for block in self.curvature.rows():
                V = block.flatten(0, 1)
                total += V.T @ (V @ X)
        return (total / self.curvature.n_samples).to(X.dtype)


def _joined(pairs: list[tuple[Batch, Tensor]]) -> tuple[Batch, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    return joined([batch for batch, _ in pairs]), torch.cat([targets_or_noise for _, targets_or_noise in pairs])
