"""Temperatures that no sample had a part in which they scale."""

from dataclasses import dataclass
from math import exp, log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.predictions.classification import ClassificationPredictions
from debiased_laplace.calibration.predictions.drawing import draw_rows
from debiased_laplace.calibration.predictions.probabilities import Probabilities, portions_of
from debiased_laplace.calibration.scaling.folds import draw_folds
from debiased_laplace.calibration.scaling.temperature import (
    TemperatureFit,
    fit_temperature,
    negative_log_likelihood_at,
)

MOST_ROWS = 20_000
MOST_NUMBERS = 10_000_000  # of the rows that a temperature is fitted on: 80 MB
FEWEST_ROWS = 2_000
_HARMLESS = 1e-3  # what all zeros of a row may hide, as a probability


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Temperatures of one method.

    Attributes:
        fold: of every sample.
        per_fold: the temperature of each fold's samples, fitted on the other folds.
        pooled: fitted on all of them.
        n_at_bound: how many of the folds' fits ended at a bound.
    """

    fold: Int[Tensor, " n"]
    per_fold: tuple[float, ...]
    pooled: TemperatureFit
    n_at_bound: int

    @property
    def temperature(self) -> Float[Tensor, " n"]:
        """What every sample is scaled with."""
        return torch.tensor(self.per_fold, dtype=torch.float64)[self.fold]


def cross_fit_temperature(predictions: ClassificationPredictions, *, seed: int) -> CrossFit:
    """A temperature for each of five folds, fitted on the other four.

    Cost: about a dozen passes over at most 20,000 rows, or 10 million probabilities, drawn by the seed.

    Args:
        predictions: of one method; a cluster of samples stays in one fold.
        seed: of folds and rows.

    Raises:
        ValueError: if there are not two independent samples.
    """
    clusters = predictions.clusters
    fold = draw_folds(predictions.n, seed=seed, clusters=clusters)
    rows = choose_rows(predictions.n, predictions.n_classes, seed=seed)
    logits = predictions.source.take_logits(rows)
    labels = predictions.targets[rows].to(logits.device)
    fold_of_row = fold[rows].to(logits.device)
    own = None if clusters is None else clusters[rows]
    pooled = fit_temperature(logits, labels, clusters=own)
    fits = [
        fit_temperature(logits, labels, rows=(fold_of_row != k).nonzero()[:, 0], start=pooled.temperature)
        for k in range(int(fold.max()) + 1)
    ]
    at_bound = sum(fit.at_bound is not None for fit in fits)
    return CrossFit(fold, tuple(fit.temperature for fit in fits), pooled, at_bound)


def fit_on_validation(probabilities: Probabilities, labels: Int[Tensor, " n"], *, seed: int) -> TemperatureFit:
    """One temperature from labelled samples outside the test set.

    Args:
        probabilities: of the validation samples.
        labels: their true classes.
        seed: of the rows, where there are more than 20,000.
    """
    rows = choose_rows(probabilities.n, probabilities.n_classes, seed=seed)
    logits = probabilities.take_logits(rows)
    return fit_temperature(logits, labels.cpu()[rows].to(logits.device))


def choose_rows(n: int, n_classes: int, *, seed: int) -> Int[Tensor, " m"]:
    """The samples to fit on: all, or as many as are worth their time, drawn by the seed and in rising order."""
    return draw_rows(n, min(MOST_ROWS, max(FEWEST_ROWS, MOST_NUMBERS // n_classes)), seed=seed)


def scaled_negative_log_likelihood(
    predictions: ClassificationPredictions, temperature: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Loss of every sample at its own temperature, in nats, on the CPU; one pass over the probabilities."""
    source = predictions.source
    device = source.values.device
    targets, temperature = predictions.targets.to(device), temperature.to(device)
    losses = [
        negative_log_likelihood_at(source.take_logits(rows), targets[rows], temperature[rows])
        for rows in portions_of(predictions.n, source.values.numel() // max(1, predictions.n))
    ]
    return torch.cat(losses).cpu()


def warn_about_saturation(method: str, predictions: ClassificationPredictions, temperature: float) -> str | None:
    """Why a temperature from these probabilities cannot be trusted, or None.

    Logits are lost where a probability was rounded to 0. That matters for true classes, and for others only if the
    temperature would make them visible again.
    """
    source = predictions.source
    if source.logits is not None:
        return None
    lost = f"pass logits={{{method!r}: ...}}"
    if predictions.n_impossible:
        return (
            f"{method}: the temperature is unreliable, since {predictions.n_impossible} true classes have probability "
            f"0 and their logits are lost; {lost}."
        )
    number = torch.finfo(source.values.dtype)
    hidden = source.n_classes * exp(log(number.smallest_normal * number.eps) / temperature)
    rows = choose_rows(predictions.n, predictions.n_classes, seed=0).to(source.values.device)
    zeros = (source.values[..., rows, :] == 0).any(dim=-1)
    if hidden > _HARMLESS and bool(zeros.any()):
        return (
            f"{method}: a temperature of {temperature:.3g} is unreliable, since {zeros.double().mean().item():.1%} of "
            f"the rows hold probabilities that {source.values.dtype} rounded to 0; {lost}."
        )
    return None
