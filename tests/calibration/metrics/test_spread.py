"""Errors by predicted spread against netcal called directly, and their noise floor against theory."""

from math import pi, sqrt

import numpy as np
import pytest
import torch
from netcal.metrics.regression import ENCE, QCE, UCE

from debiased_laplace.calibration.metrics.netcal_regression import QUANTILE_LEVELS
from debiased_laplace.calibration.metrics.regression_curves import choose_examples, tabulate_spread
from debiased_laplace.calibration.metrics.spread import bin_by_mass, bin_by_width, calibrate_spread, normalized_error
from debiased_laplace.calibration.predictions.forms import Gaussian, Samples
from debiased_laplace.calibration.predictions.regression import read_regression


def calibrate(predictions, *, n_resamples: int = 50, seed: int = 0):
    return calibrate_spread(predictions, confidence_level=0.9, n_resamples=n_resamples, seed=seed)


@pytest.mark.parametrize("n_outputs", [None, 3])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_agrees_with_netcal_called_directly(draw_regression, n_outputs: int | None, scale: float) -> None:
    mean, std, y = draw_regression(500, scale=scale, seed=30, n_outputs=n_outputs)
    spread = calibrate(read_regression("net", (mean, std), y))
    given, q = (mean.numpy(), std.numpy()), np.array(QUANTILE_LEVELS)
    expected = {
        "ence": ENCE(bins=10).measure(given, y.numpy()),
        "uce": UCE(bins=10).measure(given, y.numpy()),
        "m_qce": QCE(bins=10, marginal=True).measure(given, y.numpy(), q=q, reduction="none").mean(axis=0),
        "c_qce": QCE(bins=10, marginal=False).measure(given, y.numpy(), q=q, reduction="none").mean(axis=0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(spread.netcal, name).numpy(), np.atleast_1d(value), rtol=0, atol=1e-9)


def test_simulated_statistic_is_netcals_own(draw_regression) -> None:
    mean, std, y = draw_regression(400, scale=1.3, seed=31, n_outputs=2)
    predictions = read_regression("net", (mean, std), y)
    spread = calibrate(predictions)
    bins = bin_by_width(std, spread.is_constant)
    own = normalized_error(bins.average(std.square()), bins.average(predictions.errors.square()))
    torch.testing.assert_close(own, spread.netcal.ence, rtol=0, atol=1e-9)


def test_netcal_fails_on_the_constant_deviation_that_is_left_out() -> None:
    with pytest.raises(ValueError, match="edge"):
        ENCE(bins=10).measure((np.zeros(20), np.ones(20)), np.arange(20.0))
    spread = calibrate(read_regression("net", (torch.zeros(20), torch.ones(20)), torch.arange(20.0)))
    assert spread.is_constant.tolist() == [True]
    assert bool(spread.netcal.ence.isnan().all())


def test_bins_of_equal_mass_keep_ties_together() -> None:
    std = torch.tensor([[1.0, 5.0], [1.0, 4.0], [1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]).double().repeat(4, 1)
    bins = bin_by_mass(std)
    assert bins.n_bins == 4
    assert bins.counts.tolist() == [[0, 12, 0, 8], [4, 4, 4, 8]] or bins.counts.sum(dim=1).tolist() == [20, 20]
    for j in range(2):
        for value in std[:, j].unique():
            assert len(bins.index[std[:, j] == value, j].unique()) == 1
    distinct = bin_by_mass(torch.rand(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert distinct.counts.tolist() == [[100] * 10]


def test_averages_by_hand() -> None:
    std = torch.tensor([[1.0], [1.0], [3.0], [2.9]]).double()
    bins = bin_by_width(std, torch.tensor([False]))
    average = bins.average(torch.tensor([[1.0], [3.0], [5.0], [9.0]]).double())
    assert average[0, [0, 9]].tolist() == [2.0, 7.0]
    assert int(average.isnan().sum()) == 8


def test_noise_floor_is_what_theory_says_for_large_bins(draw_regression) -> None:
    # sqrt of a mean of m squared normals has relative deviation 1 / sqrt(2 m): its mean distance is sqrt(1 / (pi m)),
    # within bins of equal mass and nearly equal spread
    n = 4000
    std = torch.linspace(1.0, 1.01, n, dtype=torch.float64)
    spread = calibrate(read_regression("net", (torch.zeros(n), std), torch.zeros(n)), n_resamples=400)
    simulated = spread.simulated_equal_mass[:, 0]
    expected = sqrt(1 / (pi * n / 10))
    assert abs(simulated.mean().item() - expected) < 3.5 * simulated.std().item() / 20 + 0.01 * expected


FORMS = {
    "deviation": lambda mean, std, f: (mean, std),
    "covariance": lambda mean, std, f: Gaussian(mean, covariance=torch.diag_embed(std.square()), noise_included=True),
    "mixture": lambda mean, std, f: Samples(mean + f, observation_noise=std),
    "samples": lambda mean, std, f: Samples(mean + std * f * 5, noise_included=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_draws_have_the_moments_of_the_predictive(draw_regression, form: str) -> None:
    mean, std, y = draw_regression(6, scale=1.0, seed=32, n_outputs=2)
    f = 0.3 * torch.randn(40, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = read_regression("net", FORMS[form](mean, std, f), y)
    e = p.distribution.draw_errors(20_000, torch.Generator().manual_seed(1))
    variance = p.standard_deviation.square() * (39 / 40 if form == "samples" else 1)
    assert bool((e.mean(dim=0).abs() < 4 * (variance / 20_000).sqrt()).all())
    torch.testing.assert_close(e.var(dim=0), variance, rtol=0.06, atol=0)


def test_draws_of_a_covariance_are_correlated() -> None:
    C = torch.tensor([[[2.0, 1.2], [1.2, 1.0]]]).double()
    p = read_regression("net", Gaussian(torch.zeros(1, 2), covariance=C, noise_included=True), torch.zeros(1, 2))
    e = p.distribution.draw_errors(50_000, torch.Generator().manual_seed(1))[:, 0]
    torch.testing.assert_close(torch.cov(e.T), C[0], rtol=0, atol=0.04)


def test_seed_decides_and_nothing_else(draw_regression) -> None:
    p = read_regression("net", *[(m, s) for m, s, _ in [draw_regression(60, scale=1.0, seed=3)]], torch.zeros(60))
    state = torch.random.get_rng_state()
    a, b, c = calibrate(p), calibrate(p), calibrate(p, seed=1)
    assert torch.equal(a.simulated, b.simulated)
    assert not torch.equal(a.simulated, c.simulated)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "n_outputs"), [(1.0, None), (1.0, 3), (1.25, None)])
def test_size_and_power_of_the_test_of_spread(draw_regression, scale: float, n_outputs: int | None) -> None:
    p_values = []
    for seed in range(200):
        mean, std, y = draw_regression(200, scale=scale, seed=1000 + seed, n_outputs=n_outputs)
        spread = calibrate(read_regression("net", (mean, std), y), n_resamples=99, seed=seed)
        simulated = spread.simulated_equal_mass.mean(dim=1)
        p_values.append((1 + int((simulated >= spread.equal_mass.mean()).sum())) / 100)
    share = np.mean(np.array(p_values) <= 0.1)
    if scale == 1.0:
        assert abs(share - 0.1) < 3.5 * sqrt(0.1 * 0.9 / 200)
    else:
        assert share > 0.7


def test_table_of_bins_by_hand() -> None:
    std = torch.tensor([1.0] * 5 + [2.0] * 5).double()
    y = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 4.0, -4.0, 4.0, -4.0, 4.0]).double()
    p = read_regression("net", (torch.zeros(10), std), y)
    bins = tabulate_spread(p, calibrate(p, n_resamples=500), confidence_level=0.9)
    assert [(b.n, b.predicted, b.observed) for b in bins] == [(5, 1.0, 1.0), (5, 2.0, 4.0)]
    assert bins[0].consistent_low < 1 < bins[0].consistent_high < bins[1].observed
    assert bins[1].consistent_high < 4


def test_examples_are_the_same_samples_for_every_method_in_order(draw_regression) -> None:
    mean, std, y = draw_regression(300, scale=1.0, seed=33)
    one = choose_examples(read_regression("a", (mean, std), y), seed=4)
    other = choose_examples(read_regression("b", (-mean, 2 * std), y), seed=4)
    assert len(one) == 60
    assert {e.sample for e in one} == {e.sample for e in other}
    for rows in (one, other):
        assert [e.mean for e in rows] == sorted(e.mean for e in rows)
    e = one[7]
    assert (e.mean, e.target) == (mean[e.sample].item(), y[e.sample].item())
    assert e.high - e.low == pytest.approx(2 * 1.6448536 * std[e.sample].item(), rel=1e-6)
