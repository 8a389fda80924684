"""Regression metrics against netcal, SciPy, scikit-learn, values by hand and simulated calibrated test sets."""

from math import sqrt

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, norm
from sklearn.metrics import root_mean_squared_error

from debiased_laplace.calibration.distributions import Gaussian
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.metrics import regression as room
from debiased_laplace.calibration.metrics.definitions import DETECTION, REGRESSION
from debiased_laplace.calibration.regression import read_regression


def measure(form, y, *, level: float = 0.9, n_resamples: int = 20, clusters=None, seed: int = 0):
    predictions = read_regression("net", form, y)
    return room.measure_regression(predictions, Units(len(y), level, clusters), Settings(15, level, n_resamples, seed))


@pytest.mark.parametrize("n_outputs", [None, 3])
def test_metrics_are_those_of_netcal_scipy_and_scikit_learn(draw_regression, n_outputs) -> None:
    mean, std, y = draw_regression(500, scale=1.3, seed=30, n_outputs=n_outputs)
    result, d = measure((mean, std), y), n_outputs or 1
    m = result.metrics
    below, s, e = (np.reshape(x, (500, d)) for x in (norm.cdf(y, mean, std), std.numpy(), (y - mean).numpy()))
    ence = []
    for j in range(d):  # ten bins of equal width
        b = np.minimum(9, np.searchsorted(np.linspace(s[:, j].min(), s[:, j].max(), 11), s[:, j], side="right") - 1)
        ratios = [sqrt(np.mean(e[b == k, j] ** 2) / np.mean(s[b == k, j] ** 2)) for k in set(b)]
        ence.append(np.mean(np.abs(1 - np.array(ratios))))
    expected = {"ence": np.mean(ence), "rmse": root_mean_squared_error(y.flatten(), mean.flatten())}
    expected |= {"z_scale": sqrt(np.mean((e / s) ** 2)), "picp": np.mean((below > 0.05) & (below < 0.95))}
    expected |= {"mpiw": 2 * norm.ppf(0.95) * s.mean(), "sharpness": s.mean()}
    expected["pit_ks_p_value"] = min(1.0, d * min(kstest(column, "uniform").pvalue for column in below.T))
    assert {name: m[name].value for name in expected} == pytest.approx(expected, rel=1e-9)
    assert {b.output for b in result.curves.spread} == set(range(d))
    for name, scores in room.scores_of(read_regression("net", (mean, std), y)).items():
        assert scores.mean().item() == pytest.approx(m[name].value, rel=1e-12)


def test_outputs_of_constant_spread_are_left_out_and_say_why(draw_regression) -> None:
    mean, std, y = draw_regression(150, scale=1.0, seed=11, n_outputs=3)
    std[:, 1] = 0.7
    joint, *alone = (measure((mean[:, j], std[:, j]), y[:, j]).metrics for j in ([0, 1, 2], 0, 1, 2))
    for name in ("crps", "nll", "aurc", "ence"):
        assert joint[name].value == pytest.approx(np.mean([m[name].value for m in alone if m[name].value is not None]))
    p = read_regression("net", (mean, std), y)
    draws, _ = room.simulate_spread(p, room.bin_by_mass(std), Settings(15, 0.9, 20))
    assert joint["ence_noise_floor"].value == pytest.approx(draws[:, [0, 2]].mean().item())
    reasons = {name: e.reason for name, e in alone[1].items() if e.value is None}
    assert reasons == dict.fromkeys(("ence", "ence_noise_floor", "ence_p_value"), room.CONSTANT)


@pytest.mark.parametrize("n_outputs", [None, 2])
def test_simulated_errors_are_those_of_calibrated_test_sets(draw_regression, n_outputs) -> None:
    mean, std, _ = draw_regression(200, scale=1.0, seed=3, n_outputs=n_outputs)
    generator, ence = torch.Generator().manual_seed(5), []
    for scale in [1.0] * 150 + [1.3] * 20:
        y = mean + scale * std * torch.randn(std.shape, generator=generator, dtype=torch.float64)
        p = read_regression("net", (mean, std), y)
        ence.append(np.mean([room.netcal_ence(p, j) for j in range(p.n_outputs)]))
    draws, _ = room.simulate_spread(p, room.bin_by_mass(p.standard_deviation), Settings(n_resamples=400, seed=1))
    simulated = draws.mean(dim=1).numpy()
    error = np.std(simulated) * sqrt(1 / 150 + 1 / 400)
    assert abs(np.mean(ence[:150]) - simulated.mean()) < 3.5 * error
    assert simulated.mean() > 15 * error
    p_values = np.array([np.mean(simulated >= x) for x in ence])
    assert kstest(p_values[:150], "uniform").pvalue > 1e-3
    assert p_values[150:].mean() < 0.05
    m = measure((mean, std), y, n_resamples=400, seed=1).metrics  # of the last, wrong set
    assert m["ence_noise_floor"].value == pytest.approx(simulated.mean())
    assert m["ence_p_value"].value == (1 + np.sum(simulated >= ence[-1])) / 401


