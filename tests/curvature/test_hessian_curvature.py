"""The Hessian as the curvature of a sub-batch, against the dense one of each sample."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from models import MODELS
from oracles import dense_hessian, mean_of
from sub_batches import samples_of, small_network
from torch import Tensor, nn

from debiased_laplace.curvature import hessian_curvature as module
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis

SOME = torch.tensor([31, 2, 8, 39])  # in batches of 3, the last one smaller
LIKELIHOODS = ["classification", "regression"]


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


@cache
def oracle(name: str, likelihood: str) -> list[Tensor]:
    """Hessians of the samples in SOME, in that order."""
    network, X, y = small_network(name, likelihood)
    with differentiable_kernels(network.selection.model):
        return dense_hessian(network.selection.model, X[SOME], y[SOME], likelihood)[0]


def hessian_of(name: str = "MLP", likelihood: str = "classification", *, backend=None, bar=False) -> HessianCurvature:
    network, X, y = small_network(name, likelihood)
    derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, Batch(X[:2], y[:2]))
    return HessianCurvature(
        replace(network, backend=backend), samples_of(X, y, SOME, batch_size=3), derivatives, progress_bar=bar
    )


def orthonormal(P: int, k: int, seed: int = 8) -> Tensor:
    return torch.linalg.qr(torch.randn(P, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


def mean_and_spread(name: str, likelihood: str, U: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.stack([torch.stack([u @ H @ u for u in U.T]) for H in oracle(name, likelihood)])
    return values.mean(0), values.std(0, correction=1)


def cubes(name: str, likelihood: str, U: Tensor) -> Tensor:
    values = torch.stack([torch.stack([u @ H @ u for u in U.T]) for H in oracle(name, likelihood)])
    return (values - values.mean(0)).pow(3).mean(0)


@pytest.mark.parametrize(
    ("name", "likelihood"), [*((name, "classification") for name in MODELS), ("MLP", "regression")]
)
def test_matrix_products_and_curvature_along_directions(name: str, likelihood: str) -> None:
    c = hessian_of(name, likelihood)
    H = mean_of(oracle(name, likelihood), torch.arange(len(SOME)))
    P = len(H)
    U = orthonormal(P, 5)
    found = c.moments(U)
    means, spread = mean_and_spread(name, likelihood, U)
    close(found.means, means)
    close(found.standard_deviations, spread, 1e-6)
    close(found.third_moments, cubes(name, likelihood, U), 1e-6)
    assert found.n_samples == c.n_samples == 4
    assert found.trace is None
    assert found.residual_diagonal is None
    close(c.linear_map()(U), H @ U)
    close(c.dense(), H)
    assert torch.equal(c.dense(), c.dense().T)
    assert c.n_rows == P
    assert c.source == "torch.func products"
    assert not c.is_random
    assert c.redrawn() is c


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_residual_of_directions(likelihood: str) -> None:
    c = hessian_of("MLP", likelihood)
    H = mean_of(oracle("MLP", likelihood), torch.arange(len(SOME)))
    U = torch.linalg.eigh(H)[1][:, -12:]
    outside = torch.eye(len(H), dtype=H.dtype) - U @ U.T
    expected = (outside @ H @ outside).diagonal()
    assert bool((expected < 0).any())  # an estimate floors them after averaging over all samples
    means, spread = mean_and_spread("MLP", likelihood, U)
    by_diagonal, by_trace = c.moments(U, "diagonal"), c.moments(U, "trace")
    assert by_diagonal.residual_diagonal is not None
    close(by_diagonal.residual_diagonal, expected)
    assert by_trace.trace is not None
    close(by_trace.trace, torch.trace(H))
    assert by_diagonal.trace is None
    assert by_trace.residual_diagonal is None
    for found in (by_diagonal, by_trace):
        close(found.means, means)
        close(found.standard_deviations, spread, 1e-6)
        close(found.third_moments, cubes("MLP", likelihood, U), 1e-6)


def basis_of_mlp() -> KroneckerBasis:
    """For 4-7-5-3, P = 93: more than one panel of basis vectors."""
    sides = [(7, 4), (7, None), (5, 7), (5, None), (3, 5), (3, None)]
    return KroneckerBasis(
        tuple(
            BasisBlock(o, i or 1, orthonormal(o, o, o), None if i is None else orthonormal(i, i, 20 + i))
            for o, i in sides
        )
    )


def test_curvature_along_every_vector_of_a_basis() -> None:
    c = hessian_of()
    basis = basis_of_mlp()
    found = c.coordinate_moments(basis)
    means, spread = mean_and_spread("MLP", "classification", basis.to_dense())
    assert len(means) > module._PANEL
    close(found.means, means)
    close(found.standard_deviations, spread, 1e-6)
    close(found.third_moments, cubes("MLP", "classification", basis.to_dense()), 1e-6)
    assert found.n_samples == 4
    assert bool((means < 0).any())


def test_a_matrix_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    c = hessian_of()
    assert c.dense_is_affordable
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 4 * 3 * 8 * 93 * 93 - 1)
    assert not c.dense_is_affordable
    with pytest.raises(ValueError, match="dense Hessian of 93 parameters does not fit"):
        c.dense()
    c.moments(orthonormal(93, 2))  # products need no matrix
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 4 * 3 * 8 * 93 * 93)
    assert c.dense().shape == (93, 93)


def test_a_batch_larger_than_a_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    c = hessian_of(bar=True)
    U = orthonormal(93, 3)
    means, spread = mean_and_spread("MLP", "classification", U)
    close(c.moments(U).means, means)
    close(c.moments(U).standard_deviations, spread, 1e-6)
    shown = capsys.readouterr().err
    assert "Curvature along directions" in shown
    assert "4/4" in shown
    close(c.linear_map()(U), mean_of(oracle("MLP", "classification"), torch.arange(4)) @ U)
    assert capsys.readouterr().err == ""


class _Backend:
    """A backend that returns twice the correct Hessian, to tell it from torch.func."""

    name = "twice"

    def __init__(self, *, offers: bool) -> None:
        self.offers, self.calls = offers, 0

    def offers_rows(self, root: OutputRoot) -> bool:
        return False

    def rows(self, batch, root, targets_or_noise):
        raise NotImplementedError

    def offers_kfac(self, root, approximation) -> bool:
        return False

    def kfac(self, batches, n_samples):
        raise NotImplementedError

    def offers_hessian(self) -> bool:
        return self.offers

    def hessian(self, batch: Batch) -> Tensor:
        self.calls += 1
        model = small_network("MLP")[0].selection.model
        return 2 * sum(dense_hessian(model, batch.inputs, batch.targets, "classification")[0])


def test_a_backend_s_hessian_is_used_if_it_is_offered() -> None:
    other = _Backend(offers=True)
    c = hessian_of(backend=other)
    H = 2 * mean_of(oracle("MLP", "classification"), torch.arange(4))
    U = orthonormal(93, 4)
    close(c.moments(U).means, (U * (H @ U)).sum(0))
    close(c.dense(), H)
    assert other.calls == 2  # one per batch, once for both requests
    assert c.source == "twice"
    without = hessian_of(backend=_Backend(offers=False))
    close(without.dense(), H / 2)
    assert without.source == "torch.func products"
