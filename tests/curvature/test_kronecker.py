"""Kronecker factors: of row matrices against loops, and K-FAC's against curvlinops and against loops."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from curvlinops import FisherType, KFACLinearOperator
from models import MODELS, targets
from oracles import (
    block_diagonal,
    dense_ggn,
    dense_kfac_factors,
    dense_kronecker_product,
    partial_traces,
    trainable,
)
from sub_batches import network_of, rows_of, small_network
from torch import Tensor, nn

from debiased_laplace.curvature import kronecker as module
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.kfac import KfacApproximation, KfacSums
from debiased_laplace.curvature.kronecker import (
    KroneckerFactors,
    kronecker_basis,
    matrix_shapes,
    partial_trace_factors,
    row_matrix_factors,
)
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature

LIKELIHOODS = ["classification", "regression"]
SOME = torch.tensor([31, 2, 8, 39, 0, 17, 5, 22, 11, 30, 6])


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


# --- row matrices ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_row_matrices_have_the_partial_traces_of_each_block(name: str, likelihood: str) -> None:
    network, X, y = small_network(name, likelihood)
    model = network.selection.model
    H = dense_ggn(model, X[SOME], likelihood)[1]
    shapes = matrix_shapes(network.selection, layers_only=False)
    found = row_matrix_factors(rows_of(network, X, y, SOME), shapes)
    from_dense = partial_trace_factors(H, shapes)
    start = 0
    for p, shape, of_rows, of_matrix in zip(trainable(model), shapes, found, from_dense, strict=True):
        block = H[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        o, i = shape.rows.size, shape.columns.size
        assert (o, i) == ((len(p), p.numel() // len(p)) if p.ndim >= 2 else (p.numel(), 1))
        left, right = partial_traces(block, o, i)
        right = right / torch.trace(block)
        left = left if shape.rows.full else left.diagonal()
        right = right if shape.columns.full else right.diagonal()
        for factors in (of_rows, of_matrix):
            close(factors.left, left)
            close(factors.right, right)
            total = [f.diagonal().sum() if f.ndim == 2 else f.sum() for f in (factors.left, factors.right)]
            assert float(total[0] * total[1]) == pytest.approx(float(torch.trace(block)), rel=1e-10)


@pytest.mark.parametrize("root", [EmpiricalFisher, lambda kind: MonteCarloGaussNewton(kind, 3)], ids=["EF", "MC"])
def test_row_matrices_of_other_roots_are_those_of_their_dense_curvature(root) -> None:
    network, X, y = small_network("convolutions and pooling")
    curvature = rows_of(network, X, y, SOME, root, seed=4)
    shapes = matrix_shapes(network.selection, layers_only=False)
    for found, expected in zip(
        row_matrix_factors(curvature, shapes), partial_trace_factors(curvature.dense(), shapes), strict=True
    ):
        close(found.left, expected.left)
        close(found.right, expected.right)


def test_zero_curvature_gives_finite_factors() -> None:
    model = nn.Linear(3, 2).double()
    shapes = matrix_shapes(ParameterSelection.all_weights(model), layers_only=False)
    factors = partial_trace_factors(torch.zeros(8, 8, dtype=torch.float64), shapes)
    basis = kronecker_basis(factors, torch.float64)
    assert not any(f.left.any() or f.right.any() for f in factors)
    K = basis.to_dense()
    close(K.T @ K, torch.eye(8, dtype=torch.float64))


# --- bases of factors ---


def test_a_basis_diagonalizes_its_factors_by_decreasing_eigenvalue() -> None:
    network, X, y = small_network("MLP")
    shapes = matrix_shapes(network.selection, layers_only=False)
    factors = row_matrix_factors(rows_of(network, X, y), shapes)
    basis = kronecker_basis(factors, torch.float64)
    assert basis.n_parameters == network.n_parameters
    for f, block in zip(factors, basis.blocks, strict=True):
        assert f.left.ndim == 2
        assert block.left is not None
        for factor, Q in ((f.left, block.left), (f.right, block.right)):
            if Q is None:
                assert factor.shape == (1,)
                continue
            turned = Q.T @ factor @ Q
            close(turned, torch.diag(turned.diagonal()))
            assert bool((turned.diagonal().diff() <= 1e-12 * turned.max()).all())
            close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64))
    # the diagonal in another basis is that of the dense product
    other = kronecker_basis([KroneckerFactors(f.left.flip(0, 1), f.right.square()) for f in factors], torch.float64)
    K = other.to_dense()
    dense = [dense_kronecker_product(f.left, f.right if f.right.ndim == 2 else torch.diag(f.right)) for f in factors]
    found = torch.cat([f.diagonal_in(block) for f, block in zip(factors, other.blocks, strict=True)])
    close(found, (K.T @ block_diagonal(dense) @ K).diagonal())
    assert kronecker_basis(factors, torch.float32).blocks[0].left.dtype == torch.float32


def test_scaled_factors_are_the_scaled_curvature() -> None:
    f = KroneckerFactors(torch.eye(2).double() * 3, torch.tensor([1.0, 2.0]).double())
    block = kronecker_basis([f], torch.float64).blocks[0]
    assert f.diagonal_in(block).tolist() == [3, 6, 3, 6]
    assert f.scaled(0.5).diagonal_in(block).tolist() == [1.5, 3, 1.5, 3]


@pytest.mark.parametrize("side", [5, 4096], ids=["some sides keep their axes", "every side has a basis"])
def test_factors_without_some_samples_are_those_of_the_others(side: int) -> None:
    network, X, y = small_network("MLP")
    shapes = matrix_shapes(network.selection, layers_only=False, largest_side=side)
    held, others = torch.arange(7), torch.arange(7, len(X))
    whole, part, expected = (row_matrix_factors(rows_of(network, X, y, some), shapes) for some in (None, held, others))
    for f, of_held, of_others in zip(whole, part, expected, strict=True):
        found = f.without(of_held, len(held) / len(X), torch.float64)
        close(found.left, of_others.left)
        close(found.right, of_others.right)


@pytest.mark.parametrize("scale", [1e-42, 1.0, 1e42])
def test_eigenvectors_in_single_precision(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE", 6)
    generator = torch.Generator().manual_seed(3)
    M = torch.randn(9, 6, generator=generator).double()
    left, right = M @ M.T * scale, torch.diag(torch.arange(4.0, 0, -1).double())
    factors = KroneckerFactors(left, right)
    rounded = replace(factors, eigenvector_dtype=torch.float32)
    assert rounded.ranks == factors.ranks == (6, 4)
    bases = [kronecker_basis([f], torch.float64).blocks[0] for f in (factors, rounded)]
    # eigenvectors of the null space are arbitrary
    along = bases[0].left[:, :6].T @ bases[1].left[:, :6]
    torch.testing.assert_close(along.abs(), torch.eye(6).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(bases[1].left.T @ bases[1].left, torch.eye(9).double(), rtol=0, atol=1e-5)
    # small sides stay exact
    close(bases[1].right, bases[0].right)


def test_a_side_that_is_too_long_keeps_its_axes() -> None:
    network, X, y = small_network("MLP")  # 4-7-5-3
    shapes = matrix_shapes(network.selection, layers_only=False, largest_side=5)
    full = [(s.rows.full, s.columns.full) for s in shapes]
    assert full == [(False, True), (False, False), (True, False), (True, False), (True, True), (True, False)]
    H = dense_ggn(network.selection.model, X[SOME], "classification")[1]
    factors = row_matrix_factors(rows_of(network, X, y, SOME), shapes)
    left, right = partial_traces(H[:28, :28], 7, 4)
    close(factors[0].left, left.diagonal())
    close(factors[0].right, right / torch.trace(right))
    basis = kronecker_basis(factors, torch.float64)
    assert basis.blocks[0].left is None
    assert basis.blocks[0].right is not None


# --- which parameters get a basis ---


class _Unusual(nn.Module):
    """One layer of each kind with weights, in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.one_axis = nn.Conv1d(4, 4, 3, padding=1)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2, padding=1)
        self.circular = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.transposed = nn.ConvTranspose1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.tied = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.tied.weight
        self.raw = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.normalized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.known = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x.long()).mT
        h = self.circular(torch.tanh(self.grouped(torch.tanh(self.one_axis(h)))))
        h = self.recurrent(self.norm(self.transposed(h).mT))[0]
        h = self.normalized(torch.tanh(self.twin(torch.tanh(self.tied(h)))))
        return self.known((torch.tanh(h @ self.raw) * self.vector).mean(1))


