"""Slopes and curvatures along directions, per sample and on average, against dense gradients and matrices."""

import copy
import math

import jaxtyping
import pytest
import torch
from models import MODELS, mlp, targets
from quadratic_cases import (
    CURVATURES,
    LIKELIHOODS,
    N,
    built,
    close,
    dense_regularizer,
    directions,
    oracle,
    regularizer,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import Regularizer, directional_derivatives
from debiased_laplace.curvature import derivatives as module


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(("name", "likelihood"), [*((n, "classification") for n in MODELS), ("MLP", "regression")])
def test_every_sample_against_dense_matrices(name: str, likelihood: str, curvature: str) -> None:
    model, X, y = built(name, likelihood)
    _, g, H = oracle(name, likelihood, curvature)
    U = directions(g.shape[1])
    found = directional_derivatives(model, likelihood, (X, y), U, curvature=curvature)
    close(found.per_sample_slopes, g @ U)
    quadratics = torch.einsum("pk,npq,qk->nk", U, H, U)
    close(found.per_sample_curvatures, quadratics)
    close(found.slopes, (g @ U).mean(0))
    close(found.curvatures, quadratics.mean(0))
    close(found.slope_standard_errors, (g @ U).std(0, correction=1) / N**0.5)
    close(found.curvature_standard_errors, quadratics.std(0, correction=1) / N**0.5)
    assert found.n_samples == N
    assert repr(found) == "DirectionalDerivatives(3 directions, 11 samples)"


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_regularizer_joins_slopes_and_curvatures(likelihood: str, curvature: str) -> None:
    model, X, y = built("LayerNorm and raw parameters", likelihood)
    _, g, H = oracle("LayerNorm and raw parameters", likelihood, curvature)
    _, r_gradient, r_hessian = dense_regularizer(model)
    U = directions(g.shape[1])
    prior = regularizer(g.shape[1])
    found = directional_derivatives(model, likelihood, (X, y), U, curvature=curvature, regularizer=prior)
    close(found.slopes, (g.mean(0) + r_gradient) @ U)
    close(found.curvatures, (U * ((H.mean(0) + r_hessian) @ U)).sum(0))
    # the regularizer is the same for all samples, so that standard errors are unchanged
    plain = directional_derivatives(model, likelihood, (X, y), U, curvature=curvature)
    close(found.slope_standard_errors, plain.slope_standard_errors)
    close(found.curvature_standard_errors, plain.curvature_standard_errors)


def test_a_prior_precision_or_a_pair_is_a_regularizer() -> None:
    model, X, y = built("MLP")
    U = directions(oracle("MLP", "classification", "ggn")[1].shape[1])
    for given, same in (
        (2.5, Regularizer(2.5, n_data=N)),
        ((torch.full((len(U),), 0.3), -0.4), Regularizer(0.3, -0.4)),
    ):
        a, b = (
            directional_derivatives(model, "classification", (X, y), U, regularizer=prior) for prior in (given, same)
        )
        close(a.slopes, b.slopes, 1e-6)
        close(a.curvatures, b.curvatures, 1e-6)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_loader_gives_the_samples_in_the_order_of_its_data_set(curvature: str) -> None:
    model, X, y = built("MLP")
    U = directions(oracle("MLP", "classification", "ggn")[1].shape[1])
    expected = directional_derivatives(model, "classification", (X, y), U, curvature=curvature)
    loader = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True)
    for data in (loader, [(X[:4], y[:4]), (X[4:], y[4:])], [X, y]):
        found = directional_derivatives(model, "classification", data, U, curvature=curvature, progress_bar=False)
        close(found.per_sample_slopes, expected.per_sample_slopes)
        close(found.per_sample_curvatures, expected.per_sample_curvatures)


