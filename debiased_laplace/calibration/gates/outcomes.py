"""What came of a threshold: passed, failed, or not decidable on this test set."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "inconclusive"]
Judge = Literal["bound", "estimate"]
Quantity = Literal["value", "change", "relative change"]


@dataclass(frozen=True)
class ThresholdOutcome:
    """One threshold on one quantity of one method.

    Attributes:
        metric: name of the metric.
        method: name of the method that was judged.
        quantity: the metric itself, its change against another method, or that change over the other's value.
        relative_to: the other method; None for the metric itself.
        status: what came of it.
        value: the estimate of the quantity; None where there is none.
        low: lower end of its interval; None where there is none.
        high: upper end.
        minimum: smallest value allowed; None for no such limit.
        maximum: largest value allowed.
        judge: what had to keep the limits: both bounds of the interval, or the estimate.
        n: test samples behind the estimate.
        min_samples: how many were asked for.
        message: the same in a sentence.
    """

    metric: str
    method: str
    quantity: Quantity
    relative_to: str | None
    status: Status
    value: float | None
    low: float | None
    high: float | None
    minimum: float | None
    maximum: float | None
    judge: Judge
    n: int
    min_samples: int
    message: str

    @property
    def title(self) -> str:
        """What was judged, in a few words."""
        against = f" against {self.relative_to}" if self.relative_to is not None else ""
        kind = "" if self.quantity == "value" else f", {self.quantity}"
        return f"{self.method}{against}: {self.metric}{kind}"


def overall_status(outcomes: tuple[ThresholdOutcome, ...]) -> Status:
    """Failed if any failed, else inconclusive if any was, else passed."""
    found = {outcome.status for outcome in outcomes}
    return "failed" if "failed" in found else "inconclusive" if "inconclusive" in found else "passed"