def unusual() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return _Unusual().double().eval(), torch.randint(6, (9, 5)).double(), torch.randint(3, (9,))


def test_parameters_that_kfac_does_not_support_keep_their_axes() -> None:
    model, X, y = unusual()
    selection = ParameterSelection.all_weights(model)
    shapes = dict(zip(selection.names, matrix_shapes(selection, layers_only=True), strict=True))
    assert {name for name, s in shapes.items() if s.rows.full or s.columns.full} == {
        *("one_axis.weight", "one_axis.bias", "known.weight", "known.bias"),
    }
    network = network_of(model, X, y, "classification")
    sums = KfacSums(network, GaussNewton(network.likelihood), "expand")
    for batch, side in rows_of(network, X, y).batches():
        sums.add(batch, side)
    assert set(sums.factors()) == {"one_axis.weight", "one_axis.bias", "known.weight", "known.bias"}


def test_row_matrices_cover_every_parameter_of_two_or_more_dimensions() -> None:
    model, X, y = unusual()
    selection = ParameterSelection.all_weights(model)
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    shapes = dict(zip(selection.names, matrix_shapes(selection, layers_only=False), strict=True))
    full = {name for name, s in shapes.items() if s.rows.full}
    assert full == matrices | {"one_axis.bias", "known.bias"}
    assert {name for name, s in shapes.items() if s.columns.full} == {
        name for name in matrices if shapes[name].columns.size > 1
    }
    network = network_of(model, X, y, "classification")
    factors = row_matrix_factors(rows_of(network, X, y), list(shapes.values()))
    H = dense_ggn(model, X, "classification")[1]
    for found, expected in zip(factors, partial_trace_factors(H, list(shapes.values())), strict=True):
        close(found.left, expected.left, 1e-8)
        close(found.right, expected.right, 1e-8)


