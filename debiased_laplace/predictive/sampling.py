"""Predictions of the network at sampled weights, which are never written to the model."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.network import Network
from debiased_laplace.data.inputs import Inputs


def network_draws(
    network: Network,
    inputs: Inputs,
    weights: Float[Tensor, "S P"],
    model_kwargs: dict[str, Any],
    *,
    create_graph: bool = False,
) -> Float[Tensor, "S n C"]:
    """Compute the network's outputs at each of the sampled weight vectors.

    Args:
        network: provides the model and its selected parameters.
        inputs: a batch.
        weights: sampled parameters.
        model_kwargs: further keyword arguments of the model.
        create_graph: keep the graph, for gradients with respect to the inputs.

    Returns:
        Outputs per draw.
    """
    layer, found = network.linear_layer, None if create_graph else network.features(inputs, model_kwargs)
    if found is not None and layer is not None:
        # the features are the same at every draw
        draws = [layer.outputs(network.selection.unflatten(w), found[0])[:, network.chosen] for w in weights]
        return torch.stack(draws)
    with torch.set_grad_enabled(create_graph):
        draws = [network.selection.call(network.selection.unflatten(w), inputs, model_kwargs) for w in weights]
        return torch.stack(draws)
