"""Is a method better than the baseline? Paired differences on the same test samples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import Estimate, estimate_mean

Verdict = Literal["better", "worse", "no detectable difference"]


@dataclass(frozen=True)
class Comparison:
    """Mean of a method's per-sample scores minus the baseline's; a lower score is better.

    Attributes:
        method: the method that is judged.
        baseline: the method it is compared with.
        metric: name of the score.
        difference: below 0 where the method is better, in the unit of the metric.
        low: lower end of this difference's own normal interval, None with one sample.
        high: upper end.
        standard_error: of the difference, None with one sample.
        p_value: two-sided, of no difference, for this comparison alone.
        adjusted_p_value: Holm's adjustment over all comparisons of the report.
        verdict: from the adjusted p-value and the sign.
    """

    method: str
    baseline: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    p_value: float | None
    adjusted_p_value: float | None
    verdict: Verdict


def compare_to_baseline(
    scores: Mapping[str, Mapping[str, Float[Tensor, " n"]]],
    baseline: str,
    *,
    confidence_level: float,
) -> tuple[Comparison, ...]:
    """Paired differences of every score of every method to the baseline, adjusted together.

    Pairing takes out what makes a sample hard for all methods, so that a difference can be
    clear although the methods' own intervals overlap.

    Args:
        scores: method to metric to per-sample scores on the CPU, in the same order of samples.
        baseline: name of the method the others are compared with.
        confidence_level: of the intervals; 1 minus it is the level of the verdicts.
    """
    raw = [
        _compare(
            estimate_mean(score - scores[baseline][metric], confidence_level=confidence_level),
            method=method,
            baseline=baseline,
            metric=metric,
        )
        for method, metrics in scores.items()
        if method != baseline
        for metric, score in metrics.items()
    ]
    adjusted = adjust_by_holm([c.p_value for c in raw])
    return tuple(
        replace(c, adjusted_p_value=p, verdict=_judge(c.difference, p, level=1 - confidence_level))
        for c, p in zip(raw, adjusted, strict=True)
    )


def adjust_by_holm(p_values: list[float | None]) -> list[float | None]:
    """Step-down adjusted p-values; None stays None and counts as no test.

    References:
        Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = running
    return adjusted


def _compare(difference: Estimate, *, method: str, baseline: str, metric: str) -> Comparison:
    return Comparison(
        method=method,
        baseline=baseline,
        metric=metric,
        difference=difference.known,
        low=difference.low,
        high=difference.high,
        standard_error=difference.standard_error,
        p_value=_two_sided_p_value(difference),
        adjusted_p_value=None,
        verdict="no detectable difference",
    )


def _two_sided_p_value(difference: Estimate) -> float | None:
    if difference.known == 0:
        return 1.0
    if difference.standard_error is None:
        return None
    if difference.standard_error == 0:
        return 0.0
    z = abs(difference.known) / difference.standard_error
    return 2 * NormalDist().cdf(-z)


def _judge(difference: float, p_value: float | None, *, level: float) -> Verdict:
    if p_value is None or p_value >= level:
        return "no detectable difference"
    return "better" if difference < 0 else "worse"