def test_partly_selected_parameters_keep_their_axes() -> None:
    model = MODELS["MLP"]()[0]
    everything = ParameterSelection.all_weights(model)
    # all of the first weight, two entries of its bias, three of the next weight, the last bias
    picked = torch.cat([torch.arange(28), torch.tensor([29, 33, 40, 41, 50]), torch.arange(90, 93)])
    for layers_only in (False, True):
        shapes = matrix_shapes(everything.subnetwork(picked), layers_only=layers_only)
        assert [(s.rows.size, s.rows.full, s.columns.size, s.columns.full) for s in shapes] == [
            (7, True, 4, True),
            (2, False, 1, False),
            (3, False, 1, False),
            (3, True, 1, False),
        ]


# --- K-FAC ---


class _Positions(nn.Module):
    """Linear layers that act at every position of a sequence."""

    def __init__(self, *, bias: bool):
        super().__init__()
        self.first = nn.Linear(4, 6, bias=bias)
        self.second = nn.Linear(6, 5, bias=bias)
        self.head = nn.Linear(5, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


def _images(*, bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, dilation=(2, 1), bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3, bias=bias),
    )


KFAC_MODELS = {
    "linear layers": lambda bias: (
        nn.Sequential(nn.Linear(4, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias)),
        torch.randn(11, 4),
    ),
    "linear layers, in-place activation": lambda bias: (
        nn.Sequential(nn.Linear(4, 7, bias=bias), nn.ReLU(inplace=True), nn.Linear(7, 3, bias=bias)),
        torch.randn(11, 4),
    ),
    "linear layers on sequences": lambda bias: (_Positions(bias=bias), torch.randn(11, 5, 4)),
    "convolutions": lambda bias: (_images(bias=bias), torch.randn(11, 2, 7, 7)),
}


def built(name: str, *, bias: bool) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model, X = KFAC_MODELS[name](bias)
        return model.double().eval(), X.double()


