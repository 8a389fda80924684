"""Layers that K-FAC supports, and their inputs and output gradients as samples and positions."""

from torch import Tensor, nn
from torch.nn.functional import pad, unfold

KfacLayer = nn.Linear | nn.Conv1d | nn.Conv2d


def kfac_layers(model: nn.Module) -> dict[str, KfacLayer]:
    """Return the layers that K-FAC supports, by name; their weights are used in one place only."""
    places: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                places[id(p)] = places.get(id(p), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        and places.get(id(module.weight)) == 1
        and (isinstance(module, nn.Linear) or (module.groups == 1 and module.padding_mode == "zeros"))
    }


def positions_of_inputs(layer: KfacLayer, a: Tensor) -> Tensor:
    """Return a layer's inputs as (samples, positions, columns of its weight matrix)."""
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    before_and_after = layer._reversed_padding_repeated_twice
    a = pad(a, before_and_after)
    if isinstance(layer, nn.Conv1d):
        a = a[:, :, None]
        kernel, dilation, stride = ((1, *layer.kernel_size), (1, *layer.dilation), (1, *layer.stride))
    else:
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    return unfold(a, kernel, dilation=dilation, stride=stride).mT


def positions_of_outputs(layer: KfacLayer, g: Tensor) -> Tensor:
    """Return gradients at a layer's outputs as (samples, positions, rows of its weight matrix)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1])
    return g.flatten(2).mT
