r"""Class probabilities of Gaussian logits, without sampling: the mean-field link.

A softmax depends on differences of logits only. With $d_k = f_k - f_1$, class 1 having the largest mean,

$$E\,\mathrm{softmax}(f)_i = E\left[e^{d_i} \Big/ \sum_k e^{d_k}\right].$$

The differences of up to 32 leading classes are integrated jointly, on fixed quasi-random nodes with exactly the first
three moments of a standard normal, so that the result is exact to second order in the variance. Of the remaining
classes, each with mean m and residual variance r, the leading ones see only an average weight (their mean field): the
Chernoff bound of $E[\min(1, e^d / Z)]\,Z$ with $Z = \sum_k e^{m_k}$, that is $e^{m + r/2}$ while r is small. Variance
that all logits share cancels in every difference.

References:
    Lu, Ie & Sha (2020), arXiv 2006.07584 (mean-field softmax on differences); Owen (1995),
    doi 10.1007/978-1-4612-2552-2_19 (scrambled nodes); Chernoff (1952), doi 10.1214/aoms/1177729330.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.linalg.accumulation import accumulation_dtype

LEADING = 32
"""Classes whose differences are integrated jointly; at least 3."""

_PAIRS = 256  # of antithetic nodes
_JITTER = 1e-7  # of the norm of a covariance: rounding of single precision


@dataclass(frozen=True, eq=False)
class GaussianLogits:
    """What the mean-field link needs to know of a Gaussian over C logits, for each of n inputs.

    Classes are in the order of decreasing mean; the first D + 1 of them are leading, and R = C - D - 1 remain.

    Attributes:
        order: the classes.
        means: of the differences to the first class; the first one is 0.
        covariance: of the differences of the other leading classes to the first.
        variances: of the differences of the remaining classes to the first.
        total_variance: trace of the covariance of the centred logits, f minus its mean over the classes.
    """

    order: Int64[Tensor, "n C"]
    means: Float[Tensor, "n C"]
    covariance: Float[Tensor, "n D D"]
    variances: Float[Tensor, "n R"]
    total_variance: Float[Tensor, " n"]

    @classmethod
    def of_covariance(
        cls, mean: Float[Tensor, "n C"], covariance: Float[Tensor, "n C C"], n_leading: int = LEADING
    ) -> "GaussianLogits":
        """From means and covariances of the logits; a covariance that rounding made indefinite is mended."""
        sorted_mean, order = mean.sort(dim=-1, descending=True, stable=True)
        exact = covariance.to(accumulation_dtype(covariance)).clamp(-1e30, 1e30)
        C, T = mean.shape[-1], min(n_leading, mean.shape[-1])
        lead, leading = order[:, :1], order[:, :T]
        to_lead = exact.gather(2, lead[:, None, :].expand(-1, C, 1))[..., 0].gather(1, order)
        own = exact.diagonal(dim1=-2, dim2=-1).gather(1, order)
        variances = own - 2 * to_lead + own[:, :1]
        among = exact.gather(1, leading[:, :, None].expand(-1, T, C)).gather(2, leading[:, None, :].expand(-1, T, T))
        differences = among - to_lead[:, :T, None] - to_lead[:, None, :T] + own[:, :1, None]
        return cls(
            order,
            sorted_mean - sorted_mean[:, :1],
            differences[:, 1:, 1:],
            variances[:, T:].clamp_min(0),
            (own.sum(-1) - exact.sum((-2, -1)) / C).clamp_min(0),
        )

    @classmethod
    def of_variances(
        cls, mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"], n_leading: int = LEADING
    ) -> "GaussianLogits":
        """From means and variances of independent logits."""
        sorted_mean, order = mean.sort(dim=-1, descending=True, stable=True)
        own = variance.to(accumulation_dtype(variance)).clamp(0, 1e30).gather(1, order)
        first = own[:, :1]
        return cls(
            order,
            sorted_mean - sorted_mean[:, :1],
            torch.diag_embed(own[:, 1:n_leading]) + first[..., None],
            own[:, n_leading:] + first,
            own.sum(-1) * (1 - 1 / mean.shape[-1]),
        )

    def probabilities(self) -> Float[Tensor, "n C"]:
        """Expected softmax of the logits."""
        return self._by_class(torch.cat([p.mean(-1) for p in self._at_nodes(_at_least_single(self.means))]))

    def probabilities_and_information(self) -> tuple[Float[Tensor, "n C"], Float[Tensor, " n"]]:
        """Expected softmax, and the mutual information of label and logits in nats (at least 0)."""
        means, entropies = [], []
        # small differences of entropies: in double precision, so that confident inputs keep their order
        for p in self._at_nodes(accumulation_dtype(self.means)):
            means.append(p.mean(-1))
            entropies.append(torch.special.entr(p).sum(1).mean(-1))
        mean = torch.cat(means)
        # what the remaining classes share out among themselves is the same at every node, and cancels
        information = torch.special.entr(mean).sum(1) - torch.cat(entropies)
        return self._by_class(mean), information.clamp_min(0)

    def _by_class(self, mean: Float[Tensor, "n _"]) -> Float[Tensor, "n C"]:
        T = self.covariance.shape[-1] + 1
        if self.means.shape[-1] > T:
            mean = torch.cat([mean[:, :T], mean[:, T:] * self._remaining(mean.dtype).softmax(-1)], dim=1)
        return torch.zeros_like(mean).scatter(1, self.order, mean).to(self.means.dtype)

    def _remaining(self, dtype: torch.dtype) -> Float[Tensor, "n R"]:
        """Logarithms of the average weights of the remaining classes."""
        d, means = self.covariance.shape[-1], self.means.to(dtype)
        own = self.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        # the covariance of two differences is what the first class has alone, and the nodes have it already
        shared = ((self.covariance.sum((-2, -1)) - own) / (d * (d - 1))).clamp_min(0)
        r = (self.variances - shared[:, None]).to(dtype).clamp_min(torch.finfo(dtype).tiny)
        log_Z = means.logsumexp(-1, keepdim=True)
        a = means[:, d + 1 :] - log_Z
        s = (-a / r).clamp_max(1)
        return log_Z + s * a + s.square() * r / 2

    def _at_nodes(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "_ _ S"]]:
        """Softmax at every node, some inputs at a time: the leading classes, and the remaining ones as one more."""
        n, T = len(self.means), self.covariance.shape[-1] + 1
        L, m = _root(self.covariance).to(dtype), self.means[:, :T, None].to(dtype)
        z = _nodes(T - 1, dtype, m.device)
        remaining = self._remaining(dtype).logsumexp(-1) if self.means.shape[-1] > T else None
        size = max(1, CHUNK_BYTES // (4 * (T + 1) * z.shape[1] * z.element_size()))
        for start in range(0, n, size):
            some = slice(start, start + size)
            deviations = L[some] @ z
            rows = m[some] + torch.nn.functional.pad(deviations, (0, 0, 1, 0))
            if remaining is not None:
                # what the first class has alone moves all others alike
                rows = torch.cat([rows, (remaining[some, None] + deviations.mean(1))[:, None]], dim=1)
            yield rows.softmax(1)


def _at_least_single(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _root(covariance: Float[Tensor, "n d d"]) -> Float[Tensor, "n d d"]:
    """Triangular roots of covariances, which may be singular or, by rounding, slightly indefinite.

    Raises:
        ValueError: for NaN.
    """
    norm = torch.linalg.matrix_norm(covariance.detach())
    if not bool(norm.isfinite().all()):
        raise ValueError("The covariance of the logits has NaN entries; expected finite ones.")
    unit = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    added = _JITTER * norm + torch.finfo(norm.dtype).tiny ** 0.5
    while True:
        root, failed = torch.linalg.cholesky_ex(covariance + added[:, None, None] * unit)
        # with its norm added, any symmetric matrix is positive definite
        if not bool((failed > 0).any()):
            return root
        added = torch.where(failed > 0, 100 * added, added)


@lru_cache(maxsize=32)
def _nodes(d: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "d S"]:
    """Scrambled Sobol' points mapped to normal ones, each with its negative, their second moments made exact."""
    with torch.inference_mode(False), torch.no_grad():
        points = torch.quasirandom.SobolEngine(d, scramble=True, seed=0).draw(_PAIRS, dtype=torch.float64)
        z = torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).T
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(z @ z.T / _PAIRS), z, upper=False)
        return torch.cat([z, -z], dim=1).to(device=device, dtype=dtype)
