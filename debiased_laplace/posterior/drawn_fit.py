"""Fit of a posterior to rows that are drawn where the curvature is."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from debiased_laplace.checks import integer, one_of
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.drawn_rows import DrawnRows, RowSampler, Scored, Scores
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.output_rows import n_slots
from debiased_laplace.curvature.roots import GaussNewton, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import DrawErrors, SubBatchCurvature
from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.drawing import Rows, chances_of_the_rest
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.pool import missing_fitted, nothing_new
from debiased_laplace.data.sharing import described, first_of_all, own_part, united
from debiased_laplace.data.source import SampleSource, SampleStream, root_length, training_samples
from debiased_laplace.data.splitting import SubBatches, deal
from debiased_laplace.debiasing.choice import Choice, Weighting, choose_by_rows
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.held_out_kl import KLTerms, is_all, prior_trace
from debiased_laplace.debiasing.memory import bytes_of_directions, leaving_room
from debiased_laplace.debiasing.options import EstimatorOptions, Trial
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.debiasing.stopping import Stage, Stopping, stage_of_rows, stage_sizes
from debiased_laplace.posterior.fit import FitResult, FitSpec, WeightingOf, whole

Sampling = Literal["uniform", "curvature"]

DEFAULT_ROWS = 2048
"""Largest number of rows drawn by default: eigenvectors of their Gram matrices take a minute or less."""

_PRODUCTS = 3e11
"""Largest number of rows squared times parameters by default: products of the rows take about a minute on two cores."""

_WORSE_THAN_EQUAL = 1.2
"""Design effect above which rows are drawn again, with equal scores."""

_FIRST_ROWS = 128
"""Rows of the first fit of `tolerance`."""

JUDGES = 2**61
"""Distance between the seeds of a fit's rows and of those that judge it."""


@dataclass(frozen=True)
class SamplingOptions:
    """What of the samples enters the curvature, with the names of the public constructor.

    Attributes:
        sampling: "uniform": all rows of the samples; "curvature": rows drawn in proportion to their curvature.
        n_rows: "curvature": about how many rows are drawn; None: as many as there are, or a number that bounds time and
            memory. "uniform": rows of as many random samples as have that many; None: of all samples.

    Raises:
        ValueError: if an option is out of range.
    """

    sampling: Sampling
    n_rows: int | None

    def __post_init__(self) -> None:
        one_of(self.sampling, Sampling, "sampling")
        if self.n_rows is not None:
            object.__setattr__(self, "n_rows", integer(self.n_rows, "n_rows", minimum=2))


