"""Regression predictions of one method with their targets, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.distributions import Distribution, Gaussian, Mixture, SampledDistribution, Samples
from debiased_laplace.calibration.inputs import as_tensor, first_bad

_TIE_SEED = 7_919_201  # not 0, from whose stream the samples of a user often come
ASYMMETRY = 1e-4  # of a covariance, in units of its standard deviations: float32 products stay well below
_LARGEST = 1e70  # of errors in standard deviations, and of deviations: the fourth power must stay finite
_WHY_NOISE = (
    "says nothing of the observation noise: the spread of a function over the posterior leaves it out. Give "
    "observation_noise= (a standard deviation in the unit of the targets, as la.sigma_noise), or say "
    "noise_included=True in Samples(...) or Gaussian(...)"
)


@dataclass(frozen=True, eq=False)
class RegressionPredictions:
    """Predictive distributions, observation noise included, with targets, one column per output.

    The distribution is on the device it came from; targets, and all that is derived here, are float64 on the CPU.
    """

    distribution: Distribution
    targets: Float[Tensor, "n d"]

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.targets.shape[0]

    @property
    def n_outputs(self) -> int:
        """Number of outputs d."""
        return self.targets.shape[1]

    @cached_property
    def mean(self) -> Float[Tensor, "n d"]:
        """In the unit of the targets."""
        return self.distribution.mean.cpu()

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Observation noise included, positive."""
        return self.distribution.standard_deviation.cpu()

    @cached_property
    def errors(self) -> Float[Tensor, "n d"]:
        """Target minus mean."""
        return self.targets - self.mean

    @cached_property
    def z_scores(self) -> Float[Tensor, "n d"]:
        """Errors in units of the predicted standard deviation."""
        return self.errors / self.standard_deviation

    @cached_property
    def negative_log_density(self) -> Float[Tensor, " n"]:
        """Of the predictive at the targets, per output, in nats."""
        return self.distribution.negative_log_density(self._targets_beside).cpu()

    @cached_property
    def ranked_probability_score(self) -> Float[Tensor, "n d"]:
        """Continuous ranked probability score, in the unit of the targets; a mixture takes many passes over samples."""
        return self.distribution.ranked_probability_score(self._targets_beside).cpu()

    @cached_property
    def probability_transform(self) -> Float[Tensor, "n d"]:
        """Predicted probability of a smaller target: uniform where the predictive is right.

        A target between two of finitely many samples has a range of it, out of which one value is drawn, always the
        same ones for data of one shape.
        """
        low, high = (p.cpu() for p in self.distribution.probability_below(self._targets_beside))
        drawn = torch.rand(low.shape, generator=torch.Generator().manual_seed(_TIE_SEED), dtype=low.dtype)
        return low + drawn * (high - low)

    @cached_property
    def normal_scores(self) -> Float[Tensor, "n d"]:
        r"""$\Phi^{-1}$ of the probability transform: the z-scores of a Gaussian."""
        if self.distribution.n_samples is None:
            return self.z_scores  # exact also far out, where probabilities are 0 or 1
        return torch.special.ndtri(self.probability_transform.clamp(1e-300, 1 - 1e-16))

    def interval(self, level: float) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Ends of the central interval."""
        low, high = (self.distribution.quantile((1 + side * level) / 2).cpu() for side in (-1, 1))
        return low, high

    @property
    def _targets_beside(self) -> Float[Tensor, "n d"]:
        return self.targets.to(self.distribution.values.device)


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
    return {
        method: read_regression(method, p, targets, observation_noise=noise_of(method, p, observation_noise))
        for method, p in predictions.items()
    }


def noise_of(method: str, prediction: Any, observation_noise: Any) -> Any:
    """Choose the noise to add to one method's predictions; None for none."""
    if observation_noise is None or isinstance(observation_noise, Mapping):
        return None if observation_noise is None else observation_noise.get(method)
    form = as_form(prediction, f"Predictions of {method!r}")
    if form.noise_included or form.observation_noise is not None:
        return None
    if isinstance(form, Gaussian) and form.standard_deviation is not None:
        raise ValueError(
            f"observation_noise={observation_noise!r} is given for all methods, but the pair (mean, standard "
            f"deviation) of {method!r} holds its noise by definition. Name the methods that lack it: "
            f"observation_noise={{{method!r}: ...}} adds noise there, leaving a method out does not."
        )
    return observation_noise


