"""Rows by layers against rows of single samples, and curvatures that hold them by parameter against flat rows."""

import pytest
import torch
from models import MODELS, targets
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.derivatives import find_capabilities, layered_rows, looped_rows
from debiased_laplace.curvature.kronecker import KroneckerFactors, kronecker_basis, matrix_shapes, row_matrix_factors
from debiased_laplace.curvature.layer_rows import Layers, LayersDifferError
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import DrawErrors, ResidualRequest
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.linalg.row_matrix import OuterRows, flat
from debiased_laplace.predictive.linearized import predict, predict_variances

N = 9


class Many(nn.Module):
    """Layers of every kind, for inputs (n, 6): groups, strides, one and three dimensions, transposed, and others."""

    def __init__(self, inplace=True):
        super().__init__()
        self.one = nn.Conv1d(2, 4, 2, stride=2, padding=1, groups=2)
        self.two = nn.Conv2d(1, 3, (2, 1), dilation=(1, 2), padding=(1, 0))
        self.named = nn.Conv2d(3, 2, 3, padding="same", bias=False)
        self.back = nn.ConvTranspose2d(2, 2, 2, stride=2)
        self.three = nn.Conv3d(1, 2, 2)
        self.groups, self.instance = nn.GroupNorm(1, 2), nn.InstanceNorm3d(2, affine=True)
        self.act, self.relu = nn.PReLU(2), nn.ReLU(inplace=inplace)
        self.product = nn.Parameter(torch.randn(4, 3))
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.place = nn.Parameter(torch.randn(1, 3, 3))
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.pair = nn.Bilinear(3, 3, 3)
        self.transposed = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        h = self.relu(self.one(x.unflatten(1, (2, 3))))
        h = self.relu(self.named(self.two(h[:, None])))
        h = self.act(self.groups(self.back(h)))
        h = self.instance(self.three(h[:, None]))
        h = h.flatten(1)[:, :8].unflatten(1, (2, 4)).tanh() @ self.product
        h = torch.cat([self.token.expand(len(x), -1, -1), h], dim=1) + self.place
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.pair(h[:, 0], h[:, 1]) @ self.transposed.t()


class Embedded(nn.Module):
    """A tied embedding, with tokens merged with samples on the way."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        h = self.inner(self.embed(x).flatten(0, 1)).tanh().unflatten(0, (len(x), -1))
        return nn.functional.linear(self.scale * h.sum(1), self.embed.weight)


class Tokens(nn.Module):
    """Embeddings with a token for padding: of many tokens and of few, tied to an output layer."""

    def __init__(self):
        super().__init__()
        self.many = nn.Embedding(70, 9, padding_idx=0)
        self.few, self.place, self.head = nn.Embedding(2, 9), nn.Embedding(5, 9), nn.Linear(9, 70)
        self.head.weight = self.many.weight

    def forward(self, x):
        h = self.many(x) + nn.functional.embedding(x % 2, self.few.weight, padding_idx=-1)
        h = h * self.place(torch.arange(x.shape[1])[None])
        return self.head(h.sin().sum(1))[:, :3]


class Steered(nn.Module):
    """Other layers for other inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.first if len(x) < 4 else self.second)(x).tanh())


def built(name):
    if name in MODELS:
        return MODELS[name]()
    torch.manual_seed(3)
    if name == "embedding":
        return Embedded().double().eval(), torch.randint(6, (40, 4))
    if name == "tokens":
        return Tokens().double().eval(), torch.randint(70, (40, 4)) * (torch.arange(4) < 3)
    return Many().double().eval(), torch.randn(40, 6).double()


def cotangents(outputs: Tensor, aux: Tensor) -> Tensor:
    W = torch.arange(2 * outputs.shape[-1], dtype=outputs.dtype).cos().unflatten(0, (-1, 2))
    return W * (1 + aux)


