r"""From regression predictions of one method to its metrics, curves and per-sample scores.

Several outputs are averaged within each sample. The expected normalised calibration error compares, in bins of the
predicted standard deviation, the root of the mean variance with the root of the mean squared error. Like all binned
errors it is above zero even for a perfect predictive, so what it would then be is simulated: targets are drawn from the
method's own predictive, and the same bins are filled with their errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import (
    Units,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    estimate_skewed_mean,
    normal_quantile,
    wilson_by_cell,
    without_interval,
)
from debiased_laplace.calibration.metrics.selective import estimate_area, rank_losses, trace_risk
from debiased_laplace.calibration.regression import RegressionPredictions

INTERVAL_LEVEL = 0.9  # of `picp` and `mpiw`
SPREAD_BINS = 10  # netcal's own default
SAMPLES_PER_BIN = 5  # at least, in bins of equal mass
NEARLY_CONSTANT = 1e-6  # range of the standard deviations in units of their mean
COVERAGE_LEVELS = tuple(k / 20 for k in range(1, 20))
MOST_OUTPUTS = 20  # whose spread a report keeps
CONSTANT = "constant predictive standard deviation"
_DRAWS_AT_ONCE, _MOST_DRAWN = 2_000_000, 400_000_000  # numbers, 16 MB and in all


def scores_of(predictions: RegressionPredictions) -> dict[str, Float[Tensor, " n"]]:
    """Per-sample scores by which methods are compared."""
    return {
        "nll": predictions.negative_log_density,
        "crps": predictions.ranked_probability_score.mean(dim=1),
    }


def measure_regression(predictions: RegressionPredictions, units: Units, settings: Settings) -> MethodResult:
    """Metrics, curves and risk-coverage curve of one method."""
    spread = SpreadCalibration.simulate(predictions, settings)
    low, high = predictions.interval(INTERVAL_LEVEL)
    squares, z_squares = predictions.errors.square(), predictions.z_scores.square()
    ranked = [rank_losses(e, -s) for e, s in zip(squares.T, predictions.standard_deviation.T, strict=True)]
    metrics = {
        "nll": estimate_skewed_mean(predictions.negative_log_density, units),
        "crps": estimate_skewed_mean(predictions.ranked_probability_score.mean(dim=1), units),
        "rmse": estimate_root_mean(squares.mean(dim=1), units),
        "z_scale": estimate_root_mean(z_squares.mean(dim=1), units),
        "picp": estimate_share(covered(predictions, INTERVAL_LEVEL), units),
        "mpiw": estimate_mean((high - low).mean(dim=1), units),
        "sharpness": estimate_mean(predictions.standard_deviation.mean(dim=1), units),
        **_measure_spread(predictions, spread, units),
        "pit_ks_p_value": _check_transform(predictions, units),
        "aurc": estimate_area(ranked, units, most=float("inf")),
    }
    curves = RegressionCurves(
        _tabulate_coverage(predictions, units),
        _tabulate_transform(predictions, settings),
        _tabulate_spread(predictions, spread, units),
        predictions.distribution.description,
    )
    return MethodResult(metrics, curves, selection=trace_risk(ranked, units, is_share=False))


def covered(predictions: RegressionPredictions, level: float) -> Float[Tensor, " n"]:
    """Share of a sample's outputs inside their central intervals: 0 or 1 for one output."""
    return (predictions.normal_scores.abs() <= normal_quantile(level)).to(torch.float64).mean(dim=1)


