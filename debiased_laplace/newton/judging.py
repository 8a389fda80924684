r"""Whether a step is a good one, by samples that had no part in it.

The judges' losses are compared pairwise, sample by sample, before and after the step, so that what is common to both
cancels. Of N training samples, those that made the step count with their share of N, where N is known, and the judges
stand for the others. The judges' own quadratic along the step says what the step should have done to them. By how much
it is wrong is about the range in which quadratics can be trusted, and hardly about which samples the judges are; so it,
and not whether the step was accepted, adapts the damping.
"""

from dataclasses import dataclass
from math import inf, isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.newton.finite_population import Share
from debiased_laplace.newton.step import StepTask
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Shares of a step that are tried, until the judges accept one."""


@dataclass(frozen=True)
class Verdict:
    r"""What the judges say of a share of a step.

    Attributes:
        accepted: whether the training loss falls by more than the standard error.
        scale: the share of the step that was judged last.
        change: of the mean training loss by that share, estimated, the regularizer included; infinite where an output
            is not finite.
        standard_error: of the change.
        excess: by how much the whole step changes the judges' mean loss more than their own quadratic predicts.
        bend: $\tfrac12 d^\top (H + \lambda I) d$ of the judges, what a quadratic falls by at its minimum along d; the
            excess is large or small beside it.
        trials: shares that were tried.
    """

    accepted: bool
    scale: float
    change: float
    standard_error: float
    excess: float
    bend: float
    trials: int


@dataclass(frozen=True, eq=False)
class Makers:
    """The samples that made a step, where they are a known share of all.

    Attributes:
        samples: in their sets.
        loss: mean over them, at the weights, without the regularizer.
    """

    samples: list[Batch]
    loss: float


def judged(
    task: StepTask, judges: BatchQuadratic, makers: Makers, update: Float[Tensor, " P"], damping: float
) -> Verdict:
    """The largest share of a step that the judges accept, or the smallest that they refuse.

    Cost: a derivative along the step, and a forward pass for each share that is tried; of the makers too, where N is
    known.

    Args:
        task: whose penalty includes no damping.
        judges: samples that the step has not seen, at the weights; at least 2.
        makers: samples that made it.
        update: not zero.
        damping: of the step.

    Returns:
        The verdict.
    """
    pushed = judges.pushed(update[:, None])
    exact = accumulation_dtype(update)
    slope = float(judges.slopes(pushed).to(exact).mean())
    curvature = float(judges.curvatures(update[:, None], pushed).to(exact).mean())
    bend = (curvature + task.penalty.damped(damping).curvature_along(update)) / 2
    n_makers = sum(len(some) for some in makers.samples)
    share = Share.of(n_makers, len(judges), task.n_data)
    excess = float("inf")
    for trial, scale in enumerate(SCALES, start=1):
        d = scale * update
        changes = _losses_at(task, judges.batch, d) - judges.losses.to(exact)
        change = float(changes.mean())
        if share.own > 0:
            after = sum(float(_losses_at(task, some, d).sum()) for some in makers.samples) / n_makers
            change = share.own * (after - makers.loss) + (1 - share.own) * change
        if not isfinite(change):
            verdict = Verdict(False, scale, inf, inf, excess, bend, trial)
            continue
        if scale == 1:
            excess = float(changes.mean()) - slope - curvature / 2
        error = share.error * float(changes.std(correction=1)) / len(changes) ** 0.5
        change += task.penalty.change(d)
        verdict = Verdict(change < -error, scale, change, error, excess, bend, trial)
        if verdict.accepted:
            break
    return verdict


def _losses_at(task: StepTask, batch: Batch, d: Tensor) -> Tensor:
    network = task.network
    selection = network.selection
    moved = selection.unflatten(selection.flatten(network.parameters) + d)
    with torch.no_grad():
        outputs = selection.call(moved, batch.inputs)
    return network.likelihood.per_sample_loss(outputs, batch.targets).to(accumulation_dtype(d))
