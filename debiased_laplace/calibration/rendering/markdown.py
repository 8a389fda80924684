"""The report as Markdown, for pull requests and model cards, and as plain text for a terminal."""

import re

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.rendering.formatting import (
    choose_common_decimals,
    choose_decimals,
    format_interval,
    format_number,
    format_p_value,
    format_signed,
    shorten,
)
from debiased_laplace.calibration.rendering.verdict import SHORT_NAMES, summarize


def render_markdown(contents: ReportContents) -> str:
    """Headline table, comparisons and the caller's tables."""
    parts = [f"# {_plain(contents.title)}"]
    parts += ["\n".join(f"- {_plain(s)}" for s in summarize(contents))]
    if contents.description.strip():
        parts.append("\n\n".join(_plain(p) for p in contents.description.split("\n\n")))
    percent = f"{100 * float(contents.settings['confidence_level']):g} %"
    parts.append(f"{contents.data.n} test samples; brackets are {percent} intervals.")
    parts += ["## Metrics", _render_table(tabulate_metrics(contents))]
    if contents.comparisons:
        parts += [
            f"## Differences to {_plain(contents.baseline)}",
            _render_table(tabulate_comparisons(contents)),
        ]
    for table in contents.tables:
        parts += [f"## {_plain(table.title)}", _render_table(table)]
        parts += [_plain(table.note)] if table.note else []
    if contents.warnings:
        parts += ["## Warnings", "\n".join(f"- {_plain(w)}" for w in contents.warnings)]
    return "\n\n".join(parts) + "\n"


def render_text(contents: ReportContents) -> str:
    """Verdict and metrics for a terminal."""
    table = tabulate_metrics(contents)
    columns = [shorten(str(c), 34) for c in table.columns]
    rows = [columns, *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[j]) for row in rows) for j in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = [contents.title, *summarize(contents), ""]
    return "\n".join([*head, *lines, *(f"Warning: {w}" for w in contents.warnings)])


def tabulate_metrics(contents: ReportContents) -> ReportTable:
    """Metrics as rows, methods as columns, every estimate with its interval."""
    rows = []
    for name, definition in define_metrics(contents.task).items():
        estimates = [contents.metrics[m].get(name) for m in contents.methods]
        if all(e is None for e in estimates):
            continue
        decimals = choose_common_decimals(estimates)
        show = format_signed if definition.better == "zero" else format_number
        if name == "ece_p_value":
            shown = [format_p_value(e.known).removeprefix("p ").removeprefix("= ") for e in estimates if e]
            rows.append([definition.label, *shown])
            continue
        cells = [
            f"{show(e.value, decimals)} {format_interval(e.low, e.high, decimals)}".rstrip()
            if e is not None
            else "\u2013"
            for e in estimates
        ]
        rows.append([definition.label, *cells])
    return ReportTable("Metrics", ["metric", *contents.methods], rows)


def tabulate_comparisons(contents: ReportContents) -> ReportTable:
    """Paired differences with their verdicts."""
    rows = []
    for c in contents.comparisons:
        decimals = choose_decimals([c.standard_error])
        change = f"{format_signed(c.difference, decimals)} {format_interval(c.low, c.high, decimals)}"
        p = "\u2013" if c.adjusted_p_value is None else format_p_value(c.adjusted_p_value)
        rows.append([c.method, SHORT_NAMES[c.metric], change.rstrip(), p, c.verdict])
    columns = ["method", "score", "difference", "Holm-adjusted p", "verdict"]
    return ReportTable("Differences", columns, rows)


def _render_table(table: ReportTable) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns)]
    for row in table.rows:
        lines.append(["\u2013" if c is None else format_number(c) if isinstance(c, float) else str(c) for c in row])
    head, rule, *body = lines
    escaped = [[_plain(str(cell)) for cell in line] for line in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (escaped[0], rule, *escaped[1:]))


def _plain(text: str) -> str:
    """User text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))
