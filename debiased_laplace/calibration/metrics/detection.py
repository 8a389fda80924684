r"""Detection of a set out of distribution: areas under the ROC and precision-recall curves, FPR95, and comparisons.

The samples out of distribution (OOD) are the positive class and a larger score speaks for it. The two sets are drawn
independently: the variance of a statistic is the sum of the variances of its influence functions on both.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, hypot, inf, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.contents import (
    Detection,
    DetectionComparison,
    Estimate,
    OutOfDistributionSet,
    ScoreBin,
    Verdict,
)
from debiased_laplace.calibration.intervals import (
    Units,
    normal_quantile,
    student_quantile,
    two_sided_p_value,
    wilson_interval,
    wilson_of_share,
    without_interval,
)
from debiased_laplace.calibration.ties import THRESHOLD

STAND_INS = ("entropy", "standard_deviation")  # of a task, for a baseline that lacks the method's score
HISTOGRAM_BINS = 20
CHANCE = 0.5
TRUE_POSITIVE_RATE = 0.95
FEWEST_VALUES = 10  # of a score between two thresholds, for the rate to be smooth there
_SINGLE = "one independent sample on a side has no standard error"

Pair = tuple[Float[Tensor, " n"], Float[Tensor, " m"]]  # one number per sample of the test set, and of the OOD set


@dataclass(frozen=True, eq=False)
class Separation:
    """One score on the test set and out of distribution, the positive class; float64 on the CPU."""

    test: Float[Tensor, " n"]
    ood: Float[Tensor, " m"]
    units: Units
    ood_units: Units

    @property
    def n(self) -> int:
        """Number of samples of both sets."""
        return self.units.n + self.ood_units.n

    @property
    def fewest_units(self) -> int:
        """Number of units of the smaller set."""
        return min(self.units.count, self.ood_units.count)

    @property
    def freedom(self) -> int | None:
        """Degrees of freedom of a statistic of both sets; None where all samples are independent."""
        independent = self.units.codes is None and self.ood_units.codes is None
        return None if independent else self.fewest_units - 1

    @cached_property
    def components(self) -> Pair:
        """Influence of each sample on the area under the ROC curve, which is the mean over either set.

        It is the share of the other set that is on the right side of the sample; equal scores count half.

        References:
            DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595, equations 3 and 4.
        """
        return 1 - _share_below(self.test, self.ood), _share_below(self.ood, self.test)

    def average_precision(self) -> tuple[float, Pair]:
        r"""Return the mean precision over the OOD samples, and the influence of each sample on it.

        With the shares $S_1, S_0$ of OOD and test samples above a score, precision is
        $\pi S_1 / (\pi S_1 + (1 - \pi) S_0)$; a sample moves the shares at every score up to its own.
        """
        n, m = self.units.n, self.ood_units.n
        test, ood = self.test.sort().values, self.ood.sort().values
        true, false = m - torch.searchsorted(ood, ood), n - torch.searchsorted(test, ood)  # with at least each score
        total = (true + false).double()

        def sum_up_to(scores: Tensor, terms: Tensor) -> Tensor:
            sums = torch.cat([terms.new_zeros(1), terms.cumsum(dim=0)])
            return sums[torch.searchsorted(ood, scores, right=True)]

        precision = true / total
        own = precision[torch.searchsorted(ood, self.ood)]
        by_test = -n / m * sum_up_to(self.test, true / total.square())
        return precision.mean().item(), (by_test, own + sum_up_to(self.ood, false / total.square()))

    def standard_error(self, influence: Pair) -> float | None:
        """Return the standard error of a statistic, given its influence function; None with one unit on a side."""
        errors = [u.standard_error(x) for x, u in zip(influence, (self.units, self.ood_units), strict=True)]
        return None if errors[0] is None or errors[1] is None else hypot(errors[0], errors[1])

    def threshold_at(self, rate: float) -> float:
        """Return the largest score that at least a share `rate` of the OOD samples reaches; -inf for more than all."""
        needed = max(1, ceil(rate * self.ood_units.n - 1e-9))
        return self.ood.sort(descending=True).values[needed - 1].item() if needed <= self.ood_units.n else -inf


def _share_below(scores: Float[Tensor, " k"], reference: Float[Tensor, " r"]) -> Float[Tensor, " k"]:
    """Return the share of a reference set below each score, equal scores counting half."""
    ordered = reference.sort().values
    below, up_to = (torch.searchsorted(ordered, scores, right=right).double() for right in (False, True))
    return (below + up_to) / (2 * len(reference))


def estimate_auroc(s: Separation) -> Estimate:
    """Estimate the area under the ROC curve: the chance that an OOD sample scores higher, ties counting half.

    References:
        DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595;
        Obuchowski (1997), doi:10.2307/2533958 (clusters).
    """
    return _estimate_share(s.components[1].mean().item(), s.components, s, "Mann-Whitney, DeLong's")


def estimate_aupr(s: Separation) -> Estimate:
    """Estimate the average precision; that of an uninformative score is the share of OOD samples, not one half."""
    return _estimate_share(*s.average_precision(), s, "average precision, influence function's")


def estimate_fpr95(s: Separation) -> Estimate:
    """Estimate the share of test samples taken for OOD where 95 % of the OOD samples are recognised.

    The rates at the ends of the threshold's interval, a quantile of the OOD scores, are combined with Wilson's interval
    of the rate at a fixed threshold. Errors of two smooth sources add up as squares; where few values of the score lie
    within the interval of the threshold, the rate jumps, and they are added as they are.

    References:
        Zou and Donner (2008), doi:10.1002/sim.3095 (intervals from two sources of variation).
    """

    def rate_above(threshold: float) -> float:
        return int((s.test >= threshold).sum()) / s.units.n

    at, level = s.threshold_at(TRUE_POSITIVE_RATE), s.units.level
    value = rate_above(at)
    if s.fewest_units < 2:
        return without_interval(value, s.n, "rate at a quantile", _SINGLE)
    ood_size = s.ood_units.effective_size((s.ood >= at).double())
    half = normal_quantile(level) * sqrt(TRUE_POSITIVE_RATE * (1 - TRUE_POSITIVE_RATE) / ood_size)
    ends = [s.threshold_at(rate) for rate in (max(0.0, TRUE_POSITIVE_RATE - half), TRUE_POSITIVE_RATE + half)]
    by_threshold = [abs(rate_above(end) - value) for end in ends]
    by_test = [abs(end - value) for end in wilson_of_share((s.test >= at).double(), s.units)]
    between = [x[(ends[1] < x) & (x <= ends[0])] for x in (s.test, s.ood)]
    smooth = len(torch.cat(between).unique()) >= FEWEST_VALUES
    low, high = ((hypot if smooth else operator.add)(*e) for e in zip(by_threshold, by_test, strict=True))
    words = "rate at a quantile, Wilson interval and interval of the quantile"
    return Estimate(value, max(0.0, value - low), min(1.0, value + high), None, s.n, words)


def _estimate_share(value: float, influence: Pair, s: Separation, words: str) -> Estimate:
    r"""Estimate a statistic between 0 and 1 from its influence functions on both sets.

    The interval is that of a proportion of $p (1 - p) / \mathrm{se}^2$ samples, and of the fewest units where the
    standard error is 0, so that it neither leaves [0, 1] nor collapses.

    References:
        Newcombe (2006), doi:10.1002/sim.2324 (such intervals for the area under a ROC curve).
    """
    value, error, level = min(1.0, max(0.0, value)), s.standard_error(influence), s.units.level
    if error is None:
        return without_interval(value, s.n, words.split(",")[0], _SINGLE)
    widened = error * student_quantile(level, s.freedom) / normal_quantile(level)
    size = value * (1 - value) / widened**2 if widened > 0 else 0.0
    low, high = wilson_interval(value, size if size > 0 else float(s.fewest_units), level)
    return Estimate(value, low, high, error, s.n, f"{words} standard error in Wilson's interval")


def combine_scores(pairs: Sequence[Pair]) -> Pair:
    """Return 1 minus the smallest conformal p-value of several scores.

    It is large where any score is unusual for the test set. Samples of both sets are ranked among those of the test
    set, equal values counting half. Intervals of statistics of this score take the ranks as given.

    References:
        Bates, Candès, Lei, Romano & Sesia (2023), arXiv 2104.08279 (conformal p-values for outliers).
    """
    ranks = [(_share_below(test, test), _share_below(ood, test)) for test, ood in pairs]
    test, ood = (torch.stack(both).amax(dim=0) for both in zip(*ranks, strict=True))
    return test, ood


def measure_set(separations: Mapping[str, Mapping[str, Separation]], baseline: str) -> OutOfDistributionSet:
    """Return the metrics, histograms and comparisons of one set; p-values are not adjusted yet."""
    pairs = [(method, score, s) for method, scores in separations.items() for score, s in scores.items()]
    edges = {score: _choose_edges([s for _, other, s in pairs if other == score]) for _, score, _ in pairs}
    estimators = {"auroc": estimate_auroc, "aupr": estimate_aupr, "fpr95": estimate_fpr95}
    detections = tuple(
        Detection(method, score, {name: f(s) for name, f in estimators.items()}, _count(s, edges[score]))
        for method, score, s in pairs
    )
    reference = separations[baseline]
    stand_in = next((score for score in STAND_INS if score in reference), None)
    comparisons = tuple(
        _compare(s, reference[own], (method, baseline, score), own)
        for method, score, s in pairs
        if method != baseline and (own := score if score in reference else stand_in) is not None
    )
    return OutOfDistributionSet(next(iter(reference.values())).ood_units.n, detections, comparisons)


def _compare(
    s: Separation, reference: Separation, names: tuple[str, str, str], reference_score: str
) -> DetectionComparison:
    """Return the paired difference of two AUROCs on the same samples (DeLong)."""
    test, ood = (a - b for a, b in zip(s.components, reference.components, strict=True))
    difference, error = ood.mean().item(), s.standard_error((test, ood))
    low = high = p_value = None
    if error is not None:
        low, high = interval_of_difference(difference, error, s.units.level, s.freedom)
        p_value = two_sided_p_value(difference, error, s.freedom)
    below_chance = is_below_chance(s.components[0].mean().item())
    verdict: Verdict = "no detectable difference"  # until p-values are adjusted over all sets
    return DetectionComparison(
        *names, difference, low, high, error, p_value, None, verdict, reference_score, below_chance
    )


def is_below_chance(area: float | None) -> bool:
    """Return whether an area under a ROC curve is below one half by more than rounding."""
    return area is not None and area < CHANCE * (1 - THRESHOLD)


def interval_of_difference(
    difference: float, standard_error: float, level: float, freedom: int | None
) -> tuple[float, float]:
    """Return the interval of a difference of two areas."""
    half = student_quantile(level, freedom) * standard_error
    return max(-1.0, difference - half), min(1.0, difference + half)


def _choose_edges(separations: list[Separation]) -> list[float]:
    """Return edges of bins of equal width over the range of all methods."""
    low, high = range_of([x for s in separations for x in (s.test, s.ood)])
    if high <= low:
        margin = max(1e-6, 1e-6 * abs(low))
        low, high = low - margin, high + margin
    return np.linspace(low, high, HISTOGRAM_BINS + 1).tolist()


def range_of(scores: list[Tensor]) -> tuple[float, float]:
    """Return the smallest and the largest of several tensors of scores."""
    return min(x.min().item() for x in scores), max(x.max().item() for x in scores)


def _count(s: Separation, edges: list[float]) -> tuple[ScoreBin, ...]:
    test, ood = (np.histogram(x.numpy(), edges)[0].tolist() for x in (s.test, s.ood))
    return tuple(map(ScoreBin, edges[:-1], edges[1:], test, ood))
