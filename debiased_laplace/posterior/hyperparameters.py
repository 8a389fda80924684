"""Checks of what laplace-torch accepts silently: precisions, noises and temperatures that are no numbers to use."""

import operator
import warnings
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from debiased_laplace.curvature.kfac import KfacApproximation
from debiased_laplace.debiasing.complement import ComplementKind
from debiased_laplace.debiasing.directions import Solver
from debiased_laplace.debiasing.options import (
    EstimatorOptions,
    InverseCorrection,
    KronBasis,
    KronMagnitudes,
    MagnitudesKind,
    Metric,
    Request,
    Structure,
)

Amount = int | float | Tensor


def positive(value: Amount, name: str) -> Amount:
    """The value, if every entry is positive and finite.

    Raises:
        ValueError: if it is not.
    """
    try:
        entries = torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.") from error
    if entries.numel() == 0 or not bool((entries.isfinite() & (entries > 0)).all()):
        shown = entries.flatten()[:4].tolist()
        raise ValueError(f"{name} must be positive and finite; got {shown}.")
    return value


def one_positive(value: Amount, name: str) -> Amount:
    """The value, if it is a single number, positive and finite.

    Raises:
        ValueError: if it is not.
    """
    n = torch.as_tensor(positive(value, name)).numel()
    if n != 1:
        raise ValueError(f"{name} must be one number; got {n}.")
    return value


def finite(value: Amount, name: str) -> Tensor:
    """The value as a tensor, if every entry is finite.

    Raises:
        ValueError: if it is not.
    """
    try:
        entries = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.") from error
    if entries.numel() == 0 or not bool(entries.isfinite().all()):
        raise ValueError(f"{name} must be finite; got {entries.flatten()[:4].tolist()}.")
    return entries


def name_of(option: object) -> str:
    """An option as a plain string, whether it came as one or as laplace-torch's enumeration of it."""
    return str(getattr(option, "value", option))


DEFAULT_COMPLEMENT: ComplementKind = "kron"
"""What is outside the directions, if nothing is said of it; structures without directions have no complement."""

_OPEN = {
    "rank": None,
    "magnitudes": "cross_fitted",
    "complement": "none",
    "metric": "euclidean",
    "direction_samples": 0.5,
}
"""What can be left to be chosen, and what stands in its place until it is."""


