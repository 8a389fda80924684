"""Second derivatives of the losses by both modes, against Hessian rows computed one by one with autograd."""

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from laplace.curvature import CurvlinopsHessian
from models import MODELS, targets
from oracles import dense_hessian, trainable
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm

from debiased_laplace import DebiasedLaplace, directional_derivatives, newton_step, quadratic_along
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch

N = 3
LIKELIHOODS = ["classification", "regression"]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


def batch_of(name: str, likelihood: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Batch]:
    model, X = MODELS[name](dtype=dtype)
    return model, Batch(X[:N], targets(likelihood, dtype=dtype)[:N])


def second(name: str, likelihood: str, dtype: torch.dtype = torch.float64) -> tuple[SecondDerivatives, Batch]:
    model, batch = batch_of(name, likelihood, dtype)
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    return SecondDerivatives(selection, parameters, likelihood_named(likelihood), batch), batch


@cache
def oracle(name: str, likelihood: str) -> Tensor:
    model, batch = batch_of(name, likelihood)
    with differentiable_kernels(model):
        return torch.stack(dense_hessian(model, batch.inputs, batch.targets, likelihood)[0])


def draw(P: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(P, k, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert not found.requires_grad
    assert float((found.double() - expected).abs().max()) <= rtol * float(expected.abs().max())


def test_the_oracle_is_torch_s_hessian() -> None:
    model, batch = batch_of("MLP", "classification")
    shapes = [p.shape for p in trainable(model)]
    names = [name for name, _ in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, values, (batch.inputs[1:2],))
        return nn.functional.cross_entropy(outputs, batch.targets[1:2])

    flat = torch.cat([p.detach().reshape(-1) for p in trainable(model)])
    H = oracle("MLP", "classification")[1]
    close(H, torch.autograd.functional.hessian(loss, flat))
    # away from a minimum it is indefinite, which no root of a curvature could be
    values = torch.linalg.eigvalsh(H)
    assert float(values[0]) < -0.01 * float(values[-1])


@every_model
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("mode", ["fastest", "looped"])
def test_quadratics_and_products(name: str, likelihood: str, mode: str) -> None:
    derivatives, batch = second(name, likelihood)
    if mode == "looped":
        derivatives.forward_quadratics = derivatives.forward_products = False
    H = oracle(name, likelihood)
    X = draw(H.shape[1], 3)
    close(derivatives.quadratics(batch, X), torch.einsum("pk,npq,qk->nk", X, H, X))
    close(derivatives.bilinears(batch, X, X.flip(1)), torch.einsum("pk,npq,qk->nk", X, H, X.flip(1)))
    close(derivatives.products(batch, X), H.sum(0) @ X)


@every_model
def test_fast_modes_are_used_only_where_they_are_right(name: str) -> None:
    """Forward mode twice may treat the statistics of a normalization as constants, without an error."""
    derivatives, batch = second(name, "classification")
    H = oracle(name, "classification")
    X = draw(H.shape[1], 3)
    for taken, found, expected in (
        (
            derivatives.forward_quadratics,
            derivatives._forward_bilinears(batch, X, X),
            torch.einsum("pk,npq,qk->nk", X, H, X),
        ),
        (derivatives.forward_products, derivatives._forward_products(batch, X), H.sum(0) @ X),
    ):
        assert taken == torch.allclose(found, expected, rtol=1e-6)
    assert derivatives.forward_quadratics or name not in ("MLP", "convolutions and pooling")


def test_more_directions_than_one_pass_takes() -> None:
    derivatives, batch = second("MLP", "regression")
    H = oracle("MLP", "regression")
    X = draw(H.shape[1], 37)
    close(derivatives.quadratics(batch, X), torch.einsum("pk,npq,qk->nk", X, H, X))
    close(derivatives.products(batch, X), H.sum(0) @ X)


@pytest.mark.parametrize("mode", ["fastest", "looped"])
@pytest.mark.parametrize("name", ["convolutions and pooling", "LayerNorm and raw parameters", "LSTM"])
def test_single_precision(name: str, mode: str) -> None:
    derivatives, batch = second(name, "classification", torch.float32)
    if mode == "looped":
        derivatives.forward_quadratics = derivatives.forward_products = False
    H = oracle(name, "classification")
    X = draw(H.shape[1], 3, torch.float32)
    found = derivatives.quadratics(batch, X)
    assert found.dtype == torch.float32
    close(found, torch.einsum("pk,npq,qk->nk", X.double(), H, X.double()), 1e-4)
    close(derivatives.products(batch, X), H.sum(0) @ X.double(), 1e-4)


class _SlowBackward(torch.autograd.Function):
    """The sine with a derivative for backward mode only."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_SlowBackward.apply(self.first(x)))


def test_operations_without_forward_mode_use_the_slow_mode() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model, X = _Custom().double(), torch.randn(N, 4).double()
    y = targets("classification")[:N]
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    derivatives = SecondDerivatives(selection, parameters, likelihood_named("classification"), Batch(X, y))
    assert not derivatives.forward_quadratics
    assert not derivatives.forward_products
    H = torch.stack(dense_hessian(model, X, y, "classification")[0])
    U = draw(len(H[0]), 4)
    close(derivatives.quadratics(Batch(X, y), U), torch.einsum("pk,npq,qk->nk", U, H, U))
    close(derivatives.products(Batch(X, y), U), H.sum(0) @ U)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_is_linear_in_its_parameters_has_a_hessian() -> None:
    """The gradient does not depend on the outputs' own second derivative, and one parameter is not used at all."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.ones(2))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, X = Unused().double(), torch.randn(4, 3).double()
    y = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    selection = ParameterSelection.all_weights(model)
    parameters = selection.unflatten(selection.vector())
    derivatives = SecondDerivatives(selection, parameters, likelihood_named("regression"), Batch(X, y))
    U = draw(10, 3)
    of_weights = torch.einsum("nj,jk->nk", X, U[2:5]) ** 2 + torch.einsum("nj,jk->nk", X, U[5:8]) ** 2
    cross = 2 * (X @ U[2:5]) * U[8] + 2 * (X @ U[5:8]) * U[9]
    expected = of_weights + cross + U[8] ** 2 + U[9] ** 2
    for fast in (True, False):
        derivatives.forward_quadratics = derivatives.forward_products = fast
        close(derivatives.quadratics(Batch(X, y), U), expected)
        assert not derivatives.products(Batch(X, y), U)[:2].any()
    assert math.isfinite(float(expected.sum()))


def test_entries_of_a_subnetwork_have_their_block_of_the_hessian() -> None:
    model, batch = batch_of("MLP", "classification")
    picked = torch.tensor([0, 3, 4, 27, 29, 41, 60, 77, 78, 90])
    selection = ParameterSelection.all_weights(model).subnetwork(picked)
    parameters = selection.unflatten(selection.vector())
    derivatives = SecondDerivatives(selection, parameters, likelihood_named("classification"), batch)
    H = oracle("MLP", "classification")[:, picked][:, :, picked]
    U = draw(10, 3)
    for fast in (True, False):
        derivatives.forward_quadratics = derivatives.forward_products = fast
        close(derivatives.quadratics(batch, U), torch.einsum("pk,npq,qk->nk", U, H, U))
        close(derivatives.products(batch, U), H.sum(0) @ U)


def gradient_differences(model: nn.Module, batch: Batch, U: Tensor) -> Tensor:
    """Mean Hessian times U, from differences of gradients."""
    parameters = trainable(model)
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(theta: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(theta, parameters)
        loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    columns = [(gradient(start + 1e-5 * u) - gradient(start - 1e-5 * u)) / 2e-5 for u in U.unbind(1)]
    nn.utils.vector_to_parameters(start, parameters)
    return torch.stack(columns, dim=1)


def small_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(X, torch.randint(3, (20,), generator=generator))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_hessians_through_weight_normalization_are_those_of_differences(dim: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(nn.Conv2d(2, 3, 3), dim=dim), nn.Tanh(), nn.Flatten(), weight_norm(nn.Linear(12, 3), dim=dim)
    ).double()
    batch = small_batch()
    U = torch.randn(len(nn.utils.parameters_to_vector(model.parameters())), 5, dtype=torch.float64)
    expected = gradient_differences(model, batch, U)
    data = (batch.inputs, batch.targets)
    found = quadratic_along(model, "classification", data, U, curvature="hessian").curvature_matrix
    assert torch.allclose(found, U.T @ expected, rtol=1e-6, atol=1e-7 * float(found.abs().max()))
    along = directional_derivatives(model, "classification", data, U, curvature="hessian").curvatures
    assert torch.allclose(along, (U * expected).sum(0), rtol=1e-6, atol=1e-7 * float(found.abs().max()))


class FirstOrder(torch.autograd.Function):
    """Softplus whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return nn.functional.softplus(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return upstream * torch.sigmoid(ctx.saved_tensors[0])


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return FirstOrder.apply(x)


def test_a_hessian_that_double_backward_gets_wrong_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3), Softplus(), nn.Linear(3, 3)).double()
    batch = small_batch()
    data = (batch.inputs, batch.targets)
    U = torch.randn(111, 2, dtype=torch.float64)
    kind = {"rank": 2, "complement": "none", "backend": CurvlinopsHessian}
    la, of_samples = (DebiasedLaplace(model, "classification", sampling=s, **kind) for s in ("curvature", "uniform"))
    refused = r"not symmetric: .* Expected curvature='ggn'"
    for call in (
        lambda: newton_step(model, "classification", data, 0.3, curvature="hessian"),
        lambda: directional_derivatives(model, "classification", data, U, curvature="hessian"),
        lambda: quadratic_along(model, "classification", data, U, curvature="hessian"),
        lambda: la.fit([data]),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.warns(UserWarning, match="CurvlinopsHessian cannot"), pytest.raises(ValueError, match=refused):
        of_samples.fit([data])
