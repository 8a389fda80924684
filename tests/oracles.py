"""What the package computes, computed again: dense, slow, one sample and one output at a time, in double precision.

Nothing here imports the package. The formulas are those of the method, written as they stand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import ceil, exp, log, pi

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


def output_gradient(outputs: Tensor, target: Tensor, likelihood: str) -> Tensor:
    """Derivative (C,) of one sample's negative log-likelihood with respect to its outputs."""
    if likelihood == "regression":
        return outputs - target
    p = outputs.exp() / outputs.exp().sum()
    return torch.stack([p[i] - 1 if i == int(target) else p[i] for i in range(len(outputs))])


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


def eigenpairs_above(H: Tensor, threshold: float, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) above a fraction of the largest, in decreasing order, and their eigenvectors (P, k)."""
    values, vectors = torch.linalg.eigh(H)
    values, vectors = values.flip(0), vectors.flip(1)
    k = sum(1 for value in values if value > threshold * values[0]) if values[0] > 0 else 0
    k = k if rank is None else min(k, rank)
    return values[:k], vectors[:, :k]


def non_increasing(c: Tensor) -> Tensor:
    """The closest non-increasing sequence: the smallest, over where a block starts, of the largest mean of a block."""
    k = len(c)
    means = torch.zeros(k, k, dtype=c.dtype)  # of the entries from j to m
    for j in range(k):
        means[j, j:] = c[j:].cumsum(0) / torch.arange(1, k - j + 1)
    return torch.stack([means[: i + 1, i:].max(1).values.min() for i in range(k)]) if k else c


def fold_sets(samples: Tensor, folds: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of every fold: the positions of its samples, and those of all others."""
    return [(samples[folds == number], samples[folds != number]) for number in folds.unique()]


