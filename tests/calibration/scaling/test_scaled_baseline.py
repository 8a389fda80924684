"""The scaled baseline as a row of a report, and what the first sentence makes of it."""

import json

import pytest
import torch

from debiased_laplace.calibration import calibration_report

ROW = "map, temperature-scaled"


def draw(n: int, seed: int, *, factor: float = 2.0, n_classes: int = 10):
    generator = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return factor * z, torch.multinomial(z.softmax(dim=1), 1, generator=generator)[:, 0]


def report(predictions, y, **options):
    return calibration_report(predictions, y, **{"task": "multiclass", "n_resamples": 20, **options})


def test_the_row_stands_after_the_baseline_and_says_how_it_came_about() -> None:
    z, y = draw(400, 1)
    methods = {"first": (0.7 * z).softmax(dim=1), "map": z.softmax(dim=1), "last": (0.4 * z).softmax(dim=1)}
    found = report(methods, y, baseline="map")
    assert list(found.methods) == ["first", "map", ROW, "last"]
    assert found.scaling.method == ROW
    assert len(found.scaling.per_fold) == 5
    assert abs(found.scaling.value - 2.0) < 0.25
    assert "cross-fitted over 5 folds of the test set" in found.methods[ROW].description
    assert found.methods[ROW].description in found.to_html()
    m = found.metrics
    assert m[ROW]["accuracy"] == m["map"]["accuracy"]
    assert m[ROW]["nll"].value == pytest.approx(m["map"]["nll_refinement_loss"].value, rel=1e-9)
    assert m["map"]["nll"].value == pytest.approx(
        m["map"]["nll_refinement_loss"].value + m["map"]["nll_calibration_loss"].value
    )
    assert m["map"]["temperature_optimal"].low > 1 > m["last"]["temperature_optimal"].high
    assert "temperature_optimal" not in m[ROW]
    assert json.loads(found.to_json())["scaling"]["quantity"] == "temperature"
    assert "Where the loss comes from" in found.to_html()


def test_validation_data_give_one_temperature() -> None:
    z, y = draw(300, 2)
    held_out, labels = draw(2000, 3)
    methods = {"map": z.softmax(dim=1)}
    by_probabilities = report(methods, y, validation=(held_out.softmax(dim=1), labels))
    by_logits = report(methods, y, validation=(held_out, labels))
    for found in (by_probabilities, by_logits):
        assert (found.scaling.fitted_on, found.scaling.per_fold, found.scaling.n_fit) == ("validation", (), 2000)
        T = found.scaling.value
        expected = torch.nn.functional.cross_entropy(z / T, y).item()
        assert found.metrics[ROW]["nll"].value == pytest.approx(expected, rel=1e-9)
        assert "fitted on 2000 validation samples" in found.methods[ROW].description
    assert by_logits.scaling.value == pytest.approx(by_probabilities.scaling.value, rel=1e-9)


def test_logits_undo_saturation() -> None:
    """float32 probabilities of wide logits are 0 where the truth is; with logits the temperature is right."""
    z, y = draw(400, 4, factor=60.0)
    p = z.float().softmax(dim=1)
    blind, seeing = report({"map": p}, y), report({"map": p}, y, logits={"map": z.float()})
    assert any("temperature is unreliable" in w and "pass logits=" in w for w in blind.warnings)
    assert not any("unreliable" in w for w in seeing.warnings)
    assert seeing.scaling.from_logits
    assert seeing.scaling.value == pytest.approx(60, rel=0.2)
    assert seeing.metrics[ROW]["nll"].value < blind.metrics[ROW]["nll"].value


def test_on_from_a_hundred_samples_and_off_on_demand() -> None:
    z, y = draw(100, 5)
    assert report({"map": z.softmax(dim=1)}, y).scaling is not None
    assert report({"map": z[:99].softmax(dim=1)}, y[:99]).scaling is None
    assert report({"map": z[:99].softmax(dim=1)}, y[:99], temperature_scaling="cross_fitted").scaling is not None
    off = report({"map": z.softmax(dim=1)}, y, temperature_scaling="none")
    assert off.scaling is None
    assert list(off.methods) == ["map"]
    assert "nll_calibration_loss" not in off.metrics["map"]


def test_labels_that_are_all_right_end_at_a_bound_which_is_told() -> None:
    z, _ = draw(200, 6)
    found = report({"map": z.softmax(dim=1)}, z.argmax(dim=1))
    assert found.scaling.n_at_bound == 5
    assert any("5 of 5 temperatures of map ended at a bound" in w for w in found.warnings)
    assert found.metrics["map"]["temperature_optimal"].low is None
    assert "no maximum" in found.metrics["map"]["temperature_optimal"].reason


def test_clusters_reach_the_folds_and_the_comparisons() -> None:
    z, y = draw(60, 7)
    copies = {
        "map": z.repeat_interleave(4, dim=0).softmax(dim=1),
        "la": (0.5 * z).repeat_interleave(4, 0).softmax(dim=1),
    }
    clusters = torch.arange(60).repeat_interleave(4)
    found = report(copies, y.repeat_interleave(4), clusters=clusters)
    alone = report({m: p[::4] for m, p in copies.items()}, y, temperature_scaling="cross_fitted")
    pick = {(c.method, c.baseline, c.metric): c for c in found.comparisons}
    for c in alone.comparisons:
        if c.metric in ("nll", "brier") and c.baseline == "map":
            same = pick[c.method, c.baseline, c.metric]
            assert same.standard_error == pytest.approx(c.standard_error, rel=0.1)


