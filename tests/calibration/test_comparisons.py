"""Paired differences by hand; Holm's adjustment against its definition."""

from math import sqrt

import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student

from debiased_laplace.calibration.comparisons import compare_methods, compare_shares
from debiased_laplace.calibration.intervals import (
    Units,
    adjust_by_holm,
    find_holm_levels,
    hall_transform,
    standardized_skewness,
)

NOTHING = "no detectable difference"


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def compare(difference, metric: str = "nll", level: float = 0.95, codes=None):
    units = Units(len(difference), level, codes)
    (found,) = compare_methods({"a": {metric: 0 * difference}, "b": {metric: difference}}, ["a"], units)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_holm_finds_the_smallest_level_at_which_the_step_down_procedure_rejects(seed: int) -> None:
    p = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3).tolist()
    adjusted = adjust_by_holm([*p[:3], None, *p[3:]])
    assert adjusted.pop(3) is None  # no test
    for level in [k / 400 + 1e-7 for k in range(400)]:
        rejected, order = set(), sorted(range(6), key=lambda i: p[i])
        for step, i in enumerate(order):
            if p[i] > level / (6 - step):
                break
            rejected.add(i)
        assert rejected == {i for i in range(6) if adjusted[i] <= level}
    assert (adjust_by_holm([0.7, 0.6]), adjust_by_holm([])) == ([1.0, 1.0], [])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ["nll", "error", "rmsce2_debiased"])
@pytest.mark.parametrize("codes", [None, torch.arange(240) // 6])
def test_the_shown_interval_excludes_0_exactly_where_a_difference_is_detected(seed: int, metric: str, codes) -> None:
    generator, scores = torch.Generator().manual_seed(seed), {"a": {metric: torch.zeros(240, dtype=torch.float64)}}
    for i in range(12):  # from no difference to a clear one
        noise = torch.randn(240, generator=generator, dtype=torch.float64).exp() - 1.65
        scores[str(i)] = {metric: noise.sign() * (noise.abs() > 0.4) if metric == "error" else noise + 0.03 * i}
    found = compare_methods(scores, ["a"], Units(240, 0.9, codes))
    alone = [c for c in found if c.verdict == NOTHING and not c.low <= 0 <= c.high]
    assert seed or metric == "error" or alone  # what a reader would take for a contradiction
    for c in found:
        assert (c.adjusted_low <= 0 <= c.adjusted_high) == (c.verdict == NOTHING)
        assert (c.adjusted_low <= c.low, c.high <= c.adjusted_high, c.adjusted_level >= 0.9) == (True, True, True)


def test_levels_of_shown_intervals_are_those_of_holms_steps() -> None:
    p = [0.03, 0.004, None, 0.2, 0.02]  # 0.004 < 0.05 / 4; 0.02 > 0.05 / 3 ends it
    levels = find_holm_levels(p, 0.95)
    assert levels.pop(2) is None
    assert levels == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 4, 1 - 0.05 / 3, 1 - 0.05 / 3])
    assert find_holm_levels([0.01, 0.001], 0.9) == pytest.approx([0.9, 0.95])  # both rejected
    assert (find_holm_levels([], 0.9), find_holm_levels([None], 0.9)) == ([], [None])
    d = tensor([0.0, 1.0, 2.0, 3.0, -1.0, 5.0])
    scores = {m: {"rmsce2_debiased": f * d} for m, f in (("a", 0.0), ("b", 1.0), ("c", 1.0))}
    c, _ = compare_methods(scores, ["a"], Units(6, 0.9))
    assert c.high - c.difference == pytest.approx(norm.ppf(0.95) * c.standard_error)
    assert c.adjusted_high - c.difference == pytest.approx(norm.ppf(0.975) * c.standard_error)


def test_differences_by_hand() -> None:
    scores = {"map": {"nll": tensor([1.0, 2.0, 3.0, 4.0])}, "la": {"nll": tensor([0.5, 1.0, 2.5, 3.0])}}
    (c,) = compare_methods(scores, ["map"], Units(4, 0.9))
    error = tensor([0.5, 1.0, 0.5, 1.0]).std().item() / 2
    assert (c.method, c.baseline, c.metric, c.difference, c.verdict) == ("la", "map", "nll", -0.75, "better")
    half = norm.ppf(0.95) * error  # no skewness, so the interval is the normal one
    assert (c.low, c.high, c.standard_error) == pytest.approx((-0.75 - half, -0.75 + half, error))
    assert c.p_value == c.adjusted_p_value == pytest.approx(2 * norm.cdf(-0.75 / error))
    d = tensor([0.0, 0.0, 0.0, 0.1, 0.2, 3.0])
    c, t = compare(d, level=0.9), (d.mean() / (d.std() / 6**0.5)).item()
    assert c.p_value == pytest.approx(2 * norm.cdf(-hall_transform(t, standardized_skewness(d - d.mean()))))
    assert c.high - c.difference > 2 * (c.difference - c.low)
    influence = compare(d, "rmsce2_debiased", level=0.9)  # whose skewness is not that of its statistic
    assert (influence.p_value, influence.low) == pytest.approx((2 * norm.cdf(-t), 2 * d.mean().item() - influence.high))


