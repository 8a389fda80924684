r"""The linearized predictive $N(f(x), J(x) P^{-1} J(x)^\top)$, in chunks of samples.

References:
    Immer, Korzepa & Bauer (2021), arXiv 2008.08400.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.network import Network
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal


def predict(
    network: Network,
    precision: LowRankPlusDiagonal,
    inputs: Tensor,
    *,
    create_graph: bool = False,
) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C C"]]:
    """Mean and covariance of each input's outputs; no more than one chunk of Jacobians is held at a time.

    Args:
        network: the network at the posterior's mean.
        precision: of the posterior.
        inputs: a batch.
        create_graph: keep the graph, for gradients with respect to the inputs.

    Returns:
        Means and covariances.
    """
    means, covariances = [], []
    for J, f in network.jacobians(inputs, create_graph=create_graph):
        means.append(f)
        covariances.append(precision.variance(J))
    return torch.cat(means), torch.cat(covariances)


def predict_jointly(
    network: Network,
    precision: LowRankPlusDiagonal,
    inputs: Tensor,
    *,
    create_graph: bool = False,
) -> tuple[Float[Tensor, " nC"], Float[Tensor, "nC nC"]]:
    """Mean and covariance of all outputs of a batch together, inputs first."""
    chunks = list(network.jacobians(inputs, create_graph=create_graph))
    J = torch.cat([J for J, _ in chunks]).flatten(0, 1)
    f = torch.cat([f for _, f in chunks]).flatten()
    return f, precision.variance(J)


def draw_functions(
    network: Network,
    inputs: Tensor,
    deviations: Float[Tensor, "S P"],
    *,
    create_graph: bool = False,
) -> Float[Tensor, "S n C"]:
    r"""Values $f(x) + J(x)\,\delta_s$ of linearized functions; the same function at every input.

    Args:
        network: the network at the posterior's mean.
        inputs: a batch.
        deviations: draws of the parameters minus their mean, one per function.
        create_graph: keep the graph.

    Returns:
        One function per draw.
    """
    parts = [
        f + torch.einsum("ncp,sp->snc", J, deviations) for J, f in network.jacobians(inputs, create_graph=create_graph)
    ]
    return torch.cat(parts, dim=1)
