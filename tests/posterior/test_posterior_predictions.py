import pytest
import torch

from debiased_laplace.predictive import links
from debiased_laplace.predictive.predictive import class_probabilities


@pytest.mark.parametrize("alone", [False, True], ids=["covariances", "variances"])
def test_monte_carlo_is_the_mean_softmax_of_the_draws(alone: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    mean = 2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    L = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    spread = (L @ L.mT).diagonal(dim1=-2, dim2=-1) if alone else L @ L.mT
    draw = links.independent_draws if alone else links.gaussian_draws
    draws = draw(mean, spread, n_samples=9, generator=torch.Generator().manual_seed(4))
    found = class_probabilities(mean, spread, "mc", 9, torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, torch.softmax(draws, -1).mean(0))
    # of covariances, probit reads the diagonal alone
    if not alone:
        variances = spread.diagonal(dim1=-2, dim2=-1)
        probit = (class_probabilities(mean, s, "probit", 9, None) for s in (spread, variances))
        torch.testing.assert_close(*probit)
        torch.testing.assert_close(
            class_probabilities(mean, variances, "probit", 9, None), links.probit(mean, variances)
        )
