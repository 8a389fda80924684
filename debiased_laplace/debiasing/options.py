"""Options of the curvature estimate, and the combinations that `"auto"` chooses from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal, get_args

import torch

from debiased_laplace.checks import boolean, integer, one_of
from debiased_laplace.curvature.kfac import KfacApproximation
from debiased_laplace.debiasing.complement import ComplementKind
from debiased_laplace.debiasing.directions import Solver
from debiased_laplace.linalg.vector_format import VectorDevice, VectorFormat

Structure = Literal["lowrank", "kron", "full"]
MagnitudesKind = Literal["held_out", "cross_fitted", "same_batch"]
KronBasis = Literal["row_matrices", "kfac"]
KronMagnitudes = Literal["exact", "kronecker"]
Metric = Literal["euclidean", "kron"]
InverseCorrection = Literal["none", "second_order"]
DirectionsDtype = Literal["model", "bfloat16"]

_KINDS: dict[str, Any] = {
    "structure": Structure,
    "magnitudes": MagnitudesKind,
    "complement": ComplementKind,
    "solver": Solver,
    "kron_basis": KronBasis,
    "kron_magnitudes": KronMagnitudes,
    "kfac_approx": KfacApproximation,
    "metric": Metric,
    "inverse_correction": InverseCorrection,
    "directions_dtype": DirectionsDtype,
    "directions_device": VectorDevice,
}
_STRUCTURE_OF = {
    "rank": "lowrank",
    "complement": "lowrank",
    "metric": "lowrank",
    "solver": "lowrank",
    "directions_dtype": "lowrank",
    "directions_device": "lowrank",
    "shard_directions": "lowrank",
    "kron_basis": "kron",
    "kron_magnitudes": "kron",
    "kfac_approx": "kron",
}
_UNTIL_CHOSEN = {"rank": None, "magnitudes": "cross_fitted", "complement": "none", "metric": "euclidean"}


@dataclass(frozen=True)
class EstimatorOptions:
    """Options of the estimate, with the names of the public constructor and checked against each other.

    Attributes:
        complement: None becomes "none" if the directions span the whole space ("kron", "full"). For "lowrank" it stays
            None until `resolved`.

    Raises:
        ValueError: if an option is out of range, or belongs to another structure.
    """

    structure: Structure = "lowrank"
    rank: int | None = None
    magnitudes: MagnitudesKind = "cross_fitted"
    n_folds: int = 8
    complement: ComplementKind | None = None
    metric: Metric = "euclidean"
    inverse_correction: InverseCorrection = "none"
    solver: Solver = "auto"
    seed: int = 0
    kron_basis: KronBasis = "row_matrices"
    kron_magnitudes: KronMagnitudes = "exact"
    kfac_approx: KfacApproximation = "expand"
    directions_dtype: DirectionsDtype = "model"
    directions_device: VectorDevice = "model"
    shard_directions: bool = False

    def __post_init__(self) -> None:
        if self.complement is None and self.structure != "lowrank":
            object.__setattr__(self, "complement", "none")
        for name, kind in _KINDS.items():
            if name != "complement" or self.complement is not None:
                one_of(getattr(self, name), kind, name, also=("auto",) if name in _UNTIL_CHOSEN else ())
        if self.rank is not None:
            object.__setattr__(self, "rank", integer(self.rank, "rank", minimum=1, also=", None or 'auto'"))
        object.__setattr__(self, "n_folds", integer(self.n_folds, "n_folds", minimum=2))
        object.__setattr__(self, "seed", integer(self.seed, "seed"))
        self._check_structure()

    def _check_structure(self) -> None:
        """Raise if an option is given that the structure ignores."""
        for field in fields(self):
            value, structure = getattr(self, field.name), _STRUCTURE_OF.get(field.name, self.structure)
            unused = value in (field.default, "none") if field.name == "complement" else value == field.default
            of_complement = self.complement in (None, "kron") and field.name in ("kron_basis", "kfac_approx")
            if structure != self.structure and not unused and not of_complement:
                raise ValueError(
                    f"{field.name} requires hessian_structure={structure!r}; got {field.name}={value!r} with "
                    f"{self.structure!r}."
                )
        if self.inverse_correction != "none" and self.kron_magnitudes == "kronecker":
            raise ValueError(
                "inverse_correction needs standard errors, which kron_magnitudes='kronecker' does not have; expected "
                "'exact'."
            )
        for name in ("directions_dtype", "directions_device"):
            if getattr(self, name) != "model" and self.metric != "euclidean":
                raise ValueError(
                    f"{name}={getattr(self, name)!r} requires metric='euclidean'; got it with {self.metric!r}."
                )
        boolean(self.shard_directions, "shard_directions")
        if self.shard_directions:
            self._check_shard()
        if self.kfac_approx != "expand" and self.kron_basis != "kfac":
            raise ValueError(f"kfac_approx requires kron_basis='kfac'; got it with {self.kron_basis!r}.")

    def _check_shard(self) -> None:
        """Raise if an option is not built for directions of which each process holds some entries."""
        expected = {"metric": "euclidean", "inverse_correction": "none", "kron_basis": "row_matrices"}
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(f"shard_directions=True requires {name}={value!r}; got {getattr(self, name)!r}.")
        if self.solver == "lanczos":
            raise ValueError("shard_directions=True requires solver='auto' or 'gram'; got 'lanczos'.")

    @property
    def vector_format(self) -> VectorFormat:
        """How directions are held."""
        return VectorFormat(torch.bfloat16 if self.directions_dtype == "bfloat16" else None, self.directions_device)

    def resolved(self, *, prior_of_blocks: bool) -> "EstimatorOptions":
        """Return the options with the default complement: "kron", or "diagonal" under a prior per parameter.

        Args:
            prior_of_blocks: whether the prior precision is the same for all entries of a parameter tensor.
        """
        if self.complement is not None:
            return self
        return replace(self, complement="kron" if prior_of_blocks or self.metric == "kron" else "diagonal")


RANKS = (25, 100, 400, None)
"""Candidates of `rank="auto"`."""

SHARES = (0.25, 0.5, 0.75)
"""Candidates of `direction_samples="auto"`, as shares of the samples."""


@dataclass(frozen=True)
class Trial:
    """A candidate of an automatic choice.

    Attributes:
        options: options of its estimate.
        direction_share: share of the samples that give directions; for "held_out".
    """

    options: EstimatorOptions
    direction_share: float

    def __str__(self) -> str:
        shown = [f"magnitudes={self.options.magnitudes!r}"]
        if self.options.magnitudes == "held_out":
            shown.append(f"direction_samples={self.direction_share:.3g}")
        if self.options.structure == "lowrank":
            shown += [f"rank={self.options.rank}", f"complement={self.options.complement!r}"]
        if self.options.metric != "euclidean":
            shown.append(f"metric={self.options.metric!r}")
        return ", ".join(shown)


@dataclass(frozen=True)
class Request:
    """Options of the constructor, some of them to be chosen by held-out KL.

    Attributes:
        options: as given, with placeholders for the open ones.
        open: names of the arguments that were given as "auto".
    """

    options: EstimatorOptions
    open: frozenset[str] = frozenset()

    @classmethod
    def of(cls, structure: Structure, direction_samples: object, given: Mapping[str, Any]) -> "Request":
        """Create a request from the constructor's arguments.

        Args:
            structure: of the curvature.
            direction_samples: as given, possibly "auto".
            given: options of the estimator by name; missing ones take their defaults.

        Raises:
            ValueError: if an option is out of range, or "auto" although the structure ignores it.
        """
        values = {**{f.name: f.default for f in fields(EstimatorOptions)}, **given, "structure": structure}
        opened = {name for name in _UNTIL_CHOSEN if isinstance(values[name], str) and values[name] == "auto"}
        for name in opened:
            if structure != _STRUCTURE_OF.get(name, structure):
                raise ValueError(f"{name} requires hessian_structure='lowrank'; got {name}='auto' with {structure!r}.")
        one_of(values["metric"], Metric, "metric", also=("auto",))
        if values["metric"] in ("kron", "auto") and values["complement"] not in (None, "kron", "auto"):
            raise ValueError(
                f"metric={values['metric']!r} requires complement='kron', whose basis gives its coordinates; got "
                f"complement={values['complement']!r}."
            )
        if isinstance(direction_samples, str) and direction_samples == "auto":
            if values["magnitudes"] not in ("auto", "held_out"):
                raise ValueError(
                    "direction_samples='auto' requires magnitudes='held_out' or 'auto'; got magnitudes="
                    f"{values['magnitudes']!r}, for which every sample gives directions."
                )
            opened.add("direction_samples")
        values.update({name: _UNTIL_CHOSEN[name] for name in opened if name in _UNTIL_CHOSEN})
        if values["metric"] == "kron":
            values["complement"] = "kron"
        return cls(EstimatorOptions(**values), frozenset(opened))

    def resolved(self, *, prior_of_blocks: bool) -> "Request":
        """Return the request with the default complement of a prior; see `EstimatorOptions.resolved`."""
        return replace(self, options=self.options.resolved(prior_of_blocks=prior_of_blocks))

    def trials(self, direction_share: float, largest_rank: int) -> list[Trial]:
        """Return every combination of the open options.

        Args:
            direction_share: share of the directions for "held_out", unless it is open.
            largest_rank: upper bound of the rank; larger candidates are left out.
        """
        given = self.options
        kinds = get_args(MagnitudesKind) if "magnitudes" in self.open else (given.magnitudes,)
        complements = get_args(ComplementKind) if "complement" in self.open else (given.complement,)
        ranks = [r for r in RANKS if r is None or r < largest_rank] if "rank" in self.open else [given.rank]
        metrics = get_args(Metric) if "metric" in self.open else (given.metric,)
        trials = []
        for kind, complement, rank, metric in product(kinds, complements, ranks, metrics):
            if metric == "kron" and complement != "kron":
                continue
            options = replace(given, magnitudes=kind, complement=complement, rank=rank, metric=metric)
            open_share = kind == "held_out" and "direction_samples" in self.open
            trials += [Trial(options, share) for share in (SHARES if open_share else (direction_share,))]
        return trials
