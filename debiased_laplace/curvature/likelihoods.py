r"""Likelihoods: the loss on the outputs, and a root of its second derivative.

The loss of a sample is the negative log-likelihood up to constants, with unit noise: cross entropy for
classification, $\tfrac12 \|y - f\|^2$ for regression. Observation noise and temperature multiply it later.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss


@runtime_checkable
class Likelihood(Protocol):
    """What curvature needs to know of a likelihood."""

    name: str

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Raise a ValueError if the targets do not fit the outputs."""
        ...

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """The sum of the samples' losses, in nats."""
        ...

    def root(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C C"]:
        r"""$S$ with $S S^\top = \partial^2 \ell / \partial f^2$."""
        ...


class Classification:
    """Softmax likelihood of integer class labels."""

    name = "classification"

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Labels are integers of shape (n,) in [0, C), C at least 2."""
        n, C = outputs.shape
        if C < 2:
            raise ValueError(f"Classification expects at least 2 outputs (logits); the model has {C}.")
        if targets.is_floating_point() or targets.shape != (n,):
            raise ValueError(
                f"Expected class labels as integers of shape ({n},); got {targets.dtype} of shape "
                f"{tuple(targets.shape)}."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= C:
            raise ValueError(f"Expected class labels between 0 and {C - 1} for {C} outputs; got {low} to {high}.")

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """Cross entropy, summed."""
        return cross_entropy(outputs, targets.long(), reduction="sum")

    def root(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C C"]:
        r"""$S = \mathrm{diag}(\sqrt p) - p \sqrt p^\top$, so that $S S^\top = \mathrm{diag}(p) - p p^\top$."""
        p = torch.softmax(outputs, dim=-1)
        return torch.diag_embed(p.sqrt()) - p[..., :, None] * p.sqrt()[..., None, :]


class Regression:
    """Gaussian likelihood with unit noise."""

    name = "regression"

    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Targets have the shape of the outputs."""
        if not targets.is_floating_point() or targets.shape != outputs.shape:
            raise ValueError(
                f"Expected regression targets as floats of the outputs' shape {tuple(outputs.shape)}; got "
                f"{targets.dtype} of shape {tuple(targets.shape)}."
            )

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """Half the squared error, summed."""
        return 0.5 * mse_loss(outputs, targets.to(outputs.dtype), reduction="sum")

    def root(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C C"]:
        """The identity."""
        return torch.diag_embed(torch.ones_like(outputs))


_LIKELIHOODS: dict[str, Likelihood] = {
    "classification": Classification(),
    "regression": Regression(),
}


def likelihood_named(name: str) -> Likelihood:
    """The likelihood of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {sorted(_LIKELIHOODS)}; got {name!r}.")
    return _LIKELIHOODS[name]
