"""Reading of regression predictions and their targets, checked once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.counts import CountPredictions, Counts
from debiased_laplace.calibration.distributions import Gaussian, RegressionPredictions, SampledPredictions, Samples
from debiased_laplace.calibration.inputs import as_tensor, first_bad

Form = Gaussian | Samples | Counts
"""Forms of the predictions of regression."""
ASYMMETRY = 1e-4  # of a covariance, in units of its standard deviations: float32 products stay well below
_LARGEST = 1e70  # of errors in standard deviations, and of deviations: the fourth power must stay finite


def read_regressions(
    predictions: Mapping[str, Any], targets: Any, *, observation_noise: Any = None
) -> dict[str, RegressionPredictions]:
    """Read the predictions of every method, with one noise for all forms that lack it, or a mapping from methods."""
    if isinstance(observation_noise, Mapping):
        unknown = [str(name) for name in observation_noise if name not in predictions]
        if unknown:
            raise ValueError(
                f"observation_noise names {', '.join(map(repr, unknown))}; the methods are "
                f"{', '.join(map(repr, predictions))}."
            )
    read = {
        method: read_regression(method, p, targets, observation_noise=noise_of(method, p, observation_noise))
        for method, p in predictions.items()
    }
    of_counts = {method: isinstance(p, CountPredictions) for method, p in read.items()}
    if len(set(of_counts.values())) > 1:
        # probabilities and densities
        others = ", ".join(repr(method) for method, own in of_counts.items() if not own)
        raise ValueError(f"Expected Counts(rates) of every method or of none; got other forms of {others}.")
    return read


def noise_of(method: str, prediction: Any, observation_noise: Any) -> Any:
    """Choose the noise to add to one method's predictions; None for none."""
    if observation_noise is None or isinstance(observation_noise, Mapping):
        return None if observation_noise is None else observation_noise.get(method)
    form = as_form(prediction, f"Predictions of {method!r}")
    if _states_noise(form):
        return None
    if _is_deviation(form):
        raise ValueError(
            f"observation_noise={observation_noise!r} is given for all methods, but the pair (mean, standard "
            f"deviation) of {method!r} includes its noise; expected others. Name the methods that lack it: "
            f"observation_noise={{{method!r}: ...}} adds noise there, leaving a method out does not."
        )
    return observation_noise


def as_form(prediction: Any, where: str) -> Form:
    """Return predictions as `Gaussian`, `Samples` or `Counts`."""
    if isinstance(prediction, Form):
        return prediction
    if isinstance(prediction, (tuple, list)) and len(prediction) == 2:
        mean, spread = prediction
        is_covariance = as_tensor(spread, f"{where}, standard deviation").ndim == 3
        return Gaussian(mean, covariance=spread) if is_covariance else Gaussian(mean, standard_deviation=spread)
    if getattr(prediction, "ndim", 0) in (2, 3):
        return Samples(prediction)
    got = type(prediction).__name__
    if hasattr(prediction, "shape"):
        got += f" of shape {tuple(prediction.shape)}"
    raise ValueError(
        f"{where}: regression takes a pair (mean, standard deviation), a pair (mean, covariance), samples (samples, n) "
        f"or (samples, n, outputs), Gaussian(...), Samples(...) or Counts(...); got {got}."
    )


