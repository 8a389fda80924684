"""Thresholds on the metrics of a report, judged on confidence bounds, and their outcomes."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from debiased_laplace.calibration.contents import (
    PAIRED_AS,
    Criterion,
    Estimate,
    Quantity,
    ReportContents,
    Status,
    ThresholdOutcome,
)
from debiased_laplace.calibration.document import message_of
from debiased_laplace.calibration.findings import is_worse_than_constant
from debiased_laplace.calibration.formatting import MINUS, choose_decimals, format_with_interval, half_width
from debiased_laplace.calibration.inputs import parse_toml
from debiased_laplace.calibration.ties import THRESHOLD

LIMITS: dict[Quantity, tuple[str, str]] = {
    "value": ("min", "max"),
    "change": ("min_change", "max_change"),
    "relative change": ("min_relative_change", "max_relative_change"),
}
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Threshold(BaseModel):
    """Limits that a metric must keep.

    Attributes:
        metric: name of the metric.
        method: name of the method; None for all of them, in changes all but the one that they are compared with.
        min: smallest value allowed.
        max: largest value allowed.
        relative_to: method that changes are compared with; None for the report's baseline.
        min_change: smallest difference to that method allowed, in the unit of the metric.
        max_change: largest difference allowed.
        min_relative_change: smallest difference allowed, as a share of the other method's value.
        max_relative_change: largest such share.
        judge: "bound": the end of the confidence interval must keep the limit; "estimate": the value alone.
        min_samples: with fewer test samples the outcome is inconclusive.

    Raises:
        ValueError: for no limit, limits that exclude each other, or a reference without a change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    metric: str
    method: str | None = None
    min: float | None = None
    max: float | None = None
    relative_to: str | None = None
    min_change: float | None = None
    max_change: float | None = None
    min_relative_change: float | None = None
    max_relative_change: float | None = None
    judge: Criterion = "bound"
    min_samples: int = Field(default=0, ge=0, le=2**53)  # any JSON reader has integers up to here

    @property
    def limits(self) -> dict[Quantity, tuple[float | None, float | None]]:
        """The smallest and the largest value allowed of each quantity that has a limit."""
        pairs = {quantity: (getattr(self, low), getattr(self, high)) for quantity, (low, high) in LIMITS.items()}
        return {quantity: pair for quantity, pair in pairs.items() if pair != (None, None)}

    @model_validator(mode="after")
    def _check_limits(self) -> "Threshold":
        if not self.limits:
            raise ValueError(f"a threshold needs one of {', '.join(sum(LIMITS.values(), ()))}; got none")
        for quantity, (minimum, maximum) in self.limits.items():
            if minimum is not None and maximum is not None and minimum > maximum:
                low, high = LIMITS[quantity]
                raise ValueError(f"{low} must not be above {high}; got {minimum:g} and {maximum:g}")
        if self.relative_to is not None and list(self.limits) == ["value"]:
            changes = ", ".join((*LIMITS["change"], *LIMITS["relative change"]))
            raise ValueError(f"relative_to needs one of {changes}; got none")
        return self


DEFAULT = "default"
DEFAULT_THRESHOLDS = (Threshold(metric="nll", max_change=0.0), Threshold(metric="accuracy", min_change=-0.005))
"""No method may lose likelihood against the baseline, nor more than half a point of accuracy (classification only)."""

ThresholdSource = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]


class _ThresholdFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    threshold: tuple[Threshold, ...] = Field(min_length=1)


