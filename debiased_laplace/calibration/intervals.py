r"""Independent units of a test set, and the estimators with intervals over them that every metric uses.

Samples of one cluster (the pixels of an image, the visits of a patient) may depend on each other in any way; clusters
are independent. Every statistic moves like the mean of its influence function, so that one standard error, that of
sums over units, serves all of them. What differs is the shape of the interval: symmetric, Wilson's for proportions,
Hall's for means of skewed scores, log-normal for positive areas.
"""

from dataclasses import dataclass
from math import copysign, exp, hypot, sqrt
from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import Estimate, Verdict

_SYMMETRIC = 1e-9  # a standardized skewness below this changes no digit


@dataclass(frozen=True, eq=False)
class Units:
    """Independent units of n test samples, and the confidence level of intervals over them.

    Attributes:
        n: number of samples.
        level: coverage of every interval, between 0 and 1.
        codes: cluster of each sample, every number from 0 to the largest in use; None where each sample is a unit.
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
        """Degrees of freedom of Student's distribution; None for the normal one, where samples are independent."""
        return None if self.codes is None else self.count - 1

    @property
    def quantile(self) -> float:
        """Half-width of a symmetric interval in standard errors."""
        return student_quantile(self.level, self.freedom)

    @property
    def words(self) -> str:
        """What an estimator's description adds."""
        return "" if self.codes is None else f" over {self.count} clusters"

    @property
    def caution(self) -> str:
        """What must be said of noise floors and p-values, which know no clusters."""
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
        """Standard error of the mean of values, or of the statistic whose influence function they are.

        Returns:
            None with a single unit.

        References:
            Liang and Zeger (1986), doi:10.1093/biomet/73.1.13 (clusters).
        """
        units = self.count
        if units < 2:
            return None
        return sqrt(units / (units - 1) * self.residuals(influence).square().sum().item()) / self.n

    def effective_size(self, indicators: Float[Tensor, " n"]) -> float:
        """Return how many independent samples a proportion of these is worth.

        Over clusters it is n over the design effect, less for few clusters, whose standard error is itself uncertain.
        Where all samples agree no design effect can be seen: each cluster then counts as one sample.

        References:
            Korn and Graubard (1998), Survey Methodology 24, 193-201.
        """
        if self.codes is None:
            return float(self.n)
        share, error = indicators.mean().clamp(0, 1).item(), self.standard_error(indicators)
        size = min(float(self.n), share * (1 - share) / error**2) if error else float(self.count)
        return size * (normal_quantile(self.level) / self.quantile) ** 2


def normal_quantile(level: float) -> float:
    """Half-width, in standard errors, of the central normal interval of a confidence level."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def student_quantile(level: float, freedom: int | None) -> float:
    """Half-width, in standard errors, of the central interval of Student's distribution; of the normal one for None."""
    if freedom is None:
        return normal_quantile(level)
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + level / 2))


def two_sided_p_value(difference: float, standard_error: float, freedom: int | None) -> float:
    """Two-sided p-value of no difference, normal, or Student's where there are degrees of freedom.

    Without any spread it is 1 for no difference, else 0.
    """
    from scipy.special import ndtr, stdtr

    if difference == 0 or standard_error == 0:
        return float(difference == 0)
    size = -abs(difference / standard_error)
    return min(1.0, 2 * float(ndtr(size) if freedom is None else stdtr(freedom, size)))


def without_interval(value: float | None, n: int, *, estimator: str, reason: str) -> Estimate:
    """An estimate that has no interval, or no value either, and the reason."""
    return Estimate(value, None, None, None, n, estimator, reason)


def _single(value: float, units: Units, estimator: str) -> Estimate:
    unit = "sample" if units.codes is None else "cluster of samples"
    return without_interval(value, units.n, estimator=estimator, reason=f"one {unit} has no standard error")


def symmetric(value: float, standard_error: float | None, units: Units, estimator: str) -> Estimate:
    """A statistic with a symmetric interval."""
    if standard_error is None:
        return _single(value, units, estimator)
    half = units.quantile * standard_error
    return Estimate(value, value - half, value + half, standard_error, units.n, estimator + units.words)


