"""Predictive distributions of counts: mixtures of Poisson distributions, with their scores and quantiles."""

from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Independent, Poisson

from debiased_laplace.calibration.distributions import BISECTIONS, TIE_SEED, RegressionPredictions

MOST_TERMS = 20_000  # of a sum over counts; beyond it, the Gaussian of the same moments is as good


@dataclass(frozen=True, eq=False)
class Counts:
    """Predictions of counts: an equal mixture of Poisson distributions for each test sample.

    Attributes:
        rates: expected counts at S draws of the network, (S, n) or (S, n, outputs); S is 1 for a single network.
    """

    rates: Any


class CountPredictions(RegressionPredictions):
    """Equal mixture of S Poisson distributions, whose rates are `values`; `noise` is the root of their mean."""

    @property
    def description(self) -> str:
        """The distribution in words."""
        return f"mixture of {len(self.values)} Poisson distributions" if len(self.values) > 1 else "Poisson"

    @property
    def parts(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Standard deviations of the rates (epistemic) and of counts around them (aleatoric)."""
        return self.values.std(dim=0, correction=0).cpu(), self.noise.cpu()

    @cached_property
    def negative_log_density(self) -> Float[Tensor, " n"]:
        """Minus the logarithm of the joint probability of the outputs, divided by their number, in nats."""
        of_components = Independent(Poisson(self.values), 1).log_prob(self.targets)
        return ((log(len(self.values)) - of_components.logsumexp(dim=0)) / self.n_outputs).cpu()

    @cached_property
    def deviance(self) -> Float[Tensor, " n"]:
        r"""Poisson deviance $2 (y \log(y / \mu) - y + \mu)$ of the predicted mean, averaged over the outputs."""
        y, mu = self.targets.cpu(), self.mean
        return 2 * (torch.xlogy(y, y / mu) - y + mu).mean(dim=1)

    @cached_property
    def ranked_probability_score(self) -> Float[Tensor, "n d"]:
        r"""Ranked probability score $\sum_k (F(k) - 1[y \le k])^2$, up to tails below rounding.

        References:
            Czado, Gneiting & Held (2009), doi:10.1111/j.1541-0420.2009.01191.x.
        """
        spread, y = 9 * self.values.sqrt() + 30, self.targets
        first = (self.values - spread).amin(dim=0).minimum(y).clamp_min(0).floor()
        n_terms = (self.values + spread).amax(dim=0).maximum(y) - first + 1
        is_large = n_terms > MOST_TERMS
        log_rates, below, score = self.values.log(), torch.zeros_like(y), torch.zeros_like(y)
        for j in range(int(torch.where(is_large, 0, n_terms).max())):
            k = first + j
            below += (k * log_rates - self.values - torch.lgamma(k + 1)).exp().mean(dim=0)
            score += (below - (k >= y).to(y.dtype)).square()
        if bool(is_large.any()):
            return torch.where(is_large.cpu(), super().ranked_probability_score, score.cpu())
        return score.cpu()

    @cached_property
    def probability_transform(self) -> Float[Tensor, "n d"]:
        """Drawn between P(smaller) and P(not larger), always with the same random numbers: uniform if right.

        References:
            Czado, Gneiting & Held (2009), doi:10.1111/j.1541-0420.2009.01191.x, section 2.1.
        """
        low, high = (self._probability_up_to(self.targets - step).cpu() for step in (1, 0))
        return low + (high - low) * torch.rand(
            low.shape, generator=torch.Generator().manual_seed(TIE_SEED), dtype=low.dtype
        )

    @cached_property
    def normal_scores(self) -> Float[Tensor, "n d"]:
        r"""$\Phi^{-1}$ of the probability transform."""
        return torch.special.ndtri(self.probability_transform.clamp(1e-300, 1 - 1e-16))

    def quantile(self, p: float) -> Float[Tensor, "n d"]:
        """Return the smallest count whose distribution function is at least p."""
        low, high = torch.full_like(self.noise, -1.0), (self.values + 40 * self.values.sqrt() + 60).amax(dim=0).ceil()
        for _ in range(BISECTIONS):
            middle = ((low + high) / 2).floor()
            enough = self._probability_up_to(middle) >= p
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high.cpu()

    def draw_errors(self, draws: int, generator: torch.Generator) -> Float[Tensor, "draws n d"]:
        """Draw deviations from the mean."""
        rates = self.values.cpu().gather(0, self._draw_components(draws, generator))
        return torch.poisson(rates, generator=generator) - self.mean

    def _probability_up_to(self, k: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return P(y <= k), by the regularized upper incomplete gamma function."""
        found = torch.special.gammaincc(k.clamp_min(0) + 1, self.values).mean(dim=0)
        return torch.where(k < 0, 0.0, found)
