"""The example of the optimizer runs and prints the numbers that it claims."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_loss_halves_within_12_steps():
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "examples" / "04_debiased_newton.py", "--steps", "12"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    start, end = map(float, re.search(r"training loss ([\d.]+) at the start, ([\d.]+) after 12", done.stdout).groups())
    assert end < 0.5 * start
    assert re.search(r"\d+ steps accepted; \d+ raised the training loss", done.stdout)
