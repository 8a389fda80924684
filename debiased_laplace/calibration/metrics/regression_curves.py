"""What the figures of spread, of single predictions and of single outputs show, as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from debiased_laplace.calibration.estimates import Estimate, estimate_root_mean
from debiased_laplace.calibration.metrics.spread import SpreadCalibration
from debiased_laplace.calibration.predictions.regression import RegressionPredictions

MAX_OUTPUTS = 20  # whose numbers a report keeps
EXAMPLES = 60
EXAMPLE_LEVEL = 0.9


@dataclass(frozen=True)
class SpreadBin:
    """Predicted and observed size of the errors of one output in one bin of the predicted standard deviation.

    Attributes:
        output: number of the output.
        n: samples in the bin.
        predicted: root of their mean predicted variance.
        observed: root of their mean squared error.
        low: lower end of its interval, None with one sample.
        high: upper end.
        consistent_low: smallest observed value that is usual for a right predictive.
        consistent_high: largest such value.
    """

    output: int
    n: int
    predicted: float
    observed: float
    low: float | None
    high: float | None
    consistent_low: float
    consistent_high: float


@dataclass(frozen=True)
class ExamplePrediction:
    """One output of one test sample.

    Attributes:
        output: number of the output.
        sample: position in the test set.
        mean: what was predicted.
        low: lower end of the central 90 % interval.
        high: upper end.
        target: what came.
    """

    output: int
    sample: int
    mean: float
    low: float
    high: float
    target: float


@dataclass(frozen=True)
class OutputMetrics:
    """Metrics of one output alone; its negative log-likelihood is that of its marginal."""

    output: int
    metrics: Mapping[str, Estimate]


def tabulate_spread(
    predictions: RegressionPredictions, spread: SpreadCalibration, *, confidence_level: float
) -> tuple[SpreadBin, ...]:
    """Bins of equal mass of the first outputs, in the order of their predicted spread."""
    squares = predictions.errors.square()
    table = []
    for j in range(min(predictions.n_outputs, MAX_OUTPUTS)):
        for b, n in enumerate(spread.bins.counts[j].tolist()):
            if n == 0:
                continue
            inside = squares[spread.bins.index[:, j] == b, j]
            observed = estimate_root_mean(inside, confidence_level=confidence_level)
            table.append(
                SpreadBin(
                    output=j,
                    n=n,
                    predicted=spread.root_variance[j, b].item(),
                    observed=observed.known,
                    low=observed.low,
                    high=observed.high,
                    consistent_low=spread.low[j, b].item(),
                    consistent_high=spread.high[j, b].item(),
                )
            )
    return tuple(table)


def choose_examples(predictions: RegressionPredictions, *, seed: int) -> tuple[ExamplePrediction, ...]:
    """Some test samples, the same for every method, in the order of their predicted mean."""
    n = predictions.n
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:EXAMPLES]
    low, high = predictions.interval(EXAMPLE_LEVEL)
    table = []
    for j in range(min(predictions.n_outputs, MAX_OUTPUTS)):
        for i in chosen[predictions.mean[chosen, j].argsort(stable=True)].tolist():
            numbers = [x[i, j].item() for x in (predictions.mean, low, high, predictions.targets)]
            table.append(ExamplePrediction(j, i, *numbers))
    return tuple(table)
