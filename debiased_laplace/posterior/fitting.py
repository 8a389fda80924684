"""From a loader to a curvature estimate: the one path that every structure takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.ggn import SubBatchCurvature
from debiased_laplace.curvature.likelihoods import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.survey import Survey, meet_network, survey
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.samples import Samples
from debiased_laplace.data.source import SampleSource, root_length, sample_source
from debiased_laplace.data.splitting import Amount, SubBatches, draw_sub_batches
from debiased_laplace.debiasing.estimate import (
    CurvatureEstimate,
    EstimatorOptions,
    estimate_held_out,
    estimate_same_batch,
)
from debiased_laplace.errors import RepeatedSamplesError


@dataclass(frozen=True)
class SplitOptions:
    """How the samples are divided; the names are those of the public constructor."""

    direction_samples: Amount
    magnitude_samples: Amount | None
    seed: int


@dataclass(frozen=True, eq=False)
class Fit:
    """Everything that a fit found out.

    Attributes:
        split: which samples did what.
        identities: of the samples used.
        estimate: the curvature.
        loss: n_data / n_used times the summed loss of the samples used, in nats.
        n_outputs: C.
        network: at the weights that were fitted; None after loading from a state.
    """

    split: SubBatches
    identities: SampleIdentities
    estimate: CurvatureEstimate
    loss: float
    n_outputs: int
    network: Network | None


def fit_curvature(
    selection: ParameterSelection,
    likelihood: Likelihood,
    loader: object,
    *,
    split_options: SplitOptions,
    options: EstimatorOptions,
    n_data: int | None,
    progress_bar: bool,
) -> Fit:
    """Split, look at the samples once, then directions and magnitudes.

    Args:
        selection: the parameters that the posterior is over.
        likelihood: of the outputs.
        loader: of training samples.
        split_options: which samples do what.
        options: of the estimator.
        n_data: size of the data set that the likelihood stands for; None: the samples given.
        progress_bar: show progress.

    Returns:
        The fit; the model is as it was.

    Raises:
        ValueError: if weights, loader, samples or amounts cannot be used; before any long work.
    """
    selection.check_finite()
    seed = split_options.seed
    source = sample_source(loader, seed)
    split = draw_sub_batches(
        source.indices,
        direction_samples=split_options.direction_samples,
        magnitude_samples=split_options.magnitude_samples,
        shared=options.magnitudes == "same_batch",
        n_data=n_data,
        seed=seed,
    )
    model = selection.model
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        differentiable_kernels(model),
        undisturbed_randomness(seed),
    ):
        network = _meet(selection, likelihood, source, split, seed)
        augmented = source.augments(seed)
        surveys = [
            survey(
                network,
                Samples(source, indices, network.like.device, seed),
                keep=first,
                progress_bar=progress_bar,
            )
            for first, indices in _sets(split)
        ]
        identities = _identities(source, split, surveys, augmented=augmented)
        curvatures = [SubBatchCurvature(network, found.samples, progress_bar=progress_bar) for found in surveys]
        if split.shared:
            estimate = estimate_same_batch(curvatures[0], split.n_data, options)
        else:
            estimate = estimate_held_out(curvatures[0], curvatures[1], split.n_data, options)
    loss = sum(found.loss for found in surveys) * split.n_data / split.n_samples
    return Fit(split, identities, estimate, loss, network.n_outputs, network)


def _sets(split: SubBatches) -> list[tuple[bool, Tensor]]:
    """The sets of samples to look at; the first is gone through many times."""
    if split.shared:
        return [(True, split.direction_indices)]
    return [(True, split.direction_indices), (False, split.magnitude_indices)]


def _meet(
    selection: ParameterSelection,
    likelihood: Likelihood,
    source: SampleSource,
    split: SubBatches,
    seed: int,
) -> Network:
    device = selection.vector().device
    some = Samples(source, split.direction_indices[:8], device, seed)
    return meet_network(selection, likelihood, next(iter(some)))


def _identities(source: SampleSource, split: SubBatches, surveys: list[Survey], *, augmented: bool) -> SampleIdentities:
    """By what the used samples are known.

    Raises:
        RepeatedSamplesError: if samples of a split have the same input and target.
    """
    root, positions = source.root()
    hashes = torch.cat([found.hashes for found in surveys])
    identities = SampleIdentities(hashes, positions[split.used_indices], root_length(root, positions), augmented, root)
    if identities.n_repeated and not split.shared:
        positions, order = split.used_indices.sort()
        raise RepeatedSamplesError(positions[_repeats(hashes[order])])
    return identities


def _repeats(hashes: Tensor) -> Tensor:
    """Mask of the samples that an earlier one equals."""
    order = hashes.argsort(stable=True)
    repeated = torch.zeros(len(hashes), dtype=torch.bool)
    repeated[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return repeated
