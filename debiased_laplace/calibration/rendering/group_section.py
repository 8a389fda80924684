"""The metrics of every group of samples, one table for each grouping."""

from collections.abc import Mapping
from html import escape

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.metrics.groups import GroupResult
from debiased_laplace.calibration.rendering.formatting import (
    NOTHING,
    choose_common_decimals,
    format_number,
    format_with_interval,
)
from debiased_laplace.calibration.rendering.sections import render_table

FLOOR = "ece_noise_floor"


def render_groups(contents: ReportContents) -> str:
    """One table per grouping, groups and methods as rows; empty without groups."""
    if not contents.groups:
        return ""
    names = list(dict.fromkeys(g.grouping for g in contents.groups))
    tables = "".join(_render_grouping(contents, name) for name in names)
    few = sum(g.few for g in contents.groups)
    note = (
        f" {few} group{'s have' if few > 1 else ' has'} too few samples for these intervals, marked \u201cfew\u201d."
        if few
        else ""
    )
    return (
        "<h2>Groups</h2><p>The same metrics on each group of samples. Every interval is its group's own and not "
        "adjusted for looking at many groups. The calibration error stands before the slash, what chance alone would "
        f"make of it behind: it is the larger the smaller the group.{note}</p>{tables}"
    )


def _render_grouping(contents: ReportContents, name: str) -> str:
    groups = [g for g in contents.groups if g.grouping == name]
    present = {metric for g in groups for metrics in g.metrics.values() for metric in metrics}
    definitions = define_metrics(contents.task)
    metrics = [m for m in definitions if m in present and m != FLOOR]
    decimals = {m: choose_common_decimals(e.get(m) for g in groups for e in g.metrics.values()) for m in metrics}
    rows: list[list[str | int]] = []
    for g in groups:
        for method, estimates in g.metrics.items():
            cells = [_show(m, estimates, decimals[m]) for m in metrics]
            rows.append([_label(g), str(g.n), method, *cells])
    columns = [name, "samples", "method", *(definitions[m].label for m in metrics)]
    return f"<h3>{escape(name)}</h3>{render_table(ReportTable(name, columns, rows))}"


def _label(g: GroupResult) -> str:
    return f"{g.group} (few)" if g.few else g.group


def _show(metric: str, estimates: Mapping[str, Estimate], decimals: int | None) -> str:
    e = estimates.get(metric)
    if e is None or e.value is None:
        return NOTHING
    if metric == "ece" and FLOOR in estimates:
        return f"{format_number(e.value, decimals)} / {format_number(estimates[FLOOR].value)}"
    return format_with_interval(e.value, e.low, e.high, decimals, signed=metric == "confidence_gap")
