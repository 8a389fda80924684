"""A report and its JSON: everything is there, everything comes back, and what is wrong is refused with its place."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from debiased_laplace.calibration import CalibrationReport
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.document import from_json, json_schema, to_json

RENDERINGS = ("to_json", "to_html", "to_markdown", "to_csv", "__str__")


@pytest.fixture(params=["classification", "regression"])
def report(request) -> CalibrationReport:
    return request.getfixturevalue(f"{request.param}_report")


def test_a_stored_report_comes_back_and_renders_to_the_same_bytes(report, tmp_path: Path) -> None:
    (path,) = report.save(tmp_path, formats=("json",))
    for source in (report.to_json(), path, str(path)):
        again = CalibrationReport.from_json(source)
        assert type(again) is CalibrationReport
        assert again == report
    for name in RENDERINGS:
        assert getattr(again, name)() == getattr(report, name)(), name
    assert same_types(again, report) > 1000


def same_types(one: Any, other: Any) -> int:
    """How many values were compared: tuples are tuples, whole numbers are whole; mappings keep their order."""
    assert type(one) is type(other)
    if hasattr(one, "__dict__"):
        one, other = vars(one), vars(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = tuple(one.values()), tuple(other.values())
    return sum(map(same_types, one, other)) if isinstance(one, tuple) else 1


def test_documents_follow_their_schema_and_broken_ones_do_not(report) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = json.loads(report.to_json())
    validator.validate(document)
    assert not validator.is_valid(document | {"colour": "red"})
    assert not validator.is_valid(document | {"warnings": [1]})


def test_numbers_that_are_not_finite_are_never_written(make_contents) -> None:
    with pytest.raises(ValueError, match="inf"):
        to_json(make_contents({"map": {}}, metadata={"x": float("inf")}))


def test_fields_with_a_default_may_be_missing(classification_report) -> None:
    document = json.loads(classification_report.to_json())
    for name in ("checks", "posteriors", "predicted", "summary", "ood"):
        del document[name]
    read = from_json(ReportContents, json.dumps(document))
    assert (read.checks, read.summary, read.ood) == ((), (), {})
    assert read.methods == classification_report.methods


REMOVE = object()
NLL = "methods/map/metrics/nll"
BROKEN = {
    "a newer version": ("schema_version", "2.1", "newer schema_version 2.1; update debiased-laplace"),
    "a much newer version": ("schema_version", "10.0", "newer schema_version 10.0; update"),
    "an older version": ("schema_version", "1.0", "older schema_version 1.0; make the report again"),
    "no version": ("schema_version", REMOVE, "at schema_version: expected '2.0'; got None"),
    "a version that is none": ("schema_version", 2.0, "at schema_version: .*got 2.0"),
    "no methods": ("methods", REMOVE, "at methods: Field required"),
    "another task": ("task", "ranking", "at task: Input should be 'binary'"),
    "text for a value": (f"{NLL}/value", "low", "at methods.map.metrics.nll.value: Input should be a valid number"),
    "true for a value": (f"{NLL}/value", True, "at methods.map.metrics.nll.value: Input should be a valid number"),
    "half a sample": (f"{NLL}/n", 1.5, "at methods.map.metrics.nll.n: Input should be a valid integer"),
    "half an interval": (f"{NLL}/low", None, "at methods.map.metrics.nll: Expected an interval"),
    "a whole number beyond floats": (f"{NLL}/value", 10**400, "at methods.map.metrics.nll.value: "),
    "a place inside a union": ("methods/map/curves/bins/0/n", "x", r"at methods.map.curves.\w+.bins.0.n: .*integer"),
    "a baseline that is missing": ("baseline", "x", "'x' is no method of it"),
    "a comparison with nobody": ("comparisons/0/baseline", "x", "'x' is no method of it"),
    "a metric that nobody explains": ("definitions/nll", REMOVE, "'nll' is no metric with a definition of it"),
    "intervals of unknown coverage": ("settings/confidence_level", REMOVE, "'confidence_level' is no setting of it"),
    "an interval from right to left": (f"{NLL}/low", 1e9, "at methods.map.metrics.nll: Expected low <= high"),
    "an unknown field": ("data/colour", "red", "at data.colour: "),
    "an array in a cell": ("tables/0/rows/0/0", [1], "at tables.0"),
    "a table with ragged rows": ("tables/0/rows", [[1]], "at tables.0: .*2 columns, but row 0 has 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_documents_are_refused_with_the_place(classification_report, case: str) -> None:
    path, value, message = BROKEN[case]
    document: Any = json.loads(classification_report.to_json())
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    place = document
    for key in parents:
        place = place[key]
    if value is REMOVE:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ValueError, match=f"^The JSON text .*{message}"):
        CalibrationReport.from_json(json.dumps(document))


NO_JSON = {
    "cut off": (lambda t: t[:-20], "is no JSON: EOF"),
    "NaN": (lambda t: t.replace('"map"', "NaN", 1), "is no JSON"),
    "Infinity": (lambda t: t.replace('"map"', "-Infinity", 1), "is no JSON"),
    "nested without end": (lambda t: '{"a":' * 200_000, "is no JSON: recursion"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_what_is_no_json_is_refused(classification_report, case: str) -> None:
    edit, message = NO_JSON[case]
    with pytest.raises(ValueError, match=message):
        CalibrationReport.from_json(edit(classification_report.to_json()))


def test_files_that_are_no_reports(tmp_path: Path) -> None:
    for source in ("nowhere.json", ""):
        with pytest.raises(FileNotFoundError, match=f"there is no file '{source}'"):
            CalibrationReport.from_json(source)
    path = tmp_path / "report.json"
    for data, message in ((b"\x89PNG\xff", "is no JSON"), (b"[]", "is no report: at schema_version")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"report.json {message}"):
            CalibrationReport.from_json(path)


def test_a_byte_order_mark_does_not_hide_a_report(classification_report, tmp_path: Path) -> None:
    text = "\ufeff" + classification_report.to_json()
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    for source in (text, tmp_path / "report.json"):
        assert CalibrationReport.from_json(source).to_json() == classification_report.to_json()
