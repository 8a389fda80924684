"""Out-of-distribution detection: how well each score of each method tells a set from the test set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.comparisons import Verdict, adjust_by_holm, judge_difference
from debiased_laplace.calibration.estimates import Estimate, student_quantile
from debiased_laplace.calibration.metrics.detection import (
    Separation,
    difference_of_aurocs,
    estimate_aupr,
    estimate_auroc,
    estimate_fpr95,
)
from debiased_laplace.calibration.skewness import two_sided_p_value

SCORES: dict[str, str] = {
    "conformal": "conformal (mutual information, logit variance)",
    "mutual_information": "mutual information",
    "logit_variance": "logit variance",
    "entropy": "predictive entropy",
    "max_probability": "1 \u2212 maximum probability",
    "standard_deviation": "predicted standard deviation",
}
"""Scores in the order of a report; a network alone has the last two of classification."""
STAND_IN = "entropy"  # used for a baseline that lacks the method's score
COMBINED = ("mutual_information", "logit_variance")  # uncertain label, uncertain function: OOD inputs show at least one
UNITS: dict[str, str] = {"entropy": "nats", "mutual_information": "nats"}
HISTOGRAM_BINS = 20
CHANCE = 0.5


@dataclass(frozen=True)
class ScoreBin:
    """Samples with a score in [left, right), the last bin closed.

    Attributes:
        left: lower edge.
        right: upper edge.
        n_inside: samples of the test set.
        n_outside: samples out of distribution.
    """

    left: float
    right: float
    n_inside: int
    n_outside: int


@dataclass(frozen=True)
class Detection:
    """How one score of one method tells a set from the test set.

    Attributes:
        method: whose score it is.
        score: name of the score.
        metrics: `auroc`, `aupr` and `fpr95`, out of distribution being the positive class.
        histogram: of the score; the methods of a set share its edges.
    """

    method: str
    score: str
    metrics: Mapping[str, Estimate]
    histogram: tuple[ScoreBin, ...]


@dataclass(frozen=True)
class DetectionComparison:
    """A method's AUROC minus the baseline's on the same samples; higher is better.

    Attributes:
        method: the method that is judged.
        baseline: the method it is compared with.
        score: name of the score.
        difference: of the two AUROCs.
        low: lower end of its interval, None with one sample.
        high: upper end.
        standard_error: of the difference.
        p_value: two-sided, of no difference, for this comparison alone.
        adjusted_p_value: Holm's adjustment over all such comparisons of the report.
        verdict: from the adjusted p-value and the sign.
        baseline_score: the baseline's score: the same one, or entropy where the baseline does not have it.
        below_chance: whether the method's AUROC is below 0.5, so that "better" still means worse than chance.
    """

    method: str
    baseline: str
    score: str
    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    p_value: float | None
    adjusted_p_value: float | None
    verdict: Verdict
    baseline_score: str = ""
    below_chance: bool = False


@dataclass(frozen=True)
class OutOfDistributionSet:
    """One set against the test set.

    Attributes:
        n: samples of the set.
        detections: of every method and score.
        comparisons: of every other method with the baseline.
    """

    n: int
    detections: tuple[Detection, ...]
    comparisons: tuple[DetectionComparison, ...] = ()

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, Estimate]]]:
        """Method to score to metric to estimate."""
        nested: dict[str, dict[str, dict[str, Estimate]]] = {}
        for d in self.detections:
            nested.setdefault(d.method, {})[d.score] = dict(d.metrics)
        return nested


def combine_scores(
    pairs: Sequence[tuple[Float[Tensor, " n"], Float[Tensor, " m"]]],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """One less the smallest conformal p-value of several scores: large where any of them is unusual for the test set.

    Samples of both sets are ranked among those of the test set, equal values counting half. Intervals of what is
    measured by this score take the ranks as given.

    Args:
        pairs: values of each score on the test set, and out of distribution; larger ones are more unusual.

    References:
        Bates, Candès, Lei, Romano & Sesia (2023), arXiv 2104.08279 (conformal p-values for outliers).
    """
    found = []
    for inside, outside in pairs:
        ordered = inside.sort().values
        both = torch.cat([inside, outside])
        below, up_to = (torch.searchsorted(ordered, both, right=right).double() for right in (False, True))
        found.append((below + up_to) / (2 * len(inside)))
    largest = torch.stack(found).amax(0)
    return largest[: len(inside)], largest[len(inside) :]


def measure_set(
    separations: Mapping[str, Mapping[str, Separation]], baseline: str, *, confidence_level: float
) -> OutOfDistributionSet:
    """Metrics, histograms and comparisons of one set; p-values are not adjusted yet.

    Args:
        separations: method to score to the two sets' scores.
        baseline: the method that the others are compared with.
        confidence_level: of the intervals.
    """
    edges = {
        score: _choose_edges([scores[score] for scores in separations.values() if score in scores])
        for score in dict.fromkeys(score for scores in separations.values() for score in scores)
    }
    detections = tuple(
        Detection(
            method,
            score,
            {
                "auroc": estimate_auroc(s, confidence_level=confidence_level),
                "aupr": estimate_aupr(s, confidence_level=confidence_level),
                "fpr95": estimate_fpr95(s, confidence_level=confidence_level),
            },
            _count(s, edges[score]),
        )
        for method, scores in separations.items()
        for score, s in scores.items()
    )
    reference = separations[baseline]
    comparisons = tuple(
        _compare(s, reference, (method, baseline, score), confidence_level)
        for method, scores in separations.items()
        if method != baseline
        for score, s in scores.items()
        if score in reference or STAND_IN in reference
    )
    return OutOfDistributionSet(next(iter(separations[baseline].values())).outside.n, detections, comparisons)


def adjust_sets(
    sets: Mapping[str, OutOfDistributionSet], *, confidence_level: float
) -> dict[str, OutOfDistributionSet]:
    """The same sets with verdicts, after Holm's adjustment over all of their comparisons."""
    adjusted = iter(adjust_by_holm([c.p_value for s in sets.values() for c in s.comparisons]))

    def judge(c: DetectionComparison) -> DetectionComparison:
        p = next(adjusted)
        # a larger area is better, where a judged score is better if it is smaller
        return replace(c, adjusted_p_value=p, verdict=judge_difference(-c.difference, p, level=1 - confidence_level))

    return {name: replace(one, comparisons=tuple(judge(c) for c in one.comparisons)) for name, one in sets.items()}


