"""Numbers of a report as data frames, as Markdown and as plain text."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import jinja2
import pandas as pd

from debiased_laplace.calibration.contents import (
    SCORES,
    Comparison,
    Estimate,
    OutOfDistributionSet,
    ReportContents,
    RiskPoint,
    Scalar,
    Section,
    Status,
    Task,
    ThresholdOutcome,
)
from debiased_laplace.calibration.findings import SHORT_NAMES, describe_brackets, name_reference
from debiased_laplace.calibration.formatting import (
    NO_BREAK,
    NOTHING,
    choose_common_decimals,
    choose_decimals,
    format_count,
    format_level,
    format_number,
    format_p_value,
    format_seconds,
    format_with_interval,
    shorten,
)
from debiased_laplace.calibration.metrics.detection import is_below_chance
from debiased_laplace.checks import one_of

Table = Literal["metrics", "comparisons", "ood"]
ESTIMATE = tuple(f.name for f in fields(Estimate))
COLUMNS: dict[str, tuple[str, ...]] = {
    "metrics": ("method", "metric", *ESTIMATE, "better"),
    "comparisons": tuple(f.name for f in fields(Comparison)),
    "ood": ("set", "method", "score", "metric", *ESTIMATE),
}
KEPT = (0.8, 0.9, 0.95, 1.0)  # coverages
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how one begins
FAR = 0.02  # from a coverage without a point of its own
RATES = 3  # decimals of rates, whose intervals are rarely narrower
SIGNS: dict[Status, str] = {"passed": "\u2713", "failed": "\u2717", "inconclusive": "?"}
PREDICTIVES = {"glm": "linearized", "nn": "drawn networks"}
NAME_LENGTH = 34  # characters of a method's name in plain text


def to_frame(contents: ReportContents, table: Table = "metrics") -> pd.DataFrame:
    """Return a long table: one number with its interval per row, missing numbers as NaN."""
    one_of(table, Table, "table")
    rows: list[dict[str, Any]]
    if table == "metrics":
        rows = [
            {"method": method, "metric": name, **asdict(e), "better": contents.definitions[name].better}
            for method, result in contents.methods.items()
            for name, e in result.metrics.items()
        ]
    elif table == "comparisons":
        rows = [asdict(c) for c in contents.comparisons]
    else:
        rows = [
            {"set": name, "method": d.method, "score": d.score, "metric": metric, **asdict(e)}
            for name, one in contents.ood.items()
            for d in one.detections
            for metric, e in d.metrics.items()
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS[table]))


def to_csv(contents: ReportContents, table: Table = "metrics") -> str:
    """Return a table as CSV text, in which no text is a formula of a spreadsheet."""
    frame = to_frame(contents, table)
    for column in frame.columns:
        frame[column] = [f"'{x}" if isinstance(x, str) and x.startswith(FORMULA) else x for x in frame[column]]
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_text(contents: ReportContents) -> str:
    """Return findings, metrics and warnings for a terminal."""
    frame = tabulate_metrics(contents, "headline", "detail", "selective")
    frame.columns = pd.Index([shorten(column, NAME_LENGTH) for column in frame.columns])
    table = frame.to_string(index=False, justify="right")
    note = [describe_brackets(contents)] if contents.comparisons else []
    warnings = (f"Warning: {w}" for w in contents.warnings)
    return "\n".join([contents.title, *contents.summary, *note, "", table, *warnings])


def to_markdown(contents: ReportContents) -> str:
    """Return the report for a pull request or a model card: what matters first, everything else behind a fold."""
    references = " and to ".join(name_reference(contents, r) for r in contents.references)
    template = make_environment(autoescape=False).get_template("report.md.j2")
    return template.render(
        contents=contents,
        level=format_level(contents.settings["confidence_level"]),
        references=references,
        brackets=describe_brackets(contents),
        gates=summarize_gates(contents.checks),
        gates_table=tabulate_gates(contents.checks),
        headline=tabulate_metrics(contents, "headline"),
        comparisons=tabulate_comparisons(contents),
        further=_list_further(contents),
    )


def make_environment(*, autoescape: bool) -> jinja2.Environment:
    """Return the environment of the templates; in Markdown, which is not escaped, every text passes the filter `md`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("debiased_laplace.calibration.html"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": escape_markdown, "cell": format_cell}
    return environment


def escape_markdown(text: object) -> str:
    """Return a text on one line that Markdown shows as it is."""
    line = re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"^(\d*)([-+.)])(?=[\s-]|$)", r"\1\\\2", line)  # not the start of a list, nor a rule


