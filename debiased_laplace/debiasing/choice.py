r"""Choice of the estimator by held-out KL, cross-validated on the samples that the posterior is then fitted to.

The samples are dealt into parts. For each part, every trial is fitted to the other parts, with N reduced so that they
are the same share of it as all samples are of N. The trial's KL to the full batch is then estimated on the part set
aside; it is exact if the samples are all the data. The best trial is fitted to all samples.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.splitting import deal
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.cross_fitting import each_fold
from debiased_laplace.debiasing.directions import LANCZOS_RANK, choose_solver
from debiased_laplace.debiasing.estimate import estimate, estimate_variants
from debiased_laplace.debiasing.held_out_kl import prior_trace
from debiased_laplace.debiasing.options import Trial
from debiased_laplace.debiasing.split_curvature import SplitCurvature

_PARTS = 4
_PARTS_OF_LANCZOS = 2  # every part costs a Lanczos run for each trial and fold
_SMALLEST = 4  # samples in a part
_ENOUGH = 64  # samples set aside in total: differences are paired, and each part costs a fit of every trial
_FOLDS = 4  # folds of a trial, which is only ranked: each fold costs an eigendecomposition


@dataclass(frozen=True, eq=False)
class Weighting:
    r"""Weight of the likelihood and prior precision, which turn a curvature into a posterior precision.

    Attributes:
        likelihood_weight: $N \tau$.
        prior: prior precision $P_0$, one number or one per parameter.
        of_blocks: whether the prior is constant in each parameter tensor, which a Kronecker basis requires.
    """

    likelihood_weight: float
    prior: Float[Tensor, ""] | Float[Tensor, " P"]
    of_blocks: bool = True


@dataclass(frozen=True)
class RunnerUp:
    """A trial that was not chosen.

    Attributes:
        trial: the trial.
        excess: its KL to the full batch minus that of the chosen one, in nats.
        standard_error: standard error of the excess, paired by sample.
    """

    trial: Trial
    excess: float
    standard_error: float


@dataclass(frozen=True)
class Choice:
    """The chosen trial, and by how much the others are worse.

    Attributes:
        chosen: the best trial. Its lead is optimistic, because it was selected among many.
        runners_up: the others, best first.
        n_samples: number of samples that were set aside in turn, or of rows that were drawn for the comparison.
        unit: "samples" or "rows".
    """

    chosen: Trial
    runners_up: tuple[RunnerUp, ...]
    n_samples: int
    unit: str = "samples"

    def found(self, rank: int) -> "Choice":
        """Return the choice with the rank that the samples turned out to support."""
        options = self.chosen.options
        if options.rank is None or not 0 < rank < options.rank:
            return self
        return replace(self, chosen=replace(self.chosen, options=replace(options, rank=rank)))

    def __str__(self) -> str:
        if not self.runners_up:
            return f"the only candidate: {self.chosen}"
        lines = [f"chosen by held-out KL on {self.n_samples} {self.unit} (optimistic): {self.chosen}"]
        lines += [f"  + {r.excess:.2f} ± {r.standard_error:.2f} nats: {r.trial}" for r in self.runners_up]
        return "\n".join(lines)


def choose(
    batch: SubBatchCurvature, trials: Sequence[Trial], weighting: Weighting, *, n_data: float, seed: int
) -> Choice:
    """Choose the trial whose posterior comes closest to that of the full batch.

    Args:
        batch: curvature of all samples.
        trials: candidates.
        weighting: prior and likelihood weight of the posteriors.
        n_data: size N of the data set, as a number of samples with their mean weight.
        seed: of the parts, and of the splits within them.

    Returns:
        The choice, with the excess KL of the others.

    Raises:
        ValueError: if there are too few samples to set any aside.
    """
    trials = _offered(batch, trials, weighting)
    if len(trials) == 1:
        return Choice(trials[0], (), 0)
    return ranked(trials, trial_terms(batch, trials, [weighting], n_data=n_data, seed=seed)[0])


def trial_terms(
    batch: SubBatchCurvature, trials: Sequence[Trial], weightings: Sequence[Weighting], *, n_data: float, seed: int
) -> Float[Tensor, "w t n"]:
    """Compute the terms of the samples set aside in the KL of every trial's posterior to the full batch.

    Args:
        batch: curvature of all samples.
        trials: candidates.
        weightings: priors and likelihood weights of the posteriors; all share the curvature estimates.
        n_data: size N of the data set, as a number of samples with their mean weight.
        seed: of the parts, and of the splits within them.

    Returns:
        Terms in nats, up to a constant that the trials of a weighting share.

    Raises:
        ValueError: if there are too few samples to set any aside.
    """
    n = batch.n_samples
    if n < 2 * _SMALLEST:
        raise ValueError(f"Choosing by held-out KL sets samples aside: expected at least {2 * _SMALLEST}, got {n}.")
    if isinstance(batch, RowCurvature):
        batch.keep_rows()
    n_parts = min(_PARTS_OF_LANCZOS if _by_lanczos(batch, trials[0]) else _PARTS, n // _SMALLEST)
    enough = math.ceil(_ENOUGH / (n // n_parts))
    parts = deal(n, n_parts, torch.Generator().manual_seed(seed))
    terms: list[list[list[Tensor]]] = [[[] for _ in trials] for _ in weightings]
    with warnings.catch_warnings():
        # trials may lack samples for their rank, which the user did not ask for
        warnings.simplefilter("ignore", UserWarning)
        for part in each_fold(parts, first=enough, progress_bar=batch.progress_bar, description="[Choosing]"):
            rest, held = batch.part(part.others), batch.part(part.held)
            evaluation = _evaluation_curvature(rest)
            n_rest = max(rest.n_samples, round(n_data * rest.n_samples / n))
            for i, curvature in _fitted(trials, partial(split_for, rest, n_data=n_rest, seed=seed)):
                for by_trial, weighting in zip(terms, weightings, strict=True):
                    by_trial[i].append(_terms(curvature, evaluation, held, weighting, share=n / n_data))
    return torch.stack([torch.stack([torch.cat(of_trial) for of_trial in by_trial]) for by_trial in terms])


def choose_by_rows(
    batch: SubBatchCurvature,
    trials: Sequence[Trial],
    weighting: Weighting,
    split_of: Callable[[Trial], SplitCurvature],
    judges: SubBatchCurvature,
) -> Choice:
    """Choose the trial of drawn rows whose posterior comes closest to that of the full batch.

    Args:
        batch: curvature of the drawn rows.
        trials: candidates.
        weighting: prior and likelihood weight of the posteriors.
        split_of: function from a trial to its parts of the rows.
        judges: curvature of rows drawn independently, from all N samples.

    Returns:
        The choice.
    """
    trials = _offered(batch, trials, weighting)
    if len(trials) == 1:
        return Choice(trials[0], (), 0, "rows")
    quick = [replace(t, options=replace(t.options, n_folds=min(t.options.n_folds, _FOLDS))) for t in trials]
    prior = weighting.prior.expand(batch.network.n_parameters)
    assert judges.draw is not None  # for the type checker
    own, terms = torch.zeros(len(trials), dtype=torch.float64), [torch.zeros(0)] * len(trials)
    with warnings.catch_warnings():
        # trials may lack rows for their rank, which the user did not ask for
        warnings.simplefilter("ignore", UserWarning)
        for i, curvature in _fitted(quick, split_of):
            precision = curvature.precision(weighting.likelihood_weight, weighting.prior)
            own[i] = 0.5 * (prior_trace(precision, prior) + float(precision.log_det))
            terms[i] = 0.5 * weighting.likelihood_weight * judges.traces(precision).double().cpu() / judges.n_samples
    values = own + torch.stack([t.sum() for t in terms])
    order = values.argsort(stable=True).tolist()
    best = order[0]
    runners_up = tuple(
        RunnerUp(
            trials[i],
            float(values[i] - values[best]),
            float(judges.draw.left_out @ (terms[i] - terms[best]).square()) ** 0.5,
        )
        for i in order[1:]
    )
    return Choice(trials[best], runners_up, judges.n_samples, "rows")


def ranked(trials: Sequence[Trial], values: Float[Tensor, "t n"]) -> Choice:
    """Rank the trials by their mean terms, the lowest first.

    Args:
        trials: candidates.
        values: `trial_terms` of one weighting.

    Returns:
        The choice, with the excess KL of the others.
    """
    order = values.mean(1).argsort(stable=True).tolist()
    best, n = order[0], values.shape[1]
    excess = values - values[best]
    runners_up = tuple(
        RunnerUp(trials[i], float(excess[i].mean()), float(excess[i].std(correction=1)) / n**0.5) for i in order[1:]
    )
    return Choice(trials[best], runners_up, n)


def _offered(batch: SubBatchCurvature, trials: Sequence[Trial], weighting: Weighting) -> list[Trial]:
    """Select the feasible trials; of those that give the same estimate, the first."""
    rows = batch.n_rows / batch.n_samples
    limited = any(t.options.rank is None for t in trials) and _by_lanczos(batch, trials[0])
    distinct: dict[Trial, Trial] = {}
    for trial in trials:
        options, limit = trial.options, batch.network.n_parameters
        if options.complement == "kron" and not weighting.of_blocks:
            continue
        if isinstance(batch, RowCurvature):
            held_out = options.magnitudes == "held_out"
            n = _n_directions(batch.n_samples, trial.direction_share) if held_out else batch.n_samples
            limit = min(limit, round(n * rows))
        elif options.metric == "kron":
            continue
        if limited:
            limit = min(limit, LANCZOS_RANK)
        rank = None if options.rank is None else min(options.rank, limit)
        distinct.setdefault(replace(trial, options=replace(options, rank=rank)), trial)
    # if no trial is feasible, keep them all: the estimator raises the error
    return list(distinct.values()) or list(trials)


def _by_lanczos(batch: SubBatchCurvature, trial: Trial) -> bool:
    options = trial.options
    solver = choose_solver(batch, None) if options.solver == "auto" else options.solver
    return options.structure == "lowrank" and solver == "lanczos"


def _evaluation_curvature(rest: SubBatchCurvature) -> SubBatchCurvature:
    """Return the curvature of the fitted samples for evaluation, with Monte-Carlo draws that no estimate has used."""
    # an estimate uses two draws a sample: one for directions, one for the samples' own share
    evaluation = rest.redrawn().redrawn()
    if isinstance(evaluation, RowCurvature) and evaluation.is_random:
        evaluation.keep_rows()
    return evaluation


def _terms(
    curvature: LowRankCurvature, fitted: SubBatchCurvature, held: SubBatchCurvature, weighting: Weighting, share: float
) -> Float[Tensor, " h"]:
    """Compute the term of every sample set aside in a posterior's KL to the full batch, in nats, up to a constant."""
    precision = curvature.precision(weighting.likelihood_weight, weighting.prior)
    prior = weighting.prior.expand(held.network.n_parameters)
    own = 0.5 * (prior_trace(precision, prior) + float(precision.log_det))
    seen, unseen = fitted.traces(precision).double().mean(), held.traces(precision).double()
    return (own + 0.5 * weighting.likelihood_weight * (share * seen + (1 - share) * unseen)).cpu()


