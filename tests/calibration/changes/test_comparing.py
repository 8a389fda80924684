"""Two reports compared: what is equal, better, worse, and what cannot be told."""

from dataclasses import replace
from math import hypot

import pytest
import torch

from debiased_laplace.calibration import CalibrationReport, Estimate, calibration_report
from debiased_laplace.calibration.changes.comparing import compare_reports
from debiased_laplace.calibration.rendering.changes_markdown import render_changes


def draw(seed: int, n: int = 600):
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def report_on(logits, y, factor: float, *, extra: str = "b") -> CalibrationReport:
    p = {"map": (factor * logits).softmax(1), extra: logits.softmax(1)}
    return calibration_report(p, y, task="multiclass", n_resamples=20, temperature_scaling="none")


@pytest.fixture(scope="module")
def same_set():
    logits, y = draw(71)
    return {factor: report_on(logits, y, factor) for factor in (1.0, 1.5, 2.0)}


def of(changes, method: str, metric: str):
    return next(c for c in changes.changes if (c.method, c.metric) == (method, metric))


def test_a_report_against_itself(same_set) -> None:
    changes = compare_reports(same_set[1.0], same_set[1.0])
    assert changes.same_test_set
    assert changes.worse == ()
    assert {c.difference for c in changes.changes if c.old is not None} == {0.0}
    assert of(changes, "map", "nll").verdict == "unchanged"


def test_the_same_test_set_is_compared_in_pairs(same_set) -> None:
    old, new = same_set[1.0], same_set[1.5]
    changes = compare_reports(old, new)
    nll = of(changes, "map", "nll")
    assert (nll.pairing, nll.verdict) == ("same samples", "worse")
    assert nll.difference == new.metrics["map"]["nll"].value - old.metrics["map"]["nll"].value
    assert nll.low < nll.difference < nll.high
    assert nll in changes.worse
    unpaired = hypot(*(r.metrics["map"]["nll"].standard_error for r in (old, new)))
    assert (nll.high - nll.low) / 4 < 0.7 * unpaired  # pairing is what detects it
    assert of(changes, "map", "accuracy").verdict == "unchanged"
    assert of(changes, "b", "nll").verdict == "unchanged"
    back = of(compare_reports(new, old), "map", "nll")
    assert (back.verdict, back.low, back.high) == ("better", pytest.approx(-nll.high), pytest.approx(-nll.low))


def test_the_paired_interval_is_that_of_the_samples(same_set) -> None:
    """64 batches stand for 600 samples: the standard error agrees with the one of the samples' differences."""
    logits, y = draw(71)
    log_p = [(factor * logits).log_softmax(1)[torch.arange(len(y)), y] for factor in (1.0, 1.5)]
    difference = log_p[0] - log_p[1]
    change = of(compare_reports(same_set[1.0], same_set[1.5]), "map", "nll")
    assert change.difference == pytest.approx(difference.mean().item(), abs=1e-12)
    half_width = (change.high - change.low) / 2
    assert half_width == pytest.approx(2.0 * difference.std().item() / len(y) ** 0.5, rel=0.25)


def test_without_sums_the_same_set_counts_as_two(same_set) -> None:
    old = same_set[1.0]
    bare = replace(old, methods={m: replace(r, score_sums={}) for m, r in old.methods.items()})
    nll = of(compare_reports(bare, same_set[1.5]), "map", "nll")
    assert (nll.pairing, nll.verdict) == ("as if independent", "no detectable change")


def test_two_test_sets_have_the_interval_of_two_independent_estimates(same_set) -> None:
    logits, y = draw(72)
    old, new = same_set[1.0], report_on(logits, y, 2.5)
    changes = compare_reports(old, new)
    assert not changes.same_test_set
    assert {c.pairing for c in changes.changes} == {"independent"}
    a, b = (r.metrics["map"]["nll"] for r in (old, new))
    nll = of(changes, "map", "nll")
    assert nll.low == pytest.approx(b.value - a.value - hypot(b.value - b.low, a.high - a.value), abs=1e-12)
    assert nll.high == pytest.approx(b.value - a.value + hypot(b.high - b.value, a.value - a.low), abs=1e-12)
    assert nll.verdict == "worse"


