r"""Stopping rule for the number of samples, which is doubled until the gain in held-out KL is below a tolerance.

The smaller of two posteriors was fitted to a subset of the n samples B of the larger one. The KL of both to the full
batch is evaluated with $f H_B + (1 - f) H_c$: B with its exact share $f = n / N$, and samples c that neither has seen.
Only c is random, and the two are paired on it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.debiasing.held_out_kl import KLTerms

FIRST_STAGE = 32
"""Samples of the first stage, if the estimator works with so few."""

ENOUGH_UNSEEN = 128
"""Minimum number of unseen samples to evaluate a gain on, if there are as many: a few carry most of it."""

FEWEST_UNSEEN = 8
"""Number of unseen samples below which a gain is not evaluated, because their spread is too uncertain."""

_CAUTION = 2
"""Standard errors between a gain and the tolerance: of several noisy gains, one is soon small by chance."""


@dataclass(frozen=True)
class Stage:
    """An estimate from part of the samples.

    Attributes:
        n_samples: number of samples that it read, or of rows that it drew.
        gain: decrease of the KL to the full batch from the estimate before it, in nats; None for the first estimate,
            and if too few unseen samples were left.
        standard_error: standard error of the gain, in nats; 0 if all data were used and the gain is exact.
    """

    n_samples: int
    gain: float | None = None
    standard_error: float | None = None

    @property
    def at_most(self) -> float:
        """Upper confidence limit of the gain; infinite if it is unknown."""
        if self.gain is None or self.standard_error is None:
            return math.inf
        return self.gain + _CAUTION * self.standard_error

    @property
    def shown_gain(self) -> str:
        """Gain and standard error as text, in nats."""
        return "unknown" if self.gain is None else f"{self.gain:.3g} ± {self.standard_error:.2g} nats"


@dataclass(frozen=True)
class Stopping:
    """The reason why no more samples were read.

    Attributes:
        stages: estimates from more and more samples; the last one was kept.
        tolerance: in nats.
        n_available: number of available samples.
        unit: what is counted, "samples" or "rows".
    """

    stages: tuple[Stage, ...]
    tolerance: float
    n_available: int
    unit: str = "samples"

    @property
    def enough(self) -> bool:
        """Whether the last doubling gained less than the tolerance, by at least two standard errors."""
        return self.stages[-1].at_most < self.tolerance

    @property
    def reason(self) -> str:
        """Reason as a sentence."""
        last = self.stages[-1]
        if len(self.stages) == 1:
            return f"all {last.n_samples} {self.unit} were used: too few to double them."
        before = self.stages[-2].n_samples
        verb = "doubling" if last.n_samples == 2 * before else "going"
        step = f"{verb} from {before} to {last.n_samples} {self.unit}"
        gained = f"{step} gained {last.shown_gain}"
        if last.gain is None:
            gained = f"the gain of {step} is unknown, because too few unseen samples were left"
        if last.n_samples == self.n_available:
            return f"all {last.n_samples} {self.unit} were used: {gained} (tolerance {self.tolerance:g})."
        if last.at_most < 0:
            lost = (
                f"more {self.unit} brought this estimator no closer to the full batch; another one may gain from them"
            )
            return f"stopped: {gained}, below zero by over two standard errors: {lost}."
        return f"stopped: {gained}, less than the tolerance of {self.tolerance:g} by over two standard errors."

    def __str__(self) -> str:
        lines = [f"  {stage.n_samples} {self.unit}: gained {stage.shown_gain}" for stage in self.stages[1:]]
        return "\n".join([self.reason, *lines])


def stage_sizes(first: int, n: int) -> Iterator[int]:
    """Yield numbers of samples, doubled up to n."""
    while first < n:
        yield first
        first *= 2
    yield n


def stage(
    smaller: KLTerms,
    larger: KLTerms,
    read: Float[Tensor, " n"],
    unseen: Float[Tensor, " m"],
    *,
    n_data: float,
    n_unseen: float,
    drawn: bool,
) -> Stage:
    """Estimate the gain of the larger of two posteriors.

    Args:
        smaller: terms of the posterior fitted to fewer samples.
        larger: terms of the other posterior.
        read: `sample_terms` of all samples that the larger one has read, for the smaller minus those for the larger.
        unseen: the same for samples that neither has seen; may be empty if all data were read.
        n_data: size N of the data set, as a number of samples with the mean weight of the read ones.
        n_unseen: number of unseen samples in the same unit; that of the terms, without weights.
        drawn: whether the curvature is a Monte-Carlo estimate, for which no share of the full batch is exact.

    Returns:
        The stage, with the gain and its standard error.
    """
    n, m = len(read), len(unseen)
    f = n / n_data
    own = (smaller.prior_trace + smaller.log_det - larger.prior_trace - larger.log_det) / 2
    gain, variance = own + f * float(read.mean()), 0.0
    if m:
        gain += (1 - f) * float(unseen.mean())
    # finite-population correction; 0 if the unseen samples are all the others
    left_out = 1.0 if drawn else 1 - n_unseen / max(n_data - n, n_unseen, 1)
    if m and left_out > 0:
        variance += left_out * _variance_of_mean((1 - f) * unseen)
    if drawn:
        # an upper bound: it includes the spread over samples, which are fixed
        variance += _variance_of_mean(f * read)
    return Stage(n, gain, math.sqrt(variance))


def _variance_of_mean(terms: Float[Tensor, " n"]) -> float:
    return float(terms.var(correction=1)) / len(terms) if len(terms) > 1 else math.inf


def stage_of_rows(
    n: int, smaller: KLTerms, larger: KLTerms, difference: Float[Tensor, " R"], left_out: Float[Tensor, " R"]
) -> Stage:
    """Estimate the gain of the larger of two posteriors of drawn rows.

    Args:
        n: number of rows of the larger one.
        smaller: terms of the posterior of fewer rows.
        larger: terms of the other posterior.
        difference: terms of independently drawn rows, whose sum enters J, of the smaller minus those of the larger.
        left_out: probability of each of these rows not to be drawn.
    """
    own = (smaller.prior_trace + smaller.log_det - larger.prior_trace - larger.log_det) / 2
    return Stage(n, own + float(difference.sum()), math.sqrt(float(left_out @ difference.square())))
