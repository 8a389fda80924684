"""Estimates of what a fit takes, before it."""

import copy
import time

import pytest
import torch
from laplace.curvature import CurvlinopsHessian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace


def mlp(hidden):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def loader(n):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(n, 6, generator=generator), torch.arange(n) % 3)
    return DataLoader(data, batch_size=32)


CASES = {
    "drawn rows": ({"n_rows": 60}, "gram"),
    "drawn rows, products": ({"n_rows": 60, "rank": 4, "solver": "lanczos"}, "lanczos"),
    "all rows": ({}, "gram"),
    "whole samples": ({"sampling": "uniform", "n_rows": 90, "rank": 5}, "gram"),
    "Kronecker": ({"hessian_structure": "kron", "n_rows": 60}, "none"),
    "last layer": ({"subset_of_weights": "last_layer", "n_rows": 60}, "gram"),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_rows_and_solver_are_those_of_the_fit(case):
    options, solver = CASES[case]
    la = DebiasedLaplace(mlp(8), "classification", prior_precision=3.0, **options)
    cost = la.cost(loader(80))
    la.fit(loader(80))
    assert cost.solver == solver
    assert cost.n_parameters == la.n_params
    if "sampling" in options:
        assert cost.n_samples == la.split.n_samples == 30
        assert cost.n_rows == 90
    else:
        assert cost.n_samples == 80
        # the draw has as many on average; samples have two rows with a curvature, of three
        assert la.rows.n == pytest.approx(cost.n_rows, rel=0.35)
    used = la.fit_result.estimate.outcome.solver
    assert solver == "none" or (solver == "lanczos") == (used == "lanczos")
    assert f"{cost.n_rows:,} backward passes" in " ".join(str(cost).split())


def test_nothing_is_fitted_and_the_model_is_as_it_was():
    model = mlp(8).train()
    before = copy.deepcopy(model.state_dict())
    la = DebiasedLaplace(model, "classification", prior_precision=3.0)
    la.cost(loader(80))
    assert "not fitted" in repr(la)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_memory_of_rows_and_directions():
    la = DebiasedLaplace(mlp(8), "classification", prior_precision=3.0, n_rows=60, rank=7)
    cost, P = la.cost(loader(80)), 155
    # inputs and cotangents of weights, and biases
    numbers = (6 + 8) + 8 + (8 + 8) + 8 + (8 + 3) + 3
    assert cost.n_bytes["rows"] == 60 * numbers * 4
    assert cost.n_bytes["directions"] == 7 * P * 4


def test_a_prior_for_every_parameter_has_no_kronecker_basis():
    la = DebiasedLaplace(mlp(8), "classification", prior_precision=torch.linspace(0.5, 3.0, 155), n_rows=60)
    assert la.cost(loader(80)).n_bytes["eigenvectors"] == 0
    la.prior_precision = 3.0
    sides = [8, 6, 8, 8, 8, 8, 3, 8, 3]  # of weights, and of biases
    assert la.cost(loader(80)).n_bytes["eigenvectors"] == 4 * 8 * sum(side**2 for side in sides)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"hessian_structure": "kron"}], ids=["low rank", "Kronecker"])
def test_seconds_are_about_those_of_the_fit(options):
    la = DebiasedLaplace(mlp(120), "classification", prior_precision=3.0, n_rows=512, **options)
    estimated = sum(la.cost(loader(1_000)).seconds.values())
    start = time.perf_counter()
    la.fit(loader(1_000))
    assert 0.2 < estimated / (time.perf_counter() - start) < 5


def test_what_cannot_be_estimated_is_refused():
    la = DebiasedLaplace(mlp(8), "classification", prior_precision=3.0)
    with pytest.raises(ValueError, match="does not say how many samples it has"):
        la.cost(batch for batch in loader(80))
    with pytest.raises(ValueError, match="yields no samples"):
        la.cost(DataLoader(TensorDataset(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))))
    model = mlp(8)
    with torch.no_grad():
        model[-1].bias[0] = 1e3  # a softmax without curvature
    with pytest.raises(ValueError, match="first two batches have no curvature"):
        DebiasedLaplace(model, "classification", prior_precision=3.0).cost(loader(80))
    la = DebiasedLaplace(mlp(8), "classification", prior_precision=3.0, backend=CurvlinopsHessian)
    with pytest.raises(ValueError, match="cost of a Hessian is not estimated"):
        la.cost(loader(80))
