"""Predictions of one pass: the same inputs and random numbers for all, direct numbers, and untouched models."""

import inspect
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from fitted_posteriors import MODEL, TASKS, C, N, WithoutModel, X, debiased, loader, of_laplace_torch
from laplace import Laplace
from laplace.curvature import BackPackGGN
from models import batch_norm_net, mlp, targets
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.calibration.predict import collect, make_predictors, read_methods
from debiased_laplace.calibration.predictors import PredictionOptions
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.errors import NotFittedError
from debiased_laplace.predictive.mean_field import GaussianLogits


def collected(methods, batches, task="multiclass", **options):
    options = PredictionOptions(task, **options)
    return collect(make_predictors(methods, options, next(iter(methods))), batches, DEFAULT_KEYS, seed=options.seed)


def predict(method, batches, task="multiclass", **options):
    return collected({"m": method}, batches, task, **options).predictions["m"]


def shuffled(likelihood="classification", inputs=X, batch_size=7):
    return DataLoader(TensorDataset(inputs, targets(likelihood)), batch_size=batch_size, shuffle=True)


def uniform(x):
    return torch.full((len(x), C), 1 / C)


def augmented():
    """Batches with noise from the global generator, which can be loaded once."""
    for x, y in shuffled():
        yield x + torch.randn_like(x), y


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
    collected(methods, augmented(), seed=5)
    predict(alone, augmented(), seed=5)
    predict(other_seed, augmented(), seed=6)
    for recorder in methods.values():
        assert torch.equal(recorder.inputs, alone.inputs)
    assert len(alone.inputs) == N
    assert not torch.isin(alone.inputs, X).any()  # they were augmented at all
    assert not torch.isin(alone.inputs, other_seed.inputs).any()


@pytest.mark.parametrize("options", [{"link": "mc"}, {"pred_type": "nn"}], ids=["glm", "nn"])
def test_a_method_twice_predicts_the_same_twice(options):
    def dropout(x):
        """Draw from the global generator, as users' Monte-Carlo dropout does."""
        weights = nn.functional.dropout(torch.ones(20, 1, C, dtype=x.dtype), 0.4)
        return (x[:, :C] * weights).softmax(-1)

    methods = {"one": debiased(), "dropout": dropout, "two": debiased(), "dropout again": dropout}
    found = collected(methods, augmented(), **options).predictions
    for first, second in (("one", "two"), ("dropout", "dropout again")):
        assert torch.equal(found[first].probabilities, found[second].probabilities)


def test_samples_of_one_batch_at_a_time_and_nothing_but_means_afterwards():
    alive, most = [], []

    def method(x):
        most.append(sum(ref() is not None for ref in alive))
        samples = torch.rand(50, len(x), C, dtype=torch.float64)
        samples /= samples.sum(-1, keepdim=True)
        alive.append(weakref.ref(samples))
        return samples

    found = predict(method, loader(batch_size=4))
    assert max(most) == 0
    assert all(ref() is None for ref in alive)
    assert sum(t.numel() for t in found.tensors().values()) == N * C + N
    assert found.n_samples == 50


def test_predictions_and_targets_outlive_the_loaders_memory():
    def batches():
        x, y = torch.empty(20, 4), torch.empty(20, dtype=torch.long)
        for rows in (slice(0, 20), slice(20, 40)):
            yield x.copy_(X[rows]), y.copy_(targets("classification")[rows])

    found = collected({"m": lambda x: x[:, :C].softmax(-1)}, batches())
    assert_close(found.predictions["m"].probabilities, X.float()[:, :C].softmax(-1))
    assert torch.equal(found.targets, targets("classification"))


def test_covariances_between_many_outputs_are_not_kept():
    many = X[:, :1].expand(-1, 33).clone()
    predictor = make_predictors({"m": mlp(33)[0]}, PredictionOptions("regression"), "m")["m"]
    whole = replace(predictor.predict(X), function_variance=torch.diag_embed(many))
    assert torch.equal(whole.compact().function_variance, many)


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
        mean, variance = (t.detach() for t in la(X))
        assert_close(found.mean, mean)
        assert_close(found.function_variance, variance)
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
        assert_close(found.probabilities, samples.mean(0))
        assert_close(found.mutual_information, entropies[0] - entropies[1].mean(0))
    elif pred_type == "nn":
        assert_close(found.mean, samples.mean(0))
        assert_close(found.function_variance, samples.var(0))
    assert found.n_samples == (None if (likelihood, pred_type) == ("regression", "glm") else 30)