def estimate_mean(values: Float[Tensor, " n"], units: Units) -> Estimate:
    """Mean over samples with a symmetric interval."""
    return symmetric(values.mean().item(), units.standard_error(values), units, "mean")


def estimate_root_mean(squares: Float[Tensor, " n"], units: Units) -> Estimate:
    """Square root of a mean of squares; the interval is the root of the mean's interval."""
    mean = estimate_mean(squares, units)
    root, name = sqrt(mean.known), f"root of a {mean.estimator}"
    if mean.low is None or mean.high is None or mean.standard_error is None:
        return without_interval(root, mean.n, estimator=name, reason=mean.reason or "")
    error = mean.standard_error / (2 * root) if root > 0 else 0.0  # delta method
    return Estimate(root, sqrt(max(mean.low, 0.0)), sqrt(mean.high), error, mean.n, name)


def estimate_share(indicators: Float[Tensor, " n"], units: Units) -> Estimate:
    """Proportion with its Wilson interval, over clusters that of its effective sample size.

    For means of several indicators of a sample it is conservative: a variable in [0, 1] with mean p has variance
    p (1 - p) at most.
    """
    share = min(1.0, max(0.0, indicators.mean().item()))
    error = units.standard_error(indicators)
    if units.codes is None:
        error = sqrt(share * (1 - share) / units.n)
    if error is None:
        return _single(share, units, "proportion")
    low, high = wilson_interval(share, units.effective_size(indicators), units.level)
    return Estimate(share, low, high, error, units.n, f"proportion, Wilson interval{units.words}")


def wilson_interval(share: float, n: float, level: float) -> tuple[float, float]:
    """Score interval of a proportion of n samples; it neither collapses nor leaves [0, 1] at shares 0 and 1.

    References:
        Wilson (1927), doi:10.1080/01621459.1927.10502953.
    """
    z = normal_quantile(level)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def wilson_by_cell(
    indicators: Float[Tensor, " n"], cell: Int[Tensor, " n"], n_cells: int, units: Units
) -> list[tuple[float, float] | None]:
    """Wilson intervals of the share in each cell (a bin, a class); None in an empty one.

    A cell that a single cluster reaches says nothing about other clusters: its interval is all of [0, 1].
    """
    order, sizes = cell.argsort(stable=True), torch.bincount(cell, minlength=n_cells)
    intervals: list[tuple[float, float] | None] = []
    for rows in order.split(sizes.tolist()):
        if not len(rows):
            intervals.append(None)
            continue
        own, inside = units.take(rows), indicators[rows]
        single = own.codes is not None and own.count < 2
        share = min(1.0, max(0.0, inside.mean().item()))
        intervals.append((0.0, 1.0) if single else wilson_interval(share, own.effective_size(inside), own.level))
    return intervals


def interval_of_statistic(
    value: float, standard_error: float, level: float, *, least_size: float
) -> tuple[float, float]:
    r"""Wilson interval of a statistic between 0 and 1 that is no proportion.

    Its sample size is $p (1 - p) / \mathrm{se}^2$, or `least_size` where the standard error is 0, so that the interval
    neither leaves [0, 1] nor collapses.

    References:
        Newcombe (2006), doi:10.1002/sim.2324 (such intervals for the area under a ROC curve).
    """
    size = value * (1 - value) / standard_error**2 if standard_error > 0 else least_size
    return wilson_interval(value, size if size > 0 else least_size, level)


