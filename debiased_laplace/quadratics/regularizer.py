r"""The regularizer of a mean loss: $r(\theta) = \tfrac12 (\theta - \mu_0)^\top P_0 (\theta - \mu_0) / (N \tau)$.

The prior of a Laplace posterior, on the scale of a mean over samples; $\tau = 1 / (\sigma^2 T)$ (conventions.md).
"""

from dataclasses import dataclass, replace
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import inner_product


@dataclass(frozen=True, eq=False)
class Penalty:
    r"""A quadratic with a diagonal Hessian, in the distance d from the weights: $v + d^\top g + \tfrac12 d^\top C d$.

    Attributes:
        value: v.
        gradient: g.
        curvature: the diagonal of C.
    """

    value: float
    gradient: Float[Tensor, " P"]
    curvature: Float[Tensor, " P"]

    @classmethod
    def none(cls, like: Float[Tensor, " P"]) -> "Penalty":
        """Nothing."""
        return cls(0.0, torch.zeros_like(like), torch.zeros_like(like))

    def damped(self, damping: float) -> "Penalty":
        r"""With $\tfrac12 \lambda \|d\|^2$ added."""
        return replace(self, curvature=self.curvature + damping)

    def gradient_at(self, d: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The gradient d away from the weights."""
        return self.gradient + self.curvature * d

    def curvature_along(self, u: Float[Tensor, " P"]) -> float:
        r"""$u^\top C u$."""
        return inner_product(u, self.curvature * u)

    def slopes(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, " k"]:
        """At the weights, along directions."""
        exact = accumulation_dtype(directions)
        return directions.mT.to(exact) @ self.gradient.to(exact)

    def products(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C times directions."""
        return self.curvature[:, None] * directions

    def change(self, d: Float[Tensor, " P"]) -> float:
        """By how much it grows from the weights to d away from them."""
        return inner_product(d, self.gradient + self.curvature * d / 2)


@dataclass(frozen=True, eq=False)
class Regularizer:
    r"""A Gaussian prior of the weights, as the regularizer of a mean loss.

    Attributes:
        prior_precision: diagonal of $P_0$: one number, or one for every trainable parameter; at least 0.
        prior_mean: $\mu_0$, likewise.
        n_data: N, the size of the data set that the likelihood stands for; None: the samples given.
        sigma_noise: σ of the observations; above 0.
        temperature: T; above 0.

    Raises:
        ValueError: if a number is out of range.
    """

    prior_precision: float | Tensor
    prior_mean: float | Tensor = 0.0
    n_data: int | None = None
    sigma_noise: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sigma_noise", "temperature"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0; got {value!r}.")
        if self.n_data is not None and self.n_data < 1:
            raise ValueError(f"n_data must be at least 1; got {self.n_data}.")

    def around(self, weights: Float[Tensor, " P"], n_samples: int) -> Penalty:
        """The regularizer as a quadratic around some weights.

        Args:
            weights: flat vector of the trainable parameters.
            n_samples: given; N where n_data does not say.

        Returns:
            The penalty, exact.

        Raises:
            ValueError: if precision or mean are of another length or not finite, the precision is negative, or n_data
                is below the number of samples.
        """
        if self.n_data is not None and self.n_data < n_samples:
            raise ValueError(f"n_data={self.n_data} is below the {n_samples} samples given, which are part of it.")
        precision = _diagonal(self.prior_precision, weights, "prior_precision")
        if bool((precision < 0).any()):
            raise ValueError(f"prior_precision must be at least 0; got {float(precision.min()):g}.")
        scale = self.sigma_noise**2 * self.temperature / (n_samples if self.n_data is None else self.n_data)
        away = weights - _diagonal(self.prior_mean, weights, "prior_mean")
        curvature = scale * precision
        return Penalty(inner_product(away, curvature * away) / 2, curvature * away, curvature)


RegularizerLike = Regularizer | float | Tensor | tuple[float | Tensor, float | Tensor] | None
"""A prior precision, a pair of precision and mean, or a `Regularizer` that says what else belongs to it."""


def penalty_of(regularizer: RegularizerLike, weights: Float[Tensor, " P"], n_samples: int) -> Penalty:
    """What the user gave as a quadratic around some weights.

    Raises:
        ValueError: as `Regularizer.around`, or if it is none of what a regularizer can be.
    """
    if regularizer is None:
        return Penalty.none(weights)
    if isinstance(regularizer, tuple) and len(regularizer) == 2:
        regularizer = Regularizer(*regularizer)
    elif isinstance(regularizer, int | float | Tensor) and not isinstance(regularizer, bool):
        regularizer = Regularizer(regularizer)
    if not isinstance(regularizer, Regularizer):
        raise ValueError(
            "Expected regularizer as a prior precision (a number, or one for each parameter), a pair of precision and "
            f"mean, or a Regularizer; got {regularizer!r}."
        )
    return regularizer.around(weights, n_samples)


def _diagonal(value: float | Tensor, like: Tensor, name: str) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.")
    found = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if found.numel() != 1 and found.shape != like.shape:
        raise ValueError(
            f"{name} must be one number or one for each of the {len(like)} trainable parameters; got shape "
            f"{tuple(found.shape)}."
        )
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} must be finite; got NaN or infinity.")
    return found.reshape(-1).expand(len(like))