def test_networks_and_callables_give_what_the_network_gives():
    logits = MODEL(X).detach()
    methods = {
        "network": MODEL,
        "numpy": lambda x: MODEL(x).softmax(-1).detach().numpy(),
        "half": lambda x: MODEL(x).softmax(-1).half(),
        "samples": lambda x: MODEL(x).softmax(-1).expand(150, -1, -1),
    }
    found = collected(methods, loader(batch_size=13)).predictions
    assert_close(found["network"].logits, logits)
    for name, tolerance in (("network", 1e-12), ("numpy", 1e-12), ("samples", 1e-12), ("half", 1e-3)):
        assert_close(found[name].probabilities.double(), logits.softmax(-1), rtol=tolerance, atol=tolerance)
    assert (found["samples"].n_samples, found["numpy"].n_samples) == (150, None)


def test_a_binary_network_with_one_logit():
    model, x = mlp(1)
    p = model(x)[:, 0].sigmoid().detach()
    found = predict(model, [(x, torch.arange(N) % 2)], "binary")
    assert_close(found.probabilities, torch.stack([1 - p, p], dim=1))


def test_no_graph_is_kept_and_inference_mode_changes_nothing():
    la = debiased(enable_backprop=True)
    found = predict(la, loader()).probabilities
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(predict(la, loader()).probabilities, found)


def snapshot(*models):
    """All that a user could notice of models, and of the global generators but Python's, which shape checks use."""
    seen = [
        (
            [(m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
            [(p.data_ptr(), p.tolist()) for p in model.parameters()],
            [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
            [b.tolist() for b in model.buffers()],
        )
        for model in models
    ]
    return seen, torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002


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
    ours = DebiasedLaplace(model, likelihood, prior_precision=0.4)
    theirs = Laplace(model, likelihood, "all", "diag", prior_precision=0.4)
    last = Laplace(model, likelihood, "last_layer", "kron", prior_precision=0.4)
    for la in (ours, theirs, last):
        la.fit(shuffled(likelihood, x))
    expected = model.eval()(x).detach()
    in_training(model)
    before = snapshot(model, last.model)
    batches = DataLoader(TensorDataset(x, targets(likelihood)), batch_size=10)
    methods = {"map": model, "ours": ours, "theirs": theirs, "last": last}
    found = collected(methods, batches, TASKS[likelihood], pred_type=pred_type, n_samples=4).predictions["map"]
    assert snapshot(model, last.model) == before
    assert_close(found.logits if likelihood == "classification" else found.mean, expected)


@pytest.mark.parametrize("fails_at", [1, 3, 8])
def test_models_are_as_they_were_after_an_exception_between_two_draws(fails_at, monkeypatch):
    model, calls, gelu = mlp()[0], [], nn.GELU.forward
    la = Laplace(model, "classification", "all", "diag", prior_precision=0.4)
    la.fit(shuffled())
    before = snapshot(in_training(model))

    def fragile(self, x):
        calls.append(x)
        return gelu(self, x if len(calls) < fails_at else None)

    monkeypatch.setattr(nn.GELU, "forward", fragile)
    with pytest.raises(TypeError):
        predict(la, shuffled(), pred_type="nn", n_samples=5)
    assert snapshot(model) == before
    assert len(calls) == fails_at


def test_a_posterior_by_backpack_beside_ones_by_torch_func():
    """Its hooks would stop torch.func, whichever comes first."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    theirs = Laplace(model, "classification", "all", "kron", prior_precision=0.4, backend=BackPackGGN)
    ours = DebiasedLaplace(model, "classification", prior_precision=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(loader())
        ours.fit(loader())
        alone = predict(ours, loader())
        found = collected({"theirs": theirs, "ours": ours, "theirs again": theirs}, loader()).predictions
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
    "a pair of other lengths": (lambda x: (x, x[1:]), REGRESSION, "mean and standard deviation of 8"),
    "another likelihood": (debiased("regression"), {}, "likelihood 'regression'; got task='multiclass'"),
    "a reward model": (DebiasedLaplace(MODEL, "reward_modeling"), {}, "reward model.*fitting=True"),
    "not fitted": (DebiasedLaplace(MODEL, "classification"), {}, "not fitted"),
    "not fitted, laplace-torch's": (Laplace(MODEL, "classification", "all", "diag"), {}, "not fitted"),
    "weights that changed since the fit": (retrained(), {}, "changed since the fit"),
    "one draw": (uniform, {"n_samples": 1}, "n_samples must be"),
    "a negative seed": (uniform, {"seed": -1}, "seed must be"),
    "a link of drawn networks": (uniform, {"pred_type": "nn", "link": "probit"}, "expected link_approx='mc'"),
    "no batches": (uniform, {"batches": []}, "yields no samples"),
    "empty batches": (uniform, {"batches": [(torch.zeros(0, 4), torch.zeros(0))]}, "yields no samples"),
    "inputs alone": (uniform, {"batches": [X]}, "Expected batches of two tensors"),
    "NaN": (uniform, {"batches": [(X / 0, torch.zeros(N))]}, "40 of 40 samples"),
    "unequal lengths": (uniform, {"batches": [(X, torch.zeros(3))]}, "40 inputs but 3 targets"),
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
