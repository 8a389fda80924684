"""Scaling: fits against SciPy and closed forms, folds that never see themselves, and the scaled row of a report."""

from math import exp, log, sqrt

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

import debiased_laplace.calibration.scaling as sc
import debiased_laplace.calibration.temperature as tp
from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.probabilities import Probabilities, read_probabilities, reduce_classification
from debiased_laplace.calibration.regression import read_regression

ROW = "map, temperature-scaled"
STIFF, FLAT = {"temperature": 3.0, "scale": 30.0}, {"temperature": 0.9, "scale": 0.05, "n": 20_000}
PORTIONS = {"n": 1100, "n_classes": 1000}


def draw(n: int, seed: int, *, temperature: float = 2.0, n_classes: int = 10, scale: float = 1.5):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(dim=1), 1, generator=generator)[:, 0]
    return temperature * (z - z.amax(dim=1, keepdim=True)), labels


def fit(logits, labels, codes=None):
    return tp.fit_temperature(logits, labels, Units(len(labels), 0.9, codes))


def read(p, y):
    return reduce_classification(read_probabilities("m", p, task="multiclass"), y, n_bins=15)


def report(predictions, y, **options):
    return calibration_report(predictions, y, **{"task": "multiclass", "n_resamples": 2, **options})


@pytest.mark.parametrize("case", [{"temperature": 2.7}, {"temperature": 0.2, "n_classes": 2}, STIFF, FLAT, PORTIONS])
def test_the_temperature_is_scipys_and_a_cluster_of_copies_is_one_unit(case) -> None:
    logits, labels = draw(**{"n": 400, "seed": 3, **case})
    loss, options = lambda beta: cross_entropy(beta * logits, labels).item(), {"bracket": (0.5, 1.0), "method": "brent"}
    found, copies = fit(logits, labels), torch.arange(len(labels)).repeat(2)
    assert found.temperature == pytest.approx(1 / minimize_scalar(loss, **options).x, rel=1e-5)
    numbers = [(x.temperature, x.standard_error) for x in (found, fit(logits[copies], labels[copies], copies))]
    assert numbers[1] == pytest.approx(numbers[0])


def test_one_gap_by_hand_and_errors_that_are_right() -> None:
    # with one gap g and a share s of right labels the likeliest gap is logit(s)
    found = fit(torch.tensor([[0.0, -3.0]], dtype=torch.float64).expand(10, 2), torch.tensor([0] * 8 + [1] * 2))
    # slope of each loss in beta is -g (y - s): the sandwich is sd(y) g / sqrt(n - 1) over s (1 - s) g^2
    beta_error, T = sqrt(0.16 / 9) * 3 / (0.16 * 9), 3 / log(4)
    expected = (T, beta_error * T**2, 0.16 * 9 * beta_error**2 / 2)
    assert (found.temperature, found.standard_error, found.cost) == pytest.approx(expected, rel=1e-9)
    e, factor = tp.estimate_temperature(found, Units(10, 0.9)), exp(1.644853627 * beta_error * T)
    assert (e.low, e.high) == pytest.approx((T / factor, T * factor))
    fits = [fit(*draw(600, seed, temperature=0.3)) for seed in range(60)]
    z = torch.tensor([(one.temperature - 0.3) / one.standard_error for one in fits])
    assert (abs(z.mean().item()) < 3.5 / sqrt(60), 0.7 < z.std().item() < 1.35) == (True, True)
    assert fits[0].standard_error < 0.015  # the assertions above have power


def test_bounds_and_too_few_units_have_no_error() -> None:
    logits, labels = draw(200, 7, temperature=1.2)
    for found, T, bound, reason in (
        (fit(logits, logits.argmax(dim=1)), tp.LOWEST_TEMPERATURE, "lowest", "labels are the most probable class"),
        (fit(logits, logits.argmin(dim=1)), tp.HIGHEST_TEMPERATURE, "highest", "the logits tell nothing"),
        (fit(torch.zeros(20, 4).double(), torch.arange(20) % 4), 1.0, None, "too few"),  # any temperature is as good
        (fit(logits, labels, torch.zeros(200).long()), fit(logits, labels).temperature, None, "too few"),
    ):
        assert (found.temperature, found.at_bound, found.standard_error, found.cost) == (T, bound, None, 0.0)
        assert reason in tp.estimate_temperature(found, Units(200, 0.9)).reason


