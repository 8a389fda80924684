"""The curvature that the directions do not span."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.sub_batch import Residual
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
    r"""Curvature $K (D + U \mathrm{diag}(m) U^\top) K^\top$, a mean per sample.

    Attributes:
        diagonal: D; one number where it is isotropic.
        directions: U, in the coordinates of the basis.
        weights: m, which is not the curvature along the directions where D adds to it.
        basis: K; None for the axes.
    """

    diagonal: Float[Tensor, ""] | Float[Tensor, " P"]
    directions: Float[Tensor, "P k"]
    weights: Float[Tensor, " k"]
    basis: KroneckerBasis | None = None

    def precision(
        self, likelihood_weight: float, prior: Float[Tensor, ""] | Float[Tensor, " P"]
    ) -> LowRankPlusDiagonal:
        r"""The posterior precision $N \tau H + P_0$, the prior a number, or one per coordinate."""
        return LowRankPlusDiagonal(
            likelihood_weight * self.diagonal + prior, self.directions, likelihood_weight * self.weights, self.basis
        )


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
    rotated = directions if basis is None else basis.coordinates(directions.T).T.contiguous()
    # a Hessian's may be negative: floored once all samples have had their say, not fold by fold
    return LowRankCurvature(residual.to(magnitudes.dtype).clamp_min(0), rotated, magnitudes, basis)
