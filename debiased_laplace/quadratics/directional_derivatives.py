r"""Slope and curvature of the mean loss along given directions, with the values of every sample.

The quadratic of a set of samples B along a direction u is $\tfrac12 u^\top H_B u\, t^2 + u^\top g_B\, t + c_B$. Along
directions that were chosen without looking at B these are unbiased for the data that B was drawn from, and the spread
over samples gives their standard errors; along directions chosen on B itself they are not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic, batch_quadratic
from debiased_laplace.quadratics.given import (
    Curvature,
    batches_of,
    check_curvature,
    check_outputs,
    met,
    usable,
)
from debiased_laplace.quadratics.regularizer import Penalty, RegularizerLike, penalty_of

_TOGETHER = 128  # samples differentiated at once
_TANGENTS = 32  # directions at once


@dataclass(frozen=True, eq=False)
class DirectionalDerivatives:
    r"""Slopes $u_i^\top g$ and curvatures $u_i^\top H u_i$ along k directions, for every one of n samples.

    Attributes:
        per_sample_slopes: of each sample's loss, the regularizer's included where there is one.
        per_sample_curvatures: likewise.
    """

    per_sample_slopes: Float[Tensor, "n k"]
    per_sample_curvatures: Float[Tensor, "n k"]

    @property
    def n_samples(self) -> int:
        """Number n of samples."""
        return len(self.per_sample_slopes)

    @property
    def slopes(self) -> Float[Tensor, " k"]:
        """Mean slope of a sample, in double precision."""
        return _mean(self.per_sample_slopes)

    @property
    def curvatures(self) -> Float[Tensor, " k"]:
        """Mean curvature of a sample, in double precision."""
        return _mean(self.per_sample_curvatures)

    @property
    def slope_standard_errors(self) -> Float[Tensor, " k"]:
        """Of the mean slopes; infinite for a single sample, which says nothing about its spread."""
        return standard_errors(self.per_sample_slopes)

    @property
    def curvature_standard_errors(self) -> Float[Tensor, " k"]:
        """Of the mean curvatures; infinite for a single sample."""
        return standard_errors(self.per_sample_curvatures)

    def __repr__(self) -> str:
        n, k = self.per_sample_slopes.shape
        return f"DirectionalDerivatives({k} directions, {n} samples)"


def standard_errors(values: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Of the means over the samples, from the spread of the values (ddof 1); infinite for one sample."""
    n = len(values)
    values = values.to(accumulation_dtype(values))
    return values.std(0, correction=1) / n**0.5 if n > 1 else torch.full_like(values[0], float("inf"))


