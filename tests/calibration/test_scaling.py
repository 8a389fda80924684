"""Scaling: fits against SciPy and closed forms, folds that never see themselves, and the scaled row of a report."""

from math import log, sqrt

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

import debiased_laplace.calibration.scaling as sc
import debiased_laplace.calibration.temperature as tp
from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.probabilities import (
    PosteriorPredictive,
    Probabilities,
    read_probabilities,
    reduce_classification,
)
from debiased_laplace.calibration.regression import read_regression

ROW = "map, temperature-scaled"
STIFF, FLAT = {"temperature": 3.0, "scale": 30.0}, {"temperature": 0.9, "scale": 0.05, "n": 20_000}
PORTIONS = {"n": 1100, "n_classes": 1000}
REQUEST = sc.ScalingRequest("m", "cross_fitted")


def draw(n: int, seed: int, *, temperature: float = 2.0, n_classes: int = 10, scale: float = 1.5):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(dim=1), 1, generator=generator)[:, 0]
    return temperature * (z - z.amax(dim=1, keepdim=True)), labels


def fit(logits, labels, codes=None):
    return tp.fit_temperature(logits, labels, Units(len(labels), 0.9, codes))


def read(p, y):
    return reduce_classification(read_probabilities("m", p, task="multiclass"), y, n_bins=15)


def scale(p, y, codes=None, seed: int = 3):
    units = Units(len(y), 0.9, codes)
    return sc.scale_classification({"m": read(p, y)}, REQUEST, units, Settings(seed=seed), task="multiclass")


def report(predictions, y, **options):
    return calibration_report(predictions, y, **{"task": "multiclass", "n_resamples": 2, **options})


@pytest.mark.parametrize("case", [{"temperature": 2.7}, {"temperature": 0.2, "n_classes": 2}, STIFF, FLAT, PORTIONS])
def test_the_temperature_is_scipys_and_a_cluster_of_copies_is_one_unit(case) -> None:
    logits, labels = draw(**{"n": 400, "seed": 3, **case})
    loss, options = lambda beta: cross_entropy(beta * logits, labels).item(), {"bracket": (0.5, 1.0), "method": "brent"}
    found, copies = fit(logits, labels), torch.arange(len(labels)).repeat(2)
    assert found.value == pytest.approx(1 / minimize_scalar(loss, **options).x, rel=1e-5)
    again = fit(logits[copies], labels[copies], copies)
    assert (again.value, again.cost) == pytest.approx((found.value, found.cost))


def test_one_gap_by_hand_and_costs_that_are_the_expected_loss() -> None:
    # with one gap g and a share s of right labels the likeliest gap is logit(s)
    found = fit(torch.tensor([[0.0, -3.0]], dtype=torch.float64).expand(10, 2), torch.tensor([0] * 8 + [1] * 2))
    # slope of each loss in beta is -g (y - s): the sandwich is sd(y) g / sqrt(n - 1) over s (1 - s) g^2
    beta_error = sqrt(0.16 / 9) * 3 / (0.16 * 9)
    assert (found.value, found.cost) == pytest.approx((3 / log(4), 0.16 * 9 * beta_error**2 / 2), rel=1e-9)
    logits, labels = draw(60_000, 1, temperature=0.3)
    fits = [fit(*draw(600, seed, temperature=0.3)) for seed in range(60)]
    losses = torch.stack([cross_entropy(logits / T, labels) for T in (0.3, *(one.value for one in fits))])
    assert abs((losses[1:] - losses[0]).mean() / fits[0].cost - 1) < 3.5 * sqrt(2 / 60)
    assert 0 < fits[0].cost < 2e-3


def test_bounds_and_too_few_units_have_no_cost() -> None:
    z, y = draw(200, 7, temperature=1.2)
    assert fit(z, z.argmax(dim=1)) == tp.ScaleFit(tp.LOWEST_TEMPERATURE, 200, at_bound=True)
    assert fit(z, z.argmin(dim=1)) == tp.ScaleFit(tp.HIGHEST_TEMPERATURE, 200, at_bound=True)
    assert fit(0 * z, y) == tp.ScaleFit(1.0, 200)  # any temperature is as good
    assert fit(z, y, torch.zeros(200).long()) == tp.ScaleFit(fit(z, y).value, 200)


