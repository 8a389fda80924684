r"""Logits of a last linear layer under a Kronecker posterior, in closed form from features.

With features $\varphi$, a row of the weight's Jacobian is $e_k \otimes \varphi$ and is never formed. In the basis
$Q_G \otimes Q_A$, with the precision's diagonal D, the covariance of the logits is
$Q_G\,\mathrm{diag}(w)\,Q_G^\top$, where $w_c = \sum_a (Q_A^\top \varphi)_a^2 / D_{ca}$; a bias is a weight whose only
feature is 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.inputs import Inputs, first
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.predictive.mean_field import LEADING, GaussianLogits, sorted_differences

_WORTHWHILE = 33  # outputs: for fewer, rows cost less than the test for a linear layer


@dataclass(frozen=True, eq=False)
class KroneckerLogits:
    r"""Means of n inputs' logits, and their covariances $\sum_p Q_p\,\mathrm{diag}(w_p)\,Q_p^\top$.

    Attributes:
        means: of the logits.
        terms: Q and w of the weight and of the bias, if there is one; Q is None for the identity.
    """

    means: Float[Tensor, "n C"]
    terms: tuple[tuple[Float[Tensor, "C C"] | None, Float[Tensor, "n C"]], ...]

    @classmethod
    def of(cls, network: Network, precision: LowRankPlusDiagonal, inputs: Inputs) -> "KroneckerLogits | None":
        """Compute the logits if the posterior is a Kronecker one over a linear layer of many outputs; else None."""
        if network.n_outputs < _WORTHWHILE or precision.rank > 0 or precision.basis is None:
            return None
        layer = LinearLayer.of(network, first(inputs, 2))
        if layer is None:
            return None
        features, means = layer.features(inputs)
        diagonal, terms, start = precision.diagonal.expand(precision.n_parameters), [], 0
        for part, block in zip(layer.parts, precision.basis.blocks, strict=True):
            inverse = 1 / diagonal[start : start + block.size].reshape(block.rows, block.columns)
            start += block.size
            a = features if part == "weight" else torch.ones_like(features[:, :1])
            a = a if block.right is None else a @ block.right
            terms.append((block.left, a.square() @ inverse.T))
        return cls(means, tuple(terms))

    def variances(self) -> Float[Tensor, "n C"]:
        """Return the variance of every logit."""
        return sum(  # type: ignore[return-value]
            (w if Q is None else w @ Q.square().T for Q, w in self.terms), start=torch.zeros_like(self.means)
        )

    def differences(self) -> GaussianLogits:
        """Return the Gaussian over the logits, by differences to each input's first class."""
        means, order = sorted_differences(self.means)
        C, own, lead = means.shape[1], self.variances().gather(1, order), order[:, 0]
        to_lead, of_sum = torch.zeros_like(own), torch.zeros_like(own[:, 0])
        for Q, w in self.terms:
            if Q is None:
                # different logits have covariance 0
                to_lead.scatter_add_(1, lead[:, None], w.gather(1, lead[:, None]))
                of_sum = of_sum + w.sum(1)
            else:
                to_lead = to_lead + (w * Q[lead]) @ Q.T
                of_sum = of_sum + w @ Q.sum(0).square()
        variances = own - 2 * to_lead.gather(1, order) + own[:, :1]
        covariance = torch.cat(list(self._covariances(order[:, :LEADING])))
        total = (own.sum(1) - of_sum / C).clamp_min(0)
        return GaussianLogits(order, means, covariance, variances[:, LEADING:].clamp_min(0), total)

    def _covariances(self, leading: Int64[Tensor, "n T"]) -> Iterator[Float[Tensor, "m D D"]]:
        """Yield covariances of the leading classes' differences to the first one, for chunks of inputs."""
        C, T = self.means.shape[1], leading.shape[1]
        size = max(1, CHUNK_BYTES // (2 * T * C * self.means.element_size()))
        for start in range(0, len(leading), size):
            rows = slice(start, start + size)
            chosen, total = leading[rows], torch.zeros((), dtype=self.means.dtype, device=self.means.device)
            for Q, w in self.terms:
                if Q is None:
                    own = w[rows].gather(1, chosen)
                    total = total + torch.diag_embed(own[:, 1:]) + own[:, :1, None]
                else:
                    D = Q[chosen[:, 1:]] - Q[chosen[:, :1]]
                    total = total + (D * w[rows, None, :]) @ D.mT
            yield total
