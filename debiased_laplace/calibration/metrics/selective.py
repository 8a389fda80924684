"""Selective prediction: what a method gains by answering only where it is sure.

A sample is kept if its confidence is among the highest; *coverage* is the share that is kept, *selective risk* the mean
loss there. Everything is a function of the order of confidences, so that calibration plays no part.
"""

from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    normal_quantile,
    student_quantile,
    wilson_ends,
    wilson_interval,
    without_interval,
)
from debiased_laplace.calibration.metrics.influence import ONE, estimate_positive
from debiased_laplace.calibration.metrics.risk_coverage import RankedLosses

ALLOWED_RISK = 0.05
COVERAGE_OF_RISK = 0.8
COVERAGES = (0.8, 0.9, 0.95)
MAX_POINTS = 100  # of a stored curve
_ALL_WRONG = "every prediction is wrong, which no order of them changes"


@dataclass(frozen=True)
class RiskPoint:
    """A point of a risk-coverage curve.

    Attributes:
        coverage: share of the samples that is kept, the most confident first.
        risk: mean loss of these.
        low: lower end of its interval at this coverage alone, None where there is none.
        high: upper end.
        oracle: risk of the same number of samples with the smallest losses.
    """

    coverage: float
    risk: float
    low: float | None
    high: float | None
    oracle: float


@dataclass(frozen=True)
class KeptAccuracy:
    """Accuracy on the most confident samples.

    Attributes:
        coverage: share of the samples that is kept.
        accuracy: share of these that is right.
    """

    coverage: float
    accuracy: Estimate


@dataclass(frozen=True)
class SelectionCurves:
    """What the figures of selective prediction show of one method.

    Attributes:
        points: risk against coverage, at most 100 of them.
        kept: accuracy at some coverages; empty for regression.
        loss: what the risk is the mean of, in words.
    """

    points: tuple[RiskPoint, ...]
    kept: tuple[KeptAccuracy, ...]
    loss: str


def measure_selection(ranked: RankedLosses, *, confidence_level: float) -> dict[str, Estimate]:
    """Areas, coverage at 5 % risk and risk at 80 % coverage of a classifier.

    Args:
        ranked: 1 for every error, else 0, by confidence.
        confidence_level: of the intervals.

    References:
        Geifman and El-Yaniv (2017), arXiv 1705.08500 (risk and coverage);
        Geifman, Uziel and El-Yaniv (2019), arXiv 1805.08206 (area, and its excess over the oracle's);
        Traub et al. (2024), arXiv 2407.01032 (area under the generalized risk).
    """
    area = _estimate_classifier_area
    return {
        "aurc": area(ranked, ranked.area, ranked.area_influence, confidence_level=confidence_level, most=1.0),
        "e_aurc": estimate_excess(ranked, confidence_level=confidence_level),
        "augrc": area(
            ranked,
            ranked.generalized_area,
            ranked.generalized_area_influence,
            confidence_level=confidence_level,
            most=0.5,
        ),
        "coverage_at_5_risk": estimate_coverage(ranked, risk=ALLOWED_RISK, confidence_level=confidence_level),
        "risk_at_80_coverage": estimate_risk(ranked, coverage=COVERAGE_OF_RISK, confidence_level=confidence_level),
    }


def estimate_excess(ranked: RankedLosses, *, confidence_level: float) -> Estimate:
    """Area under a classifier's risk-coverage curve beyond that of the same errors in their best order."""
    oracle = ranked.oracle
    excess = ranked.area - oracle.area
    if excess <= 1e-12 * ranked.area:
        why = "the order is the best there is, so that nothing says how far off it may be elsewhere"
        return without_interval(0.0, ranked.n, estimator="statistic of ranks", reason=why)
    return estimate_area(
        ranked, excess, ranked.area_influence - oracle.area_influence, confidence_level=confidence_level, most=1.0
    )


def estimate_area(
    ranked: RankedLosses,
    area: float,
    influence: Float[Tensor, " n"],
    *,
    confidence_level: float,
    most: float,
) -> Estimate:
    """A positive area with the interval of its influence function."""
    return estimate_positive(
        area,
        influence,
        losses=ranked.losses,
        most=most,
        confidence_level=confidence_level,
        clusters=ranked.clusters,
    )


def estimate_risk(ranked: RankedLosses, *, coverage: float, confidence_level: float) -> Estimate:
    """Share of errors among the most confident samples that make up a coverage, rounded up to whole samples."""
    rank = torch.tensor([count_kept(ranked.n, coverage)], dtype=torch.float64)
    risk = ranked.risk_at(rank).item()
    if ranked.n_clusters < 2:
        return without_interval(risk, ranked.n, estimator="selective risk", reason=ONE)
    low, high = (x.item() for x in risk_intervals(ranked, rank, confidence_level=confidence_level))
    error = ranked.risk_variance(rank).sqrt().item()
    return Estimate(risk, low, high, error, ranked.n, "selective risk, Wilson interval of what its samples are worth")


