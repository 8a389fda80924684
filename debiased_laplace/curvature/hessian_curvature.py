r"""The Hessian of the loss as curvature, $H = \frac1n \sum_n \nabla^2 \ell_n$: indefinite away from a minimum.

It has no root, and so no rows. For a posterior, negative values along a direction are floored at 0 and counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.sub_batch import (
    DirectionalMoments,
    DrawErrors,
    ResidualRequest,
    RunningMoments,
    SubBatchCurvature,
    joined_directions,
)
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

_BATCH = 128  # samples differentiated at once
_PANEL = 64  # basis vectors at once


class HessianCurvature(SubBatchCurvature):
    """Mean Hessian of a set of samples."""

    def __init__(
        self,
        network: Network,
        samples: SubBatch,
        derivatives: SecondDerivatives,
        *,
        progress_bar: bool = False,
        draw: DrawErrors | None = None,
    ):
        self.network = network
        self.samples = samples
        self.derivatives = derivatives
        backend = network.backend
        # backends sum over samples without weights
        offered = backend is not None and backend.offers_hessian() and samples.weights is None
        self.backend = backend if offered else None
        self.progress_bar = progress_bar
        self.draw = draw
        self._dense: Tensor | None = None

    @property
    def source(self) -> str:
        """Engine or backend that computes the curvature."""
        return "torch.func products" if self.backend is None else self.backend.name

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def n_rows(self) -> int:
        """Upper bound P on the rank of H."""
        return self.network.n_parameters

    @property
    def dense_is_affordable(self) -> bool:
        """Whether H and its eigenvectors fit into the available memory."""
        P = self.network.n_parameters
        return self.network.available_memory >= 3 * 8 * P * P

    def dense(self) -> Float[Tensor, "P P"]:
        """Return H as a matrix in double precision, computed once.

        Raises:
            ValueError: if it does not fit into the available memory.
        """
        if self._dense is None:
            P, like = self.network.n_parameters, self.network.like
            if not self.dense_is_affordable:
                raise ValueError(
                    f"The dense Hessian of {P} parameters does not fit into the available memory; expected more of it "
                    "(`memory`, by default a quarter of what is free), hessian_structure='lowrank' with "
                    "complement='none' (products only), fewer parameters ('last_layer', 'subnetwork'), or a GGN "
                    "backend."
                )
            H = like.new_zeros(P, P, dtype=accumulation_dtype(like))
            unit = None if self.backend is not None else torch.eye(P, dtype=like.dtype, device=like.device)
            for chunk in self._chunks("[Computing the Hessian]"):
                if self.backend is not None:
                    H += self.backend.hessian(chunk)
                elif unit is not None:
                    H += self.derivatives.products(chunk, unit)
            self._dense = (H + H.T) / (2 * self.n_samples)
        return self._dense

    def of_samples(self, samples: SubBatch, seed: int) -> "HessianCurvature":  # noqa: ARG002 - nothing is drawn
        """Return the mean Hessian of other samples."""
        return HessianCurvature(self.network, samples, self.derivatives)

    def part(self, positions: Int64[Tensor, " m"]) -> "HessianCurvature":
        """Return the mean Hessian of a subset."""
        draw = None if self.draw is None else self.draw.at(positions)
        return HessianCurvature(self.network, self.samples.at(positions), self.derivatives, draw=draw)

    def reweighted(self, factors: Float[Tensor, " n"]) -> "HessianCurvature":
        """Return the mean Hessian of the same samples, each multiplied by a factor."""
        weights = factors if self.samples.weights is None else self.samples.weights * factors
        draw = None if self.draw is None else self.draw.reweighted(factors)
        return HessianCurvature(self.network, self.samples.weighted(weights), self.derivatives, draw=draw)

    def nested_moments(
        self, directions: Float[Tensor, "P k"], requests: Sequence[ResidualRequest]
    ) -> list[DirectionalMoments]:
        """Measure the moments of several requests, one after the other."""
        return [self._moments(directions[:, : request.rank], request) for request in requests]

    def _moments(self, directions: Float[Tensor, "P k"], request: ResidualRequest) -> DirectionalMoments:
        directions = directions.to(self.network.like.dtype)
        sums = RunningMoments(directions.shape[1], directions)
        for chunk in self._chunks("[Curvature along directions]"):
            draw = None if self.draw is None else self.draw.at(slice(sums.n, sums.n + len(chunk)))
            sums.add(self.derivatives.quadratics(chunk, directions), draw)
        moments = sums.moments()
        if self.backend is None and request.residual == "none":
            return moments
        H = self.dense()
        U = directions.to(H.dtype)
        HU = H @ U
        diagonal = None
        if request.residual == "diagonal":
            residual = H - HU @ U.T
            residual = residual - U @ (U.T @ residual)
            if request.basis is not None:
                rotated = request.basis.coordinates(residual.to(directions.dtype))
                residual = request.basis.coordinates(rotated.T).to(H.dtype)
            diagonal = residual.diagonal()
        trace = H.trace() if request.residual == "trace" else None
        return replace(moments, means=(U * HU).sum(0), trace=trace, residual_diagonal=diagonal)

    def coordinate_moments(self, basis: KroneckerBasis) -> DirectionalMoments:
        """Measure the curvature along every vector of a basis, and its spread over samples."""
        P, like = self.network.n_parameters, self.network.like
        units = torch.eye(P, dtype=like.dtype, device=like.device)
        places = (slice(start, start + _PANEL) for start in range(0, P, _PANEL))
        return joined_directions(((place, self.moments(basis.vectors(units[place]).T)) for place in places), P)

    def traces(self, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
        r"""Return $\mathrm{tr}(P^{-1} H_n)$ of every sample, in order."""
        chunks = self._chunks("[Held-out KL]")
        return torch.cat([hessian_traces(self.derivatives, chunk, precision) for chunk in chunks])

    def linear_map(self) -> Callable[[Tensor], Tensor]:
        """Return the map from X to H X."""
        if self.backend is not None:
            H = self.dense()
            return lambda X: (H @ X.to(H.dtype)).to(X.dtype)

        def product(X: Tensor) -> Tensor:
            total = torch.zeros_like(X, dtype=accumulation_dtype(X))
            for chunk in self._chunks("[Hessian products]", quiet=True):
                total += self.derivatives.products(chunk, X)
            return (total / self.n_samples).to(X.dtype)

        return product

    def _chunks(self, description: str, *, quiet: bool = False) -> Iterator[Batch]:
        with tqdm(total=self.n_samples, disable=quiet or not self.progress_bar, desc=description) as bar:
            for batch in self.samples:
                for chunk in batch.chunks(_BATCH):
                    yield chunk
                    bar.update(len(chunk))


def hessian_traces(derivatives: SecondDerivatives, batch: Batch, precision: LowRankPlusDiagonal) -> Float[Tensor, " n"]:
    r"""Return $\mathrm{tr}(P^{-1} H_n)$ of every sample of a batch.

    A Hessian has no rows: the trace is the sum of quadratics along the P columns of a root of the covariance.
    """
    like = precision.magnitudes
    units = torch.eye(precision.n_parameters, dtype=like.dtype, device=like.device).split(_PANEL)
    return torch.stack([derivatives.quadratics(batch, precision.root(unit).T).sum(1) for unit in units]).sum(0)
