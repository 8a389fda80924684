"""From a loader to a curvature estimate: the one path that every structure, subset and backend takes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.likelihoods import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.curvature.subsets import WeightSubset
from debiased_laplace.curvature.survey import Survey, meet_network, survey
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.source import SampleSource, root_length
from debiased_laplace.data.splitting import SubBatches
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.choice import Choice, Weighting, choose
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.options import CurvatureEstimate, EstimatorOptions, Request, SplitCurvature
from debiased_laplace.debiasing.stopping import Stopping
from debiased_laplace.errors import RepeatedSamplesError
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.posterior.split_options import SplitOptions


@dataclass(frozen=True, eq=False)
class Problem:
    """What a posterior is of, as the user gave it.

    Attributes:
        model: never written to.
        likelihood: of the outputs.
        subset: which weights.
        backend: which curvature, and whose derivatives.
        keys: where a mapping holds what.
    """

    model: nn.Module
    likelihood: Likelihood
    subset: WeightSubset
    backend: BackendChoice
    keys: MappingKeys


@dataclass(frozen=True, eq=False)
class Fit:
    """Everything that a fit found out.

    Attributes:
        split: which samples did what.
        identities: of the samples used.
        estimate: the curvature.
        loss: n_data / n_used times the summed loss of the samples used, in nats.
        n_outputs: C.
        options: of the estimate, as asked for or as chosen.
        network: at the weights that were fitted; None after loading from a state.
        choice: what was chosen among; None where nothing was open, and after loading from a state.
        pool: the samples that loaders have yielded; None after loading from a state.
        stopping: how many samples were enough; None where that was not asked, and after loading from a state.
        seconds: wall time of the fit; None after loading from a state.
    """

    split: SubBatches
    identities: SampleIdentities
    estimate: CurvatureEstimate
    loss: float
    n_outputs: int
    options: EstimatorOptions
    network: Network | None
    choice: Choice | None = None
    pool: Pool | None = None
    stopping: Stopping | None = None
    seconds: float | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be estimated, and how.

    Attributes:
        problem: model, likelihood, weights, curvature.
        split_options: which samples do what.
        request: of the estimator, with what is left open.
        weighting_of: prior and likelihood of the posterior, given its parameters and N, by which to choose.
    """

    problem: Problem
    split_options: SplitOptions
    request: Request
    weighting_of: Callable[[ParameterSelection, int], Weighting]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fit, and what it was made from.

    Attributes:
        selection: the parameters.
        fit: of the samples.
        network: with the backend's derivatives.
        some: samples that the network was met with.
        curvatures: of all samples used.
    """

    selection: ParameterSelection
    fit: Fit
    network: Network
    some: Batch
    curvatures: list[SubBatchCurvature]


def fit_curvature(task: Task, source: SampleSource, *, n_data: int, progress_bar: bool) -> Fitted:
    """Split, look at the samples once, choose what is open, then directions and magnitudes.

    Args:
        task: what is to be estimated.
        source: the samples.
        n_data: size of the data set that the likelihood stands for.
        progress_bar: show progress.

    Returns:
        The fit; the model is as it was.

    Raises:
        ValueError: if weights, loader, samples or amounts cannot be used; before any long work.
    """
    problem, split_options, request = task.problem, task.split_options, task.request
    seed = split_options.seed
    split = split_options.draw(source.indices, request, n_data)
    with at_weights(problem.model, seed):
        # the biased way alone has no sets of samples to keep apart
        biased = request.options.magnitudes == "same_batch" and not request.open
        network, some = _meet(problem, source, split, seed, request.options)
        augmented = source.augments(seed)
        surveys = [
            look_at(network, source, indices, seed, keep=first, progress_bar=progress_bar)
            for first, indices in _sets(split)
        ]
        identities = _identities(source, split, surveys, augmented=augmented, tolerates_repeats=biased)
        samples = [found.samples for found in surveys]
        curvatures = curvatures_of(problem, network, some, samples, seed, progress_bar=progress_bar)
        options, choice = request.options, None
        if request.open:
            choice, split, curvatures = _chosen(task, source, split, curvatures[0], n_data)
            options = choice.chosen.options
        roles = SplitCurvature(curvatures[0], None if split.shared else curvatures[1], split.folds, split.n_data)
        with warnings.catch_warnings():
            if "rank" in request.open:
                # nobody has asked for it
                warnings.filterwarnings("ignore", r"rank=\d+ was asked for|All directions of", UserWarning)
            estimated = estimate(roles, options)
        if choice is not None and "rank" in request.open:
            choice = choice.found(estimated.curvature.directions.shape[1])
            options = choice.chosen.options
    loss = sum(found.loss for found in surveys) * split.n_data / split.n_samples
    # a backend's copies of the model have done their work: they are large, and some cannot be pickled
    known = replace(network, foreign=None)
    fit = Fit(split, identities, estimated, loss, network.n_outputs, options, known, choice)
    return Fitted(network.selection, fit, network, some, curvatures)


def _chosen(
    task: Task, source: SampleSource, union: SubBatches, curvature: SubBatchCurvature, n_data: int
) -> tuple[Choice, SubBatches, list[SubBatchCurvature]]:
    """What is chosen for the curvature of all samples, how it splits them, and the curvature of each set."""
    split_options, request = task.split_options, task.request
    weighting = task.weighting_of(curvature.network.selection, union.n_data)
    largest_rank = min(curvature.n_rows, curvature.network.n_parameters)
    trials = request.trials(split_options.direction_share(len(source.indices)), largest_rank)
    choice = choose(curvature, trials, weighting, n_data=union.n_data, seed=split_options.seed)
    chosen = choice.chosen
    split = split_options.draw(source.indices, Request(chosen.options), n_data, chosen.direction_share)
    positions = union.direction_indices
    parts = [curvature.part(torch.searchsorted(positions, indices)) for _, indices in _sets(split)]
    for part in parts:
        part.progress_bar = curvature.progress_bar
    return choice, split, parts


def look_at(
    network: Network,
    source: SampleSource,
    indices: Tensor,
    seed: int,
    *,
    keep: bool = False,
    progress_bar: bool = False,
) -> Survey:
    """The samples at some positions, looked at once."""
    samples = SubBatch(source, indices, network.like.device, seed)
    return survey(network, samples, keep=keep, progress_bar=progress_bar)


def _sets(split: SubBatches) -> list[tuple[bool, Tensor]]:
    """The sets of samples to look at; the first is gone through many times."""
    if split.shared:
        return [(True, split.direction_indices)]
    return [(True, split.direction_indices), (False, split.magnitude_indices)]


def _meet(
    problem: Problem, source: SampleSource, split: SubBatches, seed: int, options: EstimatorOptions
) -> tuple[Network, Batch]:
    """The network, with the backend's derivatives where they are right, and some samples."""
    device = next(problem.model.parameters()).device
    some = next(iter(SubBatch(source, split.direction_indices[:8], device, seed)))
    selection = problem.subset.select_by(problem.model, some.inputs)
    network = meet_network(selection, problem.likelihood, some)
    uses_kfac = options.structure == "kron" and options.kron_basis == "kfac"
    kfac = options.kfac_approx if uses_kfac else None
    return problem.backend.attached(network, some, problem.keys, kfac=kfac), some


