"""Metrics of Gaussian predictions: proper scores, errors, and the size of the error bars."""

from math import log, pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    normal_quantile,
)
from debiased_laplace.calibration.metrics.curves import covered
from debiased_laplace.calibration.predictions.regression import RegressionPredictions

INTERVAL_LEVEL = 0.9  # of `picp` and `mpiw`


def gaussian_negative_log_likelihood(predictions: RegressionPredictions) -> Float[Tensor, " n"]:
    r"""$\frac12 z^2 + \log \sigma + \frac12 \log 2\pi$ in nats per sample, averaged over outputs."""
    z, sigma = predictions.z_scores, predictions.standard_deviation
    return (z.square() / 2 + sigma.log() + log(2 * pi) / 2).mean(dim=1)


def gaussian_crps(predictions: RegressionPredictions) -> Float[Tensor, " n"]:
    r"""Continuous ranked probability score $\sigma [z (2 \Phi(z) - 1) + 2 \varphi(z) - \pi^{-1/2}]$.

    In the unit of the targets, averaged over outputs.

    References:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437, section 4.2.
    """
    z, sigma = predictions.z_scores, predictions.standard_deviation
    density = (-z.square() / 2).exp() / sqrt(2 * pi)
    return (sigma * (z * torch.erf(z / sqrt(2)) + 2 * density - 1 / sqrt(pi))).mean(dim=1)


def measure_regression(predictions: RegressionPredictions, *, confidence_level: float) -> dict[str, Estimate]:
    """Every metric of one method; several outputs are averaged within each sample.

    Args:
        predictions: means, standard deviations and targets.
        confidence_level: of all intervals.
    """
    level = confidence_level
    squares = (predictions.targets - predictions.mean).square().mean(dim=1)
    sharpness = predictions.standard_deviation.mean(dim=1)
    width = 2 * normal_quantile(INTERVAL_LEVEL) * sharpness
    z_squares = predictions.z_scores.square().mean(dim=1)
    inside = covered(predictions, INTERVAL_LEVEL)
    nll = gaussian_negative_log_likelihood(predictions)
    return {
        "nll": estimate_mean(nll, confidence_level=level),
        "crps": estimate_mean(gaussian_crps(predictions), confidence_level=level),
        "rmse": estimate_root_mean(squares, confidence_level=level),
        "z_scale": estimate_root_mean(z_squares, confidence_level=level),
        "picp": estimate_share(inside, confidence_level=level),
        "mpiw": estimate_mean(width, confidence_level=level),
        "sharpness": estimate_mean(sharpness, confidence_level=level),
    }
