r"""Interface of likelihoods: the loss of a sample, its second derivative in the outputs, and what follows from them.

The loss of a sample is its negative log-likelihood, for a Gaussian up to constants and with unit noise. Observation
noise and temperature multiply it later. $\Lambda$ is the positive semi-definite curvature of the GGN: the second
derivative $\partial^2 \ell / \partial f^2$ in the outputs f, or its expectation over the targets.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import grad, vmap

_DRAWS = 2_000  # of targets, for moments that a likelihood does not give


class Likelihood(ABC):
    r"""Distribution of a sample's targets, given the outputs of a network.

    A likelihood of one's own has a `name`, and the methods `check`, `per_sample_loss` and `hessian`; for predictions of
    targets also `noise` and `drawn_targets`. All others have defaults.

    Attributes:
        name: shown, and kept in states.
        gives_probabilities: whether predictions are the probabilities of labels, as `probabilities` gives them.
    """

    name: str
    gives_probabilities: ClassVar[bool] = False

    @abstractmethod
    def check(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> None:
        """Check that the targets fit the outputs.

        Raises:
            ValueError: if they do not.
        """

    @abstractmethod
    def per_sample_loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, " n"]:
        """Return the loss of each sample, in nats."""

    @abstractmethod
    def hessian(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C C"]:
        r"""Return $\Lambda$, positive semi-definite."""

    def loss(self, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, ""]:
        """Return the sum of the samples' losses, in nats."""
        return self.per_sample_loss(outputs, targets).sum()

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        r"""Return columns of $S$, with $S S^\top = \Lambda$."""
        values, vectors = torch.linalg.eigh(self.hessian(outputs))
        return (vectors * values.clamp_min(0).sqrt()[..., None, :])[..., columns]

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:
        r"""Return $S^\top X$."""
        return self.root(outputs, slice(None)).mT @ X

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""Return $\Lambda x$."""
        return (self.hessian(outputs) @ x[..., None])[..., 0]

    def hessian_quadratics(self, outputs: Float[Tensor, "n C"], Q: Float[Tensor, "C k"] | None) -> Float[Tensor, "n k"]:
        r"""Return $q_i^\top \Lambda q_i$ of each sample; None: the identity."""
        H = self.hessian(outputs)
        return H.diagonal(dim1=-2, dim2=-1) if Q is None else ((H @ Q.to(H)) * Q.to(H)).sum(-2)

    def hessian_sum(self, outputs: Float[Tensor, "n C"], weights: Float[Tensor, " n"]) -> Float[Tensor, "C C"]:
        r"""Return $\sum_n w_n \Lambda_n$."""
        return torch.einsum("n,nij->ij", weights.to(outputs), self.hessian(outputs))

    def gradient(self, outputs: Float[Tensor, "*n C"], targets: Tensor) -> Float[Tensor, "*n C"]:
        r"""Return $\partial \ell / \partial f$."""

        def of_one(f: Tensor, y: Tensor) -> Tensor:
            return self.per_sample_loss(f[None], y[None])[0]

        gradient = grad(of_one)
        for _ in range(outputs.ndim - 1):
            gradient = vmap(gradient)
        found: Tensor = gradient(outputs, targets)
        return found

    def weights(self, targets: Tensor) -> Float[Tensor, " n"] | None:  # noqa: ARG002
        """Return the factor of each sample's loss that its target implies; None: 1."""
        return None

    def output_factors(self, outputs_per_sample: int, targets: Tensor) -> Float[Tensor, "n C"] | None:  # noqa: ARG002
        """Return the factor of each output's curvature; None: 1."""
        return None

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Float[Tensor, "n _"]:  # noqa: ARG002
        """Draw the noise that `drawn_targets` converts to targets, on the generator's device."""
        raise ValueError(
            f"The likelihood {self.name!r} draws no targets: it needs the methods noise and drawn_targets."
        )

    def drawn_targets(self, outputs: Float[Tensor, "*n C"], noise: Float[Tensor, "*n _"]) -> Tensor:  # noqa: ARG002
        """Return targets drawn from the likelihood at the outputs."""
        raise ValueError(
            f"The likelihood {self.name!r} draws no targets: it needs the methods noise and drawn_targets."
        )

    def probabilities(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:  # noqa: ARG002
        """Return the probabilities of the labels at the outputs."""
        raise ValueError(f"The likelihood {self.name!r} has no labels, whose probabilities outputs could give.")

    def target_moments(
        self, mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"]
    ) -> tuple[Float[Tensor, "n T"], Float[Tensor, "n T"], Float[Tensor, "n T"]]:
        """Return moments of the targets where outputs are Gaussian: mean, variance of the mean, mean of the variance.

        By default from draws, the same at every call.

        Args:
            mean: of the outputs.
            variance: of the outputs.
        """
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(_DRAWS, *mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        f = mean + variance.sqrt() * z
        one, other = (self.targets_at(f, generator).to(mean.dtype) for _ in range(2))
        # two targets of the same outputs have the covariance of their mean
        of_mean = ((one - one.mean(0)) * (other - other.mean(0))).sum(0).clamp_min(0) / (_DRAWS - 1)
        both = torch.cat([one, other])
        return both.mean(0), of_mean, (both.var(0) - of_mean).clamp_min(0)

    def targets_at(self, outputs: Float[Tensor, "S n C"], generator: torch.Generator) -> Shaped[Tensor, "S n T"]:
        """Draw targets of several functions at the same inputs; the generator is on the CPU."""
        S, n, C = outputs.shape
        noise = self.noise(S * n, C, generator).to(outputs.device)
        drawn = self.drawn_targets(outputs, noise.unflatten(0, (S, n)))
        return drawn[..., None] if drawn.ndim == 2 else drawn


class IndependentOutputs(Likelihood):
    r"""Likelihood whose $\Lambda$ is diagonal, because every output enters a factor of its own."""

    @abstractmethod
    def hessian_diagonal(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""Return the diagonal of $\Lambda$."""

    def hessian(self, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C C"]:
        r"""Return $\Lambda$."""
        return torch.diag_embed(self.hessian_diagonal(outputs))

    def root(self, outputs: Float[Tensor, "*n C"], columns: slice) -> Float[Tensor, "*n C r"]:
        r"""Return columns of $\Lambda^{1/2}$."""
        unit = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)[:, columns]
        return self.hessian_diagonal(outputs).sqrt()[..., None] * unit

    def root_transposed(self, outputs: Float[Tensor, "*n C"], X: Float[Tensor, "*n C k"]) -> Float[Tensor, "*n C k"]:
        r"""Return $\Lambda^{1/2} X$."""
        return self.hessian_diagonal(outputs).sqrt()[..., None] * X

    def hessian_product(self, outputs: Float[Tensor, "*n C"], x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        r"""Return $\Lambda x$."""
        return self.hessian_diagonal(outputs) * x

    def hessian_quadratics(self, outputs: Float[Tensor, "n C"], Q: Float[Tensor, "C k"] | None) -> Float[Tensor, "n k"]:
        r"""Return $\sum_c \Lambda_c Q_{ci}^2$ of each sample."""
        diagonal = self.hessian_diagonal(outputs)
        return diagonal if Q is None else diagonal @ Q.to(diagonal).square()

    def hessian_sum(self, outputs: Float[Tensor, "n C"], weights: Float[Tensor, " n"]) -> Float[Tensor, "C C"]:
        r"""Return $\sum_n w_n \Lambda_n$."""
        return torch.diag(weights.to(outputs) @ self.hessian_diagonal(outputs))


def by_output(targets: Tensor, outputs: Float[Tensor, "*n C"]) -> Float[Tensor, "*n T"]:
    """Return targets in the outputs' precision, those of a single one for each sample as a column."""
    # targets (n,) would be broadcast to (n, n)
    y = targets[..., None] if targets.ndim == outputs.ndim - 1 else targets
    return y.to(outputs.dtype)


def check_shape(name: str, n: int, n_targets: int, targets: Tensor) -> None:
    """Check that there are targets (n, T), or (n,) if T = 1.

    Raises:
        ValueError: otherwise.
    """
    if targets.shape != (n, n_targets) and (n_targets != 1 or targets.shape != (n,)):
        flat = f" or ({n},)" if n_targets == 1 else ""
        raise ValueError(
            f"Expected {name} targets of shape ({n}, {n_targets}){flat}; got shape {tuple(targets.shape)}."
        )
