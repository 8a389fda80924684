"""What rows have outside some directions: the diagonal of their curvature there, along the axes or in a basis."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.sub_batch import Aspect
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


class OutsideDiagonals:
    """Sums of squares of rows without their part along leading directions, for each aspect that wants them."""

    def __init__(self, aspects: Sequence[Aspect], zeros: Float[Tensor, " P"]):
        self._bases = {i: a.basis for i, a in enumerate(aspects) if a.residual == "diagonal"}
        self._rank_of = {i: aspects[i].rank for i in self._bases}
        self._sums = {i: zeros.clone() for i in self._bases}

    @property
    def ranks(self) -> list[int]:
        """Numbers of leading directions for which there is a diagonal to sum up."""
        return sorted(set(self._rank_of.values()))

    def add(self, rank: int, outside: Float[Tensor, "n r P"]) -> None:
        """More rows without their part along so many directions."""
        for i, basis in self._bases.items():
            if self._rank_of[i] == rank:
                self._sums[i] += summed_squares(outside, basis)

    def mean(self, aspect: int, n: int) -> Float[Tensor, " P"] | None:
        """The mean over n samples; None where the aspect has none."""
        return self._sums[aspect] / n if aspect in self._sums else None


def summed_squares(rows: Float[Tensor, "n r P"], basis: KroneckerBasis | None) -> Float[Tensor, " P"]:
    """Squared coordinates of all rows, summed; in a basis if there is one."""
    return rows.square().sum((0, 1)) if basis is None else basis.summed_squares(rows).sum(0)
