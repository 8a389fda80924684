"""An estimate with its interval, and the three estimators that most metrics need.

Samples of one *cluster* (pixels of an image, visits of a patient) may depend on each other in any way; clusters are
independent. Where clusters are given, an interval speaks of drawing other clusters, not other samples.
"""

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import TypeVar

from jaxtyping import Float, Int
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Estimate:
    """A number from a finite test set, and how far it can be trusted.

    Attributes:
        value: the estimate, in the unit of its metric; None where these predictions allow none.
        low: lower end of the interval, None where no interval with honest coverage exists.
        high: upper end, None together with `low`.
        standard_error: standard deviation of the estimate over test sets, None where unknown.
        n: number of test samples it rests on.
        estimator: how value and interval were obtained, in words.
        reason: why there is no interval, or no value; None where there are both.

    Raises:
        ValueError: if a number is not finite, if there is both an interval and a reason for none, or an interval
            around nothing.
    """

    value: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    estimator: str
    reason: str | None = None

    def __post_init__(self) -> None:
        numbers = [self.value, self.low, self.high, self.standard_error]
        if any(x is not None and not abs(x) < float("inf") for x in numbers):
            raise ValueError(f"An estimate must be finite; got {self}.")
        if (self.low is None) != (self.high is None) or (self.low is None) == (self.reason is None):
            raise ValueError(f"An estimate has an interval or a reason to have none; got {self}.")
        if self.value is None and (self.low is not None or self.standard_error is not None):
            raise ValueError(f"An estimate without a value has no interval either; got {self}.")

    @property
    def known(self) -> float:
        """The value, where there must be one.

        Raises:
            ValueError: if there is none.
        """
        if self.value is None:
            raise ValueError(f"There is no value: {self.reason}.")
        return self.value


def normal_quantile(confidence_level: float) -> float:
    """Half-width, in standard errors, of the central normal interval at `confidence_level`."""
    return NormalDist().inv_cdf(0.5 + confidence_level / 2)


def without_interval(value: float, n: int, *, estimator: str, reason: str) -> Estimate:
    """An estimate that has no interval, and says why."""
    return Estimate(value, None, None, None, n, estimator, reason)


def unavailable(n: int, *, estimator: str, reason: str) -> Estimate:
    """No estimate at all, and why."""
    return Estimate(None, None, None, None, n, estimator, reason)


def count_units(n: int, clusters: Int[Tensor, " n"] | None) -> int:
    """Number of independent units among n samples: the clusters, or the samples themselves without clusters."""
    if clusters is None:
        return n
    return int(clusters.max()) + 1 if clusters.numel() else 0


def sum_per_cluster(
    values: Float[Tensor, "n *columns"], clusters: Int[Tensor, " n"] | None
) -> Float[Tensor, "clusters *columns"]:
    """Sums of the samples of each cluster, in the order of the clusters' numbers; `values` itself without clusters.

    Every smooth statistic of means is one of these sums, and what is resampled or left out is a row of them.

    Args:
        values: one score, or several, per sample.
        clusters: number of each sample's cluster, every number from 0 to the largest in use; None where every sample
            is its own.
    """
    if clusters is None:
        return values
    return values.new_zeros(count_units(len(values), clusters), *values.shape[1:]).index_add_(0, clusters, values)


def estimate_mean(
    per_sample: Float[Tensor, " n"], *, confidence_level: float, clusters: Int[Tensor, " n"] | None = None
) -> Estimate:
    """Mean over samples with the interval of its standard error.

    Args:
        per_sample: one finite score per test sample.
        confidence_level: coverage of the interval, between 0 and 1.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent. The standard
            error is then that of a ratio of cluster sums, and the interval Student's with one degree of freedom less
            than there are clusters.

    References:
        Liang and Zeger (1986), doi:10.1093/biomet/73.1.13 (standard error of clusters).
    """
    n = per_sample.numel()
    mean = per_sample.mean().item()
    if clusters is not None:
        return _estimate_clustered_mean(per_sample, clusters, confidence_level=confidence_level)
    if n < 2:
        return without_interval(mean, n, estimator="mean", reason="one sample has no standard error")
    standard_error = per_sample.std().item() / sqrt(n)
    half_width = normal_quantile(confidence_level) * standard_error
    return Estimate(mean, mean - half_width, mean + half_width, standard_error, n, "mean, normal interval")


def estimate_root_mean(
    squares: Float[Tensor, " n"], *, confidence_level: float, clusters: Int[Tensor, " n"] | None = None
) -> Estimate:
    """Square root of a mean of squares; the interval is the root of the mean's interval.

    Args:
        squares: one finite, nonnegative score per test sample.
        confidence_level: coverage of the interval, between 0 and 1.
        clusters: as for `estimate_mean`.
    """
    mean = estimate_mean(squares, confidence_level=confidence_level, clusters=clusters)
    root = sqrt(mean.known)
    if mean.low is None or mean.high is None or mean.standard_error is None:
        return without_interval(root, mean.n, estimator="root mean", reason=mean.reason or "no interval")
    interval = "root of its normal interval" if clusters is None else "root of its cluster-robust interval"
    return Estimate(
        root,
        sqrt(max(mean.low, 0.0)),
        sqrt(mean.high),
        mean.standard_error / (2 * root) if root > 0 else 0.0,  # delta method
        mean.n,
        f"root of a mean, {interval}",
    )