def test_adjustment_runs_over_methods_metrics_and_references() -> None:
    d = tensor([1.0, -1.0] * 50)
    d = d - d.mean() + norm.isf(0.01) * d.std() / 10  # a lone p-value of 0.02 decides, among four tests it does not
    alone = compare(d)
    assert (alone.p_value, alone.verdict) == (pytest.approx(0.02, abs=1e-9), "worse")
    scores = {m: {"nll": f * d, "brier": 1e-3 * f * d.flip(0)} for m, f in (("a", 0), ("b", 1), ("c", 1))}
    among, lenient = (compare_methods(scores, ["a"], Units(100, level)) for level in (0.95, 0.9))
    assert [c.adjusted_p_value for c in among] == pytest.approx([0.08] * 4, abs=1e-8)
    assert ({c.verdict for c in among}, {c.verdict for c in lenient}) == ({NOTHING}, {"worse"})


def test_who_is_compared_with_whom_and_whose_fit_widens_what() -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = {m: {"nll": (i + 1) * x.square() + i, "error": x.round()} for i, m in enumerate(["map", "scaled", "la"])}
    scores["la"] |= {"own": x, "error": 1 - x.round()}  # the references lack the first
    plain = compare_methods(scores, ["map", "scaled"], Units(50, 0.95))
    wide = compare_methods(scores, ["map", "scaled"], Units(50, 0.95), fitting_errors={"scaled": 0.2})
    mean, share = x.square().mean().item(), 1 - 2 * x.round().mean().item()
    expected = {("la", "map", "nll"): 2 * mean + 2, ("la", "map", "error"): share, ("la", "scaled", "nll"): mean + 1}
    expected |= {("scaled", "map", "nll"): mean + 1, ("la", "scaled", "error"): share}  # map's errors by construction
    assert {(c.method, c.baseline, c.metric): c.difference for c in plain} == pytest.approx(expected)
    for a, b in zip(plain, wide, strict=True):
        if "scaled" in (a.method, a.baseline) and a.metric == "nll":
            assert b.standard_error == pytest.approx((a.standard_error**2 + 0.2**2) ** 0.5)
            assert (b.high - b.low > 1.5 * (a.high - a.low), b.p_value > a.p_value) == (True, True)
        else:
            assert (a.low, a.high, a.p_value) == (b.low, b.high, b.p_value)


def test_paired_proportions_are_bonett_and_prices() -> None:
    d, shrunk = tensor([1.0] * 6 + [-1.0] * 2 + [0.0] * 32), 4 / 42  # 6 + 1 and 2 + 1 disagreements of 40 + 2
    (e, p), error = compare_shares(d, 0.9), sqrt((10 / 42 - shrunk**2) / 42)
    assert (e.value, e.standard_error) == (0.1, pytest.approx(error))
    assert (e.low, e.high) == pytest.approx((shrunk - norm.ppf(0.95) * error, shrunk + norm.ppf(0.95) * error))
    assert p == pytest.approx(2 * norm.cdf(-shrunk / error))
    assert (compare(d, "error").p_value, compare(-d, "error").difference) == (p, -0.1)
    same, one = compare_shares(0 * d, 0.95)
    assert (one, same.low < 0 < same.high) == (1.0, True)  # no disagreement among 40 does not prove that there is none
    assert compare_shares(0 * d[:3] - 1, 0.95)[0].low == -1.0
    for values, p, verdict in (([0.0] * 5, 1.0, NOTHING), ([0.25] * 5, 0.0, "worse"), ([0.25], None, NOTHING)):
        for c in (compare(tensor(values), metric) for metric in ("nll", "rmsce2_debiased")):  # without spread
            assert (c.p_value, c.adjusted_p_value, c.verdict) == (p, p, verdict)


@pytest.mark.parametrize("metric", ["nll", "error", "rmsce2_debiased"])
def test_a_cluster_of_copies_is_one_unit_and_order_is_nothing(metric: str) -> None:
    d, order = tensor([1.0, 0.0, -1.0, 1.0, 0.0, 1.0, 1.0, 0.0]), torch.randperm(72, generator=torch.Generator())
    copies, codes = d.repeat_interleave(9), torch.arange(8).repeat_interleave(9)
    c, shuffled = compare(copies, metric, codes=codes), compare(copies[order], metric, codes=codes[order])
    assert c.standard_error == pytest.approx(d.std().item() / 8**0.5)
    assert (shuffled.low, shuffled.high, shuffled.p_value) == pytest.approx((c.low, c.high, c.p_value))
    assert metric == "nll" or c.p_value == pytest.approx(2 * student.sf(c.difference / c.standard_error, 7))
    assert compare(copies, metric).p_value < 0.2 * c.p_value
