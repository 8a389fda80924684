"""Likelihoods beyond labels and real targets: outputs, targets, densities of torch.distributions, fitted networks."""

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, Poisson
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.likelihood import Likelihood

N, PRIOR, TEMPERATURE = 30, 3.0, 0.7
OPTIONS = {"prior_precision": PRIOR, "temperature": TEMPERATURE}
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


def problem(name, n_outputs, n=N):
    """Return a network with inputs and targets."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, n_outputs)).double()
    X = torch.randn(n, 4, dtype=torch.float64)
    y = some_targets(name, n, n_outputs)
    # of one target, both shapes are used
    return model, X, y[:, 0] if name == "heteroscedastic" and n_outputs == 2 else y


def likelihood_of(name):
    """Return what the package is given."""
    return Ordinal() if name == "ordinal" else name


def fitted(name, n_outputs, **options):
    """Return a posterior with inputs and targets."""
    model, X, y = problem(name, n_outputs)
    la = DebiasedLaplace(model, likelihood_of(name), **{**OPTIONS, **options})
    la.fit(DataLoader(TensorDataset(X, y), batch_size=7))
    return la, X, y
