"""The samples' curvature by what it is used for, and the estimate made from it."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.magnitudes import Magnitudes
from debiased_laplace.linalg.eigenpairs import SolverOutcome


@dataclass(frozen=True, eq=False)
class SplitCurvature:
    """Curvature of the direction samples and of the magnitude samples.

    Attributes:
        directions: of the samples for the directions.
        magnitudes: of the samples for the magnitudes, disjoint from the direction samples; None where there are none.
        folds: fold of each direction sample; None without cross-fitting.
        n_data: size N of the data set.
    """

    directions: SubBatchCurvature
    magnitudes: SubBatchCurvature | None
    folds: Int64[Tensor, " a"] | None
    n_data: int

    @property
    def effective_folds(self) -> Int64[Tensor, " a"] | None:
        """Fold of each sample; None where the samples are all the data, whose own curvature is exact."""
        return self.folds if self.share < 1 or self.directions.is_random else None

    @property
    def share(self) -> float:
        """Share f of the direction samples in the data set."""
        return self.directions.n_samples / self.n_data


@dataclass(frozen=True, eq=False)
class CurvatureEstimate:
    """Estimate of the full batch's mean curvature.

    Attributes:
        curvature: low rank plus diagonal.
        magnitudes: curvatures along the directions (of a Kronecker structure, along the basis) with standard errors.
        outcome: of the eigensolver.
        source: the engine or backend that computed the curvature along the directions.
        dropped: largest eigenvalue below the threshold of `rank=None`.
    """

    curvature: LowRankCurvature
    magnitudes: Magnitudes
    outcome: SolverOutcome
    source: str
    dropped: float = 0.0
