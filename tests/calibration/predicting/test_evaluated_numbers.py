"""The numbers of a report are those of calling each method by hand."""

import warnings
from functools import cache

import pytest
import torch
from laplace import Laplace
from models import mlp, targets
from torch.distributions import Normal
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate
from debiased_laplace.predictive.mean_field import GaussianLogits

SIGMA, PRIOR, TEMPERATURE, N = 0.7, 0.4, 1.3, 40
TASKS = {"classification": "multiclass", "regression": "regression"}
OURS = [
    (subset, structure, magnitudes)
    for subset in ("all", "last_layer", "subnetwork")
    for structure in ("lowrank", "kron", "full")
    for magnitudes in ("cross_fitted", "held_out")
    if not (subset == "subnetwork" and structure == "kron")
]
THEIRS = [("all", "diag"), ("all", "kron"), ("all", "full"), ("last_layer", "full"), ("subnetwork", "full")]


def hyper_parameters(likelihood):
    options = {"prior_precision": PRIOR, "temperature": TEMPERATURE}
    return options | ({"sigma_noise": SIGMA} if likelihood == "regression" else {})


@cache
def problem(likelihood, n_outputs=3):
    model, X = mlp(n_outputs)
    return model, TensorDataset(X, targets(likelihood, n_outputs=n_outputs))


def loader(likelihood, batch_size=13, n_outputs=3):
    return DataLoader(problem(likelihood, n_outputs)[1], batch_size=batch_size)


@cache
def ours(likelihood, subset="all", structure="lowrank", magnitudes="cross_fitted", n_outputs=3):
    model, data = problem(likelihood, n_outputs)
    indices = {"subnetwork_indices": torch.arange(10, 50)} if subset == "subnetwork" else {}
    la = DebiasedLaplace(
        model, likelihood, subset, structure, magnitudes=magnitudes, **hyper_parameters(likelihood), **indices
    )
    la.fit(DataLoader(Subset(data, range(24)), batch_size=8), n_data=N)
    return la


@cache
def theirs(likelihood, subset, structure, n_outputs=3):
    model, data = problem(likelihood, n_outputs)
    indices = {"subnetwork_indices": torch.arange(10, 50)} if subset == "subnetwork" else {}
    la = Laplace(model, likelihood, subset, structure, **hyper_parameters(likelihood), **indices)
    la.fit(DataLoader(data, batch_size=8))
    return la


def by_hand(la, x, y, likelihood):
    """Mean negative log-likelihood, and mean standard deviation in regression."""
    if likelihood == "classification":
        # of either library, as the default link: with `la(x)` links would be compared, and not posteriors
        p = GaussianLogits.of_covariance(*la._glm_predictive_distribution(x)).probabilities().double()
        return -p.gather(1, y[:, None]).log().mean().item(), None
    mean, variance = (t.double() for t in la(x))
    std = (variance.diagonal(dim1=-2, dim2=-1) + SIGMA**2).sqrt()
    return -Normal(mean, std).log_prob(y).mean().item(), std.mean().item()


def check(la, likelihood, n_outputs=3):
    x, y = problem(likelihood, n_outputs)[1].tensors
    report = evaluate({"laplace": la}, loader(likelihood, n_outputs=n_outputs), task=TASKS[likelihood])
    nll, sharpness = by_hand(la, x, y, likelihood)
    metrics = report.metrics["laplace"]
    if n_outputs == 1 or likelihood == "classification":
        assert metrics["nll"].value == pytest.approx(nll, rel=1e-6)
    if sharpness is not None:
        assert metrics["sharpness"].value == pytest.approx(sharpness, rel=1e-6)
        # the noise dominates neither, so that forgetting or doubling it would be seen
        assert sharpness > 1.01 * SIGMA


@pytest.mark.parametrize("likelihood", TASKS)
@pytest.mark.parametrize(("subset", "structure", "magnitudes"), OURS)
def test_debiased_posteriors(subset, structure, magnitudes, likelihood):
    check(ours(likelihood, subset, structure, magnitudes), likelihood)


@pytest.mark.parametrize("likelihood", TASKS)
@pytest.mark.parametrize(("subset", "structure"), THEIRS)
def test_laplace_torchs_posteriors(subset, structure, likelihood):
    check(theirs(likelihood, subset, structure), likelihood)


@pytest.mark.parametrize(
    "make", [lambda: ours("regression", n_outputs=1), lambda: theirs("regression", "all", "kron", 1)]
)
def test_regression_with_one_output(make):
    check(make(), "regression", n_outputs=1)


def test_the_noise_is_added_exactly_once_for_every_kind_of_method():
    """A function variance of zero leaves sigma alone: sigma it has to be, not 0, sqrt(2) sigma or sigma squared."""
    model, data = problem("regression")
    report = evaluate(
        {
            "laplace": ours("regression"),
            "laplace-torch": theirs("regression", "all", "diag"),
            "network": model,
            "draws": lambda x: model(x).detach().repeat(4, 1, 1),
            "pair": lambda x: (model(x), torch.full((len(x), 3), 0.33)),
        },
        loader("regression"),
        task="regression",
    )
    found = {name: m["sharpness"].value for name, m in report.metrics.items()}
    assert found["network"] == pytest.approx(SIGMA, rel=1e-9)
    assert found["draws"] == pytest.approx(SIGMA, rel=1e-9)
    assert found["pair"] == pytest.approx(0.33, rel=1e-6)
    for name, la in (("laplace", ours("regression")), ("laplace-torch", theirs("regression", "all", "diag"))):
        variance = la(data.tensors[0])[1].diagonal(dim1=-2, dim2=-1).double()
        assert found[name] == pytest.approx((variance + SIGMA**2).sqrt().mean().item(), rel=1e-6)