@pytest.mark.parametrize("name", [*MODELS, "embedding", "tokens", "many"])
def test_rows_are_those_of_single_samples(name):
    model, X = built(name)
    with at_weights(model):
        selection = ParameterSelection.all_weights(model)
        parameters = selection.unflatten(selection.vector())
        able = find_capabilities(selection, parameters, X[:8])
        # PReLU is not among the layers: torch's derivative of it is wrong under vmap
        unseen = set(selection.names) - able.layers.names
        assert unseen == ({"transposed", "act.weight"} if name == "many" else set())
        aux = torch.arange(N) / 4
        arguments = (selection, parameters)
        expected, outputs = looped_rows(*arguments, X[:N], aux, cotangents)
        rows, found = layered_rows(*arguments, able.layers, X[:N], aux, cotangents, vmapped=able.vmapped_rows)
    torch.testing.assert_close(rows.dense(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, outputs)
    assert not rows.dense().requires_grad
    assert all(p.grad is None for p in model.parameters())


class Recurrent(nn.Module):
    """A recurrent layer with an initial state that is learned, for inputs (n, 5, 3) read at the last step."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.batch_first = layer, layer.batch_first
        n = layer.num_layers * (2 if layer.bidirectional else 1)
        self.start = nn.Parameter(torch.randn(n, 1, getattr(layer, "proj_size", 0) or layer.hidden_size))
        self.memory = nn.Parameter(torch.randn(n, 1, layer.hidden_size)) if isinstance(layer, nn.LSTM) else None

    def forward(self, x):
        state = self.start.expand(-1, len(x), -1).contiguous()
        if self.memory is not None:
            state = state, self.memory.expand(-1, len(x), -1).contiguous()
        outputs, last = self.layer(x if self.batch_first else x.mT.movedim(-1, 0), state)
        last = last[1] if self.memory is not None else last
        return torch.cat([outputs.movedim(0 if self.batch_first else 1, 0)[:, -1], last[-1]], dim=-1).sin()


class Cells(nn.Module):
    """Cells that are called one after another."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList(
            [nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 3, nonlinearity="relu", bias=False)]
        )

    def forward(self, x):
        long, gated, plain = self.cells
        state, h, last = None, None, None
        for step in x.unbind(1):
            state = long(step, state)
            h = gated(state[0], h)
            last = plain(h, last)
        return last


RECURRENT = {
    "LSTM, two layers, both ways": lambda: Recurrent(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)),
    "LSTM with projections": lambda: Recurrent(nn.LSTM(3, 4, 2, batch_first=True, proj_size=2)),
    "LSTM without biases, steps first": lambda: Recurrent(nn.LSTM(3, 4, bias=False)),
    "GRU, two layers, both ways, steps first": lambda: Recurrent(nn.GRU(3, 4, 2, bidirectional=True, dropout=0.5)),
    "tanh": lambda: Recurrent(nn.RNN(3, 2, batch_first=True)),
    "ReLU": lambda: Recurrent(nn.RNN(3, 2, 2, batch_first=True, nonlinearity="relu", bidirectional=True)),
    "cells": Cells,
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_seen(name):
    torch.manual_seed(5)
    model, X = RECURRENT[name]().double().eval(), torch.randn(40, 5, 3).double()
    with at_weights(model):
        selection = ParameterSelection.all_weights(model)
        parameters = selection.unflatten(selection.vector())
        able = find_capabilities(selection, parameters, X[:8])
        assert able.layers.names == set(selection.names)
        arguments, aux = (selection, parameters), torch.arange(N) / 4
        # sequences of other lengths than those that the layers were found with
        for steps in (5, 3) if name != "cells" else (5,):
            expected, outputs = looped_rows(*arguments, X[:N, :steps], aux, cotangents)
            rows, found = able.layers.rows(*arguments, X[:N, :steps], aux, cotangents)
            dense = torch.cat([flat(rows[name]) for name in selection.names], dim=-1)
            torch.testing.assert_close(dense, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found, outputs, rtol=1e-9, atol=1e-12)


