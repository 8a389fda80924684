"""Metrics of regression predictions: proper scores, errors, and the size of the error bars."""

from collections.abc import Sequence
from math import atanh, sqrt, tanh

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.estimates import (
    Estimate,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    normal_quantile,
    unavailable,
    without_interval,
)
from debiased_laplace.calibration.metrics.curves import covered
from debiased_laplace.calibration.metrics.netcal_regression import SPREAD_BINS
from debiased_laplace.calibration.metrics.regression_definitions import name_level
from debiased_laplace.calibration.metrics.spread import SpreadCalibration
from debiased_laplace.calibration.predictions.regression import RegressionPredictions
from debiased_laplace.calibration.skewness import estimate_skewed_mean

INTERVAL_LEVEL = 0.9  # of `picp`, `mpiw` and `interval_score`
CONSTANT = "constant predictive standard deviation"
_FEWEST_FOR_CORRELATION = 10
_BIASED = (
    "a binned error is biased upwards, and intervals around it miss the truth for a nearly right spread; compare it "
    "with its noise floor and p-value"
)
_ABSOLUTE = (
    "an error of absolute values is biased upwards; the p-value of the probability transform tells it from noise"
)
_SQUARED = "a binned error is biased upwards; the noise floor of the normalised error says by how much"


def negative_log_likelihood(predictions: RegressionPredictions) -> Float[Tensor, " n"]:
    """Minus the logarithm of the predictive density at the target, per output, in nats per sample.

    Joint over the outputs where the predictive is: from a covariance, or from samples of the function with noise.
    """
    return predictions.negative_log_density


def ranked_probability_score(predictions: RegressionPredictions) -> Float[Tensor, "n d"]:
    r"""Continuous ranked probability score, $E|X - y| - \frac12 E|X - X'|$, in the unit of the targets.

    Closed forms for Gaussians and mixtures of them; for bare samples the fair form, whose mean does not depend on how
    many there are.

    References:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437, section 4.2;
        Grimit, Gneiting, Berrocal, Johnson (2006), doi:10.1256/qj.05.235 (mixtures);
        Ferro (2014), doi:10.1002/qj.2270 (fair scores).
    """
    return predictions.ranked_probability_score


def interval_score(predictions: RegressionPredictions, level: float) -> Float[Tensor, "n d"]:
    r"""Width of the central interval plus $\frac{2}{\alpha}$ times the distance of a target outside of it.

    References:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437, equation 43.
    """
    low, high = predictions.interval(level)
    y, alpha = predictions.targets, 1 - level
    return high - low + 2 / alpha * ((low - y).clamp_min(0) + (y - high).clamp_min(0))


def measure_regression(
    predictions: RegressionPredictions,
    spread: SpreadCalibration,
    *,
    levels: Sequence[float],
    confidence_level: float,
) -> dict[str, Estimate]:
    """Every metric of one method; several outputs are averaged within each sample.

    Args:
        predictions: predictive distributions and targets.
        spread: the errors against their predicted spread.
        levels: of central intervals, between 0 and 1.
        confidence_level: of all intervals around the metrics.
    """

    def mean(values: Float[Tensor, "n d"]) -> Estimate:
        return estimate_mean(values.mean(dim=1), confidence_level=confidence_level)

    def root_mean(values: Float[Tensor, "n d"]) -> Estimate:
        return estimate_root_mean(values.mean(dim=1), confidence_level=confidence_level)

    metrics = {
        "nll": estimate_skewed_mean(negative_log_likelihood(predictions), confidence_level=confidence_level),
        "crps": estimate_skewed_mean(
            ranked_probability_score(predictions).mean(dim=1), confidence_level=confidence_level
        ),
        "rmse": root_mean(predictions.errors.square()),
        "z_scale": root_mean(predictions.z_scores.square()),
        "sharpness": mean(predictions.standard_deviation),
        "mae": mean(predictions.errors.abs()),
        "interval_score": mean(interval_score(predictions, INTERVAL_LEVEL)),
    }
    for level in sorted({INTERVAL_LEVEL, *levels}):
        low, high = predictions.interval(level)
        metrics[name_level("picp", level)] = estimate_share(
            covered(predictions, level), confidence_level=confidence_level
        )
        metrics[name_level("mpiw", level)] = mean(high - low)
    metrics |= _measure_binned(predictions.n, spread)
    metrics["pit_ks_p_value"] = check_probability_transform(predictions)
    metrics["error_spread_correlation"] = correlate_error_and_spread(
        predictions, spread, confidence_level=confidence_level
    )
    if predictions.noise is not None:
        variance = predictions.standard_deviation.square() - predictions.noise.square()
        metrics["std_epistemic"] = mean(variance.clamp_min(0).sqrt())
        metrics["std_noise"] = mean(predictions.noise)
    return metrics