def directional_derivatives(
    model: Any,
    likelihood: str,
    data: Any,
    directions: Float[Tensor, "P k"],
    *,
    curvature: Curvature = "ggn",
    regularizer: RegularizerLike = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> DirectionalDerivatives:
    r"""Slopes and curvatures of the mean loss at the model's weights, along given directions; matrix-free.

    Cost: one forward-mode derivative per direction and batch (GGN, EF; a second derivative for the Hessian), memory
    n x k for the values of every sample.

    Args:
        model: evaluated in evaluation mode, and left as it was.
        likelihood: "classification", "regression" or "reward_modeling".
        data: (inputs, targets), a loader over a map-style data set, or a list of batches; each sample once.
        directions: columns over the flattened trainable parameters, in their order; they need not be orthonormal.
        curvature: "ggn", "ef" or "hessian".
        regularizer: a prior precision, a pair of precision and mean, or a `Regularizer`; its slope and curvature are
            added to every sample's. None: the likelihood alone.
        seed: of the loading.
        progress_bar: show progress.

    Returns:
        Values of each sample in the order of the data set's positions, and their means and standard errors.

    Raises:
        ValueError: if model, likelihood, samples, directions or regularizer cannot be used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325; Dangel, Tatzel & Hennig (2022), arXiv 2106.02624 (derivatives of every
        sample along directions).
    """
    with at_weights(model, seed):
        task = Task.given(model, likelihood, data, directions, curvature=curvature, regularizer=regularizer, seed=seed)
        U, penalty = task.directions, task.penalty
        found = derivatives_along(task.quadratics(progress_bar=progress_bar), U)
        return DirectionalDerivatives(
            (found.per_sample_slopes + penalty.slopes(U)).to(U.dtype),
            found.per_sample_curvatures + (U * penalty.products(U)).sum(0),
        )


def derivatives_along(quadratics: Iterable[BatchQuadratic], directions: Float[Tensor, "P k"]) -> DirectionalDerivatives:
    """Slopes and curvatures of the samples of some batches, without a regularizer; each batch is gone through once.

    Args:
        quadratics: of at least one batch.
        directions: a few dozen are pushed at a time.
    """
    slopes, curvatures = [], []
    for quadratic in quadratics:
        parts = [(U, quadratic.pushed(U)) for U in directions.split(_TANGENTS, dim=1)]
        slopes.append(torch.cat([quadratic.slopes(pushed) for _, pushed in parts], dim=1).detach())
        curvatures.append(torch.cat([quadratic.curvatures(U, pushed) for U, pushed in parts], dim=1).detach())
    return DirectionalDerivatives(torch.cat(slopes), torch.cat(curvatures))


def quadratics_of(
    network: Network,
    batches: Iterable[Batch],
    curvature: Curvature,
    *,
    derivatives: SecondDerivatives | None = None,
) -> Iterator[BatchQuadratic]:
    """The quadratics of a few samples at a time.

    Raises:
        ValueError: if outputs are not finite, or targets do not fit them.
    """
    for batch in batches:
        for some in usable(batch.to(network.like.device)).chunks(_TOGETHER):
            found = batch_quadratic(network, some, curvature, derivatives=derivatives)
            check_outputs(network, found.outputs, some)
            yield found


@dataclass(frozen=True, eq=False)
class Task:
    """Samples to go through once, at the weights of a network.

    Attributes:
        network: of all trainable weights.
        directions: in the dtype and on the device of the weights.
        penalty: the regularizer.
        curvature: of which kind.
        n_samples: to go through.
        batches: of them, to be read once.
        derivatives: second ones, where the curvature is the Hessian.
    """

    network: Network
    directions: Float[Tensor, "P k"]
    penalty: Penalty
    curvature: Curvature
    n_samples: int
    batches: Iterator[Batch]
    derivatives: SecondDerivatives | None

    @classmethod
    def given(
        cls,
        model: Any,
        likelihood: str,
        data: Any,
        directions: Tensor,
        *,
        curvature: Curvature,
        regularizer: RegularizerLike,
        seed: int,
    ) -> "Task":
        """What the user gave, checked.

        Raises:
            ValueError: if anything of it cannot be used.
        """
        check_curvature(curvature)
        n_samples, batches = batches_of(data, seed)
        head = next(batches)
        network, some = met(model, likelihood, head)
        like = network.like
        if not isinstance(directions, Tensor) or directions.ndim != 2 or len(directions) != len(like):
            came = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
            raise ValueError(
                f"Expected directions as columns of a ({len(like)}, k) tensor, one row for each trainable parameter; "
                f"got {came}."
            )
        U = directions.detach().to(like)
        if U.shape[1] == 0:
            raise ValueError("Expected at least one direction; got none.")
        if not bool(U.isfinite().all()):
            raise ValueError("Expected finite directions; got NaN or infinity.")
        penalty = penalty_of(regularizer, network.selection.vector(), n_samples)
        second = None
        if curvature == "hessian":
            second = SecondDerivatives(network.selection, network.parameters, network.likelihood, some)
        return cls(network, U, penalty, curvature, n_samples, _chained(some, batches), second)

    def quadratics(self, *, progress_bar: bool) -> Iterator[BatchQuadratic]:
        """Of a few samples at a time."""
        with tqdm(total=self.n_samples, disable=not progress_bar, desc="[Along directions]") as bar:
            for found in quadratics_of(self.network, self.batches, self.curvature, derivatives=self.derivatives):
                yield found
                bar.update(len(found))


def _chained(head: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield head
    yield from rest


def _mean(values: Tensor) -> Tensor:
    return values.to(accumulation_dtype(values)).mean(0)
