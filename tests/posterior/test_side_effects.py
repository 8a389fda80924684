"""What a posterior does to the model and to others' tensors: nothing."""

import pytest
import torch
from models import MODELS, targets
from posterior_cases import hyper_parameters, loader_of, posterior_of
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "pointers": {k: p.data_ptr() for k, p in model.named_parameters()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }


def same(model, before):
    after = snapshot(model)
    for key in ("pointers", "modes", "hooks", "requires_grad"):
        assert after[key] == before[key], key
    for key in ("state", "grads"):
        for name, value in before[key].items():
            found = after[key][name]
            assert found is value is None or torch.equal(found, value), (key, name)


def everything(la, X, y):
    data = TensorDataset(X, y)
    yield lambda: la.fit(DataLoader(Subset(data, range(30)), batch_size=8, shuffle=True), n_data=40)
    yield lambda: la(X[:3])
    yield lambda: la(X[:3], pred_type="nn", link_approx="mc", n_samples=3)
    yield lambda: la.functional_samples(X[:3], "glm", 3)
    yield lambda: la.predictive_samples(X[:3], "nn", 3)
    yield lambda: la.sample(2)
    yield lambda: la.log_marginal_likelihood()
    yield lambda: la.optimize_prior_precision(n_steps=2)
    yield lambda: la.optimize_prior_precision(
        method="gridsearch", val_loader=loader_of(X, y), grid_size=3, log_prior_prec_min=-9.0, log_prior_prec_max=9.0
    )
    yield lambda: la.held_out_kl(DataLoader(Subset(data, range(30, 40))), DataLoader(Subset(data, range(30))))
    yield lambda: la.load_state_dict(la.state_dict())
    yield lambda: la(X[:3])  # of a loaded posterior


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("mode", ["training", "partly training", "evaluating"])
@pytest.mark.parametrize("name", ["BatchNorm", "transformer", "GRU", "partly frozen"])
def test_the_model_is_as_it_was(name, mode):
    likelihood = "regression" if mode == "partly training" else "classification"
    model, X = MODELS[name]()
    y = targets(likelihood)
    model.train(mode == "training")
    if mode == "partly training":
        list(model.modules())[1].train()
    for i, p in enumerate(model.parameters()):
        if i % 2:
            p.grad = torch.full_like(p, 0.25)
    before = snapshot(model)
    la = posterior_of(model, likelihood, **hyper_parameters(likelihood), rank=6)
    for step in everything(la, X, y):
        step()
        same(model, before)


@pytest.mark.parametrize("name", ["BatchNorm", "transformer"])
def test_training_mode_changes_no_number(name):
    found = []
    for training in (False, True):
        model, X = MODELS[name]()
        model.train(training)
        la = posterior_of(model, "classification", **hyper_parameters("classification"))
        la.fit(loader_of(X, targets("classification")))
        found.append((la.posterior_precision.to_dense(), la.log_marginal_likelihood(), la(X)))
    for evaluating, trained in zip(*found, strict=True):
        assert torch.equal(evaluating, trained)


class Fragile(nn.Module):
    """Raises from some call on."""

    def __init__(self):
        super().__init__()
        self.inner = MODELS["BatchNorm"]()[0]
        self.calls_left = None

    def forward(self, x):
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise RuntimeError("out of luck")
        return self.inner(x)


@pytest.mark.parametrize("calls_left", [0, 1])
def test_the_model_is_as_it_was_when_it_raises(calls_left):
    model = Fragile().double().train()
    X, y = MODELS["BatchNorm"]()[1], targets("classification")
    la = posterior_of(model, "classification", **hyper_parameters("classification"), rank=4)
    la.fit(loader_of(X, y))
    expected, mean = la(X), la.mean.clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    data = TensorDataset(X, y)
    kept = la.split.direction_indices.clone()
    for call in (
        lambda: la(X, pred_type="nn", link_approx="mc", n_samples=4),
        lambda: la.functional_samples(X, "nn", 4),
        lambda: la.fit(loader_of(X[:20], y[:20])),
    ):
        model.calls_left = calls_left
        with pytest.raises((RuntimeError, ValueError), match="out of luck"):
            call()
        same(model, before)
    model.calls_left = None
    assert torch.equal(la.mean, mean)
    assert torch.equal(la(X), expected)
    assert torch.equal(la.split.direction_indices, kept)
    assert len(data) == 40


@pytest.mark.parametrize("fresh", [True, False])
def test_training_on_does_not_move_the_mean(fresh):
    # one parameter only: flattening it must still copy
    model = nn.Linear(4, 3, bias=False).double()
    X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    la = posterior_of(model, "regression", **hyper_parameters("regression"))
    la.fit(loader_of(X, targets("regression")))
    if not fresh:
        la(X, pred_type="nn", link_approx="mc", n_samples=3)
    mean, prediction = la.mean.clone(), la(X)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert torch.equal(la.mean, mean)
    for found, expected in zip(la(X), prediction, strict=True):
        assert torch.equal(found, expected)


def test_options_are_not_written_to():
    model, X = MODELS["MLP"]()
    prior = torch.full((6,), 0.4, dtype=torch.float64)
    la = posterior_of(model, "classification", prior_precision=prior, backend_kwargs={})
    la.fit(loader_of(X, targets("classification")))
    la.optimize_prior_precision(n_steps=3, init_prior_prec=prior)
    assert torch.equal(prior, torch.full((6,), 0.4, dtype=torch.float64))
    assert not la.prior_precision.requires_grad
