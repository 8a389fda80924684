"""Interface of backends: another library's derivatives in place of torch.func's."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor

from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.data.batches import Batch


@runtime_checkable
class CurvatureBackend(Protocol):
    """Derivatives with respect to the selected parameters; the `offers_…` methods tell which are available."""

    name: str

    def offers_rows(self, root: OutputRoot) -> bool:
        """Whether rows of this root are available."""
        ...

    def rows(self, batch: Batch, root: OutputRoot, targets_or_noise: Tensor) -> Tensor:
        """Compute rows (n, r, P) of the root."""
        ...

    def offers_kfac(self, root: OutputRoot, approximation: str) -> bool:
        """Whether K-FAC's factors are available."""
        ...

    def kfac(self, batches: Iterable[Batch], n_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute factors (left, right) of the mean curvature by parameter name; right is ones (1,) for a bias."""
        ...

    def offers_hessian(self) -> bool:
        """Whether the dense Hessian is available."""
        ...

    def hessian(self, batch: Batch) -> Tensor:
        """Compute the sum (P, P) of the Hessians of a batch's losses."""
        ...
