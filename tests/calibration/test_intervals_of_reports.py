"""Intervals over samples and clusters: closed forms, SciPy, and coverage in simulations."""

from math import sqrt

import pytest
import torch
from scipy.stats import binomtest, norm
from scipy.stats import t as student

import debiased_laplace.calibration.intervals as iv
from benchmarks import report_coverage
from debiased_laplace.calibration.intervals import Units

ESTIMATORS = {
    "mean": iv.estimate_mean,
    "root mean": iv.estimate_root_mean,
    "share": lambda x, units: iv.estimate_share((x > 0.3).double(), units),
    "skewed mean": lambda x, units: iv.estimate_skewed_mean(x.square(), units, fitting_error=0.01),
}
X = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def numbers(e) -> list[float]:
    return [e.known, e.low, e.high, e.standard_error]


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (499, 500)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_intervals_are_scipys(k: int, n: int, level: float) -> None:
    ci = binomtest(k, n).proportion_ci(level, method="wilson")
    e = iv.estimate_share((torch.arange(n) < k).double(), Units(n, level))
    assert iv.wilson_interval(k / n, float(n), level) == pytest.approx((ci.low, ci.high), abs=1e-9)
    assert numbers(e) == pytest.approx([k / n, ci.low, ci.high, sqrt(k * (n - k) / n**3)], abs=1e-9)