def integer(value: Any, name: str) -> int:
    """The value as a plain integer; NumPy's are integers too.

    Raises:
        ValueError: if it is not one.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be an integer; got {value!r}.")


def one_of(value: object, kind: object, name: str) -> None:
    """Check an option against its `Literal`.

    Raises:
        ValueError: if it is none of them.
    """
    available = get_args(kind)
    if value not in available:
        shown = [*available, "auto"] if name in _OPEN else list(available)
        raise ValueError(f"{name} must be one of {shown}; got {value!r}.")


def requested(structure: Structure, direction_samples: object, options: dict[str, Any]) -> tuple[Request, Any]:
    """What is asked for, checked, with what is left open; and the direction samples.

    Raises:
        ValueError: if an option is out of its range, or left open where the structure has no use for it.
    """
    given = {**options, "direction_samples": direction_samples}
    left = {name for name in _OPEN if isinstance(given[name], str) and given[name] == "auto"}
    for name in left:
        if structure not in _STRUCTURE_OF.get(name, (structure,)):
            raise ValueError(f"{name} is of hessian_structure='lowrank'; got {name}='auto' with {structure!r}.")
    if given["metric"] in ("kron", "auto") and given["complement"] not in ("kron", "auto"):
        raise ValueError(
            f"metric={given['metric']!r} is of complement='kron', which it takes its coordinates from; got "
            f"complement={given['complement']!r}."
        )
    if "direction_samples" in left and given["magnitudes"] not in ("auto", "held_out"):
        raise ValueError(
            f"direction_samples='auto' is of magnitudes='held_out' or 'auto'; with {given['magnitudes']!r} every "
            "sample gives directions."
        )
    given.update({name: _OPEN[name] for name in left})
    if given["metric"] == "kron":
        given["complement"] = "kron"
    samples = given.pop("direction_samples")
    return Request(estimator_options(structure, given), frozenset(left)), samples


def sample_amounts(directions: object, magnitudes: object) -> tuple[Any, Any]:
    """The numbers or shares of samples, checked as far as they can be without the samples.

    Raises:
        ValueError: if they are out of range.
    """
    for amount, name in ((directions, "direction_samples"), (magnitudes, "magnitude_samples")):
        if amount is None and name == "magnitude_samples":
            continue
        message = f"{name} is a number of samples (int, at least 1) or a share of them (float, below 1); got {amount!r}"
        whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
        if not whole and not (isinstance(amount, float) and 0 < amount < 1):
            raise ValueError(f"{message}.")
    return directions, magnitudes


def warn_of_no_effect(directions: object, magnitudes: object, request: Request) -> None:
    """Say so where the share of the directions was given and makes no difference: with others, that is."""
    kind = request.options.magnitudes
    splits = kind == "held_out" or "magnitudes" in request.open
    if not splits and magnitudes is None and directions != _OPEN["direction_samples"]:
        warnings.warn(
            f"direction_samples={directions} has no effect with magnitudes={kind!r}, where every sample gives "
            "directions: all samples are used. Expected magnitudes='held_out', or a loader of fewer samples.",
            stacklevel=4,
        )


def estimator_options(structure: Structure, options: dict[str, Any]) -> EstimatorOptions:
    """The estimator's options, checked; the names are those of the public constructor.

    Raises:
        ValueError: if an option is out of its range, or of another structure.
    """
    kinds = {
        "magnitudes": MagnitudesKind,
        "complement": ComplementKind,
        "metric": Metric,
        "inverse_correction": InverseCorrection,
        "solver": Solver,
        "kron_basis": KronBasis,
        "kron_magnitudes": KronMagnitudes,
        "kfac_approx": KfacApproximation,
    }
    for name, kind in kinds.items():
        one_of(options[name], kind, name)
    rank = options["rank"]
    rank = None if rank is None else integer(rank, "rank (an integer, None or 'auto')")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, or None; got {rank!r}.")
    n_folds = integer(options["n_folds"], "n_folds")
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2; got {n_folds}.")
    if structure != "lowrank" and options["complement"] == DEFAULT_COMPLEMENT:
        # nothing is outside a complete basis; who said nothing of it has not asked for one
        options = {**options, "complement": "none"}
    numbers = {"rank": rank, "seed": integer(options["seed"], "seed"), "n_folds": n_folds}
    checked = EstimatorOptions(structure=structure, **{**options, **numbers})
    _check_structure(checked)
    return checked


_STRUCTURE_OF: dict[str, tuple[str, ...]] = {
    "rank": ("lowrank",),
    "complement": ("lowrank",),
    "metric": ("lowrank",),
    "solver": ("lowrank",),
    "kron_basis": ("kron",),
    "kron_magnitudes": ("kron",),
    "kfac_approx": ("kron",),
}


def _check_structure(options: EstimatorOptions) -> None:
    """Refuse an option that the structure would silently ignore."""
    defaults = {field.name: field.default for field in fields(EstimatorOptions)}
    defaults.update(rank=None, complement="none", solver="auto")
    for name, structures in _STRUCTURE_OF.items():
        value = getattr(options, name)
        of_complement = options.complement == "kron" and name in ("kron_basis", "kfac_approx")
        if options.structure not in structures and value != defaults[name] and not of_complement:
            raise ValueError(
                f"{name} is of hessian_structure={' or '.join(map(repr, structures))}; got {name}={value!r} with "
                f"{options.structure!r}."
            )
    if options.inverse_correction != "none" and options.kron_magnitudes == "kronecker":
        raise ValueError(
            "inverse_correction needs standard errors, which kron_magnitudes='kronecker' does not have; expected "
            "'exact'."
        )
    if options.kfac_approx != "expand" and options.kron_basis != "kfac":
        raise ValueError(f"kfac_approx is of kron_basis='kfac'; got it with {options.kron_basis!r}.")
