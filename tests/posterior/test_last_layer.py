"""Posteriors of a last linear layer are the same from features as from backward passes."""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from laplace.curvature import CurvlinopsEF
from models import N_SAMPLES, mlp, targets
from torch import nn
from torch.utils.data import DataLoader

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.predictive import linearized
from debiased_laplace.predictive import sampling as sampling_of

HYPER = {"prior_precision": 0.4, "temperature": 1.3, "subset_of_weights": "last_layer"}
NEW = 5


class OfMappings(nn.Module):
    """The network behind two named inputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, scale):
        return self.inner(x * scale)


@cache
def model_of(frozen=None):
    model = copy.deepcopy(mlp()[0])
    with torch.no_grad():
        model[-1].weight.mul_(4)
    if frozen is not None:
        getattr(model[-1], frozen).requires_grad_(False)
    return model


def problem(case, likelihood):
    """Model, batches, and further inputs."""
    X, y = mlp()[1], targets(likelihood)
    model = model_of(case.removeprefix("a frozen ") if case.startswith("a frozen") else None)
    if case == "mappings":
        scale = torch.linspace(0.5, 1, len(X)).double()[:, None]
        model, X = OfMappings(model), {"x": X, "scale": scale}
    weights = (0.2 + torch.arange(N_SAMPLES) % 3).double()

    def batch(chosen):
        inputs = {k: v[chosen] for k, v in X.items()} if isinstance(X, dict) else X[chosen]
        if isinstance(inputs, dict):
            return {**inputs, "labels": y[chosen]}
        return (inputs, y[chosen], weights[chosen]) if case == "sample weights" else (inputs, y[chosen])

    chunks = torch.arange(N_SAMPLES).split(7)
    inputs = {k: v[:NEW] for k, v in X.items()} if isinstance(X, dict) else X[:NEW]
    return model, [batch(chunk) for chunk in chunks[:-1]], [batch(chunks[-1])], inputs


CASES = {
    "plain": {},
    "mappings": {"dict_key_x": "x"},
    "sample weights": {},
    "class weights": {"class_weights": [0.5, 2.0, 1.2]},
    "a frozen bias": {},
    "a frozen weight": {},
    "the empirical Fisher": {"backend": CurvlinopsEF},
    "a Kronecker complement": {"complement": "kron", "rank": 4},
    "no complement": {"complement": "none", "rank": 4},
}


def results(likelihood, case, structure, sampling):
    """What a fit and its predictions give."""
    model, fitted, others, inputs = problem(case, likelihood)
    options = {**HYPER, **CASES[case]}
    if likelihood == "regression":
        options["sigma_noise"] = 0.7
    la = DebiasedLaplace(model, likelihood, hessian_structure=structure, sampling=sampling, seed=3, **options)
    # the others are left out of the data set only where held-out samples are judged
    la.fit(fitted, n_data=60 if sampling == "uniform" else None)

    deviations = torch.randn(3, len(la.mean), generator=torch.Generator().manual_seed(2)).double()
    with la._predictive(inputs) as p:
        functions = linearized.draw_functions(p.network, p.inputs, deviations)
        networks = sampling_of.network_draws(p.network, p.inputs, p.mean + deviations, {})
    found = {
        "loss": la.loss,
        "precision": la.posterior_precision.to_dense(),
        "standard errors": la.standard_errors,
        "variances": la._glm_predictive_distribution(inputs, diagonal_output=True)[1],
        "covariances": la._glm_predictive_distribution(inputs)[1],
        "jointly": la._glm_predictive_distribution(inputs, joint=True)[1],
        "Jacobians": la.backend.jacobians(inputs)[0],
        "functions": functions,
        "networks": networks,
        "held-out KL": la.held_out_kl(others if sampling == "uniform" else fitted).terms,
    }
    if likelihood == "classification":
        found["probabilities"] = la(inputs)
    if sampling == "curvature":
        found["design effect"] = la.rows.design_effect
    return found


def cases():
    for case, structure, sampling, likelihood in product(
        CASES, ("kron", "lowrank", "full"), ("curvature", "uniform"), ("classification", "regression")
    ):
        if case == "class weights" and likelihood == "regression":
            continue
        # rank 4 of eigenvalues that a regression repeats for each output is arbitrary
        if "complement" in case and (structure != "lowrank" or likelihood == "regression"):
            continue
        usual = likelihood == "classification" and (case == "plain" or (structure, sampling) == ("kron", "curvature"))
        yield pytest.param(
            *(case, structure, sampling, likelihood),
            id=f"{case}, {structure}, {sampling}, {likelihood}",
            marks=() if usual else pytest.mark.slow,
        )


@pytest.mark.filterwarnings(
    "ignore:rank=4 was asked for", "ignore:The fitted samples are", "ignore:CurvlinopsEF cannot"
)
@pytest.mark.parametrize(("case", "structure", "sampling", "likelihood"), list(cases()))
def test_features_give_what_backward_passes_give(case, structure, sampling, likelihood, monkeypatch):
    with_layer = results(likelihood, case, structure, sampling)
    monkeypatch.setattr(LinearLayer, "of", lambda *arguments: None)
    without = results(likelihood, case, structure, sampling)
    for name, expected in without.items():
        torch.testing.assert_close(with_layer[name], expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("structure", ["kron", "lowrank", "full"])
@pytest.mark.parametrize("sampling", ["curvature", "uniform"])
def test_single_precision(structure, sampling):
    found = []
    for dtype in (torch.float32, torch.float64):
        model, X = copy.deepcopy(model_of()).to(dtype), mlp()[1].to(dtype)
        y = targets("classification")
        la = DebiasedLaplace(model, "classification", hessian_structure=structure, sampling=sampling, **HYPER)
        la.fit([(X[:30], y[:30])], n_data=40 if sampling == "uniform" else None)
        assert la.posterior_precision.directions.dtype == dtype
        fitted, others = [(X[:30], y[:30])], [(X[30:], y[30:])]
        judged = la.held_out_kl(others, fitted) if sampling == "uniform" else la.held_out_kl(fitted)
        found.append((la(X[30:]), judged.value))
    (p, kl), (exact, exact_kl) = found
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.double(), exact, rtol=1e-3, atol=1e-4)
    assert kl == pytest.approx(exact_kl, rel=1e-3)


class Counted(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.inner = mlp()[0]
        # attributes are put back
        self.saw = seen.append

    def forward(self, x):
        self.saw(len(x))
        return self.inner(x)


@pytest.mark.parametrize("structure", ["kron", "lowrank", "full"])
@pytest.mark.parametrize("sampling", ["curvature", "uniform"])
def test_the_network_runs_once_for_each_sample_and_each_prediction(structure, sampling):
    X, y = mlp()[1], targets("classification")
    seen = []
    model = Counted(seen)
    la = DebiasedLaplace(model, "classification", hessian_structure=structure, sampling=sampling, **HYPER)
    # trials of the model are on its first few samples
    la.fit([(X[:2], y[:2])], n_data=90 if sampling == "uniform" else None)
    of_two = sum(seen)
    seen.clear()
    la.fit(DataLoader(list(zip(X, y, strict=True)), batch_size=16), n_data=90 if sampling == "uniform" else None)
    assert sum(seen) <= len(X) + of_two + 3 * 8
    for predict in (
        la,
        la.gaussian_logits,
        lambda x: la(x, link_approx="probit"),
        lambda x: la(x, pred_type="nn", link_approx="mc", n_samples=4),
        lambda x: la.functional_samples(x, n_samples=4),
        lambda x: la.backend.jacobians(x),
    ):
        seen.clear()
        predict(X)
        assert sum(seen) == len(X)


class ScaledFarAway(nn.Module):
    """Outputs of some batches are not those of the last layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        f = self.head(x)
        return 0.5 * f if bool((x > 2).all()) else f


def test_inputs_whose_outputs_the_layer_does_not_give():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, X = ScaledFarAway().double(), torch.randn(12, 4).double().clamp_max(1)
    la = DebiasedLaplace(model, "classification", hessian_structure="kron", last_layer_name="head", **HYPER)
    la.fit([(X, torch.arange(12) % 3)])
    x = X[:2] + 5
    mean, covariance = la._glm_predictive_distribution(x)
    torch.testing.assert_close(mean, 0.5 * model.head(x).detach())
    J = torch.stack([0.5 * torch.cat([torch.kron(torch.eye(3), a), torch.eye(3)], dim=1) for a in x])
    torch.testing.assert_close(covariance, J @ la.posterior_covariance @ J.mT)
    draws = la.functional_samples(x, "nn", n_samples=2, generator=torch.Generator().manual_seed(0))
    weights = la.sample(2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, torch.einsum("ncp,sp->snc", J, weights))
    with pytest.raises(ValueError, match="give the outputs of all samples"):
        la.fit([(X, torch.arange(12) % 3), (x, torch.tensor([0, 1]))])