def curvatures_of(
    problem: Problem,
    network: Network,
    some: Batch,
    sets: list[SubBatch],
    seed: int,
    *,
    progress_bar: bool = False,
    n_before: int = 0,
) -> list[SubBatchCurvature]:
    """The curvature of each set of samples; `n_before` sets with draws of their own came before them."""
    root = problem.backend.root(network.likelihood)
    if root is None:
        second = SecondDerivatives(network.selection, network.parameters, network.likelihood, some)
        return [HessianCurvature(network, samples, second, progress_bar=progress_bar) for samples in sets]
    # draws of a Monte-Carlo curvature differ between the sets of samples, and between a set and its redrawn self
    return [
        RowCurvature(network, samples, root, seed=_seed_of_draws(seed, i), progress_bar=progress_bar)
        for i, samples in enumerate(sets, n_before)
    ]


def _seed_of_draws(seed: int, i: int) -> int:
    return (seed * 1_000_003 + 2 * i) % 2**62


def _identities(
    source: SampleSource, split: SubBatches, surveys: list[Survey], *, augmented: bool, tolerates_repeats: bool
) -> SampleIdentities:
    """By what the used samples are known.

    Raises:
        RepeatedSamplesError: if samples of a split have the same input and target.
    """
    root, positions = source.root()
    hashes = torch.cat([found.hashes for found in surveys])
    identities = SampleIdentities(hashes, positions[split.used_indices], root_length(root, positions), augmented, root)
    if identities.n_repeated and not tolerates_repeats:
        positions, order = split.used_indices.sort()
        raise RepeatedSamplesError(positions[_repeats(hashes[order])])
    return identities


def _repeats(hashes: Tensor) -> Tensor:
    """Mask of the samples that an earlier one equals."""
    order = hashes.argsort(stable=True)
    repeated = torch.zeros(len(hashes), dtype=torch.bool)
    repeated[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return repeated
