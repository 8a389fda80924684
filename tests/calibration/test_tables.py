"""The numbers of a report as data frames, CSV, Markdown and plain text."""

import csv
import io
import re

import pytest
from hostile_texts import HOSTILE, TEXT

from debiased_laplace.calibration.tables import escape_markdown

HEADER = ["method", "metric", "value", "low", "high", "standard_error", "n", "estimator", "reason", "better"]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_metrics_are_one_number_a_row_with_all_digits(hostile_report) -> None:
    report = hostile_report
    text = report.to_csv()
    assert text.splitlines()[0].split(",") == HEADER
    rows = read(text)
    assert [(r["method"], r["metric"]) for r in rows] == [
        (m, k) for m, metrics in report.metrics.items() for k in metrics
    ]
    for row in rows:
        estimate = report.metrics[row["method"]][row["metric"]]
        for name in ("value", "low", "high", "standard_error"):
            number = getattr(estimate, name)
            assert row[name] == ("" if number is None else repr(number))
        assert int(row["n"]) == estimate.n
        assert row["reason"] == (estimate.reason or "")
        assert row["better"] == report.definitions[row["metric"]].better


def test_frames_hold_what_the_csv_holds(hostile_report) -> None:
    for table in ("metrics", "comparisons", "ood"):
        frame, rows = hostile_report.to_frame(table), read(hostile_report.to_csv(table))
        assert len(frame) == len(rows) > 5
        assert list(frame.columns) == list(rows[0])
    assert TEXT in set(hostile_report.to_frame().method)
    with pytest.raises(Exception, match="metrics"):  # beartype comes first where it checks
        hostile_report.to_frame("curves")


def test_comparisons_and_sets_have_tables_of_their_own(hostile_report, classification_report, tmp_path) -> None:
    rows = read(hostile_report.to_csv("comparisons"))
    assert [(r["method"], r["baseline"], r["metric"], float(r["difference"]), r["verdict"]) for r in rows] == [
        (c.method, c.baseline, c.metric, c.difference, c.verdict) for c in hostile_report.comparisons
    ]
    rows = read(hostile_report.to_csv("ood"))
    assert {r["set"] for r in rows} == {TEXT}
    found = {(r["method"], r["score"]): float(r["value"]) for r in rows if r["metric"] == "auroc"}
    assert found == {(d.method, d.score): d.metrics["auroc"].value for d in hostile_report.ood[TEXT].detections}
    names = [path.name for path in classification_report.save(tmp_path, formats=("csv", "md"))]
    assert set(names) == {"report.csv", "report_comparisons.csv", "report_ood.csv", "report.md"}
    assert all(b"\r" not in (tmp_path / name).read_bytes() for name in names)


def test_markdown_shows_hostile_texts_as_they_are(hostile_report) -> None:
    text = hostile_report.to_markdown()
    plain = re.sub(r"\\(.)", "", text)  # without what is escaped
    assert set(re.findall(r"<[^>]*>", plain)) == {"<details>", "<summary>", "</summary>", "</details>"}
    assert not [mark for mark in ("*bold*", "_it_", "[x](", "# h", "`c`", "~~s") if mark in plain]
    lines = [line for line in plain.splitlines() if line.startswith("|")]
    tables = re.split(r"\n\n+", plain)
    for table in (t for t in tables if t.startswith("|")):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table[:200]
    assert len(lines) > 40
    for hostile in HOSTILE:
        escaped = escape_markdown(hostile)
        assert re.sub(r"\\(.)", r"\1", escaped) == " ".join(hostile.split())
        assert escape_markdown(TEXT)[:30] in text
    assert escape_markdown("- item") == "\\- item"
    assert escape_markdown("1. item") == "1\\. item"


def test_markdown_says_what_matters_first(hostile_report, regression_report) -> None:
    text = hostile_report.to_markdown()
    order = ["better than map", "**gates", "## Metrics", "## Differences to map", "<details>", "## Further metrics"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    for heading in ("## Out of distribution: ", "## What was fitted", "## Distance to the full batch"):
        assert heading in text
    assert "3 254" in text
    assert "| \u2013 |" in text  # a cell of the caller's that is missing
    regression = regression_report.to_markdown()
    assert "Scale of the errors" in regression
    assert "Out of distribution" not in regression


def test_text_for_a_terminal_has_findings_metrics_and_warnings(classification_report) -> None:
    lines = str(classification_report).splitlines()
    assert lines[0] == classification_report.title
    assert lines[1] == classification_report.summary[0]
    accuracy = next(line for line in lines if line.strip().startswith("Accuracy"))
    assert accuracy.count("[") == len(classification_report.methods)
    assert f"{classification_report.metrics['map']['accuracy'].value:.3f}" in accuracy
    warned = [line.removeprefix("Warning: ") for line in lines if line.startswith("Warning: ")]
    assert warned == list(classification_report.warnings)
