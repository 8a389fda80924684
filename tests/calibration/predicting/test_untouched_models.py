"""Models, gradients and random states are as they were, also after an exception."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from laplace import Laplace
from laplace.curvature import BackPackGGN
from models import batch_norm_net, mlp, targets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate

LIKELIHOODS = {"multiclass": "classification", "regression": "regression"}


def loader(X, likelihood="classification", batch_size=10):
    return DataLoader(TensorDataset(X, targets(likelihood)), batch_size=batch_size, shuffle=True)


def trace_of(model):
    """All that a user could notice of a model."""
    return {
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "memory": [p.data_ptr() for p in model.parameters()],
        "gradients": [None if p.grad is None else id(p.grad) for p in model.parameters()],
    }


def values_of(model):
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [t.detach().clone() for t in tensors]


def random_states():
    # not Python's own: the shape checks of the test run draw from it
    return torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002


class Watched:
    """The model, its gradients and the generators, before and after."""

    def __init__(self, *models):
        self.models, self.traces = models, [trace_of(m) for m in models]
        self.values, self.states = [values_of(m) for m in models], random_states()

    def check(self):
        assert [trace_of(m) for m in self.models] == self.traces
        for model, before in zip(self.models, self.values, strict=True):
            for now, then in zip(values_of(model), before, strict=True):
                assert torch.equal(now, then)
        states = random_states()
        assert torch.equal(states[0], self.states[0])
        assert (states[1] == self.states[1]).all()


def in_training(model):
    """In training mode but for one layer, and with gradients."""
    model.train()
    next(m for m in model.children() if isinstance(m, nn.BatchNorm2d | nn.Tanh)).eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    return model


@pytest.mark.parametrize("task", LIKELIHOODS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_batch_norm_in_training_mode(task, pred_type):
    likelihood = LIKELIHOODS[task]
    model, X = batch_norm_net()
    ours = DebiasedLaplace(model, likelihood, prior_precision=0.4)
    theirs = Laplace(model, likelihood, "all", "diag", prior_precision=0.4)
    last = Laplace(model, likelihood, "last_layer", "kron", prior_precision=0.4)
    for la in (ours, theirs, last):
        la.fit(loader(X, likelihood))
    expected = model.eval()(X).detach()
    in_training(model)
    watched = Watched(model, last.model)
    options = {"task": task, "pred_type": pred_type, "n_samples": 4}
    methods = {"map": model, "ours": ours, "theirs": theirs, "last": last}
    report = evaluate(methods, loader(X, likelihood), **options)
    watched.check()
    assert torch.equal(copy.deepcopy(model).eval()(X), expected)
    if task == "multiclass":
        # in evaluation mode, whatever the mode it was found in
        y = targets(likelihood)
        assert report.metrics["map"]["nll"].value == pytest.approx(nn.functional.cross_entropy(expected, y).item())


PYTHONS = """
import random, torch
from debiased_laplace import evaluate

def method(x):
    random.random()
    return torch.full((len(x), 2), 0.5)

before = random.getstate()
evaluate({"m": method}, [(torch.zeros(8, 1), torch.tensor([0, 1] * 4))], task="binary")
assert random.getstate() == before
"""


def test_pythons_generator_is_as_it_was():
    subprocess.run([sys.executable, "-W", "ignore", "-c", PYTHONS], check=True)


class Fragile(nn.Module):
    """Fails at its `fails_at`-th forward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls, self.fails_at = [0], [0]

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == self.fails_at[0]:
            raise RuntimeError("no more")
        return self.inner(x)


@pytest.mark.parametrize("fails_at", [1, 3, 8])
def test_after_an_exception_between_two_draws(fails_at):
    model, X = mlp()
    fragile = Fragile(model)
    la = Laplace(fragile, "classification", "all", "diag", prior_precision=0.4)
    la.fit(loader(X))
    in_training(model)
    fragile.calls[0], fragile.fails_at[0] = 0, fails_at
    watched = Watched(fragile)
    with pytest.raises(RuntimeError, match="no more"):
        evaluate({"la": la}, loader(X), task="multiclass", pred_type="nn", n_samples=5, include_map=False)
    watched.check()
    assert fragile.calls[0] == fails_at


def test_after_an_exception_in_the_loader():
    model, X = mlp()
    in_training(model)

    def batches():
        torch.rand(3)
        yield X[:5], targets("classification")[:5]
        raise RuntimeError("disk gone")

    watched = Watched(model)
    with pytest.raises(RuntimeError, match="disk gone"):
        evaluate({"m": model}, batches(), task="multiclass")
    watched.check()


def test_later_training_does_not_move_the_mean_of_a_posterior():
    """laplace-torch leaves views of its mean in the parameters after sampling networks."""
    model, X = mlp()
    la = Laplace(model, "classification", "all", "diag", prior_precision=0.4)
    la.fit(loader(X))
    mean = la.mean.clone()
    evaluate({"la": la}, loader(X), task="multiclass", pred_type="nn", n_samples=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(la.mean, mean)


def test_a_posterior_by_backpack_beside_ones_by_torch_func():
    """Its hooks would stop torch.func, whichever comes first."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X = mlp()[1]
    theirs = Laplace(model, "classification", "all", "kron", prior_precision=0.4, backend=BackPackGGN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(loader(X))
        ours = DebiasedLaplace(model, "classification", prior_precision=0.4)
        ours.fit(loader(X))
        alone = evaluate({"ours": ours}, loader(X), task="multiclass", include_map=False)
        methods = {"theirs": theirs, "ours": ours, "theirs again": theirs}
        report = evaluate(methods, loader(X), task="multiclass")
    assert report.metrics["ours"] == alone.metrics["ours"]
    assert report.metrics["theirs"] == report.metrics["theirs again"]
