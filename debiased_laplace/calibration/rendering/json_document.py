"""The report as JSON: every number with its meaning, the same bytes for the same input."""

import json
from dataclasses import asdict
from typing import Any

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.rendering.verdict import summarize

SCHEMA_VERSION = "1.0"


def render_json(contents: ReportContents) -> str:
    """The report as indented JSON text; no NaN, a missing value is null."""
    return json.dumps(describe(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def describe(contents: ReportContents) -> dict[str, Any]:
    """The report as plain dictionaries and lists."""
    definitions = define_metrics(contents.task)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": contents.task,
        "title": contents.title,
        "description": contents.description,
        "created": contents.created,
        "software": dict(contents.software),
        "data": asdict(contents.data),
        "settings": dict(contents.settings),
        "metadata": dict(contents.metadata),
        "summary": summarize(contents),
        "baseline": contents.baseline,
        "methods": {
            method: {
                "metrics": {
                    name: _describe_estimate(estimate, definitions[name].better)
                    for name, estimate in result.metrics.items()
                },
                "curves": asdict(result.curves),
            }
            for method, result in contents.methods.items()
        },
        "comparisons": [asdict(c) for c in contents.comparisons],
        "tables": [asdict(t) for t in contents.tables],
        "figures": [{"title": f.title, "alt": f.alt, "note": f.note} for f in contents.figures],
        "warnings": list(contents.warnings),
    }


def _describe_estimate(estimate: Estimate, better: str) -> dict[str, Any]:
    return {**asdict(estimate), "better": better}