def estimate_coverage(ranked: RankedLosses, *, risk: float, confidence_level: float) -> Estimate:
    """Largest coverage whose selective risk is at most `risk`, 0 if there is none.

    The interval holds every coverage at which such a risk lies within the interval of the selective risk, up to its
    last: a test that is inverted. No slope of the curve has to be estimated.
    """
    n = ranked.n
    value = _largest_coverage(ranked.risk, risk)
    if ranked.n_clusters < 2:
        return without_interval(value, n, estimator="coverage", reason=ONE)
    low, high = risk_intervals(ranked, ranked.ranks, confidence_level=confidence_level)
    ends = _largest_coverage(high, risk), _largest_coverage(low, risk)
    return Estimate(value, *ends, None, n, "coverage, from the Wilson intervals of the selective risk")


def risk_intervals(
    ranked: RankedLosses, ranks: Float[Tensor, " m"], *, confidence_level: float, is_share: bool = True
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Interval of the selective risk at each rank alone.

    Args:
        ranked: losses by confidence.
        ranks: how many samples are kept.
        confidence_level: coverage of each interval.
        is_share: whether losses are 0 or 1, which makes intervals Wilson's; else they are normal.
    """
    risk, variance = ranked.risk_at(ranks), ranked.risk_variance(ranks)
    z = normal_quantile(confidence_level)
    t = student_quantile(confidence_level, None if ranked.clusters is None else ranked.n_clusters - 1)
    if not is_share:
        half = t * variance.sqrt()
        return (risk - half).clamp_min(0.0), risk + half
    spread = risk * (1 - risk)
    worth = spread / variance.clamp_min(torch.finfo(torch.float64).tiny)
    size = torch.where((spread > 0) & (variance > 0), worth, float(ranked.n_clusters)).minimum(ranks) * (z / t) ** 2
    low, high = wilson_ends(risk, size, z)
    return low.clamp_min(0.0).minimum(risk), high.clamp_max(1.0).maximum(risk)


def trace_selection(ranked: RankedLosses, *, confidence_level: float, loss: str, is_share: bool) -> SelectionCurves:
    """The curves of one method, thinned.

    Args:
        ranked: losses by confidence.
        confidence_level: of the intervals.
        loss: what is lost, in words.
        is_share: whether losses are 0 or 1.
    """
    n = ranked.n
    steps = min(n, MAX_POINTS)
    ranks = torch.tensor([ceil(n * i / steps) for i in range(1, steps + 1)], dtype=torch.float64)
    risk, oracle = ranked.risk_at(ranks).tolist(), ranked.oracle.risk_at(ranks).tolist()
    low: list[float | None] = [None] * steps
    high = low
    if ranked.n_clusters > 1:
        ends = risk_intervals(ranked, ranks, confidence_level=confidence_level, is_share=is_share)
        low, high = (list(x.tolist()) for x in ends)
    points = tuple(RiskPoint(k / n, *rest) for k, *rest in zip(ranks.tolist(), risk, low, high, oracle, strict=True))
    kept = tuple(_estimate_kept(ranked, coverage, confidence_level) for coverage in COVERAGES) if is_share else ()
    return SelectionCurves(points, kept, loss)


def count_kept(n: int, coverage: float) -> int:
    """The least number of samples out of n that makes up a coverage."""
    return max(1, ceil(coverage * n - 1e-9))


def _estimate_kept(ranked: RankedLosses, coverage: float, confidence_level: float) -> KeptAccuracy:
    risk = estimate_risk(ranked, coverage=coverage, confidence_level=confidence_level)
    words = risk.estimator.replace("selective risk", "selective accuracy")
    if risk.low is None or risk.high is None:
        accuracy = without_interval(1 - risk.known, risk.n, estimator=words, reason=risk.reason or "no interval")
    else:
        accuracy = Estimate(1 - risk.known, 1 - risk.high, 1 - risk.low, risk.standard_error, risk.n, words)
    return KeptAccuracy(coverage, accuracy)


def _estimate_classifier_area(
    ranked: RankedLosses, area: float, influence: Float[Tensor, " n"], *, confidence_level: float, most: float
) -> Estimate:
    """An area; with no error at all it is at most that of a method which orders at random, `most` times the risk."""
    errors, n = int(ranked.losses.sum()), ranked.n
    if ranked.n_clusters < 2:
        return without_interval(area, n, estimator="statistic of ranks", reason=ONE)
    if 0 < errors < n:
        return estimate_area(ranked, area, influence, confidence_level=confidence_level, most=most)
    if errors == n:
        return without_interval(area, n, estimator="statistic of ranks", reason=_ALL_WRONG)
    _, risk = wilson_interval(0.0, ranked.n_clusters, confidence_level=confidence_level)
    words = "statistic of ranks; without errors its upper end is that of an order no better than chance"
    return Estimate(area, 0.0, most * risk, None, n, words)


def _largest_coverage(risk: Float[Tensor, " n"], allowed: float) -> float:
    fine = (risk <= allowed + 1e-12).nonzero()
    return (fine[-1].item() + 1) / risk.numel() if fine.numel() else 0.0