def fit_drawn_rows(
    spec: FitSpec,
    weighting_of: WeightingOf,
    loader: Any,
    earlier: FitResult | None,
    *,
    n_rows: int | None,
    n_data: int | None,
    tolerance: float | None,
    progress_bar: bool,
) -> FitResult:
    """Score all rows by one forward pass, draw some, and estimate directions and magnitudes from them.

    Args:
        spec: request.
        weighting_of: prior and likelihood weight, for open options, the default complement and the tolerance.
        loader: of training samples, all of which are scored, each once.
        earlier: fit whose samples these join; None to start anew.
        n_rows: expected number of rows; None: see `SamplingOptions`.
        n_data: size of the data set that the likelihood stands for; None: as given earlier, or all samples yielded.
        tolerance: smallest gain, in nats, of the last doubling of rows; None: draw `n_rows` at once.
        progress_bar: show progress.

    Returns:
        The fit; the model is as it was.

    Raises:
        ValueError: if weights, loader or samples cannot be used, or an option is not built for drawn rows.
    """
    started = time.perf_counter()
    _check_built(spec)
    seed = spec.split.seed
    n_data = earlier.n_data_given if n_data is None and earlier is not None else n_data
    samples = training_samples(loader, seed, spec.keys, repeats=spec.processes.several)
    if isinstance(samples, SampleSource):
        samples = united(samples, spec.processes, seed)
    with at_weights(spec.model, seed) as written:
        sampler, network, first = _scored(spec, weighting_of, samples, earlier, n_rows, progress_bar=progress_bar)
        scored = sampler.scored
        if earlier is not None and earlier.drawn is None:
            _check_yields(scored, earlier.identities)
        N = whole(scored.weight) if n_data is None else n_data
        if scored.weight > N * (1 + 1e-6):
            raise ValueError(
                "n_data is the size of the data set, including the given samples: expected at least "
                f"{scored.weight:g}, got {n_data}."
            )
        fits = _Fits(spec, weighting_of, sampler, network, N, progress_bar)
        if (tolerance is not None or spec.request.open) and not fits.are_all:
            raise ValueError(
                f"{'tolerance' if tolerance is not None else 'An option that is chosen (auto)'} is judged by rows of "
                f"all {N:g} samples; the loader yields {scored.weight:g}. Expected a loader of all of them, or "
                "sampling='uniform'."
            )
        effect = fits.design_effect(of_judges=tolerance is not None)
        if earlier is None and isinstance(samples, SampleSource) and effect > _WORSE_THAN_EQUAL:
            sampler, *_ = _scored(spec, weighting_of, samples, None, n_rows, scores="equal", progress_bar=progress_bar)
            fits = replace(fits, sampler=sampler)
        found = fits.of_rows() if tolerance is None else fits.until_enough(tolerance)
        identities = _identities(samples, scored, earlier, seed)
    sampler.alone()
    selection, has_rows = network.selection, torch.isin(torch.arange(len(scored)), found.drawn.draw.samples)
    return FitResult(
        selection=selection,
        mean=selection.vector(),
        # what evaluation itself changes is no part of the trained network, and known now that it is put back
        fingerprint=selection.fingerprint(without=written),
        split=found.split,
        identities=identities.at(has_rows),
        estimate=found.estimate,
        loss=scored.loss * N / scored.weight,
        n_outputs=network.n_outputs,
        options=found.options,
        targets_are_flat=first.targets.ndim == 1 + (0 if network.layout is None else network.layout.n_dimensions),
        layout=network.layout,
        n_data_given=n_data,
        network=replace(network.alone(), memory=spec.memory),
        choice=found.choice,
        stopping=found.stopping,
        rows=found.rows,
        drawn=found.drawn,
        scored=identities.at(identities.distinct(torch.ones(len(scored), dtype=torch.float64))[0]),
        seconds=time.perf_counter() - started,
    )


def fit_rows_again(spec: FitSpec, weighting_of: WeightingOf, earlier: FitResult) -> FitResult:
    """Estimate from the rows of an earlier fit again, for another prior; `spec` is otherwise that of the fit."""
    assert earlier.drawn is not None  # for the type checker
    sampler = earlier.drawn.sampler
    with at_weights(spec.model, spec.split.seed):
        fits = _Fits(spec, weighting_of, sampler, sampler.network, earlier.split.n_data, progress_bar=False)
        found = fits.of_rows(earlier.drawn)
    return replace(
        earlier, split=found.split, estimate=found.estimate, options=found.options, choice=found.choice, rows=found.rows
    )


