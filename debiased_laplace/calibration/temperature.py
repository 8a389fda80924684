r"""Temperature $T$ of maximum likelihood of $\mathrm{softmax}(z / T)$, and the logits z that it is fitted to.

In $\beta = 1 / T$ the mean loss $\frac1n \sum_i \log \sum_c e^{\beta z_{ic}} - \beta z_{i y_i}$ is convex. A constant
added to a row of logits changes nothing, so that log-probabilities are logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.inputs import as_tensor, first_bad, read_labels
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.probabilities import (
    ClassificationPredictions,
    PosteriorPredictive,
    Probabilities,
    draw_rows,
    mean_prediction,
    portions_of,
    read_probabilities,
)

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.02, 50.0
MOST_ROWS, FEWEST_ROWS, MOST_NUMBERS = 20_000, 2_000, 10_000_000  # that a temperature is fitted to: at most 80 MB
_AGREEMENT, _LOOKED_AT = 0.02, 1000  # between probabilities and the softmax of given logits, in so many rows
_HARMLESS = 1e-3  # total probability that the zeros of a row may hide


@dataclass(frozen=True)
class ScaleFit:
    """Fitted temperature, or factor of standard deviations; above 1 where the predictions are over-confident.

    Attributes:
        n: number of samples of the fit.
        cost: expected loss, in nats per sample and output, from the error of `value`; 0 where that is unknown.
        at_bound: whether the likelihood has no maximum between the bounds: (nearly) all labels are the most probable
            class, or the logits are uninformative.
    """

    value: float
    n: int
    cost: float = 0.0
    at_bound: bool = False


def fit_temperature(logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], units: Units) -> ScaleFit:
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
    if lowest > 0 or highest < 0:
        return ScaleFit(HIGHEST_TEMPERATURE if lowest > 0 else LOWEST_TEMPERATURE, units.n, at_bound=True)
    # equal logits are as good at any temperature
    beta = 1.0 if lowest == highest else exp(brentq(slope, *ends, xtol=1e-12, rtol=1e-12))
    slopes, curvature = _differentiate(logits, labels, beta)
    error = units.standard_error(slopes.cpu())
    return ScaleFit(1 / beta, units.n, error**2 / (2 * curvature) if error is not None and curvature > 0 else 0.0)


def _differentiate(
    logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], beta: float
) -> tuple[Float[Tensor, " n"], float]:
    """Return the slope of every row's loss in beta, and the mean curvature."""
    slopes, curvature = [], 0.0
    for rows in portions_of(*logits.shape):
        z = logits[rows]
        p = (beta * z).softmax(dim=1)
        mean = (p * z).sum(dim=1)
        slopes.append(mean - z.gather(1, labels[rows][:, None])[:, 0])
        curvature += ((p * z.square()).sum(dim=1) - mean.square()).clamp_min(0.0).sum().item()
    return torch.cat(slopes), curvature / len(logits)


def read_validation(
    method: str, validation: tuple[Any, Any], *, n_classes: int, task: Literal["binary", "multiclass"]
) -> tuple[Probabilities, Int[Tensor, " n"]]:
    """Read validation predictions and labels.

    Values between 0 and 1 are probabilities and must sum to 1; any others are logits.
    """
    given, targets = validation
    name = f"{method}, validation"
    where = f"Predictions of {name!r}"
    values = as_tensor(given.mean if isinstance(given, PosteriorPredictive) else given, where)
    if values.numel() and values.isfinite().all() and not (values.min() >= 0 and values.max() <= 1):
        logits = read_logits(name, values, (len(values), 2 if values.ndim == 1 else values.shape[-1]))
        source = Probabilities(logits.to(torch.float64).softmax(dim=1), logits=logits)
    else:
        source = read_probabilities(name, values, task=task)
    if source.n_classes != n_classes:
        raise ValueError(f"{where} must have the {n_classes} classes of the test set; got {source.n_classes}.")
    return source, read_labels(targets, n=source.n, n_classes=n_classes, where=where).cpu()


def attach_logits(
    read: Mapping[str, ClassificationPredictions], logits: Mapping[str, Any]
) -> dict[str, ClassificationPredictions]:
    """Return predictions with their logits, and check that their softmax is the probabilities."""
    unknown = [name for name in logits if name not in read]
    if unknown:
        raise ValueError(f"logits must be those of the methods, {list(read)}; got them for {unknown}.")
    known = dict(read)
    for method, given in logits.items():
        source = read[method].source
        source = replace(source, logits=read_logits(method, given, (source.n, source.n_classes)))
        rows = slice(_LOOKED_AT)
        worst = (source.take_logits(rows).softmax(dim=1) - mean_prediction(source.read(rows))).abs().max().item()
        if worst > _AGREEMENT:
            raise ValueError(
                f"The softmax of the logits of {method!r} must be its probabilities; they differ by up to {worst:.3g}."
            )
        known[method] = replace(read[method], source=source)
    return known


def read_logits(method: str, logits: Any, shape: tuple[int, int]) -> Float[Tensor, "n C"]:
    """Read finite logits (n, C), for two classes also (n,) = those of class 1."""
    where = f"Logits of {method!r}"
    z = as_tensor(logits, where)
    z = z if z.is_floating_point() else z.to(torch.float64)
    if z.ndim == 1 and shape[1] == 2:
        z = torch.stack([torch.zeros_like(z), z], dim=1)
    if z.shape != shape:
        raise ValueError(f"{where} must have the shape {shape} of its probabilities; got {tuple(z.shape)}.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"{where} must be finite; {first_bad(~z.isfinite())}.")
    return z


def choose_rows(probabilities: Probabilities, *, seed: int) -> Int[Tensor, " m"]:
    """Choose the samples of a fit, in rising order: at most 20,000, fewer for more than 500 classes."""
    most = min(MOST_ROWS, max(FEWEST_ROWS, MOST_NUMBERS // probabilities.n_classes))
    return draw_rows(probabilities.n, most, seed=seed)


def warn_of_saturation(method: str, predictions: ClassificationPredictions, temperature: float) -> list[str]:
    """Return a warning if probabilities that were rounded to 0 make a temperature unreliable."""
    source = predictions.source
    if source.logits is not None:
        return []
    if predictions.n_impossible:
        why = f"{predictions.n_impossible} true classes have probability 0 and their logits are lost"
    else:
        # zeros of other classes matter only if the temperature would raise what they hide
        number = torch.finfo(source.values.dtype)
        hidden = source.n_classes * exp(log(number.smallest_normal * number.eps) / temperature)
        rows = choose_rows(source, seed=0).to(source.values.device)
        zeros = (source.values[..., rows, :] == 0).any(dim=-1)
        if hidden <= _HARMLESS or not bool(zeros.any()):
            return []
        share = zeros.double().mean().item()
        why = f"{share:.1%} of the rows hold probabilities that {source.values.dtype} rounded to 0"
    return [
        f"{method}: a temperature of {temperature:.3g} is unreliable, since {why}; pass logits={{{method!r}: ...}}."
    ]
