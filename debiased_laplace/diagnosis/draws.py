"""One draw: batches of every size, and samples that none of them has seen."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import sample_hashes
from debiased_laplace.diagnosis.directions import ChosenDirections, choose_directions, sees_whole_spectrum
from debiased_laplace.diagnosis.findings import weighted
from debiased_laplace.diagnosis.plan import Plan
from debiased_laplace.diagnosis.posteriors import gain_of_debiasing, mixed
from debiased_laplace.errors import RepeatedSamplesError
from debiased_laplace.quadratics.directional_derivatives import derivatives_along, quadratics_of

STEPS = (1, 3, 10)


@dataclass(frozen=True, eq=False)
class DrawFindings:
    """What a draw says, by size of batch.

    Attributes:
        pairs: own and unbiased values, by what they are of.
        gains: nats that debiasing gains a posterior; of the sizes for which posteriors were compared.
    """

    pairs: dict[int, dict[str, tuple[Tensor, Tensor]]]
    gains: dict[int, float]


def look_at(plan: Plan, draw: int, bar: "tqdm[None]") -> DrawFindings:
    """Own and unbiased values of every size: one pass over the reference samples for the directions of all of them.

    Raises:
        RepeatedSamplesError: if samples of the draw are equal.
    """
    order, seed = plan.order(draw), plan.seed + 1000 * draw
    positions = plan.batch(order, plan.sizes[-1])
    largest, reference = plan.curvature(positions), plan.curvature(plan.reference(order))
    _refuse_repeats(largest, reference)
    if sees_whole_spectrum(largest):
        # those of the smaller batches are among them
        largest.keep_rows()
    # of their own in every draw, for the error bars to have their noise
    judges = mixed(reference, seed + 1)
    if plan.compared:
        judges.keep_rows()
    own: dict[int, ChosenDirections] = {}
    gains: dict[int, float] = {}
    for size in plan.sizes:
        batch = largest.part(torch.searchsorted(positions, plan.batch(order, size)))
        bar.set_postfix_str(f"batch of {size}, draw {draw + 1}: directions")
        own[size] = choose_directions(batch, plan.kind, damping=plan.damping, steps=STEPS, seed=plan.seed)
        bar.update(size)
        if size not in plan.compared:
            continue
        bar.set_postfix_str(f"batch of {size}, draw {draw + 1}: posteriors")
        if sees_whole_spectrum(batch):
            gains[size] = gain_of_debiasing(
                batch, judges, prior_precision=plan.prior_precision, n_data=plan.n_data, seed=seed
            )
        bar.update(size)
    bar.set_postfix_str(f"samples of no batch, draw {draw + 1}")
    pairs = _compared(plan, own, reference)
    bar.update(plan.n_reference)
    return DrawFindings(pairs, gains)


def _refuse_repeats(*parts: RowCurvature) -> None:
    """Equal samples at different positions are not disjoint."""
    hashes = torch.cat([sample_hashes(batch) for part in parts for batch in part.samples])
    positions = torch.cat([part.samples.indices for part in parts])
    order = hashes.argsort(stable=True)
    repeated = positions[order[1:]][hashes[order[1:]] == hashes[order[:-1]]]
    if len(repeated):
        raise RepeatedSamplesError(repeated.sort().values)


def _compared(
    plan: Plan, own: dict[int, ChosenDirections], reference: RowCurvature
) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
    """The batches' own values beside unbiased ones."""
    columns = [chosen.columns for chosen in own.values()]
    other = derivatives_along(quadratics_of(plan.network, reference.samples, plan.kind), torch.cat(columns, dim=1))
    widths = [part.shape[1] for part in columns]
    parts = zip(own.items(), other.slopes.split(widths), other.curvatures.split(widths), strict=True)
    return {
        size: _beside_each_other(chosen, slopes, curvatures, size / plan.n_data)
        for (size, chosen), slopes, curvatures in parts
    }


def _beside_each_other(
    chosen: ChosenDirections, slopes: Float[Tensor, " k"], curvatures: Float[Tensor, " k"], share: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Own and unbiased values of a batch by what they are of, given those of samples that it has not seen."""
    widths = [group.shape[1] for group in chosen.groups.values()]
    found = {}
    for name, other_slopes, other_curvatures in zip(
        chosen.groups, slopes.split(widths), curvatures.split(widths), strict=True
    ):
        slope = chosen.slopes(name), weighted(chosen.slopes(name), other_slopes, share)
        if name not in chosen.curvatures:
            found[name] = slope
            continue
        curvature = chosen.curvatures[name], weighted(chosen.curvatures[name], other_curvatures, share)
        if name == "path":
            found["decrease"] = -(slope[0] + curvature[0] / 2), -(slope[1] + curvature[1] / 2)
        else:
            found[name] = curvature
    return found