def _scored(
    spec: FitSpec,
    weighting_of: WeightingOf,
    samples: SampleSource | SampleStream,
    earlier: FitResult | None,
    n_rows: int | None,
    *,
    progress_bar: bool,
    scores: Scores = "norms",
) -> tuple[RowSampler, Network, Batch]:
    """Score all samples and draw from them, those of an earlier fit included; return a first batch too."""
    seed = spec.split.seed
    before = None if earlier is None else earlier.drawn
    # before the pass over the samples begins: one within it would start workers of its own
    if before is not None and isinstance(samples, SampleSource) and len(samples.indices) and samples.augments(seed):
        raise ValueError(
            "override=False finds new samples by their values, and this loader yields others at every pass "
            "(augmentation, padding by batch): expected a new fit of all samples."
        )
    own = own_part(samples, spec.processes)
    few, numbered = first_of_all(own.numbered(seed), spec.processes)
    some = few.to(next(spec.model.parameters()).device).weighted(None)
    if spec.checkpoint:
        spec.checkpoint.expect("samples", described(samples, seed))
    if before is None:
        network = spec.prepared(some)
        of_blocks = weighting_of(network.selection, 1).of_blocks
        options = spec.request.resolved(prior_of_blocks=of_blocks).options
        network = leaving_room(network, options, n_rows or DEFAULT_ROWS)
        seeds = (seed, seed + JUDGES)
        n_rows = default_rows(network, options) if n_rows is None else n_rows
        spec.processes.check_same(n_rows=n_rows)
        root = spec.backend.root(network.likelihood)
        if isinstance(root, MonteCarloGaussNewton):
            # rows of the GGN itself take no more backward passes
            root = GaussNewton(network.likelihood)
        sampler = RowSampler(network, root, some, n_rows=n_rows, seeds=seeds, scores=scores)
    else:
        network = spec.within(before.sampler.network)
        # what was read before counts once
        sampler = before.sampler.continued(network, empty=spec.processes.rank > 0)
        numbered = _unknown(numbered, before.scored)
    total = len(samples.indices) if isinstance(samples, SampleSource) else None
    if spec.checkpoint:
        numbered = sampler.resumed(own, numbered, seed)
    sampler.read(numbered, total=total, progress_bar=progress_bar)
    sampler.merge(spec.processes, by_position=isinstance(samples, SampleSource))
    if before is not None and len(sampler.scored) == len(before.scored):
        raise ValueError(nothing_new(total))
    return sampler, network, some


def _unknown(
    numbered: Iterator[tuple[Int64[Tensor, " b"], Batch]], scored: Scored
) -> Iterator[tuple[Int64[Tensor, " b"], Batch]]:
    """Yield the samples that were not scored before, with positions that follow those of the others."""
    offset = int(scored.positions.max()) + 1
    for positions, batch in numbered:
        new = (~torch.isin(sample_hashes(batch), scored.hashes)).nonzero().flatten()
        if len(new):
            yield positions[new] + offset, batch.at(new)


@dataclass(frozen=True, eq=False)
class _RowFit:
    """What a fit found from drawn rows; the names are those of `FitResult`."""

    drawn: DrawnRows
    split: SubBatches
    estimate: CurvatureEstimate
    options: EstimatorOptions
    choice: Choice | None
    rows: Rows
    stopping: Stopping | None = None


