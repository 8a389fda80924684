"""Predictions of one pass: the same inputs and random numbers for all, direct numbers, and untouched models."""

import inspect
import warnings
import weakref

import numpy as np
import pytest
import torch
from fitted_posteriors import MODEL, TASKS, C, N, WithoutModel, X, debiased, loader, of_laplace_torch
from laplace import Laplace
from laplace.curvature import BackPackGGN
from models import batch_norm_net, mlp, targets
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.calibration.methods import BatchPrediction, PredictionOptions
from debiased_laplace.calibration.predict import collect, read_methods
from debiased_laplace.errors import NotFittedError
from debiased_laplace.predictive.mean_field import GaussianLogits


def collected(methods, batches, task="multiclass", **options):
    collected = collect(methods, batches, PredictionOptions(task, **options), "a set")
    return collected.found, collected.targets


def predict(method, batches, task="multiclass", **options):
    return collected({"m": method}, batches, task, **options)[0]["m"]


def uniform(x):
    return torch.full((len(x), C), 1 / C)


class Augmented(IterableDataset):
    """Samples with noise from the global generator; their number is not known."""

    def __iter__(self):
        order = torch.randperm(N).tolist()
        return ((X[i] + torch.randn(4), targets("classification")[i]) for i in order)


AUGMENTED = DataLoader(Augmented(), batch_size=7)


class Recorder:
    """Notes its inputs, overwrites them, and draws from the global generator."""

    def __init__(self, n_draws):
        self.inputs, self.n_draws = torch.empty(0, 4), n_draws

    def __call__(self, x):
        self.inputs = torch.cat([self.inputs, x])
        x.zero_()
        torch.rand(self.n_draws)
        return uniform(x)


def test_every_method_gets_the_same_augmented_inputs_in_one_pass_whatever_the_others_draw():
    methods, alone, other_seed = {f"m{n}": Recorder(n) for n in (50, 0, 7)}, Recorder(0), Recorder(0)
    collected(methods, AUGMENTED, seed=5)
    predict(alone, AUGMENTED, seed=5)
    predict(other_seed, AUGMENTED, seed=6)
    assert all(torch.equal(recorder.inputs, alone.inputs) for recorder in methods.values())
    assert len(alone.inputs) == N
    assert not torch.isin(alone.inputs, torch.cat([X, other_seed.inputs])).any()  # they were augmented at all


@pytest.mark.parametrize("options", [{"link": "mc"}, {"pred_type": "nn"}], ids=["glm", "nn"])
def test_a_method_twice_predicts_the_same_twice(options):
    def dropout(x):  # draws from the global generator
        return (x[:, :C] * nn.functional.dropout(torch.ones(20, 1, C, dtype=x.dtype), 0.4)).softmax(-1)

    found = collected({"1": debiased(), "2": dropout, "1 again": debiased(), "2 again": dropout}, AUGMENTED, **options)[
        0
    ]
    for name in "12":
        assert torch.equal(found[name].probabilities, found[f"{name} again"].probabilities)


def test_nothing_but_means_is_kept_of_the_samples_of_a_batch():
    alive, most = [], []

    def method(x):
        most.append(sum(ref() is not None for ref in alive))
        samples = torch.rand(50, len(x), C, dtype=torch.float64).softmax(-1)
        alive.append(weakref.ref(samples))
        return samples

    found = predict(method, loader(batch_size=4))
    assert max(most) == 0
    assert all(ref() is None for ref in alive)
    assert sum(t.numel() for t in found.tensors().values()) == N * C + N
    assert found.n_samples == 50
    many = X[:, :1].expand(-1, 33).clone()  # outputs, too many for their covariances
    assert torch.equal(BatchPrediction(function_variance=torch.diag_embed(many)).compact().function_variance, many)


def test_predictions_and_targets_outlive_the_loaders_memory():
    x, y = torch.empty(20, 4), torch.empty(20, dtype=torch.long)
    labels = targets("classification")
    batches = ((x.copy_(X[i : i + 20]), y.copy_(labels[i : i + 20])) for i in (0, 20))
    found, kept = collected({"m": lambda x: x[:, :C].softmax(-1)}, batches)
    assert_close(found["m"].probabilities, X.float()[:, :C].softmax(-1))
    assert torch.equal(kept, labels)


POSTERIORS = {
    f"{make.__name__}, {subset}, {structure}": (make, subset, structure)
    for make, structures in ((debiased, ("lowrank", "kron", "full")), (of_laplace_torch, ("diag", "kron", "full")))
    for subset in ("all", "last_layer", "subnetwork")
    for structure in structures
    if subset != "subnetwork" or structure in ("lowrank", "full")
}


