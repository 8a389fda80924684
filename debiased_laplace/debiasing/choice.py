r"""The estimator that suits the data, chosen by held-out KL on samples that are set aside in turn and then used.

The samples are dealt into parts. Without each part, every trial is fitted on the rest, as if the rest were as large a
share of its data set as all samples are of theirs, and judged by its KL to the full batch, which the part set aside
stands for. Where the samples are all the data, nothing is left to stand for and the KL is exact. The winner is then
fitted on all samples.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.splitting import deal
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.cross_fitting import each_fold
from debiased_laplace.debiasing.directions import LANCZOS_RANK, choose_solver
from debiased_laplace.debiasing.estimate import estimate, estimates_of_ranks
from debiased_laplace.debiasing.held_out_kl import prior_trace
from debiased_laplace.debiasing.lowrank import LowRankChoice
from debiased_laplace.debiasing.options import Trial
from debiased_laplace.debiasing.split_curvature import SplitCurvature

_PARTS = 4
_PARTS_OF_LANCZOS = 2  # every part costs a Lanczos run for each trial and fold
_SMALLEST = 4  # samples a part
_ENOUGH = 64  # samples set aside in all: differences are paired, and each part costs a fit of every trial
_FOLDS = 4  # of a trial, which only has to be ranked: each fold costs an eigendecomposition


@dataclass(frozen=True, eq=False)
class Weighting:
    r"""What turns a curvature into a posterior.

    Attributes:
        likelihood_weight: $N \tau$.
        prior: $P_0$: one number, or one per parameter.
        of_blocks: whether the prior is the same for all entries of a parameter, as a Kronecker basis wants it.
    """

    likelihood_weight: float
    prior: Float[Tensor, ""] | Float[Tensor, " P"]
    of_blocks: bool = True


@dataclass(frozen=True)
class RunnerUp:
    """A trial that was not chosen.

    Attributes:
        trial: what it was.
        excess: its KL to the full batch, less the chosen one's, in nats.
        standard_error: of the excess, paired by sample.
    """

    trial: Trial
    excess: float
    standard_error: float


@dataclass(frozen=True)
class Choice:
    """What was chosen, and by how much.

    Attributes:
        chosen: the winner. That it came out best of many makes its lead look larger than it is.
        runners_up: the others, best first.
        n_samples: set aside in turn, which the values rest on.
    """

    chosen: Trial
    runners_up: tuple[RunnerUp, ...]
    n_samples: int

    def found(self, rank: int) -> "Choice":
        """The same, knowing that the samples have no more directions than so many."""
        options = self.chosen.options
        if options.rank is None or not 0 < rank < options.rank:
            return self
        return replace(self, chosen=replace(self.chosen, options=replace(options, rank=rank)))

    def __str__(self) -> str:
        if not self.runners_up:
            return f"nothing else to choose: {self.chosen}"
        lines = [f"chosen by held-out KL on {self.n_samples} samples (optimistic): {self.chosen}"]
        lines += [f"  + {r.excess:.2f} ± {r.standard_error:.2f} nats: {r.trial}" for r in self.runners_up]
        return "\n".join(lines)


def choose(
    batch: SubBatchCurvature, trials: Sequence[Trial], weighting: Weighting, *, n_data: int, seed: int
) -> Choice:
    """The trial whose posterior comes closest to the full batch's.

    Args:
        batch: curvature of all samples.
        trials: what to choose from.
        weighting: prior and likelihood of the posteriors.
        n_data: N.
        seed: of the parts, and of the splits within.

    Returns:
        The choice, with what the others would have cost.

    Raises:
        ValueError: if there are too few samples to set any aside.
    """
    trials = _offered(batch, trials, weighting)
    if len(trials) == 1:
        return Choice(trials[0], (), 0)
    return ranked(trials, trial_terms(batch, trials, [weighting], n_data=n_data, seed=seed)[0])


def trial_terms(
    batch: SubBatchCurvature, trials: Sequence[Trial], weightings: Sequence[Weighting], *, n_data: int, seed: int
) -> Float[Tensor, "w t n"]:
    """What samples set aside say of the KL of every trial's posterior to the full batch, for every weighting.

    Args:
        batch: curvature of all samples.
        trials: what to choose from.
        weightings: prior and likelihood of the posteriors; an estimate serves them all.
        n_data: N.
        seed: of the parts, and of the splits within.

    Returns:
        In nats, up to a constant that the trials of a weighting share.

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
        # what a trial cannot have for want of samples is no news
        warnings.simplefilter("ignore", UserWarning)
        for part in each_fold(parts, first=enough, progress_bar=batch.progress_bar, description="[Choosing]"):
            rest, held = batch.part(part.others), batch.part(part.held)
            judges = _judging(rest)
            n_rest = max(rest.n_samples, round(n_data * rest.n_samples / n))
            for i, curvature in _fitted(rest, trials, n_rest, seed):
                for of_weighting, weighting in zip(terms, weightings, strict=True):
                    of_weighting[i].append(_terms(curvature, judges, held, weighting, share=n / n_data))
    return torch.stack([torch.stack([torch.cat(of_trial) for of_trial in some]) for some in terms])


