"""Observation noise of a regression: one per output, tuned where it was not given; targets in either shape."""

import copy
import math
import warnings

import pytest
import torch
from laplace.curvature import BackPackEF, CurvlinopsEF
from models import MODELS
from oracles import dense_gradients
from posterior_cases import PRIOR, TEMPERATURE, close, jacobians, loader_of, posterior_of, problem

from debiased_laplace import DebiasedLaplace, directional_derivatives, evaluate, newton_step

PER_OUTPUT = torch.tensor([0.4, 1.7, 0.9], dtype=torch.float64)
GIVEN = {"prior_precision": PRIOR, "temperature": TEMPERATURE}
FULL = {"hessian_structure": "full", "magnitudes": "same_batch"}
UNSET = "ignore:sigma_noise was not given"


def noisy(n_outputs=3, spread=0.13):
    """A network, inputs, and targets around its outputs."""
    model, X = MODELS["MLP"](n_outputs=n_outputs)
    noise = torch.randn(len(X), n_outputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return model, X, model(X).detach() + spread * noise


# --- targets (n,) for one output ---


@pytest.mark.parametrize("backend", [None, CurvlinopsEF, BackPackEF])
def test_targets_without_the_output_dimension_give_the_same_posterior(backend):
    model, X, y = noisy(1)
    options = {"sigma_noise": 0.3, "backend": backend, **GIVEN}
    flat, column = (posterior_of(model, "regression", "all", **options) for _ in range(2))
    flat.fit(loader_of(X, y[:, 0]))
    column.fit(loader_of(X, y))
    assert flat.curvature_source == column.curvature_source
    assert torch.equal(flat.posterior_precision.to_matrix(), column.posterior_precision.to_matrix())
    assert flat.loss == column.loss
    if backend is not None:
        G = dense_gradients(model, X, y, "regression")
        same = posterior_of(model, "regression", "all", **{**options, **FULL})
        same.fit(loader_of(X, y[:, 0]))
        expected = G.T @ G / (0.3**2 * TEMPERATURE) + PRIOR * torch.eye(G.shape[1], dtype=torch.float64)
        close(same.posterior_precision.to_matrix(), expected)


def test_targets_without_the_output_dimension_are_taken_everywhere():
    model, X, y = noisy(1)
    found = []
    for t in (y[:, 0], y):
        la = DebiasedLaplace(model, "regression", sigma_noise=0.3, **GIVEN)
        la.fit(loader_of(X[:24], t[:24]), n_data=40)
        held = la.held_out_kl(loader_of(X[24:], y[24:]), loader_of(X[:24], y[:24]))  # known in either shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            la.optimize_prior_precision(method="gridsearch", val_loader=loader_of(X, t), grid_size=5)
        report = evaluate({"la": la}, loader_of(X, t), task="regression", include_map=False)
        step = newton_step(model, "regression", (X, t), damping=0.1)
        slopes = directional_derivatives(
            model, "regression", (X, t), torch.eye(len(la.mean), dtype=torch.float64)[:, :2]
        )
        found.append(
            [
                held.value,
                *la.prior_search.losses.tolist(),
                report.metrics["la"]["nll"].value,
                *step.update.tolist(),
                *slopes.slopes.tolist(),
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# --- one noise per output ---


@pytest.mark.parametrize("structure", ["full", "lowrank", "kron"])
def test_every_output_has_its_own_noise(structure):
    model, X, _, _ = problem("MLP", "regression")
    y = noisy()[2]
    options = FULL if structure == "full" else {"hessian_structure": structure, "magnitudes": "same_batch"}
    la = posterior_of(model, "regression", "all", sigma_noise=PER_OUTPUT, **{**GIVEN, **options})
    la.fit(loader_of(X, y))
    J = jacobians("MLP", len(X)) / PER_OUTPUT[:, None]
    H = torch.einsum("ncp,ncq->pq", J, J) / TEMPERATURE
    found = la.posterior_precision.to_matrix() - PRIOR * torch.eye(len(H), dtype=torch.float64)
    if structure == "kron":
        close(found.trace(), H.trace())
    else:
        # directions below 1e-6 of the largest curvature are left out
        torch.testing.assert_close(found, H, rtol=0, atol=1e-5 * float(torch.linalg.matrix_norm(H, 2)))
    squares = ((y - model(X).detach()) / PER_OUTPUT).square().sum() / (2 * TEMPERATURE)
    normalizer = len(X) * (PER_OUTPUT * math.sqrt(2 * math.pi)).log().sum()
    close(la.log_likelihood, -squares - normalizer)
    torch.testing.assert_close(la.predict(X).noise, PER_OUTPUT)


def test_outputs_of_one_noise_are_the_usual_posterior():
    model, X, y = noisy()
    one, three = (
        posterior_of(model, "regression", "all", sigma_noise=s, **GIVEN) for s in (0.3, torch.full((3,), 0.3))
    )
    for la in (one, three):
        la.fit(loader_of(X, y))
    close(three.posterior_precision.to_matrix(), one.posterior_precision.to_matrix())
    close(three.log_marginal_likelihood(), one.log_marginal_likelihood())


def test_the_ratio_of_noises_is_part_of_the_fit_and_its_size_is_not():
    model, X, y = noisy()
    la, other = (posterior_of(model, "regression", "all", sigma_noise=PER_OUTPUT * f, **GIVEN) for f in (1, 2.5))
    for each in (la, other):
        each.fit(loader_of(X, y))
    la.sigma_noise = PER_OUTPUT * 2.5
    close(la.posterior_precision.to_matrix(), other.posterior_precision.to_matrix())
    for wrong in (0.3, PER_OUTPUT.flip(0)):
        with pytest.raises(ValueError, match="fitted with noise in the ratio"):
            la.sigma_noise = wrong
    with pytest.raises(ValueError, match="fitted with one noise"):
        fitted_with(model, X, y, 0.3).sigma_noise = PER_OUTPUT
    torch.testing.assert_close(la.sigma_noise, PER_OUTPUT * 2.5)
    with pytest.raises(ValueError, match="one for each of 3 outputs; got 2"):
        fitted_with(model, X, y, PER_OUTPUT[:2])


def fitted_with(model, X, y, sigma_noise):
    la = posterior_of(model, "regression", "all", sigma_noise=sigma_noise, **GIVEN)
    la.fit(loader_of(X, y))
    return la


def test_states_and_held_out_kls_know_the_noise_of_every_output():
    model, X, y = noisy()
    la = posterior_of(model, "regression", "all", sigma_noise=PER_OUTPUT, **GIVEN)
    la.fit(loader_of(X[:24], y[:24]), n_data=40)
    loaded = posterior_of(model, "regression", "all", **GIVEN)
    loaded.load_state_dict(la.state_dict())
    torch.testing.assert_close(loaded.sigma_noise, PER_OUTPUT)
    rest, seen = loader_of(X[24:], y[24:]), loader_of(X[:24], y[:24])
    assert loaded.held_out_kl(rest, seen).value == pytest.approx(la.held_out_kl(rest, seen).value)
    # tr(P^-1 H) with the rows of every output divided by its noise
    J = jacobians("MLP", len(X)) / PER_OUTPUT[:, None]
    H = torch.einsum("ncp,ncq->pq", J, J) / TEMPERATURE
    P = la.posterior_precision.to_matrix()
    full = H + PRIOR * torch.eye(len(H), dtype=torch.float64)
    expected = 0.5 * (torch.linalg.solve(P, full).trace() + torch.logdet(P))
    assert la.held_out_kl(rest, seen).value == pytest.approx(float(expected))
    plain = posterior_of(model, "regression", "all", sigma_noise=0.9, **GIVEN)
    plain.fit(seen, n_data=40)
    with pytest.raises(ValueError, match="sigma_noise"):
        _ = la.held_out_kl(rest, seen) - plain.held_out_kl(rest, seen)


# --- noise that was not given ---


def test_fit_says_once_that_the_noise_was_not_given():
    model, X, y = noisy()
    la = posterior_of(model, "regression", "all", **GIVEN)
    residual = float((y - model(X).detach()).square().mean().sqrt())
    with pytest.warns(UserWarning, match=f"is 1, but the residuals .* {residual:.3g}. .*optimize_prior_precision"):
        la.fit(loader_of(X, y))
    assert "sigma_noise=1 (not given)" in repr(la)
    la.fit(loader_of(X, y))  # once
    fitted_with(model, X, y, 1.0)  # given
    f = model(X).detach()
    other = posterior_of(model, "regression", "all", **GIVEN)
    other.fit(loader_of(X, f + (y - f) / residual))  # right


def dense_evidence(model, X, y, sigma, delta):
    """Log marginal likelihood of the linearized network in closed form, with its normalizer tempered."""
    J = jacobians("MLP", len(X))
    H = torch.einsum("ncp,ncq->pq", J, J) / (sigma**2 * TEMPERATURE) + delta * torch.eye(J.shape[2], dtype=J.dtype)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    squares = (y - model(X).detach()).square().sum() / (2 * sigma**2)
    log_likelihood = (-squares - y.numel() * math.log(sigma * math.sqrt(2 * math.pi))) / TEMPERATURE
    determinants = torch.logdet(H) - len(theta) * math.log(delta)
    return float(log_likelihood - 0.5 * (determinants + delta * theta.square().sum()))


@pytest.mark.filterwarnings(UNSET)
def test_the_marginal_likelihood_tunes_noise_and_prior_together():
    model, X, y = noisy()
    la = posterior_of(model, "regression", "all", temperature=TEMPERATURE, **FULL)
    la.fit(loader_of(X, y))
    la.optimize_prior_precision(n_steps=400, lr=0.05, init_prior_prec=0.7)
    sigma, delta = float(la.sigma_noise), float(la.prior_precision)
    best = dense_evidence(model, X, y, sigma, delta)
    for factor in (0.97, 1.03):
        assert dense_evidence(model, X, y, sigma * factor, delta) < best
        assert dense_evidence(model, X, y, sigma, delta * factor) < best
    # MacKay's fixed point: residuals over the data that are not used up by parameters
    gamma = len(la.mean) - delta * torch.linalg.inv(la.posterior_precision.to_matrix()).trace()
    squares = (y - model(X).detach()).square().sum()
    close(sigma**2, squares / (y.numel() - TEMPERATURE * gamma), rtol=1e-3)
    assert "(tuned)" in repr(la)


@pytest.mark.filterwarnings(UNSET, "ignore:The best prior precision", "ignore:Even the best")
@pytest.mark.parametrize("sigma_noise", [None, "per output"])
def test_a_grid_search_gives_every_prior_its_best_noise(sigma_noise):
    model, X, y = noisy()
    shape = None if sigma_noise is None else PER_OUTPUT
    la = posterior_of(model, "regression", "all", sigma_noise=shape, temperature=TEMPERATURE)
    la.fit(loader_of(X[:25], y[:25]))
    if shape is not None:
        la.optimize_prior_precision(method="gridsearch", val_loader=loader_of(X[25:], y[25:]), grid_size=3)
        torch.testing.assert_close(la.sigma_noise, PER_OUTPUT)  # given: kept
        assert la.prior_search.sigma_noise is None
        return
    validation = loader_of(X[25:], y[25:], 6)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=validation, log_prior_prec_min=-1, log_prior_prec_max=3, grid_size=5
    )
    search = la.prior_search
    torch.testing.assert_close(la.sigma_noise, search.sigma_noise)
    chosen = float(la.prior_precision), float(la.sigma_noise)
    loss = score(la, X[25:], y[25:], *chosen)
    assert loss == pytest.approx(float(search.losses.min()))
    # along the curve of priors times noise variances the noise is the best, and elsewhere on the grid it is no better
    for factor in (0.95, 1.05):
        assert score(la, X[25:], y[25:], chosen[0] / factor**2, chosen[1] * factor) > loss
    residual = float((y[25:] - model(X[25:]).detach()).square().mean().sqrt())
    assert search.map_loss == pytest.approx(0.5 + math.log(residual * math.sqrt(2 * math.pi)))
    assert f"with sigma_noise {chosen[1]:.4g}, tuned with it" in repr(search)


def score(la, X, y, prior, sigma):
    la = copy.copy(la)
    la.prior_precision, la.sigma_noise = prior, sigma
    mean, variance = la(X, diagonal_output=True)
    return float(torch.nn.functional.gaussian_nll_loss(mean, y, variance + sigma**2, full=True))


@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:Even the best")
def test_the_size_of_several_noises_is_tuned_and_their_ratio_kept():
    model, X, y = noisy()
    y = y * PER_OUTPUT / 0.13 + (1 - PER_OUTPUT / 0.13) * model(X).detach()  # residuals in the ratio
    la = posterior_of(model, "regression", "all", sigma_noise=PER_OUTPUT * 7, temperature=TEMPERATURE, **FULL)
    la.fit(loader_of(X, y))
    la.sigma_noise = None
    assert "(not given)" in repr(la)
    grid = {"method": "gridsearch", "val_loader": loader_of(X, y), "grid_size": 3}
    for options in ({"n_steps": 200}, grid):
        la.optimize_prior_precision(**options)
        scale = float((la.sigma_noise / PER_OUTPUT).mean())
        torch.testing.assert_close(la.sigma_noise, PER_OUTPUT * scale)
        assert 0.5 < scale < 3
        assert "(tuned)" in repr(la)


@pytest.mark.filterwarnings(UNSET, "ignore:The best prior precision", "ignore:Even the best")
def test_noise_stays_open_until_it_is_set():
    model, X, y = noisy()
    la = posterior_of(model, "regression", "all")
    la.fit(loader_of(X, y))
    la.optimize_prior_precision(n_steps=5)
    first = float(la.sigma_noise)
    loaded = posterior_of(model, "regression", "all")
    loaded.load_state_dict(la.state_dict())
    for each in (la, loaded):
        each.optimize_prior_precision(n_steps=60)
        assert float(each.sigma_noise) != first
    la.sigma_noise = 0.37
    la.optimize_prior_precision(n_steps=5)
    assert float(la.sigma_noise) == 0.37
    la.sigma_noise = None
    networks = {"pred_type": "nn", "n_samples": 5, "grid_size": 2}
    la.optimize_prior_precision(method="gridsearch", val_loader=loader_of(X, y), **networks)
    close(la.sigma_noise, (y - model(X).detach()).square().mean().sqrt())
    with pytest.raises(ValueError, match="No prior"):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader_of(X, y), loss=lambda *_: math.nan)
    close(la.sigma_noise, (y - model(X).detach()).square().mean().sqrt())


def test_reports_take_one_noise_per_output():
    model, X, y = noisy()
    la = fitted_with(model, X, y, PER_OUTPUT)
    report = evaluate({"la": la}, loader_of(X, y), task="regression", include_map=False)
    mean, covariance = la(X)
    density = torch.distributions.MultivariateNormal(mean, covariance + torch.diag(PER_OUTPUT.square()))
    assert report.metrics["la"]["nll"].value == pytest.approx(-float(density.log_prob(y).mean()) / 3)
    assert report.posteriors["la"].facts["observation noise"] == "0.4, 1.7, 0.9"
