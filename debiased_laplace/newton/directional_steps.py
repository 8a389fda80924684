r"""Debiased conjugate gradients: directions from one set of samples, steps along them from another.

Conjugate gradients on a set a read both their directions $p_i$ and their step lengths off a, where slopes look steeper
than they are: the directions were chosen on a. Here a set b that has not seen them says how far to go. With $x_i$ the
steps so far, $s_i = p_i^\top (g_b + (H_b + \lambda I) x_i)$ the slope at that point and
$c_i = p_i^\top (H_b + \lambda I) p_i$, the step is $-\varphi_i s_i / c_i$. The factor
$\varphi_i = (1 - e_i^2 / s_i^2)_+$, with $e_i$ the standard error of the slope, shrinks it as far as it is noise.

References:
    Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325 (directions and magnitudes from different halves);
    James & Stein (1961), Proc. Fourth Berkeley Symp. 1 (shrinkage).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import (
    ConjugateDirection,
    ConjugateGradientIterations,
    LinearMap,
    Status,
    inner_product,
)
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic, Position
from debiased_laplace.quadratics.regularizer import Penalty

PANEL = 4
"""Directions that are judged together: whether the quadratic still falls along them, and their derivatives at once."""

Stopping = Literal["held_out", "none"]
StepStatus = Literal["no held-out decrease"] | Status


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken.

    Attributes:
        shrinkage: shrink every step by how much of its slope is noise.
        max_iterations: of conjugate gradients.
        tolerance: conjugate gradients have converged at this residual, relative to the gradient.
        stopping: "held_out": once the quadratic of the samples that say the steps falls no more beyond its error.
        preconditioner: of conjugate gradients.
    """

    shrinkage: bool
    max_iterations: int
    tolerance: float
    stopping: Stopping
    preconditioner: LinearMap | None = None


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
        directions: $p_i$ as columns.
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
class _Step:
    """Along one direction; the fields are those of `DirectionalSteps`."""

    slope: float
    slope_error: float
    curvature: float
    curvature_error: float
    length: float
    decrease: float

    @property
    def noise(self) -> float:
        r"""How much the decrease is off where the slope is nothing but noise: $e^2 / (\sqrt 2 c)$."""
        return 0.0 if self.curvature <= 0 else self.slope_error**2 / (2**0.5 * self.curvature)


def directional_steps(a: BatchQuadratic, b: BatchQuadratic, penalty: Penalty, options: StepOptions) -> DirectionalSteps:
    r"""Conjugate gradients on a, their directions kept, and sequential steps along them on b.

    Cost: a product with the curvature of a and a derivative along the direction of b, per direction. Where a is b there
    is no more to compute than conjugate gradients do, and what comes out without shrinkage is what they give.

    Args:
        a: the samples that give the directions.
        b: the samples that say the steps; at least 2. The same object as a is the biased way.
        penalty: damping and regularizer.
        options: shrinkage, stopping, and of conjugate gradients.

    Returns:
        The steps. The directions of a panel along which the quadratic of b did not fall are in it, with steps of 0.
    """
    same = a is b
    pushes: list[Tensor] = []

    def matvec(x: Tensor) -> Tensor:
        pushed = a.pushed(x[:, None]) if same else None
        pushes.extend([] if pushed is None else [pushed])
        return a.product(x, pushed) + penalty.curvature * x

    process = ConjugateGradientIterations(
        matvec,
        -(a.gradient + penalty.gradient),
        preconditioner=options.preconditioner,
        max_iterations=options.max_iterations,
        tolerance=options.tolerance,
    )
    position, update = b.position(), torch.zeros_like(penalty.gradient)
    panels: list[Tensor] = []
    steps: list[_Step] = []
    in_sample: list[float] = []
    stopped = ""
    for panel in _panels(process):
        k, directions = len(panel), torch.stack([found.vector for found in panel], dim=1)
        in_sample += [found.step_length**2 * found.curvature / 2 for found in panel]
        position.look(directions, torch.cat(pushes[len(steps) : len(steps) + k], dim=-1) if same else None)
        taken, reached = _walk(position, directions, update, penalty, shrinkage=options.shrinkage)
        panels.append(directions)
        if not same and options.stopping == "held_out" and not _falls(taken):
            steps += [_Step(s.slope, s.slope_error, s.curvature, s.curvature_error, 0.0, 0.0) for s in taken]
            stopped = f"along directions {len(steps) - k} to {len(steps) - 1} it falls no more than its error"
            break
        steps += taken
        update = reached
    return _collected(panels, steps, in_sample, update, _outcome(process, steps, stopped, same=same))


def _panels(process: ConjugateGradientIterations) -> Iterator[list[ConjugateDirection]]:
    """The directions of conjugate gradients, a few at a time."""
    while panel := list(islice(iter(process.advance, None), PANEL)):
        yield panel


def _walk(
    position: Position, directions: Tensor, update: Tensor, penalty: Penalty, *, shrinkage: bool
) -> tuple[list[_Step], Tensor]:
    """Steps along the directions one after another, and where they lead."""
    steps = []
    for i, p in enumerate(directions.unbind(1)):
        slopes, curvatures = position.along(i)
        n = len(slopes)
        slope = float(slopes.mean()) + inner_product(p, penalty.gradient_at(update))
        curvature = float(curvatures.mean()) + penalty.curvature_along(p)
        error, curvature_error = ((float(v.std(correction=1)) / n**0.5 if n > 1 else 0.0) for v in (slopes, curvatures))
        length = decrease = 0.0
        if curvature > 0:
            kept = max(1 - error**2 / slope**2, 0.0) if slope != 0 else 0.0
            length = -(kept if shrinkage else 1.0) * slope / curvature
            # a step of -φ s / c changes the true quadratic by (φ² s² / 2 - φ s t) / c, t the true slope, and of s t on
            # average e² is noise
            decrease = (kept**2 * slope**2 / 2 if shrinkage else slope**2 / 2 - error**2) / curvature
        steps.append(_Step(slope, error, curvature, curvature_error, length, decrease))
        if length != 0:
            position.move(i, length)
            update = update + length * p
    return steps, update


def _falls(steps: list[_Step]) -> bool:
    """Whether the quadratic falls along these directions beyond its error."""
    return sum(s.decrease for s in steps) > sum(s.noise**2 for s in steps) ** 0.5


def _outcome(process: ConjugateGradientIterations, steps: list[_Step], stopped: str, *, same: bool) -> StepOutcome:
    negative = sum(s.curvature <= 0 for s in steps)
    derivatives = 0 if same else len(steps)
    ended = process.outcome
    if stopped or ended is None:
        return StepOutcome("no held-out decrease", stopped, process.products, derivatives, negative)
    return StepOutcome(ended.status, ended.reason, ended.products, derivatives, negative)


def _collected(
    panels: list[Tensor], steps: list[_Step], in_sample: list[float], update: Tensor, outcome: StepOutcome
) -> DirectionalSteps:
    def values(name: str) -> Tensor:
        return update.new_tensor([getattr(s, name) for s in steps], dtype=accumulation_dtype(update))

    return DirectionalSteps(
        torch.cat(panels, dim=1) if panels else update.new_empty(len(update), 0),
        values("slope"),
        values("slope_error"),
        values("curvature"),
        values("curvature_error"),
        values("length"),
        values("decrease"),
        update.new_tensor(in_sample, dtype=accumulation_dtype(update)),
        update,
        outcome,
    )
