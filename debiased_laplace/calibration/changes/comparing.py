"""Two reports, metric by metric: differences with intervals, and verdicts that allow for their number."""

from dataclasses import replace
from math import hypot

from debiased_laplace.calibration.changes.batches import paired_spread
from debiased_laplace.calibration.changes.change import Change, Changes, ChangeVerdict, Pairing
from debiased_laplace.calibration.comparisons import adjust_by_holm
from debiased_laplace.calibration.contents import MethodResult, ReportContents
from debiased_laplace.calibration.estimates import Estimate, student_quantile
from debiased_laplace.calibration.gates.measured import PAIRED_AS
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.metrics.metric_definition import Better
from debiased_laplace.calibration.skewness import two_sided_p_value

TARGETS = {"zero": 0.0, "one": 1.0}


def compare_reports(old: ReportContents, new: ReportContents) -> Changes:
    """What changed for every method and metric that both reports have.

    On the same test set (the digests of the targets agree) metrics that are means over samples are compared in pairs,
    by the sums that reports keep. All others, and those of different test sets, have the interval of two independent
    estimates, which uses the ends of both intervals.

    Raises:
        ValueError: for reports of different tasks or confidence levels, or without a method in common.

    References:
        Zou and Donner (2008), doi:10.1002/sim.3095 (intervals of differences from two intervals).
    """
    if old.task != new.task:
        raise ValueError(f"Both reports must be of one task; got {old.task!r} and {new.task!r}.")
    level, other = (float(report.settings["confidence_level"]) for report in (old, new))
    if level != other:
        raise ValueError(f"Both reports must have one confidence level; got {level} and {other}.")
    common = [method for method in new.methods if method in old.methods]
    if not common:
        raise ValueError(f"The reports have no method in common: {list(old.methods)} and {list(new.methods)}.")
    same = old.data.targets_sha256 == new.data.targets_sha256 and old.data.n == new.data.n
    definitions = define_metrics(new.task)
    raw = [
        _compare(method, metric, (old.methods[method], new.methods[method]), same, level)
        for method in common
        for metric in definitions
        if metric in old.methods[method].metrics and metric in new.methods[method].metrics
    ]
    judged = [_refuse(change, definitions[change.metric].better) for change in raw]
    adjusted = adjust_by_holm([change.p_value for change in judged])
    changes = tuple(
        _judge(replace(change, adjusted_p_value=p), definitions[change.metric].better, level=1 - level)
        for change, p in zip(judged, adjusted, strict=True)
    )
    return Changes(
        changes,
        same,
        level,
        tuple(m for m in old.methods if m not in new.methods),
        tuple(m for m in new.methods if m not in old.methods),
    )


def _compare(method: str, metric: str, results: tuple[MethodResult, MethodResult], same: bool, level: float) -> Change:
    before, after = (result.metrics[metric] for result in results)
    pairing: Pairing = "as if independent" if same else "independent"
    change = Change(method, metric, before.value, after.value, None, None, None, None, None, pairing, "not judged")
    if before.value is None or after.value is None:
        return replace(change, note=(after.reason if after.value is None else before.reason) or "")
    difference = after.value - before.value
    change = replace(change, difference=difference)
    score = PAIRED_AS.get(metric, (metric, 1.0))[0]
    spread = paired_spread(results[0].score_sums, results[1].score_sums, score) if same else None
    if spread is not None:
        freedom = spread.degrees_of_freedom
        half_width = student_quantile(level, freedom) * spread.standard_error
        return _with_interval(replace(change, pairing="same samples"), half_width, half_width, freedom, level)
    if before.low is None or after.low is None:
        return replace(change, note=f"no interval: {after.reason if after.low is None else before.reason}")
    return _with_interval(change, *_independent_widths(before, after), None, level)


def _independent_widths(before: Estimate, after: Estimate) -> tuple[float, float]:
    """Below and above the difference, from what both intervals have on the sides that matter."""
    ends = (before.value, before.low, before.high, after.value, after.low, after.high)
    old, old_low, old_high, new, new_low, new_high = (x or 0.0 for x in ends)  # None was sorted out
    return hypot(new - new_low, old_high - old), hypot(new_high - new, old - old_low)


def _with_interval(change: Change, below: float, above: float, freedom: int | None, level: float) -> Change:
    """The change with its interval, and the p-value of the level at which that would end at zero."""
    difference = change.difference or 0.0
    toward_zero = below if difference > 0 else above
    if difference == 0:
        p_value = 1.0
    elif toward_zero == 0:
        p_value = 0.0
    else:
        p_value = two_sided_p_value(difference / toward_zero * student_quantile(level, freedom), freedom)
    return replace(change, low=difference - below, high=difference + above, p_value=p_value)


def _refuse(change: Change, better: Better) -> Change:
    """Metrics without a good direction are shown, and count as no test."""
    if better in ("none", "level"):
        return replace(change, p_value=None, note=change.note or "no good direction")
    return change


def _judge(change: Change, better: Better, *, level: float) -> Change:
    p = change.adjusted_p_value
    if change.difference == 0:
        verdict: ChangeVerdict = "unchanged"
    elif p is None:
        verdict = "not judged"
    elif p >= level:
        verdict = "no detectable change"
    else:
        verdict = _direct(change, better)
    return replace(change, verdict=verdict)


def _direct(change: Change, better: Better) -> ChangeVerdict:
    old, new = change.old or 0.0, change.new or 0.0
    if better in TARGETS:  # closer to the target is better; a step across it is neither
        target = TARGETS[better]
        if (old - target) * (new - target) < 0:
            return "changed"
        gain = abs(old - target) - abs(new - target)
    else:
        gain = new - old if better == "higher" else old - new
    return "better" if gain > 0 else "worse"
