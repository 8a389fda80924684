r"""Expected softmax of Gaussian logits: quadrature over leading classes, a mean field of the others ("mean_field").

A softmax depends on differences of logits only. With $d_k = f_k - f_1$ and class 1 that of the largest mean,

$$E\,\mathrm{softmax}(f)_i = E\left[e^{d_i} \Big/ \sum_k e^{d_k}\right].$$

Up to 128 leading classes: quasi-Monte Carlo on nodes with exactly the first three moments of a standard normal; if all
classes lead, the result is exact to first order in the covariance. It is differentiable except where two classes change
rank, where it jumps by its quadrature error.

Each further class, with mean m and residual variance r, enters the normalizer with one fixed weight: Chernoff's upper
bound of $E[\min(1, e^{d} / Z)]\,Z$ with $Z = \sum_k e^{m_k}$, used as an estimate; it is $e^{m + r/2}$ while r is
small. It fails if many of these classes have residual variances far above 1, and then gives them too little mass
(docs/predictive.md).

References:
    Lu, Ie & Sha (2020), arXiv 2006.07584 (mean-field softmax on differences); Owen (1998), doi 10.1006/jcom.1998.0487
    (scrambled Sobol' points); Chernoff (1952), doi 10.1214/aoms/1177729330.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.linalg.accumulation import accumulation_dtype

LEADING = 128
"""Number of classes whose differences are integrated jointly."""

_PAIRS = 256  # of antithetic nodes
_JITTER = 1e-7  # relative to the norm of a covariance: rounding of single precision


@dataclass(frozen=True, eq=False)
class GaussianLogits:
    """Gaussian over the C logits of each of n inputs, by differences to its most probable class.

    Classes are ordered by decreasing mean; the first D + 1 of them are leading, and R = C - D - 1 remain.

    Attributes:
        order: the classes in that order.
        means: means of the differences to the first class; the first one is 0.
        covariance: covariance of the other leading classes' differences.
        variances: variances of the remaining classes' differences.
        total_variance: trace of the covariance of the centred logits, f minus its mean over the classes.

    Raises:
        ValueError: if means, covariances or variances are not finite.
    """

    order: Int64[Tensor, "n C"]
    means: Float[Tensor, "n C"]
    covariance: Float[Tensor, "n D D"]
    variances: Float[Tensor, "n R"]
    total_variance: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        for name in ("means", "covariance", "variances"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"Expected finite {name} of the logits; some are NaN or infinite.")

    @classmethod
    def of_covariance(cls, mean: Float[Tensor, "n C"], covariance: Float[Tensor, "n C C"]) -> "GaussianLogits":
        """Create from means and covariances of the logits, the latter positive semi-definite up to rounding."""
        means, order = sorted_differences(mean)
        exact = covariance.to(accumulation_dtype(covariance))
        C, T = mean.shape[-1], min(LEADING, mean.shape[-1])
        lead, leading = order[:, :1], order[:, :T]
        to_lead = exact.gather(2, lead[:, None, :].expand(-1, C, 1))[..., 0].gather(1, order)
        own = exact.diagonal(dim1=-2, dim2=-1).gather(1, order)
        variances = own - 2 * to_lead + own[:, :1]
        among = exact.gather(1, leading[:, :, None].expand(-1, T, C)).gather(2, leading[:, None, :].expand(-1, T, T))
        differences = among - to_lead[:, :T, None] - to_lead[:, None, :T] + own[:, :1, None]
        return cls(
            order,
            means,
            differences[:, 1:, 1:],
            variances[:, T:].clamp_min(0),
            (own.sum(-1) - exact.sum((-2, -1)) / C).clamp_min(0),
        )

    @classmethod
    def of_variances(cls, mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"]) -> "GaussianLogits":
        """Create from means and variances of independent logits."""
        means, order = sorted_differences(mean)
        own = variance.to(accumulation_dtype(variance)).clamp_min(0).gather(1, order)
        first = own[:, :1]
        return cls(
            order,
            means,
            torch.diag_embed(own[:, 1:LEADING]) + first[..., None],
            own[:, LEADING:] + first,
            own.sum(-1) * (1 - 1 / mean.shape[-1]),
        )

    def probabilities(self) -> Float[Tensor, "n C"]:
        """Return the expected softmax of the logits."""
        dtype = torch.promote_types(self.means.dtype, torch.float32)
        return self._by_class(torch.cat([p.mean(-1) for p in self._at_nodes(dtype)]))

    def probabilities_and_information(self) -> tuple[Float[Tensor, "n C"], Float[Tensor, " n"]]:
        """Return the expected softmax, and the mutual information of label and logits in nats (at least 0).

        The information of the remaining classes is that of a softmax to second order, bounded by their weights.
        """
        means, entropies = [], []
        # double precision for small differences of entropies, so that confident inputs keep their order
        for p in self._at_nodes(accumulation_dtype(self.means)):
            means.append(p.mean(-1))
            entropies.append(torch.special.entr(p).sum(1).mean(-1))
        mean = torch.cat(means)
        # the shares of the remaining classes are the same at every node, so their entropy cancels
        information = torch.special.entr(mean).sum(1) - torch.cat(entropies)
        if self._n_remaining:
            weights, own = self._remaining(mean.dtype)
            information = information + mean[:, -1] * (weights.softmax(-1) * own).sum(-1)
        return self._by_class(mean), information.clamp_min(0)

    @property
    def _n_remaining(self) -> int:
        return self.variances.shape[-1]

    def _by_class(self, mean: Float[Tensor, "n _"]) -> Float[Tensor, "n C"]:
        if self._n_remaining:
            mean = torch.cat([mean[:, :-1], mean[:, -1:] * self._remaining(mean.dtype)[0].softmax(-1)], dim=1)
        return torch.zeros_like(mean).scatter(1, self.order, mean).to(self.means.dtype)

    def _remaining(self, dtype: torch.dtype) -> tuple[Float[Tensor, "n R"], Float[Tensor, "n R"]]:
        """Compute the remaining classes' log weights, and the information of each, given that it is the label."""
        d, means = self.covariance.shape[-1], self.means.to(dtype)
        own = self.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        # all differences are assumed to share their average covariance, which the nodes include
        shared = ((self.covariance.sum((-2, -1)) - own) / (d * (d - 1))).clamp_min(0)
        r = (self.variances - shared[:, None]).to(dtype).clamp_min(0)
        log_Z = means.logsumexp(-1, keepdim=True)
        a = means[:, d + 1 :] - log_Z
        # a < -log(d + 1): the minimum over s of s a + s² r / 2 is at 1 for every r below 1
        s = (-a / r.clamp_min(1)).clamp_max(1)
        exponent = s.square() * r / 2
        return log_Z + s * a + exponent, exponent

    def _at_nodes(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "_ _ S"]]:
        """Yield the softmax at every node for chunks of inputs: leading classes, and the remaining ones as one more."""
        n, T = len(self.means), self.covariance.shape[-1] + 1
        L, m = _root(self.covariance).to(dtype), self.means[:, :T, None].to(dtype)
        z = nodes(T - 1, dtype, m.device)
        remaining = self._remaining(dtype)[0].logsumexp(-1) if self._n_remaining else None
        size = max(1, CHUNK_BYTES // (4 * (T + 1) * z.shape[1] * z.element_size()))
        for start in range(0, n, size):
            chunk = slice(start, start + size)
            deviations = L[chunk] @ z
            rows = m[chunk] + torch.nn.functional.pad(deviations, (0, 0, 1, 0))
            if remaining is not None:
                # noise of the first logit shifts every difference equally
                rows = torch.cat([rows, (remaining[chunk, None] + deviations.mean(1))[:, None]], dim=1)
            yield rows.softmax(1)


def averaged_loss(
    likelihood: Likelihood, mean: Float[Tensor, "n C"], spread: Tensor, targets: Tensor
) -> Float[Tensor, " n"]:
    r"""Return $-\log E\,p(y \mid f)$ of Gaussian outputs f in nats, by the quadrature of the leading classes.

    Args:
        likelihood: of the targets, with its normalizing constant in the loss.
        mean: of the outputs.
        spread: covariances (n, C, C), or variances (n, C) of independent outputs.
        targets: y.
    """
    exact = accumulation_dtype(mean)
    m, n_outputs = mean.to(exact), mean.shape[1]
    L = spread.to(exact).clamp_min(0).sqrt().diag_embed() if spread.ndim == 2 else _root(spread.to(exact))
    z = nodes(n_outputs, exact, m.device)
    S = z.shape[1]
    size = max(1, CHUNK_BYTES // (4 * n_outputs * S * z.element_size()))
    parts = []
    for f, root, y in zip(m.split(size), L.split(size), targets.split(size), strict=True):
        at = f[:, None] + (root @ z).mT
        losses = likelihood.per_sample_loss(at.flatten(0, 1), y.repeat_interleave(S, dim=0)).unflatten(0, (-1, S))
        parts.append(math.log(S) - (-losses).logsumexp(1))
    return torch.cat(parts)


def sorted_differences(mean: Float[Tensor, "n C"]) -> tuple[Float[Tensor, "n C"], Int64[Tensor, "n C"]]:
    """Return means of the differences to the largest, decreasing, and the classes in that order."""
    means, order = mean.sort(dim=-1, descending=True, stable=True)
    return means - means[:, :1], order


def _root(covariance: Float[Tensor, "n d d"]) -> Float[Tensor, "n d d"]:
    """Return triangular roots of covariances, after adding multiples of the identity where needed."""
    # not 0 for a covariance of 0, and its square must not underflow
    norm = torch.linalg.matrix_norm(covariance.detach()).clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    unit = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    added = _JITTER * norm
    while True:
        root, failed = torch.linalg.cholesky_ex(covariance + added[:, None, None] * unit)
        # adding more than the norm makes any symmetric matrix positive definite
        if not bool((failed > 0).any()):
            return root
        added = torch.where(failed > 0, 100 * added, added)


@lru_cache(maxsize=32)
def nodes(d: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "d S"]:
    """Return normal quantiles of scrambled Sobol' points and their negatives, with exact second moments."""
    with torch.inference_mode(False), torch.no_grad():
        points = torch.quasirandom.SobolEngine(d, scramble=True, seed=0).draw(_PAIRS, dtype=torch.float64)
        z = torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).T
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(z @ z.T / _PAIRS), z, upper=False)
        return torch.cat([z, -z], dim=1).to(device=device, dtype=dtype)
