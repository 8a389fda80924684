"""The quantities that thresholds speak about, with intervals, from a finished report."""

from dataclasses import dataclass

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.estimates import Estimate

PAIRED_AS = {"accuracy": ("error", -1.0)}
"""Metrics whose paired differences a report keeps under another name, and with which sign."""


@dataclass(frozen=True)
class Measured:
    """A quantity and its interval.

    Attributes:
        value: the estimate; None where there is none.
        low: lower end; None where there is no interval.
        high: upper end.
        n: test samples behind it.
        reason: why there is no interval; empty where there is one.
        how: what kind of interval it is, where that is not plain.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str = ""
    how: str = ""


def measure_value(estimate: Estimate) -> Measured:
    """A metric of one method."""
    return Measured(estimate.value, estimate.low, estimate.high, estimate.n, estimate.reason or "")


def measure_change(contents: ReportContents, metric: str, method: str, reference: str) -> Measured:
    """A method's metric minus the reference's.

    The interval is that of the paired difference where the report has one. Else it goes from each end of the one's
    interval to the other end of the other's: each of its ends is missed with no more probability than both of these
    together, whatever their dependence, so it is too wide rather than too narrow.
    """
    own, other = contents.metrics[method][metric], contents.metrics[reference][metric]
    n = min(own.n, other.n)
    paired = _find_paired(contents, metric, method, reference)
    if paired is not None:
        value, low, high = paired
        reason = "" if low is not None else "the paired difference has none"
        return Measured(value, low, high, n, reason, "paired difference")
    if own.value is None or other.value is None:
        return Measured(None, None, None, n, own.reason or other.reason or "")
    value = own.value - other.value
    if own.low is None or own.high is None or other.low is None or other.high is None:
        return Measured(value, None, None, n, (own.reason if own.low is None else other.reason) or "")
    how = "from the intervals of both methods, since the report has no paired difference of it"
    return Measured(value, own.low - other.high, own.high - other.low, n, "", how)


def measure_relative_change(contents: ReportContents, metric: str, method: str, reference: str) -> Measured:
    """That change as a share of the size of the reference's value, with the worst end of the latter's interval."""
    change, other = measure_change(contents, metric, method, reference), contents.metrics[reference][metric]
    if change.value is None or other.value is None:
        return change
    ends = [end for end in (other.low, other.value, other.high) if end is not None]
    if min(ends) <= 0 <= max(ends):
        reason = f"{reference} itself may be 0, and a share of that is no number"
        value = change.value / abs(other.value) if other.value else None
        return Measured(value, None, None, change.n, reason)
    sizes = [abs(end) for end in ends]
    value = change.value / abs(other.value)
    if change.low is None or change.high is None:
        return Measured(value, None, None, change.n, change.reason)
    low = min(change.low / size for size in sizes)
    high = max(change.high / size for size in sizes)
    return Measured(value, low, high, change.n, "", change.how)


def _find_paired(
    contents: ReportContents, metric: str, method: str, reference: str
) -> tuple[float, float | None, float | None] | None:
    """Difference and interval of the comparison of these two, in either direction."""
    name, sign = PAIRED_AS.get(metric, (metric, 1.0))
    for c in contents.comparisons:
        if c.metric != name or {c.method, c.baseline} != {method, reference}:
            continue
        side = sign if c.method == method else -sign
        ends = [None if end is None else side * end for end in (c.low, c.high)]
        low, high = ends if side > 0 else reversed(ends)
        return side * c.difference + 0.0, low, high
    return None
