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
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import conjugate_gradients
from debiased_laplace.linalg.eigenpairs import numerical_rank
from debiased_laplace.quadratics.directional_derivatives import quadratics_of
from debiased_laplace.quadratics.given import Curvature

MOST_ROWS = 5120
"""Of a batch (samples times outputs), or parameters where these are fewer: all eigenvectors of more take minutes."""

LEADING = 10
TRAILING = 10
"""Eigenvectors looked at, at most: the first ones, and some spread over the last tenth of the spectrum."""


@dataclass(frozen=True, eq=False)
class ChosenDirections:
    """What a batch chose, in groups of columns, and what it says along them itself.

    Attributes:
        groups: "leading" and "trailing" eigenvectors of its curvature, the latter from the last tenth of the spectrum
            that it supports and none where only leading ones were affordable; its "gradient", not normalized; the
            "conjugate" directions of conjugate gradients on its damped quadratic, normalized; the "path", where these
            stood after some of their iterations.
        gradient: its gradient g.
        curvatures: of the groups whose curvature is asked for.
    """

    groups: dict[str, Float[Tensor, "P _k"]]
    gradient: Float[Tensor, " P"]
    curvatures: dict[str, Float[Tensor, " _k"]]

    @property
    def columns(self) -> Float[Tensor, "P k"]:
        """All directions."""
        return torch.cat(list(self.groups.values()), dim=1)

    def slopes(self, name: str) -> Float[Tensor, " k"]:
        """Of the batch's own quadratic, along a group."""
        exact = accumulation_dtype(self.gradient)
        return self.groups[name].mT.to(exact) @ self.gradient.to(exact)


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
    quadratics = quadratics_of(curvature.network, curvature.samples, kind)
    g = sum((q.gradient.detach() * len(q) for q in quadratics), torch.zeros_like(curvature.network.like))
    g = g / curvature.n_samples
    product = curvature.linear_map()
    solved = conjugate_gradients(
        lambda x: product(x[:, None])[:, 0] + damping * x,
        -g,
        max_iterations=max(steps),
        tolerance=0.0,
        keep_directions=True,
    )
    walked = g.new_zeros(len(g), 0) if solved.directions is None else solved.directions
    # the path starts at the weights, and stays where conjugate gradients end before their time
    places = torch.cat([torch.zeros_like(g)[:, None], (walked * solved.step_lengths.to(walked)).cumsum(1)], dim=1)
    path = places[:, [min(k, walked.shape[1]) for k in steps]]
    (leading, first), (trailing, last) = _eigenvectors(curvature, seed)
    groups = {
        "leading": leading,
        "trailing": trailing,
        "gradient": g[:, None],
        "conjugate": walked / walked.norm(dim=0).clamp_min(torch.finfo(g.dtype).tiny),
        "path": path,
    }
    along_path = (path * product(path)).sum(0, dtype=accumulation_dtype(path))
    return ChosenDirections(groups, g, {"leading": first, "trailing": last, "path": along_path})


def sees_whole_spectrum(curvature: RowCurvature) -> bool:
    """Whether all eigenvectors of a batch are affordable; if not, only leading ones are looked at."""
    smaller_side = min(curvature.n_rows, curvature.network.n_parameters)
    return smaller_side <= MOST_ROWS and choose_solver(curvature, None) == "gram"


Pairs = tuple[Float[Tensor, "P _k"], Float[Tensor, " _k"]]


def _eigenvectors(curvature: RowCurvature, seed: int) -> tuple[Pairs, Pairs]:
    """Leading and trailing eigenvectors with their eigenvalues."""
    if not sees_whole_spectrum(curvature):
        pairs = lanczos_pairs(curvature, LEADING, SUPPORTED, seed)
        nothing = pairs.vectors[:, :0], pairs.values[:0]
        return (pairs.vectors, pairs.values), nothing
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
    k = numerical_rank(values, SUPPORTED)
    first = torch.arange(min(LEADING, k), device=values.device)
    start = max(len(first), k - k // 10)
    last = torch.linspace(start, k - 1, min(TRAILING, k - start)).round().long().to(values.device)
    return (vectors(first), values[first]), (vectors(last), values[last])
