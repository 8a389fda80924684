r"""Independent units of a test set, and estimators with confidence intervals over them.

Samples of one cluster (the pixels of an image, the visits of a patient) may depend on each other in any way; clusters
are independent. The standard error of a statistic is that of the mean of its influence function over units. Intervals
are symmetric, or Wilson's for proportions and Hall's for means of skewed scores.
"""

from dataclasses import dataclass, replace
from math import copysign, hypot, sqrt
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtr, stdtr, stdtrit
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate, Verdict

BIASED = "a binned error is biased upwards; compare it with its noise floor and p-value"


@dataclass(frozen=True, eq=False)
class Units:
    """Independent units of n test samples, and the confidence level of intervals over them.

    `codes` is the cluster of each sample, every number from 0 to the largest in use; None where each sample is a unit.
    """

    n: int
    level: float
    codes: Int[Tensor, " n"] | None = None

    @property
    def count(self) -> int:
        """Number of units."""
        return self.n if self.codes is None else int(self.codes.max()) + 1

    @property
    def freedom(self) -> int | None:
        """Degrees of freedom of Student's distribution over clusters; None for the normal one over samples."""
        return None if self.codes is None else self.count - 1

    @property
    def quantile(self) -> float:
        """Half-width of a symmetric interval in standard errors."""
        return student_quantile(self.level, self.freedom)

    @property
    def words(self) -> str:
        """Suffix of an estimator's description."""
        return "" if self.codes is None else f" over {self.count} clusters"

    @property
    def caution(self) -> str:
        """Suffix of the description of noise floors and p-values, which do not account for clusters."""
        return "" if self.codes is None else f"; samples count as independent, not as {self.count} clusters"

    def sums(self, values: Float[Tensor, "n *columns"]) -> Float[Tensor, "units *columns"]:
        """Sum values over the samples of each unit."""
        if self.codes is None:
            return values
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.codes, values)

    def take(self, rows: Int[Tensor, " m"]) -> "Units":
        """Return the units of some samples."""
        codes = None if self.codes is None else torch.unique(self.codes[rows], return_inverse=True)[1]
        return Units(len(rows), self.level, codes)

    def residuals(self, values: Float[Tensor, " n"]) -> Float[Tensor, " units"]:
        """Sum deviations from the mean over the samples of each unit."""
        return self.sums(values - values.mean())

    def standard_error(self, influence: Float[Tensor, " n"]) -> float | None:
        """Return the standard error of the statistic with this influence function; None with a single unit.

        References:
            Liang and Zeger (1986), doi:10.1093/biomet/73.1.13 (clusters).
        """
        units = self.count
        if units < 2:
            return None
        return sqrt(units / (units - 1) * self.residuals(influence).square().sum().item()) / self.n

    def effective_size(self, indicators: Float[Tensor, " n"]) -> float:
        """Return the number of independent samples that determine a proportion as well.

        Over clusters it is n over the design effect, or the number of clusters where all samples agree; smaller for few
        clusters, whose standard error is itself uncertain.

        References:
            Korn and Graubard (1998), Survey Methodology 24, 193-201.
        """
        if self.codes is None:
            return float(self.n)
        share, error = indicators.mean().clamp(0, 1).item(), self.standard_error(indicators)
        size = min(float(self.n), share * (1 - share) / error**2) if error else float(self.count)
        return size * (normal_quantile(self.level) / self.quantile) ** 2


def normal_quantile(level: float) -> float:
    """Return the half-width, in standard errors, of the central normal interval of a confidence level."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def student_quantile(level: float, freedom: int | None) -> float:
    """Return the same half-width for Student's distribution; for the normal one without degrees of freedom."""
    return normal_quantile(level) if freedom is None else float(stdtrit(freedom, 0.5 + level / 2))


def two_sided_p_value(difference: float, standard_error: float, freedom: int | None) -> float:
    """Return the p-value of no difference, normal, or Student's with degrees of freedom; 0 or 1 without any spread."""
    if difference == 0 or standard_error == 0:
        return float(difference == 0)
    size = -abs(difference / standard_error)
    return min(1.0, 2 * float(ndtr(size) if freedom is None else stdtr(freedom, size)))


