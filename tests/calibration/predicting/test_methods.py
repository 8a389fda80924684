"""What may be handed to `evaluate`, and what is said of the rest."""

import inspect

import pytest
import torch
from laplace import Laplace
from laplace.baselaplace import BaseLaplace
from models import mlp, targets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, calibration_report, evaluate
from debiased_laplace.calibration.predicting.methods import choose_prediction, read_methods
from debiased_laplace.errors import NotFittedError

C = 3


def problem(likelihood="classification"):
    model, X = mlp()
    return model, X, DataLoader(TensorDataset(X, targets(likelihood)), batch_size=11)


def fitted(likelihood="classification", model=None, **options):
    net, _, loader = problem(likelihood)
    la = DebiasedLaplace(model or net, likelihood, prior_precision=0.4, **options)
    la.fit(loader)
    return la


class WithoutModel(BaseLaplace):
    """A posterior that has no network, as an ensemble of them."""

    def __init__(self):
        self.likelihood, self.n_data = "classification", 5
        self._prior_precision, self._sigma_noise, self.temperature = torch.tensor([0.4]), torch.tensor(1.0), 1.3

    def _glm_predictive_distribution(self, x):
        return x[:, :C], torch.zeros(len(x), C, C)

    @property
    def prior_precision(self):
        return self._prior_precision

    def log_marginal_likelihood(self):
        raise NotImplementedError("it has none")


def uniform(x):
    return torch.full((len(x), C), 1 / C)


def test_map_comes_first_and_only_where_it_is_missing():
    model, _, loader = problem()
    la = fitted()
    shown = {
        "added": {"laplace": la},
        "a network is there": {"laplace": la, "net": model},
        "a method of that name is there": {"laplace": la, "MAP": uniform},
        "nobody has a network": {"laplace": WithoutModel()},
    }
    found = {case: list(evaluate(methods, loader, task="multiclass").methods) for case, methods in shown.items()}
    assert found == {
        "added": ["map", "laplace"],
        "a network is there": ["laplace", "net"],
        "a method of that name is there": ["laplace", "MAP"],
        "nobody has a network": ["laplace"],
    }


def test_map_is_left_out_for_another_baseline_or_on_request():
    _, _, loader = problem()
    methods = {"laplace": fitted(), "uniform": uniform}
    report = evaluate(methods, loader, task="multiclass", baseline="uniform")
    assert (list(report.methods), report.baseline) == (["laplace", "uniform"], "uniform")
    assert list(evaluate(methods, loader, task="multiclass", include_map=False).methods) == ["laplace", "uniform"]
    report = evaluate(methods, loader, task="multiclass", baseline="uniform", include_map=True)
    assert (list(report.methods), report.baseline) == (["map", "laplace", "uniform"], "uniform")


def test_a_posterior_without_a_network_is_reported_as_far_as_it_is_known():
    report = evaluate({"laplace": WithoutModel()}, problem()[2], task="multiclass")
    summary = report.posteriors["laplace"]
    assert (summary.kind, summary.prior_low, summary.temperature) == ("WithoutModel", pytest.approx(0.4), 1.3)
    assert summary.log_marginal_likelihood is None
    assert any("it has none" in note for note in summary.notes)
    assert "WithoutModel" in report.to_html()


class Softmaxed(nn.Module):
    def forward(self, x):
        return x[:, :C].softmax(-1)


class Flat(nn.Module):
    def forward(self, x):
        return x[:, :1]


