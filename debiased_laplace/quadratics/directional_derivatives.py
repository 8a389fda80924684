r"""Slope and curvature of the mean loss along given directions, for each sample and on average.

The quadratic model of a set of samples B along a direction u is
$\tfrac12 u^\top H_B u\, t^2 + u^\top g_B\, t + c_B$. If u is independent of B, slope and curvature are unbiased for the
data that B was drawn from, and the spread over the samples gives their standard errors; if u was chosen on B, they are
biased.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.checks import boolean, integer, one_of, tensor
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic, batch_quadratic
from debiased_laplace.quadratics.preparation import (
    Curvature,
    check_outputs,
    differentiable_batch,
    load_batches,
    prepare_network_and_batch,
)
from debiased_laplace.quadratics.regularizer import Penalty, RegularizerLike, as_penalty

_SAMPLES_AT_ONCE = 128
_DIRECTIONS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class DirectionalDerivatives:
    r"""Slopes $u_i^\top g_n$ and curvatures $u_i^\top H_n u_i$ of n samples along k directions.

    Attributes:
        per_sample_slopes: slope of each sample's loss, plus that of the regularizer if there is one.
        per_sample_curvatures: curvature of each sample's loss, likewise.
    """

    per_sample_slopes: Float[Tensor, "n k"]
    per_sample_curvatures: Float[Tensor, "n k"]

    @property
    def n_samples(self) -> int:
        """Number n of samples."""
        return len(self.per_sample_slopes)

    @property
    def slopes(self) -> Float[Tensor, " k"]:
        """Mean slopes, in double precision."""
        return _mean(self.per_sample_slopes)

    @property
    def curvatures(self) -> Float[Tensor, " k"]:
        """Mean curvatures, in double precision."""
        return _mean(self.per_sample_curvatures)

    @property
    def slope_standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the mean slopes; infinite for a single sample."""
        return _standard_errors(self.per_sample_slopes)

    @property
    def curvature_standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the mean curvatures; infinite for a single sample."""
        return _standard_errors(self.per_sample_curvatures)

    def __repr__(self) -> str:
        n, k = self.per_sample_slopes.shape
        return f"DirectionalDerivatives({k} directions, {n} samples)"


def _standard_errors(values: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Return the standard errors of the means over samples (ddof 1); infinite for one sample."""
    n = len(values)
    values = values.to(accumulation_dtype(values))
    return values.std(0, correction=1) / n**0.5 if n > 1 else torch.full_like(values[0], float("inf"))