@dataclass(frozen=True)
class CheckResult:
    """The outcomes of all thresholds, one per threshold, quantity and method."""

    outcomes: tuple[ThresholdOutcome, ...]

    @property
    def status(self) -> Status:
        """Failed if any threshold failed, else inconclusive if any was, else passed."""
        found = {outcome.status for outcome in self.outcomes}
        return "failed" if "failed" in found else "inconclusive" if "inconclusive" in found else "passed"

    @property
    def passed(self) -> bool:
        """Whether every threshold passed; an inconclusive one has not."""
        return self.status == "passed"

    def __repr__(self) -> str:
        counts = Counter(outcome.status for outcome in self.outcomes)
        words = ", ".join(f"{counts[s]} {s}" for s in ("passed", "failed", "inconclusive") if counts[s])
        return f"CheckResult({self.status}: {words})"

    def __str__(self) -> str:
        return "\n".join(f"{outcome.status:<12} {outcome.message}" for outcome in self.outcomes)

    def to_junit(self, *, strict: bool = False, name: str = "calibration") -> str:
        """Return the outcomes as JUnit XML: failures as such, inconclusive ones as skipped.

        Args:
            strict: inconclusive ones are failures too.
            name: of the test suite.
        """
        tags = {"failed": "failure", "inconclusive": "failure" if strict else "skipped", "passed": "system-out"}
        found = [tags[outcome.status] for outcome in self.outcomes]
        totals = {
            "tests": len(found),
            "failures": found.count("failure"),
            "skipped": found.count("skipped"),
            "errors": 0,
        }
        suites = ElementTree.Element("testsuites")
        suite = ElementTree.SubElement(suites, "testsuite", {"name": name} | {k: str(v) for k, v in totals.items()})
        for o, tag in zip(self.outcomes, found, strict=True):
            case = ElementTree.SubElement(suite, "testcase", {"classname": f"{name}.{o.metric}", "name": o.title})
            kind = {"failure": {"message": o.message, "type": o.status}, "skipped": {"message": o.message}}
            ElementTree.SubElement(case, tag, kind.get(tag, {})).text = None if tag == "skipped" else o.message
        ElementTree.indent(suites)
        text = _NO_XML.sub("\ufffd", ElementTree.tostring(suites, encoding="unicode"))
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def read_thresholds(source: ThresholdSource, task: str) -> tuple[Threshold, ...]:
    """Read thresholds from a TOML file or from what it would hold, or return the default ones.

    Args:
        source: path of a TOML file with tables `[[threshold]]`; or a mapping with "threshold", a sequence of mappings;
            or a sequence of mappings or `Threshold`; or "default".
        task: of the report; regression has no accuracy among the default ones.

    Raises:
        ValueError: for unknown keys, wrong values or no threshold; the message names the threshold and what there is.
        OSError: if there is no such file.
    """
    if isinstance(source, str) and source == DEFAULT:
        return DEFAULT_THRESHOLDS[:1] if task == "regression" else DEFAULT_THRESHOLDS
    where = "thresholds"
    try:
        if isinstance(source, (str, os.PathLike)):
            where = str(source)
            source = parse_toml(Path(source).read_text(encoding="utf-8-sig"))
        document = dict(source) if isinstance(source, Mapping) else {"threshold": source}
        return _ThresholdFile.model_validate(document).threshold
    except ValidationError as error:
        first = max(error.errors(), key=lambda e: e["type"] == "extra_forbidden")  # a typo explains the rest
        raise ValueError(f"{where}{_explain(first)}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no TOML: {error}") from error


def check_report(contents: ReportContents, thresholds: Sequence[Threshold]) -> CheckResult:
    """Judge a report by thresholds, in their order; a threshold without a method has an outcome for every method.

    Judged on bounds, a limit is kept where the whole confidence interval keeps it, broken where the whole interval
    breaks it, and inconclusive between, without an interval, or with fewer samples than asked for. Since one end of a
    two-sided interval of level L is missed with probability (1 - L) / 2, a threshold is passed by mistake no more often
    than that.

    Raises:
        ValueError: for a metric or method that the report does not have; the message names those that it has.
    """
    outcomes = (
        _judge(contents, threshold, quantity, method, reference)
        for i, threshold in enumerate(thresholds, 1)
        for quantity in threshold.limits
        for reference in [None if quantity == "value" else threshold.relative_to or contents.baseline]
        for method in _find_methods(contents, threshold, reference, f"threshold {i}")
    )
    return CheckResult(tuple(outcomes))


def measure_change(contents: ReportContents, metric: str, method: str, reference: str) -> Estimate:
    """Estimate a method's metric minus the reference's.

    The interval is that of the paired difference where the report has one. Otherwise it goes from each end of one
    interval to the other end of the other: the probability of missing an end is at most that of missing one of these
    two, whatever their dependence, so the interval is too wide rather than too narrow.
    """
    own, other = contents.methods[method].metrics[metric], contents.methods[reference].metrics[metric]
    n, name = min(own.n, other.n), PAIRED_AS.get(metric, metric)
    for c in contents.comparisons:
        if c.metric == name and {c.method, c.baseline} == {method, reference}:
            sign = (1 if c.method == method else -1) * (1 if name == metric else -1)
            if c.low is None or c.high is None:
                return Estimate(sign * c.difference, None, None, None, n, "", "the paired difference has none")
            low, high = sorted((sign * c.low, sign * c.high))
            return Estimate(sign * c.difference + 0.0, low, high, None, n, "paired difference")
    value = None if own.value is None or other.value is None else own.value - other.value
    if value is None or own.low is None or own.high is None or other.low is None or other.high is None:
        lacking = min((own, other), key=lambda e: (e.value is not None, e.low is not None))
        return Estimate(value, None, None, None, n, "", lacking.reason)
    how = "from the intervals of both methods, since the report has no paired difference of it"
    return Estimate(value, own.low - other.high, own.high - other.low, None, n, how)


