r"""How many samples are enough: they are doubled until that gains less held-out KL than is asked for.

The smaller of two posteriors was fitted to some of the n samples that the larger one has read. Both are judged by their
KL to the full batch, for which stands $f H_B + (1 - f) H_c$: the n samples B with their exact share $f = n / N$, and
samples c that neither has seen. Only c is subject to chance, and the two are paired on it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.debiasing.held_out_kl import KLTerms

FIRST_STAGE = 32
"""Samples of the first stage, where the estimator can take so few."""

ENOUGH_UNSEEN = 128
"""Unseen samples by which a gain is judged where it is made of fewer: a few of them carry most of it."""

FEWEST_UNSEEN = 8
"""Unseen samples below which a gain is not judged at all: their spread says too little."""

_CAUTION = 2
"""Standard errors between a gain and the tolerance: of many noisy gains, one would soon be small by luck."""


@dataclass(frozen=True)
class Stage:
    """An estimate on the way.

    Attributes:
        n_samples: that were read for it.
        gain: how much closer to the full batch it is than the one before it, in nats of held-out KL; None for the
            first one, and where too few samples were left to tell.
        standard_error: of the gain, in nats; 0 where all data were used, and the gain is exact.
    """

    n_samples: int
    gain: float | None = None
    standard_error: float | None = None

    @property
    def at_most(self) -> float:
        """What the gain may still be, by its error; infinite where it is not known."""
        if self.gain is None or self.standard_error is None:
            return math.inf
        return self.gain + _CAUTION * self.standard_error

    @property
    def shown_gain(self) -> str:
        """The gain and its error, in nats."""
        return "not known" if self.gain is None else f"{self.gain:.3g} ± {self.standard_error:.2g} nats"


@dataclass(frozen=True)
class Stopping:
    """Why no more samples were read.

    Attributes:
        stages: the estimates on the way, the last one of which was kept.
        tolerance: in nats.
        n_available: samples that there were.
    """

    stages: tuple[Stage, ...]
    tolerance: float
    n_available: int

    @property
    def enough(self) -> bool:
        """Whether the last doubling gained less than the tolerance, and not only by luck: by two standard errors."""
        return self.stages[-1].at_most < self.tolerance

    @property
    def reason(self) -> str:
        """In a sentence."""
        last = self.stages[-1]
        if len(self.stages) == 1:
            return f"all {last.n_samples} samples were used: too few to double any."
        before = self.stages[-2].n_samples
        verb = "doubling" if last.n_samples == 2 * before else "going"
        step = f"{verb} from {before} to {last.n_samples} samples"
        gained = f"{step} gained {last.shown_gain}"
        if last.gain is None:
            gained = f"what {step} gained is not known, with too few left to tell"
        if last.n_samples == self.n_available:
            return f"all {last.n_samples} samples were used: {gained} (tolerance {self.tolerance:g})."
        if last.at_most < 0:
            lost = "more samples brought this estimator no closer; another one may gain from them"
            return f"stopped: {gained}, less than nothing by over two standard errors: {lost}."
        return f"stopped: {gained}, less than the tolerance of {self.tolerance:g} by over two standard errors."

    def __str__(self) -> str:
        lines = [f"  {stage.n_samples} samples: gained {stage.shown_gain}" for stage in self.stages[1:]]
        return "\n".join([self.reason, *lines])


def stage_sizes(first: int, n: int) -> Iterator[int]:
    """Numbers of samples, doubled until there are no more."""
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
    n_data: int,
    drawn: bool,
) -> Stage:
    """What the larger of two posteriors gains.

    Args:
        smaller: terms of the posterior of fewer samples.
        larger: terms of the other one.
        read: `sample_terms` of all samples that the larger one has read, those of the smaller less those of the larger.
        unseen: likewise, of samples that neither has seen; may be empty where all data were read.
        n_data: N.
        drawn: whether the curvature was drawn (Monte Carlo). Then a sample would say something else the next time, and
            no share of the full batch is known exactly.

    Returns:
        The stage, with the gain and its standard error.
    """
    n, m = len(read), len(unseen)
    f = n / n_data
    own = (smaller.prior_trace + smaller.log_det - larger.prior_trace - larger.log_det) / 2
    gain, variance = own + f * float(read.mean()), 0.0
    if m:
        gain += (1 - f) * float(unseen.mean())
    # drawing without replacement leaves less to chance, and nothing where the unseen samples are all the others
    left_out = 1.0 if drawn else 1 - m / max(n_data - n, m, 1)
    if m and left_out > 0:
        variance += left_out * _variance_of_mean((1 - f) * unseen)
    if drawn:
        # too large by the spread over samples, which are not drawn
        variance += _variance_of_mean(f * read)
    return Stage(n, gain, math.sqrt(variance))


def _variance_of_mean(terms: Float[Tensor, " n"]) -> float:
    return float(terms.var(correction=1)) / len(terms) if len(terms) > 1 else math.inf