@pytest.mark.parametrize("case", POSTERIORS)
@pytest.mark.parametrize("likelihood", TASKS)
def test_numbers_are_those_of_the_posterior_itself(case, likelihood):
    make, *options = POSTERIORS[case]
    la = make(likelihood, *options)
    found = predict(la, loader(likelihood, batch_size=13), TASKS[likelihood])
    if likelihood == "regression":
        assert_close((found.mean, found.function_variance), tuple(t.detach() for t in la(X)))
        return
    # the same link for both libraries: with `la(x)` links would be compared, and not posteriors
    mean, covariance = la._glm_predictive_distribution(X)
    probabilities, information = GaussianLogits.of_covariance(mean, covariance).probabilities_and_information()
    assert_close(found.probabilities, probabilities.detach(), rtol=1e-6, atol=1e-9)
    assert_close(found.mutual_information, information.detach(), rtol=1e-5, atol=1e-9)
    centred = torch.eye(C, dtype=torch.float64) - 1 / C
    total = torch.einsum("ij,njk,ki->n", centred, covariance.detach().double(), centred)
    assert_close(found.logit_variance, total.to(found.logit_variance.dtype), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
def test_other_links_are_those_of_the_posterior(link):
    found = predict(debiased(), loader(batch_size=13), link=link)
    assert_close(found.probabilities, debiased()(X, link_approx=link).detach())
    assert found.mutual_information is None


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("make", [debiased, of_laplace_torch])
@pytest.mark.parametrize("likelihood", TASKS)
def test_draws_are_the_predictive_samples_of_the_posterior(likelihood, make, pred_type):
    la, generator = make(likelihood), torch.Generator().manual_seed(7)
    options = {"pred_type": pred_type, "link": "mc", "n_samples": 30, "seed": 7}
    # laplace-torch's draws of outputs depend on the size of the batches
    batches = loader(likelihood, batch_size=N if make is of_laplace_torch else 13)
    found = predict(la, batches, TASKS[likelihood], **options)
    samples = la.predictive_samples(X, pred_type, n_samples=30, generator=generator).detach()
    if likelihood == "classification":
        entropies = [torch.special.entr(p).sum(-1) for p in (samples.mean(0), samples)]
        expected = samples.mean(0), entropies[0] - entropies[1].mean(0)
        assert_close((found.probabilities, found.mutual_information), expected)
    elif pred_type == "nn":
        assert_close((found.mean, found.function_variance), (samples.mean(0), samples.var(0)))
    assert found.n_samples == (None if (likelihood, pred_type) == ("regression", "glm") else 30)


def test_networks_and_callables_give_what_the_network_gives():
    logits = MODEL(X).detach()
    methods = {
        "network": MODEL,
        "numpy": lambda x: MODEL(x).softmax(-1).detach().numpy(),
        "half": lambda x: MODEL(x).softmax(-1).half(),
        "samples": lambda x: MODEL(x).softmax(-1).expand(150, -1, -1),
    }
    found = collected(methods, loader(batch_size=13))[0]
    assert_close(found["network"].logits, logits)
    for name, tolerance in (("network", 1e-12), ("numpy", 1e-12), ("samples", 1e-12), ("half", 1e-3)):
        assert_close(found[name].probabilities.double(), logits.softmax(-1), rtol=tolerance, atol=tolerance)
    assert (found["samples"].n_samples, found["numpy"].n_samples) == (150, None)
    one_logit, x = mlp(1)
    p = one_logit(x).sigmoid().detach()
    assert_close(predict(one_logit, [(x, torch.arange(N) % 2)], "binary").probabilities, torch.cat([1 - p, p], dim=1))


def test_no_graph_is_kept_and_inference_mode_changes_nothing():
    la = debiased(enable_backprop=True)
    found = predict(la, loader()).probabilities
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(predict(la, loader()).probabilities, found)


def snapshot(*models):
    """All that a user could notice of models, and of the global generators but Python's, which shape checks use."""
    seen = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    for model in models:
        for m in model.modules():
            seen.append((m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._backward_hooks)))
        seen += [(p.data_ptr(), p.tolist()) for p in model.parameters()]
        seen += [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()]
        seen += [b.tolist() for b in model.buffers()]
    return seen


def in_training(model):
    """Set training mode but for one layer, and gradients."""
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.Tanh)).eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    return model


