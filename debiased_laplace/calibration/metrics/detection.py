r"""Telling two sets of samples apart by a score: areas under the ROC and precision-recall curves, and FPR95.

The out-of-distribution samples are the positive class and a larger score speaks for it. The two sets are drawn
independently, so that a standard error adds up from one influence function on each of them.
"""

import operator
from dataclasses import dataclass
from functools import cached_property
from math import hypot, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    count_units,
    effective_size,
    normal_quantile,
    student_quantile,
    wilson_interval,
    without_interval,
)
from debiased_laplace.calibration.metrics.influence import proportion_interval, standard_error_of
from debiased_laplace.calibration.metrics.selective import count_kept

TRUE_POSITIVE_RATE = 0.95
FEWEST_VALUES = 10  # of a score between two thresholds, for the rate to be smooth there
_ONE_SAMPLE = "one independent sample on a side has no standard error"


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """Scores of one set; float64 on the CPU.

    Attributes:
        scores: of each sample.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent.
    """

    scores: Float[Tensor, " n"]
    clusters: Int[Tensor, " n"] | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.scores.numel()

    @property
    def n_clusters(self) -> int:
        """Number of independent units."""
        return count_units(self.n, self.clusters)


@dataclass(frozen=True, eq=False)
class Separation:
    """Scores inside and outside of the distribution, counted at every value that occurs, from the largest on.

    Attributes:
        inside: scores of the test set.
        outside: scores out of distribution, the positive class.
    """

    inside: ScoredSample
    outside: ScoredSample

    @property
    def degrees_of_freedom(self) -> int | None:
        """Of the standard errors of what is measured on both sets; None where no sample depends on another."""
        if self.inside.clusters is None and self.outside.clusters is None:
            return None
        return min(self.inside.n_clusters, self.outside.n_clusters) - 1

    @cached_property
    def _counted(self) -> tuple[Int[Tensor, " both"], Float[Tensor, " values"], Float[Tensor, " values"]]:
        """Place of every score among the values, inside first, and how many of each set lie there."""
        both = torch.cat([self.inside.scores, self.outside.scores])
        values, place = torch.unique(-both, return_inverse=True)
        n = self.inside.n
        counts = (torch.bincount(p, minlength=values.numel()).to(torch.float64) for p in (place[:n], place[n:]))
        return place, *counts

    @property
    def place(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """Place of every score inside and outside."""
        return self._counted[0][: self.inside.n], self._counted[0][self.inside.n :]

    @cached_property
    def false_positives(self) -> Float[Tensor, " values"]:
        """Samples inside with at least that score."""
        return self._counted[1].cumsum(dim=0)

    @cached_property
    def true_positives(self) -> Float[Tensor, " values"]:
        """Samples outside with at least that score."""
        return self._counted[2].cumsum(dim=0)

    @cached_property
    def components(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
        """Whose means are the area under the ROC curve.

        Of each sample inside the share of samples outside that score higher, of each outside the share inside that
        score lower; equal scores count half.

        References:
            DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595, equations 3 and 4.
        """
        inside, outside = self._counted[1], self._counted[2]
        above = (self.true_positives - outside / 2) / self.outside.n
        below = 1 - (self.false_positives - inside / 2) / self.inside.n
        in_place, out_place = self.place
        return above[in_place], below[out_place]

    @cached_property
    def precision(self) -> Float[Tensor, " values"]:
        """Share of samples outside among all that score at least as high."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def average_precision(self) -> float:
        """Mean precision over the samples outside: the area under the steps of the precision-recall curve."""
        return (self.precision * self._counted[2]).sum().item() / self.outside.n

    @cached_property
    def precision_influence(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
        r"""Influence of each sample inside and outside on `average_precision`.

        With the shares $S_1, S_0$ of samples outside and inside above a score, precision is
        $\pi S_1 / (\pi S_1 + (1 - \pi) S_0)$; a sample moves the shares at every score up to its own.
        """
        n, m = self.inside.n, self.outside.n
        total = self.true_positives + self.false_positives
        weight = self._counted[2] / m
        # derivatives by the shares, times the weight of each score
        by_outside = weight * m * self.false_positives / total.square()
        by_inside = -weight * n * self.true_positives / total.square()
        in_place, out_place = self.place
        moved_in, moved_out = (x.flip(0).cumsum(dim=0).flip(0) for x in (by_inside, by_outside))
        outside = self.precision[out_place] + moved_out[out_place]
        return moved_in[in_place], outside

    def place_at(self, rate: float) -> int:
        """Place of the largest score that at least a share `rate` of the samples outside reaches.

        Beyond the last place where more than all of them would have to.
        """
        return int(torch.searchsorted(self.true_positives, float(count_kept(self.outside.n, rate))))

    def standard_error(self, influence: tuple[Float[Tensor, " n"], Float[Tensor, " m"]]) -> float | None:
        """Of a statistic, from the influence of each sample inside and outside on it; None with one unit on a side."""
        errors = [standard_error_of(x, s.clusters) for x, s in zip(influence, (self.inside, self.outside), strict=True)]
        return None if errors[0] is None or errors[1] is None else hypot(errors[0][0], errors[1][0])

    def false_positive_rate_at(self, rate: float) -> float:
        """Share of samples inside with such a score; 1 beyond the last place."""
        place = self.place_at(rate)
        if place == self.false_positives.numel():
            return 1.0
        return self.false_positives[place].item() / self.inside.n


def estimate_auroc(separation: Separation, *, confidence_level: float) -> Estimate:
    """Area under the ROC curve: the chance that a sample outside scores higher than one inside, ties counting half.

    DeLong's standard error, or its form for clusters, in Wilson's interval, which does not end beyond 1.

    References:
        DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595;
        Obuchowski (1997), doi:10.2307/2533958 (clusters).
    """
    value = separation.components[1].mean().item()
    return _estimate_share(value, separation, separation.components, confidence_level, "Mann-Whitney, DeLong's")


def estimate_aupr(separation: Separation, *, confidence_level: float) -> Estimate:
    """Average precision with the standard error of its influence function.

    It depends on the share of samples outside: a score without any use has that share, not one half.
    """
    value = separation.average_precision
    return _estimate_share(
        value, separation, separation.precision_influence, confidence_level, "average precision, influence function's"
    )


def estimate_fpr95(separation: Separation, *, confidence_level: float) -> Estimate:
    """Share of samples inside that are taken for out of distribution where 95 % of those outside are recognised.

    The threshold is a quantile of the scores outside, so that it is uncertain itself. The rates at the ends of its
    interval are combined with Wilson's interval of the rate at a fixed threshold. No density has to be estimated.
    Errors of two smooth sources add up as squares; where few values of the score lie within the interval of the
    threshold, the rate jumps, and they are added as they are.

    References:
        Zou and Donner (2008), doi:10.1002/sim.3095 (intervals from two sources of variation).
    """
    value = separation.false_positive_rate_at(TRUE_POSITIVE_RATE)
    n = separation.inside.n + separation.outside.n
    words = "rate at a quantile, Wilson interval and interval of the quantile"
    if min(separation.inside.n_clusters, separation.outside.n_clusters) < 2:
        return without_interval(value, n, estimator="rate at a quantile", reason=_ONE_SAMPLE)
    half = _half_width_of_rate(separation, confidence_level)
    ends = (max(0.0, TRUE_POSITIVE_RATE - half), TRUE_POSITIVE_RATE + half)
    by_threshold = [abs(separation.false_positive_rate_at(rate) - value) for rate in ends]
    by_inside = [abs(end - value) for end in _interval_of_rate(separation, value, confidence_level)]
    smooth = separation.place_at(ends[1]) - separation.place_at(ends[0]) >= FEWEST_VALUES
    add = hypot if smooth else operator.add
    low, high = (add(*errors) for errors in zip(by_threshold, by_inside, strict=True))
    return Estimate(value, max(0.0, value - low), min(1.0, value + high), None, n, words)


def difference_of_aurocs(one: Separation, other: Separation) -> tuple[float, float | None]:
    """AUROC of `one` minus that of `other` on the same samples, and its standard error, None with a single sample.

    References:
        DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595.
    """
    inside, outside = (a - b for a, b in zip(one.components, other.components, strict=True))
    return outside.mean().item(), one.standard_error((inside, outside))


def _estimate_share(
    value: float,
    separation: Separation,
    influence: tuple[Float[Tensor, " n"], Float[Tensor, " m"]],
    confidence_level: float,
    words: str,
) -> Estimate:
    """A statistic between 0 and 1 from its influence functions inside and outside."""
    n = separation.inside.n + separation.outside.n
    value = min(1.0, max(0.0, value))
    error = separation.standard_error(influence)
    if error is None:
        return without_interval(value, n, estimator=words.split(",")[0], reason=_ONE_SAMPLE)
    t = student_quantile(confidence_level, separation.degrees_of_freedom)
    low, high = proportion_interval(
        value,
        error * t / normal_quantile(confidence_level),
        confidence_level=confidence_level,
        least_size=min(separation.inside.n_clusters, separation.outside.n_clusters),
    )
    return Estimate(value, low, high, error, n, f"{words} standard error in Wilson's interval")


def _half_width_of_rate(separation: Separation, confidence_level: float) -> float:
    """Half-width of the interval of true positive rates that are compatible with 95 % at the threshold."""
    outside = separation.outside
    size: float = outside.n
    if outside.clusters is not None:
        above = separation.place[1] <= separation.place_at(TRUE_POSITIVE_RATE)
        size = _worth(above.to(torch.float64), outside, confidence_level)
    return normal_quantile(confidence_level) * sqrt(TRUE_POSITIVE_RATE * (1 - TRUE_POSITIVE_RATE) / size)


def _interval_of_rate(separation: Separation, rate: float, confidence_level: float) -> tuple[float, float]:
    """Wilson's interval of the false positive rate at a threshold that is taken for given."""
    inside = separation.inside
    size: float = inside.n
    if inside.clusters is not None:
        above = separation.place[0] <= separation.place_at(TRUE_POSITIVE_RATE)
        size = _worth(above.to(torch.float64), inside, confidence_level)
    return wilson_interval(rate, size, confidence_level=confidence_level)


def _worth(indicators: Float[Tensor, " n"], sample: ScoredSample, confidence_level: float) -> float:
    """How many independent samples a share of clustered ones is worth."""
    known = standard_error_of(indicators, sample.clusters)
    error = known[0] if known is not None else 0.0
    return effective_size(
        indicators.mean().item(),
        sample.n,
        n_clusters=sample.n_clusters,
        standard_error=error,
        confidence_level=confidence_level,
    )
