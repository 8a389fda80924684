import re

import pytest
import torch

from debiased_laplace.calibration import CalibrationReport, calibration_report

NASTY = "<b>&\"' $\\sigma$ 模型</b>"


@pytest.fixture
def reports(draw_classification, draw_regression):
    p, y, _ = draw_classification(300, sharpness=1.0, seed=41)
    q, _, _ = draw_classification(90, sharpness=0.5, seed=42)
    mean, std, t = draw_regression(150, scale=1.0, seed=43)
    sets = {NASTY: {NASTY: q, "other": q}, "second": {NASTY: q, "other": q}}
    common = {"n_resamples": 20, "temperature_scaling": "none"}
    return {
        "multiclass": calibration_report({NASTY: p, "other": p}, y, task="multiclass", ood=sets, **common),
        "alone": calibration_report({"map": p}, y, task="multiclass", **common),
        "regression": calibration_report(
            {"map": (mean, std)},
            t,
            task="regression",
            target_unit="$ per m²",
            ood={"far": {"map": (mean[:40], 1 + std[:40])}},
            **common,
        ),
    }


def test_sections_have_figures_with_words_and_tables(reports) -> None:
    page = reports["multiclass"].to_html()
    start, middle = page.index("<h2>Selective prediction"), page.index("<h2>Out of distribution")
    for text, n_figures in ((page[start:middle], 1), (page[middle : page.index("<h2>Settings")], 4)):
        assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{40,}"', text)) == n_figures
        assert "The same as tables" in text
    assert "Accuracy of the samples that are kept" in page[start:middle]
    detection = page[middle:]
    assert detection.count("AUROC 0.5, AUPR 0.231 and FPR95 0.95") == 2
    assert "all 4 of them" in detection
    assert "no detectable difference" in detection
    assert "<dt>FPR95 <code>fpr95</code></dt>" in page
    assert "<b>" not in page
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_no_set_no_section(reports) -> None:
    page = reports["alone"].to_html()
    assert "Out of distribution" not in page
    assert "<code>fpr95</code>" not in page
    assert "Selective prediction" in page
    assert "Out of distribution" not in reports["alone"].to_markdown()


def test_regression_sections(reports) -> None:
    page = reports["regression"].to_html()
    assert "mean squared error (($ per m²)²)" in page
    assert "predicted standard deviation ($ per m²)" in page
    assert "Accuracy of the samples" not in page
    assert "Differences to map are paired" not in page[page.index("<h2>Out of distribution") :]


def test_markdown_has_both_tables(reports) -> None:
    text = reports["multiclass"].to_markdown()
    assert "## Accuracy of the samples that are kept" in text
    assert "## Out of distribution: second" in text
    assert len(re.findall(r"\| 1 − maximum probability \| 0\.\d{3} \\\[0\.\d{3},.0\.\d{3}\\\]", text)) == 4
    assert "AUROC against" in text


@pytest.mark.parametrize("task", ["multiclass", "alone", "regression"])
def test_stored_reports_show_the_same_sections(reports, task: str) -> None:
    if not hasattr(CalibrationReport, "from_json"):
        pytest.skip("reports cannot be read back")
    report = reports[task]
    again = CalibrationReport.from_json(report.to_json())
    assert again.to_html() == report.to_html()
    assert again.ood == report.ood


def test_many_sets_are_not_all_drawn(draw_classification) -> None:
    p, y, _ = draw_classification(80, sharpness=1.0, seed=44)
    generator = torch.Generator().manual_seed(0)
    sets = {f"set {i}": {"map": torch.rand(20, 10, generator=generator).softmax(dim=1)} for i in range(14)}
    page = calibration_report({"map": p}, y, task="multiclass", n_resamples=20, ood=sets).to_html()
    assert "12 of 14 histograms are drawn" in page
    assert len(re.findall(r'id="ood-\d+-\d+"', page)) == 12
