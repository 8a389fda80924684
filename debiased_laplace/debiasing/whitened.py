r"""Directions in the metric of a Kronecker estimate, which are those that a Kronecker diagonal represents worst.

With the Kronecker estimate $K \mathrm{diag}(d) K^\top$ and the metric $S = d + \epsilon$, directions, magnitudes and
the residual diagonal are those of the whitened curvature $S^{-1/2} K^\top H K S^{-1/2}$. Divergences between
posteriors do not depend on the coordinates; the leading directions do.
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
from debiased_laplace.debiasing.lowrank import estimate_low_ranks
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature

FLOOR = 0.1
"""Lower bound of the metric as a share of the mean Kronecker curvature: its inverse must not blow up."""


def estimate_whitened(split: SplitCurvature, variants: Sequence[EstimatorOptions]) -> list[CurvatureEstimate]:
    """Estimate low ranks with whitened directions and a residual diagonal in the Kronecker basis.

    Args:
        split: curvature of the direction and magnitude samples.
        variants: options that differ in the rank only.

    Returns:
        An estimate for each of the options.

    Raises:
        ValueError: if the curvature has no rows (a Hessian).
    """
    a, b, options = split.directions, split.magnitudes, variants[0]
    if not isinstance(a, RowCurvature):
        raise ValueError("metric='kron' needs a curvature with a root (GGN, empirical Fisher); got a Hessian.")
    for part in (a, b):
        if isinstance(part, RowCurvature):
            part.keep_rows()
    kronecker = estimate_kronecker(split, options).curvature
    floor = FLOOR * kronecker.diagonal.mean()
    # where all curvature is zero, any metric gives the same
    metric = kronecker.diagonal + torch.where(floor > torch.finfo(floor.dtype).tiny, floor, 1.0)

    def whitening_of(samples: RowCurvature) -> Whitening:
        # folds need bases of their own: one that depends on a fold concentrates its curvature on too few axes
        return Whitening(basis_from(samples, options), metric)

    assert kronecker.basis is not None  # for the type checker
    whitening = Whitening(kronecker.basis, metric)
    whitened = replace(
        split,
        directions=WhitenedRowCurvature(a, whitening_of, whitening),
        magnitudes=WhitenedRowCurvature(b, whitening_of, whitening) if isinstance(b, RowCurvature) else None,
    )
    return [_unwhitened(result, whitening) for result in estimate_low_ranks(whitened, variants)]


def _unwhitened(result: CurvatureEstimate, whitening: Whitening) -> CurvatureEstimate:
    """Transform an estimate to the coordinates of the parameters, with directions of unit length."""
    whitened, metric = result.curvature, whitening.metric
    directions = whitened.directions / metric.sqrt()[:, None]
    squared_lengths: Float[Tensor, " k"] = directions.square().sum(0)
    curvature = LowRankCurvature(
        whitened.diagonal * metric,
        directions / squared_lengths.sqrt(),
        whitened.weights * squared_lengths,
        whitening.basis,
        metric,
    )
    return replace(result, curvature=curvature, magnitudes=result.magnitudes.scaled(1 / squared_lengths))