def format_cell(cell: Scalar | None) -> str:
    """Format one cell of a table."""
    return NOTHING if cell is None else format_number(cell) if isinstance(cell, float) else str(cell)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Return a table for readers, whose cells are kept as they are."""
    return pd.DataFrame([list(row) for row in rows], columns=list(columns), dtype=object)


def list_metrics(contents: ReportContents, *sections: Section) -> dict[str, int | None]:
    """Return the metrics of some sections that a method has, each with the decimals that its estimates share."""
    found = {}
    for name, definition in contents.definitions.items():
        estimates = [result.metrics.get(name) for result in contents.methods.values()]
        if definition.section in sections and any(estimates):
            found[name] = choose_common_decimals(estimates)
    return found


def tabulate_metrics(contents: ReportContents, *sections: Section) -> pd.DataFrame:
    """Return metrics of some sections as rows and methods as columns, each estimate with its interval."""
    rows = []
    for name, decimals in list_metrics(contents, *sections).items():
        cells = [show_metric(name, result.metrics.get(name), decimals) for result in contents.methods.values()]
        rows.append([contents.definitions[name].label, *cells])
    return make_table(["metric", *contents.methods], rows)


def tabulate_comparisons(contents: ReportContents) -> pd.DataFrame:
    """Return the paired differences with their verdicts."""
    rows = []
    for c in contents.comparisons:
        decimals = choose_decimals([c.standard_error])
        change = format_with_interval(c.difference, c.adjusted_low, c.adjusted_high, decimals, signed=True)
        name, p = SHORT_NAMES.get(c.metric, c.metric), format_p_value(c.adjusted_p_value)
        rows.append([c.method, c.baseline, name, change, p, c.verdict])
    return make_table(["method", "compared with", "score", "difference", "Holm-adjusted p", "verdict"], rows)


def tabulate_gates(outcomes: Sequence[ThresholdOutcome]) -> pd.DataFrame:
    """Return one row for each threshold."""
    rows = []
    for o in outcomes:
        found = format_with_interval(o.value, o.low, o.high)
        limits = (("\u2265", o.minimum), ("\u2264", o.maximum))
        allowed = ", ".join(f"{sign} {x:g}".replace("-", "\u2212") for sign, x in limits if x is not None)
        rows.append([f"{SIGNS[o.status]} {o.status}", o.title, found, allowed, o.judge, o.n])
    return make_table(["outcome", "what", "found", "allowed", "judged by", "samples"], rows)


def summarize_gates(outcomes: Sequence[ThresholdOutcome]) -> str:
    """Return how many gates passed, failed and could not be decided, in words."""
    counts = Counter(outcome.status for outcome in outcomes)
    return "gates: " + ", ".join(f"{counts[status]} {status}" for status in SIGNS if counts[status])


def tabulate_kept(contents: ReportContents) -> pd.DataFrame:
    """Return the accuracy, or the mean squared error, of the most certain samples at some coverages."""
    rows = []
    for method, result in contents.methods.items():
        if points := result.selection:
            area = show_metric("aurc", result.metrics.get("aurc"))
            rows.append([method, *(_show_kept(points, coverage, contents.task) for coverage in KEPT), area])
    return make_table(["method", *(f"at {100 * c:g}{NO_BREAK}% coverage" for c in KEPT), "AURC"], rows)


def tabulate_detection(one: OutOfDistributionSet, baseline: str) -> pd.DataFrame:
    """Return how well every method and score detect one set, with the paired differences to the baseline."""
    compared = {(c.method, c.score): c for c in one.comparisons}
    names, rows = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}, []
    for d in one.detections:
        shown = (show_metric(metric, d.metrics[metric], RATES) for metric in names)
        row = [d.method, SCORES.get(d.score, d.score), *shown]
        if c := compared.get((d.method, d.score)):
            change = _show_unbroken(c.difference, c.adjusted_low, c.adjusted_high, RATES, signed=True)
            row += [change, c.verdict + (", below chance" if c.below_chance else "")]
        elif compared:
            row += [NOTHING, "below chance" if is_below_chance(d.metrics["auroc"].value) else NOTHING]
        rows.append(row)
    more = [f"AUROC against {baseline}", "verdict"] if compared else []
    return make_table(["method", "score", *names.values(), *more], rows)


def tabulate_posteriors(contents: ReportContents) -> pd.DataFrame:
    """Return properties as rows and posteriors as columns."""
    labels = dict.fromkeys(label for s in contents.posteriors.values() for label in s.facts)
    rows = [[label, *(_show_fact(s.facts.get(label)) for s in contents.posteriors.values())] for label in labels]
    return make_table(["property", *contents.posteriors], rows)


def tabulate_held_out(contents: ReportContents) -> pd.DataFrame:
    """Return which posterior is closer to that of the full batch."""
    rows = []
    for name, s in contents.posteriors.items():
        if h := s.held_out:
            decimals = min(2, choose_decimals([h.standard_error]) or 0)
            change = format_with_interval(h.difference, h.adjusted_low, h.adjusted_high, decimals, signed=True)
            rows.append([name, h.reference, change, format_p_value(h.p_value), format_count(h.n), h.verdict])
    columns = ["posterior", "against", "difference in nats", "Holm-adjusted p", "held-out samples", "verdict"]
    return make_table(columns, rows)


def tabulate_predictions(contents: ReportContents) -> pd.DataFrame:
    """Return how each method predicted, and for how long."""
    rows = []
    for name, r in contents.predicted.items():
        predictive = PREDICTIVES.get(r.pred_type or "", NOTHING) + (f", {r.link}" if r.link else "")
        memory = NOTHING if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f} MiB"
        rows.append([name, r.kind, predictive, _show_fact(r.n_samples), format_seconds(r.seconds), memory])
    return make_table(["method", "kind", "predictive", "draws", "time", "GPU memory, peak"], rows)


def _list_further(contents: ReportContents) -> list[tuple[str, pd.DataFrame, str]]:
    """The tables that Markdown shows behind a fold, each with its title and a note."""
    kept = "Mean squared error" if contents.task == "regression" else "Accuracy"
    own = {
        "Further metrics": tabulate_metrics(contents, "detail"),
        f"{kept} of the samples that are kept": tabulate_kept(contents),
        **{f"Out of distribution: {n}": tabulate_detection(s, contents.baseline) for n, s in contents.ood.items()},
        "What was fitted": tabulate_posteriors(contents),
        "Distance to the full batch": tabulate_held_out(contents),
        "How the methods predicted": tabulate_predictions(contents),
    }
    given = [(t.title, make_table(t.columns, t.rows), t.note) for t in contents.tables]
    return [*((title, table, "") for title, table in own.items() if len(table)), *given]


def show_metric(name: str, estimate: Estimate | None, decimals: int | None = None) -> str:
    """Format a metric with its interval; a p-value without."""
    if estimate is None or estimate.value is None:
        return NOTHING
    if name.endswith("_p_value"):
        return format_p_value(estimate.value).removeprefix("p ").removeprefix("= ")
    signed = name == "confidence_gap"
    return _show_unbroken(estimate.value, estimate.low, estimate.high, decimals, signed=signed)


def _show_kept(points: Sequence[RiskPoint], coverage: float, task: Task) -> str:
    """The squared error, or the accuracy, at the point nearest to a coverage."""
    p = min(points, key=lambda p: abs(p.coverage - coverage))
    if abs(p.coverage - coverage) > FAR:
        return NOTHING
    if task == "regression":
        return _show_unbroken(p.risk, p.low, p.high)
    low, high = (None, None) if p.low is None or p.high is None else (1 - p.high, 1 - p.low)
    return _show_unbroken(1 - p.risk, low, high, RATES)


def _show_fact(fact: Scalar | None) -> str:
    return format_count(fact) if isinstance(fact, int) else format_cell(fact)


def _show_unbroken(
    value: float | None, low: float | None, high: float | None, decimals: int | None = None, *, signed: bool = False
) -> str:
    """Format as `format_with_interval`, on one line."""
    return format_with_interval(value, low, high, decimals, signed=signed).replace(", ", f",{NO_BREAK}")
