"""A metric of a method in two reports, and whether it got better or worse."""

from dataclasses import dataclass
from typing import Literal

ChangeVerdict = Literal["better", "worse", "no detectable change", "changed", "unchanged", "not judged"]
Pairing = Literal["same samples", "as if independent", "independent"]


@dataclass(frozen=True)
class Change:
    """A metric of a method in two reports.

    Attributes:
        method: name of the method.
        metric: name of the metric.
        old: its value in the older report; None where there is none.
        new: its value in the newer one.
        difference: new minus old.
        low: lower end of the difference's interval; None where there is none.
        high: upper end.
        p_value: two-sided, of no difference, for this change alone.
        adjusted_p_value: Holm's adjustment over all changes that are judged.
        pairing: how the interval came about. "same samples": paired by batches of the same test set. "as if
            independent": the same test set without sums to pair by, so the interval is too wide where what is hard for
            the old is hard for the new. "independent": two test sets.
        verdict: "changed" is a detectable change of a metric that has no good direction.
        note: why it is not judged.
    """

    method: str
    metric: str
    old: float | None
    new: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    adjusted_p_value: float | None
    pairing: Pairing
    verdict: ChangeVerdict
    note: str = ""


@dataclass(frozen=True)
class Changes:
    """What changed between two reports.

    Attributes:
        changes: of every metric of every method that both have.
        same_test_set: whether the targets are the same, in the same order.
        confidence_level: of the intervals; 1 minus it is the level of the verdicts.
        only_old: methods that the newer report lacks.
        only_new: methods that the older report lacks.
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