def test_means_by_hand() -> None:
    x, half, units = tensor([1.0, 2.0, 6.0]), norm.ppf(0.95) * sqrt(7 / 3), Units(3, 0.9, torch.tensor([0, 1, 1]))
    assert numbers(iv.estimate_mean(x, Units(3, 0.9))) == pytest.approx([3, 3 - half, 3 + half, sqrt(7 / 3)])
    squares = tensor([4.0, 16.0, 16.0, 28.0])
    root, mean = (f(squares, Units(4, 0.9)) for f in (iv.estimate_root_mean, iv.estimate_mean))
    assert numbers(root) == pytest.approx([4, sqrt(mean.low), sqrt(mean.high), mean.standard_error / 8])
    error = iv.estimate_mean(x, units).standard_error
    assert error == pytest.approx(sqrt(2 * (2.0**2 + 2.0**2)) / 3)  # residuals -2, -1 + 3
    assert units.sums(tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist() == [[1.0, 2.0], [8.0, 10.0]]
    part = units.take(torch.tensor([2, 1]))
    assert (part.n, part.count, part.level, part.codes.tolist()) == (2, 1, 0.9, [0, 0])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_cluster_of_copies_is_one_unit_and_order_is_nothing(name: str) -> None:
    x, codes, order = X[:25], torch.arange(25).repeat(7), torch.randperm(175, generator=torch.Generator())
    once = ESTIMATORS[name](x, Units(25, 0.9, torch.arange(25).flip(0)))
    copied = ESTIMATORS[name](x.repeat(7), Units(175, 0.9, codes))
    shuffled = ESTIMATORS[name](x.repeat(7)[order], Units(175, 0.9, codes[order]))
    assert (copied.n, "over 25 clusters" in copied.estimator) == (175, True)
    for e in (shuffled, once):
        assert numbers(e) == pytest.approx(numbers(copied), rel=1e-9)
    naive = ESTIMATORS[name](x.repeat(7), Units(175, 0.9))
    assert naive.high - naive.low < 0.6 * (copied.high - copied.low)
    for units in (Units(1, 0.9), Units(9, 0.9, torch.zeros(9).long())):
        e = ESTIMATORS[name](X[: units.n], units)
        if name == "share" and units.codes is None:
            assert 0 < e.low < e.high == 1  # Wilson's interval needs no deviation
        else:
            words = "one sample has" if units.codes is None else "one cluster of samples has"
            assert (e.low, e.high, e.standard_error, words in e.reason) == (None, None, None, True)


def test_the_effective_size_of_a_share_and_shares_by_cell() -> None:
    y, codes, few = (X < 0.8).double(), torch.arange(50).repeat(9), 50 * (norm.ppf(0.975) / student.ppf(0.975, 49)) ** 2
    # 49 and not 50: the deviation over clusters divides by n - 1; clusters that all agree count as one sample each
    for values, size in ((y.repeat(9), few * 49 / 50), (torch.ones(450).double(), few)):
        assert Units(450, 0.95, codes).effective_size(values) == pytest.approx(size)
    mixed = tensor([0.0, 1.0]).repeat(100) + 1e-9 * X.repeat(4)  # clusters that are all alike count as their samples
    assert Units(200, 0.95, torch.arange(200) // 4).effective_size(mixed) == pytest.approx(4 * few)
    cell = torch.tensor([2] * 2 + [0, 1, 4] * 16)  # cell 2: one cluster, cell 3: nothing
    for units in (Units(50, 0.9), Units(50, 0.9, torch.arange(50) // 5)):
        found = iv.wilson_by_cell(y, cell, 5, units)
        assert (found[3], found[2] == (0.0, 1.0)) == ((None, None), units.codes is not None)
        for b in (0, 1, 4):
            e = iv.estimate_share(y[cell == b], units.take((cell == b).nonzero()[:, 0]))
            assert found[b] == pytest.approx((e.low, e.high))


def test_halls_transformation_and_skewed_means_by_hand() -> None:
    grid = [x / 10 for x in range(-40, 41)]
    for skewness in (0.0, 1e-12, 1e-6, 0.02, -0.3, 0.9):
        found = [iv.inverse_hall_transform(x, skewness) for x in grid]
        assert [iv.hall_transform(t, skewness) for t in found] == pytest.approx(grid, abs=1e-6)
        assert found == sorted(found)
    assert iv.hall_transform(2.0, 0.3) == pytest.approx(2 + 0.1 * 4 + 0.09 / 27 * 8 + 0.05)
    r, symmetric = tensor([-1.0, -1.0, 2.0]), tensor([-3.0, -1.0, 0.0, 1.0, 3.0]) + 2
    found = [iv.standardized_skewness(s * r) for s in (1, 1e-150, 0)]  # of the second the cubes underflow
    assert found == pytest.approx([6 / 6**1.5, 6 / 6**1.5, 0])
    mean = numbers(iv.estimate_mean(symmetric, Units(5, 0.9)))
    assert numbers(iv.estimate_skewed_mean(symmetric, Units(5, 0.9))) == pytest.approx(mean)
    x, units = tensor([0.1, 0.2, 0.3, 3.0, 0.2, 0.1]), Units(24, 0.9, torch.arange(6).repeat_interleave(4))
    mean, error, a = x.mean().item(), x.std().item() / sqrt(6), iv.standardized_skewness(x - x.mean())
    high = iv.estimate_skewed_mean(x.repeat_interleave(4), units).high
    assert high == pytest.approx(mean - error * iv.inverse_hall_transform(-student.ppf(0.95, 5), a))
    whole, z = sqrt(error**2 + 0.4**2), norm.ppf(0.95)  # the part from fitting has no skewness
    ends = [mean - whole * iv.inverse_hall_transform(q, a * (error / whole) ** 3) for q in (z, -z)]
    assert numbers(iv.estimate_skewed_mean(x, Units(6, 0.9), fitting_error=0.4)) == pytest.approx([mean, *ends, whole])
    for codes in (None, torch.arange(50) // 5):  # a p-value is the level at which the interval touches zero
        p = iv.skewed_p_value(X.square() - 0.25, Units(50, 0.5, codes), fitting_error=0.01)
        at = iv.estimate_skewed_mean(X.square() - 0.25, Units(50, 1 - p, codes), fitting_error=0.01)
        assert (min(abs(at.low), abs(at.high)) < 1e-9, 0.01 < p < 0.99) == (True, True)
    for values, expected in (([0.0] * 4, 1.0), ([0.5] * 4, 0.0), ([0.5], None), ([0.0], 1.0)):
        assert iv.skewed_p_value(tensor(values), Units(len(values), 0.9)) == expected


@pytest.mark.parametrize("n_clusters", [8, 40])
def test_intervals_cover_over_drawing_of_clusters(n_clusters: int) -> None:
    n_sets, level, generator = 400, 0.95, torch.Generator().manual_seed(n_clusters)
    n, codes = n_clusters * 60, torch.arange(n_clusters).repeat_interleave(60)
    units, covered = Units(n, level, codes), dict.fromkeys(["mean", "share", "skewed", "independent"], 0)
    for _ in range(n_sets):
        of_image = 0.5 + 0.5 * torch.rand(n_clusters, generator=generator, dtype=torch.float64)
        y = (torch.rand(n, generator=generator, dtype=torch.float64) < of_image[codes]).double()
        found = [f(y, units) for f in (iv.estimate_mean, iv.estimate_share, iv.estimate_skewed_mean)]
        for name, e in zip(covered, [*found, iv.estimate_share(y, Units(n, level))], strict=True):
            covered[name] += e.low <= 0.75 <= e.high
    assert covered.pop("independent") < 0.8 * n_sets
    assert all(abs(hits - level * n_sets) < 3.5 * sqrt(level * (1 - level) * n_sets) for hits in covered.values()), (
        covered
    )


@pytest.mark.slow
def test_the_benchmarks_intervals_and_verdicts_are_right_as_often_as_they_say(monkeypatch) -> None:
    monkeypatch.setattr(report_coverage, "HUGE", 500_000)
    n_sets, far = 200, 3.5 * sqrt(0.05 * 0.95 / 200)
    for family in ("calibrated", "x 1.6"):
        truth = report_coverage.find_truth(*report_coverage.FAMILIES[family])
        covered = report_coverage.cover_classification(500, family, truth, n_sets)
        for name, share in (covered | report_coverage.cover_regression(500, family, n_sets)).items():
            most = 1.01 if "rmsce2_debiased" in name else 0.95 + far
            assert 0.95 - far < share < most, (name, share)
    found = report_coverage.judge(500, 1.5, n_sets)
    assert (found.pop("x 1.6 called worse in NLL than x 1") > 0.95, len(found)) == (True, 5)
    assert all(share < 0.05 + far for name, share in found.items() if not name.startswith("x ")), found
