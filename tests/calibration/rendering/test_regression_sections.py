"""Figures and tables of a regression page: what they show, for whom, and in which unit."""

import re

import pytest
import torch

from debiased_laplace.calibration import Samples, calibration_report
from debiased_laplace.calibration.rendering.formatting import format_number
from debiased_laplace.calibration.rendering.panels import assign_looks
from debiased_laplace.calibration.rendering.regression_sections import render_regression
from debiased_laplace.calibration.rendering.spread_figures import draw_examples, draw_spread

UNIT = "$\\sigma$ <km/h> 模型"


@pytest.fixture
def one(draw_regression):
    mean, std, y = draw_regression(300, scale=2.0, seed=40)
    given = {"map": (mean, torch.ones(300)), "laplace": (mean, std)}
    return calibration_report(given, y, task="regression", target_unit=UNIT, n_resamples=200)


@pytest.fixture
def three(draw_regression):
    mean, std, y = draw_regression(100, scale=1.0, seed=41, n_outputs=3)
    f = mean + 0.2 * torch.randn(20, 100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {"pair": (mean, std), "drawn": Samples(f, observation_noise=0.9)}
    return calibration_report(given, y, task="regression", n_resamples=50)


def draw(report, which):
    return which(dict(report.methods), assign_looks(list(report.methods)), report.data.target_unit)


def choose(panels, *captions):
    """The panels of these methods, whatever rows the report added."""
    return [panel for caption in captions for panel in panels if panel.caption == caption]


def test_spread_is_told_in_words_and_numbers(one) -> None:
    constant, varied = choose(draw(one, draw_spread)[0], "map", "laplace")
    bins = one.methods["laplace"].curves.spread
    outside = sum(not b.consistent_low <= b.observed <= b.consistent_high for b in bins)
    assert outside > 5
    assert f"{outside} of 10 bins outside the usual range" in varied.svg
    assert len(constant.table.rows) == 1
    assert [row[:3] for row in varied.table.rows] == [(b.n, b.predicted, b.observed) for b in bins]


def test_targets_outside_are_crosses_and_counted(one) -> None:
    (panel,) = choose(draw(one, draw_examples)[0], "laplace")
    examples = one.methods["laplace"].curves.examples
    missed = sum(not e.low <= e.target <= e.high for e in examples)
    assert missed > 6
    assert f"{missed} targets outside of theirs, 6 being usual" in panel.svg
    assert [row[-1] for row in panel.table.rows].count("no") == missed
    assert len(panel.table.rows) == 60


def test_the_unit_is_shown_as_it_is(one) -> None:
    page = one.to_html()
    shown = UNIT.replace("<", "&lt;").replace(">", "&gt;")
    assert f"predicted standard deviation ({shown})" in page
    assert f"lower is better, in {shown}" in page
    assert f"({shown})²" in page  # of the squared errors
    assert "label x" not in page
    assert "label y" not in page


def test_a_constant_spread_is_named_where_its_test_would_stand(one) -> None:
    section = render_regression(one, assign_looks(list(one.methods)))
    assert '<span class="aside">constant predictive standard deviation</span>' in section
    assert "p &lt; 0.001" in section


def test_several_outputs_have_panels_by_row_and_a_table_each(three) -> None:
    rows = draw(three, draw_spread)
    assert [[p.caption for p in row] for row in rows] == [[f"{m}, output {j}" for m in three.methods] for j in (0, 1)]
    page = three.to_html()
    assert "Only outputs 0 to 1 are drawn." in page
    assert "Only output 0 is drawn." in page
    assert {p.caption for row in draw(three, draw_examples) for p in row} == {f"{m}, output 0" for m in three.methods}
    for method in three.methods.values():
        for output in method.curves.outputs:
            assert format_number(output.metrics["crps"].value, 3) in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<summary>") >= 7
    assert len(page.encode()) < 300 * 1024


def test_single_output_has_no_table_of_outputs(one) -> None:
    assert "Single outputs" not in one.to_html()
