"""What another library's derivatives may be asked for, in place of torch.func's."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor

from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.data.batches import Batch


@runtime_checkable
class ForeignDerivatives(Protocol):
    """Derivatives with respect to the selected parameters; `offers_…` says which of them may be asked for."""

    name: str

    def offers_rows(self, root: OutputRoot) -> bool:
        """Whether it computes rows of this root."""
        ...

    def rows(self, batch: Batch, root: OutputRoot, side: Tensor) -> Tensor:
        """Rows (n, r, P) of the root."""
        ...

    def offers_kfac(self, root: OutputRoot, approximation: str) -> bool:
        """Whether it computes K-FAC's factors."""
        ...

    def kfac(self, batches: Iterable[Batch], n_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors (left, right) of the mean curvature by the parameter's name; a bias has ones of shape (1,) right."""
        ...

    def offers_hessian(self) -> bool:
        """Whether it computes the dense Hessian."""
        ...

    def hessian(self, batch: Batch) -> Tensor:
        """The sum (P, P) of the Hessians of a batch's losses."""
        ...
