r"""Held-out rows of a root of the curvature in the eigenvectors of the other rows, from one Gram matrix.

Let $G = V V^\top$ be the Gram matrix of all rows, h the held-out rows, o the others, $G_{oo} = W \Lambda W^\top$. Then
$V_o^\top V_o$ has the eigenvectors $u_i = V_o^\top w_i \lambda_i^{-1/2}$, which are not formed: the coordinates of the
held-out rows are $G_{ho} W \Lambda^{-1/2}$, and their residual is $V_h - G_{ho} W \Lambda^{-1} W^\top V_o$.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from debiased_laplace.linalg.eigenpairs import numerical_rank
from debiased_laplace.linalg.gram import GramFactor
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    r"""Held-out rows h in the leading directions of the other rows o.

    Attributes:
        values: eigenvalues of $G_{oo}$, decreasing, not divided by the number of samples.
        projections: $V_h U$ with the eigenvectors U of the other rows, by decreasing eigenvalue.
        coefficients: C with $U = V_o^\top C$.
        held: mask of the held-out rows.
    """

    values: Float[Tensor, " k"]
    projections: Float[Tensor, "h k"]
    coefficients: Float[Tensor, "o k"]
    held: Bool[Tensor, " R"]

    @classmethod
    def of(cls, factor: GramFactor, held: Bool[Tensor, " R"], threshold: float, rank: int) -> "HeldOutRows":
        """Project the held-out rows on the leading directions of the others.

        Args:
            factor: all rows.
            held: mask of the held-out rows, the same for all rows of a sample.
            threshold: directions of the others below this fraction of their largest eigenvalue are dropped.
            rank: maximal number of directions.

        Returns:
            The held-out rows.
        """
        others = ~held
        G = factor.gram * factor.n_samples
        values, W = torch.linalg.eigh(G[others][:, others])
        values, W = values.flip(0), W.flip(1)
        k = min(numerical_rank(values, threshold), rank)
        coefficients = W[:, :k] / values[:k].sqrt()
        return cls(values[:k], G[held][:, others] @ coefficients, coefficients, held)

    def residual(self, factor: GramFactor, rank: int) -> Float[Tensor, "h P"]:
        """Return the held-out rows without their components along the first `rank` directions."""
        V = factor.rows.dense().flatten(0, 1)
        return V[self.held] - self._combination(rank, V) @ V

    def residual_squares(
        self, factor: GramFactor, rank: int, basis: KroneckerBasis | None, scales: Float[Tensor, "h 1"] | None
    ) -> Float[Tensor, " P"]:
        """Return the squares of the residual in the coordinates of a basis, summed over the rows times their scales."""
        total = self.projections.new_zeros(factor.rows.shape[2])
        combination = self._combination(rank, factor.rows.like)
        for place, rows in factor.rows.rotated(basis).columns():
            V = rows.flatten(0, 1)
            outside = V[self.held] - combination @ V
            outside = outside if scales is None else outside * scales.to(outside)
            total[place] = outside.square().sum(0)
        return total

    def _combination(self, rank: int, like: Tensor) -> Float[Tensor, "h R"]:
        # zero coefficients for the held-out rows: indexing V by ~held would copy the other rows
        combination = self.projections.new_zeros(len(self.projections), len(self.held))
        combination[:, ~self.held] = self.projections[:, :rank] @ self.coefficients[:, :rank].T
        return combination.to(like.dtype)
