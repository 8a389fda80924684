r"""Debiased conjugate gradients: directions from one set of samples, steps along them from another.

Conjugate gradients on a set a read both their directions $p_i$ and their step lengths off a, where slopes look steeper
than they are: the directions were chosen on a. Here a set b that has not seen them says how far to go. With $x_i$ the
steps so far, $s_i = p_i^\top (g_b + (H_b + \lambda I) x_i)$ the slope at that point and
$c_i = p_i^\top (H_b + \lambda I) p_i$, the step is $-\varphi_i s_i / c_i$. The factor
$\varphi_i = (1 - e_i^2 / s_i^2)_+$, with $e_i$ the standard error of the slope, shrinks it as far as it is noise.

Of N samples, a is a share $f = |a| / N$, and b stands for the others only: the slope of all is
$f p_i^\top (g_a + \dots) + (1 - f) p_i^\top (g_b + \dots)$, likewise the curvature. What a itself says comes with
conjugate gradients. With N unknown, or infinite, f is 0 and the formulas are those above.

A derivative of b along every direction of a costs half as much again as conjugate gradients do. With held-out stopping
b is asked less often where the answer is clear: as long as slopes are beyond three standard errors, the next
segment of the path of conjugate gradients, along which it is asked for one step, is four times as long. Where
a slope is not, there is no step, since by a step along noise the quadratic rises on average, however short the step;
the next segment is a single direction again, and two of those in a row end the pass.

References:
    Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325 (directions and magnitudes from different halves);
    James & Stein (1961), Proc. Fourth Berkeley Symp. 1 (shrinkage).
"""

from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import (
    ConjugateGradientIterations,
    Status,
    inner_product,
)
from debiased_laplace.newton.finite_population import Share
from debiased_laplace.newton.options import StepOptions
from debiased_laplace.newton.single_step import Step, looked, step_along
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic
from debiased_laplace.quadratics.regularizer import Penalty

GROWTH = 4
"""How many times longer than the one before a segment is, if the quadratic fell along that one beyond its error."""
PATIENCE = 2
"""Segments in a row along which the quadratic does not fall beyond its error, that end a pass."""

StepStatus = Literal["no held-out decrease"] | Status


@dataclass(frozen=True)
class StepOutcome:
    """How a step came to its end.

    Attributes:
        status: "no held-out decrease", or that of conjugate gradients.
        reason: one sentence that says why.
        products: with the curvature, of the samples that gave the directions.
        derivatives: along directions, of the samples that gave the steps and not the directions.
        negative_curvatures: directions without a step, because the quadratic has no minimum along them.
    """

    status: StepStatus
    reason: str
    products: int
    derivatives: int
    negative_curvatures: int


@dataclass(frozen=True, eq=False)
class DirectionalSteps:
    r"""Directions, what the samples that say the steps say along each, and the steps.

    Attributes:
        directions: as columns: $p_i$, or where several make a segment, the sum of the steps of conjugate gradients
            along them.
        iterations: of conjugate gradients in each.
        slopes: $s_i$, where the steps before have led, damping and regularizer included.
        slope_standard_errors: from the spread over the samples.
        curvatures: $c_i$, damping and regularizer included.
        curvature_standard_errors: from the spread over the samples.
        step_lengths: along each direction; 0 where no step was taken.
        predicted_decreases: by how much each step is expected to lower the quadratic, the noise that it follows taken
            off; negative where it is expected to follow noise.
        in_sample_decreases: by how much conjugate gradients lower the quadratic of the directions' own samples.
        update: the steps together.
        outcome: how it ended.
    """

    directions: Float[Tensor, "P k"]
    iterations: tuple[int, ...]
    slopes: Float[Tensor, " k"]
    slope_standard_errors: Float[Tensor, " k"]
    curvatures: Float[Tensor, " k"]
    curvature_standard_errors: Float[Tensor, " k"]
    step_lengths: Float[Tensor, " k"]
    predicted_decreases: Float[Tensor, " k"]
    in_sample_decreases: Float[Tensor, " k"]
    update: Float[Tensor, " P"]
    outcome: StepOutcome


@dataclass(frozen=True)
class _Segment:
    """A piece of the path of conjugate gradients.

    Attributes:
        direction: of the piece; where it is of one iteration, that of conjugate gradients.
        iterations: in it.
        decrease: of the quadratic of the directions' own samples.
    """

    direction: Tensor
    iterations: int
    decrease: float


