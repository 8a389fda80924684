"""What changed between two stored reports, with intervals, and verdicts that allow for the number of metrics."""

from collections import Counter
from dataclasses import dataclass, replace
from math import hypot
from typing import Literal

from debiased_laplace.calibration.comparisons import paired_spread
from debiased_laplace.calibration.contents import PAIRED_AS, Better, Estimate, MethodResult, ReportContents
from debiased_laplace.calibration.formatting import (
    NOTHING,
    choose_decimals,
    format_level,
    format_number,
    format_p_value,
    format_with_interval,
    half_width,
)
from debiased_laplace.calibration.intervals import adjust_by_holm, student_quantile, two_sided_p_value
from debiased_laplace.calibration.tables import make_environment

ChangeVerdict = Literal["better", "worse", "no detectable change", "changed", "unchanged", "not judged"]
Pairing = Literal["same samples", "as if independent", "independent"]

ROUNDING = 1e-9  # relative differences up to it are those of two machines
TARGETS = {"zero": 0.0, "one": 1.0}
DETECTED: tuple[ChangeVerdict, ...] = ("worse", "better", "changed")


@dataclass(frozen=True)
class Change:
    """A metric of a method in two reports, and the difference new minus old with its interval.

    Attributes:
        pairing: how the interval was obtained. "same samples": paired by batches of the same test set. "as if
            independent": the same test set without sums to pair by, so the interval is too wide where the same samples
            are hard for both. "independent": two test sets.
        p_value: two-sided, of no difference, for this change alone; None where it is not judged.
        adjusted_p_value: Holm's adjustment over all changes that are judged.
        verdict: "changed" is a detectable change across the target of a metric.
        note: why it is not judged.
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


@dataclass(frozen=True)
class Changes:
    """What changed between two reports: every metric of every method that both have, and the other methods' names.

    The test set is the same if the targets are, in the same order; 1 minus `confidence_level` is the level of the
    verdicts.
    """

    changes: tuple[Change, ...]
    same_test_set: bool
    confidence_level: float
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """Those that got detectably worse."""
        return tuple(change for change in self.changes if change.verdict == "worse")


def independent_widths(old: Estimate, new: Estimate) -> tuple[float, float]:
    """Widths below and above the difference new minus old of two independent estimates, from both intervals.

    References:
        Zou and Donner (2008), doi:10.1002/sim.3095 (intervals of differences from two intervals).
    """
    ends = (old.value, old.low, old.high, new.value, new.low, new.high)
    a, a_low, a_high, b, b_low, b_high = (x or 0.0 for x in ends)  # the caller sorted None out
    return hypot(b - b_low, a_high - a), hypot(b_high - b, a - a_low)


def compare_reports(old: ReportContents, new: ReportContents) -> Changes:
    """Compare every method and metric that both reports have.

    On the same test set (the digests of the targets agree) metrics that are means over samples are compared in pairs,
    by the sums that reports keep. All others, and those of different test sets, have the interval of two independent
    estimates.

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
    same = old.data.targets_sha256 == new.data.targets_sha256 and old.data.n == new.data.n
    raw = [
        _compare(method, metric, (old.methods[method], new.methods[method]), same, level)
        for method in common
        for metric in new.definitions
        if metric in old.methods[method].metrics and metric in new.methods[method].metrics
    ]
    better = {name: definition.better for name, definition in new.definitions.items()}
    adjusted = adjust_by_holm([None if better[c.metric] in ("none", "level") else c.p_value for c in raw])
    changes = tuple(_judge(c, p, better[c.metric], 1 - level) for c, p in zip(raw, adjusted, strict=True))
    only_old, only_new = (tuple(m for m in one.methods if m not in common) for one in (old, new))
    return Changes(changes, same, level, only_old, only_new)


def render_changes(changes: Changes, old: ReportContents, new: ReportContents) -> str:
    """Return the changes in Markdown: the verdict, what changed detectably, and the rest behind a fold."""
    detected = [c for verdict in DETECTED for c in changes.changes if c.verdict == verdict]
    rest = [c for c in changes.changes if c not in detected]
    counts = Counter(c.verdict for c in detected)
    template = make_environment(autoescape=False).get_template("changes.md.j2")
    return template.render(
        changes=changes,
        old=old,
        new=new,
        verdict=", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
        n_judged=sum(c.adjusted_p_value is not None for c in changes.changes),
        is_paired=any(c.pairing == "same samples" for c in changes.changes),
        level=format_level(changes.confidence_level),
        detected=[_show(c, new.definitions[c.metric].label) for c in detected],
        rest=[_show(c, new.definitions[c.metric].label) for c in rest],
    )


def _compare(method: str, metric: str, results: tuple[MethodResult, MethodResult], same: bool, level: float) -> Change:
    before, after = (result.metrics[metric] for result in results)
    change = Change(method, metric, before.value, after.value, "as if independent" if same else "independent")
    if before.value is None or after.value is None:
        return replace(change, note=(after.reason if after.value is None else before.reason) or "")
    difference = after.value - before.value
    if abs(difference) <= ROUNDING * max(abs(before.value), abs(after.value)):
        difference = 0.0
    change = replace(change, difference=difference)
    score, sums = PAIRED_AS.get(metric, metric), [result.score_sums for result in results]
    spread = paired_spread(sums[0], sums[1], score) if same else None
    if spread is not None:
        error, freedom = spread
        below = above = student_quantile(level, freedom) * error
        change = replace(change, pairing="same samples")
    elif before.low is None or after.low is None:
        return replace(change, note=f"no interval: {after.reason if after.low is None else before.reason}")
    else:
        (below, above), freedom = independent_widths(before, after), None
    toward_zero = below if difference > 0 else above
    # 1 minus the level at which the interval would end at zero
    p_value = two_sided_p_value(difference, toward_zero / student_quantile(level, freedom), freedom)
    return replace(change, low=difference - below, high=difference + above, p_value=p_value)


def _judge(change: Change, adjusted: float | None, better: Better, level: float) -> Change:
    """The change with its verdict; metrics without a good direction are shown, and count as no test."""
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


def _show(c: Change, label: str) -> list[str]:
    """A row of the table."""
    decimals = choose_decimals([half_width(c.low, c.high)])
    difference = format_with_interval(c.difference, c.low, c.high, decimals, signed=True)
    p = NOTHING if c.adjusted_p_value is None else format_p_value(c.adjusted_p_value)
    verdict = f"{c.verdict} ({c.note})" if c.note else c.verdict
    return [c.method, label, *(format_number(x, decimals) for x in (c.old, c.new)), difference, p, verdict]
