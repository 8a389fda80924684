"""How sure a method says it is of each sample: what out-of-distribution detection and selection go by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.predictions.probabilities import Probabilities, mean_prediction


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Scores of every sample, in float64 on the CPU; entropies in nats.

    Attributes:
        confidence: probability of the predicted class, of the mean prediction.
        entropy: of the mean prediction.
        mutual_information: between the label and the parameters, the entropy of the mean minus the mean entropy over
            the posterior; None where only the mean is known.
        logit_variance: trace of the covariance of the centred logits; None where it is not known.
    """

    confidence: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    mutual_information: Float[Tensor, " n"] | None
    logit_variance: Float[Tensor, " n"] | None = None


def entropy(p: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows"]:
    r"""$-\sum_c p_c \log p_c$ in nats."""
    return torch.special.entr(p).sum(dim=-1)


def uncertainty_of(p: Float[Tensor, "*S rows C"]) -> Uncertainty:
    """The scores of one portion of rows."""
    mean = mean_prediction(p)
    total = entropy(mean)
    # a difference of two entropies; rounding may leave it below zero
    between = (total - entropy(p).mean(dim=0)).clamp_min(0.0).cpu() if p.ndim == 3 else None
    return Uncertainty(mean.max(dim=1).values.cpu(), total.cpu(), between)


def join(portions: Sequence[Uncertainty], probabilities: Probabilities) -> Uncertainty:
    """Portions of rows, one after another; all of them with samples of the posterior, or none."""
    between = [u.mutual_information for u in portions if u.mutual_information is not None]
    return Uncertainty(
        torch.cat([u.confidence for u in portions]),
        torch.cat([u.entropy for u in portions]),
        torch.cat(between) if between else probabilities.mutual_information,
        probabilities.logit_variance,
    )


def measure_uncertainty(probabilities: Probabilities) -> Uncertainty:
    """Confidence, entropy and, from posterior samples, mutual information of every sample.

    References:
        Houlsby, Huszár, Ghahramani, Lengyel (2011), arXiv 1112.5745 (mutual information).
    """
    return join([uncertainty_of(p) for _, p in probabilities.portions()], probabilities)
