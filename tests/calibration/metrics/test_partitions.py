"""Errors over partitions of sorted confidences, against netcal, loops and a transcription of the sweep."""

from itertools import pairwise
from math import pi, sqrt

import numpy as np
import pytest
import torch
from netcal.metrics import ECE

from debiased_laplace.calibration.metrics.bin_sensitivity import measure_other_bins, tabulate_sensitivity
from debiased_laplace.calibration.metrics.partitions import (
    MOST_SWEPT_BINS,
    SortedConfidences,
    expected_error,
    expected_error_by_chance,
    sort_confidences,
    split_by_mass,
    split_by_width,
    sweep_bins,
)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(draw_classification, n: int, *, sharpness: float, seed: int) -> SortedConfidences:
    p, y, _ = draw_classification(n, sharpness=sharpness, seed=seed)
    return sort_confidences(p.max(dim=1).values, (p.argmax(dim=1) == y).double())


@pytest.mark.parametrize("n_bins", [2, 5, 15, 50])
def test_equal_width_is_netcals(n_bins: int) -> None:
    grid = np.concatenate([np.arange(101) / 100, np.linspace(0, 1, n_bins + 1), [1.0] * 7])
    right = np.random.default_rng(1).integers(0, 2, len(grid))
    s = sort_confidences(torch.from_numpy(grid), torch.from_numpy(right).double())
    expected = ECE(bins=n_bins).measure(grid, right)
    assert expected_error(s, split_by_width(s, n_bins)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n_bins", [1, 3, 7, 10, 64])
def test_without_ties_bins_hold_nearly_equal_numbers(draw_classification, n_bins: int) -> None:
    s = draw(draw_classification, 64, sharpness=1.0, seed=1)
    sizes = np.diff(split_by_mass(s, n_bins))
    assert len(sizes) == n_bins
    assert sizes.max() - sizes.min() <= 1


def test_equal_mass_by_hand() -> None:
    s = sort_confidences(tensor([0.9, 0.5, 0.7, 0.6]), tensor([1, 0, 0, 1]))
    assert split_by_mass(s, 2).tolist() == [0, 2, 4]
    assert expected_error(s, split_by_mass(s, 2)) == pytest.approx((abs(1 - 1.1) + abs(1 - 1.6)) / 4)
    variance = np.array([0.25 + 0.24, 0.21 + 0.09])
    chance = expected_error_by_chance(s, split_by_mass(s, 2))
    assert chance == pytest.approx(sqrt(2 / pi) * np.sqrt(variance).sum() / 4)


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        ([1.0] * 8, [0, 8]),
        ([0.2, 0.3] + [1.0] * 8, [0, 2, 10]),
        ([0.1] * 3 + [0.2] * 3 + [0.3] * 2, [0, 3, 6, 8]),
        ([0.1, 0.2, 0.2, 0.2, 0.9, 0.9], [0, 1, 4, 6]),
    ],
    ids=["all equal", "most saturated", "three values", "ties across an edge"],
)
def test_equal_confidences_share_a_bin(values: list[float], bounds: list[int]) -> None:
    s = sort_confidences(tensor(values), torch.ones(len(values)).double())
    assert split_by_mass(s, 5).tolist() == bounds


def test_order_of_the_samples_does_not_matter(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=1.5, seed=2)
    confidence, right = (p.max(dim=1).values * 50).round() / 50, (p.argmax(dim=1) == y).double()
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    one, other = sort_confidences(confidence, right), sort_confidences(confidence[shuffled], right[shuffled])
    for split in (split_by_mass(one, 15), sweep_bins(one)):
        assert expected_error(one, split) == pytest.approx(expected_error(other, split), abs=1e-12)
    assert sweep_bins(one).tolist() == sweep_bins(other).tolist()


def sweep_by_hand(confidence: np.ndarray, right: np.ndarray) -> float:
    """Roelofs et al. (2022), algorithm 1, on numbers without ties whose count every swept number of bins divides."""
    order = np.argsort(confidence)
    best = 0.0
    for n_bins in range(1, len(order) + 1):
        groups = [order[(np.arange(len(order)) + 0.5) * n_bins // len(order) == b] for b in range(n_bins)]
        accuracy = [right[g].mean() for g in groups]
        if any(b < a for a, b in pairwise(accuracy)):
            return best
        best = sum(len(g) * abs(right[g].mean() - confidence[g].mean()) for g in groups) / len(order)
    return best


@pytest.mark.parametrize("sharpness", [1.0, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_sweep_is_the_published_algorithm(draw_classification, sharpness: float, seed: int) -> None:
    p, y, _ = draw_classification(400, sharpness=sharpness, seed=seed)
    confidence, right = p.max(dim=1).values, (p.argmax(dim=1) == y).double()
    s = sort_confidences(confidence, right)
    assert len(sweep_bins(s)) > 2
    expected = sweep_by_hand(confidence.numpy(), right.numpy())
    assert expected_error(s, sweep_bins(s)) == pytest.approx(expected, abs=1e-12)


def test_a_sweep_without_a_fall_ends_at_one_bin_each_or_the_limit() -> None:
    few = sort_confidences(tensor([0.1, 0.2, 0.8, 0.9]), tensor([0, 0, 1, 1]))
    assert sweep_bins(few).tolist() == [0, 1, 2, 3, 4]
    many = torch.linspace(0, 1, 3 * MOST_SWEPT_BINS, dtype=torch.float64)
    assert len(sweep_bins(sort_confidences(many, (many > 0.5).double()))) == MOST_SWEPT_BINS + 1


def test_sensitivity_is_netcal_at_every_number_of_bins(draw_classification) -> None:
    p, y, _ = draw_classification(500, sharpness=1.5, seed=3)
    confidence, right = p.max(dim=1).values, (p.argmax(dim=1) == y).double()
    table = tabulate_sensitivity(sort_confidences(confidence, right))
    assert [s.n_bins for s in table] == list(range(5, 51))
    for s in table[::9]:
        expected = ECE(bins=s.n_bins).measure(confidence.numpy(), right.long().numpy())
        assert s.error == pytest.approx(expected, abs=1e-9)
    floors = [s.noise_floor for s in table]
    assert floors[-1] > 1.5 * floors[0]


def test_floor_is_the_mean_error_of_right_confidences(draw_classification) -> None:
    s = draw(draw_classification, 400, sharpness=1.0, seed=4)
    bounds = split_by_mass(s, 10)
    rng, errors = np.random.default_rng(0), []
    for _ in range(4000):
        surplus = np.concatenate([[0.0], np.cumsum((rng.random(400) < s.confidence) - s.confidence)])
        errors.append(np.abs(np.diff(surplus[bounds])).sum() / 400)
    assert expected_error_by_chance(s, bounds) == pytest.approx(np.mean(errors), rel=0.015)
    assert np.std(errors) / sqrt(4000) < 0.005 * np.mean(errors)


def test_estimates_say_how_many_bins_and_what_chance_would_make(draw_classification) -> None:
    s = draw(draw_classification, 1000, sharpness=1.0, seed=5)
    m = measure_other_bins(s, n_bins=15)
    assert m["ece_equal_mass"].value == expected_error(s, split_by_mass(s, 15))
    assert m["ece_sweep"].value == expected_error(s, sweep_bins(s))
    assert "15 bins of equal mass" in m["ece_equal_mass"].estimator
    assert f"{expected_error_by_chance(s, sweep_bins(s)):.3g}" in m["ece_sweep"].reason
