"""One damped Newton step whose directions and step lengths are not read off the same samples."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import LinearMap
from debiased_laplace.newton.directional_steps import (
    DirectionalSteps,
    StepOutcome,
    StepStatus,
    directional_steps,
)
from debiased_laplace.newton.halves import draw_halves
from debiased_laplace.newton.options import (
    StepMagnitudes,
    StepOptions,
    Stopping,
    check_n_data,
    checked_options,
)
from debiased_laplace.quadratics.batch_quadratic import batch_quadratic, ready_for_many_products
from debiased_laplace.quadratics.given import Curvature, check_outputs, met
from debiased_laplace.quadratics.regularizer import Penalty, Regularizer, RegularizerLike, penalty_of

_BY_SEVERITY: tuple[StepStatus, ...] = (
    "breakdown",
    "negative curvature",
    "iteration limit",
    "no held-out decrease",
    "converged",
)


@dataclass(frozen=True, eq=False)
class NewtonStep:
    """A step, and all that it rests on.

    Attributes:
        update: add it to the flattened trainable parameters.
        loss: mean loss of all samples at the weights, the regularizer included.
        passes: one, or with cross-fitting two, whose updates are averaged.
    """

    update: Float[Tensor, " P"]
    loss: float
    passes: tuple[DirectionalSteps, ...]

    @property
    def directions(self) -> Float[Tensor, "P k"]:
        """Of all passes, one after another; likewise everything else along directions."""
        return torch.cat([one.directions for one in self.passes], dim=1)

    @property
    def step_lengths(self) -> Float[Tensor, " k"]:
        """Each pass's share of the update: the update is the directions times these."""
        return self._of("step_lengths") / len(self.passes)

    @property
    def slopes(self) -> Float[Tensor, " k"]:
        """Along each direction, where the steps before it have led."""
        return self._of("slopes")

    @property
    def slope_standard_errors(self) -> Float[Tensor, " k"]:
        """Of the slopes."""
        return self._of("slope_standard_errors")

    @property
    def curvatures(self) -> Float[Tensor, " k"]:
        """Along each direction, damping and regularizer included."""
        return self._of("curvatures")

    @property
    def curvature_standard_errors(self) -> Float[Tensor, " k"]:
        """Of the curvatures."""
        return self._of("curvature_standard_errors")

    @property
    def predicted_decreases(self) -> Float[Tensor, " k"]:
        """Of the damped quadratic, by each step, averaged over the passes: their sum is that of the update or less."""
        return self._of("predicted_decreases") / len(self.passes)

    @property
    def predicted_decrease(self) -> float:
        """Of the damped quadratic by the update, at least: a convex function falls more at an average."""
        return float(self.predicted_decreases.sum())

    @property
    def reliability(self) -> float:
        """The predicted decrease as a share of what the directions' own samples promise; 1 if these say the steps."""
        if all(one.outcome.derivatives == 0 for one in self.passes):
            return 1.0
        promised = sum(float(one.in_sample_decreases.sum()) for one in self.passes) / len(self.passes)
        return self.predicted_decrease / promised if promised > 0 else 0.0

    @property
    def leading_curvature(self) -> float:
        """The largest curvature along a direction of unit length, damping and regularizer included; 0 without any."""
        if self.iterations == 0:
            return 0.0
        return float((self.curvatures / self.directions.square().sum(0, dtype=self.curvatures.dtype)).max())

    @property
    def iterations(self) -> int:
        """Of conjugate gradients, in all passes."""
        return sum(sum(one.iterations) for one in self.passes)

    @property
    def products(self) -> int:
        """With the curvature, of all passes."""
        return self.outcome.products

    @property
    def outcome(self) -> StepOutcome:
        """How the passes ended: the gravest status, every reason, and sums of what was counted."""
        outcomes = [one.outcome for one in self.passes]
        return StepOutcome(
            min((o.status for o in outcomes), key=_BY_SEVERITY.index),
            "; ".join(o.reason for o in outcomes),
            sum(o.products for o in outcomes),
            sum(o.derivatives for o in outcomes),
            sum(o.negative_curvatures for o in outcomes),
        )

    def __repr__(self) -> str:
        return (
            f"NewtonStep({len(self.update)} parameters, {self.iterations} iterations, "
            f"predicted decrease {self.predicted_decrease:.3g}, {self.outcome.status})"
        )

    def _of(self, name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in self.passes])


