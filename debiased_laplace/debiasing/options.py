"""What kind of estimate is asked for, and what comes out."""

from dataclasses import dataclass
from typing import Literal

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
