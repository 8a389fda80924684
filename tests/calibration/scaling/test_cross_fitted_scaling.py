"""Folds, and temperatures that their own samples cannot move."""

import pytest
import torch

from debiased_laplace.calibration.predictions.classification import read_classification, reduce_probabilities
from debiased_laplace.calibration.predictions.probabilities import Probabilities
from debiased_laplace.calibration.scaling import cross_fitting
from debiased_laplace.calibration.scaling.cross_fitting import (
    choose_rows,
    cross_fit_temperature,
    scaled_negative_log_likelihood,
    warn_about_saturation,
)
from debiased_laplace.calibration.scaling.folds import draw_folds
from debiased_laplace.calibration.scaling.temperature import fit_temperature


@pytest.mark.parametrize(("n", "folds"), [(100, 5), (7, 5), (3, 3), (2, 2)])
def test_folds_are_equal_in_size_and_drawn_by_the_seed(n: int, folds: int) -> None:
    fold = draw_folds(n, seed=1)
    counts = torch.bincount(fold)
    assert len(counts) == folds
    assert counts.max() - counts.min() <= 1
    assert torch.equal(fold, draw_folds(n, seed=1))
    if n == 100:
        assert not torch.equal(fold, draw_folds(n, seed=2))
        assert not torch.equal(fold, torch.arange(n) % 5)


def test_clusters_stay_together() -> None:
    clusters = torch.arange(300) % 37
    fold = draw_folds(300, seed=0, clusters=clusters)
    assert all(len(fold[clusters == c].unique()) == 1 for c in range(37))
    assert len(fold.unique()) == 5


def test_one_unit_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least two units; got 1 test sample"):
        draw_folds(1, seed=0)
    with pytest.raises(ValueError, match="got 1 cluster"):
        draw_folds(5, seed=0, clusters=torch.zeros(5, dtype=torch.int64))


def test_a_temperature_never_sees_its_own_fold(draw_classification) -> None:
    """Wrong labels all over one fold move every temperature but that fold's own."""
    p, y, _ = draw_classification(400, sharpness=1.7, seed=1)
    before = cross_fit_temperature(read_classification("m", p, y, task="multiclass"), seed=3)
    for k in range(5):
        wrong = torch.where(before.fold == k, (y + 1) % 10, y)
        after = cross_fit_temperature(read_classification("m", p, wrong, task="multiclass"), seed=3)
        assert torch.equal(after.fold, before.fold)
        for j in range(5):
            moved = abs(after.per_fold[j] - before.per_fold[j]) / before.per_fold[j]
            assert moved < 1e-9 if j == k else moved > 0.01
    assert torch.equal(before.temperature, torch.tensor(before.per_fold, dtype=torch.float64)[before.fold])


def test_folds_against_plain_fits(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=2.0, seed=2)
    fit = cross_fit_temperature(read_classification("m", p, y, task="multiclass"), seed=0)
    for k in range(5):
        others = fit.fold != k
        alone = fit_temperature(p[others].log() - p[others].log().amax(dim=1, keepdim=True), y[others])
        assert fit.per_fold[k] == pytest.approx(alone.temperature, rel=1e-8)


def test_large_test_sets_are_fitted_on_a_part(monkeypatch, draw_classification) -> None:
    assert torch.equal(choose_rows(20_000, 10, seed=0), torch.arange(20_000))
    rows = choose_rows(100_000, 10, seed=0)
    assert len(rows.unique()) == 20_000
    assert (len(choose_rows(100_000, 1000, seed=0)), len(choose_rows(100_000, 50_000, seed=0))) == (10_000, 2_000)
    monkeypatch.setattr(cross_fitting, "MOST_ROWS", 2_000)
    p, y, _ = draw_classification(8_000, sharpness=2.0, seed=3)
    fit = cross_fit_temperature(read_classification("m", p, y, task="multiclass"), seed=0)
    assert fit.pooled.n == 2_000
    assert abs(fit.pooled.temperature - 2.0) < 4 * fit.pooled.standard_error


def test_reading_scales_rows_as_a_softmax_of_logits_does(draw_classification) -> None:
    p, y, _ = draw_classification(60, sharpness=1.5, seed=4)
    T = torch.linspace(0.4, 3.0, 60, dtype=torch.float64)
    expected = (p.log() / T[:, None]).softmax(dim=1)
    scaled = Probabilities(p, temperature=T)
    torch.testing.assert_close(torch.cat([rows for _, rows in scaled.portions()]), expected)
    some = torch.tensor([5, 1, 40])
    torch.testing.assert_close(scaled.take(some), expected[some])
    reduced = reduce_probabilities(scaled, y, n_bins=15)
    torch.testing.assert_close(reduced.true_class_probability, expected.gather(1, y[:, None])[:, 0])
    torch.testing.assert_close(reduced.confidence, expected.max(dim=1).values)
    plain = read_classification("m", p, y, task="multiclass")
    torch.testing.assert_close(scaled_negative_log_likelihood(plain, T), -reduced.true_class_probability.log())


def test_posterior_samples_are_averaged_before_they_are_scaled(draw_classification) -> None:
    samples = torch.stack([draw_classification(40, sharpness=s, seed=5)[0] for s in (0.5, 1.0, 2.0)])
    scaled = Probabilities(samples, temperature=torch.full((40,), 1.7, dtype=torch.float64))
    expected = (samples.mean(dim=0).log() / 1.7).softmax(dim=1)
    torch.testing.assert_close(torch.cat([rows for _, rows in scaled.portions()]), expected)
    assert scaled.n_posterior_samples is None


def test_saturation_is_told_only_where_it_matters(draw_classification) -> None:
    p, y, _ = draw_classification(200, sharpness=1.0, seed=6)
    assert warn_about_saturation("m", read_classification("m", p, y, task="multiclass"), 1.0) is None
    lost = p.clone()
    lost[0, y[0]] = 0.0
    lost = lost / lost.sum(dim=1, keepdim=True)
    text = warn_about_saturation("m", read_classification("m", lost, y, task="multiclass"), 1.0)
    assert "1 true classes have probability 0" in text
    assert "pass logits={'m': ...}" in text
    sharp = (40 * p.log()).softmax(dim=1)
    right = sharp.argmax(dim=1)
    coarse = read_classification("m", sharp.half(), right, task="multiclass")
    assert bool((sharp.half() == 0).any())
    assert warn_about_saturation("m", coarse, 1.0) is None
    assert "torch.float16 rounded to 0" in warn_about_saturation("m", coarse, 5.0)
