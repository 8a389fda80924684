"""Class probabilities of Gaussian logits, against explicit formulas and laplace-torch."""

import math

import pytest
import torch

from debiased_laplace.predictive import links


def gaussians(n=6, C=4, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(n, C, generator=generator, dtype=torch.float64) * 2
    L = torch.randn(n, C, C, generator=generator, dtype=torch.float64)
    return mean, scale * L @ L.mT


def bridge_of_one(mu, Sigma, normalized):
    """Compute the Laplace bridge for one Gaussian, entry by entry."""
    C = len(mu)
    total = Sigma.sum()
    centred = [mu[i] - Sigma[i].sum() * mu.sum() / total for i in range(C)]
    variance = [Sigma[i, i] - Sigma[i].sum() ** 2 / total for i in range(C)]
    if normalized:
        c = sum(variance) / C / math.sqrt(C / 2)
        centred, variance = [m / math.sqrt(c) for m in centred], [v / c for v in variance]
    inverse = sum(math.exp(-m) for m in centred)
    alpha = [(1 - 2 / C + math.exp(m) / C**2 * inverse) / v for m, v in zip(centred, variance, strict=True)]
    return torch.tensor([a / sum(alpha) for a in alpha], dtype=torch.float64)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("C", [2, 3, 7])
def test_bridge(C, normalized):
    mean, covariance = gaussians(C=C)
    expected = torch.stack([bridge_of_one(m, S, normalized) for m, S in zip(mean, covariance, strict=True)])
    torch.testing.assert_close(links.bridge(mean, covariance, normalized=normalized), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalized", [False, True])
def test_bridge_at_its_limits(normalized, dtype):
    mean = torch.tensor([[3.0, -1.0, 0.5], [200.0, -200.0, 0.0], [1.0, 2.0, 3.0]], dtype=dtype)
    zero = torch.zeros(3, 3, 3, dtype=dtype)
    torch.testing.assert_close(links.bridge(mean, zero, normalized=normalized), torch.softmax(mean, -1))
    small = 1e-12 * torch.eye(3, dtype=dtype).expand(3, 3, 3)
    found = links.bridge(mean, small, normalized=normalized)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=dtype))
    # fully correlated outputs: their centred variance is 0
    together = torch.ones(3, 3, 3, dtype=dtype)
    found = links.bridge(mean, together, normalized=normalized)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=dtype))


def test_probit():
    mean, covariance = gaussians()
    expected = [
        torch.softmax(
            torch.stack([m[i] / math.sqrt(1 + math.pi * S[i, i] / 8) for i in range(4)]),
            0,
        )
        for m, S in zip(mean, covariance, strict=True)
    ]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(links.probit(mean, variance), torch.stack(expected))


@pytest.mark.parametrize("diagonal", [True, False])
def test_draws_have_the_given_covariance(diagonal):
    mean, covariance = gaussians(n=2, C=3)
    n = 40_000
    draw = links.independent_draws if diagonal else links.gaussian_draws
    spread = covariance.diagonal(dim1=-2, dim2=-1) if diagonal else covariance
    draws = draw(mean, spread, n_samples=n, generator=torch.Generator().manual_seed(3))
    assert draws.shape == (n, 2, 3)
    for i in range(2):
        expected = torch.diag(covariance[i].diagonal()) if diagonal else covariance[i]
        found = torch.cov(draws[:, i].T)
        # the variance of a sample covariance of Gaussians
        errors = ((expected.square() + torch.outer(expected.diagonal(), expected.diagonal())) / n).sqrt()
        assert float(((found - expected) / errors).abs().max()) < 4.5
        z = (draws[:, i].mean(0) - mean[i]) / (expected.diagonal() / n).sqrt()
        assert float(z.abs().max()) < 4.5
        if not diagonal:  # power: the test distinguishes the two
            apart = (found - torch.diag(covariance[i].diagonal())) / errors
            assert float(apart.abs().max()) > 10


def test_draws_of_a_singular_covariance():
    mean = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    v = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    draws = links.gaussian_draws(
        mean,
        torch.outer(v, v)[None],
        n_samples=50,
        generator=torch.Generator().manual_seed(1),
    )
    deviations = draws[:, 0] - mean
    assert float(deviations.std()) > 0.5
    torch.testing.assert_close(deviations, torch.outer(deviations[:, 0], v), rtol=1e-5, atol=1e-5)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    still = links.gaussian_draws(mean, torch.diag_embed(zero), n_samples=2, generator=None)
    torch.testing.assert_close(still, mean.expand(2, 1, 3))
    still = links.independent_draws(mean, zero, n_samples=2, generator=None)
    assert torch.equal(still, mean.expand(2, 1, 3))


def test_a_negative_variance_from_rounding_counts_as_zero():
    mean, variance = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1e-9, 4.0]])
    draws = links.independent_draws(mean, variance, n_samples=30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draws[:, 0, 0], torch.ones(30))
    assert float(draws[:, 0, 1].std()) > 1


def test_the_same_generator_gives_the_same_draws_of_either_kind():
    mean, covariance = gaussians()
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    for draw, spread in ((links.gaussian_draws, covariance), (links.independent_draws, variance)):
        first, again, other = (
            draw(mean, spread, n_samples=9, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
        )
        assert torch.equal(first, again)
        assert not torch.isclose(first, other).any()