def wilson_interval(share: float, n: int | float, *, confidence_level: float) -> tuple[float, float]:
    """Score interval of a proportion; it neither collapses nor leaves [0, 1] at shares 0 and 1.

    Args:
        share: observed proportion. For a mean of several dependent indicators per sample it is
            conservative, since a variable in [0, 1] with mean p has variance p (1 - p) at most.
        n: number of independent samples, or how many these are worth.
        confidence_level: coverage, between 0 and 1.

    References:
        Wilson (1927), doi:10.1080/01621459.1927.10502953.
    """
    low, high = wilson_ends(share, float(n), normal_quantile(confidence_level))
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def wilson_ends(share: Number, n: Number, z: float) -> tuple[Number, Number]:
    """Where a share lies z standard errors from what was observed; rounding may leave [0, 1].

    Args:
        share: observed proportion, or many of them.
        n: number of independent samples of each.
        z: half-width of the interval in standard errors.
    """
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return centre - half_width, centre + half_width


def estimate_share(
    indicators: Float[Tensor, " n"], *, confidence_level: float, clusters: Int[Tensor, " n"] | None = None
) -> Estimate:
    """Proportion with its Wilson interval.

    Args:
        indicators: 0 or 1 per sample, or the mean of several indicators of that sample.
        confidence_level: coverage of the interval, between 0 and 1.
        clusters: as for `estimate_mean`; the interval is then that of as many independent samples as these are worth.
    """
    n = indicators.numel()
    share = min(1.0, max(0.0, indicators.mean().item()))
    if clusters is not None:
        return _estimate_clustered_share(indicators, clusters, confidence_level=confidence_level)
    low, high = wilson_interval(share, n, confidence_level=confidence_level)
    standard_error = sqrt(share * (1 - share) / n)
    return Estimate(share, low, high, standard_error, n, "proportion, Wilson interval")


def student_quantile(confidence_level: float, degrees_of_freedom: int | None) -> float:
    """Half-width, in standard errors, of the central interval of Student's distribution; of the normal one for None."""
    if degrees_of_freedom is None:
        return normal_quantile(confidence_level)
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.5 + confidence_level / 2))


def effective_size(share: float, n: int, *, n_clusters: int, standard_error: float, confidence_level: float) -> float:
    """How many independent samples the proportion of clustered ones is worth.

    n over the design effect, at most n, and less for few clusters, whose standard error is itself uncertain. Where all
    samples agree no design effect can be seen: then each cluster counts as one sample.

    Args:
        share: the proportion.
        n: number of samples.
        n_clusters: number of clusters that hold them, at least 2.
        standard_error: of the proportion over clusters.
        confidence_level: of the interval to be made.

    References:
        Korn and Graubard (1998), Survey Methodology 24, 193-201.
    """
    worth = min(float(n), share * (1 - share) / standard_error**2) if standard_error > 0 else float(n_clusters)
    return worth * (normal_quantile(confidence_level) / student_quantile(confidence_level, n_clusters - 1)) ** 2


def _estimate_clustered_mean(
    per_sample: Float[Tensor, " n"], clusters: Int[Tensor, " n"], *, confidence_level: float
) -> Estimate:
    n, mean = per_sample.numel(), per_sample.mean().item()
    residuals = sum_per_cluster(per_sample - mean, clusters.to(per_sample.device))
    n_clusters = residuals.numel()
    if n_clusters < 2:
        return without_interval(mean, n, estimator="mean", reason="one cluster of samples has no standard error")
    standard_error = sqrt(n_clusters / (n_clusters - 1) * residuals.square().sum().item()) / n
    half_width = student_quantile(confidence_level, n_clusters - 1) * standard_error
    words = f"mean, cluster-robust interval over {n_clusters} clusters"
    return Estimate(mean, mean - half_width, mean + half_width, standard_error, n, words)


def _estimate_clustered_share(
    indicators: Float[Tensor, " n"], clusters: Int[Tensor, " n"], *, confidence_level: float
) -> Estimate:
    mean = estimate_mean(indicators, confidence_level=confidence_level, clusters=clusters)
    share, n = min(1.0, max(0.0, mean.known)), mean.n
    if mean.standard_error is None:
        return without_interval(share, n, estimator="proportion", reason=mean.reason or "no interval")
    n_clusters = count_units(n, clusters)
    size = effective_size(
        share,
        n,
        n_clusters=n_clusters,
        standard_error=mean.standard_error,
        confidence_level=confidence_level,
    )
    low, high = wilson_interval(share, size, confidence_level=confidence_level)
    words = f"proportion, Wilson interval of {size:.4g} samples, which these of {n_clusters} clusters are worth"
    return Estimate(share, low, high, mean.standard_error, n, words)