def _fitted(trials: Sequence[Trial], split_of: Callable[[Trial], SplitCurvature]) -> list[tuple[int, LowRankCurvature]]:
    """Fit every trial; those that differ only in rank and complement share their directions."""
    groups: dict[tuple[str, str, float], list[int]] = {}
    for i, trial in enumerate(trials):
        share = trial.direction_share if trial.options.magnitudes == "held_out" else 1.0
        groups.setdefault((trial.options.magnitudes, trial.options.metric, share), []).append(i)
    fitted = []
    for members in groups.values():
        variants = [trials[i].options for i in members]
        split = split_of(trials[members[0]])
        if variants[0].structure == "lowrank":
            estimates = estimate_variants(split, variants)
        else:
            estimates = [estimate(split, options) for options in variants]
        fitted += [(i, each.curvature) for i, each in zip(members, estimates, strict=True)]
    return fitted


def split_for(batch: SubBatchCurvature, trial: Trial, n_data: float, seed: int) -> SplitCurvature:
    """Split the samples of a batch as a trial requires."""
    n, options = batch.n_samples, trial.options
    generator = torch.Generator().manual_seed(seed)
    if options.magnitudes == "held_out":
        order = torch.randperm(n, generator=generator)
        n_a = _n_directions(n, trial.direction_share)
        a, b = order[:n_a].sort().values, order[n_a:].sort().values
        return SplitCurvature(batch.part(a), batch.part(b), None, n_data)
    if options.magnitudes == "cross_fitted":
        return SplitCurvature(batch, None, deal(n, min(options.n_folds, _FOLDS, n), generator), n_data)
    return SplitCurvature(batch, None, None, n_data)


def _n_directions(n: int, share: float) -> int:
    """Return how many of n samples give directions; at least two are left, for a value and its error."""
    return min(max(1, round(share * n)), n - 2)
