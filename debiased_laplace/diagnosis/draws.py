r"""One draw of a diagnosis: batches of all sizes, the directions they choose, and disjoint reference samples.

The directions of a batch are eigenvectors from both ends of the spectrum of its curvature, its gradient, and the path
of conjugate gradients on its quadratic.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.source import SampleSource
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.debiasing.directions import SUPPORTED, choose_solver, lanczos_pairs
from debiased_laplace.diagnosis.posteriors import gain_of_debiasing, with_mixed_rows
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.conjugate_gradients import conjugate_gradients
from debiased_laplace.linalg.eigenpairs import numerical_rank
from debiased_laplace.quadratics.directional_derivatives import derivatives_along, quadratics_of
from debiased_laplace.quadratics.preparation import Curvature

STEPS = (1, 3, 10)
"""Iterations of conjugate gradients after which the decrease is measured."""

MAX_ROWS = 5120
"""Largest min(rows, parameters) of a batch for a full eigendecomposition; more would take minutes."""

LEADING = 10
TRAILING = 10
"""Largest numbers of first eigenvectors, and of eigenvectors spread over the last tenth of the spectrum."""

RootCurvature = Literal["ggn", "ef"]
OwnAndUnbiased = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Settings of a diagnosis, and the samples of its draws.

    Attributes:
        source: source of the samples.
        network: the network, at the weights of the expansion.
        sizes: batch sizes, increasing.
        n_reference: number of reference samples.
        n_data: N.
        kind: curvature, "ggn" or "ef".
        damping: damping of conjugate gradients.
        compared: batch sizes whose posteriors are compared.
        prior_precision: of the posteriors; not used if there are none.
        seed: of all draws.
    """

    source: SampleSource
    network: Network
    sizes: tuple[int, ...]
    n_reference: int
    n_data: int
    kind: RootCurvature
    damping: float
    compared: tuple[int, ...]
    prior_precision: float
    seed: int

    @property
    def root(self) -> OutputRoot:
        """Root of the curvature."""
        return (GaussNewton if self.kind == "ggn" else EmpiricalFisher)(self.network.likelihood)

    @property
    def samples_per_draw(self) -> int:
        """Number of samples processed per draw, for the progress bar; those of compared batches count twice."""
        return sum(self.sizes) + sum(self.compared) + self.n_reference

    def order(self, draw: int) -> Int64[Tensor, " n"]:
        """Return all positions in the order of a draw: the largest batch, the reference samples, the others."""
        indices = self.source.indices
        generator = torch.Generator().manual_seed(self.seed + 1000 * draw)
        return indices[torch.randperm(len(indices), generator=generator)]

    def batch(self, order: Int64[Tensor, " n"], size: int) -> Int64[Tensor, " size"]:
        """Return the increasing positions of a batch, which contains all smaller batches of the draw."""
        return order[:size].sort().values

    def reference(self, order: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        """Return the increasing positions of the reference samples, which are in no batch of the draw."""
        return order[self.sizes[-1] : self.sizes[-1] + self.n_reference].sort().values

    def curvature(self, positions: Int64[Tensor, " m"]) -> RowCurvature:
        """Return the curvature of the samples at these positions."""
        samples = SubBatch(self.source, positions, self.network.like.device, self.seed)
        # kept in memory: an augmenting loader would yield different samples the second time
        return RowCurvature(self.network, samples.keeping(list(samples)), self.root, seed=self.seed)


@dataclass(frozen=True, eq=False)
class DrawFindings:
    """Findings of one draw, by batch size.

    Attributes:
        pairs: own and unbiased values, by the name of the quantity.
        gains: gain of debiasing a posterior in nats, for the sizes that were compared.
    """

    pairs: dict[int, dict[str, OwnAndUnbiased]]
    gains: dict[int, float]


@dataclass(frozen=True, eq=False)
class ChosenDirections:
    """Directions that a batch chose, and its own derivatives along them.

    Attributes:
        groups: columns by name: "leading" and "trailing" eigenvectors of the curvature, the latter from the last tenth
            of its numerical rank, none if only leading ones were affordable; the "gradient", not normalized; the
            "conjugate" directions of conjugate gradients on the damped quadratic, normalized; the "path", iterates
            after some of their iterations.
        gradient: gradient g of the batch.
        curvatures: curvatures along "leading", "trailing" and "path".
    """

    groups: dict[str, Float[Tensor, "P _k"]]
    gradient: Float[Tensor, " P"]
    curvatures: dict[str, Float[Tensor, " _k"]]

    @property
    def columns(self) -> Float[Tensor, "P k"]:
        """All directions."""
        return torch.cat(list(self.groups.values()), dim=1)

    def slopes(self, name: str) -> Float[Tensor, " k"]:
        """Return the batch's own slopes along a group."""
        exact = accumulation_dtype(self.gradient)
        return self.groups[name].mT.to(exact) @ self.gradient.to(exact)


def diagnose_draw(plan: Plan, draw: int, bar: "tqdm[None]") -> DrawFindings:
    """Measure own and unbiased values for all batch sizes of one draw."""
    order, seed = plan.order(draw), plan.seed + 1000 * draw
    positions = plan.batch(order, plan.sizes[-1])
    largest, reference = plan.curvature(positions), plan.curvature(plan.reference(order))
    if sees_whole_spectrum(largest):
        # they contain the rows of the smaller batches
        largest.keep_rows()
    # new mixtures in each draw, so that error bars include their noise
    mixed_reference = with_mixed_rows(reference, seed + 1)
    if plan.compared:
        mixed_reference.keep_rows()
    chosen: dict[int, ChosenDirections] = {}
    gains: dict[int, float] = {}
    for size in plan.sizes:
        batch = largest.part(torch.searchsorted(positions, plan.batch(order, size)))
        bar.set_postfix_str(f"batch of {size}, draw {draw + 1}: directions")
        chosen[size] = choose_directions(batch, plan.kind, damping=plan.damping, steps=STEPS, seed=plan.seed)
        bar.update(size)
        if size not in plan.compared:
            continue
        bar.set_postfix_str(f"batch of {size}, draw {draw + 1}: posteriors")
        if sees_whole_spectrum(batch):
            gains[size] = gain_of_debiasing(
                batch, mixed_reference, prior_precision=plan.prior_precision, n_data=plan.n_data, seed=seed
            )
        bar.update(size)
    bar.set_postfix_str(f"reference samples, draw {draw + 1}")
    pairs = _own_and_unbiased(plan, chosen, reference)
    bar.update(plan.n_reference)
    return DrawFindings(pairs, gains)


def choose_directions(
    curvature: RowCurvature, kind: Curvature, *, damping: float, steps: tuple[int, ...], seed: int
) -> ChosenDirections:
    """Compute eigenvectors, gradient and conjugate directions of one batch.

    Args:
        curvature: curvature of the batch.
        kind: name of the curvature.
        damping: added to the curvature for conjugate gradients.
        steps: increasing iterations whose iterates form the path.
        seed: of the start vector of Lanczos' method.
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
    conjugate = g.new_zeros(len(g), 0) if solved.directions is None else solved.directions
    iterates = (conjugate * solved.step_lengths.to(conjugate)).cumsum(1)
    iterates = torch.cat([torch.zeros_like(g)[:, None], iterates], dim=1)
    # the last iterate stands for those after an early end of conjugate gradients
    path = iterates[:, [min(k, conjugate.shape[1]) for k in steps]]
    (leading, first), (trailing, last) = _eigenvectors(curvature, seed)
    groups = {
        "leading": leading,
        "trailing": trailing,
        "gradient": g[:, None],
        "conjugate": conjugate / conjugate.norm(dim=0).clamp_min(torch.finfo(g.dtype).tiny),
        "path": path,
    }
    along_path = (path * product(path)).sum(0, dtype=accumulation_dtype(path))
    return ChosenDirections(groups, g, {"leading": first, "trailing": last, "path": along_path})


def sees_whole_spectrum(curvature: RowCurvature) -> bool:
    """Return whether a full eigendecomposition is affordable; if not, only leading eigenvectors are computed."""
    smaller_side = min(curvature.n_rows, curvature.network.n_parameters)
    return smaller_side <= MAX_ROWS and choose_solver(curvature, None) == "gram"


Eigenpairs = tuple[Float[Tensor, "P _k"], Float[Tensor, " _k"]]


def _eigenvectors(curvature: RowCurvature, seed: int) -> tuple[Eigenpairs, Eigenpairs]:
    """Return leading and trailing eigenvectors with their eigenvalues."""
    if not sees_whole_spectrum(curvature):
        pairs = lanczos_pairs(curvature, LEADING, SUPPORTED, seed)
        none = pairs.vectors[:, :0], pairs.values[:0]
        return (pairs.vectors, pairs.values), none
    if curvature.n_rows < curvature.network.n_parameters:
        factor = curvature.stacked_rows()
        values, W = torch.linalg.eigh(factor.gram)

        def vectors(chosen: Int64[Tensor, " k"]) -> Float[Tensor, "P k"]:
            U = factor.rows.combined(W.flip(1)[:, chosen].to(factor.rows.like))
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


def _own_and_unbiased(
    plan: Plan, chosen: dict[int, ChosenDirections], reference: RowCurvature
) -> dict[int, dict[str, OwnAndUnbiased]]:
    """Return own and unbiased values by batch size, with one pass over the reference samples."""
    columns = [directions.columns for directions in chosen.values()]
    measured = derivatives_along(quadratics_of(plan.network, reference.samples, plan.kind), torch.cat(columns, dim=1))
    widths = [part.shape[1] for part in columns]
    parts = zip(chosen.items(), measured.slopes.split(widths), measured.curvatures.split(widths), strict=True)
    return {
        size: _pairs(directions, slopes, curvatures, size / plan.n_data)
        for (size, directions), slopes, curvatures in parts
    }


def _pairs(
    chosen: ChosenDirections, slopes: Float[Tensor, " k"], curvatures: Float[Tensor, " k"], share: float
) -> dict[str, OwnAndUnbiased]:
    """Return own and unbiased values of a batch by quantity, from the derivatives on the reference samples."""
    widths = [group.shape[1] for group in chosen.groups.values()]
    pairs: dict[str, OwnAndUnbiased] = {}
    for name, other_slopes, other_curvatures in zip(
        chosen.groups, slopes.split(widths), curvatures.split(widths), strict=True
    ):
        slope = chosen.slopes(name), _weighted(chosen.slopes(name), other_slopes, share)
        if name not in chosen.curvatures:
            pairs[name] = slope
            continue
        curvature = chosen.curvatures[name], _weighted(chosen.curvatures[name], other_curvatures, share)
        if name == "path":
            pairs["decrease"] = -(slope[0] + curvature[0] / 2), -(slope[1] + curvature[1] / 2)
        else:
            pairs[name] = curvature
    return pairs


def _weighted(own: Tensor, other: Tensor, share: float) -> Tensor:
    """Return the unbiased value for all data: the batch counts with its share, the others stand for the rest."""
    return share * own.double() + (1 - share) * other.double()
