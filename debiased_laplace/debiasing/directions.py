"""Leading eigenvectors of the direction samples' curvature, by the cheapest suitable solver."""

import warnings
from dataclasses import replace
from typing import Literal

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.linalg.eigenpairs import Eigenpairs, numerical_rank
from debiased_laplace.linalg.gram import dense_eigenpairs
from debiased_laplace.linalg.lanczos import lanczos
from debiased_laplace.linalg.vector_format import AS_COMPUTED, VectorFormat

Solver = Literal["auto", "gram", "lanczos"]

SUPPORTED = 1e-6
"""Eigenvalues above this fraction of the largest count as supported by the data."""

REQUESTED = 1e-10
"""Smallest fraction of the largest eigenvalue that counts if the rank is given."""

LANCZOS_RANK = 100
"""Number of directions for `rank=None` if only Lanczos is affordable."""

SWEEPS = 4
"""Passes over all rows of an estimate: inner products or factors, directions or moments, projections, norms."""

_LARGEST_BLOCK = 16
_PRODUCT = 40  # multiplications for a parameter and sample, per half product: linear layers 20, convolutions 40 to 60
_EIGENVECTORS = 5  # cost of all eigenvectors of a matrix, in products of two such matrices
_LARGEST_SIDE = 12_000  # of a matrix with all eigenvectors (`rank=None`): a minute or more on all cores


def find_directions(
    curvature: SubBatchCurvature,
    *,
    rank: int | None,
    solver: Solver,
    seed: int,
    threshold: float | None = None,
    n_folds: int = 0,
    vector_format: VectorFormat = AS_COMPUTED,
) -> Eigenpairs:
    """Compute the leading eigenpairs of a sub-batch's mean curvature.

    Args:
        curvature: of the direction samples.
        rank: number of directions; None keeps every direction that the samples support.
        solver: "gram" uses all rows at once (on the smaller side of their matrix), "lanczos" products only, "auto" the
            cheaper one that fits into the available memory.
        seed: of Lanczos' start vectors.
        threshold: smallest eigenvalue that counts, relative to the largest; None: as the rank implies.
        n_folds: folds whose directions will be computed by the same solver, which "auto" considers.
        vector_format: of the directions.

    Returns:
        The eigenpairs, of rank 0 if the curvature is zero.

    Warns:
        UserWarning: if `rank=None` was limited, fewer than `rank` directions exist, or Lanczos did not converge.
    """
    if threshold is None:
        threshold = threshold_of(rank)
    chosen = choose_solver(curvature, rank, n_folds) if solver == "auto" else solver
    if curvature.network.shard is not None:
        chosen = "gram"
    if chosen == "lanczos":
        pairs = _by_lanczos(curvature, rank, threshold, seed)
    elif isinstance(curvature, RowCurvature):
        pairs = _by_rows(curvature, rank, threshold, vector_format)
    else:
        pairs = dense_eigenpairs(curvature.dense(), threshold, rank=rank, dtype=curvature.network.like.dtype)
    if rank is not None and len(pairs.values) < rank:
        warnings.warn(
            f"rank={rank} was asked for, but the direction samples support only {len(pairs.values)} "
            f"directions with more than {REQUESTED:g} of the largest curvature.",
            stacklevel=2,
        )
    return replace(pairs, vectors=vector_format.stored(pairs.vectors))


def threshold_of(rank: int | None) -> float:
    """Return the smallest eigenvalue that counts for a rank, relative to the largest."""
    return SUPPORTED if rank is None else REQUESTED