@dataclass(frozen=True, eq=False)
class _Fits:
    """Fits to rows that were drawn from the same samples."""

    spec: FitSpec
    weighting_of: WeightingOf
    sampler: RowSampler
    network: Network
    n_data: int | float
    progress_bar: bool

    @property
    def are_all(self) -> bool:
        """Whether the samples scored are all N."""
        return is_all(self.sampler.scored.weight, self.n_data)

    @property
    def weighting(self) -> Weighting:
        """Prior and likelihood weight."""
        return self.weighting_of(self.network.selection, self.n_data)

    @cached_property
    def own(self) -> tuple[DrawnRows, SubBatchCurvature]:
        """All rows that the sampler draws, and their curvature."""
        drawn = self.sampler.drawn()
        return drawn, self._curvature(drawn)

    def design_effect(self, *, of_judges: bool) -> float:
        """Return the variance of the trace under this draw, relative to as many rows drawn uniformly."""
        drawn, curvature = (self.sampler.drawn(which=1), self.judges) if of_judges else self.own
        return _design_effect(drawn, _norms(drawn, curvature))

    def _curvature(self, drawn: DrawnRows) -> SubBatchCurvature:
        if len(drawn) < 2:
            raise ValueError(
                f"{len(drawn)} rows were drawn of {self.sampler.drawers[0].population.n_positive} that have a "
                "curvature; expected at least 2: raise n_rows."
            )
        curvature = drawn.curvature(progress_bar=self.progress_bar)
        if isinstance(curvature, RowCurvature):
            curvature.keep_rows()
        return curvature

    def of_rows(self, drawn: DrawnRows | None = None) -> _RowFit:
        """Fit the drawn rows; None: all that the sampler draws."""
        drawn, curvature = self.own if drawn is None else (drawn, self._curvature(drawn))
        request = self.spec.request.resolved(prior_of_blocks=self.weighting.of_blocks)
        options, choice = request.options, None
        direction_share = self.spec.split.direction_share(len(drawn))
        if request.open:
            choice = self._chosen(drawn, curvature, request.trials(direction_share, curvature.n_rows))
            options, direction_share = choice.chosen.options, choice.chosen.direction_share
        split, part = deal_rows(drawn, curvature, options, direction_share, self.n_data)
        with warnings.catch_warnings():
            if "rank" in request.open:
                # nobody asked for this rank
                warnings.filterwarnings("ignore", r"rank=\d+ was asked for|All directions of", UserWarning)
            estimated = estimate(split, options)
        if choice is not None and "rank" in request.open:
            choice = choice.found(estimated.curvature.directions.shape[1])
            options = choice.chosen.options
        rows = _described(drawn, curvature, part, self.n_data)
        return _RowFit(drawn, _split(drawn, part, options, self.n_data), estimated, options, choice, rows)

    @cached_property
    def judges(self) -> SubBatchCurvature:
        """Curvature of rows that no fit has seen."""
        judges = self.sampler.drawn(which=1).curvature(progress_bar=self.progress_bar)
        if isinstance(judges, RowCurvature):
            judges.keep_rows()
        return judges

    def _chosen(self, drawn: DrawnRows, curvature: SubBatchCurvature, trials: list[Trial]) -> Choice:
        def split_of(trial: Trial) -> SplitCurvature:
            return deal_rows(drawn, curvature, trial.options, trial.direction_share, self.n_data)[0]

        return choose_by_rows(curvature, trials, self.weighting, split_of, self.judges)

    def until_enough(self, tolerance: float) -> _RowFit:
        """Double the rows until that gains less than the tolerance, or there are no more."""
        most = self.sampler.drawers[0].expected()
        judges, weighting = self.judges, self.weighting
        stages: list[Stage] = []
        before: tuple[KLTerms, Float[Tensor, " R"]] | None = None
        for n in stage_sizes(min(_FIRST_ROWS, most), most):
            with warnings.catch_warnings(record=True) as caught:
                # only warnings of the fit that is kept are shown
                warnings.simplefilter("always", UserWarning)
                fit = self.of_rows(self.sampler.drawn(n))
            precision = fit.estimate.curvature.precision(weighting.likelihood_weight, weighting.prior)
            trace = prior_trace(precision, weighting.prior.expand(self.network.n_parameters))
            terms = KLTerms(trace, float(precision.log_det), weighting.likelihood_weight)
            found = judges.traces(precision).double().cpu() * (0.5 * weighting.likelihood_weight / judges.n_samples)
            assert judges.draw is not None  # for the type checker
            stages.append(
                Stage(n)
                if before is None
                else stage_of_rows(n, before[0], terms, before[1] - found, judges.draw.left_out)
            )
            before = terms, found
            stopping = Stopping(tuple(stages), tolerance, most, unit="rows")
            if stopping.enough:
                break
        for warning in caught:
            warnings.warn(warning.message, warning.category, stacklevel=6)
        return replace(fit, stopping=stopping)


