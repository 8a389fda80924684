r"""Curvature in whitened coordinates, where a Kronecker posterior is a multiple of the identity.

With an orthogonal basis K and a diagonal metric S, a vector x of parameters has the coordinates $S^{1/2} K^\top x$, and
a curvature H is $S^{-1/2} K^\top H K S^{-1/2}$: its eigenvectors are the generalized ones of
$H x = \lambda K S K^\top x$.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.network import RowBlocks
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


@dataclass(frozen=True, eq=False)
class Whitening:
    """A change of coordinates.

    Attributes:
        basis: K.
        metric: diagonal of S, positive.
    """

    basis: KroneckerBasis
    metric: Float[Tensor, " P"]

    def rows(self, rows: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        r"""Transform rows V of a curvature's root to $V K S^{-1/2}$."""
        return self.basis.coordinates(rows) / self.metric.sqrt()

    def vectors(self, coordinates: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        r"""Transform columns U of coordinates to vectors of parameters $K S^{-1/2} U$."""
        return self.basis.vectors(coordinates.T / self.metric.sqrt()).T


class WhitenedRowCurvature(RowCurvature):
    """Mean curvature of a set of samples in whitened coordinates."""

    def __init__(self, inner: RowCurvature, whitening_of: Callable[[RowCurvature], Whitening], whitening: Whitening):
        super().__init__(inner.network, inner.samples, inner.root, seed=inner.seed, progress_bar=inner.progress_bar)
        self.inner = inner
        self.whitening = whitening
        self._whitening_of = whitening_of
        self._used = inner._used

    # whitened rows are not outer products, and come from all parameters at once
    linear_layer = None
    _by_parameter = False
    parameter_groups = ()

    def in_coordinates_of(self, positions: Int64[Tensor, " m"]) -> "WhitenedRowCurvature":
        """Return the curvature in coordinates computed from a subset."""
        return WhitenedRowCurvature(self.inner, self._whitening_of, self._whitening_of(self.inner.part(positions)))

    def part(self, positions: Int64[Tensor, " m"]) -> "WhitenedRowCurvature":
        """Return the mean curvature of a subset, in the same coordinates."""
        return WhitenedRowCurvature(self.inner.part(positions), self._whitening_of, self.whitening)

    def redrawn(self) -> "RowCurvature":
        """Return the curvature of the same samples with new drawn targets; itself if none are drawn."""
        if not self.is_random:
            return self
        return WhitenedRowCurvature(self.inner.redrawn(), self._whitening_of, self.whitening)

    def row_groups(self, description: str = "[Computing rows]") -> Iterator[tuple[int, RowBlocks]]:
        """Yield groups of samples: their number, and their rows in one or more blocks."""
        if self._stacked is not None:
            yield from super().row_groups(description)
            return
        for n, blocks in self.inner.row_groups(description):
            yield n, (self.whitening.rows(block) for block in blocks)

    def linear_map(self) -> Callable[[Tensor], Tensor]:
        """Return the map from X to H X in these coordinates."""
        product, whitening = self.inner.linear_map(), self.whitening
        return lambda X: whitening.rows(product(whitening.vectors(X)).T).T

    def _columns_are_cheaper(self, k: int) -> bool:  # noqa: ARG002
        return False
