r"""Cross-fitting: every sample contributes to directions and to magnitudes, but never to both at once.

The samples are dealt into folds, and the curvature of each fold is measured along the eigenvectors of all other folds.
Values of the same index are averaged over folds and assigned to the eigenvectors of all samples.

References:
    Lam (2016), doi 10.1214/15-AOS1393; Lamrani, Bongiorno & Potters (2025), arXiv 2503.15186 (both for covariances).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.residual import ResidualDiagonal
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import (
    DirectionalMoments,
    ResidualRequest,
    RunningMoments,
    SubBatchCurvature,
)
from debiased_laplace.debiasing.directions import lanczos_pairs
from debiased_laplace.linalg.eigenpairs import Eigenpairs, numerical_rank
from debiased_laplace.linalg.held_out_rows import HeldOutRows
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis

TAIL = 0.05
"""Share of a fold's trailing values whose mean replaces the values of directions that the other folds lack."""


@dataclass(frozen=True, eq=False)
class Fold:
    """A fold of the samples.

    Attributes:
        number: 0, 1, …
        held: positions of its samples.
        others: positions of the samples of the other folds.
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
    """Iterate over the folds; over the first few only, if `first` is given."""
    for number in tqdm(folds.unique()[:first], disable=not progress_bar, desc=description):
        yield Fold(int(number), (folds == number).nonzero().flatten(), (folds != number).nonzero().flatten())


def cross_fitted_moments(
    batch: SubBatchCurvature,
    folds: Int64[Tensor, " n"],
    pairs: Eigenpairs,
    requests: Sequence[ResidualRequest],
    *,
    seed: int = 0,
    basis_of: Callable[[Fold], KroneckerBasis] | None = None,
    rest: SubBatchCurvature | None = None,
) -> list[DirectionalMoments]:
    r"""Measure each fold along the directions of the other folds, matched by index and averaged.

    Cost beyond the eigenpairs of all samples: with the Gram solver, no network pass and no product of all pairs of rows
    (except in whitened coordinates, which differ between folds); with the dense one, at most two passes over the
    samples; with Lanczos, one run per fold.

    Args:
        batch: curvature of all samples.
        folds: fold of every sample.
        pairs: eigenpairs of the batch's curvature, to whose indices the values are matched.
        requests: what to measure; several cost little more than one. The basis of a request is replaced by each fold's.
        seed: of Lanczos' start vectors.
        basis_of: map from a fold to the basis computed from the other folds; for requests with a basis.
        rest: curvature of the same samples with the weights that folds are measured with; None: those of the batch.

    Returns:
        The moments of each request, as many as its rank.
    """
    k = max((request.rank for request in requests), default=0)
    threshold = min((request.threshold for request in requests), default=0.0)

    def evaluator_of(curvature: SubBatchCurvature) -> FoldEvaluator:
        if pairs.outcome.solver == "gram" and isinstance(curvature, RowCurvature):
            assert rest is None or isinstance(rest, RowCurvature)  # for the type checker
            return _through_gram(curvature, k, threshold, rest)
        if pairs.outcome.solver == "lanczos":
            return _through_lanczos(curvature, k, threshold, seed, rest)
        return _through_dense(curvature, k, threshold, rest)

    evaluate: FoldEvaluator | None = None
    so_far: list[DirectionalMoments] = []
    for fold in each_fold(folds, progress_bar=batch.progress_bar):
        basis = None if basis_of is None else basis_of(fold)
        # coordinates that are computed from samples must not depend on those of the fold
        curvature = batch.in_coordinates_of(fold.others)
        evaluate = evaluator_of(curvature) if evaluate is None or curvature is not batch else evaluate
        measured = [extended(m, r.rank) for m, r in zip(evaluate(fold, requests, basis), requests, strict=True)]
        so_far = [pooled(pair) for pair in zip(so_far, measured, strict=True)] if so_far else measured
    return so_far


def pooled(folds: Iterable[DirectionalMoments]) -> DirectionalMoments:
    """Combine the moments of folds, one after the other; spread and skewness include the differences between folds."""
    return reduce(_merged, folds)


def _merged(a: DirectionalMoments, b: DirectionalMoments) -> DirectionalMoments:
    """Combine the moments of two sets of samples.

    References:
        Chan, Golub & LeVeque (1983), doi 10.1080/00031305.1983.10483115 (the variance), with the third moment likewise.
    """
    n = a.n_samples + b.n_samples
    share_of_a, share_of_b = a.n_samples / n, b.n_samples / n

    def mean_of(x: Tensor | None, y: Tensor | None, power: int = 1) -> Tensor | None:
        parts = [w**power * part for w, part in ((share_of_a, x), (share_of_b, y)) if part is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    n_drawn = [moments.n_drawn for moments in (a, b) if moments.n_drawn is not None]
    # sums over rows drawn independently do not depend on differences between folds
    shift = None if n_drawn else _centers(b) - _centers(a)
    squares_of_a, squares_of_b = _squares(a), _squares(b)
    squares, third = squares_of_a + squares_of_b, None
    if a.third_moments is not None and b.third_moments is not None:
        third = share_of_a * a.third_moments + share_of_b * b.third_moments
        if shift is not None:
            between = share_of_a * share_of_b * (share_of_a - share_of_b) * shift.pow(3)
            third = third + between + 3 * shift * (share_of_a * squares_of_b - share_of_b * squares_of_a) / n
    if shift is not None:
        squares = squares + n * share_of_a * share_of_b * shift.square()
    means = share_of_a * a.means + share_of_b * b.means
    return DirectionalMoments(
        n,
        means,
        (squares / (n if n_drawn else max(n - 1, 1))).sqrt(),
        mean_of(a.trace, b.trace),
        mean_of(a.residual_diagonal, b.residual_diagonal),
        third,
        a.n_folds + b.n_folds,
        sum(n_drawn) if n_drawn else None,
        # a sum of variances of independent parts, each with the square of its weight
        mean_of(a.draw_variances, b.draw_variances, power=2),
        a.sampled_share,
        mean_of(a.centers, b.centers),
    )


def _centers(moments: DirectionalMoments) -> Tensor:
    return moments.means if moments.centers is None else moments.centers


def _squares(moments: DirectionalMoments) -> Tensor:
    """Return sums of squares about the center; of drawn rows, n times the variance."""
    n = moments.n_samples
    return (n - 1 if moments.n_drawn is None else n) * moments.standard_deviations.square()


def extended(fold: DirectionalMoments, k: int) -> DirectionalMoments:
    """Extend the moments of a fold to k directions; missing values become the mean of the trailing ones, not zero.

    The mean of trailing standard deviations is slightly too large for the deviation of such a mean.
    """
    present = len(fold.means)
    if present == k:
        return fold
    tail = max(1, math.ceil(TAIL * present))

    def filled(values: Tensor) -> Tensor:
        return torch.cat([values, values[-tail:].mean().expand(k - present)]) if present else values.new_zeros(k)

    return fold.mapped(filled)


FoldEvaluator = Callable[[Fold, Sequence[ResidualRequest], KroneckerBasis | None], list[DirectionalMoments]]
"""Map from a fold, requests and a basis to the fold's moments along the directions of the other folds."""