def as_form(prediction: Any, where: str) -> Gaussian | Samples:
    """Return predictions in one of the two stated forms."""
    if isinstance(prediction, (Gaussian, Samples)):
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
    elif isinstance(prediction, (tuple, list)):
        got += f" of length {len(prediction)}"
    raise ValueError(
        f"{where}: regression takes a pair (mean, standard deviation), a pair (mean, covariance), samples (samples, n) "
        f"or (samples, n, outputs), Gaussian(...) or Samples(...); got {got}."
    )


def read_regression(
    method: str, prediction: Any, targets: Any, *, observation_noise: Any = None
) -> RegressionPredictions:
    """Read predictions in any of their forms, with targets (n,) or (n, outputs), or without.

    Args:
        method: name of the method, for messages.
        prediction: a pair (mean, standard deviation) that holds the observation noise; a pair (mean, covariance) or an
            array of samples, which need `observation_noise`; or `Gaussian` or `Samples`, which say it themselves.
        targets: None where only the spread is asked for; the means then stand for them.
        observation_noise: standard deviation of the noise to add: a number, (outputs,) or (n, outputs).
    """
    where = f"Predictions of {method!r}"
    form = _state_noise(as_form(prediction, where), observation_noise, where)
    y = None if targets is None else _as_columns(targets, where, "targets")
    if isinstance(form, Samples):
        distribution: Distribution = _read_samples(form, y, where)
    elif form.covariance is not None:
        distribution = _read_covariance(form, y, where)
    else:
        distribution = _read_deviation(form, y, where)
    read = RegressionPredictions(distribution, (distribution.mean if y is None else y).cpu())
    far, deviation = read.z_scores.abs() >= _LARGEST, read.standard_deviation
    if bool(far.any()):
        raise ValueError(
            f"{where}: every target must lie within {_LARGEST:g} standard deviations of its mean; {first_bad(far)} "
            f"(smallest: {deviation.min().item():.3g})."
        )
    unusual = (deviation <= 1 / _LARGEST) | (deviation >= _LARGEST)
    if bool(unusual.any()):
        raise ValueError(
            f"{where}: every standard deviation must lie between {1 / _LARGEST:g} and {_LARGEST:g}; "
            f"{first_bad(unusual)}. Choose another unit."
        )
    return read


def _state_noise(form: Gaussian | Samples, observation_noise: Any, where: str) -> Gaussian | Samples:
    """The form with the noise that was stated beside it, refused where nothing is said of it."""
    if observation_noise is not None:
        if form.observation_noise is not None or form.noise_included:
            raise ValueError(f"{where}: observation_noise= is given for predictions that state their noise themselves.")
        return replace(form, observation_noise=observation_noise)
    holds_noise = isinstance(form, Gaussian) and form.standard_deviation is not None
    if not holds_noise and form.observation_noise is None and not form.noise_included:
        what = "an array of samples" if isinstance(form, Samples) else "a covariance"
        raise ValueError(f"{where}: {what} {_WHY_NOISE}.")
    return form


def _read_deviation(form: Gaussian, y: Tensor | None, where: str) -> Mixture:
    mean = _as_columns(form.mean, where, "mean")
    deviation = _as_columns(form.standard_deviation, where, "standard deviation").to(mean.device)
    if mean.shape != deviation.shape or (y is not None and mean.shape != y.shape):
        raise ValueError(
            f"{where}: mean, standard deviation and targets must have one shape; got {tuple(mean.shape)}, "
            f"{tuple(deviation.shape)} and {tuple(mean.shape if y is None else y.shape)}."
        )
    noise = _read_noise(form.observation_noise, mean, where)
    # a function may be known exactly; a target never is
    _refuse_small(deviation, where, zero_allowed=noise is not None)
    return Mixture(mean[None], deviation if noise is None else torch.hypot(deviation, noise))


