"""The linearized predictive and sampled networks, in chunks of samples, against dense Jacobians."""

import copy
from dataclasses import replace

import pytest
import torch
from models import MODELS, targets
from oracles import dense_jacobian, flat_parameters

from debiased_laplace.curvature import network as network_module
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.predictive import linearized, sampling


def problem(name):
    model, X = MODELS[name]()
    network = prepare_network(
        ParameterSelection.all_weights(model), likelihood_named("regression"), Batch(X[:8], targets("regression")[:8])
    )
    generator = torch.Generator().manual_seed(6)
    P = network.n_parameters
    U = torch.linalg.qr(torch.randn(P, 5, generator=generator, dtype=torch.float64))[0]
    D = torch.linspace(0.5, 3, P, dtype=torch.float64)
    precision = LowRankPlusDiagonal(D, U, torch.tensor([9.0, 4.0, 1.0, 0.2, 0.0], dtype=torch.float64))
    J = torch.stack([dense_jacobian(model, x) for x in X[:9]])
    return model, X[:9], network, precision, J


@pytest.mark.parametrize("chunk", ["one sample", "four samples", "all"])
@pytest.mark.parametrize("name", ["MLP", "BatchNorm", "LayerNorm and raw parameters", "GRU", "partly frozen"])
def test_predictions_in_chunks(name, chunk, monkeypatch):
    model, X, network, precision, J = problem(name)
    size = {"one sample": 1, "four samples": 4, "all": 256}[chunk]
    monkeypatch.setattr(network_module, "_MOST_SAMPLES", size)
    covariance = torch.linalg.inv(precision.to_dense())
    mean, variance = linearized.predict(network, precision, X)
    torch.testing.assert_close(mean, model(X).detach())
    torch.testing.assert_close(variance, J @ covariance @ J.mT)
    mean, joint = linearized.predict_jointly(network, precision, X)
    flat = J.flatten(0, 1)
    torch.testing.assert_close(mean, model(X).detach().flatten())
    torch.testing.assert_close(joint, flat @ covariance @ flat.T)
    mean, alone = linearized.predict_variances(network, precision, X)
    torch.testing.assert_close(mean, model(X).detach())
    torch.testing.assert_close(alone, variance.diagonal(dim1=-2, dim2=-1))
    deviations = torch.randn(3, len(covariance), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    functions = linearized.draw_functions(network, X, deviations)
    expected = torch.stack([model(X).detach() + (J @ d) for d in deviations])
    torch.testing.assert_close(functions, expected)


@pytest.mark.parametrize("name", MODELS)
def test_drawn_networks_are_the_model_at_the_drawn_weights(name):
    model, X, network, _, _ = problem(name)
    theta = flat_parameters(model)
    weights = theta + 0.1 * torch.randn(2, len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = sampling.network_draws(network, X, weights, {})
    for w, outputs in zip(weights, found, strict=True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            parts = w.split([p.numel() for p in other.parameters() if p.requires_grad])
            for p, part in zip((p for p in other.parameters() if p.requires_grad), parts, strict=True):
                p.copy_(part.reshape(p.shape))
        torch.testing.assert_close(outputs, other(X).detach())
    assert torch.equal(flat_parameters(model), theta)


def test_keyword_arguments_reach_the_model():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2).double()

        def forward(self, x, scale=1.0):
            return scale * self.layer(x)

    X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Scaled()
    network = prepare_network(ParameterSelection.all_weights(model), likelihood_named("regression"), Batch(X, X[:, :2]))
    weights = flat_parameters(model)[None]
    found = sampling.network_draws(network, X, weights, {"scale": 3.0})
    torch.testing.assert_close(found[0], 3 * model(X).detach())


# samples and draws at once, number of draws, capabilities; whether JVPs are used
DRAWS = {
    "fewer draws than outputs": (128, 32, 2, True, True),
    "as many draws as outputs": (128, 32, 3, True, False),
    "fewer draws, one JVP at a time": (128, 32, 2, False, True),
    "several groups of samples": (4, 32, 2, True, True),
    "draws one at a time": (128, 1, 2, True, True),
}


@pytest.mark.parametrize("case", DRAWS)
def test_functions_are_drawn_by_the_cheaper_mode(case, monkeypatch):
    batch, at_once, n_draws, many, by_jvp = DRAWS[case]
    model, X, network, _, J = problem("BatchNorm")
    monkeypatch.setattr(linearized, "_BATCH", batch)
    monkeypatch.setattr(linearized, "_DRAWS", at_once)
    network = replace(network, capabilities=replace(network.capabilities, vmapped_columns=many))
    pushed, plain = [], network_module.Network.pushed

    def counted(self, inputs, tangents):
        pushed.append((len(inputs), tangents.shape[1]))
        return plain(self, inputs, tangents)

    monkeypatch.setattr(network_module.Network, "pushed", counted)
    generator = torch.Generator().manual_seed(1)
    deviations = torch.randn(n_draws, network.n_parameters, dtype=torch.float64, generator=generator)
    found = linearized.draw_functions(network, X, deviations)
    torch.testing.assert_close(found, torch.stack([model(X).detach() + (J @ d) for d in deviations]))
    assert bool(pushed) == by_jvp
    assert all(n <= batch and k <= at_once for n, k in pushed)


def test_variances_and_functions_with_a_graph_have_gradients_with_respect_to_the_inputs():
    _, X, network, precision, _ = problem("MLP")
    generator = torch.Generator().manual_seed(1)
    deviations = torch.randn(2, network.n_parameters, dtype=torch.float64, generator=generator)

    def total(x, create_graph):
        mean, variance = linearized.predict_variances(network, precision, x, create_graph=create_graph)
        return (mean + variance).sum() + linearized.draw_functions(
            network, x, deviations, create_graph=create_graph
        ).square().sum()

    x = X[:3].clone().requires_grad_()
    total(x, create_graph=True).backward()
    u, step = torch.randn(x.shape, generator=generator, dtype=torch.float64), 1e-6
    rise = total(X[:3] + step * u, create_graph=False) - total(X[:3] - step * u, create_graph=False)
    assert float((x.grad * u).sum()) == pytest.approx(float(rise) / (2 * step), rel=1e-6)
