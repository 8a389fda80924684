"""`torchrun -m debiased_laplace`: processes share a fit, and the first one writes."""

import os
import subprocess
import sys

import pytest
import torch

from debiased_laplace.cli import main

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loader():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 4, generator=generator)
    return DataLoader(TensorDataset(X, torch.randint(3, (60,), generator=generator)), batch_size=7)
"""


@pytest.mark.slow
def test_a_fit_of_two_processes_is_that_of_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "module_of_two.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import module_of_two

    torch.manual_seed(0)
    torch.save(module_of_two.model().state_dict(), "weights.pt")
    fit = ["fit", "--model", "module_of_two:model", "--weights", "weights.pt", "--loader", "module_of_two:loader"]
    fit += ["--likelihood", "classification", "--device", "cpu", "--n-rows", "40", "--no-progress"]
    assert main([*fit, "--out", "one.pt"]) == 0
    printed = capsys.readouterr().out
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def launched(*command):
        done = subprocess.run(
            [*run, "debiased_laplace", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert launched(*fit, "--out", "two.pt") == printed.replace("one.pt", "two.pt")
    one, two = (torch.load(name, weights_only=True) for name in ("one.pt", "two.pt"))
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7, msg=name)
    evaluate = ["evaluate", "--state", "two.pt", "--out", "out", "--format", "json", "--n-resamples", "20"]
    assert launched(*evaluate, *fit[1:7], "--device", "cpu", "--no-progress").count("wrote") == 1
    assert (tmp_path / "out" / "report.json").exists()
