"""What kind of estimate is asked for, and what comes out."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.curvature.kfac import KfacApproximation
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.debiasing.complement import ComplementKind, LowRankCurvature
from debiased_laplace.debiasing.directions import Solver
from debiased_laplace.debiasing.magnitudes import Magnitudes
from debiased_laplace.linalg.eigenpairs import SolverOutcome

Structure = Literal["lowrank", "kron", "full"]
MagnitudesKind = Literal["held_out", "cross_fitted", "same_batch"]
KronBasis = Literal["row_matrices", "kfac"]
KronMagnitudes = Literal["exact", "kronecker"]
Metric = Literal["euclidean", "kron"]
InverseCorrection = Literal["none", "second_order"]


@dataclass(frozen=True)
class EstimatorOptions:
    """What kind of estimate; the names are those of the public constructor."""

    rank: int | None
    magnitudes: MagnitudesKind
    complement: ComplementKind
    solver: Solver
    seed: int
    n_folds: int = 8
    structure: Structure = "lowrank"
    kron_basis: KronBasis = "row_matrices"
    kron_magnitudes: KronMagnitudes = "exact"
    kfac_approx: KfacApproximation = "expand"
    metric: Metric = "euclidean"
    inverse_correction: InverseCorrection = "none"


@dataclass(frozen=True, eq=False)
class SplitCurvature:
    """The curvature of the samples, by what they are used for.

    Attributes:
        directions: of the samples that the directions come from.
        magnitudes: of those that the magnitudes come from, disjoint from them; None where there are no others.
        folds: of cross-fitting, the fold of every direction sample; None without.
        n_data: N.
    """

    directions: SubBatchCurvature
    magnitudes: SubBatchCurvature | None
    folds: Int64[Tensor, " a"] | None
    n_data: int

    @property
    def effective_folds(self) -> Int64[Tensor, " a"] | None:
        """The folds, where they have a say: where the samples are all the data, what these say themselves is exact."""
        return self.folds if self.share < 1 or self.directions.is_random else None

    @property
    def share(self) -> float:
        """The share f of the direction samples in the whole data set."""
        return self.directions.n_samples / self.n_data


@dataclass(frozen=True, eq=False)
class CurvatureEstimate:
    """An estimate of the full batch's mean curvature.

    Attributes:
        curvature: low rank plus diagonal, in a basis where there is one.
        magnitudes: along the directions, or along the basis, with their errors.
        outcome: of the eigensolver.
        source: who computed the curvature along the directions.
        dropped: the largest curvature that counted as not supported by the direction samples.
    """

    curvature: LowRankCurvature
    magnitudes: Magnitudes
    outcome: SolverOutcome
    source: str
    dropped: float = 0.0


RANKS = (25, 100, 400, None)
"""The ranks among which `rank="auto"` chooses."""

SHARES = (0.25, 0.5, 0.75)
"""The shares of the directions among which `direction_samples="auto"` chooses."""


@dataclass(frozen=True)
class Trial:
    """One kind of estimate among those to choose from.

    Attributes:
        options: what kind.
        direction_share: the share of the samples that the directions come from, of `held_out`.
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
    """What a user asked for: options, some of them left to be chosen by held-out KL.

    Attributes:
        options: as given, or anything where they are open.
        open: names of the constructor's arguments given as "auto".
    """

    options: EstimatorOptions
    open: frozenset[str] = frozenset()

    def trials(self, direction_share: float, largest_rank: int) -> list[Trial]:
        """Every combination of what is open.

        Args:
            direction_share: of `held_out`, where that is not open.
            largest_rank: that there can be; larger ones all mean the same.
        """
        given = self.options
        kinds = get_args(MagnitudesKind) if "magnitudes" in self.open else (given.magnitudes,)
        complements = get_args(ComplementKind) if "complement" in self.open else (given.complement,)
        ranks = [r for r in RANKS if r is None or r < largest_rank] if "rank" in self.open else [given.rank]
        metrics = get_args(Metric) if "metric" in self.open else (given.metric,)
        found = []
        for kind, complement, rank, metric in product(kinds, complements, ranks, metrics):
            if metric == "kron" and complement != "kron":
                continue
            options = replace(given, magnitudes=kind, complement=complement, rank=rank, metric=metric)
            open_share = kind == "held_out" and "direction_samples" in self.open
            found += [Trial(options, share) for share in (SHARES if open_share else (direction_share,))]
        return found
