from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from models import MODELS
from oracles import dense_jacobian, output_hessian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from debiased_laplace import DebiasedLaplace, diagnose, directional_derivatives, newton_step, quadratic_along
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.derivatives import (
    BatchProducts,
    Capabilities,
    LinearizedBatch,
    allows_linearization,
    columns,
    find_capabilities,
    identity_cotangents,
    looped_rows,
    vmapped_rows,
)
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton
from debiased_laplace.data.batches import Batch

N = 12


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class PartlyUsed(nn.Module):
    """A trainable layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.head = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.sin())


class Branching(nn.Module):
    """A model with data-dependent control flow, which vmap does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(self.one if bool(s.sum() > 0) else self.other)(s).tanh() for s in x])


class Tokens(nn.Module):
    """Integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(1).tanh())


class _WrongUnderVmap(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return 2 * x.sin(), in_dims[0]


class _WrongForward(_WrongUnderVmap):
    generate_vmap_rule = False

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * t * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return x.sin(), in_dims[0]


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]):
        super().__init__()
        self.function = function
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function.apply(self.first(x)).tanh())


def drawn(build: Any, X: Any) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build().double().eval(), X(torch.Generator().manual_seed(4))


def real(g: torch.Generator) -> Tensor:
    return torch.randn(N, 4, generator=g, dtype=torch.float64)


def tokens(g: torch.Generator) -> Tensor:
    return torch.randint(7, (N, 6), generator=g)


ALL: dict[str, Any] = {
    **{name: (lambda build=build: (build()[0], build()[1][:N])) for name, build in MODELS.items()},
    "tied weights": lambda: drawn(Tied, real),
    "a layer that is not used": lambda: drawn(PartlyUsed, real),
    "data-dependent control flow": lambda: drawn(Branching, real),
    "integer inputs": lambda: drawn(Tokens, tokens),
    "EmbeddingBag": lambda: drawn(lambda: nn.Sequential(nn.EmbeddingBag(7, 3), nn.Tanh()), tokens),
    "weight_norm": lambda: drawn(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3, bias=False)
        ),
        real,
    ),
}
every_model = pytest.mark.parametrize("name", ALL)


class Setup:
    """A model, its capabilities, and its Jacobians by the oracle."""

    def __init__(self, name: str):
        self.model, self.X = ALL[name]()
        self.selection = ParameterSelection.all_weights(self.model)
        self.parameters = self.selection.unflatten(self.selection.vector())
        self.capabilities = find_capabilities(self.selection, self.parameters, self.X)
        self.outputs = self.model(self.X).detach()
        self.J = torch.stack([dense_jacobian(self.model, x) for x in self.X])
        self.P = self.selection.n_parameters

    def tangents(self, k: int) -> Tensor:
        return torch.randn(self.P, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@cache
def setup(name: str) -> Setup:
    """Cached, because finding capabilities takes longer than most tests."""
    with differentiable_kernels(nn.Identity()):
        return Setup(name)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.Identity()):
        yield


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


# vmapped rows, columns, vmapped columns, linearized
KNOWN = {
    "MLP": (True, True, True, True),
    "convolutions and pooling": (True, True, True, True),
    "BatchNorm": (True, True, True, True),
    "LayerNorm and raw parameters": (True, True, True, True),
    "partly frozen": (True, True, True, True),
    "transformer": (True, True, True, True),
    "GRU": (False, True, True, False),
    "tied weights": (True, True, True, True),
    "a layer that is not used": (True, True, True, True),
    "integer inputs": (True, True, True, True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_capabilities_are_the_known_ones(name: str) -> None:
    s = setup(name)
    found = s.capabilities
    *modes, linearized = KNOWN[name]
    assert [found.vmapped_rows, found.columns, found.vmapped_columns] == modes, found.reasons
    assert len(found.reasons) == modes.count(False)
    assert not found.linearized, "it is tried only where products are asked for"
    assert allows_linearization(s.selection, s.parameters, s.X) == linearized


def test_an_lstm_in_single_precision_has_no_columns_on_the_cpu() -> None:
    model, X = MODELS["LSTM"](dtype=torch.float32)
    selection = ParameterSelection.all_weights(model)
    found = find_capabilities(selection, selection.unflatten(selection.vector()), X)
    assert not found.columns
    assert not found.vmapped_columns
    assert "forward AD" in found.reasons["columns"]


def test_data_dependent_control_flow_has_no_vmapped_rows_and_says_why() -> None:
    found = setup("data-dependent control flow").capabilities
    assert not found.vmapped_rows
    assert "vmap" in found.reasons["vmapped rows"]
    assert "\n" not in found.reasons["vmapped rows"]


@pytest.mark.parametrize(
    ("function", "refused"),
    [(_WrongUnderVmap, "vmapped rows"), (_WrongForward, "columns")],
    ids=["wrong rows", "wrong columns"],
)
def test_modes_that_run_but_give_wrong_numbers_are_refused(function: type, refused: str) -> None:
    model, X = drawn(lambda: Applied(function), real)
    selection = ParameterSelection.all_weights(model)
    found = find_capabilities(selection, selection.unflatten(selection.vector()), X)
    assert found.reasons[refused] == "disagreed with one sample at a time"
    assert found.vmapped_rows == (refused != "vmapped rows")
    assert found.columns == (refused != "columns")


@pytest.mark.parametrize("name", [*KNOWN, "wrong columns"])
def test_a_large_network_is_tested_a_few_parameters_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("debiased_laplace.curvature.derivatives._LARGE", 0)
    monkeypatch.setattr("debiased_laplace.curvature.derivatives._GROUP", 100)
    wrong = name == "wrong columns"
    model, X = drawn(lambda: Applied(_WrongForward), real) if wrong else ALL[name]()
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    found = find_capabilities(selection, parameters, X)
    assert found.columns == (not wrong), found.reasons
    assert not found.vmapped_columns
    usual = find_capabilities(selection, parameters, X)
    assert (found.layers is None) == (usual.layers is None)
    assert found.layers is None or found.layers.names == usual.layers.names


def test_finding_capabilities_changes_neither_the_random_state_nor_the_model() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    setup = Setup("transformer")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in setup.model.parameters())


@every_model
def test_looped_rows_are_the_jacobian(name: str) -> None:
    s = setup(name)
    rows, outputs = looped_rows(s.selection, s.parameters, s.X, torch.zeros(N), identity_cotangents)
    assert_close(rows, s.J)
    assert_close(outputs, s.outputs)
    assert not rows.requires_grad
    assert not outputs.requires_grad
    assert all(p.grad is None for p in s.model.parameters())


@every_model
def test_vmapped_rows_are_the_jacobian(name: str) -> None:
    s = setup(name)
    if not s.capabilities.vmapped_rows:
        pytest.skip(s.capabilities.reasons["vmapped rows"])
    rows, outputs = vmapped_rows(s.selection, s.parameters, s.X, torch.zeros(N), identity_cotangents)
    assert_close(rows, s.J)
    assert_close(outputs, s.outputs)


@every_model
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_rows_of_the_root_square_to_the_ggn_of_each_sample(name: str, kind: str) -> None:
    s = setup(name)
    expected = torch.stack([J.T @ output_hessian(f, kind) @ J for J, f in zip(s.J, s.outputs, strict=True)])
    likelihood = likelihood_named(kind)

    def root(outputs: Tensor, targets_or_noise: Tensor) -> Tensor:
        return likelihood.root(outputs, slice(None))

    found = [looped_rows(s.selection, s.parameters, s.X, torch.zeros(N), root)[0]]
    if s.capabilities.vmapped_rows:
        found.append(vmapped_rows(s.selection, s.parameters, s.X, torch.zeros(N), root)[0])
    for rows in found:
        assert_close(rows.mT @ rows, expected)


@every_model
@pytest.mark.parametrize("k", [1, 5])
def test_columns_are_the_jacobian_times_tangents(name: str, k: int) -> None:
    s = setup(name)
    if not s.capabilities.columns:
        pytest.skip(s.capabilities.reasons["columns"])
    U = s.tangents(k)
    for vmapped in (False, True)[: 1 + s.capabilities.vmapped_columns]:
        pushed, outputs = columns(s.selection, s.parameters, s.X, U, vmapped=vmapped)
        assert_close(pushed, s.J @ U)
        assert_close(outputs, s.outputs)


def ggn_root(kind: str) -> GaussNewton:
    return GaussNewton(likelihood_named(kind))


def ggn_sum(s: Setup, kind: str) -> Tensor:
    return sum(J.T @ output_hessian(f, kind) @ J for J, f in zip(s.J, s.outputs, strict=True))


@every_model
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_products_of_a_batch_are_right_at_every_use(name: str, kind: str) -> None:
    s = setup(name)
    if not s.capabilities.columns:
        pytest.skip(s.capabilities.reasons["columns"])
    H = ggn_sum(s, kind)
    products = BatchProducts(
        LinearizedBatch(s.selection, s.parameters, s.X, s.capabilities),
        Batch(s.X, torch.zeros(N)),
        torch.zeros(N),
        ggn_root(kind),
    )
    U = s.tangents(4)
    for X in (U, U[:, :1], 2 * U, U[:, 1:3], U):
        assert_close(products(X), H @ X)


def without(name: str, **changes: bool) -> Capabilities:
    able = setup(name).capabilities
    found = {
        "vmapped_rows": able.vmapped_rows,
        "columns": able.columns,
        "vmapped_columns": able.vmapped_columns,
        "linearized": True,
    }
    return Capabilities(**{**found, **changes}, reasons={})


WAYS = {
    "linearized, many at once": {},
    "linearized, one by one": {"vmapped_columns": False},
    "not linearized, many at once": {"linearized": False},
    "not linearized, one by one": {"linearized": False, "vmapped_columns": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["MLP", "BatchNorm", "transformer"])
def test_products_of_all_modes_agree(name: str, way: str) -> None:
    s = setup(name)
    H = ggn_sum(s, "classification")
    able = without(name, **WAYS[way])
    products = BatchProducts(
        LinearizedBatch(s.selection, s.parameters, s.X, able),
        Batch(s.X, torch.zeros(N)),
        torch.zeros(N),
        ggn_root("classification"),
    )
    U = s.tangents(3)
    for _ in range(3):
        assert_close(products(U), H @ U)


def test_products_of_a_gru_are_right_at_the_second_and_third_use() -> None:
    # torch's linearization of a GRU overwrites its own constants, so that only its first use is right
    able = network(setup("GRU")).ready_for_products(setup("GRU").X).capabilities
    s = setup("GRU")
    H = ggn_sum(s, "classification")
    products = BatchProducts(
        LinearizedBatch(s.selection, s.parameters, s.X, able),
        Batch(s.X, torch.zeros(N)),
        torch.zeros(N),
        ggn_root("classification"),
    )
    u = s.tangents(1)
    for scale in (1.0, -2.0, 1.0):
        assert_close(products(scale * u), scale * H @ u)


def network(s: Setup, **changes: bool) -> Network:
    able = s.capabilities
    found = Capabilities(
        changes.get("vmapped_rows", able.vmapped_rows),
        able.columns,
        changes.get("vmapped_columns", able.vmapped_columns),
        {},
    )
    return Network(s.selection, s.parameters, likelihood_named("classification"), s.outputs.shape[1], found)


@every_model
@pytest.mark.parametrize("samples_a_chunk", [1, 5, 1000])
def test_a_networks_jacobians_and_rows_come_in_chunks(
    name: str, samples_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = setup(name)
    size = s.outputs.shape[1] * s.P * 8
    monkeypatch.setattr("debiased_laplace.curvature.network.CHUNK_BYTES", samples_a_chunk * size)
    net = network(s)
    assert net.n_parameters == s.P
    assert net.rows_per_chunk(3) == min(samples_a_chunk, 256)
    jacobians = list(net.jacobians(s.X))
    assert [len(J) for J, _ in jacobians] == [len(part) for part in s.X.split(samples_a_chunk)]
    assert_close(torch.cat([J for J, _ in jacobians]), s.J)
    assert_close(torch.cat([f for _, f in jacobians]), s.outputs)
    batch = Batch(s.X, torch.zeros(N, dtype=torch.int64))
    groups = [
        (n, list(blocks), who) for n, blocks, who in net.root_rows(batch, ggn_root("classification"), batch.targets)
    ]
    assert [n for n, _, _ in groups] == [len(part) for part in s.X.split(samples_a_chunk)]
    assert {(len(blocks), who) for _, blocks, who in groups} == {(1, "torch.func rows")}
    V = torch.cat([blocks[0] for _, blocks, _ in groups])
    assert_close((V.mT @ V).sum(0), ggn_sum(s, "classification"))
    assert_close(net.outputs(s.X), s.outputs)
    assert not net.outputs(s.X).requires_grad


@pytest.mark.parametrize("n_directions", [1, 32, 33, 70])
def test_a_networks_columns_come_in_groups_of_directions(n_directions: int) -> None:
    s = setup("MLP")
    U = s.tangents(n_directions)
    expected = torch.einsum(
        "pk,npq,qk->nk",
        U,
        torch.stack([J.T @ output_hessian(f, "classification") @ J for J, f in zip(s.J, s.outputs, strict=True)]),
        U,
    )
    root, targets_or_noise = ggn_root("classification"), torch.zeros(N)
    pushed = network(s).root_columns(Batch(s.X, torch.zeros(N)), root, targets_or_noise, U)
    assert pushed.shape == (N, 3, n_directions)
    assert_close(pushed.square().sum(1), expected)
    assert_close(
        network(s, vmapped_columns=False).root_columns(Batch(s.X, torch.zeros(N)), root, targets_or_noise, U), pushed
    )


@pytest.mark.parametrize("looped", [False, True], ids=["as found", "looped"])
@pytest.mark.parametrize("name", ["MLP", "BatchNorm", "LayerNorm and raw parameters", "transformer", "GRU"])
def test_jacobians_with_a_graph_have_gradients_with_respect_to_the_inputs(name: str, looped: bool) -> None:
    s = setup(name)
    net = network(s, vmapped_rows=False) if looped else network(s)
    weights = torch.randn(s.J[:3].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def along(x: Tensor) -> Tensor:
        J, outputs = next(iter(net.jacobians(x, create_graph=True)))
        return (J * weights).sum() + outputs.square().sum()

    x = s.X[:3].clone().requires_grad_()
    (found,) = torch.autograd.grad(along(x), x)
    step, generator = 1e-5, torch.Generator().manual_seed(7)
    for _ in range(3):
        u = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        rise = along(x.detach() + step * u) - along(x.detach() - step * u)
        expected = float(rise.detach()) / (2 * step)
        assert float((found * u).sum()) == pytest.approx(expected, rel=1e-6)


class OldFunction(torch.autograd.Function):
    """Softplus in the style that torch.func does not transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.softplus(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * torch.sigmoid(ctx.saved_tensors[0])


class Backward(nn.Module):
    """Two layers with a softplus between them, in one of the styles that allow backward passes only."""

    def __init__(self, style: str):
        super().__init__()
        self.first, self.last, self.style = nn.Linear(4, 5), nn.Linear(5, 3), style
        for i, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        self.double()

    def _hidden(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "a function without setup_context":
            return self.last(OldFunction.apply(self.first(x)))
        if self.style == "plain":
            return self.last(self._hidden(x))
        return self.last(checkpoint(self._hidden, x, use_reentrant=self.style == "a reentrant checkpoint"))


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(40, 4, generator=generator, dtype=torch.float64), torch.randint(3, (40,), generator=generator)


def posterior(model: nn.Module, **options: Any) -> Tensor:
    la = DebiasedLaplace(model, "classification", prior_precision=0.4, **options)
    la.fit([samples()], n_data=90)
    X = samples()[0][:4]
    draws = la.functional_samples(X, n_samples=3, generator=torch.Generator().manual_seed(0))
    return torch.cat([t.flatten() for t in (la.directional_curvatures, la(X), draws.square().mean(0))])


U = torch.randn(43, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
ENTRIES = {
    "low rank": lambda m: posterior(m, rank=4, magnitudes="same_batch")[:4],
    "last layer": lambda m: posterior(m, subset_of_weights="last_layer", rank=4)[:16],
    "Lanczos": lambda m: posterior(m, rank=3, solver="lanczos", magnitudes="same_batch", complement="none")[:15],
    "directional_derivatives": lambda m: (
        directional_derivatives(m, "classification", samples(), U).per_sample_curvatures
    ),
    "slopes": lambda m: directional_derivatives(m, "classification", samples(), U, curvature="ef").per_sample_slopes,
    "Hessian": lambda m: directional_derivatives(m, "classification", samples(), U, curvature="hessian").curvatures,
    "quadratic_along": lambda m: quadratic_along(m, "classification", samples(), U).curvature_matrix,
    "newton_step": lambda m: newton_step(m, "classification", samples(), 0.1, max_iterations=5).update,
    "newton_step, Hessian": lambda m: newton_step(m, "classification", samples(), 9.0, curvature="hessian").update,
    "diagnose": lambda m: diagnose(m, "classification", [samples()], batch_sizes=[12], n_draws=1).batches[0].posterior,
}


@cache
def of_the_plain_model(entry: str) -> Tensor:
    return ENTRIES[entry](Backward("plain"))


@pytest.mark.parametrize("style", ["a function without setup_context", "a checkpoint"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_models_that_allow_backward_passes_only_go_the_slow_way(style: str, entry: str) -> None:
    expected = of_the_plain_model(entry)
    assert bool((expected != 0).any())
    assert torch.allclose(ENTRIES[entry](Backward(style)), expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_that_leaves_gradients_out_is_refused(entry: str) -> None:
    model = Backward("a reentrant checkpoint")
    if entry == "last layer":
        assert torch.allclose(ENTRIES[entry](model), ENTRIES[entry](Backward("plain")), rtol=1e-9)
        return
    with pytest.raises(ValueError, match=r"leaves out the gradients.*expected use_reentrant=False"):
        ENTRIES[entry](model)
