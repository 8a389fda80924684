r"""One step: what the samples say along a direction, and how far to go.

The slope s and the curvature c of all samples, from those that gave the direction and those that have not seen it; the
step $-\varphi s / c$; and by how much it is expected to lower the quadratic.

References:
    Stein (1981), Ann. Statist. 9(6), doi 10.1214/aos/1176345632 (the lemma behind the expected decrease).
"""

from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from debiased_laplace.linalg.conjugate_gradients import inner_product
from debiased_laplace.newton.finite_population import Share
from debiased_laplace.quadratics.batch_quadratic import Position
from debiased_laplace.quadratics.regularizer import Penalty

SURE = 3.0
"""How many standard errors a slope has to be beyond, for a step to be taken and the next segment to grow."""


@dataclass(frozen=True)
class Step:
    """Along one direction; the fields are those of `DirectionalSteps`."""

    slope: float
    slope_error: float
    curvature: float
    curvature_error: float
    length: float
    decrease: float

    @property
    def falls(self) -> bool:
        """Whether the quadratic does, beyond what noise alone would be likely to show."""
        return self.curvature > 0 and abs(self.slope) > SURE * self.slope_error


@dataclass(frozen=True)
class Looked:
    """Means over the samples that say the steps, damping and regularizer included, and standard errors."""

    slope: float
    curvature: float
    slope_error: float
    curvature_error: float

    @property
    def finite(self) -> bool:
        """Whether all of it is."""
        return all(map(isfinite, (self.slope, self.curvature, self.slope_error, self.curvature_error)))


def looked(position: Position, p: Tensor, update: Tensor, penalty: Penalty) -> Looked:
    """Along the direction that is being looked at, from where the update leads."""
    slopes, curvatures = position.along(0)
    n = len(slopes)
    errors = (float(v.std(correction=1)) / n**0.5 if n > 1 else 0.0 for v in (slopes, curvatures))
    return Looked(
        float(slopes.mean()) + inner_product(p, penalty.gradient_at(update)),
        float(curvatures.mean()) + penalty.curvature_along(p),
        *errors,
    )


def step_along(others: Looked, own: tuple[float, float], share: Share, *, shrinkage: bool) -> Step:
    """What both sets of samples say of all, and the step that follows."""
    f = share.own
    slope, curvature = (f * x + (1 - f) * y for x, y in zip(own, (others.slope, others.curvature), strict=True))
    error, curvature_error = share.error * others.slope_error, share.error * others.curvature_error
    length = decrease = 0.0
    if curvature > 0:
        kept = max(1 - error**2 / slope**2, 0.0) if slope != 0 else 0.0
        length = -(kept if shrinkage else 1.0) * slope / curvature
        # a step of -g(s) / c changes the true quadratic by (g(s)² / 2 - g(s) t) / c, t the true slope; by Stein's lemma
        # g(s) t is on average g(s) s - e² g'(s)
        if not shrinkage:
            decrease = (slope**2 / 2 - error**2) / curvature
        elif kept > 0:
            noise = error**2 * (1 + error**2 / slope**2)
            decrease = (kept * slope**2 - noise - kept**2 * slope**2 / 2) / curvature
    return Step(slope, error, curvature, curvature_error, length, decrease)
