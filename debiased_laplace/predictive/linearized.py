r"""The linearized predictive $N(f(x), J(x) P^{-1} J(x)^\top)$, computed in chunks of samples.

References:
    Immer, Korzepa & Bauer (2021), arXiv 2008.08400.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.layer_covariance import LayerCovariance
from debiased_laplace.curvature.layer_rows import LayersDifferError
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import Network, RowBlocks
from debiased_laplace.data.inputs import Inputs, split
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.predictive.last_layer import layer_logits
from debiased_laplace.predictive.mean_field import LEADING, GaussianLogits, sorted_differences

_BATCH, _DRAWS = 128, 32  # samples and draws pushed forward at once
_FEWEST_LEADING = 32  # classes whose rows are in memory at once, whatever their size


def predict(
    network: Network,
    precision: LowRankPlusDiagonal,
    inputs: Inputs,
    *,
    create_graph: bool = False,
) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C C"]]:
    """Compute mean and covariance of each input's outputs, with one chunk of Jacobians in memory at a time.

    Args:
        network: network at the posterior's mean.
        precision: posterior precision.
        inputs: a batch.
        create_graph: keep the graph, for gradients with respect to the inputs.

    Returns:
        Means and covariances.
    """
    if not create_graph and (layer := _on_layer(network, precision, inputs)) is not None:
        (covariance, features, f), k = layer, network.chosen
        parts = [part.dense()[:, k][:, :, k] for _, part in covariance.of_features(features)]
        return f[:, k], torch.cat(parts).to(f)
    if not create_graph and (found := _predict_by_parameter(network, precision, inputs, covariances=True)) is not None:
        return found
    means, covariances = [], []
    for J, f in network.jacobians(inputs, create_graph=create_graph):
        means.append(f)
        covariances.append(precision.variance(J))
    return torch.cat(means), torch.cat(covariances)


def _predict_by_parameter(
    network: Network, precision: LowRankPlusDiagonal, inputs: Inputs, *, covariances: bool
) -> tuple[Tensor, Tensor] | None:
    """Compute means and covariances or variances by layers; None where the network does not allow that."""
    chunks = network.jacobians_by_parameter(inputs)
    if chunks is None:
        return None
    try:
        parts = [(f, precision.variance_of(rows, covariances=covariances)) for rows, f in chunks]
    except LayersDifferError:
        return None
    means, variances = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(variances)


def predict_variances(
    network: Network,
    precision: LowRankPlusDiagonal,
    inputs: Inputs,
    *,
    create_graph: bool = False,
) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
    """Compute mean and variance of each output; Jacobians of a sample may come in blocks of outputs."""
    if create_graph:
        means, covariances = predict(network, precision, inputs, create_graph=True)
        return means, covariances.diagonal(dim1=-2, dim2=-1)
    if (layer := _on_layer(network, precision, inputs)) is not None:
        (covariance, features, f), k = layer, network.chosen
        variances = torch.cat([part.variances()[:, k] for _, part in covariance.of_features(features)])
        return f[:, k], variances.clamp_min(0).to(f)
    if (found := _predict_by_parameter(network, precision, inputs, covariances=False)) is not None:
        return found
    means = network.outputs(inputs)
    groups = [
        torch.cat([precision.variances(rows) for rows in blocks], dim=1)
        for blocks in network.jacobian_blocks(inputs, means.shape[1])
    ]
    return means, torch.cat(groups)


def predict_logits(
    network: Network,
    precision: LowRankPlusDiagonal,
    inputs: Inputs,
    *,
    create_graph: bool = False,
) -> GaussianLogits:
    """Compute the Gaussian over each input's logits; for many classes, by differences to its first class."""
    if not create_graph and (layer := _on_layer(network, precision, inputs)) is not None:
        return layer_logits(*layer)
    if create_graph or network.n_outputs <= LEADING:
        return GaussianLogits.of_covariance(*predict(network, precision, inputs, create_graph=create_graph))
    means, order = sorted_differences(network.outputs(inputs))
    # rows of the leading classes are in memory at once
    n_bytes = network.bytes_of_factors if network.factors_save_memory else network.bytes_of_a_row
    leading = max(_FEWEST_LEADING, min(LEADING, CHUNK_BYTES // n_bytes)) - 1
    parts = _spreads_by_parameter(network, precision, inputs, order, leading) or [
        _spread_of_differences(precision, blocks, leading)
        for blocks in network.difference_blocks(inputs, order, leading=leading)
    ]
    return GaussianLogits(order, means, *map(torch.cat, zip(*parts, strict=True)))


def _spreads_by_parameter(
    network: Network, precision: LowRankPlusDiagonal, inputs: Inputs, order: Tensor, n_leading: int
) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """Compute what `_spread_of_differences` does by layers; None where the network does not allow that."""
    if not network.factors_save_memory:
        return None
    C = order.shape[1]
    step = max(1, CHUNK_BYTES // network.bytes_of_factors)
    size = max(1, step // n_leading)
    blocks = [slice(start, min(start + step, C - 1)) for start in range(n_leading, C - 1, step)]
    parts = []
    for chunk, own in zip(split(inputs, size), order.split(size), strict=True):
        found = []
        for chosen in (slice(n_leading), None, *blocks):
            rows = network.differences_by_parameter(chunk, own, chosen)
            if rows is None:
                return None
            found.append(precision.variance_of(rows, covariances=chosen == slice(n_leading)))
        covariance, total, others = found[0], found[1][:, 0], torch.cat(found[2:], dim=1)
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + others.sum(-1) - total / C
        parts.append((covariance, others, trace.clamp_min(0)))
    return parts


def _spread_of_differences(
    precision: LowRankPlusDiagonal, blocks: RowBlocks, n_leading: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute covariances of leading differences, variances of the others, and the centred logits' total variance."""
    first = next(blocks)
    total = first.sum(1)
    covariance, variances = precision.variance(first[:, :n_leading]), [precision.variances(first[:, n_leading:])]
    for rows in blocks:
        variances.append(precision.variances(rows))
        total += rows.sum(1)
    others = torch.cat(variances, dim=1)
    C = 1 + n_leading + others.shape[1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + others.sum(-1) - precision.variances(total) / C
    return covariance, others, trace.clamp_min(0)


def predict_jointly(
    network: Network,
    precision: LowRankPlusDiagonal,
    inputs: Inputs,
    *,
    create_graph: bool = False,
) -> tuple[Float[Tensor, " nC"], Float[Tensor, "nC nC"]]:
    """Compute mean and covariance of all outputs of a batch jointly, ordered by input, then output."""
    if not create_graph and (layer := _on_layer(network, precision, inputs)) is not None:
        (covariance, features, f), k = layer, network.chosen
        n, C = f.shape
        joint = covariance.joint(features).to(f).reshape(n, C, n, C)[:, k][..., k]
        return f[:, k].flatten(), joint.flatten(2).flatten(0, 1)
    chunks = list(network.jacobians(inputs, create_graph=create_graph))
    J = torch.cat([J for J, _ in chunks]).flatten(0, 1)
    f = torch.cat([f for _, f in chunks]).flatten()
    return f, precision.variance(J)


def draw_functions(
    network: Network,
    inputs: Inputs,
    deviations: Float[Tensor, "S P"],
    *,
    create_graph: bool = False,
) -> Float[Tensor, "S n C"]:
    r"""Compute values $f(x) + J(x)\,\delta_s$ of linearized functions, each at all inputs.

    Args:
        network: network at the posterior's mean.
        inputs: a batch.
        deviations: draws of the parameters minus their mean, one per function.
        create_graph: keep the graph.

    Returns:
        One function per draw.
    """
    features = None if create_graph else network.features(inputs)
    if features is not None and network.linear_layer is not None:
        pushed = network.linear_layer.pushed(features[0], deviations.T).movedim(-1, 0)
        return (features[1] + pushed)[..., network.chosen]
    if not create_graph and _draws_are_cheaper(network, len(deviations)):
        return torch.cat([_pushed_draws(network, chunk, deviations) for chunk in split(inputs, _BATCH)], dim=1)
    parts = [
        f + torch.einsum("ncp,sp->snc", J, deviations) for J, f in network.jacobians(inputs, create_graph=create_graph)
    ]
    return torch.cat(parts, dim=1)


def _on_layer(
    network: Network, precision: LowRankPlusDiagonal, inputs: Inputs
) -> tuple[LayerCovariance, Tensor, Tensor] | None:
    """Return the Gaussian over a last linear layer, with features and outputs; None without such a layer."""
    covariance = (
        None
        if network.linear_layer is None
        else LayerCovariance.of(network.linear_layer, precision, network.available_memory)
    )
    found = None if covariance is None else network.features(inputs)
    return None if covariance is None or found is None else (covariance, *found)


def _draws_are_cheaper(network: Network, n_draws: int) -> bool:
    """Return whether one JVP per draw is cheaper than one VJP per output."""
    return network.capabilities.columns and (
        n_draws < network.n_outputs or network.rows_per_chunk(network.n_outputs) == 0
    )


def _pushed_draws(network: Network, inputs: Inputs, deviations: Tensor) -> Tensor:
    parts = []
    for draws in deviations.split(_DRAWS):
        pushed, f = network.pushed(inputs, draws.T)
        parts.append(f + pushed.movedim(-1, 0))
    return torch.cat(parts)
