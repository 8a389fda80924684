"""Changes between two reports: equal, better, worse, and not judged."""

from dataclasses import replace
from math import hypot

import numpy as np
import pytest
import torch
from scipy import stats

from debiased_laplace.calibration.changes import compare_reports, independent_widths, render_changes
from debiased_laplace.calibration.comparisons import N_BATCHES, paired_spread, sum_scores
from debiased_laplace.calibration.contents import DataSummary, Estimate
from debiased_laplace.calibration.intervals import Units, estimate_mean, estimate_skewed_mean, wilson_interval


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(n: int, codes: torch.Tensor | None = None) -> Units:
    return Units(n, 0.95, codes)


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half, half / 1.96, n=600, estimator="by hand")


def test_sums_of_interleaved_batches() -> None:
    sums = sum_scores({"nll": draw(200, 1)}, units(200))
    assert set(sums) == {"samples", "nll"}
    assert sums["samples"] == tuple([4.0] * 8 + [3.0] * 56)
    assert sums["nll"] == pytest.approx([draw(200, 1)[b::N_BATCHES].sum().item() for b in range(N_BATCHES)], abs=1e-12)
    assert sum_scores({}, units(200)) == {}


def test_unequal_batches_are_weighted_by_their_size() -> None:
    """Against a transcription with the batches' own sizes."""
    n, old, new = 130, draw(130, 4), draw(130, 5) + 2.0
    error, freedom = paired_spread(sum_scores({"a": old}, units(n)), sum_scores({"a": new}, units(n)), "a")
    d = (new - old).numpy()
    squares = [np.sum(d[b::N_BATCHES] - d.mean()) ** 2 for b in range(N_BATCHES)]
    assert freedom == N_BATCHES - 1
    assert error == pytest.approx(np.sqrt(N_BATCHES / freedom * np.sum(squares)) / n, rel=1e-12)


