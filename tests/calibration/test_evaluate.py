"""`evaluate` against `calibration_report` on predictions made by hand."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from fitted_posteriors import MODEL, PRIOR, SIGMA, TEMPERATURE, B, C, N, X, data, debiased, loader, of_laplace_torch
from laplace import Laplace
from models import mlp, targets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, calibration_report, evaluate
from debiased_laplace.calibration.probabilities import PosteriorPredictive


def drawn(seed, n):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(C, (n,), generator=generator)


def uniform(x):
    return torch.full((len(x), C), 1 / C)


def by_hand(inputs):
    """MAP's logits, and predictions of MAP and the posterior."""
    logits, gaussian = MODEL(inputs).detach(), debiased().gaussian_logits(inputs)
    predictive = PosteriorPredictive(*gaussian.probabilities_and_information(), gaussian.total_variance)
    return logits, {"map": logits.softmax(-1), "laplace": predictive}


def leaves(value, path=""):
    """Words of a report by their paths, and numbers up to what batches of another size round otherwise."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in leaves(part, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), path)
    return {path: pytest.approx(value, rel=1e-9, abs=1e-11) if isinstance(value, float) else value}


def test_the_report_is_that_of_predictions_by_hand():
    (x, y), (held, labels), far = drawn(1, 120), drawn(2, 90), 8 * drawn(3, 50)[0]
    report = evaluate(
        debiased(),
        DataLoader(TensorDataset(x, y), batch_size=16),
        task="multiclass",
        validation_loader=DataLoader(TensorDataset(held, labels), batch_size=7),
        ood_loaders={
            "far away": DataLoader(TensorDataset(far, torch.zeros(50)), batch_size=9),
            "inputs alone": far.split(20),
            "tuples of one": [(part,) for part in far.split(20)],
        },
    )
    logits, predictions = by_hand(x)
    validation, ood = (by_hand(held)[0], labels), {"far away": by_hand(far)[1]}
    expected = calibration_report(
        predictions, y, task="multiclass", validation=validation, logits={"map": logits}, ood=ood
    )
    assert list(report.methods) == ["map", report.scaling.method, "laplace"]
    assert report.baseline == "map"
    for field in ("methods", "comparisons", "scaling", "data"):
        assert leaves(getattr(report, field)) == leaves(getattr(expected, field))
    wanted = expected.ood["far away"].metrics["laplace"]
    assert {"entropy", "mutual_information"} < set(wanted)
    for found in report.ood.values():
        areas = {score: metrics["auroc"].value for score, metrics in found.metrics["laplace"].items()}
        assert areas == pytest.approx({score: metrics["auroc"].value for score, metrics in wanted.items()}, abs=1e-9)


@pytest.mark.parametrize("given", [None, 0.5])
def test_every_method_has_its_own_noise_exactly_once(given):
    """A function variance of zero leaves sigma alone: sigma it has to be, not 0, sqrt(2) sigma or sigma squared."""
    posteriors = {
        "first": debiased("regression"),
        "laplace-torch": of_laplace_torch("regression", "all", "diag"),
        "of another noise": debiased("regression", sigma_noise=3.0),
    }
    others = {
        "network": MODEL,
        "draws": lambda x: MODEL(x).detach().repeat(4, 1, 1),
        "pair": lambda x: (MODEL(x), torch.full((len(x), C), 0.33)),
    }
    report = evaluate(posteriors | others, loader("regression"), task="regression", sigma_noise=given)
    expected = {"network": given or SIGMA, "draws": given or SIGMA, "pair": 0.33}
    for name, la in posteriors.items():
        variance = la(X)[1].diagonal(dim1=-2, dim2=-1).double()
        assert variance.mean() > 0.02 * la.sigma_noise**2  # else forgetting or doubling the noise would not be seen
        expected[name] = (variance + la.sigma_noise**2).sqrt().mean().item()
    assert {n: m["sharpness"].value for n, m in report.metrics.items() if n in expected} == pytest.approx(expected)


def test_the_temperature_of_a_saturated_network_comes_from_its_logits():
    """A confident network whose single-precision probabilities are exactly 0 and 1."""
    generator, model = torch.Generator().manual_seed(0), nn.Linear(4, C, bias=False)
    nn.init.normal_(model.weight, std=100, generator=generator)
    x = torch.randn(300, 4, generator=generator)
    z = model(x).detach()
    y = torch.multinomial((z / 20).softmax(-1), 1, generator=generator)[:, 0]
    report = evaluate({"net": model}, [(x[:150], y[:150])], task="multiclass", validation_loader=[(x[150:], y[150:])])
    given = [
        calibration_report({"net": z[:150].softmax(-1)}, y[:150], task="multiclass", validation=(held, y[150:]))
        for held in (z[150:], z[150:].softmax(-1))
    ]
    assert report.scaling == given[0].scaling
    assert report.scaling.value > 1.1 * given[1].scaling.value


def test_records_and_warnings_say_how_each_method_predicted():
    methods = {"la": debiased(), "samples": lambda x: uniform(x).expand(30, -1, -1)}
    sampled = evaluate(methods, loader(), task="multiclass", pred_type="nn", n_samples=5)
    assert {n: (r.kind, r.pred_type, r.link, r.n_samples) for n, r in sampled.predicted.items()} == {
        "map": ("network", None, None, None),
        "la": ("Laplace posterior", "nn", "mc", 5),
        "samples": ("callable", None, None, 30),
    }
    assert all(r.seconds > 0 for r in sampled.predicted.values())
    assert "Only 5 draws behind the predictions of la:" in sampled.warnings[0]
    report = evaluate(methods, loader(), task="multiclass", n_samples=5)
    assert (report.predicted["la"].link, report.predicted["la"].n_samples) == ("mean_field", None)
    assert not any("draws behind" in w for w in report.warnings)


def test_posteriors_are_summarized_and_compared():
    posteriors = {"a": debiased(complement="none"), "b": debiased(complement="none", rank=1)}
    held_out, fitted = loader(indices=range(B, 36)), loader(indices=range(B))
    options = {"task": "multiclass", "held_out_loader": held_out, "fitted_loader": fitted, "confidence_level": 0.9}
    found = evaluate(posteriors, loader(), **options).posteriors
    assert found["a"].facts["class"] == type(posteriors["a"]).__name__
    h = found["b"].held_out
    assert (h.reference, h.high - h.difference) == ("a", pytest.approx(1.644854 * h.standard_error, rel=1e-5))


class Mapped(nn.Module):
    """Takes mappings as laplace-torch's examples do."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = mlp()[0], set()

    def forward(self, batch):
        self.seen |= set(batch)
        return self.net(batch["question"])


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("library", [DebiasedLaplace, Laplace])
def test_mappings_of_tensors_have_the_keys_of_the_first_posterior_or_those_given(library, pred_type):
    """laplace-torch's sampling asks a mapping for `.to`, which a plain one lacks."""
    y, model, keys = targets("classification"), Mapped(), {"dict_key_x": "question", "dict_key_y": "answer"}
    batches = DataLoader([{"question": X[i], "answer": y[i]} for i in range(N)], batch_size=8)
    la = library(model, "classification", "last_layer", "full", prior_precision=PRIOR, temperature=TEMPERATURE, **keys)
    la.fit(batches)
    model.seen.clear()
    by_name = nn.Identity()
    by_name.forward = lambda question: SimpleNamespace(logits=MODEL(question))  # as models of Hugging Face
    report = evaluate({"net": model, "by name": by_name, "la": la}, batches, task="multiclass", pred_type=pred_type)
    assert model.seen == {"question"}
    nll = {name: metrics["nll"].value for name, metrics in report.metrics.items()}
    assert nll["net"] == nll["by name"] == pytest.approx(nn.functional.cross_entropy(MODEL(X), y).item())
    samples = la.predictive_samples({"question": X}, n_samples=4000).mean(0)
    assert nll["la"] == pytest.approx(nn.functional.nll_loss(samples.log(), y).item(), abs=0.1)
    assert evaluate({"net": model}, batches, task="multiclass", **keys).metrics["net"] == report.metrics["net"]
    with pytest.raises(ValueError, match="dict_key_y='labels'"):
        evaluate({"net": model}, batches, task="multiclass")