def check_probability_transform(predictions: RegressionPredictions) -> Estimate:
    """Kolmogorov and Smirnov's test of a uniform transform; over several outputs the least p-value, by Bonferroni."""
    from scipy.stats import kstest

    d = predictions.n_outputs
    p_values = [float(kstest(p.numpy(), "uniform").pvalue) for p in predictions.probability_transform.T.contiguous()]
    over = "" if d == 1 else f", least of {d} outputs times {d}"
    return without_interval(
        min(1.0, d * min(p_values)),
        predictions.n,
        estimator=f"SciPy, Kolmogorov-Smirnov{over}",
        reason="a p-value has no interval",
    )


def correlate_error_and_spread(
    predictions: RegressionPredictions, spread: SpreadCalibration, *, confidence_level: float
) -> Estimate:
    r"""Rank correlation of the absolute error with the predicted standard deviation, averaged over outputs.

    The interval is normal on Fisher's scale, $\operatorname{artanh} r$, with the standard error from the influence of
    each sample on the ranks, so that it holds for any dependence of error and spread.

    References:
        Croux and Dehon (2010), doi:10.1007/s10260-010-0142-z (influence function).
    """
    from scipy.stats import spearmanr

    n, estimator = predictions.n, "SciPy, Spearman"
    errors, deviations = predictions.errors.abs().numpy(), predictions.standard_deviation.numpy()
    usable = [
        j for j in range(predictions.n_outputs) if not spread.is_constant[j] and errors[:, j].min() < errors[:, j].max()
    ]
    if not usable:
        why = CONSTANT if bool(spread.is_constant.all()) else "constant errors"
        return unavailable(n, estimator=estimator, reason=why)
    r = sum(float(spearmanr(errors[:, j], deviations[:, j]).statistic) for j in usable) / len(usable)
    if predictions.n_outputs > 1:
        return without_interval(
            r, n, estimator=f"{estimator}, mean over {len(usable)} outputs", reason="the outputs depend on each other"
        )
    if n < _FEWEST_FOR_CORRELATION or abs(r) > 1 - 1e-12:
        return without_interval(r, n, estimator=estimator, reason="too few samples for its normal approximation")
    influence = _influence_on_ranks(torch.from_numpy(errors[:, 0]), torch.from_numpy(deviations[:, 0]))
    standard_error = influence.std().item() / sqrt(n - 3)
    half_width = normal_quantile(confidence_level) * standard_error / (1 - r**2)
    low, high = (tanh(atanh(r) + side * half_width) for side in (-1, 1))
    return Estimate(r, low, high, standard_error, n, f"{estimator}, normal interval of artanh")


def _influence_on_ranks(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    r"""$12 [u v + E\, 1(x \le X) V + E\, 1(y \le Y) U]$ up to a constant, with $u, v$ the relative ranks."""
    n = len(x)
    u, v = ((values.argsort().argsort() + 0.5) / n for values in (x, y))
    total = u * v
    for ranks, other in ((u, v), (v, u)):
        order = ranks.argsort(descending=True)
        total[order] += other[order].cumsum(dim=0) / n
    return 12 * total


def _measure_binned(n: int, spread: SpreadCalibration) -> dict[str, Estimate]:
    """The errors over bins of the spread with their noise floors, averaged over outputs that have any spread."""
    width, mass = f"netcal, {SPREAD_BINS} bins of equal width", f"{spread.bins.n_bins} bins of equal mass"
    draws = f"{len(spread.simulated)} test sets from the predictive"
    uses = ~spread.is_constant
    netcal = spread.netcal
    metrics = {
        "m_qce": without_interval(
            netcal.m_qce.mean().item(), n, estimator="netcal, levels 5 % to 95 %", reason=_ABSOLUTE
        )
    }
    binned: dict[str, tuple[Tensor, str, str]] = {
        "c_qce": (netcal.c_qce, f"{width}, levels 5 % to 95 %", _SQUARED),
        "ence": (netcal.ence, width, _BIASED),
        "ence_equal_mass": (spread.equal_mass, mass, _BIASED),
        "uce": (netcal.uce, width, _SQUARED),
    }
    for name, (values, estimator, reason) in binned.items():
        if not bool(uses.any()):
            metrics[name] = unavailable(n, estimator=estimator, reason=CONSTANT)
        else:
            metrics[name] = without_interval(values[uses].mean().item(), n, estimator=estimator, reason=reason)
    for name, simulated in (("ence", spread.simulated), ("ence_equal_mass", spread.simulated_equal_mass)):
        observed = metrics[name].value
        if observed is None:
            for key in (f"{name}_noise_floor", f"{name}_p_value"):
                metrics[key] = unavailable(n, estimator=draws, reason=CONSTANT)
            continue
        errors = simulated[:, uses].mean(dim=1)
        p = (1 + int((errors >= observed - 1e-12).sum())) / (1 + len(errors))
        metrics[f"{name}_noise_floor"] = without_interval(
            errors.mean().item(), n, estimator=f"mean over {draws}", reason="it follows from the predictive alone"
        )
        metrics[f"{name}_p_value"] = without_interval(
            p, n, estimator=f"share of {draws}", reason="a p-value has no interval"
        )
    return metrics
