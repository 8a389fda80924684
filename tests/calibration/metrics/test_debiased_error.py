"""The debiased squared error: unbiased, with a deviation that leaving out gives, also over clusters."""

from math import comb, sqrt

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.metrics import debiased_error as module
from debiased_laplace.calibration.metrics.binning import BinnedConfidences, bin_confidences
from debiased_laplace.calibration.metrics.debiased_error import (
    clustered_squared_error,
    debiased_squared_error,
    estimate_debiased_error,
    tabulate_clusters,
)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw_bins(draw_classification, n: int, *, sharpness: float, seed: int) -> BinnedConfidences:
    p, y, _ = draw_classification(n, sharpness=sharpness, seed=seed)
    return bin_confidences(p.max(dim=1).values, (p.argmax(dim=1) == y).double(), n_bins=15)


def value_of(bins: BinnedConfidences) -> float:
    return debiased_squared_error(bins.counts, bins.sum_per_bin(bins.correct), bins.sum_per_bin(bins.confidence)).item()


@pytest.mark.parametrize("n", [2, 5, 9])
def test_debiased_error_is_unbiased_exactly(n: int) -> None:
    """Sum over all outcomes of one bin: the expectation is (q - c)^2, without any simulation."""
    q, c = 0.7, 0.55
    expectation = sum(
        comb(n, k) * q**k * (1 - q) ** (n - k)
        * debiased_squared_error(tensor([n]), tensor([k]), tensor([n * c])).item()
        for k in range(n + 1)
    )  # fmt: skip
    assert expectation == pytest.approx((q - c) ** 2, abs=1e-12)


def test_debiased_error_weighs_bins_and_skips_single_samples() -> None:
    value = debiased_squared_error(tensor([4, 1, 0]), tensor([2, 1, 0]), tensor([3.2, 0.1, 0.0]))
    assert value.item() == pytest.approx(4 / 5 * ((0.5 - 0.8) ** 2 - 0.25 / 3))


def test_deviation_is_that_of_leaving_out_each_sample(draw_classification) -> None:
    bins = draw_bins(draw_classification, 40, sharpness=1.5, seed=1)
    left_out = []
    for i in range(40):
        rest = torch.arange(40) != i
        left_out.append(value_of(bin_confidences(bins.confidence[rest], bins.correct[rest], n_bins=15)))
    e = estimate_debiased_error(bins, confidence_level=0.9)
    assert e.value == pytest.approx(value_of(bins), abs=1e-15)
    assert e.standard_error == pytest.approx(sqrt(39 * np.var(left_out)), rel=1e-9)
    assert e.high - e.value == pytest.approx(1.644853627 * e.standard_error, rel=1e-8)


def test_without_pairs_there_is_no_interval() -> None:
    e = estimate_debiased_error(bin_confidences(tensor([0.2, 0.9]), tensor([0, 1]), n_bins=15), confidence_level=0.9)
    assert e.value == 0
    assert e.low is None
    assert "two predictions" in e.reason


def clustered_by_hand(bins: BinnedConfidences, clusters: Tensor) -> float:
    """The formula of `clustered_squared_error`, one bin and one cluster after the other."""
    total = 0.0
    for b in range(bins.n_bins):
        inside = bins.bin == b
        present = clusters[inside].unique().tolist()
        if len(present) < 2:
            continue
        surplus, n = (bins.correct - bins.confidence)[inside], int(inside.sum())
        delta = surplus.mean()
        sums = [(surplus - delta)[clusters[inside] == g].sum().item() for g in present]
        noise = len(present) / (len(present) - 1) * sum(s**2 for s in sums) / n**2
        total += n * (delta.item() ** 2 - noise)
    return total / bins.n


def test_clustered_error_by_hand_and_by_leaving_out_each_cluster(draw_classification, monkeypatch) -> None:
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 6 * 15 * 4)  # four clusters at once
    bins = draw_bins(draw_classification, 200, sharpness=1.5, seed=2)
    clusters = torch.randint(0, 23, (200,), generator=torch.Generator().manual_seed(0))
    assert len(clusters.unique()) == 23
    left_out = []
    for g in range(23):
        rest = clusters != g
        part = bin_confidences(bins.confidence[rest], bins.correct[rest], n_bins=15)
        left_out.append(clustered_by_hand(part, clusters[rest]))
    e = estimate_debiased_error(bins, confidence_level=0.9, clusters=clusters)
    assert e.value == pytest.approx(clustered_by_hand(bins, clusters), abs=1e-12)
    assert e.standard_error == pytest.approx(sqrt(22 * np.var(left_out)), rel=1e-8)


