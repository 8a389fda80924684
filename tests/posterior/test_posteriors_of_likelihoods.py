"""Posteriors and predictions of binary, Poisson, heteroscedastic and own likelihoods."""

import math

import numpy as np
import pytest
import torch
from laplace.curvature import AsdlEF, CurvlinopsGGN, CurvlinopsHessian
from likelihoods import OPTIONS, PRIOR, TEMPERATURE, N, Ordinal, density, fitted, likelihood_of, problem, some_targets
from scipy import integrate, stats
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import (
    DebiasedLaplace,
    diagnose,
    directional_derivatives,
    newton_step,
)
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.predictive.mean_field import averaged_loss

# name and number of outputs
CASES = [("binary", 1), ("binary", 3), ("poisson", 2), ("heteroscedastic", 2), ("heteroscedastic", 4), ("ordinal", 1)]
every_case = pytest.mark.parametrize(("name", "n_outputs"), CASES)


def jacobians(model, X):
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    J = jacrev(lambda p: functional_call(model, p, (X,)))(parameters)
    return torch.cat([j.flatten(2) for j in J.values()], dim=2)


@every_case
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_the_full_posterior_of_all_data_is_the_dense_one(name, n_outputs, sampling):
    la, X, y = fitted(name, n_outputs, hessian_structure="full", magnitudes="same_batch", sampling=sampling)
    J, f = jacobians(la.model, X), la.model(X).detach()
    kind = la._spec.likelihood
    P = J.shape[2]
    expected = (J.mT @ kind.hessian(f) @ J).sum(0) / TEMPERATURE + PRIOR * torch.eye(P).double()
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected, rtol=1e-6, atol=1e-8)
    mean, variance = la._glm_predictive_distribution(X)
    torch.testing.assert_close(mean, f)
    torch.testing.assert_close(variance, J @ torch.linalg.inv(expected) @ J.mT, rtol=1e-6, atol=1e-10)
    # the evidence, constants of the loss included
    loss = kind.per_sample_loss(f, y).sum()
    weights = la.mean
    evidence = -loss / TEMPERATURE - 0.5 * (
        torch.linalg.slogdet(expected)[1] - P * math.log(PRIOR) + PRIOR * weights @ weights
    )
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence, rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hessian_structure": "kron"},
        {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
        {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.arange(0, 28, 3), "rank": 4},
        {"sampling": "uniform", "magnitudes": "held_out", "direction_samples": 14, "rank": 5},
    ],
    ids=["low rank", "Kronecker", "last layer", "subnetwork", "uniform"],
)
def test_every_structure_fits_predicts_is_judged_and_saved(name, n_outputs, options):
    la, X, y = fitted(name, n_outputs, **options)
    found, draws = la(X), la.predict(X).samples(3)
    shape = (N,) if name == "ordinal" or (name, n_outputs) == ("heteroscedastic", 2) else (N, *y.shape[1:])
    assert draws.shape == (3, *shape)
    other = DebiasedLaplace(la.model, likelihood_of(name), **{**OPTIONS, **options})
    other.load_state_dict(la.state_dict())
    again = other(X)
    torch.testing.assert_close(again, found)
    assert other.likelihood == name
    assert f"({name}, " in repr(la)
    kl = la.held_out_kl(DataLoader(TensorDataset(X, y), batch_size=11)) if "sampling" not in options else None
    if options == {}:
        # all rows were drawn: the posterior of all data, to the threshold of its rank
        J = jacobians(la.model, X)
        H = la._spec.likelihood.hessian(la.model(X).detach())
        P = la.posterior_precision.to_dense()
        full = (J.mT @ H @ J).sum(0) / TEMPERATURE + PRIOR * torch.eye(len(P)).double()
        expected = 0.5 * ((torch.linalg.inv(P) @ full).trace() + P.logdet())
        assert kl.value == pytest.approx(float(expected), rel=1e-6)


def test_one_binary_label_is_a_classification_of_two_classes():
    model, X, y = problem("binary", 1)

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            z = self.inner(x)
            return torch.cat([torch.zeros_like(z), z], dim=1)

    posteriors = []
    for network, likelihood, targets in ((model, "binary", y), (Pairs(), "classification", y[:, 0].long())):
        la = DebiasedLaplace(network, likelihood, rank=6, magnitudes="held_out", sampling="uniform", **OPTIONS)
        la.fit(DataLoader(TensorDataset(X, targets), batch_size=7))
        posteriors.append(la)
    binary, pairs = posteriors
    torch.testing.assert_close(binary.directional_curvatures, pairs.directional_curvatures)
    torch.testing.assert_close(binary.log_marginal_likelihood(), pairs.log_marginal_likelihood())
    for link in ("mean_field", "probit"):
        torch.testing.assert_close(binary(X, link_approx=link)[:, 0], pairs(X, link_approx=link)[:, 1])
    own, other = (la.gaussian_logits(X) for la in posteriors)
    torch.testing.assert_close(own.probabilities_and_information(), other.probabilities_and_information())
    drawn = binary(X, link_approx="mc", n_samples=20_000, generator=torch.Generator().manual_seed(1))
    assert float((drawn - binary(X)).abs().max()) < 0.02


