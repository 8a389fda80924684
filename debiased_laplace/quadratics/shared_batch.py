"""Derivatives of a batch of which each of several processes has some samples."""

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.derivatives import LinearizedBatch
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.inputs import Inputs, n_samples_of, on_each


class SharedLinearizedBatch:
    """The same as `LinearizedBatch`; passes over the network are shared, and all processes have what they find.

    Attributes:
        outputs: (n, C), without a graph.
    """

    def __init__(self, network: Network, inputs: Inputs):
        self._processes, self._like = network.processes, network.like
        sizes = [len(part) for part in torch.arange(n_samples_of(inputs)).tensor_split(self._processes.size)]
        start = sum(sizes[: self._processes.rank])
        self._own = slice(start, start + sizes[self._processes.rank])
        self._part: LinearizedBatch | None = None
        if self._own.start < self._own.stop:
            self._part = network.linearized(on_each(inputs, lambda t: t[self._own]))
        self.outputs = self._joined(None if self._part is None else self._part.outputs)

    def pushed(self, X: Float[Tensor, "P k"]) -> Float[Tensor, "n C k"]:
        """Return $J_n x$ of all samples."""
        return self._joined(None if self._part is None else self._part.pushed(X))

    def pulled(self, W: Float[Tensor, "n C"]) -> Float[Tensor, " P"]:
        r"""Return $\sum_n J_n^\top w_n$ over all samples."""
        total = torch.zeros_like(self._like) if self._part is None else self._part.pulled(W[self._own])
        self._processes.add([total])
        return total

    def _joined(self, own: Tensor | None) -> Tensor:
        found = self._processes.gathered("derivatives", own, self._like.device)
        return torch.cat([part for part in found if part is not None])
