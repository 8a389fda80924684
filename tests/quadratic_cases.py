"""Gradients and curvatures of single samples, dense, and a regularizer that is neither one nor zero anywhere."""

from functools import cache

import torch
from models import MODELS, targets
from oracles import dense_empirical_fisher, dense_ggn, dense_gradients, dense_hessian, flat_parameters
from torch import Tensor, nn

from debiased_laplace import Regularizer
from debiased_laplace.curvature.contexts import differentiable_kernels

N = 11
CURVATURES = ["ggn", "ef", "hessian"]
LIKELIHOODS = ["classification", "regression"]


def built(name: str, likelihood: str = "classification", dtype=torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    model, X = MODELS[name](dtype=dtype)
    return model, X[:N], targets(likelihood, dtype=dtype)[:N]


@cache
def oracle(name: str, likelihood: str, curvature: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (n,), gradient (n, P) and curvature (n, P, P) of every sample."""
    model, X, y = built(name, likelihood)
    with differentiable_kernels(model):
        gradients = torch.stack(list(dense_gradients(model, X, y, likelihood)))
        if curvature == "ggn":
            H = dense_ggn(model, X, likelihood)[0]
        elif curvature == "ef":
            H = dense_empirical_fisher(model, X, y, likelihood)[0]
        else:
            H = dense_hessian(model, X, y, likelihood)[0]
    outputs = model(X).detach()
    if likelihood == "regression":
        losses = (outputs - y).square().sum(1) / 2
    else:
        losses = outputs.logsumexp(1) - outputs[torch.arange(N), y]
    return losses.detach(), gradients, torch.stack(H)


def directions(P: int, k: int = 3, seed: int = 8, dtype=torch.float64) -> Tensor:
    return torch.randn(P, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def regularizer(P: int) -> Regularizer:
    precision = torch.linspace(0.3, 2.5, P, dtype=torch.float64)
    mean = torch.linspace(-0.4, 0.7, P, dtype=torch.float64)
    return Regularizer(precision, mean, n_data=50, sigma_noise=0.7, temperature=1.6)


def dense_regularizer(model: nn.Module) -> tuple[float, Tensor, Tensor]:
    """Value, gradient and Hessian of that regularizer, as the formulas stand."""
    theta = flat_parameters(model)
    P = len(theta)
    factor = 1 / (0.7**2 * 1.6)
    P0 = torch.diag(torch.linspace(0.3, 2.5, P, dtype=torch.float64)) / (50 * factor)
    away = theta - torch.linspace(-0.4, 0.7, P, dtype=torch.float64)
    return float(away @ P0 @ away / 2), P0 @ away, P0


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())