def without_interval(value: float | None, n: int, estimator: str, reason: str) -> Estimate:
    """Return an estimate without an interval, or without a value either, and the reason."""
    return Estimate(value, None, None, None, n, estimator, reason)


def without_spread(value: float, units: Units, estimator: str) -> Estimate:
    """Return an estimate over a single unit."""
    unit = "sample" if units.codes is None else "cluster of samples"
    return without_interval(value, units.n, estimator, f"one {unit} has no standard error")


def symmetric(value: float, standard_error: float | None, units: Units, estimator: str) -> Estimate:
    """Return a statistic with a symmetric interval."""
    if standard_error is None:
        return without_spread(value, units, estimator)
    half = units.quantile * standard_error
    return Estimate(value, value - half, value + half, standard_error, units.n, estimator + units.words)


def estimate_mean(values: Float[Tensor, " n"], units: Units) -> Estimate:
    """Estimate a mean with a symmetric interval."""
    return symmetric(values.mean().item(), units.standard_error(values), units, "mean")


def estimate_root_mean(squares: Float[Tensor, " n"], units: Units) -> Estimate:
    """Estimate the square root of a mean of squares; the interval is the root of the mean's interval."""
    mean = estimate_mean(squares, units)
    root, error = sqrt(mean.known), mean.standard_error
    low, high = (None if end is None else sqrt(max(end, 0.0)) for end in (mean.low, mean.high))
    if error is not None:
        error = error / (2 * root) if root > 0 else 0.0  # delta method
    name = f"root of a {mean.estimator}"
    return replace(mean, value=root, low=low, high=high, standard_error=error, estimator=name)


def estimate_share(indicators: Float[Tensor, " n"], units: Units) -> Estimate:
    """Estimate a proportion with its Wilson interval, over clusters that of the effective sample size.

    For means of several indicators of a sample it is conservative: a variable in [0, 1] with mean p has variance
    p (1 - p) at most.
    """
    share = min(1.0, max(0.0, indicators.mean().item()))
    error = sqrt(share * (1 - share) / units.n) if units.codes is None else units.standard_error(indicators)
    if error is None:
        return without_spread(share, units, "proportion")
    low, high = wilson_interval(share, units.effective_size(indicators), units.level)
    return Estimate(share, low, high, error, units.n, f"proportion, Wilson interval{units.words}")


def wilson_interval(share: float, n: float, level: float) -> tuple[float, float]:
    """Return the score interval of a proportion of n samples; it neither collapses nor leaves [0, 1].

    References:
        Wilson (1927), doi:10.1080/01621459.1927.10502953.
    """
    z = normal_quantile(level)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def wilson_of_share(indicators: Float[Tensor, " n"], units: Units) -> tuple[float, float]:
    """Return the Wilson interval of a share; all of [0, 1] for a single cluster, which tells nothing of others."""
    share = estimate_share(indicators, units)
    return (0.0, 1.0) if share.low is None or share.high is None else (share.low, share.high)


def wilson_by_cell(
    indicators: Float[Tensor, " n"], cell: Int[Tensor, " n"], n_cells: int, units: Units
) -> list[tuple[float | None, float | None]]:
    """Return the Wilson interval of the share in each cell (a bin, a class); no ends for an empty one."""
    sizes = torch.bincount(cell, minlength=n_cells).tolist()
    return [
        wilson_of_share(indicators[rows], units.take(rows)) if len(rows) else (None, None)
        for rows in cell.argsort(stable=True).split(sizes)
    ]


def standardized_skewness(residuals: Float[Tensor, " units"]) -> float:
    r"""Return $\sum r^3 / (\sum r^2)^{3/2}$, the skewness over the root of the number of units; 0 without spread."""
    scale = residuals.abs().max().item() if residuals.numel() else 0.0
    if scale == 0:
        return 0.0
    r = residuals / scale  # their cubes may underflow
    return r.pow(3).sum().item() / r.square().sum().item() ** 1.5


