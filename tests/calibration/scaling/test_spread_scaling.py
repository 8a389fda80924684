"""Scaled standard deviations: closed form, folds, and all forms of predictives."""

import pytest
import torch

from debiased_laplace.calibration.metrics.regression import negative_log_likelihood
from debiased_laplace.calibration.predictions.forms import Gaussian, Samples
from debiased_laplace.calibration.predictions.regression import read_regression
from debiased_laplace.calibration.scaling.spread_scaling import cross_fit_factor, fit_factor, scale_spread


def test_the_factor_is_the_likeliest(draw_regression) -> None:
    mean, std, y = draw_regression(300, scale=1.7, seed=1, n_outputs=2)
    read = read_regression("m", (mean, std), y)
    best = fit_factor(read)
    assert best == pytest.approx(((y - mean) / std).square().mean().sqrt().item(), rel=1e-12)

    def loss(factor: float) -> float:
        return (
            negative_log_likelihood(scale_spread(read, torch.full((300,), factor, dtype=torch.float64))).mean().item()
        )

    assert loss(best) < min(loss(0.99 * best), loss(1.01 * best))


def test_factors_come_from_the_other_folds(draw_regression) -> None:
    mean, std, y = draw_regression(203, scale=1.7, seed=2)
    factor, per_fold = cross_fit_factor(read_regression("m", (mean, std), y), seed=4)
    squares = ((y - mean) / std).square()
    for i in range(0, 203, 20):
        own = factor == factor[i]
        assert factor[i].item() == pytest.approx(squares[~own].mean().sqrt().item(), rel=1e-12)
        assert factor[i].item() in per_fold
    assert len(per_fold) == 5


FORMS = {
    "standard deviation": lambda m, s, g: (m, s),
    "covariance": lambda m, s, g: Gaussian(m, covariance=torch.diag_embed(s**2) + 0.1, noise_included=True),
    "samples with noise": lambda m, s, g: Samples(
        m + s * torch.randn(40, *m.shape, generator=g, dtype=m.dtype), noise_included=True
    ),
    "samples of the function": lambda m, s, g: Samples(
        m + s * torch.randn(40, *m.shape, generator=g, dtype=m.dtype), observation_noise=0.7
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_its_mean_and_scales_its_quantiles(form: str, draw_regression) -> None:
    mean, std, y = draw_regression(30, scale=1.2, seed=3, n_outputs=2)
    read = read_regression("m", FORMS[form](mean, std, torch.Generator().manual_seed(0)), y)
    factor = torch.linspace(0.5, 2.0, 30, dtype=torch.float64)
    scaled = scale_spread(read, factor)
    torch.testing.assert_close(scaled.mean, read.mean)
    torch.testing.assert_close(scaled.standard_deviation, read.standard_deviation * factor[:, None])
    torch.testing.assert_close(scaled.distribution.standard_deviation, scaled.standard_deviation)
    for p in (0.05, 0.6):
        shift = read.distribution.quantile(p) - read.distribution.mean
        torch.testing.assert_close(scaled.distribution.quantile(p), read.distribution.mean + factor[:, None] * shift)
    # the density of a scaled variable, at the target that is scaled with it, is lower by the factor in every output
    moved = read.mean + factor[:, None] * (y - read.mean)
    torch.testing.assert_close(
        scaled.distribution.negative_log_density(moved), read.distribution.negative_log_density(y) + factor.log()
    )
