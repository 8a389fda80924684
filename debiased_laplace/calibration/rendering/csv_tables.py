"""The numbers of a report as long tables in CSV, for data frames; the same bytes for the same input."""

import csv
import io
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, get_args

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.definitions import define_metrics

CsvTable = Literal["metrics", "comparisons", "ood"]
ESTIMATE = ("value", "low", "high", "standard_error", "n", "estimator", "reason")


def render_csv(contents: ReportContents, table: CsvTable) -> str:
    """One table with a header line; missing numbers are empty, numbers have all their digits.

    Raises:
        ValueError: for an unknown table.
    """
    tables = {"metrics": _list_metrics, "comparisons": _list_comparisons, "ood": _list_detections}
    if table not in tables:
        raise ValueError(f"table must be one of {', '.join(map(repr, get_args(CsvTable)))}; got {table!r}.")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(tables[table](contents))
    return buffer.getvalue()


def _list_metrics(contents: ReportContents) -> Iterator[tuple[Any, ...]]:
    definitions = define_metrics(contents.task)
    yield ("method", "metric", *ESTIMATE, "better")
    for method, metrics in contents.metrics.items():
        for name, estimate in metrics.items():
            yield (method, name, *_cells(estimate), definitions[name].better)


def _list_comparisons(contents: ReportContents) -> Iterator[tuple[Any, ...]]:
    names = [f.name for f in fields(Comparison)]
    yield tuple(names)
    for comparison in contents.comparisons:
        yield tuple(getattr(comparison, name) for name in names)


def _list_detections(contents: ReportContents) -> Iterator[tuple[Any, ...]]:
    yield ("set", "method", "score", "metric", *ESTIMATE)
    for name, outside in contents.ood.items():
        for detection in outside.detections:
            for metric, estimate in detection.metrics.items():
                yield (name, detection.method, detection.score, metric, *_cells(estimate))


def _cells(estimate: Estimate) -> tuple[Any, ...]:
    return tuple(getattr(estimate, name) for name in ESTIMATE)