def read_regression(
    method: str, prediction: Any, targets: Any, *, observation_noise: Any = None
) -> RegressionPredictions:
    """Read predictions in any of their forms.

    Args:
        method: name of the method, for messages.
        prediction: a pair (mean, standard deviation) with the observation noise; a pair (mean, covariance) or an array
            of samples, which need `observation_noise`; or `Gaussian`, `Samples` or `Counts`.
        targets: (n,) or (n, outputs); None if only the spread is needed: the means are used in their place.
        observation_noise: standard deviation of the noise to add: a number, (outputs,) or (n, outputs).
    """
    where = f"Predictions of {method!r}"
    form = _state_noise(as_form(prediction, where), observation_noise, where)
    values = _read_values(form, where)
    y = values.mean(dim=0)
    if targets is not None:
        y = _read_columns(targets, where, "targets", y.shape).to(y.device)
    given = torch.float64 if isinstance(form, Gaussian) else as_tensor(_samples_of(form), where).dtype
    precision = torch.finfo(given if given.is_floating_point else values.dtype).eps
    read: RegressionPredictions
    if isinstance(form, Counts):
        if targets is not None:
            rule = "target must be a count (a whole number of at least 0)"
            _refuse((y < 0) | (y != y.round()), where, rule, y)
        read = CountPredictions(values, y, values.mean(dim=0).sqrt(), precision=precision)
    else:
        noise, cholesky, function = _read_spread(form, values, where)
        read = (
            SampledPredictions(values, y, torch.zeros_like(y), precision=precision)
            if noise is None
            else RegressionPredictions(values, y, noise, cholesky, precision, function)
        )
    deviation = read.standard_deviation
    usual = f"standard deviation must be positive, between {1 / _LARGEST:g} and {_LARGEST:g}"
    _refuse((deviation <= 1 / _LARGEST) | (deviation >= _LARGEST), where, usual, deviation)
    near = f"target must lie within {_LARGEST:g} standard deviations of its mean"
    _refuse(read.z_scores.abs() >= _LARGEST, where, near, deviation)
    return read


def _samples_of(form: Samples | Counts) -> Any:
    return form.rates if isinstance(form, Counts) else form.values


def _is_deviation(form: Form) -> bool:
    """Return whether predictions have a standard deviation, which includes the noise by definition."""
    return isinstance(form, Gaussian) and form.standard_deviation is not None


def _states_noise(form: Form) -> bool:
    return isinstance(form, Counts) or form.noise_included or form.observation_noise is not None


def _state_noise(form: Form, observation_noise: Any, where: str) -> Form:
    """Add noise that is given beside the predictions, and check that it is given once."""
    if observation_noise is not None:
        if isinstance(form, Counts) or _states_noise(form):
            raise ValueError(f"{where}: observation_noise= is given for predictions that state their noise themselves.")
        return replace(form, observation_noise=observation_noise)
    if not _is_deviation(form) and not _states_noise(form):
        what = "an array of samples" if isinstance(form, Samples) else "a covariance"
        raise ValueError(
            f"{where}: {what} says nothing of the observation noise: the spread of a function over the posterior "
            "leaves it out. Expected observation_noise= (a standard deviation in the unit of the targets, as "
            "la.sigma_noise), or noise_included=True in Samples(...) or Gaussian(...)."
        )
    return form


def _read_values(form: Form, where: str) -> Float[Tensor, "S n d"]:
    """Return the samples, or the mean as a single one."""
    if isinstance(form, Gaussian):
        return _read_columns(form.mean, where, "mean")[None]
    what = "rates" if isinstance(form, Counts) else "samples"
    values = _read(_samples_of(form), where, what)
    values = values[:, :, None] if values.ndim == 2 else values
    too_few = isinstance(form, Samples) and form.noise_included and len(values) < 2
    if values.ndim != 3 or too_few:
        least = "at least two samples" if too_few else what
        raise ValueError(
            f"{where}: expected {least} of shape (samples, n) or (samples, n, outputs); got {tuple(values.shape)}."
        )
    if isinstance(form, Counts):
        _refuse((values <= 0).any(dim=0), where, "rate must be positive", values)
    return values


