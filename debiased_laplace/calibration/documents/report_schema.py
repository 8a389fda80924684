"""The published JSON Schema of report.json, from the dataclasses that hold a report and the definitions of metrics."""

import json
import re
from collections import Counter
from typing import Any

from debiased_laplace.calibration.contents import ClassificationCurves, RegressionCurves, ReportContents
from debiased_laplace.calibration.documents.schema import describe_dataclass, describe_type
from debiased_laplace.calibration.metrics.definitions import MetricDefinition, define_metrics
from debiased_laplace.calibration.metrics.metric_definition import DIRECTIONS
from debiased_laplace.calibration.rendering.json_document import (
    DERIVED_OF_METRICS,
    DERIVED_OF_REPORT,
    SCHEMA_VERSION,
    UNITS,
)

_NUMBERED = re.compile(r"(.+)_(\d+)")
_FAMILY = 20  # metrics that differ by a number only are one pattern from this many on


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the documents that `CalibrationReport.to_json` writes."""
    definitions: dict[str, Any] = {}
    top = describe_dataclass(ReportContents, definitions)
    _add_derived(top, definitions)
    definitions["ClassificationMetrics"] = _describe_metrics(define_metrics("binary") | define_metrics("multiclass"))
    definitions["RegressionMetrics"] = _describe_metrics(define_metrics("regression"))
    describe_type(ClassificationCurves | RegressionCurves, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:debiased-laplace:calibration-report:{SCHEMA_VERSION}",
        "title": "Calibration report of debiased_laplace",
        **top,
        "if": {"properties": {"task": {"const": "regression"}}},
        "then": _of_every_method("RegressionMetrics", "RegressionCurves"),
        "else": _of_every_method("ClassificationMetrics", "ClassificationCurves"),
        "$defs": dict(sorted(definitions.items())),
    }


def render_schema() -> str:
    """The schema as indented JSON text."""
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


def _add_derived(top: dict[str, Any], definitions: dict[str, Any]) -> None:
    """What documents have beside the fields, because it follows from them."""
    words = DERIVED_OF_REPORT
    top["properties"] = {
        "schema_version": {"const": SCHEMA_VERSION, "description": words["schema_version"]},
        "summary": {"type": "array", "items": {"type": "string"}, "description": words["summary"]},
        **top["properties"],
    }
    top["required"].insert(0, "schema_version")
    definitions["Estimate"]["properties"] |= {
        "better": {"enum": list(DIRECTIONS), "description": DERIVED_OF_METRICS["better"]},
        "unit": {"enum": list(UNITS.values()), "description": DERIVED_OF_METRICS["unit"]},
    }


def _describe_metrics(metrics: dict[str, MetricDefinition]) -> dict[str, Any]:
    """An object with these metrics and no others; `picp_1` to `picp_99` are one pattern."""
    stems = Counter(found[1] for name in metrics if (found := _NUMBERED.fullmatch(name)))
    families = {stem for stem, size in stems.items() if size >= _FAMILY}
    single, patterns = {}, {}
    for name, definition in metrics.items():
        found = _NUMBERED.fullmatch(name)
        described = {"$ref": "#/$defs/Estimate"}
        if found and found[1] in families:
            about = metrics.get(found[1], definition)
            patterns[f"^{re.escape(found[1])}_[1-9][0-9]?$"] = {
                **described,
                "title": about.label,
                "description": f"As {found[1]}, at the level in percent.",
            }
        else:
            reference = f" {definition.reference}." if definition.reference else ""
            single[name] = {**described, "title": definition.label, "description": definition.meaning + reference}
    return {
        "description": "Metric to estimate.",
        "type": "object",
        "properties": single,
        "patternProperties": patterns,
        "required": ["nll"],
        "additionalProperties": False,
    }


def _of_every_method(metrics: str, curves: str) -> dict[str, Any]:
    parts = {"metrics": {"$ref": f"#/$defs/{metrics}"}, "curves": {"$ref": f"#/$defs/{curves}"}}
    return {"properties": {"methods": {"additionalProperties": {"properties": parts}}}}