def kfac(curvature: RowCurvature, approximation: KfacApproximation) -> dict[str, KroneckerFactors]:
    sums = KfacSums(curvature.network, curvature.root, approximation)
    for batch, side in curvature.batches():
        sums.add(batch, side)
    return sums.factors()


@pytest.mark.parametrize("name", KFAC_MODELS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("root", [GaussNewton, EmpiricalFisher], ids=["GGN", "EF"])
def test_kfac_is_that_of_curvlinops(
    name: str, bias: bool, approximation: KfacApproximation, likelihood: str, root
) -> None:
    model, X = built(name, bias=bias)
    y = targets(likelihood, len(X))
    network = network_of(model, X, y, likelihood)
    found = kfac(rows_of(network, X, y, root=root), approximation)
    classes = likelihood == "classification"
    theirs = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss() if classes else nn.MSELoss(),
        list(model.parameters()),
        [(X, y)],
        fisher_type=FisherType.TYPE2 if root is GaussNewton else FisherType.EMPIRICAL,
        kfac_approx=approximation,
        separate_weight_and_bias=True,
        check_deterministic=False,
    )
    theirs.compute_kronecker_factors()
    # torch's mean squared error is 2/C times half the squared norm; their empirical Fisher of it 4/C, of a mean over C
    factor = 1 if classes else (2 / 3 if root is GaussNewton else 4 / 3)
    assert set(found) == set(dict(model.named_parameters()))
    for layer, A in theirs._input_covariances.items():
        weight = found[f"{layer}.weight"]
        close(factor * weight.left, theirs._gradient_covariances[layer])
        close(weight.right, A)
        if bias:
            close(found[f"{layer}.bias"].left, weight.left)
            assert found[f"{layer}.bias"].right.tolist() == [1]


class _OneAxis(nn.Module):
    def __init__(self, **options: int):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, **options)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class _TwoAxes(_OneAxis):
    def __init__(self, **options: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (3, 2), **options)


LOOPED = {
    "one axis": (_OneAxis, {}),
    "one axis, padding, stride and dilation": (_OneAxis, {"padding": 2, "stride": 2, "dilation": 2}),
    "two axes, all of them different": (_TwoAxes, {"padding": (2, 0), "stride": (1, 2), "dilation": (2, 1)}),
    "as long as its input": (_OneAxis, {"padding": "same", "dilation": 2}),
}


@pytest.mark.parametrize("case", LOOPED)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kfac_of_convolutions_is_that_of_a_loop(case: str, approximation: KfacApproximation) -> None:
    build, options = LOOPED[case]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        X = torch.randn(6, 2, 8) if build is _OneAxis else torch.randn(6, 2, 5, 6)
        model = build(**options)
        model(X)
    model, X = model.double().eval(), X.double()
    y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(1))
    network = network_of(model, X, y, "classification")
    found = kfac(rows_of(network, X, y), approximation)["conv.weight"]
    conv = model.conv
    inputs, gradients = [], []
    for x in X:
        at = conv(x[None])
        outputs = model.head(torch.tanh(at).flatten(1))[0]
        p = torch.softmax(outputs.detach(), 0)
        S = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        inputs.append(x)
        gradients.append([torch.autograd.grad(outputs @ s, at, retain_graph=True)[0][0] for s in S.T])
    if conv.padding == "same":
        conv.padding = (2,)  # for the loop, which needs numbers
    left, right = dense_kfac_factors(conv, inputs, gradients, approximation)
    close(found.left, left)
    close(found.right, right)


