"""Binned errors that rest on more than one choice of bins: equal mass, a monotone sweep, every number of bins."""

from dataclasses import dataclass

from debiased_laplace.calibration.estimates import Estimate, without_interval
from debiased_laplace.calibration.metrics.partitions import (
    SortedConfidences,
    expected_error,
    expected_error_by_chance,
    split_by_mass,
    split_by_width,
    sweep_bins,
)

FEWEST_BINS, MOST_BINS = 5, 50


@dataclass(frozen=True)
class BinSensitivity:
    """The expected calibration error with one number of bins of equal width.

    Attributes:
        n_bins: number of bins.
        error: the error with these bins.
        noise_floor: the error that right confidences would show with these bins.
    """

    n_bins: int
    error: float
    noise_floor: float


def tabulate_sensitivity(predictions: SortedConfidences) -> tuple[BinSensitivity, ...]:
    """Error and noise floor with 5 to 50 bins of equal width."""
    table = []
    for n_bins in range(FEWEST_BINS, MOST_BINS + 1):
        bounds = split_by_width(predictions, n_bins)
        floor = expected_error_by_chance(predictions, bounds)
        table.append(BinSensitivity(n_bins, expected_error(predictions, bounds), floor))
    return tuple(table)


def measure_other_bins(predictions: SortedConfidences, *, n_bins: int) -> dict[str, Estimate]:
    """The expected calibration error over bins of equal mass, and over as many of them as stay monotone.

    Args:
        predictions: sorted confidences.
        n_bins: bins of equal mass.
    """
    mass, swept = split_by_mass(predictions, n_bins), sweep_bins(predictions)
    names = {
        "ece_equal_mass": (mass, f"{len(mass) - 1} bins of equal mass, equal confidences together"),
        "ece_sweep": (swept, f"monotone sweep, {len(swept) - 1} bins of equal mass"),
    }
    return {
        name: without_interval(
            expected_error(predictions, bounds),
            predictions.n,
            estimator=words,
            reason="a binned error is biased upwards; in these bins chance alone would make it "
            f"{expected_error_by_chance(predictions, bounds):.3g}",
        )
        for name, (bounds, words) in names.items()
    }