def _read_covariance(form: Gaussian, y: Tensor | None, where: str) -> Mixture:
    mean = _as_columns(form.mean, where, "mean")
    C = _as_finite(form.covariance, where, "covariance").to(mean.device)
    n, d = mean.shape
    if (y is not None and mean.shape != y.shape) or C.shape != (n, d, d):
        raise ValueError(
            f"{where}: mean and targets must have one shape (n, outputs), the covariance (n, outputs, outputs); got "
            f"{tuple(mean.shape)}, {tuple(mean.shape if y is None else y.shape)} and {tuple(C.shape)}."
        )
    variance = C.diagonal(dim1=-2, dim2=-1)
    _refuse_small(variance, where, zero_allowed=form.observation_noise is not None, what="variance")
    scale = (variance[:, :, None] * variance[:, None, :]).sqrt().clamp_min(torch.finfo(C.dtype).tiny)
    asymmetry = ((C - C.mT).abs() / scale).amax(dim=(1, 2))
    if not bool((asymmetry <= ASYMMETRY).all()):
        raise ValueError(
            f"{where}: every covariance must be symmetric; {first_bad(asymmetry > ASYMMETRY)} (entries differ by up to "
            f"{asymmetry.max().item():.3g} of the product of their standard deviations)."
        )
    noise = _read_noise(form.observation_noise, mean, where)
    C = (C + C.mT) / 2 if noise is None else (C + C.mT) / 2 + torch.diag_embed(noise.square())
    L, failed = torch.linalg.cholesky_ex(C)
    if bool(failed.any()):
        smallest = torch.linalg.eigvalsh(C[failed > 0]).amin().item()
        raise ValueError(
            f"{where}: every covariance must be positive definite; {first_bad(failed > 0)} "
            f"(smallest eigenvalue: {smallest:.3g})."
        )
    return Mixture(mean[None], C.diagonal(dim1=-2, dim2=-1).sqrt(), L if d > 1 else None)


def _read_samples(form: Samples, y: Tensor | None, where: str) -> Distribution:
    values = _as_finite(form.values, where, "samples")
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or (y is not None and values.shape[1:] != y.shape):
        raise ValueError(
            f"{where}: samples must have shape (samples, n) or (samples, n, outputs), with targets of shape "
            f"{None if y is None else tuple(y.shape)}; got {tuple(values.shape)}."
        )
    if form.noise_included and values.shape[0] < 2:
        raise ValueError(f"{where}: a spread needs at least two samples; got {values.shape[0]}.")
    noise = _read_noise(form.observation_noise, values[0], where)
    if noise is not None:
        return Mixture(values, noise)
    sampled = SampledDistribution(values)
    _refuse_small(sampled.standard_deviation, where)
    return sampled


def _read_noise(noise: Any, like: Float[Tensor, "n d"], where: str) -> Float[Tensor, "n d"] | None:
    """The stated noise for every sample and output."""
    if noise is None:
        return None
    sigma = _as_finite(noise, where, "observation noise").to(like.device)
    n, d = like.shape
    if sigma.shape not in ((), (1,), (d,), (n, d)):
        raise ValueError(
            f"{where}: observation_noise must be a number or have shape ({d},) or ({n}, {d}); got {tuple(sigma.shape)}."
        )
    if not bool((sigma > 0).all()):
        raise ValueError(
            f"{where}: observation_noise is a standard deviation and must be positive; got {sigma.min().item():.6g}. "
            "Predictions that hold the noise already are stated with noise_included=True."
        )
    return sigma.expand(n, d)


def _as_columns(values: Any, where: str, what: str) -> Float[Tensor, "rows outputs"]:
    """(n,) or (n, outputs) as float64 columns."""
    x = _as_finite(values, where, what)
    if x.ndim not in (1, 2):
        raise ValueError(
            f"{where}: {what} must have shape (n,) or (n, outputs) with at least one sample; got {tuple(x.shape)}."
        )
    return x[:, None] if x.ndim == 1 else x


def _as_finite(values: Any, where: str, what: str) -> Tensor:
    x = as_tensor(values, f"{where}, {what}").to(torch.float64)
    if x.numel() == 0:
        raise ValueError(f"{where}: {what} must hold at least one sample; got shape {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{where}: {what} must be finite; {first_bad(~torch.atleast_1d(x.isfinite()))}.")
    return x


def _refuse_small(
    spread: Float[Tensor, "n d"], where: str, *, zero_allowed: bool = False, what: str = "standard deviation"
) -> None:
    bad = spread < 0 if zero_allowed else spread <= 0
    if bool(bad.any()):
        raise ValueError(
            f"{where}: every {what} must be {'0 or more' if zero_allowed else 'positive'}; {first_bad(bad)} "
            f"(smallest: {spread.min().item():.6g})."
        )