@pytest.mark.parametrize(("n", "folds"), [(100, 5), (7, 5), (3, 3), (2, 2)])
def test_folds_are_equal_in_size_drawn_by_the_seed_and_keep_clusters(n: int, folds: int) -> None:
    (fold, again, other), codes = (tp.draw_folds(Units(n, 0.9), seed=s) for s in (1, 1, 2)), torch.arange(4 * n) % n
    counts = torch.bincount(fold)
    assert (len(counts), int(counts.max() - counts.min()) <= 1, torch.equal(fold, again)) == (folds, True, True)
    assert n < 100 or not (torch.equal(fold, other) or torch.equal(fold, torch.arange(n) % 5))
    assert torch.equal(tp.draw_folds(Units(4 * n, 0.9, codes), seed=1), fold[codes])


def test_cross_fitting_never_uses_a_samples_own_fold(draw_classification, draw_regression) -> None:
    p, y, _ = draw_classification(400, sharpness=1.7, seed=1)
    mean, std, t = draw_regression(400, scale=1.7, seed=2, n_outputs=2)
    units, squares = Units(400, 0.9, torch.arange(400) // 4), ((t - mean) / std).square()
    found = tp.cross_fit_temperature(read(p, y), units, seed=3)
    factor, factors = sc.cross_fit_factor(read_regression("m", (mean, std), t), units, seed=3)
    for k in range(5):
        own = found.fold == k
        alone = (fit(p[~own].log(), y[~own]).temperature, squares[~own].mean().sqrt().item())
        assert (found.per_fold[k], factors[k]) == pytest.approx(alone, rel=1e-8)
        assert (set(found.temperature[own].tolist()), set(factor[own].tolist())) == ({found.per_fold[k]}, {factors[k]})
    assert (len(set(found.per_fold)), len(set(factors)), found.n_at_bound) == (5, 5, 0)
    many = Probabilities(torch.empty(1, 1).expand(30_000, 1000))  # large test sets are fitted on a part
    one, other = (tp.choose_rows(many, seed=s).unique() for s in (1, 2))
    assert (len(one), torch.equal(one, other)) == (10_000, False)
    assert found.pooled == fit(p.log() - p.log().amax(1, keepdim=True), y, units.codes)


def test_the_scaled_row_keeps_predictions_and_says_how_it_came_about() -> None:
    z, y = draw(400, 1)
    samples = torch.stack([(f * z).softmax(dim=1) for f in (0.6, 1.4)])  # averaged before they are scaled
    z, methods = samples.mean(dim=0).log(), {"first": z.softmax(dim=1), "map": samples}
    methods["last"] = (0.4 * z).softmax(dim=1)
    found = report(methods, y, baseline="map", seed=5)
    m, fitted = found.metrics, tp.cross_fit_temperature(read(methods["map"], y), Units(400, 0.95), seed=5)
    assert list(found.methods) == ["first", "map", ROW, "last"]
    assert (found.scaling.per_fold, found.scaling.value) == (fitted.per_fold, fitted.pooled.temperature)
    assert "cross-fitted over 5 folds of the test set" in found.methods[ROW].description
    losses = [cross_entropy(x, y, reduction="none") for x in (methods["last"].log(), z / fitted.temperature[:, None])]
    assert m[ROW]["nll"].known == pytest.approx(losses[1].mean().item(), rel=1e-9)
    assert m["map"]["nll_refinement_loss"].known == pytest.approx(m[ROW]["nll"].known)
    assert (m[ROW]["accuracy"], "temperature_optimal" in m[ROW]) == (m["map"]["accuracy"], False)
    assert m["map"]["temperature_optimal"].low > 1 > m["last"]["temperature_optimal"].high
    (c,) = [c for c in found.comparisons if (c.method, c.baseline, c.metric) == ("last", ROW, "nll")]
    fitting, gain = sc.ERROR_PER_COST * fitted.pooled.cost, cross_entropy(z, y, reduction="none") - losses[1]
    repaired = m["map"]["nll_calibration_loss"]
    assert c.standard_error == pytest.approx(sqrt((losses[0] - losses[1]).var() / 400 + fitting**2))
    assert repaired.standard_error == pytest.approx(sqrt(gain.var() / 400 + fitting**2))
    assert repaired.value == pytest.approx(gain.mean().item())


def test_validation_data_give_one_temperature_and_modes_say_whether_there_is_one() -> None:
    (z, y), (held_out, labels) = draw(300, 2, n_classes=2), draw(2000, 3, n_classes=2)
    T, of_class_1 = fit(held_out, labels).temperature, held_out[:, 1] - held_out[:, 0]
    for form, mode in ((held_out.softmax(dim=1), "auto"), (held_out, "validation"), (of_class_1, "auto")):
        options = {"task": "binary", "validation": (form, labels), "temperature_scaling": mode}
        found = report({"map": z.softmax(dim=1)}, y, **options)
        assert (found.scaling.per_fold, found.scaling.n_fit, found.scaling.value) == ((), 2000, pytest.approx(T))
        assert found.metrics[ROW]["nll"].known == pytest.approx(cross_entropy(z / T, y).item())
    modes = [(100, {}), (99, {}), (99, {"temperature_scaling": "cross_fitted"}), (100, {"temperature_scaling": "none"})]
    modes.append((100, {"clusters": [7] * 100}))  # one unit has no folds
    found = [report({"map": z[:n].softmax(dim=1)}, y[:n], **options) for n, options in modes]
    assert [one.scaling is not None for one in found] == [True, False, True, False, False]
    assert ["nll_calibration_loss" in one.metrics["map"] for one in found] == [True, False, True, False, False]


def test_logits_undo_saturation_and_labels_that_are_all_right_end_at_a_bound() -> None:
    z, y = draw(400, 4, temperature=60.0)
    p = {"map": z.float().softmax(dim=1)}
    blind, seeing, bound = report(p, y), report(p, y, logits={"map": z.float()}), report(p, z.argmax(dim=1))
    assert [any("temperature is unreliable" in w for w in r.warnings) for r in (blind, seeing)] == [True, False]
    assert seeing.scaling.value == pytest.approx(60, rel=0.2)
    assert seeing.metrics[ROW]["nll"].known < blind.metrics[ROW]["nll"].known
    assert any("5 of 5 temperatures ended at a bound" in w for w in bound.warnings)
    coarse = read((z / 4).softmax(dim=1).half(), z.argmax(dim=1))  # its zeros matter at high temperatures only
    assert "torch.float16 rounded to 0; pass logits={'m': ...}" in tp.warn_of_saturation("m", coarse, 5.0)
    assert tp.warn_of_saturation("m", coarse, 0.4) is None


def test_regression_has_a_row_with_scaled_deviations(draw_regression) -> None:
    (mean, std, y), (m, s, t) = (draw_regression(n, scale=1.6, seed=n) for n in (300, 500))
    row, codes = "map, variance-scaled", torch.arange(300) // 3
    found = report({"map": (mean, std), "la": (mean, 1.6 * std)}, y, clusters=codes, seed=2, task="regression")
    p, units = read_regression("m", (mean, std), y), Units(300, 0.95, codes)
    factor, per_fold = sc.cross_fit_factor(p, units, seed=2)
    assert (list(found.methods), found.scaling.per_fold) == (["map", row, "la"], per_fold)
    assert found.scaling.value == pytest.approx(found.metrics["map"]["z_scale"].known)
    assert found.metrics[row]["rmse"] == found.metrics["map"]["rmse"]
    squares, alone = p.z_scores.square()[:, 0], Units(300, 0.95)
    assert sc.fitting_cost(p, alone) == pytest.approx((squares.std() / squares.mean()).item() ** 2 / 1200)
    scaled = [sc.scale_spread(p, torch.full((300,), f * sc.fit_factor(p)).double()) for f in (1.0, 0.99, 1.01)]
    assert scaled[0].negative_log_density.mean() < min(x.negative_log_density.mean() for x in scaled[1:])
    assert found.metrics[row]["sharpness"].known == pytest.approx((std * factor).mean().item())
    assert "aurc" not in found.metrics[row]  # a factor changes no order
    fixed = report({"map": (mean, std)}, y, validation=((m, s), t), task="regression")
    value = ((t - m) / s).square().mean().sqrt().item()
    assert (fixed.scaling.value, fixed.scaling.n_fit) == (pytest.approx(value), 500)
    assert fixed.metrics[row]["sharpness"].known == pytest.approx(value * std.mean().item())
    perfect = report({"map": (y, std)}, y, task="regression")
    assert (perfect.scaling, any("cannot be scaled" in w for w in perfect.warnings)) == (None, True)