def test_laplace_torch_leaves_the_noise_out_of_its_variance():
    """What the sum above rests on: the variance of `la(x)` does not know sigma but through the posterior."""
    x = problem("regression")[1].tensors[0]
    la = Laplace(problem("regression")[0], "regression", "all", "diag", prior_precision=1e9, sigma_noise=5.0)
    la.fit(loader("regression"))
    assert la(x)[1].abs().max() < 1e-4


@pytest.mark.parametrize("link", ["mean_field", "probit", "bridge", "bridge_norm"])
def test_links(link):
    la, (x, y) = ours("classification"), problem("classification")[1].tensors
    report = evaluate({"laplace": la}, loader("classification"), task="multiclass", link_approx=link)
    expected = -la(x, link_approx=link).gather(1, y[:, None]).log().mean().item()
    assert report.metrics["laplace"]["nll"].value == pytest.approx(expected, rel=1e-9)
    assert report.predicted["laplace"].link == link
    assert report.predicted["laplace"].n_samples is None


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_draws_are_the_predictive_samples_of_the_posterior(source, pred_type):
    la = ours("classification") if source == "ours" else theirs("classification", "all", "kron")
    x, y = problem("classification")[1].tensors
    report = evaluate(
        {"laplace": la},
        loader("classification", batch_size=N),
        task="multiclass",
        pred_type=pred_type,
        link_approx="mc",
        n_samples=30,
        seed=7,
    )
    samples = la.predictive_samples(x, pred_type, n_samples=30, generator=torch.Generator().manual_seed(7))
    expected = -samples.mean(0).gather(1, y[:, None]).log().mean().item()
    assert report.metrics["laplace"]["nll"].value == pytest.approx(expected, rel=1e-9)
    assert report.predicted["laplace"].n_samples == 30
    assert any("30 draws" in w for w in report.warnings)


def test_regression_by_drawn_networks():
    la, x = ours("regression"), problem("regression")[1].tensors[0]
    report = evaluate({"laplace": la}, loader("regression"), task="regression", pred_type="nn", n_samples=20, seed=3)
    samples = la.predictive_samples(x, "nn", n_samples=20, generator=torch.Generator().manual_seed(3))
    expected = (samples.var(0) + SIGMA**2).sqrt().mean().item()
    assert report.metrics["laplace"]["sharpness"].value == pytest.approx(expected, rel=1e-9)


def test_map_is_the_softmax_of_the_network_and_the_baseline():
    model, data = problem("classification")
    x, y = data.tensors
    report = evaluate(ours("classification"), loader("classification"), task="multiclass")
    assert list(report.methods) == ["map", "laplace"]
    assert report.baseline == "map"
    expected = torch.nn.functional.cross_entropy(model(x), y).item()
    assert report.metrics["map"]["nll"].value == pytest.approx(expected, rel=1e-9)


def test_networks_and_callables_in_half_precision_and_numpy():
    model, _data = problem("classification")
    report = evaluate(
        {
            "network": model,
            "numpy": lambda x: model(x).softmax(-1).detach().numpy(),
            "half": lambda x: model(x).softmax(-1).half(),
            "samples": lambda x: model(x).softmax(-1).expand(150, -1, -1),
        },
        loader("classification"),
        task="multiclass",
    )
    reference = report.metrics["network"]["nll"].value
    assert report.metrics["numpy"]["nll"].value == pytest.approx(reference, rel=1e-12)
    assert report.metrics["samples"]["nll"].value == pytest.approx(reference, rel=1e-12)
    assert report.metrics["half"]["nll"].value == pytest.approx(reference, rel=1e-2)
    assert report.predicted["samples"].n_samples == 150


def test_binary_network_with_one_logit():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = torch.nn.Linear(4, 1).double()
    x = problem("classification")[1].tensors[0]
    y = (x[:, 0] > 0).long()
    batches = DataLoader(TensorDataset(x, y), batch_size=9)
    report = evaluate({"one logit": model}, batches, task="binary")
    expected = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.double()).item()
    assert report.metrics["one logit"]["nll"].value == pytest.approx(expected, rel=1e-9)


def test_enable_backprop_keeps_no_graph():
    model, data = problem("classification")
    la = DebiasedLaplace(model, "classification", enable_backprop=True, prior_precision=PRIOR)
    la.fit(DataLoader(data, batch_size=8))
    x, y = data.tensors
    report = evaluate({"laplace": la}, loader("classification"), task="multiclass")
    expected = -la(x).detach().gather(1, y[:, None]).log().mean().item()
    assert report.metrics["laplace"]["nll"].value == pytest.approx(expected, rel=1e-9)


def test_inside_inference_mode():
    report = evaluate(ours("classification"), loader("classification"), task="multiclass")
    with torch.inference_mode():
        again = evaluate(ours("classification"), loader("classification"), task="multiclass")
    assert again.metrics == report.metrics


def test_no_python_warning_is_given_for_few_draws():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate(
            ours("classification"), loader("classification"), task="multiclass", pred_type="nn", n_samples=5
        )
    assert "Only 5 draws" in report.warnings[0]