REFUSED = {
    "nothing": ({}, {}, "at least one"),
    "no method": ({"m": 3.0}, {}, "'m' must be a Laplace posterior"),
    "a network that ends in a softmax": ({"m": Softmaxed()}, {}, "are probabilities"),
    "a network with one output": ({"m": Flat()}, {}, "at least 2 classes"),
    "too few predictions": ({"m": lambda x: uniform(x)[1:]}, {}, "for n = 11 inputs"),
    "logits from a callable": ({"m": lambda x: 3 * x[:, :C]}, {}, "must lie in"),
    "logits as samples": ({"m": lambda x: x[:, :C].expand(4, -1, -1)}, {}, "must lie in"),
    "no tensor": ({"m": lambda x: "yes"}, {}, "expected an array"),
    "a closed form of drawn networks": (
        {"m": uniform},
        {"pred_type": "nn", "link_approx": "probit"},
        "expected link_approx='mc'",
    ),
    "one draw": ({"m": uniform}, {"n_samples": 1}, "n_samples must be"),
    "a negative seed": ({"m": uniform}, {"seed": -1}, "seed must be"),
    "a MAP that is nowhere": ({"m": uniform}, {"include_map": True}, "none of the posteriors has a network"),
    "a baseline that is nowhere": ({"m": uniform}, {"baseline": "x"}, "baseline must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    methods, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        evaluate(methods, problem()[2], **{"task": "multiclass", **options})


UNTYPED = {
    "an unknown task": (("classification", "glm", None, 5, 0), "task must be one of"),
    "an unknown predictive": (("multiclass", "gp", None, 5, 0), "pred_type must be"),
    "an unknown link": (("multiclass", "glm", "logit", 5, 0), "link_approx must be one of"),
}


@pytest.mark.parametrize("case", UNTYPED)
def test_refused_where_no_type_checker_looks(case):
    values, message = UNTYPED[case]
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(choose_prediction)(*values)


def test_methods_have_names():
    with pytest.raises(ValueError, match="must map names to methods, at least one; got list"):
        inspect.unwrap(read_methods)([uniform], None, None)


def test_reward_models_and_other_likelihoods_are_refused():
    model, _, loader = problem()
    reward = DebiasedLaplace(model, "reward_modeling")
    with pytest.raises(ValueError, match=r"reward model.*fitting=True"):
        evaluate({"r": reward}, loader, task="multiclass")
    with pytest.raises(ValueError, match="likelihood 'regression'; got task='multiclass'"):
        evaluate({"r": fitted("regression")}, loader, task="multiclass")


@pytest.mark.parametrize(
    "make", [lambda m: DebiasedLaplace(m, "classification"), lambda m: Laplace(m, "classification", "all", "diag")]
)
def test_posteriors_that_are_not_fitted_are_refused(make):
    with pytest.raises(NotFittedError):
        evaluate({"la": make(problem()[0])}, problem()[2], task="multiclass")


def test_weights_that_changed_since_the_fit_are_refused():
    la = fitted()
    with torch.no_grad():
        next(la.model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="changed since the fit"):
        evaluate({"la": la}, problem()[2], task="multiclass")


def test_regression_needs_the_noise():
    model, _, loader = problem("regression")
    with pytest.raises(ValueError, match=r"'net'.*expected sigma_noise"):
        evaluate({"net": model}, loader, task="regression")
    report = evaluate({"net": model}, loader, task="regression", sigma_noise=[0.2, 0.5, 0.8])
    assert report.metrics["net"]["sharpness"].value == pytest.approx(0.5, rel=1e-6)
    report = evaluate({"net": model, "la": fitted("regression", sigma_noise=0.6)}, loader, task="regression")
    assert report.metrics["net"]["sharpness"].value == pytest.approx(0.6, rel=1e-6)


BATCHES = {
    "no batches": ([], "yields no samples"),
    "empty batches": ([(torch.zeros(0, 4), torch.zeros(0))], "yields no samples"),
    "inputs alone": ([torch.zeros(2, 4)], "Expected batches of two tensors"),
    "NaN": ([(torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.long))], "2 of 2 samples"),
    "unequal lengths": ([(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))], "2 inputs but 3 targets"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_that_are_none(case):
    batches, message = BATCHES[case]
    with pytest.raises(ValueError, match=message):
        evaluate({"m": uniform}, batches, task="multiclass")


def test_any_iterable_of_batches_will_do(capsys):
    X, y = mlp()[1], targets("classification")
    whole = evaluate({"m": uniform}, [(X, y)], task="multiclass")
    parts = evaluate(
        {"m": uniform}, ((X[i : i + 9], y[i : i + 9]) for i in range(0, 40, 9)), task="multiclass", progress_bar=True
    )
    assert whole.metrics == parts.metrics
    assert whole.data == parts.data
    assert "[Predicting the test set]: 5it" in capsys.readouterr().err


def test_evaluate_takes_every_option_of_the_report():
    """All but what it finds out itself; an option added to `calibration_report` has to be passed on here too."""
    report = inspect.signature(calibration_report).parameters
    own = {"predictions", "targets", "posteriors", "observation_noise", "validation", "logits", "ood"}
    here = inspect.signature(evaluate).parameters
    assert {name for name in report if name not in here} <= own
    for name in (set(report) & set(here)) - {"task", "posteriors"}:
        assert here[name].default == report[name].default, name
