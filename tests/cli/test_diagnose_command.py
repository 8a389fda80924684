"""`debiased-laplace diagnose`: output and exit codes."""

import re
import subprocess
import sys

import pytest

from debiased_laplace.cli import main

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loader():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 4, generator=generator)
    return DataLoader(TensorDataset(X, torch.randint(3, (60,), generator=generator)), batch_size=10)
"""
NAMED = ["--model", "users_problem:model", "--loader", "users_problem:loader", "--likelihood", "classification"]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "users_problem.py").write_text(MODULE)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "debiased_laplace.cli", "diagnose", *NAMED, *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_findings_and_figure(run, tmp_path):
    done = run("--batch-sizes", "12", "20", "--draws", "2", "--figure", "found.svg", "--prior-precision", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The first curvature of a batch of 12 is ")
    assert "nats gained by debiasing" in done.stdout
    assert "of 180 rows; as many rows of random samples carry" in done.stdout
    # two draws: directions and posteriors of both batches, and the samples that the larger batch leaves
    assert f"[Diagnosing]: 100%|██████████| {2 * (2 * 32 + 40)}/{2 * (2 * 32 + 40)} [" in done.stderr
    assert (tmp_path / "found.svg").read_text().count("<svg") == 1


def test_an_unknown_format_of_the_figure_is_an_error_before_the_work(tmp_path, capsys):
    assert main(["diagnose", *NAMED, "--figure", f"{tmp_path}/found.abc"]) == 2
    assert re.search(r"--figure must end in one of .*png.*; got .*found.abc", capsys.readouterr().err)


@pytest.mark.slow
def test_an_unsuitable_batch_size_is_an_error(run):
    done = run("--batch-sizes", "60", "--no-progress", "--no-posteriors")
    assert done.returncode == 2
    assert "leaving some of the 60 samples" in done.stderr
    assert done.stderr.count("\n") == 1
