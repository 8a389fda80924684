r"""An optimizer of debiased Newton steps, without a learning rate.

Every batch is divided in three. Two parts make a cross-fitted step; the third, the judges, have no part in it: they
accept it or a share of it, and adapt the damping by how far their loss is above their own quadratic at the step.

References:
    Martens (2010), Deep learning via Hessian-free optimization, ICML, §4.1 (damping that adapts);
    Tatzel et al. (2025), arXiv 2410.14325 (debiased steps).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.survey import meet_network
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS
from debiased_laplace.linalg.conjugate_gradients import inner_product
from debiased_laplace.newton.damping import adapted, wrong_by
from debiased_laplace.newton.directional_steps import StepOutcome
from debiased_laplace.newton.halves import draw_parts
from debiased_laplace.newton.judging import Makers, Verdict, judged
from debiased_laplace.newton.options import StepMagnitudes, StepOptions, Stopping, check_n_data, checked_options
from debiased_laplace.newton.step import StepTask, step_on
from debiased_laplace.quadratics.batch_quadratic import batch_quadratic, ready_for_many_products
from debiased_laplace.quadratics.given import Curvature, check_outputs, usable
from debiased_laplace.quadratics.regularizer import Penalty

Closure = Callable[[], Any]


@dataclass(frozen=True)
class StepReport:
    """What became of the last step.

    Attributes:
        loss: mean loss of the batch before it, the regularizer included.
        damping: it was computed with.
        verdict: of the judges; None where no half had a step to offer.
        outcome: how conjugate gradients ended.
        predicted_decrease: of the damped quadratic, by the samples that said the step.
    """

    loss: float
    damping: float
    verdict: Verdict | None
    outcome: StepOutcome
    predicted_decrease: float

    @property
    def accepted(self) -> bool:
        """Whether the weights were changed."""
        return self.verdict is not None and self.verdict.accepted


class DebiasedNewton(Optimizer):
    r"""Debiased Newton steps with adaptive damping and an acceptance test on held-out samples.

    ```python
    optimizer = DebiasedNewton(model.parameters(), model, "classification")
    for inputs, targets in loader:
        loss = optimizer.step(lambda: (inputs, targets))
    ```

    The closure returns the batch, not a loss: a step needs slopes and curvatures of every sample, at several points and
    of parts of the batch, which a number computed outside cannot give. The model is evaluated in evaluation mode, since
    dropout and batch statistics would make samples depend on chance and on each other; running statistics move only
    where the closure runs the model in training mode itself.

    Parameter groups may differ in `weight_decay`, $\tfrac12$ weight_decay $\|\theta\|^2$ added to the mean loss.
    Parameters of the model that are in no group stay as they are.

    Args:
        params: parameters of the model, or groups of them.
        model: that they belong to.
        likelihood: "classification", "regression" or "reward_modeling".
        damping: λ to begin with; adapted from then on.
        magnitudes: as in `newton_step`.
        shrinkage: likewise.
        max_iterations: likewise; a cap.
        curvature: likewise.
        stopping: likewise; "none" by default, since the judges and the damping guard against steps on noise, and later
            directions together lower the loss where no few of them do so beyond their error.
        judging_share: of every batch, for the judges.
        weight_decay: of groups that do not say their own.
        n_data: size N of the training set whose mean loss is to fall: the samples of a batch then count with their
            share of it, in the steps and before the judges. None: that share is taken as 0.
        seed: of the division of the batches.

    Attributes:
        last_step: what became of the last step; None before the first.

    Raises:
        ValueError: if an option is out of range, or a parameter does not belong to the model.
    """

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        likelihood: str,
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
        seed: int = 0,
    ):
        self._options = checked_options(
            damping, magnitudes, curvature, StepOptions(shrinkage, max_iterations, 1e-6, stopping)
        )
        if not damping > 0:
            raise ValueError(f"damping must be above 0 to be adapted; got {damping!r}.")
        if not (isinstance(judging_share, float) and 0 < judging_share < 1):
            raise ValueError(f"judging_share must lie between 0 and 1; got {judging_share!r}.")
        self.model, self.likelihood = model, likelihood_named(likelihood)
        self.magnitudes, self.curvature, self.judging_share = magnitudes, curvature, judging_share
        self.n_data, self.seed = n_data, seed
        check_n_data(n_data, 1)
        self.last_step: StepReport | None = None
        self._network: Network | None = None
        super().__init__(params, {"weight_decay": weight_decay})
        self._names()
        self._memory.update(damping=float(damping), n_steps=0)

    @property
    def damping(self) -> float:
        """λ of the next step."""
        return float(self._memory["damping"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: if its weight decay is negative or not finite.
        """
        decay = param_group.get("weight_decay", self.defaults["weight_decay"])
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not (isfinite(decay) and decay >= 0):
            raise ValueError(f"weight_decay must be a finite number of at least 0; got {decay!r}.")
        super().add_param_group(param_group)
        self._network = None

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One step, if the judges accept it.

        Args:
            closure: returns the batch, as (inputs, targets) or a mapping with both. It is called once.

        Returns:
            The mean loss of the batch before the step, the regularizer included.

        Raises:
            ValueError: if there is no closure, or the batch cannot be used or is too small to be divided.
        """
        if closure is None:
            raise ValueError(
                "Expected a closure that returns the batch, (inputs, targets): optimizer.step(lambda: (x, y)). A loss "
                "is not enough for a step that needs the curvature of every sample."
            )
        given = as_batch(closure(), DEFAULT_KEYS)
        with at_weights(self.model):
            network, batch, sets, judges = self._divided(given)
            damping, penalty = self.damping, self._penalty(network)
            second = None
            if self.curvature == "hessian":
                second = SecondDerivatives(network.selection, network.parameters, network.likelihood, batch)
            task = StepTask(network, penalty, self.curvature, second, self.n_data)
            damped = replace(task, penalty=penalty.damped(damping))
            step = step_on(damped, sets, self.magnitudes, self._options)
            quadratic = batch_quadratic(network, judges, self.curvature, derivatives=second)
            check_outputs(network, quadratic.outputs, judges)
            verdict = None
            if bool((step.update != 0).any()):
                verdict = judged(task, quadratic, Makers(sets, step.loss - penalty.value), step.update, damping)
            share = len(judges) / len(batch)
            loss = (1 - share) * (step.loss - penalty.value) + share * float(quadratic.losses.mean()) + penalty.value
        if verdict is not None and verdict.accepted:
            self._move(network.selection, verdict.scale * step.update)
        self.last_step = StepReport(loss, damping, verdict, step.outcome, step.predicted_decrease)
        if verdict is not None:
            damping = adapted(damping, wrong_by(verdict))
        self._memory.update(damping=damping, n_steps=self._memory["n_steps"] + 1)
        return loss

    def _divided(self, given: Batch) -> tuple[Network, Batch, list[Batch], Batch]:
        """The network at the present weights, and the batch in the parts that make the step and the judges."""
        selection = self._selection()
        batch = usable(given.to(selection.vector().device))
        check_n_data(self.n_data, len(batch))
        rest = 1 - self.judging_share
        shares = (rest,) if self.magnitudes == "same_batch" else (rest / 2, rest / 2)
        *parts, judging = draw_parts(batch, (*shares, self.judging_share), self.seed + self._memory["n_steps"])
        if min(len(part) for part in (*parts, judging)) < 2:
            raise ValueError(
                f"Expected at least 2 samples in each of {len(shares) + 1} parts of a batch; got {len(batch)} samples "
                f"and judging_share={self.judging_share}."
            )
        sets = [batch.at(part) for part in parts]
        if self._network is None:
            network = meet_network(selection, self.likelihood, batch)
            self._network = ready_for_many_products(network, sets[0], self._options.max_iterations)
        parameters = {k: v.clone() for k, v in selection.unflatten(selection.vector()).items()}
        return replace(self._network, selection=selection, parameters=parameters), batch, sets, batch.at(judging)

    def _selection(self) -> ParameterSelection:
        everything = ParameterSelection.all_weights(self.model)
        everything.check_finite()
        chosen = self._names()
        if set(everything.names) <= chosen.keys():
            return everything
        start, indices = 0, []
        for name, size in zip(everything.names, everything.sizes, strict=True):
            if name in chosen:
                indices.append(torch.arange(start, start + size))
            start += size
        if not indices:
            raise ValueError("Expected at least one parameter with requires_grad=True in the groups; got none.")
        return everything.subnetwork(torch.cat(indices))

    def _names(self) -> dict[str, float]:
        """The weight decay of every parameter in the groups, by its name in the model."""
        model = getattr(self.model, "_orig_mod", self.model)
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError(
                        f"Expected parameters of the model; got one of shape {tuple(p.shape)} that is not."
                    )
                decays[names[id(p)]] = float(group["weight_decay"])
        return decays

    def _penalty(self, network: Network) -> Penalty:
        weights = network.selection.flatten(network.parameters)
        decays = self._names()
        curvature = torch.cat(
            [
                weights.new_full((size,), decays[name])
                for name, size in zip(network.selection.names, network.selection.sizes, strict=True)
            ]
        )
        return Penalty(inner_product(weights, curvature * weights) / 2, curvature * weights, curvature)

    @property
    def _memory(self) -> dict[str, Any]:
        """What outlives a step, where `state_dict` looks for it."""
        found: dict[str, Any] = self.state[next(p for group in self.param_groups for p in group["params"])]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: if it is not that of a `DebiasedNewton`.
        """
        if not any({"damping", "n_steps"} <= state.keys() for state in state_dict["state"].values()):
            raise ValueError("Expected the state of a DebiasedNewton, with damping and n_steps; got another one's.")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # a network that has been met holds functions, which cannot be copied; the next step meets it again
        return {**self.__dict__, "_network": None}

    @torch.no_grad()
    def _move(self, selection: ParameterSelection, update: Tensor) -> None:
        parameters = dict(selection.model.named_parameters())
        for name, change in selection.unflatten(update).items():
            parameters[name].add_(change)
