"""Samples with integer weights have the curvature of as many copies of each, by every way through the network."""

import pytest
import torch
from models import MODELS, targets
from sub_batches import network_of

from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.kfac import KfacSums
from debiased_laplace.curvature.kronecker import kronecker_basis, matrix_shapes, row_matrix_factors
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch

N = 12
TIMES = torch.arange(N) % 3 + 1
COPIES = torch.arange(N).repeat_interleave(TIMES)
WEIGHTS = TIMES.double() * (N / TIMES.sum())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


def samples_of(X, y, weights=None):
    source = sample_source([(X[i : i + 8], y[i : i + 8]) for i in range(0, len(X), 8)], 0)
    samples = SubBatch(source, source.indices, torch.device("cpu"), 0)
    samples = samples.keeping(list(samples))
    return samples if weights is None else samples.weighted(weights)


def both(name, root, *, last_layer=False):
    """Curvature of the weighted samples, and of the copies."""
    model, X = MODELS[name]()
    X, y = X[:N], targets("classification")[:N]
    network = network_of(model, X, y, "classification")
    if last_layer:
        layer = ParameterSelection.all_weights(model).layer(list(dict(model.named_modules()))[-1])
        network = Network(
            layer, layer.unflatten(layer.vector()), network.likelihood, network.n_outputs, network.capabilities
        )
    kind = root(network.likelihood)
    weighted = RowCurvature(network, samples_of(X, y, WEIGHTS), kind)
    return weighted, RowCurvature(network, samples_of(X[COPIES], y[COPIES]), kind)


@pytest.mark.parametrize("last_layer", [False, True], ids=["all weights", "last layer"])
@pytest.mark.parametrize("root", [GaussNewton, EmpiricalFisher])
@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling", "GRU"])
def test_curvature_of_weighted_samples_is_that_of_copies(name, root, last_layer):
    weighted, copies = both(name, root, last_layer=last_layer)
    H = copies.dense()
    close(weighted.dense(), H)
    P = len(H)
    X = torch.linalg.qr(torch.randn(P, 4, generator=torch.Generator().manual_seed(2), dtype=H.dtype))[0]
    close(weighted.linear_map()(X), H @ X)
    close(weighted.moments(X).means, (X * (H @ X)).sum(0))
    found, expected = (c.moments(X, "diagonal") for c in (weighted, copies))
    close(found.residual_diagonal, expected.residual_diagonal)
    close(found.means, expected.means)
    shapes = matrix_shapes(weighted.network.selection, layers_only=False)
    factors, of_copies = (row_matrix_factors(c, shapes) for c in (weighted, copies))
    for ours, theirs in zip(factors, of_copies, strict=True):
        close(ours.left, theirs.left)
        close(ours.right, theirs.right)
    basis = kronecker_basis(of_copies, H.dtype)
    close(weighted.coordinate_moments(basis).means, copies.coordinate_moments(basis).means)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling"])
def test_kfac_of_weighted_samples_is_that_of_copies(name, approximation):
    found = []
    for curvature in both(name, GaussNewton):
        sums = KfacSums(curvature.network, curvature.root, approximation)
        for batch, targets_or_noise in curvature.batches():
            sums.add(batch, targets_or_noise)
        found.append(sums.factors())
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for key in ours:
        close(ours[key].left, theirs[key].left)
        close(ours[key].right, theirs[key].right)


def test_hessian_of_weighted_samples_is_that_of_copies():
    model, X = MODELS["MLP"]()
    X, y = X[:N], targets("classification")[:N]
    network = network_of(model, X, y, "classification")
    likelihood = likelihood_named("classification")
    second = SecondDerivatives(network.selection, network.parameters, likelihood, Batch(X, y))
    weighted = HessianCurvature(network, samples_of(X, y, WEIGHTS), second)
    copies = HessianCurvature(network, samples_of(X[COPIES], y[COPIES]), second)
    close(weighted.dense(), copies.dense())
    X = torch.randn(len(copies.dense()), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    close(weighted.moments(X).means, copies.moments(X).means)
    close(weighted.linear_map()(X), copies.linear_map()(X))
