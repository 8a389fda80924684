"""The published schema: reports are valid, what is broken is not, and the files are those that the code gives."""

import copy
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

import debiased_laplace.calibration.documents as room
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.documents.report_schema import render_schema, report_schema
from debiased_laplace.calibration.documents.schema import describe_attributes, describe_dataclass, describe_type
from debiased_laplace.calibration.metrics.definitions import define_metrics

PUBLISHED = (
    Path(room.__file__).with_name("report.schema.json"),
    Path(__file__).parents[3] / "docs" / "report.schema.json",
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression", "two outputs"])
def test_reports_of_every_task_are_valid(stored_reports, validator, task: str) -> None:
    validator.validate(json.loads(stored_reports[task].to_json()))


BROKEN: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "another version": (("schema_version",), "0.9"),
    "another task": (("task",), "ranking"),
    "the curves of another task": (("task",), "regression"),
    "an unknown field": (("colour",), "red"),
    "an unknown metric": (("methods", "map", "metrics", "nlll"), {}),
    "an unknown field of a metric": (("methods", "map", "metrics", "nll", "colour"), "red"),
    "text for a number": (("methods", "map", "metrics", "nll", "value"), "low"),
    "another direction": (("methods", "map", "metrics", "nll", "better"), "upwards"),
    "a fraction of a sample": (("data", "n"), 2.5),
    "another verdict": (("comparisons", 0, "verdict"), "superb"),
    "an object for a list": (("warnings",), {}),
    "a number in a warning": (("warnings",), [1]),
    "an array in a table": (("tables", 0, "rows"), [[[1]]]),
    "another outcome": (("checks", 0, "status"), "maybe"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_reports_are_not_valid(stored_reports, validator, case: str) -> None:
    document = json.loads(stored_reports["multiclass"].to_json())
    assert validator.is_valid(document)
    path, value = BROKEN[case]
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not validator.is_valid(document)


def test_every_required_field_is_missed(stored_reports, validator) -> None:
    document = json.loads(stored_reports["multiclass"].to_json())
    required = report_schema()["required"]
    assert "schema_version" in required
    for name in required:
        less = copy.copy(document)
        del less[name]
        assert not validator.is_valid(less), name


def test_every_field_and_every_metric_is_described(validator) -> None:
    schema = validator.schema
    for f in fields(ReportContents):
        assert schema["properties"][f.name]["description"], f.name
    for name, task in (("ClassificationMetrics", "multiclass"), ("RegressionMetrics", "regression")):
        described = schema["$defs"][name]
        for metric, definition in define_metrics(task).items():
            if metric in described["properties"]:
                assert definition.meaning in described["properties"][metric]["description"]
                assert described["properties"][metric]["title"] == definition.label
            else:
                assert metric.startswith(("picp_", "mpiw_"))


def test_numbered_metrics_are_one_pattern(stored_reports, validator) -> None:
    patterns = validator.schema["$defs"]["RegressionMetrics"]["patternProperties"]
    assert set(patterns) == {"^picp_[1-9][0-9]?$", "^mpiw_[1-9][0-9]?$"}
    document = json.loads(stored_reports["regression"].to_json())
    metrics = document["methods"]["map"]["metrics"]
    metrics["picp_99"] = metrics["picp_50"]
    assert validator.is_valid(document)
    metrics["picp_100"] = metrics["picp_50"]
    assert not validator.is_valid(document)


@pytest.mark.parametrize("path", PUBLISHED, ids=["package", "docs"])
def test_the_published_files_are_up_to_date(path: Path) -> None:
    """Else, with D = debiased_laplace/calibration/documents:

    debiased-laplace schema | tee docs/report.schema.json > D/report.schema.json
    """
    assert path.read_text(encoding="utf-8") == render_schema()


@dataclass(frozen=True)
class Example:
    """First line.

    Second line: no field.

    Attributes:
        one: a word,
            on two lines.
        two: a pair: of things.

    Raises:
        ValueError: never.
    """

    one: Literal["a", "b"]
    two: tuple[int, str]
    rest: "tuple[Example, ...]" = ()


def test_dataclasses_become_objects() -> None:
    definitions: dict[str, Any] = {}
    assert describe_type(Example | None, definitions) == {"anyOf": [{"$ref": "#/$defs/Example"}, {"type": "null"}]}
    described = definitions["Example"]
    assert described == describe_dataclass(Example, definitions)
    assert described["description"] == "First line."
    assert described["required"] == ["one", "two"]
    assert described["additionalProperties"] is False
    assert described["properties"]["one"] == {"enum": ["a", "b"], "description": "a word, on two lines."}
    pair = {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2}
    assert described["properties"]["two"] == {**pair, "description": "a pair: of things."}
    assert described["properties"]["rest"] == {"type": "array", "items": {"$ref": "#/$defs/Example"}}


def test_attributes_end_with_their_section() -> None:
    assert describe_attributes(Example) == {"one": "a word, on two lines.", "two": "a pair: of things."}
    assert describe_attributes(int) == {}


def test_numbers_are_one_type() -> None:
    assert describe_type(str | int | float | None, {}) == {"type": ["string", "number", "null"]}
    with pytest.raises(TypeError, match="complex"):
        describe_type(complex, {})
