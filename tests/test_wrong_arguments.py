"""Wrong arguments of every public entry point are a ValueError that says what was expected or what came."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from models import mlp, targets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import (
    DebiasedLaplace,
    DebiasedNewton,
    calibration_report,
    conjugate_gradients,
    diagnose,
    directional_derivatives,
    evaluate,
    newton_step,
)

NAMED = re.compile(r"xpected|got |must |needs |takes |is not fitted|has no entry")


@pytest.mark.slow
def test_every_wrong_argument_is_named() -> None:
    script = Path(__file__).with_name("wrong_arguments.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    kinds = {}
    for case, (classes, message) in outcomes.items():
        if not classes:
            kinds[case] = "silent"
        elif "FileNotFoundError" not in classes and not ("ValueError" in classes and NAMED.search(message)):
            kinds[case] = f"bare {classes[0]}: {message}"
    assert kinds == {}
    assert len(outcomes) > 1700
    assert len(Counter(case.split(",")[0] for case in outcomes)) > 20


X, Y = mlp()[1], targets("classification")
LOADER = DataLoader(TensorDataset(X, Y), batch_size=16)


def fitted(likelihood="classification", **options):
    la = DebiasedLaplace(mlp()[0], likelihood, rank=3, prior_precision=0.4, **options)
    la.fit(
        LOADER if likelihood == "classification" else DataLoader(TensorDataset(X, targets(likelihood)), batch_size=16)
    )
    return la


@pytest.mark.untyped
def test_numbers_and_truth_values_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    la, model = fitted(seed=np.int32(2), n_folds=np.int64(4), enable_backprop=np.False_), mlp()[0]
    assert torch.equal(la(X), fitted(seed=2, n_folds=4)(X))
    draws = [
        la(X, link_approx="mc", n_samples=n, joint=f, generator=torch.Generator().manual_seed(3))
        for n, f in ((5, False), (np.int16(5), np.False_))
    ]
    assert torch.equal(*draws)
    assert torch.equal(la.confidence_intervals(level=np.float64(0.5)), la.confidence_intervals(level=0.5))
    la.optimize_prior_precision(n_steps=np.int64(2), lr=np.float32(0.25), verbose=np.False_)
    few = {"n_resamples": 9, "n_bins": 7, "seed": 1, "n_samples": 5, "max_samples": 1000}
    level = np.float32(0.9)
    found = evaluate(la, LOADER, confidence_level=level, **{k: np.int32(v) for k, v in few.items()})
    found.save(tmp_path)
    assert type(found).from_json(tmp_path / "report.json") == found
    assert (found.confidence_level, found.settings["n_bins"]) == (float(level), 7)
    step = newton_step(
        model, "classification", (X, Y), damping=np.float32(0.5), max_iterations=np.int8(3), seed=np.int64(0)
    )
    same = newton_step(model, "classification", (X, Y), damping=0.5, max_iterations=3)
    assert torch.equal(step.update, same.update)
    DebiasedNewton(model.parameters(), model, "classification", damping=np.float64(0.5), weight_decay=np.float32(0.25),
                   judging_share=np.float64(0.25), n_data=np.int64(99), seed=np.int64(1))  # fmt: skip
    few = {
        "n_draws": np.int64(1),
        "seed": np.int64(5),
        "n_reference": np.int32(8),
        "damping": np.float32(0.5),
        "prior_precision": None,
    }
    assert diagnose(model, "classification", LOADER, batch_sizes=np.array([8, 10]), **few).batches[1].batch_size == 10
    solved = conjugate_gradients(lambda v: 2 * v, X[0], max_iterations=np.int64(2), tolerance=np.float64(1e-6))
    assert torch.allclose(solved.solution, X[0] / 2)
    directional_derivatives(model, "classification", LOADER, torch.ones(93, 1), seed=np.int64(4))


def test_misspelt_arguments_of_a_prediction_are_refused_and_the_models_own_are_passed_on() -> None:
    la = fitted()
    with pytest.raises(ValueError, match=r"got 'link_aprox'; did you mean 'link_approx'\?"):
        la(X, link_aprox="mc")
    with pytest.raises(ValueError, match=r"got 'n_sample'; did you mean 'n_samples'\?"):
        la(X, pred_type="nn", link_approx="mc", n_sample=7)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()[0]

        def forward(self, x, scale=1.0):
            return scale * self.inner(x)

    la = DebiasedLaplace(Scaled(), "regression", rank=3, sigma_noise=0.7)
    la.fit(DataLoader(TensorDataset(X, targets("regression")), batch_size=16))
    one, two = (
        la(X, pred_type="nn", link_approx="mc", generator=torch.Generator().manual_seed(5), **o)[0]
        for o in ({}, {"scale": 2.0})
    )
    assert torch.allclose(two, 2 * one)


def test_inputs_with_two_dimensions_of_samples_are_refused_with_the_way_out() -> None:
    la = fitted()
    with pytest.raises(ValueError, match=r"outputs of shape \(4, 3\).*\(b, q, d\) to \(b q, d\)"):
        la(X[:12].reshape(3, 4, 4))
    assert la(X[:12].reshape(3, 4, 4).flatten(0, 1)).shape == (12, 3)


@pytest.mark.untyped
def test_a_fit_of_arrays_says_that_it_takes_a_loader() -> None:
    with pytest.raises(ValueError, match=r"Expected fit\(loader\).*fit\(\[\(X, y\)\]\); got a second array") as caught:
        DebiasedLaplace(mlp()[0], "classification").fit(X, Y)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(7, track_running_stats=False), nn.BatchNorm2d(2, track_running_stats=False)]
)
def test_samples_that_depend_on_each_other_are_refused(layer) -> None:
    image = isinstance(layer, nn.BatchNorm2d)
    start = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1)) if image else nn.Linear(4, 7)
    model = nn.Sequential(start, layer, nn.Flatten(), nn.Linear(8 if image else 7, 3)).double()
    calls = {
        "fit": lambda: DebiasedLaplace(model, "classification").fit(LOADER),
        "newton_step": lambda: newton_step(model, "classification", (X, Y)),
        "diagnose": lambda: diagnose(model, "classification", LOADER, batch_sizes=[8], n_draws=1),
        "directional_derivatives": lambda: directional_derivatives(model, "classification", LOADER, torch.ones(9, 1)),
    }
    for call in calls.values():
        with pytest.raises(
            ValueError, match=f"{type(layer).__name__} '1' has no running statistics.*depend on each other"
        ):
            call()


def test_the_task_is_that_of_the_posterior() -> None:
    assert evaluate(fitted(), LOADER, n_resamples=5).task == "multiclass"
    loader = DataLoader(TensorDataset(X, targets("regression")), batch_size=16)
    assert evaluate(fitted("regression", sigma_noise=0.7), loader, n_resamples=5).task == "regression"
    with pytest.raises(ValueError, match=r"Expected task as one of .* no Laplace posterior"):
        evaluate({"net": mlp()[0]}, LOADER)


P = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((120,))
T = torch.arange(120) % 4


def report(p, y=T, **options):
    return calibration_report({"=a": p}, y, **{"task": "multiclass", "n_resamples": 9, **options})


def test_short_floating_point_types_are_probabilities() -> None:
    exact = report(P).metrics["=a"]["nll"].known
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float16, 0.002)):
        assert report(P.to(dtype)).metrics["=a"]["nll"].known == pytest.approx(exact, abs=tolerance)
    with pytest.raises(ValueError, match=r"sum to 1 within 0\.03.*softmax"):
        report((1.1 * P).to(torch.bfloat16).clamp(max=1))


def test_a_single_column_is_the_probability_of_class_1() -> None:
    p, y = P[:, 0].reshape(6, 4, 5), (T > 1).reshape(6, 4, 5)
    for one, column, labels in ((p.flatten(), p.reshape(-1, 1), y.flatten()), (p, p[:, None], y)):
        assert report(column, labels, task="binary").metrics == report(one, labels, task="binary").metrics
    with pytest.raises(ValueError, match="task='binary'"):
        report(P[:, :1])


def test_labels_may_be_names_of_classes() -> None:
    names = ["w", "x", "y", "z"]
    words = [names[i] for i in T]
    expected = report(P, class_names=names)
    for labels in (words, np.array(words), tuple(words)):
        found = report(P, labels, class_names=names, validation=(P, labels))
        assert (found.metrics["=a"], found.data.targets_sha256) == (
            expected.metrics["=a"],
            expected.data.targets_sha256,
        )
    with pytest.raises(ValueError, match=r"names out of class_names.*got 'q'"):
        report(P, ["q", *words[1:]], class_names=names)
    with pytest.raises(ValueError, match="names together with class_names; got 'w'"):
        report(P, words)


def test_masked_entries_are_no_numbers() -> None:
    masked = np.ma.masked_array(T.numpy(), mask=T.numpy() == 2)
    with pytest.raises(ValueError, match="Targets: expected numbers without a mask; got 30 masked"):
        report(P, masked)
    open_mask = np.ma.masked_array(T.numpy(), mask=False)
    assert report(P, open_mask).metrics == report(P).metrics


def test_no_cell_of_a_csv_file_is_a_formula() -> None:
    for line in report(P).to_csv().splitlines()[1:]:
        assert line.lstrip('"').startswith("'=a")
