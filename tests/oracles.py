"""What the package computes, computed again: dense, slow, one sample and one output at a time, in double precision.

Nothing here imports the package. The formulas are those of the method, written as they stand.
"""

from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a posterior is over, in their order."""
    return [p for p in model.parameters() if p.requires_grad]


def flat_parameters(model: nn.Module) -> Tensor:
    """Their values, one after another."""
    return torch.cat([p.detach().reshape(-1) for p in trainable(model)])


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Jacobian (C, P) of the outputs for one sample x, which comes without a batch dimension."""
    outputs = model(x[None])[0]
    rows = []
    for output in outputs:
        gradients = torch.autograd.grad(output, trainable(model), retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trainable(model), strict=True)]
        rows.append(torch.cat([piece.reshape(-1) for piece in pieces]))
    return torch.stack(rows)


def output_hessian(outputs: Tensor, likelihood: str) -> Tensor:
    """Second derivative (C, C) of one sample's loss with respect to its outputs."""
    C = len(outputs)
    if likelihood == "regression":
        return torch.eye(C, dtype=outputs.dtype)
    p = outputs.exp() / outputs.exp().sum()
    H = torch.empty(C, C, dtype=outputs.dtype)
    for i in range(C):
        for j in range(C):
            H[i, j] = p[i] * (1 - p[i]) if i == j else -p[i] * p[j]
    return H


def dense_ggn(model: nn.Module, X: Tensor, likelihood: str) -> tuple[list[Tensor], Tensor]:
    """GGN (P, P) of each sample, and their mean."""
    per_sample = []
    for x in X:
        J = dense_jacobian(model, x)
        outputs = model(x[None])[0].detach()
        per_sample.append(J.T @ output_hessian(outputs, likelihood) @ J)
    return per_sample, sum(per_sample) / len(per_sample)


def mean_of(per_sample: list[Tensor], indices: Tensor) -> Tensor:
    """Mean curvature of the samples at these positions."""
    total = torch.zeros_like(per_sample[0])
    for i in indices.tolist():
        total = total + per_sample[i]
    return total / len(indices)


@dataclass
class DenseLowRankPosterior:
    """Everything about a low-rank posterior, with nothing left implicit."""

    directions: Tensor  # (P, k), by decreasing curvature
    in_sample: Tensor  # (k,), curvature of the direction samples
    magnitudes: Tensor  # (k,), estimate of the full batch
    standard_errors: Tensor  # (k,)
    complement: Tensor  # (P, P), what is added outside the directions
    curvature: Tensor  # (P, P), the estimate of the mean curvature H
    posterior_precision: Tensor  # (P, P)

    @property
    def covariance(self) -> Tensor:
        """Inverse of the posterior precision."""
        return torch.linalg.inv(self.posterior_precision)