def test_probabilities_of_several_labels_are_integrals():
    la, X, _ = fitted("binary", 3)
    la.prior_precision = 0.05
    mean, variance = la._glm_predictive_distribution(X[:4])
    found = la(X[:4])
    for i in range(4):
        for c in range(3):
            m, s = float(mean[i, c]), float(variance[i, c, c]) ** 0.5
            expected = integrate.quad(lambda z: stats.norm.pdf(z) / (1 + np.exp(-(m + s * z))), -9, 9)[0]  # noqa: B023
            assert float(found[i, c]) == pytest.approx(expected, abs=3e-3)
    assert float((found - torch.sigmoid(mean)).abs().max()) > 0.02
    torch.testing.assert_close(la.predict(X[:4]).probs, found)
    drawn = la.predict(X[:4], "nn", n_samples=40).probs
    assert drawn.shape == found.shape
    assert bool(((drawn > 0) & (drawn < 1)).all())
    draws = la.predictive_samples(X[:4], n_samples=5)
    assert draws.shape == (5, 4, 3)
    assert bool(((draws > 0) & (draws < 1)).all())


@pytest.mark.parametrize(("name", "n_outputs"), CASES[2:])
def test_predictions_of_targets_are_those_of_their_draws(name, n_outputs):
    la, X, y = fitted(name, n_outputs)
    la.prior_precision = 0.8
    p = la.predict(X[:6])
    assert p.mean.shape == p.std.shape == y[:6].shape
    n = 20_000
    draws = p.samples(n, torch.Generator().manual_seed(0)).double()
    assert draws.shape == (n, *p.mean.shape)
    error = draws.std(0) / n**0.5
    # moments of an own likelihood are those of 2,000 draws
    slack = 4.5 * error + (5 * p.std / 4_000**0.5 if name == "ordinal" else 0.0)
    assert bool(((draws.mean(0) - p.mean).abs() < slack).all())
    torch.testing.assert_close(draws.std(0), p.std, rtol=0.06, atol=0)
    torch.testing.assert_close(p.std.square(), p.function_std.square() + p.noise_std.square())
    for level in (0.5, 0.9):
        low, high = p.interval(level)
        inside = ((draws >= low) & (draws <= high)).double().mean(0)
        assert bool((inside > level - 0.04).all())
        if name == "heteroscedastic":
            assert bool((inside < level + 0.04).all())
    again = p.interval(0.9)
    torch.testing.assert_close(again, p.interval(0.9))
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        p.interval(1.2)
    assert f"TargetPrediction({name}" in repr(p)


@pytest.mark.parametrize(("name", "n_outputs"), CASES[2:])
def test_the_negative_log_likelihood_of_a_prediction_is_that_of_the_mixture(name, n_outputs):
    kind = Ordinal() if name == "ordinal" else likelihood_named(name)
    g = torch.Generator().manual_seed(0)
    mean = 0.5 * torch.randn(3, n_outputs, generator=g).double()
    A = 0.4 * torch.randn(3, n_outputs, n_outputs, generator=g).double()
    covariance, y = A @ A.mT, some_targets(name, 3, n_outputs)
    found = averaged_loss(kind, mean, covariance, y)
    n = 400_000
    f = mean + (A @ torch.randn(3, n_outputs, n, generator=g).double()).permute(2, 0, 1)
    likelihoods = (-kind.per_sample_loss(f.flatten(0, 1), y.repeat(n, *[1] * (y.ndim - 1)))).exp().unflatten(0, (n, 3))
    error = likelihoods.std(0) / n**0.5 / likelihoods.mean(0)
    assert bool(((found + likelihoods.mean(0).log()).abs() < 4.5 * error + 5e-3).all())
    # without variance it is the loss
    torch.testing.assert_close(averaged_loss(kind, mean, 1e-18 * covariance, y), kind.per_sample_loss(mean, y))
    if n_outputs == 1:
        alone = averaged_loss(kind, mean, covariance[..., 0], y)
        torch.testing.assert_close(alone, found)


