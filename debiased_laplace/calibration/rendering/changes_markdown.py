"""What changed between two reports, in Markdown for a pull request."""

from debiased_laplace.calibration.changes.change import Change, Changes
from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.rendering.formatting import (
    NOTHING,
    choose_decimals,
    format_level,
    format_number,
    format_p_value,
    format_with_interval,
    half_width,
)
from debiased_laplace.calibration.rendering.markdown import plain_markdown, render_markdown_table
from debiased_laplace.calibration.rendering.markdown_fitting import fit_markdown

_DETECTED = ("worse", "better", "changed")


def render_changes(changes: Changes, old: ReportContents, new: ReportContents) -> str:
    """Verdict first, then what changed detectably, then the rest behind a fold."""
    detected = [c for kind in _DETECTED for c in changes.changes if c.verdict == kind]
    rest = [c for c in changes.changes if c.verdict not in _DETECTED]
    percent = format_level(changes.confidence_level)
    parts = [
        "# Changes between two calibration reports",
        _summarize(changes),
        f"Old: {plain_markdown(old.title)}, {old.created}, {old.data.n} test samples. "
        f"New: {plain_markdown(new.title)}, {new.created}, {new.data.n} test samples. {_explain_pairing(changes)} "
        f"Brackets are {percent} intervals of the differences; verdicts allow for the number of metrics (Holm).",
    ]
    for names, words in ((changes.only_old, "Only in the old report"), (changes.only_new, "Only in the new report")):
        parts += [f"{words}: {plain_markdown(', '.join(names))}."] if names else []
    if detected:
        parts += ["## Detectable changes", render_markdown_table(_tabulate(detected, new.task))]
    return fit_markdown(parts, ["## Other metrics", render_markdown_table(_tabulate(rest, new.task))] if rest else [])


def _summarize(changes: Changes) -> str:
    counts = {kind: sum(c.verdict == kind for c in changes.changes) for kind in _DETECTED}
    judged = sum(c.adjusted_p_value is not None for c in changes.changes)
    if not any(counts.values()):
        return f"**No detectable change** in {judged} judged metrics."
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"**Detectably {words}**, of {judged} judged metrics."


def _explain_pairing(changes: Changes) -> str:
    if not changes.same_test_set:
        return "The test sets differ, so the numbers are compared as independent ones."
    paired = any(c.pairing == "same samples" for c in changes.changes)
    return "The test set is the same" + (
        "; means over samples are compared in pairs, other metrics as if they were independent."
        if paired
        else ", but the reports keep no sums to pair by: the numbers are compared as if they were independent."
    )


def _tabulate(changes: list[Change], task: str) -> ReportTable:
    definitions = define_metrics(task)
    rows = []
    for c in changes:
        decimals = choose_decimals([half_width(c.low, c.high)])
        difference = format_with_interval(c.difference, c.low, c.high, decimals, signed=True)
        p = NOTHING if c.adjusted_p_value is None else format_p_value(c.adjusted_p_value)
        verdict = f"{c.verdict} ({c.note})" if c.note else c.verdict
        values = [format_number(x, decimals) for x in (c.old, c.new)]
        rows.append([c.method, definitions[c.metric].label, *values, difference, p, verdict])
    columns = ["method", "metric", "old", "new", "new \u2212 old", "Holm-adjusted p", "verdict"]
    return ReportTable("Changes", columns, rows)
