from math import sqrt

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.metrics import root_mean_squared_error

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.metrics.curves import tabulate_coverage, tabulate_pit
from debiased_laplace.calibration.metrics.regression import gaussian_crps, gaussian_negative_log_likelihood
from debiased_laplace.calibration.predictions.regression import read_regression


def measure(mean, std, y):
    return calibration_report({"net": (mean, std)}, y, task="regression").metrics["net"]


@pytest.mark.parametrize(("mean", "std", "y"), [(0.0, 1.0, 0.0), (1.5, 0.4, 2.3), (-2.0, 3.0, 4.0)])
def test_crps_is_the_integral_that_defines_it(mean: float, std: float, y: float) -> None:
    below = quad(lambda x: norm.cdf(x, mean, std) ** 2, -np.inf, y, epsabs=1e-12)[0]
    above = quad(lambda x: norm.sf(x, mean, std) ** 2, y, np.inf, epsabs=1e-12)[0]
    crps = gaussian_crps(read_regression("net", ([mean], [std]), [y])).item()
    assert crps == pytest.approx(below + above, abs=1e-9)


def test_nll_is_that_of_torch_averaged_over_outputs(draw_regression) -> None:
    mean, std, y = draw_regression(50, scale=1.0, seed=0, n_outputs=3)
    expected = -torch.distributions.Normal(mean, std).log_prob(y).mean(dim=1)
    mine = gaussian_negative_log_likelihood(read_regression("net", (mean, std), y))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_metrics_by_hand() -> None:
    m = measure([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 1.0, 2.0], [1.0, -2.0, 3.0, 0.0])
    assert set(m) == {"nll", "crps", "rmse", "z_scale", "picp", "mpiw", "sharpness"}
    assert m["rmse"].value == pytest.approx(sqrt(14 / 4))
    assert m["z_scale"].value == pytest.approx(sqrt(11 / 4))
    assert m["picp"].value == 0.75
    assert m["sharpness"].value == 1.5
    assert m["mpiw"].value == pytest.approx(2 * norm.ppf(0.95) * 1.5)


def test_rmse_is_that_of_scikit_learn(draw_regression) -> None:
    mean, std, y = draw_regression(80, scale=2.0, seed=1)
    assert measure(mean, std, y)["rmse"].value == pytest.approx(root_mean_squared_error(y, mean), abs=1e-12)


@pytest.mark.parametrize("n_outputs", [None, 3])
def test_the_scale_of_errors_is_found(draw_regression, n_outputs: int | None) -> None:
    mean, std, y = draw_regression(2000, scale=1.4, seed=2, n_outputs=n_outputs)
    m = measure(mean, std, y)
    assert abs(m["z_scale"].value - 1.4) < 3.5 * m["z_scale"].standard_error
    assert m["z_scale"].low > 1.2
    assert m["picp"].high < 0.9
    assert m["picp"].n == 2000


def test_constant_deviation_is_no_special_case() -> None:
    y = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = measure(torch.zeros(40), torch.full((40,), 0.5), y)
    assert (m["sharpness"].low, m["sharpness"].high) == (0.5, 0.5)
    assert m["mpiw"].standard_error == 0


def test_coverage_curve_of_right_and_wrong_error_bars(draw_regression) -> None:
    for scale, right in ((1.0, True), (2.0, False)):
        mean, std, y = draw_regression(3000, scale=scale, seed=3)
        levels = tabulate_coverage(read_regression("net", (mean, std), y), confidence_level=0.999)
        assert [x.nominal for x in levels] == pytest.approx([k / 20 for k in range(1, 20)])
        assert all(x.low <= x.nominal <= x.high for x in levels) == right
        expected = [2 * norm.cdf(norm.ppf(0.5 + x.nominal / 2) / scale) - 1 for x in levels]
        assert all(x.low <= e <= x.high for x, e in zip(levels, expected, strict=True))


def test_probability_transform_counts_by_hand() -> None:
    y = norm.ppf([0.05, 0.15, 0.151, 0.95])
    bins = tabulate_pit(read_regression("net", (np.zeros(4), np.ones(4)), y), confidence_level=0.9)
    assert [b.n for b in bins] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]


def test_extreme_targets_fall_in_the_outer_bins() -> None:
    bins = tabulate_pit(read_regression("net", (np.zeros(2), np.ones(2)), [-60.0, 60.0]), confidence_level=0.9)
    assert (bins[0].n, bins[-1].n) == (1, 1)
