"""Rows in blocks, and networks of mappings, against dense Jacobians."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from models import MODELS, targets
from oracles import dense_ggn, dense_jacobian, output_gradient
from torch import Tensor, nn

from debiased_laplace.curvature import network as network_module
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, Identity, MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs, MappingKeys
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.predictive.linearized import draw_functions, predict_variances

KINDS = ["classification", "regression"]
N = 5


class Mapped(nn.Module):
    """A network whose input comes in two parts, by name."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.net(torch.cat([left, right], dim=-1))


class OneMapping(Mapped):
    """The same network with one argument."""

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([parts["left"], parts["right"]], dim=-1))


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.Identity()):
        yield


# the model for the library, the same function of one tensor for the oracle, inputs for both
Twin = tuple[nn.Module, nn.Module, Inputs, Tensor]


def plain(name: str) -> Twin:
    model, X = MODELS[name]()
    return model, model, X[:N], X[:N]


def mapped(kind: type[Mapped]) -> Twin:
    model, X = MODELS["MLP"]()
    X = X[:N]
    return kind(model), model, {"left": X[:, :1], "right": X[:, 1:]}, X


TWINS: dict[str, Callable[[], Twin]] = {
    "MLP": lambda: plain("MLP"),
    "GRU": lambda: plain("GRU"),
    "a mapping by name": lambda: mapped(Mapped),
    "one mapping": lambda: mapped(OneMapping),
}
every_twin = pytest.mark.parametrize("twin", TWINS)

ROOTS: dict[str, Callable[[Likelihood], OutputRoot]] = {
    "GGN": GaussNewton,
    "EF": EmpiricalFisher,
    "Monte Carlo": lambda likelihood: MonteCarloGaussNewton(likelihood, 4),
}
every_root = pytest.mark.parametrize("root", ROOTS)


@cache
def setup(twin: str, kind: str) -> tuple[Network, Inputs, nn.Module, Tensor]:
    model, other, inputs, X = TWINS[twin]()
    selection = ParameterSelection.all_weights(model)
    return prepare_network(selection, likelihood_named(kind), Batch(inputs, targets(kind, N))), inputs, other, X


def curvature(twin: str, kind: str, root: str, seed: int = 0, batch_size: int = 3) -> RowCurvature:
    network, inputs, _, _ = setup(twin, kind)
    batches = [(b.inputs, b.targets) for b in Batch(inputs, targets(kind, N)).chunks(batch_size)]
    samples = SubBatch(sample_source(batches, 0, MappingKeys("left", "y")), torch.arange(N), torch.device("cpu"), 0)
    return RowCurvature(network, samples, ROOTS[root](network.likelihood), seed=seed)


def per_sample(twin: str, kind: str, root: str) -> list[Tensor]:
    """Curvature of each sample by the oracle."""
    _, _, model, X = setup(twin, kind)
    if root == "GGN":
        return dense_ggn(model, X, kind)[0]
    found = []
    for x, y in zip(X, targets(kind, N), strict=True):
        g = dense_jacobian(model, x).T @ output_gradient(model(x[None])[0].detach(), y, kind)
        found.append(torch.outer(g, g))
    return found


