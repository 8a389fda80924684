"""How predictions were made and what they cost: plain numbers for the report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictionRecord:
    """How one method predicted the test set.

    Attributes:
        kind: "network", "Laplace posterior" or "callable".
        pred_type: "glm" or "nn"; None where the method is no Laplace posterior.
        link: "mean_field", "probit", "mc", "bridge" or "bridge_norm"; None where there is none.
        n_samples: Monte-Carlo samples behind every prediction; None where nothing is drawn.
        seconds: wall time of all its predictions of the test set.
        peak_bytes: most GPU memory that was in use at once while it predicted; None without a GPU.
    """

    kind: str
    pred_type: str | None
    link: str | None
    n_samples: int | None
    seconds: float
    peak_bytes: int | None
