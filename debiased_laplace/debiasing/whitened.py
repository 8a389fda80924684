r"""Directions in the metric of a Kronecker estimate: the low rank goes where a Kronecker diagonal fails most.

With the Kronecker estimate $K \mathrm{diag}(d) K^\top$ and the metric $S = d + \epsilon$, directions, magnitudes and
the diagonal outside are those of the whitened curvature $S^{-1/2} K^\top H K S^{-1/2}$. Distances between posteriors
are the same in all coordinates; which directions lead is not.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.whitening import WhitenedRowCurvature, Whitening
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.kronecker import basis_from, estimate_kronecker
from debiased_laplace.debiasing.lowrank import LowRankChoice, estimate_low_ranks
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature

FLOOR = 0.1
"""Of the mean Kronecker curvature, what the metric has at least: where the samples say nothing, it must not blow up."""


def estimate_whitened(
    split: SplitCurvature, options: EstimatorOptions, ranks: Sequence[int | None]
) -> list[CurvatureEstimate]:
    """Estimates of several ranks with whitened directions and a diagonal outside them in the Kronecker basis.

    Folds have bases of their own: one that a fold had a say in would put its curvature on too few axes.

    Args:
        split: curvature of the samples, by what they are used for.
        options: all but the rank.
        ranks: of the estimates.

    Returns:
        An estimate for each rank.

    Raises:
        ValueError: if the curvature has no rows (a Hessian).
    """
    a, b = split.directions, split.magnitudes
    if not isinstance(a, RowCurvature):
        raise ValueError("metric='kron' needs a curvature with a root (GGN, empirical Fisher); got a Hessian.")
    for part in (a, b):
        if isinstance(part, RowCurvature):
            part.keep_rows()
    kronecker = estimate_kronecker(split, options).curvature
    floor = FLOOR * kronecker.diagonal.mean()
    # no curvature at all is the same in any metric
    metric = kronecker.diagonal + torch.where(floor > torch.finfo(floor.dtype).tiny, floor, 1.0)

    def whitening_of(some: RowCurvature) -> Whitening:
        return Whitening(basis_from(some, options), metric)

    assert kronecker.basis is not None  # for the type checker
    whitening = Whitening(kronecker.basis, metric)
    whitened = replace(
        split,
        directions=WhitenedRowCurvature(a, whitening_of, whitening),
        magnitudes=WhitenedRowCurvature(b, whitening_of, whitening) if isinstance(b, RowCurvature) else None,
    )
    choices = [LowRankChoice(rank, "diagonal") for rank in ranks]
    return [_unwhitened(found, whitening) for found in estimate_low_ranks(whitened, options, choices)]


def _unwhitened(found: CurvatureEstimate, whitening: Whitening) -> CurvatureEstimate:
    """The same curvature over the parameters, its directions as unit vectors there."""
    whitened, metric = found.curvature, whitening.metric
    directions = whitened.directions / metric.sqrt()[:, None]
    squared_lengths: Float[Tensor, " k"] = directions.square().sum(0)
    curvature = LowRankCurvature(
        whitened.diagonal * metric,
        directions / squared_lengths.sqrt(),
        whitened.weights * squared_lengths,
        whitening.basis,
        metric,
    )
    return replace(found, curvature=curvature, magnitudes=found.magnitudes.scaled(1 / squared_lengths))
