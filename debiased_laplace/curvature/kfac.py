r"""K-FAC's factors: second moments of a layer's inputs and of the gradients at its outputs.

If a layer's weights act at several positions of a sample (sequences, images), "expand" treats every position as a
sample, and "reduce" first averages inputs and sums gradients over positions.

References:
    Martens & Grosse (2015), arXiv 1503.05671; Grosse & Martens (2016), arXiv 1602.01407 (convolutions); Eschenhagen,
    Immer, Turner, Schneider & Hennig (2023), arXiv 2311.00636 (expand and reduce).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.kfac_layers import kfac_layers, positions_of_inputs, positions_of_outputs
from debiased_laplace.curvature.kronecker import KroneckerFactors
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype

KfacApproximation = Literal["expand", "reduce"]

_BATCH = 64  # samples whose layer inputs are in memory at once


class KfacSums:
    """Running sums of K-FAC's factors over batches."""

    def __init__(self, network: Network, root: OutputRoot, approximation: KfacApproximation):
        self.network, self.root, self.approximation = network, root, approximation
        self.n = 0
        layers = kfac_layers(network.selection.model)
        own = set(network.selection.names)
        ids = {id(p): name for name, p in network.selection.model.named_parameters()}
        self._weights: dict[str, str] = {}
        self._biases: dict[str, str] = {}
        for name, layer in layers.items():
            if ids[id(layer.weight)] in own:
                self._weights[name] = ids[id(layer.weight)]
            if layer.bias is not None and ids[id(layer.bias)] in own:
                self._biases[name] = ids[id(layer.bias)]
        self._layers = {name: layers[name] for name in {**self._weights, **self._biases}}
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._positions: dict[str, float] = {}
        # layers whose inputs do not separate samples, or that get no gradient
        self._unsupported: set[str] = set()

    def add(self, batch: Batch, targets_or_noise: Tensor) -> None:
        """Add the samples of a batch."""
        for chunk, part in zip(batch.chunks(_BATCH), targets_or_noise.split(_BATCH), strict=True):
            self._add(chunk, part)

    def factors(self) -> dict[str, KroneckerFactors]:
        """Return the factors by parameter name, as means over samples."""
        factors: dict[str, KroneckerFactors] = {}
        for layer, G in self._gradients.items():
            if layer in self._unsupported:
                continue
            G = G / self.n
            if layer in self._weights:
                A = self._inputs[layer] / (self._positions[layer] or 1)
                factors[self._weights[layer]] = KroneckerFactors(G, A)
            if layer in self._biases:
                factors[self._biases[layer]] = KroneckerFactors(G, G.new_ones(1))
        return factors

    def _add(self, batch: Batch, targets_or_noise: Tensor) -> None:
        seen: list[tuple[str, Tensor]] = []
        weights = batch.weights

        def note(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Any:
                a = (arguments[0] if arguments else named["input"]).detach()
                if not output.requires_grad or not self._separates_samples(module, a, output, batch):
                    self._unsupported.add(name)
                    return output
                self._add_inputs(name, a, weights)
                seen.append((name, output))
                # the next layer may work in place, and would overwrite this output
                return output.clone()

            return hook

        handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in self._layers.items()]
        leaves = {name: p.detach().requires_grad_() for name, p in self.network.parameters.items()}
        try:
            with torch.enable_grad():
                outputs = self.network.selection.call(leaves, batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.n += len(batch)
        if not seen:
            return
        at = [output for _, output in seen]
        S = batch.scaled(self.root.columns(outputs.detach(), targets_or_noise, slice(None)), 0.5)
        for cotangent in S.unbind(-1):
            gradients = torch.autograd.grad(outputs, at, cotangent, retain_graph=True, materialize_grads=True)
            for (name, _), g in zip(seen, gradients, strict=True):
                G = positions_of_outputs(self._layers[name], g)
                G = G.sum(1, keepdim=True) if self.approximation == "reduce" else G
                _accumulate(self._gradients, name, G)

    def _separates_samples(self, layer: nn.Module, a: Tensor, output: Tensor, batch: Batch) -> bool:
        """Return whether a layer's inputs separate samples from positions, as far as the approximation requires."""
        dimensions = {nn.Conv1d: 3, nn.Conv2d: 4}
        expected = next((d for kind, d in dimensions.items() if isinstance(layer, kind)), None)
        if a.ndim < 2 or (expected is not None and a.ndim != expected):
            return False
        n = len(batch)
        if self.approximation == "reduce" or batch.weights is not None:
            return len(a) == n == len(output)
        # every position counts as a sample; only inputs that all samples share are not supported
        positions = a.shape[0] if expected is not None else a.shape[:-1].numel()
        return positions % n == 0

    def _add_inputs(self, name: str, a: Tensor, weights: Tensor | None) -> None:
        A = positions_of_inputs(self._layers[name], a)
        A = A.mean(1, keepdim=True) if self.approximation == "reduce" else A
        n_positions = float(A.shape[0] * A.shape[1])
        if weights is not None:
            A, n_positions = A * weights.to(A).sqrt()[:, None, None], float(weights.sum()) * A.shape[1]
        self._positions[name] = self._positions.get(name, 0.0) + n_positions
        _accumulate(self._inputs, name, A)


def _accumulate(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    x = x.flatten(0, 1).to(accumulation_dtype(x))
    sums[name] = x.T @ x if name not in sums else sums[name] + x.T @ x
