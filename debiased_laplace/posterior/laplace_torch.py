"""Posteriors of laplace-torch as candidates of the held-out KL.

Their precision is converted to this package's operator and checked. Their `functional_variance` is not used: that of a
full posterior can be outdated after a change of hyper-parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from laplace import ParametricLaplace
from laplace.lllaplace import LLLaplace
from laplace.subnetlaplace import SubnetLaplace
from laplace.utils.feature_extractor import FeatureExtractor
from laplace.utils.matrix import KronDecomposed
from torch import Tensor, nn

from debiased_laplace.checks import integer, name_of, one_positive
from debiased_laplace.curvature.contexts import evaluating
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.errors import NotFittedError
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.posterior.candidates import Candidate, Target
from debiased_laplace.processes import Processes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SEED = 0  # of random loaders; a debiased posterior of the default seed loads the same


def laplace_torch_candidate(la: Any, n_data: int | None, temperature: int | float | None) -> Candidate:
    """Convert a posterior of laplace-torch over parameters.

    Args:
        la: the posterior.
        n_data: N of the full batch; None: the samples that it was fitted to.
        temperature: of the full batch; None: the posterior's own.

    Raises:
        NotFittedError: before `fit`.
        ValueError: if it has no precision over parameters that can be used, its mean is not the model's present
            weights, or N and temperature do not describe a full batch that it could belong to.
    """
    if not isinstance(la, ParametricLaplace):
        raise ValueError(
            "Expected a posterior over parameters: one of this package, or one of laplace-torch's diag, kron, full or "
            f"lowrank; got {type(la).__name__}. Functional posteriors (GP, ELLA, VaLLA) have no precision of the "
            "parameters that the full batch's could be compared with."
        )
    if not la.n_data:
        raise NotFittedError(f"This {type(la).__name__} is not fitted; call fit() first.")
    n_data, temperature = _full_batch(la, n_data, temperature)
    selection, order = _selection(la)
    likelihood = likelihood_named(name_of(la.likelihood))
    target = Target(
        selection,
        likelihood,
        BackendChoice.of_laplace_torch(la._backend_cls, la._backend_kwargs),
        _prior(la, selection, order),
        float(one_positive(la.sigma_noise, "sigma_noise")),
        temperature,
        n_data,
    )
    precision = _operator(la.posterior_precision, order, selection)
    met: list[Network] = []

    def network(batch: Batch) -> Network:
        if not met:
            met.append(prepare_network(selection, likelihood, batch))
        return met[0]

    keys = MappingKeys(la.dict_key_x, la.dict_key_y)
    return Candidate(precision, target, la.model, network, keys, _SEED, la.n_data, None, processes=Processes.of())


@contextmanager
def plain_model(model: nn.Module) -> Iterator[None]:
    """Remove what laplace-torch's backends left on a model, and restore it afterwards.

    A last-layer posterior's notes its features at every forward pass; BackPACK's hooks stay, and torch.func cannot
    differentiate through them.
    """
    features = dict(model._features) if isinstance(model, FeatureExtractor) else {}
    removed = []
    for module in model.modules():
        for hooks in (module._forward_hooks, module._backward_hooks):
            kept = list(hooks.items())
            theirs = [key for key, hook in kept if getattr(hook, "__module__", "") == "backpack"]
            if theirs:
                removed.append((hooks, kept))
            for key in theirs:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, kept in removed:
            # in their order: hooks run in it
            hooks.clear()
            hooks.update(kept)
        if isinstance(model, FeatureExtractor):
            model._features.clear()
            model._features.update(features)


@contextmanager
def preserve_state(model: nn.Module | None, plain: bool = True) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards restore modes, attributes, hooks, parameters and gradients.

    laplace-torch's sampling writes every draw into the parameters and leaves views of its mean there, or, after an
    exception, the last draw; its backends may clear gradients, and extend modules with hooks. With `plain` the model is
    a `plain_model`.
    """
    if model is None:
        yield
        return
    # by identity: a parameter holds other memory while a draw is written into it, and gets its own back
    before = [(p, p.data, p.grad) for p in model.parameters()]
    hooks = [(getattr(m, name), dict(getattr(m, name))) for m in model.modules() for name in _HOOKS]
    try:
        with evaluating(model), plain_model(model) if plain else nullcontext():
            for p, _, _ in before:
                p.grad = None
            yield
    finally:
        for p, data, grad in before:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            p.grad = grad
        for present, kept in hooks:
            present.clear()
            present.update(kept)


def _full_batch(la: ParametricLaplace, n_data: int | None, temperature: int | float | None) -> tuple[int, float]:
    """Return N and temperature of the full batch."""
    n = la.n_data if n_data is None else integer(n_data, "n_data")
    if n < la.n_data:
        raise ValueError(f"n_data must count the {la.n_data} samples that were fitted too; got {n}.")
    if n != la.n_data and temperature is None:
        raise ValueError(
            f"This posterior was fitted to {la.n_data} samples; to judge it against the posterior of n_data={n}, "
            "expected the temperature of that one as well: temperature=1.0 unless its likelihood is tempered. "
            f"laplace-torch scales the curvature of n samples up to N by its own temperature n / N (here "
            f"{float(la.temperature):.6g}), so that its temperature is not the full batch's."
        )
    return n, float(one_positive(la.temperature if temperature is None else temperature, "temperature"))


