r"""Debiased conjugate gradients: directions from one set of samples, steps along them from another.

Conjugate gradients on a set a take both their directions $p_i$ and their step lengths from a, where slopes are too
steep because the directions were chosen on a. Here a held-out set b gives the step lengths. With $x_i$ the steps so
far, $s_i = p_i^\top (g_b + (H_b + \lambda I) x_i)$ the slope at that point and $c_i = p_i^\top (H_b + \lambda I) p_i$,
the step is $-\varphi_i s_i / c_i$. The factor $\varphi_i = (1 - e_i^2 / s_i^2)_+$, with $e_i$ the standard error of the
slope, shrinks it by the noise in the slope.

Of N samples, a is a fraction $f = |a| / N$ and b represents all others: the slope is
$f p_i^\top (g_a + \dots) + (1 - f) p_i^\top (g_b + \dots)$, and likewise the curvature. The terms of a are by-products
of conjugate gradients. If N is unknown or infinite, f is 0 and the formulas are those above.

References:
    Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325 (directions and magnitudes from different halves);
    James & Stein (1961), Proc. Fourth Berkeley Symp. 1 (shrinkage);
    Stein (1981), Ann. Statist. 9(6), doi 10.1214/aos/1176345632 (the lemma behind the predicted decrease).
"""

from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
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
from debiased_laplace.newton.finite_population import FinitePopulation
from debiased_laplace.newton.options import StepOptions
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic, Position
from debiased_laplace.quadratics.regularizer import Penalty

SIGNIFICANCE = 3.0
"""Standard errors that a slope has to exceed for a step under held-out stopping."""
GROWTH = 4
"""Ratio of the lengths of two successive segments after a significant slope."""
PATIENCE = 2
"""Successive segments without a significant decrease after which a pass ends."""

StepStatus = Literal["no held-out decrease"] | Status


@dataclass(frozen=True)
class StepOutcome:
    """How a pass ended, and what it took.

    Attributes:
        status: "no held-out decrease", or the status of conjugate gradients.
        reason: one sentence on why it ended.
        products: curvature products on the samples of the directions.
        derivatives: directional derivatives on the held-out samples.
        negative_curvatures: number of directions without a step because of a curvature of at most 0.
    """

    status: StepStatus
    reason: str
    products: int
    derivatives: int
    negative_curvatures: int