def _compare(
    one: Separation, reference: Mapping[str, Separation], names: tuple[str, str, str], confidence_level: float
) -> DetectionComparison:
    score = names[2] if names[2] in reference else STAND_IN
    difference, error = difference_of_aurocs(one, reference[score])
    known = (score, float(one.components[0].mean()) < CHANCE)
    nothing: Verdict = "no detectable difference"
    if error is None:
        return DetectionComparison(*names, difference, None, None, None, None, None, nothing, *known)
    freedom = one.degrees_of_freedom
    half = student_quantile(confidence_level, freedom) * error
    p_value = 1.0
    if difference != 0:
        p_value = two_sided_p_value(difference / error, freedom) if error > 0 else 0.0
    return DetectionComparison(
        *names,
        difference,
        max(-1.0, difference - half),
        min(1.0, difference + half),
        error,
        p_value,
        None,
        nothing,
        *known,
    )


def _choose_edges(separations: list[Separation]) -> Float[Tensor, " edges"]:
    """Bins of equal width over the range of all methods."""
    scores = [x.scores for s in separations for x in (s.inside, s.outside)]
    low, high = min(x.min().item() for x in scores), max(x.max().item() for x in scores)
    if high <= low:
        margin = max(1e-6, 1e-6 * abs(low))
        low, high = low - margin, high + margin
    return torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64)


def _count(separation: Separation, edges: Float[Tensor, " edges"]) -> tuple[ScoreBin, ...]:
    inside, outside = (
        torch.bincount(torch.bucketize(x.scores, edges[1:-1], right=True), minlength=HISTOGRAM_BINS).tolist()
        for x in (separation.inside, separation.outside)
    )
    ends = edges.tolist()
    return tuple(ScoreBin(*bin_) for bin_ in zip(ends[:-1], ends[1:], inside, outside, strict=True))
