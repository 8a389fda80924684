"""Callables that evaluate a network in training mode: a warning, and running statistics as they were."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def report_of(method):
    return evaluate({"method": method}, DataLoader(TensorDataset(X, Y), 20), task="multiclass", n_resamples=10)


def test_a_callable_of_a_network_in_training_mode_is_warned_about_and_leaves_no_trace() -> None:
    model = network().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.warns(UserWarning, match="'method' evaluates a Sequential in training mode"):
        report = report_of(lambda x: model(x).softmax(-1))
    assert any("training mode" in warning for warning in report.warnings)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model.training


@pytest.mark.parametrize("container", [list, tuple, lambda models: dict(enumerate(models))])
def test_ensembles_in_containers_are_found(container) -> None:
    models = [network().train() for _ in range(2)]
    before = {name: b.clone() for name, b in models[1].named_buffers()}
    held = container(models)
    members = list(held.values()) if isinstance(held, dict) else held

    class Ensemble:
        def __init__(self, models):
            self.models = models

        def __call__(self, x):
            return sum(model(x).softmax(-1) for model in members) / 2

    for method in (lambda x: (held, sum(model(x).softmax(-1) for model in members) / 2)[1], Ensemble(held)):
        with pytest.warns(UserWarning, match="'method' evaluates a Sequential in training mode"):
            report_of(method)
        assert all(torch.equal(b, before[name]) for name, b in models[1].named_buffers())


@pytest.mark.untyped
def test_the_warning_points_at_the_call() -> None:
    model = network().train()
    with pytest.warns(UserWarning, match="training mode") as caught:
        report_of(lambda x: model(x).softmax(-1))
    assert caught[0].filename == __file__


def in_evaluation_mode(model):
    model.eval()
    return lambda x: model(x).softmax(-1)


def that_sets_the_mode(model):
    def predict(x):
        model.eval()
        return model(x).softmax(-1)

    model.train()
    return predict


def monte_carlo_dropout(model):
    model.eval()
    model[3].train()
    return lambda x: torch.stack([model(x).softmax(-1) for _ in range(5)])


def of_a_posterior(model):
    la = DebiasedLaplace(model.eval(), "classification", prior_precision=3.0)
    la.fit(DataLoader(TensorDataset(X, Y), 20))
    model.train()
    return lambda x: la(x)


def plain_network(model):
    return model.train()


@pytest.mark.parametrize(
    "method", [in_evaluation_mode, that_sets_the_mode, monte_carlo_dropout, of_a_posterior, plain_network]
)
def test_what_predicts_in_evaluation_mode_is_not_warned_about(method) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = report_of(method(network()))
    assert not any("training mode" in warning for warning in report.warnings)
