r"""A last linear layer, whose rows are outer products $s \varphi^\top$ of cotangents s and features.

With features $\varphi$ and outputs $W \varphi + b$, the Jacobian is $I \otimes \varphi^\top$: derivatives need no
backward pass, and a Kronecker basis and the curvature along it not even rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from debiased_laplace.curvature.parameters import ParameterSelection, working_dtype
from debiased_laplace.data.inputs import Inputs
from debiased_laplace.linalg.accumulation import accumulation_dtype


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear layer that computes the network's outputs and has all selected parameters.

    Attributes:
        selection: the parameters.
        layer: the layer.
        parts: "weight" or "bias" for each selected parameter, in order.
    """

    selection: ParameterSelection
    layer: nn.Linear
    parts: tuple[str, ...]

    @classmethod
    def of(
        cls,
        selection: ParameterSelection,
        parameters: Mapping[str, Tensor],
        inputs: Inputs,
        cotangents: Float[Tensor, "C r"],
        rows: Float[Tensor, "n r P"],
    ) -> "LinearLayer | None":
        """Return the layer, if it gives the network's outputs on some inputs; else None.

        Args:
            selection: the parameters.
            parameters: their values.
            inputs: a few.
            cotangents: of each of these inputs.
            rows: of the cotangents, by backward passes.
        """
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
        result = cls(selection, layer, parts)
        found = result.features(parameters, inputs)
        if found is None:
            return None
        features, outputs = found
        # the layer may not be the only use of its weights
        expected = result.rows(features, cotangents.expand(len(features), -1, -1))
        tolerance = 1000 * torch.finfo(rows.dtype).eps * float(rows.abs().max())
        again = result.outputs(parameters, features)
        # the layer itself may be in half precision
        eps = 4 * torch.finfo(layer.weight.dtype).eps if layer.weight.dtype != rows.dtype else 0.0
        same = torch.allclose(again, outputs, rtol=0, atol=eps * float(outputs.abs().max()))
        return result if same and torch.allclose(expected, rows, rtol=max(1e-3, eps), atol=tolerance) else None

    def features(
        self, parameters: Mapping[str, Tensor], inputs: Inputs, model_kwargs: dict[str, Any] | None = None
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n C"]] | None:
        """Return the layer's inputs and the network's outputs; None where the layer does not compute them."""
        return features_of(self.selection, parameters, self.layer, inputs, model_kwargs)

    def outputs(self, parameters: Mapping[str, Tensor], features: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Return the outputs at features."""
        own = dict(zip(self.parts, (parameters[name] for name in self.selection.names), strict=True))
        bias = self.layer.bias
        weight = own.get("weight", self.layer.weight.detach().to(features))
        return linear(features, weight, own.get("bias", None if bias is None else bias.detach().to(features)))

    def rows(self, features: Float[Tensor, "n d"], columns: Float[Tensor, "n C r"]) -> Float[Tensor, "n r P"]:
        r"""Return the rows $s \varphi^\top$ and s of columns s."""
        S = columns.mT
        return torch.cat(
            [(S[..., None] * features[:, None, None, :]).flatten(2) if part == "weight" else S for part in self.parts],
            dim=-1,
        )

    def squared_lengths(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        r"""Return the squared norms of rows of cotangents with norm 1, $\|\varphi\|^2$ and 1 for a bias."""
        lengths = features.to(accumulation_dtype(features)).square().sum(1)
        return sum((lengths if p == "weight" else torch.ones_like(lengths) for p in self.parts), lengths.new_zeros(()))

    def pushed(self, features: Float[Tensor, "n d"], tangents: Float[Tensor, "P k"]) -> Float[Tensor, "n C k"]:
        """Return directional derivatives of the outputs."""
        k, pushed = tangents.shape[1], features.new_zeros(())
        for part, tangent in zip(self.parts, tangents.split(self.selection.sizes), strict=True):
            if part == "weight":
                pushed = pushed + (tangent.unflatten(0, (-1, features.shape[1])).mT @ features.mT).permute(2, 0, 1)
            else:
                pushed = pushed + tangent
        return pushed.expand(len(features), -1, k)

    def pulled(self, features: Float[Tensor, "n d"], cotangents: Float[Tensor, "n C"]) -> Float[Tensor, " P"]:
        """Return the sum over samples of the cotangents' rows."""
        parts = [(cotangents.T @ features).flatten() if p == "weight" else cotangents.sum(0) for p in self.parts]
        return torch.cat(parts)


def features_of(
    selection: ParameterSelection,
    parameters: Mapping[str, Tensor],
    layer: nn.Linear,
    inputs: Inputs,
    model_kwargs: dict[str, Any] | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n C"]] | None:
    """Return the inputs of a layer and the network's outputs.

    None if the layer is not called exactly once, with one vector for each sample, or the outputs are others than its.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(
        lambda module, arguments, named, output: seen.append((arguments or (named["input"],)) + (output,)),  # noqa: ARG005
        with_kwargs=True,
    )
    try:
        with torch.no_grad():
            outputs = selection.call(dict(parameters), inputs, model_kwargs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][0].ndim != 2 or len(seen[0][0]) != len(outputs):
        return None
    features, own = (x.detach().to(working_dtype(x.dtype)) for x in seen[0])
    return (features, outputs) if own.dtype == outputs.dtype and torch.equal(own, outputs) else None


def output_layer(selection: ParameterSelection, parameters: Mapping[str, Tensor], inputs: Inputs) -> nn.Linear | None:
    """Return the linear layer that computes the outputs, called once with one vector for each sample; None without."""
    called: list[nn.Linear] = []
    handles = [
        module.register_forward_hook(lambda m, arguments, output: called.append(m))  # noqa: ARG005
        for module in selection.model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            selection.call(dict(parameters), inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = features_of(selection, parameters, called[-1], inputs) if called else None
    return None if found is None else called[-1]