def measure_relative_change(contents: ReportContents, metric: str, method: str, reference: str) -> Estimate:
    """Estimate that change as a share of the reference's value, by the worst end of the latter's interval."""
    change, other = measure_change(contents, metric, method, reference), contents.methods[reference].metrics[metric]
    if change.value is None or other.value is None:
        return change
    ends = [end for end in (other.low, other.value, other.high) if end is not None]
    value = change.value / abs(other.value) if other.value else None
    if min(ends) <= 0 <= max(ends):
        reason = f"the interval of {reference} contains 0, so the relative change is undefined"
        return Estimate(value, None, None, None, change.n, "", reason)
    if change.low is None or change.high is None:
        return replace(change, value=value)
    low, high = min(change.low / abs(end) for end in ends), max(change.high / abs(end) for end in ends)
    return replace(change, value=value, low=low, high=high)


def _find_methods(contents: ReportContents, threshold: Threshold, reference: str | None, where: str) -> list[str]:
    having = [name for name, metrics in contents.metrics.items() if threshold.metric in metrics]
    if not having:
        known = dict.fromkeys(metric for metrics in contents.metrics.values() for metric in metrics)
        found = f"no metric {threshold.metric!r} in this report; it has {', '.join(known)}"
        raise ValueError(f"{where}: expected a metric of the report; {found}.")
    for name in (threshold.method, reference):
        if name is not None and name not in having:
            there = ", ".join(map(repr, having))
            raise ValueError(f"{where}: the report has no {threshold.metric} of {name!r}; it has that of {there}.")
    if threshold.method is not None:
        if threshold.method == reference:
            raise ValueError(f"{where}: {reference!r} cannot be compared with itself; name another relative_to.")
        return [threshold.method]
    methods = [name for name in having if name not in (reference, *contents.references[1:])]  # not the report's own row
    if not methods:
        raise ValueError(f"{where}: the report has no method beside {reference!r} to compare with it.")
    return methods


def _judge(
    contents: ReportContents, threshold: Threshold, quantity: Quantity, method: str, reference: str | None
) -> ThresholdOutcome:
    if quantity == "value" or reference is None:
        measured = contents.methods[method].metrics[threshold.metric]
    else:
        measure = measure_change if quantity == "change" else measure_relative_change
        measured = measure(contents, threshold.metric, method, reference)
    minimum, maximum = threshold.limits[quantity]
    status, why = _decide(threshold, measured, minimum, maximum)
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
    )
    width = half_width(measured.low, measured.high)
    decimals = choose_decimals([width and width / 10])  # a digit more, since ends may lie near limits
    found = format_with_interval(measured.value, measured.low, measured.high, decimals)
    limits = (("least", minimum), ("most", maximum))
    allowed = " and ".join(f"at {side} {limit:g}" for side, limit in limits if limit is not None).replace("-", MINUS)
    basis = f" ({measured.estimator})" if reference and measured.estimator and threshold.judge == "bound" else ""
    message = f"{outcome.title} is {found}; its {threshold.judge} must be {allowed}{basis}. {status.capitalize()}"
    if is_worse_than_constant(contents, method, threshold.metric):
        message = f"{message}, but worse than a constant prediction ({contents.constant[threshold.metric]:.4g})"
    return replace(outcome, message=f"{message}: {why}." if why else f"{message}.")


def _decide(
    threshold: Threshold, measured: Estimate, minimum: float | None, maximum: float | None
) -> tuple[Status, str]:
    """The status, and the reason for an inconclusive one."""
    if measured.n < threshold.min_samples:
        return "inconclusive", f"{measured.n} test samples are fewer than the {threshold.min_samples} asked for"
    if measured.value is None:
        return "inconclusive", f"there is no value: {measured.reason}"
    low, high = (measured.low, measured.high) if threshold.judge == "bound" else (measured.value, measured.value)
    if low is None or high is None:
        advice = "set judge = 'estimate' to judge the value alone"
        return "inconclusive", f"there is no interval ({measured.reason}); {advice}"
    rounding = THRESHOLD * max(abs(low), abs(high))
    if (maximum is None or high <= maximum + rounding) and (minimum is None or low >= minimum - rounding):
        return "passed", ""
    if (maximum is not None and low > maximum + rounding) or (minimum is not None and high < minimum - rounding):
        return "failed", ""
    return "inconclusive", "the interval contains the limit; more samples are needed"


def _shortened(value: object) -> str:
    # 400 digits are no message; beyond 4,300 Python refuses to print them
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain(error: Any) -> str:
    """One of pydantic's errors, with the number of the threshold and the key."""
    place, kind, words = error["loc"], error["type"], message_of(error)
    hint = "" if kind == "value_error" else f"; got {_shortened(error['input'])}"
    if kind in ("extra_forbidden", "missing"):
        words = "unknown key" if kind == "extra_forbidden" else "missing key"
        hint = f"; the keys are {', '.join(Threshold.model_fields)}"
    if len(place) == 1:
        return f", {place[0]!r}: {words}; expected at least one table [[threshold]] and no other key"
    where = ", ".join([f", threshold {place[1] + 1}", *map(repr, place[2:])])
    return f"{where}: {words}{hint}"
