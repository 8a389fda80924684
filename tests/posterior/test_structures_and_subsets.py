"""Every structure over every subset of the weights, from fit to checkpoint, against the same computed densely."""

import copy
import io
import math
from functools import cache
from itertools import product

import pytest
import torch
from oracles import dense_log_likelihood, dense_log_marginal_likelihood, flat_parameters
from posterior_cases import close, mean_field
from subset_cases import (
    CELLS,
    LIKELIHOODS,
    NAMES,
    STRUCTURES,
    SUBSETS,
    dense,
    fit,
    network_at,
    selected_shapes,
    unfitted,
)
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from debiased_laplace.predictive.predictive import class_probabilities

every_cell = pytest.mark.parametrize("case", CELLS)


def generator():
    return torch.Generator().manual_seed(4)


@cache
def fitted(case):
    """A posterior, all samples, and what it has to be; nobody writes to them."""
    la, data = fit(CELLS[case])
    return la, data, dense(la, CELLS[case])


def test_no_cell_is_left_out():
    found = list(CELLS.values())
    assert {(c.structure, c.subset, c.likelihood) for c in found} == set(product(STRUCTURES, SUBSETS, LIKELIHOODS))
    assert {(c.structure, c.name) for c in found} == set(product(STRUCTURES, NAMES))
    assert {(c.subset, c.name) for c in found} == set(product(SUBSETS, NAMES))


@every_cell
def test_precision_covariance_and_its_root(case):
    la, _, expected = fitted(case)
    P = len(expected.center)
    close(la.directional_curvatures, expected.magnitudes)
    close(la.in_sample_curvatures, expected.in_sample)
    close(la.standard_errors, expected.standard_errors)
    assert float(la.standard_errors.max()) > 0
    close(la.posterior_precision.to_dense(), expected.precision)
    A = la.posterior_precision.root(torch.eye(P, dtype=torch.float64)).T
    close(A @ A.T, expected.covariance)
    J = expected.jacobians
    close(la.functional_variance(J), J @ expected.covariance @ J.mT)
    flat = J.flatten(0, 1)
    close(la.functional_covariance(J), flat @ expected.covariance @ flat.T)
    point = expected.center + torch.linspace(-0.2, 0.3, P, dtype=torch.float64)
    distance = (point - expected.center) @ expected.precision @ (point - expected.center)
    log_det = torch.linalg.slogdet(expected.precision)[1]
    close(la.log_prob(point), 0.5 * (log_det - distance - P * math.log(2 * math.pi)))
    close(la.log_prob(point, normalized=False), -0.5 * distance)