def test_copies_of_samples_add_nothing(draw_classification) -> None:
    bins = draw_bins(draw_classification, 90, sharpness=1.5, seed=3)
    copied = bin_confidences(bins.confidence.repeat(4), bins.correct.repeat(4), n_bins=15)
    one = estimate_debiased_error(bins, confidence_level=0.9, clusters=torch.arange(90))
    four = estimate_debiased_error(copied, confidence_level=0.9, clusters=torch.arange(90).repeat(4))
    for part in ("value", "low", "high", "standard_error"):
        assert getattr(four, part) == pytest.approx(getattr(one, part), rel=1e-9)
    assert four.value < estimate_debiased_error(copied, confidence_level=0.9).value  # too little taken off


def test_one_cluster_in_every_bin_has_no_interval() -> None:
    bins = bin_confidences(tensor([0.3, 0.3, 0.9, 0.9]), tensor([1, 0, 1, 1]), n_bins=2)
    e = estimate_debiased_error(bins, confidence_level=0.9, clusters=torch.tensor([0, 0, 1, 1]))
    assert (e.value, e.low) == (0.0, None)
    assert "two clusters" in e.reason


def draw_images(n_images: int, pixels: int, *, shift: float, seed: int) -> tuple[Float[Tensor, " n"], ...]:
    """Confidences, outcomes and images; the accuracy of an image varies around its confidence less `shift`."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.6 + 0.35 * torch.rand(n_images, pixels, generator=generator, dtype=torch.float64)
    effect = 0.3 * (torch.rand(n_images, 1, generator=generator, dtype=torch.float64) - 0.5)
    right = torch.rand(n_images, pixels, generator=generator, dtype=torch.float64) < confidence - shift + effect
    return confidence.flatten(), right.double().flatten(), torch.arange(n_images).repeat_interleave(pixels)


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_over_clusters_it_is_unbiased_and_its_interval_covers(shift: float) -> None:
    """Confidences between 0.6 and 0.95, right up to `shift`: the squared error is its square."""
    n_sets, level = 250, 0.95
    values, naive, covered = [], [], 0
    for seed in range(n_sets):
        confidence, right, clusters = draw_images(30, 80, shift=shift, seed=seed)
        bins = bin_confidences(confidence, right, n_bins=10)
        e = estimate_debiased_error(bins, confidence_level=level, clusters=clusters)
        values.append(e.value)
        naive.append(estimate_debiased_error(bins, confidence_level=level).value)
        covered += e.low <= shift**2 <= e.high
    assert abs(np.mean(values) - shift**2) < 4 * np.std(values) / sqrt(n_sets)
    too_large = np.subtract(naive, values)
    assert too_large.mean() > 10 * too_large.std() / sqrt(n_sets)  # what dependence does to the plain estimate
    assert covered / n_sets > level - 3.5 * sqrt(level * (1 - level) / n_sets)


def test_the_clusters_table_is_its_columns() -> None:
    bins = bin_confidences(tensor([0.1, 0.2, 0.9]), tensor([1, 0, 1]), n_bins=2)
    table = tabulate_clusters(bins, torch.tensor([1, 1, 0]))
    expected = tensor(
        [
            [[0, 1], [0, 0.1], [0, 0.01], [0, 0.1], [0, 1], [0, 1]],
            [[2, 0], [0.7, 0], [0.49, 0], [1.4, 0], [4, 0], [1, 0]],
        ]
    )
    torch.testing.assert_close(table, expected)
    assert clustered_squared_error(table.sum(dim=0)).item() == 0  # no bin that two clusters reach


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 1.1, 1.5])
def test_debiased_error_is_unbiased_and_its_interval_covers(draw_classification, sharpness: float) -> None:
    n_sets, level = 600, 0.95
    p, _, truth = draw_classification(1_000_000, sharpness=sharpness, seed=0)
    big = bin_confidences(p.max(dim=1).values, torch.zeros(len(p)).double(), n_bins=15)
    expected_correct = big.sum_per_bin(truth.gather(1, p.argmax(dim=1, keepdim=True))[:, 0])
    gap = expected_correct - big.sum_per_bin(big.confidence)
    population = (gap.square() / big.counts.clamp(min=1)).sum().item() / big.n
    debiased, plug_in, covered = [], [], 0
    for seed in range(n_sets):
        bins = draw_bins(draw_classification, 500, sharpness=sharpness, seed=5000 + seed)
        e = estimate_debiased_error(bins, confidence_level=level)
        surplus = bins.sum_per_bin(bins.correct - bins.confidence)
        plug_in.append((surplus.square() / bins.counts.clamp(min=1)).sum().item() / bins.n)
        debiased.append(e.value)
        covered += e.low <= population <= e.high
    z = [(np.mean(x) - population) / (np.std(x) / sqrt(n_sets)) for x in (debiased, plug_in)]
    assert abs(z[0]) < 4
    assert z[1] > 10  # the test would have seen a bias
    deviation = sqrt(level * (1 - level) / n_sets)
    assert covered / n_sets > level - 3.5 * deviation
    if sharpness == 1.5:  # near calibration the interval is wider than it need be
        assert covered / n_sets < level + 3.5 * deviation
