"""Standard deviations multiplied by the scale of the errors: what temperature scaling is to a Gaussian."""

from dataclasses import replace
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.predictions.distributions import (
    Distribution,
    NormalDistribution,
    NormalMixture,
    SampledDistribution,
)
from debiased_laplace.calibration.predictions.regression import RegressionPredictions
from debiased_laplace.calibration.scaling.folds import draw_folds


def fit_factor(predictions: RegressionPredictions) -> float:
    r"""$\sqrt{\frac{1}{nd} \sum z^2}$: the likeliest factor of the standard deviations of independent Gaussians."""
    return sqrt(predictions.z_scores.square().mean().item())


def cross_fit_factor(predictions: RegressionPredictions, *, seed: int) -> tuple[Float[Tensor, " n"], tuple[float, ...]]:
    """A factor for each of five folds, from the errors of the other four.

    Args:
        predictions: of one method.
        seed: of the folds.

    Returns:
        The factor of every sample, and those of the folds; 0 where all errors of the other folds are.

    Raises:
        ValueError: if there are not two samples.
    """
    fold = draw_folds(predictions.n, seed=seed)
    squares = predictions.z_scores.square().mean(dim=1)
    n_folds = int(fold.max()) + 1
    sums = torch.bincount(fold, weights=squares, minlength=n_folds)
    counts = torch.bincount(fold, minlength=n_folds)
    # a sum of the others, not a difference to the total: one huge error must not leave its rounding to small ones
    others = torch.ones(n_folds, n_folds, dtype=sums.dtype) - torch.eye(n_folds, dtype=sums.dtype)
    per_fold = ((others @ sums) / (others @ counts.to(sums.dtype))).sqrt()
    return per_fold[fold], tuple(per_fold.tolist())


def fitting_cost(predictions: RegressionPredictions) -> float:
    """Expected loss, in nats per sample and output, from not knowing the factor better; for independent Gaussians."""
    squares = predictions.z_scores.square().mean(dim=1)
    if predictions.n < 2 or squares.max().item() == 0:
        return 0.0
    return (squares / squares.mean()).var().item() / (4 * predictions.n)


def scale_spread(predictions: RegressionPredictions, factor: Float[Tensor, " n"]) -> RegressionPredictions:
    """The same predictions with every deviation from the mean multiplied, noise and correlations included.

    Args:
        predictions: of one method.
        factor: of every sample, positive.
    """
    columns = factor[:, None]
    scaled = _scale(predictions.distribution, columns.to(predictions.distribution.mean.device))
    return replace(
        predictions,
        distribution=scaled,
        standard_deviation=predictions.standard_deviation * columns,
        noise=None if predictions.noise is None else predictions.noise * columns,
    )


def _scale(distribution: Distribution, factor: Float[Tensor, "n 1"]) -> Distribution:
    mean = distribution.mean
    if isinstance(distribution, NormalDistribution):
        L = distribution.cholesky
        return NormalDistribution(
            mean, distribution.standard_deviation * factor, None if L is None else L * factor[:, :, None]
        )
    values = mean + factor * (distribution.values - mean)
    if isinstance(distribution, NormalMixture):
        return NormalMixture(values, distribution.noise * factor)
    return SampledDistribution(values)
