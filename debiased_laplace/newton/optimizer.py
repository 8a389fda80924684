r"""Optimizer that takes debiased Newton steps, without a learning rate.

Each batch is split in three parts. Two give a cross-fitted step. The third is held out for the acceptance test and the
adaptation of the damping.

References:
    Martens (2010), Deep learning via Hessian-free optimization, ICML, §4.1 (adaptive damping);
    Tatzel et al. (2025), arXiv 2410.14325 (debiased steps).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from debiased_laplace.checks import function, integer, network, number, shown
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.data.sharing import batch_of_all
from debiased_laplace.linalg.conjugate_gradients import inner_product
from debiased_laplace.newton.acceptance import StepAcceptance, StepSamples, adapt_damping, backtrack
from debiased_laplace.newton.directional_steps import StepOutcome
from debiased_laplace.newton.options import StepMagnitudes, StepOptions, Stopping, check_n_data, checked_options
from debiased_laplace.newton.split import disjoint_split
from debiased_laplace.newton.step import StepProblem, step_on
from debiased_laplace.processes import Processes
from debiased_laplace.quadratics.batch_quadratic import batch_quadratic, ready_for_many_products
from debiased_laplace.quadratics.preparation import Curvature, check_outputs, differentiable_batch
from debiased_laplace.quadratics.regularizer import Penalty

Closure = Callable[[], Any]


@dataclass(frozen=True)
class StepReport:
    """Result of a step of the optimizer.

    Attributes:
        loss: regularized mean loss of the batch before the step.
        damping: damping of the step.
        acceptance: result of the acceptance test; None if the update is zero.
        outcome: how conjugate gradients ended.
        predicted_decrease: expected decrease of the damped quadratic by the whole step.
    """

    loss: float
    damping: float
    acceptance: StepAcceptance | None
    outcome: StepOutcome
    predicted_decrease: float

    @property
    def accepted(self) -> bool:
        """Whether the weights were changed."""
        return self.acceptance is not None and self.acceptance.accepted


class DebiasedNewton(Optimizer):
    r"""Debiased Newton steps with adaptive damping and an acceptance test on held-out samples.

    ```python
    optimizer = DebiasedNewton(model.parameters(), model, "classification")
    for inputs, targets in loader:
        loss = optimizer.step(lambda: (inputs, targets))
    ```

    The closure returns the batch, not a loss, because a step needs slopes and curvatures of each sample, at several
    points. The model is evaluated in evaluation mode, because dropout and batch statistics would make samples random
    and dependent on each other. Running statistics change only if the closure itself runs the model in training mode.

    Parameter groups may differ in `weight_decay`; $\tfrac12$ weight_decay $\|\theta\|^2$ is added to the mean loss.
    Parameters of the model in no group are left unchanged.

    Args:
        params: parameters of the model, or groups of them.
        model: the model.
        likelihood: a name, or a likelihood of one's own, as of `DebiasedLaplace`.
        damping: initial λ, above 0.
        magnitudes: as in `newton_step`.
        shrinkage: as in `newton_step`.
        max_iterations: as in `newton_step`.
        curvature: as in `newton_step`.
        stopping: as in `newton_step`, but "none" by default: the acceptance test guards against steps along noise, and
            the later directions together may lower the loss although no single slope is significant.
        judging_share: share of each batch that is held out for the acceptance test.
        weight_decay: for groups without their own.
        n_data: size N of the training set whose mean loss is to be lowered: the samples of a step then count with their
            share of N, in the step and in the acceptance test. None: that share is taken as 0.
        n_rows: as in `newton_step`; the acceptance test takes all rows.
        seed: of the splits of the batches and of the draws.

    Attributes:
        last_step: result of the last step; None before the first.

    Raises:
        ValueError: if an option is out of range, or a parameter does not belong to the model.
    """

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        damping: float = 0.1,
        magnitudes: StepMagnitudes = "cross_fitted",
        shrinkage: bool = True,
        max_iterations: int = 20,
        curvature: Curvature = "ggn",
        stopping: Stopping = "none",
        judging_share: float = 0.25,
        weight_decay: float = 0.0,
        n_data: int | None = None,
        n_rows: int | None = None,
        seed: int = 0,
    ):
        self._options = checked_options(
            damping, magnitudes, curvature, StepOptions(shrinkage, max_iterations, 1e-6, stopping, n_rows=n_rows)
        )
        number(damping, "damping", low=0, is_open=True)
        judging_share = number(judging_share, "judging_share", low=0, high=1, is_open=True)
        network(model)
        seed = integer(seed, "seed")
        self.model, self.likelihood = model, likelihood_named(likelihood)
        self.magnitudes, self.curvature, self.judging_share = magnitudes, curvature, judging_share
        check_n_data(n_data, 1)
        self.n_data, self.seed = None if n_data is None else int(n_data), seed
        self.last_step: StepReport | None = None
        self._network: Network | None = None
        try:
            super().__init__(params, {"weight_decay": weight_decay})
        except TypeError as error:
            raise ValueError(
                f"Expected params as parameters or groups of them; got {shown(params)} ({error})."
            ) from error
        self._weight_decays()
        self._memory.update(damping=float(damping), n_steps=0)

    @property
    def damping(self) -> float:
        """Damping λ of the next step."""
        return float(self._memory["damping"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: if its weight decay is negative or not finite.
        """
        decay = param_group.get("weight_decay", self.defaults["weight_decay"])
        number(decay, "weight_decay", low=0)
        super().add_param_group(param_group)
        self._network = None

    @leaves_as_found(moves=True)
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Compute a step, and take the largest factor of it that is accepted, if any.

        Args:
            closure: returns the batch, as (inputs, targets) or a mapping with both. It is called once. Of several
                processes of torch.distributed, each returns its part, or all return the same.

        Returns:
            The regularized mean loss of the batch before the step.

        Raises:
            ValueError: if there is no closure, or the batch cannot be used or is too small to be split.
        """
        if closure is None:
            raise ValueError(
                "Expected a closure that returns the batch, (inputs, targets): optimizer.step(lambda: (x, y)). A loss "
                "is not enough, because a step needs the curvature of each sample; got None."
            )
        processes = Processes.of()
        with processes.together():
            own = as_batch(function(closure, "closure")(), DEFAULT_KEYS)
        with processes.together(), at_weights(self.model):
            checked_batch = batch_of_all(own, processes).with_mean_weight_one()
            network, batch, sets, held_out = self._split(checked_batch)
            network = network.shared(processes)
            if processes.several:
                given = (self.damping, self.magnitudes, self.curvature, self._options, self.n_data, self.seed)
                processes.check_same(likelihood=network.likelihood.name, options=given)
            damping, penalty = self.damping, self._penalty(network)
            second = None
            if self.curvature == "hessian":
                second = SecondDerivatives(network.selection, network.parameters, network.likelihood, batch)
            problem = StepProblem(
                network, penalty, self.curvature, second, self.n_data, self.seed + self._memory["n_steps"]
            )
            damped = replace(problem, penalty=penalty.damped(damping))
            step = step_on(damped, sets, self.magnitudes, self._options)
            quadratic = batch_quadratic(network, held_out, self.curvature, derivatives=second)
            check_outputs(network, quadratic.outputs, held_out)
            acceptance = None
            if bool((step.update != 0).any()):
                step_samples = StepSamples(sets, step.loss - penalty.value)
                acceptance = backtrack(problem, quadratic, step_samples, step.update, damping)
            share = len(held_out) / len(batch)
            loss = (1 - share) * (step.loss - penalty.value) + share * float(quadratic.losses.mean()) + penalty.value
        if acceptance is not None and acceptance.accepted:
            self._move(network.selection, acceptance.scale * step.update)
        self.last_step = StepReport(loss, damping, acceptance, step.outcome, step.predicted_decrease)
        if acceptance is not None:
            damping = adapt_damping(damping, acceptance.relative_model_error)
        self._memory.update(damping=damping, n_steps=self._memory["n_steps"] + 1)
        return loss

    def _split(self, batch: Batch) -> tuple[Network, Batch, list[Batch], Batch]:
        """Return the network at the weights, the batch on its device, the sets of the step and the held-out set."""
        selection = self._selection()
        batch = differentiable_batch(batch.to(selection.vector().device))
        check_n_data(self.n_data, len(batch))
        rest = 1 - self.judging_share
        shares = (rest,) if self.magnitudes == "same_batch" else (rest / 2, rest / 2)
        *parts, held_out = disjoint_split(batch, (*shares, self.judging_share), self.seed + self._memory["n_steps"])
        if min(len(part) for part in (*parts, held_out)) < 2:
            raise ValueError(
                f"Expected at least 2 samples in each of {len(shares) + 1} parts of a batch; got {len(batch)} samples "
                f"and judging_share={self.judging_share}."
            )
        sets = [batch.at(part) for part in parts]
        if self._network is None:
            network = prepare_network(selection, self.likelihood, batch)
            self._network = ready_for_many_products(network, sets[0], self._options.max_iterations)
        parameters = {k: v.clone() for k, v in selection.unflatten(selection.vector()).items()}
        return replace(self._network, selection=selection, parameters=parameters), batch, sets, batch.at(held_out)

    def _selection(self) -> ParameterSelection:
        """Return the trainable parameters that are in a group."""
        trainable = ParameterSelection.all_weights(self.model)
        trainable.check_finite()
        decays = self._weight_decays()
        if set(trainable.names) <= decays.keys():
            return trainable
        start, indices = 0, []
        for name, size in zip(trainable.names, trainable.sizes, strict=True):
            if name in decays:
                indices.append(torch.arange(start, start + size))
            start += size
        if not indices:
            raise ValueError("Expected at least one parameter with requires_grad=True in the groups; got none.")
        return trainable.subnetwork(torch.cat(indices))

    def _weight_decays(self) -> dict[str, float]:
        """Return the weight decay of each parameter in the groups, by its name in the model."""
        model = getattr(self.model, "_orig_mod", self.model)
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError(f"Expected parameters of the model; got another one, of shape {tuple(p.shape)}.")
                decays[names[id(p)]] = float(group["weight_decay"])
        return decays

    def _penalty(self, network: Network) -> Penalty:
        """Return the weight decay as a quadratic around the weights."""
        weights = network.selection.flatten(network.parameters)
        decays = self._weight_decays()
        curvature = torch.cat(
            [
                weights.new_full((size,), decays[name])
                for name, size in zip(network.selection.names, network.selection.sizes, strict=True)
            ]
        )
        return Penalty(inner_product(weights, curvature * weights) / 2, curvature * weights, curvature)

    @property
    def _memory(self) -> dict[str, Any]:
        """State kept between steps: damping and number of steps."""
        # torch saves the state of parameters only
        memory: dict[str, Any] = self.state[next(p for group in self.param_groups for p in group["params"])]
        return memory

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the optimizer.

        Raises:
            ValueError: if it is not the state of a `DebiasedNewton`.
        """
        states = state_dict.get("state") if isinstance(state_dict, Mapping) else None
        entries = states.values() if isinstance(states, Mapping) else ()
        if not any(isinstance(state, Mapping) and {"damping", "n_steps"} <= state.keys() for state in entries):
            raise ValueError("Expected the state of a DebiasedNewton, with damping and n_steps; got one without them.")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # a prepared network holds functions, which cannot be copied; the next step prepares it again
        return {**self.__dict__, "_network": None}

    @torch.no_grad()
    def _move(self, selection: ParameterSelection, update: Tensor) -> None:
        """Add the update to the parameters."""
        parameters = dict(selection.model.named_parameters())
        for name, change in selection.unflatten(update).items():
            parameters[name].add_(change)