def deal_rows(
    drawn: DrawnRows,
    curvature: SubBatchCurvature,
    options: EstimatorOptions,
    direction_share: float,
    n_data: int | float,
) -> tuple[SplitCurvature, Int64[Tensor, " R"]]:
    r"""Deal drawn rows to directions and magnitudes, or to folds.

    A row is known with the weight $1/N$ that it has in the full batch; the rest of its weight stands for rows that were
    not drawn. Where all N samples were scored, rows are dealt: the population is fixed, and chance is in the draw
    alone. Where the N' scored ones are themselves a draw, samples are dealt, and a row is among those drawn with the
    probability $\tilde\pi = \pi N' / N$; rows of the direction samples that were not drawn are then represented by
    rows of other samples.

    Args:
        drawn: the rows.
        curvature: of all of them, weighted by inverse probability.
        options: of the estimate.
        direction_share: share of the rows, or of the samples, for the directions ("held_out").
        n_data: N.

    Returns:
        The curvature of the parts, and the part of each row, as in `Rows`.
    """
    R, dtype, scored = len(drawn), curvature.network.like.dtype, drawn.scored
    share = min(scored.weight / n_data, 1.0)
    p, left_out = drawn.probabilities * share, 1 - drawn.probabilities
    generator = torch.Generator().manual_seed(options.seed)
    by_sample = not is_all(scored.weight, n_data)
    if by_sample:
        # equal samples are one
        units, of_samples = scored.hashes.unique(return_inverse=True)
        unit, n_units = of_samples[drawn.draw.samples], len(units)
        curvature.draw = DrawErrors(left_out, torch.ones_like(p), unit, n_units, share)
    else:
        unit, n_units = torch.arange(R), R
        curvature.draw = DrawErrors.of(p)
    if options.magnitudes == "same_batch":
        return SplitCurvature(curvature, None, None, n_data), torch.zeros(R, dtype=torch.int64)
    if options.magnitudes == "cross_fitted":
        folds = deal(n_units, min(options.n_folds, n_units), generator)[unit]
        # not every fold of the samples has drawn rows
        folds = folds.unique(return_inverse=True)[1]
        rest = curvature.reweighted((1 - p).to(dtype))
        return SplitCurvature(curvature, None, folds, n_data, known_factors=p.to(dtype), rest=rest), folds
    in_b, q = _in_second_part(n_units, direction_share, generator, exactly=by_sample)
    in_b = in_b[unit]
    a, b = (~in_b).nonzero().flatten(), in_b.nonzero().flatten()
    if len(a) == 0 or len(b) < 2:
        raise ValueError(f"{R} drawn rows give {len(a)} for directions and {len(b)} for magnitudes; raise n_rows.")
    directions, magnitudes = curvature.part(a), curvature.part(b)
    # in units of the parts' means, whose weights are R / (N p)
    chance = chances_of_the_rest(p[b], 1 - q, q)
    known_factors = (p[a] * len(a) / R).to(dtype)
    others = magnitudes.reweighted((p[b] / chance * len(b) / R).to(dtype))
    others.draw = DrawErrors.of(chance)
    if by_sample:
        sampled = q * share / (1 - (1 - q) * share)
        others.draw = DrawErrors(left_out[b], torch.ones_like(chance), unit[b], q * n_units, sampled)
    return SplitCurvature(directions, others, None, n_data, known_factors=known_factors), in_b.long()


def _in_second_part(
    n: int, direction_share: float, generator: torch.Generator, *, exactly: bool
) -> tuple[Bool[Tensor, " n"], float]:
    """Return which of n units give magnitudes, and the probability of that: in a fixed number, or each by itself."""
    if not exactly:
        q = 1 - direction_share
        return torch.rand(n, generator=generator, dtype=torch.float64) < q, q
    n_a = min(max(1, round(direction_share * n)), n - 1)
    in_b = torch.ones(n, dtype=torch.bool)
    in_b[torch.randperm(n, generator=generator)[:n_a]] = False
    return in_b, 1 - n_a / n


def _check_built(spec: FitSpec) -> None:
    """Check that rows can be drawn for the request."""
    options = spec.request.options
    metric = "auto" if "metric" in spec.request.open else options.metric
    if metric != "euclidean":
        raise ValueError(_not_built(f"metric={metric!r}", "metric='euclidean'"))
    if options.structure == "kron" and options.kron_magnitudes == "kronecker":
        raise ValueError(_not_built("kron_magnitudes='kronecker'", "kron_magnitudes='exact'"))
    splits = options.magnitudes == "held_out" or "magnitudes" in spec.request.open
    if spec.split.magnitude_samples is not None or (splits and isinstance(spec.split.direction_samples, int)):
        instead = "direction_samples as a share of the rows without magnitude_samples"
        raise ValueError(_not_built("numbers of samples", instead))