def test_a_cluster_stays_in_one_batch() -> None:
    clustered, independent = units(300, torch.arange(300) // 3), units(300)
    new = draw(100, 7).repeat_interleave(3)  # equal within clusters
    errors = [
        paired_spread(sum_scores({"a": 0 * new}, u), sum_scores({"a": new}, u), "a")[0]
        for u in (clustered, independent)
    ]
    truth = new.std().item() / 10  # of 100 clusters
    assert errors[0] == pytest.approx(truth, rel=0.25)
    assert errors[1] < 0.75 * truth


GOOD = {"samples": (3.0, 2.0), "a": (1.0, 2.0)}
UNPAIRED = {
    "no sums": ({}, GOOD),
    "another score": ({"samples": (3.0, 2.0), "b": (1.0, 2.0)}, GOOD),
    "other batches": ({**GOOD, "samples": (2.0, 3.0)}, GOOD),
    "a single batch": ({"samples": (5.0,), "a": (1.0,)}, {"samples": (5.0,), "a": (2.0,)}),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_what_cannot_be_paired_is_not(case: str) -> None:
    assert paired_spread(GOOD, GOOD, "a") is not None
    assert paired_spread(*UNPAIRED[case], "a") is None


def test_newcombes_example() -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II: 56/70 against 48/80, method 10."""
    old, new = (
        Estimate(k / n, *wilson_interval(k / n, float(n), 0.95), 0.05, n=n, estimator="share")
        for k, n in ((48, 80), (56, 70))
    )
    below, above = independent_widths(old, new)
    assert (0.2 - below, 0.2 + above) == pytest.approx((0.0524, 0.3339), abs=5e-5)


LOSSES = {m: 1.0 + 0.2 * draw(600, seed) + draw(600, 70) for m, seed in (("map", 71), ("b", 72))}
"""Most of what varies is common to the methods: what makes a sample hard."""


@pytest.fixture(scope="module")
def store(make_contents):
    """A report of per-sample losses."""

    def store(losses=LOSSES, **changes):
        nll = {m: {"nll": estimate_skewed_mean(x, units(len(x)))} for m, x in losses.items()}
        sums = {m: sum_scores({"nll": x}, units(len(x))) for m, x in losses.items()}
        return make_contents(nll, sums=sums, **changes)

    return store


def worse(by: float = 0.1, seed: int = 73):
    """Losses of a report in which `map` is worse."""
    return LOSSES | {"map": LOSSES["map"] + by + 0.2 * draw(600, seed)}


def of(changes, method: str, metric: str = "nll"):
    return next(c for c in changes if (c.method, c.metric) == (method, metric))


def test_a_real_report_against_itself_is_unchanged_in_everything(classification_report, regression_report) -> None:
    for report in (classification_report, regression_report):
        changes = compare_reports(report, report)
        assert {c.method for c in changes} == set(report.methods)
        assert {c.verdict for c in changes if c.old is not None} == {"unchanged"}
        assert of(changes, "b").pairing == "same samples"
        text = render_changes(changes, report, report)
        assert text.splitlines()[2].startswith("**No detectable change**")


def test_the_same_test_set_is_compared_in_pairs(store) -> None:
    old, new = store(), store(worse())
    changes = compare_reports(old, new)
    nll, difference = of(changes, "map"), worse()["map"] - LOSSES["map"]
    assert (nll.pairing, nll.verdict) == ("same samples", "worse")
    assert nll.difference == pytest.approx(difference.mean().item(), abs=1e-12)
    # 64 batches stand for 600 samples
    assert (nll.high - nll.low) / 4 == pytest.approx(difference.std().item() / 600**0.5, rel=0.25)
    assert [c for c in changes if c.verdict == "worse"] == [nll]
    assert of(changes, "b").verdict == "unchanged"
    back = of(compare_reports(new, old), "map")
    assert (back.verdict, back.low, back.high) == ("better", pytest.approx(-nll.high), pytest.approx(-nll.low))


def test_rounding_errors_are_no_change(store) -> None:
    nll = of(compare_reports(store(), store({m: x * (1 + 1e-12) for m, x in LOSSES.items()})), "map")
    assert (nll.difference, nll.p_value, nll.verdict) == (0.0, 1.0, "unchanged")


def test_without_sums_the_same_set_counts_as_two(store) -> None:
    old = store()
    bare = replace(old, methods={m: replace(r, score_sums={}) for m, r in old.methods.items()})
    nll = of(compare_reports(bare, store(worse())), "map")
    assert (nll.pairing, nll.verdict) == ("as if independent", "no detectable change")


def test_two_test_sets_have_the_interval_of_two_independent_estimates(store) -> None:
    old, new = store(), store(worse(by=0.5), data=DataSummary(600, 4, None, "another digest"))
    changes = compare_reports(old, new)
    assert {c.pairing for c in changes} == {"independent"}
    a, b = (r.metrics["map"]["nll"] for r in (old, new))
    nll = of(changes, "map")
    assert nll.low == pytest.approx(b.value - a.value - hypot(b.value - b.low, a.high - a.value), abs=1e-12)
    assert nll.high == pytest.approx(b.value - a.value + hypot(b.high - b.value, a.value - a.low), abs=1e-12)
    assert nll.verdict == "worse"


DIRECTIONS = {
    "lower is better": ("lower", 0.5, 0.6, "worse"),
    "higher is better": ("higher", 0.5, 0.6, "better"),
    "closer to zero": ("zero", -0.2, -0.1, "better"),
    "further from zero": ("zero", 0.1, 0.2, "worse"),
    "across zero": ("zero", -0.1, 0.1, "changed"),
    "closer to one": ("one", 1.3, 1.2, "better"),
    "further from one": ("one", 0.9, 0.8, "worse"),
    "no good direction": ("none", 0.1, 0.2, "not judged"),
    "a level": ("level", 0.8, 0.9, "not judged"),
}


@pytest.mark.parametrize("case", DIRECTIONS)
def test_the_good_direction_of_a_metric_counts(make_contents, case: str) -> None:
    better, before, after, verdict = DIRECTIONS[case]
    old, new = (make_contents({"map": {"x": estimate(v, 0.001)}}, better={"x": better}) for v in (before, after))
    change = of(compare_reports(old, new), "map", "x")
    assert change.verdict == verdict
    assert (change.adjusted_p_value is None) == (verdict == "not judged")


def test_verdicts_allow_for_the_number_of_metrics(make_contents) -> None:
    """A p-value of 0.03 alone is a change; among three judged metrics it is none (Holm). Others count as no test."""
    step = 0.1 * 2**0.5 * stats.norm.isf(0.015) / stats.norm.isf(0.025)
    for names, adjusted, verdict in (
        ("a", 0.03, "worse"),
        ("ac", 0.03, "worse"),
        ("abd", 0.09, "no detectable change"),
    ):
        old, new = (
            make_contents(
                {"map": {name: estimate(1.0 + (by if name in "ac" else by * 1e-8), 0.1) for name in names}},
                better={"c": "none"},
            )
            for by in (0.0, step)
        )
        change = of(compare_reports(old, new), "map", "a")
        assert change.p_value == pytest.approx(0.03, abs=1e-9)
        assert change.low > 0  # its own interval; the shown one is adjusted as the verdict is
        assert (change.adjusted_low > 0) == (verdict == "worse")
        shown = next(line for line in render_changes([change], old, new).splitlines() if line.startswith("| map | a "))
        assert ("[−" in shown) == (verdict != "worse")
        assert (change.adjusted_p_value, change.verdict) == (pytest.approx(adjusted, abs=1e-8), verdict)


def test_what_has_no_interval_or_value_is_not_judged_and_says_why(make_contents) -> None:
    old, new, none = (
        make_contents({"map": {"ece": Estimate(v, None, None, None, 600, "by hand", "nobody knows")}})
        for v in (0.1, 0.2, None)
    )
    for other, difference, note in (
        (new, pytest.approx(0.1), "no interval: nobody knows"),
        (none, None, "nobody knows"),
    ):
        change = of(compare_reports(old, other), "map", "ece")
        assert (change.verdict, change.difference, change.note) == ("not judged", difference, note)


def test_what_cannot_be_compared_is_refused(store) -> None:
    base = store()
    for other, message in (
        (store(settings={"confidence_level": 0.9}), "one confidence level; got 0.95 and 0.9"),
        (store(task="regression"), "one task; got 'multiclass' and 'regression'"),
        (store({"x": LOSSES["b"]}), "no method in common"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_reports(base, other)


def test_markdown_says_the_verdict_first(store) -> None:
    old = store(title="old | <b>")
    new = store({"map": worse()["map"], "c": LOSSES["b"], "d*": LOSSES["b"]})
    text = render_changes(compare_reports(old, new), old, new)
    assert text.splitlines()[:3] == [
        "# Changes between two calibration reports",
        "",
        "**Detectably 1 worse**, of 1 judged metrics.",
    ]
    assert r"Old: old \| \<b\>, " in text
    assert "compared in pairs" in text
    assert "| map | nll | " in text.split("## Detectable changes")[1]
    assert "Only in the old report: b." in text
    assert r"Only in the new report: c, d\*." in text
    assert "<details>" not in text
    again = render_changes(compare_reports(new, new), new, new)
    assert "| map | nll | " in again.split("## Other metrics")[1]
    assert "## Detectable" not in again


def test_false_alarms_are_as_rare_as_promised_and_changes_are_found(make_contents) -> None:
    """Equally good methods on the same 400 samples: an alarm over all metrics in at most 5 % of the pairs."""
    alarms, found, repetitions, u = 0, 0, 200, units(400)

    def report(scores):
        metrics = {name: estimate_mean(x, u) for name, x in scores.items()}
        return make_contents({"map": metrics}, sums={"map": sum_scores(scores, u)})

    for seed in range(repetitions):
        common, *own = draw(400 * 9, 5000 + seed).exp().reshape(9, 400)
        one, two = ({f"score {i}": common + own[i + k] for i in range(4)} for k in (0, 4))
        alarms += bool({c.verdict for c in compare_reports(report(one), report(two))} & {"better", "worse"})
        harmed = two | {"score 0": two["score 0"] + 0.8}
        found += of(compare_reports(report(one), report(harmed)), "map", "score 0").verdict == "worse"
    assert 0.01 < alarms / repetitions <= 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5
    assert found / repetitions > 0.9
