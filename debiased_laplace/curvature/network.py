"""A network at its trained weights: how its outputs and their derivatives are computed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace.curvature import derivatives
from debiased_laplace.curvature.derivatives import BatchProducts, Capabilities, Root
from debiased_laplace.curvature.likelihoods import Likelihood
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.parameters import ParameterSelection

_MOST_SAMPLES = 256  # of a chunk: activations are not in the byte count
_TANGENTS = 32  # directions pushed forward at once


@dataclass(frozen=True)
class Network:
    """A network, its likelihood, and what can be differentiated how.

    Attributes:
        selection: the parameters that count.
        parameters: their values.
        likelihood: of the outputs.
        n_outputs: C.
        capabilities: found by trying.
    """

    selection: ParameterSelection
    parameters: dict[str, Tensor]
    likelihood: Likelihood
    n_outputs: int
    capabilities: Capabilities

    @property
    def n_parameters(self) -> int:
        """P."""
        return self.selection.n_parameters

    @property
    def like(self) -> Tensor:
        """Any flat vector of the parameters' dtype and device."""
        return next(iter(self.parameters.values())).reshape(-1)[:1].expand(self.n_parameters)

    @property
    def rows_per_chunk(self) -> int:
        """Samples whose rows fit into one chunk."""
        size = self.n_outputs * self.n_parameters * self.like.element_size()
        return max(1, min(_MOST_SAMPLES, CHUNK_BYTES // size))

    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs (n, C) of a batch, without a graph."""
        with torch.no_grad():
            return self.selection.call(self.parameters, inputs)

    def check_inputs(self, inputs: Tensor) -> None:
        """Evaluate the first sample, where a failure can still be told from one inside a transformation.

        Raises:
            ValueError: if the model cannot be evaluated on it.
        """
        try:
            self.outputs(inputs[:1])
        except Exception as error:
            raise ValueError(
                f"The model could not be evaluated on inputs of shape {tuple(inputs.shape)} and {inputs.dtype}: {error}"
            ) from error

    def jacobians(self, inputs: Tensor, *, create_graph: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Jacobians (n, C, P) and outputs (n, C), chunk by chunk."""
        return self._rows(inputs, derivatives.identity_root, create_graph=create_graph)

    def ggn_rows(self, inputs: Tensor) -> Iterator[Tensor]:
        r"""Rows $S_n^\top J_n$ (n, r, P) of the GGN's root, chunk by chunk."""
        for rows, _ in self._rows(inputs, self.likelihood.root, create_graph=False):
            yield rows

    def _rows(self, inputs: Tensor, root: Root, *, create_graph: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in inputs.split(self.rows_per_chunk):
            # vmap's backward pass of normalization layers is right once, but not differentiable: it takes mean and
            # deviation for constants
            if self.capabilities.vmapped_rows and not create_graph:
                rows, outputs = derivatives.vmapped_rows(self.selection, self.parameters, chunk, root)
                yield rows.detach(), outputs.detach()
            else:
                yield derivatives.looped_rows(self.selection, self.parameters, chunk, root, create_graph=create_graph)

    def ggn_columns(self, inputs: Tensor, directions: Tensor) -> Tensor:
        r"""$S_n^\top J_n u_i$ as (n, r, k) for directions (P, k)."""
        vmapped = self.capabilities.vmapped_columns
        parts = []
        for tangents in directions.split(_TANGENTS, dim=1):
            pushed, outputs = derivatives.columns(self.selection, self.parameters, inputs, tangents, vmapped=vmapped)
            parts.append(self.likelihood.root(outputs).mT @ pushed)
        return torch.cat(parts, dim=-1)

    def products(self, inputs: Tensor) -> BatchProducts:
        """The batch made ready for many GGN products."""
        return BatchProducts(self.selection, self.parameters, inputs, self.likelihood.root, self.capabilities)
