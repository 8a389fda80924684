"""A report and its JSON: everything is there, and everything comes back."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from debiased_laplace.calibration import CalibrationReport, Estimate, ReportFigure, ReportTable, calibration_report
from debiased_laplace.calibration.contents import ClassificationCurves, RegressionCurves
from debiased_laplace.calibration.rendering.json_document import SCHEMA_VERSION, describe

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text>x</text></svg>'
RENDERINGS = ("to_json", "to_html", "to_markdown", "to_csv", "__str__")


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression", "two outputs"])
def test_a_stored_report_renders_to_the_same_bytes(stored_reports, task: str, tmp_path: Path) -> None:
    report = stored_reports[task]
    (path,) = report.save(tmp_path, formats=("json",))
    for source in (report.to_json(), path, str(path)):
        again = CalibrationReport.from_json(source)
        assert again == report
    for name in RENDERINGS:
        assert getattr(again, name)() == getattr(report, name)()
    for table in ("comparisons", "ood"):
        assert again.to_csv(table) == report.to_csv(table)


def fill(kind: Any, depth: int = 0) -> Any:
    """A value of a type in which nothing has its default."""
    origin, members = get_origin(kind), get_args(kind)
    if kind is Estimate:
        return Estimate(0.25, 0.125, 0.5, 0.0625, 17, "by hand")
    if kind is ReportFigure:
        return ReportFigure("figure", SVG, "what it shows", "note")
    if kind is ReportTable:
        return ReportTable("table", ("a", "b"), ((1, None), (2.5, "x")), "note")
    if is_dataclass(kind):
        return kind(**{name: fill(hint, depth + 1) for name, hint in get_type_hints(kind).items()})
    if origin is Literal:
        return members[-1]
    if origin is tuple:
        kinds = members[:1] * 2 if members[-1] is Ellipsis else members
        return tuple(fill(k, depth + 1) for k in kinds)
    if origin is not None and issubclass(origin if isinstance(origin, type) else object, Mapping):
        return {"nll" if members[1] is Estimate else "key / ~ «»": fill(members[1], depth + 1)}
    if origin in (Union, type(int | None)):
        return fill(next(m for m in members if m is not type(None)), depth + 1)
    return {str: 'text with "quotes", <tags> and \u2028', int: 7, float: 0.1 + 0.2, bool: True, Any: "any"}[kind]


def full_report(base: CalibrationReport) -> CalibrationReport:
    """Every field of every dataclass has a value that is not its default, but for what must refer to each other."""
    kept = {"task", "settings", "baseline", "comparisons", "methods"}
    hints = get_type_hints(CalibrationReport)
    given = {f.name: fill(hints[f.name]) for f in fields(CalibrationReport) if f.name not in kept}
    curves = fill(RegressionCurves if base.task == "regression" else ClassificationCurves)
    results = {}
    for name, result in base.methods.items():
        others = {f.name: fill(get_type_hints(type(result))[f.name]) for f in fields(result)}
        results[name] = replace(result, **{**others, "metrics": result.metrics, "curves": curves})
    return replace(base, methods=results, **given)


def differs_from_default(value: Any) -> None:
    """Fails for a field that `fill` left at its default, so that the round trip would not notice its loss."""
    if is_dataclass(value):
        for f in fields(value):
            default = (
                f.default
                if f.default is not MISSING
                else f.default_factory()
                if callable(f.default_factory)
                else MISSING
            )
            if not isinstance(value, Estimate):
                assert getattr(value, f.name) != default, f"{type(value).__name__}.{f.name}"
            differs_from_default(getattr(value, f.name))
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ():
        differs_from_default(item)


def holds_every_field(value: Any, document: Any, where: str) -> int:
    """How many fields of dataclasses were found in the document under their own names."""
    found = 0
    if is_dataclass(value):
        for f in fields(value):
            assert f.name in document, f"{where}.{f.name} is not in the document"
            found += 1 + holds_every_field(getattr(value, f.name), document[f.name], f"{where}.{f.name}")
    elif isinstance(value, Mapping):
        assert list(value) == list(document), where
        found += sum(holds_every_field(value[k], document[k], f"{where}[{k}]") for k in value)
    elif isinstance(value, tuple):
        assert len(value) == len(document), where
        found += sum(holds_every_field(v, d, where) for v, d in zip(value, document, strict=True))
    else:
        assert type(value) is type(document), where
        assert value == document, where
    return found


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_no_field_of_any_dataclass_is_forgotten(stored_reports, task: str) -> None:
    """Of a report in which every field has a value: a field that is added later is in it without a line here."""
    report = full_report(stored_reports[task])
    for f in fields(report):
        if f.name not in ("task", "settings", "baseline", "comparisons", "methods", "description"):
            differs_from_default(getattr(report, f.name))
    document = json.loads(report.to_json())
    assert holds_every_field(report, document, "report") > 300
    assert CalibrationReport.from_json(report.to_json()) == report


def test_metrics_say_which_way_is_better_and_in_which_unit(stored_reports) -> None:
    metrics = describe(stored_reports["two outputs"])["methods"]["map"]["metrics"]
    assert (metrics["crps"]["better"], metrics["crps"]["unit"]) == ("lower", "unit of the targets")
    assert (metrics["z_scale"]["better"], metrics["z_scale"]["unit"]) == ("one", "")
    outputs = describe(stored_reports["two outputs"])["methods"]["map"]["curves"]["outputs"]
    assert [o["metrics"]["rmse"]["unit"] for o in outputs] == ["unit of the targets"] * 2


def change(path: str, value: Any):
    """A document with another value at a place; REMOVE takes it out."""

    def edit(document: dict[str, Any]) -> dict[str, Any]:
        *parents, last = path.split("/")
        place: Any = document
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        if value is REMOVE:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
        return document

    return edit


REMOVE = object()
BROKEN = {
    "a newer version": (change("schema_version", "1.1"), "version 1.1 is newer than 1.0.*update it"),
    "a much newer version": (change("schema_version", "2.0"), "version 2.0 is newer"),
    "no version": (change("schema_version", REMOVE), "at /schema_version: expected a version such as '1.0'; got null"),
    "a version that is none": (change("schema_version", 1.0), "at /schema_version: .*got 1.0"),
    "no methods": (change("methods", REMOVE), "CalibrationReport lacks 'methods'"),
    "another task": (change("task", "ranking"), "at /task: expected one of 'binary'"),
    "curves of another task": (change("task", "regression"), "at /methods/map/curves: these are not the curves"),
    "text for a value": (change("methods/map/metrics/nll/value", "low"), "at /methods/map/metrics/nll/value: .*'low'"),
    "half an interval": (change("methods/map/metrics/nll/low", None), "at /methods/map/metrics/nll: An estimate has"),
    "an unknown metric": (change("methods/map/metrics/nlll", None), "at /methods/map/metrics/nlll: expected an object"),
    "a metric that is missing": (change("methods/map/metrics/nll", REMOVE), "/methods/map/metrics: expected a metric"),
    "a baseline that is missing": (change("baseline", "x"), "at /baseline: expected one of the methods"),
    "a comparison with nobody": (change("comparisons/0/baseline", "x"), "at /comparisons/0: expected names of methods"),
    "no confidence level": (change("settings/confidence_level", REMOVE), "at /settings/confidence_level"),
    "an unknown field": (change("data/colour", "red"), "at /data: DataSummary has no field 'colour'"),
    "a script in a figure": (change("figures/0/svg", "<svg><script/></svg>"), "at /figures/0: .*script"),
    "a table with ragged rows": (change("tables/0/rows", [[1]]), "at /tables/0: .*2 columns, but row 0 has 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_documents_are_refused_with_the_place(stored_reports, case: str) -> None:
    edit, message = BROKEN[case]
    document = edit(json.loads(stored_reports["multiclass"].to_json()))
    with pytest.raises(ValueError, match=message):
        CalibrationReport.from_json(json.dumps(document))


NO_JSON = {
    "cut off": (lambda t: t[:-20], "is no JSON.*line"),
    "NaN": (lambda t: t.replace('"baseline": "map"', '"baseline": NaN'), "NaN is no JSON number"),
    "a key twice": (lambda t: t.replace('"task":', '"title": "x", "task":'), "the key 'title' stands twice"),
    "an array": (lambda t: "[]", "expected an object; got an array of 0"),
    "nested without end": (lambda t: "[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_what_is_no_json_is_refused(stored_reports, case: str) -> None:
    edit, message = NO_JSON[case]
    with pytest.raises(ValueError, match=message):
        CalibrationReport.from_json(edit(stored_reports["multiclass"].to_json()))


def test_files_that_are_no_reports(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere\.json'"):
        CalibrationReport.from_json("nowhere.json")
    (tmp_path / "image.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        CalibrationReport.from_json(tmp_path / "image.json")


def test_older_documents_lack_what_was_added_with_a_default(stored_reports) -> None:
    document = json.loads(stored_reports["multiclass"].to_json())
    for name in ("checks", "posteriors", "predicted", "summary"):
        del document[name]
    for result in document["methods"].values():
        del result["score_sums"]
    read = CalibrationReport.from_json(json.dumps(document))
    assert read.checks == ()
    assert read.methods["map"].score_sums == {}


def test_the_version_is_two_numbers() -> None:
    assert [int(n) for n in SCHEMA_VERSION.split(".")] == [1, 0]


def test_json_comes_with_the_outcomes_of_thresholds(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=2.0, seed=41)
    report = calibration_report({"map": p}, y, task="multiclass", thresholds=[{"metric": "nll", "max": 0.1}])
    (outcome,) = json.loads(report.to_json())["checks"]
    assert (outcome["status"], outcome["maximum"], outcome["method"]) == ("failed", 0.1, "map")
