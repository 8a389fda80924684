"""Risk and coverage: averages over random orders, numerical derivatives, and coverage in simulations."""

from itertools import pairwise, permutations
from math import exp, inf, sqrt

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from debiased_laplace.calibration.intervals import Units, wilson_interval
from debiased_laplace.calibration.metrics.selective import MOST_POINTS, estimate_area, rank_losses, trace_risk

LEVEL = 0.9
CASES = [(200, -0.5, 4, None, 1), (200, -2, 5, None, 1), (500, -0.5, 4, 10, 1), (2000, -0.5, 4, None, 10)]


def draw(n: int, seed: int, *, values: int | None = None, binary: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    confidence, noise = torch.rand(2, n, generator=generator, dtype=torch.float64)
    losses = (noise < 0.7 * (1 - confidence)).double() if binary else noise.square() * (2 - confidence)
    return losses, (confidence * values).floor() if values else confidence


def measure(losses, confidence, codes: Tensor | None = None, most: float = 1.0):
    losses, confidence = (torch.as_tensor(x, dtype=torch.float64) for x in (losses, confidence))
    return estimate_area([rank_losses(losses, confidence)], Units(len(losses), LEVEL, codes), most=most)


@pytest.mark.parametrize("values", [1, 2, 4, None])
@pytest.mark.parametrize("binary", [True, False])
def test_ties_are_the_mean_over_all_orders(values: int | None, binary: bool) -> None:
    losses, confidence = draw(7, 6, values=values, binary=binary)
    orders = [o for o in permutations(range(7)) if all(confidence[i] >= confidence[j] for i, j in pairwise(o))]
    ranked, k = rank_losses(losses, confidence), torch.arange(1, 8, dtype=torch.float64)
    risk = torch.stack([losses[list(o)].cumsum(0) / k for o in orders]).mean(0)
    torch.testing.assert_close(ranked.risk_at(k), risk, rtol=0, atol=1e-14)
    assert ranked.area == pytest.approx(risk.mean().item(), abs=1e-14)


def weighted_area(losses: Tensor, confidence: Tensor, weights: Tensor) -> float:
    total = 0.0  # losses times the mean of -log u over the coverages that a group takes up
    for value in confidence.unique():
        group = confidence == value
        a, b = weights[confidence > value].sum(), weights[confidence >= value].sum()
        w = ((b - b * b.log()) - (a - torch.xlogy(a, a))) / (b - a)
        total += ((losses * weights)[group].sum() * w).item()
    return total


@pytest.mark.parametrize("values", [4, None], ids=["ties", "no ties"])
def test_influence_on_the_area_is_the_derivative_towards_a_sample(values: int | None) -> None:
    losses, confidence = draw(1000, 3, values=values, binary=False)
    ranked, order, step = rank_losses(losses, confidence), confidence.argsort(descending=True), 1e-6
    even = torch.full((1000,), 1 / 1000, dtype=torch.float64)
    for i in range(0, 1000, 97):
        moved = (1 - step) * even
        moved[i] += step
        slope = (weighted_area(losses, confidence, moved) - weighted_area(losses, confidence, even)) / step
        assert ranked.area_influence[i].item() == pytest.approx(slope, abs=0.005), i  # a sum is an integral up to 1/n
    if values is None:  # a risk moves by what is kept, around the losses of 1000^(2/3) ranks at the threshold
        kept = torch.zeros(1000).double().index_fill_(0, order[:300], 1000 / 300)
        torch.testing.assert_close(ranked.risk_influence(300.0), (losses - losses[order[250:350]].mean()) * kept)


def test_areas_and_their_ends_by_hand() -> None:
    (losses, confidence), falling = draw(200, 6), list(range(50, 0, -1))
    e, ranked = measure(losses, confidence), rank_losses(losses, confidence)
    error = ranked.area_influence.std().item() / sqrt(200)
    factor = exp(student.ppf(0.95, int(losses.sum().item() / 2)) * error / ranked.area)
    assert (e.low, e.high, e.standard_error) == pytest.approx((ranked.area / factor, ranked.area * factor, error))
    for codes, n in ((None, 50.0), (torch.arange(50) // 5, 10.0)):
        right = measure([0] * 50, falling, codes)
        assert (right.value, right.low, right.high) == (0, 0, wilson_interval(0.0, n, LEVEL)[1])
    for e, value, reason in (
        (measure([1] * 50, falling), 1, "every prediction is wrong"),
        (measure([0.0] * 50, falling, most=inf), 0, "there is no error"),
        (measure([1, 0, 0], [0.1, 0.2, 0.3], torch.zeros(3).long()), pytest.approx(1 / 9), "one cluster of samples"),
    ):
        assert (e.value, e.low, e.high, reason in e.reason) == (value, None, None, True)
    assert measure([1.0] * 50, falling, most=1.01).high == 1.01  # squared errors of 1


@pytest.mark.parametrize("binary", [True, False], ids=["errors", "losses"])
def test_a_cluster_of_copies_is_one_unit_and_order_is_nothing(binary: bool) -> None:
    losses, confidence = draw(80, 1, values=12, binary=binary)
    order, codes = torch.randperm(480, generator=torch.Generator().manual_seed(2)), torch.arange(80).repeat(6)
    copies, once = [x.repeat(6) for x in (losses, confidence)], measure(losses, confidence, torch.arange(80), inf)
    cases = ((*copies, codes), (*(x[order] for x in copies), codes[order]), (*copies, None))
    found = [measure(*c, inf) for c in cases]
    numbers = [[e.known, e.low, e.high, e.standard_error] for e in (*found, once)]
    assert found[0].estimator == once.estimator  # with its degrees of freedom
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-9)
    assert numbers[0] == pytest.approx(numbers[3], rel=0.05)  # sums over ranks of 480 and of 80
    assert numbers[2][3] < 0.5 * numbers[0][3]
    curves = [trace_risk([rank_losses(x, c)], Units(480, LEVEL, k), is_share=binary) for x, c, k in cases]
    for a, b, naive in list(zip(*curves, strict=True))[::9]:
        assert (b.risk, b.low, b.high, b.oracle) == pytest.approx((a.risk, a.low, a.high, a.oracle), abs=1e-9)
        assert naive.high - naive.low < 0.8 * (a.high - a.low) or a.risk == 0


def test_the_curve_is_thinned_ends_with_all_samples_and_averages_outputs() -> None:
    losses, confidence = draw(3217, 4)
    ranked = rank_losses(losses, confidence)
    points = trace_risk([ranked], Units(3217, LEVEL), is_share=True)
    ranks = torch.tensor([p.coverage * 3217 for p in points], dtype=torch.float64)
    assert (len(points), points[-1].coverage) == (MOST_POINTS, 1)
    assert [p.risk for p in points] == pytest.approx(ranked.risk_at(ranks).tolist(), abs=1e-15)
    best = losses.sort().values.cumsum(0)[ranks.long() - 1] / ranks
    assert [p.oracle for p in points] == pytest.approx(best.tolist(), abs=1e-12)
    assert all(0 <= p.low <= p.risk <= p.high <= 1 for p in points)
    expected = wilson_interval(losses.mean().item(), 3216.0, LEVEL)  # a variance has one degree of freedom less
    assert (points[-1].low, points[-1].high) == pytest.approx(expected, abs=1e-12)
    (alone,) = trace_risk([rank_losses(losses[:1], confidence[:1])], Units(1, LEVEL), is_share=True)
    assert (alone.coverage, alone.low, alone.high) == (1, None, None)
    outputs, units = [rank_losses(*draw(120, seed, binary=False)) for seed in (1, 2, 3)], Units(120, LEVEL)
    e, last = estimate_area(outputs, units, most=inf), trace_risk(outputs, units, is_share=False)[-1]
    influence, errors = (torch.stack([getattr(r, k) for r in outputs]).mean(0) for k in ("area_influence", "losses"))
    assert e.known == pytest.approx(sum(r.area for r in outputs) / 3)
    assert e.standard_error == pytest.approx(influence.std().item() / sqrt(120))
    half, mean = units.quantile * errors.std().item() / sqrt(120), errors.mean().item()
    assert (last.low, last.risk, last.high) == pytest.approx((mean - half, mean, mean + half))


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover(case) -> None:
    generator, n_sets, hits, narrow = torch.Generator().manual_seed(11), 250, 0, 0
    n, base, slope, n_values, copies = case  # the second has few errors, the third ties, the last clusters of copies

    def drawn(n: int, copies: int):
        s, u = torch.rand(2, n // copies, generator=generator, dtype=torch.float64).repeat(1, copies)
        errors = (u < torch.sigmoid(base - slope * s)).double()
        return rank_losses(errors, (s * n_values).floor() if n_values else s)

    truth, codes = drawn(400_000, 1).area, torch.arange(n // copies).repeat(copies) if copies > 1 else None
    for _ in range(n_sets):
        e = estimate_area([drawn(n, copies)], Units(n, 0.95, codes), most=1.0)
        hits += e.low <= truth <= e.high
        narrow += abs(truth - e.known) <= (e.high - e.low) / 4
    assert hits / n_sets >= 0.91
    assert narrow / n_sets < 0.85 or base == -2  # half the width would miss: the test could fail