def _not_built(what: str, instead: str) -> str:
    return f"sampling='curvature', the default, is not built for {what}; expected {instead}, or sampling='uniform'."


def default_rows(network: Network, options: EstimatorOptions | None = None) -> int:
    """Return a number of rows that takes about a minute and fits into the available memory, as do its directions.

    Args:
        network: the network.
        options: of the estimate; None: rows without directions.
    """
    P = network.n_parameters
    most = max(2, min(DEFAULT_ROWS, int((_PRODUCTS / P) ** 0.5)))
    needed = network.bytes_of_held_rows(most)
    if options is not None and options.structure != "kron" and options.rank is None:
        needed = max(needed, bytes_of_directions(network, options, most))
    return max(2, min(most, most * network.available_memory // needed))


def _identities(
    samples: SampleSource | SampleStream, scored: Scored, earlier: FitResult | None, seed: int
) -> SampleIdentities:
    """Return the identities of all samples that were scored."""
    if isinstance(samples, SampleStream) or (earlier is not None and earlier.drawn is not None):
        return SampleIdentities(scored.hashes, scored.positions, int(scored.positions.max()) + 1, False)
    root, places = samples.root()
    augmented = samples.augments(seed)
    return SampleIdentities(scored.hashes, places[scored.positions], root_length(root, places), augmented, root)


def _check_yields(scored: Scored, fitted: SampleIdentities) -> None:
    """Check that samples contain those fitted before a state was loaded."""
    n_missing = int((~torch.isin(fitted.hashes, scored.hashes)).sum())
    if n_missing:
        raise ValueError(missing_fitted(n_missing, len(fitted)))


def _split(drawn: DrawnRows, part: Tensor, options: EstimatorOptions, n_data: int | float) -> SubBatches:
    """Return the samples of each part, which may share some."""
    positions, weight = drawn.positions, drawn.scored.weight
    if options.magnitudes == "held_out":
        sets = [positions[part == i].unique() for i in (0, 1)]
        return SubBatches(sets[0], sets[1], n_data, shared=False, of_rows=True, weight=weight)
    every = positions.unique()
    return SubBatches(every, every, n_data, shared=True, of_rows=True, weight=weight)


def _described(drawn: DrawnRows, curvature: SubBatchCurvature, part: Tensor, n_data: int | float) -> Rows:
    p, norms = drawn.probabilities, _norms(drawn, curvature)
    known = float(norms.sum() / (norms / p).sum()) * min(drawn.scored.weight / n_data, 1.0)
    network, rows = drawn.sampler.network, drawn.draw.rows
    slots = rows.new_tensor(2**62 if network.layout is None else n_slots(network.n_classes))
    positions = torch.stack([drawn.positions, rows // slots, rows % slots], dim=1)
    return Rows(positions, part, p, _design_effect(drawn, norms), known)


def _norms(drawn: DrawnRows, curvature: SubBatchCurvature) -> Float[Tensor, " R"]:
    """Return the squared norms of drawn rows, up to a factor; of samples drawn as a whole, their scores."""
    if not isinstance(curvature, RowCurvature):
        return drawn.draw.scores
    return drawn.probabilities * curvature.squared_norms()


def _design_effect(drawn: DrawnRows, norms: Float[Tensor, " R"]) -> float:
    """Return the variance of the trace relative to as many rows drawn uniformly of those that have curvature."""
    p = drawn.probabilities
    uniform = min(1.0, drawn.expected / drawn.sampler.drawers[0].population.n_positive)
    own, of_uniform = (
        ((1 - p) / p.square() * norms.square()).sum(),
        ((1 - uniform) / uniform / p * norms.square()).sum(),
    )
    return float(own / of_uniform) if of_uniform > 0 else 0.0
