"""Likelihoods beyond labels and real targets: outputs, targets and densities of torch.distributions."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, Poisson

from debiased_laplace.curvature.likelihood import Likelihood

THRESHOLDS = (-1.0, 0.4, 1.5)


class Ordinal(Likelihood):
    """Ordered labels 0 to 3 by one latent number: P(y <= k) = sigmoid(t_k - f); with the least that one's own needs."""

    name = "ordinal"

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check for labels."""
        if outputs.shape[1] != 1 or targets.shape != (len(outputs),):
            raise ValueError("Expected one output, and labels (n,).")

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """Return those of all labels."""
        t = outputs.new_tensor(THRESHOLDS)
        below = torch.sigmoid(t - outputs)
        edges = torch.cat([torch.zeros_like(outputs), below, torch.ones_like(outputs)], dim=-1)
        return edges.diff(dim=-1).clamp_min(1e-30).log()

    def per_sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log probabilities."""
        return -self.log_probabilities(outputs).gather(-1, targets[:, None])[:, 0]

    def hessian(self, outputs: Tensor) -> Tensor:
        """Return the Fisher information: the expected square of the slope."""
        slopes = []
        t = outputs.new_tensor(THRESHOLDS)
        s = torch.sigmoid(t - outputs)
        density = -s * (1 - s)
        zeros = torch.zeros_like(outputs)
        slopes = torch.cat([zeros, density, zeros], dim=-1).diff(dim=-1)
        return (slopes.square() / self.log_probabilities(outputs).exp()).sum(-1)[..., None, None]

    def noise(self, n: int, n_outputs: int, generator: torch.Generator) -> Tensor:
        """Draw uniform numbers."""
        return torch.rand(n, 1, generator=generator, dtype=torch.float64)

    def drawn_targets(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return labels."""
        below = self.log_probabilities(outputs).exp().cumsum(-1)
        return (below < noise).sum(-1).clamp_max(len(THRESHOLDS))


def density(name: str, outputs: Tensor):
    """Distribution of the targets at outputs."""
    if name == "binary":
        return Bernoulli(logits=outputs)
    if name == "poisson":
        return Poisson(outputs.exp())
    m, s = outputs.chunk(2, dim=-1)
    return Normal(m, (s / 2).exp())


def some_targets(name: str, n: int, n_outputs: int, seed: int = 19) -> Tensor:
    """Targets of n samples."""
    g = torch.Generator().manual_seed(seed)
    if name == "ordinal":
        return torch.randint(4, (n,), generator=g)
    if name == "binary":
        return torch.randint(2, (n, n_outputs), generator=g).double()
    if name == "poisson":
        return torch.poisson(2 * torch.rand(n, n_outputs, generator=g).double(), generator=g)
    return torch.randn(n, n_outputs // 2, generator=g, dtype=torch.float64)
