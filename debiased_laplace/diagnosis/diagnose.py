r"""How biased is a batch of this size, for this model?

For each size and draw: directions from a batch a, its own values along them, and unbiased values for all data,
$f H_a + (1 - f) H_c$ with $f = |a| / N$ and samples c that no batch of the draw has seen.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tqdm import tqdm

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.source import sample_source
from debiased_laplace.diagnosis.diagnosis import Diagnosis
from debiased_laplace.diagnosis.draws import STEPS, DrawFindings, look_at
from debiased_laplace.diagnosis.findings import BatchFindings, stack
from debiased_laplace.diagnosis.plan import Plan
from debiased_laplace.quadratics.given import met

SIZES = (32, 64, 128, 256)
REFERENCE = 512
QUICK = 2e11
"""Multiplications for the products of all pairs of a batch's rows: more of them make posteriors take minutes."""


def diagnose(
    model: Any,
    likelihood: str,
    loader: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    n_draws: int = 3,
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
    from samples that had no part in the choice. No full-batch quantity is computed. Cost: for every draw, the products
    of all pairs of the largest batch's rows (C rows a sample) and its eigenvectors, and for every size two posteriors
    that share their rows; memory for the rows, up to a quarter of what is free.

    Args:
        model: trained or not; evaluated in evaluation mode, and left as it was.
        likelihood: "classification", "regression" or "reward_modeling".
        loader: training samples, as `DebiasedLaplace.fit` takes them.
        batch_sizes: sizes to look at; None: powers of two from 32 to 256, as far as a third of the samples allows.
        n_draws: draws of every batch; error bars are over draws.
        n_reference: samples behind the unbiased values, disjoint from every batch of the draw.
        n_data: size N of the data set that the likelihood stands for; None: the samples given.
        curvature: "ggn" or "ef".
        damping: added to the batch's curvature for conjugate gradients, at least 0.
        prior_precision: of the posteriors that are compared; None compares none. Only with the GGN. Where
            `batch_sizes` is None, only those of batches for which it is quick: up to 128 samples at 100,000 parameters
            and 10 outputs.
        seed: of the draws.
        progress_bar: show progress.

    Returns:
        The findings; `print` shows them, `.table()` and `.figure()` go into a report.

    Raises:
        ValueError: if sizes, numbers or the samples do not fit each other, or samples are equal.

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
        compares = prior_precision is not None and curvature == "ggn"
        compared = tuple(s for s in sizes if compares and (batch_sizes is not None or _is_quick(network, s)))
        plan = Plan(source, network, sizes, n_reference, N, curvature, damping, compared, prior_precision or 0.0, seed)
        total = n_draws * plan.samples_a_draw
        with tqdm(total=total, disable=not progress_bar, desc="[Diagnosing]", unit=" samples") as bar:
            draws = [look_at(plan, draw, bar) for draw in range(n_draws)]
    findings = tuple(_over_draws(size, draws) for size in sizes)
    prior, P, seconds = prior_precision if compares else None, network.n_parameters, time.perf_counter() - start
    return Diagnosis(findings, STEPS, n_draws, n_reference, N, P, curvature, damping, prior, seconds)


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


def _is_quick(network: Network, size: int) -> bool:
    """Whether posteriors of a batch are compared unasked: at 100,000 parameters and 10 outputs up to 128 samples."""
    rows = size * network.n_outputs
    return min(rows, network.n_parameters) * rows * network.n_parameters <= QUICK


def _over_draws(size: int, draws: list[DrawFindings]) -> BatchFindings:
    """What the draws say of one size."""
    pairs = [draw.pairs[size] for draw in draws]
    gains = [draw.gains[size] for draw in draws if size in draw.gains]
    # memory may have run short in some draws
    posterior = torch.tensor(gains, dtype=torch.float64) if len(gains) == len(draws) else None
    return BatchFindings(
        size, **{name: stack([found[name] for found in pairs]) for name in pairs[0]}, posterior=posterior
    )
