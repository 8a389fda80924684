"""Where the loss comes from: what one number would repair, and what it would not."""

from math import exp

from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import Estimate, count_units, student_quantile, without_interval
from debiased_laplace.calibration.scaling.temperature import TemperatureFit
from debiased_laplace.calibration.skewness import estimate_skewed_mean

# Of a loss that is quadratic around its best number, with five folds: the scaled loss exceeds the best by
# -G^2 / 2 + 9 S / 32 costs of a fit on all samples, times two, with G^2 and S chi-squared of one and four degrees of
# freedom. The deviation of that is 2.1 costs, of which the spread of the samples' differences does not know.
ERROR_PER_COST = 2.1


def split_loss(
    loss: Float[Tensor, " n"],
    scaled_loss: Float[Tensor, " n"],
    *,
    confidence_level: float,
    clusters: Int[Tensor, " n"] | None = None,
    fitting_error: float = 0.0,
) -> dict[str, Estimate]:
    """Calibration and refinement loss.

    Args:
        loss: negative log-likelihood of every sample.
        scaled_loss: the same after cross-fitted scaling.
        confidence_level: of the intervals.
        clusters: number of each sample's cluster; None where all are independent.
        fitting_error: standard error of the scaled loss from the fits.

    References:
        Berta, Holzmüller, Jordan, Bach (2025), arXiv 2501.19195.
    """
    parts = {"nll_calibration_loss": loss - scaled_loss, "nll_refinement_loss": scaled_loss}
    return {
        name: estimate_skewed_mean(
            part, confidence_level=confidence_level, clusters=clusters, fitting_error=fitting_error
        )
        for name, part in parts.items()
    }


def estimate_temperature(
    fit: TemperatureFit, *, confidence_level: float, clusters: Int[Tensor, " n"] | None = None
) -> Estimate:
    """The fitted temperature with its interval.

    Args:
        fit: of all samples.
        confidence_level: coverage of the interval.
        clusters: number of each sample's cluster; None where all are independent.
    """
    if fit.at_bound is not None:
        why = "nearly all labels are the most probable class" if fit.at_bound == "lowest" else "the logits tell nothing"
        return without_interval(
            fit.temperature,
            fit.n,
            estimator=f"maximum likelihood, at its {fit.at_bound} bound",
            reason=f"{why}, so that the likelihood has no maximum between the bounds",
        )
    if fit.standard_error is None:
        return without_interval(
            fit.temperature, fit.n, estimator="maximum likelihood", reason="too few independent samples"
        )
    level = confidence_level
    quantile = student_quantile(level, None if clusters is None else count_units(fit.n, clusters) - 1)
    # a temperature is positive and scales: its logarithm is closer to normal
    factor = exp(quantile * fit.standard_error / fit.temperature)
    return Estimate(
        fit.temperature,
        fit.temperature / factor,
        fit.temperature * factor,
        fit.standard_error,
        fit.n,
        "maximum likelihood, robust standard error",
    )
