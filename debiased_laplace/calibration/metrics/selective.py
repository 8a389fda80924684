r"""Selective prediction: the risk of a method that answers only where it is confident.

A sample is kept if its confidence is among the highest; *coverage* is the share that is kept, *selective risk* the mean
loss there. Samples of equal confidence are kept in random order: every number is the expectation over that order, so
that the order of the samples in the file does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, exp

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate, RiskPoint
from debiased_laplace.calibration.intervals import (
    Units,
    normal_quantile,
    student_quantile,
    wilson_interval,
    without_interval,
    without_spread,
)

MOST_POINTS = 100  # of a stored curve
RANKS = "statistic of ranks"


@dataclass(frozen=True, eq=False)
class RankedLosses:
    """Losses in groups of equal confidence, the most confident being group 0; float64 on the CPU.

    Of each group: its size, the sum of its losses, and the rank of its last sample.
    """

    losses: Float[Tensor, " n"]
    group: Int[Tensor, " n"]
    sizes: Float[Tensor, " groups"]
    sums: Float[Tensor, " groups"]
    ends: Float[Tensor, " groups"]

    def risk_at(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return the mean loss of so many most confident samples; inside a group the sum of losses grows evenly."""
        return self._accumulate(ranks) / ranks

    @cached_property
    def area(self) -> float:
        """Area under the risk-coverage curve: the mean of the risk over all ranks."""
        return self.risk_at(torch.arange(1, len(self.losses) + 1, dtype=torch.float64)).mean().item()

    @cached_property
    def area_influence(self) -> Float[Tensor, " n"]:
        r"""Influence of each sample on `area`, with mean 0.

        The area is $\sum_g L_g w_g$ with the mean loss $L_g$ that a group adds and the mean $w_g$ of $-\log u$ over
        the coverages from $a$ to $b$ that it takes up. A sample enters $L_g$ of its own group, and $a$ and $b$ of all
        groups that are no more confident.
        """
        n, p = len(self.losses), self.sizes / len(self.losses)
        a, b = (self.ends - self.sizes) / n, self.ends / n
        tail = _sum_from(1 / torch.arange(1, n + 1, dtype=torch.float64))  # by rank
        own = torch.bincount(torch.repeat_interleave(self.sizes.long()), weights=tail) / self.sizes
        w = ((b - torch.xlogy(b, b)) - (a - torch.xlogy(a, a))) / p
        by_end = self.sums / n * (-b.log() - w) / p
        by_start = self.sums / n * (a.log() + w) / p
        by_start[0] = 0.0  # nothing is above the first group
        moved = _sum_from(by_end) + _sum_from(by_start) - by_start
        influence = self.losses * own[self.group] + moved[self.group]
        return influence - influence.mean()

    def risk_influence(self, rank: float) -> Float[Tensor, " n"]:
        r"""Return the influence of each sample on the risk at a coverage: $(\ell - m)$ of the kept, over the coverage.

        $m$ is the mean loss around the threshold: a sample above the threshold displaces one at the threshold.
        """
        n = len(self.losses)
        half = max(5.0, n ** (2 / 3) / 2)  # a window that shrinks relative to n as n grows
        window = torch.tensor([max(0.0, rank - half), min(float(n), rank + half)], dtype=torch.float64)
        around = (self._accumulate(window).diff() / window.diff()).item()
        kept = ((rank - (self.ends - self.sizes)) / self.sizes).clamp(0, 1)[self.group]
        return (self.losses - around) * kept * (n / rank)

    def _accumulate(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        g = torch.searchsorted(self.ends, ranks.contiguous()).clamp(max=self.ends.numel() - 1)
        return self.sums.cumsum(dim=0)[g] - self.sums[g] * (self.ends[g] - ranks) / self.sizes[g]


def _sum_from(terms: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return the sum of each term and all later ones."""
    return terms.flip(0).cumsum(dim=0).flip(0)


def rank_losses(losses: Float[Tensor, " n"], confidence: Float[Tensor, " n"]) -> RankedLosses:
    """Group nonnegative losses (1 for an error, or squared errors) by the order of their confidence."""
    _, group, counts = torch.unique(-confidence.cpu(), return_inverse=True, return_counts=True)
    losses, sizes = losses.to("cpu", torch.float64), counts.to(torch.float64)
    return RankedLosses(losses, group, sizes, torch.bincount(group, weights=losses), sizes.cumsum(dim=0))


def estimate_area(outputs: Sequence[RankedLosses], units: Units, *, most: float) -> Estimate:
    """Estimate the area under the risk-coverage curve, averaged over outputs; `most` is the largest possible area.

    The interval is symmetric for the logarithm of the area. Its quantile is Student's, with half as many degrees of
    freedom as the effective number of losses, since few samples may hold most of the loss. Without errors the upper end
    is that of an order no better than chance.

    References:
        Geifman, Uziel and El-Yaniv (2019), arXiv 1805.08206.
    """
    area = sum(r.area for r in outputs) / len(outputs)
    losses = torch.stack([r.losses for r in outputs]).mean(dim=0)
    if most == 1 and bool((losses == 1).all()):
        return without_interval(area, units.n, RANKS, "every prediction is wrong, which no order of them changes")
    error = units.standard_error(torch.stack([r.area_influence for r in outputs]).mean(dim=0))
    if error is None:
        return without_spread(area, units, RANKS)
    if area > 0:
        sums = units.sums(losses)
        n_losses = sums.sum().item() ** 2 / sums.square().sum().item()
        freedom = max(1, min(units.count - 1, int(n_losses / 2)))
        factor = exp(min(student_quantile(units.level, freedom) * error / area, 100.0))
        words = f"{RANKS}, influence function, log-normal interval with {freedom} degrees of freedom{units.words}"
        return Estimate(area, area / factor, max(area, min(most, area * factor)), error, units.n, words)
    if most != 1:
        return without_interval(area, units.n, RANKS, "there is no error")
    _, risk = wilson_interval(0.0, float(units.count), units.level)
    words = f"{RANKS}; without errors its upper end is that of an order no better than chance"
    return Estimate(area, 0.0, risk, None, units.n, words)


def trace_risk(outputs: Sequence[RankedLosses], units: Units, *, is_share: bool) -> tuple[RiskPoint, ...]:
    """Return the risk-coverage curve at up to 100 coverages, averaged over outputs, with Wilson intervals of shares."""
    n, steps = units.n, min(units.n, MOST_POINTS)
    ranks = torch.tensor([ceil(n * i / steps) for i in range(1, steps + 1)], dtype=torch.float64)
    risk = torch.stack([r.risk_at(ranks) for r in outputs]).mean(dim=0)
    oracle = torch.stack([rank_losses(r.losses, -r.losses).risk_at(ranks) for r in outputs]).mean(dim=0)
    points = []
    for k, mean, best in zip(ranks.tolist(), risk.tolist(), oracle.tolist(), strict=True):
        error = units.standard_error(torch.stack([r.risk_influence(k) for r in outputs]).mean(dim=0))
        points.append(RiskPoint(k / n, mean, *_risk_interval(mean, error, k, units, is_share=is_share), best))
    return tuple(points)


def _risk_interval(
    risk: float, error: float | None, rank: float, units: Units, *, is_share: bool
) -> tuple[float | None, float | None]:
    """Return the interval at one coverage, which allows for the uncertain threshold that keeps so many samples."""
    if error is None:
        return None, None
    if not is_share:
        return max(0.0, risk - units.quantile * error), risk + units.quantile * error
    spread = risk * (1 - risk)
    size = min(rank, spread / error**2 if spread > 0 and error > 0 else float(units.count))
    return wilson_interval(risk, size * (normal_quantile(units.level) / units.quantile) ** 2, units.level)
