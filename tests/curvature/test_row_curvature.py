import dataclasses
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from models import MODELS, targets
from oracles import dense_ggn
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.derivatives import activation_bytes
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton, MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import RunningMoments
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.row_matrix import OuterRows

KINDS = ["classification", "regression"]
every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("kind", KINDS)
# some positions of the data, out of order and in batches of 7: the last one is smaller
SOME = torch.tensor([31, 2, 8, 39, 0, 17, 5, 22, 11, 30, 6, 13, 27, 4, 36, 9])


@cache
def oracle(name: str, kind: str) -> list[Tensor]:
    model, X = MODELS[name]()
    return dense_ggn(model, X, kind)[0]


@cache
def network(name: str, kind: str, dtype: torch.dtype) -> Network:
    model, X = MODELS[name](dtype=dtype)
    selection = ParameterSelection.all_weights(model)
    with differentiable_kernels(model):
        return prepare_network(selection, likelihood_named(kind), Batch(X, targets(kind, dtype=dtype)))


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


def curvature(
    name: str = "MLP",
    kind: str = "classification",
    *,
    indices: Tensor = SOME,
    batch_size: int = 7,
    dtype: torch.dtype = torch.float64,
    progress_bar: bool = False,
    root: Callable[[Likelihood], OutputRoot] = GaussNewton,
    **capabilities: bool,
) -> RowCurvature:
    net = network(name, kind, dtype)
    if capabilities:
        net = dataclasses.replace(net, capabilities=dataclasses.replace(net.capabilities, **capabilities))
    _, X = MODELS[name](dtype=dtype)
    y = targets(kind, dtype=dtype)
    batches = [(X[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(X), batch_size)]
    samples = SubBatch(sample_source(batches, 0), indices, torch.device("cpu"), 0)
    return RowCurvature(net, samples, root(net.likelihood), seed=5, progress_bar=progress_bar)


def expected_curvatures(name: str, kind: str, indices: Tensor = SOME) -> tuple[Tensor, Tensor]:
    """Curvature of each sample, and their mean."""
    of_samples = torch.stack([oracle(name, kind)[i] for i in indices.tolist()])
    return of_samples, of_samples.mean(0)


def directions(P: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    noise = torch.randn(P, k, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return torch.linalg.qr(noise)[0].to(dtype)


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= rtol * float(expected.abs().max())


TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@every_model
@every_kind
@both_precisions
def test_rows_square_to_the_curvature(name: str, kind: str, dtype: torch.dtype) -> None:
    c = curvature(name, kind, dtype=dtype)
    of_samples, mean = expected_curvatures(name, kind)
    chunks = list(c.rows())
    assert [len(chunk) for chunk in chunks] == [7, 7, 2]
    V = torch.cat(chunks)
    assert V.dtype == dtype
    assert not V.requires_grad
    assert_close(V.mT.double() @ V.double(), of_samples, TOLERANCE[dtype])
    assert_close((V.flatten(0, 1).T @ V.flatten(0, 1)).double() / 16, mean, TOLERANCE[dtype])
    assert c.n_samples == 16
    assert c.n_rows == 48
    held = c.stacked_rows().rows
    parts = [(p.left, p.right) if isinstance(p, OuterRows) else (p,) for p in held.parts]
    # right factors of a sample's rows are shared
    n_bytes = sum(x.numel() * x.element_size() for part in parts for x in part)
    assert n_bytes <= c.bytes_of_rows <= V.numel() * V.element_size()
    assert c.bytes_of_rows <= 2 * n_bytes


@every_model
def test_stacked_rows_know_their_samples(name: str) -> None:
    c = curvature(name)
    of_samples, mean = expected_curvatures(name, "classification")
    factor = c.stacked_rows()
    assert factor.n_samples == 16
    V = factor.rows.dense().flatten(0, 1)
    for i in range(16):
        mine = V[factor.sample_of_row == i]
        assert_close(mine.T @ mine, of_samples[i])
    assert_close(factor.gram, V @ V.T / 16)
    assert_close(V.T @ V / 16, mean)
    assert c.stacked_rows() is factor  # kept
    assert_close(torch.cat(list(c.rows())).flatten(0, 1), V)


def test_rows_from_memory_come_in_chunks_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    c = curvature()
    whole = torch.cat(list(c.rows()))
    c.stacked_rows()
    size = 3 * c.network.n_parameters * 8
    monkeypatch.setattr("debiased_laplace.curvature.network.CHUNK_BYTES", 5 * size)
    chunks = list(c.rows())
    assert [len(chunk) for chunk in chunks] == [5, 5, 5, 1]
    assert_close(torch.cat(chunks), whole)


# a batch takes a quarter of a second to linearize; several batches are tested below
@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *((name, "classification", torch.float64) for name in MODELS),
        ("MLP", "regression", torch.float32),
        ("LSTM", "regression", torch.float32),
    ],
)
def test_the_linear_map_is_the_mean_curvature(name: str, kind: str, dtype: torch.dtype) -> None:
    c = curvature(name, kind, dtype=dtype, batch_size=len(SOME))
    _, H = expected_curvatures(name, kind)
    H_times = c.linear_map()
    U = directions(len(H), 4, dtype)
    for X in (U, 3 * U[:, :2], U[:, 3:], U):
        assert_close(H_times(X), H @ X.double(), TOLERANCE[dtype])
    assert H_times(U).dtype == dtype
    G = (U.T @ H_times(U)).double()
    assert_close(G, G.T, TOLERANCE[dtype])
    able = c.network.capabilities.columns
    assert c.source == ("torch.func products" if able else "torch.func rows")


@every_model
def test_the_linear_map_without_columns_goes_through_rows(name: str) -> None:
    c = curvature(name, columns=False)
    _, H = expected_curvatures(name, "classification")
    U = directions(len(H), 3)
    assert_close(c.linear_map()(U), H @ U)
    assert c.source == "torch.func rows"


def check_moments(c: RowCurvature, name: str, kind: str, k: int, residual: str = "none") -> None:
    of_samples, H = expected_curvatures(name, kind, c.samples.indices)
    dtype = c.network.like.dtype
    U = directions(len(H), k, dtype)
    found = c.moments(U, residual)
    exact = U.double()
    along = np.array([[float(u @ Hn @ u) for u in exact.T] for Hn in of_samples]).reshape(len(of_samples), k)
    rtol = TOLERANCE[dtype]
    assert found.n_samples == len(of_samples)
    assert found.means.dtype == torch.float64
    if k:
        assert_close(found.means, torch.from_numpy(along.mean(0)), rtol)
        assert_close(found.standard_deviations, torch.from_numpy(along.std(0, ddof=1)), max(rtol, 1e-7))
        cubes = torch.from_numpy(((along - along.mean(0)) ** 3).mean(0))
        torch.testing.assert_close(found.third_moments, cubes, rtol=0, atol=max(rtol, 1e-7) * float(along.max()) ** 3)
    else:
        assert found.means.shape == found.standard_deviations.shape == (0,)
    assert (found.trace is None) == (residual != "trace")
    assert (found.residual_diagonal is None) == (residual != "diagonal")
    if residual == "trace":
        assert_close(found.trace, torch.trace(H), rtol)
    if residual == "diagonal":
        outside = torch.eye(len(H), dtype=torch.float64) - exact @ exact.T
        assert_close(found.residual_diagonal, (outside @ H @ outside).diagonal(), rtol)
        assert bool((found.residual_diagonal >= 0).all())


@every_model
@every_kind
@both_precisions
@pytest.mark.parametrize("residual", ["none", "trace", "diagonal"])
def test_moments_along_directions(name: str, kind: str, dtype: torch.dtype, residual: str) -> None:
    c = curvature(name, kind, dtype=dtype)
    check_moments(c, name, kind, 5, residual)
    able = c.network.capabilities
    by_products = residual == "none" and able.columns
    assert c.source == ("torch.func products" if by_products else "torch.func rows")


# number of directions, residual, capabilities, rows kept; expected engine
ENGINES = {
    "few directions": (5, "none", {}, False, "torch.func products"),
    "as many as products are good for": (60, "none", {}, False, "torch.func products"),
    "one more": (61, "none", {}, False, "torch.func rows"),
    "all directions": (93, "none", {}, False, "torch.func rows"),
    "no directions": (0, "none", {}, False, "torch.func rows"),
    "no directions, but the trace": (0, "trace", {}, False, "torch.func rows"),
    "no directions, but the diagonal": (0, "diagonal", {}, False, "torch.func rows"),
    "the trace needs rows": (5, "trace", {}, False, "torch.func rows"),
    "the diagonal needs rows": (5, "diagonal", {}, False, "torch.func rows"),
    "rows are there already": (5, "none", {}, True, "torch.func rows"),
    "no columns": (5, "none", {"columns": False, "vmapped_columns": False}, False, "torch.func rows"),
    "columns one by one, rows at once": (5, "none", {"vmapped_columns": False}, False, "torch.func rows"),
    "rows one by one, columns at once": (
        70,
        "none",
        {"vmapped_rows": False, "layers": None},
        False,
        "torch.func products",
    ),
    "rows and columns one by one": (
        5,
        "none",
        {"vmapped_rows": False, "layers": None, "vmapped_columns": False},
        False,
        "torch.func products",
    ),
    "rows one by one, no columns": (
        5,
        "diagonal",
        {"vmapped_rows": False, "layers": None, "columns": False, "vmapped_columns": False},
        False,
        "torch.func rows",
    ),
}


@pytest.mark.parametrize("case", ENGINES)
def test_engines_are_chosen_by_what_is_possible_then_by_cost_and_agree(case: str) -> None:
    k, residual, capabilities, kept, source = ENGINES[case]
    c = curvature("MLP", **capabilities)
    if kept:
        c.stacked_rows()
    check_moments(c, "MLP", "classification", k, residual)
    assert c.source == source


@pytest.mark.parametrize("batch_size", [1, 3, 16], ids="batches of {}".format)
@pytest.mark.parametrize("residual", ["none", "diagonal"])
def test_several_batches_give_the_same_as_one(batch_size: int, residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("debiased_laplace.curvature.row_curvature._BATCH", 5)
    monkeypatch.setattr("debiased_laplace.curvature.network.CHUNK_BYTES", 4 * 3 * 93 * 8)
    c = curvature("MLP", batch_size=batch_size, indices=SOME[:8])
    check_moments(c, "MLP", "classification", 4, residual)
    if residual == "diagonal":
        return
    _, H = expected_curvatures("MLP", "classification", SOME[:8])
    assert_close(c.linear_map()(directions(93, 2)), H @ directions(93, 2))
    V = c.stacked_rows().rows.dense().flatten(0, 1)
    assert_close(V.T @ V / 8, H)


PRODUCTS = {
    "all are linearized": (1000, True),
    "some are": (4 * 8, True),
    "none is": (1, True),
    "none can be": (8, False),
}
"""Samples whose activations fit into memory, and whether the model can be linearized."""


@pytest.mark.parametrize("root", [GaussNewton, lambda likelihood: MonteCarloGaussNewton(likelihood, 3)], ids=["", "mc"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_keep_what_fits_into_memory_and_compute_the_rest_again(
    case: str, root: Callable[[Likelihood], OutputRoot], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting, linearized = PRODUCTS[case]
    c = curvature("MLP", root=root)
    memory = 4 * fitting * c.network.capabilities.activation_bytes
    c.samples = c.samples.weighted(torch.linspace(0.5, 1.5, 16, dtype=torch.float64))
    rows = torch.cat(list(c.rows())).flatten(0, 1)
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: memory)
    # groups of three samples, from batches of seven
    monkeypatch.setattr("debiased_laplace.curvature.row_curvature._BATCH", 3)
    monkeypatch.setattr("debiased_laplace.curvature.row_curvature.CHUNK_BYTES", 1)
    if not linearized:
        monkeypatch.setattr("debiased_laplace.curvature.derivatives.linearize", None)
    product, X = c.linear_map(), directions(93, 2)
    kept = len(product._kept)
    assert {"all are linearized": kept == 6, "none is": kept == 0}.get(case, 0 < kept < 6)
    for _ in range(2):
        assert_close(product(X), rows.T @ (rows @ X) / 16)


def test_cheap_samples_are_linearized_together_whatever_the_batches_of_the_loader() -> None:
    c = curvature("MLP", batch_size=2)
    product, X = c.linear_map(), directions(93, 2)
    assert len(product._kept) == 1
    _, H = expected_curvatures("MLP", "classification")
    assert_close(product(X), H @ X)


def test_activation_bytes_of_a_sample() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    selection = ParameterSelection.all_weights(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    # of inputs, hidden units and outputs
    for n in (1, 2, 9):
        found = activation_bytes(selection, parameters, torch.randn(n, 5))
        weights = 4 * sum(p.numel() for p in parameters.values())
        expected = 4 * (5 + 7 + 3)
        assert expected <= found <= expected + (weights if n == 1 else 0)

    class Force(nn.Module):
        """Its forward pass differentiates, where torch allows no hooks."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda t: self.inner(t).sum())(x)

    force = ParameterSelection.all_weights(Force())
    parameters = {name: p.detach() for name, p in Force().named_parameters()}
    assert activation_bytes(force, parameters, torch.randn(4, 5)) == 2**20

    class Sparse(nn.Module):
        """Its graph holds a matrix that has no address."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.sparse.mm(torch.eye(5).to_sparse(), (x * self.inner[0].weight.mean()).T).T)

    sparse = ParameterSelection.all_weights(Sparse())
    parameters = {name: p.detach() for name, p in Sparse().named_parameters()}
    assert activation_bytes(sparse, parameters, torch.randn(7, 5)) >= 4 * (5 + 7 + 3)


def test_the_spread_of_a_single_sample_is_zero() -> None:
    c = curvature(indices=torch.tensor([3]))
    found = c.moments(directions(93, 4))
    assert_close(found.means, torch.stack([u @ oracle("MLP", "classification")[3] @ u for u in directions(93, 4).T]))
    assert torch.equal(found.standard_deviations, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
def test_the_same_curvature_in_every_sample_has_no_spread(dtype: torch.dtype) -> None:
    # a regression's last bias: its curvature is 1 whatever the input
    c = curvature("MLP", "regression", dtype=dtype)
    bias = torch.eye(93, dtype=dtype)[:, -1:]
    found = c.moments(bias)
    assert float(found.means[0]) == pytest.approx(1.0, rel=1e-6)
    assert float(found.standard_deviations[0]) <= 1e-7


def test_sums_over_samples_are_kept_in_double_precision() -> None:
    sums = RunningMoments(1, torch.zeros(1, dtype=torch.float32))
    for value in (2.0**24, 1.0, 1.0):
        sums.add(torch.tensor([[value]], dtype=torch.float32))
    assert float(sums.moments().means) == (2**24 + 2) / 3


def test_the_trace_is_magnitudes_and_residual_diagonal_together() -> None:
    c = curvature("LayerNorm and raw parameters")
    U = directions(91, 9)
    along, outside, whole = c.moments(U), c.moments(U, "diagonal"), c.moments(U, "trace")
    assert float(along.means.sum() + outside.residual_diagonal.sum()) == pytest.approx(float(whole.trace), rel=1e-10)


def test_asking_twice_gives_the_same() -> None:
    c = curvature("convolutions and pooling")
    U = directions(103, 6)
    for residual in ("none", "diagonal"):
        first, second = c.moments(U, residual), c.moments(U, residual)
        assert torch.equal(first.means, second.means)
        assert torch.equal(first.standard_deviations, second.standard_deviations)


@pytest.mark.parametrize("show", [False, True])
def test_progress_is_shown_on_request(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    c = curvature(progress_bar=show)
    c.moments(directions(93, 2))
    c.moments(directions(93, 2), "trace")
    c.stacked_rows()
    printed = capsys.readouterr().err
    assert ("Curvature along directions" in printed) == show
    assert ("Computing rows" in printed) == show


def test_the_model_is_left_as_it_was() -> None:
    c = curvature("BatchNorm")
    model = c.network.selection.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    U = directions(c.network.n_parameters, 3)
    c.moments(U)
    c.linear_map()(U)
    c.stacked_rows()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


# --- parts ---


@pytest.mark.parametrize("held", ["in memory", "formed again"])
@every_kind
def test_parts_add_up_to_the_whole_with_the_same_draws(kind: str, held: str) -> None:
    whole = curvature(kind=kind, root=lambda likelihood: MonteCarloGaussNewton(likelihood, 2))
    rows = torch.cat(list(whole.rows()))
    if held == "in memory":
        whole.keep_rows()
    chosen = [torch.tensor([0, 3, 4, 9, 13]), torch.tensor([1, 2, 5, 6, 7, 8, 10, 11, 12, 14, 15])]
    total = torch.zeros(rows.shape[-1], rows.shape[-1], dtype=rows.dtype)
    for positions in chosen:
        part = whole.part(positions)
        assert part.n_samples == len(positions)
        torch.testing.assert_close(torch.cat(list(part.rows())), rows[positions])
        total += part.n_samples * part.dense()
        # iterating over the samples gives the same draws
        targets_or_noise = torch.cat([targets_or_noise for _, targets_or_noise in part.batches()])
        assert torch.equal(
            targets_or_noise, torch.cat([targets_or_noise for _, targets_or_noise in whole.batches()])[positions]
        )
        again = part.part(torch.tensor([1, 4]))
        torch.testing.assert_close(torch.cat(list(again.rows())), rows[positions[[1, 4]]])
    torch.testing.assert_close(total / len(SOME), whole.dense())


def test_parts_without_draws() -> None:
    whole = curvature()
    part = whole.part(torch.tensor([2, 7, 8]))
    torch.testing.assert_close(torch.cat(list(part.rows())), torch.cat(list(whole.rows()))[[2, 7, 8]])
    expected = sum(oracle("MLP", "classification")[SOME[i]] for i in (2, 7, 8)) / 3
    torch.testing.assert_close(part.dense(), expected)
    assert part.source == "torch.func rows"
    assert whole.source == part.source