def dense_low_rank_posterior(
    model: nn.Module,
    X: Tensor,
    likelihood: str,
    direction_indices: Tensor,
    magnitude_indices: Tensor,
    *,
    n_data: int | None = None,
    magnitudes: str = "held_out",
    complement: str = "none",
    rank: int | None = None,
    threshold: float = 1e-6,
    prior_precision: float | Tensor = 1.0,
    sigma_noise: float = 1.0,
    temperature: float = 1.0,
    per_sample: list[Tensor] | None = None,
) -> DenseLowRankPosterior:
    """The estimator on given positions of X: `magnitudes` is "held_out" or "same_batch".

    For "same_batch" both index sets are read as one. `n_data` is N, by default the number of samples in X.
    `per_sample` saves the curvatures of all samples being computed again.
    """
    if per_sample is None:
        per_sample = dense_ggn(model, X, likelihood)[0]
    N = len(X) if n_data is None else n_data
    a, b = direction_indices, magnitude_indices
    if magnitudes == "same_batch":
        a = b = torch.unique(torch.cat([a, b]))

    values, vectors = torch.linalg.eigh(mean_of(per_sample, a))
    values, vectors = values.flip(0), vectors.flip(1)
    k = sum(1 for value in values if value > threshold * values[0])
    if rank is not None:
        k = min(k, rank)
    U, in_sample = vectors[:, :k], values[:k]
    P = len(values)

    if magnitudes == "same_batch":
        H = mean_of(per_sample, a)
        share_seen, unseen = 0.0, 1 - len(b) / N
    else:
        f = len(a) / N
        H = f * mean_of(per_sample, a) + (1 - f) * mean_of(per_sample, b)
        share_seen, unseen = f, 1 - len(b) / (N - len(a)) if len(a) < N else 0.0

    m, errors = [], []
    for i in range(k):
        u = U[:, i]
        m.append(u @ H @ u)
        of_samples = torch.stack([u @ per_sample[j] @ u for j in b.tolist()])
        errors.append((1 - share_seen) * (unseen / len(b)) ** 0.5 * of_samples.std(correction=1))
    m = torch.stack(m) if k else torch.zeros(0, dtype=X.dtype)
    errors = torch.stack(errors) if k else torch.zeros(0, dtype=X.dtype)

    outside = torch.eye(P, dtype=H.dtype) - U @ U.T
    if complement == "none":
        C = torch.zeros_like(H)
    elif complement == "isotropic":
        c = (torch.trace(H) - m.sum()) / (P - k) if k < P else 0.0
        C = c * outside
    elif complement == "diagonal":
        C = torch.diag(torch.diagonal(outside @ H @ outside))
    else:
        raise ValueError(complement)
    curvature = U @ torch.diag(m) @ U.T + C

    tau = 1 / (sigma_noise**2 * temperature)
    P0 = torch.diag(torch.as_tensor(prior_precision, dtype=H.dtype).expand(P))
    return DenseLowRankPosterior(U, in_sample, m, errors, C, curvature, N * tau * curvature + P0)


def dense_posterior_precision(
    H: Tensor,
    *,
    n_data: int,
    prior_precision: float | Tensor,
    sigma_noise: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """N tau H + P0 for a mean curvature H."""
    tau = 1 / (sigma_noise**2 * temperature)
    return n_data * tau * H + torch.diag(torch.as_tensor(prior_precision, dtype=H.dtype).expand(len(H)))


def dense_kl(
    precision: Tensor, reference: Tensor, mean: Tensor | None = None, reference_mean: Tensor | None = None
) -> float:
    """KL( N(mean, precision^-1) || N(reference_mean, reference^-1) ), in nats; equal means by default."""
    shift = torch.zeros(len(precision), dtype=precision.dtype)
    if mean is not None and reference_mean is not None:
        shift = reference_mean - mean
    trace = torch.trace(reference @ torch.linalg.inv(precision))
    log_dets = torch.linalg.slogdet(precision)[1] - torch.linalg.slogdet(reference)[1]
    return float(0.5 * (trace - len(precision) + shift @ reference @ shift + log_dets))


def dense_log_likelihood(
    model: nn.Module,
    X: Tensor,
    y: Tensor,
    likelihood: str,
    *,
    n_data: int | None = None,
    sigma_noise: float = 1.0,
    temperature: float = 1.0,
) -> float:
    """Log likelihood of N samples like these, one sample at a time.

    As in laplace-torch, temperature divides the loss and not the normalizer of the Gaussian.
    """
    tau = 1 / (sigma_noise**2 * temperature)
    N = len(X) if n_data is None else n_data
    total = 0.0
    for x, target in zip(X, y, strict=True):
        outputs = model(x[None])[0].detach()
        if likelihood == "classification":
            total += -tau * float(torch.logsumexp(outputs, 0) - outputs[int(target)])
        else:
            total += -tau * 0.5 * float((target - outputs) @ (target - outputs))
            total += -len(outputs) * log(sigma_noise * (2 * pi) ** 0.5)
    return total * N / len(X)


def dense_log_marginal_likelihood(
    log_likelihood: float,
    posterior_precision: Tensor,
    prior_precision: float | Tensor,
    mean: Tensor,
    prior_mean: float | Tensor = 0.0,
) -> float:
    """Laplace's approximation of the log evidence, in nats; `mean` is the trained parameters."""
    P0 = torch.as_tensor(prior_precision, dtype=mean.dtype).expand(len(mean))
    scatter = (P0 * (mean - prior_mean) ** 2).sum()
    log_det_ratio = torch.linalg.slogdet(posterior_precision)[1] - P0.log().sum()
    return log_likelihood - 0.5 * float(log_det_ratio + scatter)