def pooled_over_folds(sizes: list[int], means: list[Tensor], deviations: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and spread of all samples: within the folds, and between them."""
    n = sum(sizes)
    mean = sum(size * m for size, m in zip(sizes, means, strict=True)) / n
    squares = torch.zeros_like(mean)
    for size, m, s in zip(sizes, means, deviations, strict=True):
        squares = squares + (size - 1) * s**2 + size * (m - mean) ** 2
    return mean, (squares / (n - 1)).sqrt()


@dataclass
class DenseFolds:
    """What folds say along the eigenvectors of the other folds, averaged by index and weighed by size."""

    values: Tensor  # (k,)
    deviations: Tensor  # (k,), of single samples
    residual: Tensor  # (P,), diagonal outside each fold's directions, in each fold's basis
    in_fold: list[Tensor]  # the values of every fold, as many as its others have directions


def dense_folds(
    per_sample: list[Tensor],
    samples: Tensor,
    folds: Tensor,
    k: int,
    *,
    threshold: float,
    basis_of: Callable[[Tensor], Tensor] | None = None,
    whitening_of: Callable[[Tensor], Tensor] | None = None,
) -> DenseFolds:
    """Fold by fold, one direction at a time; missing trailing values are the mean of the last 5 % of the others.

    `whitening_of` gives from the curvature of the others a matrix T, in whose coordinates T' H T everything is.
    """
    P = len(per_sample[0])
    sizes, means, deviations, in_fold, residual = [], [], [], [], torch.zeros(P, dtype=per_sample[0].dtype)
    for held, others in fold_sets(samples, folds):
        H_others, H_held = mean_of(per_sample, others), mean_of(per_sample, held)
        T = torch.eye(P, dtype=H_held.dtype) if whitening_of is None else whitening_of(H_others)
        H_others, H_held = T.T @ H_others @ T, T.T @ H_held @ T
        _, U = eigenpairs_above(H_others, threshold, k)
        c, s = [], []
        for u in U.T:
            of_samples = torch.stack([T @ u @ per_sample[j] @ T @ u for j in held.tolist()])
            c.append(of_samples.mean())
            s.append(of_samples.std(correction=1) if len(held) > 1 else torch.zeros_like(c[-1]))
        in_fold.append(torch.stack(c))
        tail = max(1, ceil(0.05 * len(c)))
        missing = k - len(c)
        c += [sum(c[-tail:]) / tail] * missing
        s += [sum(s[-tail:]) / tail] * missing
        outside = torch.eye(P, dtype=U.dtype) - U @ U.T
        K = torch.eye(P, dtype=U.dtype) if basis_of is None else basis_of(H_others)
        residual = residual + len(held) / len(samples) * torch.diagonal(K.T @ outside @ H_held @ outside @ K)
        sizes.append(len(held))
        means.append(torch.stack(c))
        deviations.append(torch.stack(s))
    return DenseFolds(*pooled_over_folds(sizes, means, deviations), residual, in_fold)


def dense_cross_fitted_posterior(
    per_sample: list[Tensor],
    samples: Tensor,
    folds: Tensor,
    *,
    n_data: int,
    complement: str = "none",
    rank: int | None = None,
    threshold: float = 1e-6,
    basis_of: Callable[[Tensor], Tensor] | None = None,
    prior_precision: float | Tensor = 1.0,
    sigma_noise: float = 1.0,
    temperature: float = 1.0,
) -> DenseLowRankPosterior:
    """Directions of all samples, magnitudes f lambda + (1 - f) c with the non-increasing c of the folds.

    `basis_of` gives the orthogonal matrix in whose coordinates a diagonal complement is, from a curvature.
    """
    H = mean_of(per_sample, samples)
    P, n = len(H), len(samples)
    f = n / n_data
    in_sample, U = eigenpairs_above(H, threshold, rank)
    k = len(in_sample)
    found = dense_folds(per_sample, samples, folds, k, threshold=threshold, basis_of=basis_of)
    m = (f * in_sample + (1 - f) * non_increasing(found.values)).clamp(min=0)
    outside = torch.eye(P, dtype=H.dtype) - U @ U.T
    if complement == "none":
        C = torch.zeros_like(H)
    elif complement == "isotropic":
        c = max(float(torch.trace(H) - m.sum()), 0.0) / (P - k) if k < P else 0.0
        C = c * outside
    else:
        K = torch.eye(P, dtype=H.dtype) if basis_of is None else basis_of(H)
        own = torch.diagonal(K.T @ outside @ H @ outside @ K)
        C = K @ torch.diag((f * own + (1 - f) * found.residual).clamp(min=0)) @ K.T
    curvature = U @ torch.diag(m) @ U.T + C
    precision = dense_posterior_precision(
        curvature,
        n_data=n_data,
        prior_precision=prior_precision,
        sigma_noise=sigma_noise,
        temperature=temperature,
    )
    errors = ((1 - f) / n) ** 0.5 * found.deviations
    return DenseLowRankPosterior(U, in_sample, m, errors, C, curvature, precision)


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


def sample_loss(outputs: Tensor, target: Tensor, likelihood: str) -> Tensor:
    """Negative log-likelihood of one sample with outputs (C,), up to constants, with unit noise."""
    if likelihood == "regression":
        return 0.5 * (target - outputs) @ (target - outputs)
    return torch.logsumexp(outputs, 0) - outputs[int(target)]


def dense_gradients(model: nn.Module, X: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """Gradient of each sample's loss, (n, P)."""
    rows = []
    for x, target in zip(X, y, strict=True):
        loss = sample_loss(model(x[None])[0], target, likelihood)
        gradients = torch.autograd.grad(loss, trainable(model), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


def dense_empirical_fisher(model: nn.Module, X: Tensor, y: Tensor, likelihood: str) -> tuple[list[Tensor], Tensor]:
    """Empirical Fisher (P, P) of each sample, and their mean."""
    per_sample = [torch.outer(g, g) for g in dense_gradients(model, X, y, likelihood)]
    return per_sample, sum(per_sample) / len(per_sample)


def dense_hessian(model: nn.Module, X: Tensor, y: Tensor, likelihood: str) -> tuple[list[Tensor], Tensor]:
    """Hessian (P, P) of each sample's loss, one row for each entry of its gradient, and their mean."""
    parameters, per_sample = trainable(model), []
    P = sum(p.numel() for p in parameters)
    for x, target in zip(X, y, strict=True):
        loss = sample_loss(model(x[None])[0], target, likelihood)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        if not gradient.requires_grad:
            per_sample.append(gradient.new_zeros(P, P))
            continue
        entries = torch.eye(P, dtype=gradient.dtype)
        rows = torch.autograd.grad(gradient, parameters, entries, is_grads_batched=True, allow_unused=True)
        blocks = [torch.zeros(P, *p.shape).to(p) if r is None else r for r, p in zip(rows, parameters, strict=True)]
        per_sample.append(torch.cat([block.reshape(P, -1) for block in blocks], dim=1))
    return per_sample, sum(per_sample) / len(per_sample)


def dense_kronecker_product(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product, block by block."""
    return torch.cat([torch.cat([entry * right for entry in row], dim=1) for row in left], dim=0)


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Square matrices along the diagonal of one."""
    n = sum(len(block) for block in blocks)
    matrix = torch.zeros(n, n, dtype=blocks[0].dtype)
    start = 0
    for block in blocks:
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix


def partial_traces(block: Tensor, o: int, i: int) -> tuple[Tensor, Tensor]:
    """Partial traces (o, o) and (i, i) of the curvature of an (o, i) matrix that is flattened row by row."""
    left, right = torch.zeros(o, o, dtype=block.dtype), torch.zeros(i, i, dtype=block.dtype)
    for r in range(o):
        for s in range(o):
            left[r, s] = sum(block[r * i + c, s * i + c] for c in range(i))
    for c in range(i):
        for d in range(i):
            right[c, d] = sum(block[r * i + c, r * i + d] for r in range(o))
    return left, right


def dense_kronecker_basis(model: nn.Module, H: Tensor) -> Tensor:
    """The basis (P, P) of a curvature: eigenvectors of the partial traces, by decreasing eigenvalue.

    Matrix-shaped parameters have two sides, biases of linear layers and convolutions one, and all others their axes.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    biases = {id(layer.bias) for layer in layers}
    blocks, start = [], 0
    for p in trainable(model):
        block = H[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        if p.ndim >= 2:
            left, right = partial_traces(block, len(p), p.numel() // len(p))
            blocks.append(
                dense_kronecker_product(
                    torch.linalg.eigh(left)[1].flip(1),
                    torch.linalg.eigh(right)[1].flip(1),
                )
            )
        elif id(p) in biases:
            blocks.append(torch.linalg.eigh(block)[1].flip(1))
        else:
            blocks.append(torch.eye(p.numel(), dtype=H.dtype))
    return block_diagonal(blocks)


@dataclass
class DenseKroneckerPosterior:
    """Everything about a Kronecker posterior with exact magnitudes."""

    in_sample: Tensor  # (P,), curvature of the direction samples along the basis
    magnitudes: Tensor  # (P,), estimate of the full batch
    standard_errors: Tensor  # (P,)
    curvature: Tensor  # (P, P)
    posterior_precision: Tensor  # (P, P)


def dense_kronecker_posterior(
    basis: Tensor,
    per_sample: list[Tensor],
    direction_indices: Tensor,
    magnitude_indices: Tensor | None,
    *,
    n_data: int,
    prior_precision: float | Tensor = 1.0,
    sigma_noise: float = 1.0,
    temperature: float = 1.0,
) -> DenseKroneckerPosterior:
    """Curvature along each column k of the basis, one at a time; biased where there are no magnitude samples.

    Negative values, which a Hessian can have, are 0.
    """
    H_a = mean_of(per_sample, direction_indices)
    n_a = len(direction_indices)
    if magnitude_indices is None:
        H, seen_by, share, unseen = H_a, direction_indices, 0.0, 1 - n_a / n_data
    else:
        share, seen_by = n_a / n_data, magnitude_indices
        H = share * H_a + (1 - share) * mean_of(per_sample, magnitude_indices)
        unseen = 1 - len(magnitude_indices) / (n_data - n_a)
    in_sample, magnitudes, errors = [], [], []
    for k in basis.T:
        of_samples = torch.stack([k @ per_sample[j] @ k for j in seen_by.tolist()])
        in_sample.append(k @ H_a @ k)
        magnitudes.append((k @ H @ k).clamp(min=0))
        errors.append((1 - share) * (unseen / len(seen_by)) ** 0.5 * of_samples.std(correction=1))
    m = torch.stack(magnitudes)
    curvature = basis @ torch.diag(m) @ basis.T
    precision = dense_posterior_precision(
        curvature,
        n_data=n_data,
        prior_precision=prior_precision,
        sigma_noise=sigma_noise,
        temperature=temperature,
    )
    return DenseKroneckerPosterior(torch.stack(in_sample), m, torch.stack(errors), curvature, precision)


def averaged_over_null_blocks(model: nn.Module, H: Tensor, values: Tensor) -> Tensor:
    """Values (P,) along the Kronecker basis of a curvature, one mean where vectors are anybody's: where H has nothing.

    A row (or column) of a parameter's matrix of values counts as null where its side's eigenvalue is.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    biases = {id(layer.bias) for layer in layers}
    averaged, start = [], 0
    for p in trainable(model):
        block = H[start : start + p.numel(), start : start + p.numel()]
        own = values[start : start + p.numel()]
        start += p.numel()
        if p.ndim >= 2 or id(p) in biases:
            o, i = len(p), p.numel() // len(p)
            sides = partial_traces(block, o, i)
            null = [side < 1e-10 * side.max() for side in (torch.linalg.eigvalsh(s).flip(0) for s in sides)]
            M = own.reshape(o, i).clone()
            for c in range(i):
                if null[0].any():
                    M[null[0], c] = M[null[0], c].mean()
            for r in range(o):
                if null[1].any():
                    M[r, null[1]] = M[r, null[1]].mean()
            own = M.reshape(-1)
        averaged.append(own)
    return torch.cat(averaged)


def dense_cross_fitted_kronecker(
    per_sample: list[Tensor],
    samples: Tensor,
    folds: Tensor,
    *,
    n_data: int,
    basis_of: Callable[[Tensor], Tensor],
    averaged: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes (P,), their errors, and what the samples say of their own basis.

    Args:
        basis_of: the basis (P, P) of the samples at some positions.
        averaged: values along the basis of a curvature, averaged where it has nothing; arguments H and values.
    """
    f, n = len(samples) / n_data, len(samples)
    sizes, means, deviations = [], [], []
    for held, others in fold_sets(samples, folds):
        K, H_others = basis_of(others), mean_of(per_sample, others)
        of_samples = torch.stack([torch.diagonal(K.T @ per_sample[j] @ K) for j in held.tolist()])
        variances = of_samples.var(0, correction=1) if len(held) > 1 else torch.zeros(len(K), dtype=K.dtype)
        sizes.append(len(held))
        means.append(averaged(H_others, of_samples.mean(0)))
        deviations.append(averaged(H_others, variances).sqrt())
    c, spread = pooled_over_folds(sizes, means, deviations)
    K = basis_of(samples)
    own = torch.diagonal(K.T @ mean_of(per_sample, samples) @ K)
    return (f * own + (1 - f) * c).clamp(min=0), ((1 - f) / n) ** 0.5 * spread, own


def dense_kronecker_values(model: nn.Module, H: Tensor, K: Tensor) -> Tensor:
    """Products of what a curvature's two factors say along a basis (P, P) that has Kronecker products as blocks.

    The factors of a parameter are the partial traces of its block, the second one with trace 1.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    biases = {id(layer.bias) for layer in layers}
    values, start = [], 0
    for p in trainable(model):
        at = slice(start, start + p.numel())
        start += p.numel()
        if p.ndim >= 2 or id(p) in biases:
            left, right = partial_traces(H[at, at], len(p), p.numel() // len(p))
            product_of_factors = dense_kronecker_product(left, right / torch.trace(right))
        else:
            product_of_factors = H[at, at]
        values.append(torch.diagonal(K[at, at].T @ product_of_factors @ K[at, at]))
    return torch.cat(values)


def kfac_positions(layer: nn.Module, a: Tensor) -> Tensor:
    """What one sample's input (without a batch dimension) shows a layer's weight at each position, (positions, i)."""
    if isinstance(layer, nn.Linear):
        return a.reshape(-1, a.shape[-1])
    n_space = a.ndim - 1
    padded = torch.zeros(len(a), *(a.shape[1 + d] + 2 * layer.padding[d] for d in range(n_space)), dtype=a.dtype)
    inside = [slice(None)] + [slice(layer.padding[d], layer.padding[d] + a.shape[1 + d]) for d in range(n_space)]
    padded[tuple(inside)] = a
    reach = [layer.dilation[d] * (layer.kernel_size[d] - 1) + 1 for d in range(n_space)]
    starts = [range(0, padded.shape[1 + d] - reach[d] + 1, layer.stride[d]) for d in range(n_space)]
    rows = []
    for start in product(*starts):
        window = [slice(None)] + [slice(s, s + reach[d], layer.dilation[d]) for d, s in enumerate(start)]
        rows.append(padded[tuple(window)].reshape(-1))
    return torch.stack(rows)


def dense_kfac_factors(
    layer: nn.Module, inputs: list[Tensor], gradients: list[list[Tensor]], approximation: str
) -> tuple[Tensor, Tensor]:
    """Factors (o, o) and (i, i) of one layer.

    `inputs` holds each sample's input; `gradients` holds, for each sample and each column of its root, the derivative
    of that column's combination of outputs with respect to the layer's output.
    """
    o = layer.weight.shape[0]
    G, A, n_inputs = 0.0, 0.0, 0
    for a, of_sample in zip(inputs, gradients, strict=True):
        seen = kfac_positions(layer, a)
        if approximation == "reduce":
            seen = seen.mean(0, keepdim=True)
        for row in seen:
            A, n_inputs = A + torch.outer(row, row), n_inputs + 1
        for g in of_sample:
            at = g.reshape(-1, o) if isinstance(layer, nn.Linear) else g.reshape(o, -1).T
            if approximation == "reduce":
                at = at.sum(0, keepdim=True)
            for row in at:
                G = G + torch.outer(row, row)
    return G / len(inputs), A / n_inputs


def naive_conjugate_gradients(
    A: Tensor, b: Tensor, iterations: int, M: Tensor | None = None, x0: Tensor | None = None
) -> tuple[Tensor, list[Tensor], list[float]]:
    """The textbook's preconditioned conjugate gradients: iterate, directions and step lengths."""
    x = torch.zeros_like(b) if x0 is None else x0
    r = b - A @ x
    z = r if M is None else M @ r
    p = z
    directions, steps = [], []
    for _ in range(iterations):
        alpha = (r @ z) / (p @ A @ p)
        directions.append(p)
        steps.append(float(alpha))
        x = x + alpha * p
        r_next = r - alpha * (A @ p)
        z_next = r_next if M is None else M @ r_next
        p = z_next + (r_next @ z_next) / (r @ z) * p
        r, z = r_next, z_next
    return x, directions, steps


@dataclass
class NaiveWalk:
    """One pass of debiased conjugate gradients, with nothing left implicit."""

    directions: list[Tensor]
    slopes: list[float]
    errors: list[float]
    curvatures: list[float]
    steps: list[float]
    decreases: list[float]
    update: Tensor


def naive_directional_steps(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    extra_gradient: Tensor,
    extra_curvature: Tensor,
    iterations: int,
    *,
    shrinkage: bool,
    stopping: bool = False,
    n_data: int | None = None,
) -> NaiveWalk:
    """Directions of conjugate gradients on a, steps along them on b.

    Both sets are given as gradients (n, P) and curvatures (n, P, P) of their samples.
    `extra_gradient` (P,) and `extra_curvature` (P, P) are those of damping and regularizer. With stopping, directions
    are taken together: four times as many as before after a slope beyond three standard errors, else one, with no step;
    two such are the end. Of N samples, a counts with its share and b, drawn without replacement, stands for the rest.
    """
    H_a, g_a = a[1].mean(0) + extra_curvature, a[0].mean(0) + extra_gradient
    H_b, g_b = b[1].mean(0) + extra_curvature, b[0].mean(0) + extra_gradient
    _, directions, lengths = naive_conjugate_gradients(H_a, -g_a, iterations)
    f, factor_of_error = 0.0, 1.0
    if n_data is not None:
        f = len(a[0]) / n_data
        factor_of_error = (1 - f) * (1 - len(b[0]) / (n_data - len(a[0]))) ** 0.5
    g_all, H_all = f * g_a + (1 - f) * g_b, f * H_a + (1 - f) * H_b
    walk = NaiveWalk([], [], [], [], [], [], torch.zeros_like(g_a))
    start, size, misses = 0, 1, 0
    while start < iterations and misses < 2:
        taken = range(start, min(start + size, iterations))
        p = directions[start] if len(taken) == 1 else sum(lengths[i] * directions[i] for i in taken)
        start = taken.stop
        x = walk.update
        slope = float(p @ (g_all + H_all @ x))
        # what the samples do not have in common
        of_samples = torch.stack([p @ (g + H @ x) for g, H in zip(*b, strict=True)])
        error = factor_of_error * float(of_samples.std(correction=1)) / len(of_samples) ** 0.5
        curvature = float(p @ H_all @ p)
        factor = max(0.0, 1 - error**2 / slope**2)
        step = -slope / curvature * (factor if shrinkage else 1.0)
        # the expectation of q(x) - q(x + step p), given that slope² is error² too large on average
        if shrinkage:  # Stein's unbiased estimate, for a slope with normal noise
            g = slope - error**2 / slope
            derivative = 1 + error**2 / slope**2
            decrease = (g * slope - error**2 * derivative - g**2 / 2) / curvature if factor > 0 else 0.0
        else:
            decrease = (slope**2 - 2 * error**2) / (2 * curvature)
        if stopping:
            falls = abs(slope) > 3 * error
            size, misses = (4 * size, 0) if falls else (1, misses + 1)
            if not falls:
                step = decrease = 0.0
        walk.directions.append(p)
        walk.slopes.append(slope)
        walk.errors.append(error)
        walk.curvatures.append(curvature)
        walk.steps.append(step)
        walk.decreases.append(decrease)
        walk.update = x + step * p
    return walk


def naive_mean_field(mean: Tensor, covariance: Tensor, nodes: Tensor) -> Tensor:
    """Expected softmax (C,) of one input's Gaussian logits: leading classes on nodes (S, T - 1), others by a bound."""
    order = mean.argsort(descending=True)
    d, S = mean[order] - mean.max(), covariance[order][:, order]
    W = S - S[:, :1] - S[:1] + S[0, 0]
    T = nodes.shape[1] + 1
    root = torch.linalg.cholesky(W[1:T, 1:T])
    off_diagonal = [W[i, j] for i in range(1, T) for j in range(1, T) if i != j]
    residual = [
        max(float(W[k, k] - max(sum(off_diagonal) / max(len(off_diagonal), 1), 0)), 0) for k in range(T, len(d))
    ]
    Z = float(d.exp().sum())
    weights = []
    for m, r in zip(d[T:].tolist(), residual, strict=True):
        bounds = [Z * exp(s * (m - log(Z)) + s**2 * r / 2) for s in torch.linspace(0, 1, 20_001).tolist()]
        weights.append(log(min(bounds)))
    total = torch.zeros_like(d)
    for z in nodes:
        u = root @ z
        others = torch.tensor(weights, dtype=torch.float64) + u.mean()
        total += torch.cat([torch.zeros(1, dtype=torch.float64), d[1:T] + u, others]).softmax(0)
    return torch.zeros_like(d).scatter(0, order, total / len(nodes))
