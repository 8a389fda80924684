"""A network at its trained weights: how its outputs and their derivatives are computed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from debiased_laplace.curvature import derivatives
from debiased_laplace.curvature.derivatives import BatchProducts, Capabilities, LinearizedBatch
from debiased_laplace.curvature.foreign import ForeignDerivatives
from debiased_laplace.curvature.likelihoods import Likelihood
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import Identity, OutputRoot
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs, first, n_samples_of, split

_MOST_SAMPLES = 256  # of a chunk: activations are not in the byte count
_MOST_SAMPLES_OF_A_BACKEND = 32  # its Jacobians may cost the square of that
_TANGENTS = 32  # directions pushed forward at once

RowBlocks = Iterator[Tensor]
"""Rows (n, r, P) of the same n samples, their r rows in one or more blocks."""

TORCH_ROWS = "torch.func rows"

_Columns = Callable[[Tensor, Tensor, slice], Tensor]  # as OutputRoot.columns


@dataclass(frozen=True)
class Network:
    """A network, its likelihood, and what can be differentiated how.

    Attributes:
        selection: the parameters that count.
        parameters: their values.
        likelihood: of the outputs.
        n_outputs: C.
        capabilities: found by trying.
        foreign: another library's derivatives, where they are to be used; None: torch.func's.
    """

    selection: ParameterSelection
    parameters: dict[str, Tensor]
    likelihood: Likelihood
    n_outputs: int
    capabilities: Capabilities
    foreign: ForeignDerivatives | None = None

    @property
    def n_parameters(self) -> int:
        """P."""
        return self.selection.n_parameters

    @property
    def like(self) -> Tensor:
        """Any flat vector of the parameters' dtype and device."""
        some = next(p for p in self.parameters.values() if p.numel())
        return some.reshape(-1)[:1].expand(self.n_parameters)

    @property
    def bytes_of_a_row(self) -> int:
        """Memory that a row takes while it is computed: of a subnetwork, whole parameters, and what is pulled back."""
        return max(self.selection.n_differentiated, self.n_outputs) * self.like.element_size()

    def rows_per_chunk(self, n_rows: int) -> int:
        """Samples of so many rows each that fit into one chunk; 0 where a single one does not."""
        return min(_MOST_SAMPLES, CHUNK_BYTES // (n_rows * self.bytes_of_a_row))

    def outputs(self, inputs: Inputs) -> Tensor:
        """Outputs (n, C) of a batch, without a graph."""
        with torch.no_grad():
            return self.selection.call(self.parameters, inputs)

    def check_inputs(self, inputs: Inputs) -> None:
        """Evaluate the first sample, where a failure can still be told from one inside a transformation.

        Raises:
            ValueError: if the model cannot be evaluated on it.
        """
        with torch.no_grad():
            self.selection.evaluated(self.parameters, first(inputs, 1))

    def jacobians(self, inputs: Inputs, *, create_graph: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Jacobians (n, C, P) and outputs (n, C), chunk by chunk, all outputs of a sample at once."""
        size = max(1, self.rows_per_chunk(self.n_outputs))
        for chunk in split(inputs, size):
            side = torch.zeros(n_samples_of(chunk))
            yield self._rows(chunk, side, derivatives.identity_cotangents, create_graph=create_graph)

    def jacobian_blocks(self, inputs: Inputs, n_outputs: int) -> Iterator[RowBlocks]:
        """Rows of the Jacobian, for each group of samples in blocks of outputs that bound the memory."""
        side = torch.zeros(n_samples_of(inputs))
        return (blocks for _, blocks in self._grouped(inputs, side, Identity().columns, n_outputs))

    def difference_blocks(self, inputs: Inputs, order: Tensor, *, leading: int) -> Iterator[RowBlocks]:
        """Rows of the differences of each input's outputs to one of them.

        Args:
            inputs: a batch.
            order: outputs (n, C) of each input; the differences are to the first, in this order.
            leading: rows that the first block holds at least.

        Yields:
            C - 1 rows of each group of samples, in blocks that bound the memory.
        """
        groups = self._grouped(inputs, order, _difference_columns, order.shape[1] - 1, leading=leading)
        return (blocks for _, blocks in groups)

    def root_rows(self, batch: Batch, root: OutputRoot, side: Tensor) -> Iterator[tuple[int, RowBlocks, str]]:
        r"""Rows $S_n^\top J_n$ of a curvature's root.

        Args:
            batch: samples.
            root: of the curvature with respect to the outputs.
            side: what the root needs to know of each sample.

        Yields:
            The number of samples of a group, their rows in blocks that bound the memory, and who computed them.
        """
        r = root.n_columns(self.n_outputs)
        foreign = self.foreign
        if foreign is None or not foreign.offers_rows(root):
            for n, blocks in self._grouped(batch.inputs, side, root.columns, r):
                yield n, blocks, TORCH_ROWS
            return
        size = max(1, min(self.rows_per_chunk(self.n_outputs), _MOST_SAMPLES_OF_A_BACKEND))
        for chunk, known in zip(batch.chunks(size), side.split(size), strict=True):
            yield len(chunk), iter([foreign.rows(chunk, root, known)]), foreign.name

    def _grouped(
        self, inputs: Inputs, side: Tensor, columns: _Columns, n_rows: int, *, leading: int = 0
    ) -> Iterator[tuple[int, RowBlocks]]:
        size = self.rows_per_chunk(n_rows)
        # where one sample's rows are too many, its rows come in blocks
        step = n_rows if size else max(1, CHUNK_BYTES // self.bytes_of_a_row)
        edges = [0, *range(max(step, leading), n_rows, step), n_rows]
        for chunk, known in zip(split(inputs, max(size, 1)), side.split(max(size, 1)), strict=True):
            yield len(known), self._blocks(chunk, known, columns, [slice(*ends) for ends in pairwise(edges)])

    def _blocks(self, inputs: Inputs, side: Tensor, columns: _Columns, blocks: list[slice]) -> RowBlocks:
        for chosen in blocks:
            yield self._rows(inputs, side, partial(_chosen_columns, columns, chosen))[0]

    def _rows(
        self, inputs: Inputs, side: Tensor, cotangents: derivatives.Cotangents, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        side = side.to(self.like.device)
        # vmap's backward pass of normalization layers is right once, but not differentiable: it takes mean and
        # deviation for constants
        if self.capabilities.vmapped_rows and not create_graph:
            rows, outputs = derivatives.vmapped_rows(self.selection, self.parameters, inputs, side, cotangents)
            return rows.detach(), outputs.detach()
        return derivatives.looped_rows(
            self.selection, self.parameters, inputs, side, cotangents, create_graph=create_graph
        )

    def root_columns(self, inputs: Inputs, root: OutputRoot, side: Tensor, directions: Tensor) -> Tensor:
        r"""$S_n^\top J_n u_i$ as (n, r, k) for directions (P, k)."""
        parts = []
        for tangents in directions.split(_TANGENTS, dim=1):
            pushed, outputs = self.pushed(inputs, tangents)
            parts.append(root.transposed(outputs, side, pushed))
        return torch.cat(parts, dim=-1)

    def pushed(self, inputs: Inputs, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """$J_n u_i$ as (n, C, k) for a few tangents (P, k), and the outputs (n, C)."""
        vmapped = self.capabilities.vmapped_columns
        return derivatives.columns(self.selection, self.parameters, inputs, tangents, vmapped=vmapped)

    def ready_for_products(self, inputs: Inputs) -> "Network":
        """The network, having tried on some inputs whether linearizing it once is right."""
        linear = derivatives.allows_linearization(self.selection, self.parameters, inputs)
        return replace(self, capabilities=replace(self.capabilities, linearized=linear))

    def products(self, inputs: Inputs, root: OutputRoot, side: Tensor) -> BatchProducts:
        """The batch made ready for many products with the curvature."""
        return BatchProducts(self.selection, self.parameters, inputs, side, root, self.capabilities)

    def linearized(self, inputs: Inputs) -> LinearizedBatch:
        """The batch made ready for many derivatives along directions and gradients."""
        return LinearizedBatch(self.selection, self.parameters, inputs, self.capabilities)


def _chosen_columns(columns: _Columns, chosen: slice, outputs: Tensor, side: Tensor) -> Tensor:
    return columns(outputs, side, chosen)


def _difference_columns(outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:
    """Cotangents (C, r) of differences of outputs to the first of an order."""
    classes = torch.arange(outputs.shape[-1], device=outputs.device)[:, None]
    return (classes == side[1:][chosen]).to(outputs.dtype) - (classes == side[:1]).to(outputs.dtype)
