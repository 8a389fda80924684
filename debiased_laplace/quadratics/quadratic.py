r"""The quadratic of a set of samples in the space that some directions span, the regularizer included.

$q(\theta_0 + U t; B) = c_B + t^\top U^\top g_B + \tfrac12 t^\top U^\top H_B U t$: along one direction a parabola, in
the plane of two a quadratic with a 2 x 2 curvature matrix, and for one update d as its column the value at t = 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.quadratics.directional_derivatives import Task
from debiased_laplace.quadratics.given import Curvature
from debiased_laplace.quadratics.regularizer import RegularizerLike


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A quadratic of k coefficients t, in double precision.

    Attributes:
        value: at t = 0, the mean loss of a sample with the regularizer's.
        slopes: of its k coordinates.
        curvature_matrix: symmetric.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    value: float
    slopes: Float[Tensor, " k"]
    curvature_matrix: Float[Tensor, "k k"]

    def __post_init__(self) -> None:
        if self.curvature_matrix.shape != (len(self.slopes), len(self.slopes)):
            raise ValueError(
                f"Expected a square curvature matrix for {len(self.slopes)} slopes; got "
                f"{tuple(self.curvature_matrix.shape)}."
            )

    @property
    def curvatures(self) -> Float[Tensor, " k"]:
        """Along each of the directions."""
        return self.curvature_matrix.diagonal()

    def __call__(self, t: Float[Tensor, "*m k"]) -> Float[Tensor, "*m"]:
        """Values at some coefficients."""
        t = t.to(self.slopes)
        return self.value + t @ self.slopes + ((t @ self.curvature_matrix) * t).sum(-1) / 2

    def along(self, i: int, steps: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Values so far along the i-th direction."""
        steps = steps.to(self.slopes)
        return self.value + steps * self.slopes[i] + steps.square() * self.curvature_matrix[i, i] / 2

    def grid(self, first: Float[Tensor, " m1"], second: Float[Tensor, " m2"]) -> Float[Tensor, "m1 m2"]:
        """Values in the plane of two directions, at every pair of coefficients.

        Raises:
            ValueError: if there are not exactly two directions.
        """
        if len(self.slopes) != 2:
            raise ValueError(f"A grid is of the plane of 2 directions; this quadratic has {len(self.slopes)}.")
        return self(torch.stack(torch.meshgrid(first, second, indexing="ij"), dim=-1))

    def minimizer(self) -> Float[Tensor, " k"] | None:
        """The coefficients at its minimum, the smallest where there are many; None where it has no minimum."""
        C, s = self.curvature_matrix, self.slopes
        values, vectors = torch.linalg.eigh(C)
        null = values.abs() <= 1e-12 * values.abs().max()
        coefficients = vectors.mT @ s
        if bool((values[~null] < 0).any()) or bool((coefficients[null].abs() > 1e-9 * s.norm()).any()):
            return None
        return -vectors[:, ~null] @ (coefficients[~null] / values[~null])


def quadratic_along(
    model: Any,
    likelihood: str,
    data: Any,
    directions: Float[Tensor, "P k"],
    *,
    curvature: Curvature = "ggn",
    regularizer: RegularizerLike = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> Quadratic:
    r"""The quadratic of a set of samples around the model's weights, in the space that directions span; matrix-free.

    Cost: k forward-mode derivatives of every batch (a Hessian: k products), all k at once; k is meant to be small.

    Args:
        model: evaluated in evaluation mode, and left as it was.
        likelihood: "classification", "regression" or "reward_modeling".
        data: (inputs, targets), a loader over a map-style data set, or a list of batches; each sample once.
        directions: columns over the flattened trainable parameters; they need not be orthonormal.
        curvature: "ggn", "ef" or "hessian".
        regularizer: a prior precision, a pair of precision and mean, or a `Regularizer`: part of value, slopes and
            curvature. None: the likelihood alone.
        seed: of the loading.
        progress_bar: show progress.

    Returns:
        The quadratic.

    Raises:
        ValueError: if model, likelihood, samples, directions or regularizer cannot be used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325, §2.
    """
    with at_weights(model, seed):
        task = Task.given(model, likelihood, data, directions, curvature=curvature, regularizer=regularizer, seed=seed)
        U, penalty = task.directions, task.penalty
        exact = accumulation_dtype(U)
        k = U.shape[1]
        loss, slopes, matrix = 0.0, U.new_zeros(k, dtype=exact), U.new_zeros(k, k, dtype=exact)
        for quadratic in task.quadratics(progress_bar=progress_bar):
            pushed = quadratic.pushed(U)
            loss += float(quadratic.losses.to(exact).sum())
            slopes += quadratic.slopes(pushed).to(exact).sum(0)
            matrix += quadratic.curvature_matrix(U, pushed)
        n = task.n_samples
        matrix = matrix / n + U.mT.to(exact) @ penalty.products(U).to(exact)
        return Quadratic(
            loss / n + penalty.value,
            (slopes / n + penalty.slopes(U)).detach(),
            ((matrix + matrix.mT) / 2).detach(),
        )
