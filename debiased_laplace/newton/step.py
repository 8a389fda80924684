"""Damped Newton step with directions and step lengths from different samples."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.checks import integer
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.data.sharing import batch_of_all
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import LinearMap
from debiased_laplace.newton.directional_steps import (
    DirectionalSteps,
    StepOutcome,
    StepStatus,
    directional_steps,
)
from debiased_laplace.newton.options import (
    StepMagnitudes,
    StepOptions,
    Stopping,
    check_n_data,
    checked_options,
)
from debiased_laplace.newton.split import disjoint_halves
from debiased_laplace.processes import Processes
from debiased_laplace.quadratics.batch_quadratic import (
    BatchQuadratic,
    batch_quadratic,
    ready_for_many_products,
    root_of,
)
from debiased_laplace.quadratics.drawn_rows import DrawnRowsQuadratic
from debiased_laplace.quadratics.preparation import Curvature, check_outputs, prepare_network_and_batch
from debiased_laplace.quadratics.regularizer import Penalty, Regularizer, RegularizerLike, as_penalty

_BY_SEVERITY: tuple[StepStatus, ...] = (
    "breakdown",
    "negative curvature",
    "iteration limit",
    "no held-out decrease",
    "converged",
)


@dataclass(frozen=True, eq=False)
class NewtonStep:
    """A Newton step and the passes it was computed from.

    Attributes:
        update: change of the flattened trainable parameters.
        loss: regularized mean loss of all samples at the weights.
        passes: one pass, or with cross-fitting two, whose updates are averaged.
    """

    update: Float[Tensor, " P"]
    loss: float
    passes: tuple[DirectionalSteps, ...]

    @property
    def directions(self) -> Float[Tensor, "P k"]:
        """Directions of all passes, one after another, as in all values per direction."""
        return torch.cat([steps.directions for steps in self.passes], dim=1)

    @property
    def step_lengths(self) -> Float[Tensor, " k"]:
        """Step lengths divided by the number of passes: the update is the directions times these."""
        return self._joined("step_lengths") / len(self.passes)

    @property
    def slopes(self) -> Float[Tensor, " k"]:
        """Slope along each direction, at the point that the steps before it have reached."""
        return self._joined("slopes")

    @property
    def slope_standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the slopes."""
        return self._joined("slope_standard_errors")

    @property
    def curvatures(self) -> Float[Tensor, " k"]:
        """Curvature along each direction, damping and regularizer included."""
        return self._joined("curvatures")

    @property
    def curvature_standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the curvatures."""
        return self._joined("curvature_standard_errors")

    @property
    def predicted_decreases(self) -> Float[Tensor, " k"]:
        """Expected decrease of the damped quadratic by each step, divided by the number of passes."""
        return self._joined("predicted_decreases") / len(self.passes)

    @property
    def predicted_decrease(self) -> float:
        """Sum of the expected decreases, a lower bound on that by the update."""
        # a convex function falls by at least as much at the average of two points as on average at them
        return float(self.predicted_decreases.sum())

    @property
    def reliability(self) -> float:
        """Ratio of the predicted decrease to the in-sample decrease; 1 without held-out samples."""
        if all(steps.outcome.derivatives == 0 for steps in self.passes):
            return 1.0
        in_sample = sum(float(steps.in_sample_decreases.sum()) for steps in self.passes) / len(self.passes)
        return self.predicted_decrease / in_sample if in_sample > 0 else 0.0

    @property
    def iterations(self) -> int:
        """Number of iterations of conjugate gradients in all passes."""
        return sum(sum(steps.iterations) for steps in self.passes)

    @property
    def products(self) -> int:
        """Number of curvature products in all passes."""
        return self.outcome.products

    @property
    def outcome(self) -> StepOutcome:
        """How the passes ended: the most severe status, all reasons, and the sums of the counts."""
        outcomes = [steps.outcome for steps in self.passes]
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

    def _joined(self, name: str) -> Tensor:
        """Return the values of all passes."""
        return torch.cat([getattr(steps, name) for steps in self.passes])


@leaves_as_found()
def newton_step(
    model: Any,
    likelihood: str | Likelihood,
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
    n_rows: int | None = None,
    seed: int = 0,
) -> NewtonStep:
    r"""Compute a damped Newton step at the model's weights by debiased conjugate gradients.

    The batch is split in two. Conjugate gradients on one half give directions; the other half, independent of them,
    gives the step along each and the stopping point. The step minimizes the quadratic model of the mean loss plus
    $\tfrac12 \lambda \|d\|^2$. Cost: a forward-mode derivative and a backward pass on one half per direction, and a
    forward-mode derivative on the other half per step; with held-out stopping, steps are fewer than directions. With
    `n_rows`, a forward pass over each half and a backward pass per row take the place of the products.

    Args:
        model: evaluated in evaluation mode, and left as it was; the update is not applied.
        likelihood: a name, or a likelihood of one's own, as of `DebiasedLaplace`.
        batch: (inputs, targets), (inputs, targets, sample_weights), or a mapping with them; the mean loss is weighted.
            Of several processes of torch.distributed, each gives its part, or all give the same.
        damping: λ, added to the mean curvature; at least 0.
        magnitudes: "held_out": directions from one half, steps from the other; "cross_fitted": both ways round, the two
            updates averaged; "same_batch": directions and steps from all samples, biased.
        shrinkage: shrink each step by the noise in its slope.
        max_iterations: largest number of directions of a pass.
        regularizer: a prior precision, a pair of precision and mean, or a `Regularizer`; None: no regularizer.
        curvature: "ggn", "ef" or "hessian"; with "hessian", a pass ends at a direction of negative curvature.
        preconditioner: for conjugate gradients: maps a vector r to M r, M close to the inverse of $H + \lambda I$.
        stopping: "held_out": take no step along a direction whose slope is not beyond three standard errors, and end a
            pass after two of these in a row; after a clear slope, the next step is along the sum of four times as many
            directions of conjugate gradients. "none": one step per direction, up to `max_iterations`. No effect with
            "same_batch".
        tolerance: residual, relative to the gradient, at which a pass has converged.
        n_data: size N of the training set that the batch is drawn from and whose mean loss the step is to lower: the
            samples of the directions then count with their share of N, the others for the rest. Also the N of the
            regularizer. None: the share is taken as 0, and the N of the regularizer is the size of the batch.
        n_rows: about how many rows (sample, output) to draw of each half, or of the batch, where the curvature is; the
            curvature is then theirs, and a product with it takes no pass over the network. Along directions that few
            rows miss it is the damping alone, which predicted decreases do not know: draw many more than there are
            outputs. The rows are held in memory. None: all of them.
        seed: of the split and of the draw.

    Returns:
        The step.

    Raises:
        ValueError: if an option is out of range, the batch is too small to be split, or model, likelihood or samples
            cannot be used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325; Martens (2010), Deep learning via Hessian-free optimization, ICML.
    """
    options = checked_options(
        damping,
        magnitudes,
        curvature,
        StepOptions(shrinkage, max_iterations, tolerance, stopping, preconditioner, n_rows),
    )
    damping, shrinkage, max_iterations = float(damping), options.shrinkage, options.max_iterations
    seed = integer(seed, "seed")
    processes = Processes.of()
    with processes.together(), at_weights(model):
        checked_batch = batch_of_all(as_batch(batch, DEFAULT_KEYS), processes).with_mean_weight_one()
        network, samples = prepare_network_and_batch(model, likelihood, checked_batch)
        network = network.shared(processes)
        if processes.several:
            given = (damping, magnitudes, curvature, replace(options, preconditioner=None), n_data, seed)
            processes.check_same(likelihood=network.likelihood.name, options=given)
        sets = index_sets(samples, magnitudes, seed, shrinkage=shrinkage)
        network = ready_for_many_products(network, samples.at(sets[0]), max_iterations)
        check_n_data(n_data, len(samples))
        of_prior = regularizer.n_data if isinstance(regularizer, Regularizer) else None
        if n_data is not None and of_prior not in (None, n_data):
            raise ValueError(f"Expected the same n_data twice; got {n_data}, and {of_prior} in the regularizer.")
        penalty = as_penalty(regularizer, network.selection.vector(), n_data or len(samples))
        second = None
        if curvature == "hessian":
            second = SecondDerivatives(network.selection, network.parameters, network.likelihood, samples)
        problem = StepProblem(network, penalty.damped(damping), curvature, second, n_data, seed)
        return step_on(problem, [samples.at(indices) for indices in sets], magnitudes, options)


@dataclass(frozen=True, eq=False)
class StepProblem:
    """The quadratic model that a step is to lower.

    Attributes:
        network: the network, at the weights of the expansion.
        penalty: damping and regularizer.
        curvature: "ggn", "ef" or "hessian".
        derivatives: second derivatives if the curvature is "hessian", else None.
        n_data: N; None: unknown or infinite.
        seed: of draws of rows.
    """

    network: Network
    penalty: Penalty
    curvature: Curvature
    derivatives: SecondDerivatives | None
    n_data: int | None
    seed: int = 0

    def quadratic(self, samples: Batch, n_rows: int | None) -> BatchQuadratic:
        """Return the quadratic models of samples; with the curvature of drawn rows, if their number is given."""
        if n_rows is None:
            return batch_quadratic(self.network, samples, self.curvature, derivatives=self.derivatives)
        root = root_of(self.curvature, self.network.likelihood)
        return DrawnRowsQuadratic(self.network, samples, root, n_rows=n_rows, seed=self.seed)


def step_on(problem: StepProblem, sets: list[Batch], magnitudes: StepMagnitudes, options: StepOptions) -> NewtonStep:
    """Compute a step from one set of samples (same_batch) or from two.

    Raises:
        ValueError: if outputs are not finite, targets are invalid for them, or the preconditioner returns the wrong
            shape.
    """
    quadratics = []
    for samples in sets:
        quadratic = problem.quadratic(samples, options.n_rows)
        check_outputs(problem.network, quadratic.outputs, samples)
        quadratics.append(quadratic)
    pairs = {
        "same_batch": [(0, 0)],
        "held_out": [(0, 1)],
        "cross_fitted": [(0, 1), (1, 0)],
    }[magnitudes]
    penalty, n_data = problem.penalty, problem.n_data
    passes = [directional_steps(quadratics[a], quadratics[b], penalty, options, n_data) for a, b in pairs]
    losses = torch.cat([q.losses for q in quadratics])
    update = sum((steps.update for steps in passes[1:]), passes[0].update) / len(passes)
    loss = float(losses.mean(dtype=accumulation_dtype(losses))) + penalty.value
    return NewtonStep(update, loss, tuple(passes))


def index_sets(samples: Batch, magnitudes: StepMagnitudes, seed: int, *, shrinkage: bool) -> list[Tensor]:
    """Return the positions of the one or two sets of samples that a step takes.

    Raises:
        ValueError: if there are too few samples for a slope and its standard error.
    """
    n = len(samples)
    if magnitudes == "same_batch":
        if n < 1 + shrinkage:
            raise ValueError(f"Expected at least 2 samples, for a slope and its standard error; got {n}.")
        return [torch.arange(n)]
    smallest = 3 if magnitudes == "held_out" else 4
    if n < smallest:
        raise ValueError(
            f"Expected at least {smallest} samples for magnitudes={magnitudes!r}, 2 of them for a slope and its "
            f"standard error; got {n}. magnitudes='same_batch' does not split them."
        )
    a, b = disjoint_halves(samples, seed)
    if len(b) < 2 or (magnitudes == "cross_fitted" and len(a) < 2):
        raise ValueError(
            f"Expected at least 2 samples in a half that gives steps; got halves of {len(a)} and {len(b)} samples. "
            "Equal samples stay in one half."
        )
    return [a, b]
