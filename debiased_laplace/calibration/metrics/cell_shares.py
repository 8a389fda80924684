"""Proportions in cells (bins of confidence, classes) with their intervals, also over clusters of samples."""

from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import effective_size, wilson_interval

Interval = tuple[float, float]


def intervals_of_shares(
    indicators: Float[Tensor, " n"],
    cell: Int[Tensor, " n"],
    n_cells: int,
    *,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None,
) -> list[Interval | None]:
    """Wilson's interval of the share in each cell; None in an empty one.

    With clusters the interval is that of as many independent samples as a cell's are worth. A cell that one cluster
    alone reaches says nothing about others: its interval is all of [0, 1].

    Args:
        indicators: 0 or 1 per sample.
        cell: number of each sample's cell.
        n_cells: number of cells.
        confidence_level: coverage of each interval.
        clusters: number of each sample's cluster, or None where all samples are independent.
    """
    n = torch.bincount(cell, minlength=n_cells)
    k = torch.bincount(cell, weights=indicators, minlength=n_cells)
    shares = (k / n.clamp_min(1)).clamp(0.0, 1.0)
    if clusters is None:
        return [
            wilson_interval(p, size, confidence_level=confidence_level) if size else None
            for p, size in zip(shares.tolist(), n.tolist(), strict=True)
        ]
    reached, squares = _sum_squares(indicators - shares[cell], cell, n_cells, clusters)
    intervals: list[Interval | None] = []
    for p, size, groups, square in zip(shares.tolist(), n.tolist(), reached.tolist(), squares.tolist(), strict=True):
        if groups < 2:
            intervals.append((0.0, 1.0) if groups else None)
            continue
        error = sqrt(groups / (groups - 1) * square) / size
        worth = effective_size(p, size, n_clusters=groups, standard_error=error, confidence_level=confidence_level)
        intervals.append(wilson_interval(p, worth, confidence_level=confidence_level))
    return intervals


def _sum_squares(
    residuals: Float[Tensor, " n"], cell: Int[Tensor, " n"], n_cells: int, clusters: Int[Tensor, " n"]
) -> tuple[Int[Tensor, " cells"], Float[Tensor, " cells"]]:
    """How many clusters reach each cell, and the sum of squares of their residual sums there."""
    pairs, place = torch.unique(clusters * n_cells + cell, return_inverse=True)
    sums = torch.bincount(place, weights=residuals, minlength=pairs.numel())
    of_pair = pairs % n_cells
    return torch.bincount(of_pair, minlength=n_cells), torch.bincount(of_pair, weights=sums.square(), minlength=n_cells)
