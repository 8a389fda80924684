"""How many samples are enough: they are doubled until that gains less held-out KL than is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

FIRST_STAGE = 32
"""Samples of the first stage, where the estimator can take so few."""


@dataclass(frozen=True)
class Stage:
    """An estimate on the way.

    Attributes:
        n_samples: that it was made of.
        gain: how much closer to the full batch it is than the one before it, in nats of held-out KL; None for the
            first one, and where no sample was left to tell.
        standard_error: of the gain, in nats; 0 where all data were used, and the gain is exact.
    """

    n_samples: int
    gain: float | None = None
    standard_error: float | None = None

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
        """Whether the last doubling gained less than the tolerance."""
        gain = self.stages[-1].gain
        return gain is not None and gain < self.tolerance

    @property
    def reason(self) -> str:
        """In a sentence."""
        last = self.stages[-1]
        if len(self.stages) == 1:
            return f"all {last.n_samples} samples were used: too few to double any."
        before = self.stages[-2].n_samples
        verb = "doubling" if last.n_samples == 2 * before else "going"
        gained = f"{verb} from {before} to {last.n_samples} samples gained {last.shown_gain}"
        if last.gain is None:
            gained = f"what {verb} from {before} to {last.n_samples} gained is not known, with no sample left to tell"
        if last.n_samples == self.n_available:
            return f"all {last.n_samples} samples were used: {gained} (tolerance {self.tolerance:g})."
        return f"stopped: {gained}, less than the tolerance of {self.tolerance:g}."

    def __str__(self) -> str:
        lines = [f"  {stage.n_samples} samples: gained {stage.shown_gain}" for stage in self.stages[1:]]
        return "\n".join([self.reason, *lines])


def stage_sizes(first: int, n: int) -> Iterator[int]:
    """Numbers of samples, doubled until there are no more."""
    while first < n:
        yield first
        first *= 2
    yield n
