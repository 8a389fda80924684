"""The squared kernel calibration error: unbiased, with an interval that covers where it is degenerate too."""

from dataclasses import replace
from math import exp, sqrt

import numpy as np
import pytest
import torch

from debiased_laplace.calibration.metrics import kernel_error as module
from debiased_laplace.calibration.metrics.kernel_error import estimate_kernel_error
from debiased_laplace.calibration.predictions.classification import ClassificationPredictions, read_classification
from debiased_laplace.calibration.predictions.drawing import draw_rows


def read(p, y, clusters=None) -> ClassificationPredictions:
    return replace(read_classification("net", p, y, task="multiclass"), clusters=clusters)


def by_hand(p: torch.Tensor, y: torch.Tensor, clusters: torch.Tensor) -> float:
    """Mean of k(p, p') r.r' over pairs of different clusters, one pair after the other."""
    residuals = torch.nn.functional.one_hot(y, p.shape[1]) - p
    terms = [
        exp(-(p[i] - p[j]).norm().item() / module.BANDWIDTH) * (residuals[i] @ residuals[j]).item()
        for i in range(len(y))
        for j in range(len(y))
        if clusters[i] != clusters[j]
    ]
    return sum(terms) / len(terms)


def block_by_hand(p: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> float:
    """Sum of the terms between two sets of rows."""
    residuals = torch.nn.functional.one_hot(y, p.shape[1]) - p
    kernel = (-torch.cdist(p[rows], p[columns]) / module.BANDWIDTH).exp()
    return (kernel * (residuals[rows] @ residuals[columns].T)).sum().item()


@pytest.mark.parametrize("n_classes", [2, 6])
@pytest.mark.parametrize("clustered", [False, True])
def test_value_and_deviation_by_pairs_and_by_leaving_out(
    draw_classification, monkeypatch, n_classes: int, clustered: bool
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    p, y, _ = draw_classification(30, sharpness=1.5, seed=1, n_classes=n_classes)
    clusters = torch.arange(30) // 3 if clustered else torch.arange(30)
    e = estimate_kernel_error(read(p, y, clusters if clustered else None), confidence_level=0.9, seed=0)
    assert e.value == pytest.approx(by_hand(p, y, clusters), rel=1e-9)
    units = clusters.unique()
    left_out = [by_hand(p[clusters != g], y[clusters != g], clusters[clusters != g]) for g in units]
    jackknife = (len(units) - 1) * np.var(left_out)
    pairs = sum(int((clusters == g).sum() * (clusters == h).sum()) for g in units for h in units if g != h)
    squares = sum(block_by_hand(p, y, clusters == g, clusters == h) ** 2 for g in units for h in units if g != h)
    assert e.standard_error == pytest.approx(sqrt(jackknife + 2 * squares / pairs**2), rel=1e-7)


def test_right_for_two_outcomes_exactly() -> None:
    """Two samples with p = (0.3, 0.7): the expectation over labels of truth q is k |q - p|^2 = 2 (q1 - 0.7)^2."""
    p, q = torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64), 0.55
    expectation = 0.0
    for labels in torch.cartesian_prod(*[torch.arange(2)] * 3):
        chance = np.prod([q if label else 1 - q for label in labels.tolist()])
        expectation += chance * estimate_kernel_error(read(p, labels), confidence_level=0.9, seed=0).value
    assert expectation == pytest.approx(2 * (q - 0.7) ** 2, abs=1e-12)


def test_rows_are_drawn_by_seed_and_only_where_there_are_many(draw_classification) -> None:
    p, y, _ = draw_classification(500, sharpness=1.5, seed=2)
    predictions = read(p, y)
    one, again, other = (
        estimate_kernel_error(predictions, confidence_level=0.9, seed=s, most_rows=100) for s in (1, 1, 2)
    )
    assert one == again
    assert one.value != other.value
    assert one.n == 100
    assert "100 rows drawn" in one.estimator
    assert draw_rows(5, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert len(set(draw_rows(50, 20, seed=0).tolist())) == 20


@pytest.mark.parametrize("clusters", [None, [0, 1]], ids=["two samples", "two clusters"])
def test_too_few_for_a_deviation(clusters) -> None:
    c = None if clusters is None else torch.tensor(clusters)
    e = estimate_kernel_error(read([[0.3, 0.7], [0.6, 0.4]], [1, 0], c), confidence_level=0.9, seed=0)
    assert e.low is None
    assert "at least three" in e.reason


def test_one_sample_has_no_pair() -> None:
    e = estimate_kernel_error(read([[0.3, 0.7]], [1]), confidence_level=0.9, seed=0)
    assert (e.value, e.low) == (None, None)
    assert "pair" in e.reason


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 1.2, 2.0])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_unbiased_and_covered(draw_classification, sharpness: float, n_classes: int) -> None:
    n_sets, n, level = 400, 250, 0.95
    p, _, truth = draw_classification(6000, sharpness=sharpness, seed=0, n_classes=n_classes)
    with_truth = truth - p  # the mean of the residual given the probabilities
    kernel = (-torch.cdist(p, p) / module.BANDWIDTH).exp()
    terms = kernel * (with_truth @ with_truth.T)
    population = ((terms.sum() - terms.diagonal().sum()) / (6000 * 5999)).item()
    assert (population == pytest.approx(0, abs=1e-12)) == (sharpness == 1.0)
    values, covered = [], 0
    for seed in range(n_sets):
        p, y, _ = draw_classification(n, sharpness=sharpness, seed=100 + seed, n_classes=n_classes)
        e = estimate_kernel_error(read(p, y), confidence_level=level, seed=seed)
        values.append(e.value)
        covered += e.low <= population <= e.high
    assert abs(np.mean(values) - population) < 4 * np.std(values) / sqrt(n_sets) + 0.03 * population
    assert covered / n_sets > level - 3.5 * sqrt(level * (1 - level) / n_sets)
