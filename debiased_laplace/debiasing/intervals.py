r"""Confidence intervals for the full batch's curvature along directions, where a few samples carry most of it.

Per-sample curvatures are not negative, nearly zero for many samples and large for a few. Their mean is then most often
too small, and its standard error with it, so that $\pm 1.96$ standard errors miss the truth on one side: above. With
$\gamma$ the skewness over samples, n samples out of a population of which they are the share $\phi$, the studentized
error $T = (\hat m - m) / \mathrm{se}$ has, for a standard normal's distribution $\Phi$ and density $\varphi$,

$$P(T \le x) = \Phi(x) + g\,(A x^2 + B)\,\varphi(x) + O(1/n), \quad g = \frac{\gamma}{\sqrt n}, \quad
A = \frac{2 - \phi}{6 \sqrt{1 - \phi}}, \quad B = \frac{\sqrt{1 - \phi}}{2} - A$$

($A = 1/3$ and $B = 1/6$ for independent samples), and Hall's monotone transformation
$(e^{2 A g T} - 1) / (2 A g) + B g$ is normal to that order. Turned round, it says how far above and below the truth is.
Two things are added. The correction only ever widens the plain interval: the skewness of a heavy tail is itself far
from certain, and its estimate too small more often than not. And cross-fitted values have an error that is no matter
of samples: they belong to directions of other folds, which know a little less (`mismatch_of_folds`).

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

from debiased_laplace.linalg.accumulation import accumulation_dtype

_LEAST = 0.05
"""Least argument of the logarithm: more skewness than that is taken for as much, or there were no upper end."""


@dataclass(frozen=True, eq=False)
class ErrorShape:
    r"""What is known of the errors of magnitudes besides their standard errors.

    Attributes:
        skewness: $g$, the skewness over samples divided by $\sqrt n$; of a sum, its third cumulant over its
            standard error cubed.
        mismatch: how much too large the values are expected to be because they were measured along other directions.
        n_samples: number n of samples that the standard errors come from.
        sampled_share: the share $\phi$ of the population that they are; 1 where the values are exact.
    """

    skewness: Float[Tensor, " k"]
    mismatch: Float[Tensor, " k"]
    n_samples: int
    sampled_share: float

    def to(self, dtype: torch.dtype) -> "ErrorShape":
        """The same in another precision."""
        return ErrorShape(self.skewness.to(dtype), self.mismatch.to(dtype), self.n_samples, self.sampled_share)


def mismatch_of_folds(
    measured: Float[Tensor, " k"], in_sample: Float[Tensor, " k"], n_folds: int
) -> Float[Tensor, " k"]:
    r"""How much too large values are that folds measured along the directions of the other folds.

    To second order in the noise of H, an eigenvalue of n samples is $a_i / n$ above and the full batch's curvature
    along its eigenvector $a_i / n$ below the full batch's own eigenvalue, leading ones having $a_i > 0$. The others of
    a fold are $n (1 - 1/K)$ samples, so that what the fold says is $a_i / (n (K - 1))$ below the curvature along the
    eigenvectors of all n, and $a_i (2K - 1) / (n (K - 1))$ below their eigenvalue, which is known. In a finite
    population the same is true.

    Args:
        measured: what folds say.
        in_sample: the eigenvalues of all samples.
        n_folds: K.

    Returns:
        (measured - in_sample) / (2K - 1): negative for leading directions, positive for trailing ones.
    """
    return (measured - in_sample) / (2 * n_folds - 1)


def confidence_intervals(
    values: Float[Tensor, " k"], standard_errors: Float[Tensor, " k"], shape: ErrorShape, *, level: float
) -> Float[Tensor, "k 2"]:
    r"""Intervals for non-negative curvatures that allow for skewness and for directions that do not quite match.

    Valid only as far as the samples show their tail: where the few samples that carry the curvature are missing, no
    interval from the others can know.

    Args:
        values: the estimates.
        standard_errors: of the estimates.
        shape: what else is known of their errors.
        level: nominal coverage, above 0 and below 1.

    Returns:
        Lower and upper ends, 0 <= lower <= value <= upper; both are the value where it is exact, and 0 and infinity
        where a single sample says nothing about spread.

    Raises:
        ValueError: for another level.
    """
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise ValueError(f"Expected a level between 0 and 1, 0.95 say; got {level!r}.")
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
    """How many standard errors an estimate may be below the truth, for its quantile z; above it, with -g for g."""
    rest = (1 - share) ** 0.5
    A = (2 - share) / (6 * rest)
    B = rest / 2 - A
    g = g.clamp_max((1 - _LEAST) / (2 * A * (z + max(B, 0.0))))
    x = 2 * A * g * (z + B * g)
    stretch = torch.where(x == 0, 1.0, -torch.log1p(-x) / torch.where(x == 0, 1.0, x))
    return ((z + B * g) * stretch).clamp_min(z)
