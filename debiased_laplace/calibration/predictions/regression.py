"""Regression predictions of one method and what came, checked once."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import as_tensor, first_bad
from debiased_laplace.calibration.predictions.distributions import (
    Distribution,
    NormalDistribution,
    NormalMixture,
    SampledDistribution,
)
from debiased_laplace.calibration.predictions.forms import Gaussian, Samples, as_form, state_noise

ASYMMETRY = 1e-4  # of a covariance, in units of its standard deviations: float32 products stay well below
_FARTHEST = 1e70  # standard deviations; the fourth power of a much larger error overflows
_LARGEST = 1e70  # unit of the targets; the square of an error that is _FARTHEST times as large is still finite


@dataclass(frozen=True, eq=False)
class RegressionPredictions:
    """Predictive distributions of one method on a test set, one column per output.

    Attributes:
        distribution: the predictive, observation noise included, on the device it came from.
        mean: float64, finite, in the unit of the targets; this and the rest on the CPU.
        standard_deviation: float64, finite, positive, observation noise included.
        targets: float64, finite.
        noise: standard deviation of the noise that was added; None where it came with the predictions.
    """

    distribution: Distribution
    mean: Float[Tensor, "n d"]
    standard_deviation: Float[Tensor, "n d"]
    targets: Float[Tensor, "n d"]
    noise: Float[Tensor, "n d"] | None = None

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.mean.shape[0]

    @property
    def n_outputs(self) -> int:
        """Number of outputs d."""
        return self.mean.shape[1]

    @cached_property
    def targets_beside(self) -> Float[Tensor, "n d"]:
        """The targets on the device of the distribution."""
        return self.targets.to(self.distribution.mean.device)

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
        return self.distribution.negative_log_density(self.targets_beside).cpu()

    @cached_property
    def ranked_probability_score(self) -> Float[Tensor, "n d"]:
        """Continuous ranked probability score, in the unit of the targets; a mixture takes many passes over samples."""
        score = self.distribution.expected_distance(self.targets_beside) - self.distribution.mean_difference() / 2
        return score.cpu()

    @cached_property
    def probability_transform(self) -> Float[Tensor, "n d"]:
        """Predicted probability of a smaller target: uniform where the predictive is right.

        A target between two of finitely many samples has a range of it, out of which one value is drawn, always the
        same ones for data of one shape.
        """
        low, high = (p.cpu() for p in self.distribution.probability_below(self.targets_beside))
        drawn = torch.rand(low.shape, generator=torch.Generator().manual_seed(0), dtype=low.dtype)
        return low + drawn * (high - low)

    @cached_property
    def normal_scores(self) -> Float[Tensor, "n d"]:
        r"""$\Phi^{-1}$ of the probability transform: the z-scores of a Gaussian, as good as these for any other."""
        if isinstance(self.distribution, NormalDistribution):
            return self.z_scores  # exact also far out, where probabilities are 0 or 1
        p = self.probability_transform
        return torch.special.ndtri(p.clamp(1e-300, 1 - 1e-16))

    def output(self, j: int) -> "RegressionPredictions":
        """The predictions of one output."""
        one = slice(j, j + 1)
        noise = None if self.noise is None else self.noise[:, one]
        parts = (self.mean[:, one], self.standard_deviation[:, one], self.targets[:, one])
        return RegressionPredictions(self.distribution.marginal(j), *parts, noise)

    def interval(self, level: float) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Ends of the central interval, on the CPU."""
        if level not in self._intervals:
            low, high = (self.distribution.quantile((1 + side * level) / 2).cpu() for side in (-1, 1))
            self._intervals[level] = low, high
        return self._intervals[level]

    @cached_property
    def _intervals(self) -> dict[float, tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
        """The intervals so far, by level: those of a mixture take many passes over its samples."""
        return {}


def read_regression(
    method: str, prediction: Any, targets: Any, *, observation_noise: Any = None
) -> RegressionPredictions:
    """Predictions in any of their forms with their targets, checked and in float64.

    Args:
        method: name of the method, for messages.
        prediction: a pair (mean, standard deviation) that holds the observation noise; a pair (mean, covariance) or an
            array of samples, which need `observation_noise`; or `Gaussian` or `Samples`, which say it themselves.
        targets: (n,) or (n, outputs); (n,) and (n, 1) are the same.
        observation_noise: standard deviation of the noise to add, for the forms that do not say it themselves: a
            number, (outputs,) or (n, outputs).

    Raises:
        ValueError: for other shapes, numbers that are not finite, a standard deviation of 0 or less, a covariance that
            is not symmetric or not positive definite, or noise that is not stated or stated twice.
    """
    where = f"Predictions of {method!r}"
    form = state_noise(as_form(prediction, where), observation_noise, where)
    y = _as_columns(targets, where, "targets")
    if isinstance(form, Samples):
        read = _read_samples(form, y, where)
    elif form.covariance is not None:
        read = _read_covariance(form, y, where)
    else:
        read = _read_deviation(form, y, where)
    if not bool((read.z_scores.abs() < _FARTHEST).all()):
        raise ValueError(
            f"{where}: every target must lie within {_FARTHEST:g} standard deviations of its mean; "
            f"{first_bad(read.z_scores.abs() >= _FARTHEST)} (smallest: {read.standard_deviation.min().item():.3g})."
        )
    usual = (read.standard_deviation > 1 / _LARGEST) & (read.standard_deviation < _LARGEST)
    if not bool(usual.all()):
        raise ValueError(
            f"{where}: every standard deviation must lie between {1 / _LARGEST:g} and {_LARGEST:g}; "
            f"{first_bad(~usual)}. Choose another unit."
        )
    return read


def _read_deviation(form: Gaussian, y: Float[Tensor, "rows outputs"], where: str) -> RegressionPredictions:
    mean = _as_columns(form.mean, where, "mean")
    deviation = _as_columns(form.standard_deviation, where, "standard deviation").to(mean.device)
    if not mean.shape == deviation.shape == y.shape:
        raise ValueError(
            f"{where}: mean, standard deviation and targets must have one shape; got "
            f"{tuple(mean.shape)}, {tuple(deviation.shape)} and {tuple(y.shape)}."
        )
    noise = _read_noise(form.observation_noise, mean, where)
    # a function may be known exactly; a target never is
    _refuse_small(deviation, where, zero_allowed=noise is not None)
    if noise is not None:
        deviation = torch.hypot(deviation, noise)
    return _collect(NormalDistribution(mean, deviation), y, noise)


def _read_covariance(form: Gaussian, y: Float[Tensor, "rows outputs"], where: str) -> RegressionPredictions:
    mean = _as_columns(form.mean, where, "mean")
    C = _as_finite(form.covariance, where, "covariance").to(mean.device)
    n, d = mean.shape
    if mean.shape != y.shape or C.shape != (n, d, d):
        raise ValueError(
            f"{where}: mean and targets must have one shape (n, outputs), the covariance (n, outputs, outputs); got "
            f"{tuple(mean.shape)}, {tuple(y.shape)} and {tuple(C.shape)}."
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
    C = (C + C.mT) / 2
    if noise is not None:
        C = C + torch.diag_embed(noise.square())
    L, failed = torch.linalg.cholesky_ex(C)
    if bool(failed.any()):
        smallest = torch.linalg.eigvalsh(C[failed > 0]).amin().item()
        raise ValueError(
            f"{where}: every covariance must be positive definite; {first_bad(failed > 0)} "
            f"(smallest eigenvalue: {smallest:.3g})."
        )
    deviation = C.diagonal(dim1=-2, dim2=-1).sqrt()
    return _collect(NormalDistribution(mean, deviation, L if d > 1 else None), y, noise)


def _read_samples(form: Samples, y: Float[Tensor, "rows outputs"], where: str) -> RegressionPredictions:
    values = _as_finite(form.values, where, "samples")
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[1:] != y.shape:
        raise ValueError(
            f"{where}: samples must have shape (samples, n) or (samples, n, outputs), with targets of shape "
            f"{tuple(y.shape)}; got {tuple(values.shape)}."
        )
    if form.noise_included and values.shape[0] < 2:
        raise ValueError(f"{where}: a spread needs at least two samples; got {values.shape[0]}.")
    noise = _read_noise(form.observation_noise, values[0], where)
    if noise is not None:
        return _collect(NormalMixture(values, noise), y, noise)
    sampled = SampledDistribution(values)
    _refuse_small(sampled.standard_deviation, where)
    return _collect(sampled, y, None)


def _collect(
    distribution: Distribution, y: Float[Tensor, "n d"], noise: Float[Tensor, "n d"] | None
) -> RegressionPredictions:
    mean, deviation = distribution.mean.cpu(), distribution.standard_deviation.cpu()
    return RegressionPredictions(distribution, mean, deviation, y.cpu(), None if noise is None else noise.cpu())


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