def directions(P: int, k: int) -> Tensor:
    noise = torch.randn(P, k, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def basis(P: int) -> KroneckerBasis:
    """Return a basis of two blocks: one rotated on both sides, one with axes only."""
    return KroneckerBasis((BasisBlock(4, 5, directions(4, 4), directions(5, 5)), BasisBlock(P - 20, 1)))


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


QUANTITIES = [("MLP", kind, root) for kind in KINDS for root in ("GGN", "EF")]
QUANTITIES += [("GRU", "classification", "GGN"), ("GRU", "regression", "EF")]
QUANTITIES += [("a mapping by name", "classification", "GGN"), ("a mapping by name", "regression", "EF")]
QUANTITIES += [("one mapping", "regression", "GGN"), ("one mapping", "classification", "EF")]


@pytest.mark.parametrize(("twin", "kind", "root"), QUANTITIES)
def test_every_quantity_of_a_curvature_is_that_of_the_oracle(twin: str, kind: str, root: str) -> None:
    each = torch.stack(per_sample(twin, kind, root))
    H, P = each.mean(0), each.shape[-1]
    U, K = directions(P, 3), basis(P)
    c = curvature(twin, kind, root)
    close(c.dense(), H)
    close(c.linear_map()(U), H @ U)
    along = torch.einsum("pk,npq,qk->nk", U, each, U)
    for residual in ("none", "trace", "diagonal"):
        close(c.moments(U, residual).means, along.mean(0))
    close(c.moments(U).standard_deviations, along.std(0))
    close(c.moments(U).third_moments, (along - along.mean(0)).pow(3).mean(0))
    close(c.moments(U, "trace").trace, H.trace())
    outside = torch.eye(P, dtype=torch.float64) - U @ U.T
    close(c.moments(U, "diagonal").residual_diagonal, (outside @ H @ outside).diagonal())
    dense_basis = torch.block_diag(torch.kron(directions(4, 4), directions(5, 5)), torch.eye(P - 20))
    at_coordinates = torch.einsum("pk,npq,qk->nk", dense_basis, each, dense_basis)
    close(c.coordinate_moments(K).means, at_coordinates.mean(0))
    close(c.coordinate_moments(K).standard_deviations, at_coordinates.std(0))
    close(c.coordinate_moments(K).third_moments, (at_coordinates - at_coordinates.mean(0)).pow(3).mean(0))
    factor = c.stacked_rows()
    assert c.rows_per_sample == {"GGN": 3, "EF": 1}[root]
    V = factor.rows.dense().flatten(0, 1)
    assert c.n_rows == len(V) == N * c.rows_per_sample
    close(V.T @ V / N, H)


# bytes in terms of one row
CHUNKS = {
    "less than one row": lambda row: row - 1,
    "two rows, less than a sample": lambda row: 2 * row,
    "one sample": lambda row: 4 * row,
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("twin", "root"),
    [("MLP", "GGN"), ("MLP", "EF"), ("MLP", "Monte Carlo"), ("GRU", "GGN"), ("a mapping by name", "Monte Carlo")],
)
def test_rows_in_blocks_give_the_same(twin: str, root: str, chunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = curvature(twin, "classification", root), curvature(twin, "classification", root)
    P, r = whole.network.n_parameters, whole.rows_per_sample
    U, K = directions(P, 5), basis(P)

    def answers(c: RowCurvature) -> list[Tensor]:
        trace, diagonal, coordinates = c.moments(U, "trace"), c.moments(U, "diagonal"), c.coordinate_moments(K)
        found = [c.dense(), trace.means, trace.standard_deviations, trace.trace, diagonal.means]
        found += [diagonal.standard_deviations, diagonal.residual_diagonal, coordinates.means]
        found += [coordinates.standard_deviations, torch.cat([rows.flatten(0, 1) for rows in c.rows()])]
        # rows that are kept come in chunks too
        return [*found, c.stacked_rows().rows.dense(), c.moments(U, "trace").trace, c.dense()]

    expected = answers(whole)
    limit = CHUNKS[chunk](8 * P)
    monkeypatch.setattr(network_module, "CHUNK_BYTES", limit)
    step = max(1, limit // (8 * P))
    blocks = [[b.shape for b in group] for _, group in cut.row_groups()]
    if step < r:  # one sample's rows do not fit
        assert [len(group) for group in blocks] == [-(-r // step)] * N
    assert all(shape.numel() <= step * P for group in blocks for shape in group)
    for found, known in zip(answers(cut), expected, strict=True):
        close(found, known)
    assert torch.equal(cut.stacked_rows().sample_of_row, torch.arange(N).repeat_interleave(r))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("twin", ["MLP", "GRU", "one mapping"])
def test_predictions_in_blocks_of_outputs(twin: str, chunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs, model, X = setup(twin, "regression")
    P = network.n_parameters
    D = torch.linspace(0.5, 3, P, dtype=torch.float64)
    precision = LowRankPlusDiagonal(D, directions(P, 3), torch.tensor([9.0, 4.0, 0.2], dtype=torch.float64))
    covariance = torch.linalg.inv(precision.to_dense())
    J = torch.stack([dense_jacobian(model, x) for x in X])
    f = model(X).detach()
    monkeypatch.setattr(network_module, "CHUNK_BYTES", CHUNKS[chunk](8 * P))
    mean, variance = predict_variances(network, precision, inputs)
    close(mean, f)
    close(variance, (J @ covariance @ J.mT).diagonal(dim1=1, dim2=2))
    deviations = torch.randn(5, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(draw_functions(network, inputs, deviations), f + torch.einsum("ncp,sp->snc", J, deviations))


@every_twin
def test_blocks_of_the_jacobian_bound_the_memory(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs, model, X = setup(twin, "regression")
    row = 8 * network.n_parameters
    shapes = {row: (1, 1), 2 * row: (1, 2), 3 * row: (1, 3), 6 * row: (2, 3)}
    for limit, (n, r) in shapes.items():
        monkeypatch.setattr(network_module, "CHUNK_BYTES", limit)
        groups = [list(blocks) for blocks in network.jacobian_blocks(inputs, 3)]
        assert groups[0][0].shape == (n, r, network.n_parameters)
        J = torch.cat([torch.cat(blocks, dim=1) for blocks in groups])
        close(J, torch.stack([dense_jacobian(model, x) for x in X]))


@every_twin
@every_root
def test_rows_columns_and_products_are_of_one_root(twin: str, root: str) -> None:
    c = curvature(twin, "classification", root, seed=3)
    network, U = c.network, directions(c.network.n_parameters, 3)
    for batch, targets_or_noise in c.batches():
        groups = network.root_rows(batch, c.root, targets_or_noise)
        V = torch.cat([torch.cat(list(blocks), dim=1) for _, blocks, _ in groups])
        close(network.root_columns(batch, c.root, targets_or_noise, U), V @ U)
        close(network.products(batch, c.root, targets_or_noise)(U), (V.mT @ V).sum(0) @ U)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_at_every_pass_and_another_one_differs(kind: str) -> None:
    c, again = (curvature("MLP", kind, "Monte Carlo", seed=3) for _ in range(2))
    U = directions(c.network.n_parameters, 3)
    H = c.dense()
    assert torch.equal(c.dense(), H)
    assert torch.equal(again.dense(), H)
    close(c.linear_map()(U), H @ U)
    close(c.moments(U).means, (U.T @ H @ U).diagonal())  # by columns
    close(c.moments(U, "trace").means, (U.T @ H @ U).diagonal())  # by rows
    V = c.stacked_rows().rows.dense().flatten(0, 1)
    close(V.T @ V / N, H)
    assert c.is_random
    other = c.redrawn()
    assert other.samples is c.samples
    difference = float((other.dense() - H).abs().max() / H.abs().max())
    assert difference > 0.05
    twice = other.redrawn().dense()
    assert not torch.isclose(twice, H).all()
    assert not torch.isclose(twice, other.dense()).all()
    assert torch.equal(c.redrawn().dense(), other.dense())


@pytest.mark.parametrize("root", ["GGN", "EF"])
def test_curvatures_without_draws_are_not_redrawn(root: str) -> None:
    c = curvature("MLP", "classification", root, seed=3)
    assert not c.is_random
    assert c.redrawn() is c
    assert torch.equal(c.dense(), curvature("MLP", "classification", root, seed=4).dense())


def test_many_redraws_have_the_ggn_as_their_mean() -> None:
    draws, c = [], curvature("MLP", "classification", "Monte Carlo", batch_size=N)
    U = directions(c.network.n_parameters, 4)
    for _ in range(200):
        draws.append(c.moments(U).means)
        c = c.redrawn()
    H = torch.stack(per_sample("MLP", "classification", "GGN")).mean(0)
    expected = (U.T @ H @ U).diagonal()
    errors = torch.stack(draws).std(0) / len(draws) ** 0.5
    z = (torch.stack(draws).mean(0) - expected) / errors
    assert float(z.abs().max()) < 4
    assert float((0.25 * expected / errors).min()) > 4  # power: a quarter more would be significant


@pytest.mark.parametrize("twin", ["a mapping by name", "one mapping"])
def test_a_network_of_mappings_has_the_capabilities_of_its_twin(twin: str) -> None:
    network, inputs, model, X = setup(twin, "classification")
    able = network.capabilities
    assert able.vmapped_rows
    assert able.columns
    assert able.vmapped_columns
    assert network.ready_for_products(inputs).capabilities.linearized
    close(network.outputs(inputs), model(X).detach())
    chunks = list(network.jacobians(inputs))
    close(torch.cat([J for J, _ in chunks]), torch.stack([dense_jacobian(model, x) for x in X]))
    network.check_inputs(inputs)
    with pytest.raises(ValueError, match=r"'left': \(1, 1\)"):
        network.check_inputs({"left": inputs["left"], "other": inputs["right"]})


def test_gradients_with_respect_to_the_entries_of_a_mapping() -> None:
    network, inputs = setup("a mapping by name", "regression")[:2]
    leaves = {key: value[:2].clone().requires_grad_() for key, value in inputs.items()}
    ((J, f),) = list(network.jacobians(leaves, create_graph=True))
    (J.square().sum() + f.sum()).backward()
    step = 1e-6
    for key in leaves:
        bumped = {k: v.detach() + step * (k == key) for k, v in leaves.items()}
        lowered = {k: v.detach() - step * (k == key) for k, v in leaves.items()}
        high, low = (sum(float(J.square().sum() + f.sum()) for J, f in network.jacobians(x)) for x in (bumped, lowered))
        assert float(leaves[key].grad.sum()) == pytest.approx((high - low) / (2 * step), rel=1e-6)


def test_rows_of_the_identity_are_the_jacobian() -> None:
    network, inputs, model, X = setup("MLP", "regression")
    batch = Batch(inputs, targets("regression", N))
    V = torch.cat([next(blocks) for _, blocks, _ in network.root_rows(batch, Identity(), torch.zeros(N))])
    close(V, torch.stack([dense_jacobian(model, x) for x in X]))
