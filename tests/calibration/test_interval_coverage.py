"""Coverage of intervals and size of verdicts, by the benchmark whose tables the documentation shows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import report_coverage

REPETITIONS = 300
FAR = 3.5 * (0.05 * 0.95 / REPETITIONS) ** 0.5  # of a share from 95 or 5 %
CONSERVATIVE = ("rmsce2_debiased", "difference of rmsce2_debiased")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["calibrated", "x 1.6"])
def test_intervals_contain_the_truth_as_often_as_they_say(family: str, monkeypatch) -> None:
    monkeypatch.setattr(report_coverage, "HUGE", 1_000_000)
    truth = report_coverage.find_truth(*report_coverage.FAMILIES[family])
    covered = report_coverage.cover_classification(500, family, truth, REPETITIONS)
    covered |= report_coverage.cover_regression(500, family, REPETITIONS)
    assert len(covered) == 16
    for name, share in covered.items():
        assert share > 0.95 - FAR, (name, share)
        assert share < 0.95 + FAR or name in CONSERVATIVE or name == "nll_calibration_loss", (name, share)
    shifted = {name: value + 0.1 for name, value in truth.items()}
    missed = report_coverage.cover_classification(500, family, shifted, 50)
    assert max(missed["confidence_gap"], missed["accuracy"], missed["rmsce2_debiased"]) < 0.5  # it can fail


@pytest.mark.slow
def test_verdicts_are_false_as_rarely_as_they_say_and_found_where_they_are_due() -> None:
    found = report_coverage.judge(500, 1.5, REPETITIONS)
    for name in (
        "consistency test rejects right confidences",
        "any verdict between two equally good methods",
        "the best temperature called better than the fitted one",
    ):
        assert found[name] < 0.05 + FAR, (name, found[name])
    assert found["x 1.6 called worse in NLL than x 1"] > 0.95
    assert found["x 1.3 called worse in NLL than x 1"] > 0.5
