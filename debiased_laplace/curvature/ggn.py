r"""The generalized Gauss-Newton curvature of a set of samples, $H = \frac1n \sum_n J_n^\top \Lambda_n J_n$.

A `SubBatchCurvature` is what the estimator may ask of a set of samples. Two engines answer: *rows* ($S_n^\top J_n$,
C VJPs per sample) and *products* (JVPs along directions, or one JVP and one VJP per matrix-vector product). Which one
ran is chosen by what the model allows, then by cost, and is said in `source`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.network import Network
from debiased_laplace.data.samples import Samples
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.gram import GramFactor

Residual = Literal["none", "trace", "diagonal"]
Source = Literal["torch.func rows", "torch.func products"]

_ROWS_WIN_ABOVE = 20  # directions per output: above, rows times directions beat one JVP per direction
_BATCH = 128  # samples pushed forward at once


@dataclass(frozen=True, eq=False)
class DirectionalMoments:
    r"""What a set of samples says along given directions $u_i$, and about what they do not span.

    Attributes:
        n_samples: number n of samples.
        means: $u_i^\top H u_i$.
        standard_deviations: of the per-sample values $u_i^\top H_n u_i$ (ddof 1).
        trace: of H; only where it was asked for.
        residual_diagonal: diagonal of $(I - UU^\top) H (I - UU^\top)$; only where it was asked for.
    """

    n_samples: int
    means: Float[Tensor, " k"]
    standard_deviations: Float[Tensor, " k"]
    trace: Float[Tensor, ""] | None = None
    residual_diagonal: Float[Tensor, " P"] | None = None


class SubBatchCurvature:
    """Mean GGN of some samples, never formed."""

    def __init__(self, network: Network, samples: Samples, *, progress_bar: bool = False):
        self.network = network
        self.samples = samples
        self.progress_bar = progress_bar
        self.source: Source = "torch.func rows"
        self._stacked: GramFactor | None = None

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def n_rows(self) -> int:
        """Rows of the root: outputs times samples."""
        return self.n_samples * self.network.n_outputs

    @property
    def bytes_of_rows(self) -> int:
        """Memory that all rows together take."""
        return self.n_rows * self.network.n_parameters * self.network.like.element_size()

    def rows(self, description: str = "[Computing rows]") -> Iterator[Float[Tensor, "n r P"]]:
        """Rows of the root of every sample, chunk by chunk; from memory where they are kept."""
        if self._stacked is not None:
            r = self.network.n_outputs
            yield from self._stacked.rows.unflatten(0, (-1, r)).split(self.network.rows_per_chunk)
            return
        with self._progress(description) as bar:
            for batch in self.samples:
                for chunk in self.network.ggn_rows(batch.inputs):
                    yield chunk
                    bar.update(len(chunk))

    def stacked_rows(self) -> GramFactor:
        """All rows in one matrix, kept."""
        if self._stacked is None:
            n, r, P = self.n_samples, self.network.n_outputs, self.network.n_parameters
            rows = self.network.like.new_empty(n, r, P)
            start = 0
            for chunk in self.rows("[Computing rows]"):
                rows[start : start + len(chunk)] = chunk
                start += len(chunk)
            owner = torch.arange(n, device=rows.device).repeat_interleave(r)
            self._stacked = GramFactor(rows.flatten(0, 1), owner, n)
        return self._stacked

    def linear_map(self) -> "GGNProducts":
        """Products with H, each batch made ready once and kept."""
        return GGNProducts(self)

    def moments(self, directions: Float[Tensor, "P k"], residual: Residual = "none") -> DirectionalMoments:
        """Curvature along directions, its spread over samples, and what is left outside, in one pass.

        Args:
            directions: orthonormal columns.
            residual: what to say about the complement of the directions.

        Returns:
            The moments; sums are kept in double precision.
        """
        sums = _Sums(directions, residual)
        if residual == "none" and self._columns_are_cheaper(directions.shape[1]):
            self.source = "torch.func products"
            with self._progress("[Curvature along directions]") as bar:
                for batch in self.samples:
                    for inputs in batch.inputs.split(_BATCH):
                        sums.add_projections(self.network.ggn_columns(inputs, directions))
                        bar.update(len(inputs))
        else:
            for chunk in self.rows("[Curvature along directions]"):
                sums.add_rows(chunk)
        return sums.moments()

    def _columns_are_cheaper(self, k: int) -> bool:
        able = self.network.capabilities
        if self._stacked is not None or not able.columns or k == 0:
            return False
        if not able.vmapped_rows:
            return True
        return able.vmapped_columns and k <= _ROWS_WIN_ABOVE * self.network.n_outputs

    def _progress(self, description: str) -> "tqdm[None]":
        return tqdm(total=self.n_samples, disable=not self.progress_bar, desc=description)


class GGNProducts:
    """The map X to H X of a set of samples, ready for many products."""

    def __init__(self, curvature: SubBatchCurvature):
        self.curvature = curvature
        network = curvature.network
        if network.capabilities.columns:
            curvature.source = "torch.func products"
            self._batches = [
                network.products(inputs) for batch in curvature.samples for inputs in batch.inputs.split(_BATCH)
            ]
        else:
            self._batches = []

    def __call__(self, X: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
        """H X."""
        exact = accumulation_dtype(X)
        total = torch.zeros_like(X, dtype=exact)
        for products in self._batches:
            total += products(X)
        if not self._batches:
            for chunk in self.curvature.rows():
                V = chunk.flatten(0, 1)
                total += V.T @ (V @ X)
        return (total / self.curvature.n_samples).to(X.dtype)


class _Sums:
    """Running sums of one pass over the samples."""

    def __init__(self, directions: Tensor, residual: Residual):
        exact = accumulation_dtype(directions)
        P, k = directions.shape
        self.directions, self.residual = directions, residual
        self.n = 0
        self.first = directions.new_zeros(k, dtype=exact)
        self.second = directions.new_zeros(k, dtype=exact)
        self.trace = directions.new_zeros((), dtype=exact)
        self.diagonal = directions.new_zeros(P if residual == "diagonal" else 0, dtype=exact)

    def add_projections(self, projections: Tensor) -> None:
        """Projections (n, r, k) of the samples' rows on the directions."""
        quadratics = projections.to(self.first.dtype).square().sum(1)
        self.n += len(quadratics)
        self.first += quadratics.sum(0)
        self.second += quadratics.square().sum(0)

    def add_rows(self, rows: Tensor) -> None:
        """Rows (n, r, P) of the samples."""
        projections = rows @ self.directions
        self.add_projections(projections)
        if self.residual == "trace":
            self.trace += rows.to(self.trace.dtype).square().sum()
        if self.residual == "diagonal":
            outside = rows - projections @ self.directions.T
            self.diagonal += outside.square().sum((0, 1))

    def moments(self) -> DirectionalMoments:
        """Means and spreads of what was added."""
        means = self.first / self.n
        spread = (self.second - self.n * means.square()).clamp_min(0) / max(self.n - 1, 1)
        return DirectionalMoments(
            self.n,
            means,
            spread.sqrt(),
            self.trace / self.n if self.residual == "trace" else None,
            self.diagonal / self.n if self.residual == "diagonal" else None,
        )
