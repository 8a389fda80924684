"""Data whose calibration is known, because the labels are drawn from the true probabilities."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _draw(n: int, *, sharpness: float, seed: int, n_classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    truth = logits.softmax(dim=1)
    labels = torch.multinomial(truth, 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(dim=1), labels, truth


@pytest.fixture
def draw_classification() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Predicted probabilities, labels, true probabilities; sharpness 1 is calibrated, above 1 over-confident."""
    return _draw


@pytest.fixture
def draw_regression() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Mean, standard deviation and targets; the true errors are `scale` standard deviations."""

    def draw(n: int, *, scale: float, seed: int, n_outputs: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (n,) if n_outputs is None else (n, n_outputs)
        mean = torch.randn(shape, generator=generator, dtype=torch.float64)
        sigma = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return mean, sigma, mean + scale * sigma * noise

    return draw
