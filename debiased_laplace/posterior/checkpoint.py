"""State of a fitted posterior: tensors, strings and numbers, bound to the trained weights."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from hashlib import sha256
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.positions import OutputLayout
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.splitting import SubBatches
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.intervals import ErrorShape
from debiased_laplace.debiasing.magnitudes import Magnitudes
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate
from debiased_laplace.linalg.eigenpairs import SolverOutcome
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.shard import Shard
from debiased_laplace.linalg.vector_format import VectorDevice, VectorFormat
from debiased_laplace.posterior.fit import FitResult

VERSION = 8
_OTHER = {
    "cls_name": "Expected the state of a {expected}; got a {found}.",
    "likelihood": "Expected likelihood {expected!r}; the state has {found!r}.",
    "curvature": "Expected the state of a posterior with the {expected}; it has the {found}: pass the backend that it "
    "was fitted with.",
}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("loss", "magnitudes_sampled_share", "temperature", "split_weight"), float),
    **dict.fromkeys(("split_shared", "split_of_rows", "samples_augmented", "solver_converged"), bool),
    **dict.fromkeys(("targets_are_flat", "enable_backprop"), bool),
    **dict.fromkeys(("curvature_source", "solver", "solver_reason", "open_options", "checksum"), str),
    **dict.fromkeys(("n_outputs", "n_data", "n_data_given", "magnitudes_n_floored", "magnitudes_n_samples"), int),
    **dict.fromkeys(("solver_products", "samples_n_root", "basis_n_blocks"), int),
    **dict.fromkeys(("positions_n_classes", "positions_n_dimensions"), int),
}
_INTEGER_TENSORS = (
    "split_direction_indices",
    "split_magnitude_indices",
    "split_folds",
    "split_copies",
    "samples_hashes",
    "samples_positions",
)
_OF_THE_MACHINE = {"directions_device", "shard_directions"}
"""Options that are no part of a state."""

_OF_A_SHARD = ("curvature_directions", "curvature_diagonal", "basis_", "shard_", "checksum")
"""Starts of the names of entries that differ between the shards of a state."""

_SIDES = ("rows", "columns", "left", "right")
"""Entries of a block of the basis."""

HYPER_PARAMETERS = ("prior_mean", "prior_precision", "sigma_noise", "temperature", "enable_backprop")


def to_state(fit: FitResult, further: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fit as tensors, strings and numbers, none of them shared with it.

    Args:
        fit: of a posterior.
        further: entries on the posterior itself, the hyper-parameters among them.
    """
    estimate, split, identities = fit.estimate, fit.split, fit.identities
    state: dict[str, Any] = {
        "version": VERSION,
        **further,
        "weights_fingerprint": fit.fingerprint,
        "parameters": fit.selection.description,
        "last_layer_name": fit.selection.last_layer or "",
        "mean": fit.mean,
        "loss": fit.loss,
        "n_outputs": fit.n_outputs,
        "n_data": split.n_data,
        "targets_are_flat": fit.targets_are_flat,
        "positions_n_classes": 0 if fit.layout is None else fit.layout.n_classes,
        "positions_n_dimensions": 0 if fit.layout is None else fit.layout.n_dimensions,
        # None is -1, as some loaders of states do not know None
        "n_data_given": -1 if fit.n_data_given is None else fit.n_data_given,
        **{f"option_{name}": -1 if value is None else value for name, value in _options(fit).items()},
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
        "split_copies": split.copies,
        "split_weight": -1.0 if split.weight is None else float(split.weight),
        "split_of_rows": split.of_rows,
        "samples_hashes": identities.hashes,
        "samples_positions": identities.positions,
        "samples_n_root": identities.n_root,
        "samples_augmented": identities.augmented,
    }
    shard = estimate.curvature.shard
    if shard is not None:
        state["shard_first"], state["shard_last"] = shard.numbers.start, shard.numbers.stop
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
    state = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return {**state, "checksum": _checksum(state)}


