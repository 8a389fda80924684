"""Rows are drawn with the probabilities that the scores ask for, and the same ones whatever the order."""

from itertools import product

import pytest
import torch

from debiased_laplace.data.drawing import (
    chances_of_the_rest,
    draw_rows,
    inclusion_probabilities,
    mixed_scores,
    permanent_numbers,
)


def scores(n=300, r=4, power=4):
    return torch.rand(n, r, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** power


@pytest.mark.parametrize("n_rows", [1, 7, 150, 900, 1199])
def test_probabilities_sum_to_the_number_of_rows_and_are_proportional_below_one(n_rows):
    s = scores().flatten()
    p = inclusion_probabilities(s, n_rows)
    assert float(p.sum()) == pytest.approx(n_rows, rel=1e-9)
    assert float(p.max()) <= 1
    ratio = (p / s)[p < 1]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    if bool((p == 1).any()):
        assert float(ratio[0] * s[p == 1].min()) >= 1 - 1e-12


def test_with_few_positive_scores_all_of_them_are_drawn():
    s = scores(10, 3)
    s[2:] = 0
    p = inclusion_probabilities(s.flatten(), 6)
    assert p.tolist() == [1.0] * 6 + [0.0] * 24
    draw = draw_rows(s, s, torch.arange(10), n_rows=100, seed=0)
    assert len(draw) == draw.n_positive == 6
    assert len(draw_rows(torch.zeros(5, 2), torch.zeros(5, 2), torch.arange(5), n_rows=3, seed=0)) == 0


def test_the_floor_is_the_same_for_all_samples():
    """A sample of tiny score has a tenth of the mean of probability, shared out by the sizes of its rows."""
    s = torch.tensor([[4.0, 2.0], [0.0, 0.0], [1e-9, 3e-9]])
    mixed = mixed_scores(s, s)
    torch.testing.assert_close(mixed[2], torch.tensor([0.1 * 2 / 4, 0.1 * 2 * 3 / 4]), rtol=1e-6, atol=1e-8)
    assert mixed[1].tolist() == [0, 0]
    torch.testing.assert_close(mixed[0], 0.9 * s[0] / s.mean() + 0.2 * s[0] / 6)


def test_a_draw_depends_on_neither_order_nor_company_and_is_nested():
    s, positions = scores(), torch.arange(300) * 7 + 2
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))

    def drawn(scores, positions, n_rows, seed=5):
        draw = draw_rows(scores, scores, positions, n_rows=n_rows, seed=seed)
        return set(zip(positions[draw.samples].tolist(), draw.rows.tolist(), strict=True))

    assert drawn(s, positions, 100) == drawn(s[order], positions[order], 100)
    assert drawn(s, positions, 50) < drawn(s, positions, 100) < drawn(s, positions, 400)
    assert drawn(s, positions, 100) != drawn(s, positions, 100, seed=6)


def test_permanent_numbers_are_uniform_and_independent():
    u = permanent_numbers(torch.arange(50_000), 3, seed=9)
    n = len(u)
    # three standard errors of the mean, of the variance and of correlations
    assert float((u.mean(0) - 0.5).abs().max()) < 3 * (1 / 12 / n) ** 0.5
    assert float((12 * u.var(0) - 1).abs().max()) < 3 * (0.8 / n) ** 0.5
    others = torch.cat([u, permanent_numbers(torch.arange(50_000), 3, seed=10), u.roll(1, 0)], dim=1)
    correlations = torch.corrcoef(others.T) - torch.eye(9)
    assert float(correlations.abs().max()) < 4 / n**0.5
    assert 0 < float(u.min()) < float(u.max()) < 1


@pytest.mark.slow
def test_frequencies_of_draws_are_the_probabilities():
    s = scores(20, 3)
    n = 4000
    counts = torch.zeros(20, 3)
    for seed in range(n):
        draw = draw_rows(s, s, torch.arange(20), n_rows=12, seed=seed)
        counts[draw.samples, draw.rows] += 1
    p = inclusion_probabilities(mixed_scores(s, s).flatten(), 12).view(20, 3)
    z = (counts / n - p) / (p * (1 - p) / n).sqrt().clamp_min(1e-9)
    assert float(z[p < 1].abs().max()) < 4
    assert float(z[p < 1].square().mean()) < 1.6
    assert bool((counts[p == 1] == n).all())


@pytest.mark.parametrize("q", [0.5, 0.3])
def test_the_rest_is_estimated_without_bias_given_the_rows_of_the_other_part(q):
    """By enumeration of all ways to draw and deal four rows."""
    p = torch.tensor([0.2, 0.9, 0.55, 1.0], dtype=torch.float64)
    y = torch.tensor([3.0, 0.7, 1.9, 0.4], dtype=torch.float64)
    chance = chances_of_the_rest(p, q)
    total, weight = {}, {}
    for places in product("ab-", repeat=4):  # in a, in b, not drawn
        probability, estimate = 1.0, 0.0
        for i, place in enumerate(places):
            probability *= {"a": (1 - q) * p[i], "b": q * p[i], "-": 1 - p[i]}[place]
            estimate += float(y[i] / chance[i]) if place == "b" else 0.0
        in_a = tuple(place == "a" for place in places)
        total[in_a] = total.get(in_a, 0.0) + float(probability) * estimate
        weight[in_a] = weight.get(in_a, 0.0) + float(probability)
    for in_a, probability in weight.items():
        if probability > 0:
            truth = sum(float(v) for v, known in zip(y, in_a, strict=True) if not known)
            assert total[in_a] / probability == pytest.approx(truth, rel=1e-9, abs=1e-12)
