"""Changes between two stored reports, with intervals and verdicts adjusted for the number of metrics."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import Literal

import pandas as pd

from debiased_laplace.calibration.comparisons import paired_spread
from debiased_laplace.calibration.contents import PAIRED_AS, Better, Estimate, MethodResult, ReportContents
from debiased_laplace.calibration.findings import describe_worse_than_constant
from debiased_laplace.calibration.formatting import (
    choose_decimals,
    format_level,
    format_number,
    format_p_value,
    format_with_interval,
    half_width,
)
from debiased_laplace.calibration.intervals import (
    adjust_by_holm,
    find_holm_levels,
    student_quantile,
    two_sided_p_value,
)
from debiased_laplace.calibration.tables import make_environment, make_table
from debiased_laplace.calibration.ties import THRESHOLD

ChangeVerdict = Literal["better", "worse", "no detectable change", "changed", "unchanged", "not judged"]
Pairing = Literal["same samples", "as if independent", "independent"]

TARGETS = {"zero": 0.0, "one": 1.0}
DETECTED: tuple[ChangeVerdict, ...] = ("worse", "better", "changed")


@dataclass(frozen=True)
class Change:
    """A metric of one method in two reports, and the difference new minus old with its interval.

    Attributes:
        pairing: "same samples": paired by batches of the same test set. "as if independent": the same test set without
            sums to pair by, so the interval is too wide where the same samples are hard for both. "independent": two
            test sets.
        p_value: two-sided, of no difference, for this change alone; None where it is not judged.
        adjusted_p_value: Holm's adjustment over all changes that are judged.
        verdict: "changed" is a detectable change across the target of a metric.
        note: why it is not judged.
        adjusted_low: of the interval at the level of Holm's procedure, which excludes 0 exactly where a change is
            detected; None where the change is not judged.
        adjusted_high: its other end.
    """

    method: str
    metric: str
    old: float | None
    new: float | None
    pairing: Pairing
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    adjusted_p_value: float | None = None
    verdict: ChangeVerdict = "not judged"
    note: str = ""
    adjusted_low: float | None = None
    adjusted_high: float | None = None


def independent_widths(old: Estimate, new: Estimate) -> tuple[float, float]:
    """Return the widths of the interval below and above the difference new - old of two independent estimates.

    References:
        Zou and Donner (2008), doi:10.1002/sim.3095 (intervals of differences from two intervals).
    """
    ends = (old.value, old.low, old.high, new.value, new.low, new.high)
    a, a_low, a_high, b, b_low, b_high = (x or 0.0 for x in ends)  # the caller sorted None out
    return hypot(b - b_low, a_high - a), hypot(b_high - b, a - a_low)


def compare_reports(old: ReportContents, new: ReportContents) -> tuple[Change, ...]:
    """Compare every metric of every method that both reports have.

    The test set is the same if the targets are, in the same order. Metrics that are means over samples of the same test
    set are paired by the sums that reports keep; all others are compared as independent estimates.

    Raises:
        ValueError: for reports of different tasks or confidence levels, or without a method in common.
    """
    if old.task != new.task:
        raise ValueError(f"Both reports must be of one task; got {old.task!r} and {new.task!r}.")
    level = new.confidence_level
    if old.confidence_level != level:
        raise ValueError(f"Both reports must have one confidence level; got {old.confidence_level} and {level}.")
    common = [method for method in new.methods if method in old.methods]
    if not common:
        raise ValueError(f"The reports have no method in common: {list(old.methods)} and {list(new.methods)}.")
    same = is_same_test_set(old, new)
    measured = [
        _compare(method, metric, (old.methods[method], new.methods[method]), same, level)
        for method in common
        for metric in new.definitions
        if metric in old.methods[method].metrics and metric in new.methods[method].metrics
    ]
    better = {name: definition.better for name, definition in new.definitions.items()}
    p_values = [None if better[c.metric] in ("none", "level") else c.p_value for c, _ in measured]
    adjusted = zip(adjust_by_holm(p_values), find_holm_levels(p_values, level), strict=True)
    judged = []
    for (c, freedom), (p, own) in zip(measured, adjusted, strict=True):
        change = _judge(c, p, better[c.metric], 1 - level)
        if own is not None and c.difference is not None and c.low is not None and c.high is not None:
            wider = student_quantile(own, freedom) / student_quantile(level, freedom)
            low, high = (c.difference + wider * (end - c.difference) for end in (c.low, c.high))
            change = replace(change, adjusted_low=low, adjusted_high=high)
        judged.append(change)
    return tuple(judged)


def is_same_test_set(old: ReportContents, new: ReportContents) -> bool:
    """Return whether two reports have the same targets in the same order."""
    return old.data.targets_sha256 == new.data.targets_sha256 and old.data.n == new.data.n


def render_changes(changes: Sequence[Change], old: ReportContents, new: ReportContents) -> str:
    """Return the changes in Markdown: the verdict, what changed detectably, and the rest behind a fold."""
    detected = [c for verdict in DETECTED for c in changes if c.verdict == verdict]
    counts = Counter(c.verdict for c in detected)
    return (
        make_environment(autoescape=False)
        .get_template("changes.md.j2")
        .render(
            old=old,
            new=new,
            verdict=", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
            n_judged=sum(c.adjusted_p_value is not None for c in changes),
            useless=[f"{m} ({words})" for m in new.methods if (words := describe_worse_than_constant(new, m))],
            is_same=is_same_test_set(old, new),
            is_paired=any(c.pairing == "same samples" for c in changes),
            level=format_level(new.confidence_level),
            only={
                "old": [m for m in old.methods if m not in new.methods],
                "new": [m for m in new.methods if m not in old.methods],
            },
            detected=_tabulate(detected, new),
            rest=_tabulate([c for c in changes if c.verdict not in DETECTED], new),
        )
    )


def _compare(
    method: str, metric: str, results: tuple[MethodResult, MethodResult], same: bool, level: float
) -> tuple[Change, int | None]:
    """Return the change without a verdict, and the degrees of freedom of its interval."""
    before, after = (result.metrics[metric] for result in results)
    change = Change(method, metric, before.value, after.value, "as if independent" if same else "independent")
    if before.value is None or after.value is None:
        return replace(change, note=(after.reason if after.value is None else before.reason) or ""), None
    difference = after.value - before.value
    if abs(difference) <= THRESHOLD * max(abs(before.value), abs(after.value)):
        difference = 0.0
    change = replace(change, difference=difference)
    old_sums, new_sums = (result.score_sums for result in results)
    spread = paired_spread(old_sums, new_sums, PAIRED_AS.get(metric, metric)) if same else None
    if spread is not None:
        error, freedom = spread
        below = above = student_quantile(level, freedom) * error
        change = replace(change, pairing="same samples")
    elif before.low is None or after.low is None:
        return replace(change, note=f"no interval: {after.reason if after.low is None else before.reason}"), None
    else:
        (below, above), freedom = independent_widths(before, after), None
    toward_zero = below if difference > 0 else above
    # 1 minus the level at which the interval would end at zero
    p_value = two_sided_p_value(difference, toward_zero / student_quantile(level, freedom), freedom)
    return replace(change, low=difference - below, high=difference + above, p_value=p_value), freedom


def _judge(change: Change, adjusted: float | None, better: Better, level: float) -> Change:
    """The change with its verdict; a metric without a good direction is not judged."""
    if better in ("none", "level"):
        change = replace(change, p_value=None, note=change.note or "no good direction")
    old, new, target = change.old or 0.0, change.new or 0.0, TARGETS.get(better)
    gain = new - old if better == "higher" else old - new
    if target is not None:  # closer to the target is better; a step across it is neither
        gain = 0.0 if (old - target) * (new - target) < 0 else abs(old - target) - abs(new - target)
    verdict: ChangeVerdict = "changed" if gain == 0 else "better" if gain > 0 else "worse"
    if change.difference == 0:
        verdict = "unchanged"
    elif adjusted is None or adjusted >= level:
        verdict = "not judged" if adjusted is None else "no detectable change"
    return replace(change, adjusted_p_value=adjusted, verdict=verdict)


def _tabulate(changes: Sequence[Change], new: ReportContents) -> pd.DataFrame:
    rows = []
    for c in changes:
        decimals = choose_decimals([half_width(c.low, c.high)])
        old_and_new = (format_number(x, decimals) for x in (c.old, c.new))
        ends = (c.low, c.high) if c.adjusted_p_value is None else (c.adjusted_low, c.adjusted_high)
        difference = format_with_interval(c.difference, *ends, signed=True)
        verdict = f"{c.verdict} ({c.note})" if c.note else c.verdict
        label, p = new.definitions[c.metric].label, format_p_value(c.adjusted_p_value)
        rows.append([c.method, label, *old_and_new, difference, p, verdict])
    return make_table(["method", "metric", "old", "new", "new − old", "Holm-adjusted p", "verdict"], rows)
