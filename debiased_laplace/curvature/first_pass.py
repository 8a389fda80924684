"""The first pass over the samples, which checks and identifies them and sums their losses before any long work."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.classification import LOGITS_NEEDED, are_probabilities
from debiased_laplace.curvature.derivatives import find_capabilities, is_large_network
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.memory import KEEP_BYTES
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection, rounding_of
from debiased_laplace.curvature.positions import OutputLayout, PositionWise, flattened
from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype


@dataclass(frozen=True, eq=False)
class FirstPass:
    """Result of the first pass over a set of samples.

    Attributes:
        samples: the samples, held in memory if they are few or `keep` was set.
        hashes: hash of each sample.
        loss: sum of the weighted losses, in nats.
        weights: weight of each sample, on the CPU; None if all are 1.
    """

    samples: SubBatch
    hashes: Int64[Tensor, " n"]
    loss: float
    weights: Float[Tensor, " n"] | None


def first_pass(network: Network, samples: SubBatch, *, keep: bool, progress_bar: bool) -> FirstPass:
    """Run one forward pass over the samples to check them and to compute their hashes and loss.

    Args:
        network: the network.
        samples: the samples.
        keep: hold the batches in memory whatever their size.
        progress_bar: show progress.

    Raises:
        ValueError: if inputs, targets or outputs are not finite, or targets do not fit.
    """
    hashes: list[Tensor] = []
    weights: list[Tensor] = []
    kept: list[Batch] = []
    size = 0
    loss = torch.zeros((), dtype=accumulation_dtype(network.like), device=network.like.device)
    with tqdm(total=len(samples), disable=not progress_bar, desc="[Reading samples]") as bar:
        for batch in samples:
            batch.check_finite()
            found = network.features(batch.inputs)
            outputs = checked_outputs(network.outputs(batch.inputs) if found is None else found[1], batch)
            network.likelihood.check(outputs, batch.targets)
            weighted = with_target_weights(batch, network.likelihood)
            if weighted.weights is None:
                loss += network.likelihood.loss(outputs, batch.targets)
            else:
                loss += weighted.scaled(network.likelihood.per_sample_loss(outputs, batch.targets)).sum()
                weights.append(weighted.weights.cpu().double())
            hashes.append(sample_hashes(batch))
            batch = batch if found is None else replace(batch, features=found[0])
            size += batch.n_bytes
            kept = [*kept, batch] if keep or size <= KEEP_BYTES else []
            bar.update(len(batch))
    if keep or size <= KEEP_BYTES:
        samples = samples.keeping(kept)
    return FirstPass(samples, torch.cat(hashes), float(loss), torch.cat(weights) if weights else None)


def with_target_weights(batch: Batch, likelihood: Likelihood) -> Batch:
    """Return the samples with their weights times those that the likelihood gives to their targets."""
    of_targets = likelihood.weights(batch.targets)
    if of_targets is None:
        return batch
    return batch.weighted(batch.scaled(of_targets))


def prepare_network(
    selection: ParameterSelection, likelihood: Likelihood, batch: Batch, memory: int | None = None
) -> Network:
    """Evaluate the model on a first batch, and test how it can be differentiated.

    Args:
        selection: the parameters.
        likelihood: likelihood of the outputs.
        batch: at least one sample, on the model's device.
        memory: see `Network`.

    Returns:
        The network.

    Raises:
        ValueError: if the model cannot be evaluated or differentiated on it, its outputs do not have the shape (n, C)
            or differ for the same inputs, those of a classifier are probabilities, or a sample's output depends on the
            other samples of the batch.
    """
    batch.check_finite()
    parameters = selection.current()
    few = batch.first(2 if is_large_network(selection.model) else 8)
    with torch.no_grad():
        returned = selection.evaluated(parameters, few.inputs)
        layout = OutputLayout.of(returned)
        likelihood = PositionWise.of(likelihood, layout)
        outputs = checked_outputs(flattened(returned), few)
        likelihood.check(outputs, few.targets)
        by_position = outputs if layout is None else outputs.reshape(-1, layout.n_classes)
        if likelihood.name == "classification" and are_probabilities(by_position):
            raise ValueError(f"The model's outputs are probabilities; {LOGITS_NEEDED}.")
        if likelihood.name == "binary" and _ends_with_a_sigmoid(selection, parameters, few.first(1)):
            raise ValueError(
                "The model's outputs are probabilities: it ends with a sigmoid. Expected logits, of which the sigmoid "
                "is taken: remove the model's last sigmoid."
            )
        again = selection.call(parameters, few.inputs)
        single = evaluated(selection, parameters, few.first(1))
    scale = float(outputs.abs().max())
    if not torch.allclose(outputs, again, rtol=1e-4, atol=1e-5 * scale):
        raise ValueError(
            "The model gives different outputs for the same inputs in evaluation mode (a random layer "
            "that does not respect eval()?); expected a deterministic network."
        )
    rounding = max(1e-3, 10 * rounding_of(selection.model))
    if not torch.allclose(outputs[:1], single, rtol=rounding, atol=rounding * scale):
        raise ValueError(
            "The output of a sample depends on the other samples of its batch; expected samples along "
            "the first dimension, each on its own (batch_first=True for attention and recurrent layers)."
        )
    capabilities = find_capabilities(selection, parameters, batch.first(3).inputs)
    parameters = {name: p.clone() for name, p in parameters.items()}
    return Network(selection, parameters, likelihood, outputs.shape[1], capabilities, memory=memory)


def _ends_with_a_sigmoid(selection: ParameterSelection, parameters: dict[str, Tensor], batch: Batch) -> bool:
    """Return whether the last function of the graph is a sigmoid, apart from those that change the shape alone."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        node = selection.evaluated(leaves, batch.inputs).grad_fn
    while node is not None and node.name().startswith(_OF_SHAPE):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("SigmoidBackward")


_OF_SHAPE = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Permute",
    "TBackward",
    "ToCopy",
    "Alias",
)
"""Beginnings of the names of functions that change no value."""


def evaluated(selection: ParameterSelection, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the outputs (n, C) of the model on a batch.

    Raises:
        ValueError: if the model cannot be evaluated, or the outputs are not finite or have another shape.
    """
    return checked_outputs(flattened(selection.evaluated(parameters, batch.inputs)), batch)


def checked_outputs(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the outputs, if they are finite and of shape (n, C).

    Raises:
        ValueError: otherwise.
    """
    if outputs.ndim != 2 or len(outputs) != len(batch):
        raise ValueError(
            f"Expected model outputs of shape ({len(batch)}, outputs) for {len(batch)} samples; got "
            f"{tuple(outputs.shape)}."
        )
    if not bool(outputs.isfinite().all()):
        raise ValueError("The model's outputs are NaN or infinite on some samples.")
    return outputs
