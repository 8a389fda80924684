"""A last linear layer without forming its rows: used where it gives the same numbers, and only there."""

from dataclasses import replace

import pytest
import torch
from models import MODELS, targets
from sub_batches import samples_of
from torch import nn

from debiased_laplace.curvature.derivatives import Capabilities
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.kronecker import kronecker_basis, matrix_shapes, row_matrix_factors
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.subsets import WeightSubset
from debiased_laplace.data.batches import Batch

ROOTS = {
    "GGN": lambda likelihood: GaussNewton(likelihood),
    "empirical Fisher": lambda likelihood: EmpiricalFisher(likelihood),
    "Monte Carlo": lambda likelihood: MonteCarloGaussNewton(likelihood, 2),
}


def network_of(model, X, y, kind, name=None):
    selection = WeightSubset("last_layer", name).select_by(model, X[:2])
    return prepare_network(selection, likelihood_named(kind), Batch(X, y))


def both(name, kind, root, layer=None):
    """Return the curvature with and without forming rows."""
    model, X = MODELS[name]()
    y = targets(kind)
    network = network_of(model, X, y, kind, layer)
    samples = samples_of(X, y, torch.arange(len(X)))
    root = ROOTS[root](network.likelihood)
    assert network.linear_layer is not None
    return tuple(RowCurvature(n, samples, root, seed=4) for n in (network, without_layer(network)))


def without_layer(network):
    """Return the network, differentiated by backward passes."""
    return replace(network, capabilities=Capabilities(False, False, False, {}))


CASES = {
    "a weight and a bias": ("MLP", None),
    "a frozen bias": ("partly frozen", None),
    "behind recurrent layers": ("GRU", None),
    "behind attention": ("transformer", "head"),
}


@pytest.mark.parametrize("chunk", [CHUNK_BYTES, 40 * 3 * 8], ids=["all columns at once", "one column at a time"])
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("case", CASES)
def test_factors_and_moments_are_those_of_the_rows(case, kind, root, chunk, monkeypatch):
    monkeypatch.setattr("debiased_laplace.curvature.roots.CHUNK_BYTES", chunk)
    name, layer = CASES[case]
    fast, slow = both(name, kind, root, layer)
    shapes = matrix_shapes(fast.network.selection, layers_only=False)
    found, expected = row_matrix_factors(fast, shapes), row_matrix_factors(slow, shapes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.left, other.left, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.right, other.right, rtol=1e-9, atol=1e-12)
    basis = kronecker_basis(expected, torch.float64)
    one, other = fast.coordinate_moments(basis), slow.coordinate_moments(basis)
    assert one.n_samples == other.n_samples
    factors = [torch.linspace(0.3, 2, one.n_samples).double()]
    means = zip(fast.coordinate_means(basis, factors), slow.coordinate_means(basis, factors), strict=True)
    for of_layer, of_rows in means:
        torch.testing.assert_close(of_layer, of_rows, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.means, other.means, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.standard_deviations, other.standard_deviations, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(one.third_moments, other.third_moments, rtol=1e-7, atol=1e-10)


class Tied(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return self.head(torch.tanh(x @ self.head.weight))


class Scaled(nn.Module):
    """The head is followed by another function."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return 2.5 * self.head(x)


class Twice(nn.Module):
    """The head is called twice."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.head(x)))


class Pooled(nn.Module):
    """The head is applied at several positions."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.stack([x, 2 * x], dim=1)).mean(1)


OTHERWISE = {
    "a weight that is used elsewhere": Tied,
    "an output that is scaled": Scaled,
    "a layer called twice": Twice,
    "a layer at several positions": Pooled,
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_layers_use_rows(case):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, X = OTHERWISE[case]().double(), torch.randn(6, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    network = network_of(model, X, y, "classification", "head")
    assert network.linear_layer is None
    assert not model.head._forward_hooks


def test_all_weights_use_rows():
    model, X = MODELS["MLP"]()
    network = prepare_network(
        WeightSubset("all").select(model), likelihood_named("classification"), Batch(X, targets("classification"))
    )
    assert network.linear_layer is None
