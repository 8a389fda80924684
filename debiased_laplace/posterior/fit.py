"""Fit of a posterior: from a loader to the curvature estimate, one path for every structure, subset and backend."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.drawn_rows import DrawnRows
from debiased_laplace.curvature.first_pass import FirstPass, first_pass, prepare_network
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.positions import OutputLayout
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.curvature.subsets import WeightSubset
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.drawing import Rows
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.source import SampleSource, root_length
from debiased_laplace.data.splitting import Amount, SubBatches, draw_sub_batches
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.choice import Choice, Weighting, choose
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.memory import leaving_room
from debiased_laplace.debiasing.options import EstimatorOptions, Request
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.debiasing.stopping import Stopping
from debiased_laplace.fit_checkpoint import NO_CHECKPOINT, FitCheckpoint
from debiased_laplace.linalg.shard import Shard
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.processes import ALONE, Processes

WeightingOf = Callable[[ParameterSelection, int | float], Weighting]
"""Prior and likelihood weight of the posterior, given its parameters and N."""


@dataclass(frozen=True)
class SplitOptions:
    """Division of the samples into direction and magnitude samples, with the names of the public constructor.

    Attributes:
        direction_samples: a number of samples, or a share of them below 1.
        magnitude_samples: likewise; None for all the rest.
        seed: of the draw.

    Raises:
        ValueError: if an amount is out of range, as far as that is known without the samples.
    """

    direction_samples: Amount
    magnitude_samples: Amount | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("direction_samples", "magnitude_samples"):
            amount = getattr(self, name)
            if amount is None and name == "magnitude_samples":
                continue
            whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
            if not whole and not (isinstance(amount, float) and 0 < amount < 1):
                raise ValueError(
                    f"{name} is a number of samples (int, at least 1) or a share of them (float, below 1); got "
                    f"{amount!r}."
                )

    def draw(
        self, indices: Tensor, request: Request, n_data: int | None, direction_share: float | None = None
    ) -> SubBatches:
        """Draw the sub-batches of an estimator; one set of all samples where the estimator is still to be chosen.

        Args:
            indices: of the available samples.
            request: options of the estimator.
            n_data: size of the data set that the likelihood stands for.
            direction_share: share of the samples for the directions, as chosen; None: as given.

        Raises:
            ValueError: if the amounts do not fit into the samples, for any estimator that may be chosen.
        """
        if request.open:
            self._check_open(indices, request, n_data)
        directions, magnitudes = self.direction_samples, self.magnitude_samples
        options = request.options
        if direction_share is not None and options.magnitudes == "held_out" and magnitudes is None:
            directions = round(direction_share * len(indices))
        return draw_sub_batches(
            indices,
            direction_samples=directions,
            magnitude_samples=magnitudes,
            shared=bool(request.open) or options.magnitudes != "held_out",
            n_data=n_data,
            seed=self.seed,
            n_folds=options.n_folds if options.magnitudes == "cross_fitted" and not request.open else None,
        )

    def _check_open(self, indices: Tensor, request: Request, n_data: int | None) -> None:
        """Refuse amounts that would turn out not to fit once the long work is done."""
        if "direction_samples" in request.open and self.magnitude_samples is not None:
            raise ValueError(
                "direction_samples='auto' shares all samples out between directions and magnitudes: expected "
                f"magnitude_samples=None; got {self.magnitude_samples!r}."
            )
        n = len(indices)
        trials = request.trials(self.direction_share(n), 0) if n else []
        for trial in {(t.options.magnitudes, t.direction_share): t for t in trials}.values():
            self.draw(indices, Request(trial.options), n_data, trial.direction_share)

    def warn_of_no_effect(self, request: Request, *, stacklevel: int) -> None:
        """Warn if `direction_samples` was given and the estimator uses all samples for directions."""
        kind = request.options.magnitudes
        splits = kind == "held_out" or "magnitudes" in request.open
        if not splits and self.magnitude_samples is None and self.direction_samples != 0.5:
            warnings.warn(
                f"direction_samples={self.direction_samples} has no effect with magnitudes={kind!r}, where every "
                "sample gives directions: all samples are used. Expected magnitudes='held_out', or a loader of fewer "
                "samples.",
                stacklevel=stacklevel,
            )

    def direction_share(self, n: int) -> float:
        """Return the share of the used samples that give directions."""
        first, second = (
            0 if amount is None else amount * n if isinstance(amount, float) else amount
            for amount in (self.direction_samples, self.magnitude_samples)
        )
        return first / (n if self.magnitude_samples is None else first + second)


@dataclass(frozen=True, eq=False)
class FitSpec:
    """Request for a fit: everything that it needs except for the samples and the prior.

    Attributes:
        model: the trained network; never written to.
        likelihood: of the outputs.
        subset: of the weights.
        backend: kind of curvature, and the laplace-torch backend that computes its derivatives.
        keys: of batches that are mappings.
        split: division of the samples.
        request: options of the estimator.
        memory: bytes that a fit or a prediction may take beyond the model and the directions; None: a quarter of what
            is free.
        processes: that share passes over samples.
        checkpoint: of parts that an interrupted fit has finished.
    """

    model: nn.Module
    likelihood: Likelihood
    subset: WeightSubset
    backend: BackendChoice
    keys: MappingKeys
    split: SplitOptions
    request: Request
    memory: int | None = None
    processes: Processes = ALONE
    checkpoint: FitCheckpoint = NO_CHECKPOINT

    def prepared(self, some: Batch) -> Network:
        """Evaluate the model on a few samples, and test how it can be differentiated."""
        return self.prepared_for(self.subset.select_by(self.model, some.inputs), some)

    def prepared_for(self, selection: ParameterSelection, some: Batch) -> Network:
        """Do the same for selected parameters, the same ones at the same values in all processes.

        Raises:
            ValueError: as `prepare_network`, and if weights or selected parameters differ between processes.
        """
        network = prepare_network(selection, self.likelihood, some, self.memory)
        if self.checkpoint:
            self.checkpoint.expect("weights or parameters", f"{selection.subset}, {selection.fingerprint()}")
            # to a few digits: a model of other code, or a likelihood of other parameters, has the same weights
            outputs = network.outputs(some.inputs)
            sizes = outputs, network.likelihood.per_sample_loss(outputs, some.targets)
            self.checkpoint.expect("outputs or losses", " ".join(f"{float(x.double().norm()):.4g}" for x in sizes))
        return self.within(network)

    def within(self, network: Network) -> Network:
        """Return the network whose passes the processes of the fit share, and whose rows it keeps or divides."""
        network = network.shared(self.processes)
        return replace(network, checkpoint=self.checkpoint, shard=self._shard_of(network))

    def _shard_of(self, network: Network) -> Shard | None:
        """Return the parameters whose directions this process holds; None: all.

        Raises:
            ValueError: if rows cannot be computed by parameter.
        """
        if not (self.request.options.shard_directions and self.processes.several):
            return None
        by_layers = network.capabilities.layers is not None and network.linear_layer is None
        partly = any(entries is not None for entries in network.selection.entries)
        if not by_layers or partly or self.backend.root(self.likelihood) is None:
            raise ValueError(
                "shard_directions=True is built for whole parameter tensors of more than the last layer, of models "
                "whose layers hooks can see, and for curvatures with rows (GGN, empirical Fisher); expected these, or "
                "shard_directions=False."
            )
        return Shard.of(self.processes, network.selection.sizes)


@dataclass(frozen=True, eq=False)
class FitResult:
    """Result of a fit; what a state does not hold is None after loading one.

    Attributes:
        selection: parameters of the posterior.
        mean: their trained values.
        fingerprint: hash of the weights and buffers at the fit, except for buffers that evaluation writes to.
        split: sub-batches.
        identities: of the samples used.
        estimate: of the curvature.
        loss: summed loss of the samples used, with their weights, times N over the sum of the weights, in nats.
        n_outputs: C.
        options: of the estimate, as asked for or as chosen.
        targets_are_flat: whether targets are (n,), or with positions one for each of them.
        layout: of the outputs; None without positions.
        n_data_given: size of the data set as the user gave it; None: all samples that loaders yielded.
        network: at the fitted weights; not in a state.
        choice: alternatives of "auto"; None where nothing was open; not in a state.
        pool: samples that loaders have yielded; not in a state.
        stopping: outcome of `tolerance`; None without one; not in a state.
        rows: what was drawn; None where all rows of the samples were used; not in a state.
        drawn: the drawn rows with their samples; None likewise; not in a state.
        scored: identities of the samples that they were drawn from; None likewise; not in a state.
        seconds: wall time of the fit; not in a state.
    """

    selection: ParameterSelection
    mean: Float[Tensor, " P"]
    fingerprint: str
    split: SubBatches
    identities: SampleIdentities
    estimate: CurvatureEstimate
    loss: float
    n_outputs: int
    options: EstimatorOptions
    targets_are_flat: bool
    layout: OutputLayout | None = None
    n_data_given: int | None = None
    network: Network | None = None
    choice: Choice | None = None
    pool: Pool | None = None
    stopping: Stopping | None = None
    rows: Rows | None = None
    drawn: DrawnRows | None = None
    scored: SampleIdentities | None = None
    seconds: float | None = None


def fit_curvature(
    spec: FitSpec,
    weighting_of: WeightingOf,
    source: SampleSource,
    *,
    n_data: int,
    known_n_data: bool,
    progress_bar: bool,
) -> tuple[FitResult, list[SubBatchCurvature]]:
    """Split the samples, load them once, choose open options, then estimate directions and magnitudes.

    Args:
        spec: request.
        weighting_of: prior and likelihood weight, for open options and the default complement.
        source: the samples.
        n_data: size of the data set that the likelihood stands for.
        known_n_data: whether the user gave it; if not, weights of samples scale it.
        progress_bar: show progress.

    Returns:
        The fit, and the curvature of each sub-batch; the model is as it was.

    Raises:
        ValueError: if weights, loader, samples or amounts cannot be used, or the fit does not fit into memory; before
            any long work.
    """
    seed, request = spec.split.seed, spec.request
    split = spec.split.draw(source.indices, request, n_data)
    with at_weights(spec.model, seed) as written:
        some = first_samples(spec, source, split.direction_indices)
        selection = spec.subset.select_by(spec.model, some.inputs)
        weighting = weighting_of(selection, split.n_data)
        request = request.resolved(prior_of_blocks=weighting.of_blocks)
        network = _network_with_backend(spec, selection, some, request.options, len(source.indices))
        augmented = source.augments(seed)
        passes = [
            load(network, source, indices, seed, keep=first, progress_bar=progress_bar)
            for first, indices in _sets(split)
        ]
        split, passes, identities = _merged(
            source,
            split,
            passes,
            augmented=augmented,
            known_n_data=known_n_data,
            seed=seed,
            dtype=network.like.dtype,
        )
        weighting = weighting_of(selection, split.n_data)
        curvatures = _curvatures(spec, network, some, passes, progress_bar=progress_bar)
        options, choice = request.options, None
        if request.open:
            choice, split, curvatures = _choose(spec, request, weighting, source, union=split, curvature=curvatures[0])
            options = choice.chosen.options
        roles = SplitCurvature(
            curvatures[0], None if split.shared else curvatures[1], split.folds, split.n_data_in_samples
        )
        with warnings.catch_warnings():
            if "rank" in request.open:
                # nobody asked for this rank
                warnings.filterwarnings("ignore", r"rank=\d+ was asked for|All directions of", UserWarning)
            estimated = estimate(roles, options)
        if choice is not None and "rank" in request.open:
            choice = choice.found(estimated.curvature.directions.shape[1])
            options = choice.chosen.options
    result = FitResult(
        selection=selection,
        mean=selection.vector(),
        # what evaluation itself changes is no part of the trained network
        fingerprint=selection.fingerprint(without=written),
        split=split,
        identities=identities,
        estimate=estimated,
        loss=sum(found.loss for found in passes) * split.n_data / split.total_weight,
        n_outputs=network.n_outputs,
        options=options,
        targets_are_flat=some.targets.ndim == 1 + (0 if network.layout is None else network.layout.n_dimensions),
        layout=network.layout,
        # without a backend's copies of the model, which are large and cannot always be pickled
        network=replace(network.alone(), backend=None, memory=spec.memory),
        choice=choice,
    )
    return result, curvatures


def _choose(
    spec: FitSpec,
    request: Request,
    weighting: Weighting,
    source: SampleSource,
    *,
    union: SubBatches,
    curvature: SubBatchCurvature,
) -> tuple[Choice, SubBatches, list[SubBatchCurvature]]:
    """Choose open options for the curvature of all samples; return the split and the curvature of each part too."""
    largest_rank = min(curvature.n_rows, curvature.network.n_parameters)
    trials = request.trials(spec.split.direction_share(len(source.indices)), largest_rank)
    choice = choose(curvature, trials, weighting, n_data=union.n_data_in_samples, seed=spec.split.seed)
    chosen = choice.chosen
    split = spec.split.draw(source.indices, Request(chosen.options), None, chosen.direction_share)
    positions = union.direction_indices
    split = split.merged(
        torch.isin(split.used_indices, positions), n_data=union.n_data, weight=union.weight, seed=spec.split.seed
    )
    parts = [curvature.part(torch.searchsorted(positions, indices)) for _, indices in _sets(split)]
    for part in parts:
        part.progress_bar = curvature.progress_bar
    return choice, split, parts


def load(
    network: Network,
    source: SampleSource,
    indices: Tensor,
    seed: int,
    *,
    keep: bool = False,
    progress_bar: bool = False,
) -> FirstPass:
    """Load the samples at some positions once, with their losses and hashes."""
    samples = SubBatch(source, indices, network.like.device, seed)
    return first_pass(network, samples, keep=keep, progress_bar=progress_bar)


def _sets(split: SubBatches) -> list[tuple[bool, Tensor]]:
    """Sets of samples to load; the first is needed many times and kept."""
    if split.shared:
        return [(True, split.direction_indices)]
    return [(True, split.direction_indices), (False, split.magnitude_indices)]


def first_samples(spec: FitSpec, source: SampleSource, indices: Tensor) -> Batch:
    """Return a few samples to try the model on, on its device."""
    device = next(spec.model.parameters()).device
    batch = next(iter(SubBatch(source, indices[:8], device, spec.split.seed)))
    # backends, which are compared on them, know no weights
    return batch.weighted(None)


def _network_with_backend(
    spec: FitSpec, selection: ParameterSelection, some: Batch, options: EstimatorOptions, n_samples: int
) -> Network:
    """The network, with the backend's derivatives where they agree with torch.func on some samples."""
    network = spec.prepared_for(selection, some)
    network = leaving_room(network, options, n_samples * network.n_outputs)
    uses_kfac = options.structure == "kron" and options.kron_basis == "kfac"
    return spec.backend.attached(network, some, spec.keys, kfac=options.kfac_approx if uses_kfac else None)


