"""Every number of a posterior against the same number computed densely."""

import math

import pytest
import torch
from models import mlp, targets
from oracles import dense_log_likelihood, dense_log_marginal_likelihood, flat_parameters
from posterior_cases import (
    close,
    dense_counterpart,
    fitted,
    hyper_parameters,
    jacobians,
    loader_of,
    mean_field,
    posterior_of,
)

MODEL_NAMES = ["MLP", "convolutions and pooling", "BatchNorm", "LayerNorm and raw parameters"]
SPLITS = {
    "held out, all the data": {"magnitudes": "held_out", "direction_samples": 0.4},
    "held out, 37 of 95": {"magnitudes": "held_out", "direction_samples": 17, "magnitude_samples": 20, "n_data": 95},
    "same batch, all the data": {"magnitudes": "same_batch"},
    "same batch, 25 of 90": {
        "magnitudes": "same_batch",
        "direction_samples": 15,
        "magnitude_samples": 10,
        "n_data": 90,
    },
}


def check_curvature(la, dense):
    assert la.rank == dense.directions.shape[1]
    overlap = (la.directions.T @ dense.directions).abs()
    close(overlap, torch.eye(la.rank), rtol=1e-6)
    close(la.in_sample_curvatures, dense.in_sample)
    close(la.directional_curvatures, dense.magnitudes)
    close(la.standard_errors, dense.standard_errors)


def check_precision(la, dense, J):
    P = la.n_params
    close(la.posterior_precision.to_dense(), dense.posterior_precision)
    close(la.log_det_posterior_precision, torch.linalg.slogdet(dense.posterior_precision)[1], rtol=1e-9)
    covariance = dense.covariance
    close(la.functional_variance(J), J @ covariance @ J.mT)
    flat = J.flatten(0, 1)
    close(la.functional_covariance(J), flat @ covariance @ flat.T)
    close(la.functional_covariance(flat), flat @ covariance @ flat.T)
    root = la.posterior_precision.root(torch.eye(P, dtype=J.dtype))
    close(root.T @ root, covariance)
    points = la.mean + torch.randn(3, P, dtype=J.dtype, generator=torch.Generator().manual_seed(5))
    expected = torch.stack([(p - la.mean) @ dense.posterior_precision @ (p - la.mean) for p in points])
    close(la.square_norm(points), expected)
    close(la.log_prob(points[0], normalized=False), -0.5 * expected[0])
    normalizer = 0.5 * torch.linalg.slogdet(dense.posterior_precision)[1] - 0.5 * P * math.log(2 * math.pi)
    close(la.log_prob(points[0]), normalizer - 0.5 * expected[0])


def check_evidence(la, dense, X, y, prior_mean=0.0):
    used = la.split.used_indices.unique()
    options = {"sigma_noise": float(la.sigma_noise), "temperature": la.temperature}
    log_likelihood = dense_log_likelihood(la.model, X[used], y[used], la.likelihood, n_data=la.n_data, **options)
    close(la.log_likelihood, log_likelihood, rtol=1e-9)
    theta = flat_parameters(la.model)
    close(la.mean, theta, rtol=0)
    close(la.scatter, (la.prior_precision_diag * (theta - prior_mean) ** 2).sum(), rtol=1e-9)
    expected = dense_log_marginal_likelihood(
        log_likelihood, dense.posterior_precision, la.prior_precision_diag, theta, prior_mean
    )
    close(la.log_marginal_likelihood(), expected, rtol=1e-8)


