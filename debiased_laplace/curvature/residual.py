"""The diagonal of the curvature that leading directions do not span, along the axes or in a basis."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.sub_batch import ResidualRequest


class ResidualDiagonal:
    """Sums of squared rows without their part along leading directions, for each request of a diagonal."""

    def __init__(self, requests: Sequence[ResidualRequest], zeros: Float[Tensor, " P"]):
        self._sums = {request: zeros.clone() for request in requests if request.residual == "diagonal"}

    @property
    def ranks(self) -> list[int]:
        """Numbers of leading directions for which a diagonal is requested."""
        return sorted({request.rank for request in self._sums})

    def add(self, rank: int, rows: Float[Tensor, "n r P"]) -> None:
        """Add rows from which the part along that many leading directions was removed."""
        for request, total in self._sums.items():
            if request.rank == rank:
                basis = request.basis
                total += rows.square().sum((0, 1)) if basis is None else basis.summed_squares(rows).sum(0)

    @property
    def requests(self) -> list[ResidualRequest]:
        """Requests of a diagonal."""
        return list(self._sums)

    def add_squares(self, request: ResidualRequest, squares: Float[Tensor, " P"]) -> None:
        """Add squares that were summed over rows, in the coordinates of the request."""
        self._sums[request] += squares

    def mean(self, request: ResidualRequest, n: int) -> Float[Tensor, " P"] | None:
        """Return the mean over n samples; None if the request has no diagonal."""
        return self._sums[request] / n if request in self._sums else None