def test_kfac_of_one_position_without_spread_is_the_ggn() -> None:
    """With equal inputs, K-FAC of a linear layer is the GGN."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model, x = nn.Linear(3, 4).double(), torch.randn(1, 3).double()
    X, y = x.repeat(5, 1), torch.tensor([0, 1, 2, 3, 0])
    network = network_of(model, X, y, "classification")
    found = kfac(rows_of(network, X, y), "expand")
    H = dense_ggn(model, X, "classification")[1]
    close(dense_kronecker_product(found["weight"].left, found["weight"].right), H[:12, :12])
    close(found["bias"].left, H[12:, 12:])


def test_kfac_of_monte_carlo_draws_is_unbiased_for_the_ggn() -> None:
    model, X = built("linear layers on sequences", bias=True)
    y = targets("classification", len(X))
    network = network_of(model, X, y, "classification")
    exact = kfac(rows_of(network, X, y), "expand")

    def distances(draws: int) -> dict[str, float]:
        curvature = rows_of(network, X, y, root=lambda kind: MonteCarloGaussNewton(kind, draws), seed=3)
        found = kfac(curvature, "expand")
        for name, factors in exact.items():
            close(found[name].right, factors.right)
        return {name: float((found[name].left - f.left).norm() / f.left.norm()) for name, f in exact.items()}

    assert max(distances(300).values()) < 0.05
    assert max(distances(1).values()) > 0.15


def test_kfac_takes_batches_of_any_size() -> None:
    model, X = built("convolutions", bias=True)
    X = torch.cat([X] * 13)[:140]  # more samples than are in memory at once
    y = targets("regression", len(X))
    network = network_of(model, X, y, "regression")
    curvature = rows_of(network, X, y)
    one = KfacSums(network, curvature.root, "reduce")
    (batch, side), *rest = [(b, s) for b, s in curvature.batches()]
    for some, known in [(batch, side), *rest]:
        one.add(some, known)
    whole = KfacSums(network, curvature.root, "reduce")
    whole.add(type(batch)(X, y), torch.zeros(140))
    for name, factors in whole.factors().items():
        close(one.factors()[name].left, factors.left)
        close(one.factors()[name].right, factors.right)


class _Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(input=torch.tanh(self.inner(x)))))


def test_each_use_of_a_layer_counts_as_a_position() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model, X = _Reused().double(), torch.randn(6, 4).double()
    y = targets("classification", 6)
    network = network_of(model, X, y, "classification")
    found = kfac(rows_of(network, X, y), "expand")["inner.weight"]
    G, A = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for x in X:
        first = model.inner(x)
        hidden = torch.tanh(first)
        second = model.inner(hidden)
        outputs = model.head(torch.tanh(second))
        p = torch.softmax(outputs.detach(), 0)
        S = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for s in S.T:
            for g in torch.autograd.grad(outputs @ s, [first, second], retain_graph=True):
                G += torch.outer(g, g) / 6
        A += (torch.outer(x, x) + torch.outer(hidden, hidden).detach()) / 12
    close(found.left, G)
    close(found.right, A)


# --- the model is left as it was ---


class _Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if self.fails:
            raise RuntimeError("out of order")
        return self.head(torch.tanh(hidden))


@pytest.mark.parametrize("fails", [False, True], ids=["no failure", "a failing forward pass"])
def test_hooks_gradients_and_weights_are_as_found(fails: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model, X = _Failing().double(), torch.randn(6, 4).double()
    calls: list[int] = []
    model.inner.register_forward_hook(lambda *_: calls.append(1))
    y = targets("classification", 6)
    network = network_of(model, X, y, "classification")
    curvature = rows_of(network, X, y)
    before = [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    model.fails = fails
    calls.clear()
    if fails:
        with pytest.raises(RuntimeError, match="out of order"):
            kfac(curvature, "expand")
    else:
        kfac(curvature, "expand")
    assert calls == [1]  # the user's own hook is called, and is still there
    after = [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("which", ["weights frozen", "biases frozen", "no layer at all"])
def test_only_selected_parameters_have_factors(which: str) -> None:
    model, X = built("linear layers", bias=True)
    if which == "no layer at all":
        model = nn.Sequential(nn.LayerNorm(4), nn.Flatten(), _Raw()).double()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith(which.split(" ")[0].removesuffix("s").removesuffix("e")))
    y = targets("classification", len(X))
    network = network_of(model, X, y, "classification")
    found = kfac(rows_of(network, X, y), "expand")
    expected = {"weights frozen": {"0.bias", "2.bias"}, "biases frozen": {"0.weight", "2.weight"}}
    assert set(found) == expected.get(which, set())


class _Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix
