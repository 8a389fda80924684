"""Moments of samples and of drawn rows."""

import pytest
import torch

from debiased_laplace.curvature.sub_batch import DrawErrors, RunningMoments
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
