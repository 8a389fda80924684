from collections.abc import Callable
from typing import Any

import pytest
import torch
from laplace import Laplace
from models import MODELS, mlp, targets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import (
    DebiasedLaplace,
    DebiasedNewton,
    diagnose,
    directional_derivatives,
    evaluate,
    held_out_kl,
    newton_step,
)
from debiased_laplace.curvature.classification import are_probabilities
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.first_pass import checked_outputs, first_pass, prepare_network
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch


class Wrapped(nn.Module):
    """A layer followed by a function of its outputs."""

    def __init__(self, change: Callable[[Tensor], Any]):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3).double()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.layer(x))


def meet(model: nn.Module, likelihood: str, X: Tensor, y: Tensor) -> Network:
    return prepare_network(ParameterSelection.all_weights(model), likelihood_named(likelihood), Batch(X, y))


MET = {
    **{name: (name, "classification", 40) for name in MODELS},
    "one sample": ("MLP", "classification", 1),
    "two samples": ("convolutions and pooling", "classification", 2),
    "regression": ("BatchNorm", "regression", 40),
    "regression, one sample": ("MLP", "regression", 1),
}


@pytest.mark.parametrize("case", MET)
def test_a_network_that_works_is_prepared(case: str) -> None:
    name, likelihood, n = MET[case]
    model, X = MODELS[name]()
    with differentiable_kernels(model):
        network = meet(model, likelihood, X[:n], targets(likelihood, n))
    assert network.n_outputs == 3
    assert network.likelihood.name == likelihood
    assert network.n_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert network.like.shape == (network.n_parameters,)
    assert network.like.dtype == torch.float64
    # later training does not reach the network
    with torch.no_grad():
        before = network.outputs(X)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    assert torch.equal(network.outputs(X), before)