def _curvatures(
    spec: FitSpec, network: Network, some: Batch, passes: list[FirstPass], *, progress_bar: bool
) -> list[SubBatchCurvature]:
    """Curvature of each set of samples; Monte-Carlo draws differ between the sets."""
    root = spec.backend.root(network.likelihood)
    if root is None:
        second = SecondDerivatives(network.selection, network.parameters, network.likelihood, some)
        return [HessianCurvature(network, found.samples, second, progress_bar=progress_bar) for found in passes]
    return [
        RowCurvature(network, found.samples, root, seed=seed_of_draws(spec.split.seed, i), progress_bar=progress_bar)
        for i, found in enumerate(passes)
    ]


def seed_of_draws(seed: int, i: int) -> int:
    """Return the seed of the i-th set of Monte-Carlo draws, also different from that of the same set redrawn."""
    return (seed * 1_000_003 + 2 * i) % 2**62


def _merged(
    source: SampleSource,
    split: SubBatches,
    passes: list[FirstPass],
    *,
    augmented: bool,
    known_n_data: bool,
    seed: int,
    dtype: torch.dtype,
) -> tuple[SubBatches, list[FirstPass], SampleIdentities]:
    """Merge equal samples, which count with the sum of their weights, and scale the weights to a mean of 1.

    Args:
        source: the samples.
        split: their sub-batches; n_data is the number of samples unless known.
        passes: first pass over each sub-batch.
        augmented: whether loading is random.
        known_n_data: whether N is given; if not, it is scaled by the mean weight.
        seed: of the folds.
        dtype: of the weights.

    Returns:
        Sub-batches, first passes and identities of the distinct samples.

    Raises:
        ValueError: if all weights are 0, their sum exceeds N, or too few samples are distinct.
    """
    root, positions = source.root()
    hashes = torch.cat([found.hashes for found in passes])
    identities = SampleIdentities(hashes, positions[split.used_indices], root_length(root, positions), augmented, root)
    weights = torch.cat(
        [torch.ones(len(f.hashes), dtype=torch.float64) if f.weights is None else f.weights for f in passes]
    )
    kept, together = identities.distinct(weights)
    if bool(kept.all()) and all(found.weights is None for found in passes):
        return split, passes, identities
    total = float(weights.sum())
    if total == 0:
        raise ValueError("Expected a positive weight of at least one sample; got 0 for all of them.")
    n_data = split.n_data if known_n_data else whole(split.n_data * total / len(weights))
    relative = together / (total / int(kept.sum()))
    sizes = [len(found.hashes) for found in passes]
    merged = []
    for found, mask, weight in zip(passes, kept.split(sizes), relative.split(sizes), strict=True):
        samples = found.samples.at(mask.nonzero().flatten()).weighted(weight[mask].to(dtype))
        merged.append(replace(found, samples=samples, hashes=found.hashes[mask]))
    split = split.merged(kept, n_data=n_data, weight=total, seed=seed)
    return split, merged, identities.at(kept)


def whole(n: float) -> int | float:
    """Return a sum of weights as an integer if it is one, up to the rounding of weights in single precision."""
    return round(n) if abs(n - round(n)) < 1e-6 * n else n
