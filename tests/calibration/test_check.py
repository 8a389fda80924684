"""Thresholds, from TOML to exit status: outcomes on reports whose numbers are known."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hostile_texts import TEXT

from debiased_laplace.calibration.check import (
    DEFAULT_THRESHOLDS,
    CheckResult,
    Threshold,
    check_report,
    measure_change,
    measure_relative_change,
    read_thresholds,
)
from debiased_laplace.calibration.contents import Comparison, Estimate, ScalingRecord, ThresholdOutcome
from debiased_laplace.calibration.intervals import Units, estimate_skewed_mean

TOML = """
[[threshold]]
metric = "nll"
method = "laplace"
max = 0.35

[[threshold]]
metric = "picp"
min = 0.85
max = 1
judge = "estimate"
min_samples = 100

[[threshold]]
metric = "brier"
relative_to = "map"
max_relative_change = 0.05
"""
EXPECTED = (
    Threshold(metric="nll", method="laplace", max=0.35),
    Threshold(metric="picp", min=0.85, max=1.0, judge="estimate", min_samples=100),
    Threshold(metric="brier", relative_to="map", max_relative_change=0.05),
)


def test_toml_mappings_and_thresholds_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text(TOML, encoding="utf-8")
    mappings = [t.model_dump(exclude_unset=True) for t in EXPECTED]
    for source in (path, str(path), {"threshold": mappings}, mappings, tuple(mappings), EXPECTED):
        assert read_thresholds(source, "multiclass") == EXPECTED


def test_default_ones_ask_for_accuracy_in_classification_only() -> None:
    assert read_thresholds("default", "binary") == DEFAULT_THRESHOLDS
    assert [t.metric for t in read_thresholds("default", "regression")] == ["nll"]


NLL = {"metric": "nll"}
WRONG = {
    "unknown key": ([NLL | {"maximum": 1}], "threshold 1, 'maximum': unknown key; the keys are metric, method"),
    "no metric": ([{"max": 1}], "threshold 1, 'metric': missing key; the keys are metric, method"),
    "no limit": ([NLL], "threshold 1: a threshold needs one of min, max, min_change.*; got none"),
    "the second one": ([NLL | {"max": 1}, NLL], "threshold 2: "),
    "text for a limit": ([NLL | {"max": "1"}], "'max': .* valid number; got '1'"),
    "true for a limit": ([NLL | {"max": True}], "'max': .* valid number; got True"),
    "infinity": ([NLL | {"max": float("inf")}], "'max': .* finite number; got inf"),
    "limits that exclude each other": ([NLL | {"min": 2, "max": 1}], "min must not be above max; got 2 and 1"),
    "another judge": ([NLL | {"max": 1, "judge": "upper"}], "'judge': .*'bound' or 'estimate'; got 'upper'"),
    "half a sample": ([NLL | {"max": 1, "min_samples": 0.5}], "'min_samples': .*integer; got 0.5"),
    "fewer than no samples": ([NLL | {"max": 1, "min_samples": -1}], "'min_samples': .*; got -1"),
    "a method without a name": ([NLL | {"max": 1, "method": 3}], "'method': .*string; got 3"),
    "a reference without a change": ([NLL | {"max": 1, "relative_to": "map"}], "relative_to needs one of min_change"),
    "another table": ({"thresholds": []}, r"'thresholds': unknown key; expected at least one table \[\[threshold\]\]"),
    "no threshold": ({}, "at least one table"),
    "one table": ({"threshold": NLL}, "at least one table"),
    "a number in the list": ([3], "threshold 1: .*; got 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_threshold_the_key_and_what_there_is(case: str) -> None:
    source, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^thresholds, .*{message}"):
        read_thresholds(source, "multiclass")


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    for text, message in (("[[threshold]\n", " is no TOML"), ("[[threshold]]\nmaks = 1\n", ", threshold 1, 'maks'")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
            read_thresholds(path, "binary")
    with pytest.raises(FileNotFoundError):
        read_thresholds(tmp_path / "none.toml", "binary")


def test_keys_are_all_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ci_gates.md").read_text(encoding="utf-8")
    assert [key for key in Threshold.model_fields if f"`{key}`" not in page] == []


def by_hand(value: float | None, low: float | None = None, high: float | None = None, reason: str | None = None):
    return Estimate(value, low, high, None, 50, "by hand", reason)


@pytest.fixture(scope="module")
def report(make_contents):
    """NLL of `map` 0.40 [0.36, 0.44], of `b` 0.30 [0.27, 0.33], their paired difference -0.10 [-0.12, -0.08]."""
    metrics = {
        name: {
            "nll": by_hand(*numbers),
            "accuracy": by_hand(0.8, 0.75, 0.85),
            "ece": by_hand(0.1, reason="none has honest coverage"),
            "mce": by_hand(None, reason="nobody knows"),
        }
        for name, numbers in {"map": (0.40, 0.36, 0.44), "b": (0.30, 0.27, 0.33), "c": (0.50, 0.45, 0.55)}.items()
    }
    rest = {"standard_error": 0.01, "p_value": 0.0, "adjusted_p_value": 0.0, "verdict": "better"}
    comparisons = (
        Comparison("b", "map", "nll", difference=-0.10, low=-0.12, high=-0.08, **rest),
        Comparison("b", "map", "error", difference=0.004, low=0.002, high=0.006, **rest),
    )
    return make_contents(metrics, comparisons=comparisons)


def check(report, *thresholds) -> CheckResult:
    return check_report(report, read_thresholds(thresholds, report.task))


CASES = {
    "whole interval below": ({"method": "map", "max": 0.45}, "passed"),
    "the upper end on the limit": ({"method": "map", "max": 0.44}, "passed"),
    "the estimate below, the bound above": ({"method": "map", "max": 0.42}, "inconclusive"),
    "the estimate above, the other bound below": ({"method": "map", "max": 0.38}, "inconclusive"),
    "whole interval above": ({"method": "map", "max": 0.35}, "failed"),
    "whole interval above a minimum": ({"method": "map", "min": 0.35}, "passed"),
    "an interval across a minimum": ({"method": "map", "min": 0.38}, "inconclusive"),
    "whole interval below a minimum": ({"method": "map", "min": 0.45}, "failed"),
    "between both": ({"method": "map", "min": 0.35, "max": 0.45}, "passed"),
    "between both, but for one end": ({"method": "map", "min": 0.35, "max": 0.42}, "inconclusive"),
    "outside of both": ({"method": "map", "min": 0.45, "max": 0.5}, "failed"),
    "the estimate alone": ({"method": "map", "max": 0.42, "judge": "estimate"}, "passed"),
    "the estimate alone, above": ({"method": "map", "max": 0.38, "judge": "estimate"}, "failed"),
    "too few samples": ({"method": "map", "max": 0.45, "min_samples": 51}, "inconclusive"),
    "just enough samples": ({"method": "map", "max": 0.45, "min_samples": 50}, "passed"),
    "no interval": ({"metric": "ece", "method": "map", "max": 1.0}, "inconclusive"),
    "no interval, the estimate alone": ({"metric": "ece", "method": "map", "max": 1.0, "judge": "estimate"}, "passed"),
    "no value": ({"metric": "mce", "method": "map", "max": 1.0, "judge": "estimate"}, "inconclusive"),
    "a change, paired": ({"method": "b", "relative_to": "map", "max_change": -0.07}, "passed"),
    "a change, paired, inconclusive": ({"method": "b", "relative_to": "map", "max_change": -0.09}, "inconclusive"),
    "a change, paired, failed": ({"method": "b", "relative_to": "map", "max_change": -0.13}, "failed"),
    "the same change seen from the other side": ({"method": "map", "relative_to": "b", "min_change": 0.08}, "passed"),
    "a change against the baseline": ({"method": "b", "max_change": 0.0}, "passed"),
    "a change without a comparison": ({"method": "c", "max_change": 0.2}, "passed"),
    "a change without a comparison, not clear": ({"method": "c", "max_change": 0.1}, "inconclusive"),
    "accuracy is compared as error": ({"metric": "accuracy", "method": "b", "min_change": -0.005}, "inconclusive"),
    "accuracy, a larger drop allowed": ({"metric": "accuracy", "method": "b", "min_change": -0.006}, "passed"),
    "accuracy, no drop allowed": ({"metric": "accuracy", "method": "b", "min_change": 0.0}, "failed"),
    "a relative change": ({"method": "b", "max_relative_change": -0.1}, "passed"),
    "a relative change, inconclusive": ({"method": "b", "max_relative_change": -0.2}, "inconclusive"),
}


@pytest.mark.parametrize("case", CASES)
def test_outcomes(report, case: str) -> None:
    threshold, status = CASES[case]
    result = check(report, NLL | threshold)
    (outcome,) = result.outcomes
    assert outcome.status == result.status == status, outcome.message
    assert outcome.message.startswith(outcome.title)
    assert status.capitalize() in outcome.message


def test_a_message_says_what_was_found_what_is_allowed_and_from_what(report) -> None:
    (outcome,) = check(report, NLL | {"method": "b", "max_change": -0.09}).outcomes
    assert outcome.message.replace("\u2212", "-") == (
        "b against map: nll, change is -0.1000 [-0.1200, -0.0800]; its bound must be at most -0.09 (paired difference)."
        " Inconclusive: the interval contains the limit; more samples are needed."
    )


def test_changes_have_the_ends_that_the_doc_says(report) -> None:
    expected = {
        ("nll", "b", "map"): (-0.10, -0.12, -0.08),
        ("nll", "map", "b"): (0.10, 0.08, 0.12),
        ("accuracy", "b", "map"): (-0.004, -0.006, -0.002),
        ("nll", "c", "map"): (0.10, 0.01, 0.19),
    }
    for names, ends in expected.items():
        change = measure_change(report, *names)
        assert (change.value, change.low, change.high) == pytest.approx(ends, abs=1e-15)
    relative = measure_relative_change(report, "nll", "b", "map")
    assert (relative.value, relative.low, relative.high) == pytest.approx((-0.25, -0.12 / 0.36, -0.08 / 0.44))
    assert measure_change(report, "mce", "b", "map").reason == "nobody knows"
    assert measure_relative_change(report, "ece", "b", "map").reason == "none has honest coverage"


def test_a_share_of_nothing_is_inconclusive(make_contents) -> None:
    report = make_contents({"map": {"nll": by_hand(0.01, -0.01, 0.03)}, "b": {"nll": by_hand(0.2, 0.1, 0.3)}})
    (outcome,) = check(report, NLL | {"method": "b", "max_relative_change": 0.0}).outcomes
    assert outcome.status == "inconclusive"
    assert "the interval of map contains 0, so the relative change is undefined" in outcome.message


def test_without_a_method_every_one_is_judged_but_the_one_compared_with(report) -> None:
    values = check(report, NLL | {"max": 0.45}).outcomes
    assert [(o.method, o.status) for o in values] == [("map", "passed"), ("b", "passed"), ("c", "inconclusive")]
    changes = check(report, NLL | {"relative_to": "b", "max_change": 0.0}).outcomes
    assert [(o.method, o.relative_to) for o in changes] == [("map", "b"), ("c", "b")]
    both = check(report, NLL | {"method": "b", "max": 0.35, "max_change": 0.0}).outcomes
    assert [(o.quantity, o.status) for o in both] == [("value", "passed"), ("change", "passed")]


def test_the_row_that_the_report_made_is_no_candidate(make_contents) -> None:
    same = {"nll": by_hand(0.4, 0.3, 0.5)}
    scaling = ScalingRecord("map, scaled", "map", "temperature", 1.1, (), 50)
    report = make_contents({"map": same, "map, scaled": same, "b": same}, scaling=scaling)
    assert [o.method for o in check(report, NLL | {"max_change": 1.0}).outcomes] == ["b"]
    assert check(report, NLL | {"method": "map, scaled", "max": 10}).passed
    with pytest.raises(ValueError, match="no method beside 'map'"):
        check(make_contents({"map": same}), NLL | {"max_change": 1.0})


UNKNOWN = {
    "metric": ({"metric": "nlll", "max": 1}, "no metric 'nlll' in this report; it has nll, accuracy"),
    "method": (NLL | {"method": "d", "max": 1}, "no nll of 'd'; it has that of 'map', .*'b'"),
    "reference": (NLL | {"relative_to": "d", "max_change": 1}, "no nll of 'd'"),
    "itself": (NLL | {"method": "map", "max_change": 1}, "'map' cannot be compared with itself"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_names_are_errors_that_name_what_there_is(report, case: str) -> None:
    threshold, message = UNKNOWN[case]
    with pytest.raises(ValueError, match=f"threshold 2: .*{message}"):
        check(report, NLL | {"max": 1}, threshold)


def outcome(status: str, method: str = "b") -> ThresholdOutcome:
    numbers = {"value": 0.3, "low": 0.2, "high": 0.4, "minimum": None, "maximum": 0.35}
    rest = {"judge": "bound", "n": 50, "min_samples": 0, "message": f"it {status}"}
    return ThresholdOutcome("nll", method, "value", None, status, **numbers, **rest)


def test_the_worst_outcome_is_the_result() -> None:
    for statuses, worst in (
        (("passed",), "passed"),
        (("passed", "inconclusive"), "inconclusive"),
        (("inconclusive", "failed", "passed"), "failed"),
        ((), "passed"),
    ):
        result = CheckResult(tuple(map(outcome, statuses)))
        assert (result.status, result.passed) == (worst, worst == "passed")
    result = CheckResult((outcome("passed"), outcome("failed"), outcome("passed")))
    assert repr(result) == "CheckResult(failed: 2 passed, 1 failed)"
    assert str(result).splitlines()[1] == "failed       it failed"


@pytest.mark.parametrize(("strict", "failures", "skipped"), [(False, 1, 1), (True, 2, 0)])
def test_junit(strict: bool, failures: int, skipped: int) -> None:
    hostile = f"{TEXT} \x01\ud800\uffff"
    result = CheckResult((outcome("passed"), outcome("failed", hostile), outcome("inconclusive")))
    text = result.to_junit(strict=strict, name=f"gate {hostile}")
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    (suite,) = ElementTree.fromstring(text.encode())
    assert suite.get("name") == f"gate {TEXT} \ufffd\ufffd\ufffd"
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "skipped", "errors")}
    assert counts == {"tests": 3, "failures": failures, "skipped": skipped, "errors": 0}
    assert [len(suite.findall(f".//{tag}")) for tag in ("failure", "skipped")] == [failures, skipped]
    cases = list(suite)
    assert all(case.get("classname").startswith(f"gate {TEXT}") for case in cases)
    assert cases[0].find("system-out").text == "it passed"
    assert cases[1].get("name") == f"{TEXT} \ufffd\ufffd\ufffd: nll"
    assert cases[1].find("failure").get("message") == "it failed"


def test_a_gate_is_passed_by_mistake_no_more_often_than_it_promises(make_contents) -> None:
    """A method that is exactly as bad as allowed passes in (1 - 0.95) / 2 of all test sets; a far better one always."""
    generator, repetitions, passed = torch.Generator().manual_seed(54), 1000, {"exactly": 0, "far": 0}
    losses = torch.empty(repetitions, 400, dtype=torch.float64).exponential_(generator=generator)  # of mean 1
    for own in losses:
        nll = estimate_skewed_mean(own, Units(400, 0.95))
        report = make_contents({"m": {"nll": nll}})
        for name, limit in (("exactly", 1.0), ("far", 1.0 + 6 * nll.standard_error)):
            passed[name] += check(report, Threshold(metric="nll", max=limit)).passed
    assert 0.01 < passed["exactly"] / repetitions <= 0.025 + 3 * (0.025 * 0.975 / repetitions) ** 0.5
    assert passed["far"] / repetitions >= 0.99
