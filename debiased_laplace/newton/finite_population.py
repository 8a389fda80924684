"""What some samples say about all N of a data set, when others of it have had another part."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    r"""Weights of samples that count themselves only and of samples that stand for all others.

    The mean of N values is $f \cdot$ (mean of the n own ones) $+ (1 - f) \cdot$ (mean of the others), and a sample of m
    of those, drawn without replacement, leaves a standard error of $(1 - f) \sqrt{1 - m / (N - n)}$ times the one that
    it has by itself.

    Attributes:
        own: f.
        error: factor of the standard error.
    """

    own: float
    error: float

    @classmethod
    def of(cls, n_own: int, n_standing: int, n_data: int | None) -> "Share":
        """Of n samples that count themselves and m that stand for the rest of N; 0 and 1 where N is unknown."""
        if n_data is None:
            return cls(0.0, 1.0)
        own = n_own / n_data
        return cls(own, (1 - own) * (1 - n_standing / (n_data - n_own)) ** 0.5)