def hall_transform(t: float, skewness: float) -> float:
    r"""Return $t + \frac a3 t^2 + \frac{a^2}{27} t^3 + \frac a6$ of a standardized mean: nearly normal, rising in t."""
    return t + skewness / 3 * t**2 + skewness**2 / 27 * t**3 + skewness / 6


def inverse_hall_transform(x: float, skewness: float) -> float:
    """Return the standardized mean whose Hall transform is x."""
    if abs(skewness) < 1e-9:  # changes no digit
        return x
    cube = 1 + skewness * (x - skewness / 6)
    return 3 / skewness * (copysign(abs(cube) ** (1 / 3), cube) - 1)


def estimate_skewed_mean(values: Float[Tensor, " n"], units: Units, *, fitting_error: float = 0.0) -> Estimate:
    """Estimate a mean with an interval that is longer on the side of the long tail.

    A few surprised samples make up much of a mean negative log-likelihood; the interval covers like that of a
    studentized bootstrap (docs/calibration_reports.md), without draws. `fitting_error` is a standard error that the
    scores share, from numbers that were fitted on other samples.

    References:
        Hall (1992), doi:10.1111/j.2517-6161.1992.tb01872.x (removal of skewness by transformation).
    """
    mean, moments = values.mean().item(), _moments(values, units, fitting_error)
    if moments is None:
        return without_spread(mean, units, "mean")
    error, skewness = moments
    low, high = (mean - error * inverse_hall_transform(x, skewness) for x in (units.quantile, -units.quantile))
    name = f"mean, interval corrected for skewness{units.words}"
    return Estimate(mean, min(low, mean), max(high, mean), error, units.n, name)


def skewed_p_value(values: Float[Tensor, " n"], units: Units, *, fitting_error: float = 0.0) -> float | None:
    """Return the two-sided p-value of a mean of zero, by the same transformation; None with a single unit."""
    mean, moments = values.mean().item(), _moments(values, units, fitting_error)
    if mean == 0:
        return 1.0
    if moments is None:
        return None
    error, skewness = moments
    return two_sided_p_value(hall_transform(mean / error, skewness), 1.0, units.freedom) if error > 0 else 0.0


def _moments(values: Float[Tensor, " n"], units: Units, fitting_error: float) -> tuple[float, float] | None:
    """Return the standard error and the standardized skewness of a mean; the part from fitting has no skewness."""
    error = units.standard_error(values)
    if error is None:
        return None
    whole = hypot(error, fitting_error)
    return whole, standardized_skewness(units.residuals(values)) * (error / whole) ** 3 if whole > 0 else 0.0


def adjust_by_holm(p_values: list[float | None]) -> list[float | None]:
    """Adjust p-values step-down; None stays None and counts as no test.

    References:
        Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    p = np.array(p_values, dtype=np.float64)  # None becomes NaN, which sorts last
    order, n_tests = p.argsort(), np.count_nonzero(~np.isnan(p))
    p[order] = np.minimum(1.0, np.maximum.accumulate((n_tests - np.arange(len(p))) * p[order]))
    return [None if np.isnan(x) else x for x in p.tolist()]


def find_holm_levels(p_values: list[float | None], level: float) -> list[float | None]:
    r"""Return the level of each comparison's interval that excludes 0 exactly where Holm's procedure rejects.

    With $\alpha = 1 - \mathrm{level}$ the procedure compares the smallest of m p-values with $\alpha / m$, the next
    with $\alpha / (m - 1)$ and so on; the first that it does not reject ends it, and all others keep the level of that.
    """
    p, adjusted = (np.array(x, dtype=np.float64) for x in (p_values, adjust_by_holm(p_values)))
    n_tests, alpha = int(np.count_nonzero(~np.isnan(p))), 1 - level
    place = np.minimum(p.argsort(kind="stable").argsort(), np.count_nonzero(adjusted < alpha))
    return [None if np.isnan(x) else 1 - alpha / (n_tests - i) for x, i in zip(p.tolist(), place.tolist(), strict=True)]


def judge_difference(difference: float, p_value: float | None, *, level: float) -> Verdict:
    """Return "better" below 0 and "worse" above it, where the p-value is below the level."""
    if p_value is None or p_value >= level:
        return "no detectable difference"
    return "better" if difference < 0 else "worse"
