"""Outcomes of thresholds on reports whose numbers are known."""

from dataclasses import replace

import pytest
import torch

from debiased_laplace.calibration import CalibrationReport, Estimate, calibration_report
from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.gates.measured import measure_change, measure_relative_change


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    """NLL of `map` 0.40 [0.36, 0.44], of `b` 0.30 [0.27, 0.33], their paired difference -0.10 [-0.12, -0.08]."""
    generator = torch.Generator().manual_seed(51)
    logits = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    p = {"map": (2 * logits).softmax(1), "b": logits.softmax(1), "c": (3 * logits).softmax(1)}
    base = calibration_report(p, y, task="multiclass", n_resamples=20, temperature_scaling="none")
    numbers = {"map": (0.40, 0.36, 0.44), "b": (0.30, 0.27, 0.33), "c": (0.50, 0.45, 0.55)}
    methods = {}
    for name, (value, low, high) in numbers.items():
        metrics = dict(base.methods[name].metrics)
        metrics["nll"] = Estimate(value, low, high, (high - low) / 4, 50, "by hand")
        metrics["accuracy"] = Estimate(0.8, 0.75, 0.85, 0.025, 50, "by hand")
        metrics["mce"] = Estimate(None, None, None, None, 50, "by hand", "nobody knows")
        methods[name] = replace(base.methods[name], metrics=metrics)
    rest = {"standard_error": 0.01, "p_value": 0.0, "adjusted_p_value": 0.0, "verdict": "better"}
    comparisons = (
        Comparison("b", "map", "nll", difference=-0.10, low=-0.12, high=-0.08, **rest),
        Comparison("b", "map", "error", difference=0.004, low=0.002, high=0.006, **rest),
    )
    return replace(base, methods=methods, comparisons=comparisons)


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
    "an interval wider than the limits": ({"method": "map", "min": 0.39, "max": 0.41}, "inconclusive"),
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
    result = report.check([{"metric": "nll"} | threshold])
    (outcome,) = result.outcomes
    assert outcome.status == status, outcome.message
    assert result.status == status
    assert result.passed == (status == "passed")
    assert outcome.message.startswith(outcome.title)
    assert status.capitalize() in outcome.message


def test_changes_have_the_ends_that_the_doc_says(report) -> None:
    paired = measure_change(report, "nll", "b", "map")
    assert (paired.value, paired.low, paired.high) == (-0.10, -0.12, -0.08)
    turned = measure_change(report, "nll", "map", "b")
    assert (turned.value, turned.low, turned.high) == (0.10, 0.08, 0.12)
    accuracy = measure_change(report, "accuracy", "b", "map")
    assert (accuracy.value, accuracy.low, accuracy.high) == (-0.004, -0.006, -0.002)
    unpaired = measure_change(report, "nll", "c", "map")
    assert (unpaired.value, unpaired.low, unpaired.high) == pytest.approx((0.10, 0.01, 0.19))
    relative = measure_relative_change(report, "nll", "b", "map")
    assert (relative.value, relative.low, relative.high) == pytest.approx((-0.25, -0.12 / 0.36, -0.08 / 0.44))


def test_a_share_of_nothing_is_inconclusive(report) -> None:
    method = report.methods["map"]
    metrics = {**method.metrics, "nll": Estimate(0.01, -0.01, 0.03, 0.01, 50, "by hand")}
    changed = replace(report, methods={**report.methods, "map": replace(method, metrics=metrics)})
    (outcome,) = changed.check([{"metric": "nll", "method": "b", "max_relative_change": 0.0}]).outcomes
    assert outcome.status == "inconclusive"
    assert "map itself may be 0" in outcome.message


def test_without_a_method_every_one_is_judged_but_the_one_compared_with(report) -> None:
    values = report.check([{"metric": "nll", "max": 0.45}]).outcomes
    assert [(o.method, o.status) for o in values] == [("map", "passed"), ("b", "passed"), ("c", "inconclusive")]
    changes = report.check([{"metric": "nll", "relative_to": "b", "max_change": 0.0}]).outcomes
    assert [o.method for o in changes] == ["map", "c"]
    assert {o.relative_to for o in changes} == {"b"}


def test_the_row_that_the_report_made_is_no_candidate(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=2.0, seed=52)
    report = calibration_report({"map": p, "b": p}, y, task="multiclass", n_resamples=20)
    assert report.scaling is not None
    assert len(report.methods) == 3
    assert {o.method for o in report.check().outcomes} == {"b"}
    made = report.check([{"metric": "nll", "method": report.scaling.method, "max": 10}])
    assert made.passed


def test_one_threshold_may_have_limits_of_several_quantities(report) -> None:
    outcomes = report.check([{"metric": "nll", "method": "b", "max": 0.35, "max_change": 0.0}]).outcomes
    assert [(o.quantity, o.status) for o in outcomes] == [("value", "passed"), ("change", "passed")]


WRONG = {
    "metric": ({"metric": "nlll", "max": 1}, "no metric 'nlll' in this report; it has nll, brier"),
    "method": (
        {"metric": "nll", "method": "d", "max": 1},
        "'d' was asked for, but the report has no such method; it has 'map', .*'b'",
    ),
    "reference": ({"metric": "nll", "relative_to": "d", "max_change": 1}, "'d' was asked for"),
    "itself": ({"metric": "nll", "method": "map", "max_change": 1}, "'map' cannot be compared with itself"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unknown_names_are_errors_that_name_what_there_is(report, case: str) -> None:
    threshold, message = WRONG[case]
    with pytest.raises(ValueError, match=f"threshold 1: .*{message}"):
        report.check([threshold])


def test_the_default_gates_need_something_to_compare(draw_classification) -> None:
    p, y, _ = draw_classification(60, sharpness=2.0, seed=53)
    alone = calibration_report({"map": p}, y, task="multiclass", n_resamples=20)
    with pytest.raises(ValueError, match="no method beside 'map'"):
        alone.check()


@pytest.mark.slow
def test_a_gate_is_passed_by_mistake_no_more_often_than_it_promises(draw_classification) -> None:
    """A method that is exactly as bad as allowed passes in (1 - 0.95) / 2 of all test sets; a far better one always."""
    passed = {"exactly": 0, "far": 0}
    repetitions = 400
    limit = None
    for seed in range(repetitions):
        p, y, truth = draw_classification(400, sharpness=1.0, seed=1000 + seed, n_classes=3)
        report = calibration_report({"m": p}, y, task="multiclass", n_resamples=2, temperature_scaling="none")
        entropy = -(truth * truth.log()).sum(1)
        limit = entropy.mean().item()  # of these inputs; the labels are what varies
        spread = report.metrics["m"]["nll"].standard_error
        passed["exactly"] += report.check([{"metric": "nll", "max": limit}]).passed
        passed["far"] += report.check([{"metric": "nll", "max": limit + 6 * spread}]).passed
    assert passed["exactly"] / repetitions <= 0.025 + 3 * (0.025 * 0.975 / repetitions) ** 0.5
    assert passed["far"] / repetitions >= 0.99
