r"""The directions that a batch chooses, and what the batch itself says along them.

Three kinds: eigenvectors of its curvature from both ends of the spectrum, its own gradient, and the path of conjugate
gradients on its quadratic.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.debiasing.directions import SUPPORTED, choose_solver, lanczos_pairs
from debiased_laplace.linalg.conjugate_gradients import conjugate_gradients
from debiased_laplace.linalg.eigenpairs import supported
from debiased_laplace.quadratics.batch_quadratic import batch_quadratic
from debiased_laplace.quadratics.given import Curvature, usable

LEADING = 10
TRAILING = 10
"""Eigenvectors looked at, at most: the first ones, and some spread over the last tenth of the spectrum."""

_TOGETHER = 128  # samples differentiated at once


@dataclass(frozen=True, eq=False)
class ChosenDirections:
    """What a batch chose.

    Attributes:
        leading: first eigenvectors of its curvature.
        leading_curvatures: their eigenvalues.
        trailing: eigenvectors from the last tenth of the spectrum that the batch supports; none where only leading
            ones were affordable.
        trailing_curvatures: their eigenvalues.
        gradient: its gradient, not normalized.
        conjugate: directions of conjugate gradients on its damped quadratic, normalized.
        path: where conjugate gradients stood after some of its iterations.
        rank: number of directions that the batch supports; None where only leading ones were affordable.
    """

    leading: Float[Tensor, "P l"]
    leading_curvatures: Float[Tensor, " l"]
    trailing: Float[Tensor, "P t"]
    trailing_curvatures: Float[Tensor, " t"]
    gradient: Float[Tensor, " P"]
    conjugate: Float[Tensor, "P m"]
    path: Float[Tensor, "P s"]
    rank: int | None


def choose_directions(
    curvature: RowCurvature, kind: Curvature, *, damping: float, steps: tuple[int, ...], seed: int
) -> ChosenDirections:
    """Eigenvectors, gradient and conjugate directions of one batch.

    Args:
        curvature: of the batch.
        kind: the same in a word.
        damping: added to the curvature for conjugate gradients.
        steps: iterations after which the path is looked at, increasing.
        seed: of Lanczos' start.
    """
    g = mean_gradient(curvature, kind)
    product = curvature.linear_map()
    solved = conjugate_gradients(
        lambda x: product(x[:, None])[:, 0] + damping * x,
        -g,
        max_iterations=max(steps),
        tolerance=0.0,
        keep_directions=True,
    )
    walked = g.new_zeros(len(g), 0) if solved.directions is None else solved.directions
    path = (walked * solved.step_lengths.to(walked)).cumsum(1)
    reached = [min(k, path.shape[1]) for k in steps]
    places = torch.stack([path[:, k - 1] if k > 0 else torch.zeros_like(g) for k in reached], dim=1)
    (leading, first), (trailing, last), rank = _eigenvectors(curvature, seed)
    conjugate = walked / walked.norm(dim=0).clamp_min(torch.finfo(g.dtype).tiny)
    return ChosenDirections(leading, first, trailing, last, g, conjugate, places, rank)


def mean_gradient(curvature: RowCurvature, kind: Curvature) -> Float[Tensor, " P"]:
    """Of the samples' mean loss."""
    network = curvature.network
    total = torch.zeros_like(network.like)
    for batch in curvature.samples:
        for some in usable(batch).chunks(_TOGETHER):
            total += batch_quadratic(network, some, kind).gradient.detach() * len(some)
    return total / curvature.n_samples


Pairs = tuple[Float[Tensor, "P _k"], Float[Tensor, " _k"]]


def _eigenvectors(curvature: RowCurvature, seed: int) -> tuple[Pairs, Pairs, int | None]:
    """Leading and trailing eigenvectors with their eigenvalues, and how many there are."""
    if choose_solver(curvature, None) == "lanczos":
        pairs = lanczos_pairs(curvature, LEADING, SUPPORTED, seed)
        nothing = pairs.vectors[:, :0], pairs.values[:0]
        return (pairs.vectors, pairs.values), nothing, None
    if curvature.n_rows < curvature.network.n_parameters:
        factor = curvature.stacked_rows()
        values, W = torch.linalg.eigh(factor.gram)

        def vectors(chosen: Int64[Tensor, " k"]) -> Float[Tensor, "P k"]:
            U = factor.rows.mT @ W.flip(1)[:, chosen].to(factor.rows.dtype)
            return U / U.norm(dim=0)

    else:
        values, V = torch.linalg.eigh(curvature.dense())

        def vectors(chosen: Int64[Tensor, " k"]) -> Float[Tensor, "P k"]:
            return V.flip(1)[:, chosen].to(curvature.network.like.dtype)

    values = values.flip(0)
    k = supported(values, SUPPORTED)
    first = torch.arange(min(LEADING, k), device=values.device)
    start = max(len(first), k - k // 10)
    last = torch.linspace(start, k - 1, min(TRAILING, k - start)).round().long().to(values.device)
    return (vectors(first), values[first]), (vectors(last), values[last]), k
