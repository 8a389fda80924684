r"""A few random mixtures of a sample's rows in place of all of them, for traces.

$\mathrm{tr}(V^\top A V) = E \|A^{1/2} V^\top z\|^2$ for a vector z of random signs: one backward pass a mixture, where
the rows themselves take one for each output.

References:
    Hutchinson (1990), Comm. Statist. Simulation Comput. 19(2), doi 10.1080/03610919008812866.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace.curvature.likelihoods import Likelihood
from debiased_laplace.curvature.roots import OutputRoot


@dataclass(frozen=True)
class MixedGaussNewton(OutputRoot):
    r"""The GGN's root S with its columns mixed by random signs, $S Z / \sqrt m$: unbiased for the GGN.

    Attributes:
        likelihood: of the outputs.
        n_mixtures: m.
    """

    likelihood: Likelihood
    n_mixtures: int
    kind: str = "GGN"

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """One for each mixture."""
        return self.n_mixtures

    def side(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """The signs Z (n, C, m)."""
        shape = (len(targets), n_outputs, self.n_mixtures)
        return torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).to(targets.device)

    def columns(self, outputs: Tensor, side: Tensor, chosen: slice) -> Tensor:
        """Some mixtures."""
        signs = side[..., chosen].to(outputs.dtype)
        return self.likelihood.root(outputs, slice(None)) @ signs / self.n_mixtures**0.5

    def transposed(self, outputs: Tensor, side: Tensor, X: Tensor) -> Tensor:
        """By the likelihood's formula, mixed."""
        return side.to(X.dtype).mT @ self.likelihood.root_transposed(outputs, X) / self.n_mixtures**0.5

    def product(self, outputs: Tensor, side: Tensor, x: Tensor) -> Tensor:
        """Through the mixtures."""
        S = self.columns(outputs, side, slice(None))
        return (S @ (S.mT @ x[..., None]))[..., 0]
