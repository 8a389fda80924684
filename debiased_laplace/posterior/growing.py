"""Fits of a growing number of samples: those of a further loader, or doubled until the held-out KL gains too little."""

import time
import warnings
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.sharing import united
from debiased_laplace.data.source import SampleSource, sample_source
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
from debiased_laplace.posterior.drawn_fit import SamplingOptions, fit_drawn_rows, fit_rows_again
from debiased_laplace.posterior.fit import (
    FitResult,
    FitSpec,
    WeightingOf,
    first_samples,
    fit_curvature,
    load,
    seed_of_draws,
)

Fitted = tuple[FitResult, list[SubBatchCurvature]]


def fit_samples(
    spec: FitSpec,
    weighting_of: WeightingOf,
    loader: object,
    earlier: FitResult | None,
    *,
    sampling: SamplingOptions,
    n_data: int | None,
    tolerance: float | None,
    progress_bar: bool,
) -> FitResult:
    """Fit the samples of a loader together with those fitted earlier, or as many of them as are needed.

    Args:
        spec: request.
        weighting_of: prior and likelihood weight of the posterior.
        loader: of training samples.
        earlier: fit whose samples these join; None to start anew.
        sampling: what of the samples enters the curvature.
        n_data: size of the data set that the likelihood stands for; None: as given earlier, or all samples yielded.
        tolerance: smallest gain, in nats, of the last doubling of samples; None: use all samples.
        progress_bar: show progress.

    Returns:
        The fit; the model is as it was.

    Raises:
        ValueError: if weights, loader, samples or amounts cannot be used; before any long work.
    """
    started = time.perf_counter()
    ParameterSelection.all_weights(spec.model).check_finite()
    seed = spec.split.seed
    by_rows = sampling.sampling == "curvature"
    if earlier is not None and earlier.split.of_rows != by_rows:
        was, now = ("curvature", "uniform") if earlier.split.of_rows else ("uniform", "curvature")
        raise ValueError(f"override=False goes on with the sampling of the earlier fit, {was!r}; got {now!r}.")
    if by_rows:
        return fit_drawn_rows(
            spec,
            weighting_of,
            loader,
            earlier,
            n_rows=sampling.n_rows,
            n_data=n_data,
            tolerance=tolerance,
            progress_bar=progress_bar,
        )
    source = united(sample_source(loader, seed, spec.keys, repeats=spec.processes.several), spec.processes, seed)
    pool = Pool.of(source, n_data) if earlier is None else _joined(earlier, source, n_data, seed)
    growth = _Growth(spec, weighting_of, pool, progress_bar)
    positions = pool.available
    if sampling.n_rows is not None:
        if earlier is not None:
            raise ValueError("n_rows with sampling='uniform' is of a new fit; got it with override=False.")
        positions = pool.reading_order(seed)[: growth.n_samples_of(sampling.n_rows)]
    if tolerance is not None:
        fit = growth.until_enough(tolerance, len(positions))
    else:
        fit = replace(growth.fit_at(positions)[0], pool=pool.with_read(positions))
    return replace(fit, n_data_given=pool.n_data, seconds=time.perf_counter() - started)


def _joined(earlier: FitResult, source: SampleSource, n_data: int | None, seed: int) -> Pool:
    """Return the pool of the fitted samples and those of a loader; after loading a state, the loader yields both.

    Raises:
        ValueError: if no sample is new, or the samples cannot be joined.
    """
    if earlier.pool is not None:
        return earlier.pool.join(source, n_data, seed)
    n_data = earlier.n_data_given if n_data is None else n_data
    pool = Pool.resumed(source, earlier.identities, n_data, seed)
    # with weights, N is their sum and no number of samples
    n_before = earlier.split.n_data if earlier.split.weight is None else earlier.split.n_samples
    if pool.size < n_before and n_data is None:
        raise ValueError(
            f"The state is of a fit to {n_before} samples; the loader yields {pool.size}. Expected at "
            "least as many, or n_data."
        )
    return pool


