"""Wrong input is a ValueError that says what was expected and what came; model and posterior stay as they were."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import MODELS, mlp, targets
from posterior_cases import fitted, hyper_parameters, loader_of, posterior_of
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from debiased_laplace.errors import OverlapError

# --- types: tried in a process of its own, without the tests' type checks ---

WRONG_TYPES = {
    "rank: float": "2.5",
    "rank: bool": "True",
    "seed: text": "seed must be an integer",
    "seed: bool": "seed must be an integer",
    "n_folds: one": "n_folds must be an integer of at least 2; got 1",
    "n_folds: text": "n_folds must be an integer of at least 2; got 'ten'",
    "magnitudes: unknown": "'held_out', 'cross_fitted', 'same_batch'.*'jackknife'",
    "complement: unknown": "'none', 'isotropic', 'diagonal', 'kron'.*'block'",
    "metric: unknown": "'euclidean', 'kron', 'auto'.*'fisher'",
    "inverse_correction: unknown": "'none', 'second_order'.*'third_order'",
    "rank: auto with kron": "rank requires hessian_structure='lowrank'.*'auto' with 'kron'",
    "direction_samples: auto with cross_fitted": "direction_samples='auto' requires magnitudes='held_out'",
    "solver: unknown": "'auto', 'gram', 'lanczos'.*'power'",
    "direction_samples: text": "number.*share.*'half'",
    "direction_samples: bool": "number.*share.*True",
    "magnitude_samples: text": "magnitude_samples.*'rest'",
    "prior_precision: text": "prior_precision.*'big'",
    "prior_precision: None": "prior_precision.*None",
    "prior_mean: text": "prior_mean.*'zero'",
    "temperature: text": "temperature.*'cold'",
    "temperature: several": "temperature must be one number; got 2",
    "sigma_noise: a matrix": r"one number or one per output; got shape \(3, 2\)",
    "likelihood: unknown": "'binary', 'classification', .*'reward_modeling'.*'bernoulli'",
    "subset: unknown": "'all', 'last_layer', 'subnetwork'.*'full', 'kron', 'lowrank'.*got 'first_layer'",
    "structure: unknown": "'all', 'last_layer', 'subnetwork'.*'full', 'kron', 'lowrank'.*got 'all' and 'tree'",
    "subnetwork: no indices": "1-D LongTensor.* 93 trainable parameters; got none",
    "subnetwork: a list": r"1-D LongTensor.*got \[0, 1\]",
    "subnetwork: floats": r"1-D LongTensor.*got torch.float32 of shape \(2,\)",
    "subnetwork: a mask": r"1-D LongTensor.*got torch.bool of shape \(93,\)",
    "last_layer_name: a number": "one of the modules.*got 4",
    "kron_basis: unknown": "'row_matrices', 'kfac'.*'ekfac'",
    "kron_magnitudes: unknown": "'exact', 'kronecker'.*'eigenvalues'",
    "kfac_approx: unknown": "'expand', 'reduce'.*'sum'",
    "backend: no class of laplace-torch's": "None or one of laplace-torch's classes.*CurvlinopsGGN.*'object'",
    "backend: its name": "None or one of laplace-torch's classes.*'CurvlinopsGGN'",
    "backend_kwargs: unknown": r"'stochastic' and 'num_samples'; got \['last_layer'\]",
    "backend_kwargs: draws: text": "num_samples must be an integer; got 'many'",
    "loader: a number": "DataLoader.*int",
    "loader: None": "DataLoader.*NoneType",
    "loader: a tensor": "DataLoader.*Tensor",
    "loader: a generator": "DataLoader.*generator",
    "loader: batches of text": "two tensors.*'str'",
    "loader: batches of four": "two tensors.*'Tensor', 'Tensor', 'Tensor', 'Tensor'",
    "n_data: float": "n_data must be an integer.*40.0",
    "n_data: bool": "n_data must be an integer.*True",
    "override: text": "override must be True or False; got 'no'",
    "override: a number": "override must be True or False; got 0",
    "tolerance: text": "tolerance.*'small'",
    "tolerance: bool": "tolerance.*True",
    "tolerance: several": "tolerance.*one number; got 2",
    "x: list": "inputs as a tensor, or a mapping of tensors; got list",
    "x: None": "inputs as a tensor, or a mapping of tensors; got NoneType",
    "n_samples: float": "n_samples.*2.5",
    "n_samples: bool": "n_samples.*True",
    "generator: seed": "torch.Generator; got int",
    "generator: seed of weights": "torch.Generator; got int",
    "generator: seed of functions": "torch.Generator; got int",
    "state: text": "dictionary; got str",
    "init_prior_prec: text": "init_prior_prec.*'big'",
    "val_loader: a number": "val_loader.*got 3",
    "grid_size: float": "grid_size.*2.5",
    "loss: text": "loss must be a torchmetrics metric, or a function .*got 'nll'",
    "held-out loader: a number": "DataLoader.*int",
}


@pytest.fixture(scope="module")
def outcomes():
    script = Path(__file__).parent / "wrong_types.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types(case, outcomes):
    classes, message = outcomes[case]
    assert "ValueError" in classes, (classes, message)
    assert re.search(WRONG_TYPES[case], message), message


@pytest.mark.slow
def test_every_type_that_is_tried_is_expected(outcomes):
    assert set(outcomes) == set(WRONG_TYPES)


# --- numbers out of range ---

BAD_NUMBERS = {"zero": 0.0, "negative": -1.0, "NaN": math.nan, "infinite": math.inf, "a bad entry": "entry"}


def bad_value(kind, name, n):
    if BAD_NUMBERS[kind] != "entry":
        return BAD_NUMBERS[kind]
    if name == "temperature":
        return -0.4
    value = torch.full((n if name == "prior_precision" else 1,), 0.4)
    value[-1] = -0.4
    return value


@pytest.mark.parametrize("kind", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
def test_numbers_that_must_be_positive(name, kind):
    model, _ = mlp()
    value = bad_value(kind, name, 6)
    with pytest.raises(ValueError, match=f"{name} must be positive and finite; got"):
        posterior_of(model, "regression", **{name: value})
    la = fitted("MLP", "regression", rank=3)[0]
    before = la.log_marginal_likelihood()
    with pytest.raises(ValueError, match=f"{name} must be positive and finite; got"):
        setattr(la, name, value)
    assert la.log_marginal_likelihood() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor([0.0, math.nan])])
def test_prior_means_that_are_no_numbers(value):
    with pytest.raises(ValueError, match="prior_mean must be finite; got"):
        posterior_of(mlp()[0], "regression", prior_mean=value)
    la = fitted("MLP", "regression", rank=3)[0]
    with pytest.raises(ValueError, match="prior_mean must be finite; got"):
        la.prior_mean = value


LENGTHS = {
    "prior_precision": r"one number, one per parameter tensor \(6\) or one per parameter \(93\); got 5",
    "prior_mean": r"one number or one per parameter \(93\); got 5",
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_that_fit_nothing(name):
    with pytest.raises(ValueError, match=LENGTHS[name]):
        posterior_of(mlp()[0], "regression", **{name: torch.ones(5)})


def test_observation_noise_is_of_regression():
    with pytest.raises(ValueError, match="regression"):
        posterior_of(mlp()[0], "classification", sigma_noise=0.7)
    la = fitted("MLP", "classification", rank=3)[0]
    with pytest.raises(ValueError, match="regression"):
        la.sigma_noise = 0.7


AMOUNTS = {
    "rank 0": {"rank": 0},
    "rank negative": {"rank": -3},
    "share 0": {"direction_samples": 0.0},
    "share 1": {"direction_samples": 1.0},
    "share above 1": {"direction_samples": 1.5},
    "share negative": {"magnitude_samples": -0.2},
    "share NaN": {"direction_samples": math.nan},
    "no samples": {"magnitude_samples": 0},
    "fewer than no samples": {"direction_samples": -4},
}


@pytest.mark.parametrize("case", AMOUNTS)
def test_amounts_out_of_range(case):
    (name, value), *_ = AMOUNTS[case].items()
    with pytest.raises(ValueError, match=rf"(?s){name}.*{value}"):
        posterior_of(mlp()[0], "classification", **AMOUNTS[case])


# --- loaders, samples and models ---


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(mlp()[1], targets("classification"), strict=True)


def data(likelihood="classification"):
    return TensorDataset(mlp()[1], targets(likelihood))


def changed(likelihood, change_x=None, change_y=None):
    X, y = mlp()[1].clone(), targets(likelihood)
    return DataLoader(TensorDataset(change_x(X) if change_x else X, change_y(y) if change_y else y), batch_size=16)


def put(value):
    def change(t):
        t = t.clone()
        t[33] = value
        return t

    return change


CLASSIFICATION, REGRESSION = "classification", "regression"
LOADERS = {
    "empty": (CLASSIFICATION, {}, lambda: DataLoader(Subset(data(), []), batch_size=4), "no samples"),
    "empty list": (CLASSIFICATION, {}, list, "empty"),
    "iterable data set": (CLASSIFICATION, {}, lambda: DataLoader(Stream(), batch_size=4), "map-style.*Stream"),
    "no batches": (CLASSIFICATION, {}, lambda: DataLoader(data(), batch_size=None), "batch_size=None"),
    "two samples": (CLASSIFICATION, {}, lambda: DataLoader(Subset(data(), [0, 1])), "at least 2"),
    "nothing for the magnitudes": (
        CLASSIFICATION,
        {"direction_samples": 40},
        lambda: DataLoader(data(), batch_size=8),
        "leave 0 for the magnitudes",
    ),
    "more than there are": (
        CLASSIFICATION,
        {"direction_samples": 25, "magnitude_samples": 20},
        lambda: DataLoader(data(), batch_size=8),
        r"25 \+ 20.*40",
    ),
    "more directions than there are": (
        CLASSIFICATION,
        {"direction_samples": 41},
        lambda: DataLoader(data(), batch_size=8),
        "direction_samples.*40.*41",
    ),
    "with replacement": (
        CLASSIFICATION,
        {},
        lambda: DataLoader(data(), batch_size=8, sampler=RandomSampler(data(), replacement=True, num_samples=60)),
        "more than once.*without replacement",
    ),
    "oversampling": (
        CLASSIFICATION,
        {},
        lambda: DataLoader(data(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 60)),
        "more than once",
    ),
    "NaN inputs": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, put(math.nan)), "finite inputs; 1 of"),
    "infinite inputs": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, put(math.inf)), "finite inputs; 1 of"),
    "NaN targets": (REGRESSION, {}, lambda: changed(REGRESSION, None, put(math.nan)), "finite targets; 1 of"),
    "targets (n,)": (REGRESSION, {}, lambda: changed(REGRESSION, None, lambda y: y[:, 0]), r"\(8, 3\).*\(8,\)"),
    "targets (n, 1)": (REGRESSION, {}, lambda: changed(REGRESSION, None, lambda y: y[:, :1]), r"3\).*1\)"),
    "integer targets": (REGRESSION, {}, lambda: changed(REGRESSION, None, lambda y: y.long()), "floats.*int64"),
    "label too large": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, None, put(3)), "between 0 and 2.*3"),
    "label negative": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, None, put(-1)), "between 0 and 2.*-1"),
    "float labels": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, None, lambda y: y.double()), "integers"),
    "one-hot labels": (
        CLASSIFICATION,
        {},
        lambda: changed(CLASSIFICATION, None, lambda y: nn.functional.one_hot(y, 3)),
        "integers of shape",
    ),
    "inputs of another width": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, lambda X: X[:, :3]), "could not"),
    "inputs of another type": (CLASSIFICATION, {}, lambda: changed(CLASSIFICATION, lambda X: X.float()), "could not"),
}


@pytest.mark.parametrize("case", LOADERS)
def test_loaders_that_cannot_be_used(case, monkeypatch):
    likelihood, options, make, message = LOADERS[case]
    model, X = mlp()
    la = posterior_of(model, likelihood, **hyper_parameters(likelihood), **options)
    loader = make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr("debiased_laplace.posterior.fit.estimate", no_long_work)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        la.fit(loader)
    with pytest.raises(ValueError, match="not fitted"):
        la(X)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        assert la.n_data == 0


def no_long_work(*args):
    raise AssertionError("long work has begun")


@pytest.mark.parametrize("n_data", [39, 1, 0, -5])
def test_n_data_below_the_samples_given(n_data):
    la = posterior_of(mlp()[0], "classification", direction_samples=5, magnitude_samples=5)
    with pytest.raises(ValueError, match=f"at least 40, got {n_data}"):
        la.fit(DataLoader(data(), batch_size=8), n_data=n_data)


class Returning(nn.Module):
    """An MLP whose outputs are passed through something."""

    def __init__(self, through):
        super().__init__()
        self.inner, self.through = mlp()[0], through

    def forward(self, x):
        return self.through(self.inner(x))


def with_weight(value):
    model = mlp()[0]
    with torch.no_grad():
        model[2].weight[1, 2] = value
    return model


def frozen():
    return mlp()[0].requires_grad_(False)


MODELS_TO_REFUSE = {
    "NaN weights": (lambda: with_weight(math.nan), "finite weights.*2.weight"),
    "infinite weights": (lambda: with_weight(math.inf), "finite weights.*2.weight"),
    "nothing trainable": (frozen, "no trainable parameters"),
    "NaN outputs": (lambda: Returning(lambda f: f / (f - f)), "NaN or infinite"),
    "one dimension": (lambda: Returning(lambda f: f[:, 0]), r"\(8, outputs\).*\(8,\)"),
    "three dimensions": (lambda: Returning(lambda f: f[:, None]), r"\(8, 1\) for outputs \(8, 1, 3\).*shape \(8,\)"),
    "a tuple": (lambda: Returning(lambda f: (f, f)), "return a tensor.*with a tensor of logits; got tuple"),
    "one logit": (lambda: Returning(lambda f: f[:, :1]), "at least 2 outputs"),
    "random": (lambda: Returning(lambda f: f + torch.randn_like(f)), "different outputs for the same inputs"),
    "mixing samples": (lambda: Returning(lambda f: f - f.mean(0)), "depends on the other samples"),
    "two precisions": (lambda: nn.Sequential(mlp()[0], nn.Linear(3, 3)), "one dtype"),
}


@pytest.mark.parametrize("case", MODELS_TO_REFUSE)
def test_models_that_cannot_be_used(case):
    make, message = MODELS_TO_REFUSE[case]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        posterior_of(make(), "classification").fit(DataLoader(data(), batch_size=16))


# --- prediction ---

CALLS = {
    "unknown predictive": (lambda la, x: la(x, pred_type="gp"), "'glm', 'nn'.*'gp'"),
    "unknown link": (lambda la, x: la(x, link_approx="logit"), "'mean_field', 'probit', 'mc'.*'logit'"),
    "networks by probit": (lambda la, x: la(x, pred_type="nn"), "expected link_approx='mc', got 'mean_field'"),
    "NaN inputs": (lambda la, x: la(x * math.nan), "finite inputs"),
    "infinite inputs of functions": (lambda la, x: la.functional_samples(x / 0), "finite inputs"),
    "no inputs": (lambda la, x: la(x[:0]), "at least one sample"),
    "no draws": (lambda la, x: la(x, link_approx="mc", n_samples=0), "n_samples"),
    "fewer than no weights": (lambda la, x: la.sample(-2), "n_samples"),
    "log density of a part": (lambda la, x: la.log_prob(la.mean[:5]), r"93\); got \(5,\)"),
    "log density of one number": (lambda la, x: la.log_prob(la.mean[:1]), r"93\); got \(1,\)"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_cannot_be_answered(case):
    call, message = CALLS[case]
    la, X, _, _ = fitted("MLP", "classification", rank=3)
    with pytest.raises(ValueError, match=message):
        call(la, X)


def test_one_drawn_network_has_no_variance():
    la, X, _, _ = fitted("MLP", "regression", rank=3)
    with pytest.raises(ValueError, match="at least 2; got 1"):
        la(X, pred_type="nn", link_approx="mc", n_samples=1)


# --- held-out KL ---


def judged(**options):
    model, X = MODELS["MLP"]()
    dataset = TensorDataset(X, targets("classification"))
    la = posterior_of(model, "classification", **{**hyper_parameters("classification"), **options})
    la.fit(DataLoader(Subset(dataset, range(20)), batch_size=8), n_data=40)
    return la, dataset


@pytest.mark.parametrize(
    "overlapping",
    [
        lambda d: Subset(d, [19, 20, 21]),
        lambda d: Subset(Subset(d, list(range(15, 40))), [4, 5, 6]),
        lambda d: TensorDataset(d.tensors[0][[3, 30]], d.tensors[1][[3, 30]]),
        lambda d: ConcatDataset([Subset(d, [30]), Subset(d, [0])]),
    ],
)
def test_fitted_samples_are_refused_for_judging(overlapping, monkeypatch):
    la, dataset = judged()
    monkeypatch.setattr("debiased_laplace.posterior.held_out_kl.sample_terms", no_long_work)
    with pytest.raises(OverlapError, match="1 of the"):
        la.held_out_kl(DataLoader(overlapping(dataset)), DataLoader(Subset(dataset, range(20))))


FITTED_LOADERS = {
    "one too few": lambda d: Subset(d, range(19)),
    "one other": lambda d: Subset(d, [*range(19), 25]),
    "one more": lambda d: Subset(d, range(21)),
}


@pytest.mark.parametrize("case", FITTED_LOADERS)
def test_fitted_loader_of_other_samples(case, monkeypatch):
    la, dataset = judged()
    monkeypatch.setattr("debiased_laplace.posterior.held_out_kl.sample_terms", no_long_work)
    with pytest.raises(ValueError, match="the 20 samples that were fitted; it yields"):
        la.held_out_kl(DataLoader(Subset(dataset, range(30, 40))), DataLoader(FITTED_LOADERS[case](dataset)))


def test_held_out_kl_without_what_it_needs(monkeypatch):
    la, dataset = judged()
    rest = DataLoader(Subset(dataset, range(20, 40)), batch_size=7)
    monkeypatch.setattr("debiased_laplace.posterior.held_out_kl.sample_terms", no_long_work)
    for fitted_loader in (None, DataLoader(Subset(dataset, range(20)))):
        with pytest.raises(ValueError, match="20 of 40 samples were fitted"):
            la.held_out_kl(None, fitted_loader)
    la.fit(DataLoader(dataset, batch_size=8))
    with pytest.raises(ValueError, match="All 40 samples were fitted"):
        la.held_out_kl(rest)
    la.fit(DataLoader(Subset(dataset, range(20)), batch_size=8), n_data=21)
    with pytest.raises(ValueError, match="leaves 1 samples out of the fit; the loader yields 20"):
        la.held_out_kl(rest, DataLoader(Subset(dataset, range(20))))


def test_held_out_targets_must_fit():
    la, dataset = judged()
    X = dataset.tensors[0][30:]
    with pytest.raises(ValueError, match="soft labels as probabilities"):
        la.held_out_kl(loader_of(X, torch.randn(10, 3)), DataLoader(Subset(dataset, range(20))))


def test_a_missing_share_is_pointed_out():
    la, dataset = judged()
    with pytest.warns(UserWarning, match="50% of the data"):
        la.held_out_kl(DataLoader(Subset(dataset, range(20, 40))))


@pytest.mark.parametrize("other", [{"prior_precision": 0.5}, {"temperature": 1.4}])
def test_differences_over_other_constants(other):
    (la, dataset), (different, _) = judged(), judged(**other)
    loaders = DataLoader(Subset(dataset, range(20, 40))), DataLoader(Subset(dataset, range(20)))
    with pytest.raises(ValueError, match="compare only between posteriors of the same"):
        _ = la.held_out_kl(*loaders) - different.held_out_kl(*loaders)


def test_differences_over_other_samples():
    (la, dataset), (other, _) = judged(), judged(rank=2)
    inside = DataLoader(Subset(dataset, range(20)))
    first = la.held_out_kl(DataLoader(Subset(dataset, range(20, 30))), inside)
    for indices in (range(21, 31), range(20, 31)):
        second = other.held_out_kl(DataLoader(Subset(dataset, indices)), inside)
        with pytest.raises(ValueError, match="is paired; expected the same held-out samples"):
            _ = first - second
    with pytest.raises(TypeError):
        _ = first - 1.0
