"""Low-rank curvature, and the complement that its directions do not span."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.sub_batch import Residual
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.linalg.shard import Shard

ComplementKind = Literal["none", "isotropic", "diagonal", "kron"]

RESIDUAL_OF: dict[ComplementKind, Residual] = {
    "none": "none",
    "isotropic": "trace",
    "diagonal": "diagonal",
    "kron": "diagonal",
}
"""Residual that each kind is computed from."""


_ROWS = 2**16  # rows of the directions that are changed at a time


@dataclass(frozen=True, eq=False)
class LowRankCurvature:
    r"""Curvature $K (D + F \mathrm{diag}(m) F^\top) K^\top$, a mean per sample, $F = S U$.

    Attributes:
        diagonal: D; one number where it is isotropic.
        directions: U, unit vectors in the coordinates of the basis, orthogonal in the metric: $U^\top S U$ is diagonal;
            possibly in a shorter format than m, on another device, or on disk.
        weights: m; the curvature along the directions only if D is 0 and there is no metric.
        basis: K; None for the axes.
        metric: diagonal of S; None for the identity.
        error_variances: variances of m (without directions, of D), for the correction of the inverse's bias; None for
            no correction.
        shard: of the parameters, where D, U and K have the entries of these alone.
    """

    diagonal: Float[Tensor, ""] | Float[Tensor, " P"]
    directions: Float[Tensor, "P k"]
    weights: Float[Tensor, " k"]
    basis: KroneckerBasis | None = None
    metric: Float[Tensor, " P"] | None = None
    error_variances: Float[Tensor, " _"] | None = None
    shard: Shard | None = None

    @property
    def factor(self) -> Float[Tensor, "P k"]:
        """The matrix F."""
        return self.directions if self.metric is None else self.directions * self.metric[:, None]

    def precision(
        self, likelihood_weight: float, prior: Float[Tensor, ""] | Float[Tensor, " P"]
    ) -> LowRankPlusDiagonal:
        r"""Return the posterior precision $N \tau H + P_0$; the prior is one number, or one per coordinate."""
        diagonal, weights = self.diagonal_and_weights(likelihood_weight, prior)
        return LowRankPlusDiagonal(diagonal, self.factor, weights, self.basis, self.shard)

    def diagonal_and_weights(
        self, likelihood_weight: float | Tensor, prior: Float[Tensor, ""] | Float[Tensor, " P"]
    ) -> tuple[Tensor, Tensor]:
        """Return the diagonal and the weights of the precision, differentiable in both arguments."""
        weights = likelihood_weight * self.weights
        if self.shard is not None and (self.diagonal.ndim or prior.ndim):
            # a diagonal of some of the parameters
            likelihood_weight, prior = (self.shard.hyper_parameter(x) for x in (likelihood_weight, prior))
            prior = self.shard.own(prior) if prior.ndim else prior
        diagonal = likelihood_weight * self.diagonal + prior
        if self.error_variances is None:
            return diagonal, weights
        variances = likelihood_weight**2 * self.error_variances
        if len(weights) == 0 and len(variances) == 0:
            return diagonal, weights
        if len(weights) == 0:
            return prior + second_order(likelihood_weight * self.diagonal, variances, prior), weights
        # unit vectors: with one number D the precision of the rest along each of them is D
        rest = diagonal if diagonal.ndim == 0 else 1 / ((1 / diagonal) @ self.factor.to(diagonal).square())
        return diagonal, second_order(weights, variances, rest)


def without_complement(directions: Float[Tensor, "P k"], magnitudes: Float[Tensor, " k"]) -> LowRankCurvature:
    """Return the low rank with no curvature outside its directions, where the posterior is the prior."""
    return LowRankCurvature(magnitudes.new_zeros(()), directions, magnitudes)


def isotropic(
    directions: Float[Tensor, "P k"], magnitudes: Float[Tensor, " k"], trace: Float[Tensor, ""], n_parameters: int
) -> LowRankCurvature:
    r"""Add the average curvature $c = (\mathrm{tr} H - \sum m) / (P - k)$ in every direction outside the span.

    Written as $c I + U \mathrm{diag}(m - c) U^\top$, so that the curvature along the directions stays m.
    """
    P, k = n_parameters, len(magnitudes)
    left = (trace - magnitudes.to(trace.dtype).sum()).clamp_min(0)
    c = (left / (P - k) if k < P else left.new_zeros(())).to(magnitudes.dtype)
    return LowRankCurvature(c, directions, magnitudes - c)


def diagonal(
    directions: Float[Tensor, "P k"],
    magnitudes: Float[Tensor, " k"],
    residual: Float[Tensor, " P"],
    basis: KroneckerBasis | None = None,
    *,
    out: Float[Tensor, "P k"] | None = None,
) -> LowRankCurvature:
    r"""Add the diagonal of $(I - UU^\top) H (I - UU^\top)$, in a basis; the trace of H is preserved.

    The diagonal D also adds $u_i^\top D u_i$ along the directions. Subtracting that from the magnitudes would preserve
    the curvature along the directions instead of the trace.

    Args:
        directions: U, not in the coordinates of the basis.
        magnitudes: of the directions.
        residual: the diagonal, in the coordinates of the basis.
        basis: K; None for the axes.
        out: where to write the coordinates of the directions, which may be these; None: a new tensor.
    """
    rotated = directions if basis is None else _without_traces(basis.coordinates_of_columns(directions, out=out))
    # a Hessian's may be negative: floored after the mean over all samples, not in each fold
    return LowRankCurvature(residual.to(magnitudes.dtype).clamp_min(0), rotated, magnitudes, basis)


def _without_traces(x: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
    """Replace entries whose products underflow by zeros, in place: arithmetic with subnormal numbers is slow."""
    for part in x.split(_ROWS):
        part.masked_fill_(part.abs() < torch.finfo(x.dtype).tiny ** 0.5, 0.0)
    return x


def second_order(
    weights: Float[Tensor, " k"], variances: Float[Tensor, " k"], rest: Float[Tensor, " k"] | Float[Tensor, ""]
) -> Float[Tensor, " k"]:
    r"""Correct curvatures to second order for the bias of the inverse of a precision.

    If v estimates a precision along a direction without bias, $E[1/v] \approx (1 + \mathrm{var}(v)/v^2) / E[v]$ by
    Jensen's inequality: variances are too large on average. Raising the precision to $v + \mathrm{var}(v)/v$ removes
    that bias. With a known variance it would also lower the expected KL to the posterior of the true precision;
    estimated from skewed samples, the variance is large where v is, and most of the gain is lost.

    Args:
        weights: estimated curvatures m, in the unit of the precision.
        variances: variances of the estimates, in the squared unit.
        rest: the other terms of the precision along each direction, $v = m + rest$.

    Returns:
        $m + \mathrm{var}/v$, at most $m + v$: the expansion is invalid beyond.
    """
    v = weights + rest
    return weights + torch.minimum(variances / v, v)
