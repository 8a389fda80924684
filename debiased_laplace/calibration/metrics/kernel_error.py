r"""Squared kernel calibration error: calibration of the whole vector of probabilities, without bins.

For predictions $p$ and labels $y$ let $r = e_y - p$. Where the probabilities are right, $r$ has mean zero given $p$,
and $E[k(p, p')\, r^\top r'] = 0$ for independent pairs; with a universal kernel it is positive everywhere else.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    count_units,
    student_quantile,
    sum_per_cluster,
    unavailable,
    without_interval,
)
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions
from debiased_laplace.calibration.predictions.drawing import draw_rows
from debiased_laplace.calibration.predictions.probabilities import mean_prediction

BANDWIDTH = 0.5  # fixed, so that the numbers of two methods and of two reports compare
MOST_ROWS = 2000
ROWS_AT_ONCE = 500


def estimate_kernel_error(
    predictions: ClassificationPredictions, *, confidence_level: float, seed: int, most_rows: int = MOST_ROWS
) -> Estimate:
    r"""Unbiased squared kernel calibration error with the kernel $\exp(-\lVert p - p' \rVert / 0.5)$.

    A mean over all pairs of rows, or of rows of different clusters; it may be negative. The interval is normal. Where
    the probabilities are wrong, the jackknife's variance is right. Where they are right, the mean is degenerate: its
    law is that of weighted squares, and the jackknife's variance is small just where the estimate is far below zero.
    The variance of a degenerate mean is therefore added: the interval then covers in both cases, and more than it
    promises near calibration.

    Args:
        predictions: probabilities and labels; of more than `most_rows` rows as many are drawn.
        confidence_level: coverage of the interval.
        seed: of the draw.
        most_rows: the cost is its square times the number of classes.

    References:
        Widmann, Lindsten, Zachariah (2019), arXiv 1910.11385, table 1 (the unbiased quadratic estimator);
        Arvesen (1969), doi:10.1214/aoms/1177697287 (the jackknife of such means).
    """
    rows = draw_rows(predictions.n, most_rows, seed=seed)
    n = rows.numel()
    words = f"unbiased, all pairs of {n} rows" + ("" if n == predictions.n else " drawn")
    clusters = torch.arange(n)
    if predictions.clusters is not None:
        clusters = torch.unique(predictions.clusters[rows], return_inverse=True)[1]
        words = f"{words} of different clusters"
    p = mean_prediction(predictions.source.take(rows))
    terms = sum_pairs(p, predictions.targets[rows].to(p.device), clusters.to(p.device)).cpu()
    sizes = torch.bincount(clusters).to(terms.dtype)
    units, clustered = sizes.numel(), predictions.clusters is not None
    if units < 2:
        return unavailable(n, estimator=words, reason="it takes a pair of independent samples")
    of_unit, pairs = terms.sum(dim=1), sizes * (n - sizes)
    value = (of_unit.sum() / pairs.sum()).item()
    if units < 3:
        unit = "clusters" if clustered else "samples"
        return without_interval(value, n, estimator=words, reason=f"a deviation takes at least three {unit}")
    without = (of_unit.sum() - 2 * of_unit) / (pairs.sum() - 2 * pairs)
    jackknife = (units - 1) / units * (without - without.mean()).square().sum()
    degenerate = 2 * terms.square().sum() / pairs.sum().square()
    standard_error = (jackknife + degenerate).sqrt().item()
    quantile = student_quantile(confidence_level, units - 1 if clustered else None)
    half_width = quantile * standard_error
    words = f"{words}, normal interval, deviation of the jackknife and of a degenerate mean"
    return Estimate(value, value - half_width, value + half_width, standard_error, n, words)


def sum_pairs(
    p: Float[Tensor, "n C"], labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"]
) -> Float[Tensor, "clusters clusters"]:
    """Sums of k(p, p') r.r' over the pairs of rows of each two clusters; nothing within a cluster."""
    norms = p.square().sum(dim=1)
    n_clusters = count_units(len(p), clusters)
    sums = p.new_zeros(n_clusters, n_clusters)
    for first in range(0, p.shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        products = p[rows] @ p.T
        distances = (norms[rows, None] + norms - 2 * products).clamp_min(0.0).sqrt()
        same_label = (labels[rows, None] == labels).to(p.dtype)
        residuals = same_label - p[rows][:, labels] - p[:, labels[rows]].T + products
        terms = residuals * (-distances / BANDWIDTH).exp()
        sums.index_add_(0, clusters[rows], sum_per_cluster(terms.T, clusters).T)
    return sums.fill_diagonal_(0.0)
