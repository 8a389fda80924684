r"""Does the predicted spread say how large the errors are? Errors in bins of the predicted standard deviation.

The expected normalised calibration error compares, in every bin, the root of the mean variance with the root of the
mean squared error. Like all binned errors it is above zero even for a perfect predictive, so what it would then be is
simulated: targets are drawn from the method's own predictive, and the same bins are filled with their errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from debiased_laplace.calibration.metrics.netcal_regression import SPREAD_BINS, NetcalErrors, measure_with_netcal
from debiased_laplace.calibration.predictions.regression import RegressionPredictions

SAMPLES_PER_BIN = 5  # at least, in bins of equal mass
NEARLY_CONSTANT = 1e-6  # range of the standard deviations in units of their mean
_DRAWS_AT_ONCE = 2_000_000  # numbers drawn at a time: 16 MB
_MOST_DRAWN = 400_000_000  # numbers drawn in all


@dataclass(frozen=True, eq=False)
class SpreadBins:
    """Samples of every output in bins of its predicted standard deviation.

    Attributes:
        index: bin of each sample.
        n_bins: number of bins B.
    """

    index: Int[Tensor, "n d"]
    n_bins: int

    def average(self, values: Float[Tensor, "*draws n d"]) -> Float[Tensor, "*draws d bins"]:
        """Mean of `values` over each bin, NaN in empty ones."""
        d = self.index.shape[1]
        cell = (self.index + self.n_bins * torch.arange(d)).flatten()
        flat = values.reshape(-1, cell.numel())
        sums = flat.new_zeros(len(flat), d * self.n_bins).index_add_(1, cell, flat)
        return (sums / self.counts.flatten()).reshape(*values.shape[:-2], d, self.n_bins)

    @cached_property
    def counts(self) -> Int[Tensor, "d bins"]:
        """Samples per bin."""
        return torch.stack([torch.bincount(column, minlength=self.n_bins) for column in self.index.T])


@dataclass(frozen=True, eq=False)
class SpreadCalibration:
    """Errors against predicted spread, output by output, and what they would be if the predictive were right.

    Attributes:
        is_constant: outputs whose standard deviation is the same for all samples; their binned errors say nothing.
        netcal: netcal's errors, NaN for these outputs where they are binned by spread.
        equal_mass: expected normalised calibration error in bins of equal mass.
        simulated: the error in bins of equal width of simulated targets, on the same bins.
        simulated_equal_mass: the same in bins of equal mass.
        bins: of equal mass.
        root_variance: root of the mean variance in each of these.
        root_square: root of the mean squared error.
        low: lower quantile of its simulated values.
        high: upper quantile.
    """

    is_constant: Bool[Tensor, " d"]
    netcal: NetcalErrors
    equal_mass: Float[Tensor, " d"]
    simulated: Float[Tensor, "draws d"]
    simulated_equal_mass: Float[Tensor, "draws d"]
    bins: SpreadBins
    root_variance: Float[Tensor, "d bins"]
    root_square: Float[Tensor, "d bins"]
    low: Float[Tensor, "d bins"]
    high: Float[Tensor, "d bins"]

    def output(self, j: int) -> "SpreadCalibration":
        """The part of one output."""
        one = slice(j, j + 1)
        return SpreadCalibration(
            self.is_constant[one],
            self.netcal.output(j),
            self.equal_mass[one],
            self.simulated[:, one],
            self.simulated_equal_mass[:, one],
            SpreadBins(self.bins.index[:, one], self.bins.n_bins),
            *(x[one] for x in (self.root_variance, self.root_square, self.low, self.high)),
        )


def calibrate_spread(
    predictions: RegressionPredictions, *, confidence_level: float, n_resamples: int, seed: int
) -> SpreadCalibration:
    """Observed and simulated errors in bins of the predicted standard deviation.

    Cost: `n_resamples` draws from the predictive, fewer where these would be more than 400 million numbers.

    Args:
        predictions: means, standard deviations and targets.
        confidence_level: share of the simulated values between `low` and `high`.
        n_resamples: simulated test sets.
        seed: of the simulation.

    References:
        Levi, Gispan, Giladi, Fetaya (2022), doi:10.3390/s22155540 (ENCE);
        Bröcker and Smith (2007), doi:10.1175/WAF993.1 (consistency resampling).
    """
    std = predictions.standard_deviation
    is_constant = std.amax(dim=0) - std.amin(dim=0) < NEARLY_CONSTANT * std.mean(dim=0)
    width, mass = bin_by_width(std, is_constant), bin_by_mass(std)
    variance, variance_in_width = mass.average(std.square()), width.average(std.square())
    square = mass.average(predictions.errors.square())
    simulated_in_width, simulated = [], []
    for e in _simulate_squares(predictions, n_resamples, seed):
        simulated_in_width.append(normalized_error(variance_in_width, width.average(e)))
        simulated.append(mass.average(e))
    in_mass = torch.cat(simulated)
    tail = (1 - confidence_level) / 2
    tails = torch.tensor([tail, 1 - tail], dtype=std.dtype)
    low, high = torch.quantile(in_mass.sqrt(), tails, dim=0)
    return SpreadCalibration(
        is_constant=is_constant,
        netcal=measure_with_netcal(predictions, is_constant),
        equal_mass=normalized_error(variance, square),
        simulated=torch.cat(simulated_in_width),
        simulated_equal_mass=normalized_error(variance, in_mass),
        bins=mass,
        root_variance=variance.sqrt(),
        root_square=square.sqrt(),
        low=low,
        high=high,
    )


def normalized_error(
    variance: Float[Tensor, "d bins"], square: Float[Tensor, "*draws d bins"]
) -> Float[Tensor, "*draws d"]:
    r"""Mean over bins with samples of $|\sqrt{v_b} - \sqrt{e_b}| / \sqrt{v_b}$."""
    return (1 - (square / variance).sqrt()).abs().nanmean(dim=-1)


def bin_by_width(std: Float[Tensor, "n d"], is_constant: Bool[Tensor, " d"]) -> SpreadBins:
    """As netcal has them: of equal width between the smallest and the largest standard deviation."""
    columns = []
    for column, constant in zip(std.T, is_constant.tolist(), strict=True):
        if constant:
            columns.append(torch.zeros(len(column), dtype=torch.int64))
            continue
        edges = np.linspace(column.min().item(), column.max().item(), SPREAD_BINS + 1)
        columns.append(torch.bucketize(column.contiguous(), torch.from_numpy(edges[1:-1].copy()), right=True))
    return SpreadBins(torch.stack(columns, dim=1), SPREAD_BINS)


def bin_by_mass(std: Float[Tensor, "n d"]) -> SpreadBins:
    """Bins of nearly equal counts, at least five samples each; equal standard deviations share a bin."""
    n = len(std)
    n_bins = max(1, min(SPREAD_BINS, n // SAMPLES_PER_BIN))
    columns = []
    for column in std.T.contiguous():
        ordered = column.sort().values
        # twice the middle rank of a value among its equals, from 0 on
        middle = torch.searchsorted(ordered, column) + torch.searchsorted(ordered, column, right=True) - 1
        columns.append(middle * n_bins // (2 * n))
    return SpreadBins(torch.stack(columns, dim=1), n_bins)


def _simulate_squares(
    predictions: RegressionPredictions, n_resamples: int, seed: int
) -> Iterator[Float[Tensor, "draws n d"]]:
    """Portions of squared errors of targets drawn from the predictive."""
    size = predictions.mean.numel()
    total = max(2, min(n_resamples, _MOST_DRAWN // size))
    portion = max(1, min(total, _DRAWS_AT_ONCE // size))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, total, portion):
        yield predictions.distribution.draw_errors(min(portion, total - start), generator).square_()