SENTENCES = {
    "better than both": ({"la": 1.0}, "la is better than map (NLL ", " and better than temperature-scaled map ("),
    "better and worse": (
        {"la": 0.55},
        "CAUTION, worse than temperature-scaled map: la is better than map (NLL ",
        ", but",
    ),
    "worse than both": (
        {"la": 3.0},
        "CAUTION, worse than map and temperature-scaled map: la is worse",
        " and worse than",
    ),
    "the same": ({"la": 2.0}, "la is not detectably different from map (NLL 0 [0, 0])", ", but worse than"),
}


@pytest.mark.parametrize("case", [c for c in SENTENCES if c != "better than both"])
def test_the_first_sentence(case: str) -> None:
    factors, start, joint = SENTENCES[case]
    z, y = draw(1500, 8)
    methods = {"map": z.softmax(dim=1)} | {m: (f / 2 * z).softmax(dim=1) for m, f in factors.items()}
    first = str(report(methods, y)).splitlines()[1]
    if case == "the same":
        start = f"CAUTION, worse than temperature-scaled map: {start}"
    assert first.startswith(start), first
    assert joint in first
    assert first in report(methods, y).to_markdown().replace("\\", "")


def test_the_first_sentence_of_a_posterior_that_knows_more() -> None:
    generator = torch.Generator().manual_seed(9)
    z, y = draw(1500, 10, factor=1.0)
    blurred = 2 * (z + 1.5 * torch.randn(z.shape, generator=generator, dtype=z.dtype))
    first = str(report({"map": blurred.softmax(dim=1), "la": z.softmax(dim=1)}, y)).splitlines()[1]
    assert first.startswith(SENTENCES["better than both"][1])
    assert SENTENCES["better than both"][2] in first


def test_regression_has_a_row_with_scaled_deviations(draw_regression) -> None:
    mean, std, y = draw_regression(300, scale=1.6, seed=1)
    options = {"task": "regression", "n_resamples": 20}
    found = calibration_report({"map": (mean, std), "la": (mean, 1.6 * std)}, y, **options)
    row = found.scaling.method
    assert row == "map, variance-scaled"
    assert list(found.methods) == ["map", row, "la"]
    assert found.scaling.value == pytest.approx(found.metrics["map"]["z_scale"].value)
    assert found.metrics[row]["rmse"] == found.metrics["map"]["rmse"]
    assert 0.9 < found.metrics[row]["z_scale"].value < 1.1
    assert {c.baseline for c in found.comparisons if c.method == "la"} == {"map", row}
    m_v, s_v, y_v = draw_regression(500, scale=1.6, seed=2)
    fixed = calibration_report({"map": (mean, std)}, y, validation=((m_v, s_v), y_v), **options)
    factor = ((y_v - m_v) / s_v).square().mean().sqrt().item()
    assert fixed.scaling.value == pytest.approx(factor)
    assert fixed.metrics[row]["sharpness"].value == pytest.approx(factor * std.mean().item())


def test_perfect_regression_cannot_be_scaled(draw_regression) -> None:
    mean, std, _ = draw_regression(150, scale=1.0, seed=3)
    found = calibration_report({"map": (mean, std)}, mean, task="regression", n_resamples=20)
    assert found.scaling is None
    assert any("cannot be scaled" in w for w in found.warnings)


Z, Y = draw(120, 11)
P = Z.softmax(dim=1)
WRONG = {
    "unknown mode": (
        {"temperature_scaling": "yes"},
        "temperature_scaling.*'yes'|temperature_scaling'.\nActual value: 'yes'",
    ),
    "validation without data": ({"temperature_scaling": "validation"}, "needs validation="),
    "data that are not used": ({"temperature_scaling": "none", "validation": (P, Y)}, "does not use it"),
    "data that are no pair": ({"validation": P}, "pair|parameter 'validation'"),
    "other classes": ({"validation": (P[:, :4] / P[:, :4].sum(dim=1, keepdim=True), Y % 4)}, "10 classes.*got 4"),
    "neither probabilities nor logits": ({"validation": (0.5 * P, Y)}, "sum to 1"),
    "labels of another length": ({"validation": (P, Y[:50])}, "120 rows"),
    "logits of another shape": ({"logits": {"map": Z[:, :3]}}, "shape"),
    "logits of somebody else": ({"logits": {"map": Z.flip(0)}}, "must be its probabilities"),
    "logits of nobody": ({"logits": {"mpa": Z}}, "mpa"),
    "infinite logits": ({"logits": {"map": Z.log()}}, "finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        report({"map": P}, Y, **options)


def test_the_name_of_the_row_is_taken() -> None:
    with pytest.raises(ValueError, match="rename it"):
        report({"map": P, ROW: P}, Y)
    assert report({"map": P, ROW: P}, Y, temperature_scaling="none").scaling is None
