r"""Predictive distributions of n test samples with d outputs: Gaussian, mixture of Gaussians, or known by samples.

The three answer the same questions; only the density is joint over the outputs, all else is per output.

- `mean`, `standard_deviation`, and `samples`: the number of samples it rests on, None for a closed form;
- `negative_log_density(y)`: joint, divided by the number of outputs, in nats;
- `expected_distance(y)` $= E|X - y|$ and `mean_difference()` $= E|X - X'|$ of two independent draws, which make the
  continuous ranked probability score;
- `probability_below(y)`: of a smaller value, between two bounds that are equal where the distribution is continuous;
- `quantile(p)`: the value below which the share p lies;
- `draw_errors(draws, generator)`: draws minus the mean, on the CPU;
- `marginal(output)`: the distribution of one output.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log, pi, sqrt
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

BISECTIONS = 60  # halvings of an interval as wide as the spread of the samples: below a rounding error of it


@dataclass(frozen=True, eq=False)
class NormalDistribution:
    """Gaussian, its outputs independent unless there is a Cholesky factor of their covariance.

    Attributes:
        mean: of each sample and output.
        standard_deviation: positive.
        cholesky: lower factor of the covariance, or None.
    """

    mean: Float[Tensor, "n d"]
    standard_deviation: Float[Tensor, "n d"]
    cholesky: Float[Tensor, "n d d"] | None = None

    @property
    def description(self) -> str:
        """The distribution in words."""
        return "Gaussian" if self.cholesky is None else "Gaussian with covariance"

    @property
    def samples(self) -> None:
        """None: it is a closed form."""
        return

    def negative_log_density(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        r"""$\frac12 \|L^{-1}(y - \mu)\|^2 + \log\det L + \frac d2 \log 2\pi$ over d."""
        if self.cholesky is None:
            z, scale = (y - self.mean) / self.standard_deviation, self.standard_deviation
        else:
            z = torch.linalg.solve_triangular(self.cholesky, (y - self.mean)[..., None], upper=False)[..., 0]
            scale = self.cholesky.diagonal(dim1=-2, dim2=-1)
        return (z.square() / 2 + scale.log() + log(2 * pi) / 2).mean(dim=1)

    def expected_distance(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        r"""$E|X - y|$ of every output."""
        return normal_distance(self.mean - y, self.standard_deviation)

    def mean_difference(self) -> Float[Tensor, "n d"]:
        r"""$2 \sigma / \sqrt\pi$."""
        return 2 / sqrt(pi) * self.standard_deviation

    def probability_below(self, y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        r"""$\Phi((y - \mu) / \sigma)$, twice."""
        p = torch.special.ndtr((y - self.mean) / self.standard_deviation)
        return p, p

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        r"""$\mu + \sigma \Phi^{-1}(p)$."""
        return self.mean + NormalDist().inv_cdf(p) * self.standard_deviation

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        r"""$L \epsilon$, or $\sigma \epsilon$, with standard normal $\epsilon$."""
        noise = torch.randn(draws, *self.mean.shape, generator=generator, dtype=self.mean.dtype)
        if self.cholesky is None:
            return noise.mul_(self.standard_deviation.cpu())
        return torch.einsum("nij,rnj->rni", self.cholesky.cpu(), noise)

    def marginal(self, output: int) -> "NormalDistribution":
        """The Gaussian of one output."""
        one = slice(output, output + 1)
        return NormalDistribution(self.mean[:, one], self.standard_deviation[:, one])


@dataclass(frozen=True, eq=False)
class _Sampled:
    """What all distributions that rest on samples share."""

    values: Float[Tensor, "S n d"]

    @property
    def samples(self) -> int:
        """Number of samples S."""
        return self.values.shape[0]

    @cached_property
    def mean(self) -> Float[Tensor, "n d"]:
        """Mean of the samples."""
        return self.values.mean(dim=0)


@dataclass(frozen=True, eq=False)
class NormalMixture(_Sampled):
    """Equal mixture of a Gaussian around each of S samples of the function.

    Memory: a few arrays of the samples' size at a time.

    Attributes:
        values: samples of the function.
        noise: standard deviation of the observation noise, positive.
    """

    noise: Float[Tensor, "n d"]

    @property
    def description(self) -> str:
        """The distribution in words."""
        return f"mixture of {self.samples} Gaussians"

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Root of the variance of the samples plus that of the noise."""
        return (self.values.var(dim=0, correction=0) + self.noise.square()).sqrt()

    def negative_log_density(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        r"""$-\log \frac1S \sum_s \prod_j N(y_j; f_{sj}, \sigma_j^2)$ over d."""
        z = (y - self.values) / self.noise
        log_densities = -(z.square() / 2 + self.noise.log() + log(2 * pi) / 2).sum(dim=-1)
        return (log(self.samples) - log_densities.logsumexp(dim=0)) / y.shape[1]

    def expected_distance(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        r"""Mean over components of $E|X - y|$."""
        return normal_distance(self.values - y, self.noise).mean(dim=0)

    def mean_difference(self) -> Float[Tensor, "n d"]:
        r"""$S^{-2} \sum_{s, t} E|N(f_s - f_t, 2 \sigma^2)|$, in S / 2 passes over the samples.

        References:
            Grimit, Gneiting, Berrocal, Johnson (2006), doi:10.1256/qj.05.235.
        """
        S, scale = self.samples, sqrt(2) * self.noise
        total = S * normal_distance(torch.zeros_like(scale), scale)
        for k in range(1, S // 2 + 1):
            # every pair k apart on a ring; those half the ring apart come twice of themselves
            pairs = 1 if 2 * k == S else 2
            total += pairs * normal_distance(self.values - self.values.roll(k, dims=0), scale).sum(dim=0)
        return total / S**2

    def probability_below(self, y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        r"""Mean over components of $\Phi((y - f_s) / \sigma)$, twice."""
        p = self._below(y)
        return p, p

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """By bisection between the smallest and the largest quantile of a component."""
        shift = NormalDist().inv_cdf(p) * self.noise
        low, high = self.values.amin(dim=0) + shift, self.values.amax(dim=0) + shift
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_below = self._below(middle) < p
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """A component and its noise."""
        noise = torch.randn(draws, *self.mean.shape, generator=generator, dtype=self.mean.dtype)
        centred = _pick(self.values - self.mean, draws, generator)
        return noise.mul_(self.noise.cpu()).add_(centred)

    def marginal(self, output: int) -> "NormalMixture":
        """The mixture of one output."""
        one = slice(output, output + 1)
        return NormalMixture(self.values[:, :, one], self.noise[:, one])

    def _below(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return torch.special.ndtr((y - self.values) / self.noise).mean(dim=0)


@dataclass(frozen=True, eq=False)
class SampledDistribution(_Sampled):
    """Known through S samples that hold the noise; target and samples are exchangeable where it is right.

    Attributes:
        values: samples, at least two.
    """

    @property
    def description(self) -> str:
        """The distribution in words."""
        return f"{self.samples} samples"

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "n d"]:
        """Unbiased deviation of the samples."""
        return self.values.std(dim=0)

    def negative_log_density(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """That of the independent Gaussian with the samples' moments: samples have no density of their own."""
        return NormalDistribution(self.mean, self.standard_deviation).negative_log_density(y)

    def expected_distance(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        r"""Mean of $|x_s - y|$."""
        return (self.values - y).abs().mean(dim=0)

    def mean_difference(self) -> Float[Tensor, "n d"]:
        r"""$\frac{1}{S (S - 1)} \sum_{s, t} |x_s - x_t|$, unbiased, from the sorted samples.

        References:
            Ferro (2014), doi:10.1002/qj.2270 (fair scores of ensembles).
        """
        S = self.samples
        weights = 2 * torch.arange(1, S + 1, device=self.values.device, dtype=self.values.dtype) - S - 1
        return 2 / (S * (S - 1)) * torch.einsum("s,snd->nd", weights, self._ordered - self.mean)

    def probability_below(self, y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Bounds (rank, rank + 1) / (S + 1) of the target among the samples, wider where it ties with some."""
        low = (self.values < y).sum(dim=0) / (self.samples + 1)
        high = ((self.values <= y).sum(dim=0) + 1) / (self.samples + 1)
        return low.to(y.dtype), high.to(y.dtype)

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """Interpolated at rank p (S + 1), no further out than the samples go."""
        position = min(max(p * (self.samples + 1), 1.0), float(self.samples)) - 1
        k = min(int(position), self.samples - 2)
        return torch.lerp(self._ordered[k], self._ordered[k + 1], position - k)

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """Samples minus their mean."""
        return _pick(self.values - self.mean, draws, generator)

    def marginal(self, output: int) -> "SampledDistribution":
        """The samples of one output."""
        return SampledDistribution(self.values[:, :, output : output + 1])

    @cached_property
    def _ordered(self) -> Float[Tensor, "S n d"]:
        return self.values.sort(dim=0).values


Distribution = NormalDistribution | NormalMixture | SampledDistribution


def normal_distance(shift: Float[Tensor, "*S n d"], scale: Float[Tensor, "n d"]) -> Float[Tensor, "*S n d"]:
    r"""$E|X|$ of a normal variable: $\sigma [z (2 \Phi(z) - 1) + 2 \varphi(z)]$ with $z = \mu / \sigma$."""
    z = shift / scale
    return scale * (z * torch.erf(z / sqrt(2)) + sqrt(2 / pi) * (-z.square() / 2).exp())


def _pick(values: Float[Tensor, "S n d"], draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
    """One of the S rows for every draw and test sample, the same for all its outputs."""
    S, n, d = values.shape
    chosen = torch.randint(S, (draws, n, 1), generator=generator).expand(draws, n, d)
    return values.cpu().gather(0, chosen)
