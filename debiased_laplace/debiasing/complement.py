"""The curvature that the directions do not span."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.sub_batch import Residual
from debiased_laplace.debiasing.inverse_bias import second_order
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

ComplementKind = Literal["none", "isotropic", "diagonal", "kron"]

RESIDUAL_OF: dict[ComplementKind, Residual] = {
    "none": "none",
    "isotropic": "trace",
    "diagonal": "diagonal",
    "kron": "diagonal",
}
"""What has to be measured on the samples for each kind."""


@dataclass(frozen=True, eq=False)
class LowRankCurvature:
    r"""Curvature $K (D + F \mathrm{diag}(m) F^\top) K^\top$, a mean per sample, $F = S U$.

    Attributes:
        diagonal: D; one number where it is isotropic.
        directions: U, unit vectors in the coordinates of the basis, orthogonal in the metric: $U^\top S U$ is diagonal.
        weights: m, which is not the curvature along the directions where D adds to it, or there is a metric.
        basis: K; None for the axes.
        metric: diagonal of S; None for the identity.
        error_variances: of m, or of D where there are no directions, by which the precision is corrected for the bias
            of its inverse; None for no correction.
    """

    diagonal: Float[Tensor, ""] | Float[Tensor, " P"]
    directions: Float[Tensor, "P k"]
    weights: Float[Tensor, " k"]
    basis: KroneckerBasis | None = None
    metric: Float[Tensor, " P"] | None = None
    error_variances: Float[Tensor, " _"] | None = None

    @property
    def factor(self) -> Float[Tensor, "P k"]:
        """F."""
        return self.directions if self.metric is None else self.directions * self.metric[:, None]

    def precision(
        self, likelihood_weight: float, prior: Float[Tensor, ""] | Float[Tensor, " P"]
    ) -> LowRankPlusDiagonal:
        r"""The posterior precision $N \tau H + P_0$, the prior a number, or one per coordinate."""
        diagonal, weights = self.diagonal_and_weights(likelihood_weight, prior)
        return LowRankPlusDiagonal(diagonal, self.factor, weights, self.basis)

    def diagonal_and_weights(
        self, likelihood_weight: float | Tensor, prior: Float[Tensor, ""] | Float[Tensor, " P"]
    ) -> tuple[Tensor, Tensor]:
        """Those of the precision, differentiable in both arguments."""
        diagonal, weights = likelihood_weight * self.diagonal + prior, likelihood_weight * self.weights
        if self.error_variances is None:
            return diagonal, weights
        variances = likelihood_weight**2 * self.error_variances
        if len(weights) == 0 and len(variances) == 0:
            return diagonal, weights
        if len(weights) == 0:
            return prior + second_order(likelihood_weight * self.diagonal, variances, prior), weights
        spread = self.factor.square() / diagonal[..., None] if diagonal.ndim else self.factor.square() / diagonal
        return diagonal, second_order(weights, variances, 1 / spread.sum(0))


def without_complement(directions: Float[Tensor, "P k"], magnitudes: Float[Tensor, " k"]) -> LowRankCurvature:
    """Nothing outside the directions: there the posterior is the prior."""
    return LowRankCurvature(directions.new_zeros(()), directions, magnitudes)


def isotropic(
    directions: Float[Tensor, "P k"], magnitudes: Float[Tensor, " k"], trace: Float[Tensor, ""]
) -> LowRankCurvature:
    r"""The same curvature c in every direction outside, $c = (\mathrm{tr} H - \sum m) / (P - k)$.

    Written as $c I + U \mathrm{diag}(m - c) U^\top$, so that the curvature along the directions stays m.
    """
    P, k = directions.shape
    left = (trace - magnitudes.to(trace.dtype).sum()).clamp_min(0)
    c = (left / (P - k) if k < P else left.new_zeros(())).to(magnitudes.dtype)
    return LowRankCurvature(c, directions, magnitudes - c)


def diagonal(
    directions: Float[Tensor, "P k"],
    magnitudes: Float[Tensor, " k"],
    residual: Float[Tensor, " P"],
    basis: KroneckerBasis | None = None,
) -> LowRankCurvature:
    r"""The diagonal of $(I - UU^\top) H (I - UU^\top)$, in a basis: non-negative, and the trace of H is kept.

    It adds curvature along the directions too, $u_i^\top D u_i$; taking that off the magnitudes would keep their values
    and lose as much of the trace.
    """
    rotated = directions if basis is None else _without_traces(basis.coordinates(directions.T).T.contiguous())
    # a Hessian's may be negative: floored once all samples have had their say, not fold by fold
    return LowRankCurvature(residual.to(magnitudes.dtype).clamp_min(0), rotated, magnitudes, basis)


def _without_traces(x: Tensor) -> Tensor:
    """Zeros in place of entries whose products underflow: they add nothing, and processors are slow with them."""
    return x.masked_fill(x.abs() < torch.finfo(x.dtype).tiny ** 0.5, 0.0)
