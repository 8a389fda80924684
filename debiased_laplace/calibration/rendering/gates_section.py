"""What came of the thresholds: a row of badges under the verdict, and the sentences behind a fold."""

from collections import Counter
from html import escape

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.gates.outcomes import Status, ThresholdOutcome, overall_status
from debiased_laplace.calibration.rendering.formatting import choose_decimals, format_with_interval, half_width
from debiased_laplace.calibration.rendering.sections import render_table

SIGNS: dict[Status, str] = {"passed": "\u2713", "failed": "\u2717", "inconclusive": "?"}
MAX_BADGES = 12


def render_gates(contents: ReportContents) -> str:
    """Badges with words, so that no colour is needed to read them; empty without thresholds."""
    if not contents.checks:
        return ""
    badges = [_render_badge(overall_status(contents.checks), summarize_gates(contents.checks))]
    if len(contents.checks) <= MAX_BADGES:
        badges += [_render_badge(outcome.status, outcome.title) for outcome in contents.checks]
    sentences = "".join(f"<li>{escape(outcome.message)}</li>" for outcome in contents.checks)
    return (
        f'<ul class="badges" aria-label="Gates">{"".join(badges)}</ul>'
        f"<details><summary>Thresholds and numbers</summary>{render_table(tabulate_gates(contents.checks))}"
        f"<ul>{sentences}</ul></details>"
    )


def summarize_gates(outcomes: tuple[ThresholdOutcome, ...]) -> str:
    """How many gates passed, failed and could not be decided."""
    counts = Counter(outcome.status for outcome in outcomes)
    return "gates: " + ", ".join(f"{counts[status]} {status}" for status in SIGNS if counts[status])


def tabulate_gates(outcomes: tuple[ThresholdOutcome, ...]) -> ReportTable:
    """One row per outcome."""
    rows = []
    for o in outcomes:
        shown = format_with_interval(o.value, o.low, o.high, choose_decimals([half_width(o.low, o.high)]))
        rows.append([f"{SIGNS[o.status]} {o.status}", o.title, shown, _show_limits(o), o.judge, o.n])
    return ReportTable("Gates", ["outcome", "what", "found", "allowed", "judged by", "samples"], rows)


def _show_limits(outcome: ThresholdOutcome) -> str:
    """The limits in a few signs."""
    limits = (("\u2265", outcome.minimum), ("\u2264", outcome.maximum))
    return ", ".join(f"{sign} {limit:g}".replace("-", "\u2212") for sign, limit in limits if limit is not None)


def _render_badge(status: Status, text: str) -> str:
    return f'<li class="badge {status}"><b>{SIGNS[status]} {status}</b> {escape(text)}</li>'
