"""Labels, counts, predicted noise and positions from the command line: fit and evaluate."""

import json
import sys
from pathlib import Path

import pytest
import torch

from debiased_laplace.cli import main

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N_OUTPUTS = {"binary": 3, "poisson": 2, "heteroscedastic": 2, "classification": 3}
likelihood = "LIKELIHOOD"


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, N_OUTPUTS[likelihood]))


def loader(seed=0):
    generator = torch.Generator().manual_seed(seed)
    if likelihood == "classification":
        X, y = torch.randn(40, 6, 4, generator=generator), torch.randint(3, (40, 6), generator=generator)
        y[:, 4:] = -100
        return DataLoader(TensorDataset(X, y), batch_size=10)
    X = torch.randn(40, 4, generator=generator)
    y = torch.randn(40, {"binary": 3, "poisson": 2, "heteroscedastic": 1}[likelihood], generator=generator)
    y = {"binary": (y > 0).float(), "poisson": y.abs().round(), "heteroscedastic": y}[likelihood]
    return DataLoader(TensorDataset(X, y), batch_size=10)


def test():
    return loader(1)
"""
MODEL = ["--model", "module_of_the_user:model", "--weights", "weights.pt", "--device", "cpu", "--no-progress"]


@pytest.fixture(params=["binary", "poisson", "heteroscedastic", "classification"])
def likelihood(request, tmp_path, monkeypatch):
    (tmp_path / "module_of_the_user.py").write_text(MODULE.replace("LIKELIHOOD", request.param))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import module_of_the_user

    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(module_of_the_user.model().state_dict(), "weights.pt")
    yield request.param
    sys.modules.pop("module_of_the_user", None)


def test_what_is_fitted_is_evaluated(likelihood, capsys):
    fit = ["--loader", "module_of_the_user:loader", "--likelihood", likelihood, "--prior-precision", "3"]
    assert main(["fit", *MODEL, *fit, "--out", "la.pt"]) == 0
    options = ["--loader", "module_of_the_user:test", "--n-resamples", "20", "--format", "json", "--out", "out"]
    assert main(["evaluate", "--state", "la.pt", *MODEL, *options]) == 0, capsys.readouterr()
    found = json.loads(Path("out/report.json").read_text())
    assert found["data"]["n"] == {"binary": 120, "classification": 160}.get(likelihood, 40)
    assert found["task"] == {"binary": "binary", "classification": "multiclass"}.get(likelihood, "regression")
