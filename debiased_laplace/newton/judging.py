r"""Whether a step is a good one, by samples that had no part in it.

The judges' losses are compared pairwise, sample by sample, before and after the step, so that what is common to both
cancels. Their own quadratic along the step says what the step should have done to them. By how much it is wrong is
about the range in which quadratics can be trusted, and hardly about which samples the judges are; so it, and not
whether the step was accepted, adapts the damping.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.newton.step import StepTask
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Shares of a step that are tried, until the judges accept one."""


@dataclass(frozen=True)
class Verdict:
    """What the judges say of a share of a step.

    Attributes:
        accepted: whether their mean loss falls.
        scale: the share of the step that was judged last.
        change: of their mean loss by that share, the regularizer's included; infinite where an output is not finite.
        standard_error: of the change.
        excess: by how much the whole step changes their mean loss more than their own quadratic predicts.
    """

    accepted: bool
    scale: float
    change: float
    standard_error: float
    excess: float


def judged(task: StepTask, judges: BatchQuadratic, update: Float[Tensor, " P"]) -> Verdict:
    """The largest share of a step that the judges accept, or the smallest that they refuse.

    Cost: a derivative along the step, and a forward pass for each share that is tried.

    Args:
        task: whose penalty includes no damping.
        judges: samples that the step has not seen, at the weights; at least 2.
        update: not zero.

    Returns:
        The verdict.
    """
    pushed = judges.pushed(update[:, None])
    exact = accumulation_dtype(update)
    slope = float(judges.slopes(pushed).to(exact).mean())
    curvature = float(judges.curvatures(update[:, None], pushed).to(exact).mean())
    excess = float("inf")
    for scale in SCALES:
        d = scale * update
        changes = _losses_at(task, judges, d) - judges.losses.to(exact)
        if not bool(changes.isfinite().all()):
            verdict = Verdict(False, scale, float("inf"), float("inf"), excess)
            continue
        change = float(changes.mean())
        error = float(changes.std(correction=1)) / len(changes) ** 0.5
        if scale == 1:
            excess = change - slope - curvature / 2
        change += task.penalty.change(d)
        verdict = Verdict(change < 0, scale, change, error, excess)
        if verdict.accepted:
            break
    return verdict


def _losses_at(task: StepTask, judges: BatchQuadratic, d: Tensor) -> Tensor:
    network, batch = task.network, judges.batch
    selection = network.selection
    moved = selection.unflatten(selection.flatten(network.parameters) + d)
    with torch.no_grad():
        outputs = selection.call(moved, batch.inputs)
    return network.likelihood.per_sample_loss(outputs, batch.targets).to(accumulation_dtype(d))
