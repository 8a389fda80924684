r"""Selective prediction: what a method gains by answering only where it is sure.

A sample is kept if its confidence is among the highest; *coverage* is the share that is kept, *selective risk* the mean
loss there. Samples of equal confidence are kept in random order: every number is the expectation over that order, so
that the order of the samples in the file does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate, RiskPoint
from debiased_laplace.calibration.intervals import (
    Units,
    estimate_positive,
    normal_quantile,
    wilson_interval,
    without_interval,
)

MOST_POINTS = 100  # of a stored curve
RANKS = "statistic of ranks"


@dataclass(frozen=True, eq=False)
class RankedLosses:
    """Losses with their group of equal confidence, the most confident being group 0; float64 on the CPU."""

    losses: Float[Tensor, " n"]
    group: Int[Tensor, " n"]

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.losses.numel()

    @cached_property
    def sizes(self) -> Float[Tensor, " groups"]:
        """Samples per group."""
        return torch.bincount(self.group).to(torch.float64)

    @cached_property
    def sums(self) -> Float[Tensor, " groups"]:
        """Sum of the losses of each group."""
        return torch.bincount(self.group, weights=self.losses)

    @cached_property
    def ends(self) -> Float[Tensor, " groups"]:
        """Rank of the last sample of each group."""
        return self.sizes.cumsum(dim=0)

    @cached_property
    def oracle(self) -> "RankedLosses":
        """The same losses in the best order there is: smallest first."""
        return rank_losses(self.losses, -self.losses)

    def risk_at(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Mean loss of as many most confident samples; inside a group the sum of losses grows evenly."""
        return self._accumulate(ranks) / ranks

    @cached_property
    def area(self) -> float:
        """Mean of the risk over all ranks: the area under the risk-coverage curve."""
        return self.risk_at(torch.arange(1, self.n + 1, dtype=torch.float64)).mean().item()

    @cached_property
    def area_influence(self) -> Float[Tensor, " n"]:
        r"""Influence of each sample on `area`, with mean 0.

        The area is $\sum_g L_g w_g$ with the mean loss $L_g$ that a group adds and the mean $w_g$ of $-\log u$ over
        the coverages from $a$ to $b$ that it takes up. A sample enters $L_g$ of its own group, and $a$ and $b$ of all
        groups that are no more confident.
        """
        n, p = self.n, self.sizes / self.n
        a, b = (self.ends - self.sizes) / n, self.ends / n
        ranks = torch.arange(1, n + 1, dtype=torch.float64)
        tail = (1 / ranks).flip(0).cumsum(dim=0).flip(0)  # sum of 1/k from a rank on
        place = torch.repeat_interleave(self.sizes.to(torch.int64))  # group of each rank
        own = torch.bincount(place, weights=tail) / self.sizes
        w = ((b - torch.xlogy(b, b)) - (a - torch.xlogy(a, a))) / p
        by_end = self.sums / n * (-b.log() - w) / p
        by_start = self.sums / n * (a.log() + w) / p
        by_start[0] = 0.0  # nothing is above the first group
        pushed = by_end.flip(0).cumsum(dim=0).flip(0) + by_start.flip(0).cumsum(dim=0).flip(0) - by_start
        influence = self.losses * own[self.group] + pushed[self.group]
        return influence - influence.mean()

    def risk_influence(self, rank: float) -> Float[Tensor, " n"]:
        r"""Influence of each sample on the risk at a coverage: $(\ell - m)$ of what is kept, over the coverage.

        $m$ is the mean loss around the threshold: a sample above the threshold displaces one at the threshold.
        """
        half = max(5.0, self.n ** (2 / 3) / 2)  # a window that shrinks relative to n as n grows
        window = torch.tensor([max(0.0, rank - half), min(float(self.n), rank + half)], dtype=torch.float64)
        below, above = self._accumulate(window).tolist()
        around = (above - below) / (window[1] - window[0]).item()
        kept = ((rank - (self.ends - self.sizes)) / self.sizes).clamp(0, 1)[self.group]
        return (self.losses - around) * kept * (self.n / rank)

    def _accumulate(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        g = torch.searchsorted(self.ends, ranks.contiguous()).clamp(max=self.ends.numel() - 1)
        return self.sums.cumsum(dim=0)[g] - self.sums[g] * (self.ends[g] - ranks) / self.sizes[g]


def rank_losses(losses: Float[Tensor, " n"], confidence: Float[Tensor, " n"]) -> RankedLosses:
    """Group nonnegative losses (1 for an error, or squared errors) by confidence, of which only the order matters."""
    _, group = torch.unique(-confidence.cpu(), return_inverse=True)
    return RankedLosses(losses.to("cpu", torch.float64), group)


def estimate_area(outputs: Sequence[RankedLosses], units: Units, *, most: float) -> Estimate:
    """Area under the risk-coverage curve, averaged over outputs.

    Without errors the upper end is that of an order no better than chance; `most` is the largest area there can be, 1
    for shares of errors.

    References:
        Geifman, Uziel and El-Yaniv (2019), arXiv 1805.08206.
    """
    area = sum(r.area for r in outputs) / len(outputs)
    influence = torch.stack([r.area_influence for r in outputs]).mean(dim=0)
    losses = torch.stack([r.losses for r in outputs]).mean(dim=0)
    if units.count < 2:
        return without_interval(area, units.n, estimator=RANKS, reason="one independent sample has no standard error")
    if bool((losses == 1).all()) and most == 1:
        why = "every prediction is wrong, which no order of them changes"
        return without_interval(area, units.n, estimator=RANKS, reason=why)
    if area > 0:
        return estimate_positive(area, influence, units, losses=losses, most=most)
    if most != 1:
        return without_interval(0.0, units.n, estimator=RANKS, reason="there is no error")
    _, risk = wilson_interval(0.0, float(units.count), units.level)
    words = f"{RANKS}; without errors its upper end is that of an order no better than chance"
    return Estimate(area, 0.0, risk, None, units.n, words)


def trace_risk(outputs: Sequence[RankedLosses], units: Units, *, is_share: bool) -> tuple[RiskPoint, ...]:
    """Risk-coverage curve, averaged over outputs, at most at 100 coverages; intervals of shares are Wilson's."""
    n = units.n
    steps = min(n, MOST_POINTS)
    ranks = torch.tensor([ceil(n * i / steps) for i in range(1, steps + 1)], dtype=torch.float64)
    risk = torch.stack([r.risk_at(ranks) for r in outputs]).mean(dim=0)
    oracle = torch.stack([r.oracle.risk_at(ranks) for r in outputs]).mean(dim=0)
    points = []
    for k, mean, best in zip(ranks.tolist(), risk.tolist(), oracle.tolist(), strict=True):
        influence = torch.stack([r.risk_influence(k) for r in outputs]).mean(dim=0)
        ends = _risk_interval(mean, units.standard_error(influence), k, units, is_share=is_share)
        points.append(RiskPoint(k / n, mean, *ends, best))
    return tuple(points)


def _risk_interval(
    risk: float, error: float | None, rank: float, units: Units, *, is_share: bool
) -> tuple[float | None, float | None]:
    """Interval at one coverage; the threshold that keeps so many samples counts as uncertain too."""
    if error is None:
        return None, None
    if not is_share:
        return max(0.0, risk - units.quantile * error), risk + units.quantile * error
    spread = risk * (1 - risk)
    size = min(rank, spread / error**2 if spread > 0 and error > 0 else float(units.count))
    return wilson_interval(risk, size * (normal_quantile(units.level) / units.quantile) ** 2, units.level)