def of_shards(states: Iterable[dict[str, Any]], selection: ParameterSelection, shard: Shard | None) -> dict[str, Any]:
    """Return the state with the directions of all parameters, or of some, from states that hold a part of them each.

    Args:
        states: one of them in memory at a time, as far as the caller loads them so.
        selection: parameters of the posterior.
        shard: of the parameters; None: all.

    Raises:
        ValueError: if states are damaged, belong to different fits, or leave out parameters.
    """
    sizes = list(selection.sizes)
    numbers = range(len(sizes)) if shard is None else range(shard.numbers.start, shard.numbers.stop)
    known: dict[str, Any] = {}
    pieces: dict[int, dict[str, Any]] = {}
    missing = set(range(len(sizes)))
    for state in states:
        _check_head(state, {})
        check_integrity(state)
        first, last = state.get("shard_first", 0), state.get("shard_last", len(sizes))
        common = {name: value for name, value in state.items() if not name.startswith(_OF_A_SHARD)}
        known = known or common
        if not _equal(known, common):
            raise ValueError("Expected the shards of one state; got states of different fits.")
        places = torch.tensor([0, *sizes[first:last]]).cumsum(0).tolist()
        missing -= set(range(first, last))
        for number, (start, stop) in zip(range(first, last), pairwise(places), strict=True):
            if number in numbers:
                pieces[number] = _piece(state, number - first, slice(start, stop))
    if missing:
        raise ValueError(f"Expected all shards of a state; none has the directions of parameters {sorted(missing)}.")
    own = [pieces[number] for number in numbers]
    diagonals = [piece["curvature_diagonal"] for piece in own]
    joined = {
        "curvature_directions": torch.cat([piece["curvature_directions"] for piece in own]),
        "curvature_diagonal": diagonals[0] if diagonals[0].ndim == 0 else torch.cat(diagonals),
    }
    blocks = {f"basis_{i}_{side}": piece[side] for i, piece in enumerate(own) for side in _SIDES if side in piece}
    state = {**known, **joined, **blocks, **({"basis_n_blocks": len(own)} if blocks else {})}
    return {**state, "checksum": _checksum(state)}