@pytest.mark.parametrize("likelihood", TASKS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_models_predict_in_evaluation_mode_and_are_as_they_were(likelihood, pred_type):
    model, x = batch_norm_net()
    posteriors = {
        "ours": DebiasedLaplace(model, likelihood, prior_precision=0.4),
        "theirs": Laplace(model, likelihood, "all", "diag", prior_precision=0.4),
        "last": Laplace(model, likelihood, "last_layer", "kron", prior_precision=0.4),
    }
    batches = DataLoader(TensorDataset(x, targets(likelihood)), batch_size=10)
    for la in posteriors.values():
        la.fit(batches)
    expected = model.eval()(x).detach()
    in_training(model)
    before = snapshot(model, posteriors["last"].model)
    found = collected({"map": model, **posteriors}, batches, TASKS[likelihood], pred_type=pred_type, n_samples=4)[0][
        "map"
    ]
    assert snapshot(model, posteriors["last"].model) == before
    assert_close(found.logits if likelihood == "classification" else found.mean, expected)


@pytest.mark.parametrize("fails_at", [1, 3, 8])
def test_models_are_as_they_were_after_an_exception_between_two_draws(fails_at, monkeypatch):
    model, calls, gelu = mlp()[0], [], nn.GELU.forward
    la = Laplace(model, "classification", "all", "diag", prior_precision=0.4)
    la.fit(loader())
    before = snapshot(in_training(model))

    def fragile(self, x):
        calls.append(x)
        return gelu(self, x if len(calls) < fails_at else None)

    monkeypatch.setattr(nn.GELU, "forward", fragile)
    with pytest.raises(TypeError):
        predict(la, loader(), pred_type="nn", n_samples=5)
    assert snapshot(model) == before
    assert len(calls) == fails_at


def test_a_posterior_by_backpack_beside_ones_by_torch_func():
    """Its hooks would stop torch.func, whichever comes first."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    theirs = Laplace(model, "classification", "all", "kron", prior_precision=0.4, backend=BackPackGGN)
    ours = DebiasedLaplace(model, "classification", prior_precision=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(loader())
        ours.fit(loader())
        alone = predict(ours, loader())
        found = collected({"theirs": theirs, "ours": ours, "theirs again": theirs}, loader())[0]
    assert torch.equal(found["ours"].probabilities, alone.probabilities)
    assert torch.equal(found["theirs"].probabilities, found["theirs again"].probabilities)


WITH_MAP = {
    "added": ({"la": debiased}, None, None, ["map", "la"]),
    "a network is there": ({"la": debiased, "net": lambda: MODEL}, None, None, ["la", "net"]),
    "a method of that name is there": ({"la": debiased, "MAP": lambda: uniform}, None, None, ["la", "MAP"]),
    "nobody has a network": ({"la": WithoutModel}, None, None, ["la"]),
    "another baseline": ({"la": debiased, "u": lambda: uniform}, "u", None, ["la", "u"]),
    "on request, with another baseline": ({"la": debiased, "u": lambda: uniform}, "u", True, ["map", "la", "u"]),
    "left out on request": ({"la": debiased}, None, False, ["la"]),
}


@pytest.mark.parametrize("case", WITH_MAP)
def test_map_comes_first_where_it_is_missing(case):
    makers, baseline, include_map, expected = WITH_MAP[case]
    found = read_methods({name: make() for name, make in makers.items()}, baseline, include_map)
    assert list(found) == expected
    assert "map" not in found or found["map"] is MODEL


class Softmaxed(nn.Module):
    def forward(self, x):
        return x[:, :C].softmax(-1)


def changing(x):
    return uniform(x) if len(x) == 13 else uniform(x).expand(4, -1, -1)


def retrained():
    la = DebiasedLaplace(mlp()[0], "classification", prior_precision=0.4)
    la.fit(loader())
    nn.init.zeros_(next(la.model.parameters()))
    return la


REGRESSION = {"task": "regression"}
REFUSED = {
    "a network that ends in a softmax": (Softmaxed(), {}, "are probabilities"),
    "a network with one output": (mlp(1)[0], {}, "at least 2 classes"),
    "too few predictions": (lambda x: uniform(x)[1:], {}, "expected probabilities .* for n = 8 inputs"),
    "logits as samples": (lambda x: x[:, :C].expand(4, -1, -1), {}, "must lie in"),
    "no tensor": (lambda x: "yes", {}, "expected an array"),
    "samples of some batches": (changing, {"batches": loader(batch_size=13)}, "same form for every batch"),
    "one sample of a function": (lambda x: x[None], REGRESSION, "at least 2 samples"),
    "a pair of other lengths": (
        lambda x: (x, x[1:]),
        REGRESSION,
        "expected 8 means and standard deviations; got 8 and 7",
    ),
    "another likelihood": (debiased("regression"), {}, "likelihood 'regression'; got task='multiclass'"),
    "a reward model": (DebiasedLaplace(MODEL, "reward_modeling"), {}, "reward model.*fitting=True"),
    "not fitted": (Laplace(MODEL, "classification", "all", "diag"), {}, "not fitted"),
    "weights that changed since the fit": (retrained(), {}, "changed since the fit"),
    "one draw": (uniform, {"n_samples": 1}, "n_samples must be"),
    "a negative seed": (uniform, {"seed": -1}, "seed must be"),
    "a link of drawn networks": (uniform, {"pred_type": "nn", "link": "probit"}, "expected link_approx='mc'"),
    "empty batches": (uniform, {"batches": [(torch.zeros(0, 4), torch.zeros(0))]}, "yields no samples"),
    "inputs alone": (uniform, {"batches": [X]}, "Expected batches of two tensors"),
    "NaN": (uniform, {"batches": [(X / 0, torch.zeros(N))]}, "40 of 40 samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_methods_options_and_batches_that_are_refused(case):
    method, options, message = REFUSED[case]
    with pytest.raises((ValueError, NotFittedError), match=message):
        predict(method, **{"batches": loader(), **options})


@pytest.mark.parametrize("wrong", [{"task": "classification"}, {"pred_type": "gp"}, {"link": "logit"}])
def test_unknown_names_are_refused_where_no_type_checker_looks(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        inspect.unwrap(PredictionOptions.__init__)(object.__new__(PredictionOptions), **{"task": "binary"} | wrong)