def choose_solver(curvature: SubBatchCurvature, rank: int | None, n_folds: int = 0) -> Literal["gram", "lanczos"]:
    """Choose the cheaper solver that fits into the available memory."""
    # Gram costs a product of all pairs of rows; Lanczos about 3 products per direction, each about two backward passes
    # over the samples; with convolutions a pass costs about 25 times its parameters
    P = curvature.network.n_parameters
    budget = curvature.network.available_memory
    if not isinstance(curvature, RowCurvature):
        # a Hessian has no rows, and P products give all of it
        fits = budget >= 3 * 8 * P * P
        return "gram" if fits and (rank is None or 6 * rank + 40 >= P) else "lanczos"
    R, r = curvature.n_rows, curvature.rows_per_sample
    if min(curvature.bytes_of_rows + 3 * 8 * R * R, 3 * 8 * P * P) > budget and not _recomputes(
        curvature, LANCZOS_RANK if rank is None else rank, n_folds
    ):
        return "lanczos"
    if rank is None:
        return "gram" if min(R, P) <= _LARGEST_SIDE else "lanczos"
    if R < P:
        return "gram" if curvature.n_samples * r * r <= 100 * (6 * rank + 40) else "lanczos"
    if not curvature.network.capabilities.columns:
        # every product would compute all rows again
        return "gram"
    # the dense curvature is summed once, and once more in parts if there are folds, each of which has eigenvectors
    sums = (2 if n_folds else 1) / (1 + n_folds)
    dense = sums * r * P + _EIGENVECTORS * P * P / curvature.n_samples
    return "gram" if dense <= _PRODUCT * (6 * rank + 40) else "lanczos"


def _recomputes(curvature: RowCurvature, k: int, n_folds: int) -> bool:
    """Return whether rows that do not fit are computed a few parameters at a time, which may take fewer passes."""
    groups = len(curvature.parameter_groups)
    if not groups or 2 * 3 * 8 * curvature.n_rows**2 > curvature.network.available_memory:
        return False
    # passes of all rows, against those of Lanczos' products, two each
    return groups * (SWEEPS + n_folds) * curvature.rows_per_sample <= 2 * (1 + n_folds) * (3 * k + 20)


def _by_rows(curvature: RowCurvature, rank: int | None, threshold: float, vector_format: VectorFormat) -> Eigenpairs:
    if curvature.n_rows < curvature.network.n_parameters or curvature.network.shard is not None:
        return curvature.stacked_rows().eigenpairs(threshold, rank, vector_format)
    curvature.keep_rows()
    return dense_eigenpairs(curvature.dense(), threshold, rank=rank, dtype=curvature.network.like.dtype)


def lanczos_pairs(curvature: SubBatchCurvature, k: int, threshold: float, seed: int) -> Eigenpairs:
    """Compute at most k leading eigenpairs above the threshold, from products only.

    Warns:
        UserWarning: if Lanczos did not converge.
    """
    network = curvature.network
    # a regression's last layer repeats every eigenvalue once per output
    repeated = network.n_outputs if network.likelihood.name == "regression" else 1
    k = min(k, network.n_parameters, curvature.n_rows)
    pairs = lanczos(curvature.linear_map(), network.like, k, block_size=min(repeated, _LARGEST_BLOCK), seed=seed)
    if not pairs.outcome.converged:
        warnings.warn(f"Lanczos did not converge: {pairs.outcome.reason}.", stacklevel=4)
    n = numerical_rank(pairs.values, threshold)
    return Eigenpairs(pairs.values[:n], pairs.vectors[:, :n], pairs.residuals[:n], pairs.outcome)


def _by_lanczos(curvature: SubBatchCurvature, rank: int | None, threshold: float, seed: int) -> Eigenpairs:
    limit = min(curvature.network.n_parameters, curvature.n_rows)
    k = min(LANCZOS_RANK if rank is None else rank, limit)
    pairs = lanczos_pairs(curvature, k, threshold, seed)
    if rank is None and len(pairs.values) == k < limit:
        warnings.warn(
            f"All directions of {curvature.n_samples} direction samples do not fit into the available memory "
            "(`memory`, by default a quarter of what is free), or take the eigenvectors of a matrix of more than "
            f"{_LARGEST_SIDE:,} rows: rank=None means the {k} leading directions here. Pass rank, or fewer "
            "direction_samples.",
            stacklevel=3,
        )
    return pairs