def newton_step(
    model: Any,
    likelihood: str,
    batch: Any,
    damping: float = 1e-3,
    magnitudes: StepMagnitudes = "cross_fitted",
    *,
    shrinkage: bool = True,
    max_iterations: int = 20,
    regularizer: RegularizerLike = None,
    curvature: Curvature = "ggn",
    preconditioner: LinearMap | None = None,
    stopping: Stopping = "held_out",
    tolerance: float = 1e-6,
    n_data: int | None = None,
    seed: int = 0,
) -> NewtonStep:
    r"""A damped Newton step at the model's weights, by conjugate gradients whose steps are debiased.

    The batch is split in two. Conjugate gradients on one half give directions; the other half, which they have never
    seen, says how far to go along each, and when to stop. The step minimizes the mean loss's quadratic with
    $\tfrac12 \lambda \|d\|^2$ added. Cost: a forward-mode derivative and a backward pass on one half for every
    direction, and a forward-mode derivative on the other for every step; with held-out stopping steps are fewer than
    directions.

    Args:
        model: evaluated in evaluation mode, and left as it was; the update is not applied.
        likelihood: "classification", "regression" or "reward_modeling".
        batch: (inputs, targets), or a mapping with both.
        damping: λ, added to the mean curvature; at least 0.
        magnitudes: "held_out": directions from one half, steps from the other; "cross_fitted": that, and again with the
            halves swapped, the two updates averaged; "same_batch": both from all samples, the biased way.
        shrinkage: shrink each step by how much of its slope is noise.
        max_iterations: directions of a pass at most; a cap, where "held_out" stopping has not ended it before.
        regularizer: a prior precision, a pair of precision and mean, or a `Regularizer`; None: none.
        curvature: "ggn", "ef" or "hessian"; a pass ends where the latter is not positive.
        preconditioner: of conjugate gradients: maps a vector r to M r, M close to the inverse of $H + \lambda I$.
        stopping: "held_out" takes no step along a direction whose slope is not beyond three standard errors, and ends
            a pass after two of those in a row; as long as slopes are clear, steps are along the sum of more and more
            directions of conjugate gradients. "none" goes on to the cap, a step along each direction. Of no effect on
            "same_batch".
        tolerance: a pass has converged at this residual, relative to the gradient.
        n_data: size N of the training set that the batch is drawn from, and to whose mean loss the step is fitted:
            the directions' own samples then count with their share of N, the others for the rest; also the N of the
            regularizer. None: the batch's share of N is taken as 0, and for the regularizer N is the batch.
        seed: of the split.

    Returns:
        The step.

    Raises:
        ValueError: if an option is out of range, the batch is too small to be split, or model, likelihood or samples
            cannot be used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325; Martens (2010), Deep learning via Hessian-free optimization, ICML.
    """
    options = checked_options(
        damping, magnitudes, curvature, StepOptions(shrinkage, max_iterations, tolerance, stopping, preconditioner)
    )
    given = as_batch(batch, DEFAULT_KEYS)
    with at_weights(model):
        network, samples = met(model, likelihood, given)
        sets = index_sets(samples, magnitudes, seed, shrinkage=shrinkage)
        network = ready_for_many_products(network, samples.at(sets[0]), max_iterations)
        check_n_data(n_data, len(samples))
        of_prior = regularizer.n_data if isinstance(regularizer, Regularizer) else None
        if n_data is not None and of_prior not in (None, n_data):
            raise ValueError(f"Expected one N; got n_data={n_data} and a regularizer with n_data={of_prior}.")
        penalty = penalty_of(regularizer, network.selection.vector(), n_data or len(samples))
        second = None
        if curvature == "hessian":
            second = SecondDerivatives(network.selection, network.parameters, network.likelihood, samples)
        task = StepTask(network, penalty.damped(damping), curvature, second, n_data)
        return step_on(task, [samples.at(indices) for indices in sets], magnitudes, options)


@dataclass(frozen=True, eq=False)
class StepTask:
    """Of what the quadratic is that a step is to lower.

    Attributes:
        network: at the weights.
        penalty: damping and regularizer.
        curvature: of which kind.
        derivatives: second ones, where the curvature is the Hessian.
        n_data: N; None: infinite.
    """

    network: Network
    penalty: Penalty
    curvature: Curvature
    derivatives: SecondDerivatives | None
    n_data: int | None


def step_on(task: StepTask, sets: list[Batch], magnitudes: StepMagnitudes, options: StepOptions) -> NewtonStep:
    """A step from one set of samples that does everything, or from two that take turns.

    Raises:
        ValueError: if outputs are not finite, or targets do not fit them.
    """
    quadratics = []
    for samples in sets:
        found = batch_quadratic(task.network, samples, task.curvature, derivatives=task.derivatives)
        check_outputs(task.network, found.outputs, samples)
        quadratics.append(found)
    pairs = {
        "same_batch": [(0, 0)],
        "held_out": [(0, 1)],
        "cross_fitted": [(0, 1), (1, 0)],
    }[magnitudes]
    passes = [directional_steps(quadratics[a], quadratics[b], task.penalty, options, task.n_data) for a, b in pairs]
    losses = torch.cat([q.losses for q in quadratics])
    update = sum((one.update for one in passes[1:]), passes[0].update) / len(passes)
    return NewtonStep(update, float(losses.mean(dtype=accumulation_dtype(losses))) + task.penalty.value, tuple(passes))


def index_sets(samples: Batch, magnitudes: StepMagnitudes, seed: int, *, shrinkage: bool) -> list[Tensor]:
    """Which samples do what.

    Raises:
        ValueError: if there are too few for a slope and its standard error.
    """
    n = len(samples)
    if magnitudes == "same_batch":
        if n < 1 + shrinkage:
            raise ValueError(f"Expected at least 2 samples for a slope and its standard error; got {n}.")
        return [torch.arange(n)]
    smallest = 3 if magnitudes == "held_out" else 4
    if n < smallest:
        raise ValueError(
            f"magnitudes={magnitudes!r} takes at least {smallest} samples: 2 of them say a step and its standard "
            f"error, others the direction; got {n}. magnitudes='same_batch' does not split."
        )
    a, b = draw_halves(samples, seed)
    if len(b) < 2 or (magnitudes == "cross_fitted" and len(a) < 2):
        raise ValueError(
            f"Expected at least 2 samples in a half that says steps; got halves of {len(a)} and {len(b)} samples, "
            "because equal samples stay in one half."
        )
    return [a, b]