def _piece(state: Mapping[str, Any], i: int, place: slice) -> dict[str, Any]:
    """Return the entries of the i-th parameter of a shard."""
    diagonal = state["curvature_diagonal"]
    return {
        "curvature_directions": state["curvature_directions"][place],
        "curvature_diagonal": diagonal if diagonal.ndim == 0 else diagonal[place],
        **{side: state[f"basis_{i}_{side}"] for side in _SIDES if f"basis_{i}_{side}" in state},
    }


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Return whether entries are equal."""
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name] for name, value in a.items()
    )


def _checksum(state: Mapping[str, Any]) -> str:
    """Return a hash of all entries but the checksum itself, in any order and on any device."""
    digest = sha256()
    for name in sorted(state.keys() - {"checksum"}):
        value = state[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r};".encode())
            continue
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}={value.dtype}{tuple(value.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy().data)  # without a copy
    return digest.hexdigest()


def check_integrity(state: Mapping[str, Any]) -> None:
    """Refuse a state whose entries are not those that were written.

    Raises:
        ValueError: if the checksum differs.
    """
    if state["checksum"] != _checksum(state):
        raise ValueError(
            "The state is damaged: its entries are not those that were written, as its checksum tells. Expected an "
            "undamaged copy; hyper-parameters are changed on the posterior, after loading."
        )


def _basis_entries(basis: KroneckerBasis | None) -> dict[str, Any]:
    """Return both sides of every block; an empty tensor for the axes, so that a missing entry is an error."""
    if basis is None:
        return {}
    entries: dict[str, Any] = {"basis_n_blocks": len(basis.blocks)}
    for i, block in enumerate(basis.blocks):
        entries[f"basis_{i}_rows"], entries[f"basis_{i}_columns"] = block.rows, block.columns
        for side in ("left", "right"):
            own = getattr(block, side)
            entries[f"basis_{i}_{side}"] = torch.zeros(0, 0) if own is None else own
    return entries


def _options(fit: FitResult) -> dict[str, Any]:
    """Return the options of a fit that a state keeps."""
    return {name: value for name, value in asdict(fit.options).items() if name not in _OF_THE_MACHINE}


def from_state(
    state: dict[str, Any],
    model: nn.Module,
    selection: ParameterSelection | None,
    expected: Mapping[str, str],
    directions_device: VectorDevice,
    shard: Shard | None = None,
) -> FitResult:
    """Return the fit that a state holds.

    Args:
        state: as of `to_state`.
        model: the trained network.
        selection: parameters of the posterior; None where the state is to tell the last layer.
        expected: entries that have to agree.
        directions_device: where directions are held.
        shard: of the parameters whose directions the state has; None: all.

    Raises:
        ValueError: if entries are missing or damaged, or belong to another posterior, other parameters or weights.
    """
    try:
        with torch.inference_mode(False):
            _check_head(state, expected)
            _check_entries(state)
            if selection is None:
                selection = ParameterSelection.all_weights(model).layer(state["last_layer_name"])
            _check_parameters(state, selection)
            if "shard_first" in state:
                raise ValueError(
                    "The state is one of several shards; expected all of them, load_state_dict([state, ...])."
                )
            return _fit(state, selection, directions_device, shard)
    except ValueError:
        raise
    except KeyError as error:
        raise ValueError(f"The state lacks the entry {error}.") from error
    except Exception as error:
        raise ValueError(f"The state is damaged: {type(error).__name__}: {error}") from error


def _fit(
    state: dict[str, Any], selection: ParameterSelection, directions_device: VectorDevice, shard: Shard | None
) -> FitResult:
    like = selection.vector()
    names = {field.name for field in fields(EstimatorOptions)} - _OF_THE_MACHINE
    given = {name: state[f"option_{name}"] for name in names}
    given["rank"] = None if given["rank"] < 0 else given["rank"]
    options = EstimatorOptions(**given, directions_device=directions_device, shard_directions=shard is not None)
    layout = state["positions_n_classes"], state["positions_n_dimensions"]
    split = SubBatches(
        _on_cpu(state["split_direction_indices"]),
        _on_cpu(state["split_magnitude_indices"]),
        state["n_data"],
        state["split_shared"],
        _on_cpu(state["split_folds"]) if len(state["split_folds"]) else None,
        _on_cpu(state["split_copies"]),
        None if state["split_weight"] < 0 else state["split_weight"],
        state["split_of_rows"],
    )
    identities = SampleIdentities(
        _on_cpu(state["samples_hashes"]),
        _on_cpu(state["samples_positions"]),
        state["samples_n_root"],
        state["samples_augmented"],
    )
    if len(identities.hashes) != split.n_samples or len(identities.positions) != split.n_samples:
        raise ValueError(f"Expected the identities of {split.n_samples} samples; the state has {len(identities)}.")
    # what the posterior itself reads is missed here too
    for name in (*HYPER_PARAMETERS, "open_options", "checksum"):
        _ = state[name]
    return FitResult(
        selection=selection,
        mean=_like(state["mean"], like),
        fingerprint=state["weights_fingerprint"],
        split=split,
        identities=identities,
        estimate=_estimate(state, like, options.vector_format, shard),
        loss=state["loss"],
        n_outputs=state["n_outputs"],
        options=options,
        targets_are_flat=state["targets_are_flat"],
        layout=OutputLayout(*layout) if all(layout) else None,
        n_data_given=None if state["n_data_given"] < 0 else state["n_data_given"],
    )


def _on_cpu(positions: Tensor) -> Tensor:
    return positions.detach().to("cpu", copy=True)


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(like, copy=True)


def _estimate(
    state: dict[str, Any], like: Tensor, vector_format: VectorFormat, shard: Shard | None
) -> CurvatureEstimate:
    n_own = len(like) if shard is None else len(shard.own(like))
    curvature = LowRankCurvature(
        _like(state["curvature_diagonal"], like),
        vector_format.copied(state["curvature_directions"].detach(), like),
        _like(state["curvature_weights"], like),
        _basis(state, like, n_own),
        _like(state["curvature_metric"], like) if state["option_metric"] == "kron" else None,
        _like(state["curvature_error_variances"], like) if state["option_inverse_correction"] != "none" else None,
        shard,
    )
    P, k = len(like), curvature.directions.shape[-1]
    fits = curvature.directions.shape == (n_own, k) and curvature.weights.shape == (k,)
    if not fits or curvature.diagonal.numel() not in (1, n_own):
        raise ValueError(
            f"Expected directions of shape ({n_own}, k) with k weights, and a diagonal of 1 or {n_own} entries."
        )
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


def _basis(state: dict[str, Any], like: Tensor, n_parameters: int) -> KroneckerBasis | None:
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
    if basis.n_parameters != n_parameters:
        raise ValueError(f"Expected a basis of {n_parameters} vectors; the state has {basis.n_parameters}.")
    return basis


def _check_head(state: dict[str, Any], expected: Mapping[str, str]) -> None:
    """Refuse a state of another kind of posterior."""
    if not isinstance(state, dict):
        raise ValueError(f"Expected a state as a dictionary; got {type(state).__name__}.")
    for key in ("version", *expected, "weights_fingerprint", "parameters", "last_layer_name", "mean"):
        if key not in state:
            raise ValueError(f"The state has no entry {key!r}; it is not one of this package, or of an older version.")
    if state["version"] != VERSION:
        raise ValueError(
            f"Expected a state of version {VERSION}; got {state['version']}. Fit again, or load it with the version "
            "of the package that wrote it."
        )
    for key, own in expected.items():
        if state[key] != own:
            raise ValueError(_OTHER[key].format(expected=own, found=state[key]))


def _check_entries(state: dict[str, Any]) -> None:
    """Refuse entries of another type, and numbers that are not finite."""
    weighted = float(state["split_weight"]) >= 0
    for name, value in state.items():
        # with weights, N is their sum
        of_weights = weighted and name == "n_data" and isinstance(value, float)
        kind = float if of_weights else _TYPES.get(name, type(value))
        if type(value) is not kind:
            raise ValueError(f"Expected the state's {name!r} as {kind.__name__}; got {value!r}.")
        if name in _INTEGER_TENSORS and (not isinstance(value, Tensor) or value.dtype != torch.int64):
            raise ValueError(f"Expected the state's {name!r} as a tensor of torch.int64.")
        if isinstance(value, Tensor | float) and not _is_finite(torch.as_tensor(value)):
            raise ValueError(f"Expected finite numbers in the state; {name!r} has NaN or infinity.")


def _is_finite(value: Tensor) -> bool:
    # extremes are NaN where an entry is, and take no memory
    return not value.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(value))


def _check_parameters(state: dict[str, Any], selection: ParameterSelection) -> None:
    """Refuse a state of another dtype, other parameters or weights."""
    center, mean = selection.vector(), state["mean"]
    if mean.shape == center.shape and mean.dtype != center.dtype:
        raise ValueError(
            f"The state is of a model with dtype {mean.dtype}; this model has {center.dtype}. Expected the same: load "
            f"it beside model.to({mean.dtype}), with the weights of the fit."
        )
    if not selection.matches(str(state["weights_fingerprint"])):
        raise ValueError(
            "The state was fitted at other weights than the model has now; load the weights that it was "
            "fitted to first."
        )
    described = state["parameters"] == selection.description
    if not described or mean.shape != center.shape or not torch.equal(mean.to(center), center):
        raise ValueError(
            f"The state is over other parameters ({len(mean)}) than this posterior ({len(center)}); expected "
            "the same ones with requires_grad as at the fit, and the same subset of weights."
        )
