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
    r"""Rows h against the leading directions of the other rows.

    Attributes:
        projections: $V_h U$ with the directions U of the others, by decreasing eigenvalue.
        combination: A with $A V = V_h U U^\top$: columns of held-out rows are zero.
        held: which rows these are.
    """

    projections: Float[Tensor, "h k"]
    combination: Float[Tensor, "h R"]
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
        scaled = W[:, :k] / values[:k].sqrt()
        projections = G[held][:, others] @ scaled
        combination = G.new_zeros(len(projections), len(G))
        combination[:, others] = projections @ scaled.T
        return cls(projections, combination, held)

    def outside(self, factor: GramFactor) -> Float[Tensor, "h P"]:
        """The held-out rows without their part along the directions."""
        V = factor.rows
        return V[self.held] - self.combination.to(V.dtype) @ V
