"""Prior precisions as laplace-torch takes them: one number, one per parameter tensor, or one per parameter."""

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.parameters import ParameterSelection


def check_prior_precision(prior: Tensor, selection: ParameterSelection | None, *, in_basis: bool) -> None:
    """Check the shape of a prior precision, and in a Kronecker basis its values.

    Args:
        prior: precision, positive.
        selection: parameters of the posterior; None while they are unknown, and any length may fit.
        in_basis: whether the posterior has a Kronecker basis, which mixes the entries of a parameter tensor.

    Raises:
        ValueError: if it does not fit the parameters.
    """
    if prior.ndim != 1:
        raise ValueError(f"prior_precision must be one number or one-dimensional; got shape {tuple(prior.shape)}.")
    if selection is None or len(prior) in (1, len(selection.names)):
        return
    P, n_tensors = selection.n_parameters, len(selection.names)
    if in_basis and (len(prior) != P or not is_of_tensors(prior, selection)):
        raise mixed_by_basis(len(prior), selection)
    if len(prior) != P:
        raise ValueError(
            f"prior_precision must be one number, one per parameter tensor ({n_tensors}) or one per parameter "
            f"({P}); got {len(prior)}."
        )


def mixed_by_basis(n: int, selection: ParameterSelection) -> ValueError:
    """Return the error of n prior precisions in a Kronecker basis."""
    return ValueError(
        f"A Kronecker posterior or complement takes one prior_precision, or one per parameter tensor "
        f"({len(selection.names)}), because its basis mixes the entries of a tensor; got {n}. For one per parameter, "
        "take hessian_structure='lowrank' with complement='diagonal' or 'none'."
    )


def is_of_tensors(prior: Float[Tensor, " _"], selection: ParameterSelection) -> bool:
    """Return whether a prior precision is the same for all entries of each parameter tensor."""
    if len(prior) != selection.n_parameters:
        return True
    return all(bool((part == part[0]).all()) for part in prior.detach().split(list(selection.sizes)))


def check_prior_mean(mean: Tensor, selection: ParameterSelection | None) -> None:
    """Check the shape of a prior mean: one number, or one per parameter.

    Raises:
        ValueError: if it does not fit the parameters.
    """
    if mean.ndim > 1:
        raise ValueError(f"prior_mean must be one number or one per parameter; got shape {tuple(mean.shape)}.")
    if selection is not None and mean.numel() not in (1, selection.n_parameters):
        raise ValueError(
            f"prior_mean must be one number or one per parameter ({selection.n_parameters}); got {mean.numel()}."
        )


def expand_prior(prior: Float[Tensor, " _"], selection: ParameterSelection) -> Float[Tensor, " P"]:
    """Return the prior precision of every parameter."""
    if len(prior) == 1:
        return prior.expand(selection.n_parameters)
    if len(prior) == selection.n_parameters:
        return prior
    return prior.repeat_interleave(torch.tensor(selection.sizes, device=prior.device))
