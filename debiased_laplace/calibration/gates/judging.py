"""A report judged by thresholds."""

from collections.abc import Sequence
from dataclasses import replace

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.gates.measured import (
    Measured,
    measure_change,
    measure_relative_change,
    measure_value,
)
from debiased_laplace.calibration.gates.outcomes import Quantity, Status, ThresholdOutcome
from debiased_laplace.calibration.gates.thresholds import CHANGES, LIMITS, RELATIVE_CHANGES, Threshold
from debiased_laplace.calibration.rendering.formatting import choose_decimals, format_interval, format_number

QUANTITIES: tuple[tuple[Quantity, tuple[str, str]], ...] = (
    ("value", LIMITS),
    ("change", CHANGES),
    ("relative change", RELATIVE_CHANGES),
)


def judge_report(contents: ReportContents, thresholds: Sequence[Threshold]) -> tuple[ThresholdOutcome, ...]:
    """Outcomes of all thresholds, in their order; a threshold without a method has one for every method.

    Judged on bounds, a limit is kept where the whole confidence interval keeps it, broken where the whole interval
    breaks it, and inconclusive between, without an interval, or with fewer samples than asked for. Since one end of a
    two-sided interval of level L is missed with probability (1 - L) / 2, a threshold is passed by mistake no more often
    than that.

    Raises:
        ValueError: for a metric or method that the report does not have; the message names those that it has.
    """
    outcomes = []
    for i, threshold in enumerate(thresholds, 1):
        for quantity, names in QUANTITIES:
            minimum, maximum = (getattr(threshold, name) for name in names)
            if minimum is None and maximum is None:
                continue
            reference = None if quantity == "value" else threshold.relative_to or contents.baseline
            for method in _find_methods(contents, threshold, reference, f"threshold {i}"):
                measured = _measure(contents, quantity, threshold.metric, method, reference)
                outcomes.append(_judge(threshold, method, reference, quantity, measured, (minimum, maximum)))
    return tuple(outcomes)


def _find_methods(contents: ReportContents, threshold: Threshold, reference: str | None, where: str) -> list[str]:
    having = [name for name, metrics in contents.metrics.items() if threshold.metric in metrics]
    if not having:
        known = dict.fromkeys(metric for metrics in contents.metrics.values() for metric in metrics)
        raise ValueError(f"{where}: no metric {threshold.metric!r} in this report; it has {', '.join(known)}.")
    for name in (threshold.method, reference):
        if name is not None and name not in having:
            lack = "has no such method" if name not in contents.methods else f"has no {threshold.metric} of it"
            there = ", ".join(map(repr, having))
            raise ValueError(f"{where}: {name!r} was asked for, but the report {lack}; it has {there}.")
    if threshold.method is not None:
        if threshold.method == reference:
            raise ValueError(f"{where}: {reference!r} cannot be compared with itself; name another relative_to.")
        return [threshold.method]
    made = contents.scaling.method if contents.scaling is not None else None  # the report's own row is no candidate
    methods = [name for name in having if name not in (reference, made)]
    if not methods:
        raise ValueError(f"{where}: the report has no method beside {reference!r} to compare with it.")
    return methods


def _measure(contents: ReportContents, quantity: Quantity, metric: str, method: str, reference: str | None) -> Measured:
    if reference is None:
        return measure_value(contents.metrics[method][metric])
    measure = measure_change if quantity == "change" else measure_relative_change
    return measure(contents, metric, method, reference)


def _judge(
    threshold: Threshold,
    method: str,
    reference: str | None,
    quantity: Quantity,
    measured: Measured,
    limits: tuple[float | None, float | None],
) -> ThresholdOutcome:
    status, why = _decide(threshold, measured, limits)
    minimum, maximum = limits
    outcome = ThresholdOutcome(
        metric=threshold.metric,
        method=method,
        quantity=quantity,
        relative_to=reference,
        status=status,
        value=measured.value,
        low=measured.low,
        high=measured.high,
        minimum=minimum,
        maximum=maximum,
        judge=threshold.judge,
        n=measured.n,
        min_samples=threshold.min_samples,
        message="",
    )
    return _with_message(outcome, measured, why)


def _decide(threshold: Threshold, measured: Measured, limits: tuple[float | None, float | None]) -> tuple[Status, str]:
    """The status, and the reason for an inconclusive one."""
    minimum, maximum = limits
    if measured.n < threshold.min_samples:
        return "inconclusive", f"{measured.n} test samples are fewer than the {threshold.min_samples} asked for"
    if measured.value is None:
        return "inconclusive", f"there is no value: {measured.reason}"
    low = high = measured.value
    if threshold.judge == "bound":
        if measured.low is None or measured.high is None:
            advice = "judge = 'estimate' would look at the value alone"
            return "inconclusive", f"there is no interval ({measured.reason}); {advice}"
        low, high = measured.low, measured.high
    if (maximum is None or high <= maximum) and (minimum is None or low >= minimum):
        return "passed", ""
    if (maximum is not None and low > maximum) or (minimum is not None and high < minimum):
        return "failed", ""
    return "inconclusive", "the interval lies across a limit, so it takes more samples to decide"


def _with_message(outcome: ThresholdOutcome, measured: Measured, why: str) -> ThresholdOutcome:
    half_width = None if outcome.low is None or outcome.high is None else (outcome.high - outcome.low) / 2
    decimals = choose_decimals([half_width and half_width / 10])  # a digit more, since ends may lie near limits
    shown = f"{format_number(outcome.value, decimals)} {format_interval(outcome.low, outcome.high, decimals)}".rstrip()
    allowed = [
        f"at {side} {_show_limit(limit)}"
        for side, limit in (("least", outcome.minimum), ("most", outcome.maximum))
        if limit is not None
    ]
    what = "its bound" if outcome.judge == "bound" else "its estimate"
    message = f"{outcome.title} is {shown}; {what} must be {' and '.join(allowed)}"
    basis = f" ({measured.how})" if measured.how and outcome.judge == "bound" else ""
    reason = f": {why}" if why else ""
    return replace(outcome, message=f"{message}{basis}. {outcome.status.capitalize()}{reason}.")


def _show_limit(limit: float) -> str:
    return f"{limit:g}".replace("-", "\u2212")
