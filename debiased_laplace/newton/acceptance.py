r"""Acceptance test of a step on held-out samples, and the damping of the next step.

The losses of the held-out samples before and after the step are compared sample by sample, so that their common part
cancels. Of N training samples, those of the step count with their share of N if N is known; the held-out samples stand
for all others.

References:
    Martens (2010), Deep learning via Hessian-free optimization, ICML, §4.1 (adaptive damping).
"""

from dataclasses import dataclass
from math import inf, isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.newton.finite_population import FinitePopulation
from debiased_laplace.newton.step import StepProblem
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Factors of a step, tried in turn until one is accepted."""

_DECREASE, _INCREASE, _STRONG_INCREASE = 2 / 3, 1.5, 4.0  # factors of the damping
_MIN_DAMPING, _MAX_DAMPING = 1e-8, 1e8


@dataclass(frozen=True)
class StepAcceptance:
    r"""Result of the acceptance test.

    Attributes:
        accepted: whether the training loss falls by more than the standard error.
        scale: the last factor of the step that was tried.
        change: estimated change of the regularized training loss at that factor; infinite if an output is not finite.
        standard_error: standard error of the change.
        model_error: change of the held-out mean loss by the whole step minus that predicted by its quadratic model.
        quadratic_term: $\tfrac12 d^\top (H + \lambda I) d$ of the held-out samples for the whole step d; a quadratic of
            this curvature with its minimum at d decreases by it.
        trials: number of factors tried.
    """

    accepted: bool
    scale: float
    change: float
    standard_error: float
    model_error: float
    quadratic_term: float
    trials: int

    @property
    def relative_model_error(self) -> float:
        """Model error divided by the quadratic term; 0 if the loss is at or below the model."""
        if self.model_error <= 0:
            return 0.0
        if self.quadratic_term > 0 and isfinite(self.model_error):
            return self.model_error / self.quadratic_term
        return inf


@dataclass(frozen=True, eq=False)
class StepSamples:
    """Samples that a step was computed from.

    Attributes:
        sets: their sets.
        loss: their mean loss at the weights, without the regularizer.
    """

    sets: list[Batch]
    loss: float


def backtrack(
    problem: StepProblem,
    held_out: BatchQuadratic,
    step_samples: StepSamples,
    update: Float[Tensor, " P"],
    damping: float,
) -> StepAcceptance:
    """Find the largest factor of a step that is accepted.

    Cost: a derivative along the step, and per factor a forward pass of the held-out samples; if N is known, also of the
    samples of the step.

    Args:
        problem: the step's problem, with a penalty that excludes damping.
        held_out: at least 2 samples that the step does not depend on, at the weights.
        step_samples: samples that the step was computed from.
        update: the step, not zero.
        damping: of the step.

    Returns:
        The result for the first factor accepted, or for the smallest one.
    """
    pushed = held_out.pushed(update[:, None])
    exact = accumulation_dtype(update)
    slope = float(held_out.slopes(pushed).to(exact).mean())
    curvature = float(held_out.curvatures(update[:, None], pushed).to(exact).mean())
    quadratic_term = (curvature + problem.penalty.damped(damping).curvature_along(update)) / 2
    n_step = sum(len(batch) for batch in step_samples.sets)
    population = FinitePopulation.of(n_step, len(held_out), problem.n_data)
    f = population.observed_fraction
    model_error = inf
    for trial, scale in enumerate(SCALES, start=1):
        d = scale * update
        changes = _losses_at(problem, held_out.batch, d) - held_out.losses.to(exact)
        change = float(changes.mean())
        if f > 0:
            after = sum(float(_losses_at(problem, batch, d).sum()) for batch in step_samples.sets) / n_step
            change = f * (after - step_samples.loss) + (1 - f) * change
        if not isfinite(change):
            acceptance = StepAcceptance(False, scale, inf, inf, model_error, quadratic_term, trial)
            continue
        if scale == 1:
            model_error = float(changes.mean()) - slope - curvature / 2
        error = population.error_factor * float(changes.std(correction=1)) / len(changes) ** 0.5
        change += problem.penalty.change(d)
        acceptance = StepAcceptance(change < -error, scale, change, error, model_error, quadratic_term, trial)
        if acceptance.accepted:
            break
    return acceptance


def adapt_damping(damping: float, relative_model_error: float) -> float:
    """Return the damping of the next step, by the rule of Levenberg and Marquardt.

    Args:
        damping: of the last step.
        relative_model_error: of the last step, see `StepAcceptance`.
    """
    # The model error shows how far the quadratic can be trusted and depends little on which samples are held out;
    # acceptance depends on them a lot.
    factor = 1.0
    if relative_model_error < 0.25:
        factor = _DECREASE
    elif relative_model_error > 0.75:
        factor = _INCREASE if relative_model_error < 2 else _STRONG_INCREASE
    return min(max(damping * factor, _MIN_DAMPING), _MAX_DAMPING)


def _losses_at(problem: StepProblem, batch: Batch, d: Tensor) -> Tensor:
    """Return the losses of a batch at distance d from the weights."""
    network = problem.network
    selection = network.selection
    moved = selection.unflatten(selection.flatten(network.parameters) + d)
    with torch.no_grad():
        outputs = selection.call(moved, batch.inputs)
    losses = network.likelihood.per_sample_loss(outputs, batch.targets).to(accumulation_dtype(d))
    return batch.scaled(losses)
