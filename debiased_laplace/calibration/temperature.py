r"""The temperature $T$ that makes $\mathrm{softmax}(z / T)$ most likely, and the logits it is fitted on.

In $\beta = 1 / T$ the mean loss $\frac1n \sum_i \log \sum_c e^{\beta z_{ic}} - \beta z_{i y_i}$ is convex; logits count
up to a constant per row, so that log-probabilities are logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate
from debiased_laplace.calibration.inputs import as_tensor, first_bad
from debiased_laplace.calibration.intervals import Units, without_interval
from debiased_laplace.calibration.probabilities import (
    ClassificationPredictions,
    Probabilities,
    draw_rows,
    mean_prediction,
    portions_of,
    read_probabilities,
)

N_FOLDS = 5
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.02, 50.0
MOST_ROWS, FEWEST_ROWS, MOST_NUMBERS = 20_000, 2_000, 10_000_000  # that a temperature is fitted on: at most 80 MB
_AGREEMENT, _LOOKED_AT = 0.02, 1000  # between probabilities and the softmax of given logits, in so many rows
_HARMLESS = 1e-3  # what all zeros of a row may hide, as a probability


def draw_folds(units: Units, *, seed: int) -> Int[Tensor, " n"]:
    """Draw five folds of equally many units, fewer where there are fewer units; a cluster stays in one fold."""
    order = torch.randperm(units.count, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(units.count, dtype=torch.int64)
    fold[order] = torch.arange(units.count) % min(N_FOLDS, units.count)
    return fold if units.codes is None else fold[units.codes]


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature, above 1 where the logits are over-confident.

    Attributes:
        standard_error: robust to wrong logits and to clusters; None at a bound, or without a second unit.
        at_bound: the bound beyond which the likelihood still rises: "lowest" where (nearly) all labels are the most
            probable class, "highest" where the logits tell nothing; None for an optimum between them.
        n: samples it was fitted on.
        cost: expected loss, in nats per sample, from not knowing the temperature better; 0 without a standard error.
    """

    temperature: float
    standard_error: float | None
    at_bound: str | None
    n: int
    cost: float = 0.0


def fit_temperature(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], units: Units) -> TemperatureFit:
    """Fit the temperature of maximum likelihood, between 0.02 and 50, to logits whose largest in each row is 0.

    Cost: about fifteen passes over the logits, in portions of 8 MB.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), arXiv 1706.04599 (temperature scaling);
        White (1982), doi:10.2307/1912526 (standard error under a wrong model).
    """
    from scipy.optimize import brentq

    def slope(log_beta: float) -> float:
        return _differentiate(logits, labels, exp(log_beta))[0].mean().item()

    ends = -log(HIGHEST_TEMPERATURE), -log(LOWEST_TEMPERATURE)
    lowest, highest = slope(ends[0]), slope(ends[1])
    if lowest > 0:
        return TemperatureFit(HIGHEST_TEMPERATURE, None, "highest", units.n)
    if highest < 0:
        return TemperatureFit(LOWEST_TEMPERATURE, None, "lowest", units.n)
    # equal logits are as good at any temperature
    beta = 1.0 if lowest == highest else exp(brentq(slope, *ends, xtol=1e-12, rtol=1e-12))
    slopes, curvature = _differentiate(logits, labels, beta)
    # the spread of the slopes over units, whose mean is zero at the fit
    per_unit = units.sums(slopes.cpu())
    if len(per_unit) < 2 or curvature <= 0:
        return TemperatureFit(1 / beta, None, None, units.n)
    error = sqrt(len(per_unit) / (len(per_unit) - 1) * per_unit.square().sum().item()) / (units.n * curvature)
    return TemperatureFit(1 / beta, error / beta**2, None, units.n, curvature * error**2 / 2)


def _differentiate(
    logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], beta: float
) -> tuple[Float[Tensor, " n"], float]:
    """Slope of every row's loss in beta, and the mean curvature."""
    slopes, curvature = [], 0.0
    for rows in portions_of(*logits.shape):
        z = logits[rows]
        p = (beta * z).softmax(dim=1)
        mean = (p * z).sum(dim=1)
        slopes.append(mean - z.gather(1, labels[rows][:, None])[:, 0])
        curvature += ((p * z.square()).sum(dim=1) - mean.square()).clamp_min(0.0).sum().item()
    return torch.cat(slopes), curvature / len(logits)


def estimate_temperature(fit: TemperatureFit, units: Units) -> Estimate:
    """The fitted temperature with an interval that is symmetric for its logarithm."""
    if fit.at_bound is not None:
        why = "nearly all labels are the most probable class" if fit.at_bound == "lowest" else "the logits tell nothing"
        words = f"maximum likelihood, at its {fit.at_bound} bound"
        reason = f"{why}, so that the likelihood has no maximum between the bounds"
        return without_interval(fit.temperature, fit.n, estimator=words, reason=reason)
    if fit.standard_error is None:
        reason = "too few independent samples"
        return without_interval(fit.temperature, fit.n, estimator="maximum likelihood", reason=reason)
    factor = exp(units.quantile * fit.standard_error / fit.temperature)
    ends = (fit.temperature / factor, fit.temperature * factor)
    words = "maximum likelihood, robust standard error"
    return Estimate(fit.temperature, *ends, fit.standard_error, fit.n, words)