def check_predictive(la, dense, X, J):
    x = X[: len(J)]
    f = la.model(x).detach()
    variance = J @ dense.covariance @ J.mT
    if la.likelihood == "classification":
        shrunk = f / (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
        close(la(x, link_approx="probit"), torch.softmax(shrunk, -1))
        close(la(x), mean_field(f, variance))
        return
    mean, found = la(x)
    close(mean, f)
    close(found, variance)
    close(la(x, diagonal_output=True)[1], variance.diagonal(dim1=1, dim2=2))
    mean, found = la(x, joint=True)
    close(mean, f.flatten())
    close(found, J.flatten(0, 1) @ dense.covariance @ J.flatten(0, 1).T)


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_posterior_is_the_dense_one(name, likelihood, split, complement):
    options = SPLITS[split]
    la, X, y, per_sample = fitted(name, likelihood, complement=complement, **options)
    dense = dense_counterpart(la, X, per_sample, magnitudes=options["magnitudes"], complement=complement)
    J = jacobians(name, 4)
    check_curvature(la, dense)
    check_precision(la, dense, J)
    check_evidence(la, dense, X, y)
    check_predictive(la, dense, X, J)


PRIORS = {
    "one number in a tensor": lambda la: torch.tensor(2.5),
    "one per parameter tensor": lambda la: torch.linspace(0.2, 3.0, la.n_layers),
    "one per parameter": lambda la: torch.linspace(0.1, 7.0, la.n_params),
}


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
@pytest.mark.parametrize("prior", PRIORS)
def test_prior_structures(prior, complement):
    la, X, y, per_sample = fitted(
        "LayerNorm and raw parameters", "regression", complement=complement, rank=9, prior_mean=0.3
    )
    la.prior_precision = PRIORS[prior](la)
    dense = dense_counterpart(la, X, per_sample, complement=complement, rank=9)
    J = jacobians("LayerNorm and raw parameters", 3)
    assert la.rank == 9
    check_curvature(la, dense)
    check_precision(la, dense, J)
    check_evidence(la, dense, X, y, prior_mean=0.3)
    check_predictive(la, dense, X, J)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_prior_mean_per_parameter(likelihood):
    la, X, y, per_sample = fitted("MLP", likelihood, rank=5)
    prior_mean = torch.linspace(-1, 1, la.n_params, dtype=torch.float64)
    la.prior_mean = prior_mean
    check_evidence(la, dense_counterpart(la, X, per_sample, rank=5), X, y, prior_mean)


def unit_vectors(n, like, generator):
    return torch.eye(len(like), dtype=like.dtype)


def test_sample_is_mean_plus_root_of_the_generators_noise(monkeypatch):
    la, X, _, per_sample = fitted("MLP", "classification", complement="diagonal")
    noise = torch.randn(6, la.n_params, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    found = la.sample(6, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(found, la.mean + la.posterior_precision.root(noise), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("debiased_laplace.posterior.laplace.standard_normal", unit_vectors)
    deviations = la.sample(la.n_params) - la.mean
    close(deviations.T @ deviations, dense_counterpart(la, X, per_sample, complement="diagonal").covariance)


def test_functions_drawn_are_linear_in_drawn_weights(monkeypatch):
    la, X, _, per_sample = fitted("MLP", "regression")
    monkeypatch.setattr("debiased_laplace.predictive.predictive.standard_normal", unit_vectors)
    deviations = la.functional_samples(X[:4], n_samples=la.n_params) - la.model(X[:4]).detach()
    J = jacobians("MLP", 4).flatten(0, 1)
    covariance = J @ dense_counterpart(la, X, per_sample).covariance @ J.T
    flat = deviations.flatten(1)
    close(flat.T @ flat, covariance)


HYPER_PARAMETERS = {
    "prior precision": ("prior_precision", 3.7),
    "temperature": ("temperature", 0.45),
    "observation noise": ("sigma_noise", 1.9),
}


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
@pytest.mark.parametrize("changed", HYPER_PARAMETERS)
def test_hyper_parameters_take_effect_at_once(changed, complement):
    la, X, y, per_sample = fitted("MLP", "regression", complement=complement, rank=12)
    J = jacobians("MLP", 3)
    before = la.functional_variance(J), la.log_marginal_likelihood(), la(X[:3])[1]
    setattr(la, *HYPER_PARAMETERS[changed])
    dense = dense_counterpart(la, X, per_sample, complement=complement, rank=12)
    check_precision(la, dense, J)
    check_evidence(la, dense, X, y)
    check_predictive(la, dense, X, J)
    after = la.functional_variance(J), la.log_marginal_likelihood(), la(X[:3])[1]
    assert all(not torch.allclose(x, z, rtol=1e-2) for x, z in zip(before, after, strict=True))


@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
def test_everything_given_makes_directional_curvatures_those_of_the_full_batch(rank, magnitudes):
    la, _, _, per_sample = fitted("MLP", "classification", rank=rank, magnitudes=magnitudes)
    H = sum(per_sample) / len(per_sample)
    close(la.directional_curvatures, (la.directions * (H @ la.directions)).sum(0), rtol=1e-9)
    assert not la.standard_errors.any()
    if magnitudes == "held_out":
        assert not torch.allclose(la.in_sample_curvatures, la.directional_curvatures, rtol=1e-3)


def test_everything_given_and_full_rank_keeps_the_trace_of_the_full_batch():
    # 17 + 1 trainable parameters are fewer than the direction samples' rows
    la, _, _, per_sample = fitted("partly frozen", "regression", complement="isotropic", direction_samples=0.7)
    H = sum(per_sample) / len(per_sample)
    close(
        torch.trace(la.posterior_precision.to_dense() - la.prior_precision * torch.eye(la.n_params)),
        la.n_data * la._H_factor * torch.trace(H),
        rtol=1e-9,
    )
    close(la.directional_curvatures, (la.directions * (H @ la.directions)).sum(0), rtol=1e-9)


def test_float32_agrees_with_float64():
    model32, X32 = mlp(dtype=torch.float32)
    la32 = posterior_of(model32, "classification", rank=10, **hyper_parameters("classification"))
    la32.fit(loader_of(X32, targets("classification"), shuffle=True))
    la64, X, _, _ = fitted("MLP", "classification", rank=10)
    assert la32.directions.dtype == torch.float32
    torch.testing.assert_close(la32.directional_curvatures.double(), la64.directional_curvatures, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(la32(X32).double(), la64(X), rtol=1e-4, atol=1e-5)
