"""Finite-population weights for combining two disjoint samples of a data set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FinitePopulation:
    r"""Weights to estimate a mean over N values from n observed ones and a sample of m of the others.

    The mean is $f \cdot$ (mean of the n observed) $+ (1 - f) \cdot$ (mean of the others), $f = n / N$. With the second
    mean estimated from m values drawn without replacement, its standard error is $(1 - f) \sqrt{1 - m / (N - n)}$ times
    that of the sample mean.

    Attributes:
        observed_fraction: f.
        error_factor: factor of the standard error.
    """

    observed_fraction: float
    error_factor: float

    @classmethod
    def of(cls, n_observed: int, n_sampled: int, n_data: int | None) -> "FinitePopulation":
        """Return the weights for n observed and m sampled values of N; 0 and 1 if N is None, unknown or infinite."""
        if n_data is None:
            return cls(0.0, 1.0)
        f = n_observed / n_data
        return cls(f, (1 - f) * (1 - n_sampled / (n_data - n_observed)) ** 0.5)
