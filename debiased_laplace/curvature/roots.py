r"""Roots of a curvature with respect to the outputs: $\Lambda_n = S_n S_n^\top$, of which the rest of the house asks.

The GGN has as many columns as the model has outputs, the empirical Fisher one (the gradient of the loss), the
Monte-Carlo GGN one for each drawn target. Everything downstream, rows $S_n^\top J_n$, columns $S_n^\top J_n u$ and
products, is the same for all of them.

References:
    Martens (2020), arXiv 1412.1193, §9 (the GGN as a Fisher matrix); Kunstner, Balles & Hennig (2019),
    arXiv 1905.12558 (what the empirical Fisher is not).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace.curvature.likelihoods import Likelihood


class OutputRoot(ABC):
    """A root of the curvature with respect to the outputs, given what it needs to know of each sample."""

    kind: str

    @abstractmethod
    def n_columns(self, n_outputs: int) -> int:
        """Number r of columns."""

    @abstractmethod
    def side(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """What the root needs to know of each sample beside its outputs; (n, …)."""

    @abstractmethod
    def columns(self, outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:
        """Some columns (C, r) of S for one sample's outputs (C,)."""

    @abstractmethod
    def transposed(self, outputs: Tensor, side: Tensor, X: Tensor) -> Tensor:
        r"""$S^\top X$ (n, r, k) of a batch, for X (n, C, k)."""

    @abstractmethod
    def product(self, outputs: Tensor, side: Tensor, x: Tensor) -> Tensor:
        r"""$S S^\top x$ (n, C) of a batch, for x (n, C)."""


@dataclass(frozen=True)
class Identity(OutputRoot):
    """The root of the plain Jacobian."""

    kind: str = "Jacobian"

    def n_columns(self, n_outputs: int) -> int:
        """C."""
        return n_outputs

    def side(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Nothing."""
        return targets.new_zeros(len(targets))

    def columns(self, outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:  # noqa: ARG002
        """Unit vectors."""
        return torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)[:, chosen]

    def transposed(self, outputs: Tensor, side: Tensor, X: Tensor) -> Tensor:  # noqa: ARG002
        """X."""
        return X

    def product(self, outputs: Tensor, side: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """The vector itself."""
        return x


@dataclass(frozen=True)
class GaussNewton(OutputRoot):
    """The second derivative of the loss with respect to the outputs."""

    likelihood: Likelihood
    kind: str = "GGN"

    def n_columns(self, n_outputs: int) -> int:
        """C."""
        return n_outputs

    def side(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Nothing: the targets do not enter."""
        return targets.new_zeros(len(targets))

    def columns(self, outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:  # noqa: ARG002
        """Those of the likelihood's root."""
        return self.likelihood.root(outputs, chosen)

    def transposed(self, outputs: Tensor, side: Tensor, X: Tensor) -> Tensor:  # noqa: ARG002
        """By the likelihood's formula."""
        return self.likelihood.root_transposed(outputs, X)

    def product(self, outputs: Tensor, side: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """By the likelihood's formula."""
        return self.likelihood.hessian_product(outputs, x)


@dataclass(frozen=True)
class EmpiricalFisher(OutputRoot):
    """The outer product of the loss's gradient at the sample's own target."""

    likelihood: Likelihood
    kind: str = "EF"

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """One."""
        return 1

    def side(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The targets."""
        return targets

    def columns(self, outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:
        """The gradient."""
        return self.likelihood.gradient(outputs, side)[..., None][..., chosen]

    def transposed(self, outputs: Tensor, side: Tensor, X: Tensor) -> Tensor:
        """One row a sample."""
        return self.columns(outputs, side, slice(None)).mT @ X

    def product(self, outputs: Tensor, side: Tensor, x: Tensor) -> Tensor:
        """Gradient times its product with x."""
        g = self.likelihood.gradient(outputs, side)
        return g * (g * x).sum(-1, keepdim=True)


@dataclass(frozen=True)
class MonteCarloGaussNewton(OutputRoot):
    """The GGN as the mean outer product of gradients at targets that the model itself draws.

    Unbiased for the GGN, with one backward pass per draw instead of one per output.

    Attributes:
        likelihood: of the outputs.
        n_draws: targets drawn for each sample.
    """

    likelihood: Likelihood
    n_draws: int
    kind: str = "Monte-Carlo GGN"

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """One per draw."""
        return self.n_draws

    def side(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """The noise (n, draws, …) of the drawn targets."""
        draws = [self.likelihood.noise(len(targets), n_outputs, generator) for _ in range(self.n_draws)]
        return torch.stack(draws, dim=1).to(targets.device)

    def columns(self, outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:
        """Gradients at drawn targets, each over the root of the number of draws."""
        noise = side[..., chosen, :]
        at = outputs[..., None, :].expand(*noise.shape[:-1], outputs.shape[-1])
        gradients = self.likelihood.gradient(at, self.likelihood.drawn_targets(at, noise))
        return gradients.mT / self.n_draws**0.5

    def transposed(self, outputs: Tensor, side: Tensor, X: Tensor) -> Tensor:
        """One row per draw."""
        return self.columns(outputs, side, slice(None)).mT @ X

    def product(self, outputs: Tensor, side: Tensor, x: Tensor) -> Tensor:
        """Through the rows."""
        S = self.columns(outputs, side, slice(None))
        return (S @ (S.mT @ x[..., None]))[..., 0]
