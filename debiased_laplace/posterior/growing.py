"""A fit that grows: by the samples of one more loader, or by doubling until that gains too little."""

import time
import warnings
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.choice import Weighting
from debiased_laplace.debiasing.held_out_kl import KLTerms, prior_trace, sample_terms
from debiased_laplace.debiasing.stopping import (
    ENOUGH_UNSEEN,
    FEWEST_UNSEEN,
    FIRST_STAGE,
    Stage,
    Stopping,
    stage,
    stage_sizes,
)
from debiased_laplace.posterior.fitting import Fit, Fitted, Task, curvatures_of, fit_curvature, look_at


def fit_samples(
    task: Task,
    loader: object,
    earlier: Pool | None,
    *,
    n_data: int | None,
    tolerance: float | None,
    progress_bar: bool,
) -> tuple[ParameterSelection, Fit]:
    """Fit the samples of a loader, together with those that were fitted earlier, or as many of them as are needed.

    Args:
        task: what is to be estimated.
        loader: of training samples.
        earlier: samples of earlier loaders; None to start anew.
        n_data: size of the data set that the likelihood stands for; None: as given earlier, or all samples yielded.
        tolerance: in nats, of what the last doubling of samples has to gain; None: use all samples.
        progress_bar: show progress.

    Returns:
        The parameters, and the fit; the model is as it was.

    Raises:
        ValueError: if weights, loader, samples or amounts cannot be used; before any long work.
    """
    started = time.perf_counter()
    ParameterSelection.all_weights(task.problem.model).check_finite()
    seed = task.split_options.seed
    source = sample_source(loader, seed, task.problem.keys)
    pool = Pool.of(source, n_data) if earlier is None else earlier.join(source, n_data, seed)
    if tolerance is not None:
        selection, fit = _until_enough(task, pool, tolerance, progress_bar=progress_bar)
    else:
        found = _fit_at(task, pool, pool.available, progress_bar=progress_bar)
        selection, fit = found.selection, replace(found.fit, pool=pool.with_read(pool.available))
    return selection, replace(fit, seconds=time.perf_counter() - started)


def _fit_at(task: Task, pool: Pool, positions: Int64[Tensor, " n"], *, progress_bar: bool) -> Fitted:
    """The fit of some samples, the same as if a loader had yielded just these."""
    source = replace(pool.source, indices=positions.sort().values)
    return fit_curvature(task, source, n_data=pool.size, progress_bar=progress_bar)


def _until_enough(task: Task, pool: Pool, tolerance: float, *, progress_bar: bool) -> tuple[ParameterSelection, Fit]:
    """Double the samples until that gains less than the tolerance, or there are no more."""
    sizes, order = _sizes(task, pool), pool.reading_order(task.split_options.seed)
    stages: list[Stage] = []
    before: Fit | None = None
    with tqdm(total=len(order), disable=not progress_bar, desc="[Doubling the samples]") as bar:
        for n in sizes:
            with warnings.catch_warnings(record=True) as caught:
                # only what is said of the posterior that is kept is news
                warnings.simplefilter("always", UserWarning)
                selection, fit, last = _at_stage(task, pool, order, n, before, progress_bar=progress_bar)
            stages.append(last)
            before = fit
            stopping = Stopping(tuple(stages), tolerance, len(order))
            bar.update(n - bar.n)
            bar.set_postfix_str(f"gained {last.shown_gain}, tolerance {tolerance:g}" if len(stages) > 1 else "")
            if stopping.enough:
                break
    for warning in caught:
        warnings.warn(warning.message, warning.category, stacklevel=4)
    return selection, replace(fit, pool=pool.with_read(order[:n]), stopping=stopping)


