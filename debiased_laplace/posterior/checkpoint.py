"""The state of a fitted posterior: tensors, strings and numbers, bound to the trained weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.splitting import SubBatches
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.estimate import CurvatureEstimate
from debiased_laplace.debiasing.magnitudes import Magnitudes
from debiased_laplace.linalg.eigenpairs import SolverOutcome
from debiased_laplace.posterior.fitting import Fit
from debiased_laplace.posterior.hyperparameters import estimator_options
from debiased_laplace.posterior.predictions import PredictiveInterface

VERSION = 1


def state_of(la: PredictiveInterface) -> dict[str, Any]:
    """The state; no tensor of it is shared with the posterior."""
    fit = la.fitted
    estimate, split, identities = fit.estimate, fit.split, fit.identities
    state: dict[str, Any] = {
        "version": VERSION,
        "cls_name": type(la).__name__,
        "likelihood": la.likelihood,
        "weights_fingerprint": la.weights_fingerprint,
        "parameter_names": "\n".join(la._selection.names),
        "mean": la.mean,
        "prior_mean": la.prior_mean,
        "prior_precision": la.prior_precision,
        "sigma_noise": la.sigma_noise,
        "temperature": la.temperature,
        "enable_backprop": la.enable_backprop,
        "loss": fit.loss,
        "n_outputs": fit.n_outputs,
        "n_data": split.n_data,
        "option_rank": -1 if la._options.rank is None else la._options.rank,
        "option_magnitudes": la._options.magnitudes,
        "option_complement": la._options.complement,
        "option_solver": la._options.solver,
        "option_seed": la._options.seed,
        "curvature_diagonal": estimate.curvature.diagonal,
        "curvature_directions": estimate.curvature.directions,
        "curvature_weights": estimate.curvature.weights,
        "curvature_source": estimate.source,
        "magnitudes_values": estimate.magnitudes.values,
        "magnitudes_standard_errors": estimate.magnitudes.standard_errors,
        "magnitudes_in_sample": estimate.magnitudes.in_sample,
        "magnitudes_n_floored": estimate.magnitudes.n_floored,
        "solver": estimate.outcome.solver,
        "solver_converged": estimate.outcome.converged,
        "solver_products": estimate.outcome.products,
        "solver_reason": estimate.outcome.reason,
        "split_direction_indices": split.direction_indices,
        "split_magnitude_indices": split.magnitude_indices,
        "split_shared": split.shared,
        "samples_hashes": identities.hashes,
        "samples_positions": identities.positions,
        "samples_n_root": identities.n_root,
        "samples_augmented": identities.augmented,
    }
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def restore(la: PredictiveInterface, state: dict[str, Any]) -> None:
    """Make a posterior what a state says.

    Raises:
        ValueError: if entries are missing, or the state belongs to something else; the posterior stays as it was.
    """
    _check(la, state)
    before = dict(la.__dict__)
    try:
        _restore(la, state)
    except Exception as error:
        la.__dict__.clear()
        la.__dict__.update(before)
        if isinstance(error, ValueError):
            raise
        if isinstance(error, KeyError):
            raise ValueError(f"The state lacks the entry {error}.") from error
        raise ValueError(f"The state is damaged: {type(error).__name__}: {error}") from error


def _restore(la: PredictiveInterface, state: dict[str, Any]) -> None:
    like = la._selection.vector()

    def tensor(key: str) -> Tensor:
        return state[key].detach().clone().to(like)

    estimate = CurvatureEstimate(
        LowRankCurvature(
            tensor("curvature_diagonal"),
            tensor("curvature_directions"),
            tensor("curvature_weights"),
        ),
        Magnitudes(
            tensor("magnitudes_values"),
            tensor("magnitudes_standard_errors"),
            tensor("magnitudes_in_sample"),
            state["magnitudes_n_floored"],
        ),
        SolverOutcome(
            state["solver"],
            state["solver_converged"],
            state["solver_products"],
            state["solver_reason"],
        ),
        state["curvature_source"],
    )
    split = SubBatches(
        state["split_direction_indices"].clone(),
        state["split_magnitude_indices"].clone(),
        state["n_data"],
        state["split_shared"],
    )
    identities = SampleIdentities(
        state["samples_hashes"].clone(),
        state["samples_positions"].clone(),
        state["samples_n_root"],
        state["samples_augmented"],
    )
    options = estimator_options(
        rank=None if state["option_rank"] < 0 else state["option_rank"],
        magnitudes=state["option_magnitudes"],
        complement=state["option_complement"],
        solver=state["option_solver"],
        seed=state["option_seed"],
    )
    curvature = estimate.curvature
    P, k = len(like), curvature.directions.shape[-1]
    fits = curvature.directions.shape == (P, k) and curvature.weights.shape == (k,)
    if not fits or curvature.diagonal.numel() not in (1, P):
        raise ValueError(f"Expected directions of shape ({P}, k) with k weights, and a diagonal of 1 or {P} entries.")
    la._options, la._split_options = options, replace(la._split_options, seed=options.seed)
    la.adopt(
        Fit(split, identities, estimate, state["loss"], state["n_outputs"], None),
        tensor("mean"),
        state["weights_fingerprint"],
    )
    la.prior_mean = tensor("prior_mean")
    la.prior_precision = tensor("prior_precision")
    la.sigma_noise = tensor("sigma_noise")
    la.temperature = state["temperature"]
    la.enable_backprop = state["enable_backprop"]
    la.posterior_precision.log_det  # noqa: B018  a precision that cannot be used is found out here


def _check(la: PredictiveInterface, state: dict[str, Any]) -> None:
    """Refuse a state that does not belong here."""
    if not isinstance(state, dict):
        raise ValueError(f"Expected a state as a dictionary; got {type(state).__name__}.")
    for key in ("version", "cls_name", "likelihood", "mean", "weights_fingerprint", "parameter_names"):
        if key not in state:
            raise ValueError(f"The state has no entry {key!r}; it is not one of this package.")
    if state["version"] != VERSION:
        raise ValueError(f"Expected a state of version {VERSION}; got {state['version']}.")
    if state["cls_name"] != type(la).__name__:
        raise ValueError(f"Expected the state of a {type(la).__name__}; got a {state['cls_name']}.")
    if state["likelihood"] != la.likelihood:
        raise ValueError(f"Expected likelihood {la.likelihood!r}; the state has {state['likelihood']!r}.")
    if len(state["mean"]) != la.n_params:
        raise ValueError(
            f"The state is over {len(state['mean'])} parameters, the model has {la.n_params} trainable ones."
        )
    if state["weights_fingerprint"] != la._selection.fingerprint():
        raise ValueError(
            "The state was fitted at other weights than the model has now; load the weights that it was "
            "fitted to first."
        )
    if state["parameter_names"] != "\n".join(la._selection.names) or not torch.equal(
        state["mean"].to(la._selection.vector()), la._selection.vector()
    ):
        raise ValueError(
            "The state is over other parameters than the model's trainable ones; expected the same ones with "
            "requires_grad as at the fit."
        )
