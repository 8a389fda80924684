"""The state of a fitted posterior: tensors, strings and numbers, bound to the trained weights."""

from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.splitting import SubBatches
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.intervals import ErrorShape
from debiased_laplace.debiasing.magnitudes import Magnitudes
from debiased_laplace.debiasing.options import CurvatureEstimate, EstimatorOptions, Request
from debiased_laplace.linalg.eigenpairs import SolverOutcome
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.posterior.fitting import Fit
from debiased_laplace.posterior.hyperparameters import estimator_options
from debiased_laplace.posterior.predictions import PredictiveInterface

VERSION = 5


def state_of(la: PredictiveInterface) -> dict[str, Any]:
    """The state; no tensor of it is shared with the posterior."""
    fit = la.fitted
    estimate, split, identities = fit.estimate, fit.split, fit.identities
    state: dict[str, Any] = {
        "version": VERSION,
        "cls_name": type(la).__name__,
        "likelihood": la.likelihood,
        "curvature": la._problem.backend.kind,
        "weights_fingerprint": la.weights_fingerprint,
        "parameters": la.selection.description,
        "last_layer_name": la.selection.last_layer or "",
        "mean": la._center,
        "prior_mean": la.prior_mean,
        "prior_precision": la.prior_precision,
        "sigma_noise": la.sigma_noise,
        "temperature": la.temperature,
        "enable_backprop": la.enable_backprop,
        "loss": fit.loss,
        "n_outputs": fit.n_outputs,
        "n_data": split.n_data,
        **{f"option_{name}": value for name, value in _storable(asdict(la._options)).items()},
        "open_options": " ".join(sorted(la._request.open)),
        "curvature_diagonal": estimate.curvature.diagonal,
        "curvature_directions": estimate.curvature.directions,
        "curvature_weights": estimate.curvature.weights,
        **_basis_entries(estimate.curvature.basis),
        "curvature_source": estimate.source,
        "magnitudes_values": estimate.magnitudes.values,
        "magnitudes_in_sample": estimate.magnitudes.in_sample,
        "magnitudes_n_floored": estimate.magnitudes.n_floored,
        "solver": estimate.outcome.solver,
        "solver_converged": estimate.outcome.converged,
        "solver_products": estimate.outcome.products,
        "solver_reason": estimate.outcome.reason,
        "split_direction_indices": split.direction_indices,
        "split_magnitude_indices": split.magnitude_indices,
        "split_shared": split.shared,
        "split_folds": torch.zeros(0, dtype=torch.int64) if split.folds is None else split.folds,
        "samples_hashes": identities.hashes,
        "samples_positions": identities.positions,
        "samples_n_root": identities.n_root,
        "samples_augmented": identities.augmented,
    }
    if estimate.magnitudes.standard_errors is not None:
        state["magnitudes_standard_errors"] = estimate.magnitudes.standard_errors
    shape = estimate.magnitudes.error_shape
    if shape is not None:
        state["magnitudes_skewness"], state["magnitudes_mismatch"] = shape.skewness, shape.mismatch
        state["magnitudes_n_samples"], state["magnitudes_sampled_share"] = shape.n_samples, shape.sampled_share
    if estimate.curvature.metric is not None:
        state["curvature_metric"] = estimate.curvature.metric
    if estimate.curvature.error_variances is not None:
        state["curvature_error_variances"] = estimate.curvature.error_variances
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """Options without None, which some loaders of states do not know."""
    return {name: -1 if value is None else value for name, value in options.items()}


def _basis_entries(basis: KroneckerBasis | None) -> dict[str, Any]:
    """The sides of every block; an empty one for the axes, so that a missing entry is not read as them."""
    if basis is None:
        return {}
    entries: dict[str, Any] = {"basis_n_blocks": len(basis.blocks)}
    for i, block in enumerate(basis.blocks):
        entries[f"basis_{i}_rows"], entries[f"basis_{i}_columns"] = block.rows, block.columns
        for side in ("left", "right"):
            own = getattr(block, side)
            entries[f"basis_{i}_{side}"] = torch.zeros(0, 0) if own is None else own
    return entries


