"""Scores of a constant prediction, which uses no inputs: what every method has to beat."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.counts import CountPredictions
from debiased_laplace.calibration.distributions import RegressionPredictions

ROUNDING = 1e-12  # relative; a smaller spread is none


def score_class_frequencies(labels: Int[Tensor, " n"], n_classes: int) -> dict[str, float]:
    """Return the scores of the class frequencies of the test set.

    The NLL and the Brier score of a sample are those of the frequencies of all other samples, one of each class added;
    the accuracy is that of the most frequent class.
    """
    n, counts = labels.numel(), torch.bincount(labels.cpu(), minlength=n_classes).double()
    total, squares = n - 1 + n_classes, (counts + 1).square().sum() - (counts + 1).square() + counts.square()
    p = counts / total  # of the class of a sample, from all others
    brier = squares / total**2 - 2 * p + 1
    share = counts / n
    nll = -torch.xlogy(share, torch.where(counts > 0, p, 1.0)).sum()
    return {"nll": nll.item(), "brier": (share * brier).sum().item(), "accuracy": share.max().item()}


def score_constant_gaussian(targets: Float[Tensor, "n d"]) -> dict[str, float]:
    """Return the scores of a Gaussian with the mean and variance of all other targets; empty where they have none."""
    y, n = targets.cpu().double(), len(targets)
    if n < 3:
        return {}
    deviations = y - y.mean(dim=0)
    sums = deviations.square().sum(dim=0) - n / (n - 1) * deviations.square()
    if not bool((sums > ROUNDING * y.square().sum(dim=0)).all()):
        return {}
    return _scores_of(RegressionPredictions((y - n / (n - 1) * deviations)[None], y, (sums / (n - 2)).sqrt()))


def score_constant_rate(targets: Float[Tensor, "n d"]) -> dict[str, float]:
    """Return the scores of a Poisson distribution with the mean of all other targets; empty where that may be 0."""
    y, n = targets.cpu().double(), len(targets)
    if n < 2 or bool(((y > 0).sum(dim=0) < 2).any()):
        return {}
    rates = (y.sum(dim=0) - y) / (n - 1)
    p = CountPredictions(rates[None], y, rates.sqrt())
    return _scores_of(p) | {"deviance": p.deviance.mean().item()}


def _scores_of(p: RegressionPredictions) -> dict[str, float]:
    scores = {"nll": p.negative_log_density, "crps": p.ranked_probability_score}
    return {**{k: x.mean().item() for k, x in scores.items()}, "rmse": p.errors.square().mean().sqrt().item()}