def ranked(trials: Sequence[Trial], values: Float[Tensor, "t n"]) -> Choice:
    """The trials by their mean terms, the lowest first.

    Args:
        trials: what there was.
        values: `trial_terms` of one weighting.

    Returns:
        The choice, with what the others would have cost.
    """
    order = values.mean(1).argsort(stable=True).tolist()
    best, n = order[0], values.shape[1]
    excess = values - values[best]
    runners_up = tuple(
        RunnerUp(trials[i], float(excess[i].mean()), float(excess[i].std(correction=1)) / n**0.5) for i in order[1:]
    )
    return Choice(trials[best], runners_up, n)


def _offered(batch: SubBatchCurvature, trials: Sequence[Trial], weighting: Weighting) -> list[Trial]:
    """The trials that can be had; of those that the samples cannot tell apart the first one."""
    rows = batch.n_rows / batch.n_samples
    limited = any(t.options.rank is None for t in trials) and _by_lanczos(batch, trials[0])
    found: dict[Trial, Trial] = {}
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
        found.setdefault(replace(trial, options=replace(options, rank=rank)), trial)
    # who asks for what cannot be had is told so by whoever would have to do it
    return list(found.values()) or list(trials)


def _by_lanczos(batch: SubBatchCurvature, trial: Trial) -> bool:
    options = trial.options
    solver = choose_solver(batch, None) if options.solver == "auto" else options.solver
    return options.structure == "lowrank" and solver == "lanczos"


def _judging(rest: SubBatchCurvature) -> SubBatchCurvature:
    """The samples of the posteriors as their judges: where draws are drawn, with draws that none was fitted to."""
    # an estimate has two draws a sample: one for directions, and another for the samples' own share
    judges = rest.redrawn().redrawn()
    if isinstance(judges, RowCurvature) and judges.is_random:
        judges.keep_rows()
    return judges


def _terms(
    curvature: LowRankCurvature, inside: SubBatchCurvature, held: SubBatchCurvature, weighting: Weighting, share: float
) -> Float[Tensor, " h"]:
    """What every sample set aside says of a posterior's KL to the full batch, in nats, up to a constant."""
    precision = curvature.precision(weighting.likelihood_weight, weighting.prior)
    prior = weighting.prior.expand(held.network.n_parameters)
    own = 0.5 * (prior_trace(precision, prior) + float(precision.log_det))
    known, unseen = inside.traces(precision).double().mean(), held.traces(precision).double()
    return (own + 0.5 * weighting.likelihood_weight * (share * known + (1 - share) * unseen)).cpu()


def _fitted(
    rest: SubBatchCurvature, trials: Sequence[Trial], n_data: int, seed: int
) -> list[tuple[int, LowRankCurvature]]:
    """Every trial's estimate; those that differ only in rank and complement share what they can."""
    groups: dict[tuple[str, str, float], list[int]] = {}
    for i, trial in enumerate(trials):
        share = trial.direction_share if trial.options.magnitudes == "held_out" else 1.0
        groups.setdefault((trial.options.magnitudes, trial.options.metric, share), []).append(i)
    found = []
    for members in groups.values():
        options = trials[members[0]].options
        split = split_for(rest, trials[members[0]], n_data, seed)
        if options.structure == "lowrank":
            choices = [LowRankChoice(trials[i].options.rank, trials[i].options.complement or "kron") for i in members]
            estimates = estimates_of_ranks(split, options, choices)
        else:
            estimates = [estimate(split, trials[i].options) for i in members]
        found += [(i, one.curvature) for i, one in zip(members, estimates, strict=True)]
    return found


def split_for(batch: SubBatchCurvature, trial: Trial, n_data: int, seed: int) -> SplitCurvature:
    """The samples of a batch, by what a trial uses them for."""
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
    """Of n samples, those for directions; the others are at least two, for a value and its error."""
    return min(max(1, round(share * n)), n - 2)
