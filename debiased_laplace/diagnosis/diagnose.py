r"""Measure how biased the quadratic of a mini-batch is for a model.

For each batch size and draw: directions from a batch a, its own curvatures and slopes along them, and unbiased ones for
all data, $f H_a + (1 - f) H_c$ with $f = |a| / N$ and reference samples c that are in no batch of the draw.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from debiased_laplace.checks import boolean, integer, number, one_of, one_positive, shown
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.drawn_rows import RowScorer
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.sharing import own_part, united
from debiased_laplace.data.source import sample_source
from debiased_laplace.diagnosis.diagnosis import Diagnosis
from debiased_laplace.diagnosis.draws import STEPS, DrawFindings, Plan, RootCurvature, diagnose_draw
from debiased_laplace.diagnosis.findings import BatchFindings, Pairs
from debiased_laplace.diagnosis.row_shares import row_shares
from debiased_laplace.processes import Processes
from debiased_laplace.quadratics.preparation import prepare_network_and_batch

SIZES = (32, 64, 128, 256)
REFERENCE = 512
MAX_PRODUCTS = 2e11
"""Multiplications for the Gram matrix of a batch's rows, up to which posteriors are compared by default."""


@leaves_as_found()
def diagnose(
    model: Any,
    likelihood: str | Likelihood,
    loader: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    n_draws: int = 3,
    n_reference: int = REFERENCE,
    n_data: int | None = None,
    curvature: RootCurvature = "ggn",
    damping: float = 1e-3,
    prior_precision: float | None = 1.0,
    seed: int = 0,
    progress_bar: bool = False,
) -> Diagnosis:
    r"""Measure how biased the quadratic of a mini-batch is for a range of batch sizes, and what debiasing changes.

    A batch gives directions; its own curvatures and slopes along them are compared with unbiased values for all data,
    estimated on disjoint samples. Scores of all rows say how few of them carry the curvature. No full-batch derivative
    is computed. Cost: one forward pass over all samples; per draw, the Gram matrix of the largest batch's rows (C per
    sample) and its eigenvectors, and per size two posteriors that share their rows; memory for the rows, up to a
    quarter of what is free.

    Args:
        model: trained or not; evaluated in evaluation mode, and left as it was.
        likelihood: a name, or a likelihood of one's own, as of `DebiasedLaplace`.
        loader: training samples, as `DebiasedLaplace.fit` takes them.
        batch_sizes: sizes to measure; None: powers of two from 32 to 256, up to a third of the samples.
        n_draws: draws of each batch; error bars are over draws.
        n_reference: samples for the unbiased values, disjoint from all batches of the draw.
        n_data: size N of the data set that the likelihood stands for; None: the number of samples given.
        curvature: "ggn" or "ef".
        damping: added to the batch's curvature for conjugate gradients, at least 0.
        prior_precision: of the posteriors that are compared, with the GGN only; None: do not compare posteriors. If
            `batch_sizes` is None, they are compared only where it is fast: up to 128 samples at 100,000 parameters and
            10 outputs.
        seed: of the draws.
        progress_bar: show progress.

    Returns:
        The findings; `print` shows them, `.table()` and `.figure()` go into a report.

    Raises:
        ValueError: if an argument is out of range, there are too few samples, or model, likelihood or samples cannot be
            used.

    References:
        Tatzel et al. (2025), arXiv 2410.14325, §3 and figure 3.
    """
    start, processes = time.perf_counter(), Processes.of()
    with processes.together():
        _check(curvature, damping, prior_precision, n_draws, n_reference)
        boolean(progress_bar, "progress_bar")
        n_draws, n_reference, damping, seed = int(n_draws), int(n_reference), float(damping), integer(seed, "seed")
        prior_precision = None if prior_precision is None else float(prior_precision)
    with processes.together(), at_weights(model, seed):
        source = united(sample_source(loader, seed, repeats=processes.several), processes, seed)
        n = len(source.indices)
        sizes = _sizes(batch_sizes, n)
        if n_data is not None:
            n_data = integer(n_data, "n_data", minimum=n)
        first = next(source.batches(source.indices[: source.batch_size], seed))
        network, first = prepare_network_and_batch(model, likelihood, first)
        if processes.several:
            given = (batch_sizes, n_draws, n_reference, n_data, curvature, damping, prior_precision, seed)
            processes.check_same(options=given)
            processes.check_same(weights=network.selection.fingerprint(), likelihood=network.likelihood.name)
        N, n_reference = n_data or n, min(n_reference, n - sizes[-1])
        compares = prior_precision is not None and curvature == "ggn"
        compared = tuple(s for s in sizes if compares and (batch_sizes is not None or _is_fast(network, s)))
        plan = Plan(source, network, sizes, n_reference, N, curvature, damping, compared, prior_precision or 0.0, seed)
        shown = progress_bar and processes.rank == 0
        with tqdm(total=n, disable=not shown, desc="[Scoring rows]", unit=" samples") as bar:
            own = (batch for _, batch in own_part(source, processes).numbered(seed))
            rows = row_shares(RowScorer(network, plan.root, first), own, bar, processes)
        total = n_draws * plan.samples_per_draw
        with tqdm(total=total, disable=not shown, desc="[Diagnosing]", unit=" samples") as bar:
            device = network.like.device
            draws = list(processes.shared_out(range(n_draws), lambda draw: diagnose_draw(plan, draw, bar), device))
    findings = tuple(_collect(size, draws) for size in sizes)
    prior, P, seconds = prior_precision if compares else None, network.n_parameters, time.perf_counter() - start
    return Diagnosis(findings, STEPS, n_draws, n_reference, N, P, curvature, damping, prior, seconds, rows)