@leaves_as_found()
def directional_derivatives(
    model: Any,
    likelihood: str | Likelihood,
    data: Any,
    directions: Float[Tensor, "P k"],
    *,
    curvature: Curvature = "ggn",
    regularizer: RegularizerLike = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> DirectionalDerivatives:
    r"""Compute slopes and curvatures of the mean loss at the model's weights along given directions, matrix-free.

    Cost: one forward-mode derivative per direction and batch (GGN, EF; a second derivative for the Hessian), memory
    n x k for the values of all samples.

    Args:
        model: evaluated in evaluation mode, and left as it was.
        likelihood: a name, or a likelihood of one's own, as of `DebiasedLaplace`.
        data: (inputs, targets), a loader over a map-style data set, or a list of batches; each sample once.
        directions: columns over the flattened trainable parameters, in their order; they need not be orthonormal.
        curvature: "ggn", "ef" or "hessian".
        regularizer: a prior precision, a pair of precision and mean, or a `Regularizer`; its slope and curvature are
            added to those of each sample. None: the likelihood alone.
        seed: of the loading.
        progress_bar: show progress.

    Returns:
        Values of each sample in the order of the data set, with their means and standard errors.

    Raises:
        ValueError: if model, likelihood, samples, directions or regularizer cannot be used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325; Dangel, Tatzel & Hennig (2022), arXiv 2106.02624 (per-sample
        directional derivatives).
    """
    with at_weights(model, seed):
        problem = DirectionalProblem.checked(
            model, likelihood, data, directions, curvature=curvature, regularizer=regularizer, seed=seed
        )
        U, penalty = problem.directions, problem.penalty
        derivatives = derivatives_along(problem.quadratics(progress_bar=progress_bar), U)
        return DirectionalDerivatives(
            (derivatives.per_sample_slopes + penalty.slopes(U)).to(U.dtype),
            derivatives.per_sample_curvatures + (U * penalty.products(U)).sum(0),
        )


def derivatives_along(quadratics: Iterable[BatchQuadratic], directions: Float[Tensor, "P k"]) -> DirectionalDerivatives:
    """Compute slopes and curvatures of samples along directions, without a regularizer, in one pass over the batches.

    Args:
        quadratics: quadratic models of at least one batch.
        directions: columns; the memory is that of a few dozen at a time.
    """
    slopes, curvatures, weights = [], [], []
    for quadratic in quadratics:
        if quadratic.batch.weights is not None:
            weights.append(quadratic.batch.weights)
        parts = [(U, quadratic.pushed(U)) for U in directions.split(_DIRECTIONS_AT_ONCE, dim=1)]
        slopes.append(torch.cat([quadratic.slopes(pushed) for _, pushed in parts], dim=1).detach())
        curvatures.append(torch.cat([quadratic.curvatures(U, pushed) for U, pushed in parts], dim=1).detach())
    mean = float(torch.cat(weights).to(directions).mean()) if weights else 1.0
    if mean == 0:
        raise ValueError("Expected positive sample_weights of at least one sample; got 0 for all of them.")
    return DirectionalDerivatives(torch.cat(slopes) / mean, torch.cat(curvatures) / mean)


def quadratics_of(
    network: Network,
    batches: Iterable[Batch],
    curvature: Curvature,
    *,
    derivatives: SecondDerivatives | None = None,
) -> Iterator[BatchQuadratic]:
    """Yield quadratic models of at most 128 samples at a time.

    Raises:
        ValueError: if inputs, targets or outputs are not finite, or targets are invalid for the outputs.
    """
    for batch in batches:
        for chunk in differentiable_batch(batch.to(network.like.device)).chunks(_SAMPLES_AT_ONCE):
            quadratic = batch_quadratic(network, chunk, curvature, derivatives=derivatives)
            check_outputs(network, quadratic.outputs, chunk)
            yield quadratic


@dataclass(frozen=True, eq=False)
class DirectionalProblem:
    """Checked arguments of `directional_derivatives` and `quadratic_along`.

    Attributes:
        network: network of all trainable weights.
        directions: columns, in the dtype and on the device of the weights.
        penalty: the regularizer.
        curvature: "ggn", "ef" or "hessian".
        n_samples: number of samples.
        batches: iterator over the samples, for one pass.
        derivatives: second derivatives if the curvature is "hessian", else None.
    """

    network: Network
    directions: Float[Tensor, "P k"]
    penalty: Penalty
    curvature: Curvature
    n_samples: int
    batches: Iterator[Batch]
    derivatives: SecondDerivatives | None

    @classmethod
    def checked(
        cls,
        model: Any,
        likelihood: str | Likelihood,
        data: Any,
        directions: Tensor,
        *,
        curvature: Curvature,
        regularizer: RegularizerLike,
        seed: int,
    ) -> "DirectionalProblem":
        """Check and prepare the arguments of the user.

        Raises:
            ValueError: if one of them cannot be used.
        """
        one_of(curvature, Curvature, "curvature")
        n_samples, batches = load_batches(data, integer(seed, "seed"))
        network, first = prepare_network_and_batch(model, likelihood, next(batches))
        like = network.like
        if not isinstance(directions, Tensor) or directions.ndim != 2 or len(directions) != len(like):
            given = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
            raise ValueError(
                f"Expected directions as columns of a ({len(like)}, k) tensor, one row for each trainable parameter; "
                f"got {given}."
            )
        tensor(directions, "directions")
        U = directions.detach().to(like)
        if U.shape[1] == 0:
            raise ValueError("Expected at least one direction; got none.")
        if not bool(U.isfinite().all()):
            raise ValueError("Expected finite directions; got NaN or infinity.")
        penalty = as_penalty(regularizer, network.selection.vector(), n_samples)
        second = None
        if curvature == "hessian":
            second = SecondDerivatives(network.selection, network.parameters, network.likelihood, first)
        return cls(network, U, penalty, curvature, n_samples, chain([first], batches), second)

    def quadratics(self, *, progress_bar: bool) -> Iterator[BatchQuadratic]:
        """Yield quadratic models of a few samples at a time."""
        hidden = not boolean(progress_bar, "progress_bar")
        with tqdm(total=self.n_samples, disable=hidden, desc="[Along directions]") as bar:
            for quadratic in quadratics_of(self.network, self.batches, self.curvature, derivatives=self.derivatives):
                yield quadratic
                bar.update(len(quadratic))


def _mean(values: Tensor) -> Tensor:
    return values.to(accumulation_dtype(values)).mean(0)
