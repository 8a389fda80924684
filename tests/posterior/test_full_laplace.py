"""With every direction of all the data in one batch, the posterior is laplace-torch's full one."""

import warnings

import pytest
import torch
from laplace import FullLaplace, Laplace, ParametricLaplace
from models import targets
from posterior_cases import PLAIN, close, hyper_parameters, loader_of, posterior_of
from torch import nn

from debiased_laplace.posterior.factory import DebiasedLowRankLaplace

RTOL = 1e-6  # laplace-torch's default backend multiplies by a single-precision identity


def small_network(n_outputs=3):
    """Few enough parameters for 40 samples to support every direction but softmax's null ones."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs)).double()
        return model.eval(), torch.randn(40, 3, dtype=torch.float64)


PRIORS = {
    "scalar": lambda la: 0.4,
    "layerwise": lambda la: torch.linspace(0.2, 3.0, la.n_layers),
    "diagonal": lambda la: torch.linspace(0.1, 7.0, la.n_params),
}


def both(likelihood, prior="scalar"):
    """Ours and laplace-torch's posterior of the same network and samples."""
    found = []
    for cls, options in ((posterior_of, {"magnitudes": "same_batch"}), (FullLaplace, {})):
        model, X = small_network()
        la = cls(model, likelihood, **hyper_parameters(likelihood), **options)
        la.fit(loader_of(X, targets(likelihood), batch_size=40))
        la.prior_precision = PRIORS[prior](la)
        found.append(la)
    return *found, X


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_precision_and_evidence(likelihood, prior):
    ours, theirs, _ = both(likelihood, prior)
    close(ours.posterior_precision.to_dense(), theirs.posterior_precision, RTOL)
    close(ours.log_det_posterior_precision, theirs.log_det_posterior_precision, RTOL)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), RTOL)
    close(ours.loss, theirs.loss, RTOL)
    value = ours.mean + 0.1
    close(ours.log_prob(value), theirs.log_prob(value), RTOL)


@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
@pytest.mark.parametrize("prior", PRIORS)
def test_class_probabilities(prior, link):
    ours, theirs, X = both("classification", prior)
    close(ours(X, link_approx=link), theirs(X, link_approx=link), RTOL)


def test_class_probabilities_by_monte_carlo():
    ours, theirs, X = both("classification")
    draws = theirs.functional_samples(X, n_samples=20_000, generator=torch.Generator().manual_seed(2))
    probabilities = torch.softmax(draws, -1)
    error = probabilities.std(0) * (2 / 20_000) ** 0.5
    for diagonal in (False, True):
        found = ours(
            X,
            link_approx="mc",
            n_samples=20_000,
            diagonal_output=diagonal,
            generator=torch.Generator().manual_seed(1),
        )
        z = (found - probabilities.mean(0)) / error
        # without the covariances between outputs it is another distribution, which shows that the test can tell
        assert (float(z.abs().max()) < 4.5) is not diagonal


@pytest.mark.parametrize("prior", PRIORS)
def test_regression(prior):
    ours, theirs, X = both("regression", prior)
    for joint in (False, True):
        for found, expected in zip(ours(X[:7], joint=joint), theirs(X[:7], joint=joint), strict=True):
            close(found, expected, RTOL)


@pytest.mark.parametrize("prior", ["scalar", "layerwise", "diag"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_tuned_prior(likelihood, prior):
    ours, theirs, _ = both(likelihood)
    start = {"scalar": 6.0, "layerwise": torch.linspace(0.5, 2, 4), "diag": torch.linspace(0.5, 2, ours.n_params)}
    for la in (ours, theirs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "By default `link_approx`")
            la.optimize_prior_precision(
                method="marglik", n_steps=12, init_prior_prec=start[prior], prior_structure=prior
            )
    close(ours.prior_precision, theirs.prior_precision, 1e-5)
    assert not torch.allclose(ours.prior_precision, torch.as_tensor(start[prior], dtype=torch.float64), rtol=0.05)


@pytest.mark.parametrize("wrt", ["prior precision", "observation noise"])
def test_gradients_of_the_evidence(wrt):
    ours, theirs, _ = both("regression")
    gradients = []
    for la in (ours, theirs):
        value = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
        key = "prior_precision" if wrt == "prior precision" else "sigma_noise"
        la.log_marginal_likelihood(**{key: value}).backward()
        gradients.append(value.grad)
    close(gradients[0], gradients[1], RTOL)
    assert gradients[0].abs() > 1e-2


def test_laplace_torch_finds_the_class_by_name():
    options = {**PLAIN, "rank": 3, "prior_precision": 0.4}
    la = Laplace(small_network()[0], "classification", "all", "debiased_lowrank", **options)
    assert type(la) is DebiasedLowRankLaplace
    assert isinstance(la, ParametricLaplace)
    assert isinstance(posterior_of(small_network()[0], "classification"), ParametricLaplace)
    la.fit(loader_of(small_network()[1], targets("classification")))
    assert la.rank == 3
    own = posterior_of(small_network()[0], "classification", **options)
    own.fit(loader_of(small_network()[1], targets("classification")))
    torch.testing.assert_close(la.directional_curvatures, own.directional_curvatures)


def test_laplace_torchs_own_classes_are_still_found_by_theirs():
    assert type(Laplace(small_network()[0], "classification", "all", "full")) is FullLaplace
