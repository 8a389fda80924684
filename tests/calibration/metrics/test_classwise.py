"""Calibration of each class's probability, against netcal's one-against-rest and closed forms."""

from dataclasses import replace
from math import pi, sqrt

import numpy as np
import pytest
import torch
from netcal.metrics import ECE

from debiased_laplace.calibration.metrics.classwise import measure_classwise, measure_each_class, tabulate_classes
from debiased_laplace.calibration.metrics.debiased_error import debiased_squared_error
from debiased_laplace.calibration.predictions.classification import read_classification


def read(p, y, n_bins: int = 15):
    return read_classification("net", p, y, task="multiclass", n_bins=n_bins)


@pytest.mark.parametrize("n_bins", [5, 15])
@pytest.mark.parametrize("n_classes", [2, 7])
def test_each_class_is_netcal_against_the_rest(draw_classification, n_bins: int, n_classes: int) -> None:
    p, y, _ = draw_classification(800, sharpness=1.6, seed=1, n_classes=n_classes)
    error, _ = measure_each_class(read(p, y, n_bins))
    for c in range(n_classes):
        expected = ECE(bins=n_bins).measure(p[:, c].numpy(), (y == c).long().numpy())
        assert error[c].item() == pytest.approx(expected, abs=1e-9)
    m = measure_classwise(read(p, y, n_bins))
    assert m["classwise_ece"].value == pytest.approx(error.mean().item(), abs=1e-15)


def test_float32_agrees_with_float64_off_the_edges(draw_classification) -> None:
    p, y, _ = draw_classification(3000, sharpness=1.6, seed=2)
    single, double = (measure_classwise(read(x, y))["classwise_ece"].value for x in (p.float(), p))
    assert single == pytest.approx(double, abs=2e-4)  # a value next to an edge may change its bin


def test_floor_is_the_mean_error_of_right_probabilities(draw_classification) -> None:
    p, _, _ = draw_classification(500, sharpness=1.0, seed=3, n_classes=4)
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(1500):
        y = torch.multinomial(p, 1, generator=generator)[:, 0]
        errors.append(measure_each_class(read(p, y, 10))[0].mean().item())
    floor = measure_classwise(read(p, y, 10))["classwise_ece_noise_floor"].value
    assert floor == pytest.approx(np.mean(errors), rel=0.015)
    assert np.std(errors) / sqrt(1500) < 0.005 * np.mean(errors)


def test_floor_by_hand() -> None:
    p = torch.tensor([[0.2, 0.8], [0.1, 0.9]], dtype=torch.float64)
    floor = sqrt(2 / pi) * (sqrt(0.2 * 0.8 + 0.1 * 0.9)) / 2  # both classes have both samples in one bin of two
    _, floors = measure_each_class(read(p, [1, 1], 2))
    assert floors.tolist() == pytest.approx([floor, floor])


def test_debiased_error_is_near_zero_for_right_probabilities(draw_classification) -> None:
    values, plug_in = [], []
    for seed in range(60):
        p, y, _ = draw_classification(400, sharpness=1.0, seed=seed, n_classes=5)
        r = read(p, y, 5)
        values.append(measure_classwise(r)["classwise_rmsce2_debiased"].value)
        bins = r.class_bins
        gap = (bins.positives - bins.confidence).square() / bins.counts.clamp(min=1)
        plug_in.append((gap.sum(dim=1) / 400).mean().item())
    # within a wide bin calibrated confidences and shares still agree on average
    assert abs(np.mean(values)) < 4 * np.std(values) / sqrt(60)
    assert np.mean(plug_in) > 10 * np.std(plug_in) / sqrt(60)


def test_debiased_error_of_one_class_is_the_binary_one(draw_classification) -> None:
    p, y, _ = draw_classification(200, sharpness=2.0, seed=4, n_classes=2)
    r = read(p, y)
    of_class = debiased_squared_error(r.class_bins.counts, r.class_bins.positives, r.class_bins.confidence)
    assert measure_classwise(r)["classwise_rmsce2_debiased"].value == pytest.approx(of_class.mean().item())


@pytest.mark.parametrize("labels", [[3] * 40, [3] * 20 + [5] * 20], ids=["one class", "two of ten classes"])
def test_shards_with_few_classes(draw_classification, labels: list[int]) -> None:
    p, _, _ = draw_classification(40, sharpness=1.0, seed=5)
    r = read(p, labels)
    table = tabulate_classes(r, confidence_level=0.9)
    assert [c.n for c in table] == np.bincount(labels, minlength=10).tolist()
    assert table[0].low is None
    assert table[0].error == pytest.approx(p[:, 0].mean().item())  # probability for a class that never came
    assert 0 <= table[3].low <= table[3].n_correct / table[3].n <= table[3].high


def test_clusters_widen_the_accuracies(draw_classification) -> None:
    p, y, _ = draw_classification(600, sharpness=1.0, seed=6)
    r = read(p.repeat(3, 1), y.repeat(3))
    plain, clustered = (
        tabulate_classes(replace(r, clusters=c), confidence_level=0.9) for c in (None, torch.arange(600).repeat(3))
    )
    for one, other in zip(plain, clustered, strict=True):
        assert (one.n, one.n_correct, one.error) == (other.n, other.n_correct, other.error)
        assert other.high - other.low > 1.5 * (one.high - one.low)
    assert (
        "independent"
        in measure_classwise(replace(r, clusters=torch.arange(600).repeat(3)))["classwise_ece_noise_floor"].reason
    )
