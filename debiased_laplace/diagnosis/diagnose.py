r"""How biased is a batch of this size, for this model?

For each size and draw: directions from a batch a, its own values along them, and unbiased values for all data,
$f H_a + (1 - f) H_c$ with $f = |a| / N$ and samples c that no batch of the draw has seen.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.samples import Samples
from debiased_laplace.data.source import SampleSource, sample_source
from debiased_laplace.diagnosis.diagnosis import Diagnosis
from debiased_laplace.diagnosis.directions import ChosenDirections, choose_directions
from debiased_laplace.diagnosis.findings import BatchFindings, stack, weighted
from debiased_laplace.posterior.factory import DebiasedLaplace
from debiased_laplace.quadratics.directional_derivatives import derivatives_along, quadratics_of
from debiased_laplace.quadratics.given import met

SIZES = (32, 64, 128, 256, 512)
REFERENCE = 512
STEPS = (1, 3, 10)
POSTERIOR_RANK = 100


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which samples do what in a draw, and what is done with them.

    Attributes:
        source: of the samples.
        network: at the weights.
        sizes: of batches, increasing.
        n_reference: samples of the unbiased values.
        n_data: N.
        kind: of curvature.
        damping: of conjugate gradients.
        seed: of everything drawn.
    """

    source: SampleSource
    network: Network
    sizes: tuple[int, ...]
    n_reference: int
    n_data: int
    kind: Literal["ggn", "ef"]
    damping: float
    seed: int

    def order(self, draw: int) -> Int64[Tensor, " n"]:
        """All positions, in the order of a draw: batches come from its front, reference samples after the largest."""
        indices = self.source.indices
        generator = torch.Generator().manual_seed(self.seed + 1000 * draw)
        return indices[torch.randperm(len(indices), generator=generator)]

    def batch(self, order: Int64[Tensor, " n"], size: int) -> Int64[Tensor, " size"]:
        """Positions of a batch, increasing."""
        return order[:size].sort().values

    def reference(self, order: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        """Positions that no batch of the draw has."""
        return order[self.sizes[-1] : self.sizes[-1] + self.n_reference].sort().values

    def samples(self, positions: Int64[Tensor, " m"]) -> Samples:
        """Loaded, and kept: an augmenting loader must not give others the second time."""
        samples = Samples(self.source, positions, self.network.like.device, self.seed)
        return samples.keeping(list(samples))

    def curvature(self, positions: Int64[Tensor, " m"]) -> RowCurvature:
        """Of some samples."""
        root = (GaussNewton if self.kind == "ggn" else EmpiricalFisher)(self.network.likelihood)
        return RowCurvature(self.network, self.samples(positions), root, seed=self.seed)


def diagnose(
    model: Any,
    likelihood: str,
    loader: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    n_draws: int = 5,
    n_reference: int = REFERENCE,
    n_data: int | None = None,
    curvature: Literal["ggn", "ef"] = "ggn",
    damping: float = 1e-3,
    prior_precision: float | None = 1.0,
    seed: int = 0,
    progress_bar: bool = False,
) -> Diagnosis:
    r"""How biased the quadratic of a mini-batch is for a model, for a range of batch sizes, and what debiasing changes.

    Directions are chosen by a batch; along them its own curvature and slope stand against unbiased values for all data,
    from samples that had no part in the choice. No full-batch quantity is computed. Cost: for every draw and size, the
    eigenvectors of the batch (C rows a sample) and two fits of a posterior.

    Args:
        model: trained or not; evaluated in evaluation mode, and left as it was.
        likelihood: "classification", "regression" or "reward_modeling".
        loader: training samples, as `DebiasedLaplace.fit` takes them.
        batch_sizes: sizes to look at; None: powers of two from 32 to 512, as far as a third of the samples allows.
        n_draws: draws of every batch; error bars are over draws.
        n_reference: samples behind the unbiased values, disjoint from every batch of the draw.
        n_data: size N of the data set that the likelihood stands for; None: the samples given.
        curvature: "ggn" or "ef".
        damping: added to the batch's curvature for conjugate gradients, at least 0.
        prior_precision: of the posteriors that are compared; None compares none. Only with the GGN.
        seed: of the draws.
        progress_bar: show progress.

    Returns:
        The findings; `print` shows them, `.table()` and `.figure()` go into a report.

    Raises:
        ValueError: if sizes, numbers or the samples do not fit each other.

    References:
        Tatzel et al. (2025), arXiv 2410.14325, §3 and figure 3.
    """
    start = time.perf_counter()
    _check(curvature, damping, prior_precision, n_draws, n_reference)
    with at_weights(model, seed):
        source = sample_source(loader, seed)
        n = len(source.indices)
        sizes = _sizes(batch_sizes, n)
        if n_data is not None and n_data < n:
            raise ValueError(f"n_data={n_data} is below the {n} samples given, which are part of it.")
        network, _ = met(model, likelihood, next(source.batches(source.indices[: source.batch_size], seed)))
        N, n_reference = n_data or n, min(n_reference, n - sizes[-1])
        plan = _Plan(source, network, sizes, n_reference, N, curvature, damping, seed)
        draws = [_one_draw(plan, draw) for draw in tqdm(range(n_draws), disable=not progress_bar, desc="[Diagnosing]")]
    compared = prior_precision if curvature == "ggn" else None
    gains = None if compared is None else _gains(model, likelihood, plan, n_draws, compared, progress_bar)
    findings = tuple(
        BatchFindings(
            size,
            **{name: stack([values[size][name] for values in draws]) for name in draws[0][size]},
            posterior=None if gains is None else gains[:, i],
        )
        for i, size in enumerate(sizes)
    )
    P, seconds = network.n_parameters, time.perf_counter() - start
    return Diagnosis(findings, STEPS, n_draws, n_reference, N, P, curvature, damping, compared, seconds)


def _check(curvature: str, damping: float, prior_precision: float | None, n_draws: int, n_reference: int) -> None:
    """Refuse numbers out of range."""
    if curvature not in ("ggn", "ef"):
        raise ValueError(f'curvature must be "ggn" or "ef"; got {curvature!r}.')
    if not damping >= 0 or (prior_precision is not None and not prior_precision > 0):
        raise ValueError(
            f"Expected damping of at least 0 and prior_precision above 0; got {damping!r} and {prior_precision!r}."
        )
    if n_draws < 1 or n_reference < 2:
        raise ValueError(f"Expected n_draws >= 1 and n_reference >= 2; got {n_draws!r} and {n_reference!r}.")


def _sizes(batch_sizes: Sequence[int] | None, n: int) -> tuple[int, ...]:
    """Sizes of batches, increasing, each once."""
    if batch_sizes is None:
        sizes = tuple(size for size in SIZES if 3 * size <= n)
        if not sizes:
            raise ValueError(
                f"The smallest batch to look at has {SIZES[0]} samples, and twice as many are needed beside it; the "
                f"loader has {n}. Pass batch_sizes."
            )
        return sizes
    sizes = tuple(sorted({int(size) for size in batch_sizes}))
    if not sizes or sizes[0] < 2 or sizes[-1] > n - 2:
        raise ValueError(
            f"Expected batch_sizes from 2 to {n - 2}, leaving some of the {n} samples for unbiased values; got "
            f"{list(batch_sizes)}."
        )
    return sizes


def _one_draw(plan: _Plan, draw: int) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
    """Own and unbiased values of every size: one pass over the reference samples for all of them."""
    order = plan.order(draw)
    own = {
        size: choose_directions(
            plan.curvature(plan.batch(order, size)), plan.kind, damping=plan.damping, steps=STEPS, seed=plan.seed
        )
        for size in plan.sizes
    }
    columns = [chosen.columns for chosen in own.values()]
    quadratics = quadratics_of(plan.network, plan.samples(plan.reference(order)), plan.kind)
    other = derivatives_along(quadratics, torch.cat(columns, dim=1))
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


def _gains(
    model: Any, likelihood: str, plan: _Plan, n_draws: int, prior_precision: float, progress_bar: bool
) -> Float[Tensor, "d sizes"]:
    """Nats by which the biased posterior is further from the full batch than the debiased one, estimated unbiasedly."""
    gains = torch.zeros(n_draws, len(plan.sizes), dtype=torch.float64)
    for draw in tqdm(range(n_draws), disable=not progress_bar, desc="[Comparing posteriors]"):
        order = plan.order(draw)
        reference = _loader(plan.source, plan.reference(order))
        for i, size in enumerate(plan.sizes):
            given = _loader(plan.source, plan.batch(order, size))
            values = []
            for magnitudes in ("same_batch", "cross_fitted"):
                la = DebiasedLaplace(
                    model,
                    likelihood,
                    magnitudes=magnitudes,
                    rank=POSTERIOR_RANK,
                    complement="kron",
                    prior_precision=prior_precision,
                    seed=plan.seed,
                )
                with warnings.catch_warnings():
                    # fewer directions than asked for are all there are
                    warnings.filterwarnings("ignore", message=f"rank={POSTERIOR_RANK} was asked for")
                    la.fit(given, n_data=plan.n_data)
                values.append(la.held_out_kl(reference, given))
            gains[draw, i] = (values[0] - values[1]).value
    return gains


def _loader(source: SampleSource, positions: Int64[Tensor, " m"]) -> DataLoader[Any]:
    """Over some of the samples, loaded as the user's loader does."""
    some = Subset(source.dataset, positions.tolist())
    return DataLoader(some, batch_size=source.batch_size, **source.options)