def _sizes(task: Task, pool: Pool) -> list[int]:
    """Samples of each stage: from those that were read on, or from the fewest that the estimator can take.

    Raises:
        ValueError: if no number of samples would do, or it would make no difference.
    """
    options, available = task.split_options, pool.available
    if isinstance(options.direction_samples, int) and isinstance(options.magnitude_samples, int):
        raise ValueError(
            "tolerance doubles the samples: expected direction_samples or magnitude_samples as a share of them; got "
            f"{options.direction_samples} and {options.magnitude_samples} samples."
        )
    options.draw(available, task.request, pool.size)
    sizes = stage_sizes(len(pool.read) or FIRST_STAGE, len(available))
    return [n for n in sizes if _can_take(task, available[:n], pool.size)]


def _can_take(task: Task, positions: Int64[Tensor, " n"], n_data: int) -> bool:
    try:
        task.split_options.draw(positions, task.request, n_data)
    except ValueError:
        return False
    return True


def _at_stage(
    task: Task, pool: Pool, order: Int64[Tensor, " _"], n: int, before: Fit | None, *, progress_bar: bool
) -> tuple[ParameterSelection, Fit, Stage]:
    """The fit of the first n samples, and what it gains over the one before; their rows are let go of."""
    found = _fit_at(task, pool, order[:n], progress_bar=progress_bar)
    unseen = order[n : n + max(n, ENOUGH_UNSEEN)].sort().values
    if before is None or len(unseen) < min(FEWEST_UNSEEN, pool.size - n):
        return found.selection, found.fit, Stage(n)
    with at_weights(task.problem.model, task.split_options.seed):
        inside, outside = _judges(task, pool, found, order[:n], unseen)
        weighting = task.weighting_of(found.selection, pool.size)
        smaller, larger = (_judged(fit, weighting, inside, outside) for fit in (before, found.fit))
    return (
        found.selection,
        found.fit,
        stage(
            smaller.terms,
            larger.terms,
            smaller.read - larger.read,
            smaller.unseen - larger.unseen,
            n_data=pool.size,
            drawn=inside[0].is_random,
        ),
    )


@dataclass(frozen=True, eq=False)
class _Judged:
    """What samples say of a posterior.

    Attributes:
        terms: its own.
        read: `sample_terms` of the samples that were read.
        unseen: likewise of those that were not.
    """

    terms: KLTerms
    read: Float[Tensor, " n"]
    unseen: Float[Tensor, " m"]


def _judged(
    fit: Fit, weighting: Weighting, inside: list[SubBatchCurvature], outside: list[SubBatchCurvature]
) -> _Judged:
    precision = fit.estimate.curvature.precision(weighting.likelihood_weight, weighting.prior)
    trace = prior_trace(precision, weighting.prior.expand(inside[0].network.n_parameters))
    terms = KLTerms(trace, float(precision.log_det), weighting.likelihood_weight)
    read, unseen = (sample_terms(terms, (part.traces(precision) for part in parts)) for parts in (inside, outside))
    return _Judged(terms, read, unseen)


def _judges(
    task: Task, pool: Pool, found: Fitted, read: Int64[Tensor, " n"], unseen: Int64[Tensor, " m"]
) -> tuple[list[SubBatchCurvature], list[SubBatchCurvature]]:
    """The curvature of the samples that were read, used or not, and of those that were not."""
    seed = task.split_options.seed

    def of(sets: list[SubBatch], n_before: int) -> list[SubBatchCurvature]:
        return curvatures_of(task.problem, found.network, found.some, sets, seed, n_before=n_before)

    def at(positions: Int64[Tensor, " _"]) -> list[SubBatch]:
        return [look_at(found.network, pool.source, positions, seed).samples] if len(positions) else []

    # draws that the posterior was fitted to, of which there are two a sample, would judge it too kindly
    drawn = [part.samples for part in found.curvatures if isinstance(part, RowCurvature) and part.is_random]
    unused = read[~torch.isin(read, found.fit.split.used_indices)].sort().values
    inside = (of(drawn, 2) or found.curvatures) + of(at(unused), 4)
    outside = of(at(unseen), 5)
    for curvature in inside + outside:
        if isinstance(curvature, RowCurvature):
            curvature.keep_rows()
    return inside, outside