@dataclass(frozen=True, eq=False)
class SpreadBins:
    """Bin of each sample and output by its predicted standard deviation."""

    index: Int[Tensor, "n d"]
    n_bins: int

    @classmethod
    def of_equal_width(cls, std: Float[Tensor, "n d"]) -> "SpreadBins":
        """Netcal's bins, between the smallest and the largest standard deviation."""
        columns = []
        for column in std.T.contiguous():
            edges = np.linspace(column.min().item(), column.max().item(), SPREAD_BINS + 1)
            columns.append(torch.bucketize(column, torch.from_numpy(edges[1:-1].copy()), right=True))
        return cls(torch.stack(columns, dim=1), SPREAD_BINS)

    @classmethod
    def of_equal_mass(cls, std: Float[Tensor, "n d"]) -> "SpreadBins":
        """Bins of nearly equal counts, at least five samples each; equal standard deviations share a bin."""
        n = len(std)
        n_bins = max(1, min(SPREAD_BINS, n // SAMPLES_PER_BIN))
        columns = []
        for column in std.T.contiguous():
            ordered = column.sort().values
            # twice the middle rank of a value among its equals, from 0 on
            middle = torch.searchsorted(ordered, column) + torch.searchsorted(ordered, column, right=True) - 1
            columns.append(middle * n_bins // (2 * n))
        return cls(torch.stack(columns, dim=1), n_bins)

    @cached_property
    def counts(self) -> Int[Tensor, "d bins"]:
        """Samples per bin."""
        return torch.stack([torch.bincount(column, minlength=self.n_bins) for column in self.index.T])

    def average(self, values: Float[Tensor, "*draws n d"]) -> Float[Tensor, "*draws d bins"]:
        """Mean over each bin, NaN in empty ones."""
        d = self.index.shape[1]
        cell = (self.index + self.n_bins * torch.arange(d)).flatten()
        flat = values.reshape(-1, cell.numel())
        sums = flat.new_zeros(len(flat), d * self.n_bins).index_add_(1, cell, flat)
        return (sums / self.counts.flatten()).reshape(*values.shape[:-2], d, self.n_bins)


@dataclass(frozen=True, eq=False)
class SpreadCalibration:
    """Errors against predicted spread, and what they would be if the predictive were right.

    Attributes:
        varying: outputs whose standard deviation varies; binned errors of the others say nothing.
        simulated: normalised error in bins of equal width, averaged over these outputs, of simulated targets.
        bins: of equal mass.
        low: lower quantile of the simulated root mean squared error in each of these bins.
        high: upper quantile.
    """

    varying: Int[Tensor, " varying"]
    simulated: Float[Tensor, " draws"]
    bins: SpreadBins
    low: Float[Tensor, "d bins"]
    high: Float[Tensor, "d bins"]

    @classmethod
    def simulate(cls, predictions: RegressionPredictions, settings: Settings) -> "SpreadCalibration":
        """Draw test sets from the predictive: `n_resamples`, fewer where they would be 400 million numbers.

        References:
            Bröcker and Smith (2007), doi:10.1175/WAF993.1 (consistency resampling).
        """
        std = predictions.standard_deviation
        is_constant = std.amax(dim=0) - std.amin(dim=0) < NEARLY_CONSTANT * std.mean(dim=0)
        varying = (~is_constant).nonzero()[:, 0]
        mass, errors, in_mass = SpreadBins.of_equal_mass(std), [], []
        width = SpreadBins.of_equal_width(std[:, varying]) if len(varying) else None
        for squares in _simulate_squares(predictions, settings):
            in_mass.append(mass.average(squares))
            if width is not None:
                variance = width.average(std[:, varying].square())
                ratio = (width.average(squares[..., varying]) / variance).sqrt()
                errors.append((1 - ratio).abs().nanmean(dim=-1).mean(dim=-1))
        tail = (1 - settings.confidence_level) / 2
        tails = torch.tensor([tail, 1 - tail], dtype=std.dtype)
        low, high = torch.quantile(torch.cat(in_mass).sqrt(), tails, dim=0)
        return cls(varying, torch.cat(errors) if errors else std.new_zeros(0), mass, low, high)


def _simulate_squares(predictions: RegressionPredictions, settings: Settings) -> Iterator[Float[Tensor, "draws n d"]]:
    """Portions of squared errors of targets drawn from the predictive."""
    size = predictions.targets.numel()
    total = max(2, min(settings.n_resamples, _MOST_DRAWN // size))
    portion = max(1, min(total, _DRAWS_AT_ONCE // size))
    generator = torch.Generator().manual_seed(settings.seed)
    for start in range(0, total, portion):
        yield predictions.distribution.draw_errors(min(portion, total - start), generator).square_()


def netcal_ence(predictions: RegressionPredictions, output: int) -> float:
    """Expected normalised calibration error of one output as netcal computes it.

    netcal raises where all standard deviations are equal. Errors are given to it in units of the output's mean standard
    deviation, with mean 0: large means would cost digits.

    References:
        Levi, Gispan, Giladi, Fetaya (2022), doi:10.3390/s22155540.
    """
    from netcal.metrics.regression import ENCE  # two seconds that only a report costs

    scale = predictions.standard_deviation[:, output].mean()
    std, errors = ((x[:, [output]] / scale).numpy() for x in (predictions.standard_deviation, predictions.errors))
    return float(ENCE(bins=SPREAD_BINS).measure((np.zeros_like(std), std), errors))


def _measure_spread(predictions: RegressionPredictions, spread: SpreadCalibration, units: Units) -> dict[str, Estimate]:
    """The error over bins of the spread with noise floor and p-value, averaged over outputs with any spread."""
    n, simulated = predictions.n, spread.simulated
    words, draws = f"netcal, {SPREAD_BINS} bins of equal width", f"{len(simulated)} test sets from the predictive"
    if not len(spread.varying):
        names = {"ence": words, "ence_noise_floor": "test sets from the predictive"}
        names["ence_p_value"] = names["ence_noise_floor"]
        return {name: without_interval(None, n, estimator=text, reason=CONSTANT) for name, text in names.items()}
    observed = float(np.mean([netcal_ence(predictions, j) for j in spread.varying.tolist()]))
    p_value = (1 + int((simulated >= observed - 1e-12).sum())) / (1 + len(simulated))
    biased = "a binned error is biased upwards; compare it with its noise floor and p-value"
    floor = simulated.mean().item()
    return {
        "ence": without_interval(observed, n, estimator=words, reason=biased),
        "ence_noise_floor": without_interval(
            floor, n, estimator=f"mean over {draws}", reason=f"it follows from the predictive alone{units.caution}"
        ),
        "ence_p_value": without_interval(
            p_value, n, estimator=f"share of {draws}", reason=f"a p-value has no interval{units.caution}"
        ),
    }


def _check_transform(predictions: RegressionPredictions, units: Units) -> Estimate:
    """Test that the transform is uniform; over several outputs the least p-value, by Bonferroni."""
    from scipy.stats import kstest

    d = predictions.n_outputs
    p_values = [float(kstest(p.numpy(), "uniform").pvalue) for p in predictions.probability_transform.T.contiguous()]
    words = "SciPy, Kolmogorov-Smirnov" + ("" if d == 1 else f", least of {d} outputs times {d}")
    p_value = min(1.0, d * min(p_values))
    return without_interval(p_value, predictions.n, estimator=words, reason=f"a p-value has no interval{units.caution}")


def _tabulate_coverage(predictions: RegressionPredictions, units: Units) -> tuple[CoverageLevel, ...]:
    """Nominal against observed coverage of central intervals, averaged over outputs."""
    table, cell = [], torch.zeros(predictions.n, dtype=torch.int64)
    for nominal in COVERAGE_LEVELS:
        inside = covered(predictions, nominal)
        (interval,) = wilson_by_cell(inside, cell, 1, units)
        table.append(CoverageLevel(nominal, inside.mean().item(), *(interval or (0.0, 1.0))))
    return tuple(table)


def _tabulate_transform(predictions: RegressionPredictions, settings: Settings) -> tuple[HistogramBin, ...]:
    """Histogram of the probability transform: flat where the predictive is right.

    The usual counts are those of a binomial variable over samples; several outputs of one sample count as one
    observation, which makes the band wide rather than narrow.
    """
    n_bins = 10 if predictions.n < 1000 else 20
    transform = predictions.probability_transform.flatten()
    index = (transform * n_bins).floor().clamp(0, n_bins - 1).to(torch.int64)
    counts = torch.bincount(index, minlength=n_bins).tolist()
    expected, outputs = predictions.n / n_bins, predictions.n_outputs
    half = normal_quantile(settings.confidence_level) * (expected * (1 - 1 / n_bins)) ** 0.5
    ends = outputs * max(0.0, expected - half), outputs * (expected + half)
    return tuple(HistogramBin(b / n_bins, (b + 1) / n_bins, count, *ends) for b, count in enumerate(counts))


def _tabulate_spread(
    predictions: RegressionPredictions, spread: SpreadCalibration, units: Units
) -> tuple[SpreadBin, ...]:
    """Bins of equal mass of the first outputs, in the order of their predicted spread."""
    squares, bins = predictions.errors.square(), spread.bins
    predicted = bins.average(predictions.standard_deviation.square()).sqrt()
    table = []
    for j in range(min(predictions.n_outputs, MOST_OUTPUTS)):
        for b, n in enumerate(bins.counts[j].tolist()):
            if n == 0:
                continue
            rows = (bins.index[:, j] == b).nonzero()[:, 0]
            e = estimate_root_mean(squares[rows, j], units.take(rows))
            band = (spread.low[j, b].item(), spread.high[j, b].item())
            table.append(SpreadBin(j, n, predicted[j, b].item(), e.known, e.low, e.high, *band))
    return tuple(table)
