r"""Curvatures with a root, $H = \frac1n \sum_n V_n^\top V_n$ with rows $V_n = S_n^\top J_n$: GGN, empirical Fisher.

Two engines compute them: *rows* (one VJP per row) and *products* (JVPs along directions, or one JVP and one VJP per
matrix-vector product). The model's capabilities decide first, then cost; `source` names the engine that ran.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.derivatives import BatchProducts
from debiased_laplace.curvature.layer_covariance import LayerCovariance
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import TORCH_ROWS, Network, RowBlocks
from debiased_laplace.curvature.residual import ResidualDiagonal
from debiased_laplace.curvature.roots import MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.sub_batch import (
    DirectionalMoments,
    DrawErrors,
    OuterValues,
    ResidualRequest,
    RunningMoments,
    SubBatchCurvature,
    joined_directions,
)
from debiased_laplace.data.batches import Batch, joined, of_one_kind, sample_hashes
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.gram import GramFactor, dense_curvature
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal, along, onto
from debiased_laplace.linalg.row_matrix import OuterRows, RecomputedRows, RowMatrix, RowsOfParameter, placed
from debiased_laplace.linalg.shard import Shard

Value = TypeVar("Value")

_ROWS_WIN_ABOVE = 20  # directions per row of a sample: above, rows times directions beat one JVP per direction
_BATCH = 128  # samples pushed forward at once
_VALUES = 2**20  # directions along which moments are computed at once
_FEATURES = 1024  # samples whose features are used at once
_BYTES_OF_AN_OUTPUT = 64  # of what is computed from it: several numbers in double precision
_MOST_GROUPS = 8  # passes for rows as factors, above which forming all rows in one pass is cheaper
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
        """Memory of all rows together as they are held, in bytes."""
        if self.network.shard is not None:
            return self.network.bytes_of_held_rows(self.n_rows)
        return self.n_rows * (self.network.bytes_of_factors if self._by_parameter else self.network.bytes_of_a_flat_row)

    @property
    def _by_parameter(self) -> bool:
        """Whether rows are held by parameter: where that saves half of their memory."""
        backend = self.network.backend
        offered = backend is not None and backend.offers_rows(self.root)
        return self.network.shard is not None or (not offered and self.network.factors_save_memory)

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
        if self._stacked is not None and isinstance(self._stacked.rows.parts, RecomputedRows):
            part._hold(part._recomputed_rows(part.parameter_groups or self._stacked.rows.parts.groups))
        elif self._stacked is not None:
            part._hold(self._stacked.rows.at(positions.to(self._stacked.rows.like.device)))
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
        if self._stacked is not None and not self._stacked.rows.recomputed:
            size = max(1, self.network.rows_per_chunk(self.rows_per_sample))
            for start in range(0, self.n_samples, size):
                rows = self._stacked.rows.at(slice(start, start + size)).dense()
                if self._scales is not None:
                    rows = rows * self._scales[start : start + size].to(rows)[:, None, None]
                yield len(rows), iter([rows])
            return
        network = self.network
        with self._progress(description) as bar:
            if network.processes.several or network.checkpoint:
                size = max(1, network.rows_per_chunk(self.rows_per_sample))
                for rows, sources in network.processes.shared_out(
                    self._chunks(size), self._whole_rows, network.like.device
                ):
                    self._used |= sources
                    yield len(rows), iter([rows])
                    bar.update(len(rows))
                return
            for batch, targets_or_noise in self.batches():
                for n, blocks, source in network.root_rows(batch, self.root, targets_or_noise):
                    self._used.add(source)
                    yield n, blocks
                    bar.update(n)

    def _chunks(self, size: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield up to so many samples at a time, with the targets or noise that the root needs."""
        for batch, targets_or_noise in self.batches():
            yield from zip(batch.chunks(size), targets_or_noise.split(size), strict=True)

    def _whole_rows(self, chunk: tuple[Batch, Tensor]) -> tuple[Float[Tensor, "n r P"], set[str]]:
        """Return all rows of some samples, and the engines that computed them."""

        def compute() -> tuple[Tensor, set[str]]:
            groups = [
                (torch.cat(list(blocks), dim=1), source)
                for _, blocks, source in self.network.root_rows(chunk[0], self.root, chunk[1])
            ]
            return torch.cat([rows for rows, _ in groups]), {source for _, source in groups}

        return self._kept(chunk, "flat rows", compute)

    def _kept(self, chunk: tuple[Batch, Tensor], what: str, compute: Callable[[], Value]) -> Value:
        """Return what an interrupted fit has computed of some samples, or else compute it."""
        checkpoint = self.network.checkpoint
        if not checkpoint:
            return compute()
        batch, targets_or_noise = chunk
        digest = sha256(sample_hashes(batch).numpy().tobytes())
        for part in (targets_or_noise, batch.weights):
            digest.update(b"none" if part is None else part.detach().cpu().double().numpy().tobytes())
        return checkpoint.kept(
            f"{what}, {type(self.root).__name__}, {digest.hexdigest()}", compute, self.network.like.device
        )

    def rows(self, description: str = "[Computing rows]") -> Iterator[Float[Tensor, "n r P"]]:
        """Yield all rows, block by block."""
        for _, blocks in self.row_groups(description):
            yield from blocks

    def stacked_rows(self) -> GramFactor:
        """Return all rows as one matrix, held in memory if they fit; the rows of a sample are adjacent."""
        if self._stacked is not None and self._scales is not None:
            scales, self._scales = self._scales, None
            return self._hold(self._stacked.rows.scaled(scales))
        if self._stacked is None and self.network.shard is not None:
            return self._hold(self._own_rows(self.network.shard))
        # free memory may change between two questions
        fits = self._stacked is not None or self.bytes_of_rows <= self.network.available_memory
        if not fits and (groups := self.parameter_groups):
            return self._hold(self._recomputed_rows(groups))
        if self._stacked is None and self._by_parameter and (parts := self._rows_of(None)) is not None:
            return self._hold(RowMatrix(tuple(parts)))
        if self._stacked is None:
            flat = self.network.like.new_empty(self.n_samples, self.rows_per_sample, self.network.n_parameters)
            start = 0
            for n, blocks in self.row_groups():
                first = 0
                for block in blocks:
                    flat[start : start + n, first : first + block.shape[1]] = block
                    first += block.shape[1]
                start += n
            return self._hold(RowMatrix((flat,)))
        return self._stacked

    def _own_rows(self, shard: Shard) -> RowMatrix:
        """Compute the rows with the entries of some parameters.

        Raises:
            ValueError: if they do not fit into memory, or the model calls other layers for some samples.
        """
        available = self.network.available_memory
        if self.bytes_of_rows > available:
            raise ValueError(
                f"The share of {shard.processes.size} processes in {self.n_rows:,} rows takes "
                f"{self.bytes_of_rows / 2**30:.2g} GiB, and {available / 2**30:.2g} GiB may be used; expected more "
                "processes, fewer rows or a larger memory."
            )
        parts = self._rows_of(None)
        if parts is None:
            raise ValueError(
                "The model calls other layers for some samples than for others, which shard_directions=True is not "
                "built for."
            )
        return RowMatrix(tuple(parts), shard)

    @property
    def parameter_groups(self) -> tuple[range, ...]:
        """Ranges of parameters whose rows fit together into the available memory; none if some do not."""
        backend = self.network.backend
        offered = backend is not None and backend.offers_rows(self.root)
        if offered or self.linear_layer is not None or self.network.capabilities.layers is None:
            return ()
        groups, start, size = [], 0, 0
        sizes = self.network.bytes_by_parameter
        most = self.network.available_memory // max(1, self.n_rows)
        if most < max(sizes):
            return ()
        for i, own in enumerate(sizes):
            if size + own > most:
                groups.append(range(start, i))
                start, size = i, 0
            size += own
        return (*groups, range(start, len(self.network.selection.names)))

    def _recomputed_rows(self, groups: tuple[range, ...]) -> RowMatrix:
        network = self.network

        def compute(group: range) -> list[RowsOfParameter]:
            rows = self._rows_of(group)
            if rows is None:
                raise ValueError(
                    "The model calls other layers for some samples than for others, and all rows together do not fit "
                    "into memory; expected a larger memory or fewer rows."
                )
            return rows

        shape = self.n_samples, self.rows_per_sample, network.n_parameters
        sizes = tuple(network.selection.sizes)
        return RowMatrix(RecomputedRows(shape, network.like, sizes, groups, compute))

    def _rows_of(self, chosen: range | None) -> list[RowsOfParameter] | None:
        """Compute the rows of some parameters, or of all, by layers; None where a batch calls other layers."""
        r = self.rows_per_sample
        size = max(1, min(_BATCH, self.network.samples_per_pass, CHUNK_BYTES // (r * self.network.bytes_of_factors)))
        shard = self.network.shard
        own = slice(None) if shard is None else shard.numbers
        found: list[RowsOfParameter | None] = [None for _ in (chosen or self.network.selection.names)[own]]
        start = 0

        def compute(pair: tuple[Batch, Tensor]) -> tuple[RowsOfParameter, ...] | None:
            return self._kept(pair, f"rows of {chosen}", partial(compute_anew, pair))

        def compute_anew(pair: tuple[Batch, Tensor]) -> tuple[RowsOfParameter, ...] | None:
            chunk, part = pair
            of_chunk = self.network.row_matrix(chunk.inputs, part, self._cotangents, chosen)
            if of_chunk is None:
                return None
            rows = of_chunk[0] if chunk.weights is None else of_chunk[0].scaled(chunk.weights.sqrt())
            return tuple(rows.parts)

        with self._progress("[Computing rows]") as bar:
            for parts in self.network.processes.shared_out(self._chunks(size), compute, self.network.like.device):
                if parts is None:
                    return None
                for i, (part_of_all, new) in enumerate(zip(found, parts[own], strict=True)):
                    found[i] = placed(new, start, self.n_samples, part_of_all)
                n = parts[0].shape[0]
                start += n
                bar.update(n)
        self._used.add(TORCH_ROWS)
        return [part for part in found if part is not None]

    def _cotangents(self, outputs: Tensor, targets_or_noise: Tensor) -> Tensor:
        return self.root.columns(outputs, targets_or_noise, slice(None))

    @property
    def rows_by_parameter(self) -> RowMatrix | None:
        """Rows that are held by parameter."""
        if self._stacked is None or not self._stacked.rows.by_parameter:
            return None
        return self._stacked.rows if self._scales is None else self._stacked.rows.scaled(self._scales)

    def _hold(self, rows: RowMatrix) -> GramFactor:
        self._stacked = GramFactor(rows)
        return self._stacked

    def keep_rows(self) -> None:
        """Hold all rows in memory for repeated use if they fit, or a few parameters' at a time as factors."""
        if self.linear_layer is not None:
            return
        fits = self.network.shard is not None or self.bytes_of_rows <= self.network.available_memory
        if fits or (self._by_parameter and 0 < len(self.parameter_groups) <= _MOST_GROUPS):
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
        if self.network.shard is not None:
            self.stacked_rows()
        U = directions[:, : max((request.rank for request in requests), default=0)]
        if all(request.residual == "none" for request in requests) and self._columns_are_cheaper(U.shape[1]):
            moments = self._moments_by_columns(U)
            return [moments.leading(request.rank, None, None) for request in requests]
        if (held := self.rows_by_parameter) is not None:
            return self._moments_of_held(held, U, requests)
        sums = RunningMoments(U.shape[1], self.network.like)
        with_trace = any(request.residual == "trace" for request in requests)
        trace = sums.first.new_zeros(())
        residual = ResidualDiagonal(requests, sums.first.new_zeros(len(directions)))
        for n, blocks in self.row_groups("[Curvature along directions]"):
            quadratics = sums.first.new_zeros(n, U.shape[1])
            for rows in blocks:
                projections = onto(rows, U)
                quadratics += projections.to(quadratics.dtype).square().sum(1)
                if with_trace:
                    trace += rows.to(trace.dtype).square().sum()
                for k in residual.ranks:
                    residual.add(k, rows - along(projections[..., :k], U[:, :k]))
            sums.add(quadratics, self._draw_of(sums.n, n))
        moments = sums.moments()
        return [
            moments.leading(r.rank, trace / sums.n if r.residual == "trace" else None, residual.mean(r, sums.n))
            for r in requests
        ]

    def _moments_of_held(
        self, rows: RowMatrix, U: Float[Tensor, "P k"], requests: Sequence[ResidualRequest]
    ) -> list[DirectionalMoments]:
        projections = rows.projected(U)
        moments, n = self._moments_of(_summed_squares(projections)), len(rows)
        found = []
        for request in requests:
            k, trace, diagonal = request.rank, None, None
            if request.residual == "trace":
                trace = self.squared_norms().sum().to(moments.means) / n
            if request.residual == "diagonal":
                diagonal = rows.residual_squares(projections[..., :k], U[:, :k], request.basis) / n
            found.append(moments.leading(k, trace, diagonal))
        return found

    @property
    def linear_layer(self) -> LinearLayer | None:
        """Last linear layer that all parameters belong to, whose rows need not be formed; None if there is none."""
        backend = self.network.backend
        return None if backend is not None and backend.offers_rows(self.root) else self.network.linear_layer

    def features(self, description: str) -> Iterator[tuple[Tensor, Tensor, Batch]]:
        """Yield features and outputs of a last linear layer, and batches of the features with targets or noise.

        Raises:
            ValueError: if the layer does not compute the outputs of some samples.
        """
        self._used.add(TORCH_ROWS)
        together = max(1, min(_FEATURES, CHUNK_BYTES // (_BYTES_OF_AN_OUTPUT * self.network.n_outputs)))
        found: list[tuple[Tensor, Tensor, Batch]] = []
        with self._progress(description) as bar:
            for batch, targets_or_noise in self.batches():
                size = min(_BATCH, together)
                for chunk, part in zip(batch.chunks(size), targets_or_noise.split(size), strict=True):
                    of_chunk = self.network.features_of(chunk)
                    if of_chunk is None:
                        raise ValueError(
                            "The last layer gives the outputs of some samples and not of others; expected "
                            "subset_of_weights='all'."
                        )
                    features, outputs = of_chunk
                    found.append((features, outputs, Batch(features, part.to(features.device), chunk.weights)))
                    bar.update(len(chunk))
                    if sum(len(outputs) for _, outputs, _ in found) >= together:
                        yield _joined(found)
                        found = []
        if found:
            yield _joined(found)

    def coordinate_moments(self, basis: KroneckerBasis) -> DirectionalMoments:
        """Measure the curvature along every vector of a basis, and its spread over samples."""
        if self.linear_layer is not None:
            return self._moments_of_outer_products(basis, self.linear_layer)
        if (held := self.rows_by_parameter) is not None:
            # totals of samples take equal right factors of their rows, which a transposed linear map does not have
            outer = self.draw is None or self.draw.samples is None
            columns = _squared_columns(held.rotated(basis), outer=outer)
            parts = ((place, self._moments_of(values)) for place, values in columns)
            return joined_directions(parts, self.network.n_parameters)
        sums = RunningMoments(self.network.n_parameters, self.network.like)
        for n, blocks in self.row_groups("[Curvature along the basis]"):
            quadratics = sums.first.new_zeros(n, self.network.n_parameters)
            for rows in blocks:
                quadratics += basis.summed_squares(rows)
            sums.add(quadratics, self._draw_of(sums.n, n))
        return sums.moments()

    def coordinate_means(
        self, basis: KroneckerBasis, factors: Sequence[Float[Tensor, " n"]]
    ) -> list[Float[Tensor, " P"]]:
        """Measure the curvature along every vector of a basis, with each sample multiplied by each of its factors."""
        zeros = self.network.like.new_zeros(self.network.n_parameters, dtype=accumulation_dtype(self.network.like))
        sums, weights = [torch.zeros_like(zeros) for _ in factors], [f.to(zeros) for f in factors]
        if self.linear_layer is not None:
            start = 0
            for values in self._values_of_layer(basis, self.linear_layer):
                for total, w in zip(sums, weights, strict=True):
                    total += values.summed(1, w[start : start + len(values)])
                start += len(values)
        elif (held := self.rows_by_parameter) is not None:
            for place, values in _squared_columns(held.rotated(basis), outer=True):
                for total, w in zip(sums, weights, strict=True):
                    total[place] = values.summed(1, w)
        else:
            return super().coordinate_means(basis, factors)
        return [total / self.n_samples for total in sums]

    def _moments_of(self, values: OuterValues) -> DirectionalMoments:
        """Return the moments of all samples' values."""
        sums = RunningMoments(values.n_directions, self.network.like)
        sums.add(values, self._draw_of(0, len(values)))
        return sums.moments()

    def traces(self, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
        r"""Return $\mathrm{tr}(P^{-1} H_n)$ of every sample, in order."""
        if self._by_parameter:
            self.keep_rows()
        if (held := self.rows_by_parameter) is not None:
            parts = [held] if held.recomputed else [held.at(chosen) for chosen in torch.arange(len(held)).split(_BATCH)]
            return torch.cat([precision.variance_of(part, covariances=False).sum(1) for part in parts])
        zeros, groups = self.network.like.new_zeros, []
        covariance = (
            None
            if self.linear_layer is None
            else LayerCovariance.of(self.linear_layer, precision, self.network.available_memory)
        )
        if covariance is None:
            for n, blocks in self.row_groups("[Held-out KL]"):
                groups.append(sum((precision.variance_trace(rows) for rows in blocks), start=zeros(n)))
            return torch.cat(groups)
        for features, outputs, batch in self.features("[Held-out KL]"):
            groups.append(batch.scaled(covariance.traces(features, outputs, self.root, batch.targets)))
        return torch.cat(groups)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Return the sum of the squared norms of every sample's rows, in double precision on the CPU."""
        exact, groups = accumulation_dtype(self.network.like), []
        if (held := self.rows_by_parameter) is not None and held.recomputed and self._stacked is not None:
            # inner products are needed again, and take the same passes
            norms = self._stacked.gram.diagonal().unflatten(0, (self.n_samples, -1)).sum(1) * self.n_samples
            groups = [norms if self._scales is None else norms * self._scales.to(norms).square()]
        elif held is not None:
            groups = [held.squared_norms()]
        elif self.linear_layer is None:
            for n, blocks in self.row_groups():
                zeros = self.network.like.new_zeros(n, dtype=exact)
                groups.append(sum((rows.to(exact).square().sum((1, 2)) for rows in blocks), start=zeros))
        else:
            for features, outputs, batch in self.features("[Norms of rows]"):
                sizes = batch.scaled(self.root.quadratics(outputs, batch.targets, None).sum(1))
                groups.append(sizes * self.linear_layer.squared_lengths(features))
        return torch.cat(groups).cpu().double()

    def _moments_of_outer_products(self, basis: KroneckerBasis, layer: LinearLayer) -> DirectionalMoments:
        sums = RunningMoments(self.network.n_parameters, self.network.like)
        for values in self._values_of_layer(basis, layer):
            sums.add(values, self._draw_of(sums.n, len(values)))
        return sums.moments()

    def _values_of_layer(self, basis: KroneckerBasis, layer: LinearLayer) -> Iterator[OuterValues]:
        r"""Yield the curvature of rows $s \varphi^\top$, $\sum (Q_L^\top s)^2 \otimes (Q_R^\top \varphi)^2$."""
        for features, outputs, batch in self.features("[Curvature along the basis]"):
            blocks = []
            for part, block in zip(layer.parts, basis.blocks, strict=True):
                x = batch.scaled(self.root.quadratics(outputs, batch.targets, block.left))
                y = features if part == "weight" else torch.ones_like(features[:, :1])
                y = y if block.right is None else y @ block.right
                blocks.append((x, y.to(x.dtype).square()))
            yield OuterValues(tuple(blocks))

    def _moments_by_columns(self, directions: Tensor) -> DirectionalMoments:
        self._used.add("torch.func products")
        sums = RunningMoments(directions.shape[1], self.network.like)

        def compute(pair: tuple[Batch, Tensor]) -> Tensor:
            projections = self.network.root_columns(pair[0], self.root, pair[1], directions)
            return projections.to(sums.first.dtype).square().sum(1)

        device = self.network.like.device
        with self._progress("[Curvature along directions]") as bar:
            for squares in self.network.processes.shared_out(self._chunks(_BATCH), compute, device):
                sums.add(squares, self._draw_of(sums.n, len(squares)))
                bar.update(len(squares))
        return sums.moments()

    def _draw_of(self, start: int, n: int) -> DrawErrors | None:
        return None if self.draw is None else self.draw.at(slice(start, start + n))

    def _columns_are_cheaper(self, k: int) -> bool:
        capabilities, backend = self.network.capabilities, self.network.backend
        offered = backend is not None and backend.offers_rows(self.root)
        if self.linear_layer is not None:
            return k > 0
        if self._stacked is not None or offered or not capabilities.columns or k == 0:
            return False
        if not capabilities.vmapped_rows and capabilities.layers is None:
            return True
        return capabilities.vmapped_columns and k <= _ROWS_WIN_ABOVE * self.rows_per_sample

    def _progress(self, description: str) -> "tqdm[None]":
        return tqdm(total=self.n_samples, disable=not self.progress_bar, desc=description)


def _summed_squares(rows: Float[Tensor, "n r k"]) -> OuterValues:
    """Return the squares of entries of rows, summed over the rows of each sample, in double precision."""
    squares = rows.to(accumulation_dtype(rows), copy=True).square_()
    return OuterValues.of(squares[:, 0] if rows.shape[1] == 1 else squares.sum(1))


def _squared_columns(rows: RowMatrix, *, outer: bool) -> Iterator[tuple[slice, OuterValues]]:
    """Yield `_summed_squares` of chunks of columns, with their places; with `outer`, single outer products as such."""
    exact = accumulation_dtype(rows.like)
    for place, part in zip(rows.places, rows.parts, strict=True):
        if outer and isinstance(part, OuterRows) and part.positions == 1 and part.right.shape[1] == 1:
            x, y = (factor[:, :, 0].to(exact).square().sum(1) for factor in (part.left, part.right))
            step = max(1, _VALUES // y.shape[1])
            for i, of_x in enumerate(x.split(step, dim=1)):
                start = place.start + i * step * y.shape[1]
                yield slice(start, start + of_x.shape[1] * y.shape[1]), OuterValues(((of_x, y),))
            continue
        for local, values in RowMatrix((part,)).columns(4):
            yield slice(place.start + local.start, place.start + local.stop), _summed_squares(values)


def _joined(found: list[tuple[Tensor, Tensor, Batch]]) -> tuple[Tensor, Tensor, Batch]:
    features, outputs, batches = zip(*found, strict=True)
    return torch.cat(features), torch.cat(outputs), joined(batches)


class RowProducts:
    """The map from X to H X of a set of samples, prepared for repeated use.

    As many batches as fit into the available memory are linearized and kept; the others are differentiated
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
        n_bytes = network.capabilities.activation_bytes
        budget = network.available_memory
        self._size = max(1, min(_BATCH, budget // n_bytes), CHUNK_BYTES // n_bytes)
        n_kept, held = 0, n_bytes * (_HELD if network.capabilities.linearized else 1)
        self._processes = network.processes
        for number, (batch, targets_or_noise) in enumerate(self._batches(curvature)):
            if (n_kept + len(batch)) * held > budget * self._processes.size:
                # kept are whole leading batches
                self._rest = curvature.part(torch.arange(n_kept, curvature.n_samples))
                return
            if self._processes.is_mine(number):
                self._kept.append(network.products(batch, curvature.root, targets_or_noise))
            n_kept += len(batch)

    def _batches(self, curvature: RowCurvature) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches of as many samples as a product takes at once, which may be more than the loader's."""
        waiting: list[tuple[Batch, Tensor]] = []
        for batch, targets_or_noise in curvature.batches():
            for pair in zip(batch.chunks(self._size), targets_or_noise.split(self._size), strict=True):
                n_waiting = sum(len(other) for other, _ in waiting)
                if waiting and (n_waiting + len(pair[0]) > self._size or not of_one_kind(waiting[0][0], pair[0])):
                    yield _joined_pairs(waiting)
                    waiting = []
                waiting.append(pair)
        yield _joined_pairs(waiting)

    def __call__(self, X: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
        """Return H X."""
        total = torch.zeros_like(X, dtype=accumulation_dtype(X))
        for products in self._kept:
            total += products(X)
        if self._rest is not None:
            for number, (batch, targets_or_noise) in enumerate(self._batches(self._rest)):
                if self._processes.is_mine(number):
                    total += self._network.products(batch, self.curvature.root, targets_or_noise)(X)
        if self._by_columns:
            self._processes.add([total])
        else:
            for block in self.curvature.rows():
                V = block.flatten(0, 1)
                total += V.T @ (V @ X)
        return (total / self.curvature.n_samples).to(X.dtype)


def _joined_pairs(pairs: list[tuple[Batch, Tensor]]) -> tuple[Batch, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    return joined([batch for batch, _ in pairs]), torch.cat([targets_or_noise for _, targets_or_noise in pairs])
