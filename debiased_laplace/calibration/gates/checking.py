"""The result of a check, for programs, people and CI servers."""

import re
from collections import Counter
from dataclasses import dataclass
from xml.etree import ElementTree

from debiased_laplace.calibration.gates.outcomes import Status, ThresholdOutcome, overall_status

_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class CheckResult:
    """What came of all thresholds.

    Attributes:
        outcomes: one per threshold, quantity and method.
    """

    outcomes: tuple[ThresholdOutcome, ...]

    @property
    def status(self) -> Status:
        """Failed if any threshold failed, else inconclusive if any was, else passed."""
        return overall_status(self.outcomes)

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
        """The outcomes as JUnit XML: failures as such, inconclusive ones as skipped.

        Args:
            strict: inconclusive ones are failures too.
            name: of the test suite.
        """
        bad = {"failed", "inconclusive"} if strict else {"failed"}
        statuses = [outcome.status for outcome in self.outcomes]
        counts = {
            "tests": len(statuses),
            "failures": sum(s in bad for s in statuses),
            "skipped": sum(s == "inconclusive" and s not in bad for s in statuses),
            "errors": 0,
        }
        attributes = {key: str(value) for key, value in counts.items()}
        suites = ElementTree.Element("testsuites")
        suite = ElementTree.SubElement(suites, "testsuite", {"name": _clean(name), **attributes})
        for outcome in self.outcomes:
            about = {"classname": f"{name}.{outcome.metric}", "name": outcome.title}
            case = ElementTree.SubElement(suite, "testcase", {key: _clean(text) for key, text in about.items()})
            if outcome.status in bad:
                kind = {"message": _clean(outcome.message), "type": outcome.status}
                ElementTree.SubElement(case, "failure", kind).text = _clean(outcome.message)
            elif outcome.status == "inconclusive":
                ElementTree.SubElement(case, "skipped", {"message": _clean(outcome.message)})
            else:
                ElementTree.SubElement(case, "system-out").text = _clean(outcome.message)
        ElementTree.indent(suites)
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def _clean(text: str) -> str:
    """Without characters that XML cannot hold."""
    return _NO_XML.sub("\ufffd", text)