def restore(la: PredictiveInterface, state: dict[str, Any]) -> None:
    """Make a posterior what a state says.

    Raises:
        ValueError: if entries are missing, or the state belongs to something else; the posterior stays as it was.
    """
    before = dict(la.__dict__)
    try:
        with torch.inference_mode(False):
            _check(la, state)
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
    selection = _selection(la, state)
    like = selection.vector()
    estimate = _estimate(state, like)
    split = SubBatches(
        state["split_direction_indices"].clone(),
        state["split_magnitude_indices"].clone(),
        state["n_data"],
        state["split_shared"],
        state["split_folds"].clone() if len(state["split_folds"]) else None,
    )
    identities = SampleIdentities(
        state["samples_hashes"].clone(),
        state["samples_positions"].clone(),
        state["samples_n_root"],
        state["samples_augmented"],
    )
    options = {field.name: state[f"option_{field.name}"] for field in fields(EstimatorOptions)}
    if options["structure"] != la._structure:
        raise ValueError(f"Expected the structure {la._structure!r}; the state has {options['structure']!r}.")
    if len(identities.hashes) != split.n_samples or len(identities.positions) != split.n_samples:
        raise ValueError(f"Expected the identities of {split.n_samples} samples; the state has {len(identities)}.")
    options["rank"] = None if options["rank"] < 0 else options["rank"]
    chosen = estimator_options(options.pop("structure"), options)
    la._request, la._fit = Request(chosen, frozenset(state["open_options"].split())), None
    la._split_options = replace(la._split_options, seed=chosen.seed)
    # the prior of the state replaces the present one, which may not fit
    la._selection = selection
    la.prior_mean = _like(state["prior_mean"], like)
    la.prior_precision = _like(state["prior_precision"], like)
    la.adopt(
        selection,
        Fit(split, identities, estimate, state["loss"], state["n_outputs"], chosen, None),
        _like(state["mean"], like),
        state["weights_fingerprint"],
    )
    la.sigma_noise = _like(state["sigma_noise"], like)
    la.temperature = state["temperature"]
    la.enable_backprop = state["enable_backprop"]
    la.posterior_precision.log_det  # noqa: B018  a precision that cannot be used is found out here


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().clone().to(like)


def _estimate(state: dict[str, Any], like: Tensor) -> CurvatureEstimate:
    curvature = LowRankCurvature(
        _like(state["curvature_diagonal"], like),
        _like(state["curvature_directions"], like),
        _like(state["curvature_weights"], like),
        _basis(state, like),
        _like(state["curvature_metric"], like) if state["option_metric"] == "kron" else None,
        _like(state["curvature_error_variances"], like) if state["option_inverse_correction"] != "none" else None,
    )
    P, k = len(like), curvature.directions.shape[-1]
    fits = curvature.directions.shape == (P, k) and curvature.weights.shape == (k,)
    if not fits or curvature.diagonal.numel() not in (1, P):
        raise ValueError(f"Expected directions of shape ({P}, k) with k weights, and a diagonal of 1 or {P} entries.")
    variances, n_corrected = curvature.error_variances, k if state["option_structure"] != "kron" else P
    if variances is not None and variances.shape != (n_corrected,):
        raise ValueError(f"Expected {n_corrected} error variances; the state has {len(variances)}.")
    metric = curvature.metric
    if metric is not None and (metric.shape != (P,) or not bool((metric > 0).all())):
        raise ValueError(f"Expected a metric of {P} positive entries; got shape {tuple(metric.shape)}.")
    # products of factors look at no sample on its own
    magnitudes = Magnitudes(
        _like(state["magnitudes_values"], like),
        None,
        _like(state["magnitudes_in_sample"], like),
        state["magnitudes_n_floored"],
    )
    known = [magnitudes.values, magnitudes.in_sample]
    if state["option_kron_magnitudes"] != "kronecker":
        names = ("standard_errors", "skewness", "mismatch")
        errors, skewness, mismatch = (_like(state[f"magnitudes_{name}"], like) for name in names)
        n_samples, share = state["magnitudes_n_samples"], state["magnitudes_sampled_share"]
        shape = ErrorShape(skewness, mismatch, n_samples, share)
        magnitudes = replace(magnitudes, standard_errors=errors, error_shape=shape)
        known += [errors, skewness, mismatch]
    n_magnitudes = P if state["option_structure"] == "kron" else k
    lengths = {len(t) for t in known}
    if lengths != {n_magnitudes}:
        raise ValueError(f"Expected {n_magnitudes} magnitudes with their errors; the state has {sorted(lengths)}.")
    outcome = SolverOutcome(
        state["solver"], state["solver_converged"], state["solver_products"], state["solver_reason"]
    )
    return CurvatureEstimate(curvature, magnitudes, outcome, state["curvature_source"])


