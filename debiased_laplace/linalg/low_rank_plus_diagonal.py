r"""Precision matrices $K (D + U \mathrm{diag}(m) U^\top) K^\top$ in forms that stay accurate in single precision.

K is an orthogonal basis or the identity. A low-rank posterior has no K, a Kronecker posterior has no U, and a full
posterior has all eigenvectors in U.

All methods use one decomposition. With $D^{-1/2} U = Q R$ and
$R\,\mathrm{diag}(m) R^\top = Z\,\mathrm{diag}(s) Z^\top$, the matrix is
$D^{1/2} (I + V \mathrm{diag}(s) V^\top) D^{1/2}$, where $V = Q Z$ is orthonormal. It needs neither $m^{1/2}$ nor
$m^{-1}$, so zero and negative magnitudes are allowed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.gram import polish
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.row_matrix import RowMatrix, row_products
from debiased_laplace.linalg.shard import Shard
from debiased_laplace.linalg.vector_format import is_on_disk

_CONVERTED = 2**18  # rows of directions in a shorter format that are converted at a time
_BLOCK = 1024  # rows of the directions converted to double precision at a time
_GRAM_ACCURACY = 1e-8  # relative error of inner products, times condition number, up to which they replace QR
_WELL_CONDITIONED = 1e2  # condition number of inner products up to which single precision loses one digit
_CANCELLED = 1e-2  # share of a variance, below which it is not computed as a difference


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal:
    r"""The symmetric positive definite matrix $P = K (D + U \mathrm{diag}(m) U^\top) K^\top$.

    Attributes:
        diagonal: $D > 0$: one number for $D = \delta I$, or one per coordinate.
        directions: $U$, orthonormal columns, in the coordinates of the basis; possibly in a shorter format than m, on
            another device, or on disk.
        magnitudes: $m$, of any sign as long as $P$ is positive definite.
        basis: $K$; None: the identity.
        shard: of the parameters, where diagonal, directions and basis have the entries of these alone. All processes
            call every method with the same arguments, which are of all parameters.

    Raises:
        ValueError: if the diagonal is not positive and finite, or a magnitude is not finite.
    """

    diagonal: Float[Tensor, "#P"] | Float[Tensor, ""]
    directions: Float[Tensor, "P k"]
    magnitudes: Float[Tensor, " k"]
    basis: KroneckerBasis | None = None
    shard: Shard | None = None

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
        return self.directions.shape[0] if self.shard is None else self.shard.n_parameters

    @property
    def is_isotropic(self) -> bool:
        """Whether the diagonal is one number."""
        return self.diagonal.ndim == 0 or (self.diagonal.numel() == 1 and self.shard is None)

    @property
    def _n_own(self) -> int:
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return self.directions.shape[1]

    @cached_property
    def _inner(self) -> "_Inner":
        r"""The eigenvalues s, and V as k x k matrices: all that the determinant and its gradients need."""
        exact, m = accumulation_dtype(self.magnitudes), self.magnitudes
        if self.rank == 0:
            return _Inner.of(m, None, None, None)
        if self.is_isotropic and not self._are_stored:
            return _Inner.of(m / self.diagonal, None, None, None)
        # in double precision the inner products of the columns are as good as a QR decomposition of single ones, for a
        # fraction of its cost, unless the columns are nearly dependent
        weights = (1 / self.diagonal.to(exact)).expand(self._n_own)
        gram = self._summed(row_products(self.directions.T, exact, weights=weights, device=m.device))
        R, info = torch.linalg.cholesky_ex(gram, upper=True)
        Q = None
        if bool(info > 0) or _condition(gram) * torch.finfo(exact).eps > _GRAM_ACCURACY:
            if self.shard is not None:
                raise ValueError(
                    "Directions are nearly dependent in the metric of the prior and the complement, which "
                    "shard_directions=True is not built for."
                )
            Q, R = torch.linalg.qr(self.directions.to(m) / self.diagonal.sqrt()[:, None])
            R = R.to(exact)
        s, Z = torch.linalg.eigh((R * m.to(exact)) @ R.T)
        if self.shard is not None:
            s, Z = self.shard.same((s, Z), m.device)
        return _Inner.of(s.to(m.dtype), R, Z, Q)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Whitened directions V (P, k) and their eigenvalues s (k,)."""
        inner = self._inner
        if inner.rotation is None:
            return self.directions, inner.s
        V = self.magnitudes.new_empty(self.directions.shape)
        start = 0
        for block in self._whitened_blocks():
            V[start : start + len(block)] = block
            start += len(block)
        return V, inner.s

    @cached_property
    def _whitening(self) -> tuple[Float[Tensor, "P k"], Float[Tensor, "k k"]]:
        r"""U and T with $V = D^{-1/2} U T$: the directions, or $D^{1/2} V$ where products with T would lose digits."""
        R, Z, Q = self._inner.triangle, self._inner.rotation, self._inner.orthonormal
        identity = torch.eye(self.rank).to(self.magnitudes)
        if self.rank == 0:
            return self.directions, identity
        if R is None or Z is None:
            return self.directions, self.diagonal.reshape(()).sqrt() * identity
        if Q is not None or (not self._are_stored and _condition(R.mT @ R) > _WELL_CONDITIONED):
            return self._spectrum[0] * self.diagonal.sqrt()[:, None], identity
        return self.directions, torch.linalg.solve_triangular(R, Z, upper=True).to(self.magnitudes.dtype)

    def _whitened_blocks(self) -> Iterator[Tensor]:
        """Yield blocks of the rows of V, in the precision of sums."""
        R, Z, Q = self._inner.triangle, self._inner.rotation, self._inner.orthonormal
        exact = accumulation_dtype(self.magnitudes)
        if R is None or Z is None:
            yield from (block.to(exact) for block in self.directions.split(_BLOCK))
        elif Q is not None:
            yield from (block.to(exact) @ Z.contiguous() for block in Q.split(_BLOCK))
        else:
            # products of two matrices in column order take three times as long
            T = torch.linalg.solve_triangular(R, Z, upper=True).contiguous()
            diagonal = self.diagonal.expand(self._n_own)
            for u, d in zip(self.directions.split(_BLOCK), diagonal.split(_BLOCK), strict=True):
                yield (u.to(T) / d.to(exact).sqrt()[:, None]) @ T

    @property
    def n_floored(self) -> int:
        """Number of directions in which the matrix was not positive definite; 1 + s is floored there."""
        return self._inner.n_floored

    @property
    def log_det(self) -> Float[Tensor, ""]:
        r"""$\log\det P = \sum \log D + \sum \log(1 + s)$."""
        exact = accumulation_dtype(self.magnitudes)
        per_parameter = self.diagonal.to(exact).log()
        of_diagonal = self._total(per_parameter)
        return (of_diagonal + self._inner.s.to(exact).log1p().sum()).to(self.magnitudes.dtype)

    @property
    def direction_variances(self) -> Float[Tensor, " k"]:
        r"""$u_i^\top K^\top P^{-1} K u_i$ of every direction, the derivatives of `log_det` by the magnitudes."""
        R, Z, s = self._inner.triangle, self._inner.rotation, self._inner.s
        if R is None or Z is None:
            return 1 / (self.diagonal * (1 + s)) if self.rank else s
        return ((Z.T @ R).square() / (1 + s.to(R.dtype))[:, None]).sum(0).to(s.dtype)

    @property
    def variance_sum(self) -> Float[Tensor, ""]:
        r"""$\mathrm{tr} P^{-1}$."""
        if not self.is_isotropic:
            return self.coordinate_variances.sum()
        return (self.n_parameters - self.rank) / self.diagonal.reshape(()) + self.direction_variances.sum()

    def matmat(self, X: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
        """Return P X."""
        rows = self._coordinates(X.T)
        parallel = self._summed(onto(rows, self.directions)) * self.magnitudes
        product = rows * self.diagonal + along(parallel, self.directions)
        return self._vectors(product).T

    def quadratic(self, x: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        r"""Return $x^\top P x$, non-negative by construction."""
        parallel, perpendicular = self._split(self._coordinates(x) * self.diagonal.sqrt())
        s = self._inner.s
        return self._summed(perpendicular.square().sum(-1)) + ((1 + s) * parallel.square()).sum(-1)

    def variance(self, rows: Float[Tensor, "*batch r P"]) -> Float[Tensor, "*batch r r"]:
        r"""Return $X P^{-1} X^\top$ of a stack of row matrices."""
        x = self._coordinates(rows) / self.diagonal.sqrt()
        parallel = self._onto(x)
        return self._variance(
            self._summed(x @ x.mT), parallel, lambda: self._summed(_products(x - self._along(parallel)))
        )

    def variances(self, rows: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        r"""Return $x P^{-1} x^\top$ of every row, without products of different rows."""
        parallel, perpendicular = self._split(self._coordinates(rows) / self.diagonal.sqrt())
        return self._summed(perpendicular.square().sum(-1)) + (parallel.square() / (1 + self._inner.s)).sum(-1)

    def variance_trace(self, rows: Float[Tensor, "*batch r P"]) -> Float[Tensor, "*batch"]:
        r"""Return $\mathrm{tr}(X P^{-1} X^\top)$ of a stack of row matrices, without the r x r products."""
        return self.variances(rows).sum(-1)

    def variance_of(self, rows: RowMatrix, *, covariances: bool = True) -> Tensor:
        r"""Return `variance` of the rows of every sample, (n, r, r), or `variances`, (n, r), chunk by chunk of columns.

        Args:
            rows: of n samples, r each.
            covariances: between the rows of a sample; otherwise the variance of every row.
        """
        rows = rows.within(self.shard).rotated(self.basis)
        inverse = (1 / self.diagonal).expand(self._n_own)
        U, T = self._whitening
        whole, projections = rows.weighted(inverse, U, pairs=covariances)
        parallel, squared = projections @ T, _products if covariances else _squares

        def perpendicular() -> Tensor:
            c = parallel @ T.mT
            parts = (squared((V - along(c, U[place])) * inverse[place].sqrt()) for place, V in rows.columns())
            return self._summed(sum(parts, start=torch.zeros_like(whole)))

        return self._variance(whole, parallel, perpendicular)

    def _variance(
        self, whole: Tensor, parallel: Float[Tensor, "*batch r k"], perpendicular: Callable[[], Tensor]
    ) -> Tensor:
        """Return the variances of whitened rows.

        Args:
            whole: products of the rows, of each with itself or of all pairs.
            parallel: coordinates of the rows along V.
            perpendicular: computes products of their residuals; called where they are not the difference of the two.
        """
        if self.rank == 0:
            return whole
        pairs = whole.ndim == parallel.ndim
        squared = _products if pairs else _squares
        residual = whole - squared(parallel)
        p, w = (x.diagonal(dim1=-2, dim2=-1) if pairs else x for x in (residual, whole))
        if bool((p < _CANCELLED * w).any()):
            residual = perpendicular()
        return residual + squared(parallel / (1 + self._inner.s).sqrt())

    @cached_property
    def inverse_factor(self) -> tuple[Float[Tensor, "k P"], Float[Tensor, " k"]]:
        r"""Rows F and weights w in double precision: $P^{-1} = K D^{-1} K^\top + F^\top \mathrm{diag}(w) F$.

        With as many directions as parameters, $P^{-1} = F^\top \mathrm{diag}(w) F$ alone: nothing is subtracted.
        """
        if self.shard is not None:
            raise ValueError("The inverse as a dense factor is not built for shard_directions=True.")
        exact = accumulation_dtype(self.magnitudes)
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
        exact = accumulation_dtype(self.magnitudes)
        V, s = polish(self._spectrum[0].to(exact), shard=self.shard), self._inner.s.to(exact)
        prior = 1 / self.diagonal.to(exact).expand(self._n_own)
        if self.basis is None:
            outside = (1 - V.square().sum(1)).clamp_min(0)
            return self._joined(((outside + (V.square() / (1 + s)).sum(1)) * prior).to(self.magnitudes.dtype))
        basis = self.basis.to(exact)
        whole = basis.diagonal_of(prior)
        removed = basis.vectors((V * prior.sqrt()[:, None]).T).square()
        # no direction reduces the variance by more than the stiffest
        least = whole / (1 + max(float(s.max()), 0.0)) if self.rank else whole
        return self._joined(torch.maximum(whole - (s / (1 + s)) @ removed, least).to(self.magnitudes.dtype))

    @cached_property
    def coordinate_variances(self) -> Float[Tensor, " P"]:
        """Diagonal of the inverse in the coordinates of the basis."""
        return self._joined(self.own_coordinate_variances)

    @cached_property
    def own_coordinate_variances(self) -> Float[Tensor, " p"]:
        """The same of the parameters of this process."""
        s = self._inner.s.to(accumulation_dtype(self.magnitudes))
        if self.rank == 0:
            return 1 / self.diagonal.expand(self._n_own)
        # no direction reduces the variance by more than the stiffest; entries far below the prior variance are less
        # accurate than in `covariance_diagonal`
        removed, least = s / (1 + s), 1 / (1 + max(float(s.max()), 0.0))
        kept = [(1 - V.square() @ removed).clamp_min(least) for V in self._whitened_blocks()]
        return torch.cat(kept).to(self.magnitudes.dtype) / self.diagonal

    def root(self, noise: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        r"""Return $A \varepsilon$ with $A A^\top = P^{-1}$: draws with covariance $P^{-1}$ from standard normals."""
        noise = noise if self.shard is None else self.shard.own(noise)
        shrunk = noise + self._along(self._onto(noise) * ((1 + self._inner.s).rsqrt() - 1))
        return self._vectors(shrunk / self.diagonal.sqrt())

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return P as a dense matrix, for tests and small problems."""
        if self.shard is not None:
            return self.matmat(torch.eye(self.n_parameters).to(self.magnitudes))
        diagonal = self.diagonal.expand(self.n_parameters)
        U = self.directions.to(self.magnitudes)
        inner = torch.diag(diagonal) + (U * self.magnitudes) @ U.T
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
        x = x if self.shard is None else self.shard.own(x)
        return x if self.basis is None else self.basis.coordinates(x)

    def _vectors(self, x: Tensor) -> Tensor:
        return self._joined(x if self.basis is None else self.basis.vectors(x))

    def _joined(self, own: Tensor) -> Tensor:
        return own if self.shard is None else self.shard.joined(own)

    def _summed(self, own: Tensor) -> Tensor:
        return own if self.shard is None else self.shard.summed(own)

    def _total(self, of_diagonal: Tensor) -> Tensor:
        """Return the sum over all parameters of values of the diagonal, which may be one number."""
        if self.is_isotropic:
            return of_diagonal.sum() * self.n_parameters
        return self._summed(of_diagonal.sum())

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split whitened rows into their coordinates along V and their residual."""
        parallel = self._onto(x)
        return parallel, x - self._along(parallel)

    @property
    def _are_stored(self) -> bool:
        return _differ(self.directions, self.magnitudes) or is_on_disk(self.directions)

    def _onto(self, x: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch k"]:
        """Return the coordinates of whitened rows along V, which is not formed of stored directions."""
        if not self._are_stored:
            return self._summed(x @ self._spectrum[0])
        U, T = self._whitening
        return self._summed(onto(x / self.diagonal.sqrt(), U)) @ T

    def _along(self, c: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch P"]:
        """Return the vectors of coordinates along V, likewise."""
        if not self._are_stored:
            return c @ self._spectrum[0].mT
        U, T = self._whitening
        return along(c @ T.mT, U) / self.diagonal.sqrt()


@dataclass(frozen=True, eq=False)
class _Inner:
    r"""Decomposition of the part of a precision that lies in the span of the directions.

    Attributes:
        s: eigenvalues, above -1.
        triangle: $R$ with $R^\top R = U^\top D^{-1} U$; None for $R = \delta^{-1/2} I$.
        rotation: Z; None for the identity.
        orthonormal: Q; None if $V = D^{-1/2} U R^{-1} Z$ is accurate.
        n_floored: number of eigenvalues that were floored.
    """

    s: Float[Tensor, " k"]
    triangle: Float[Tensor, "k k"] | None
    rotation: Float[Tensor, "k k"] | None
    orthonormal: Float[Tensor, "P k"] | None
    n_floored: int

    @classmethod
    def of(cls, s: Tensor, triangle: Tensor | None, rotation: Tensor | None, orthonormal: Tensor | None) -> "_Inner":
        """Return the decomposition with eigenvalues that make the matrix positive definite."""
        # 1 + s is accurate to about eps; small true values occur with an isotropic part far above the prior
        lowest = 8 * torch.finfo(s.dtype).eps - 1
        return cls(s.clamp_min(lowest), triangle, rotation, orthonormal, int((s < lowest).sum()))


def onto(x: Float[Tensor, "*batch P"], U: Float[Tensor, "P k"]) -> Float[Tensor, "*batch k"]:
    """Return $x U$ like x, to whose precision and device stored directions are converted block by block."""
    if not _differ(x, U):
        return x @ U
    total = x.new_zeros(*x.shape[:-1], U.shape[1])
    for part, block in zip(x.split(_CONVERTED, dim=-1), U.split(_CONVERTED), strict=True):
        total = total + part @ block.to(x)
    return total


def along(c: Float[Tensor, "*batch k"], U: Float[Tensor, "P k"]) -> Float[Tensor, "*batch P"]:
    r"""Return $c\, U^\top$ like c, likewise."""
    if not _differ(c, U):
        return c @ U.mT
    return torch.cat([c @ block.to(c).mT for block in U.split(_CONVERTED)], dim=-1)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors have another precision or device."""
    return a.dtype != b.dtype or a.device != b.device


def _products(x: Float[Tensor, "*batch r n"]) -> Float[Tensor, "*batch r r"]:
    return x @ x.mT


def _squares(x: Float[Tensor, "*batch r n"]) -> Float[Tensor, "*batch r"]:
    return x.square().sum(-1)


def _condition(gram: Float[Tensor, "k k"]) -> float:
    """Return the condition number of the inner products of vectors of unit length."""
    lengths = gram.diagonal().sqrt()
    values = torch.linalg.eigvalsh(gram / torch.outer(lengths, lengths))
    return float(values[-1] / values[0].clamp_min(torch.finfo(values.dtype).tiny))


class _DifferentiableLogDet(torch.autograd.Function):
    r"""Log determinant with its closed-form gradient, which avoids differentiating eigenvectors.

    $\partial \log\det P / \partial D_i = (P^{-1})_{ii}$ and $\partial \log\det P / \partial m_j = u_j^\top P^{-1} u_j$.
    """

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, magnitudes: Tensor, operator: LowRankPlusDiagonal) -> Tensor:
        """Return the log determinant of the operator, which holds the same values detached."""
        ctx.operator = operator
        ctx.isotropic = operator.is_isotropic
        ctx.shapes = diagonal.shape, magnitudes.shape
        return operator.log_det.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients with respect to the diagonal and the magnitudes."""
        (g,) = upstream
        op = ctx.operator
        diagonal = op.variance_sum if ctx.isotropic else op.own_coordinate_variances
        return g * diagonal.reshape(ctx.shapes[0]), g * op.direction_variances.reshape(ctx.shapes[1]), None


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
    exact = accumulation_dtype(precision.magnitudes)
    variances = precision.variances(reference.directions.T.to(precision.magnitudes)).to(exact)
    trace = (precision.covariance_diagonal.to(exact) * reference.diagonal.to(exact)).sum()
    trace = trace + (variances * reference.magnitudes.to(exact)).sum()
    log_dets = precision.log_det.to(exact) - reference.log_det.to(exact)
    return 0.5 * (trace - precision.n_parameters + log_dets)
