"""Intervals for skewed curvatures, against closed forms, root finding and simulated populations."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from debiased_laplace.curvature.sub_batch import DirectionalMoments, RunningMoments
from debiased_laplace.debiasing.cross_fitting import pooled
from debiased_laplace.debiasing.intervals import ErrorShape, confidence_intervals, mismatch_of_folds
from debiased_laplace.debiasing.magnitudes import Magnitudes, cross_fitted, held_out, same_batch

LEVELS = (0.05, 0.5, 0.8, 0.95, 0.999)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def moments_of(values: Tensor) -> DirectionalMoments:
    """Return the moments of per-sample values (n, k)."""
    sums = RunningMoments(values.shape[1], values)
    sums.add(values)
    return sums.moments()


def intervals_of(magnitudes: Magnitudes, level: float = 0.95) -> Tensor:
    assert magnitudes.standard_errors is not None
    assert magnitudes.error_shape is not None
    return confidence_intervals(magnitudes.values, magnitudes.standard_errors, magnitudes.error_shape, level=level)


def shape_of(*skewness: float, n: int = 100, share: float = 0.0, mismatch: float = 0.0) -> ErrorShape:
    g = tensor(*skewness)
    return ErrorShape(g, torch.full_like(g, mismatch), n, share)


def normal_of(T: float, g: float, share: float) -> float:
    """Return Hall's exponential transformation of a studentized error."""
    A = (2 - share) / (6 * math.sqrt(1 - share))
    B = math.sqrt(1 - share) / 2 - A
    return (math.exp(2 * A * g * T) - 1) / (2 * A * g) + B * g


def test_without_skewness_it_is_student_s_interval() -> None:
    m, se = tensor(3.0, 0.5), tensor(0.2, 0.1)
    found = confidence_intervals(m, se, shape_of(0.0, 0.0, n=12), level=0.9)
    z = stats.t.ppf(0.95, 11)
    torch.testing.assert_close(found, torch.stack([m - z * se, m + z * se], 1))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("g", [1e-9, 0.05, 0.2, 0.4, -0.2])
def test_the_longer_end_is_where_the_transformation_is_a_quantile(g: float, share: float) -> None:
    shape = shape_of(g, n=40, share=share)
    lower, upper = confidence_intervals(tensor(9.0), tensor(0.5), shape, level=0.95)[0].tolist()
    z = float(stats.t.ppf(0.975, 39))
    if g > 0:
        below = brentq(lambda T: normal_of(T, g, share) + z, -40, 0)
        assert upper == pytest.approx(9 - 0.5 * below, rel=1e-6)
        assert lower == pytest.approx(9 - 0.5 * z)
    else:
        above = brentq(lambda T: normal_of(T, g, share) - z, 0, 40)
        assert lower == pytest.approx(9 - 0.5 * above, rel=1e-6)
        assert upper == pytest.approx(9 + 0.5 * z)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_transformation_is_nearer_to_normal_with_and_without_replacement(share: float) -> None:
    """Studentized errors of samples of a skewed population, infinite or not."""
    n, rng = 60, np.random.default_rng(1)
    T, g = [], []
    for _ in range(20_000):
        q = rng.gamma(1.0, size=n if share == 0 else round(n / share))
        truth, b = (1.0, q) if share == 0 else (q.mean(), q[:n])
        T.append((b.mean() - truth) / (b.std(ddof=1) * math.sqrt((1 - share) / n)))
        g.append(2 / math.sqrt(n))
    below = stats.norm.ppf(0.025)
    plain = np.mean(np.array(T) < below)
    transformed = np.mean(np.array([normal_of(*pair, share) for pair in zip(T, g, strict=True)]) < below)
    assert plain > 0.05
    assert 0.02 < transformed < 0.034