@pytest.mark.parametrize(("n", "folds"), [(100, 5), (7, 5), (2, 2)])
def test_folds_are_equal_in_size_drawn_by_the_seed_and_keep_clusters(n: int, folds: int) -> None:
    (fold, other), codes = (sc.draw_folds(Units(n, 0.9), seed=s) for s in (1, 2)), torch.arange(4 * n) // 4
    counts = torch.bincount(fold)
    assert (len(counts), int(counts.max() - counts.min()) <= 1) == (folds, True)
    assert n < 100 or not (torch.equal(fold, other) or torch.equal(fold, torch.arange(n) % 5))
    assert torch.equal(sc.draw_folds(Units(4 * n, 0.9, codes), seed=1), fold[codes])


def test_cross_fitting_never_uses_a_samples_own_fold(draw_classification, draw_regression) -> None:
    p, y, _ = draw_classification(400, sharpness=1.7, seed=1)
    mean, std, t = draw_regression(400, scale=1.7, seed=2, n_outputs=2)
    codes, squares = torch.arange(400) // 4, ((t - mean) / std).square()
    units, one = Units(400, 0.9, codes), read_regression("m", (mean, std), t)
    found, fold = scale(p, y, codes), sc.draw_folds(units, seed=3)
    wide = sc.scale_regression({"m": one}, REQUEST, units, Settings(seed=3), validation=None)
    for k in range(5):
        own = fold == k
        alone = (fit(p[~own].log(), y[~own]).value, squares[~own].mean().sqrt().item())
        assert (found.record.per_fold[k], wide.record.per_fold[k]) == pytest.approx(alone, rel=1e-8)
        assert set(found.row.source.temperature[own].tolist()) == {found.record.per_fold[k]}
        torch.testing.assert_close(wide.row.standard_deviation[own], wide.record.per_fold[k] * std[own])
    assert (len(set(found.record.per_fold)), len(set(wide.record.per_fold)), found.record.n_at_bound) == (5, 5, 0)
    pooled = fit(p.log() - p.log().amax(1, keepdim=True), y, codes)
    assert (found.record.value, found.fitting_error) == (pooled.value, sc.ERROR_PER_COST * pooled.cost)
    many = Probabilities(torch.empty(1, 1).expand(30_000, 1000))  # large test sets are fitted on a part
    drawn, other = (tp.choose_rows(many, seed=s).unique() for s in (1, 2))
    assert (len(drawn), torch.equal(drawn, other)) == (10_000, False)


def test_the_scaled_row_keeps_predictions_and_says_how_it_came_about() -> None:
    z, y = draw(400, 1)
    samples = torch.stack([(f * z).softmax(dim=1) for f in (0.6, 1.4)])  # averaged before they are scaled
    z, methods = samples.mean(dim=0).log(), {"first": z.softmax(dim=1), "map": samples}
    methods["last"] = (0.4 * z).softmax(dim=1)
    found, fitted = report(methods, y, baseline="map", seed=5), scale(samples, y, seed=5)
    m, T = found.metrics, fitted.row.source.temperature[:, None]
    assert list(found.methods) == ["first", "map", ROW, "last"]
    assert (found.scaling.per_fold, found.scaling.value) == (fitted.record.per_fold, fitted.record.value)
    assert "cross-fitted over 5 folds of the test set" in found.methods[ROW].description
    losses = [cross_entropy(x, y, reduction="none") for x in (methods["last"].log(), z / T)]
    assert m[ROW]["nll"].known == pytest.approx(losses[1].mean().item(), rel=1e-9)
    assert m[ROW]["accuracy"] == m["map"]["accuracy"]
    (c,) = [c for c in found.comparisons if (c.method, c.baseline, c.metric) == ("last", ROW, "nll")]
    assert c.standard_error == pytest.approx(sqrt((losses[0] - losses[1]).var() / 400 + fitted.fitting_error**2))


