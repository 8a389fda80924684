"""With every direction of all the data in one batch, the posterior is laplace-torch's full one."""

import warnings
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from contract_cases import LAST_LAYER, LIKELIHOODS, SUBSETS, positions
from laplace import FullLaplace, FullLLLaplace, FullSubnetLaplace
from models import reused_module_net, targets
from posterior_cases import close, hyper_parameters, loader_of, posterior_of

RTOL = 1e-8
THEIRS = {"all": FullLaplace, "last_layer": FullLLLaplace, "subnetwork": FullSubnetLaplace}
PRIORS = {
    "scalar": lambda la: torch.tensor([0.4]).double(),
    "layerwise": lambda la: torch.linspace(0.2, 3.0, la.n_layers, dtype=torch.float64),
    "diag": lambda la: torch.linspace(0.1, 7.0, la.n_params, dtype=torch.float64),
}


@contextmanager
def in_double_precision():
    """laplace-torch's default backend multiplies by an identity of torch's default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def both(likelihood, n_outputs=3, subset="all"):
    """Ours and laplace-torch's posterior of the same weights, fitted to the same samples."""
    found = []
    for ours in (True, False):
        # a model for each: laplace-torch's last-layer posterior leaves attributes on it
        model, X = reused_module_net(n_outputs)
        only = {"subnetwork_indices": positions("reused module", model, subset)} if subset == "subnetwork" else {}
        if ours:
            options = {"magnitudes": "same_batch", "subset_of_weights": subset, "hessian_structure": "full"}
            la = posterior_of(model, likelihood, **options, **hyper_parameters(likelihood), **only)
        else:
            only |= {"last_layer_name": LAST_LAYER["reused module"]} if subset == "last_layer" else {}
            la = THEIRS[subset](model, likelihood, **hyper_parameters(likelihood), **only)
        with in_double_precision():
            la.fit(loader_of(X, targets(likelihood, n_outputs=n_outputs), batch_size=40))
        found.append(la)
    return *found, X


CELLS = [
    (subset, likelihood, prior)
    for subset, likelihood, prior in product(SUBSETS, LIKELIHOODS, PRIORS)
    if subset == "all" or prior == "scalar"
]


@pytest.mark.parametrize(("subset", "likelihood", "prior"), CELLS)
def test_every_direction_of_all_the_data_is_laplace_torchs_full_posterior(subset, likelihood, prior):
    ours, theirs, X = both(*LIKELIHOODS[likelihood], subset)
    ours.prior_precision, theirs.prior_precision = PRIORS[prior](ours), PRIORS[prior](ours)
    close(ours.posterior_precision.to_dense(), theirs.posterior_precision, RTOL)
    close(ours.log_det_posterior_precision, theirs.log_det_posterior_precision, RTOL)
    close(ours.loss, theirs.loss, RTOL)
    close(ours.mean, theirs.mean, 1e-12)
    assert ours.n_params == theirs.n_params
    if subset == "subnetwork":  # whose evidence laplace-torch cannot compute
        assert ours.n_params_subnet == theirs.n_params_subnet
        close(ours.mean_subnet, theirs.mean_subnet, 1e-12)
    else:
        close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), RTOL)
        close(ours.log_prob(ours.mean + 0.1), theirs.log_prob(ours.mean + 0.1), RTOL)
    P = len(ours.mean_subnet)
    J = torch.randn(3, 2, P, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    close(ours.functional_variance(J), theirs.functional_variance(J), RTOL)
    calls = [{"joint": False}, {"joint": True}]
    if ours.likelihood == "classification":
        calls = [{"link_approx": link} for link in ("probit", "bridge", "bridge_norm")]
    for call in calls:
        for found, expected in zip(ours(X[:7], **call), theirs(X[:7], **call), strict=True):
            close(found, expected, RTOL)
    draws = [la.sample(4, generator=torch.Generator().manual_seed(1)) for la in (ours, theirs)]
    assert draws[0].shape == draws[1].shape
    if subset == "subnetwork":
        outside = torch.ones(ours.n_params, dtype=torch.bool)
        outside[positions("reused module", ours.model, subset)] = False
        assert torch.equal(draws[0][:, outside], draws[1][:, outside])


def test_class_probabilities_by_monte_carlo():
    ours, theirs, X = both("classification")
    draws = theirs.functional_samples(X, n_samples=20_000, generator=torch.Generator().manual_seed(2))
    probabilities = torch.softmax(draws, -1)
    error = probabilities.std(0) * (2 / 20_000) ** 0.5
    options = {"link_approx": "mc", "n_samples": 20_000}
    for diagonal in (False, True):
        found = ours(X, diagonal_output=diagonal, generator=torch.Generator().manual_seed(1), **options)
        z = (found - probabilities.mean(0)) / error
        # without the covariances between outputs it is another distribution, which shows that the test can tell
        assert (float(z.abs().max()) < 4.5) is not diagonal


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_tuned_prior(likelihood, prior):
    ours, theirs, _ = both(likelihood)
    start = 6.0 if prior == "scalar" else PRIORS[prior](ours)
    for la in (ours, theirs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "By default `link_approx`")
            la.optimize_prior_precision(method="marglik", n_steps=12, init_prior_prec=start, prior_structure=prior)
    close(ours.prior_precision, theirs.prior_precision, 1e-5)
    assert not torch.allclose(ours.prior_precision, torch.as_tensor(start, dtype=torch.float64), rtol=0.05)


@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise"])
def test_gradients_of_the_evidence(name):
    gradients = []
    for la in both("regression")[:2]:
        value = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
        la.log_marginal_likelihood(**{name: value}).backward()
        gradients.append(value.grad)
    close(gradients[0], gradients[1], RTOL)
    assert gradients[0].abs() > 1e-2
