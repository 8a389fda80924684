r"""Predictive distributions of regression: the forms in which they are given, and their scores and quantiles.

A Gaussian is a mixture of one component, samples of a function with observation noise are an equal mixture, and samples
that include their noise are an empirical distribution. Only the density is joint over the outputs.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import log, pi, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from debiased_laplace.calibration.ties import merge_ties

BISECTIONS = 60  # halvings of an interval as wide as the spread of the samples: below a rounding error of it
TIE_SEED = 7_919_201  # not 0, from whose stream the samples of a user often come


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian predictions: a mean with a standard deviation or a covariance per test sample.

    A standard deviation includes the observation noise unless `observation_noise` is given. A covariance needs one of
    the last two arguments, since the covariance that `la(x)` of laplace-torch returns is that of the function alone.

    Attributes:
        mean: (n,) or (n, outputs), in the unit of the targets.
        standard_deviation: as the mean, positive.
        covariance: (n, outputs, outputs), symmetric and positive definite.
        observation_noise: standard deviation of the noise to add: a number, (outputs,), (n, outputs), or (n,) of one.
        noise_included: True if the covariance includes the noise.
    """

    mean: Any
    standard_deviation: Any = None
    covariance: Any = None
    observation_noise: Any = None
    noise_included: bool = False

    def __post_init__(self) -> None:
        if (self.standard_deviation is None) == (self.covariance is None):
            raise ValueError("Gaussian takes a standard_deviation or a covariance; got both or neither.")
        _check_noise(self)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of the function, whose observation noise is to be added, or of the targets.

    With `observation_noise` the prediction is the mixture of a Gaussian around every sample, with `noise_included` the
    empirical distribution of the samples.

    Attributes:
        values: (samples, n) or (samples, n, outputs), in the unit of the targets.
        observation_noise: as of `Gaussian`, or of every sample, in the shape of the values.
        noise_included: True if every value was drawn with its noise.
    """

    values: Any
    observation_noise: Any = None
    noise_included: bool = False

    def __post_init__(self) -> None:
        _check_noise(self)


def _check_noise(form: Gaussian | Samples) -> None:
    if form.observation_noise is not None and form.noise_included:
        raise ValueError(
            "observation_noise would be added to predictions that include it (noise_included=True): drop one."
        )


@dataclass(frozen=True, eq=False)
class RegressionPredictions:
    """Equal mixture of S Gaussians, observation noise included, for each test sample, with its target.

    Fields are on the device of the predictions; all else is float64 on the CPU. Memory: a few arrays of the size of
    `values` at a time.

    Attributes:
        values: means of the components.
        noise: standard deviation of the components, of all or of each.
        cholesky: factor of the covariance between the outputs of a single Gaussian.
        precision: relative spacing of the numbers that were given.
        function: standard deviation of the function in that of a single Gaussian; None if unknown.
    """

    values: Float[Tensor, "S n d"]
    targets: Float[Tensor, "n d"]
    noise: Float[Tensor, "*S n d"]
    cholesky: Float[Tensor, "n d d"] | None = None
    precision: float = torch.finfo(torch.float64).eps
    function: Float[Tensor, "n d"] | None = None

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.values.shape[1]

    @property
    def n_outputs(self) -> int:
        """Number of outputs d."""
        return self.values.shape[2]

    @property
    def n_samples(self) -> int | None:
        """Number of posterior samples; None for a closed form."""
        return len(self.values) if len(self.values) > 1 else None

    @property
    def description(self) -> str:
        """The distribution in words."""
        if len(self.values) > 1:
            return f"mixture of {len(self.values)} Gaussians"
        return "Gaussian" if self.cholesky is None else "Gaussian with covariance"

    @cached_property
    def mean(self) -> Float[Tensor, "n d"]:
        """Predictive mean."""
        return self.values.mean(dim=0).cpu()

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Predictive standard deviation, positive: root of the variance between the components plus that within."""
        return self._merge_ties((self.values.var(dim=0, correction=0) + self._noise_variance).sqrt())

    @property
    def parts(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]] | None:
        """Standard deviations of the function (epistemic) and of the noise (aleatoric); None if not told apart."""
        if self.n_samples is not None:
            return self.values.std(dim=0, correction=0).cpu(), self._noise_variance.sqrt().cpu()
        if self.function is None:
            return None
        return self.function.cpu(), (self.noise.square() - self.function.square()).clamp_min(0).sqrt().cpu()

    @cached_property
    def errors(self) -> Float[Tensor, "n d"]:
        """Target minus mean."""
        return self.targets.cpu() - self.mean

    @cached_property
    def z_scores(self) -> Float[Tensor, "n d"]:
        """Errors in units of the predicted standard deviation."""
        return self.errors / self.standard_deviation

    @cached_property
    def negative_log_density(self) -> Float[Tensor, " n"]:
        """Minus the logarithm of the joint density of the outputs, divided by their number, in nats."""
        if self.cholesky is None:
            log_densities = Independent(Normal(self.values, self.noise), 1).log_prob(self.targets)
        else:
            log_densities = MultivariateNormal(self.values, scale_tril=self.cholesky).log_prob(self.targets)
        return ((log(len(self.values)) - log_densities.logsumexp(dim=0)) / self.n_outputs).cpu()

    @cached_property
    def ranked_probability_score(self) -> Float[Tensor, "n d"]:
        r"""Continuous ranked probability score $E|X - y| - \frac12 E|X - X'|$, in S / 2 passes over the components.

        References:
            Grimit, Gneiting, Berrocal, Johnson (2006), doi:10.1256/qj.05.235.
        """
        S, scale = len(self.values), sqrt(2) * self.noise
        of_each = self.noise.ndim == 3
        pairs = S * _normal_distance(torch.zeros_like(scale), scale)
        pairs = pairs.mean(dim=0) if of_each else pairs
        for k in range(1, S // 2 + 1):
            # every pair k apart on a ring; those half the ring apart are met twice
            weight = 1 if 2 * k == S else 2
            spread = torch.hypot(self.noise, self.noise.roll(k, dims=0)) if of_each else scale
            pairs += weight * _normal_distance(self.values - self.values.roll(k, dims=0), spread).sum(dim=0)
        return (_normal_distance(self.values - self.targets, self.noise).mean(dim=0) - pairs / S**2 / 2).cpu()

    @cached_property
    def probability_transform(self) -> Float[Tensor, "n d"]:
        """Predicted probability of a smaller target: uniform if the predictive is right."""
        return self._probability_below(self.targets).cpu()

    @cached_property
    def normal_scores(self) -> Float[Tensor, "n d"]:
        r"""$\Phi^{-1}$ of the probability transform: the z-scores of a Gaussian."""
        if self.n_samples is None:
            return self.z_scores  # exact also far out, where probabilities are 0 or 1
        return torch.special.ndtri(self.probability_transform.clamp(1e-300, 1 - 1e-16))

    def interval(self, level: float) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Return the ends of the central interval."""
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """Return the p-quantile, by bisection between the components' quantiles."""
        shift = NormalDist().inv_cdf(p) * self.noise
        low, high = (self.values + shift).amin(dim=0), (self.values + shift).amax(dim=0)
        for _ in range(BISECTIONS if len(self.values) > 1 else 0):
            middle = (low + high) / 2
            is_below = self._probability_below(middle) < p
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return ((low + high) / 2).cpu()

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """Draw deviations from the mean."""
        noise = torch.randn(draws, self.n, self.n_outputs, generator=generator, dtype=self.noise.dtype)
        if self.cholesky is not None:
            return torch.einsum("nij,rnj->rni", self.cholesky.cpu(), noise)
        if len(self.values) == 1:
            return noise.mul_(self.noise.cpu())
        chosen = self._draw_components(draws, generator)
        own = self.noise.cpu()
        noise.mul_(own if own.ndim == 2 else own.gather(0, chosen))
        return noise.add_(self._deviations.gather(0, chosen))

    def scaled(self, factor: Float[Tensor, " n"]) -> "RegressionPredictions":
        """Multiply every deviation from the mean, noise and correlations included, by the factor of its sample."""
        column, mean = factor[:, None].to(self.values.device), self.values.mean(dim=0)
        L = None if self.cholesky is None else self.cholesky * column[:, :, None]
        f = None if self.function is None else self.function * column
        values = mean + column * (self.values - mean)
        return replace(self, values=values, noise=self.noise * column, cholesky=L, function=f)

    def _merge_ties(self, deviation: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Merge standard deviations of samples that differ by the rounding of the samples."""
        if self.n_samples is None:
            return deviation.cpu()
        # some units in the last place of a sample, of which the deviation is a difference
        tolerance = (4 * self.precision * self.values.abs().amax(dim=0)).cpu()
        columns = zip(deviation.cpu().T, tolerance.T, strict=True)
        return torch.stack([merge_ties(x, t) for x, t in columns], dim=1)

    def _probability_below(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        # Normal.cdf loses all digits of small probabilities
        return torch.special.ndtr((y - self.values) / self.noise).mean(dim=0)

    @property
    def _noise_variance(self) -> Float[Tensor, "n d"]:
        """Mean variance of the components."""
        return self.noise.square().mean(dim=0) if self.noise.ndim == 3 else self.noise.square()

    @property
    def _deviations(self) -> Float[Tensor, "S n d"]:
        """Means of the components less the mean."""
        return (self.values - self.values.mean(dim=0)).cpu()

    def _draw_components(self, draws: int, generator: torch.Generator) -> Int[Tensor, "draws n d"]:
        """Draw components for every test sample, the same for all its outputs."""
        chosen = torch.randint(len(self.values), (draws, self.n, 1), generator=generator)
        return chosen.expand(draws, self.n, self.n_outputs)


class SampledPredictions(RegressionPredictions):
    """Predictions by S >= 2 samples with their noise, `noise` being 0; target and samples should be exchangeable."""

    @property
    def description(self) -> str:
        """The distribution in words."""
        return f"{len(self.values)} samples"

    @property
    def parts(self) -> None:
        """None: a sample does not tell its noise apart."""

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Unbiased standard deviation of the samples."""
        return self._merge_ties(self.values.std(dim=0))

    @cached_property
    def negative_log_density(self) -> Float[Tensor, " n"]:
        """That of independent Gaussians with the samples' moments: samples have no density of their own."""
        return -Normal(self.mean, self.standard_deviation).log_prob(self.targets.cpu()).mean(dim=1)

    @cached_property
    def ranked_probability_score(self) -> Float[Tensor, "n d"]:
        """Fair score, whose mean does not depend on the number of samples.

        References:
            Ferro (2014), doi:10.1002/qj.2270.
        """
        S, ordered = len(self.values), (self.values - self.values.mean(dim=0)).sort(dim=0).values
        weights = 2 * torch.arange(1, S + 1, device=ordered.device, dtype=ordered.dtype) - S - 1
        difference = 2 / (S * (S - 1)) * torch.einsum("s,snd->nd", weights, ordered)
        return ((self.values - self.targets).abs().mean(dim=0) - difference / 2).cpu()

    @cached_property
    def probability_transform(self) -> Float[Tensor, "n d"]:
        """Drawn between (rank, rank + 1) / (S + 1), further apart for ties, always with the same random numbers."""
        S = len(self.values)
        low = ((self.values < self.targets).sum(dim=0) / (S + 1)).cpu().to(torch.float64)
        high = (((self.values <= self.targets).sum(dim=0) + 1) / (S + 1)).cpu().to(torch.float64)
        drawn = torch.rand(low.shape, generator=torch.Generator().manual_seed(TIE_SEED), dtype=low.dtype)
        return low + drawn * (high - low)

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """Return the value of rank p (S + 1), interpolated and within the range of the samples."""
        return torch.as_tensor(np.quantile(self.values.cpu().numpy(), p, axis=0, method="weibull"))

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """Draw deviations from the mean."""
        return self._deviations.gather(0, self._draw_components(draws, generator))


def _normal_distance(shift: Float[Tensor, "*S n d"], scale: Float[Tensor, "*T n d"]) -> Float[Tensor, "*S n d"]:
    r"""Return $E|X|$ of a normal variable: $\sigma [z (2 \Phi(z) - 1) + 2 \varphi(z)]$ with $z = \mu / \sigma$."""
    z = shift / scale
    return scale * (z * torch.erf(z / sqrt(2)) + sqrt(2 / pi) * (-z.square() / 2).exp())