def _check(curvature: str, damping: float, prior_precision: float | None, n_draws: int, n_reference: int) -> None:
    """Check that the arguments are in range."""
    one_of(curvature, RootCurvature, "curvature")
    number(damping, "damping", low=0)
    if prior_precision is not None:
        one_positive(prior_precision, "prior_precision")
    integer(n_draws, "n_draws", minimum=1)
    integer(n_reference, "n_reference", minimum=2)


def _sizes(batch_sizes: Sequence[int] | None, n: int) -> tuple[int, ...]:
    """Return the distinct batch sizes in increasing order."""
    if batch_sizes is None:
        sizes = tuple(size for size in SIZES if 3 * size <= n)
        if not sizes:
            raise ValueError(
                f"Expected at least {3 * SIZES[0]} samples, for batches of {SIZES[0]} and twice as many other samples; "
                f"got {n}. Pass batch_sizes."
            )
        return sizes
    if isinstance(batch_sizes, str | Mapping) or not isinstance(batch_sizes, Iterable):
        raise ValueError(f"batch_sizes must be a sequence of integers; got {shown(batch_sizes)}.")
    sizes = tuple(sorted({integer(size, "each of batch_sizes") for size in batch_sizes}))
    if not sizes or sizes[0] < 2 or sizes[-1] > n - 2:
        raise ValueError(
            f"Expected batch_sizes from 2 to {n - 2}, leaving some of the {n} samples for unbiased values; got "
            f"{list(sizes)}."
        )
    return sizes


def _is_fast(network: Network, size: int) -> bool:
    """Return whether posteriors of a batch are compared by default."""
    rows = size * network.n_outputs
    return min(rows, network.n_parameters) * rows * network.n_parameters <= MAX_PRODUCTS


def _collect(size: int, draws: list[DrawFindings]) -> BatchFindings:
    """Stack the findings of the draws for one batch size."""
    pairs = [draw.pairs[size] for draw in draws]
    gains = [draw.gains[size] for draw in draws if size in draw.gains]
    # a draw has no gain if memory ran short
    posterior = torch.tensor(gains, dtype=torch.float64) if len(gains) == len(draws) else None
    stacked = {name: Pairs.stack([p[name] for p in pairs]) for name in pairs[0]}
    return BatchFindings(size, **stacked, posterior=posterior)
