"""The sections of the page that show numbers, each a function from the report to HTML."""

from html import escape

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.metrics.classification import signed_root
from debiased_laplace.calibration.metrics.definitions import DIRECTIONS, MetricDefinition, define_metrics
from debiased_laplace.calibration.metrics.metric_definition import Section
from debiased_laplace.calibration.rendering.formatting import (
    NOTHING,
    choose_common_decimals,
    format_interval,
    format_number,
    format_p_value,
    format_signed,
)
from debiased_laplace.calibration.rendering.panels import Panel
from debiased_laplace.calibration.rendering.verdict import CONFIDENCE_TARGETS, name_confidence, name_reference

COMPARED_AS = {"accuracy": "error"}  # a row, and the score that its differences are stored as
NOISE_AND_TEST: dict[str, tuple[str, ...]] = {
    name: (f"{name}_noise_floor", f"{name}_p_value") for name in ("ece", "ence", "ence_equal_mass")
} | {"classwise_ece": ("classwise_ece_noise_floor",)}
SHOWN_BESIDE = {other for others in NOISE_AND_TEST.values() for other in others}  # not in rows of their own
LABELS: dict[Section, str] = {
    "detail": "Further metrics of every method",
    "selective": "Metrics of selective prediction of every method",
}


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


def render_metrics(contents: ReportContents, section: Section) -> str:
    """Metrics as rows and methods as columns, which stay readable on a phone; empty without any."""
    head = "".join(
        f'<th scope="col">{escape(method)}'
        + ('<span class="aside">baseline</span>' if method == contents.baseline and contents.comparisons else "")
        + (f'<span class="aside">{escape(result.description)}</span>' if result.description else "")
        + "</th>"
        for method, result in contents.methods.items()
    )
    body = []
    for name, definition in define_metrics(contents.task).items():
        estimates = [contents.metrics[m].get(name) for m in contents.methods]
        if name in SHOWN_BESIDE or definition.section != section or all(e is None for e in estimates):
            continue
        decimals = choose_common_decimals(estimates)
        cells = "".join(f"<td>{_render_cell(contents, method, name, decimals)}</td>" for method in contents.methods)
        unit = _show_unit(definition, contents.data.target_unit)
        direction = ", in ".join(words for words in (DIRECTIONS[definition.better], unit) if words)
        body.append(
            f'<tr><th scope="row">{escape(definition.label)}'
            f'<span class="aside">{escape(direction)}</span></th>{cells}</tr>'
        )
    if not body:
        return ""
    return _scrolling(
        f'<table class="headline"><thead><tr><th scope="col">Metric</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
        label=LABELS.get(section, "Metrics of every method"),
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
    for other in NOISE_AND_TEST.get(name, ()):
        found = contents.metrics[method][other].known
        words = format_p_value(found) if other.endswith("_p_value") else f"chance alone: {format_number(found)}"
        parts.append(f'<span class="aside">{words}</span>')
    if name in ("rmsce2_debiased", "classwise_rmsce2_debiased"):
        root = format_number(signed_root(estimate.known), 3)
        parts.append(f'<span class="aside">signed root: {root}</span>')
    if name in CONFIDENCE_TARGETS:
        named = name_confidence(estimate, target=CONFIDENCE_TARGETS[name])
        parts.append(f'<span class="aside">{named or "neither detectably"}</span>')
    compared = COMPARED_AS.get(name, name)
    own = [c for c in contents.comparisons if (c.method, c.metric) == (method, compared)]
    parts.append(_render_verdicts(contents, own))
    return "".join(parts)


def _show_unit(definition: MetricDefinition, target_unit: str | None) -> str:
    """The metric's unit, where the unit of the targets was given."""
    if not target_unit or not definition.unit:
        return ""
    return f"({target_unit})²" if definition.unit == "squared" else target_unit


def _render_verdicts(contents: ReportContents, comparisons: list[Comparison]) -> str:
    """What was detected, in words; the differences themselves stand in the next section."""
    detected = [c for c in comparisons if c.verdict != "no detectable difference"]
    if comparisons and not detected:
        return '<span class="aside">no detectable difference</span>'
    return "".join(
        f'<span class="change {c.verdict}">{c.verdict} than {escape(name_reference(contents, c.baseline))}</span>'
        for c in detected
    )


def _show_cell(cell: object) -> str:
    if cell is None:
        return NOTHING
    return format_number(cell) if isinstance(cell, float) else str(cell)


def _scrolling(table: str, *, label: str) -> str:
    """Wide tables scroll in their own box, which the keyboard can reach."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'
