from math import sqrt

import numpy as np
import pytest
import torch
from netcal.metrics import ACE, ECE, MCE

from debiased_laplace.calibration.metrics.binning import (
    bin_confidences,
    expected_error_by_chance,
    measure_binned_errors,
    measure_positive_class_error,
)
from debiased_laplace.calibration.metrics.consistency import check_consistency
from debiased_laplace.calibration.metrics.curves import tabulate_bins
from debiased_laplace.calibration.predictions.classification import read_classification


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reduce(p, y, n_bins=15):
    r = read_classification("net", p, y, task="multiclass")
    return bin_confidences(r.confidence, r.correct, n_bins=n_bins)


@pytest.mark.parametrize("n_bins", [2, 10, 15])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_errors_are_those_of_a_plain_netcal_call(draw_classification, n_bins: int, sharpness: float) -> None:
    p, y, _ = draw_classification(2000, sharpness=sharpness, seed=3)
    mine = measure_binned_errors(reduce(p, y, n_bins))
    for name, metric in {"ece": ECE, "mce": MCE, "ace": ACE}.items():
        assert mine[name] == pytest.approx(metric(bins=n_bins).measure(p.numpy(), y.numpy()), abs=1e-9)


def test_positive_class_error_is_netcals_binary_convention(draw_classification) -> None:
    p, y, _ = draw_classification(500, sharpness=2.0, seed=4, n_classes=2)
    top = measure_binned_errors(reduce(p, y))["ece"]
    positive = measure_positive_class_error(p[:, 1], y, n_bins=15)
    assert positive == pytest.approx(ECE(bins=15).measure(p[:, 1].numpy(), y.numpy()), abs=1e-9)
    assert abs(positive - top) > 1e-3  # the two conventions differ, so both are reported


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]], ids=["one class", "two of ten classes"])
def test_shards_that_netcal_refuses(labels: list[int]) -> None:
    p = torch.full((6, 10), 0.02, dtype=torch.float64)
    p[:, 0] = 0.82
    with pytest.raises(RuntimeError):
        ECE(bins=15).measure(p.numpy(), np.array(labels))
    accuracy = labels.count(0) / 6
    assert measure_binned_errors(reduce(p, labels))["ece"] == pytest.approx(abs(0.82 - accuracy), abs=1e-12)


def test_confidences_of_exactly_one_share_the_last_bin() -> None:
    confidence = tensor([1.0] * 10 + [0.95] * 10)
    bins = bin_confidences(confidence, torch.ones_like(confidence), n_bins=15)
    assert bins.counts.tolist() == [0.0] * 14 + [20.0]
    assert measure_binned_errors(bins)["ece"] == pytest.approx(0.025, abs=1e-12)
    assert expected_error_by_chance(bins) > 0


@pytest.mark.parametrize("n_bins", [7, 10, 15])
def test_bin_table_and_netcal_agree_on_every_edge(n_bins: int) -> None:
    edges = np.linspace(0, 1, n_bins + 1)
    values = np.concatenate([edges, np.nextafter(edges[1:], 0), np.nextafter(edges[:-1], 1), np.arange(101) / 100])
    correct = tensor(np.random.default_rng(0).integers(0, 2, len(values)))
    bins = bin_confidences(torch.from_numpy(values), correct, n_bins=n_bins)
    consistency = check_consistency(bins, n_resamples=5, confidence_level=0.9, seed=0)
    table = tabulate_bins(bins, consistency, confidence_level=0.9)
    by_hand = sum(b.n * abs(b.accuracy - b.confidence) for b in table) / len(values)
    assert by_hand == pytest.approx(measure_binned_errors(bins)["ece"], abs=1e-12)
    assert sum(b.n for b in table) == len(values)


def test_bin_table_by_hand() -> None:
    bins = bin_confidences(tensor([0.6, 0.7, 0.95, 0.9]), tensor([1, 0, 1, 1]), n_bins=4)
    consistency = check_consistency(bins, n_resamples=50, confidence_level=0.9, seed=0)
    empty, _, third, last = tabulate_bins(bins, consistency, confidence_level=0.9)
    assert (empty.n, empty.accuracy, empty.low, empty.consistent_low) == (0, None, None, None)
    assert (third.left, third.right, third.n, third.n_correct) == (0.5, 0.75, 2, 1)
    assert (third.accuracy, last.accuracy) == (0.5, 1.0)
    assert (third.confidence, last.confidence) == pytest.approx((0.65, 0.925))
    assert third.low < 0.5 < third.high
    assert 0 <= last.consistent_low <= last.consistent_high <= 1


def test_noise_floor_is_the_mean_of_simulated_errors(draw_classification) -> None:
    p, y, _ = draw_classification(400, sharpness=1.0, seed=5)
    bins = reduce(p, y)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(5000):
        correct = (torch.rand(400, generator=generator, dtype=torch.float64) < bins.confidence).double()
        surplus = torch.zeros(15, dtype=torch.float64).index_add_(0, bins.bin, correct - bins.confidence)
        errors.append(surplus.abs().sum() / 400)
    simulated = torch.stack(errors)
    # normal sums are exact only for many samples per bin; 1.5 % is what the approximation costs here
    assert expected_error_by_chance(bins) == pytest.approx(simulated.mean().item(), rel=0.015)
    assert simulated.std() / sqrt(5000) < 0.005 * simulated.mean()


def test_noise_floor_of_certain_predictions_is_zero() -> None:
    assert expected_error_by_chance(bin_confidences(tensor([1.0, 1.0]), tensor([1, 0]), n_bins=15)) == 0


@pytest.mark.parametrize("n_bins", [5, 15])
def test_the_same_error_as_torchmetrics_where_the_two_agree(draw_classification, n_bins: int) -> None:
    """torchmetrics gives confidences of exactly 1 a bin of their own; there are none here."""
    calibration = pytest.importorskip("torchmetrics.functional.classification")
    p, y, _ = draw_classification(1500, sharpness=2.0, seed=8)
    assert p.max() < 1
    mine = measure_binned_errors(reduce(p, y, n_bins))
    for name, norm in {"ece": "l1", "mce": "max"}.items():
        other = calibration.multiclass_calibration_error(p, y, num_classes=10, n_bins=n_bins, norm=norm)
        assert mine[name] == pytest.approx(other.item(), abs=1e-6)  # torchmetrics counts in float32
