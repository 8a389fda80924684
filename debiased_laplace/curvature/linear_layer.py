r"""Rows with respect to a last linear layer, which are outer products $s \varphi^\top$ for columns s of the root.

With features $\varphi$ and outputs $W \varphi + b$, the Jacobian is $I \otimes \varphi^\top$ and is never formed: a
Kronecker basis and the curvature along it need the root of the outputs' curvature and the features only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.data.inputs import Inputs


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear layer that computes the network's outputs and has all selected parameters.

    Attributes:
        network: the network.
        layer: the layer.
        parts: "weight" or "bias" for each selected parameter, in order.
    """

    network: Network
    layer: nn.Linear
    parts: tuple[str, ...]

    @classmethod
    def of(cls, network: Network, inputs: Inputs) -> "LinearLayer | None":
        """Return the layer, if the selection is one that gives the network's outputs on these inputs; else None."""
        selection = network.selection
        if selection.last_layer is None or any(entries is not None for entries in selection.entries):
            return None
        layer = dict(selection.model.named_modules()).get(selection.last_layer)
        if type(layer) is not nn.Linear:
            return None
        names = {id(p): local for local, p in layer.named_parameters(recurse=False)}
        own = {name: names.get(id(p)) for name, p in selection.model.named_parameters() if name in selection.names}
        parts = tuple(own[name] or "" for name in selection.names)
        if "" in parts:
            return None
        result = cls(network, layer, parts)
        try:
            features, outputs = result.features(inputs)
        except ValueError:
            return None
        return result if torch.equal(result._applied(features), outputs) and result._has_all_uses(inputs) else None

    def features(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the layer's inputs (n, d) and the outputs (n, C).

        Raises:
            ValueError: if the layer is not called exactly once, with one vector for each sample.
        """
        return features_of(self.network, self.layer, inputs)

    def root_columns(self, outputs: Tensor, root: OutputRoot, targets_or_noise: Tensor) -> Iterator[Tensor]:
        """Yield columns of the root (n, C, r), in blocks that bound the memory."""
        r = root.n_columns(self.network.n_outputs)
        step = max(1, CHUNK_BYTES // (outputs.numel() * outputs.element_size()))
        for start in range(0, r, step):
            yield root.columns(outputs, targets_or_noise, slice(start, min(start + step, r)))

    def _has_all_uses(self, inputs: Inputs) -> bool:
        """Return whether the layer is the only use of its weights, by comparing gradients."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.network.parameters.items()}
        features, outputs = self.features(inputs)
        generator = torch.Generator().manual_seed(0)
        cotangents = torch.randn(outputs.shape, generator=generator).to(outputs)
        with torch.enable_grad():
            loss = (self.network.selection.call(leaves, inputs) * cotangents).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        expected = {"weight": cotangents.T @ features, "bias": cotangents.sum(0)}
        return all(
            torch.allclose(g, expected[part], rtol=1e-3, atol=1e-4 * float(expected[part].abs().max()))
            for g, part in zip(gradients, self.parts, strict=True)
        )

    def _applied(self, features: Tensor) -> Tensor:
        """Return the layer's outputs for these features."""
        with torch.no_grad():
            return self.layer(features)


def features_of(network: Network, layer: nn.Linear, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the inputs (n, d) of a layer and the network's outputs (n, C).

    Raises:
        ValueError: if the layer is not called exactly once, with one vector for each sample.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append((arguments or (named["input"],))[0].detach()),  # noqa: ARG005
        with_kwargs=True,
    )
    try:
        outputs = network.outputs(inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != len(outputs):
        raise ValueError("Expected a layer that is called once, with one vector for each sample.")
    return seen[0], outputs


def output_layer(network: Network, inputs: Inputs) -> nn.Linear | None:
    """Return the linear layer that computes the outputs, called once with one vector for each sample; None without."""
    called: list[tuple[nn.Linear, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, arguments, output: called.append((m, output)))  # noqa: ARG005
        for module in network.selection.model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        outputs = network.outputs(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not called or called[-1][1].shape != outputs.shape or not torch.equal(called[-1][1], outputs):
        return None
    try:
        features_of(network, called[-1][0], inputs)
    except ValueError:
        return None
    return called[-1][0]
