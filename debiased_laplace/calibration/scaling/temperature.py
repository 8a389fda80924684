r"""The temperature $T$ that makes $\mathrm{softmax}(z / T)$ most likely.

In $\beta = 1 / T$ the mean loss $\frac1n \sum_i \log \sum_c e^{\beta z_{ic}} - \beta z_{i y_i}$ is convex; its slope is
the mean of $E_\beta[z_i] - z_{i y_i}$ and its curvature the mean of $\mathrm{Var}_\beta[z_i]$. Logits count up to a
constant per row, so log-probabilities are logits.
"""

from dataclasses import dataclass
from math import inf, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import sum_per_cluster
from debiased_laplace.calibration.predictions.probabilities import portions_of

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.02, 50.0
_TOLERANCE = 1e-7  # of the last step, relative; Newton's error is about its square after that
_MOST_STEPS = 100  # bisection alone would be done by then


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature.

    Attributes:
        temperature: above 1 where the logits are over-confident.
        standard_error: of it over test sets, robust to wrong logits and to clusters; None at a bound, or without a
            second unit.
        at_bound: the likelihood still rises beyond the bound that stopped it: "lowest" where (nearly) all labels are
            the most probable class, "highest" where the logits tell nothing.
        n: samples it was fitted on.
        n_iterations: evaluations of the loss.
        cost: expected loss, in nats per sample, from not knowing the temperature better; 0 without a standard error.
    """

    temperature: float
    standard_error: float | None
    at_bound: str | None
    n: int
    n_iterations: int
    cost: float = 0.0


def fit_temperature(
    logits: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    *,
    rows: Int[Tensor, " m"] | None = None,
    clusters: Int[Tensor, " n"] | None = None,
    start: float = 1.0,
) -> TemperatureFit:
    """Maximum likelihood by Newton steps that a bracket guards.

    Cost: about seven passes over the logits, in portions of 8 MB.

    Args:
        logits: float64, finite; the largest of each row is 0, so that none overflows.
        labels: true classes, on the same device.
        rows: which rows to use, all by default.
        clusters: number of each row's cluster, for the standard error.
        start: temperature of the first evaluation.

    Returns:
        The fit; it stops at 0.02 and 50.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), arXiv 1706.04599 (temperature scaling);
        White (1982), doi:10.2307/1912526 (standard error under a wrong model).
    """
    low, high = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    left, right = -inf, inf
    beta = min(max(1 / start, low), high)
    at_bound = None
    for iteration in range(1, _MOST_STEPS + 1):  # noqa: B007 - it is the count of evaluations
        slopes, curvature = _differentiate(logits, labels, rows, beta)
        slope = slopes.mean().item()
        if slope < 0 and beta >= high:
            at_bound = "lowest"
            break
        if slope > 0 and beta <= low:
            at_bound = "highest"
            break
        left, right = (beta, right) if slope < 0 else (left, beta)
        step = slope / curvature if curvature > 0 else -inf if slope < 0 else 0.0
        if abs(step) <= _TOLERANCE * beta:
            beta = min(max(beta - step, low), high)
            break
        beta = _guard(beta - step, left, right, low, high)
    own = clusters if clusters is None or rows is None else clusters[rows]
    error = None if at_bound else _sandwich_error(slopes, curvature, own)
    n = slopes.numel()
    if error is None:
        return TemperatureFit(1 / beta, None, at_bound, n, iteration)
    return TemperatureFit(1 / beta, error / beta**2, None, n, iteration, cost=curvature * error**2 / 2)


def negative_log_likelihood_at(
    logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], temperature: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Loss of every row at its own temperature, in nats."""
    scaled = logits / temperature[:, None]
    return scaled.logsumexp(dim=1) - scaled.gather(1, labels[:, None])[:, 0]


def _guard(proposal: float, left: float, right: float, low: float, high: float) -> float:
    """The proposal where it lies between the ends of the bracket, else a bound not tried yet, or their middle."""
    if left < proposal < right and low <= proposal <= high:
        return proposal
    if proposal >= high and right > high:
        return high
    if proposal <= low and left < low:
        return low
    return sqrt(max(left, low) * min(right, high))


def _differentiate(
    logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], rows: Int[Tensor, " m"] | None, beta: float
) -> tuple[Float[Tensor, " m"], float]:
    """Slope of every row's loss in beta, and the mean curvature."""
    n = logits.shape[0] if rows is None else rows.numel()
    slopes, curvature = [], 0.0
    for portion in portions_of(n, logits.shape[1]):
        chosen = portion if rows is None else rows[portion]
        z = logits[chosen]
        weights = torch.mul(z, beta).exp_()
        total = weights.sum(dim=1)
        weights.mul_(z)
        mean = weights.sum(dim=1) / total
        square = weights.mul_(z).sum(dim=1) / total
        slopes.append(mean - z.gather(1, labels[chosen][:, None])[:, 0])
        curvature += (square - mean.square()).clamp_min(0.0).sum().item()
    return torch.cat(slopes), curvature / n


def _sandwich_error(slopes: Float[Tensor, " m"], curvature: float, clusters: Int[Tensor, " m"] | None) -> float | None:
    """Standard error of beta from the spread of the slopes over units, whose mean is zero at the fit."""
    if clusters is not None:
        _, clusters = clusters.to(slopes.device).unique(return_inverse=True)
    per_unit = sum_per_cluster(slopes, clusters)
    units = per_unit.numel()
    if units < 2 or curvature <= 0:
        return None
    return sqrt(units / (units - 1) * per_unit.square().sum().item()) / (slopes.numel() * curvature)
