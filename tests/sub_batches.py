"""SubBatch of the small networks, and their curvature as the package computes it."""

from collections.abc import Callable
from functools import cache

import torch
from models import MODELS, targets
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.split_curvature import SplitCurvature


def network_of(model: nn.Module, X: Tensor, y: Tensor, likelihood: str) -> Network:
    """All weights of a model."""
    with differentiable_kernels(model):
        return prepare_network(ParameterSelection.all_weights(model), likelihood_named(likelihood), Batch(X, y))


@cache
def small_network(name: str, likelihood: str = "classification") -> tuple[Network, Tensor, Tensor]:
    """One of the small networks, with its data."""
    model, X = MODELS[name]()
    y = targets(likelihood)
    return network_of(model, X, y, likelihood), X, y


def samples_of(X: Tensor, y: Tensor, indices: Tensor, batch_size: int = 7) -> SubBatch:
    """The samples at some positions, held in memory."""
    batches = [(X[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(X), batch_size)]
    kept = [Batch(X[some], y[some]) for some in indices.split(batch_size)]
    return SubBatch(sample_source(batches, 0), indices, torch.device("cpu"), 0).keeping(kept)


def rows_of(
    network: Network,
    X: Tensor,
    y: Tensor,
    indices: Tensor | None = None,
    root: Callable[[Likelihood], OutputRoot] = GaussNewton,
    seed: int = 0,
    batch_size: int = 7,
) -> RowCurvature:
    """Curvature with a root of the samples at some positions, of all by default."""
    indices = torch.arange(len(X)) if indices is None else indices
    return RowCurvature(network, samples_of(X, y, indices, batch_size), root(network.likelihood), seed=seed)


def two_sets(a: SubBatchCurvature, b: SubBatchCurvature | None, n_data: int) -> SplitCurvature:
    """Directions from a, magnitudes from b, or from a too where there is no b."""
    return SplitCurvature(a, b, None, n_data)
