import re
from pathlib import Path

import pytest

from debiased_laplace.calibration.gates.thresholds import DEFAULT_THRESHOLDS, KEYS, Threshold, read_thresholds

TOML = """
[[threshold]]
metric = "nll"
method = "laplace"
max = 0.35

[[threshold]]
metric = "picp"
min = 0.85
max = 0.95
judge = "estimate"
min_samples = 100

[[threshold]]
metric = "brier"
relative_to = "map"
max_relative_change = 0.05
"""
EXPECTED = (
    Threshold("nll", "laplace", max=0.35),
    Threshold("picp", min=0.85, max=0.95, judge="estimate", min_samples=100),
    Threshold("brier", relative_to="map", max_relative_change=0.05),
)


def test_toml_and_mappings_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text(TOML, encoding="utf-8")
    mappings = [{k: v for k, v in vars(t).items() if v is not None} for t in EXPECTED]
    for source in (path, str(path), {"threshold": mappings}, mappings, EXPECTED, list(EXPECTED)):
        assert read_thresholds(source, "multiclass") == EXPECTED


def test_default_ones_ask_for_accuracy_in_classification_only() -> None:
    assert read_thresholds("default", "binary") == DEFAULT_THRESHOLDS
    assert [t.metric for t in read_thresholds("default", "regression")] == ["nll"]


WRONG = {
    "unknown key": (
        [{"metric": "nll", "maximum": 1}],
        "threshold 1: unknown key 'maximum'; the keys are metric, method",
    ),
    "no metric": ([{"max": 1}], "threshold 1: it names no metric"),
    "no limit": ([{"metric": "nll"}], "needs one of min, max, min_change.*got none"),
    "the second one": ([{"metric": "nll", "max": 1}, {"metric": "nll"}], "threshold 2"),
    "text for a limit": ([{"metric": "nll", "max": "1"}], "max must be a finite number; got '1'"),
    "true for a limit": ([{"metric": "nll", "max": True}], "max must be a finite number; got True"),
    "infinity": ([{"metric": "nll", "max": float("inf")}], "finite"),
    "limits that exclude each other": (
        [{"metric": "nll", "min": 2, "max": 1}],
        "min must not be above max; got 2 and 1",
    ),
    "changes that exclude each other": (
        [{"metric": "nll", "min_change": 1, "max_change": 0}],
        "min_change must not be",
    ),
    "another judge": (
        [{"metric": "nll", "max": 1, "judge": "upper"}],
        "judge must be 'bound' or 'estimate'; got 'upper'",
    ),
    "half a sample": ([{"metric": "nll", "max": 1, "min_samples": 0.5}], "min_samples must be a whole number"),
    "a method without a name": ([{"metric": "nll", "max": 1, "method": 3}], "method must be text; got 3"),
    "a reference without a change": ([{"metric": "nll", "max": 1, "relative_to": "map"}], "relative_to needs one of"),
    "another table": ({"thresholds": []}, r"unknown key 'thresholds'; expected tables \[\[threshold\]\]"),
    "no threshold": ({}, r"at least one table \[\[threshold\]\]"),
    "an empty list": ([], "at least one table"),
    "one table": ({"threshold": {"metric": "nll"}}, "at least one table"),
    "a number in the list": ([3], "threshold 1: expected a table; got 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_threshold_and_what_there_is(case: str) -> None:
    source, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_thresholds(source, "multiclass")


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text("[[threshold]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path} is no TOML")):
        read_thresholds(path, "binary")
    path.write_text('[[threshold]]\nmetric = "nll"\nmaks = 1\n', encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, threshold 1: unknown key 'maks'")):
        read_thresholds(path, "binary")
    with pytest.raises(FileNotFoundError):
        read_thresholds(tmp_path / "none.toml", "binary")


def test_keys_are_all_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "calibration_reports.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in page] == []
