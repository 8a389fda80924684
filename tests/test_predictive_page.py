"""The code of docs/predictive.md runs as it stands."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "predictive.md"


@pytest.mark.pages
def test_the_regression_of_the_page():
    matplotlib.use("Agg")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    exec(code, names)
    y, low, high = names["y"], names["low"], names["high"]
    assert 0.85 < float(((low < y) & (y < high)).float().mean()) < 0.95
    assert names["targets"].shape == (10, 200)
    assert isinstance(names["prediction"].mean, torch.Tensor)
