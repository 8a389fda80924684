import numpy as np
import pytest

from debiased_laplace.calibration import ReportTable, calibration_report
from debiased_laplace.calibration.rendering.markdown_fitting import LIMIT, fit_markdown

TABLE = "| a | b |\n| --- | --- |\n" + "\n".join(f"| {i} | é |" for i in range(1000))


def test_what_fits_is_left_alone() -> None:
    assert fit_markdown(["# T", "text"], []) == "# T\n\ntext\n"
    folded = fit_markdown(["# T"], ["more", "and more"])
    assert folded == "# T\n\n<details><summary>Details</summary>\n\nmore\n\nand more\n\n</details>\n"


@pytest.mark.parametrize("limit", [600, 1000, 5000, 9000])
def test_what_does_not_fit_is_cut_at_a_line_and_says_so(limit: int) -> None:
    text = fit_markdown(["# T", TABLE, "last"], ["hidden"], limit=limit)
    assert len(text.encode()) <= limit
    assert "Cut here" in text
    assert "last" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert len(rows) > 5
    assert text.count("<details>") == text.count("</details>")


def test_details_go_first() -> None:
    text = fit_markdown(["# T", "essential"], [TABLE, "never"], limit=3000)
    assert len(text.encode()) <= 3000
    assert "essential" in text.split("<details>")[0]
    assert "Cut here" in text.split("<details>")[1]
    assert text.endswith("</details>\n")


def test_a_head_without_rows_is_no_table() -> None:
    text = fit_markdown(["x" * 150, TABLE], [], limit=400 + 150 + 2 + 24)
    assert "|" not in text
    assert "Cut here" in text


def test_a_large_report_fits_into_a_comment(draw_classification) -> None:
    p, y, _ = draw_classification(120, sharpness=2.0, seed=91)
    rows = [[f"row {i}", "x" * 60] for i in range(2000)]
    report = calibration_report(
        {f"method {i}": p for i in range(6)},
        y,
        task="multiclass",
        n_resamples=10,
        tables=[ReportTable("Large", ["a", "b"], rows)],
        thresholds=[{"metric": "nll", "max": 0.1}, {"metric": "brier", "max": 2}],
    )
    text = report.to_markdown()
    assert 50_000 < len(text.encode()) <= LIMIT
    head, fold = text.split("<details>")
    assert head.index("method 1") < head.index("gates: ") < head.index("## Metrics") < head.index("## Differences")
    assert "6 passed, 6 failed" in head
    assert "Further metrics" in fold
    assert "| row 0 |" in fold
    assert "Cut here" in fold
    assert np.all([line.endswith("|") for line in text.splitlines() if line.startswith("|")])
