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
BOM = "\ufeff"


@pytest.fixture(params=["classification", "regression"])
def report(request) -> CalibrationReport:
    return request.getfixturevalue(f"{request.param}_report")


def test_a_stored_report_comes_back_and_renders_to_the_same_bytes(report, tmp_path: Path) -> None:
    (path,) = report.save(tmp_path, formats=("json",))
    marked = tmp_path / "marked.json"
    marked.write_text(BOM + report.to_json(), encoding="utf-8")
    for source in (path, str(path), marked, BOM + report.to_json(), report.to_json()):
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
    schema, document = json_schema(), json.loads(report.to_json())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(document)
    assert not validator.is_valid(document | {"colour": "red"})
    assert not validator.is_valid(document | {"warnings": [1]})


def test_fields_with_a_default_may_be_missing_and_infinite_numbers_are_not_written(
    classification_report, make_contents
) -> None:
    document = json.loads(classification_report.to_json())
    for name in ("checks", "posteriors", "predicted", "summary", "ood"):
        del document[name]
    read = from_json(ReportContents, json.dumps(document))
    assert (read.checks, read.summary, read.ood) == ((), (), {})
    assert read.methods == classification_report.methods
    with pytest.raises(ValueError, match="inf"):
        to_json(make_contents({"map": {}}, metadata={"x": float("inf")}))


REMOVE = object()


def put(path: str, value: Any):
    """Return the edit of a text that sets or removes one place of the document."""

    def edit(text: str) -> str:
        place = document = json.loads(text)
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in parents:
            place = place[key]
        if value is REMOVE:
            del place[last]
        else:
            place[last] = value
        return json.dumps(document)

    return edit


NLL, AT_NLL = "methods/map/metrics/nll", "at methods.map.metrics.nll"
BROKEN = {
    "a newer version": (put("schema_version", "2.2"), "newer schema_version 2.2; update debiased-laplace"),
    "a much newer version": (put("schema_version", "10.0"), "newer schema_version 10.0; update"),
    "an older version": (put("schema_version", "1.0"), "older schema_version 1.0; make the report again"),
    "no version": (put("schema_version", REMOVE), "at schema_version: expected '2.1'; got None"),
    "a version that is none": (put("schema_version", 2.0), "at schema_version: .*got 2.0"),
    "no methods": (put("methods", REMOVE), "at methods: Field required"),
    "another task": (put("task", "ranking"), "at task: Input should be 'binary'"),
    "true for a value": (put(f"{NLL}/value", True), f"{AT_NLL}.value: Input should be a valid number"),
    "half a sample": (put(f"{NLL}/n", 1.5), f"{AT_NLL}.n: Input should be a valid integer"),
    "half an interval": (put(f"{NLL}/low", None), f"{AT_NLL}: Expected an interval"),
    "an interval from right to left": (put(f"{NLL}/low", 1e9), f"{AT_NLL}: Expected low <= high"),
    "a whole number beyond floats": (put(f"{NLL}/value", 10**400), f"{AT_NLL}.value: "),
    "a place inside a union": (put("methods/map/curves/bins/0/n", "x"), r"map.curves.\w+.bins.0.n: .*integer"),
    "a baseline that is missing": (put("baseline", "x"), "it has no method 'x'"),
    "a comparison with nobody": (put("comparisons/0/baseline", "x"), "it has no method 'x'"),
    "a metric that nobody explains": (put("definitions/nll", REMOVE), "it has no metric with a definition 'nll'"),
    "intervals of unknown coverage": (put("settings/confidence_level", REMOVE), "no setting 'confidence_level'"),
    "an unknown field": (put("data/colour", "red"), "at data.colour: "),
    "an array in a cell": (put("tables/0/rows/0/0", [1]), "at tables.0"),
    "a table with ragged rows": (put("tables/0/rows", [[1]]), "at tables.0: .*2 columns, but row 0 has 1"),
    "cut off": (lambda text: text[:-20], "is not JSON: EOF"),
    "NaN": (lambda text: text.replace('"map"', "NaN", 1), "is not JSON"),
    "Infinity": (lambda text: text.replace('"map"', "-Infinity", 1), "is not JSON"),
    "nested without end": (lambda text: '{"a":' * 200_000, "is not JSON: recursion"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_documents_are_refused_with_the_place(classification_report, case: str) -> None:
    edit, message = BROKEN[case]
    with pytest.raises(ValueError, match=f"^The JSON text .*{message}"):
        CalibrationReport.from_json(edit(classification_report.to_json()))


def test_files_that_are_no_reports(tmp_path: Path) -> None:
    for source in ("nowhere.json", ""):
        with pytest.raises(FileNotFoundError, match=f"there is no file '{source}'"):
            CalibrationReport.from_json(source)
    path = tmp_path / "report.json"
    for data, message in ((b"\x89PNG\xff", "is not JSON"), (b"[]", "is not a report: at schema_version")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"report.json {message}"):
            CalibrationReport.from_json(path)
