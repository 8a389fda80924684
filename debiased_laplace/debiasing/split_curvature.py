"""Curvature of the direction and magnitude samples, and the estimate computed from it."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.magnitudes import Magnitudes
from debiased_laplace.linalg.eigenpairs import SolverOutcome


@dataclass(frozen=True, eq=False)
class SplitCurvature:
    """Curvature of the direction samples and of the magnitude samples.

    Attributes:
        directions: curvature of the direction samples.
        magnitudes: curvature of the magnitude samples, disjoint from them; None if there are none.
        folds: fold of each direction sample; None without cross-fitting.
        n_data: size N of the data set, as a number of samples with their mean weight.
        known_factors: of drawn rows, what the curvature of each direction sample is multiplied by to be its part of
            the full batch; None for samples, of whose curvature that is the share f.
        rest: of drawn rows dealt to folds, what they stand for of the rows that were not drawn; None likewise.
    """

    directions: SubBatchCurvature
    magnitudes: SubBatchCurvature | None
    folds: Int64[Tensor, " a"] | None
    n_data: float
    known_factors: Float[Tensor, " a"] | None = None
    rest: SubBatchCurvature | None = None

    @property
    def known(self) -> SubBatchCurvature | None:
        """Of drawn rows, what the full batch contains of the direction samples exactly; None for samples."""
        return None if self.known_factors is None else self.directions.reweighted(self.known_factors)

    @property
    def effective_folds(self) -> Int64[Tensor, " a"] | None:
        """Fold of each sample; None if the samples are all the data, whose in-sample curvature is exact."""
        if self.known_factors is not None:
            draw = self.directions.draw
            return None if draw is not None and draw.is_exact else self.folds
        return self.folds if self.share < 1 or self.directions.is_random else None

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the direction samples' own curvature and of the others' in the estimate."""
        return (1.0, 1.0) if self.known_factors is not None else (self.share, 1 - self.share)

    @property
    def share(self) -> float:
        """Share f of the direction samples in the data set."""
        return self.directions.n_samples / self.n_data


@dataclass(frozen=True, eq=False)
class CurvatureEstimate:
    """Estimate of the full batch's mean curvature.

    Attributes:
        curvature: low rank plus diagonal.
        magnitudes: curvatures along the directions (Kronecker structure: along the basis), with standard errors.
        outcome: outcome of the eigensolver.
        source: engine or backend that computed the curvature along the directions.
        dropped: largest eigenvalue below the threshold of `rank=None`.
    """

    curvature: LowRankCurvature
    magnitudes: Magnitudes
    outcome: SolverOutcome
    source: str
    dropped: float = 0.0
