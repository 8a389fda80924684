"""Many low-rank posteriors of the same samples for little more than the price of one.

Each is the one that `DebiasedLaplace(...).fit` gives with its options; what they have in common (rows, directions,
folds, trials of "auto") is computed once.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.fidelity_tasks import Task
from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.debiasing.choice import Choice, Weighting, ranked, trial_terms
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.estimate import estimate, estimate_variants
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import SplitCurvature
from debiased_laplace.posterior.fit import fit_curvature

Kinds = dict[str, dict[str, Any]]


@dataclass(eq=False)
class SharedFit:
    """Samples whose curvature is computed once.

    Attributes:
        task: that they are from.
        loader: of the samples.
        seed: of splits and folds.
    """

    task: Task
    loader: DataLoader[Any]
    seed: int

    def __post_init__(self) -> None:
        # a first fit for the sake of the samples; one direction is the cheapest
        la = self._unfitted({"magnitudes": "same_batch", "complement": "none", "rank": 1, "solver": "lanczos"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.fit(self.loader, n_data=self.task.n_data)
        pool = la.fit_result.pool
        self._fit, (batch, *_) = fit_curvature(
            la._spec, la._weighting, pool.source, n_data=self.task.n_data, known_n_data=True, progress_bar=False
        )
        if not isinstance(batch, RowCurvature):
            raise TypeError("Expected a curvature with rows.")
        batch.keep_rows()
        self.batch = batch
        self._positions = self._fit.split.direction_indices

    def _unfitted(self, options: dict[str, Any]) -> Any:
        task, samples = self.task, {"sampling": "uniform", "seed": self.seed}
        return DebiasedLaplace(task.model, task.likelihood, sigma_noise=task.sigma_noise, **samples, **options)

    def posteriors(self, kinds: Kinds) -> Iterator[tuple[str, Any, float]]:
        """Fitted posteriors by name, and how long each took, what they share divided among them."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, options in kinds.items():
            apart = {k: v for k, v in options.items() if k not in ("rank", "complement")}
            # the metric brings its own complement
            groups.setdefault(tuple(sorted(apart.items())), []).append(name)
        for names in groups.values():
            yield from self._group({name: kinds[name] for name in names})

    def _group(self, kinds: Kinds) -> Iterator[tuple[str, Any, float]]:
        start = time.perf_counter()
        posteriors = {name: self._unfitted(options) for name, options in kinds.items()}
        first = next(iter(posteriors.values()))
        split = first._spec.split.draw(self._positions, first._spec.request, self.task.n_data)
        parts = [
            self.batch.part(torch.searchsorted(self._positions, some))
            for some in (split.direction_indices, None if split.shared else split.magnitude_indices)
            if some is not None
        ]
        roles = SplitCurvature(parts[0], None if split.shared else parts[1], split.folds, split.n_data)
        options = [la._spec.request.options.resolved(prior_of_blocks=True) for la in posteriors.values()]
        with at_weights(self.task.model, self.seed), warnings.catch_warnings():
            # too few samples for a rank: the rank that was found is recorded
            warnings.simplefilter("ignore", UserWarning)
            found = estimate_variants(roles, options)
        seconds = (time.perf_counter() - start) / len(kinds)
        for (name, la), chosen, one in zip(posteriors.items(), options, found, strict=True):
            la._adopt(replace(self._fit, split=split, estimate=one, options=chosen))
            yield name, la, seconds

    def shrunk(self, weights: dict[str, float]) -> Iterator[tuple[str, Any, float]]:
        """Linear shrinkage: a weight of the samples' own curvature, the rest of the cross-fitted Kronecker estimate."""
        start = time.perf_counter()
        la = self._unfitted({"magnitudes": "cross_fitted", "complement": "kron"})
        split = la._spec.split.draw(self._positions, la._spec.request, self.task.n_data)
        options = la._spec.request.options
        with at_weights(self.task.model, self.seed):
            own = estimate(SplitCurvature(self.batch, None, None, split.n_data), _same_batch(options))
            target = estimate(
                SplitCurvature(self.batch, None, split.folds, split.n_data),
                EstimatorOptions("kron", magnitudes=options.magnitudes, n_folds=options.n_folds, seed=options.seed),
            )
        basis = target.curvature.basis
        rotated = basis.coordinates(own.curvature.directions.T).T.contiguous()
        seconds = (time.perf_counter() - start) / len(weights)
        for name, weight in weights.items():
            mixed = LowRankCurvature(
                (1 - weight) * target.curvature.diagonal, rotated, weight * own.curvature.weights, basis
            )
            fit = replace(self._fit, split=split, estimate=replace(own, curvature=mixed), options=options)
            posterior = self._unfitted({"magnitudes": "cross_fitted", "complement": "kron"})
            posterior._adopt(fit)
            yield name, posterior, seconds

    def choices(self, kind: dict[str, Any], priors: list[float]) -> tuple[dict[float, Choice], float]:
        """What "auto" chooses at every prior precision, and how long the trials took."""
        start = time.perf_counter()
        task, la = self.task, self._unfitted(kind)
        n_rows = min(self.batch.n_rows, self.batch.network.n_parameters)
        request = la._spec.request.resolved(prior_of_blocks=True)
        trials = request.trials(la._spec.split.direction_share(self.batch.n_samples), n_rows)
        weight = task.n_data / task.sigma_noise**2
        weightings = [Weighting(weight, torch.tensor(prior)) for prior in priors]
        with at_weights(task.model, self.seed):
            terms = trial_terms(self.batch, trials, weightings, n_data=task.n_data, seed=self.seed)
        found = {prior: ranked(trials, values) for prior, values in zip(priors, terms, strict=True)}
        return found, time.perf_counter() - start


def _same_batch(options: EstimatorOptions) -> EstimatorOptions:
    return replace(options, magnitudes="same_batch", complement="none")
