"""Check the model, likelihood and samples of a user, and prepare them for differentiation."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.first_pass import checked_outputs, prepare_network
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch

Curvature = Literal["ggn", "ef", "hessian"]


def prepare_network_and_batch(model: nn.Module, likelihood: str | Likelihood, batch: Batch) -> tuple[Network, Batch]:
    """Return the network of all trainable weights, and the batch on its device.

    Raises:
        ValueError: if the model, its weights, the likelihood or the batch cannot be used.
    """
    selection = ParameterSelection.all_weights(model)
    selection.check_finite()
    kind = likelihood_named(likelihood)
    if len(batch) == 0:
        raise ValueError("Expected at least one sample; got an empty batch.")
    batch = differentiable_batch(batch.to(selection.vector().device))
    return prepare_network(selection, kind, batch), batch


def differentiable_batch(batch: Batch) -> Batch:
    """Return the batch with tensors that autograd accepts, copied if they were made in inference mode.

    Raises:
        ValueError: if inputs or targets are not finite.
    """
    batch.check_finite()
    if batch.targets.is_inference() or (isinstance(batch.inputs, Tensor) and batch.inputs.is_inference()):
        return batch.mapped(torch.clone)
    return batch


def check_outputs(network: Network, outputs: Tensor, batch: Batch) -> None:
    """Check that outputs are finite and targets valid for them.

    Raises:
        ValueError: if they are not.
    """
    network.likelihood.check(checked_outputs(outputs, batch), batch.targets)


def load_batches(data: Any, seed: int) -> tuple[int, Iterator[Batch]]:
    """Return the number of samples and an iterator over batches of them.

    Args:
        data: (inputs, targets), a loader over a map-style data set, or a list of batches.
        seed: of the loading.

    Raises:
        ValueError: if data are none of these, are empty, or yield a sample twice.
    """
    if _is_one_batch(data):
        batch = as_batch(data, DEFAULT_KEYS)
        if len(batch) == 0:
            raise ValueError("Expected at least one sample; got an empty batch.")
        return len(batch), iter([batch])
    source = sample_source(data, seed)
    return len(source.indices), iter(SubBatch(source, source.indices, torch.device("cpu"), seed))


def _is_one_batch(data: Any) -> bool:
    """Return whether data are one batch, a tuple of tensors or a mapping, and not a loader or a list of batches."""
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        return isinstance(data, Mapping)
    return isinstance(data[0], Tensor | Mapping) and all(isinstance(t, Tensor) for t in data[1:])
