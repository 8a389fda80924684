r"""Intervals of statistics that are no means, from the influence of every sample on them.

A smooth statistic moves like the mean of its influence function, so that the standard error of that mean is its own,
over clusters too. Which interval it makes depends on where the statistic may lie.
"""

from math import exp

from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    count_units,
    estimate_mean,
    student_quantile,
    wilson_interval,
    without_interval,
)

ONE = "one independent sample has no standard error"


def standard_error_of(influence: Float[Tensor, " n"], clusters: Int[Tensor, " n"] | None) -> tuple[float, int] | None:
    """Standard error of the mean of an influence function, and the number of independent units behind it.

    Args:
        influence: of every sample on the statistic.
        clusters: number of each sample's cluster; None where all samples are independent.

    Returns:
        None with a single unit.
    """
    mean = estimate_mean(influence, confidence_level=0.5, clusters=clusters)
    if mean.standard_error is None:
        return None
    return mean.standard_error, count_units(influence.numel(), clusters)


def estimate_positive(
    value: float,
    influence: Float[Tensor, " n"],
    *,
    losses: Float[Tensor, " n"],
    most: float,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None = None,
) -> Estimate:
    """An area that losses make up, with a symmetric interval for its logarithm.

    Its standard error is itself an estimate, and a poor one where few samples hold most of the loss: the interval is
    Student's, with half as many degrees of freedom as there are losses of equal size that would be worth these.

    Args:
        value: the estimate, above 0.
        influence: of every sample on it.
        losses: of every sample.
        most: the largest value there can be.
        confidence_level: coverage of the interval.
        clusters: as for `estimate_mean`.
    """
    n, words = influence.numel(), "statistic of ranks, influence function"
    known = standard_error_of(influence, clusters)
    if known is None:
        return without_interval(value, n, estimator=words, reason=ONE)
    error, units = known
    worth = losses.sum().item() ** 2 / losses.square().sum().item()
    degrees = max(1, min(units - 1, int(worth / 2)))
    factor = exp(min(student_quantile(confidence_level, degrees) * error / value, 100.0))
    over = "" if clusters is None else f" over {units} clusters"
    words += f", log-normal interval with {degrees} degrees of freedom{over}"
    return Estimate(value, value / factor, max(value, min(most, value * factor)), error, n, words)


def proportion_interval(
    value: float, standard_error: float, *, confidence_level: float, least_size: int | float
) -> tuple[float, float]:
    r"""Wilson's interval of as many independent samples as the statistic is worth, $p (1 - p) / \text{se}^2$.

    For statistics between 0 and 1; it neither leaves that range nor collapses at its ends.

    Args:
        value: between 0 and 1.
        standard_error: of the value.
        confidence_level: coverage.
        least_size: number of samples it counts as where the standard error is 0.

    References:
        Newcombe (2006), doi:10.1002/sim.2324 (such intervals for the area under a ROC curve).
    """
    size = value * (1 - value) / standard_error**2 if standard_error > 0 else least_size
    if size <= 0:
        size = least_size
    return wilson_interval(value, size, confidence_level=confidence_level)
