r"""Metrics, curves and per-sample scores of the regression predictions of one method.

Several outputs are averaged within each sample. The expected normalised calibration error compares, in bins of the
predicted standard deviation, the root of the mean variance with the root of the mean squared error. Like all binned
errors it is above zero even for a perfect predictive: its noise floor is the error of simulated targets, drawn from the
method's own predictive.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import (
    CoverageLevel,
    Estimate,
    HistogramBin,
    MethodResult,
    RegressionCurves,
    SpreadBin,
)
from debiased_laplace.calibration.counts import CountPredictions
from debiased_laplace.calibration.distributions import RegressionPredictions
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import (
    BIASED,
    Units,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    estimate_skewed_mean,
    normal_quantile,
    wilson_of_share,
    without_interval,
)
from debiased_laplace.calibration.metrics.selective import estimate_area, rank_losses, trace_risk

INTERVAL_LEVEL = 0.9  # of `picp` and `mpiw`
SPREAD_BINS = 10  # netcal's own default
SAMPLES_PER_BIN = 5  # at least, in bins of equal mass
NEARLY_CONSTANT = 1e-6  # range of the standard deviations in units of their mean
COVERAGE_LEVELS = tuple(k / 20 for k in range(1, 20))
MOST_OUTPUTS = 20  # whose spread a report keeps
CONSTANT = "constant predictive standard deviation"
_DRAWS_AT_ONCE, _MOST_DRAWN = 2_000_000, 400_000_000  # numbers, 16 MB and in all


def scores_of(predictions: RegressionPredictions) -> dict[str, Float[Tensor, " n"]]:
    """Return the per-sample scores of paired comparisons."""
    return {"nll": predictions.negative_log_density, "crps": predictions.ranked_probability_score.mean(dim=1)}


def measure_regression(predictions: RegressionPredictions, units: Units, settings: Settings) -> MethodResult:
    """Estimate the metrics, curves and risk-coverage curve of one method."""
    bins = bin_by_mass(predictions.standard_deviation)
    simulated, band = simulate_spread(predictions, bins, settings)
    low, high = predictions.interval(INTERVAL_LEVEL)
    squares, z_squares = predictions.errors.square(), predictions.z_scores.square()
    ranked = [rank_losses(e, -s) for e, s in zip(squares.T, predictions.standard_deviation.T, strict=True)]
    metrics = {
        **{name: estimate_skewed_mean(score, units) for name, score in scores_of(predictions).items()},
        "rmse": estimate_root_mean(squares.mean(dim=1), units),
        "z_scale": estimate_root_mean(z_squares.mean(dim=1), units),
        "picp": estimate_share(covered(predictions, INTERVAL_LEVEL), units),
        "mpiw": estimate_mean((high - low).mean(dim=1), units),
        "sharpness": estimate_mean(predictions.standard_deviation.mean(dim=1), units),
        **_measure_parts(predictions, units),
        **_measure_spread(predictions, simulated, units),
        "pit_ks_p_value": _check_transform(predictions, units),
        "aurc": estimate_area(ranked, units, most=float("inf")),
    }
    if isinstance(predictions, CountPredictions):
        metrics["deviance"] = estimate_skewed_mean(predictions.deviance, units)
    curves = RegressionCurves(
        _tabulate_coverage(predictions, units),
        _tabulate_transform(predictions, settings),
        _tabulate_spread(predictions, bins, band, units),
        predictions.description,
    )
    return MethodResult(metrics, curves, selection=trace_risk(ranked, units, is_share=False))


def covered(predictions: RegressionPredictions, level: float) -> Float[Tensor, " n"]:
    """Return the share of a sample's outputs inside their central intervals: 0 or 1 for one output."""
    return (predictions.normal_scores.abs() <= normal_quantile(level)).to(torch.float64).mean(dim=1)


def bin_by_width(std: Float[Tensor, "n d"]) -> Int[Tensor, "n d"]:
    """Assign netcal's bins, of equal width between the smallest and the largest standard deviation of each output."""
    edges = torch.from_numpy(np.linspace(std.amin(dim=0).numpy(), std.amax(dim=0).numpy(), SPREAD_BINS + 1))
    return torch.stack([std >= edge for edge in edges[1:-1]]).sum(dim=0)


