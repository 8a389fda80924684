"""Is a method better than the ones it must beat? Paired differences on the same test samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import Estimate, count_units, estimate_mean, normal_quantile
from debiased_laplace.calibration.skewness import estimate_skewed_mean, skewed_p_value, two_sided_p_value

Verdict = Literal["better", "worse", "no detectable difference"]

_NORMAL = {"rmsce2_debiased"}  # its scores are influences, whose skewness is not that of the statistic


@dataclass(frozen=True)
class Comparison:
    """A method's score minus that of a reference on the same samples; a lower score is better.

    Attributes:
        method: the method that is judged.
        baseline: the reference that it is compared with: the baseline, or the baseline after scaling.
        metric: name of the score.
        difference: below 0 where the method is better, in the unit of the metric.
        low: lower end of this difference's own interval, None with one sample.
        high: upper end.
        standard_error: of the difference, None with one sample.
        p_value: two-sided, of no difference, for this comparison alone.
        adjusted_p_value: Holm's adjustment over all comparisons of the report.
        verdict: from the adjusted p-value and the sign.
        estimator: how the interval and the p-value were obtained.
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
    estimator: str = ""


def compare_methods(
    scores: Mapping[str, Mapping[str, Float[Tensor, " n"]]],
    references: Sequence[str],
    *,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None = None,
    fitting_errors: Mapping[str, float] | None = None,
) -> tuple[Comparison, ...]:
    """Paired differences of every score of every method to every reference, adjusted together.

    Pairing takes out what makes a sample hard for all methods, so that a difference can be
    clear although the methods' own intervals overlap.

    Args:
        scores: method to metric to per-sample scores on the CPU, in the same order of samples; of a statistic that is
            no mean, the influences of the samples around its value.
        references: the baseline, and after it the same baseline after scaling, if there is one. A method is compared
            with each of them but itself, and the baseline with none.
        confidence_level: of the intervals; 1 minus it is the level of the verdicts.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent.
        fitting_errors: standard errors of methods' NLL from numbers that were fitted on other folds.
    """
    fitted = fitting_errors or {}
    raw = [
        _compare(
            (method, reference, metric),
            score - scores[reference][metric],
            confidence_level=confidence_level,
            clusters=clusters,
            fitting_error=max(fitted.get(method, 0.0), fitted.get(reference, 0.0)) if metric == "nll" else 0.0,
        )
        for method, metrics in scores.items()
        for reference in references
        if method not in (reference, references[0])
        for metric, score in metrics.items()
        if metric in scores[reference] and not (metric == "error" and method in references)  # equal by construction
    ]
    adjusted = adjust_by_holm([c.p_value for c in raw])
    return tuple(
        replace(c, adjusted_p_value=p, verdict=judge_difference(c.difference, p, level=1 - confidence_level))
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


def compare_shares(difference: Float[Tensor, " n"], *, confidence_level: float) -> tuple[Estimate, float]:
    """Difference of two paired proportions, and its p-value.

    One sample is added to either kind of disagreement, so that neither interval nor p-value collapses where the
    methods disagree on few samples.

    Args:
        difference: -1, 0 or 1 per sample.
        confidence_level: coverage of the interval.

    References:
        Bonett and Price (2012), doi:10.3102/1076998611411915.
    """
    n = difference.numel()
    more, fewer = ((side * difference > 0).sum().item() for side in (1, -1))
    value, shrunk = (more - fewer) / n, (more - fewer) / (n + 2)
    standard_error = sqrt(((more + fewer + 2) / (n + 2) - shrunk**2) / (n + 2))
    half_width = normal_quantile(confidence_level) * standard_error
    low, high = max(-1.0, shrunk - half_width), min(1.0, shrunk + half_width)
    estimate = Estimate(
        value, min(low, value), max(high, value), standard_error, n, "paired proportions, Bonett and Price's interval"
    )
    return estimate, two_sided_p_value(shrunk / standard_error, None)


def _compare(
    names: tuple[str, str, str],
    difference: Float[Tensor, " n"],
    *,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None,
    fitting_error: float,
) -> Comparison:
    method, reference, metric = names
    p_value: float | None
    if metric == "error" and clusters is None:
        estimate, p_value = compare_shares(difference, confidence_level=confidence_level)
    elif metric == "error" or metric in _NORMAL:
        estimate = estimate_mean(difference, confidence_level=confidence_level, clusters=clusters)
        p_value = _normal_p_value(estimate, clusters)
    else:
        estimate = estimate_skewed_mean(
            difference, confidence_level=confidence_level, clusters=clusters, fitting_error=fitting_error
        )
        p_value = skewed_p_value(difference, clusters=clusters, fitting_error=fitting_error)
    return Comparison(
        method=method,
        baseline=reference,
        metric=metric,
        difference=estimate.known,
        low=estimate.low,
        high=estimate.high,
        standard_error=estimate.standard_error,
        p_value=p_value,
        adjusted_p_value=None,
        verdict="no detectable difference",
        estimator=f"paired {estimate.estimator.removeprefix('paired ')}",
    )


def _normal_p_value(difference: Estimate, clusters: Int[Tensor, " n"] | None) -> float | None:
    if difference.known == 0:
        return 1.0
    if difference.standard_error is None:
        return None
    if difference.standard_error == 0:
        return 0.0
    freedom = None if clusters is None else count_units(clusters.numel(), clusters) - 1
    return two_sided_p_value(difference.known / difference.standard_error, freedom)


def judge_difference(difference: float, p_value: float | None, *, level: float) -> Verdict:
    """Better below 0 and worse above it, where the p-value is below the level."""
    if p_value is None or p_value >= level:
        return "no detectable difference"
    return "better" if difference < 0 else "worse"
