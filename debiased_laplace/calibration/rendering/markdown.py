"""The report as Markdown, for pull requests and model cards, and as plain text for a terminal."""

import re
from dataclasses import replace
from typing import Literal

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.rendering.formatting import (
    NOTHING,
    choose_common_decimals,
    choose_decimals,
    format_bare_p_value,
    format_level,
    format_number,
    format_p_value,
    format_with_interval,
    shorten,
)
from debiased_laplace.calibration.rendering.gates_section import summarize_gates, tabulate_gates
from debiased_laplace.calibration.rendering.markdown_fitting import fit_markdown
from debiased_laplace.calibration.rendering.posterior_tables import (
    tabulate_held_out,
    tabulate_posteriors,
    tabulate_predictions,
)
from debiased_laplace.calibration.rendering.selection_tables import tabulate_detection, tabulate_kept
from debiased_laplace.calibration.rendering.verdict import SHORT_NAMES, name_reference, summarize


def render_markdown(contents: ReportContents) -> str:
    """What a pull request must say: verdict, gates, headline table and comparisons; all the rest behind a fold.

    At most 65,536 bytes, which is what GitHub takes as a comment: tables that do not fit are cut, and say so.
    """
    percent = format_level(contents.settings["confidence_level"])
    parts = [
        f"# {plain_markdown(contents.title)}",
        "\n".join(f"- {plain_markdown(s)}" for s in summarize(contents)),
        *_render_gates(contents),
        f"{contents.data.n} test samples; brackets are {percent} intervals.",
        "## Metrics",
        render_markdown_table(tabulate_metrics(contents, "headline")),
    ]
    if contents.comparisons:
        scaled = "" if contents.scaling is None else name_reference(contents, contents.scaling.method)
        against = plain_markdown(f"{contents.baseline} and to {scaled}" if scaled else contents.baseline)
        parts += [f"## Differences to {against}", render_markdown_table(tabulate_comparisons(contents))]
    if contents.warnings:
        parts += ["## Warnings", "\n".join(f"- {plain_markdown(w)}" for w in contents.warnings)]
    return fit_markdown(parts, _render_details(contents))


def _render_gates(contents: ReportContents) -> list[str]:
    if not contents.checks:
        return []
    summary = plain_markdown(summarize_gates(contents.checks))
    return [f"**{summary}**", render_markdown_table(tabulate_gates(contents.checks))]


def _render_details(contents: ReportContents) -> list[str]:
    """Description, further metrics and further tables."""
    paragraphs = [plain_markdown(p) for p in contents.description.split("\n\n")]
    parts = ["\n\n".join(paragraphs)] if contents.description.strip() else []
    for table in (tabulate_metrics(contents, "detail"), *_tabulate_fits(contents), *contents.tables):
        if not table.rows:
            continue
        parts += [f"## {plain_markdown(table.title)}", render_markdown_table(table)]
        parts += [plain_markdown(table.note)] if table.note else []
    return parts


def render_text(contents: ReportContents) -> str:
    """Verdict and metrics for a terminal."""
    table = tabulate_metrics(contents)
    columns = [shorten(str(c), 34) for c in table.columns]
    rows = [columns, *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[j]) for row in rows) for j in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = [contents.title, *summarize(contents), ""]
    return "\n".join([*head, *lines, *(f"Warning: {w}" for w in contents.warnings)])


def tabulate_metrics(contents: ReportContents, section: Literal["headline", "detail"] | None = None) -> ReportTable:
    """Metrics as rows, methods as columns, every estimate with its interval; of one section, or all of them."""
    rows = []
    for name, definition in define_metrics(contents.task).items():
        estimates = [contents.metrics[m].get(name) for m in contents.methods]
        if all(e is None for e in estimates) or section not in (None, definition.section):
            continue
        decimals = choose_common_decimals(estimates)
        rows.append([definition.label, *(_show(name, e, decimals, definition.better == "zero") for e in estimates)])
    title = "Further metrics" if section == "detail" else "Metrics"
    return ReportTable(title, ["metric", *contents.methods], rows)


def _show(name: str, estimate: Estimate | None, decimals: int | None, signed: bool) -> str:
    if estimate is None or estimate.value is None:
        return NOTHING
    if name.endswith("_p_value"):
        return format_bare_p_value(estimate.value)
    return format_with_interval(estimate.value, estimate.low, estimate.high, decimals, signed=signed)


def tabulate_comparisons(contents: ReportContents) -> ReportTable:
    """Paired differences with their verdicts."""
    rows = []
    for c in contents.comparisons:
        decimals = choose_decimals([c.standard_error])
        change = format_with_interval(c.difference, c.low, c.high, decimals, signed=True)
        p = NOTHING if c.adjusted_p_value is None else format_p_value(c.adjusted_p_value)
        rows.append([c.method, c.baseline, SHORT_NAMES[c.metric], change, p, c.verdict])
    columns = ["method", "compared with", "score", "difference", "Holm-adjusted p", "verdict"]
    return ReportTable("Differences", columns, rows)


def _tabulate_fits(contents: ReportContents) -> list[ReportTable]:
    """Selection and detection, what was fitted and how close it is to the full batch, how each method predicted."""
    posteriors, predicted = dict(contents.posteriors), dict(contents.predicted)
    tables = [tabulate_posteriors(posteriors), tabulate_held_out(posteriors)] if posteriors else []
    tables += [tabulate_predictions(predicted)] if predicted else []
    selection = [tabulate_kept(contents)]
    selection += [
        replace(table, title=f"Out of distribution: {table.title}")
        for table in (tabulate_detection(name, one, contents.baseline) for name, one in contents.ood.items())
    ]
    return [table for table in (*selection, *tables) if table is not None]


def render_markdown_table(table: ReportTable) -> str:
    """A table with a head, every cell on one line."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    for row in table.rows:
        lines.append([NOTHING if c is None else format_number(c) if isinstance(c, float) else str(c) for c in row])
    head, rule, *body = lines
    escaped = [[plain_markdown(str(cell)) for cell in line] for line in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (escaped[0], rule, *escaped[1:]))


def plain_markdown(text: str) -> str:
    """User text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))
