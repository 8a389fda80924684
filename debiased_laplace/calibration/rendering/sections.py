"""The sections of the page that show numbers, each a function from the report to HTML."""

from html import escape
from typing import Literal

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.contents import (
    ClassificationCurves,
    ReportContents,
    ReportTable,
)
from debiased_laplace.calibration.estimates import Estimate, wilson_interval
from debiased_laplace.calibration.metrics.classification import signed_root
from debiased_laplace.calibration.metrics.definitions import DIRECTIONS, define_metrics
from debiased_laplace.calibration.rendering.formatting import (
    NOTHING,
    choose_common_decimals,
    choose_decimals,
    format_interval,
    format_number,
    format_p_value,
    format_signed,
)
from debiased_laplace.calibration.rendering.panels import Panel

MAX_CLASSES = 20
SHOWN_BESIDE_ECE = ("ece_noise_floor", "ece_p_value")


def render_table(table: ReportTable, *, kind: str = "") -> str:
    """A table in its own scrolling box; numbers stand to the right."""
    numeric = [
        all(isinstance(row[j], (int, float, type(None))) for row in table.rows) for j in range(len(table.columns))
    ]
    classes = ['class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(
        f'<th scope="col" {c}>{escape(str(column))}</th>' for column, c in zip(table.columns, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td {c}>{escape(_show_cell(cell))}</td>" for cell, c in zip(row, classes, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return _scrolling(
        f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        label=table.title,
    )


def render_panels(panels: list[Panel], asides: list[str] | None = None) -> str:
    """Small multiples, and the same numbers as tables behind a fold."""
    figures = "".join(
        f"<figure><figcaption>{escape(p.caption)}"
        + (f'<span class="aside">{escape(aside)}</span>' if aside else "")
        + f"</figcaption>{p.svg}</figure>"
        for p, aside in zip(panels, asides or [""] * len(panels), strict=True)
    )
    tables = "".join(f"<h3>{escape(p.caption)}</h3>{render_table(p.table)}" for p in panels)
    return f'<div class="panels">{figures}</div><details><summary>The same as tables</summary>{tables}</details>'


def render_metrics(contents: ReportContents, section: Literal["headline", "detail"]) -> str:
    """Metrics as rows and methods as columns, which stay readable on a phone; empty without any."""
    head = "".join(
        f'<th scope="col">{escape(method)}'
        + ('<span class="aside">baseline</span>' if method == contents.baseline and contents.comparisons else "")
        + "</th>"
        for method in contents.methods
    )
    body = []
    for name, definition in define_metrics(contents.task).items():
        estimates = [contents.metrics[m].get(name) for m in contents.methods]
        if name in SHOWN_BESIDE_ECE or definition.section != section or all(e is None for e in estimates):
            continue
        decimals = choose_common_decimals(estimates)
        cells = "".join(f"<td>{_render_cell(contents, method, name, decimals)}</td>" for method in contents.methods)
        direction = DIRECTIONS[definition.better]
        body.append(
            f'<tr><th scope="row">{escape(definition.label)}'
            f'<span class="aside">{escape(direction)}</span></th>{cells}</tr>'
        )
    if not body:
        return ""
    return _scrolling(
        f'<table class="headline"><thead><tr><th scope="col">Metric</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
        label="Metrics of every method" if section == "headline" else "Further metrics of every method",
    )


def render_classes(contents: ReportContents) -> str:
    """Accuracy on each class, the baseline's worst first; empty for regression."""
    curves = {m: r.curves for m, r in contents.methods.items() if isinstance(r.curves, ClassificationCurves)}
    if not curves:
        return ""
    present = [c for c in curves[contents.baseline].classes if c.n > 0]
    present.sort(key=lambda c: (c.n_correct / c.n, c.label))
    level = float(contents.settings["confidence_level"])
    rows: list[list[str | int]] = []
    for c in present[:MAX_CLASSES]:
        shares = []
        for method_curves in curves.values():
            share = method_curves.classes[c.label].n_correct / c.n
            interval = format_interval(*wilson_interval(share, c.n, confidence_level=level), 2)
            shares.append(f"{format_number(share, 3)} {interval}")
        rows.append([contents.data.name_class(c.label), c.n, *shares])
    table = ReportTable("Accuracy by class", ["class", "samples", *curves], rows)
    more = len(present) - MAX_CLASSES
    note = f" The {more} classes with the highest accuracy are not shown." if more > 0 else ""
    return (
        "<h2>Accuracy by class</h2>"
        f"<p>Share of each class that was recognised, with Wilson intervals; the classes that "
        f"{escape(contents.baseline)} recognises least come first.{note}</p>{render_table(table)}"
    )


def _render_cell(contents: ReportContents, method: str, name: str, decimals: int | None) -> str:
    estimate = contents.metrics[method].get(name)
    if estimate is None:
        return NOTHING
    if estimate.value is None:
        return f'{NOTHING}<span class="aside">{escape(estimate.reason or "")}</span>'
    signed = name == "confidence_gap"
    value = (format_signed if signed else format_number)(estimate.value, decimals)
    interval = format_interval(estimate.low, estimate.high, decimals)
    parts = [f'<span class="value">{value}</span> <span class="interval">{interval}</span>']
    if name == "ece":
        floor, p = (contents.metrics[method][other].known for other in SHOWN_BESIDE_ECE)
        parts.append(
            f'<span class="aside">chance alone: {format_number(floor)}</span>'
            f'<span class="aside">{format_p_value(p)}</span>'
        )
    if name == "rmsce2_debiased":
        root = format_number(signed_root(estimate.known), 3)
        parts.append(f'<span class="aside">signed root: {root}</span>')
    if name in ("confidence_gap", "z_scale"):
        parts.append(f'<span class="aside">{_name_sign(estimate, name)}</span>')
    parts += [_render_change(c) for c in contents.comparisons if (c.method, c.metric) == (method, name)]
    return "".join(parts)


def _name_sign(estimate: Estimate, name: str) -> str:
    target = 1.0 if name == "z_scale" else 0.0
    if estimate.low is not None and estimate.low > target:
        return "over-confident"
    if estimate.high is not None and estimate.high < target:
        return "under-confident"
    return "neither detectably"


def _render_change(comparison: Comparison) -> str:
    decimals = choose_decimals([comparison.standard_error])
    difference = format_signed(comparison.difference, decimals)
    interval = format_interval(comparison.low, comparison.high, decimals)
    kind = comparison.verdict if comparison.verdict in ("better", "worse") else "aside"
    return (
        f'<span class="change">{difference} <span class="interval">{interval}</span></span>'
        f'<span class="change {kind}">{comparison.verdict}</span>'
    )


def _show_cell(cell: object) -> str:
    if cell is None:
        return "\u2013"
    return format_number(cell) if isinstance(cell, float) else str(cell)


def _scrolling(table: str, *, label: str) -> str:
    """Wide tables scroll in their own box, which the keyboard can reach."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'
