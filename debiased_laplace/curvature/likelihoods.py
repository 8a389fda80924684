r"""Likelihoods: the loss on the outputs, its gradient, and its second derivative and a root of that.

The loss of a sample is the negative log-likelihood up to constants, with unit noise: cross entropy for
classification, $\tfrac12 \|y - f\|^2$ for regression. Observation noise and temperature multiply it later.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot


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

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Each sample's loss, in nats."""
        ...

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        r"""Some columns of $S$, with $S S^\top = \Lambda = \partial^2 \ell / \partial f^2$."""
        ...

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:
        r"""$S^\top X$, without forming $S$."""
        ...

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""$\Lambda x$, without forming $\Lambda$."""
        ...

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        r"""$\partial \ell / \partial f$."""
        ...

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """What `drawn_targets` turns into targets, on the generator's device."""
        ...

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Targets drawn from the model's own likelihood."""
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

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Cross entropy."""
        return cross_entropy(outputs, targets.long(), reduction="none")

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        r"""$S = \mathrm{diag}(\sqrt p) - p \sqrt p^\top$, so that $S S^\top = \mathrm{diag}(p) - p p^\top$."""
        p = torch.softmax(outputs, dim=-1)
        chosen = p[..., columns].sqrt()
        unit = torch.eye(outputs.shape[-1], dtype=p.dtype, device=p.device)[:, columns]
        return (unit - p[..., :, None]) * chosen[..., None, :]

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:
        r"""$\sqrt p \circ (X - p^\top X)$."""
        p = torch.softmax(outputs, dim=-1)[..., None]
        return p.sqrt() * (X - (p * X).sum(-2, keepdim=True))

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""$p \circ (x - p^\top x)$."""
        p = torch.softmax(outputs, dim=-1)
        return p * (x - (p * x).sum(-1, keepdim=True))

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Probabilities minus the label's unit vector."""
        p = torch.softmax(outputs, dim=-1)
        return p - one_hot(targets.long(), outputs.shape[-1]).to(p.dtype)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:  # noqa: ARG002
        """One uniform number a sample."""
        return torch.rand(n, 1, generator=generator, dtype=torch.float64)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Labels by the inverse of the distribution function."""
        below = torch.softmax(outputs, dim=-1).to(noise.dtype).cumsum(-1)
        return (below < noise * below[..., -1:]).sum(-1).clamp_max(outputs.shape[-1] - 1)


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

    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Half the squared error."""
        return 0.5 * (outputs - targets.to(outputs.dtype)).square().sum(-1)

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        """Columns of the identity."""
        unit = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)[:, columns]
        return unit.expand(*outputs.shape[:-1], *unit.shape)

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:  # noqa: ARG002
        """X itself."""
        return X

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:  # noqa: ARG002
        """The vector itself."""
        return x

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        """Output minus target."""
        return outputs - targets.to(outputs.dtype)

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:
        """One standard normal number an output."""
        return torch.randn(n, n_outputs, generator=generator, dtype=torch.float64)

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:
        """Outputs plus unit noise."""
        return outputs + noise.to(outputs.dtype)


_LIKELIHOODS: dict[str, Likelihood] = {
    "classification": Classification(),
    "regression": Regression(),
    # the logits of a pair's two rewards are a binary classification: Bradley & Terry's likelihood
    "reward_modeling": Classification(),
}


def likelihood_named(name: str) -> Likelihood:
    """The likelihood of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {sorted(_LIKELIHOODS)}; got {name!r}.")
    return _LIKELIHOODS[name]
