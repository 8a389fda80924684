"""The sums behind class-wise calibration against a plain loop over every probability."""

import numpy as np
import pytest
import torch

from debiased_laplace.calibration.predictions import probabilities as room
from debiased_laplace.calibration.predictions.class_bins import ClassBins
from debiased_laplace.calibration.predictions.classification import read_classification


def sum_by_hand(p: torch.Tensor, y: torch.Tensor, n_bins: int) -> list[np.ndarray]:
    """Counts, confidence, positives and variance of every class and bin, one probability after the other."""
    edges = np.linspace(0, 1, n_bins + 1)
    sums = [np.zeros((p.shape[1], n_bins)) for _ in range(4)]
    for row, label in zip(p.tolist(), y.tolist(), strict=True):
        for c, value in enumerate(row):
            b = min(n_bins - 1, int(np.searchsorted(edges, value, side="right")) - 1)
            for total, part in zip(sums, (1, value, c == label, value * (1 - value)), strict=True):
                total[c, b] += part
    return sums


def compare(bins: ClassBins, expected: list[np.ndarray]) -> None:
    for mine, other in zip((bins.counts, bins.confidence, bins.positives, bins.variance), expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n_bins", [2, 7, 15])
@pytest.mark.parametrize("n_classes", [2, 12])
def test_sums_are_those_of_a_loop(draw_classification, monkeypatch, n_bins: int, n_classes: int) -> None:
    monkeypatch.setattr(room, "NUMBERS_AT_ONCE", 50)  # several portions
    p, y, _ = draw_classification(60, sharpness=1.5, seed=1, n_classes=n_classes)
    compare(read_classification("net", p, y, task="multiclass", n_bins=n_bins).class_bins, sum_by_hand(p, y, n_bins))


def test_values_on_edges_and_certain_ones() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.3, 0.7], [0.1, 0.9], [0.6, 0.4]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 0])
    compare(read_classification("net", p, y, task="binary", n_bins=10).class_bins, sum_by_hand(p, y, 10))


def test_a_bin_without_samples_holds_nothing_at_all() -> None:
    p = torch.full((1000, 3), 1 / 3, dtype=torch.float64)
    bins = read_classification("net", p, torch.zeros(1000, dtype=torch.int64), task="multiclass", n_bins=15).class_bins
    assert bins.counts[:, 0].tolist() == bins.confidence[:, 0].tolist() == bins.variance[:, 0].tolist() == [0.0] * 3


def test_samples_of_the_posterior_are_averaged_first(draw_classification) -> None:
    samples = torch.stack([draw_classification(40, sharpness=1.0, seed=s)[0] for s in range(3)])
    y = torch.arange(40) % 10
    read = read_classification("net", samples, y, task="multiclass", n_bins=5)
    compare(read.class_bins, sum_by_hand(samples.mean(dim=0), y, 5))
    rows = torch.tensor([7, 3, 3])
    torch.testing.assert_close(read.source.take(rows), samples[:, rows])
