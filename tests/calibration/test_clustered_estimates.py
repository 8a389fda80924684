"""Intervals over samples that depend on each other within clusters."""

from math import sqrt

import pytest
import torch
from scipy.stats import t

from debiased_laplace.calibration.estimates import (
    effective_size,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    student_quantile,
    sum_per_cluster,
    wilson_interval,
)


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("freedom", [1, 9, 400])
def test_student_quantile_is_scipys(freedom: int) -> None:
    assert student_quantile(0.9, freedom) == pytest.approx(t.ppf(0.95, freedom), rel=1e-9)


def test_sums_per_cluster_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert sum_per_cluster(values, torch.tensor([1, 0, 1])).tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert sum_per_cluster(values[:, 0], torch.tensor([1, 0, 1])).tolist() == [3.0, 6.0]
    assert sum_per_cluster(values, None) is values


def test_clusters_of_one_have_the_plain_standard_error() -> None:
    x = draw(40)
    plain, clustered = (estimate_mean(x, confidence_level=0.9, clusters=c) for c in (None, torch.arange(40).flip(0)))
    assert clustered.value == plain.value
    assert clustered.standard_error == pytest.approx(plain.standard_error, rel=1e-12)
    assert clustered.high - clustered.value == pytest.approx(t.ppf(0.95, 39) * plain.standard_error, rel=1e-9)


@pytest.mark.parametrize("estimator", [estimate_mean, estimate_root_mean])
def test_copies_of_a_sample_are_worth_one_sample(estimator) -> None:
    x = draw(25)
    once = estimator(x, confidence_level=0.9, clusters=torch.arange(25))
    copied = estimator(x.repeat(7), confidence_level=0.9, clusters=torch.arange(25).repeat(7))
    assert copied.n == 175
    for part in ("value", "low", "high", "standard_error"):
        assert getattr(copied, part) == pytest.approx(getattr(once, part), rel=1e-9)


def test_copies_of_an_outcome_are_worth_one_outcome() -> None:
    y = (draw(50) < 0.8).to(torch.float64)
    copied = estimate_share(y.repeat(9), confidence_level=0.95, clusters=torch.arange(50).repeat(9))
    worth = 49 * (1.959963985 / t.ppf(0.975, 49)) ** 2  # 49 and not 50: the deviation over clusters divides by n - 1
    expected = wilson_interval(y.mean().item(), worth, confidence_level=0.95)
    assert (copied.low, copied.high) == pytest.approx(expected, abs=1e-9)
    assert copied.standard_error == pytest.approx(y.std().item() / sqrt(50))


def test_clusters_of_unequal_size_by_hand() -> None:
    e = estimate_mean(
        torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64), confidence_level=0.9, clusters=torch.tensor([0, 1, 1])
    )
    assert e.standard_error == pytest.approx(sqrt(2 * (2.0**2 + 2.0**2)) / 3)  # residuals -2, -1 + 3


def test_clusters_that_all_agree_count_as_one_sample_each() -> None:
    e = estimate_share(torch.ones(1000, dtype=torch.float64), confidence_level=0.95, clusters=torch.arange(1000) % 10)
    few = 10 * (1.959963985 / t.ppf(0.975, 9)) ** 2
    assert (e.low, e.high) == pytest.approx(wilson_interval(1.0, few, confidence_level=0.95))


def test_evenly_spread_clusters_are_worth_no_more_than_their_samples() -> None:
    n = effective_size(0.5, 100, n_clusters=50, standard_error=1e-9, confidence_level=0.9)
    assert n == pytest.approx(100 * (1.644853627 / t.ppf(0.95, 49)) ** 2)


@pytest.mark.parametrize("estimator", [estimate_mean, estimate_root_mean, estimate_share])
def test_one_cluster_has_no_interval_and_says_so(estimator) -> None:
    e = estimator(draw(9), confidence_level=0.95, clusters=torch.zeros(9, dtype=torch.int64))
    assert (e.low, e.high, e.standard_error) == (None, None, None)
    assert "one cluster" in e.reason
    assert e.known > 0


@pytest.mark.parametrize("n_clusters", [8, 40])
def test_intervals_cover_over_drawing_of_clusters(n_clusters: int) -> None:
    """Accuracies that differ from image to image: a random effect; intervals of independent pixels miss it."""
    n_sets, pixels, level = 800, 60, 0.95
    generator = torch.Generator().manual_seed(n_clusters)
    clusters = torch.arange(n_clusters).repeat_interleave(pixels)
    covered = dict.fromkeys(["mean", "share", "independent"], 0)
    for _ in range(n_sets):
        of_image = 0.5 + 0.5 * torch.rand(n_clusters, generator=generator, dtype=torch.float64)
        right = torch.rand(n_clusters, pixels, generator=generator, dtype=torch.float64) < of_image[:, None]
        y = right.flatten().to(torch.float64)
        for name, e in {
            "mean": estimate_mean(y, confidence_level=level, clusters=clusters),
            "share": estimate_share(y, confidence_level=level, clusters=clusters),
            "independent": estimate_share(y, confidence_level=level),
        }.items():
            covered[name] += e.low <= 0.75 <= e.high
    deviation = sqrt(level * (1 - level) / n_sets)
    assert abs(covered["mean"] / n_sets - level) < 3.5 * deviation
    assert abs(covered["share"] / n_sets - level) < 3.5 * deviation
    assert covered["independent"] / n_sets < 0.8
