"""Scores of a constant prediction, against a loop over samples."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from debiased_laplace.calibration.metrics.constant import score_class_frequencies, score_constant_gaussian


def test_class_frequencies_are_those_of_all_other_samples_and_one_of_each_class() -> None:
    y, C = [0, 2, 2, 1, 2, 0, 2, 4], 6  # two classes without a sample
    nll, brier = [], []
    for i, label in enumerate(y):
        p = np.bincount(y[:i] + y[i + 1 :], minlength=C) + 1.0
        p /= p.sum()
        nll.append(-np.log(p[label]))
        brier.append(((p - np.eye(C)[label]) ** 2).sum())
    found = score_class_frequencies(torch.tensor(y), C)
    assert found == pytest.approx({"nll": np.mean(nll), "brier": np.mean(brier), "accuracy": 0.5}, rel=1e-12)


def test_the_gaussian_is_that_of_all_other_targets() -> None:
    y = np.random.default_rng(3).gamma(2.0, 3.0, (9, 2)) + 40.0
    nll, crps, squares = [], [], []
    for i in range(9):
        others = np.delete(y, i, 0)
        m, s = others.mean(0), others.std(0, ddof=1)
        z = (y[i] - m) / s
        nll.append(-norm.logpdf(y[i], m, s))
        crps.append(s * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)))
        squares.append((y[i] - m) ** 2)
    expected = {"nll": np.mean(nll), "crps": np.mean(crps), "rmse": np.sqrt(np.mean(squares))}
    assert score_constant_gaussian(torch.tensor(y)) == pytest.approx(expected, rel=1e-9)
    for none in (torch.tensor(y[:2]), torch.full((5, 1), 0.3)):  # too few, or without spread
        assert score_constant_gaussian(none) == {}
