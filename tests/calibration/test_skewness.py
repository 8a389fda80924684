"""The interval of a skewed mean: transformation, symmetry, and a studentized bootstrap as oracle."""

from math import exp

import pytest
import torch
from scipy.stats import t as student

from debiased_laplace.calibration.estimates import estimate_mean
from debiased_laplace.calibration.skewness import bend, estimate_skewed_mean, lean_of, skewed_p_value, straighten


@pytest.mark.parametrize("lean", [0.0, 1e-12, 1e-6, 0.02, -0.3, 0.9])
def test_bending_undoes_straightening_and_rises(lean: float) -> None:
    grid = [x / 10 for x in range(-40, 41)]
    assert [straighten(bend(x, lean), lean) for x in grid] == pytest.approx(grid, abs=1e-6)
    bent = [bend(x, lean) for x in grid]
    assert bent == sorted(bent)


def test_lean_by_hand() -> None:
    r = torch.tensor([-1.0, -1.0, 2.0], dtype=torch.float64)
    assert lean_of(r) == pytest.approx(6 / 6**1.5)
    assert lean_of(1e-150 * r) == pytest.approx(6 / 6**1.5)  # cubes that underflow
    assert lean_of(0 * r) == 0.0


def test_a_symmetric_sample_has_the_normal_interval() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64) + 2
    skewed, plain = (f(x, confidence_level=0.9) for f in (estimate_skewed_mean, estimate_mean))
    assert (skewed.low, skewed.high) == pytest.approx((plain.low, plain.high))


def test_agrees_with_a_studentized_bootstrap() -> None:
    """Both ends are nearer to the bootstrap's than the normal ones are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, generator=generator, dtype=torch.float64).exp()
    n, R = len(x), 20_000
    w = torch.zeros(R, n, dtype=torch.float64)
    w.scatter_add_(1, torch.randint(n, (R, n), generator=generator), torch.ones(R, n, dtype=torch.float64))
    m = w @ x / n
    s = ((w @ x.square()) / n - m.square()).sqrt()
    t = torch.quantile((m - x.mean()) / s, torch.tensor([0.975, 0.025], dtype=torch.float64))
    low, high = (x.mean() - t * x.std(correction=0)).tolist()
    skewed, plain = (f(x, confidence_level=0.95) for f in (estimate_skewed_mean, estimate_mean))
    assert abs(skewed.low - low) < 0.4 * abs(plain.low - low)
    assert abs(skewed.high - high) < 0.4 * abs(plain.high - high)


def test_the_p_value_is_the_level_at_which_the_interval_touches_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, generator=generator, dtype=torch.float64).exp() - 1.2
    for clusters in (None, torch.arange(60) // 5):
        p = skewed_p_value(x, clusters=clusters, fitting_error=0.01)
        at = estimate_skewed_mean(x, confidence_level=1 - p, clusters=clusters, fitting_error=0.01)
        assert min(abs(at.low), abs(at.high)) < 1e-9
        assert 0.05 < p < 0.99


def test_clusters_of_copies_count_once_with_students_quantile() -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 3.0, 0.2, 0.1], dtype=torch.float64)
    clusters = torch.arange(6).repeat_interleave(4)
    e = estimate_skewed_mean(x.repeat_interleave(4), confidence_level=0.9, clusters=clusters)
    error, lean = x.std().item() / 6**0.5, lean_of(x - x.mean())
    assert e.standard_error == pytest.approx(error)
    assert e.high == pytest.approx(x.mean().item() - error * bend(-student.ppf(0.95, 5), lean))


@pytest.mark.slow
def test_covers_a_heavy_tail_on_both_sides() -> None:
    """Log-normal scores, n = 150: normal intervals miss on one side only and too often; these do not."""
    generator = torch.Generator().manual_seed(3)
    truth, n_sets, misses = exp(0.5), 3000, {"skewed": [0, 0], "normal": [0, 0]}
    for _ in range(n_sets):
        x = torch.randn(150, generator=generator, dtype=torch.float64).exp()
        for name, f in (("skewed", estimate_skewed_mean), ("normal", estimate_mean)):
            e = f(x, confidence_level=0.95)
            misses[name][0] += e.low > truth
            misses[name][1] += e.high < truth
    # 213 and 244 of 3,000 when written, 150 are right; the sides are 80 and 133 against 29 and 215
    assert sum(misses["skewed"]) < 0.95 * sum(misses["normal"])
    assert misses["skewed"][1] < 0.7 * misses["normal"][1]
    assert misses["normal"][0] < 0.01 * n_sets < 0.018 * n_sets < misses["skewed"][0]  # 2.5 % are right