@every_cell
def test_linearized_predictions(case):
    la, data, expected = fitted(case)
    J = expected.jacobians
    x = data.tensors[0][: len(J)]
    f = la.model(x).detach()
    variance = J @ expected.covariance @ J.mT
    if la.likelihood == "regression":
        for found, wanted in zip(la(x), (f, variance), strict=True):
            close(found, wanted)
        close(la(x, diagonal_output=True)[1], variance.diagonal(dim1=1, dim2=2))
        flat = J.flatten(0, 1)
        for found, wanted in zip(la(x, joint=True), (f.flatten(), flat @ expected.covariance @ flat.T), strict=True):
            close(found, wanted)
        return
    shrunk = f / (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
    close(la(x, link_approx="probit"), torch.softmax(shrunk, -1))
    close(la(x), mean_field(f, variance))
    # the links have tests of their own: here they have to be given the right Gaussian
    for link in ("mc", "bridge", "bridge_norm"):
        found = la(x, link_approx=link, n_samples=20, generator=generator())
        close(found, class_probabilities(f, variance, link, 20, generator()))
    assert not torch.allclose(la(x), torch.softmax(f, -1), rtol=1e-3)


@every_cell
def test_draws(case):
    la, data, expected = fitted(case)
    cell = CELLS[case]
    x, trained = data.tensors[0][:5], flat_parameters(la.model)
    whole = torch.arange(len(trained)) if cell.subset == "subnetwork" else expected.indices
    weights = la.sample(3, generator=generator())
    assert weights.shape == (3, len(whole))
    torch.testing.assert_close(la.mean, trained[whole], rtol=0, atol=0)
    deviations = torch.zeros(3, len(trained), dtype=torch.float64)
    deviations[:, whole] = weights - la.mean
    # entries outside the subset stay at their trained values
    inside = torch.zeros(len(trained), dtype=torch.bool)
    inside[expected.indices] = True
    assert not deviations[:, ~inside].any()
    assert bool((deviations[:, inside] != 0).all())
    noise = torch.randn(3, len(expected.indices), dtype=torch.float64, generator=generator())
    close(deviations[:, inside], la.posterior_precision.root(noise))
    functions = la.functional_samples(x, n_samples=3, generator=generator())
    moved = torch.einsum("ncp,sp->snc", expected.jacobians, deviations[:, inside])
    close(functions, la.model(x).detach() + moved)
    networks = la.functional_samples(x, "nn", 3, generator=generator())
    close(networks, torch.stack([network_at(la.model, whole, w)(x).detach() for w in weights]))
    classes = la.likelihood == "classification"
    for pred_type, draws in (("glm", functions), ("nn", networks)):
        passed = la.predictive_samples(x, pred_type, 3, generator=generator())
        close(passed, torch.softmax(draws, -1) if classes else draws)
    found = la(x, pred_type="nn", link_approx="mc", n_samples=3, generator=generator())
    wanted = (torch.softmax(networks, -1).mean(0),) if classes else (networks.mean(0), networks.var(0))
    for one, other in zip((found,) if classes else found, wanted, strict=True):
        close(one, other)


@every_cell
def test_marginal_likelihood_and_its_gradient(case):
    la, data, expected = fitted(case)
    X, y = data.tensors
    used = la.split.used_indices
    scales = {"sigma_noise": float(la.sigma_noise), "temperature": la.temperature}
    log_likelihood = dense_log_likelihood(la.model, X[used], y[used], la.likelihood, n_data=la.n_data, **scales)
    evidence = dense_log_marginal_likelihood(
        log_likelihood, expected.precision, la.prior_precision_diag, expected.center
    )
    close(la.log_marginal_likelihood(), evidence, 1e-9)
    # of a prior for each parameter tensor, with the gradient of the dense formula
    changed = copy.copy(la)
    sizes = torch.tensor([n for n, _ in selected_shapes(la.model, expected.indices)])
    of_ours, of_theirs = (torch.linspace(0.3, 2.0, len(sizes), dtype=torch.float64).requires_grad_() for _ in range(2))
    P0 = of_theirs.repeat_interleave(sizes)
    wanted = log_likelihood - 0.5 * (
        torch.logdet(expected.likelihood_part + torch.diag(P0)) - P0.log().sum() + (P0 * expected.center**2).sum()
    )
    wanted.backward()
    found = changed.log_marginal_likelihood(of_ours)
    found.backward()
    close(found, wanted.detach(), 1e-9)
    close(of_ours.grad, of_theirs.grad)
    assert float(la.prior_precision) == pytest.approx(0.4)


@every_cell
def test_held_out_kl(case):
    la, data, expected = fitted(case)
    loaders = DataLoader(Subset(data, range(30, 37)), batch_size=4), DataLoader(Subset(data, range(30)), batch_size=8)
    found = la.held_out_kl(*loaders)
    tau = la.n_data / (float(la.sigma_noise) ** 2 * la.temperature)
    of_samples = torch.stack([0.5 * tau * torch.trace(expected.covariance @ H) for H in expected.per_sample])
    own = 0.5 * (la.prior_precision_diag * expected.covariance.diagonal()).sum()
    own = own + 0.5 * torch.linalg.slogdet(expected.precision)[1]
    value = own + 0.75 * of_samples[:30].mean() + 0.25 * of_samples[30:37].mean()
    assert found.value == pytest.approx(float(value), rel=1e-7)
    error = 0.25 * of_samples[30:37].std() * (0.3 / 7) ** 0.5
    assert found.standard_error == pytest.approx(float(error), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@every_cell
def test_tuning_the_prior(case):
    la, data, expected = fitted(case)
    la = copy.copy(la)
    before = float(la.log_marginal_likelihood(torch.tensor(6.0)))
    n_entries = {
        "scalar": 1,
        "layerwise": len(selected_shapes(la.model, expected.indices)),
        "diag": len(expected.center),
    }
    for structure, n in n_entries.items():
        la.prior_precision = 0.4
        if structure == "diag" and CELLS[case].structure == "kron":
            with pytest.raises(ValueError, match="one per parameter tensor"):
                la.optimize_prior_precision(n_steps=5, prior_structure="diag", init_prior_prec=6.0)
            assert la.prior_precision.tolist() == pytest.approx([0.4])
            continue
        la.optimize_prior_precision(n_steps=8, prior_structure=structure, init_prior_prec=6.0)
        assert la.prior_precision.numel() == n
        assert float(la.log_marginal_likelihood()) > before + 0.05
    check_grid_search(la, *(t[30:] for t in data.tensors))


def check_grid_search(la, X, y):
    grid = torch.logspace(-2, 2, 3, dtype=torch.float64)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=[(X, y)], grid_size=3, log_prior_prec_min=-2.0, log_prior_prec_max=2.0
    )
    chosen = float(la.prior_precision)
    scores = []
    for prior in grid:
        la.prior_precision = prior
        if la.likelihood == "classification":
            scores.append(-la(X).gather(1, y[:, None]).log().mean())
        else:
            mean, covariance = la(X)
            total = covariance.diagonal(dim1=1, dim2=2) + la.sigma_noise**2
            scores.append(torch.nn.functional.gaussian_nll_loss(mean, y, total, full=True))
    assert len({round(float(s), 6) for s in scores}) == 3  # the scores tell the priors apart
    assert chosen == pytest.approx(float(grid[torch.stack(scores).argmin()]))


@every_cell
def test_state_and_what_it_says(case):
    la, data, expected = fitted(case)
    cell = CELLS[case]
    state = la.state_dict()
    assert {type(v) for v in state.values()} <= {Tensor, str, int, float, bool}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = unfitted(cell, prior_precision=3.0, temperature=0.6)
    # the last layer of a posterior that was never fitted is the state's
    assert (loaded.n_params is None) is (cell.subset == "last_layer")
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key], key
    assert torch.equal(loaded.posterior_precision.to_dense(), la.posterior_precision.to_dense())
    assert torch.equal(loaded.mean, la.mean)
    x = data.tensors[0][:3]
    for found, wanted in zip(loaded(x), la(x), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(loaded.sample(2, generator=generator()), la.sample(2, generator=generator()))
    assert loaded.n_params == la.n_params
    assert loaded.n_layers == la.n_layers == len(selected_shapes(la.model, expected.indices))
    shown = repr(loaded)
    assert shown == repr(la)
    where = f" of last layer {la.selection.last_layer!r}" if cell.subset == "last_layer" else ""
    assert shown.startswith(f"{type(la).__name__}({cell.kind}, {len(expected.center):,} parameters{where}, ")
    assert "fitted on 15 + 15 of 40 samples" in shown
    assert ("rank=" in shown) is (cell.structure != "kron")
