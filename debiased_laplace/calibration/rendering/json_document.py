"""The report as JSON: every field of its dataclasses, the same bytes for the same input."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.definitions import MetricDefinition, define_metrics
from debiased_laplace.calibration.rendering.verdict import summarize

SCHEMA_VERSION = "1.0"
DERIVED_OF_REPORT = {
    "schema_version": "Version of this schema: the second number grows with new fields, the first with other changes.",
    "summary": "The findings in sentences.",
}
DERIVED_OF_METRICS = {
    "better": "The good direction; zero, one and level are targets, none is no judgement.",
    "unit": "Unit of the value, empty for plain numbers.",
}
UNITS = {"": "", "target": "unit of the targets", "squared": "squared unit of the targets"}


def render_json(contents: ReportContents) -> str:
    """The report as indented JSON text; no NaN, a missing value is null."""
    return json.dumps(describe(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def describe(contents: ReportContents) -> dict[str, Any]:
    """The report as plain data: every field, and what follows from them for readers who have no definitions at hand.

    What follows: `schema_version`, `summary` (the verdict's sentences), and `better` and `unit` of every metric.
    """
    fields_of_report = _plain(contents, define_metrics(contents.task))
    return {"schema_version": SCHEMA_VERSION, "summary": summarize(contents), **fields_of_report}


def _plain(value: Any, definitions: Mapping[str, MetricDefinition]) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), definitions) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain_member(key, item, definitions) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, definitions) for item in value]
    return value


def _plain_member(name: str, value: Any, definitions: Mapping[str, MetricDefinition]) -> Any:
    plain = _plain(value, definitions)
    if isinstance(value, Estimate) and name in definitions:
        plain |= {"better": definitions[name].better, "unit": UNITS[definitions[name].unit]}
    return plain
