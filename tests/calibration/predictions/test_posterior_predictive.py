"""Samples reduced to mean and mutual information say the same as the samples themselves."""

import torch

from debiased_laplace.calibration.predictions.probabilities import PosteriorPredictive, read_probabilities
from debiased_laplace.calibration.predictions.uncertainty import measure_uncertainty


def test_reduced_samples_have_the_uncertainty_of_all_samples():
    generator = torch.Generator().manual_seed(3)
    samples = (2 * torch.randn(7, 50, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    whole = measure_uncertainty(read_probabilities("m", samples, task="multiclass"))
    reduced = PosteriorPredictive(samples.mean(0), whole.mutual_information)
    found = measure_uncertainty(read_probabilities("m", reduced, task="multiclass"))
    assert whole.mutual_information.min() > 0.01
    for name in ("confidence", "entropy", "mutual_information"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=0)


def test_means_alone_have_no_mutual_information():
    p = torch.full((5, 2), 0.5)
    assert measure_uncertainty(read_probabilities("m", p, task="binary")).mutual_information is None
