"""The section on posteriors: every figure has words and numbers, nothing is invented, everything is escaped."""

import json
import re
from dataclasses import replace

import pytest
import torch

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.posteriors.summaries import (
    DirectionSummary,
    HeldOutDifference,
    PosteriorSummary,
    SpectrumPoint,
)
from debiased_laplace.calibration.predicting.records import PredictionRecord
from debiased_laplace.calibration.rendering.posterior_section import render_posteriors
from debiased_laplace.calibration.rendering.posterior_tables import tabulate_posteriors

SUMMARY = PosteriorSummary(
    "DebiasedLowRankLaplace",
    structure="lowrank",
    n_parameters=3254,
    n_data=1200,
    n_direction_samples=64,
    n_magnitude_samples=64,
    shared_samples=False,
    magnitudes="held_out",
    complement="diagonal",
    share_outside=0.2,
    prior_low=40.0,
    prior_high=40.0,
    temperature=1.0,
    effective_parameters=312.4,
    fit_seconds=2.5,
    directions=(
        DirectionSummary(1, 4.0, 2.0, 1.0, 8.0),
        DirectionSummary(2, 2.0, 1.0, 0.0, 3.0),
        DirectionSummary(30, 0.01, 1.0, 0.5, 2.0),
        DirectionSummary(31, 0.01, 0.0, 0.0, 0.0),
    ),
    spectrum=tuple(SpectrumPoint(i, 1e4 / i**2) for i in range(1, 30)),
    held_out=HeldOutDifference("<first>", -120.0, 30.0, -178.8, -61.2, 6e-5, "closer", 256),
    notes=("a <note>",),
)
RECORD = PredictionRecord("Laplace posterior", "glm", "mc", 100, 1.25, 3 * 2**20)


def report(**changes):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(40, 3, generator=generator, dtype=torch.float64)
    made = calibration_report(
        {"<first>": p / p.sum(1, keepdim=True)}, torch.arange(40) % 3, task="multiclass", temperature_scaling="none"
    )
    return replace(made, **{"posteriors": {"<first>": SUMMARY}, "predicted": {"<first>": RECORD}, **changes})


def test_every_figure_has_a_text_alternative_and_a_table():
    page = render_posteriors(report())
    figures = re.findall(r'<svg [^>]*aria-label="([^"]+)"', page)
    assert len(figures) == 2
    assert "2.000 along the first" in figures[0]
    assert "the prior precision is 40" in figures[1]
    assert "above it up to about place 15" in figures[1]  # 1e4 / 15² = 44.4
    assert page.count("The same as tables") == 2
    assert "&lt;first&gt;" in page
    assert "<first>" not in page
    assert "a &lt;note&gt;" in page


def test_the_numbers_are_on_the_page():
    page = render_posteriors(report())
    for shown in ("3\u202f254", "64 for directions, 64 for magnitudes", "diagonal, 20 % of the trace", "312", "2.5 s"):
        assert shown in page, shown
    for shown in ("closer", "\u2212120 [\u2212179, \u221261]", "p &lt; 0.001", "linearized, mc", "1.2 s", "3 MiB"):
        assert shown in page, shown
    # temperature 1 and an unknown observation noise are no rows
    assert "temperature</td>" not in page
    assert "observation noise" not in page


@pytest.mark.parametrize("magnitudes", ["same_batch", None])
def test_no_inflation_figure_of_what_cannot_know_it(magnitudes):
    summary = replace(SUMMARY, magnitudes=magnitudes, directions=SUMMARY.directions if magnitudes else ())
    page = render_posteriors(report(posteriors={"<first>": summary}))
    assert "How inflated" not in page
    assert "What the data say" in page


def test_a_posterior_of_which_nothing_is_known_is_a_column_of_its_class():
    table = tabulate_posteriors({"x": PosteriorSummary("ELLA")})
    assert [list(row) for row in table.rows] == [["class", "ELLA"]]
    page = render_posteriors(report(posteriors={"x": PosteriorSummary("ELLA")}))
    assert "<svg" not in page
    assert "Distance to the full batch" not in page


def test_without_posteriors_there_is_no_section():
    assert render_posteriors(report(posteriors={}, predicted={})) == ""
    assert "The posteriors" not in report(posteriors={}, predicted={}).to_html()


def test_page_markdown_and_json_hold_the_section():
    made = report()
    assert "<h2>The posteriors</h2>" in made.to_html()
    markdown = made.to_markdown()
    assert "## What was fitted" in markdown
    assert "## Distance to the full batch" in markdown
    found = json.loads(made.to_json())
    assert found["posteriors"]["<first>"]["directions"][0]["in_sample"] == 4.0
    assert found["posteriors"]["<first>"]["held_out"]["verdict"] == "closer"
    assert found["predicted"]["<first>"]["n_samples"] == 100


def test_the_figures_are_the_same_bytes_again():
    assert render_posteriors(report()) == render_posteriors(report())


def test_a_page_of_five_posteriors_stays_small():
    five = {f"posterior {i}": replace(SUMMARY, directions=SUMMARY.directions * 6) for i in range(5)}
    assert len(render_posteriors(report(posteriors=five))) < 150_000