def fit_again(spec: FitSpec, weighting_of: WeightingOf, earlier: FitResult) -> FitResult:
    """Fit the samples of an earlier fit again, for another prior; `spec` is otherwise that of the fit."""
    started = time.perf_counter()
    if earlier.drawn is not None:
        fit = fit_rows_again(spec, weighting_of, earlier)
    else:
        pool = earlier.pool
        assert pool is not None  # the caller has checked
        fit = replace(_Growth(spec, weighting_of, pool, progress_bar=False).fit_at(pool.read)[0], pool=pool)
    return replace(fit, stopping=earlier.stopping, seconds=time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class _Growth:
    """Fits of several numbers of samples of a pool."""

    spec: FitSpec
    weighting_of: WeightingOf
    pool: Pool
    progress_bar: bool

    def fit_at(self, positions: Int64[Tensor, " n"]) -> Fitted:
        """Fit some samples, as if a loader had yielded just these."""
        source = replace(self.pool.source, indices=positions.sort().values)
        return fit_curvature(
            self.spec,
            self.weighting_of,
            source,
            n_data=self.pool.size,
            known_n_data=self.pool.n_data is not None,
            progress_bar=self.progress_bar,
        )

    def n_samples_of(self, n_rows: int) -> int:
        """Return how many samples have as many rows, at least 2."""
        with at_weights(self.spec.model, self.spec.split.seed):
            some = first_samples(self.spec, self.pool.source, self.pool.available)
            network = prepare_network(ParameterSelection.all_weights(self.spec.model), self.spec.likelihood, some)
        root = self.spec.backend.root(network.likelihood)
        return max(2, n_rows // (network.n_outputs if root is None else root.n_columns(network.n_outputs)))

    def until_enough(self, tolerance: float, most: int) -> FitResult:
        """Double the samples until that gains less than the tolerance, or as many as allowed are used."""
        sizes, order = self._sizes(most), self.pool.reading_order(self.spec.split.seed)
        stages: list[Stage] = []
        before: FitResult | None = None
        with tqdm(total=most, disable=not self.progress_bar, desc="[Doubling the samples]") as bar:
            for n in sizes:
                with warnings.catch_warnings(record=True) as caught:
                    # only warnings of the fit that is kept are shown
                    warnings.simplefilter("always", UserWarning)
                    fit, last = self._stage(before, order, n)
                before = fit
                stages.append(last)
                stopping = Stopping(tuple(stages), tolerance, most)
                bar.update(n - bar.n)
                bar.set_postfix_str(f"gained {stages[-1].shown_gain}, tolerance {tolerance:g}" if stages[1:] else "")
                if stopping.enough:
                    break
        for warning in caught:
            warnings.warn(warning.message, warning.category, stacklevel=5)
        return replace(fit, pool=self.pool.with_read(order[:n]), stopping=stopping)

    def _sizes(self, most: int) -> list[int]:
        """Numbers of samples of the stages that the estimator can take.

        Raises:
            ValueError: if no number would do, or the number would make no difference.
        """
        options, at_hand = self.spec.split, self.pool.available
        if self.pool.source.augments(options.seed):
            # the gain of a stage would contain the difference between two loadings of the same samples
            raise ValueError(
                "tolerance compares fits of the same samples, and this loader yields others at every pass "
                "(augmentation, padding by batch): expected a loader without it, or the batches of one pass, "
                "list(loader)."
            )
        if isinstance(options.direction_samples, int) and isinstance(options.magnitude_samples, int):
            raise ValueError(
                "tolerance doubles the samples: expected direction_samples or magnitude_samples as a share of them; "
                f"got {options.direction_samples} and {options.magnitude_samples} samples."
            )
        options.draw(at_hand, self.spec.request, self.pool.size)
        sizes = stage_sizes(len(self.pool.read) or FIRST_STAGE, most)
        return [n for n in sizes if self._can_take(at_hand[:n])]

    def _can_take(self, positions: Int64[Tensor, " n"]) -> bool:
        try:
            self.spec.split.draw(positions, self.spec.request, self.pool.size)
        except ValueError:
            return False
        return True

    def _stage(self, before: FitResult | None, order: Int64[Tensor, " _"], n: int) -> tuple[FitResult, Stage]:
        """Fit the first n samples, and estimate the gain over the fit before; their rows are freed on return."""
        fitted = self.fit_at(order[:n])
        N = self.pool.size
        unseen = order[n : n + max(n, ENOUGH_UNSEEN)].sort().values
        if before is None or len(unseen) < min(FEWEST_UNSEEN, N - n):
            return fitted[0], Stage(n)
        with at_weights(self.spec.model, self.spec.split.seed):
            inside, outside, n_unseen = self._evaluation_curvatures(fitted, order[:n], unseen)
            split = fitted[0].split
            weighting = self.weighting_of(fitted[0].selection, split.n_data)
            smaller, larger = (_evaluate(fit, weighting, inside, outside) for fit in (before, fitted[0]))
        gain = stage(
            smaller.terms,
            larger.terms,
            smaller.read - larger.read,
            smaller.unseen - larger.unseen,
            n_data=split.n_data_in_samples,
            n_unseen=n_unseen,
            drawn=inside[0].is_random,
        )
        return fitted[0], gain

    def _evaluation_curvatures(
        self, fitted: Fitted, read: Int64[Tensor, " n"], unseen: Int64[Tensor, " m"]
    ) -> tuple[list[SubBatchCurvature], list[SubBatchCurvature], float]:
        """Curvature of the samples that were read, used or not, and of those that were not, with their number.

        Weights of read samples are relative to the mean of the used ones, those of unseen samples to their own. The
        number of unseen samples is one of samples with the mean weight of the used ones.
        """
        (fit, used), seed = fitted, self.spec.split.seed
        mean = fit.split.total_weight / fit.split.n_samples

        def of(positions: Int64[Tensor, " _"], i: int, mean: float | None) -> tuple[list[SubBatchCurvature], float]:
            if not len(positions):
                return [], 0.0
            found = load(used[0].network, self.pool.source, positions, seed)
            weights = torch.ones(len(positions), dtype=torch.float64) if found.weights is None else found.weights
            relative = weights / (weights.mean() if mean is None else mean)
            # as loaded where all are 1
            plain = found.weights is None and bool((relative == 1).all())
            samples = found.samples if plain else found.samples.weighted(relative.to(used[0].network.like.dtype))
            return [used[0].of_samples(samples, seed_of_draws(seed, i))], float(weights.sum())

        # Monte-Carlo curvatures are evaluated with fresh draws; the fitted ones, two a sample, would be optimistic
        redrawn = [
            part.of_samples(part.samples, seed_of_draws(seed, i))
            for i, part in enumerate(used, 2)
            if isinstance(part, RowCurvature) and part.is_random
        ]
        unused = read[~torch.isin(read, torch.cat([fit.split.used_indices, fit.split.copies]))].sort().values
        inside = (redrawn or used) + of(unused, 4, mean)[0]
        outside, weight = of(unseen, 5, None)
        for curvature in inside + outside:
            if isinstance(curvature, RowCurvature):
                curvature.keep_rows()
        return inside, outside, weight / mean


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """Terms of a posterior's held-out KL: its own, and those of the samples that were read and not read."""

    terms: KLTerms
    read: Float[Tensor, " n"]
    unseen: Float[Tensor, " m"]


def _evaluate(
    fit: FitResult, weighting: Weighting, inside: list[SubBatchCurvature], outside: list[SubBatchCurvature]
) -> _Evaluation:
    precision = fit.estimate.curvature.precision(weighting.likelihood_weight, weighting.prior)
    trace = prior_trace(precision, weighting.prior.expand(inside[0].network.n_parameters))
    terms = KLTerms(trace, float(precision.log_det), weighting.likelihood_weight)
    read, unseen = (sample_terms(terms, (part.traces(precision) for part in parts)) for parts in (inside, outside))
    return _Evaluation(terms, read, unseen)