@dataclass(frozen=True, eq=False)
class CrossFit:
    """The temperature of each fold's samples, fitted on the other folds, and one fitted on all of them."""

    fold: Int[Tensor, " n"]
    per_fold: tuple[float, ...]
    pooled: TemperatureFit
    n_at_bound: int

    @property
    def temperature(self) -> Float[Tensor, " n"]:
        """The temperature of every sample."""
        return torch.tensor(self.per_fold, dtype=torch.float64)[self.fold]


def cross_fit_temperature(predictions: ClassificationPredictions, units: Units, *, seed: int) -> CrossFit:
    """Fit a temperature for each of five folds on the other four, at most on 20,000 rows drawn by the seed."""
    fold = draw_folds(units, seed=seed)
    rows = choose_rows(predictions.source, seed=seed)
    logits, labels = predictions.source.take_logits(rows), predictions.targets[rows]
    drawn = units.take(rows)

    def fit(chosen: Int[Tensor, " m"]) -> TemperatureFit:
        place = chosen.to(logits.device)
        return fit_temperature(logits[place], labels[chosen].to(logits.device), drawn.take(chosen))

    pooled = fit(torch.arange(len(rows)))
    fits = [fit((fold[rows] != k).nonzero()[:, 0]) for k in range(int(fold.max()) + 1)]
    n_at_bound = sum(f.at_bound is not None for f in fits)
    return CrossFit(fold, tuple(f.temperature for f in fits), pooled, n_at_bound)


def scaled_negative_log_likelihood(
    predictions: ClassificationPredictions, temperature: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Loss of every sample at its own temperature, in nats, on the CPU; one pass over the probabilities."""
    source, losses = predictions.source, []
    targets, temperature = (x.to(source.values.device) for x in (predictions.targets, temperature))
    for rows in source.portions():
        scaled = source.take_logits(rows) / temperature[rows][:, None]
        losses.append(scaled.logsumexp(dim=1) - scaled.gather(1, targets[rows][:, None])[:, 0])
    return torch.cat(losses).cpu()


def read_validation(method: str, predictions: Any, *, task: Literal["binary", "multiclass"]) -> Probabilities:
    """Read validation predictions: numbers between 0 and 1 are probabilities and must sum to 1, any others logits."""
    name = f"{method}, validation"
    values = as_tensor(predictions, f"Predictions of {name!r}")
    if values.numel() and values.isfinite().all() and not (values.min() >= 0 and values.max() <= 1):
        shape = torch.Size((values.shape[0], 2 if values.ndim == 1 else values.shape[-1]))
        logits = read_logits(name, values, shape=shape)
        return Probabilities(logits.to(torch.float64).softmax(dim=1), logits=logits)
    return read_probabilities(name, predictions, task=task)


def attach_logits(
    read: Mapping[str, ClassificationPredictions], logits: Mapping[str, Any]
) -> dict[str, ClassificationPredictions]:
    """Return predictions that know the logits they came from, and refuse logits of other probabilities."""
    unknown = [name for name in logits if name not in read]
    if unknown:
        raise ValueError(f"logits are given for {unknown}, but the methods are {list(read)}.")
    known = dict(read)
    for method, given in logits.items():
        source = known[method].source
        source = replace(source, logits=read_logits(method, given, shape=source.values.shape))
        rows = slice(0, min(source.n, _LOOKED_AT))
        worst = (source.take_logits(rows).softmax(dim=1) - mean_prediction(source.read(rows))).abs().max().item()
        if worst > _AGREEMENT:
            raise ValueError(
                f"The softmax of the logits of {method!r} must be its probabilities; they differ by up to {worst:.3g}."
            )
        known[method] = replace(known[method], source=source)
    return known


def read_logits(method: str, logits: Any, *, shape: torch.Size) -> Tensor:
    """Read finite logits of the shape of their probabilities, for two classes also (n,) = those of class 1."""
    where = f"Logits of {method!r}"
    z = as_tensor(logits, where)
    z = z if z.is_floating_point() else z.to(torch.float64)
    if z.ndim == 1 and shape[-1] == 2:
        z = torch.stack([torch.zeros_like(z), z], dim=1)
    if z.shape != shape[-2:]:
        raise ValueError(f"{where} must have the shape {tuple(shape[-2:])} of its probabilities; got {tuple(z.shape)}.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"{where} must be finite; {first_bad(~z.isfinite())}.")
    return z


def choose_rows(probabilities: Probabilities, *, seed: int) -> Int[Tensor, " m"]:
    """The samples to fit on: all, or as many as are worth their time, drawn by the seed and in rising order."""
    most = min(MOST_ROWS, max(FEWEST_ROWS, MOST_NUMBERS // probabilities.n_classes))
    return draw_rows(probabilities.n, most, seed=seed)


def warn_of_saturation(method: str, predictions: ClassificationPredictions, temperature: float) -> str | None:
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
    rows = choose_rows(source, seed=0).to(source.values.device)
    zeros = (source.values[..., rows, :] == 0).any(dim=-1)
    if hidden > _HARMLESS and bool(zeros.any()):
        return (
            f"{method}: a temperature of {temperature:.3g} is unreliable, since {zeros.double().mean().item():.1%} of "
            f"the rows hold probabilities that {source.values.dtype} rounded to 0; {lost}."
        )
    return None