@dataclass(frozen=True, eq=False)
class DirectionalSteps:
    r"""Directions of a pass, slopes and curvatures along them, and the steps.

    Attributes:
        directions: columns $p_i$; for a segment of several iterations, the sum of the steps of conjugate gradients.
        iterations: iterations of conjugate gradients in each segment.
        slopes: $s_i$ at the point that the steps before have reached, damping and regularizer included.
        slope_standard_errors: from the spread over the samples.
        curvatures: $c_i$, damping and regularizer included.
        curvature_standard_errors: from the spread over the samples.
        step_lengths: along each direction; 0 where no step was taken.
        predicted_decreases: expected decrease of the quadratic by each step, corrected for the noise in its slope;
            negative where the step is expected to follow noise.
        in_sample_decreases: decrease of the quadratic of the directions' own samples by conjugate gradients.
        update: sum of the steps.
        outcome: how the pass ended.
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
class DirectionalMeasurement:
    """Mean slope and curvature along a direction, damping and regularizer included, with standard errors."""

    slope: float
    curvature: float
    slope_error: float
    curvature_error: float

    @property
    def finite(self) -> bool:
        """Whether all values are finite."""
        return all(map(isfinite, (self.slope, self.curvature, self.slope_error, self.curvature_error)))


@dataclass(frozen=True)
class Step:
    """Step along one direction; the fields are those of `DirectionalSteps`."""

    slope: float
    slope_error: float
    curvature: float
    curvature_error: float
    length: float
    decrease: float

    @property
    def significant(self) -> bool:
        """Whether the curvature is positive and the slope beyond three standard errors."""
        return self.curvature > 0 and abs(self.slope) > SIGNIFICANCE * self.slope_error


@dataclass(frozen=True)
class _Segment:
    """Consecutive iterations of conjugate gradients, combined into one direction.

    Attributes:
        direction: the direction of a single iteration, or the sum of the steps of several.
        product: damped curvature of the directions' own samples times the direction.
        iterations: number of iterations.
        decrease: decrease of the quadratic of the directions' own samples.
    """

    direction: Tensor
    product: Tensor
    iterations: int
    decrease: float


def directional_steps(
    a: BatchQuadratic, b: BatchQuadratic, penalty: Penalty, options: StepOptions, n_data: int | None = None
) -> DirectionalSteps:
    r"""Run conjugate gradients on a, and take sequential steps along their directions on b.

    Cost: a curvature product of a per iteration, and a derivative of b per direction. If a is b, the cost is that of
    conjugate gradients, and without shrinkage so is the result.

    Args:
        a: samples of the directions.
        b: samples of the steps, at least 2. The same object as a gives the biased step.
        penalty: damping and regularizer.
        options: shrinkage, stopping, and options of conjugate gradients.
        n_data: N, the size of the data set that contains a and b; None: unknown or infinite.

    Returns:
        The directions and steps.

    Raises:
        ValueError: if the preconditioner returns the wrong shape.
    """
    same = a is b
    population = FinitePopulation.of(0 if same else len(a), len(b), n_data)
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
    while not broken and misses < PATIENCE and (segment := _next_segment(process, size)) is not None:
        p = segment.direction
        position.prepare(p[:, None], pushed)
        measured = measure(position, p, update, penalty)
        if not measured.finite:
            broken = f"a slope or a curvature along direction {len(steps)} is not finite"
            continue
        own = inner_product(p, own_gradient), inner_product(p, segment.product)
        step = step_along(measured, own, population, shrinkage=options.shrinkage)
        if held_out:
            # Longer segments save derivatives of b while slopes are clear. A step along noise raises the quadratic on
            # average, however short it is.
            size, misses = (GROWTH * size, 0) if step.significant else (1, misses + 1)
            step = step if step.significant else replace(step, length=0.0, decrease=0.0)
        if step.length != 0:
            position.move(0, step.length)
            update = update + step.length * p
            own_gradient = own_gradient + step.length * segment.product
        segments.append(segment)
        steps.append(step)
    status, reason = _end(process, len(steps), misses, broken)
    derivatives, negative = 0 if same else len(steps), sum(s.curvature <= 0 for s in steps)
    return _collect(segments, steps, update, StepOutcome(status, reason, process.products, derivatives, negative))


def measure(position: Position, p: Tensor, update: Tensor, penalty: Penalty) -> DirectionalMeasurement:
    """Measure slope and curvature along the prepared direction p at the point reached by the update."""
    slopes, curvatures = position.along(0)
    n = len(slopes)
    errors = (float(v.std(correction=1)) / n**0.5 if n > 1 else 0.0 for v in (slopes, curvatures))
    return DirectionalMeasurement(
        float(slopes.mean()) + inner_product(p, penalty.gradient_at(update)),
        float(curvatures.mean()) + penalty.curvature_along(p),
        *errors,
    )


def step_along(
    measured: DirectionalMeasurement, own: tuple[float, float], population: FinitePopulation, *, shrinkage: bool
) -> Step:
    r"""Compute the step $-\varphi s / c$ along a direction and its expected decrease of the quadratic.

    Args:
        measured: slope and curvature on the held-out samples.
        own: slope and curvature on the samples of the direction.
        population: weights of the two.
        shrinkage: shrink the step by the noise in its slope.
    """
    f, factor = population.observed_fraction, population.error_factor
    slope, curvature = (f * x + (1 - f) * y for x, y in zip(own, (measured.slope, measured.curvature), strict=True))
    error, curvature_error = factor * measured.slope_error, factor * measured.curvature_error
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


def _next_segment(process: ConjugateGradientIterations, size: int) -> _Segment | None:
    """Advance conjugate gradients by at most `size` iterations; None if there are no more."""
    iterations = list(islice(iter(process.advance, None), size))
    if not iterations:
        return None
    direction, product = iterations[0].vector, iterations[0].product
    if len(iterations) > 1:
        direction = torch.stack([i.step_length * i.vector for i in iterations]).sum(0)
        product = torch.stack([i.step_length * i.product for i in iterations]).sum(0)
    decrease = sum(i.step_length**2 * i.curvature / 2 for i in iterations)
    return _Segment(direction, product, len(iterations), decrease)


def _end(process: ConjugateGradientIterations, n_steps: int, misses: int, broken: str) -> tuple[StepStatus, str]:
    """Return why a pass ended."""
    if broken:
        return "breakdown", broken
    if misses == PATIENCE or process.outcome is None:
        reason = f"no slope beyond chance, or no minimum, along the last {misses} of {n_steps} directions"
        return "no held-out decrease", reason
    return process.outcome.status, process.outcome.reason


def _collect(segments: list[_Segment], steps: list[Step], update: Tensor, outcome: StepOutcome) -> DirectionalSteps:
    """Stack segments and steps into tensors."""

    def tensor(values: list[float]) -> Tensor:
        return update.new_tensor(values, dtype=accumulation_dtype(update))

    directions = [segment.direction for segment in segments]
    return DirectionalSteps(
        torch.stack(directions, dim=1) if directions else update.new_empty(len(update), 0),
        tuple(segment.iterations for segment in segments),
        tensor([s.slope for s in steps]),
        tensor([s.slope_error for s in steps]),
        tensor([s.curvature for s in steps]),
        tensor([s.curvature_error for s in steps]),
        tensor([s.length for s in steps]),
        tensor([s.decrease for s in steps]),
        tensor([segment.decrease for segment in segments]),
        update,
        outcome,
    )