def normalized_over_the_batch(f: Tensor) -> Tensor:
    return f - f.mean(0)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "samples that influence each other": (normalized_over_the_batch, "depends on the other samples"),
    "samples that are sorted": (lambda f: f.sort(0).values, "depends on the other samples"),
    "dropout that does not rest": (
        lambda f: nn.functional.dropout(f, 0.5, training=True),
        "different outputs for the same inputs",
    ),
    "noise": (lambda f: f + torch.randn_like(f), "different outputs for the same inputs"),
    "NaN": (lambda f: f / 0 * 0, "NaN or infinite"),
    "infinity": (lambda f: f / 0, "NaN or infinite"),
    "one dimension": (lambda f: f[:, 0], r"shape \(8, outputs\) for 8 samples; got \(8,\)"),
    "three dimensions": (lambda f: f[:, :, None], r"\(8, 3\) for outputs \(8, 3, 1\)"),
    "samples merged": (lambda f: f.reshape(-1, 1), r"got \(24, 1\)"),
    "samples along the second dimension": (lambda f: f.T, r"got \(3, 8\)"),
    "a tuple": (lambda f: (f, f), "return a tensor.*; got tuple"),
    "a dictionary": (lambda f: {"scores": f}, "return a tensor.*; got dict with keys"),
    "one output": (lambda f: f[:, :1], "at least 2 outputs"),
    "too few outputs for the labels": (lambda f: f[:, :2], "labels between 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_networks_that_are_not_one_output_row_per_sample(case: str) -> None:
    change, message = REFUSED[case]
    X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert int(targets("classification", 8).max()) == 2
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        meet(Wrapped(change), "classification", X, targets("classification"))


def test_a_batch_normalization_that_still_trains_is_refused_and_leaves_its_weights() -> None:
    model, X = MODELS["BatchNorm"]()
    model[1].train()
    weights = model[1].weight.detach().clone()
    with pytest.raises(ValueError, match=r"depends on the other samples|different outputs"):
        meet(model, "classification", X, targets("classification"))
    assert torch.equal(model[1].weight, weights)


INPUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "wrong width": (lambda X: X[:, :3], r"could not be evaluated on a batch of inputs of shape \(8, 3\)"),
    "wrong dtype": (lambda X: X.float(), "float32"),
    "NaN": (lambda X: X / 0 * 0, "finite inputs"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_refuses_inputs_that_the_model_cannot_read(case: str) -> None:
    spoil, message = INPUTS[case]
    model, X = mlp()
    with pytest.raises(ValueError, match=message):
        meet(model, "classification", spoil(X), targets("classification"))


def test_a_model_that_cannot_take_a_single_sample_is_refused() -> None:
    def fails_alone(f: Tensor) -> Tensor:
        if len(f) == 1:
            raise RuntimeError("one sample is not enough")
        return f

    _, X = mlp()
    with pytest.raises(ValueError, match="one sample is not enough"):
        meet(Wrapped(fails_alone), "classification", X, targets("classification"))


def test_valid_outputs_are_returned() -> None:
    batch = Batch(torch.zeros(5, 2), torch.zeros(5))
    outputs = torch.ones(5, 3)
    assert checked_outputs(outputs, batch) is outputs


def look(likelihood: str = "classification", *, keep: bool = False, spoil: Any = None, batch_size: int = 7) -> Any:
    model, X = mlp()
    y = targets(likelihood)
    network = meet(model, likelihood, X, y)
    X, y = X.clone(), y.clone()
    if spoil is not None:
        spoil(X, y)
    source = sample_source([(X[i : i + batch_size], y[i : i + batch_size]) for i in range(0, 40, batch_size)], 0)
    samples = SubBatch(source, torch.arange(40), torch.device("cpu"), 0)
    return first_pass(network, samples, keep=keep, progress_bar=False), model, X, y


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_first_pass_finds_hashes_and_the_loss(likelihood: str) -> None:
    found, model, X, y = look(likelihood)
    assert torch.equal(found.hashes, sample_hashes(Batch(X, y)))
    with torch.no_grad():
        f = model(X)
    loss = nn.functional.cross_entropy(f, y, reduction="sum") if y.ndim == 1 else 0.5 * (f - y).square().sum()
    assert found.loss == pytest.approx(float(loss), rel=1e-12)
    assert len(found.samples) == 40


@pytest.mark.parametrize(
    ("limit", "keep", "kept"),
    [(10**9, False, True), (0, False, False), (0, True, True), (7 * 40 + 1, False, False)],
    ids=["small", "too large", "too large but asked for", "too large after the first batch"],
)
def test_samples_are_kept_if_they_fit_or_must(
    limit: int, keep: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("debiased_laplace.curvature.first_pass.KEEP_BYTES", limit)
    found, _, X, y = look(keep=keep)
    assert (found.samples.kept is not None) == kept
    batches = list(found.samples)
    assert torch.equal(torch.cat([b.inputs for b in batches]), X)
    assert torch.equal(torch.cat([b.targets for b in batches]), y)


LATE: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "NaN in the last input": (lambda X, _: X[39].fill_(float("nan")), "finite inputs"),
    "a label out of range in the last batch": (lambda _, y: y[39:].fill_(3), "between 0 and 2"),
}


@pytest.mark.parametrize("case", LATE)
def test_the_first_pass_checks_every_sample(case: str) -> None:
    spoil, message = LATE[case]
    with pytest.raises(ValueError, match=message):
        look(spoil=spoil)


def test_the_first_pass_refuses_outputs_that_overflow_on_a_late_sample() -> None:
    _, X = mlp()
    X, y = X.clone(), targets("classification")
    network = meet(Wrapped(torch.exp), "classification", X, y)
    X[39] *= 1e6
    samples = SubBatch(sample_source([(X, y)], 0), torch.arange(40), torch.device("cpu"), 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        first_pass(network, samples, keep=False, progress_bar=False)


def test_the_first_pass_can_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model, X = mlp()
    y = targets("classification")
    network = meet(model, "classification", X, y)
    samples = SubBatch(sample_source([(X, y)], 0), torch.arange(40), torch.device("cpu"), 0)
    first_pass(network, samples, keep=False, progress_bar=False)
    assert capsys.readouterr().err == ""
    first_pass(network, samples, keep=False, progress_bar=True)
    assert "Reading samples" in capsys.readouterr().err


def from_every_entry_point(model, X, y):
    """Every way for a classifier to come in, by name."""
    data = DataLoader(TensorDataset(X, y), batch_size=13)
    optimizer = DebiasedNewton(model.parameters(), model, "classification")
    U = torch.randn(sum(p.numel() for p in model.parameters()), 2, generator=torch.Generator().manual_seed(0))
    return {
        "fit": lambda: DebiasedLaplace(model, "classification", prior_precision=0.4).fit(data),
        "fit of the last layer": lambda: DebiasedLaplace(model, "classification", "last_layer").fit(data),
        "diagnose": lambda: diagnose(model, "classification", data, batch_sizes=[8], n_draws=1),
        "newton_step": lambda: newton_step(model, "classification", (X, y)),
        "DebiasedNewton": lambda: optimizer.step(lambda: (X, y)),
        "directional_derivatives": lambda: directional_derivatives(model, "classification", data, U),
        "held_out_kl": lambda: held_out_kl(theirs(model, data), None, fitted_loader=data),
        "evaluate, of the network": lambda: evaluate({"net": model}, data, task="multiclass"),
        "evaluate, of laplace-torch's posterior": lambda: evaluate(
            {"la": theirs(model, data)}, data, task="multiclass", include_map=False
        ),
    }


def theirs(model, data):
    la = Laplace(model, "classification", "all", "diag", prior_precision=0.4)
    la.fit(data)
    return la


@pytest.mark.parametrize("entry", from_every_entry_point(nn.Linear(1, 2), torch.ones(1, 1), torch.ones(1)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_network_that_ends_in_a_softmax_is_refused_everywhere(entry, dtype):
    network, X = mlp(dtype=dtype)
    call = from_every_entry_point(nn.Sequential(network, nn.Softmax(-1)), X, targets("classification"))[entry]
    with pytest.raises(ValueError, match=r"are probabilities; expected logits.*last softmax.*log_softmax"):
        call()


def test_log_probabilities_are_logits():
    network, X = mlp()
    predictions = []
    for model in (network, nn.Sequential(network, nn.LogSoftmax(-1))):
        la = DebiasedLaplace(model, "classification", prior_precision=0.4)
        la.fit(DataLoader(TensorDataset(X, targets("classification")), batch_size=13))
        predictions.append(la(X))
    assert torch.allclose(*predictions, rtol=1e-9)


def test_non_negative_outputs_and_rows_that_sum_to_one_are_logits_still():
    network, X = mlp()
    rows = torch.eye(3, dtype=X.dtype)[targets("classification")[:8]]
    assert are_probabilities(rows)
    assert are_probabilities(torch.softmax(network(X), 1).bfloat16())
    for outputs in (network(X).exp(), network(X) - network(X).mean(1, keepdim=True) + 1 / 3, rows[:1] * 1.002):
        assert not are_probabilities(outputs)