def test_validation_data_give_one_temperature_and_modes_say_whether_there_is_one() -> None:
    (z, y), (held_out, labels) = draw(300, 2, n_classes=2), draw(2000, 3, n_classes=2)
    T, of_class_1 = fit(held_out, labels).value, held_out[:, 1] - held_out[:, 0]
    p, mode = held_out.softmax(dim=1), "auto"
    for form in (p, held_out, of_class_1, PosteriorPredictive(p, torch.zeros(2000))):
        options, mode = {"task": "binary", "validation": (form, labels), "temperature_scaling": mode}, "validation"
        found = report({"map": z.softmax(dim=1)}, y, **options)
        assert (found.scaling.per_fold, found.scaling.n_fit, found.scaling.value) == ((), 2000, pytest.approx(T))
        assert found.metrics[ROW]["nll"].known == pytest.approx(cross_entropy(z / T, y).item())
    modes = [(100, {}), (99, {}), (99, {"temperature_scaling": "cross_fitted"}), (100, {"temperature_scaling": "none"})]
    modes.append((100, {"clusters": [7] * 100}))  # one unit has no folds
    found = [report({"map": z[:n].softmax(dim=1)}, y[:n], **options) for n, options in modes]
    assert [one.scaling is not None for one in found] == [True, False, True, False, False]


def test_logits_undo_saturation_and_labels_that_are_all_right_end_at_a_bound() -> None:
    z, y = draw(400, 4, temperature=60.0)
    p = {"map": z.float().softmax(dim=1)}
    blind, seeing, bound = report(p, y), report(p, y, logits={"map": z.float()}), report(p, z.argmax(dim=1))
    assert [any("is unreliable" in w for w in r.warnings) for r in (blind, seeing)] == [True, False]
    assert seeing.scaling.value == pytest.approx(60, rel=0.2)
    assert seeing.metrics[ROW]["nll"].known < blind.metrics[ROW]["nll"].known
    assert any("5 of 5 temperatures ended at a bound" in w for w in bound.warnings)
    coarse = read((z / 4).softmax(dim=1).half(), z.argmax(dim=1))  # its zeros matter at high temperatures only
    (warning,) = tp.warn_of_saturation("m", coarse, 5.0)
    assert "torch.float16 rounded to 0; pass logits={'m': ...}" in warning
    assert tp.warn_of_saturation("m", coarse, 0.4) == []


def test_regression_has_a_row_with_scaled_deviations(draw_regression) -> None:
    (mean, std, y), (m, s, t) = (draw_regression(n, scale=1.6, seed=n) for n in (300, 500))
    row, p, every = "map, variance-scaled", read_regression("m", (mean, std), y), torch.arange(300)
    found = report({"map": (mean, std), "la": (mean, 1.6 * std)}, y, clusters=every // 3, seed=2, task="regression")
    fold = sc.draw_folds(Units(300, 0.95, every // 3), seed=2)
    factor, squares = torch.tensor(found.scaling.per_fold)[fold], p.z_scores.square()[:, 0]
    assert list(found.methods) == ["map", row, "la"]
    assert found.scaling.value == pytest.approx(found.metrics["map"]["z_scale"].known)
    assert found.metrics[row]["rmse"] == found.metrics["map"]["rmse"]
    cost = sc.fit_factor(p, every, Units(300, 0.95)).cost
    assert cost == pytest.approx((squares.std() / squares.mean()).item() ** 2 / 1200)
    assert found.metrics[row]["sharpness"].known == pytest.approx((std * factor).mean().item())
    assert "aurc" not in found.metrics[row]  # a factor changes no order
    fixed = report({"map": (mean, std)}, y, validation=((m, s), t), task="regression")
    value = ((t - m) / s).square().mean().sqrt().item()
    assert (fixed.scaling.value, fixed.scaling.n_fit) == (pytest.approx(value), 500)
    assert fixed.metrics[row]["sharpness"].known == pytest.approx(value * std.mean().item())
    perfect = report({"map": (y, std)}, y, task="regression")
    assert (perfect.scaling, any("cannot be scaled" in w for w in perfect.warnings)) == (None, True)
