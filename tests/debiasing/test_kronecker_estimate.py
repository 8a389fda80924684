"""The Kronecker estimate against one basis vector at a time."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from models import MODELS
from oracles import (
    DenseKroneckerPosterior,
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
    dense_kronecker_basis,
    dense_kronecker_posterior,
    mean_of,
    partial_traces,
    trainable,
)
from sub_batches import network_of, rows_of, samples_of, small_network, two_sets
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.kfac import KfacSums
from debiased_laplace.curvature.roots import EmpiricalFisher, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(2))
A, B = ORDER[:11], ORDER[11:24]
N_DATA = 70
PRIOR, TAU = 0.37, 1 / (0.6**2 * 1.3)
LIKELIHOODS = ["classification", "regression"]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


@cache
def oracle(name: str, likelihood: str) -> list[Tensor]:
    model, X = MODELS[name]()
    return dense_ggn(model, X, likelihood)[0]


def options(**chosen: object) -> EstimatorOptions:
    held_out = {"rank": None, "magnitudes": "held_out", "complement": "none", "solver": "auto", "seed": 0}
    return EstimatorOptions(**{**held_out, "structure": "kron", **chosen})


def of_split(name: str, likelihood: str, *, b: bool = True, root=None, seed: int = 0, **chosen: object):
    network, X, y = small_network(name, likelihood)
    how = {} if root is None else {"root": root}
    first = rows_of(network, X, y, A, **how, seed=seed)
    second = rows_of(network, X, y, B, **how, seed=seed + 100) if b else None
    return estimate(two_sets(first, second, N_DATA), options(**chosen))


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


def weighted(per_sample: list[Tensor]) -> Tensor:
    """Return f H_a + (1 - f) H_b."""
    f = len(A) / N_DATA
    return f * mean_of(per_sample, A) + (1 - f) * mean_of(per_sample, B)


def precision_of(found: CurvatureEstimate) -> LowRankPlusDiagonal:
    c = found.curvature
    scale = N_DATA * TAU
    return LowRankPlusDiagonal(scale * c.diagonal + PRIOR, c.directions, scale * c.weights, c.basis)


def dense(K: Tensor, per_sample: list[Tensor], b: Tensor | None = B) -> DenseKroneckerPosterior:
    return dense_kronecker_posterior(
        K, per_sample, A, b, n_data=N_DATA, prior_precision=PRIOR, sigma_noise=0.6, temperature=1.3
    )


@every_model
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kron_basis", ["row_matrices", "kfac"])
def test_every_basis_vector_has_its_curvature_and_the_trace_is_the_ggn_s(
    name: str, likelihood: str, kron_basis: str
) -> None:
    per_sample = oracle(name, likelihood)
    found = of_split(name, likelihood, kron_basis=kron_basis)
    K = found.curvature.basis.to_dense()
    close(K.T @ K, torch.eye(len(K), dtype=K.dtype))
    expected = dense(K, per_sample)
    close(found.magnitudes.values, expected.magnitudes)
    close(found.magnitudes.in_sample, expected.in_sample)
    close(found.magnitudes.standard_errors, expected.standard_errors, 1e-6)
    assert float(found.magnitudes.values.sum()) == pytest.approx(float(torch.trace(weighted(per_sample))), rel=1e-9)
    assert found.magnitudes.n_floored == 0
    close(precision_of(found).to_dense(), expected.posterior_precision)
    assert found.source == "torch.func rows"
    assert found.curvature.directions.shape == (len(K), 0)


def test_the_basis_is_that_of_the_direction_samples_alone() -> None:
    """Compare with a basis computed by the oracle, which is unique for simple eigenvalues."""
    model, _ = MODELS["MLP"]()
    per_sample = oracle("MLP", "classification")
    K = dense_kronecker_basis(model, mean_of(per_sample, A))
    found = precision_of(of_split("MLP", "classification")).to_dense()
    close(found, dense(K, per_sample).posterior_precision, 1e-6)
    other = dense(dense_kronecker_basis(model, mean_of(per_sample, B)), per_sample).posterior_precision
    assert float((found - other).abs().max()) > 0.01 * float(found.abs().max())


@every_model
def test_without_magnitude_samples_it_is_the_biased_estimate(name: str) -> None:
    per_sample = oracle(name, "classification")
    found = of_split(name, "classification", b=False, magnitudes="same_batch")
    expected = dense(found.curvature.basis.to_dense(), per_sample, None)
    close(found.magnitudes.values, expected.magnitudes)
    assert torch.equal(found.magnitudes.in_sample, found.magnitudes.values)
    close(found.magnitudes.standard_errors, expected.standard_errors, 1e-6)


@pytest.mark.parametrize("kron_basis", ["row_matrices", "kfac"])
def test_all_the_data_leave_nothing_to_estimate(kron_basis: str) -> None:
    network, X, y = small_network("LayerNorm and raw parameters")
    per_sample = oracle("LayerNorm and raw parameters", "classification")
    H = mean_of(per_sample, torch.arange(40))
    whole = estimate(
        two_sets(rows_of(network, X, y), None, 40), options(magnitudes="same_batch", kron_basis=kron_basis)
    )
    split = estimate(
        two_sets(rows_of(network, X, y, ORDER[:15]), rows_of(network, X, y, ORDER[15:]), 40),
        options(kron_basis=kron_basis),
    )
    for found in (whole, split):
        K = found.curvature.basis.to_dense()
        close(found.magnitudes.values, (K.T @ H @ K).diagonal())
        assert not found.magnitudes.standard_errors.any()


# --- what has no layer that K-FAC knows ---

OUTSIDE_LAYERS = {
    "BatchNorm": {"1.weight", "1.bias", "5.weight", "5.bias"},
    "LayerNorm and raw parameters": {"scale", "temperature", "norm.weight", "norm.bias"},
    "LSTM": {f"recurrent.{kind}_{where}_l0" for kind in ("weight", "bias") for where in ("ih", "hh")},
    "transformer": {
        *("layer.self_attn.in_proj_weight", "layer.self_attn.in_proj_bias"),
        *(f"layer.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    },
}


@pytest.mark.parametrize("name", OUTSIDE_LAYERS)
@pytest.mark.parametrize("kron_magnitudes", ["exact", "kronecker"])
def test_parameters_outside_layers_get_the_exact_diagonal(name: str, kron_magnitudes: str) -> None:
    found = of_split(name, "classification", kron_basis="kfac", kron_magnitudes=kron_magnitudes)
    H = weighted(oracle(name, "classification"))
    start, seen = 0, set()
    for (parameter, p), block in zip(MODELS[name]()[0].named_parameters(), found.curvature.basis.blocks, strict=True):
        if parameter in OUTSIDE_LAYERS[name]:
            seen.add(parameter)
            assert block.left is None
            assert block.right is None
            own = slice(start, start + p.numel())
            close(found.magnitudes.values[own], H.diagonal()[own])
        else:
            assert block.left is not None
        start += p.numel()
    assert seen == OUTSIDE_LAYERS[name]


def test_row_matrices_give_parameters_of_one_axis_the_exact_diagonal() -> None:
    found = of_split("LayerNorm and raw parameters", "classification")
    H = weighted(oracle("LayerNorm and raw parameters", "classification"))
    names = dict(MODELS["LayerNorm and raw parameters"]()[0].named_parameters())
    ends = torch.tensor([p.numel() for p in names.values()]).cumsum(0).tolist()
    for (name, p), end in zip(names.items(), ends, strict=True):
        if name in ("temperature", "norm.weight", "norm.bias"):
            close(found.magnitudes.values[end - p.numel() : end], H.diagonal()[end - p.numel() : end])


class _Projection(nn.Module):
    """A linear layer whose weights are used without calling it, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(nn.functional.linear(x, self.quiet.weight, self.quiet.bias)))