def test_clusters_are_in_the_order_of_a_loader_that_does_not_shuffle():
    ids = torch.arange(N) // 4
    with pytest.raises(ValueError, match="shuffle=False"):
        evaluate({"m": MODEL}, DataLoader(data(), shuffle=True), task="multiclass", clusters=ids)
    nll = [evaluate({"m": MODEL}, loader(), task="multiclass", clusters=c).metrics["m"]["nll"] for c in (ids, None)]
    assert nll[0].value == pytest.approx(nll[1].value)
    assert nll[0].standard_error != pytest.approx(nll[1].standard_error, rel=0.01)


def test_a_report_of_the_same_loader_and_seed_is_the_same_and_shows_progress(capsys):
    whole = evaluate(debiased(), loader(batch_size=40), task="multiclass", pred_type="nn", seed=2)
    parts = evaluate(debiased(), iter(loader()), task="multiclass", pred_type="nn", seed=2, progress_bar=True)
    assert whole.data == parts.data
    for name, metrics in whole.metrics.items():
        assert parts.metrics[name]["nll"].value == pytest.approx(metrics["nll"].value, rel=1e-9)
    assert "[Predicting the test set]" in capsys.readouterr().err


REFUSED = {
    "no noise": ({"net": MODEL}, {"task": "regression"}, "'net'.*pass sigma_noise"),
    "nothing": ({}, {}, "at least one name to a method; got {}"),
    "no method": ({"m": 3.0}, {}, "got {'m': 'float'}"),
    "a MAP that is nowhere": ({"m": uniform}, {"include_map": True}, "none of the posteriors has a network"),
    "a baseline that is nowhere": ({"m": uniform}, {"baseline": "x"}, "baseline must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    methods, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        evaluate(methods, loader("regression"), **{"task": "multiclass", **options})


def test_evaluate_takes_every_option_of_the_report():
    """All but what it finds out itself; an option added to `calibration_report` has to be passed on here too."""
    report = inspect.signature(calibration_report).parameters
    own = {"predictions", "targets", "posteriors", "observation_noise", "validation", "logits", "ood"}
    here = inspect.signature(evaluate).parameters
    assert {name for name in report if name not in here} <= own
    for name in (set(report) & set(here)) - {"task", "posteriors"}:
        assert here[name].default == report[name].default, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu_and_tells_its_memory():
    found = {}
    for device in ("cpu", "cuda"):
        la = DebiasedLaplace(mlp()[0].to(device), "classification", prior_precision=PRIOR, temperature=TEMPERATURE)
        la.fit(loader())
        found[device] = evaluate(la, loader(), task="multiclass")
    for method in ("map", "laplace"):
        ours, theirs = (found[d].metrics[method]["nll"].value for d in ("cuda", "cpu"))
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert found["cuda"].predicted[method].peak_bytes > 0
        assert found["cpu"].predicted[method].peak_bytes is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("baseline", ["net", "even"])
def test_the_negative_log_likelihood_of_a_network_comes_from_its_logits(dtype, baseline):
    """Of two samples one has 1600 nats: its probability is 0 in double precision too."""
    model = nn.Linear(2, 2, bias=False).to(dtype)
    model.weight.data = 800 * torch.eye(2, dtype=dtype)
    x, y = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype), torch.tensor([0, 0])
    methods = {"net": model, "even": lambda x: torch.full((len(x), 2), 0.5)}
    report = evaluate(methods, [(x, y)], task="multiclass", baseline=baseline)
    assert report.metrics["net"]["nll"].value == pytest.approx(800, rel=1e-6)
    assert not any("true class probability 0" in warning for warning in report.warnings)


def test_the_negative_log_likelihood_after_scaling_comes_from_the_logits_too():
    model = nn.Linear(4, C, bias=False)
    nn.init.normal_(model.weight, std=300, generator=torch.Generator().manual_seed(0))
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    z = model(x).detach().double()
    y = torch.multinomial((z / 300).softmax(-1), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    report = evaluate({"net": model}, [(x, y)], task="multiclass", validation_loader=[(x[:100], y[:100])])
    T = report.scaling.value
    for name, scale in (("net", 1.0), (report.scaling.method, T)):
        expected = torch.nn.functional.cross_entropy(z / scale, y).item()
        assert report.metrics[name]["nll"].value == pytest.approx(expected, rel=1e-6)
    assert T > 3
