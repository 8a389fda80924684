"""Gaussian logits of many classes, by rows of differences and from features, are those of the dense covariance."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature import layer_covariance
from debiased_laplace.curvature import network as network_module
from debiased_laplace.predictive import linearized
from debiased_laplace.predictive.mean_field import LEADING, GaussianLogits

C, N_DATA = LEADING + 13, 60
FIELDS = ("order", "means", "covariance", "variances", "total_variance")

POSTERIORS = {
    "all weights": ("all", {"rank": 9}),
    "all weights, Kronecker complement": ("all", {"complement": "kron"}),
    "last layer, low rank": ("last_layer", {"rank": 9}),
    "last layer, Kronecker": ("last_layer", {"hessian_structure": "kron"}),
    "last layer, K-FAC's basis": ("last_layer", {"hessian_structure": "kron", "kron_basis": "kfac"}),
    "last layer without bias": ("last_layer", {"hessian_structure": "kron", "bias": False}),
    "subnetwork": ("subnetwork", {"hessian_structure": "full", "subnetwork_indices": torch.arange(20, 330, 3)}),
}


def posterior(case):
    subset, options = POSTERIORS[case]
    bias = options.get("bias", True)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, C, bias=bias)).double()
    X = torch.randn(N_DATA, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (N_DATA,), generator=generator)
    options = {"hessian_structure": "lowrank", **{k: v for k, v in options.items() if k != "bias"}}
    la = DebiasedLaplace(model, "classification", subset, prior_precision=0.7, temperature=1.3, **options)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=20), n_data=260)
    return la, X[:6]


@pytest.mark.slow
@pytest.mark.parametrize("case", POSTERIORS)
def test_differences_are_those_of_the_dense_covariance(case):
    la, X = posterior(case)
    mean, covariance = la._glm_predictive_distribution(X)
    expected, found = GaussianLogits.of_covariance(mean, covariance), la.gaussian_logits(X)
    assert found.covariance.shape[-1] == LEADING - 1
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(la(X), expected.probabilities())
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(
        linearized.predict_variances(la.fit_result.network, la.posterior_precision, X)[1], variance
    )
    alone = la(X, diagonal_output=True)
    torch.testing.assert_close(alone, GaussianLogits.of_variances(mean, variance).probabilities())
    assert float((alone - la(X)).abs().max()) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_rows_in_blocks(rows, monkeypatch):
    la, X = posterior("all weights")
    whole = la.gaussian_logits(X)
    monkeypatch.setattr(network_module, "CHUNK_BYTES", rows * la.n_params * 8)
    found = la.gaussian_logits(X)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all weights", "all weights, Kronecker complement"])
@pytest.mark.parametrize("rows", [1, 150, 10_000])
def test_rows_as_factors_in_blocks(case, rows, monkeypatch):
    la, X = posterior(case)
    n_bytes = la.fit_result.network.bytes_of_factors
    monkeypatch.setattr(linearized, "CHUNK_BYTES", rows * n_bytes)
    monkeypatch.setattr(network_module.Network, "bytes_of_a_row", n_bytes)
    monkeypatch.setattr(network_module.Network, "factors_save_memory", False)
    expected = la.gaussian_logits(X)
    monkeypatch.setattr(network_module.Network, "factors_save_memory", True)
    calls, computed = [], network_module.Network.differences_by_parameter
    monkeypatch.setattr(
        network_module.Network,
        "differences_by_parameter",
        lambda *arguments: calls.append(arguments[-1]) or computed(*arguments),
    )
    found = la.gaussian_logits(X)
    leading = found.covariance.shape[-1]
    # a block of leading rows, the sum, and blocks of the others, for each chunk of samples
    assert len(calls) == -(-6 // max(1, rows // leading)) * (2 + -(-(C - 1 - leading) // rows))
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["last layer, Kronecker", "last layer without bias"])
def test_a_kronecker_last_layer_needs_features_alone(case, monkeypatch):
    la, X = posterior(case)
    whole = la.gaussian_logits(X)

    def refuse(*_, **__):
        raise AssertionError("a Jacobian was asked for")

    monkeypatch.setattr(network_module.Network, "_rows", refuse)
    monkeypatch.setattr(layer_covariance, "CHUNK_BYTES", 2 * 8 * C * 4)  # four inputs at once
    found = la.gaussian_logits(X)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    la(X, link_approx="probit")


@pytest.mark.slow
def test_probabilities_can_be_differentiated_with_respect_to_inputs():
    la, X = posterior("all weights")
    la.enable_backprop = True
    x = X[:2].clone().requires_grad_()
    la(x)[:, 3].sum().backward()
    direction, step = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 1e-5
    with torch.no_grad():
        ends = [float(la(X[:2] + sign * step * direction)[:, 3].sum()) for sign in (1, -1)]
    assert float((x.grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_outputs_that_are_no_logits_are_refused():
    model = nn.Linear(3, 2)
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    la = DebiasedLaplace(model, "regression", prior_precision=0.7, sigma_noise=1.3)
    la.fit(DataLoader(TensorDataset(X, X[:, :2]), batch_size=4))
    with pytest.raises(ValueError, match="a posterior of logits; got the likelihood 'regression'"):
        la.gaussian_logits(X)