def _through_gram(batch: RowCurvature, k: int, threshold: float, rest: RowCurvature | None) -> FoldEvaluator:
    """Evaluate folds from sub-blocks of the Gram matrix of all rows."""
    factor, r = batch.stacked_rows(), batch.rows_per_sample
    factors = None if rest is None else _ratios(rest, batch)

    def evaluate(
        fold: Fold, requests: Sequence[ResidualRequest], basis: KroneckerBasis | None
    ) -> list[DirectionalMoments]:
        held = torch.isin(factor.sample_of_row, fold.held.to(factor.rows.like.device))
        rows = HeldOutRows.of(factor, held, threshold, k)
        requests = _of_fold(requests, rows.values, basis)
        sums = RunningMoments(rows.projections.shape[1], factor.rows.like)
        values, diagonal = rows.projections.square().unflatten(0, (-1, r)).sum(1), factor.gram.diagonal()[held]
        scales: Tensor | None = None
        if factors is not None:
            mine = factors[fold.held].to(values)
            values, diagonal, scales = values * mine[:, None], diagonal * mine, mine.sqrt()[:, None]
        draw = (rest or batch).draw
        sums.add(values, None if draw is None else draw.at(fold.held))
        trace = diagonal.sum() * factor.n_samples / sums.n
        residual = ResidualDiagonal(requests, sums.first.new_zeros(factor.rows.shape[2]))
        if factor.rows.by_parameter:
            for request in residual.requests:
                residual.add_squares(request, rows.residual_squares(factor, request.rank, request.basis, scales))
        else:
            for rank in residual.ranks:
                outside = rows.residual(factor, rank)
                if scales is not None:
                    outside = outside * scales.to(outside.dtype)
                residual.add(rank, outside.unflatten(0, (-1, r)))
        moments = sums.moments()
        return [
            moments.leading(
                request.rank, trace if request.residual == "trace" else None, residual.mean(request, sums.n)
            )
            for request in requests
        ]

    return evaluate


def _ratios(rest: RowCurvature, batch: RowCurvature) -> Float[Tensor, " n"]:
    """Return the weights of a curvature relative to those of another one of the same samples."""
    assert rest.samples.weights is not None  # for the type checker
    assert batch.samples.weights is not None
    return rest.samples.weights / batch.samples.weights


def _through_dense(batch: SubBatchCurvature, k: int, threshold: float, rest: SubBatchCurvature | None) -> FoldEvaluator:
    """Evaluate folds with the dense curvature of the other folds, the whole minus the fold's."""
    H, n = batch.dense(), batch.n_samples

    def evaluate(
        fold: Fold, requests: Sequence[ResidualRequest], basis: KroneckerBasis | None
    ) -> list[DirectionalMoments]:
        held, own = (rest or batch).part(fold.held), batch.part(fold.held)
        if isinstance(held, RowCurvature):
            held.keep_rows()
        h = held.n_samples
        values, U = torch.linalg.eigh((n * H - h * (held if rest is None else own).dense()) / (n - h))
        values, U = values.flip(0), U.flip(1)
        m = min(numerical_rank(values, threshold), k)
        U = U[:, :m].to(batch.network.like.dtype)
        return held.nested_moments(U, _of_fold(requests, values[:m], basis))

    return evaluate


def _through_lanczos(
    batch: SubBatchCurvature, k: int, threshold: float, seed: int, rest: SubBatchCurvature | None
) -> FoldEvaluator:
    """Evaluate folds with one Lanczos run each."""

    def evaluate(
        fold: Fold, requests: Sequence[ResidualRequest], basis: KroneckerBasis | None
    ) -> list[DirectionalMoments]:
        pairs = lanczos_pairs(batch.part(fold.others), max(k, 1), threshold, seed)
        return (rest or batch).part(fold.held).nested_moments(pairs.vectors, _of_fold(requests, pairs.values, basis))

    return evaluate


def _of_fold(
    requests: Sequence[ResidualRequest], values: Float[Tensor, " k"], basis: KroneckerBasis | None
) -> list[ResidualRequest]:
    """Return the requests to a fold, given the eigenvalues and the basis of the other folds."""
    return [
        replace(r, rank=min(r.rank, numerical_rank(values, r.threshold)), basis=None if r.basis is None else basis)
        for r in requests
    ]
