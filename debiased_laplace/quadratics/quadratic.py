r"""Quadratic model of the regularized mean loss in the span of k directions.

$q(\theta_0 + U t; B) = c_B + t^\top U^\top g_B + \tfrac12 t^\top U^\top H_B U t$: a parabola along one direction, a
quadratic with a 2 x 2 curvature matrix in the plane of two. With an update d as the only column of U, its value after
the update is that at t = 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.quadratics.directional_derivatives import DirectionalProblem
from debiased_laplace.quadratics.preparation import Curvature
from debiased_laplace.quadratics.regularizer import RegularizerLike


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Quadratic function of k coefficients t, in double precision.

    Attributes:
        value: value at t = 0, the mean loss plus the regularizer.
        slopes: gradient at t = 0.
        curvature_matrix: Hessian, symmetric.

    Raises:
        ValueError: if the shapes disagree.
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
        """Curvature along each direction."""
        return self.curvature_matrix.diagonal()

    def __call__(self, t: Float[Tensor, "*m k"]) -> Float[Tensor, "*m"]:
        """Return the values at coefficients t."""
        t = t.to(self.slopes)
        return self.value + t @ self.slopes + ((t @ self.curvature_matrix) * t).sum(-1) / 2

    def along(self, i: int, steps: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return the values after steps along the i-th direction."""
        steps = steps.to(self.slopes)
        return self.value + steps * self.slopes[i] + steps.square() * self.curvature_matrix[i, i] / 2

    def grid(self, first: Float[Tensor, " m1"], second: Float[Tensor, " m2"]) -> Float[Tensor, "m1 m2"]:
        """Return the values in the plane of two directions, at all pairs of coefficients.

        Raises:
            ValueError: if the number of directions is not two.
        """
        if len(self.slopes) != 2:
            raise ValueError(f"Expected a quadratic of 2 directions for a grid; got one of {len(self.slopes)}.")
        return self(torch.stack(torch.meshgrid(first, second, indexing="ij"), dim=-1))

    def minimizer(self) -> Float[Tensor, " k"] | None:
        """Return the coefficients of smallest norm at the minimum; None if there is no minimum."""
        C, s = self.curvature_matrix, self.slopes
        values, vectors = torch.linalg.eigh(C)
        null = values.abs() <= 1e-12 * values.abs().max()
        coefficients = vectors.mT @ s
        if bool((values[~null] < 0).any()) or bool((coefficients[null].abs() > 1e-9 * s.norm()).any()):
            return None
        return -vectors[:, ~null] @ (coefficients[~null] / values[~null])


@leaves_as_found()
def quadratic_along(
    model: Any,
    likelihood: str | Likelihood,
    data: Any,
    directions: Float[Tensor, "P k"],
    *,
    curvature: Curvature = "ggn",
    regularizer: RegularizerLike = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> Quadratic:
    r"""Compute the quadratic model of the mean loss around the model's weights in the span of directions, matrix-free.

    Cost: k forward-mode derivatives per batch (Hessian: k products), all k at once; k is meant to be small.

    Args:
        model: evaluated in evaluation mode, and left as it was.
        likelihood: a name, or a likelihood of one's own, as of `DebiasedLaplace`.
        data: (inputs, targets), a loader over a map-style data set, or a list of batches; each sample once.
        directions: columns over the flattened trainable parameters; they need not be orthonormal.
        curvature: "ggn", "ef" or "hessian".
        regularizer: a prior precision, a pair of precision and mean, or a `Regularizer`; it joins value, slopes and
            curvature. None: the likelihood alone.
        seed: of the loading.
        progress_bar: show progress.

    Returns:
        The quadratic model.

    Raises:
        ValueError: if model, likelihood, samples, directions or regularizer cannot be used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325, §2.
    """
    with at_weights(model, seed):
        problem = DirectionalProblem.checked(
            model, likelihood, data, directions, curvature=curvature, regularizer=regularizer, seed=seed
        )
        U, penalty = problem.directions, problem.penalty
        exact = accumulation_dtype(U)
        k = U.shape[1]
        n, loss, slopes, matrix = 0.0, 0.0, U.new_zeros(k, dtype=exact), U.new_zeros(k, k, dtype=exact)
        for quadratic in problem.quadratics(progress_bar=progress_bar):
            pushed = quadratic.pushed(U)
            n += quadratic.batch.total_weight
            loss += float(quadratic.losses.to(exact).sum())
            slopes += quadratic.slopes(pushed).to(exact).sum(0)
            matrix += quadratic.curvature_matrix(U, pushed)
        if n == 0:
            raise ValueError("Expected positive sample_weights of at least one sample; got 0 for all of them.")
        matrix = matrix / n + U.mT.to(exact) @ penalty.products(U).to(exact)
        return Quadratic(
            loss / n + penalty.value,
            (slopes / n + penalty.slopes(U)).detach(),
            ((matrix + matrix.mT) / 2).detach(),
        )