def _read_spread(
    form: Gaussian | Samples, values: Float[Tensor, "S n d"], where: str
) -> tuple[Float[Tensor, "*S n d"] | None, Float[Tensor, "n d d"] | None, Float[Tensor, "n d"] | None]:
    """Return the standard deviation of each component, a covariance's Cholesky factor, and the function's part."""
    like, noise = values[0], None
    n, d = like.shape
    if form.observation_noise is not None:
        of_each = [tuple(values.shape)] if isinstance(form, Samples) else []
        shapes = [(), (1,), (d,), (n, d), *of_each]
        shapes += [shape[:-1] for shape in ((n, d), *of_each) if d == 1]
        noise = _read(form.observation_noise, where, "observation_noise", *shapes)
        # (n,) of one output; where there is one sample, a single number is that of the output
        noise = noise[..., None] if d == 1 and noise.shape in ((n,), values.shape[:-1]) else noise
        noise = noise.to(like.device).expand(noise.shape if noise.ndim == 3 else (n, d))
        _refuse(noise <= 0, where, "observation_noise must be positive (none to add: noise_included=True)", noise)
    if isinstance(form, Samples):
        if noise is None or len(values) > 1:
            return noise, None, None
        # one sample is a function that is known
        return noise.reshape(n, d), None, torch.zeros_like(like)
    if form.covariance is not None:
        C = _read(form.covariance, where, "covariance", (n, d, d)).to(like.device)
        function = None if noise is None else C.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        return *_factorize(C, noise, where), function
    deviation = _read_columns(form.standard_deviation, where, "standard deviation", like.shape).to(like.device)
    # a function may be known exactly; a target never is
    rule = f"standard deviation must be {'positive' if noise is None else '0 or more'}"
    _refuse(deviation < 0, where, rule, deviation)
    return (deviation, None, None) if noise is None else (torch.hypot(deviation, noise), None, deviation)


def _factorize(
    C: Float[Tensor, "n d d"], noise: Float[Tensor, "n d"] | None, where: str
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d d"] | None]:
    """Add the noise, and return standard deviations and, for several outputs, the Cholesky factor."""
    variance = C.diagonal(dim1=-2, dim2=-1)
    _refuse(variance < 0, where, "variance must be 0 or more", variance)
    scale = (variance[:, :, None] * variance[:, None, :]).sqrt().clamp_min(torch.finfo(C.dtype).tiny)
    asymmetry = ((C - C.mT).abs() / scale).amax(dim=(1, 2))
    rule = f"covariance must be symmetric, up to {ASYMMETRY:g} of the product of the standard deviations"
    _refuse(~(asymmetry <= ASYMMETRY), where, rule, asymmetry)
    C = (C + C.mT) / 2 if noise is None else (C + C.mT) / 2 + torch.diag_embed(noise.square())
    L, failed = torch.linalg.cholesky_ex(C)
    if bool(failed.any()):
        _refuse(failed > 0, where, "covariance must have positive eigenvalues", torch.linalg.eigvalsh(C))
    return C.diagonal(dim1=-2, dim2=-1).sqrt(), L if C.shape[1] > 1 else None


def _read_columns(
    values: Any, where: str, what: str, shape: tuple[int, ...] | None = None
) -> Float[Tensor, "rows outputs"]:
    """Read (n,) or (n, outputs) as columns."""
    x = _read(values, where, what)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or (shape is not None and x.shape != shape):
        expected = "(n,) or (n, outputs)" if shape is None else f"{tuple(shape)}"
        raise ValueError(f"{where}: {what} must have shape {expected}; got {tuple(x.shape)}.")
    return x


def _read(values: Any, where: str, what: str, *shapes: tuple[int, ...]) -> Tensor:
    """Read finite numbers in float64, of one of some shapes if any are given."""
    x = as_tensor(values, f"{where}, {what}").to(torch.float64)
    if x.numel() == 0:
        raise ValueError(f"{where}: {what} must hold at least one sample; got shape {tuple(x.shape)}.")
    if shapes and x.shape not in shapes:
        raise ValueError(f"{where}: {what} must have shape {' or '.join(map(str, shapes))}; got {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{where}: {what} must be finite; {first_bad(~torch.atleast_1d(x.isfinite()))}.")
    return x


def _refuse(bad: Tensor, where: str, rule: str, values: Tensor) -> None:
    """Raise an error with the first bad entry and the range of `values`, if any entry is bad."""
    if bool(bad.any()):
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"{where}: every {rule}; {first_bad(bad)} (range {low:.3g} to {high:.3g}).")
