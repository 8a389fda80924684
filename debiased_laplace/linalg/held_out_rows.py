r"""Rows of a curvature's root along the eigenvectors of the other rows, from one Gram matrix.

With $G = V V^\top$ of all rows, $G_{oo} = W \Lambda W^\top$ of the others has the eigenvectors
$u_i = V_o^\top w_i \lambda_i^{-1/2}$, which are never formed: the held-out rows' coordinates along them are
$G_{ho} W \Lambda^{-1/2}$, and what is outside is $V_h - G_{ho} W \Lambda^{-1} W^\top V_o$.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from debiased_laplace.linalg.eigenpairs import supported
from debiased_laplace.linalg.gram import GramFactor


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    r"""Rows h against the leading directions of the other rows o.

    Attributes:
        values: of the others' Gram matrix, decreasing, not divided by the number of samples.
        projections: $V_h U$ with the directions U of the others, by decreasing eigenvalue.
        coefficients: C with $U = V_o^\top C$.
        held: which rows these are.
    """

    values: Float[Tensor, " k"]
    projections: Float[Tensor, "h k"]
    coefficients: Float[Tensor, "o k"]
    held: Bool[Tensor, " R"]

    @classmethod
    def of(cls, factor: GramFactor, held: Bool[Tensor, " R"], threshold: float, rank: int) -> "HeldOutRows":
        """Split the rows in two and look from the others at these.

        Args:
            factor: all rows.
            held: which rows are held out, all rows of a sample together.
            threshold: directions of the others below this fraction of their largest eigenvalue are dropped.
            rank: at most so many directions.
        """
        others = ~held
        G = factor.gram * factor.n_samples
        values, W = torch.linalg.eigh(G[others][:, others])
        values, W = values.flip(0), W.flip(1)
        k = min(supported(values, threshold), rank)
        coefficients = W[:, :k] / values[:k].sqrt()
        return cls(values[:k], G[held][:, others] @ coefficients, coefficients, held)

    def outside(self, factor: GramFactor, rank: int) -> Float[Tensor, "h P"]:
        """The held-out rows without their part along the first `rank` directions."""
        V = factor.rows
        # all rows take part, the held-out ones with zeros: no copy of the others is made
        combination = self.projections.new_zeros(len(self.projections), len(V))
        combination[:, ~self.held] = self.projections[:, :rank] @ self.coefficients[:, :rank].T
        return V[self.held] - combination.to(V.dtype) @ V
