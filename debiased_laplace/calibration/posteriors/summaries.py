"""A fitted posterior in plain numbers."""

from dataclasses import dataclass
from typing import Literal

KLVerdict = Literal["closer", "further", "no detectable difference"]


@dataclass(frozen=True)
class DirectionSummary:
    """Curvature along one direction; all curvatures are means per sample.

    Attributes:
        place: 1 for the direction that its own samples find the most curved.
        in_sample: what these samples say: a single batch's own, biased value.
        curvature: the estimate of the full batch's, from samples that the direction does not know.
        low: lower end of its confidence interval; None where there is none.
        high: upper end.
    """

    place: int
    in_sample: float
    curvature: float
    low: float | None
    high: float | None

    @property
    def inflation(self) -> float | None:
        """How many times too large the single batch's value is; None where the curvature is zero."""
        return self.in_sample / self.curvature if self.curvature > 0 else None

    @property
    def inflation_low(self) -> float | None:
        """Lower end of the inflation's interval, from the upper end of the curvature's."""
        return self.in_sample / self.high if self.high else None

    @property
    def inflation_high(self) -> float | None:
        """Upper end; None where the curvature may be zero."""
        return self.in_sample / self.low if self.low else None


@dataclass(frozen=True)
class SpectrumPoint:
    """One value of the data's part of the posterior precision, N times its curvature over noise and temperature.

    Attributes:
        place: 1 for the largest.
        precision: in the unit of the prior precision.
    """

    place: int
    precision: float


@dataclass(frozen=True)
class HeldOutDifference:
    """How much further from the full-batch posterior than another one, by held-out samples, in nats.

    Attributes:
        reference: name of the other posterior.
        difference: negative where this one is closer.
        standard_error: from the spread over the held-out samples, paired.
        low: lower end of its normal interval.
        high: upper end.
        p_value: two-sided, Holm-adjusted over the posteriors of the report.
        verdict: in words.
        n: number of held-out samples.
    """

    reference: str
    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float
    verdict: KLVerdict
    n: int


@dataclass(frozen=True)
class PosteriorSummary:
    """What was fitted, from how many samples, and what it cost; None or empty where nobody knows.

    Attributes:
        kind: class of the posterior.
        likelihood: of the outputs.
        weights: which weights it is over.
        structure: of the curvature.
        curvature: "GGN", "Monte-Carlo GGN", "EF" or "Hessian".
        source: who computed it.
        n_parameters: number of parameters P.
        n_data: samples N that the likelihood stands for.
        n_direction_samples: samples that the directions come from.
        n_magnitude_samples: samples that the magnitudes come from.
        shared_samples: whether these are the same.
        rank: number of directions.
        magnitudes: how the curvature along them was estimated.
        complement: curvature outside the directions.
        metric: in which the directions lead.
        share_outside: part of the curvature's trace that is outside the directions.
        prior_low: smallest prior precision.
        prior_high: largest.
        sigma_noise: standard deviation of the observation noise; None in classification.
        temperature: of the likelihood.
        log_marginal_likelihood: Laplace's, in nats.
        effective_parameters: trace of N τ H (N τ H + P0)^-1, the number of parameters that the data determine.
        fit_seconds: wall time of the fit.
        directions: a selection of the directions.
        spectrum: a selection of the data's precisions, decreasing.
        held_out: how close it is to the full batch, against the first posterior.
        notes: why something is missing.
    """

    kind: str
    likelihood: str | None = None
    weights: str | None = None
    structure: str | None = None
    curvature: str | None = None
    source: str | None = None
    n_parameters: int | None = None
    n_data: int | None = None
    n_direction_samples: int | None = None
    n_magnitude_samples: int | None = None
    shared_samples: bool | None = None
    rank: int | None = None
    magnitudes: str | None = None
    complement: str | None = None
    metric: str | None = None
    share_outside: float | None = None
    prior_low: float | None = None
    prior_high: float | None = None
    sigma_noise: float | None = None
    temperature: float | None = None
    log_marginal_likelihood: float | None = None
    effective_parameters: float | None = None
    fit_seconds: float | None = None
    directions: tuple[DirectionSummary, ...] = ()
    spectrum: tuple[SpectrumPoint, ...] = ()
    held_out: HeldOutDifference | None = None
    notes: tuple[str, ...] = ()

    @property
    def shows_inflation(self) -> bool:
        """Whether its curvatures come from other samples than its directions; a single batch cannot see its bias."""
        return bool(self.directions) and self.magnitudes != "same_batch"
