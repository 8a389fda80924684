r"""Confidence intervals for the full batch's curvature along directions, for skewed per-sample curvatures.

Per-sample curvatures are non-negative, nearly zero for many samples and large for a few. Their mean is then mostly too
small, and so is its standard error: $\pm 1.96$ standard errors miss the truth too often, above the interval. For n
samples, a share $\phi$ of the population, with skewness $\gamma$, the studentized error
$T = (\hat m - m) / \mathrm{se}$ has the expansion

$$P(T \le x) = \Phi(x) + g\,(A x^2 + B)\,\varphi(x) + O(1/n), \quad g = \frac{\gamma}{\sqrt n}, \quad
A = \frac{2 - \phi}{6 \sqrt{1 - \phi}}, \quad B = \frac{\sqrt{1 - \phi}}{2} - A$$

($\Phi$ and $\varphi$ the standard normal distribution and density; $A = 1/3$ and $B = 1/6$ for independent samples).
Hall's monotone transformation $(e^{2 A g T} - 1) / (2 A g) + B g$ is normal to that order, and its inverse gives the
ends of the interval. Two things are added. The correction only widens the plain interval, because the estimated
skewness of a heavy tail is uncertain and mostly too small. And cross-fitted values have a bias from using directions
estimated on (K - 1)/K of the samples (`mismatch_of_folds`).

References:
    Hall (1992), J. R. Stat. Soc. B 54(1), 221-228 (skewness removed by a monotone transformation; the exponential
    one); Zhou & Gao (2000), Am. Stat. 54(2), 100-104 (compared for means of skewed populations); Sugden, Smith & Jones
    (2000), J. R. Stat. Soc. B 62(4), 787-793 (the expansion under sampling without replacement).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from debiased_laplace.checks import number
from debiased_laplace.linalg.accumulation import accumulation_dtype

_LEAST = 0.05
"""Lower bound of the logarithm's argument: larger skewness is clipped, or the upper end would be infinite."""


@dataclass(frozen=True, eq=False)
class ErrorShape:
    r"""Skewness, bias and sampling of magnitudes, beside their standard errors.

    Attributes:
        skewness: $g$, the skewness over samples divided by $\sqrt n$; for a sum, its third cumulant divided by its
            standard error cubed.
        mismatch: expected excess of the values from measuring them along other directions.
        n_samples: number n of samples that the standard errors come from.
        sampled_share: their share $\phi$ of the population; 1 if the values are exact.
    """

    skewness: Float[Tensor, " k"]
    mismatch: Float[Tensor, " k"]
    n_samples: int
    sampled_share: float

    def to(self, dtype: torch.dtype) -> "ErrorShape":
        """Convert to another precision."""
        return ErrorShape(self.skewness.to(dtype), self.mismatch.to(dtype), self.n_samples, self.sampled_share)


def mismatch_of_folds(
    measured: Float[Tensor, " k"], in_sample: Float[Tensor, " k"], n_folds: int
) -> Float[Tensor, " k"]:
    r"""Return the expected excess of curvatures that folds measured along the directions of the other folds.

    To second order in the noise of H, an eigenvalue of n samples is $a_i / n$ above the full batch's eigenvalue, and
    the full batch's curvature along its eigenvector $a_i / n$ below; $a_i > 0$ for leading ones. Directions from the
    $n (1 - 1/K)$ samples outside a fold give values $a_i / (n (K - 1))$ below the curvature along the eigenvectors of
    all n, and $a_i (2K - 1) / (n (K - 1))$ below their eigenvalue, which is known. The same holds in a finite
    population.

    Args:
        measured: cross-fitted curvatures.
        in_sample: eigenvalues of all samples.
        n_folds: number K of folds.

    Returns:
        (measured - in_sample) / (2K - 1): negative for leading directions, positive for trailing ones.
    """
    return (measured - in_sample) / (2 * n_folds - 1)


def confidence_intervals(
    values: Float[Tensor, " k"], standard_errors: Float[Tensor, " k"], shape: ErrorShape, *, level: float
) -> Float[Tensor, "k 2"]:
    r"""Compute intervals for non-negative curvatures that include skewness and the mismatch of directions.

    Valid only if the samples contain some of the few that carry the curvature; the others do not reveal these.

    Args:
        values: estimates.
        standard_errors: standard errors of the estimates.
        shape: other properties of the errors.
        level: nominal coverage, above 0 and below 1.

    Returns:
        Lower and upper ends, 0 <= lower <= value <= upper. Both equal the value if it is exact; they are 0 and infinity
        for a single sample.

    Raises:
        ValueError: if the level is not between 0 and 1.
    """
    level = number(level, "level, such as 0.95,", low=0, high=1, is_open=True)
    if shape.sampled_share >= 1:
        return torch.stack([values, values], 1)
    if shape.n_samples < 2:
        return torch.stack([torch.zeros_like(values), torch.full_like(values, torch.inf)], 1)
    exact = accumulation_dtype(values)
    m, errors = values.to(exact), standard_errors.to(exact)
    g, bias = shape.skewness.to(exact), shape.mismatch.to(exact)
    z = float(student.ppf((1 + level) / 2, shape.n_samples - 1))
    lower = m - errors * _errors_below(-g, z, shape.sampled_share) - bias.clamp_min(0)
    upper = m + errors * _errors_below(g, z, shape.sampled_share) + (-bias).clamp_min(0)
    return torch.stack([lower.clamp_min(0), upper], 1).to(values.dtype)


def _errors_below(g: Float[Tensor, " k"], z: float, share: float) -> Float[Tensor, " k"]:
    """Return how many standard errors an estimate may be below the truth, for quantile z; with -g: above the truth."""
    rest = (1 - share) ** 0.5
    A = (2 - share) / (6 * rest)
    B = rest / 2 - A
    g = g.clamp_max((1 - _LEAST) / (2 * A * (z + max(B, 0.0))))
    x = 2 * A * g * (z + B * g)
    stretch = torch.where(x == 0, 1.0, -torch.log1p(-x) / torch.where(x == 0, 1.0, x))
    return ((z + B * g) * stretch).clamp_min(z)
