"""What the user gives: a model, a likelihood and samples, made ready to be differentiated."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.survey import checked_outputs, meet_network
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch

Curvature = Literal["ggn", "ef", "hessian"]
_CURVATURES = ("ggn", "ef", "hessian")


def met(model: nn.Module, likelihood: str, batch: Batch) -> tuple[Network, Batch]:
    """The network of all trainable weights, and a batch of its samples where the model is.

    Raises:
        ValueError: if model, likelihood, weights or batch cannot be used.
    """
    selection = ParameterSelection.all_weights(model)
    selection.check_finite()
    if not isinstance(likelihood, str):
        raise ValueError(f"Expected likelihood as a string; got {likelihood!r}.")
    kind = likelihood_named(likelihood)
    if len(batch) == 0:
        raise ValueError("The batch has no samples.")
    batch = usable(batch.to(selection.vector().device))
    return meet_network(selection, kind, batch), batch


def usable(batch: Batch) -> Batch:
    """A batch whose tensors may be differentiated through, even where they were made in inference mode."""
    batch.check_finite()
    if batch.targets.is_inference() or (isinstance(batch.inputs, Tensor) and batch.inputs.is_inference()):
        inputs = batch.inputs.clone() if isinstance(batch.inputs, Tensor) else batch.inputs
        return Batch(inputs, batch.targets.clone())
    return batch


def check_outputs(network: Network, outputs: Tensor, batch: Batch) -> None:
    """Refuse outputs that are not finite, and targets that do not fit them.

    Raises:
        ValueError: if they do not.
    """
    network.likelihood.check(checked_outputs(outputs, batch), batch.targets)


def check_curvature(curvature: str) -> None:
    """Refuse what is no curvature.

    Raises:
        ValueError: naming those that are.
    """
    if curvature not in _CURVATURES:
        raise ValueError(f"curvature must be one of {list(_CURVATURES)}; got {curvature!r}.")


def is_one_batch(data: Any) -> bool:
    """Whether data are a pair of inputs and targets, and no loader."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return isinstance(data, Mapping)
    return isinstance(data[0], Tensor | Mapping) and isinstance(data[1], Tensor)


def batches_of(data: Any, seed: int) -> tuple[int, Iterator[Batch]]:
    """The number of samples, and batches of them, where the data are.

    Args:
        data: (inputs, targets), a loader over a map-style data set, or a list of batches.
        seed: of the loading.

    Raises:
        ValueError: if it is none of these, is empty, or yields a sample twice.
    """
    if is_one_batch(data):
        batch = as_batch(data, DEFAULT_KEYS)
        if len(batch) == 0:
            raise ValueError("The batch has no samples.")
        return len(batch), iter([batch])
    source = sample_source(data, seed)
    return len(source.indices), iter(SubBatch(source, source.indices, torch.device("cpu"), seed))