def estimate_positive(
    value: float, influence: Float[Tensor, " n"], units: Units, *, losses: Float[Tensor, " n"], most: float
) -> Estimate:
    """A positive area, at most `most`, with an interval that is symmetric for its logarithm.

    The standard error is itself an estimate, and a poor one where few samples hold most of the loss: the interval is
    Student's, with half as many degrees of freedom as there are losses of equal size that would be worth these.
    """
    error, name = units.standard_error(influence), "statistic of ranks, influence function"
    if error is None:
        return _single(value, units, name)
    sums = units.sums(losses)
    worth = sums.sum().item() ** 2 / sums.square().sum().item()
    freedom = max(1, min(units.count - 1, int(worth / 2)))
    factor = exp(min(student_quantile(units.level, freedom) * error / value, 100.0))
    name += f", log-normal interval with {freedom} degrees of freedom{units.words}"
    return Estimate(value, value / factor, max(value, min(most, value * factor)), error, units.n, name)


def standardized_skewness(residuals: Float[Tensor, " units"]) -> float:
    r"""$\sum r^3 / (\sum r^2)^{3/2}$: the skewness of residuals over the root of their number; 0 without spread."""
    scale = residuals.abs().max().item() if residuals.numel() else 0.0
    if scale == 0:
        return 0.0
    r = residuals / scale  # their cubes may underflow
    return r.pow(3).sum().item() / r.square().sum().item() ** 1.5


def hall_transform(t: float, skewness: float) -> float:
    r"""$t + \frac a3 t^2 + \frac{a^2}{27} t^3 + \frac a6$ of a standardized mean: nearly normal, and rising in t."""
    return t + skewness / 3 * t**2 + skewness**2 / 27 * t**3 + skewness / 6


def inverse_hall_transform(x: float, skewness: float) -> float:
    """The standardized mean whose Hall transform is x."""
    if abs(skewness) < _SYMMETRIC:
        return x
    cube = 1 + skewness * (x - skewness / 6)
    return 3 / skewness * (copysign(abs(cube) ** (1 / 3), cube) - 1)


def estimate_skewed_mean(values: Float[Tensor, " n"], units: Units, *, fitting_error: float = 0.0) -> Estimate:
    """Mean with an interval that is longer on the side of the long tail.

    A few surprised samples make up much of a mean negative log-likelihood; the interval covers as a studentized
    bootstrap's does (docs/calibration_reports.md), without draws. `fitting_error` is a standard error that the scores
    have in common, from numbers that were fitted on other samples.

    References:
        Hall (1992), doi:10.1111/j.2517-6161.1992.tb01872.x (removal of skewness by transformation).
    """
    mean = values.mean().item()
    moments = _moments(values, units, fitting_error)
    if moments is None:
        return _single(mean, units, "mean")
    error, skewness = moments
    low, high = (mean - error * inverse_hall_transform(x, skewness) for x in (units.quantile, -units.quantile))
    name = f"mean, interval corrected for skewness{units.words}"
    return Estimate(mean, min(low, mean), max(high, mean), error, units.n, name)


def skewed_p_value(values: Float[Tensor, " n"], units: Units, *, fitting_error: float = 0.0) -> float | None:
    """Two-sided p-value of a mean of zero, by the same transformation; None with a single unit."""
    mean, moments = values.mean().item(), _moments(values, units, fitting_error)
    if mean == 0:
        return 1.0
    if moments is None:
        return None
    error, skewness = moments
    return two_sided_p_value(hall_transform(mean / error, skewness), 1.0, units.freedom) if error > 0 else 0.0


def _moments(values: Float[Tensor, " n"], units: Units, fitting_error: float) -> tuple[float, float] | None:
    """Standard error and standardized skewness of a mean; the part from fitting has no skewness."""
    error = units.standard_error(values)
    if error is None:
        return None
    skewness = standardized_skewness(units.residuals(values))
    whole = hypot(error, fitting_error)
    return whole, skewness * (error / whole) ** 3 if fitting_error else skewness


def adjust_by_holm(p_values: list[float | None]) -> list[float | None]:
    """Step-down adjusted p-values; None stays None and counts as no test.

    References:
        Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = running
    return adjusted


def judge_difference(difference: float, p_value: float | None, *, level: float) -> Verdict:
    """Return "better" below 0 and "worse" above it, where the p-value is below the level."""
    if p_value is None or p_value >= level:
        return "no detectable difference"
    return "better" if difference < 0 else "worse"
