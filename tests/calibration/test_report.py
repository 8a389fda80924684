import json
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

import debiased_laplace.calibration as room
from debiased_laplace.calibration import CalibrationReport, Estimate, ReportFigure, ReportTable, calibration_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text>x</text></svg>'


@pytest.fixture
def data(draw_classification):
    p, y, _ = draw_classification(300, sharpness=2.0, seed=11)
    q, _, _ = draw_classification(300, sharpness=1.0, seed=11)
    return {"map": p, "laplace": q}, y


@pytest.fixture
def regression(draw_regression):
    mean, std, y = draw_regression(200, scale=1.5, seed=12)
    return {"map": (mean, std), "laplace": (mean, 1.5 * std)}, y


def test_report_of_the_contract(data, tmp_path: Path) -> None:
    predictions, y = data
    report = calibration_report(predictions, y, task="multiclass")
    assert isinstance(report, CalibrationReport)
    assert isinstance(report.metrics["laplace"]["ece"], Estimate)
    paths = report.save(tmp_path / "new" / "report")
    assert paths == tuple(tmp_path / "new" / "report" / f"report.{f}" for f in ("html", "json", "md"))
    assert [p.read_text(encoding="utf-8") for p in paths] == [report.to_html(), report.to_json(), report.to_markdown()]
    assert report.save(tmp_path / "new" / "report", formats=("md",)) == (paths[2],)
    assert "CalibrationReport(multiclass, n=300" in repr(report)


def test_summary_judges_the_posterior_against_the_baseline(data) -> None:
    predictions, y = data
    report = calibration_report(predictions, y, task="multiclass")
    verdicts = {c.metric: c.verdict for c in report.comparisons if (c.method, c.baseline) == ("laplace", "map")}
    assert (verdicts["nll"], verdicts["brier"], verdicts["error"]) == ("better", "better", "no detectable difference")
    first = str(report).splitlines()[1]
    assert first.startswith("laplace is better than map (NLL ")
    assert ", but not detectably different from temperature-scaled map (" in first
    assert "neither over- nor under-confident detectably" in first
    size, low, high = map(float, re.search(r"NLL ([\d.]+) lower \[([\d.]+), ([\d.]+)\]", first).groups())
    assert 0 < low < size < high
    other = calibration_report(predictions, y, task="multiclass", baseline="laplace")
    first = str(other).splitlines()[1]
    assert first.startswith(
        "CAUTION, worse than laplace and temperature-scaled laplace: map is worse than laplace (NLL "
    )
    assert "over-confident by" in first
    assert "class=harm>CAUTION" in other.to_html()
    assert "CAUTION" not in report.to_html()


def test_one_method_has_no_comparisons(data) -> None:
    predictions, y = data
    report = calibration_report({"map": predictions["map"]}, y, task="multiclass", temperature_scaling="none")
    assert report.comparisons == ()
    assert report.scaling is None
    assert "map: NLL" in str(report)
    assert "Differences to" not in report.to_html() + report.to_markdown()


def test_regression_report(regression) -> None:
    predictions, y = regression
    report = calibration_report(predictions, y, task="regression")
    assert "laplace is better than map (NLL " in str(report)
    found = {(c.metric, c.verdict) for c in report.comparisons if (c.method, c.baseline) == ("laplace", "map")}
    assert found == {("nll", "better"), ("crps", "better")}
    assert "over-confident (errors are 1." in str(calibration_report({"map": predictions["map"]}, y, task="regression"))
    stored = json.loads(report.to_json())
    assert stored["data"]["n_outputs"] == 1
    assert len(stored["methods"]["map"]["curves"]["coverage"]) == 19
    assert "n_bins" not in stored["settings"]