def directional_steps(
    a: BatchQuadratic, b: BatchQuadratic, penalty: Penalty, options: StepOptions, n_data: int | None = None
) -> DirectionalSteps:
    r"""Conjugate gradients on a, their directions kept, and sequential steps along them on b.

    Cost: a product with the curvature of a per iteration, and a derivative of b per direction. Where a is b there is no
    more to compute than conjugate gradients do, and what comes out without shrinkage is what they give.

    Args:
        a: the samples that give the directions.
        b: the samples that say the steps; at least 2. The same object as a is the biased way.
        penalty: damping and regularizer.
        options: shrinkage, stopping, and of conjugate gradients.
        n_data: N, of which a and b are parts; None: more than can be counted.

    Returns:
        The steps. With held-out stopping there is none along a direction where the quadratic does not fall.
    """
    same = a is b
    share = Share.of(0 if same else len(a), len(b), n_data)
    held_out = not same and options.stopping == "held_out"
    pushed: Tensor | None = None

    def matvec(x: Tensor) -> Tensor:
        nonlocal pushed
        pushed = a.pushed(x[:, None]) if same else None
        return a.product(x, pushed) + penalty.curvature * x

    process = ConjugateGradientIterations(
        matvec,
        -(a.gradient + penalty.gradient),
        preconditioner=options.preconditioner,
        max_iterations=options.max_iterations,
        tolerance=options.tolerance,
    )
    position, update = b.position(), torch.zeros_like(penalty.gradient)
    own_gradient = a.gradient + penalty.gradient
    segments: list[_Segment] = []
    steps: list[Step] = []
    size, misses, broken = 1, 0, ""
    while not broken and misses < PATIENCE and (found := _segment(process, size)) is not None:
        segment, product = found
        p = segment.direction
        position.look(p[:, None], pushed)
        others = looked(position, p, update, penalty)
        if not others.finite:
            broken = f"a slope or a curvature along direction {len(steps)} is not finite"
            continue
        own = inner_product(p, own_gradient), inner_product(p, product)
        step = step_along(others, own, share, shrinkage=options.shrinkage)
        if held_out:
            size, misses = (GROWTH * size, 0) if step.falls else (1, misses + 1)
            step = step if step.falls else replace(step, length=0.0, decrease=0.0)
        if step.length != 0:
            position.move(0, step.length)
            update = update + step.length * p
            own_gradient = own_gradient + step.length * product
        segments.append(segment)
        steps.append(step)
    status, reason = _end(process, len(steps), misses, broken)
    derivatives, negative = 0 if same else len(steps), sum(s.curvature <= 0 for s in steps)
    return _collected(segments, steps, update, StepOutcome(status, reason, process.products, derivatives, negative))


def _segment(process: ConjugateGradientIterations, size: int) -> tuple[_Segment, Tensor] | None:
    """The next piece of the path of conjugate gradients, of so many iterations or as many as are left.

    And the damped curvature of the directions' own samples times its direction.
    """
    found = list(islice(iter(process.advance, None), size))
    if not found:
        return None
    direction, product = found[0].vector, found[0].product
    if len(found) > 1:
        direction = torch.stack([one.step_length * one.vector for one in found]).sum(0)
        product = torch.stack([one.step_length * one.product for one in found]).sum(0)
    decrease = sum(one.step_length**2 * one.curvature / 2 for one in found)
    return _Segment(direction, len(found), decrease), product


def _end(process: ConjugateGradientIterations, n_steps: int, misses: int, broken: str) -> tuple[StepStatus, str]:
    """Why there are no more directions."""
    if broken:
        return "breakdown", broken
    if misses == PATIENCE or process.outcome is None:
        reason = f"along the last {misses} of {n_steps} directions it has no slope beyond chance, or no minimum"
        return "no held-out decrease", reason
    return process.outcome.status, process.outcome.reason


def _collected(segments: list[_Segment], steps: list[Step], update: Tensor, outcome: StepOutcome) -> DirectionalSteps:
    def values(found: list[float]) -> Tensor:
        return update.new_tensor(found, dtype=accumulation_dtype(update))

    directions = [one.direction for one in segments]
    return DirectionalSteps(
        torch.stack(directions, dim=1) if directions else update.new_empty(len(update), 0),
        tuple(one.iterations for one in segments),
        values([s.slope for s in steps]),
        values([s.slope_error for s in steps]),
        values([s.curvature for s in steps]),
        values([s.curvature_error for s in steps]),
        values([s.length for s in steps]),
        values([s.decrease for s in steps]),
        values([one.decrease for one in segments]),
        update,
        outcome,
    )