def bin_by_mass(std: Float[Tensor, "n d"]) -> Int[Tensor, "n d"]:
    """Assign bins of nearly equal counts, at least five samples each; equal standard deviations share a bin."""
    from scipy.stats import rankdata

    n_bins = max(1, min(SPREAD_BINS, len(std) // SAMPLES_PER_BIN))
    middle = torch.from_numpy(2 * rankdata(std.numpy(), axis=0) - 2).to(torch.int64)  # twice the rank, from 0 on
    return middle * n_bins // (2 * len(std))


def average_by_bin(values: Float[Tensor, "*draws n d"], bins: Int[Tensor, "n d"]) -> Float[Tensor, "*draws d bins"]:
    """Return the mean of each output over each bin, NaN in empty ones."""
    d = bins.shape[1]
    cell = (bins + SPREAD_BINS * torch.arange(d)).flatten()
    flat = values.reshape(-1, cell.numel())
    sums = flat.new_zeros(len(flat), d * SPREAD_BINS).index_add_(1, cell, flat)
    return (sums / torch.bincount(cell, minlength=d * SPREAD_BINS)).reshape(*values.shape[:-2], d, SPREAD_BINS)


def simulate_spread(
    predictions: RegressionPredictions, bins: Int[Tensor, "n d"], settings: Settings
) -> tuple[Float[Tensor, "draws d"], Float[Tensor, "2 d bins"]]:
    """Simulate test sets from the predictive: `n_resamples`, fewer where they would be 400 million numbers.

    Returns:
        The normalised error of every output in bins of equal width, and quantiles of the root mean squared error in the
        given bins.

    References:
        Bröcker and Smith (2007), doi:10.1175/WAF993.1 (consistency resampling).
    """
    by_width = bin_by_width(predictions.standard_deviation)
    variance = average_by_bin(predictions.standard_deviation.square(), by_width)
    size, errors, in_bins = predictions.targets.numel(), [], []
    n_draws = max(2, min(settings.n_resamples, _MOST_DRAWN // size))
    portion = max(1, min(n_draws, _DRAWS_AT_ONCE // size))
    generator = torch.Generator().manual_seed(settings.seed)
    for start in range(0, n_draws, portion):
        squares = predictions.draw_errors(min(portion, n_draws - start), generator).square_()
        in_bins.append(average_by_bin(squares, bins))
        errors.append((1 - (average_by_bin(squares, by_width) / variance).sqrt()).abs().nanmean(dim=-1))
    tail = (1 - settings.confidence_level) / 2
    tails = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return torch.cat(errors), torch.quantile(torch.cat(in_bins).sqrt(), tails, dim=0)


def netcal_ence(predictions: RegressionPredictions, output: int) -> float:
    """Return netcal's expected normalised calibration error of one output, whose standard deviation must vary.

    References:
        Levi, Gispan, Giladi, Fetaya (2022), doi:10.3390/s22155540.
    """
    from netcal.metrics.regression import ENCE  # two seconds that only a report costs

    # in units of the mean standard deviation, and around a mean of 0: large means would cost digits
    scale = predictions.standard_deviation[:, output].mean()
    std, errors = ((x[:, [output]] / scale).numpy() for x in (predictions.standard_deviation, predictions.errors))
    return float(ENCE(bins=SPREAD_BINS).measure((np.zeros_like(std), std), errors))


def _measure_parts(predictions: RegressionPredictions, units: Units) -> dict[str, Estimate]:
    """Estimate the mean standard deviations of function and noise, where a prediction tells them apart."""
    parts = dict(zip(("function_std", "noise_std"), predictions.parts or (), strict=False))
    return {name: estimate_mean(deviation.mean(dim=1), units) for name, deviation in parts.items()}


def _measure_spread(
    predictions: RegressionPredictions, simulated: Float[Tensor, "draws d"], units: Units
) -> dict[str, Estimate]:
    """Estimate the binned error with noise floor and p-value, averaged over outputs whose spread varies."""
    std = predictions.standard_deviation
    varying = std.amax(dim=0) - std.amin(dim=0) >= NEARLY_CONSTANT * std.mean(dim=0)
    outputs, draws = varying.nonzero()[:, 0].tolist(), f"{len(simulated)} test sets from the predictive"
    words = {"ence": f"netcal, {SPREAD_BINS} bins of equal width"}
    words |= {"ence_noise_floor": f"mean over {draws}", "ence_p_value": f"share of {draws}"}
    if not outputs:
        return {name: without_interval(None, units.n, text, CONSTANT) for name, text in words.items()}
    mean = simulated[:, outputs].mean(dim=1)
    observed = float(np.mean([netcal_ence(predictions, j) for j in outputs]))
    p_value = (1 + int((mean >= observed - 1e-12).sum())) / (1 + len(mean))
    found = {
        "ence": (observed, BIASED),
        "ence_noise_floor": (mean.mean().item(), f"it follows from the predictive alone{units.caution}"),
        "ence_p_value": (p_value, f"a p-value has no interval{units.caution}"),
    }
    return {name: without_interval(value, units.n, words[name], reason) for name, (value, reason) in found.items()}


def _check_transform(predictions: RegressionPredictions, units: Units) -> Estimate:
    """Test that the transform is uniform; over several outputs the least p-value, by Bonferroni."""
    from scipy.stats import kstest

    d = predictions.n_outputs
    p_values = [float(kstest(p.numpy(), "uniform").pvalue) for p in predictions.probability_transform.T.contiguous()]
    words = "SciPy, Kolmogorov-Smirnov" + ("" if d == 1 else f", least of {d} outputs times {d}")
    p_value = min(1.0, d * min(p_values))
    return without_interval(p_value, units.n, words, f"a p-value has no interval{units.caution}")


def _tabulate_coverage(predictions: RegressionPredictions, units: Units) -> tuple[CoverageLevel, ...]:
    """Return nominal against observed coverage of central intervals, averaged over outputs."""
    inside = {nominal: covered(predictions, nominal) for nominal in COVERAGE_LEVELS}
    return tuple(CoverageLevel(q, x.mean().item(), *wilson_of_share(x, units)) for q, x in inside.items())


def _tabulate_transform(predictions: RegressionPredictions, settings: Settings) -> tuple[HistogramBin, ...]:
    """Return the histogram of the probability transform, with binomial intervals of its counts if it is uniform.

    Several outputs of one sample count as one observation, which makes the intervals conservative.
    """
    n_bins = 10 if predictions.n < 1000 else 20
    expected, outputs = predictions.n / n_bins, predictions.n_outputs
    half = normal_quantile(settings.confidence_level) * (expected * (1 - 1 / n_bins)) ** 0.5
    ends = outputs * max(0.0, expected - half), outputs * (expected + half)
    counts = np.histogram(predictions.probability_transform.numpy(), n_bins, (0, 1))[0].tolist()
    return tuple(HistogramBin(b / n_bins, (b + 1) / n_bins, count, *ends) for b, count in enumerate(counts))


def _tabulate_spread(
    predictions: RegressionPredictions, bins: Int[Tensor, "n d"], band: Float[Tensor, "2 d bins"], units: Units
) -> tuple[SpreadBin, ...]:
    """Return the bins of the first outputs, in the order of their predicted spread."""
    squares, predicted = predictions.errors.square(), average_by_bin(predictions.standard_deviation.square(), bins)
    table = []
    for j in range(min(predictions.n_outputs, MOST_OUTPUTS)):
        for b in bins[:, j].unique().tolist():
            rows = (bins[:, j] == b).nonzero()[:, 0]
            e = estimate_root_mean(squares[rows, j], units.take(rows))
            ends = (e.low, e.high, *band[:, j, b].tolist())
            table.append(SpreadBin(j, len(rows), predicted[j, b].sqrt().item(), e.known, *ends))
    return tuple(table)