def test_newcombes_example() -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II: 56/70 against 48/80, method 10."""
    from debiased_laplace.calibration.changes.comparing import _independent_widths
    from debiased_laplace.calibration.estimates import wilson_interval

    shares = (48 / 80, 56 / 70)
    ends = [wilson_interval(s, n, confidence_level=0.95) for s, n in zip(shares, (80, 70), strict=True)]
    old, new = (Estimate(s, *e, 0.05, 80, "share") for s, e in zip(shares, ends, strict=True))
    below, above = _independent_widths(old, new)
    assert (0.2 - below, 0.2 + above) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def with_metric(report: CalibrationReport, metric: str, value: float) -> CalibrationReport:
    """Another value with a narrow interval, and nothing to pair by."""
    method = report.methods["map"]
    metrics = {**method.metrics, metric: Estimate(value, value - 0.001, value + 0.001, 0.0005, 600, "by hand")}
    return replace(report, methods={"map": replace(method, metrics=metrics, score_sums={})})


DIRECTIONS = {
    "lower is better": ("nll", 0.5, 0.6, "worse"),
    "higher is better": ("accuracy", 0.5, 0.6, "better"),
    "closer to zero": ("confidence_gap", -0.2, -0.1, "better"),
    "further from zero": ("confidence_gap", 0.1, 0.2, "worse"),
    "across zero": ("confidence_gap", -0.1, 0.1, "changed"),
    "no good direction": ("ece_noise_floor", 0.1, 0.2, "not judged"),
}


@pytest.mark.parametrize("case", DIRECTIONS)
def test_the_good_direction_of_a_metric_counts(same_set, case: str) -> None:
    metric, before, after, verdict = DIRECTIONS[case]
    old, new = (with_metric(same_set[1.0], metric, value) for value in (before, after))
    assert of(compare_reports(old, new), "map", metric).verdict == verdict


def test_what_has_no_interval_is_not_judged_and_says_why(same_set) -> None:
    ece = of(compare_reports(same_set[1.0], same_set[2.0]), "map", "ece")
    assert ece.verdict == "not judged"
    assert "no interval" in ece.note
    assert ece.difference > 0


def test_methods_of_one_report_only_are_named(same_set) -> None:
    logits, y = draw(71)
    changes = compare_reports(same_set[1.0], report_on(logits, y, 1.0, extra="c"))
    assert (changes.only_old, changes.only_new) == (("b",), ("c",))
    text = render_changes(changes, same_set[1.0], same_set[1.0])
    assert "Only in the old report: b." in text
    assert "Only in the new report: c." in text


def test_what_cannot_be_compared_is_refused(same_set) -> None:
    logits, y = draw(71)
    base = same_set[1.0]
    other_level = calibration_report(
        {"map": logits.softmax(1)},
        y,
        task="multiclass",
        n_resamples=20,
        confidence_level=0.9,
        temperature_scaling="none",
    )
    mean = logits[:, 0]
    regression = calibration_report({"map": (mean, mean.exp())}, mean + 1, task="regression", n_resamples=20)
    nobody = replace(base, methods={"x": base.methods["map"]}, baseline="x", comparisons=())
    for other, message in (
        (other_level, "one confidence level; got 0.95 and 0.9"),
        (regression, "one task; got 'multiclass' and 'regression'"),
        (nobody, "no method in common"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_reports(base, other)


def test_markdown_says_the_verdict_first(same_set) -> None:
    text = render_changes(compare_reports(same_set[1.0], same_set[1.5]), same_set[1.0], same_set[1.5])
    assert text.splitlines()[2].startswith("**Detectably ")
    assert "worse" in text.splitlines()[2]
    assert "compared in pairs" in text
    detected = text.split("## Detectable changes")[1].split("<details>")[0]
    assert "| map | Negative log-likelihood |" in detected
    assert "## Other metrics" in text.split("<details>")[1]
    nothing = render_changes(compare_reports(same_set[1.0], same_set[1.0]), same_set[1.0], same_set[1.0])
    assert nothing.splitlines()[2].startswith("**No detectable change**")


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_promised_and_changes_are_found() -> None:
    """Equally good methods on the same 400 samples: an alarm over all metrics in at most 5 % of the pairs."""
    alarms, found, repetitions = 0, 0, 150
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(5000 + seed)
        logits, y = draw(3000 + seed, n=400)
        noise = 0.7 * torch.randn(2, *logits.shape, generator=generator, dtype=torch.float64)
        one, two = (report_on(logits + e, y, 1.0) for e in noise)  # different networks, equally good on average
        worse = report_on(logits + noise[1], y, 2.2)
        keep = {
            r: replace(r_, methods={"map": r_.methods["map"]}) for r, r_ in (("one", one), ("two", two), ("w", worse))
        }
        alarms += bool({c.verdict for c in compare_reports(keep["one"], keep["two"]).changes} & {"better", "worse"})
        found += any(c.metric == "nll" for c in compare_reports(keep["one"], keep["w"]).worse)
    assert alarms / repetitions <= 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5
    assert found / repetitions > 0.9
