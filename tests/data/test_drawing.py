"""Rows are drawn with the probabilities that the scores ask for, and the same ones whatever the order."""

from itertools import combinations, product

import pytest
import torch

from debiased_laplace.data.drawing import RowDrawer, chances_of_the_rest, permanent_numbers


def scores(n=300, r=4, power=4):
    return torch.rand(n, r, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** power


def drawer_of(s, *, n_rows, seed=0, keys=None, batch=10**6, order=None):
    """The draw of all rows, batch by batch; attached is where each row is in s."""
    keys = torch.arange(len(s)) * 7 + 2 if keys is None else keys
    drawer = RowDrawer(n_rows, seed)
    for chosen in (torch.arange(len(s)) if order is None else order).split(batch):
        places = lambda samples, rows, chosen=chosen: torch.stack([chosen[samples], rows], 1).double()  # noqa: E731
        drawer = drawer.adding(s[chosen], s[chosen], keys[chosen], places)
    return drawer


def drawn_set(drawer, n_rows=None):
    return {tuple(place) for place in drawer.drawn(n_rows)[0].attached.long().tolist()}


def probabilities(s, n_rows):
    """Inclusion probabilities of all rows, by bisection."""
    positive = s > 0
    if int(positive.sum()) <= n_rows:
        return positive.double()
    floors = torch.where(positive, s / s.sum(1, keepdim=True).clamp_min(1e-300), 0.0)
    b = min(0.1 * n_rows / int(positive.any(1).sum()), 1.0)
    low, high = 0.0, 2 * n_rows / float(s[positive].min())
    for _ in range(200):
        a = (low + high) / 2
        low, high = (a, high) if float((a * s + b * floors).clamp_max(1).sum()) < n_rows else (low, a)
    return (high * s + b * floors).clamp_max(1)


@pytest.mark.parametrize("batch", [10**6, 64, 7])
@pytest.mark.parametrize("n_rows", [1, 7, 150, 600, 1199])
def test_probabilities_are_proportional_below_one_and_sum_to_the_number_of_rows(n_rows, batch):
    s = scores()
    s[50:90, 1:] = 0
    s[100:150] = 0
    draw, p = drawer_of(s, n_rows=n_rows, batch=batch).drawn()
    expected = probabilities(s, n_rows)
    assert float(expected.sum()) == pytest.approx(min(n_rows, int((s > 0).sum())), rel=1e-9)
    at = draw.attached.long()
    torch.testing.assert_close(p, expected[at[:, 0], at[:, 1]])
    numbers = permanent_numbers(torch.arange(300) * 7 + 2, 4, 0)
    assert drawn_set(drawer_of(s, n_rows=n_rows, batch=batch)) == {
        tuple(place) for place in (numbers < expected).nonzero().tolist()
    }


def test_with_few_positive_scores_all_of_them_are_drawn():
    s = scores(10, 3)
    s[2:] = 0
    drawer = drawer_of(s, n_rows=100)
    draw, p = drawer.drawn()
    assert p.tolist() == [1.0] * 6
    assert len(draw) == drawer.population.n_positive == drawer.expected() == 6
    assert drawer.population.n_samples == 10
    assert len(drawer_of(torch.zeros(5, 2).double(), n_rows=3).drawn()[0]) == 0


def test_tiny_scores_are_scores():
    """A network that is sure of everything has curvatures of 1e-30, and still some rows are larger than others."""
    s = scores()
    big, tiny = (drawer_of(s * factor, n_rows=60) for factor in (1.0, 1e-200))
    assert drawn_set(big) == drawn_set(tiny)
    torch.testing.assert_close(big.drawn()[1], tiny.drawn()[1])


def test_the_floor_is_the_same_for_all_samples():
    """A tenth of the expected number is shared out among samples, and within a sample by the sizes of its rows."""
    s = torch.full((200, 2), 1e-12, dtype=torch.float64)
    s[:10] = scores(10, 2)
    s[10:, 1] *= 3
    draw, p = drawer_of(s, n_rows=10).drawn()
    tiny = draw.samples >= 10
    assert int(tiny.sum()) > 0
    expected = 0.1 * 10 / 200 * torch.where(draw.rows == 1, 0.75, 0.25).double()
    torch.testing.assert_close(p[tiny], expected[tiny], rtol=1e-6, atol=0)


def test_equal_scores_are_equally_probable():
    p = drawer_of(torch.full((50, 4), 0.3, dtype=torch.float64), n_rows=40, batch=9).drawn()[1]
    torch.testing.assert_close(p, torch.full_like(p, 40 / 200))


def test_a_draw_depends_on_neither_order_nor_company_and_is_nested():
    s = scores()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    hundred = drawn_set(drawer_of(s, n_rows=100))
    assert hundred == drawn_set(drawer_of(s, n_rows=100, order=order, batch=11))
    fifty = drawn_set(drawer_of(s, n_rows=50))
    assert fifty < hundred < drawn_set(drawer_of(s, n_rows=400))
    assert hundred != drawn_set(drawer_of(s, n_rows=100, seed=6))


def test_fewer_rows_of_a_draw_have_the_probabilities_of_a_smaller_draw():
    s = scores()
    large, small = drawer_of(s, n_rows=500, batch=13), drawer_of(s, n_rows=80)
    assert drawn_set(large, 80) == drawn_set(small)
    torch.testing.assert_close(large.drawn(80)[1], small.drawn()[1])
    assert large.expected(80) == 80


def test_only_rows_that_are_drawn_are_held_and_attached():
    """Of 30,000 rows never more than those drawn so far are kept, nor is anything computed for many more."""
    s, computed = scores(3000, 10, power=8), 0
    drawer = RowDrawer(100, 0)
    for chosen in torch.arange(3000).split(50):

        def attach(samples, rows):
            nonlocal computed
            computed += len(samples)
            return torch.zeros(len(samples), 2, dtype=torch.float64)

        drawer = drawer.adding(s[chosen], s[chosen], chosen, attach)
        assert len(drawer) < 160
    assert computed < 1000


def test_equal_keys_have_equal_numbers():
    s = scores(40, 3)
    s[20:] = s[:20]
    keys = torch.arange(40) % 20
    found = drawn_set(drawer_of(s, n_rows=30, keys=keys))
    assert {((sample + 20) % 40, row) for sample, row in found} == found


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
@pytest.mark.slow
def test_frequencies_of_draws_are_the_probabilities():
    s = scores(20, 3)
    n = 4000
    counts = torch.zeros(20, 3)
    for seed in range(n):
        draw, _ = drawer_of(s, n_rows=12, seed=seed).drawn()
        counts[draw.samples, draw.rows] += 1
    p = probabilities(s, 12)
    z = (counts / n - p) / (p * (1 - p) / n).sqrt().clamp_min(1e-9)
    assert float(z[p < 1].abs().max()) < 4
    assert float(z[p < 1].square().mean()) < 1.6
    assert bool((counts[p == 1] == n).all())


P = [0.2, 0.9, 0.55, 1.0]
Y = [3.0, 0.7, 1.9, 0.4]


@pytest.mark.parametrize("q", [0.5, 0.3])
def test_the_rest_is_estimated_without_bias_given_the_rows_of_the_other_part(q):
    """By enumeration of all ways to draw and deal four rows."""
    chance = chances_of_the_rest(torch.tensor(P, dtype=torch.float64), 1 - q, q).tolist()
    total, weight = {}, {}
    for places in product("ab-", repeat=4):  # in a, in b, not drawn
        probability, estimate = 1.0, 0.0
        for i, place in enumerate(places):
            probability *= {"a": (1 - q) * P[i], "b": q * P[i], "-": 1 - P[i]}[place]
            estimate += Y[i] / chance[i] if place == "b" else 0.0
        in_a = tuple(place == "a" for place in places)
        total[in_a] = total.get(in_a, 0.0) + probability * estimate
        weight[in_a] = weight.get(in_a, 0.0) + probability
    for in_a, probability in weight.items():
        if probability > 0:
            truth = sum(v for v, known in zip(Y, in_a, strict=True) if not known)
            assert total[in_a] / probability == pytest.approx(truth, rel=1e-9, abs=1e-12)


def test_some_samples_of_all_are_estimated_without_bias():
    """By enumeration: three of five samples of two rows are scored, one of them dealt to a, and their rows drawn.

    For directions that do not depend on the draw the estimate is of all rows. Given a, it is of the drawn rows of a and
    of all samples outside a, whose rows stand for those of a that were not drawn.
    """
    N, n, n_a = 5, 3, 1
    y = [[2.0, 0.3], [1.1, 0.9], [0.2, 0.1], [3.0, 1.5], [0.7, 0.6]]
    pi = [[0.9, 0.25], [0.6, 0.5], [0.3, 0.2], [1.0, 0.7], [0.4, 0.35]]
    by_a, every = {}, []
    for scored in combinations(range(N), n):
        for a in scored:
            rows = [(i, j) for i in scored for j in (0, 1)]
            for drawn in product([True, False], repeat=len(rows)):
                probability, known, rest = 1.0, 0.0, 0.0
                for (i, j), is_drawn in zip(rows, drawn, strict=True):
                    probability *= pi[i][j] if is_drawn else 1 - pi[i][j]
                    if is_drawn and i == a:
                        known += y[i][j] / N
                    elif is_drawn:
                        p = torch.tensor([pi[i][j] * n / N], dtype=torch.float64)
                        chance = float(chances_of_the_rest(p, n_a / n, 1 - n_a / n))
                        rest += y[i][j] / chance / N
                every.append((probability, known + rest))
                by_a.setdefault(a, []).append((probability, rest))
    mean = sum(p * v for p, v in every) / sum(p for p, _ in every)
    assert mean == pytest.approx(sum(map(sum, y)) / N, rel=1e-9)
    for a, cases in by_a.items():
        found = sum(p * v for p, v in cases) / sum(p for p, _ in cases)
        outside = [v * (N - n_a * p) / (N - n_a) for i in range(N) if i != a for v, p in zip(y[i], pi[i], strict=True)]
        assert found == pytest.approx(sum(outside) / N, rel=1e-9)
