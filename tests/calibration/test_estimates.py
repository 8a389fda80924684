from math import sqrt

import pytest
import torch
from scipy.stats import binomtest, norm

from debiased_laplace.calibration import Estimate
from debiased_laplace.calibration.estimates import (
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    normal_quantile,
    wilson_interval,
)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_normal_quantile_is_scipys(level: float) -> None:
    assert normal_quantile(level) == pytest.approx(norm.ppf(0.5 + level / 2), rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (499, 500)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_interval_is_scipys(k: int, n: int, level: float) -> None:
    ci = binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson_interval(k / n, n, confidence_level=level) == pytest.approx((ci.low, ci.high), abs=1e-9)


def test_mean_by_hand() -> None:
    e = estimate_mean(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64), confidence_level=0.9)
    assert e.value == 3.0
    assert e.standard_error == pytest.approx(sqrt(7.0 / 3))
    assert e.high == pytest.approx(3.0 + 1.6448536269514722 * sqrt(7.0 / 3))
    assert (e.low + e.high) / 2 == pytest.approx(3.0)


def test_root_mean_by_hand() -> None:
    squares = torch.tensor([4.0, 16.0, 16.0, 28.0], dtype=torch.float64)
    e, mean = (f(squares, confidence_level=0.9) for f in (estimate_root_mean, estimate_mean))
    assert e.value == 4.0
    assert (e.low**2, e.high**2) == pytest.approx((mean.low, mean.high))
    assert e.standard_error == pytest.approx(mean.standard_error / 8)


@pytest.mark.parametrize("estimator", [estimate_mean, estimate_root_mean])
def test_one_sample_has_no_interval_and_says_so(estimator) -> None:
    e = estimator(torch.tensor([4.0], dtype=torch.float64), confidence_level=0.95)
    assert (e.low, e.high, e.standard_error) == (None, None, None)
    assert "one sample" in e.reason


def test_share_of_all_keeps_an_interval() -> None:
    e = estimate_share(torch.ones(20, dtype=torch.float64), confidence_level=0.95)
    assert e.value == e.high == 1.0
    assert 0.8 < e.low < 0.9


@pytest.mark.parametrize(
    "fields",
    [
        (float("nan"), 0.0, 1.0, 0.1, 5, "mean", None),
        (0.5, float("-inf"), 1.0, 0.1, 5, "mean", None),
        (0.5, 0.0, None, 0.1, 5, "mean", None),
        (0.5, None, None, None, 5, "mean", None),
        (0.5, 0.0, 1.0, 0.1, 5, "mean", "no reason needed"),
    ],
    ids=["NaN", "infinite end", "half an interval", "neither interval nor reason", "both"],
)
def test_estimate_refuses(fields) -> None:
    with pytest.raises(ValueError, match="estimate"):
        Estimate(*fields)
