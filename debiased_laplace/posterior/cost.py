"""Cost of a fit, estimated beforehand from two batches."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.drawn_rows import RowSampler
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import GaussNewton, MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.source import SampleSource, training_samples
from debiased_laplace.debiasing.directions import LANCZOS_RANK, SWEEPS, choose_solver
from debiased_laplace.debiasing.memory import (
    bytes_beyond_rows,
    bytes_of_directions,
    leaving_room,
    sides_with_eigenvectors,
)
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.lanczos import SPARE as LANCZOS_SPARE
from debiased_laplace.posterior.drawn_fit import DEFAULT_ROWS, SamplingOptions, default_rows
from debiased_laplace.posterior.fit import FitSpec

_EIGENVECTORS = 10  # multiplications for all eigenvectors of a matrix, in cubes of its side
_ENTRIES = 50  # memory-bound operations for an entry of all rows, in multiplications
_ROWS = 64  # rows that are timed
_COLUMNS = 4  # of the matrix whose product with their curvature is timed
_SIDE = 768  # of the matrices whose product is timed


@dataclass(frozen=True)
class FitCost:
    """Estimated cost of a fit.

    Attributes:
        n_samples: number of samples that are scored (sampling="uniform": used).
        n_rows: expected number of rows, that is backward passes.
        n_parameters: number P of parameters.
        solver: of the directions: "gram" or "lanczos"; "none" for a Kronecker posterior.
        seconds: wall time of the "tests" of the network, forward passes ("scoring"), backward passes ("rows"),
            "products" with the curvature (Lanczos) and other "linear algebra".
        n_bytes: memory of the "rows", the "directions", the "activations" of a backward pass, "eigenvectors" of
            Kronecker factors and "vectors of P", beyond the model and the samples.
    """

    n_samples: int
    n_rows: int
    n_parameters: int
    solver: str
    seconds: dict[str, float]
    n_bytes: dict[str, int]

    def __str__(self) -> str:
        seconds = ", ".join(f"{name} {value:.2g}" for name, value in self.seconds.items())
        gigabytes = ", ".join(f"{name} {value / 2**30:.2g}" for name, value in self.n_bytes.items())
        return (
            f"A fit of {self.n_parameters:,} parameters takes {self.n_samples:,} forward and about {self.n_rows:,} "
            f"backward passes (solver: {self.solver}).\n"
            f"About {sum(self.seconds.values()):.2g} s: {seconds}.\n"
            f"About {sum(self.n_bytes.values()) / 2**30:.2g} GiB beyond the model and the samples: {gigabytes}."
        )


class _Planned(RowCurvature):
    """A curvature of some rows that is asked about more of them."""

    n_planned = 0

    @property
    def n_samples(self) -> int:
        """Planned number of samples, or of drawn rows."""
        return self.n_planned


def cost_of_fit(spec: FitSpec, sampling: SamplingOptions, loader: Any, *, prior_of_blocks: bool) -> FitCost:
    """Estimate the cost of a fit from two batches.

    Args:
        spec: request.
        sampling: of the samples.
        loader: of training samples.
        prior_of_blocks: whether the prior precision is the same for all entries of a parameter tensor.

    Returns:
        The estimate; the model is as it was.

    Raises:
        ValueError: if the number of samples is not known beforehand, two batches have no curvature, the curvature is a
            Hessian, or the fit does not fit into memory.
    """
    if spec.backend.root(spec.likelihood) is None:
        raise ValueError("The cost of a Hessian is not estimated; expected a GGN or an empirical Fisher.")
    samples = training_samples(loader, spec.split.seed, spec.keys)
    if not isinstance(samples, SampleSource):
        raise ValueError(
            "An iterable of batches does not say how many samples it has; expected a DataLoader or a list."
        )
    with at_weights(spec.model, spec.split.seed):
        timed = _timed(spec, samples)
        network, rows = timed.network, timed.rows
        root = spec.backend.root(network.likelihood)
        assert root is not None  # for the type checker
        if isinstance(root, MonteCarloGaussNewton) and sampling.sampling == "curvature":
            root = GaussNewton(network.likelihood)
        # few enough of a large network
        some = rows.part(torch.arange(max(1, min(len(rows.samples), int(_MOST_SECONDS / timed.scoring)))))
        options = spec.request.options.resolved(prior_of_blocks=prior_of_blocks)
        most = sampling.n_rows or DEFAULT_ROWS
        if sampling.sampling == "uniform":
            most = len(samples.indices) * network.n_outputs
        network = leaving_room(network, options, most)
        n, n_rows = _numbers(network, root, sampling, options, len(samples.indices))
        drawn = sampling.sampling == "curvature"
        planned = _Planned(network, rows.samples, rows.root if drawn else root)
        planned.n_planned = n_rows if drawn else n
        n_folds = options.n_folds if options.magnitudes == "cross_fitted" else 0
        solver = "none"
        if options.structure != "kron":
            solver = options.solver if options.solver != "auto" else choose_solver(planned, options.rank, n_folds)
        rank = _rank(planned, options, solver)
        seconds = {"tests": timed.tests, "scoring": n * timed.scoring}
        if solver != "lanczos" or options.complement != "none":
            again = SWEEPS * len(planned.parameter_groups) if planned.bytes_of_rows > network.available_memory else 1
            seconds["rows"] = n_rows * max(again, 1) * _seconds(some.squared_norms) / some.n_samples
        if solver == "lanczos":
            seconds["products"] = (1 + n_folds) * (3 * rank + 20) * planned.n_samples * _seconds_of_a_product(some)
    multiplications = _multiplications(planned, options, solver, rank, n_folds)
    seconds["linear algebra"] = multiplications * _seconds_of_a_multiplication(network)
    P = network.n_parameters
    n_bytes = {
        "rows": min(planned.bytes_of_rows, network.available_memory),
        "directions": bytes_of_directions(network, options, rank + (LANCZOS_SPARE if solver == "lanczos" else 0)),
        "activations": network.bytes_of_activations(n_rows),
        **bytes_beyond_rows(network, options),
    }
    return FitCost(n, n_rows, P, solver, seconds, n_bytes)


_MOST_SECONDS = 1.0
"""Seconds of forward passes over the samples that derivatives are timed with, each about ten times as long."""


@dataclass(frozen=True, eq=False)
class _Timed:
    """What two batches tell.

    Attributes:
        network: the network.
        tests: seconds that its tests took.
        scoring: seconds to load and score a sample.
        rows: curvature of some rows.
    """

    network: Network
    tests: float
    scoring: float
    rows: RowCurvature


def _timed(spec: FitSpec, samples: SampleSource) -> _Timed:
    """Load and score two batches; the first also starts workers and warms up the device."""
    numbered = samples.numbered(spec.split.seed)
    first = next(numbered, None)
    if first is None:
        raise ValueError("The loader yields no samples; expected at least 2.")
    some = first[1].first(8).to(next(spec.model.parameters()).device).weighted(None)
    start = time.perf_counter()
    network = spec.prepared(some)
    tests = time.perf_counter() - start
    sampler = RowSampler(network, GaussNewton(network.likelihood), some, n_rows=_ROWS, seeds=(0,))
    sampler.read([first], total=None, progress_bar=False)
    start = time.perf_counter()
    second = next(numbered, first)
    sampler.read([second], total=None, progress_bar=False)
    scoring = (time.perf_counter() - start) / len(second[1])
    drawn = sampler.drawn()
    if len(drawn) == 0:
        raise ValueError("The samples of the first two batches have no curvature; expected some that have.")
    rows = drawn.curvature()
    assert isinstance(rows, RowCurvature)  # for the type checker
    return _Timed(network, tests, scoring, rows)


def _numbers(
    network: Network, root: OutputRoot, sampling: SamplingOptions, options: EstimatorOptions, n_samples: int
) -> tuple[int, int]:
    """Return the number of samples and of rows that a fit uses."""
    r = root.n_columns(network.n_outputs)
    if sampling.sampling == "curvature":
        n_rows = default_rows(network, options) if sampling.n_rows is None else sampling.n_rows
        return n_samples, min(n_samples * r, n_rows)
    n = n_samples if sampling.n_rows is None else min(n_samples, max(2, sampling.n_rows // r))
    return n, n * r


def _rank(planned: RowCurvature, options: EstimatorOptions, solver: str) -> int:
    """Return the number of directions, of which fewer may have a curvature."""
    if solver == "none":
        return 0
    most = min(planned.n_rows, planned.network.n_parameters)
    if options.rank is None:
        return min(most, LANCZOS_RANK) if solver == "lanczos" else most
    return min(most, options.rank)


def _multiplications(planned: RowCurvature, options: EstimatorOptions, solver: str, rank: int, n_folds: int) -> float:
    """Return about how many multiplications a fit takes beyond derivatives."""
    network, R = planned.network, planned.n_rows
    P = network.n_parameters
    length = planned.bytes_of_rows / R / network.like.element_size()
    total = float(_ENTRIES * R * P)
    if solver == "lanczos":
        # every product is orthogonalized against the ones before
        total += (1 + n_folds) * 2 * P * (3 * rank + 20) ** 2
    elif solver == "gram":
        side = min(R, P)
        total += R * side * length + (1 + n_folds) * _EIGENVECTORS * side**3 + 3 * R * P * rank
    for n_entries, sides in sides_with_eigenvectors(network, options):
        total += (1 + n_folds) * _EIGENVECTORS * sum(side**3 for side in sides)
        # factors, and rows in coordinates of the basis
        total += 4 * R * (sum(side**2 for side in sides) if network.linear_layer else n_entries * sum(sides))
    return total


def _seconds(run: Callable[[], Any]) -> float:
    """Return the wall time of a function, with all that it asked a device to do."""
    start = time.perf_counter()
    found = run()
    if isinstance(found, Tensor):
        float(found.sum())
    return time.perf_counter() - start


def _seconds_of_a_product(rows: RowCurvature) -> float:
    """Return the time of the product of one sample's curvature with one vector."""
    product = rows.linear_map()
    X = rows.network.like.new_ones(rows.network.n_parameters, _COLUMNS)
    return min(_seconds(lambda: product(X)) for _ in range(2)) / (rows.n_samples * _COLUMNS)


def _seconds_of_a_multiplication(network: Network) -> float:
    like = network.like
    A = like.new_ones(_SIDE, _SIDE, dtype=accumulation_dtype(like))
    return min(_seconds(lambda: A @ A) for _ in range(3)) / _SIDE**3
