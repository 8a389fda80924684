r"""Regularizer of a mean loss: $r(\theta) = \tfrac12 (\theta - \mu_0)^\top P_0 (\theta - \mu_0) / (N \tau)$.

It is the prior of a Laplace posterior on the scale of a mean over samples; $\tau = 1 / (\sigma^2 T)$ (conventions.md).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.checks import integer, one_positive
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import inner_product


@dataclass(frozen=True, eq=False)
class Penalty:
    r"""Quadratic with a diagonal Hessian, $v + d^\top g + \tfrac12 d^\top C d$, d being the distance from the weights.

    Attributes:
        value: v.
        gradient: g.
        curvature: diagonal of C.
    """

    value: float
    gradient: Float[Tensor, " P"]
    curvature: Float[Tensor, " P"]

    @classmethod
    def none(cls, like: Float[Tensor, " P"]) -> "Penalty":
        """Return a penalty of zero."""
        return cls(0.0, torch.zeros_like(like), torch.zeros_like(like))

    def damped(self, damping: float) -> "Penalty":
        r"""Return the penalty plus $\tfrac12 \lambda \|d\|^2$."""
        return replace(self, curvature=self.curvature + damping)

    def gradient_at(self, d: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """Return the gradient at distance d from the weights."""
        return self.gradient + self.curvature * d

    def curvature_along(self, u: Float[Tensor, " P"]) -> float:
        r"""Return $u^\top C u$."""
        return inner_product(u, self.curvature * u)

    def slopes(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, " k"]:
        """Return the slopes along directions at the weights, in double precision."""
        exact = accumulation_dtype(directions)
        return directions.mT.to(exact) @ self.gradient.to(exact)

    def products(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """Return C times the directions."""
        return self.curvature[:, None] * directions

    def change(self, d: Float[Tensor, " P"]) -> float:
        """Return the change of the penalty over a step d from the weights."""
        return inner_product(d, self.gradient + self.curvature * d / 2)


@dataclass(frozen=True, eq=False)
class Regularizer:
    r"""Gaussian prior of the weights as the regularizer of a mean loss.

    Attributes:
        prior_precision: diagonal of $P_0$: one number, or one for each trainable parameter; at least 0.
        prior_mean: $\mu_0$, likewise.
        n_data: N, the size of the data set that the likelihood stands for; None: the number of samples given.
        sigma_noise: standard deviation σ of the observations; above 0.
        temperature: T; above 0.

    Raises:
        ValueError: if n_data, sigma_noise or temperature is out of range.
    """

    prior_precision: float | Tensor
    prior_mean: float | Tensor = 0.0
    n_data: int | None = None
    sigma_noise: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        one_positive(self.sigma_noise, "sigma_noise")
        one_positive(self.temperature, "temperature")
        if self.n_data is not None:
            integer(self.n_data, "n_data", minimum=1)

    def around(self, weights: Float[Tensor, " P"], n_samples: int) -> Penalty:
        """Expand the regularizer around the weights, which is exact.

        Args:
            weights: flat vector of the trainable parameters.
            n_samples: number of samples given; N if `n_data` is None.

        Raises:
            ValueError: if precision or mean has the wrong length or is not finite, the precision is negative, or n_data
                is below the number of samples.
        """
        if self.n_data is not None:
            integer(self.n_data, "n_data", minimum=n_samples)
        precision = _diagonal(self.prior_precision, weights, "prior_precision")
        if bool((precision < 0).any()):
            raise ValueError(f"prior_precision must be at least 0; got {float(precision.min()):g}.")
        scale = self.sigma_noise**2 * self.temperature / (n_samples if self.n_data is None else self.n_data)
        distance = weights - _diagonal(self.prior_mean, weights, "prior_mean")
        curvature = scale * precision
        return Penalty(inner_product(distance, curvature * distance) / 2, curvature * distance, curvature)


RegularizerLike = Regularizer | float | Tensor | tuple[float | Tensor, float | Tensor] | None
"""A prior precision, a pair of precision and mean, or a `Regularizer`; None: no regularizer."""


def as_penalty(regularizer: RegularizerLike, weights: Float[Tensor, " P"], n_samples: int) -> Penalty:
    """Expand a regularizer, in any of its forms, around the weights.

    Raises:
        ValueError: if the regularizer has none of these forms, or as in `Regularizer.around`.
    """
    if regularizer is None:
        return Penalty.none(weights)
    if isinstance(regularizer, tuple) and len(regularizer) == 2:
        regularizer = Regularizer(*regularizer)
    elif isinstance(regularizer, int | float | Tensor) and not isinstance(regularizer, bool):
        regularizer = Regularizer(regularizer)
    if not isinstance(regularizer, Regularizer):
        raise ValueError(
            "regularizer must be a prior precision (a number, or one for each parameter), a pair of precision and "
            f"mean, or a Regularizer; got {regularizer!r}."
        )
    return regularizer.around(weights, n_samples)


def _diagonal(value: float | Tensor, like: Tensor, name: str) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.")
    diagonal = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if diagonal.numel() != 1 and diagonal.shape != like.shape:
        raise ValueError(
            f"{name} must be one number or one for each of the {len(like)} trainable parameters; got shape "
            f"{tuple(diagonal.shape)}."
        )
    if not bool(diagonal.isfinite().all()):
        raise ValueError(f"{name} must be finite; got NaN or infinity.")
    return diagonal.reshape(-1).expand(len(like))
