r"""Precision matrices $K (D + U \mathrm{diag}(m) U^\top) K^\top$ in forms that stay accurate in single precision.

K is an orthogonal basis or the identity. A low-rank posterior has no K, a Kronecker posterior has no U, and a full
posterior has all eigenvectors in U.

All methods use one decomposition. With $D^{-1/2} U = Q R$ and
$R\,\mathrm{diag}(m) R^\top = Z\,\mathrm{diag}(s) Z^\top$, the matrix is
$D^{1/2} (I + V \mathrm{diag}(s) V^\top) D^{1/2}$, where $V = Q Z$ is orthonormal. It needs neither $m^{1/2}$ nor
$m^{-1}$, so zero and negative magnitudes are allowed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.gram import polish
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.row_matrix import RowMatrix


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal:
    r"""The symmetric positive definite matrix $P = K (D + U \mathrm{diag}(m) U^\top) K^\top$.

    Attributes:
        diagonal: $D > 0$: one number for $D = \delta I$, or one per coordinate.
        directions: $U$, orthonormal columns, in the coordinates of the basis.
        magnitudes: $m$, of any sign as long as $P$ is positive definite.
        basis: $K$; None: the identity.

    Raises:
        ValueError: if the diagonal is not positive and finite, or a magnitude is not finite.
    """

    diagonal: Float[Tensor, "#P"] | Float[Tensor, ""]
    directions: Float[Tensor, "P k"]
    magnitudes: Float[Tensor, " k"]
    basis: KroneckerBasis | None = None

    def __post_init__(self) -> None:
        if not bool((self.diagonal > 0).all() and self.diagonal.isfinite().all()):
            raise ValueError(
                "Expected the diagonal of a precision to be positive and finite; got entries from "
                f"{self.diagonal.min().item():.3g} to {self.diagonal.max().item():.3g}."
            )
        if not bool(self.magnitudes.isfinite().all()):
            raise ValueError("Magnitudes must be finite; got NaN or infinity.")

    @property
    def n_parameters(self) -> int:
        """Number of rows P."""
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return self.directions.shape[1]

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, int]:
        """Whitened directions V (P, k), their eigenvalues s (k,), and how many of these were floored."""
        exact = accumulation_dtype(self.directions)
        if self.rank == 0:
            return self.directions, self.magnitudes, 0
        if self.diagonal.numel() == 1:
            V, s = self.directions, self.magnitudes / self.diagonal
        else:
            Q, R = torch.linalg.qr(self.directions / self.diagonal.sqrt()[:, None])
            R = R.to(exact)
            s, Z = torch.linalg.eigh((R * self.magnitudes.to(exact)) @ R.T)
            V, s = Q @ Z.to(Q.dtype), s.to(Q.dtype)
        # 1 + s is accurate to about eps; small true values occur with an isotropic part far above the prior
        lowest = 8 * torch.finfo(s.dtype).eps - 1
        return V, s.clamp_min(lowest), int((s < lowest).sum())

    @property
    def n_floored(self) -> int:
        """Number of directions in which the matrix was not positive definite; 1 + s is floored there."""
        return self._spectrum[2]

    @property
    def log_det(self) -> Float[Tensor, ""]:
        r"""$\log\det P = \sum \log D + \sum \log(1 + s)$."""
        exact = accumulation_dtype(self.directions)
        per_parameter = self.diagonal.to(exact).log().expand(self.n_parameters)
        return (per_parameter.sum() + self._spectrum[1].to(exact).log1p().sum()).to(self.directions.dtype)

    def matmat(self, X: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
        """Return P X."""
        rows = self._coordinates(X.T)
        product = rows * self.diagonal + ((rows @ self.directions) * self.magnitudes) @ self.directions.T
        return self._vectors(product).T

    def quadratic(self, x: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        r"""Return $x^\top P x$, non-negative by construction."""
        parallel, perpendicular = self._split(self._coordinates(x) * self.diagonal.sqrt())
        s = self._spectrum[1]
        return perpendicular.square().sum(-1) + ((1 + s) * parallel.square()).sum(-1)

    def variance(self, rows: Float[Tensor, "*batch r P"]) -> Float[Tensor, "*batch r r"]:
        r"""Return $X P^{-1} X^\top$ of a stack of row matrices, as a sum of two positive semi-definite terms."""
        parallel, perpendicular = self._split(self._coordinates(rows) / self.diagonal.sqrt())
        scaled = parallel / (1 + self._spectrum[1]).sqrt()
        return perpendicular @ perpendicular.mT + scaled @ scaled.mT

    def variances(self, rows: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        r"""Return $x P^{-1} x^\top$ of every row, without products of different rows."""
        parallel, perpendicular = self._split(self._coordinates(rows) / self.diagonal.sqrt())
        return perpendicular.square().sum(-1) + (parallel.square() / (1 + self._spectrum[1])).sum(-1)

    def variance_trace(self, rows: Float[Tensor, "*batch r P"]) -> Float[Tensor, "*batch"]:
        r"""Return $\mathrm{tr}(X P^{-1} X^\top)$ of a stack of row matrices, without the r x r products."""
        return self.variances(rows).sum(-1)

    def variance_of(self, rows: RowMatrix, *, covariances: bool = True) -> Tensor:
        r"""Return `variance` of the rows of every sample, (n, r, r), or `variances`, (n, r), chunk by chunk of columns.

        Args:
            rows: of n samples, r each.
            covariances: between the rows of a sample; otherwise the variance of every row.
        """
        V, s, _ = self._spectrum
        rows = rows.rotated(self.basis)
        scales = self.diagonal.rsqrt().expand(self.n_parameters)
        n, r, _ = rows.shape
        parallel = rows.like.new_zeros(n, r, self.rank)
        for place, part in rows.columns() if self.rank else ():
            parallel += (part * scales[place]) @ V[place]
        total = rows.like.new_zeros((n, r, r) if covariances else (n, r))
        for place, part in rows.columns():
            perpendicular = part * scales[place]
            if self.rank:
                perpendicular = perpendicular - parallel @ V[place].mT
            total += perpendicular @ perpendicular.mT if covariances else perpendicular.square().sum(-1)
        scaled = parallel / (1 + s).sqrt()
        return total + (scaled @ scaled.mT if covariances else scaled.square().sum(-1))

    @cached_property
    def inverse_factor(self) -> tuple[Float[Tensor, "k P"], Float[Tensor, " k"]]:
        r"""Rows F and weights w in double precision: $P^{-1} = K D^{-1} K^\top + F^\top \mathrm{diag}(w) F$.

        With as many directions as parameters, $P^{-1} = F^\top \mathrm{diag}(w) F$ alone: nothing is subtracted.
        """
        exact = accumulation_dtype(self.directions)
        V, s = self._spectrum[0].to(exact), self._spectrum[1].to(exact)
        complete = self.rank == self.n_parameters
        # what is subtracted may be nearly all: V must be orthonormal in double precision
        rows = (V if complete else polish(V)).T / self.diagonal.to(exact).sqrt()
        weights = 1 / (1 + s) if complete else -s / (1 + s)
        return (rows if self.basis is None else self.basis.to(exact).vectors(rows)), weights

    @cached_property
    def covariance_diagonal(self) -> Float[Tensor, " P"]:
        """Diagonal of the inverse."""
        # In double precision, with V orthonormal in it: where the directions span nearly the whole space, the residual
        # is a difference of nearly equal numbers, and a KL divergence multiplies it by the curvature.
        exact = accumulation_dtype(self.directions)
        V, s = polish(self._spectrum[0].to(exact)), self._spectrum[1].to(exact)
        prior = 1 / self.diagonal.to(exact).expand(self.n_parameters)
        if self.basis is None:
            outside = (1 - V.square().sum(1)).clamp_min(0)
            return ((outside + (V.square() / (1 + s)).sum(1)) * prior).to(self.directions.dtype)
        basis = self.basis.to(exact)
        whole = basis.diagonal_of(prior)
        removed = basis.vectors((V * prior.sqrt()[:, None]).T).square()
        # no direction reduces the variance by more than the stiffest
        least = whole / (1 + max(float(s.max()), 0.0)) if self.rank else whole
        return torch.maximum(whole - (s / (1 + s)) @ removed, least).to(self.directions.dtype)

    @cached_property
    def coordinate_variances(self) -> Float[Tensor, " P"]:
        """Diagonal of the inverse in the coordinates of the basis."""
        V, s, _ = self._spectrum
        # 1 - sum V² s/(1+s); entries far below the prior variance are less accurate than in `covariance_diagonal`
        outside = (1 - V.square().sum(1)).clamp_min(0)
        inside = (V.square() / (1 + s)).sum(1)
        return (outside + inside) / self.diagonal

    def root(self, noise: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        r"""Return $A \varepsilon$ with $A A^\top = P^{-1}$: draws with covariance $P^{-1}$ from standard normals."""
        V, s, _ = self._spectrum
        shrunk = noise + ((noise @ V) * ((1 + s).rsqrt() - 1)) @ V.T
        return self._vectors(shrunk / self.diagonal.sqrt())

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return P as a dense matrix, for tests and small problems."""
        diagonal = self.diagonal.expand(self.n_parameters)
        inner = torch.diag(diagonal) + (self.directions * self.magnitudes) @ self.directions.T
        if self.basis is None:
            return inner
        half = self.basis.vectors(inner)
        return self.basis.vectors(half.T)

    def to_matrix(self) -> Float[Tensor, "P P"]:
        """Return the matrix itself, by laplace-torch's name; as `to_dense`."""
        return self.to_dense()

    def logdet(self) -> Float[Tensor, ""]:
        """Return the log determinant, by torch's name; as `log_det`."""
        return self.log_det

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return the product with a vector (P,) or a matrix (P, b)."""
        return self.matmat(x) if x.ndim == 2 else self.matmat(x[:, None])[:, 0]

    def _coordinates(self, x: Tensor) -> Tensor:
        return x if self.basis is None else self.basis.coordinates(x)

    def _vectors(self, x: Tensor) -> Tensor:
        return x if self.basis is None else self.basis.vectors(x)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split whitened rows into their coordinates along V and their residual."""
        V = self._spectrum[0]
        parallel = x @ V
        return parallel, x - parallel @ V.T


