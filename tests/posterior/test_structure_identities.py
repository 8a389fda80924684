"""Posteriors that have to be the same one: subsets that are everything, and laplace-torch's own on all the data."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from laplace import FullLaplace, FullLLLaplace, FullSubnetLaplace
from models import mlp, reused_module_net, targets
from oracles import dense_ggn, flat_parameters
from posterior_cases import close, fitted, hyper_parameters, loader_of, posterior_of
from subset_cases import LAST_LAYER, LIKELIHOODS, STRUCTURES, SUBSETS, positions, problem
from torch import nn

RTOL = 1e-8


@contextmanager
def in_double_precision():
    """laplace-torch's default backend multiplies by an identity of torch's default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fitted_on(model, X, likelihood, subset, structure, **options):
    la = posterior_of(model, likelihood, subset, structure, **{**hyper_parameters(likelihood), **options})
    la.fit(loader_of(X, targets(likelihood)), n_data=60)
    return la


def only_a_last_layer():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
        return model.eval(), torch.randn(40, 2, 2, dtype=torch.float64)


ALL_BUT_IN_NAME = {
    "last layer of a model that has no other": (only_a_last_layer, "last_layer", lambda n: {}),
    "last layer by its name": (only_a_last_layer, "last_layer", lambda n: {"last_layer_name": "1"}),
    "subnetwork of all entries": (mlp, "subnetwork", lambda n: {"subnetwork_indices": torch.arange(n)}),
}


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", [*STRUCTURES, "kron by K-FAC"])
@pytest.mark.parametrize("case", ALL_BUT_IN_NAME)
def test_a_subset_that_is_everything_is_everything(case, structure, likelihood):
    make, subset, options_of = ALL_BUT_IN_NAME[case]
    model, X = make()
    kfac = {"kron_basis": "kfac", "kron_magnitudes": "kronecker"} if structure == "kron by K-FAC" else {}
    structure = structure.split()[0]
    n = len(flat_parameters(model))
    whole = fitted_on(model, X, likelihood, "all", structure, **kfac)
    part = fitted_on(model, X, likelihood, subset, structure, **options_of(n), **kfac)
    close(part.posterior_precision.to_dense(), whole.posterior_precision.to_dense(), 1e-9)
    close(part.log_marginal_likelihood(), whole.log_marginal_likelihood(), 1e-9)
    for found, expected in zip(part(X), whole(X), strict=True):
        close(found, expected, 1e-9)
    draws = [la.sample(3, torch.Generator().manual_seed(2)) for la in (part, whole)]
    close(draws[0], draws[1])
    assert torch.equal(part.mean, whole.mean)
    # the two are told apart
    inside, rest = (loader_of(X[some], targets(likelihood)[some]) for some in (range(20), range(20, 40)))
    for la in (part, whole):
        la.fit(inside, n_data=40)
    close(part.held_out_kl(rest, inside).value, whole.held_out_kl(rest, inside).value, 1e-9)
    with pytest.raises(ValueError, match="compare only between posteriors of the same"):
        _ = part.held_out_kl(rest, inside) - whole.held_out_kl(rest, inside)


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
@pytest.mark.parametrize("basis", ["row_matrices", "kfac"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_exact_kronecker_magnitudes_keep_the_trace_of_the_ggn(likelihood, basis, magnitudes):
    name = "LayerNorm and raw parameters"
    la, _, _, per_sample = fitted(name, likelihood, hessian_structure="kron", kron_basis=basis, magnitudes=magnitudes)
    H = sum(per_sample) / len(per_sample)
    assert len(la.directional_curvatures) == len(H)
    close(la.directional_curvatures.sum(), torch.trace(H), 1e-10)
    K = la.posterior_precision.basis.to_dense()
    close(la.directional_curvatures, (K.T @ H @ K).diagonal(), 1e-9)


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_full_is_low_rank_of_every_direction_with_their_mean_outside(likelihood, magnitudes):
    # fewer direction rows than parameters: most directions are in the null space of H_a
    options = {"magnitudes": magnitudes, "direction_samples": 8, "magnitude_samples": 9}
    full, *_ = fitted("MLP", likelihood, hessian_structure="full", **options)
    low, *_ = fitted("MLP", likelihood, hessian_structure="lowrank", complement="isotropic", **options)
    assert full.rank == low.rank < 93
    close(full.posterior_precision.to_dense(), low.posterior_precision.to_dense(), 1e-9)
    weights = full.n_data / (float(full.sigma_noise) ** 2 * full.temperature)
    null_space = torch.linalg.eigvalsh(full.posterior_precision.to_dense())
    # one value for all of them, more than the prior's
    c = weights * float(full.fit_result.estimate.curvature.diagonal)
    # on the direction samples themselves there is nothing outside
    assert c > 1e-3 if magnitudes == "held_out" else c < 1e-9
    assert int(((null_space - c - 0.4).abs() < 1e-8 * (c + 0.4)).sum()) >= 93 - full.rank


def test_full_keeps_directions_that_low_rank_takes_for_unsupported():
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model, X = nn.Linear(3, 2).double(), torch.randn(40, 3, dtype=torch.float64)
    X[:, 0] *= 1e-4  # its curvature is 1e-8 of the largest
    y = targets("regression", n_outputs=2)
    options = {"magnitudes": "same_batch", **hyper_parameters("regression"), "prior_precision": 1e-9}
    full = posterior_of(model, "regression", "all", "full", **options)
    full.fit(loader_of(X, y))
    assert full.rank == 8
    H = dense_ggn(model, X, "regression")[1]
    weight = 40 / (float(full.sigma_noise) ** 2 * full.temperature)
    found = torch.linalg.eigvalsh(full.posterior_precision.to_dense())
    close(found, torch.linalg.eigvalsh(weight * H) + 1e-9, 1e-6)
    assert float(found[1]) == pytest.approx(float(torch.linalg.eigvalsh(weight * H)[1]) + 1e-9, rel=1e-4)
    low = posterior_of(model, "regression", "all", "lowrank", **options)
    with pytest.warns(UserWarning, match="rank=None left out directions"):
        low.fit(loader_of(X, y))
    assert low.rank == 6


THEIRS = {"all": FullLaplace, "last_layer": FullLLLaplace, "subnetwork": FullSubnetLaplace}


def both(subset, likelihood, name="reused module", n_outputs=3):
    """Ours and laplace-torch's posterior of the same weights, fitted to the same samples."""
    model, X, y, _ = problem(name, likelihood, n_outputs)
    at = positions(name, model, subset)
    ours_only = {"subnetwork_indices": at} if subset == "subnetwork" else {}
    theirs_only = {"last_layer": {"last_layer_name": LAST_LAYER[name]}, "subnetwork": ours_only}.get(subset, {})
    ours = posterior_of(
        model, likelihood, subset, "full", magnitudes="same_batch", **hyper_parameters(likelihood), **ours_only
    )
    # a copy of its own: laplace-torch's last-layer posterior leaves attributes on the model
    copied, _ = reused_module_net(n_outputs)
    theirs = THEIRS[subset](copied, likelihood, **hyper_parameters(likelihood), **theirs_only)
    ours.fit(loader_of(X, y, batch_size=40))
    with in_double_precision():
        theirs.fit(loader_of(X, y, batch_size=40))
    return ours, theirs, X, at


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("subset", SUBSETS)
def test_every_direction_of_all_the_data_is_laplace_torchs_full_posterior(subset, likelihood):
    ours, theirs, X, at = both(subset, *LIKELIHOODS[likelihood][:1], n_outputs=LIKELIHOODS[likelihood][1])
    close(ours.posterior_precision.to_dense(), theirs.posterior_precision, RTOL)
    close(ours.log_det_posterior_precision, theirs.log_det_posterior_precision, RTOL)
    close(ours.mean, theirs.mean, 1e-12)
    assert ours.n_params == theirs.n_params
    if subset == "subnetwork":
        assert ours.n_params_subnet == theirs.n_params_subnet == len(at)
        close(ours.mean_subnet, theirs.mean_subnet, 1e-12)
    else:
        close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), RTOL)
    J = torch.randn(3, 2, len(at), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    close(ours.functional_variance(J), theirs.functional_variance(J), RTOL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "By default `link_approx`")
        for found, expected in zip(ours(X[:5], link_approx="probit"), theirs(X[:5], link_approx="probit"), strict=True):
            close(found, expected, RTOL)
    draws = [la.sample(4, generator=torch.Generator().manual_seed(1)) for la in (ours, theirs)]
    assert draws[0].shape == draws[1].shape
    outside = torch.ones(ours.n_params if subset != "last_layer" else len(at), dtype=torch.bool)
    outside[at if subset == "subnetwork" else slice(None)] = False
    assert torch.equal(draws[0][:, outside], ours.mean[outside].expand(4, -1))
    assert torch.equal(draws[0][:, outside], draws[1][:, outside])


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_evidence_of_a_subnetwork(likelihood):
    ours, theirs, _, at = both("subnetwork", likelihood)
    prior = torch.linspace(0.2, 3.0, len(at), dtype=torch.float64)
    ours.prior_precision = prior
    scatter = (prior * flat_parameters(ours.model)[at] ** 2).sum()
    close(ours.scatter, scatter, 1e-9)
    precision = theirs.posterior_precision - 0.4 * torch.eye(len(at)) + torch.diag(prior)
    log_det_ratio = torch.linalg.slogdet(precision)[1] - prior.log().sum()
    close(ours.log_marginal_likelihood(), theirs.log_likelihood - 0.5 * (log_det_ratio + scatter), RTOL)
