"""Validation data, sets out of distribution, mappings of tensors, a GPU."""

import pytest
import torch
from models import mlp, targets
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, calibration_report, evaluate

N, C = 40, 3


def data(seed, n=N):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(X, torch.randint(C, (n,), generator=generator))


def posterior(device="cpu", likelihood="classification"):
    model, X = mlp()
    la = DebiasedLaplace(model.to(device), likelihood, prior_precision=0.4)
    la.fit(DataLoader(TensorDataset(X, targets(likelihood)), batch_size=8))
    return la


@pytest.mark.parametrize("option", ["groups", "clusters"])
def test_a_loader_that_shuffles_has_no_order_for(option):
    """Labels of samples would silently go to other samples."""
    test = data(1)
    shuffling = DataLoader(test, batch_size=16, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        evaluate(posterior(), shuffling, task="multiclass", **{option: test.tensors[1]})
    evaluate(posterior(), shuffling, task="multiclass")


def test_map_is_scaled_with_validation_data():
    la, test, held = posterior(), data(1, 120), data(2, 90)
    report = evaluate(
        {"laplace": la},
        DataLoader(test, batch_size=16),
        task="multiclass",
        validation_loader=DataLoader(held, batch_size=7),
    )
    with torch.no_grad():
        logits = {name: la.model(d.tensors[0]) for name, d in (("test", test), ("held", held))}
    by_hand = calibration_report(
        {"map": logits["test"].softmax(-1), "laplace": la(test.tensors[0])},
        test.tensors[1],
        task="multiclass",
        validation=(logits["held"], held.tensors[1]),
        logits={"map": logits["test"]},
    )
    assert len(report.methods) == 3  # the scaled one too
    assert report.methods == by_hand.methods
    assert report.comparisons == by_hand.comparisons


def test_logits_save_the_temperature_of_a_saturated_network():
    """A confident network whose single-precision probabilities are exactly 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, C)
    with torch.no_grad():
        model.weight.mul_(2000)
    test = TensorDataset(data(1, 150).tensors[0].float(), data(1, 150).tensors[1])
    report = evaluate({"net": model}, DataLoader(test, batch_size=16), task="multiclass")
    assert (model(test.tensors[0]).softmax(-1) == 0).any()
    assert not any("logits are lost" in w for w in report.warnings)


OF_POSTERIORS = {"conformal", "mutual_information", "logit_variance"}


@pytest.mark.parametrize("batches", ["pairs", "inputs alone", "tuples of one"])
@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, OF_POSTERIORS),
        ({"link_approx": "probit"}, set()),
        ({"pred_type": "nn", "n_samples": 100}, {"mutual_information"}),
    ],
    ids=["mean field", "probit", "nn"],
)
def test_out_of_distribution(batches, options, scores):
    la, test, X = posterior(), data(1, 60), 8 * data(3, 50).tensors[0]
    given = {
        "pairs": DataLoader(TensorDataset(X, torch.zeros(50)), batch_size=9),
        "inputs alone": [X[:20], X[20:]],
        "tuples of one": [(X[:20],), (X[20:],)],
    }
    loader = DataLoader(test, batch_size=16)
    report = evaluate(la, loader, task="multiclass", ood_loaders={"far away": given[batches]}, **options)
    by_hand = calibration_report(
        {"map": la.model(test.tensors[0]).softmax(-1)},
        test.tensors[1],
        task="multiclass",
        ood={"far away": {"map": la.model(X).softmax(-1)}},
        temperature_scaling="none",
    )
    assert report.ood["far away"].metrics["map"] == by_hand.ood["far away"].metrics["map"]
    found = report.ood["far away"].metrics["laplace"]
    assert set(found) == {"entropy", "max_probability"} | scores
    if not options:
        logits = [la.gaussian_logits(x) for x in (test.tensors[0], X)]
        areas = {
            "logit_variance": [g.total_variance for g in logits],
            "mutual_information": [g.probabilities_and_information()[1] for g in logits],
        }
        for name, values in areas.items():
            expected = roc_auc_score([0] * 60 + [1] * 50, torch.cat(values))
            assert found[name]["auroc"].value == pytest.approx(expected, abs=1e-9)


class Mapped(nn.Module):
    """Takes mappings as laplace-torch's examples do."""

    def __init__(self):
        super().__init__()
        self.net = mlp()[0]

    def forward(self, batch):
        assert "answer" not in batch
        return self.net(batch["question"])


def test_mappings_with_keys_of_the_posterior_or_as_told():
    X, y, model = mlp()[1], targets("classification"), Mapped()
    batches = [{"question": X[i : i + 8], "answer": y[i : i + 8]} for i in range(0, N, 8)]
    la = DebiasedLaplace(model, "classification", prior_precision=0.4, dict_key_x="question", dict_key_y="answer")
    la.fit(batches)
    report = evaluate(la, batches, task="multiclass")
    assert report.metrics["map"]["nll"].value == pytest.approx(nn.functional.cross_entropy(model.net(X), y).item())
    expected = -la({"question": X}).gather(1, y[:, None]).log().mean().item()
    assert report.metrics["laplace"]["nll"].value == pytest.approx(expected, rel=1e-9)
    alone = evaluate({"net": model}, batches, task="multiclass", dict_key_x="question", dict_key_y="answer")
    assert alone.metrics["net"] == report.metrics["map"]
    with pytest.raises(ValueError, match="dict_key_y='labels'"):
        evaluate({"net": model}, batches, task="multiclass")


def test_laplace_torch_with_mappings_in_its_last_layer():
    """Its sampling asks a mapping for `.to`, which a plain one lacks."""
    from laplace import Laplace

    X, y, model = mlp()[1], targets("classification"), Mapped()
    data = [{"question": X[i], "answer": y[i]} for i in range(N)]
    loader = DataLoader(data, batch_size=8)
    la = Laplace(
        model, "classification", "last_layer", "full", prior_precision=0.4, dict_key_x="question", dict_key_y="answer"
    )
    la.fit([*loader] and _Stripped(loader))
    for options in ({}, {"pred_type": "nn", "n_samples": 8}):
        report = evaluate({"la": la}, loader, task="multiclass", **options)
        assert report.metrics["la"]["nll"].value == pytest.approx(1.1, abs=0.5)


class _Stripped:
    """laplace-torch hands the model the whole mapping, the targets included: here it does not."""

    def __init__(self, loader):
        self.loader, self.dataset = loader, loader.dataset

    def __iter__(self):
        for batch in self.loader:
            yield _Hidden(batch)


class _Hidden(dict):
    def __contains__(self, key):
        return key != "answer" and super().__contains__(key)


def test_a_transformer():
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = transformers.BertConfig(
            vocab_size=12,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=5,
            max_position_embeddings=6,
            num_labels=C,
        )
        model = transformers.BertForSequenceClassification(config).eval()
        tokens = torch.randint(1, 12, (24, 6))
    y = targets("classification", n=24)
    batches = [
        transformers.BatchEncoding(
            {
                "input_ids": tokens[i : i + 7],
                "attention_mask": torch.ones_like(tokens[i : i + 7]),
                "labels": y[i : i + 7],
            }
        )
        for i in range(0, 24, 7)
    ]
    la = DebiasedLaplace(model, "classification", "last_layer", prior_precision=0.4)
    la.fit(batches)
    report = evaluate(la, batches, task="multiclass")
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(**inputs).logits, y).item()
    assert report.metrics["map"]["nll"].value == pytest.approx(expected, rel=1e-5)
    expected = -la(inputs).gather(1, y[:, None]).log().mean().item()
    assert report.metrics["laplace"]["nll"].value == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu_and_tells_its_memory():
    found = {}
    for device in ("cpu", "cuda"):
        methods = {"laplace": posterior(device)}
        found[device] = evaluate(methods, DataLoader(data(1), batch_size=16), task="multiclass")
    for method in ("map", "laplace"):
        ours, theirs = (found[d].metrics[method]["nll"].value for d in ("cuda", "cpu"))
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert found["cuda"].predicted[method].peak_bytes > 0
        assert found["cpu"].predicted[method].peak_bytes is None