def _selection(la: ParametricLaplace) -> tuple[ParameterSelection, Tensor | None]:
    """Return the parameters in increasing order, and their places in the posterior's own order where it differs.

    Raises:
        ValueError: if it is over other parameters than the trainable ones, or not at the model's present weights.
    """
    order = None
    if isinstance(la, LLLaplace):
        selection = ParameterSelection.all_weights(la.model.model).layer(la.model._last_layer_name)
        present, P = selection.vector(), la.n_params
    else:
        selection = ParameterSelection.all_weights(la.model)
        present, P = selection.vector(), len(la.mean)
    if len(present) != P:
        raise ValueError(
            f"Expected a posterior over the {len(present)} trainable parameters of {selection.subset}; this "
            f"{type(la).__name__} is over {P}. A last layer has to be trainable as a whole."
        )
    if not torch.equal(la.mean.detach(), present):
        raise ValueError(
            f"The mean of this {type(la).__name__} is not the model's present weights; expected a posterior of the "
            "weights as they are. Restore them, or fit again."
        )
    if isinstance(la, SubnetLaplace):
        indices = la.backend.subnetwork_indices.cpu()
        order = indices.argsort()
        selection = selection.subnetwork(indices[order])
    return selection, order


def _prior(la: ParametricLaplace, selection: ParameterSelection, order: Tensor | None) -> Tensor:
    """Return the diagonal of the prior precision; laplace-torch's property lacks a prior per layer of a last layer."""
    prior, P = la.prior_precision.detach(), selection.n_parameters
    if len(prior) == 1:
        return prior.expand(P)
    if len(prior) == P:
        return prior if order is None else prior[order.to(prior.device)]
    if len(prior) == len(selection.sizes):
        return prior.repeat_interleave(torch.tensor(selection.sizes, device=prior.device))
    raise ValueError(
        f"Expected a prior precision of 1, {len(selection.sizes)} (one per parameter tensor) or {P} entries; "
        f"got {len(prior)}."
    )


def _operator(precision: Any, order: Tensor | None, selection: ParameterSelection) -> LowRankPlusDiagonal:
    """Convert a precision in any of laplace-torch's forms."""
    if isinstance(precision, KronDecomposed):
        return _of_kron(precision, selection)
    if isinstance(precision, Tensor) and precision.ndim == 1:
        p = precision.detach()
        p = p if order is None else p[order.to(p.device)]
        return LowRankPlusDiagonal(p, p.new_zeros(len(p), 0), p.new_zeros(0))
    if isinstance(precision, Tensor) and precision.ndim == 2:
        dense = precision.detach()
        if order is not None:
            at = order.to(dense.device)
            dense = dense[at][:, at]
        return _of_dense(dense)
    if isinstance(precision, tuple) and len(precision) == 2:
        (U, values), diagonal = precision
        diagonal = diagonal.detach()
        # its vectors come from a power iteration: orthonormal to its tolerance only, and a diagonal of more than one
        # number has them orthogonalized
        return LowRankPlusDiagonal(diagonal, U.detach().to(diagonal), values.detach().to(diagonal))
    raise ValueError(
        "Expected a posterior precision as a diagonal, a dense matrix, Kronecker factors or a low-rank form; got "
        f"{type(precision).__name__}."
    )


def _of_dense(precision: Tensor) -> LowRankPlusDiagonal:
    exact = precision.to(accumulation_dtype(precision))
    values, vectors = torch.linalg.eigh((exact + exact.T) / 2)
    if not bool(values[0] > 0):
        raise ValueError(
            f"Expected a positive definite posterior precision; its smallest eigenvalue is {float(values[0]):.3g}. A "
            "Hessian away from a minimum needs a larger prior_precision."
        )
    # all that the smallest eigenvalue leaves: magnitudes that are not negative, none of them floored
    rest = values - values[0]
    return LowRankPlusDiagonal(values[0].to(precision), vectors.to(precision), rest.to(precision))


def _of_kron(precision: KronDecomposed, selection: ParameterSelection) -> LowRankPlusDiagonal:
    blocks, diagonal = [], []
    for Qs, ls, delta in zip(precision.eigenvectors, precision.eigenvalues, precision.deltas, strict=True):
        if len(ls) == 1:
            blocks.append(BasisBlock(len(ls[0]), 1, Qs[0].detach(), None))
            diagonal.append(ls[0] + delta)
        else:
            blocks.append(BasisBlock(len(ls[0]), len(ls[1]), Qs[0].detach(), Qs[1].detach()))
            diagonal.append(torch.outer(ls[0], ls[1]).flatten() + delta)
    if tuple(block.size for block in blocks) != selection.sizes:
        raise ValueError(
            f"Expected Kronecker factors of the parameters' sizes {selection.sizes}; this posterior has factors of "
            f"sizes {tuple(block.size for block in blocks)}."
        )
    values = torch.cat(diagonal).detach()
    return LowRankPlusDiagonal(
        values, values.new_zeros(len(values), 0), values.new_zeros(0), KroneckerBasis(tuple(blocks))
    )