@every_case
@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:.*than the plain network")
def test_the_prior_is_tuned_on_validation_data_by_these_losses(name, n_outputs):
    la, X, y = fitted(name, n_outputs)
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=DataLoader(TensorDataset(X, y), batch_size=10),
        log_prior_prec_min=-1,
        log_prior_prec_max=4,
        grid_size=6,
    )
    losses = {}
    for prior in (0.1, 1.0, 10.0, 100.0, 1e3, 1e4):
        other = DebiasedLaplace(la.model, likelihood_of(name), **{**OPTIONS, "prior_precision": prior})
        other.fit(DataLoader(TensorDataset(X, y), batch_size=7))
        if name == "binary":
            p = other(X)
            losses[prior] = -(y * p.log() + (1 - y) * (1 - p).log()).sum(1).mean()
        else:
            losses[prior] = averaged_loss(la._spec.likelihood, *other._glm_predictive_distribution(X), y).mean()
    best = min(losses, key=lambda prior: float(losses[prior]))
    assert float(la.prior_precision) == pytest.approx(best)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlEF, CurvlinopsHessian])
@pytest.mark.filterwarnings("ignore:.*torch.func computes the same instead")
def test_other_curvatures_are_those_of_the_same_loss(backend):
    for name, C in (("binary", 3), ("poisson", 2)):
        found = fitted(name, C, hessian_structure="full", magnitudes="same_batch", sampling="uniform", backend=backend)
        la, X, y = found
        J, f = jacobians(la.model, X), la.model(X).detach()
        kind = la._spec.likelihood
        if backend is CurvlinopsGGN:
            H = (J.mT @ kind.hessian(f) @ J).sum(0)
        elif backend is AsdlEF:
            g = (kind.gradient(f, y)[:, None] @ J)[:, 0]
            H = g.T @ g
        else:
            parameters = dict(la.model.named_parameters())
            sizes = [p.numel() for p in parameters.values()]

            def loss(flat, la=la, X=X, y=y, kind=kind, parameters=parameters, sizes=sizes):
                parts = [v.view_as(p) for v, p in zip(flat.split(sizes), parameters.values(), strict=True)]
                values = dict(zip(parameters, parts, strict=True))
                return kind.per_sample_loss(functional_call(la.model, values, (X,)), y).sum()

            H = torch.autograd.functional.hessian(loss, la.mean)
            # directions of negative curvature are floored
            values, vectors = torch.linalg.eigh(H)
            H = (vectors * values.clamp_min(0)) @ vectors.T
        expected = H / TEMPERATURE + PRIOR * torch.eye(len(H)).double()
        torch.testing.assert_close(la.posterior_precision.to_dense(), expected, rtol=1e-5, atol=1e-6)


@every_case
def test_quadratics_and_newton_steps_take_these_likelihoods(name, n_outputs):
    model, X, y = problem(name, n_outputs)
    J, f = jacobians(model, X), model(X).detach()
    kind = Ordinal() if name == "ordinal" else likelihood_named(name)
    U = torch.linalg.qr(torch.randn(J.shape[2], 2, generator=torch.Generator().manual_seed(0)).double())[0]
    found = directional_derivatives(model, likelihood_of(name), DataLoader(TensorDataset(X, y), batch_size=8), U)
    H, g = (J.mT @ kind.hessian(f) @ J).mean(0), (kind.gradient(f, y)[:, None] @ J).mean((0, 1))
    torch.testing.assert_close(found.curvatures, (U * (H @ U)).sum(0))
    torch.testing.assert_close(found.slopes, U.T @ g)
    step = newton_step(model, likelihood_of(name), (X, y), 0.3, "same_batch", shrinkage=False, max_iterations=60)
    expected = -torch.linalg.solve(H + 0.3 * torch.eye(len(H)).double(), g)
    torch.testing.assert_close(step.update, expected, rtol=1e-3, atol=1e-5)


def test_diagnosis_takes_these_likelihoods():
    model, X, y = problem("binary", 3)
    found = diagnose(model, "binary", DataLoader(TensorDataset(X, y), batch_size=8), batch_sizes=[8], n_draws=3)
    assert "8" in str(found)
    assert len(found.batches) == 1
    assert found.n_data == N
    assert found.rows is not None


def test_what_cannot_be_done_says_why():
    la, X, y = fitted("binary", 3)
    with pytest.raises(ValueError, match=r"'bridge' is of a softmax; expected 'mean_field', 'probit' or 'mc'"):
        la(X, link_approx="bridge")
    model = nn.Sequential(la.model, nn.Sigmoid())
    with pytest.raises(ValueError, match=r"it ends with a sigmoid.* remove the model's last sigmoid"):
        DebiasedLaplace(model, "binary").fit(DataLoader(TensorDataset(X, y), batch_size=8))
    with pytest.raises(ValueError, match="sigma_noise is of regression only; expected 1 in heteroscedastic"):
        DebiasedLaplace(model, "heteroscedastic", sigma_noise=0.5)
    with pytest.raises(ValueError, match=r"class_weights are for likelihood='classification'; got likelihood='binary'"):
        DebiasedLaplace(model, "binary", class_weights=[1.0, 2.0, 3.0])

    class WithoutDraws(Ordinal):
        noise = Ordinal.__mro__[1].noise

    model, X, y = problem("ordinal", 1)
    la = DebiasedLaplace(model, WithoutDraws(), **OPTIONS)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=8))
    assert la(X)[0].shape == (N, 1)
    with pytest.raises(ValueError, match="'ordinal' draws no targets: it needs the methods noise and drawn_targets"):
        la.predict(X)


