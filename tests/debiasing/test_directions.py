"""Both eigensolvers on the same samples; the rank, and warnings if it is not available."""

from dataclasses import replace

import pytest
import torch
from models import MODELS, targets
from oracles import dense_ggn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing import directions as module
from debiased_laplace.debiasing.directions import choose_solver, find_directions


def curvature_of(name, likelihood, n=12):
    model, X = MODELS[name]()
    y = targets(likelihood)
    network = prepare_network(ParameterSelection.all_weights(model), likelihood_named(likelihood), Batch(X[:8], y[:8]))
    source = sample_source(DataLoader(TensorDataset(X[:n], y[:n]), batch_size=6), 0)
    samples = SubBatch(source, source.indices, torch.device("cpu"), 0)
    return RowCurvature(network, samples, GaussNewton(network.likelihood)), model, X[:n]


@pytest.mark.parametrize(
    ("name", "likelihood", "rank"),
    [
        ("MLP", "classification", 1),
        ("MLP", "classification", 7),
        ("MLP", "regression", 7),
        ("convolutions and pooling", "regression", 4),
        ("LSTM", "classification", 3),
        ("GRU", "regression", 3),
        ("transformer", "classification", 7),
    ],
)
def test_solvers_agree(name, likelihood, rank):
    curvature, model, X = curvature_of(name, likelihood)
    H = dense_ggn(model, X, likelihood)[1].detach()
    expected = torch.linalg.eigvalsh(H).flip(0)[:rank]
    found = {solver: find_directions(curvature, rank=rank, solver=solver, seed=3) for solver in ("gram", "lanczos")}
    for pairs in found.values():
        U = pairs.vectors
        torch.testing.assert_close(pairs.values, expected, rtol=1e-7, atol=1e-10 * float(expected[0]))
        torch.testing.assert_close(U.T @ U, torch.eye(rank, dtype=U.dtype), rtol=0, atol=1e-10)
        residuals = (H @ U - U * pairs.values).norm(dim=0)
        assert float(residuals.max()) < 1e-7 * float(expected[0])
        assert pairs.outcome.converged
    projectors = [pairs.vectors @ pairs.vectors.T for pairs in found.values()]
    gap = float(torch.linalg.eigvalsh(H).flip(0)[rank - 1 : rank + 1].diff().abs() / expected[0])
    assert float((projectors[0] - projectors[1]).abs().max()) < 1e-7 / gap
    assert found["gram"].outcome.solver in ("gram", "dense")
    assert found["lanczos"].outcome.solver == "lanczos"


@pytest.mark.parametrize(
    ("likelihood", "solver"), [("classification", "gram"), ("classification", "lanczos"), ("regression", "gram")]
)
def test_rank_none_keeps_what_the_samples_support(likelihood, solver):
    curvature, model, X = curvature_of("MLP", likelihood, n=40)
    eigenvalues = torch.linalg.eigvalsh(dense_ggn(model, X, likelihood)[1].detach()).flip(0)
    expected = int((eigenvalues > 1e-6 * eigenvalues[0]).sum())
    assert expected < 93
    pairs = find_directions(curvature, rank=None, solver=solver, seed=0)
    assert len(pairs.values) == expected
    assert float(pairs.values[-1] / pairs.values[0]) > 1e-6


def test_a_given_rank_includes_smaller_eigenvalues():
    curvature, *_ = curvature_of("MLP", "regression", n=40)
    supported = len(find_directions(curvature, rank=None, solver="gram", seed=0).values)
    further = find_directions(curvature, rank=supported + 2, solver="gram", seed=0)
    assert len(further.values) == supported + 2
    assert float(further.values[-1]) < 1e-6 * float(further.values[0])


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_a_rank_above_the_supported_one_is_warned_about(solver):
    curvature, *_ = curvature_of("MLP", "classification", n=5)
    with pytest.warns(UserWarning, match="rank=50 was asked for, but the direction samples support only 10"):
        pairs = find_directions(curvature, rank=50, solver=solver, seed=0)
    assert len(pairs.values) == 10


def test_lanczos_is_chosen_if_rows_do_not_fit_into_memory(monkeypatch):
    curvature, *_ = curvature_of("MLP", "classification")
    assert choose_solver(curvature, None) == "gram"
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 1000)
    assert choose_solver(curvature, None) == "lanczos"
    monkeypatch.setattr(module, "LANCZOS_RANK", 5)
    with pytest.warns(UserWarning, match="rank=None means the 5 leading directions"):
        pairs = find_directions(curvature, rank=None, solver="auto", seed=0)
    assert len(pairs.values) == 5


def test_no_curvature_at_all_is_rank_zero():
    curvature, _, _ = curvature_of("MLP", "classification")
    zero = {name: torch.zeros_like(p) for name, p in curvature.network.parameters.items()}
    # with logits of a hundred the softmax has no curvature
    zero["4.bias"] = torch.tensor([1000.0, 0.0, 0.0], dtype=torch.float64)
    network = type(curvature.network)(
        curvature.network.selection,
        zero,
        curvature.network.likelihood,
        3,
        curvature.network.capabilities,
    )
    for solver in ("gram", "lanczos"):
        pairs = find_directions(
            RowCurvature(network, curvature.samples, curvature.root), rank=None, solver=solver, seed=0
        )
        assert pairs.vectors.shape == (93, 0)


# parameters, outputs, samples, rank, folds; CPU seconds of both solvers on a multilayer perceptron, one thread
CHOICES = {
    "few directions of many parameters: 45 s dense, 1.9 s by products": ((4960, 10, 1000, 50, 0), "lanczos"),
    "many samples: 2.0 s dense, 0.6 s by products": ((940, 10, 4000, 20, 0), "lanczos"),
    "many directions of few parameters": ((300, 10, 4000, 50, 0), "gram"),
    "fewer directions": ((300, 10, 4000, 3, 0), "lanczos"),
    "the same, with folds that share the sums": ((300, 10, 4000, 3, 8), "gram"),
    "all directions": ((4960, 10, 1000, None, 0), "gram"),
}


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("columns", [True, False], ids=["products", "rows only"])
def test_dense_curvature_or_products(case, columns, monkeypatch):
    (P, C, n, rank, folds), expected = CHOICES[case]
    curvature, *_ = curvature_of("MLP", "classification")
    capabilities = replace(curvature.network.capabilities, columns=columns)
    curvature.network = replace(curvature.network, capabilities=capabilities)
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 2**50)
    for name, value in (("n_samples", n), ("rows_per_sample", C)):
        monkeypatch.setattr(RowCurvature, name, value)
    monkeypatch.setattr(type(curvature.network), "n_parameters", P)
    assert choose_solver(curvature, rank, folds) == (expected if columns else "gram")
