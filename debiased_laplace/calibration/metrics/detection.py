r"""One score on two sets of samples: areas under the ROC and precision-recall curves, and FPR95.

The samples out of distribution (OOD) are the positive class and a larger score speaks for it. The two sets are drawn
independently, so that a standard error adds up from one influence function on each of them.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, hypot, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate
from debiased_laplace.calibration.intervals import (
    Units,
    interval_of_statistic,
    normal_quantile,
    student_quantile,
    wilson_interval,
    without_interval,
)

TRUE_POSITIVE_RATE = 0.95
FEWEST_VALUES = 10  # of a score between two thresholds, for the rate to be smooth there
_SINGLE = "one independent sample on a side has no standard error"


@dataclass(frozen=True, eq=False)
class Separation:
    """One score on the test set and out of distribution, the positive class; float64 on the CPU."""

    test: Float[Tensor, " n"]
    ood: Float[Tensor, " m"]
    units: Units
    ood_units: Units

    @property
    def freedom(self) -> int | None:
        """Degrees of freedom of what is measured on both sets; None where all samples are independent."""
        if self.units.codes is None and self.ood_units.codes is None:
            return None
        return self.fewest_units - 1

    @property
    def fewest_units(self) -> int:
        """Number of units of the set that has fewer."""
        return min(self.units.count, self.ood_units.count)

    @cached_property
    def _counted(self) -> tuple[Int[Tensor, " both"], Float[Tensor, " values"], Float[Tensor, " values"]]:
        """Place of every score among the values, test samples first, and how many of each set lie there."""
        values, place = torch.unique(-torch.cat([self.test, self.ood]), return_inverse=True)
        n = self.units.n
        counts = (torch.bincount(p, minlength=values.numel()).to(torch.float64) for p in (place[:n], place[n:]))
        return place, *counts

    @property
    def place(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """Place of every score of both sets."""
        return self._counted[0][: self.units.n], self._counted[0][self.units.n :]

    @cached_property
    def false_positives(self) -> Float[Tensor, " values"]:
        """Test samples with at least that score."""
        return self._counted[1].cumsum(dim=0)

    @cached_property
    def true_positives(self) -> Float[Tensor, " values"]:
        """OOD samples with at least that score."""
        return self._counted[2].cumsum(dim=0)

    @cached_property
    def components(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
        """Influence of each sample of both sets on the area under the ROC curve, which is the mean of either.

        For a test sample the share of OOD samples that score higher, for an OOD sample the share of test samples that
        score lower; equal scores count half.

        References:
            DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595, equations 3 and 4.
        """
        above = (self.true_positives - self._counted[2] / 2) / self.ood_units.n
        below = 1 - (self.false_positives - self._counted[1] / 2) / self.units.n
        test, ood = self.place
        return above[test], below[ood]

    @cached_property
    def average_precision(self) -> tuple[float, tuple[Float[Tensor, " n"], Float[Tensor, " m"]]]:
        r"""Mean precision over the OOD samples, and the influence of each sample of both sets on it.

        With the shares $S_1, S_0$ of OOD and test samples above a score, precision is
        $\pi S_1 / (\pi S_1 + (1 - \pi) S_0)$; a sample moves the shares at every score up to its own.
        """
        n, m = self.units.n, self.ood_units.n
        total = self.true_positives + self.false_positives
        precision, weight = self.true_positives / total, self._counted[2] / m
        # derivatives by the shares, times the weight of each score
        by_ood = weight * m * self.false_positives / total.square()
        by_test = -weight * n * self.true_positives / total.square()
        moved_test, moved_ood = (x.flip(0).cumsum(dim=0).flip(0) for x in (by_test, by_ood))
        test, ood = self.place
        value = (precision * self._counted[2]).sum().item() / m
        return value, (moved_test[test], precision[ood] + moved_ood[ood])

    def standard_error(self, influence: tuple[Float[Tensor, " n"], Float[Tensor, " m"]]) -> float | None:
        """Of a statistic, from the influence of each sample of both sets; None with one unit on a side."""
        errors = [u.standard_error(x) for x, u in zip(influence, (self.units, self.ood_units), strict=True)]
        return None if errors[0] is None or errors[1] is None else hypot(errors[0], errors[1])

    def place_at(self, rate: float) -> int:
        """Place of the largest score that at least a share `rate` of the OOD samples reaches.

        Beyond the last place where more than all of them would have to.
        """
        needed = float(max(1, ceil(rate * self.ood_units.n - 1e-9)))
        return int(torch.searchsorted(self.true_positives, needed))

    def false_positive_rate_at(self, rate: float) -> float:
        """Share of test samples with such a score; 1 beyond the last place."""
        place = self.place_at(rate)
        if place == self.false_positives.numel():
            return 1.0
        return self.false_positives[place].item() / self.units.n


def estimate_auroc(s: Separation) -> Estimate:
    """Area under the ROC curve: the chance that an OOD sample scores higher than a test sample, ties counting half.

    References:
        DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595;
        Obuchowski (1997), doi:10.2307/2533958 (clusters).
    """
    return _estimate_share(s.components[1].mean().item(), s, s.components, "Mann-Whitney, DeLong's")


def estimate_aupr(s: Separation) -> Estimate:
    """Average precision; a score without any use has the share of OOD samples, not one half."""
    value, influence = s.average_precision
    return _estimate_share(value, s, influence, "average precision, influence function's")


def estimate_fpr95(s: Separation) -> Estimate:
    """Share of test samples that are taken for OOD where 95 % of the OOD samples are recognised.

    The threshold is a quantile of the OOD scores, so that it is uncertain itself. The rates at the ends of its interval
    are combined with Wilson's interval of the rate at a fixed threshold; no density has to be estimated. Errors of two
    smooth sources add up as squares; where few values of the score lie within the interval of the threshold, the rate
    jumps, and they are added as they are.

    References:
        Zou and Donner (2008), doi:10.1002/sim.3095 (intervals from two sources of variation).
    """
    value, n = s.false_positive_rate_at(TRUE_POSITIVE_RATE), s.units.n + s.ood_units.n
    if s.fewest_units < 2:
        return without_interval(value, n, estimator="rate at a quantile", reason=_SINGLE)
    at = s.place_at(TRUE_POSITIVE_RATE)
    size, ood_size = (
        u.effective_size((p <= at).to(torch.float64)) for p, u in zip(s.place, (s.units, s.ood_units), strict=True)
    )
    level = s.units.level
    half = normal_quantile(level) * sqrt(TRUE_POSITIVE_RATE * (1 - TRUE_POSITIVE_RATE) / ood_size)
    ends = (max(0.0, TRUE_POSITIVE_RATE - half), TRUE_POSITIVE_RATE + half)
    by_threshold = [abs(s.false_positive_rate_at(rate) - value) for rate in ends]
    by_test = [abs(end - value) for end in wilson_interval(value, size, level)]
    smooth = s.place_at(ends[1]) - s.place_at(ends[0]) >= FEWEST_VALUES
    low, high = ((hypot if smooth else operator.add)(*e) for e in zip(by_threshold, by_test, strict=True))
    words = "rate at a quantile, Wilson interval and interval of the quantile"
    return Estimate(value, max(0.0, value - low), min(1.0, value + high), None, n, words)


def _estimate_share(
    value: float, s: Separation, influence: tuple[Float[Tensor, " n"], Float[Tensor, " m"]], words: str
) -> Estimate:
    """A statistic between 0 and 1 from its influence functions on both sets."""
    n, value, error = s.units.n + s.ood_units.n, min(1.0, max(0.0, value)), s.standard_error(influence)
    if error is None:
        return without_interval(value, n, estimator=words.split(",")[0], reason=_SINGLE)
    level = s.units.level
    widened = error * student_quantile(level, s.freedom) / normal_quantile(level)
    low, high = interval_of_statistic(value, widened, level, least_size=float(s.fewest_units))
    return Estimate(value, low, high, error, n, f"{words} standard error in Wilson's interval")


def combine_scores(
    pairs: Sequence[tuple[Float[Tensor, " n"], Float[Tensor, " m"]]],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """One less the smallest conformal p-value of several scores: large where any of them is unusual for the test set.

    Samples of both sets are ranked among those of the test set, equal values counting half. Intervals of what is
    measured by this score take the ranks as given.

    References:
        Bates, Candès, Lei, Romano & Sesia (2023), arXiv 2104.08279 (conformal p-values for outliers).
    """
    ranks = []
    for test, ood in pairs:
        ordered, both = test.sort().values, torch.cat([test, ood])
        below, up_to = (torch.searchsorted(ordered, both, right=right).double() for right in (False, True))
        ranks.append((below + up_to) / (2 * len(test)))
    largest = torch.stack(ranks).amax(0)
    n = len(pairs[0][0])
    return largest[:n], largest[n:]
