"""The law of the number of right predictions in a bin, and the test that rests on it."""

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
import torch
from scipy.stats import binom

from debiased_laplace.calibration.metrics.binning import bin_confidences
from debiased_laplace.calibration.metrics.consistency import check_consistency, law_of_successes


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bins_of(confidence: torch.Tensor, correct: torch.Tensor, n_bins: int = 15):
    return bin_confidences(confidence, correct, n_bins=n_bins)


def test_law_by_summing_over_all_outcomes() -> None:
    chances = [0.1, 0.5, 0.93, 1.0, 0.0, 0.4]
    expected = np.zeros(7)
    for outcome in product((0, 1), repeat=6):
        expected[sum(outcome)] += np.prod([c if o else 1 - c for c, o in zip(chances, outcome, strict=True)])
    np.testing.assert_allclose(law_of_successes(tensor(chances)).numpy(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", [1, 64, 65, 700, 4096])
def test_equal_chances_are_scipys_binomial(n: int) -> None:
    law = law_of_successes(torch.full((n,), 0.83, dtype=torch.float64))
    np.testing.assert_allclose(law.numpy(), binom.pmf(np.arange(n + 1), n, 0.83), rtol=0, atol=1e-13)


def test_moments_of_a_large_bin() -> None:
    chances = 0.3 + 0.7 * torch.rand(50_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law, k = law_of_successes(chances), torch.arange(50_001, dtype=torch.float64)
    assert law.sum().item() == pytest.approx(1, abs=1e-11)
    assert (law * k).sum().item() == pytest.approx(chances.sum().item(), rel=1e-10)
    variance = (law * (k - chances.sum()).square()).sum().item()
    assert variance == pytest.approx((chances * (1 - chances)).sum().item(), rel=1e-7)


def test_band_of_equal_confidences_is_the_binomials() -> None:
    bins = bins_of(torch.full((200,), 0.7, dtype=torch.float64), torch.ones(200).double())
    c = check_consistency(bins, n_resamples=2_000, confidence_level=0.9, seed=0)
    assert c.low.nan_to_num().max().item() == binom.ppf(0.05, 200, 0.7) / 200
    assert c.high.nan_to_num().max().item() == binom.ppf(0.95, 200, 0.7) / 200
    assert int(c.low.isnan().sum()) == 14
    assert c.p_value == pytest.approx(1 / 2_001)


def test_p_value_of_a_calibrated_bin_is_exact() -> None:
    """One bin, ten samples at 1/2: the p-value of 8 right is P(|B - 5| >= 3) for a binomial B."""
    exact = sum(comb(10, k) for k in range(11) if abs(k - 5) >= 3) / 2**10
    bins = bins_of(tensor([0.5] * 10), tensor([1] * 8 + [0] * 2), n_bins=3)
    p = check_consistency(bins, n_resamples=20_000, confidence_level=0.9, seed=0).p_value
    assert abs(p - exact) < 4 * sqrt(exact * (1 - exact) / 20_000)


def test_p_value_over_several_bins_is_that_of_plain_resampling(draw_classification) -> None:
    p, y, _ = draw_classification(150, sharpness=1.15, seed=9)
    confidence, predicted = p.max(dim=1)
    bins = bins_of(confidence, (predicted == y).double(), n_bins=5)
    generator = torch.Generator().manual_seed(1)
    right = (torch.rand(20_000, 150, generator=generator, dtype=torch.float64) < confidence).double()
    expected = bins.sum_per_bin(confidence)
    sums = torch.zeros(20_000, 5, dtype=torch.float64).index_add_(1, bins.bin, right)
    observed = (bins.sum_per_bin(bins.correct) - expected).abs().sum()
    plain = ((sums - expected).abs().sum(dim=1) >= observed - 1e-9).double().mean().item()
    mine = check_consistency(bins, n_resamples=20_000, confidence_level=0.9, seed=0).p_value
    assert 0.02 < plain < 0.98
    assert abs(mine - plain) < 4 * sqrt(2 * plain * (1 - plain) / 20_000)


def test_certain_predictions_cannot_vary() -> None:
    bins = bins_of(torch.ones(6).double(), tensor([1, 1, 1, 1, 1, 1]))
    c = check_consistency(bins, n_resamples=50, confidence_level=0.9, seed=0)
    assert (c.low[-1].item(), c.high[-1].item(), c.p_value) == (1.0, 1.0, 1.0)
    wrong = check_consistency(
        bins_of(torch.ones(6).double(), tensor([1] * 5 + [0])), n_resamples=50, confidence_level=0.9, seed=0
    )
    assert wrong.p_value == 1 / 51


def test_draws_follow_the_seed_and_no_global_state(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=1.1, seed=6)
    bins = bins_of(p.max(dim=1).values, (p.argmax(dim=1) == y).double())
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, again, other = (
        check_consistency(bins, n_resamples=500, confidence_level=0.95, seed=s).p_value for s in (1, 1, 2)
    )
    assert one == again != other
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.slow
def test_size_and_power_of_the_consistency_test(draw_classification) -> None:
    n_sets, level = 1000, 0.05
    rejected = {}
    for sharpness in (1.0, 1.5):
        rejected[sharpness] = 0
        for seed in range(n_sets):
            p, y, _ = draw_classification(300, sharpness=sharpness, seed=1000 + seed)
            bins = bins_of(p.max(dim=1).values, (p.argmax(dim=1) == y).double())
            test = check_consistency(bins, n_resamples=199, confidence_level=0.9, seed=seed)
            rejected[sharpness] += test.p_value <= level
    z = (rejected[1.0] - level * n_sets) / sqrt(level * (1 - level) * n_sets)
    assert abs(z) < 3.5
    assert rejected[1.5] > 0.95 * n_sets
