from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor

from debiased_laplace.calibration.metrics.risk_coverage import RankedLosses, rank_losses


def draw(n: int, seed: int, *, values: int | None = None, binary: bool = True) -> tuple[Tensor, Tensor]:
    """Losses that are smaller where the confidence is larger, which has few values or as many as samples."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=generator, dtype=torch.float64)
    noise = torch.rand(n, generator=generator, dtype=torch.float64)
    losses = (noise < 0.7 * (1 - confidence)).double() if binary else noise.square() * (2 - confidence)
    return losses, (confidence * values).floor() if values else confidence


def average_over_orders(losses: Tensor, confidence: Tensor) -> tuple[Tensor, float, float]:
    """Risk, area and generalized area, averaged over every order that equal confidences leave open."""
    n = losses.numel()
    risks, areas, generalized = [], [], []
    for order in permutations(range(n)):
        if any(confidence[i] < confidence[j] for i, j in pairwise(order)):
            continue
        lost = losses[list(order)].cumsum(0)
        risks.append(lost / torch.arange(1, n + 1))
        areas.append(risks[-1].mean().item())
        below = torch.cat([torch.zeros(1, dtype=torch.float64), lost]) / n
        generalized.append(((below[:-1] + below[1:]) / 2).mean().item())
    return torch.stack(risks).mean(0), sum(areas) / len(areas), sum(generalized) / len(generalized)


@pytest.mark.parametrize("values", [1, 2, 4, None], ids=["all equal", "two values", "four values", "no ties"])
@pytest.mark.parametrize("binary", [True, False], ids=["errors", "losses"])
def test_ties_are_the_mean_over_all_orders(values: int | None, binary: bool) -> None:
    losses, confidence = draw(7, 5, values=values, binary=binary)
    ranked = rank_losses(losses, confidence)
    risk, area, generalized = average_over_orders(losses, confidence)
    torch.testing.assert_close(ranked.risk, risk, rtol=0, atol=1e-14)
    assert ranked.area == pytest.approx(area, abs=1e-14)
    assert ranked.generalized_area == pytest.approx(generalized, abs=1e-14)


@pytest.mark.parametrize("values", [3, None], ids=["ties", "no ties"])
def test_the_order_of_the_samples_does_not_matter(values: int | None) -> None:
    losses, confidence = draw(400, 1, values=values, binary=False)
    clusters = torch.arange(400) // 7
    one = rank_losses(losses, confidence, clusters=clusters)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    other = rank_losses(losses[shuffled], confidence[shuffled], clusters=clusters[shuffled])
    ranks = one.ranks[::13]
    for a, b in ((one.risk, other.risk), (one.risk_variance(ranks), other.risk_variance(ranks))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    for name in ("area_influence", "generalized_area_influence"):
        torch.testing.assert_close(getattr(one, name)[shuffled], getattr(other, name), rtol=1e-11, atol=1e-13)


def weighted_area(losses: Tensor, confidence: Tensor, weights: Tensor) -> float:
    """The area of a weighted sample: losses times the mean of -log u over the coverages that a group takes up."""
    total = 0.0
    for value in confidence.unique():
        group = confidence == value
        a, b = weights[confidence > value].sum(), weights[confidence >= value].sum()
        w = ((b - b * b.log()) - (a - torch.xlogy(a, a))) / (b - a)
        total += ((losses * weights)[group].sum() * w).item()
    return total


def weighted_generalized_area(losses: Tensor, confidence: Tensor, weights: Tensor) -> float:
    below = (confidence[:, None] > confidence[None, :]).double() + (confidence[:, None] == confidence[None, :]) / 2
    return ((losses * weights) @ below @ weights).item()


@pytest.mark.parametrize("values", [4, None], ids=["ties", "no ties"])
def test_influence_is_the_derivative_towards_a_sample(values: int | None) -> None:
    losses, confidence = draw(400, 3, values=values, binary=False)
    ranked = rank_losses(losses, confidence)
    even = torch.full((400,), 1 / 400, dtype=torch.float64)
    step = 1e-6
    for functional, influence, exact in (
        (weighted_area, ranked.area_influence, False),  # the sum over ranks is an integral up to 1/n
        (weighted_generalized_area, ranked.generalized_area_influence, True),
    ):
        assert influence.mean().item() == pytest.approx(0, abs=1e-12)
        start = functional(losses, confidence, even)
        for i in range(0, 400, 37):
            moved = (1 - step) * even
            moved[i] += step
            slope = (functional(losses, confidence, moved) - start) / step
            assert influence[i].item() == pytest.approx(slope, abs=1e-5 if exact else 0.01), i


def naive_variance(ranked: RankedLosses, confidence: Tensor, clusters: Tensor, k: int) -> float:
    """Sum over clusters of the squared sums of influences on the mean loss of the k most confident, without ties."""
    n = ranked.n
    half = 50  # of the window around the threshold, for 1000 samples
    order = confidence.argsort(descending=True)
    low, high = max(0, k - half), min(n, k + half)
    m = ranked.losses[order][low:high].mean()
    kept = torch.zeros(n, dtype=torch.float64)
    kept[order[:k]] = 1
    influence = (ranked.losses - m) * kept
    influence = influence - influence.mean()
    sums = torch.stack([influence[clusters == c].sum() for c in clusters.unique()])
    return (len(sums) / (len(sums) - 1) * sums.square().sum() / k**2).item()


@pytest.mark.parametrize("size", [1, 4], ids=["independent", "clusters of four"])
def test_variance_of_the_risk_is_that_of_its_influence(size: int) -> None:
    n = 1000  # the window is 50 ranks to each side
    losses, confidence = draw(n, 4, binary=False)
    clusters = torch.randperm(n, generator=torch.Generator().manual_seed(5)) // size
    ranked = rank_losses(losses, confidence, clusters=None if size == 1 else clusters)
    for k in (10, 300, 800, 1000):
        expected = naive_variance(ranked, confidence, clusters, k)
        assert ranked.risk_variance(torch.tensor([float(k)], dtype=torch.float64)).item() == pytest.approx(
            expected, rel=1e-9
        )


def test_all_samples_have_the_variance_of_a_mean() -> None:
    losses, confidence = draw(300, 6)
    ranked = rank_losses(losses, confidence)
    n = torch.tensor([300.0], dtype=torch.float64)
    assert ranked.risk_variance(n).item() == pytest.approx(losses.var().item() / 300, rel=1e-12)


def test_no_order_is_better_than_the_oracle() -> None:
    losses, confidence = draw(200, 7, binary=False)
    ranked = rank_losses(losses, confidence)
    oracle = ranked.oracle
    assert bool((oracle.risk <= ranked.risk + 1e-15).all())
    assert oracle.risk[-1].item() == pytest.approx(ranked.risk[-1].item(), abs=1e-15)
    torch.testing.assert_close(oracle.risk, losses.sort().values.cumsum(0) / ranked.ranks)