def test_a_layer_that_is_never_called_has_no_silent_zero() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, X = _Projection().double(), torch.randn(20, 4).double()
    y = torch.randint(3, (20,), generator=torch.Generator().manual_seed(1))
    network = network_of(model, X, y, "classification")
    H = dense_ggn(model, X, "classification")[1]
    for kron_magnitudes in ("exact", "kronecker"):
        chosen = options(magnitudes="same_batch", kron_basis="kfac", kron_magnitudes=kron_magnitudes)
        found = estimate(two_sets(rows_of(network, X, y), None, 20), chosen)
        assert float(found.magnitudes.values[:20].sum()) == pytest.approx(float(torch.trace(H[:20, :20])), rel=1e-9)
        assert float(found.magnitudes.values[20:25].sum()) == pytest.approx(float(torch.trace(H[20:25, 20:25])))


# --- magnitudes of the factors ---


@every_model
def test_products_of_factors_along_row_matrix_bases(name: str) -> None:
    per_sample = oracle(name, "classification")
    found = of_split(name, "classification", kron_magnitudes="kronecker")
    assert found.magnitudes.standard_errors is None
    f, start = len(A) / N_DATA, 0
    for p, block in zip(trainable(MODELS[name]()[0]), found.curvature.basis.blocks, strict=True):
        own = slice(start, start + p.numel())
        start += p.numel()
        o, i = block.rows, block.columns
        axes = torch.eye(max(o, i), dtype=torch.float64)
        QL, QR = (axes[:n, :n] if Q is None else Q for Q, n in ((block.left, o), (block.right, i)))
        of_parts = []
        for part in (A, B):
            H = mean_of(per_sample, part)[own, own]
            left, right = partial_traces(H, o, i)
            along = torch.outer((QL.T @ left @ QL).diagonal(), (QR.T @ right @ QR).diagonal() / torch.trace(H))
            of_parts.append(along.flatten())
        close(found.magnitudes.in_sample[own], of_parts[0])
        close(found.magnitudes.values[own], f * of_parts[0] + (1 - f) * of_parts[1])
        assert float(found.magnitudes.values[own].sum()) == pytest.approx(
            float(torch.trace(weighted(per_sample)[own, own])), rel=1e-9, abs=1e-14
        )


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_products_of_kfac_s_factors(approximation: str) -> None:
    name = "convolutions and pooling"
    network, X, y = small_network(name)
    found = of_split(name, "classification", kron_basis="kfac", kron_magnitudes="kronecker", kfac_approx=approximation)
    expected = []
    for part in (A, B):
        curvature = rows_of(network, X, y, part)
        sums = KfacSums(network, curvature.root, approximation)
        for batch, targets_or_noise in curvature.batches():
            sums.add(batch, targets_or_noise)
        factors = sums.factors()
        along = []
        for parameter, block in zip(network.selection.names, found.curvature.basis.blocks, strict=True):
            G, R = factors[parameter].left, factors[parameter].right
            R = torch.eye(1).double() if R.ndim == 1 else R
            QR = torch.eye(1).double() if block.right is None else block.right
            along.append(torch.outer((block.left.T @ G @ block.left).diagonal(), (QR.T @ R @ QR).diagonal()).flatten())
        expected.append(torch.cat(along))
    f = len(A) / N_DATA
    close(found.magnitudes.in_sample, expected[0])
    close(found.magnitudes.values, f * expected[0] + (1 - f) * expected[1])
    exact = of_split(name, "classification", kron_basis="kfac", kfac_approx=approximation)
    # another curvature along the same basis
    assert torch.equal(exact.curvature.basis.to_dense(), found.curvature.basis.to_dense())
    assert float((exact.magnitudes.values - found.magnitudes.values).abs().max()) > 0.01 * float(expected[0].max())