def simulated(kind: str, level: float, n: int = 256, N: int = 1024) -> tuple[float, float, float]:
    """Return coverage of these and of plain intervals, and their relative width; the spread is 3.5 means."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(N, 2000, generator=generator, dtype=torch.float64)
    q = (1.6 * normal).exp() if kind == "nearly zero for most" else normal.square()
    found = held_out(q[:0].sum(0), moments_of(q[:n]), n_a=0, n_data=N)
    truth, ends = q.mean(0), intervals_of(found, level)
    half = stats.norm.ppf((1 + level) / 2) * found.standard_errors
    hits = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    plain = (found.values - truth).abs() <= half
    width = (ends[:, 1] - ends[:, 0]) / (2 * half)
    return float(hits.double().mean()), float(plain.double().mean()), float(width.median())


def test_coverage_where_plain_intervals_fail() -> None:
    covered, plain, width = simulated("nearly zero for most", 0.95)
    assert plain < 0.89  # the test has power: two standard errors of 2000 intervals are 1.5 %
    assert covered > 0.9
    assert 1.2 < width < 3


def test_intervals_are_hardly_wider_where_plain_ones_suffice() -> None:
    covered, plain, width = simulated("chi-square", 0.95)
    assert plain > 0.92
    assert covered > 0.93
    assert 1 < width < 1.1


@pytest.mark.parametrize("g", [-0.8, -0.1, 0.0, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("n", [2, 3, 30])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_higher_levels_are_wider_and_all_contain_the_estimate(g: float, n: int, share: float) -> None:
    shape = shape_of(g, n=n, share=share, mismatch=0.1)
    found = torch.cat([confidence_intervals(tensor(2.0), tensor(0.3), shape, level=level) for level in LEVELS])
    lower, upper = found.T
    assert bool(found.isfinite().all())
    assert bool((lower.diff() <= 0).all())
    assert bool((upper.diff() > 0).all())
    assert bool(((lower >= 0) & (lower <= 2) & (upper >= 2)).all())


def test_more_skewness_is_never_narrower() -> None:
    g = torch.linspace(-1, 1, 201, dtype=torch.float64)
    ends = confidence_intervals(torch.full_like(g, 50.0), torch.ones_like(g), shape_of(*g.tolist()), level=0.95)
    assert bool((ends[:, 1].diff() >= 0).all())
    assert bool((ends[:, 0].diff() >= 0).all())
    assert float(ends[-1, 1]) < 50 + 8  # however skewed


def test_the_mismatch_of_directions_moves_one_end() -> None:
    m, se = tensor(3.0, 3.0, 3.0), tensor(0.2, 0.2, 0.2)
    plain = confidence_intervals(m, se, shape_of(0.0, 0.0, 0.0), level=0.95)
    shape = ErrorShape(torch.zeros_like(m), tensor(0.5, -0.5, 0.0), 100, 0.0)
    found = confidence_intervals(m, se, shape, level=0.95)
    torch.testing.assert_close(found - plain, tensor(-0.5, 0, 0, 0.5, 0, 0).reshape(3, 2))


# --- from samples to shapes ---

# values of one direction over samples, N, known ends of the interval
EDGES = {
    "all data used": ([1.0, 5.0, 0.0], 3, (2.0, 2.0)),
    "one sample of many": ([3.0], 10, (0.0, math.inf)),
    "one sample, which is all the data": ([3.0], 1, (3.0, 3.0)),
    "constant values": ([0.3] * 7, 50, (0.3, 0.3)),
    "zero values": ([0.0] * 7, 50, (0.0, 0.0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str, dtype: torch.dtype) -> None:
    values, N, ends = EDGES[case]
    q = torch.tensor(values, dtype=dtype)[:, None]
    m = q.mean(0)
    for found in (same_batch(m, moments_of(q), n_data=N), held_out(m, moments_of(q), n_a=0, n_data=N)):
        interval = intervals_of(found)
        assert interval.dtype == dtype
        torch.testing.assert_close(interval[0], torch.tensor(ends, dtype=dtype), rtol=1e-6, atol=0)
        assert bool((interval[:, 0] <= found.values).all() and (found.values <= interval[:, 1]).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ends_enclose_the_estimate_in_every_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    q = (3 * torch.randn(20, 50, generator=generator)).exp().to(dtype) * torch.logspace(-12, 6, 50).to(dtype)
    found = held_out(q.mean(0), moments_of(q), n_a=10, n_data=100)
    ends = intervals_of(found)
    assert ends.dtype == dtype
    assert bool(ends.isfinite().all())
    assert bool(((ends[:, 0] >= 0) & (ends[:, 0] <= found.values) & (ends[:, 1] > found.values)).all())


def test_no_directions() -> None:
    assert intervals_of(same_batch(tensor(), moments_of(torch.zeros(4, 0).double()), n_data=9)).shape == (0, 2)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, -0.1, math.nan])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(ValueError, match=r"such as 0\.95, must be between 0 and 1; got"):
        confidence_intervals(tensor(1.0), tensor(0.1), shape_of(0.1), level=level)


def test_the_error_shape_has_the_samples_skewness_and_their_share_of_the_population() -> None:
    q = torch.randn(30, 3, generator=torch.Generator().manual_seed(3)).double().exp()
    g = torch.from_numpy(((q - q.mean(0)) ** 3).mean(0).numpy() / q.numpy().std(0, ddof=1) ** 3) / 30**0.5
    shape = held_out(q.mean(0), moments_of(q), n_a=20, n_data=80).error_shape
    assert shape is not None
    torch.testing.assert_close(shape.skewness, g)
    assert (shape.n_samples, shape.sampled_share) == (30, pytest.approx(0.5))
    assert not shape.mismatch.any()
    shape = same_batch(q.mean(0), moments_of(q), n_data=80, drawn=True).error_shape
    assert shape is not None
    torch.testing.assert_close(shape.skewness, g)
    assert shape.sampled_share == 0
    # without third moments there is no skewness, and without that no interval
    assert same_batch(q.mean(0), DirectionalMoments(30, q.mean(0), q.std(0)), n_data=80).error_shape is None


def test_fresh_draws_of_the_direction_samples_contribute_to_the_skewness() -> None:
    generator = torch.Generator().manual_seed(4)
    of_a, of_b = (torch.randn(n, 2, generator=generator).double().exp() for n in (20, 30))
    found = held_out(of_a.mean(0), moments_of(of_b), n_a=20, n_data=80, a_redrawn=moments_of(of_a))
    cumulant = sum(
        w**3 * ((q - q.mean(0)) ** 3).mean(0) / len(q) ** 2 for w, q in ((0.25, of_a), (0.75, of_b))
    )  # fmt: skip
    assert found.error_shape is not None
    torch.testing.assert_close(found.error_shape.skewness, cumulant / found.standard_errors**3)
    assert (found.error_shape.n_samples, found.error_shape.sampled_share) == (20, 0.0)


def test_skewness_of_nearly_equal_values_is_not_rounding() -> None:
    q = 1e3 + 1e-9 * torch.randn(9, 40, generator=torch.Generator().manual_seed(6)).double()
    shape = same_batch(q.mean(0), moments_of(q), n_data=80).error_shape
    assert shape is not None
    assert float(shape.skewness.abs().max()) < 1


def test_pooled_folds_keep_their_skewness_and_number() -> None:
    q = torch.randn(17, 4, generator=torch.Generator().manual_seed(7)).double().exp()
    parts = [moments_of(part) for part in q.split([6, 1, 7, 3])]
    found = pooled(parts)
    torch.testing.assert_close(found.third_moments, (q - q.mean(0)).pow(3).mean(0))
    assert found.n_folds == 4
    without = [DirectionalMoments(part.n_samples, part.means, part.standard_deviations) for part in parts]
    assert pooled([*parts[:2], *without[2:]]).third_moments is None
    assert pooled([*without[:2], *parts[2:]]).third_moments is None


def test_cross_fitted_values_have_a_mismatch() -> None:
    q = torch.randn(20, 3, generator=torch.Generator().manual_seed(8)).double().square()
    folds = pooled([moments_of(part) for part in q.split(4)])
    in_sample = tensor(3.0, 1.0, 0.1)
    shape = cross_fitted(in_sample, folds, n_data=80, decreasing=False).error_shape
    assert shape is not None
    torch.testing.assert_close(shape.mismatch, 0.75 * (q.mean(0) - in_sample) / 9)
    assert shape.sampled_share == pytest.approx(0.25)


def test_the_mismatch_of_folds_is_that_of_directions_from_fewer_samples() -> None:
    """Over draws from a normal distribution with well separated, known eigenvalues."""
    generator = torch.Generator().manual_seed(9)
    spectrum, n, K = tensor(8.0, 4.0, 2.0, 1.0), 120, 6
    true, predicted = [], []
    for _ in range(1500):
        V = torch.randn(n, 4, generator=generator, dtype=torch.float64) * spectrum.sqrt()
        blocks = V.unflatten(0, (K, -1))
        grams = blocks.mT @ blocks
        values, U = torch.linalg.eigh(grams.sum(0) / n)
        of_others = torch.linalg.eigh(grams.sum(0) - grams)[1]
        own, others = ((spectrum[:, None] * Q.square()).sum(-2).flip(-1) for Q in (U, of_others))
        measured = (of_others * (grams @ of_others)).sum(-2).flip(-1).mean(0) * K / n
        true.append(others.mean(0) - own)
        predicted.append(mismatch_of_folds(measured, values.flip(0), K))
    expected, found = (torch.stack(rows).mean(0) for rows in (true, predicted))
    errors = torch.stack(predicted).std(0) / 1500**0.5
    assert float(expected[0]) < 0 < float(expected[-1])
    # the second one is between others, whose effects cancel
    ends = [0, -1]
    torch.testing.assert_close(found[ends], expected[ends], rtol=0.3, atol=0)
    assert bool(((found - expected).abs() < 4 * errors + 0.3 * expected.abs()).all())