def test_packed_sequences_take_another_way():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            lengths = torch.full((len(x),), 3)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.head(self.layer(packed)[1][-1])

    model, X = Packed().double().eval(), torch.randn(N, 5, 3).double()
    selection = ParameterSelection.all_weights(model)
    with at_weights(model):
        layers = Layers.of(selection, selection.unflatten(selection.vector()), X)
    assert layers.names == {"head.weight", "head.bias"}


def test_many_positions_of_a_layer_that_is_used_again_are_summed():
    torch.manual_seed(5)
    model, X = Cells().double().eval(), torch.randn(3, 20, 3).double()
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    layers = Layers.of(selection, parameters, X)
    rows, _ = layers.rows(selection, parameters, X, torch.zeros(3), cotangents)
    assert all(isinstance(part, Tensor) for part in rows.values())


class Places(nn.Module):
    """An embedding of positions that the model uses in one of several ways."""

    def __init__(self, use):
        super().__init__()
        self.use, self.place, self.head = use, nn.Embedding(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        places = self.place(torch.arange(4)[None])
        return self.head(x) + torch.einsum("nt,...td->nd", x, self.use(places)).sin()


USES = {
    "as the shape of a sample": lambda places: places.view(4, 3),
    "the first": lambda places: places[0],
    "the last": lambda places: places[-1],
    "the mean": lambda places: places.mean(0),
    "the largest": lambda places: places.amax(0),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_not_repeated_for_each_sample_takes_another_way(use, dtype):
    torch.manual_seed(2)
    model, X = Places(USES[use]).to(dtype).eval(), torch.randn(6, 4).to(dtype)
    selection = ParameterSelection.all_weights(model)
    parameters = selection.current()
    with at_weights(model):
        # without a comparison of rows, which may be too small to count
        assert Layers.of(selection, parameters, X).names == {"head.weight", "head.bias"}
        able = find_capabilities(selection, parameters, X)
        expected, _ = looped_rows(selection, parameters, X, torch.zeros(6), cotangents)
        rows, _ = layered_rows(selection, parameters, able.layers, X, torch.zeros(6), cotangents, vmapped=True)
    tolerance = 1e-9 if dtype == torch.float64 else 0.02
    assert (rows.dense() - expected).norm() < tolerance * expected.norm()


class Categories(nn.Module):
    """Embeddings with one token for each sample, and one token for all; other calls for other inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(40, 5), nn.Embedding(40, 5)
        self.constant, self.head = nn.Embedding(2, 5), nn.Linear(5, 3)

    def forward(self, x):
        embedded = self.first(x[:, 0]) * self.second(x[:, 1])
        if len(x) > 20:
            embedded = embedded + self.first(x[:, 1])
        constant = self.constant(torch.zeros(2 if len(x) > 10 else 1, dtype=torch.int64))
        return self.head((embedded + (constant if len(x) <= 10 else constant.mean(0))).tanh())


def test_embeddings_with_one_token_for_each_sample_and_one_for_all():
    torch.manual_seed(2)
    model, X = Categories().double().eval(), torch.randint(40, (30, 2))
    selection = ParameterSelection.all_weights(model)
    parameters, aux = selection.current(), torch.arange(N) / 4
    able = find_capabilities(selection, parameters, X)
    assert able.layers.names == set(selection.names)
    expected, _ = looped_rows(selection, parameters, X[:N], aux, cotangents)
    rows, _ = layered_rows(selection, parameters, able.layers, X[:N], aux, cotangents, vmapped=True)
    torch.testing.assert_close(rows.dense(), expected, rtol=1e-9, atol=1e-12)
    for n in (15, 25):
        with pytest.raises(LayersDifferError, match="call"):
            able.layers.rows(selection, parameters, X[:n], torch.zeros(n), cotangents)


def test_rows_of_a_linear_layer_stay_factors():
    model, X = MODELS["MLP"]()
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    able = find_capabilities(selection, parameters, X)
    rows, _ = layered_rows(selection, parameters, able.layers, X, torch.zeros(40), cotangents, vmapped=True)
    assert [isinstance(part, OuterRows) for part in rows.parts] == [True, False] * 3
    assert sum(able.layers.n_numbers.values()) < selection.n_parameters


def test_other_layers_than_found_take_another_way():
    model, X = Steered().double(), torch.randn(6, 4).double()
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    able = find_capabilities(selection, parameters, X)
    with pytest.raises(LayersDifferError, match="other calls"):
        able.layers.rows(selection, parameters, X, torch.zeros(6), cotangents)
    net = Network(selection, parameters, likelihood_named("classification"), 3, able)
    J = torch.cat([J for J, _ in net.jacobians(X)])
    expected = looped_rows(selection, parameters, X, torch.zeros(6), lambda f, _: torch.eye(3, dtype=f.dtype))[0]
    torch.testing.assert_close(J, expected)


def test_an_input_changed_in_place_takes_another_way():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = x.clone()
            h = self.layer(x)
            x.mul_(2)
            return self.head(h.tanh() + x)

    model, X = Changed().double(), torch.randn(5, 4).double()
    selection = ParameterSelection.all_weights(model)
    with pytest.raises(LayersDifferError, match="in place"):
        Layers.of(selection, selection.unflatten(selection.vector()), X)


def curvature_of(name, weights=None):
    model, X = built(name)
    X, y = X[:N], targets("classification", N)
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    likelihood = likelihood_named("classification")
    network = Network(selection, parameters, likelihood, 3, find_capabilities(selection, parameters, X))
    batches = (Batch(X[:4], y[:4]), Batch(X[4:], y[4:]))
    samples = SubBatch(None, torch.arange(N), torch.device("cpu"), 0, batches, weights)
    draw = DrawErrors.of(torch.linspace(0.2, 1, N).double())
    return RowCurvature(network, samples, GaussNewton(likelihood), draw=draw)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling", "GRU", "transformer", "tokens", "many"])
def test_curvatures_that_hold_rows_by_parameter_are_those_of_flat_rows(name, recomputed, monkeypatch):
    weights = torch.linspace(0.5, 1.7, N).double()
    monkeypatch.setattr(RowCurvature, "_by_parameter", False)
    flat = curvature_of(name, weights)
    monkeypatch.setattr(RowCurvature, "_by_parameter", True)
    monkeypatch.setattr("debiased_laplace.linalg.row_matrix._CHUNK_BYTES", 3000)
    held = curvature_of(name, weights)
    if recomputed:
        least = 2 * held.n_rows * max(held.network.bytes_by_parameter)
        monkeypatch.setattr(Network, "available_memory", min(least, held.bytes_of_rows - 1))
        monkeypatch.setattr("debiased_laplace.curvature.row_curvature._MOST_GROUPS", 100)
        assert len(held.parameter_groups) > 1
    factors = torch.linspace(2, 0.3, N).double()
    chosen = torch.tensor([1, 2, 5, 8])
    changes = {
        "itself": lambda c: c,
        "reweighted": lambda c: c.reweighted(factors),
        "part": lambda c: c.part(chosen),
        "part of reweighted": lambda c: c.reweighted(factors).part(chosen),
    }
    for change in changes.values():
        held.keep_rows()
        expected, found = change(flat), change(held)
        assert expected.rows_by_parameter is None
        assert found.rows_by_parameter is not None
        close = torch.testing.assert_close
        V = torch.cat(list(expected.rows())).flatten(0, 1)
        close(torch.cat(list(found.rows())).flatten(0, 1), V, rtol=1e-9, atol=1e-12)
        factor = found.stacked_rows()
        assert factor.rows.recomputed == recomputed
        for some in (slice(1, 3), torch.arange(found.n_samples) % 2 == 0):
            close(factor.rows.at(some).dense().flatten(0, 1), V.unflatten(0, (-1, 3))[some].flatten(0, 1))
        close(factor.gram, V @ V.mT / found.n_samples, rtol=1e-9, atol=1e-12)
        close(found.squared_norms(), expected.squared_norms(), rtol=1e-9, atol=1e-12)
        W = torch.randn(len(V), 3).double()
        close(factor.rows.combined(W), V.mT @ W)
        shapes = matrix_shapes(flat.network.selection, layers_only=False)
        pairs = list(zip(row_matrix_factors(expected, shapes), row_matrix_factors(found, shapes), strict=True))
        for one, other in pairs:
            close(other.left, one.left, rtol=1e-9, atol=1e-12)
            close(other.right, one.right, rtol=1e-9, atol=1e-12)
        basis = kronecker_basis([one for one, _ in pairs], torch.float64)
        several = [torch.ones(found.n_samples).double(), torch.linspace(0.3, 2, found.n_samples).double()]
        for f, means in zip(several, found.coordinate_means(basis, several), strict=True):
            close(means, expected.reweighted(f).coordinate_moments(basis).means, rtol=1e-9, atol=1e-12)
        U = torch.linalg.qr(V.mT @ W)[0]
        requests = [ResidualRequest(2, "diagonal", basis), ResidualRequest(3, "diagonal"), ResidualRequest(1, "trace")]
        moments = zip(expected.nested_moments(U, requests), found.nested_moments(U, requests), strict=True)
        for one, other in [*moments, (expected.coordinate_moments(basis), found.coordinate_moments(basis))]:
            for key in ("means", "standard_deviations", "third_moments", "trace", "residual_diagonal"):
                a, b = getattr(one, key), getattr(other, key)
                assert (a is None) == (b is None)
                if a is not None:
                    close(b, a, rtol=1e-8, atol=1e-12)


class Transposed(nn.Module):
    """Maps x @ W, whose right factors are the cotangents."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.W, self.V = (nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 5), (5, 3)))

    def forward(self, x):
        return (x @ self.W).tanh() @ self.V


def test_several_drawn_rows_of_a_sample_have_factors_of_their_own(monkeypatch):
    model, n = Transposed().double(), 6
    X = torch.randn(n, 4, generator=torch.Generator().manual_seed(8)).double().repeat_interleave(2, dim=0)
    y = torch.arange(2 * n) % 3
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    likelihood = likelihood_named("classification")
    network = Network(selection, parameters, likelihood, 3, find_capabilities(selection, parameters, X))
    draw = DrawErrors(
        torch.linspace(0, 0.8, 2 * n).double(), torch.ones(2 * n).double(), torch.arange(2 * n) // 2, n, 0.4
    )
    found = []
    for by_parameter in (False, True):
        monkeypatch.setattr(RowCurvature, "_by_parameter", by_parameter)
        samples = SubBatch(None, torch.arange(2 * n), torch.device("cpu"), 0, (Batch(X, y),), None)
        curvature = RowCurvature(network, samples, EmpiricalFisher(likelihood), draw=draw)
        curvature.keep_rows()
        assert (curvature.rows_by_parameter is not None) == by_parameter
        factors = row_matrix_factors(curvature, matrix_shapes(selection, layers_only=False))
        found.append(curvature.coordinate_moments(kronecker_basis(factors, torch.float64)))
    flat, held = found
    for key in ("means", "standard_deviations", "third_moments", "draw_variances", "centers"):
        torch.testing.assert_close(getattr(held, key), getattr(flat, key), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling", "GRU", "transformer", "tokens"])
@pytest.mark.parametrize("rank", [0, 3])
def test_predictions_by_parameter_are_those_of_flat_rows(name, rank, monkeypatch):
    curvature = curvature_of(name)
    network, X = curvature.network, built(name)[1]
    P = network.n_parameters
    shapes = matrix_shapes(network.selection, layers_only=False)
    basis = kronecker_basis(row_matrix_factors(curvature, shapes), network.like.dtype)
    generator = torch.Generator().manual_seed(4)
    diagonal, U = torch.rand(P, generator=generator).double() + 0.3, torch.randn(P, rank, generator=generator).double()
    precision = LowRankPlusDiagonal(diagonal, torch.linalg.qr(U)[0], torch.arange(1, rank + 1).double(), basis)
    expected, traces = predict(network, precision, X), curvature.traces(precision)
    monkeypatch.setattr("debiased_laplace.linalg.row_matrix._CHUNK_BYTES", 3000)
    monkeypatch.setattr(Network, "bytes_of_factors", 8)
    monkeypatch.setattr(RowCurvature, "_by_parameter", True)
    assert network.jacobians_by_parameter(X) is not None
    torch.testing.assert_close(predict(network, precision, X), expected, rtol=1e-9, atol=1e-12)
    variances = expected[1].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        predict_variances(network, precision, X), (expected[0], variances), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(curvature.traces(precision), traces, rtol=1e-9, atol=1e-12)


def test_the_rank_of_factors_is_bounded_by_the_number_of_outer_products_and_by_the_shorter_side():
    # many positions of a narrow map, few of a wide one, dense rows of a third
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide, self.head = nn.Linear(2, 80), nn.Linear(80, 90), nn.Linear(90, 3, bias=False)

        def forward(self, x):
            return self.head(self.wide(self.narrow(x).tanh().mean(1)).tanh())

    model, X = Wide().double(), torch.randn(4, 30, 2).double()
    selection = ParameterSelection.all_weights(model)
    likelihood = likelihood_named("classification")
    parameters = selection.unflatten(selection.vector())
    network = Network(selection, parameters, likelihood, 3, find_capabilities(selection, parameters, X))
    samples = SubBatch(None, torch.arange(4), torch.device("cpu"), 0, (Batch(X, torch.arange(4) % 3),), None)
    curvature = RowCurvature(network, samples, GaussNewton(likelihood))
    curvature.keep_rows()
    shapes = matrix_shapes(selection, layers_only=False)
    factors = dict(zip(selection.names, row_matrix_factors(curvature, shapes), strict=True))
    assert factors["narrow.weight"].rank == 4 * 3 * 2
    assert factors["wide.weight"].rank == 4 * 3
    for found in factors.values():
        for side in (found.left, found.right):
            assert side.ndim == 1 or torch.linalg.matrix_rank(side) <= found.rank


@pytest.mark.parametrize("rank", [3, 20])
def test_eigenvectors_of_a_factor_of_low_rank(rank, monkeypatch):
    monkeypatch.setattr("debiased_laplace.curvature.kronecker._LARGE", 40)
    generator = torch.Generator().manual_seed(6)
    V = torch.randn(rank, 60, generator=generator).double() * torch.logspace(0, -4, rank).double()[:, None]
    factors = KroneckerFactors(V.mT @ V, torch.ones(1).double(), rank)
    block = factors.basis(torch.float64)
    values = torch.linalg.eigvalsh(V.mT @ V).flip(0)
    torch.testing.assert_close(block.left.mT @ block.left, torch.eye(60).double(), rtol=0, atol=1e-12)
    rotated = block.left.mT @ (V.mT @ V) @ block.left
    torch.testing.assert_close(rotated, values.diag(), rtol=1e-9, atol=1e-12 * float(values[0]))
    assert factors.ranks == (rank, 1)
    # of a rank above a quarter of the side, by all eigenvectors
    other = KroneckerFactors(V.mT @ V, torch.ones(1).double(), None)
    assert other.ranks == (rank, 1)
