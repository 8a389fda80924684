"""Moments of samples and of drawn rows."""

import pytest
import torch

from debiased_laplace.curvature.sub_batch import DrawErrors, OuterValues, RunningMoments
from debiased_laplace.debiasing.cross_fitting import pooled


@pytest.mark.parametrize("values", ["proportional to the probabilities", "spread", "heavy-tailed"])
@pytest.mark.parametrize("n_folds", [1, 4])
def test_variances_of_sums_over_drawn_rows_are_right_on_average(values, n_folds):
    """Where values are proportional to the probabilities, all of the variance is that of the number of rows."""
    generator = torch.Generator().manual_seed(4)
    p = torch.rand(800, generator=generator, dtype=torch.float64).pow(3) * 0.3 + 0.01
    p[:3] = 1.0
    y = p.clone()
    if values == "spread":
        y = y * (0.5 * torch.randn(800, generator=generator, dtype=torch.float64)).exp()
    elif values == "heavy-tailed":
        y = torch.randn(800, generator=generator, dtype=torch.float64).square() * 0.1
    truth = ((1 - p) / p * y.square()).sum()
    estimated, sums = [], []
    for _ in range(400):
        drawn = (torch.rand(800, generator=generator, dtype=torch.float64) < p).nonzero().flatten()
        fold = torch.arange(len(drawn)) % n_folds
        parts = []
        for i in range(n_folds):
            mine = drawn[fold == i]
            # values are scaled by the weight that stands for rows not drawn, errors are not
            factors = 1 - p[mine]
            moments = RunningMoments(1, y)
            moments.add((factors * y[mine] / p[mine])[:, None], DrawErrors.of(p[mine]).reweighted(factors))
            parts.append(moments.moments())
        found = parts[0] if n_folds == 1 else pooled(parts)
        estimated.append(found.standard_deviations.square() * found.n_samples)
        sums.append((y[drawn] / p[drawn]).sum())
        assert found.n_drawn == len(drawn) - 3
    ratios = torch.stack(estimated).flatten() / truth
    of_mean = float(ratios.std()) / len(ratios) ** 0.5
    assert of_mean < 0.3
    assert abs(float(ratios.mean()) - 1) < 4 * of_mean
    if values != "heavy-tailed":
        assert float(torch.stack(sums).var() / truth) == pytest.approx(1, abs=0.25)


def test_samples_that_are_a_draw_have_the_spread_of_their_totals():
    """Samples of up to four rows, 30 of 80, whose rows are drawn; added in parts that cut through samples."""
    generator = torch.Generator().manual_seed(2)
    p = torch.rand(30, 4, generator=generator, dtype=torch.float64).clamp_min(0.2)
    values = torch.rand(30, 4, 3, generator=generator, dtype=torch.float64).pow(3) / p[:, :, None]
    drawn = torch.rand(30, 4, generator=generator, dtype=torch.float64) < p
    sample, _ = drawn.nonzero().unbind(1)
    y, left_out, R = values[drawn], (1 - p)[drawn], int(drawn.sum())
    factors = 0.3 + 0.5 * torch.rand(R, generator=generator, dtype=torch.float64)
    draw = DrawErrors(left_out, torch.ones(R).double(), sample, 30.0, 30 / 80).reweighted(factors)
    moments = RunningMoments(3, y)
    for chosen in torch.arange(R).split(7):
        moments.add(y[chosen] * factors[chosen][:, None], draw.at(slice(int(chosen[0]), int(chosen[-1]) + 1)))
    found = moments.moments()
    # as values whose mean over samples is the mean over rows
    totals = torch.zeros(30, 3).double().index_add(0, sample, y) * 30 / R
    torch.testing.assert_close(found.means, (y * factors[:, None]).mean(0))
    torch.testing.assert_close(found.centers, totals.mean(0))
    torch.testing.assert_close(found.standard_deviations, totals.std(0))
    torch.testing.assert_close(found.third_moments, (totals - totals.mean(0)).pow(3).mean(0))
    torch.testing.assert_close(found.draw_variances, (left_out[:, None] * y.square()).sum(0) / R**2)
    assert found.n_samples == pytest.approx(30)
    assert found.sampled_share == 30 / 80
    assert found.n_drawn is None


@pytest.mark.parametrize("kind", ["samples", "rows of all samples", "rows of drawn samples"])
def test_outer_products_have_the_moments_of_their_entries(kind):
    """Rows of a sample have the same second factor; they are added in parts that cut through samples."""
    generator = torch.Generator().manual_seed(3)
    sample = torch.randint(0, 9, (40,), generator=generator).sort().values
    left_out = torch.rand(40, generator=generator, dtype=torch.float64)
    blocks = [
        (torch.rand(40, o, generator=generator).double(), torch.rand(9, i, generator=generator).double()[sample])
        for o, i in ((3, 4), (3, 1))
    ]
    draw = {
        "samples": None,
        "rows of all samples": DrawErrors.of(left_out).reweighted(0.2 + left_out),
        "rows of drawn samples": DrawErrors(left_out, 1 + left_out, sample, 12.0, 0.4),
    }[kind]
    formed = torch.cat([(x[:, :, None] * y[:, None, :]).flatten(1) for x, y in blocks], dim=1)
    sums = [RunningMoments(15, formed) for _ in range(2)]
    for start in range(0, 40, 7):
        chosen = slice(start, start + 7)
        part = None if draw is None else draw.at(chosen)
        sums[0].add(OuterValues(tuple((x[chosen], y[chosen]) for x, y in blocks)), part)
        sums[1].add(formed[chosen], part)
    found, expected = (one.moments() for one in sums)
    for name in ("means", "standard_deviations", "third_moments", "draw_variances", "centers"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert (found.n_samples, found.n_drawn) == (expected.n_samples, expected.n_drawn)


def test_standard_errors_of_two_phases_are_right_on_average():
    """30 of 80 samples are drawn, then their rows: the variance of the mean, by simulation."""
    generator = torch.Generator().manual_seed(5)
    y = torch.rand(80, 3, generator=generator, dtype=torch.float64).pow(4)
    p = (y / y.max() * 2 + 0.05).clamp_max(1.0)
    f = 30 / 80
    found, means = [], []
    for _ in range(1500):
        chosen = torch.randperm(80, generator=generator)[:30].sort().values
        drawn = torch.rand(30, 3, generator=generator, dtype=torch.float64) < p[chosen]
        rows, left_out = (y / p)[chosen][drawn], (1 - p)[chosen][drawn]
        R = len(rows)
        moments = RunningMoments(1, y)
        moments.add(
            rows[:, None] * R / 30, DrawErrors(left_out, torch.ones(R).double(), drawn.nonzero()[:, 0], 30.0, f)
        )
        m = moments.moments()
        found.append(float((1 - f) * m.standard_deviations**2 / 30 + f * m.draw_variances))
        means.append(float(m.means))
    found, means = torch.tensor(found), torch.tensor(means)
    assert abs(float(means.mean() - y.sum(1).mean())) < 4 * float(means.std()) / 1500**0.5
    ratio = float(found.mean() / means.var())
    assert abs(ratio - 1) < 0.12, ratio
    # without the draw of rows it would be detectably too small
    totals = y.sum(1)
    assert float((1 - f) * totals.var() / 30 / means.var()) < 0.8