FORMS = {
    "numpy": (lambda p: p.numpy(), lambda y: y.numpy()),
    "lists": (lambda p: p.tolist(), lambda y: y.tolist()),
    "gradient": (lambda p: p.clone().requires_grad_(True), lambda y: y),
    "one-hot": (lambda p: p, lambda y: torch.nn.functional.one_hot(y, 10)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_input_changes_no_byte(data, monkeypatch, form: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    predictions, y = data
    as_p, as_y = FORMS[form]
    given = calibration_report({m: as_p(p) for m, p in predictions.items()}, as_y(y), task="multiclass", n_resamples=50)
    assert given.to_json() == calibration_report(predictions, y, task="multiclass", n_resamples=50).to_json()


def test_float32_changes_only_rounding(data) -> None:
    predictions, y = data
    exact = calibration_report(predictions, y, task="multiclass").metrics
    single = calibration_report({m: p.float() for m, p in predictions.items()}, y, task="multiclass").metrics
    for name in ("nll", "brier", "accuracy", "confidence_gap"):
        assert single["map"][name].value == pytest.approx(exact["map"][name].value, abs=1e-6)


def test_same_seed_same_bytes_other_seed_other_bytes(data, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    predictions, y = data
    options = {"title": "t", "description": "d", "metadata": {"rank": 3}, "figures": [ReportFigure("f", SVG, "alt")]}
    one, two = (calibration_report(predictions, y, task="multiclass", **options) for _ in range(2))
    other = calibration_report(predictions, y, task="multiclass", seed=1, **options)
    assert one.created == "2023-11-14T22:13:20+00:00"
    for render in ("to_json", "to_html", "to_markdown"):
        assert getattr(one, render)() == getattr(two, render)() == getattr(one, render)()
    assert one.to_json() != other.to_json()


def test_only_the_time_differs_between_runs(data, monkeypatch) -> None:
    predictions, y = data
    texts = []
    for epoch in ("1700000000", "1800000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        texts.append(calibration_report(predictions, y, task="multiclass", n_resamples=50).to_json().splitlines())
    different = [a for a, b in zip(*texts, strict=True) if a != b]
    assert len(different) == 1
    assert '"created"' in different[0]


def test_bad_epoch(data, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ValueError, match=r"SOURCE_DATE_EPOCH.*yesterday"):
        calibration_report(*data, task="multiclass")


def test_json_says_everything(data) -> None:
    predictions, y = data
    table = ReportTable("Cost", ["method", "seconds"], [["map", np.float32(0.5)], ["laplace", None]], note="wall time")
    report = calibration_report(
        predictions, y, task="multiclass", metadata={"rank": np.int64(4), "λ": 0.5}, tables=[table], title="T"
    )
    stored = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert stored["schema_version"] == "1.0"
    assert stored["task"] == "multiclass"
    assert stored["metadata"] == {"rank": 4, "λ": 0.5}
    assert set(stored["software"]) == {"python", "debiased-laplace", "netcal", "torch", "numpy", "matplotlib"}
    assert (stored["data"]["n"], stored["data"]["n_classes"], len(stored["data"]["targets_sha256"])) == (300, 10, 64)
    assert stored["settings"]["n_resamples"] == 1000
    ece = stored["methods"]["map"]["metrics"]["ece"]
    assert ece["low"] is None
    assert "bootstrap" in ece["reason"]
    assert ece["better"] == "lower"
    bins = stored["methods"]["map"]["curves"]["bins"]
    assert sum(b["n"] for b in bins) == 300
    assert stored["comparisons"][0]["verdict"] == "better"
    assert stored["tables"] == [
        {
            "title": "Cost",
            "columns": ["method", "seconds"],
            "rows": [["map", 0.5], ["laplace", None]],
            "note": "wall time",
        }
    ]
    assert stored["summary"][0] in str(report)


def test_targets_have_a_fingerprint(data) -> None:
    predictions, y = data
    changed = y.clone()
    changed[0] = (changed[0] + 1) % 10
    digests = [
        calibration_report(predictions, t, task="multiclass", n_resamples=2).data.targets_sha256
        for t in (y, y.int(), changed)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_markdown_has_tables_and_escapes(data) -> None:
    predictions, y = data
    renamed = {"a|b *c*": predictions["map"], "d": predictions["laplace"]}
    text = calibration_report(
        renamed, y, task="multiclass", tables=[ReportTable("Cost", ["m"], [["x|y"]], note="wall time")]
    ).to_markdown()
    table = [line for line in text.split("## Metrics")[1].splitlines() if line.startswith("|")]
    assert "a\\|b \\*c\\*" in table[0]
    assert "x\\|y" in text
    assert "wall time" in text
    assert text.count("| laplace") == 0
    assert {line.replace("\\|", "").count("|") for line in table[:8]} == {5}


def test_few_samples_few_draws_and_absent_classes_are_warned_about() -> None:
    p = np.full((5, 3), 1 / 3)
    report = calibration_report(
        {"net": p}, [0, 0, 1, 1, 0], task="multiclass", n_resamples=20, class_names=["ant", "bee", "cat"]
    )
    text = " ".join(report.warnings)
    assert "Only 5 test samples" in text
    assert "Only 20 resamples" in text
    assert "1 of 3 classes: cat" in text
    assert all(w in str(report) for w in report.warnings)
    assert 'href="#warnings"' in report.to_html()


def test_enough_of_everything_raises_no_warning(data) -> None:
    assert calibration_report(*data, task="multiclass").warnings == ()


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_a_single_sample_is_reported_without_intervals(task) -> None:
    given = [0.8] if task == "binary" else ([1.0], [0.5])
    report = calibration_report({"a": given, "b": given}, [1], task=task)
    assert report.metrics["a"]["nll"].low is None
    assert {c.verdict for c in report.comparisons} == {"no detectable difference"}
    json.loads(report.to_json(), parse_constant=pytest.fail)
    assert "</html>" in report.to_html()
    assert report.to_markdown()


def test_one_class_only_and_saturated(tmp_path: Path) -> None:
    p = np.tile([1.0, 0.0, 0.0], (40, 1))
    report = calibration_report({"net": p, "same": p}, np.zeros(40, dtype=int), task="multiclass")
    assert report.metrics["net"]["ece"].value == pytest.approx(0, abs=1e-12)
    assert report.comparisons[0].p_value == 1.0
    assert len(report.save(tmp_path)) == 3


def test_input_is_left_as_it_was(data) -> None:
    predictions, y = data
    before = {m: p.clone() for m, p in predictions.items()}
    state = torch.get_rng_state()
    calibration_report(predictions, y, task="multiclass").to_html()
    assert all(torch.equal(before[m], p) for m, p in predictions.items())
    assert torch.equal(state, torch.get_rng_state())


P, Y = [[0.4, 0.6], [0.7, 0.3]], [1, 0]
WRONG = {
    "no method": ({}, Y, {}, "at least one.*empty"),
    "unknown baseline": ({"a": P}, Y, {"baseline": "b"}, "'a'; got 'b'"),
    "blank name": ({" ": P}, Y, {}, "printable"),
    "name with a line break": ({"a\nb": P}, Y, {}, "printable"),
    "other number of classes": ({"a": P, "b": [[0.2, 0.3, 0.5]] * 2}, Y, {}, "same classes.*'b': 3"),
    "other number of samples": ({"a": P, "b": [*P, [0.5, 0.5]]}, Y, {}, "'b' have 3 rows"),
    "too few class names": ({"a": P}, Y, {"class_names": ["x"]}, "2 classes; got 1"),
    "one bin": ({"a": P}, Y, {"n_bins": 1}, "n_bins.*at least 2; got 1"),
    "one resample": ({"a": P}, Y, {"n_resamples": 1}, "n_resamples"),
    "negative seed": ({"a": P}, Y, {"seed": -1}, "seed"),
    "level in percent": ({"a": P}, Y, {"confidence_level": 95.0}, "between 0 and 1; got 95"),
    "seed of 64 bits": ({"a": P}, Y, {"seed": 2**63}, "seed must be below"),
    "class names in one text": (
        {"a": P},
        Y,
        {"class_names": "ab"},
        "class_names and levels must be sequences; got 'ab'",
    ),
    "metadata beyond floats": ({"a": P}, Y, {"metadata": {"x": 10**400}}, "a float can hold in metadata 'x'"),
    "NaN in metadata": ({"a": P}, Y, {"metadata": {"x": float("nan")}}, "finite number in metadata 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named(case: str) -> None:
    predictions, targets, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        calibration_report(predictions, targets, task="multiclass", **options)


def test_class_names_without_classes(regression) -> None:
    with pytest.raises(ValueError, match="no classes"):
        calibration_report(*regression, task="regression", class_names=["x"])


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [(["a"], [[1, 2]], "1 columns, but row 0 has 2"), (["a"], [[float("inf")]], "finite"), (["a"], [[[1]]], "list"),
     (["a"], [[np.ones(2)]], "an array")],
)  # fmt: skip
def test_wrong_tables_are_named(columns, rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReportTable("t", columns, rows)


def test_unknown_formats_are_refused_before_anything_is_written(data, tmp_path: Path) -> None:
    report = calibration_report(*data, task="multiclass", n_resamples=10)
    for formats in ((), ("html", "pdf"), "html"):
        with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="formats"):
            report.save(tmp_path / "x", formats=formats)
    assert not (tmp_path / "x").exists()


ISOLATED = """
import sys, types
package = types.ModuleType("debiased_laplace"); package.__path__ = [{path!r}]
sys.modules["debiased_laplace"] = package  # this room alone, without what the package imports beside it
import debiased_laplace.calibration as room
loaded = [m for m in ("netcal", "pyro", "gpytorch", "matplotlib.pyplot", "matplotlib") if m in sys.modules]
assert not loaded, loaded
P, Y = [[0.4, 0.6], [0.7, 0.3]], [1, 0]
report = room.calibration_report({{"a": P}}, Y, task="binary")
report.to_html()
assert "matplotlib" in sys.modules and "netcal" in sys.modules
assert not [m for m in ("pyro", "gpytorch", "matplotlib.pyplot") if m in sys.modules]
for call, expected in (
    (lambda: room.calibration_report({{"a": P}}, Y, task="ranking"), "task must be one of 'binary'"),
    (lambda: room.calibration_report([P], Y, task="binary"), "got list"),
    (lambda: room.calibration_report({{1: P}}, Y, task="binary"), "printable text; got 1"),
    (lambda: room.calibration_report({{"a": P}}, Y, task="binary", n_bins=2.5), "n_bins must be a whole number"),
    (lambda: room.calibration_report({{"a": P}}, Y, task="binary", title=3), "title must be text; got int"),
    (lambda: room.calibration_report({{"a": P}}, Y, task="binary", levels=0.9), "must be sequences; got None and 0.9"),
    (lambda: report.save("x", formats="html"), "formats must be a sequence"),
    (lambda: report.save("x", formats=("html", "pdf")), "formats must be a sequence"),
):
    try:
        call()
    except ValueError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(expected)
"""


def test_import_is_light_and_wrong_types_are_value_errors() -> None:
    """In a process of its own: nothing heavy is loaded yet, and no type checker steps in before the message."""
    path = str(Path(room.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", ISOLATED.format(path=path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
