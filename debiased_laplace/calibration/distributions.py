r"""Predictive distributions of regression: the forms in which they are stated, and what a report asks of them.

A Gaussian is a mixture of one component, samples of a function with observation noise are an equal mixture, and samples
that hold their noise are known by their values only. Both distributions answer the same questions; only the density is
joint over the outputs, all else is per output.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log, pi, sqrt
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BISECTIONS = 60  # halvings of an interval as wide as the spread of the samples: below a rounding error of it


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian predictions: a mean with a standard deviation or a covariance per test sample.

    A standard deviation holds the observation noise already unless `observation_noise` is given. A covariance needs a
    word on it, since the covariance that `la(x)` of laplace-torch returns is that of the function alone.

    Attributes:
        mean: (n,) or (n, outputs), in the unit of the targets.
        standard_deviation: as the mean, positive.
        covariance: (n, outputs, outputs), symmetric and positive definite.
        observation_noise: standard deviation of the noise to add: a number, (outputs,) or (n, outputs).
        noise_included: True if the covariance holds the noise already.

    Raises:
        ValueError: for both or neither of deviation and covariance, or noise that is included and to be added.
    """

    mean: Any
    standard_deviation: Any = None
    covariance: Any = None
    observation_noise: Any = None
    noise_included: bool = False

    def __post_init__(self) -> None:
        if (self.standard_deviation is None) == (self.covariance is None):
            raise ValueError("Gaussian takes a standard_deviation or a covariance; got both or neither.")
        _refuse_contradiction(self.observation_noise, self.noise_included)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of the prediction: of the function, observation noise to be added, or of the targets themselves.

    With `observation_noise` the prediction is the mixture of a Gaussian around every sample. With `noise_included` it
    is known through its samples only, which are then taken for equally likely, as the target is.

    Attributes:
        values: (samples, n) or (samples, n, outputs), in the unit of the targets.
        observation_noise: standard deviation of the noise to add: a number, (outputs,) or (n, outputs).
        noise_included: True if every value was drawn with its noise.

    Raises:
        ValueError: for noise that is included and to be added.
    """

    values: Any
    observation_noise: Any = None
    noise_included: bool = False

    def __post_init__(self) -> None:
        _refuse_contradiction(self.observation_noise, self.noise_included)


def _refuse_contradiction(observation_noise: Any, noise_included: bool) -> None:
    if observation_noise is not None and noise_included:
        raise ValueError(
            "observation_noise would be added to predictions that hold it (noise_included=True): drop one."
        )


@dataclass(frozen=True, eq=False)
class Mixture:
    """Equal mixture of S Gaussians for each test sample, a single Gaussian for S = 1.

    `noise` is the standard deviation of each component. A single Gaussian may have a covariance between outputs.
    Memory: a few arrays of the size of `values` at a time.
    """

    values: Float[Tensor, "S n d"]
    noise: Float[Tensor, "n d"]
    cholesky: Float[Tensor, "n d d"] | None = None

    @property
    def description(self) -> str:
        """The distribution in words."""
        if len(self.values) > 1:
            return f"mixture of {len(self.values)} Gaussians"
        return "Gaussian" if self.cholesky is None else "Gaussian with covariance"

    @property
    def n_samples(self) -> int | None:
        """Number of posterior samples behind it; None for a closed form."""
        return len(self.values) if len(self.values) > 1 else None

    @cached_property
    def mean(self) -> Float[Tensor, "n d"]:
        """Mean of the components."""
        return self.values.mean(dim=0)

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Root of the variance between the components plus that within."""
        if len(self.values) == 1:
            return self.noise
        return (self.values.var(dim=0, correction=0) + self.noise.square()).sqrt()

    def negative_log_density(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Minus the logarithm of the joint density of the outputs, divided by their number, in nats."""
        if self.cholesky is None:
            z, log_scale = (y - self.values) / self.noise, self.noise.log()
        else:
            z = torch.linalg.solve_triangular(self.cholesky, (y - self.mean)[..., None], upper=False)[None, ..., 0]
            log_scale = self.cholesky.diagonal(dim1=-2, dim2=-1).log()
        log_densities = -(z.square() / 2 + log_scale + log(2 * pi) / 2).sum(dim=-1)
        return (log(len(self.values)) - log_densities.logsumexp(dim=0)) / y.shape[1]

    def ranked_probability_score(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        r"""$E|X - y| - \frac12 E|X - X'|$ in closed form; S / 2 passes over the components.

        References:
            Grimit, Gneiting, Berrocal, Johnson (2006), doi:10.1256/qj.05.235.
        """
        S, scale = len(self.values), sqrt(2) * self.noise
        pairs = S * _normal_distance(torch.zeros_like(scale), scale)
        for k in range(1, S // 2 + 1):
            # every pair k apart on a ring; those half the ring apart come twice of themselves
            weight = 1 if 2 * k == S else 2
            pairs += weight * _normal_distance(self.values - self.values.roll(k, dims=0), scale).sum(dim=0)
        return _normal_distance(self.values - y, self.noise).mean(dim=0) - pairs / S**2 / 2

    def probability_below(self, y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        r"""Bounds of the probability of a smaller value: twice the mean of $\Phi((y - f_s) / \sigma)$."""
        p = self._below(y)
        return p, p

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """The value below which the share p lies, by bisection between the components' quantiles."""
        shift = NormalDist().inv_cdf(p) * self.noise
        low, high = self.values.amin(dim=0) + shift, self.values.amax(dim=0) + shift
        for _ in range(BISECTIONS if len(self.values) > 1 else 0):
            middle = (low + high) / 2
            is_below = self._below(middle) < p
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """Draws minus the mean, on the CPU."""
        noise = torch.randn(draws, *self.mean.shape, generator=generator, dtype=self.mean.dtype)
        if self.cholesky is not None:
            return torch.einsum("nij,rnj->rni", self.cholesky.cpu(), noise)
        noise.mul_(self.noise.cpu())
        return noise if len(self.values) == 1 else noise.add_(_pick(self.values - self.mean, draws, generator))

    def scaled(self, factor: Float[Tensor, "n 1"]) -> "Mixture":
        """The distribution with every deviation from the mean multiplied, noise and correlations included."""
        L = None if self.cholesky is None else self.cholesky * factor[:, :, None]
        return Mixture(self.mean + factor * (self.values - self.mean), self.noise * factor, L)

    def _below(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return torch.special.ndtr((y - self.values) / self.noise).mean(dim=0)


@dataclass(frozen=True, eq=False)
class SampledDistribution:
    """Distribution known through S >= 2 samples with noise; if it is right, target and samples are exchangeable."""

    values: Float[Tensor, "S n d"]

    @property
    def description(self) -> str:
        """The distribution in words."""
        return f"{len(self.values)} samples"

    @property
    def n_samples(self) -> int:
        """Number of samples S."""
        return len(self.values)

    @cached_property
    def mean(self) -> Float[Tensor, "n d"]:
        """Mean of the samples."""
        return self.values.mean(dim=0)

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Unbiased deviation of the samples."""
        return self.values.std(dim=0)

    def negative_log_density(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """That of the independent Gaussian with the samples' moments: samples have no density of their own."""
        return Mixture(self.mean[None], self.standard_deviation).negative_log_density(y)

    def ranked_probability_score(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Fair score, whose mean does not depend on the number of samples.

        References:
            Ferro (2014), doi:10.1002/qj.2270.
        """
        S = len(self.values)
        weights = 2 * torch.arange(1, S + 1, device=self.values.device, dtype=self.values.dtype) - S - 1
        difference = 2 / (S * (S - 1)) * torch.einsum("s,snd->nd", weights, self._ordered - self.mean)
        return (self.values - y).abs().mean(dim=0) - difference / 2

    def probability_below(self, y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Bounds (rank, rank + 1) / (S + 1) of the target among the samples, wider where it ties with some."""
        low = (self.values < y).sum(dim=0) / (len(self.values) + 1)
        high = ((self.values <= y).sum(dim=0) + 1) / (len(self.values) + 1)
        return low.to(y.dtype), high.to(y.dtype)

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """Interpolated at rank p (S + 1), no further out than the samples go."""
        S = len(self.values)
        position = min(max(p * (S + 1), 1.0), float(S)) - 1
        k = min(int(position), S - 2)
        return torch.lerp(self._ordered[k], self._ordered[k + 1], position - k)

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """Samples minus their mean, on the CPU."""
        return _pick(self.values - self.mean, draws, generator)

    def scaled(self, factor: Float[Tensor, "n 1"]) -> "SampledDistribution":
        """The distribution with every deviation from the mean multiplied."""
        return SampledDistribution(self.mean + factor * (self.values - self.mean))

    @cached_property
    def _ordered(self) -> Float[Tensor, "S n d"]:
        return self.values.sort(dim=0).values


Distribution = Mixture | SampledDistribution


def _normal_distance(shift: Float[Tensor, "*S n d"], scale: Float[Tensor, "n d"]) -> Float[Tensor, "*S n d"]:
    r"""$E|X|$ of a normal variable: $\sigma [z (2 \Phi(z) - 1) + 2 \varphi(z)]$ with $z = \mu / \sigma$."""
    z = shift / scale
    return scale * (z * torch.erf(z / sqrt(2)) + sqrt(2 / pi) * (-z.square() / 2).exp())


def _pick(values: Float[Tensor, "S n d"], draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
    """One of the S rows for every draw and test sample, the same for all its outputs."""
    S, n, d = values.shape
    chosen = torch.randint(S, (draws, n, 1), generator=generator).expand(draws, n, d)
    return values.cpu().gather(0, chosen)