def test_samples_and_directions_may_exceed_a_chunk() -> None:
    model, X = mlp()
    X, y = X.repeat(7, 1) + torch.linspace(0, 1, 280)[:, None], targets("classification").repeat(7)
    P = sum(p.numel() for p in model.parameters())
    U = directions(P, 70)
    found = directional_derivatives(model, "classification", (X, y), U)
    parts = [
        directional_derivatives(model, "classification", (X[rows], y[rows]), U[:, columns]).per_sample_curvatures
        for rows in (slice(0, 100), slice(100, 280))
        for columns in (slice(0, 20), slice(20, 70))
    ]
    close(found.per_sample_curvatures, torch.cat([torch.cat(parts[:2], 1), torch.cat(parts[2:], 1)]))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_model_without_forward_mode_is_differentiated_by_rows(monkeypatch, curvature: str) -> None:
    def refused(*args, **kwargs):
        raise NotImplementedError("no forward mode")

    model, X, y = built("convolutions and pooling")
    _, g, H = oracle("convolutions and pooling", "classification", curvature)
    U = directions(g.shape[1])
    monkeypatch.setattr(module, "columns", refused)
    found = directional_derivatives(model, "classification", (X, y), U, curvature=curvature)
    close(found.per_sample_slopes, g @ U)
    close(found.per_sample_curvatures, torch.einsum("pk,npq,qk->nk", U, H, U))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_single_precision_agrees_with_double(curvature: str) -> None:
    model, X, y = built("convolutions and pooling", dtype=torch.float32)
    _, g, H = oracle("convolutions and pooling", "classification", curvature)
    U = directions(g.shape[1])
    found = directional_derivatives(model, "classification", (X, y), U, curvature=curvature)
    assert found.per_sample_slopes.dtype == torch.float32
    assert found.slopes.dtype == torch.float64
    close(found.slopes, (g @ U).mean(0), 1e-4)
    close(found.curvatures, (U * (H.mean(0) @ U)).sum(0), 1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model, X, y = built("BatchNorm")
    model.train()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = copy.deepcopy(model.state_dict())
    U = directions(sum(p.numel() for p in model.parameters()))
    for data in ((X, y), (X[:, :, :, :2], y)):
        try:
            directional_derivatives(model, "classification", data, U, curvature="hessian")
        except ValueError:
            assert data[0] is not X
        assert model.training
        assert not model[1].training
        assert all(bool((p.grad == 0.5).all()) for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_grad_and_inference_mode_of_the_caller_make_no_difference() -> None:
    model, X, y = built("MLP")
    U = directions(sum(p.numel() for p in model.parameters()))
    expected = directional_derivatives(model, "classification", (X, y), U)
    with torch.no_grad():
        close(directional_derivatives(model, "classification", (X, y), U).slopes, expected.slopes)
    with torch.inference_mode():
        close(directional_derivatives(model, "classification", (X + 0, y + 0), U + 0).slopes, expected.slopes)


def test_standard_errors_of_one_sample_are_infinite() -> None:
    model, X, y = built("MLP")
    U = directions(sum(p.numel() for p in model.parameters()))
    found = directional_derivatives(model, "classification", (X[:1], y[:1]), U)
    assert bool(found.slope_standard_errors.isinf().all())
    assert bool(found.slopes.isfinite().all())


def test_slopes_are_unbiased_on_other_samples_and_biased_on_those_of_the_direction() -> None:
    """The slope along the mean gradient of a batch is unbiased on another batch, and too steep on its own."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        X, y = torch.randn(200, 4, dtype=torch.float64), torch.randint(3, (200,))
    P = sum(p.numel() for p in model.parameters())
    G = directional_derivatives(model, "classification", (X, y), torch.eye(P, dtype=torch.float64)).per_sample_slopes
    other, own = [], []
    for draw in range(300):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(draw))
        a, b = order[:20], order[20:40]
        p = -G[a].mean(0)
        slopes = G @ p
        if draw == 0:  # the other draws use the slopes along the axes, G
            found = directional_derivatives(model, "classification", (X[b], y[b]), p[:, None])
            close(found.per_sample_slopes[:, 0], slopes[b])
        # the mean over b for fixed a, as b is drawn from all samples but a
        truth = slopes[order[20:]].mean()
        other.append(slopes[b].mean() - truth)
        own.append(slopes[a].mean() - truth)
    z_other, z_own = (float(torch.stack(e).mean() / (torch.stack(e).std() / 300**0.5)) for e in (other, own))
    assert abs(z_other) < 4
    assert z_own < -10


P = 4 * 7 + 7 + 7 * 5 + 5 + 5 * 3 + 3
NAN = torch.full((P, 1), math.nan, dtype=torch.float64)
WRONG = {
    "directions of another length": ({"directions": torch.zeros(P + 1, 2)}, "directions"),
    "a vector as directions": ({"directions": torch.zeros(P)}, "directions"),
    "no directions": ({"directions": torch.zeros(P, 0)}, "at least one"),
    "NaN in directions": ({"directions": NAN}, "finite directions"),
    "an unknown curvature": ({"curvature": "fisher"}, "curvature"),
    "an unknown likelihood": ({"likelihood": "bernoulli"}, "likelihood"),
    "no samples": ({"data": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))}, "at least one sample"),
    "no batches": ({"data": []}, "empty"),
    "inputs that the model refuses": ({"data": (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))}, "evaluated"),
    "labels out of range": ({"data": (torch.zeros(3, 4).double(), torch.full((3,), 9))}, "labels"),
    "labels out of range in a later batch": (
        {"data": [(torch.zeros(3, 4).double(), torch.full((3,), i)) for i in (0, 9)]},
        "labels",
    ),
    "a negative prior precision": ({"regularizer": -1.0}, "at least 0"),
    "a prior precision of another length": ({"regularizer": torch.ones(5)}, "trainable parameters"),
    "a prior mean that is NaN": ({"regularizer": (1.0, math.nan)}, "finite"),
    "N below the samples": ({"regularizer": Regularizer(1.0, n_data=3)}, "n_data"),
    "a string as regularizer": ({"regularizer": "ridge"}, "regularizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_value_error(name: str) -> None:
    change, message = WRONG[name]
    model, X, y = built("MLP")
    given = {
        "model": model,
        "likelihood": "classification",
        "data": (X, y),
        "directions": directions(P),
        "curvature": "ggn",
        "regularizer": None,
        **change,
    }
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        directional_derivatives(
            given["model"],
            given["likelihood"],
            given["data"],
            given["directions"],
            curvature=given["curvature"],
            regularizer=given["regularizer"],
        )


@pytest.mark.parametrize("change", [{"sigma_noise": 0.0}, {"temperature": math.inf}, {"n_data": 0}])
def test_invalid_numbers_of_a_regularizer_are_a_value_error(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Regularizer(1.0, **change)