def test_products_of_factors_of_the_same_batch() -> None:
    both = [
        of_split("MLP", "regression", b=False, magnitudes="same_batch", kron_magnitudes="kronecker"),
        of_split("MLP", "regression", kron_magnitudes="kronecker"),
    ]
    assert torch.equal(both[0].magnitudes.values, both[0].magnitudes.in_sample)
    close(both[0].magnitudes.values, both[1].magnitudes.in_sample)


# --- other curvatures ---


def test_empirical_fisher() -> None:
    network, X, y = small_network("convolutions and pooling", "regression")
    per_sample = dense_empirical_fisher(network.selection.model, X, y, "regression")[0]
    for kron_basis in ("row_matrices", "kfac"):
        found = of_split("convolutions and pooling", "regression", root=EmpiricalFisher, kron_basis=kron_basis)
        expected = dense(found.curvature.basis.to_dense(), per_sample)
        close(found.magnitudes.values, expected.magnitudes)
        close(found.magnitudes.standard_errors, expected.standard_errors, 1e-6)


def test_negative_curvature_of_a_hessian_is_floored_and_counted() -> None:
    network, X, y = small_network("MLP")
    X, y, first, second = X[:12], y[:12], torch.arange(5), torch.arange(5, 12)
    per_sample = dense_hessian(network.selection.model, X, y, "classification")[0]
    derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, Batch(X[:2], y[:2]))
    a, b = (HessianCurvature(network, samples_of(X, y, part), derivatives) for part in (first, second))
    found = estimate(two_sets(a, b, N_DATA), options())
    K = found.curvature.basis.to_dense()
    expected = dense_kronecker_posterior(K, per_sample, first, second, n_data=N_DATA, prior_precision=PRIOR)
    close(found.magnitudes.values, expected.magnitudes)
    close(found.magnitudes.in_sample, expected.in_sample)
    close(found.magnitudes.standard_errors, expected.standard_errors, 1e-6)
    f = 5 / N_DATA
    H = f * mean_of(per_sample, first) + (1 - f) * mean_of(per_sample, second)
    along = (K.T @ H @ K).diagonal()
    # the sign of zero curvature is that of its rounding error
    assert 3 < int((along < -1e-12).sum()) <= found.magnitudes.n_floored <= int((along < 1e-12).sum())
    biased = estimate(two_sets(a, None, N_DATA), options(magnitudes="same_batch"))
    close(biased.magnitudes.values, expected.in_sample.clamp_min(0))
    assert biased.magnitudes.n_floored >= int((expected.in_sample < -1e-12).sum()) > 3
    # K-FAC has no Hessian: layers get partial traces of their blocks, other parameters the diagonal
    of_layers = estimate(two_sets(a, b, N_DATA), options(kron_basis="kfac"))
    close(of_layers.magnitudes.values, found.magnitudes.values)


