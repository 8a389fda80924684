"""A network at its trained weights, with its outputs and their derivatives."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature import derivatives
from debiased_laplace.curvature.backend import CurvatureBackend
from debiased_laplace.curvature.derivatives import BatchProducts, Capabilities, LinearizedBatch, LinearizedLayer
from debiased_laplace.curvature.layer_rows import LayersDifferError
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import CHUNK_BYTES, LARGEST_SIDE, available_memory
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.positions import OutputLayout, PositionWise
from debiased_laplace.curvature.roots import Identity, OutputRoot
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs, first, n_samples_of, on_each, shape_of, split
from debiased_laplace.fit_checkpoint import NO_CHECKPOINT, FitCheckpoint
from debiased_laplace.linalg.row_matrix import RowMatrix
from debiased_laplace.linalg.shard import Shard
from debiased_laplace.processes import ALONE, Processes

_MOST_SAMPLES = 256  # in a chunk
_ACTIVATION_BYTES = 512 * 2**20  # of a backward pass on a CPU
_MOST_SAMPLES_OF_A_BACKEND = 32  # the cost of a backend's Jacobians may be quadratic
_TANGENTS = 32  # directions pushed forward at once

RowBlocks = Iterator[Tensor]
"""Rows (n, r, P) of n samples, in one or more blocks along r."""

TORCH_ROWS = "torch.func rows"

_Columns = Callable[[Tensor, Tensor, slice], Tensor]  # as OutputRoot.columns


@dataclass(frozen=True)
class Network:
    """A network, its likelihood, and its ways of differentiation.

    Attributes:
        selection: parameters that the posterior is over.
        parameters: their values.
        likelihood: likelihood of the outputs.
        n_outputs: number C of outputs.
        capabilities: modes of differentiation that work.
        backend: another library's derivatives to use; None for torch.func's.
        memory: bytes that computations may take beyond the model and the directions; None: a quarter of what is free.
        largest_side: longest side of a parameter as a matrix that gets eigenvectors; longer ones keep their axes.
        processes: that share passes over samples.
        checkpoint: of rows that an interrupted fit has computed.
        shard: of the parameters whose entries of rows and directions a fit holds; None: of all.
    """

    selection: ParameterSelection
    parameters: dict[str, Tensor]
    likelihood: Likelihood
    n_outputs: int
    capabilities: Capabilities
    backend: CurvatureBackend | None = None
    memory: int | None = None
    largest_side: int = LARGEST_SIDE
    processes: Processes = ALONE
    checkpoint: FitCheckpoint = NO_CHECKPOINT
    shard: Shard | None = None

    @property
    def layout(self) -> OutputLayout | None:
        """Layout of the outputs in the model; None without positions."""
        return self.likelihood.layout if isinstance(self.likelihood, PositionWise) else None

    @property
    def n_classes(self) -> int:
        """Number of outputs at each position; without positions, of all outputs."""
        return self.n_outputs if self.layout is None else self.layout.n_classes

    def at_position(self, number: int) -> "Network":
        """Return the network with the outputs at one position alone."""
        C = self.n_classes
        return self.at_outputs(slice(number * C, (number + 1) * C), C)

    def at_outputs(self, chosen: slice | Tensor, n_outputs: int) -> "Network":
        """Return the network with some of its flat outputs alone, and the likelihood of outputs without positions."""
        likelihood = self.likelihood.base if isinstance(self.likelihood, PositionWise) else self.likelihood
        selection = replace(self.selection, outputs=chosen)
        return replace(self, selection=selection, n_outputs=n_outputs, likelihood=likelihood)

    @property
    def chosen(self) -> slice | Tensor:
        """Index of the outputs among all, for closed forms of a last layer, which are of all of them."""
        return slice(None) if self.selection.outputs is None else self.selection.outputs

    def alone(self) -> "Network":
        """Return the network whose passes are this process's own, after a fit."""
        return replace(self, processes=ALONE, checkpoint=NO_CHECKPOINT, shard=None)

    @property
    def share(self) -> float:
        """Share of the entries of rows and directions that a fit holds."""
        return 1.0 if self.shard is None else self.shard.share

    def shared(self, processes: Processes) -> "Network":
        """Return the network whose passes processes share, with the memory that all of them have.

        Raises:
            ValueError: if weights or selected parameters differ between them.
        """
        if not processes.several:
            return replace(self, processes=processes)
        processes.check_same(weights=self.selection.fingerprint(), parameters=self.selection.subset)
        memory = min(processes.gathered("available memory", self.available_memory))
        return replace(self, processes=processes, memory=memory)

    @property
    def available_memory(self) -> int:
        """Bytes that computations may take beyond the model and the directions."""
        return available_memory(self.like.device, self.memory)

    @property
    def n_parameters(self) -> int:
        """Number P of parameters."""
        return self.selection.n_parameters

    @property
    def like(self) -> Tensor:
        """A flat vector (P,) of the parameters' dtype and device."""
        p = next(p for p in self.parameters.values() if p.numel())
        return p.reshape(-1)[:1].expand(self.n_parameters)

    @property
    def bytes_of_a_row(self) -> int:
        """Memory of a row while it is computed, in bytes; for a subnetwork, of whole parameters."""
        return max(self.selection.n_differentiated, self.n_outputs) * self.like.element_size()

    @property
    def samples_per_pass(self) -> int:
        """Number of samples whose activations are held for a backward pass."""
        most = self.available_memory // 4
        if self.like.device.type == "cpu":
            most = min(most, _ACTIVATION_BYTES)
        return max(1, min(_MOST_SAMPLES, most // self.capabilities.activation_bytes))

    def bytes_of_activations(self, n_samples: int) -> int:
        """Return the memory of the activations that are held for a backward pass over so many samples, in bytes."""
        return min(self.samples_per_pass, n_samples) * self.capabilities.activation_bytes

    def rows_per_chunk(self, n_rows: int) -> int:
        """Return how many samples with `n_rows` rows each fit into one chunk; 0 if a single one does not."""
        return min(self.samples_per_pass, CHUNK_BYTES // (n_rows * self.bytes_of_a_row))

    def outputs(self, inputs: Inputs) -> Tensor:
        """Return the outputs (n, C) of a batch, without a graph."""
        with torch.no_grad():
            return self.selection.call(self.parameters, inputs)

    @property
    def linear_layer(self) -> LinearLayer | None:
        """The last linear layer that all parameters belong to, if there is one."""
        return self.capabilities.linear_layer

    def features(self, inputs: Inputs, model_kwargs: dict[str, Any] | None = None) -> tuple[Tensor, Tensor] | None:
        """Return features (n, d) and outputs (n, C) of a last linear layer; None where it does not give the outputs.

        Raises:
            ValueError: as `check_inputs`.
        """
        if self.linear_layer is None:
            return None
        try:
            found = self.linear_layer.features(self.parameters, inputs, model_kwargs)
        except Exception:
            self.check_inputs(inputs)
            raise
        if found is None:
            self.check_inputs(inputs)
        return found

    def features_of(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return the same for a batch, whose features may have been kept."""
        if self.linear_layer is None or batch.features is None:
            return self.features(batch.inputs)
        return batch.features, self.linear_layer.outputs(self.parameters, batch.features)

    def check_inputs(self, inputs: Inputs) -> None:
        """Evaluate the first sample.

        Raises:
            ValueError: if the model cannot be evaluated on it, or has other outputs than at the fitted inputs.
        """
        # outside a transformation, where the model's own errors are readable
        with torch.no_grad():
            outputs = self.selection.evaluated(self.parameters, first(inputs, 1))
        found = OutputLayout.of(outputs)
        if found != self.layout and outputs.numel() != self.n_outputs:
            raise ValueError(
                f"Expected inputs with {self.n_outputs} outputs each, as at the fit; got outputs of shape "
                f"{tuple(outputs.shape[1:])} for inputs of shape {shape_of(inputs)}. Flatten further dimensions of "
                "samples, such as (b, q, d) to (b q, d), into the first."
            )

    def jacobians(self, inputs: Inputs, *, create_graph: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield Jacobians (n, C, P) and outputs (n, C), chunk by chunk, all outputs of a sample at once."""
        size = max(1, self.rows_per_chunk(self.n_outputs))
        features = None if create_graph else self.features(inputs)
        if features is not None:
            unused = torch.zeros(size)
            for values, f in zip(features[0].split(size), features[1].split(size), strict=True):
                yield self._rows_of_layer((values, f), unused, derivatives.identity_cotangents)
            return
        for chunk in split(inputs, size):
            unused = torch.zeros(n_samples_of(chunk))
            yield self._rows(chunk, unused, derivatives.identity_cotangents, create_graph=create_graph)

    def jacobian_blocks(self, inputs: Inputs, n_outputs: int) -> Iterator[RowBlocks]:
        """Yield rows of the Jacobian for groups of samples, in blocks of outputs that bound the memory."""
        batch = Batch(inputs, torch.zeros(n_samples_of(inputs)))
        return (blocks for _, blocks in self._grouped(batch, batch.targets, Identity().columns, n_outputs))

    def difference_blocks(self, inputs: Inputs, order: Tensor, *, leading: int) -> Iterator[RowBlocks]:
        """Yield Jacobian rows of the differences between each input's outputs and one of them.

        Args:
            inputs: a batch.
            order: indices (n, C) of each input's outputs; differences are to the first, in this order.
            leading: minimum number of rows in the first block.

        Yields:
            C - 1 rows of each group of samples, in blocks that bound the memory.
        """
        groups = self._grouped(Batch(inputs, order), order, _difference_columns, order.shape[1] - 1, leading=leading)
        return (blocks for _, blocks in groups)

    @property
    def factors_save_memory(self) -> bool:
        """Whether rows by parameter take at most half the memory of flat ones."""
        return self.capabilities.layers is not None and 2 * self.bytes_of_factors <= self.bytes_of_a_flat_row

    @property
    def bytes_of_a_flat_row(self) -> int:
        """Memory of a row as it is held, in bytes; for a subnetwork, of the selected entries."""
        return self.n_parameters * self.like.element_size()

    def differences_by_parameter(self, inputs: Inputs, order: Tensor, chosen: slice | None) -> RowMatrix | None:
        """Return the rows of some of these differences, or of their sum; None where a batch calls other layers."""

        def columns(outputs: Tensor, order: Tensor) -> Tensor:
            every = _difference_columns(outputs, order, slice(None) if chosen is None else chosen)
            return every.sum(-1, keepdim=True) if chosen is None else every

        found = self.row_matrix(inputs, order, columns)
        return None if found is None else found[0]

    def root_rows(
        self, batch: Batch, root: OutputRoot, targets_or_noise: Tensor
    ) -> Iterator[tuple[int, RowBlocks, str]]:
        r"""Yield rows $\sqrt{m_n} S_n^\top J_n$ of a curvature's root, $m_n$ being the samples' weights.

        Args:
            batch: samples.
            root: root of the curvature with respect to the outputs.
            targets_or_noise: input of the root for each sample; see `OutputRoot.targets_or_noise`.

        Yields:
            Number of samples of a group, their rows in blocks that bound the memory, and the engine's name.
        """
        r = root.n_columns(self.n_outputs)
        backend = self.backend
        if backend is None or not backend.offers_rows(root):
            start = 0
            for n, blocks in self._grouped(batch, targets_or_noise, root.columns, r):
                group = None if batch.weights is None else batch.weights[start : start + n]
                yield n, _weighted(blocks, group), TORCH_ROWS
                start += n
            return
        size = max(1, min(self.rows_per_chunk(self.n_outputs), _MOST_SAMPLES_OF_A_BACKEND))
        for chunk, part in zip(batch.chunks(size), targets_or_noise.split(size), strict=True):
            yield len(chunk), _weighted([backend.rows(chunk, root, part)], chunk.weights), backend.name

    def _grouped(
        self, batch: Batch, targets_or_noise: Tensor, columns: _Columns, n_rows: int, *, leading: int = 0
    ) -> Iterator[tuple[int, RowBlocks]]:
        size = self.rows_per_chunk(n_rows)
        # if the rows of one sample do not fit into a chunk, they come in blocks
        step = n_rows if size else max(1, CHUNK_BYTES // self.bytes_of_a_row)
        edges = [0, *range(max(step, leading), n_rows, step), n_rows]
        blocks = [partial(_chosen_columns, columns, slice(*ends)) for ends in pairwise(edges)]
        features = self.features_of(batch)
        for start in range(0, len(batch), max(size, 1)):
            chosen = slice(start, start + max(size, 1))
            part = targets_or_noise[chosen]
            if features is None:
                chunk = on_each(batch.inputs, lambda t, chosen=chosen: t[chosen])  # type: ignore[misc]
                rows_of = partial(self._rows, chunk, part)
            else:
                rows_of = partial(self._rows_of_layer, tuple(t[chosen] for t in features), part)
            # bound now, and called later
            yield len(part), (rows for rows, _ in map(rows_of, blocks))

    def _rows_of_layer(
        self, features: tuple[Tensor, ...], targets_or_noise: Tensor, cotangents: derivatives.Cotangents
    ) -> tuple[Tensor, Tensor]:
        assert self.linear_layer is not None  # for the type checker
        values, outputs = features
        S = cotangents(outputs, targets_or_noise.to(outputs.device))
        return self.linear_layer.rows(values, S.expand(len(values), -1, -1)), outputs

    def _rows(
        self,
        inputs: Inputs,
        targets_or_noise: Tensor,
        cotangents: derivatives.Cotangents,
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor, Tensor]:
        targets_or_noise = targets_or_noise.to(self.like.device)
        by_layers = None if create_graph else self.row_matrix(inputs, targets_or_noise, cotangents)
        if by_layers is not None:
            return by_layers[0].dense(), by_layers[1]
        # vmap's backward pass of normalization layers is correct, but its derivative treats mean and deviation as
        # constants
        if self.capabilities.vmapped_rows and self.linear_layer is None and not create_graph:
            rows, outputs = derivatives.vmapped_rows(
                self.selection, self.parameters, inputs, targets_or_noise, cotangents
            )
            return rows.detach(), outputs.detach()
        return derivatives.looped_rows(
            self.selection, self.parameters, inputs, targets_or_noise, cotangents, create_graph=create_graph
        )

    def row_matrix(
        self,
        inputs: Inputs,
        targets_or_noise: Tensor,
        cotangents: derivatives.Cotangents,
        chosen: range | None = None,
    ) -> tuple[RowMatrix, Tensor] | None:
        """Compute rows by layers, and outputs (n, C), of a batch; None if the network has no layers that are seen.

        Args:
            inputs: a batch.
            targets_or_noise: input of the cotangents for each sample.
            cotangents: of the outputs.
            chosen: numbers of the parameters; None: all.
        """
        layers = self.capabilities.layers
        if layers is None:
            return None
        vmapped = self.capabilities.vmapped_rows
        try:
            return derivatives.layered_rows(
                self.selection,
                self.parameters,
                layers,
                inputs,
                targets_or_noise,
                cotangents,
                vmapped=vmapped,
                names=None if chosen is None else self.selection.names[chosen.start : chosen.stop],
            )
        except LayersDifferError:
            # data-dependent control flow
            return None

    def jacobians_by_parameter(self, inputs: Inputs) -> Iterator[tuple[RowMatrix, Tensor]] | None:
        """Return Jacobians and outputs (n, C) of chunks of samples; None unless that saves much memory.

        Raises:
            LayersDifferError: while iterating, if a chunk calls other layers than those that were found.
        """
        layers = self.capabilities.layers
        if layers is None or not self.factors_save_memory:
            return None
        size = max(1, min(self.samples_per_pass, CHUNK_BYTES // (self.n_outputs * self.bytes_of_factors)))

        def chunks() -> Iterator[tuple[RowMatrix, Tensor]]:
            for chunk in split(inputs, size):
                unused = torch.zeros(n_samples_of(chunk), device=self.like.device)
                yield derivatives.layered_rows(
                    self.selection,
                    self.parameters,
                    layers,
                    chunk,
                    unused,
                    derivatives.identity_cotangents,
                    vmapped=self.capabilities.vmapped_rows,
                )

        return chunks()

    @property
    def bytes_of_factors(self) -> int:
        """Memory of a row as `row_matrix` returns it, in bytes."""
        return self.bytes_of_a_row if self.capabilities.layers is None else sum(self.bytes_by_parameter)

    @property
    def bytes_by_parameter(self) -> list[int]:
        """Memory of a row as `row_matrix` returns it, in bytes, for each parameter."""
        n_numbers = {} if self.capabilities.layers is None else self.capabilities.layers.n_numbers
        numbers = (n_numbers.get(n, size) for n, size in zip(self.selection.names, self.selection.sizes, strict=True))
        return [n * self.like.element_size() for n in numbers]

    def bytes_of_held_rows(self, n_rows: int) -> int:
        """Return the memory of rows in bytes: by parameter where that saves half of it or more."""
        if self.shard is not None:
            return n_rows * sum(self.bytes_by_parameter[self.shard.numbers])
        return n_rows * (self.bytes_of_factors if self.factors_save_memory else self.bytes_of_a_flat_row)

    def root_columns(self, batch: Batch, root: OutputRoot, targets_or_noise: Tensor, directions: Tensor) -> Tensor:
        r"""Return $\sqrt{m_n} S_n^\top J_n u_i$ as (n, r, k) for directions (P, k)."""
        features = self.features_of(batch)
        parts = []
        for tangents in directions.split(_TANGENTS, dim=1):
            pushed, outputs = self._pushed(batch.inputs, features, tangents.to(self.like))
            parts.append(root.transposed(outputs, targets_or_noise, pushed))
        return batch.scaled(torch.cat(parts, dim=-1), 0.5)

    def pushed(self, inputs: Inputs, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Return $J_n u_i$ as (n, C, k) for a few tangents (P, k), and the outputs (n, C)."""
        return self._pushed(inputs, self.features(inputs), tangents)

    def _pushed(
        self, inputs: Inputs, features: tuple[Tensor, Tensor] | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.linear_layer is not None and features is not None:
            return self.linear_layer.pushed(features[0], tangents), features[1]
        vmapped = self.capabilities.vmapped_columns and self.linear_layer is None
        return derivatives.columns(self.selection, self.parameters, inputs, tangents, vmapped=vmapped)

    def ready_for_products(self, inputs: Inputs) -> "Network":
        """Return the network with the result of testing `torch.func.linearize` on a few inputs."""
        if self.linear_layer is not None:
            return self
        linear = derivatives.allows_linearization(self.selection, self.parameters, inputs)
        return replace(self, capabilities=replace(self.capabilities, linearized=linear))

    def unlinearized(self) -> "Network":
        """Return the network with products that keep nothing but the batch."""
        return replace(self, capabilities=replace(self.capabilities, linearized=False))

    def products(self, batch: Batch, root: OutputRoot, targets_or_noise: Tensor) -> BatchProducts:
        """Prepare a batch for repeated products with its curvature."""
        features = self.features_of(batch)
        linearized: LinearizedBatch | LinearizedLayer
        if self.linear_layer is None or features is None:
            linearized = self.linearized(batch.inputs)
        else:
            linearized = LinearizedLayer(self.linear_layer, *features)
        return BatchProducts(linearized, batch, targets_or_noise, root)

    def linearized(self, inputs: Inputs) -> LinearizedBatch:
        """Prepare a batch for repeated derivatives along directions and gradients."""
        return LinearizedBatch(self.selection, self.parameters, inputs, self.capabilities)


def _weighted(blocks: Iterable[Tensor], weights: Tensor | None) -> RowBlocks:
    """Scale rows (n, r, P) so that the curvature of each sample has its weight."""
    for rows in blocks:
        yield rows if weights is None else rows * weights.to(rows).sqrt()[:, None, None]


def _chosen_columns(columns: _Columns, chosen: slice, outputs: Tensor, targets_or_noise: Tensor) -> Tensor:
    return columns(outputs, targets_or_noise, chosen)


def _difference_columns(outputs: Tensor, order: Tensor, chosen: slice) -> Tensor:
    """Return cotangents (…, C, r) of the differences to the first output of an order."""
    classes = torch.arange(outputs.shape[-1], device=outputs.device)[:, None]
    others, first = order[..., None, 1:][..., chosen], order[..., None, :1]
    return (classes == others).to(outputs.dtype) - (classes == first).to(outputs.dtype)