class _DifferentiableLogDet(torch.autograd.Function):
    r"""Log determinant with its closed-form gradient, which avoids differentiating eigenvectors.

    $\partial \log\det P / \partial D_i = (P^{-1})_{ii}$ and $\partial \log\det P / \partial m_j = u_j^\top P^{-1} u_j$.
    """

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, magnitudes: Tensor, operator: LowRankPlusDiagonal) -> Tensor:
        """Return the log determinant of the operator, which holds the same values detached."""
        ctx.operator = operator
        ctx.isotropic = diagonal.numel() == 1
        ctx.shapes = diagonal.shape, magnitudes.shape
        return operator.log_det.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients with respect to the diagonal and the magnitudes."""
        (g,) = upstream
        op = ctx.operator
        per_parameter = op.coordinate_variances
        diagonal = per_parameter.sum() if ctx.isotropic else per_parameter
        # variance_trace of one row per direction is u' P^-1 u
        rows = op.directions.T if op.basis is None else op.basis.vectors(op.directions.T)
        magnitudes = op.variances(rows)
        return g * diagonal.reshape(ctx.shapes[0]), g * magnitudes.reshape(ctx.shapes[1]), None


def differentiable_log_det(
    diagonal: Float[Tensor, "#P"] | Float[Tensor, ""],
    magnitudes: Float[Tensor, " k"],
    operator: LowRankPlusDiagonal,
) -> Float[Tensor, ""]:
    """Return the log determinant with first-order gradients with respect to the diagonal and the magnitudes.

    Args:
        diagonal: diagonal of the operator, part of the caller's graph.
        magnitudes: magnitudes of the operator, part of the caller's graph.
        operator: the same matrix, detached; its decomposition is reused.

    Returns:
        The log determinant, in nats.
    """
    result: Tensor = _DifferentiableLogDet.apply(diagonal, magnitudes, operator)
    return result


def kl_divergence(precision: LowRankPlusDiagonal, reference: LowRankPlusDiagonal) -> Float[Tensor, ""]:
    r"""Return the KL divergence of two Gaussians with the same mean, $KL(N(\mu, P^{-1}) \| N(\mu, R^{-1}))$.

    Args:
        precision: precision P of the approximation.
        reference: precision R of the approximated posterior.

    Returns:
        $\tfrac12 [\mathrm{tr}(P^{-1} R) - \dim + \log\det P - \log\det R]$, in nats.

    Raises:
        ValueError: if the reference has a Kronecker basis.
    """
    if reference.basis is not None:
        raise ValueError("Expected a reference without a Kronecker basis (low rank or full); got one with a basis.")
    exact = accumulation_dtype(precision.directions)
    along = precision.variances(reference.directions.T).to(exact)
    trace = (precision.covariance_diagonal.to(exact) * reference.diagonal.to(exact)).sum()
    trace = trace + (along * reference.magnitudes.to(exact)).sum()
    log_dets = precision.log_det.to(exact) - reference.log_det.to(exact)
    return 0.5 * (trace - precision.n_parameters + log_dets)