def test_a_constant_log_variance_is_a_regression_with_that_noise():
    model, X, _ = problem("heteroscedastic", 1)
    y, sigma = torch.randn(N, 1, generator=torch.Generator().manual_seed(8)).double(), 0.6

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            m = self.inner(x)
            return torch.cat([m, torch.full_like(m, 2 * math.log(sigma))], dim=1)

    options = {"rank": 6, "magnitudes": "held_out", "sampling": "uniform", **OPTIONS}
    both = DebiasedLaplace(Constant(), "heteroscedastic", **options)
    regression = DebiasedLaplace(model, "regression", sigma_noise=sigma, **options)
    for la in (both, regression):
        la.fit(DataLoader(TensorDataset(X, y), batch_size=7))
    torch.testing.assert_close(both.posterior_precision.to_dense(), regression.posterior_precision.to_dense())
    ours, theirs = both.predict(X), regression.predict(X)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.std, theirs.std)
    low, high = ours.interval(0.9)
    expected = theirs.interval(0.9)
    assert float((low - expected[0]).abs().max() / theirs.std.max()) < 0.15
    assert float((high - expected[1]).abs().max() / theirs.std.max()) < 0.15


def test_densities_of_the_tests_are_those_of_the_losses():
    # of the helper that other tests take as truth
    f = torch.tensor([[0.3, -0.2]]).double()
    assert float(density("poisson", f).mean[0, 0]) == pytest.approx(math.exp(0.3))
    assert float(density("heteroscedastic", f).variance[0, 0]) == pytest.approx(math.exp(-0.2))


def test_logits_between_0_and_1_are_logits():
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.mul_(0.1)
        model.bias.fill_(0.5)
    X, y = torch.randn(N, 4).double(), torch.randint(2, (N, 1)).double()
    assert bool(((model(X) > 0) & (model(X) < 1)).all())
    DebiasedLaplace(model, "binary", **OPTIONS).fit(DataLoader(TensorDataset(X, y), batch_size=10))
    inner = nn.Sequential(model, nn.Sigmoid(), nn.Tanh())
    DebiasedLaplace(inner, "binary", **OPTIONS).fit(DataLoader(TensorDataset(X, y), batch_size=10))
    flat = nn.Sequential(model, nn.Sigmoid(), nn.Flatten())
    with pytest.raises(ValueError, match="it ends with a sigmoid"):
        DebiasedLaplace(flat, "binary", **OPTIONS).fit(DataLoader(TensorDataset(X, y), batch_size=10))


def test_counts_far_from_the_data_are_drawn_at_once():
    kind = likelihood_named("poisson")
    f = torch.tensor([[20.0, 45.0, 200.0, 800.0]]).double()
    drawn = kind.drawn_targets(
        f.expand(1000, 4), torch.rand(1000, 4, generator=torch.Generator().manual_seed(0)).double()
    )
    rates = f.exp()
    z = (drawn.mean(0) - rates[0])[:3] / (rates[0, :3] / 1000).sqrt()
    assert float(z[:2].abs().max()) < 4.5
    # the rate itself is infinite
    assert bool(drawn[:, 3].isinf().all())
    assert bool((kind.drawn_targets(f.float().expand(9, 4), torch.rand(9, 4).double())[:, :2] > 1e8).all())


def test_names_and_probabilities_of_own_likelihoods():
    class Reserved(Ordinal):
        name = "regression"

    class Probabilities(Ordinal):
        name = "mine"
        gives_probabilities = True

    model, _, _ = problem("ordinal", 1)
    with pytest.raises(ValueError, match=r"none of \['binary', .*\]; got 'regression'"):
        DebiasedLaplace(model, Reserved())
    with pytest.raises(ValueError, match="gives_probabilities is of built-in likelihoods; expected False of 'mine'"):
        DebiasedLaplace(model, Probabilities())


def test_predictions_of_targets_keep_the_graph():
    model, X, y = problem("heteroscedastic", 2)
    la = DebiasedLaplace(model, "heteroscedastic", enable_backprop=True, **OPTIONS)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=7))
    x = X[:2].clone().requires_grad_()
    p = la.predict(x)
    assert p.mean.requires_grad
    assert p.std.requires_grad
    assert not p.interval(0.9)[0].requires_grad
