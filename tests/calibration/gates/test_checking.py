from xml.etree import ElementTree

import pytest

from debiased_laplace.calibration.gates.checking import CheckResult
from debiased_laplace.calibration.gates.outcomes import ThresholdOutcome


def outcome(status: str, method: str = "b") -> ThresholdOutcome:
    numbers = {"value": 0.3, "low": 0.2, "high": 0.4, "minimum": None, "maximum": 0.35}
    return ThresholdOutcome(
        "nll", method, "value", None, status, judge="bound", n=50, min_samples=0, message=f"it {status}", **numbers
    )


STATUSES = {
    ("passed",): "passed",
    ("passed", "inconclusive"): "inconclusive",
    ("inconclusive", "failed", "passed"): "failed",
    (): "passed",
}


@pytest.mark.parametrize("statuses", STATUSES)
def test_the_worst_outcome_is_the_result(statuses) -> None:
    result = CheckResult(tuple(map(outcome, statuses)))
    assert result.status == STATUSES[statuses]
    assert result.passed == (result.status == "passed")


def test_it_says_what_it_is() -> None:
    result = CheckResult((outcome("passed"), outcome("failed"), outcome("passed")))
    assert repr(result) == "CheckResult(failed: 2 passed, 1 failed)"
    assert str(result).splitlines()[1] == "failed       it failed"


@pytest.mark.parametrize(("strict", "failures", "skipped"), [(False, 1, 1), (True, 2, 0)])
def test_junit(strict: bool, failures: int, skipped: int) -> None:
    nasty = 'a<b> & "c" \x01'
    result = CheckResult((outcome("passed"), outcome("failed", nasty), outcome("inconclusive")))
    text = result.to_junit(strict=strict, name="gate")
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    (suite,) = ElementTree.fromstring(text.encode())
    assert suite.get("name") == "gate"
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "skipped", "errors")}
    assert counts == {"tests": 3, "failures": failures, "skipped": skipped, "errors": 0}
    cases = list(suite)
    assert len(suite.findall(".//failure")) == failures
    assert len(suite.findall(".//skipped")) == skipped
    assert cases[0].find("failure") is None
    assert cases[1].get("name") == 'a<b> & "c" \ufffd: nll'
    assert cases[1].find("failure").get("message") == "it failed"
