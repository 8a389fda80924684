r"""Variances under $A + \delta I$ for many $\delta$, by one decomposition of A."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis

_EIGENDECOMPOSITION = 18  # P³ in the time of a single-precision operation: about 9 of them, in double precision
_LARGEST = 10_000  # parameters of a dense decomposition


class ProjectedRows(NamedTuple):
    """Rows of a stack, in the coordinates of a decomposition.

    Attributes:
        inside: coordinates along its vectors, (n, r, m).
        outside: Gram matrices of what is orthogonal to them, (n, r, r); None where nothing is.
    """

    inside: Tensor
    outside: Tensor | None


@dataclass(frozen=True, eq=False)
class Shifted:
    r"""The matrices $K (W \mathrm{diag}(\mu) W^\top + c\,(I - W W^\top)) K^\top + \delta I$.

    Attributes:
        values: $\mu$, of the m vectors.
        vectors: W, orthonormal; None: the axes, all of them.
        rest: c, of everything orthogonal to W.
        basis: K; None: the identity.
    """

    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "P m"] | None
    rest: Float[Tensor, ""]
    basis: KroneckerBasis | None

    @classmethod
    def of(
        cls,
        diagonal: Float[Tensor, ""] | Float[Tensor, " P"],
        directions: Float[Tensor, "P k"],
        weights: Float[Tensor, " k"],
        basis: KroneckerBasis | None,
        *,
        n_rows: int,
        n_shifts: int,
    ) -> "Shifted | None":
        r"""Return the decomposition of $A = K (D + U \mathrm{diag}(m) U^\top) K^\top$, if it pays.

        Args:
            diagonal: D, one number or one per coordinate.
            directions: U, orthonormal where D is one number.
            weights: m.
            basis: K.
            n_rows: rows whose variances are wanted.
            n_shifts: values of $\delta$.

        Returns:
            The decomposition; None where a decomposition for each $\delta$ is cheaper, as for many parameters, or
            where directions are held elsewhere or in a shorter format.
        """
        P, k = directions.shape
        stored = directions.dtype != weights.dtype or directions.device != weights.device
        if diagonal.numel() == 1 and stored and k:
            return None
        if diagonal.numel() == 1:
            c = diagonal.reshape(())
            return cls(c + weights, directions, c, basis)
        if k == 0:
            return cls(diagonal, None, diagonal.new_zeros(()), basis)
        once = _EIGENDECOMPOSITION * P**3 + 2 * n_rows * P**2
        if P > _LARGEST or once > 4 * n_shifts * n_rows * P * k:
            return None
        exact = accumulation_dtype(weights)
        U = directions.to(weights.device, exact)
        values, vectors = torch.linalg.eigh(torch.diag(diagonal.to(exact)) + (U * weights.to(exact)) @ U.T)
        if basis is not None:
            vectors = basis.to(exact).vectors(vectors.T).T
        # all in double precision: what all outputs share along soft directions cancels in a softmax, and is large
        return cls(values, vectors.contiguous(), values.new_zeros(()), None)

    def project(self, rows: Float[Tensor, "n r P"]) -> ProjectedRows:
        """Return what the variances of a stack of row matrices need of them."""
        rows = rows if self.basis is None else self.basis.coordinates(rows)
        if self.vectors is None:
            return ProjectedRows(rows, None)
        inside = rows.to(self.vectors.dtype) @ self.vectors
        if self.vectors.shape[1] == self.vectors.shape[0]:
            return ProjectedRows(inside, None)
        left = rows - inside @ self.vectors.T
        return ProjectedRows(inside, left @ left.mT)

    def variance(self, rows: ProjectedRows, shift: float) -> Float[Tensor, "n r r"]:
        r"""Return $X (A + \delta I)^{-1} X^\top$ of every row matrix, in the precision of the decomposition."""
        scaled = rows.inside / self._inside(shift).sqrt()
        found = scaled @ scaled.mT
        return found if rows.outside is None else found + rows.outside / (self.rest + shift)

    def variances(self, rows: ProjectedRows, shift: float) -> Float[Tensor, "n r"]:
        """Return the diagonals of `variance`."""
        found = (rows.inside.square() / self._inside(shift)).sum(-1)
        return found if rows.outside is None else found + rows.outside.diagonal(dim1=1, dim2=2) / (self.rest + shift)

    def _inside(self, shift: float) -> Float[Tensor, " m"]:
        # as `LowRankPlusDiagonal` floors what is not positive definite
        lowest = 8 * torch.finfo(self.values.dtype).eps * (self.rest + shift)
        return torch.maximum(self.values + shift, lowest)
