r"""Means of skewed scores: an interval that does not pretend that both tails are alike.

A few surprised samples make up much of a mean negative log-likelihood. The standardised mean then leans to one side by
$a = \sum_i r_i^3 / (\sum_i r_i^2)^{3/2}$, $r_i$ being the residuals, and Hall's transformation
$t + \frac a3 t^2 + \frac{a^2}{27} t^3 + \frac a6$ takes that lean off. It covers as a studentized bootstrap does
(docs/calibration_reports.md), without draws and with p-values as small as the data make them.
"""

from math import copysign, hypot

from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    estimate_mean,
    student_quantile,
    sum_per_cluster,
)

_SYMMETRIC = 1e-9  # a lean below this changes no digit


def lean_of(residuals: Float[Tensor, " units"]) -> float:
    """Skewness of the residuals over the root of their number; 0 without any spread."""
    scale = residuals.abs().max().item() if residuals.numel() else 0.0
    if scale == 0:
        return 0.0
    r = residuals / scale  # their cubes may underflow
    return r.pow(3).sum().item() / r.square().sum().item() ** 1.5


def straighten(t: float, lean: float) -> float:
    """Hall's transformation of a standardised mean: nearly normal, and rising in t."""
    return t + lean / 3 * t**2 + lean**2 / 27 * t**3 + lean / 6


def bend(x: float, lean: float) -> float:
    """The standardised mean whose `straighten` is x."""
    if abs(lean) < _SYMMETRIC:
        return x
    cube = 1 + lean * (x - lean / 6)
    return 3 / lean * (copysign(abs(cube) ** (1 / 3), cube) - 1)


def estimate_skewed_mean(
    per_sample: Float[Tensor, " n"],
    *,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None = None,
    fitting_error: float = 0.0,
) -> Estimate:
    """Mean over samples with an interval that is longer on the side of the long tail.

    Args:
        per_sample: one finite score per test sample.
        confidence_level: coverage of the interval, between 0 and 1.
        clusters: as for `estimate_mean`; the skewness is then that of cluster sums.
        fitting_error: standard error that the scores have in common, from numbers that were fitted on other samples.

    References:
        Hall (1992), doi:10.1111/j.2517-6161.1992.tb01872.x (removal of skewness by transformation).
    """
    mean = estimate_mean(per_sample, confidence_level=confidence_level, clusters=clusters)
    if mean.standard_error is None:
        return mean
    residuals = _residuals(per_sample, mean.known, clusters)
    quantile = student_quantile(confidence_level, None if clusters is None else residuals.numel() - 1)
    error, lean = _add(mean.standard_error, lean_of(residuals), fitting_error)
    low, high = (mean.known - error * bend(x, lean) for x in (quantile, -quantile))
    over = "" if clusters is None else f" over {residuals.numel()} clusters"
    words = f"mean, interval corrected for skewness{over}"
    return Estimate(mean.known, min(low, mean.known), max(high, mean.known), error, mean.n, words)


def skewed_p_value(
    per_sample: Float[Tensor, " n"],
    *,
    clusters: Int[Tensor, " n"] | None = None,
    fitting_error: float = 0.0,
) -> float | None:
    """Two-sided p-value of a mean of zero, by the same transformation.

    Args:
        per_sample: what was averaged.
        clusters: as in that estimate.
        fitting_error: as in that estimate.

    Returns:
        None where the mean has no standard error.
    """
    mean = estimate_mean(per_sample, confidence_level=0.5, clusters=clusters)
    if mean.known == 0:
        return 1.0
    if mean.standard_error is None:
        return None
    residuals = _residuals(per_sample, mean.known, clusters)
    error, lean = _add(mean.standard_error, lean_of(residuals), fitting_error)
    if error == 0:
        return 0.0
    x = straighten(mean.known / error, lean)
    return two_sided_p_value(x, None if clusters is None else residuals.numel() - 1)


def two_sided_p_value(statistic: float, degrees_of_freedom: int | None) -> float:
    """Of a standard normal statistic, or of Student's where there are degrees of freedom."""
    from scipy.special import ndtr, stdtr

    size = -abs(statistic)
    return min(1.0, 2 * float(ndtr(size) if degrees_of_freedom is None else stdtr(degrees_of_freedom, size)))


def _add(standard_error: float, lean: float, fitting_error: float) -> tuple[float, float]:
    """The whole standard error, and the lean of a sum whose other part has none."""
    if fitting_error == 0:
        return standard_error, lean
    whole = hypot(standard_error, fitting_error)
    return whole, lean * (standard_error / whole) ** 3


def _residuals(
    per_sample: Float[Tensor, " n"], mean: float, clusters: Int[Tensor, " n"] | None
) -> Float[Tensor, " units"]:
    return sum_per_cluster(per_sample - mean, None if clusters is None else clusters.to(per_sample.device))
