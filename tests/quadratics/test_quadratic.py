"""The quadratic model of a set of samples, regularizer included, against dense gradients and matrices."""

import pytest
import torch
from models import MODELS
from oracles import flat_parameters
from quadratic_cases import CURVATURES, built, close, dense_regularizer, directions, oracle, regularizer
from torch import Tensor

from debiased_laplace import directional_derivatives, quadratic_along
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.quadratics.quadratic import Quadratic


def dense(name: str, likelihood: str, curvature: str, d: Tensor) -> float:
    """Return q(θ₀ + d; B), regularizer included, from dense matrices."""
    losses, g, H = oracle(name, likelihood, curvature)
    value, r_gradient, r_hessian = dense_regularizer(built(name, likelihood)[0])
    return float(losses.mean() + value + d @ (g.mean(0) + r_gradient) + d @ (H.mean(0) + r_hessian) @ d / 2)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(
    ("name", "likelihood"), [*((n, "classification") for n in MODELS), ("BatchNorm", "regression")]
)
def test_values_in_a_plane_against_dense_matrices(name: str, likelihood: str, curvature: str) -> None:
    model, X, y = built(name, likelihood)
    U = directions(len(flat_parameters(model)), 2)
    q = quadratic_along(model, likelihood, (X, y), U, curvature=curvature, regularizer=regularizer(len(U)))
    first, second = torch.tensor([-0.3, 0.0, 0.4]), torch.tensor([0.1, -0.2])
    grid = q.grid(first, second)
    expected = [[dense(name, likelihood, curvature, s * U[:, 0] + t * U[:, 1]) for t in (0.1, -0.2)] for s in first]
    close(grid, torch.tensor(expected, dtype=torch.float64), 1e-6)
    assert q.value == pytest.approx(dense(name, likelihood, curvature, 0 * U[:, 0]), rel=1e-10)
    close(q.along(1, second), torch.stack([q(torch.tensor([0.0, t])) for t in second]))
    assert torch.equal(q.curvature_matrix, q.curvature_matrix.mT)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_slopes_and_curvatures_are_those_of_directional_derivatives(curvature: str) -> None:
    model, X, y = built("convolutions and pooling")
    U = directions(len(flat_parameters(model)), 4)
    prior = regularizer(len(U))
    q = quadratic_along(model, "classification", (X, y), U, curvature=curvature, regularizer=prior)
    found = directional_derivatives(model, "classification", (X, y), U, curvature=curvature, regularizer=prior)
    close(q.slopes, found.slopes)
    close(q.curvatures, found.curvatures)


def test_the_error_of_the_quadratic_with_the_hessian_is_of_third_order() -> None:
    """At twice the distance the error is eight times as large."""
    model, X, y = built("MLP", "regression")
    selection = ParameterSelection.all_weights(model)
    theta = selection.vector()
    U = directions(len(theta), 2)
    prior = regularizer(len(theta))
    q = quadratic_along(model, "regression", (X, y), U, curvature="hessian", regularizer=prior)
    errors = []
    for size in (2e-3, 4e-3):
        t = size * torch.tensor([0.6, -0.8], dtype=torch.float64)
        at = theta + U @ t
        losses = likelihood_named("regression").per_sample_loss(selection.call(selection.unflatten(at), X), y)
        errors.append(float(q(t)) - float(losses.mean()) - prior.around(at, len(X)).value)
    assert errors[1] / errors[0] == pytest.approx(8, rel=0.1)


def test_the_minimizer_solves_for_the_slopes_or_is_none() -> None:
    model, X, y = built("MLP")
    U = directions(len(flat_parameters(model)), 3)
    q = quadratic_along(model, "classification", (X, y), U, regularizer=4.0)
    t = q.minimizer()
    assert t is not None
    close(q.curvature_matrix @ t, -q.slopes)
    generator = torch.Generator().manual_seed(1)
    around = t + 0.01 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
    assert bool((q(around) > q(t)).all())
    flat = Quadratic(1.0, torch.tensor([-2.0, 0.0]), torch.diag(torch.tensor([4.0, 0.0])))
    close(flat.minimizer(), torch.tensor([0.5, 0.0]))
    assert Quadratic(1.0, torch.tensor([1.0, 1.0]), torch.diag(torch.tensor([4.0, 0.0]))).minimizer() is None
    assert Quadratic(1.0, torch.tensor([1.0, 1.0]), torch.diag(torch.tensor([4.0, -1.0]))).minimizer() is None


def test_wrong_shapes_are_a_value_error() -> None:
    with pytest.raises(Exception, match=r"square|curvature_matrix"):
        Quadratic(0.0, torch.zeros(2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="2 directions"):
        Quadratic(0.0, torch.zeros(3), torch.eye(3)).grid(torch.zeros(1), torch.zeros(1))
