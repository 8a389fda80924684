"""An estimate with its interval, and the three estimators that most metrics need."""

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor


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


def estimate_mean(per_sample: Float[Tensor, " n"], *, confidence_level: float) -> Estimate:
    """Mean over independent samples with the normal interval of its standard error.

    Args:
        per_sample: one finite score per test sample.
        confidence_level: coverage of the interval, between 0 and 1.
    """
    n = per_sample.numel()
    mean = per_sample.mean().item()
    if n < 2:
        return without_interval(mean, n, estimator="mean", reason="one sample has no standard error")
    standard_error = per_sample.std().item() / sqrt(n)
    half_width = normal_quantile(confidence_level) * standard_error
    return Estimate(mean, mean - half_width, mean + half_width, standard_error, n, "mean, normal interval")


def estimate_root_mean(squares: Float[Tensor, " n"], *, confidence_level: float) -> Estimate:
    """Square root of a mean of squares; the interval is the root of the mean's normal interval.

    Args:
        squares: one finite, nonnegative score per test sample.
        confidence_level: coverage of the interval, between 0 and 1.
    """
    mean = estimate_mean(squares, confidence_level=confidence_level)
    root = sqrt(mean.known)
    if mean.low is None or mean.high is None or mean.standard_error is None:
        return without_interval(root, mean.n, estimator="root mean", reason=mean.reason or "no interval")
    return Estimate(
        root,
        sqrt(max(mean.low, 0.0)),
        sqrt(mean.high),
        mean.standard_error / (2 * root) if root > 0 else 0.0,  # delta method
        mean.n,
        "root of a mean, root of its normal interval",
    )


def wilson_interval(share: float, n: int, *, confidence_level: float) -> tuple[float, float]:
    """Score interval of a proportion; it neither collapses nor leaves [0, 1] at shares 0 and 1.

    Args:
        share: observed proportion. For a mean of several dependent indicators per sample it is
            conservative, since a variable in [0, 1] with mean p has variance p (1 - p) at most.
        n: number of independent samples, at least 1.
        confidence_level: coverage, between 0 and 1.

    References:
        Wilson (1927), doi:10.1080/01621459.1927.10502953.
    """
    z = normal_quantile(confidence_level)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, centre - half_width)), min(1.0, max(share, centre + half_width))


def estimate_share(indicators: Float[Tensor, " n"], *, confidence_level: float) -> Estimate:
    """Proportion with its Wilson interval.

    Args:
        indicators: 0 or 1 per sample, or the mean of several indicators of that sample.
        confidence_level: coverage of the interval, between 0 and 1.
    """
    n = indicators.numel()
    share = min(1.0, max(0.0, indicators.mean().item()))
    low, high = wilson_interval(share, n, confidence_level=confidence_level)
    standard_error = sqrt(share * (1 - share) / n)
    return Estimate(share, low, high, standard_error, n, "proportion, Wilson interval")
