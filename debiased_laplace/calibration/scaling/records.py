"""What was done to the baseline, for the report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScalingRecord:
    """How the scaled baseline came about.

    Attributes:
        method: name of its row.
        baseline: name of the method that was scaled.
        quantity: "temperature" divides logits, "factor" multiplies standard deviations; above 1 the baseline was
            over-confident.
        value: fitted on all samples of the fit.
        per_fold: what each fold was scaled with, fitted on the others; empty where validation data were given.
        fitted_on: "folds" of the test set itself, or "validation" data.
        n_fit: samples of the fit.
        n_at_bound: how many fits ended at a bound instead of an optimum.
        from_logits: whether logits were given; else logarithms of probabilities served.
    """

    method: str
    baseline: str
    quantity: Literal["temperature", "factor"]
    value: float
    per_fold: tuple[float, ...]
    fitted_on: Literal["folds", "validation"]
    n_fit: int
    n_at_bound: int = 0
    from_logits: bool = False

    @property
    def description(self) -> str:
        """In a few words, for the head of its column."""
        symbol = "T" if self.quantity == "temperature" else "factor"
        if self.fitted_on == "validation":
            return f"{symbol} = {self.value:.3g}, fitted on {self.n_fit} validation samples"
        low, high = min(self.per_fold), max(self.per_fold)
        shown = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
        return f"{symbol} = {shown}, cross-fitted over {len(self.per_fold)} folds of the test set"
