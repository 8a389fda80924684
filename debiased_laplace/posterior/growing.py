r"""A fit that grows: by the samples of one more loader, or by doubling until that gains too little.

Posterior i of a sequence is judged against posterior i + 1 by the KL of both to the full batch, for which stands
$H = f H_B + (1 - f) H_c$: the samples B that the larger one has read, the smaller one's among them, with their exact
share f, and samples c that neither has seen. Only c is subject to chance, and the two are paired on it.
"""

import warnings
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.source import sample_source
from debiased_laplace.debiasing.held_out_kl import (
    HeldOutKL,
    KLDifference,
    KLTerms,
    estimate_held_out_kl,
    prior_trace,
    sample_terms,
)
from debiased_laplace.debiasing.stopping import FIRST_STAGE, Stage, Stopping, stage_sizes
from debiased_laplace.posterior.fitting import Fit, Fitted, Task, at_work, curvatures_of, fit_curvature, look_at


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
    ParameterSelection.all_weights(task.problem.model).check_finite()
    seed = task.split_options.seed
    source = sample_source(loader, seed, task.problem.keys)
    pool = Pool.of(source, n_data) if earlier is None else earlier.joined(source, n_data, seed)
    if tolerance is not None:
        return _until_enough(task, pool, tolerance, progress_bar=progress_bar)
    found = _fit_at(task, pool, pool.at_hand, progress_bar=progress_bar)
    return found.selection, replace(found.fit, pool=pool.having_read(pool.at_hand))


def _fit_at(task: Task, pool: Pool, positions: Int64[Tensor, " n"], *, progress_bar: bool) -> Fitted:
    """The fit of some samples, the same as if a loader had yielded just these."""
    source = replace(pool.source, indices=positions.sort().values)
    return fit_curvature(task, source, n_data=pool.size, progress_bar=progress_bar)


def _until_enough(task: Task, pool: Pool, tolerance: float, *, progress_bar: bool) -> tuple[ParameterSelection, Fit]:
    """Double the samples until that gains less than the tolerance, or there are no more."""
    first, order = _first_size(task, pool), pool.in_order(task.split_options.seed)
    stages: list[Stage] = []
    before: Fitted | None = None
    with tqdm(total=len(order), disable=not progress_bar, desc="[Doubling the samples]") as bar:
        for n in stage_sizes(first, len(order)):
            with warnings.catch_warnings(record=True) as caught:
                # only what is said of the posterior that is kept is news
                warnings.simplefilter("always")
                found = _fit_at(task, pool, order[:n], progress_bar=progress_bar)
            stage = Stage(n)
            if before is not None:
                gain = _gain(task, pool, before, found, order, n)
                stage = stage if gain is None else Stage(n, gain.value, gain.standard_error)
                bar.set_postfix_str(f"the last doubling gained {stage.shown_gain} of {tolerance:g} held-out KL")
            stages.append(stage)
            bar.update(n - bar.n)
            stopping = Stopping(tuple(stages), tolerance, len(order))
            if stopping.enough:
                break
            before = replace(found, curvatures=[])  # their rows are large
    for warning in caught:
        warnings.warn(warning.message, warning.category, stacklevel=4)
    pool = pool.having_read(order[:n].sort().values)
    return found.selection, replace(found.fit, pool=pool, stopping=stopping)


def _first_size(task: Task, pool: Pool) -> int:
    """Samples of the first stage: those that were read, or the fewest that the estimator can take.

    Raises:
        ValueError: if no number of samples would do, or it would make no difference.
    """
    options, at_hand = task.split_options, pool.at_hand
    if isinstance(options.direction_samples, int) and isinstance(options.magnitude_samples, int):
        raise ValueError(
            "tolerance doubles the samples: expected direction_samples or magnitude_samples as a share of them; got "
            f"{options.direction_samples} and {options.magnitude_samples} samples."
        )
    options.draw(at_hand, task.request, pool.size)
    n = len(pool.read) or FIRST_STAGE
    while n < len(at_hand):
        try:
            options.draw(at_hand[:n], task.request, pool.size)
        except ValueError:
            n *= 2
        else:
            return n
    return len(at_hand)


def _gain(
    task: Task, pool: Pool, before: Fitted, found: Fitted, order: Int64[Tensor, " n"], n: int
) -> KLDifference | None:
    """How much further from the full batch the smaller fit is; None where no sample is left to tell."""
    unseen = order[n : 2 * n].sort().values
    if len(unseen) == 0 and n < pool.size:
        return None
    seed = task.split_options.seed
    unused = order[:n][~torch.isin(order[:n], found.fit.split.used_indices)].sort().values
    with at_work(task.problem.model, seed):
        # draws that the posterior was fitted to would judge it too kindly
        inside = [*(curvature.redrawn() for curvature in found.curvatures), *_curvatures_at(task, pool, found, unused)]
        outside = _curvatures_at(task, pool, found, unseen)
        for curvature in inside + outside:
            if isinstance(curvature, RowCurvature):
                curvature.keep_rows()

        def held_out_kl(fitted: Fitted) -> HeldOutKL:
            weighting = task.weighting_of(found.selection, pool.size)
            precision = fitted.fit.estimate.curvature.precision(weighting.likelihood_weight, weighting.prior)
            prior = weighting.prior.expand(len(found.network.like))
            terms = KLTerms(prior_trace(precision, prior), float(precision.log_det), weighting.likelihood_weight)
            of_inside, of_outside = (
                sample_terms(terms, [part.traces(precision) for part in parts]) for parts in (inside, outside)
            )
            return estimate_held_out_kl(
                terms, of_outside, of_inside, n_data=pool.size, n_fitted=n, sample_keys=unseen, context=""
            )

        return held_out_kl(before) - held_out_kl(found)


def _curvatures_at(task: Task, pool: Pool, found: Fitted, positions: Int64[Tensor, " m"]) -> list[SubBatchCurvature]:
    """The curvature of samples that the fit did not use; nothing where there are none."""
    if len(positions) == 0:
        return []
    seed = task.split_options.seed
    seen = look_at(found.network, pool.source, positions, seed, keep=True, progress_bar=False)
    n_before = len(found.curvatures)
    return curvatures_of(task.problem, found.network, found.some, [seen], seed, progress_bar=False, n_before=n_before)