# --- Monte Carlo ---

DRAWS = 100


@pytest.mark.parametrize("kron_basis", ["row_matrices", "kfac"])
def test_monte_carlo_magnitudes_are_unbiased_along_their_own_basis(kron_basis: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model, X = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(9, 3).double()
    y = torch.randint(3, (9,), generator=torch.Generator().manual_seed(1))
    network = network_of(model, X, y, "classification")
    first, second, f = torch.arange(5), torch.arange(5, 9), 5 / 9
    per_sample = dense_ggn(model, X, "classification")[0]
    H = f * mean_of(per_sample, first) + (1 - f) * mean_of(per_sample, second)

    def drawn(part: Tensor, seed: int) -> RowCurvature:
        curvature = rows_of(network, X, y, part, lambda kind: MonteCarloGaussNewton(kind, 1), seed, 9)
        curvature.stacked_rows()
        return curvature

    errors, without, stated = [], [], []
    for seed in range(DRAWS):
        b = drawn(second, seed + 1000)
        found = estimate(two_sets(drawn(first, 2 * seed), b, 9), options(kron_basis=kron_basis))
        K = found.curvature.basis.to_dense()
        truth = (K.T @ H @ K).diagonal()
        seen_by_b = b.coordinate_moments(found.curvature.basis).means
        leading = torch.tensor([0, 12, 16, 28])  # of each parameter: overestimated by its draws
        errors.append((found.magnitudes.values - truth)[leading])
        without.append((f * found.magnitudes.in_sample + (1 - f) * seen_by_b - truth)[leading])
        stated.append(found.magnitudes.standard_errors[leading])
    scores = [torch.stack(e).mean(0) / (torch.stack(e).std(0) / DRAWS**0.5) for e in (errors, without)]
    assert float(scores[0].abs().max()) < 4
    # power: with the draws that the basis was computed from, it would be biased
    assert float(scores[1].max()) > 6
    ratio = torch.stack(stated).square().mean(0).sqrt() / torch.stack(errors).std(0)
    # although all the data are used, not smaller than the noise of the draws
    assert bool((ratio > 0.85).all())