def _basis(state: dict[str, Any], like: Tensor) -> KroneckerBasis | None:
    if "kron" not in (state["option_structure"], state["option_complement"]):
        return None
    blocks: list[BasisBlock] = []
    for i in range(state["basis_n_blocks"]):
        rows, columns = state[f"basis_{i}_rows"], state[f"basis_{i}_columns"]
        sides: list[Tensor | None] = []
        for name, n in (("left", rows), ("right", columns)):
            side = state[f"basis_{i}_{name}"]
            if side.numel() and side.shape != (n, n):
                raise ValueError(f"Expected basis_{i}_{name} of shape ({n}, {n}); got {tuple(side.shape)}.")
            sides.append(_like(side, like) if side.numel() else None)
        blocks.append(BasisBlock(rows, columns, *sides))
    basis = KroneckerBasis(tuple(blocks))
    if basis.n_parameters != len(like):
        raise ValueError(f"Expected a basis of {len(like)} vectors; the state has {basis.n_parameters}.")
    return basis


def _selection(la: PredictiveInterface, state: dict[str, Any]) -> ParameterSelection:
    """The parameters that the posterior is over; of a last layer that is still to be found, the state's."""
    if la._selection is not None:
        return la._selection
    return ParameterSelection.all_weights(la.model).layer(state["last_layer_name"])


def _check(la: PredictiveInterface, state: dict[str, Any]) -> None:
    """Refuse a state that does not belong here."""
    if not isinstance(state, dict):
        raise ValueError(f"Expected a state as a dictionary; got {type(state).__name__}.")
    needed = ("version", "cls_name", "likelihood", "curvature", "weights_fingerprint", "parameters", "last_layer_name")
    for key in (*needed, "mean"):
        if key not in state:
            raise ValueError(f"The state has no entry {key!r}; it is not one of this package, or of an older version.")
    if state["version"] != VERSION:
        raise ValueError(f"Expected a state of version {VERSION}; got {state['version']}.")
    if state["cls_name"] != type(la).__name__:
        raise ValueError(f"Expected the state of a {type(la).__name__}; got a {state['cls_name']}.")
    if state["likelihood"] != la.likelihood:
        raise ValueError(f"Expected likelihood {la.likelihood!r}; the state has {state['likelihood']!r}.")
    if state["curvature"] != la._problem.backend.kind:
        raise ValueError(
            f"Expected the state of a posterior with the {la._problem.backend.kind}; it has the {state['curvature']}: "
            "pass the backend that it was fitted with."
        )
    selection = _selection(la, state)
    if state["weights_fingerprint"] != selection.fingerprint():
        raise ValueError(
            "The state was fitted at other weights than the model has now; load the weights that it was "
            "fitted to first."
        )
    center = selection.vector()
    if (
        state["parameters"] != selection.description
        or state["mean"].shape != center.shape
        or not torch.equal(state["mean"].to(center), center)
    ):
        raise ValueError(
            f"The state is over other parameters ({len(state['mean'])}) than this posterior ({len(center)}); expected "
            "the same ones with requires_grad as at the fit, and the same subset of weights."
        )
