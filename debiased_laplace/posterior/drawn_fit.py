"""Fit of a posterior to rows that are drawn where the curvature is."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.checks import integer, one_of
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.drawn_rows import load_drawn, score_rows
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.memory import free_memory
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import DrawErrors
from debiased_laplace.data.batches import sample_hashes
from debiased_laplace.data.drawing import RowDraw, Rows, chances_of_the_rest, draw_rows
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.source import SampleSource, root_length
from debiased_laplace.data.splitting import SubBatches, deal
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import SplitCurvature
from debiased_laplace.posterior.fit import FitResult, FitSpec, WeightingOf, first_samples

Sampling = Literal["uniform", "curvature"]

DEFAULT_ROWS = 2048
"""Largest number of rows drawn by default: their Gram matrix and its eigenvectors take a minute or less."""


@dataclass(frozen=True)
class SamplingOptions:
    """What of the samples enters the curvature, with the names of the public constructor.

    Attributes:
        sampling: "uniform": all rows of the samples; "curvature": rows drawn in proportion to their curvature.
        n_rows: about how many rows are drawn; None: as many as there are, or a number that bounds time and memory.

    Raises:
        ValueError: if an option is out of range.
    """

    sampling: Sampling
    n_rows: int | None

    def __post_init__(self) -> None:
        one_of(self.sampling, Sampling, "sampling")
        if self.n_rows is not None:
            object.__setattr__(self, "n_rows", integer(self.n_rows, "n_rows", minimum=2))
            if self.sampling == "uniform":
                raise ValueError("n_rows requires sampling='curvature'; got it with 'uniform'.")


def fit_drawn_rows(
    spec: FitSpec,
    weighting_of: WeightingOf,
    source: SampleSource,
    n_rows: int | None,
    *,
    n_data: int,
    progress_bar: bool,
) -> FitResult:
    """Score all rows by one forward pass, draw some, and estimate directions and magnitudes from them.

    Args:
        spec: request.
        weighting_of: prior and likelihood weight, for the default complement.
        source: the samples, all of which are scored.
        n_rows: expected number of rows; None: see `SamplingOptions`.
        n_data: size of the data set that the likelihood stands for.
        progress_bar: show progress.

    Returns:
        The fit; the model is as it was.

    Raises:
        ValueError: if weights, loader or samples cannot be used, or an option is not built for drawn rows.
    """
    seed = spec.split.seed
    root = _check_built(spec, source, n_data)
    with at_weights(spec.model, seed) as written:
        some = first_samples(spec, source, source.indices)
        selection = spec.subset.select_by(spec.model, some.inputs)
        weighting = weighting_of(selection, n_data)
        options = spec.request.resolved(prior_of_blocks=weighting.of_blocks).options
        network = prepare_network(selection, spec.likelihood, some)
        if source.augments(seed):
            raise ValueError(_not_built("a loader that yields other samples at every pass (augmentation, padding)"))
        scored = score_rows(network, source, root, seed=seed, progress_bar=progress_bar)
        if n_rows is None:
            n_rows = _default_rows(network)
        draw = draw_rows(scored.scores, scored.sizes, source.indices, n_rows=n_rows, seed=seed)
        if len(draw) < 2:
            raise ValueError(
                f"{len(draw)} rows were drawn of {draw.n_positive} that have a curvature; expected at least 2: raise "
                "n_rows."
            )
        samples, curvature = load_drawn(network, source, draw, root, seed=seed)
        curvature.progress_bar = progress_bar
        split, part = deal_rows(curvature, draw, options, spec.split.direction_share(len(draw)), n_data)
        estimated = estimate(split, options)
    by_sample, identities = _identify(source, samples, draw, part, options, n_data)
    return FitResult(
        selection=selection,
        mean=selection.vector(),
        fingerprint=selection.fingerprint(without=written),
        split=by_sample,
        identities=identities,
        estimate=estimated,
        loss=scored.loss,
        n_outputs=network.n_outputs,
        options=options,
        targets_are_flat=some.targets.ndim == 1,
        network=replace(network, backend=None),
        rows=_described(source, curvature, draw, part),
    )


def deal_rows(
    curvature: RowCurvature, draw: RowDraw, options: EstimatorOptions, direction_share: float, n_data: int
) -> tuple[SplitCurvature, Int64[Tensor, " R"]]:
    r"""Deal drawn rows to directions and magnitudes, or to folds.

    Valid only if all N samples were scored: the population is fixed then, and chance is in the draw alone. A row is
    known with the weight $1/N$ that it has in the full batch; the rest of its weight stands for rows not drawn.

    Args:
        curvature: of all drawn rows, weighted by inverse probability.
        draw: the rows.
        options: of the estimate.
        direction_share: share of the rows for the directions ("held_out").
        n_data: N.

    Returns:
        The curvature of the parts, and the part of each row.
    """
    R, like = len(draw), curvature.network.like
    curvature.keep_rows()
    generator = torch.Generator().manual_seed(options.seed)
    none = torch.zeros(R, dtype=torch.int64)
    if options.magnitudes == "same_batch":
        return SplitCurvature(curvature, None, None, n_data), none
    p = draw.probabilities
    if options.magnitudes == "cross_fitted":
        folds = deal(R, min(options.n_folds, R), generator)
        known, rest = curvature.reweighted(p.to(like.dtype)), curvature.reweighted((1 - p).to(like.dtype))
        return SplitCurvature(curvature, None, folds, n_data, known=known, rest=rest), folds
    q = 1 - direction_share
    in_b = torch.rand(R, generator=generator, dtype=torch.float64) < q
    a, b = (~in_b).nonzero().flatten(), in_b.nonzero().flatten()
    if len(a) == 0 or len(b) < 2:
        raise ValueError(f"{R} drawn rows give {len(a)} for directions and {len(b)} for magnitudes; raise n_rows.")
    directions, magnitudes = curvature.part(a), curvature.part(b)
    # in units of the parts' means, whose weights are R / (N pi)
    known = directions.reweighted((p[a] * len(a) / R).to(like.dtype))
    chance = chances_of_the_rest(p[b], q)
    others = magnitudes.reweighted((p[b] / chance * len(b) / R).to(like.dtype))
    others.draw = DrawErrors.of(chance)
    return SplitCurvature(directions, others, None, n_data, known=known), in_b.long()


def _check_built(spec: FitSpec, source: SampleSource, n_data: int) -> OutputRoot:
    """Return the root of the curvature, if rows can be drawn for the request."""
    root = spec.backend.root(spec.likelihood)
    options = spec.request.options
    if root is None or isinstance(root, MonteCarloGaussNewton):
        raise ValueError(_not_built(f"the {spec.backend.kind}", "the GGN or the empirical Fisher"))
    if getattr(spec.likelihood, "class_weights", None) is not None:
        raise ValueError(_not_built("class_weights"))
    if spec.request.open:
        raise ValueError(_not_built(f"{sorted(spec.request.open)[0]}='auto'", "a value"))
    if options.metric == "kron":
        raise ValueError(_not_built("metric='kron'", "'euclidean'"))
    if options.structure == "kron" and options.kron_magnitudes == "kronecker":
        raise ValueError(_not_built("kron_magnitudes='kronecker'", "'exact'"))
    if n_data != len(source.indices):
        raise ValueError(_not_built(f"n_data={n_data} beyond the {len(source.indices)} samples of the loader"))
    if isinstance(spec.split.direction_samples, int) or spec.split.magnitude_samples is not None:
        raise ValueError(_not_built("numbers of samples", "direction_samples as a share of the rows"))
    return root


def _not_built(what: str, instead: str = "sampling='uniform'") -> str:
    return f"sampling='curvature' is not built for {what}; expected {instead}."


def _default_rows(network: Network) -> int:
    """Return a number of rows that takes at most a quarter of the free memory, and about a minute."""
    of_a_row = network.n_parameters * network.like.element_size()
    return max(2, min(DEFAULT_ROWS, free_memory(network.like.device) // 4 // of_a_row))


def _identify(
    source: SampleSource,
    samples: SubBatch,
    draw: RowDraw,
    part: Tensor,
    options: EstimatorOptions,
    n_data: int,
) -> tuple[SubBatches, SampleIdentities]:
    """Return the samples of each part, which may share some, and their identities."""
    positions = source.indices[draw.samples]
    hashes = torch.cat([sample_hashes(batch) for batch in samples])
    root, places = source.root()
    identities = SampleIdentities(hashes, places[samples.indices], root_length(root, places), False, root)
    if options.magnitudes == "held_out":
        sets = [positions[part == i].unique() for i in (0, 1)]
        return SubBatches(sets[0], sets[1], n_data, shared=False, of_rows=True), identities
    return SubBatches(samples.indices, samples.indices, n_data, shared=True, of_rows=True), identities


def _described(source: SampleSource, curvature: RowCurvature, draw: RowDraw, part: Tensor) -> Rows:
    p = draw.probabilities
    weighted = torch.cat([rows.double().square().sum((1, 2)).cpu() for rows in curvature.rows()])
    # squared norms of the rows, by their weights in the mean over N
    norms = weighted * p
    # as many rows of those that have curvature
    uniform = min(1.0, float(draw.expected / draw.n_positive))
    own, of_uniform = (
        ((1 - p) / p.square() * norms.square()).sum(),
        ((1 - uniform) / uniform / p * norms.square()).sum(),
    )
    effect = float(own / of_uniform) if of_uniform > 0 else 0.0
    return Rows(
        torch.stack([source.indices[draw.samples], draw.rows], dim=1),
        part,
        p,
        effect,
        float(norms.sum() / weighted.sum()),
    )