def test_bins_of_spread_by_hand_and_their_band_of_five_squared_normals() -> None:
    std = torch.tensor([[1.0, 5.0], [1.0, 4.0], [1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], dtype=torch.float64).repeat(4, 1)
    # equal values stay together, at their middle rank: 6 of 20 lies in the second of four bins
    assert [torch.bincount(b).tolist() for b in room.bin_by_mass(std).T] == [[0, 12, 4, 4], [4, 8, 4, 4]]
    assert torch.bincount(room.bin_by_mass(torch.arange(1000.0)[:, None])[:, 0]).tolist() == [100] * 10
    width = room.bin_by_width(torch.tensor([[1.0], [1.0], [3.0], [2.81], [2.79]], dtype=torch.float64))
    assert width[:, 0].tolist() == [0, 0, 9, 9, 8]
    average = room.average_by_bin(torch.tensor([[1.0], [3.0], [5.0], [9.0], [4.0]], dtype=torch.float64), width)
    assert average[0].nan_to_num(-1).tolist() == [2.0, *[-1.0] * 7, 4.0, 7.0]
    y = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 4.0, -4.0, 4.0, -4.0, 4.0], dtype=torch.float64)
    bins = measure((0 * y, torch.tensor([1.0] * 5 + [2.0] * 5)), y, n_resamples=4000).curves.spread
    assert [(b.output, b.n, b.predicted, b.observed) for b in bins] == [(0, 5, 1.0, 1.0), (0, 5, 2.0, 4.0)]
    for b in bins:
        ends = b.predicted * np.sqrt(chi2.ppf([0.05, 0.95], 5) / 5)
        assert (b.consistent_low, b.consistent_high) == pytest.approx(ends, rel=0.05)


@pytest.mark.parametrize(("n", "n_bins"), [(99, 10), (1200, 20)])
def test_histogram_of_the_transform_and_its_usual_counts(n: int, n_bins: int) -> None:
    p = np.stack([(np.arange(n) + 0.5) / n, ((np.arange(n) + 0.5) / n) ** 2], axis=1)
    bins = measure((0 * p, 0 * p + 1), torch.from_numpy(norm.ppf(p))).curves.pit
    expected = [(k / n_bins, (k + 1) / n_bins, x) for k, x in enumerate(np.histogram(p, n_bins, (0, 1))[0])]
    assert [(b.left, b.right, b.n) for b in bins] == expected
    half = norm.ppf(0.95) * sqrt(n / n_bins * (1 - 1 / n_bins))
    ends = [2 * (n / n_bins - half), 2 * (n / n_bins + half)]
    assert [bins[0].consistent_low, bins[0].consistent_high] == pytest.approx(ends)


@pytest.mark.parametrize(("scale", "is_right"), [(2.0, True), (1.0, False)])
def test_the_table_of_coverage_contains_the_nominal_levels_of_a_right_predictive(scale: float, is_right: bool) -> None:
    y = scale * torch.randn(4000, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    table, levels = measure((0 * y, 0 * y + 2), y, level=0.999, n_resamples=2).curves.coverage, np.arange(1, 20) / 20
    inside = [np.mean(np.abs(y.numpy()) <= 2 * norm.ppf((1 + q) / 2)) for q in levels]
    assert [(c.nominal, c.observed) for c in table] == list(zip(levels, inside, strict=True))
    assert {c.low <= c.nominal <= c.high for c in table} == {is_right}


def test_directions_and_units_of_the_definitions_and_intervals_or_reasons(draw_regression) -> None:
    mean, std, y = draw_regression(2000, scale=1.0, seed=13)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def metrics(mean, std, y, **options):
        return measure(Gaussian(mean, 0.6 * std, observation_noise=0.8 * std), y, **options).metrics

    good, bad = metrics(mean, std, y), metrics(mean + noise, 1.6 - std, y)
    twice = metrics(mean.repeat(2), std.repeat(2), y.repeat(2), clusters=torch.arange(2000).repeat(2))
    huge = {name: e.value for name, e in metrics(1e30 * mean, 1e30 * std, 1e30 * y).items()}
    assert good["function_std"].value == pytest.approx(0.6 * std.mean().item())
    assert good["noise_std"].value == pytest.approx(0.8 * std.mean().item())
    assert huge.pop("nll") == pytest.approx(good["nll"].value + np.log(1e30))
    power = {name: ("", "target", "squared").index(REGRESSION[name].unit) for name in huge}
    assert huge == pytest.approx({name: good[name].value * 1e30**k for name, k in power.items()}, rel=1e-9)
    assert set(good) == set(REGRESSION) - {"deviance"}
    for name, e in good.items():
        assert (e.low is None) == (e.reason is not None) == ("ence" in name or "p_value" in name)
        assert REGRESSION[name].better != "lower" or e.value < bad[name].value, name
        assert e.low is None or twice[name].standard_error == pytest.approx(e.standard_error, rel=0.02), name
    assert (REGRESSION["z_scale"].better, REGRESSION["picp"].better) == ("one", "level")
    assert {name: d.better for name, d in DETECTION.items()} == {"auroc": "higher", "aupr": "higher", "fpr95": "lower"}
