r"""Cross-fitting: every sample gives directions and magnitudes, but never both at once.

The samples are dealt into folds. Of each fold the curvature is measured along the eigenvectors of all other folds;
values of the same index are then averaged over folds and belong to the eigenvectors of all samples.

References:
    Lam (2016), doi 10.1214/15-AOS1393; Lamrani, Bongiorno & Potters (2025), arXiv 2503.15186 (both for covariances).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.outside import OutsideDiagonals
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import (
    Aspect,
    DirectionalMoments,
    Residual,
    RunningMoments,
    SubBatchCurvature,
)
from debiased_laplace.debiasing.directions import lanczos_pairs
from debiased_laplace.linalg.eigenpairs import Eigenpairs, numerical_rank
from debiased_laplace.linalg.held_out_rows import HeldOutRows
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis

TAIL = 0.05
"""Share of a fold's trailing values whose mean stands for the directions that the other folds do not have."""


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold among all samples.

    Attributes:
        number: 0, 1, …
        held: positions of its samples among all.
        others: positions of all other samples.
    """

    number: int
    held: Int64[Tensor, " h"]
    others: Int64[Tensor, " o"]


def each_fold(
    folds: Int64[Tensor, " n"],
    *,
    first: int | None = None,
    progress_bar: bool = False,
    description: str = "[Cross-fitting]",
) -> Iterator[Fold]:
    """The folds, one after the other; only the first ones if asked for."""
    for number in tqdm(folds.unique()[:first], disable=not progress_bar, desc=description):
        yield Fold(int(number), (folds == number).nonzero().flatten(), (folds != number).nonzero().flatten())


@dataclass(frozen=True)
class Question:
    """What is asked of every fold.

    Attributes:
        rank: number of leading directions.
        threshold: directions of a fold's others below this fraction of their largest eigenvalue do not count.
        residual: what to say about all others.
        in_basis: whether the residual's diagonal is in the basis of the fold's others, or along the axes.
    """

    rank: int
    threshold: float
    residual: Residual
    in_basis: bool


def cross_fitted_moments(
    batch: SubBatchCurvature,
    folds: Int64[Tensor, " n"],
    pairs: Eigenpairs,
    questions: Sequence[Question],
    *,
    seed: int = 0,
    basis_of: Callable[[Fold], KroneckerBasis] | None = None,
) -> list[DirectionalMoments]:
    r"""What each fold says along the directions of the others, matched by index and averaged.

    With the Gram solver no network pass and no product of all pairs of rows is repeated, but for whitened coordinates,
    which are other ones for every fold; with the dense one the samples are gone through twice more at most; Lanczos
    runs once for every fold.

    Args:
        batch: curvature of all samples.
        folds: the fold of every sample.
        pairs: eigenpairs of the batch's curvature, whose indices the values are matched to.
        questions: what to find out; several cost little more than one.
        seed: of Lanczos' start vectors.
        basis_of: a basis from the others of a fold, for questions in one.

    Returns:
        The moments, for each question as many as its rank.
    """
    k = max((question.rank for question in questions), default=0)
    threshold = min((question.threshold for question in questions), default=0.0)

    def look_at(seen: SubBatchCurvature) -> Look:
        if pairs.outcome.solver == "gram" and isinstance(seen, RowCurvature):
            return _through_gram(seen, k, threshold)
        if pairs.outcome.solver == "lanczos":
            return _through_lanczos(seen, k, threshold, seed)
        return _through_dense(seen, k, threshold)

    look: Look | None = None
    found: list[list[DirectionalMoments]] = [[] for _ in questions]
    for fold in each_fold(folds, progress_bar=batch.progress_bar):
        basis = None if basis_of is None else basis_of(fold)
        # where coordinates come from samples, those of a fold must not be among them
        seen = batch.seen_from(fold.others)
        look = look_at(seen) if look is None or seen is not batch else look
        for question, answers, answer in zip(questions, found, look(fold, questions, basis), strict=True):
            answers.append(extended(answer, question.rank))
    return [pooled(answers) for answers in found]


def pooled(folds: list[DirectionalMoments]) -> DirectionalMoments:
    """Moments of all samples from those of the folds: spread and skewness include how much the folds differ."""
    n = sum(fold.n_samples for fold in folds)
    means = sum((fold.n_samples * fold.means for fold in folds), start=torch.zeros_like(folds[0].means)) / n
    within = torch.zeros_like(means)
    cubes: Tensor | None = torch.zeros_like(means)
    for fold in folds:
        squares, shift = (fold.n_samples - 1) * fold.standard_deviations.square(), fold.means - means
        within += squares + fold.n_samples * shift.square()
        if cubes is None or fold.third_moments is None:
            cubes = None
        else:
            cubes += fold.n_samples * (fold.third_moments + shift.pow(3)) + 3 * shift * squares

    def mean_of(parts: list[Tensor | None]) -> Tensor | None:
        known = [fold.n_samples * part for fold, part in zip(folds, parts, strict=True) if part is not None]
        return torch.stack(known).sum(0) / n if known else None

    return DirectionalMoments(
        n,
        means,
        (within / max(n - 1, 1)).sqrt(),
        mean_of([fold.trace for fold in folds]),
        mean_of([fold.residual_diagonal for fold in folds]),
        None if cubes is None else cubes / n,
        len(folds),
    )


def extended(fold: DirectionalMoments, k: int) -> DirectionalMoments:
    """As many values as all samples have directions: the missing ones take the mean of the trailing ones, not zero.

    The standard deviations do likewise, which is a little too large for a mean, and so do the third moments.
    """
    known = len(fold.means)
    if known == k:
        return fold
    tail = max(1, math.ceil(TAIL * known))

    def filled(values: Tensor) -> Tensor:
        return torch.cat([values, values[-tail:].mean().expand(k - known)]) if known else values.new_zeros(k)

    return replace(
        fold,
        means=filled(fold.means),
        standard_deviations=filled(fold.standard_deviations),
        third_moments=None if fold.third_moments is None else filled(fold.third_moments),
    )


Look = Callable[[Fold, Sequence[Question], KroneckerBasis | None], list[DirectionalMoments]]
"""A fold's moments along the directions of the others, the residual's diagonal in a basis where that is asked for."""


def _through_gram(batch: RowCurvature, k: int, threshold: float) -> Look:
    """Sub-blocks of the one Gram matrix."""
    factor, r = batch.stacked_rows(), batch.rows_per_sample

    def look(fold: Fold, questions: Sequence[Question], basis: KroneckerBasis | None) -> list[DirectionalMoments]:
        held = torch.isin(factor.sample_of_row, fold.held.to(factor.rows.device))
        rows = HeldOutRows.of(factor, held, threshold, k)
        aspects = _aspects(questions, rows.values, basis)
        sums = RunningMoments(rows.projections.shape[1], factor.rows)
        sums.add(rows.projections.square().unflatten(0, (-1, r)).sum(1))
        trace = factor.gram.diagonal()[held].sum() * factor.n_samples / sums.n
        outside = OutsideDiagonals(aspects, sums.first.new_zeros(factor.rows.shape[1]))
        for rank in outside.ranks:
            outside.add(rank, rows.residual(factor, rank).unflatten(0, (-1, r)))
        found = sums.moments()
        return [
            found.leading(a.rank, trace if a.residual == "trace" else None, outside.mean(i, sums.n))
            for i, a in enumerate(aspects)
        ]

    return look


def _through_dense(batch: SubBatchCurvature, k: int, threshold: float) -> Look:
    """The dense curvature of the others: the whole minus the fold's."""
    H, n = batch.dense(), batch.n_samples

    def look(fold: Fold, questions: Sequence[Question], basis: KroneckerBasis | None) -> list[DirectionalMoments]:
        held = batch.part(fold.held)
        if isinstance(held, RowCurvature):
            held.keep_rows()
        h = held.n_samples
        values, U = torch.linalg.eigh((n * H - h * held.dense()) / (n - h))
        values, U = values.flip(0), U.flip(1)
        m = min(numerical_rank(values, threshold), k)
        U = U[:, :m].to(batch.network.like.dtype)
        return held.nested_moments(U, _aspects(questions, values[:m], basis))

    return look


def _through_lanczos(batch: SubBatchCurvature, k: int, threshold: float, seed: int) -> Look:
    """Another run for the others of every fold."""

    def look(fold: Fold, questions: Sequence[Question], basis: KroneckerBasis | None) -> list[DirectionalMoments]:
        pairs = lanczos_pairs(batch.part(fold.others), max(k, 1), threshold, seed)
        return batch.part(fold.held).nested_moments(pairs.vectors, _aspects(questions, pairs.values, basis))

    return look


def _aspects(questions: Sequence[Question], values: Float[Tensor, " k"], basis: KroneckerBasis | None) -> list[Aspect]:
    """The questions to one fold, whose others have these eigenvalues."""
    return [
        Aspect(min(q.rank, numerical_rank(values, q.threshold)), q.residual, basis if q.in_basis else None)
        for q in questions
    ]
