r"""Roots of a curvature with respect to the outputs, $\Lambda_n = S_n S_n^\top$.

The GGN has as many columns as the model has outputs, the empirical Fisher one (the gradient of the loss), the
Monte-Carlo GGN one per drawn target. Rows $S_n^\top J_n$, columns $S_n^\top J_n u$ and products are computed from any
root in the same way.

References:
    Martens (2020), arXiv 1412.1193, §9 (the GGN as a Fisher matrix); Kunstner, Balles & Hennig (2019),
    arXiv 1905.12558 (what the empirical Fisher is not).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.linalg.accumulation import accumulation_dtype


class OutputRoot(ABC):
    """A root of the curvature with respect to the outputs, given targets or noise of each sample."""

    kind: str

    @abstractmethod
    def n_columns(self, n_outputs: int) -> int:
        """Return the number r of columns."""

    @abstractmethod
    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """Return the input of the root beside the outputs, (n, …): targets, noise of drawn targets, or unused zeros."""

    @abstractmethod
    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:
        """Return the chosen columns (C, r) of S for one sample's outputs (C,)."""

    @abstractmethod
    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:
        r"""Return $S^\top X$ (n, r, k) of a batch, for X (n, C, k)."""

    @abstractmethod
    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:
        r"""Return $S S^\top x$ (n, C) of a batch, for x (n, C)."""

    def quadratics(self, outputs: Tensor, targets_or_noise: Tensor, Q: Tensor | None) -> Tensor:
        r"""Return $q_i^\top S S^\top q_i$ (n, k) in double precision, for Q (C, k); None: the identity."""
        total = outputs.new_zeros(len(outputs), outputs.shape[1] if Q is None else Q.shape[1])
        total = total.to(accumulation_dtype(outputs))
        for S in self._blocks(outputs, targets_or_noise):
            rows = S.mT.to(total.dtype)
            total += (rows if Q is None else rows @ Q.to(total.dtype)).square().sum(1)
        return total

    def weighted_sum(self, outputs: Tensor, targets_or_noise: Tensor, weights: Tensor) -> Tensor:
        r"""Return $\sum_n w_n S_n S_n^\top$ (C, C) in double precision."""
        total = outputs.new_zeros(outputs.shape[1], outputs.shape[1]).to(accumulation_dtype(outputs))
        for S in self._blocks(outputs, targets_or_noise):
            rows = S.to(total.dtype).mT.flatten(0, 1)
            total += rows.T @ (rows * weights.to(rows).repeat_interleave(S.shape[2])[:, None])
        return total

    def _blocks(self, outputs: Tensor, targets_or_noise: Tensor) -> Iterator[Tensor]:
        """Yield columns (n, C, r) of the root, in blocks that bound the memory."""
        r = self.n_columns(outputs.shape[1])
        step = max(1, CHUNK_BYTES // max(1, outputs.numel() * outputs.element_size()))
        for start in range(0, r, step):
            S = self.columns(outputs, targets_or_noise, slice(start, min(start + step, r)))
            yield S.expand(len(outputs), -1, -1)


@dataclass(frozen=True)
class Identity(OutputRoot):
    """The root of the plain Jacobian."""

    kind: str = "Jacobian"

    def n_columns(self, n_outputs: int) -> int:
        """Return C."""
        return n_outputs

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return zeros, which are unused."""
        return targets.new_zeros(len(targets))

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:  # noqa: ARG002
        """Return unit vectors."""
        return torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)[:, chosen]

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:  # noqa: ARG002
        """Return X."""
        return X

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """Return x."""
        return x


@dataclass(frozen=True)
class GaussNewton(OutputRoot):
    """The second derivative of the loss with respect to the outputs."""

    likelihood: Likelihood
    kind: str = "GGN"

    def n_columns(self, n_outputs: int) -> int:
        """Return C."""
        return n_outputs

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return factors of the outputs' curvature; without any, zeros, which are unused."""
        factors = self.likelihood.output_factors(n_outputs, targets)
        return targets.new_zeros(len(targets)) if factors is None else factors

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:
        """Return columns of the likelihood's root."""
        S = self.likelihood.root(outputs, chosen)
        # blocks of the curvature have one factor each
        return S if targets_or_noise.ndim < outputs.ndim else S * targets_or_noise.to(S).sqrt()[..., None]

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:
        r"""Return $S^\top X$ by the likelihood's formula."""
        if targets_or_noise.ndim == outputs.ndim:
            X = X * targets_or_noise.to(X).sqrt()[..., None]
        return self.likelihood.root_transposed(outputs, X)

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:
        r"""Return $\Lambda x$ by the likelihood's formula."""
        found = self.likelihood.hessian_product(outputs, x)
        return found if targets_or_noise.ndim < outputs.ndim else found * targets_or_noise.to(found)

    def quadratics(self, outputs: Tensor, targets_or_noise: Tensor, Q: Tensor | None) -> Tensor:  # noqa: ARG002
        r"""Return $q_i^\top \Lambda q_i$ by the likelihood's formula."""
        return self.likelihood.hessian_quadratics(outputs.to(accumulation_dtype(outputs)), Q)

    def weighted_sum(self, outputs: Tensor, targets_or_noise: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        r"""Return $\sum_n w_n \Lambda_n$ by the likelihood's formula."""
        return self.likelihood.hessian_sum(outputs.to(accumulation_dtype(outputs)), weights)


@dataclass(frozen=True)
class EmpiricalFisher(OutputRoot):
    """The outer product of the loss's gradient at the sample's own target."""

    likelihood: Likelihood
    kind: str = "EF"

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return the targets."""
        return targets

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:
        """Return the gradient as the only column."""
        return self.likelihood.gradient(outputs, targets_or_noise)[..., None][..., chosen]

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:
        r"""Return $S^\top X$, one row per sample."""
        return self.columns(outputs, targets_or_noise, slice(None)).mT @ X

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:
        """Return the gradient times its inner product with x."""
        g = self.likelihood.gradient(outputs, targets_or_noise)
        return g * (g * x).sum(-1, keepdim=True)


@dataclass(frozen=True)
class MonteCarloGaussNewton(OutputRoot):
    """The mean outer product of gradients at targets drawn from the model, an unbiased estimate of the GGN.

    It costs one backward pass per draw instead of one per output.

    Attributes:
        likelihood: likelihood of the outputs.
        n_draws: number of targets drawn for each sample.
    """

    likelihood: Likelihood
    n_draws: int
    kind: str = "Monte-Carlo GGN"

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """Return the number of draws."""
        return self.n_draws

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """Return the noise (n, draws, …) of the drawn targets."""
        draws = [self.likelihood.noise(len(targets), n_outputs, generator) for _ in range(self.n_draws)]
        return torch.stack(draws, dim=1).to(targets.device)

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:
        """Return gradients at drawn targets, divided by the square root of the number of draws."""
        noise = targets_or_noise[..., chosen, :]
        at = outputs[..., None, :].expand(*noise.shape[:-1], outputs.shape[-1])
        gradients = self.likelihood.gradient(at, self.likelihood.drawn_targets(at, noise))
        return gradients.mT / self.n_draws**0.5

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:
        r"""Return $S^\top X$, one row per draw."""
        return self.columns(outputs, targets_or_noise, slice(None)).mT @ X

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:
        r"""Return $S S^\top x$ from the columns."""
        S = self.columns(outputs, targets_or_noise, slice(None))
        return (S @ (S.mT @ x[..., None]))[..., 0]
