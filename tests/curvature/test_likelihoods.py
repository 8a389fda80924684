import math

import pytest
import torch
from models import targets
from oracles import output_hessian
from torch import Tensor
from torch.autograd.functional import hessian

from debiased_laplace.curvature.likelihoods import Likelihood, likelihood_named

KINDS = ["classification", "regression"]
ALL = slice(None)


def outputs(n: int = 6, C: int = 4, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_is_that_of_the_losss_second_derivative(kind: str) -> None:
    likelihood = likelihood_named(kind)
    f, y = outputs(), targets(kind, 6, 4)
    S = likelihood.root(f, ALL)
    assert S.shape == (6, 4, 4)
    for i in range(6):
        expected = hessian(lambda g, i=i: likelihood.loss(g[None], y[i : i + 1]), f[i])
        assert torch.allclose(S[i] @ S[i].T, expected, rtol=1e-9, atol=1e-14)
        assert torch.allclose(S[i] @ S[i].T, output_hessian(f[i], kind), rtol=1e-9, atol=1e-14)
        assert torch.allclose(likelihood.root(f[i], ALL), S[i], rtol=1e-12)
    assert torch.allclose(likelihood.root(f.reshape(2, 3, 4), ALL), S.reshape(2, 3, 4, 4), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_sum_over_samples(kind: str) -> None:
    likelihood = likelihood_named(kind)
    f, y = outputs(), targets(kind, 6, 4)
    if kind == "classification":
        expected = sum(float(f[i].logsumexp(0) - f[i, y[i]]) for i in range(6))
    else:
        expected = sum(0.5 * float((f[i] - y[i]) @ (f[i] - y[i])) for i in range(6))
    assert float(likelihood.loss(f, y)) == pytest.approx(expected, rel=1e-12)
    assert isinstance(likelihood, Likelihood)
    assert likelihood.name == kind


def test_labels_of_any_integer_type() -> None:
    likelihood = likelihood_named("classification")
    y = targets("classification", 6, 4)
    expected = likelihood.loss(outputs(), y)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        likelihood.check(outputs(), y.to(dtype))
        assert torch.equal(likelihood.loss(outputs(), y.to(dtype)), expected)


EXTREME = {
    "one class certain": [800.0, 0.0, -800.0],
    "far below zero": [-1e4, -1e4 + 1.0, -1e4],
    "far above zero": [1e4, 1e4 + 1.0, 1e4],
    "all equal": [0.0, 0.0, 0.0],
    "two equal and one impossible": [300.0, 300.0, -300.0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_logits_have_a_finite_root(case: str, dtype: torch.dtype) -> None:
    f = torch.tensor(EXTREME[case], dtype=dtype)
    S = likelihood_named("classification").root(f, ALL)
    p = torch.tensor([math.exp(v - max(EXTREME[case])) for v in EXTREME[case]], dtype=torch.float64)
    p = p / p.sum()
    expected = torch.diag(p) - torch.outer(p, p)
    assert bool(S.isfinite().all())
    assert torch.allclose((S @ S.T).double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_the_softmax_root_has_no_curvature_along_the_ones() -> None:
    S = likelihood_named("classification").root(outputs(), ALL)
    assert torch.allclose(S.sum(1), torch.zeros(6, 4, dtype=torch.float64), atol=1e-15)
    assert [int(torch.linalg.matrix_rank(s)) for s in S] == [3] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_keeps_the_dtype(kind: str) -> None:
    assert likelihood_named(kind).root(outputs().float(), ALL).dtype == torch.float32


UNFIT = {
    "one output": ("classification", outputs(6, 1), torch.zeros(6, dtype=torch.int64), "at least 2 outputs"),
    "labels as floats": ("classification", outputs(), torch.zeros(6), "integers of shape"),
    "one-hot labels": ("classification", outputs(), torch.zeros(6, 4, dtype=torch.int64), "integers of shape"),
    "labels as a column": ("classification", outputs(), torch.zeros(6, 1, dtype=torch.int64), "integers of shape"),
    "a label too large": ("classification", outputs(), torch.tensor([0, 1, 2, 3, 4, 0]), "got 0 to 4"),
    "a negative label": ("classification", outputs(), torch.tensor([0, 1, -100, 3, 2, 0]), "got -100 to 3"),
    "too few labels": ("classification", outputs(), torch.zeros(5, dtype=torch.int64), r"shape \(6,\)"),
    "targets as integers": ("regression", outputs(), torch.zeros(6, 4, dtype=torch.int64), "as floats"),
    "targets without the output dimension": ("regression", outputs(6, 1), torch.zeros(6), r"shape \(6, 1\)"),
    "targets of fewer outputs": ("regression", outputs(), torch.zeros(6, 3), r"shape \(6, 4\)"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_refuses_targets_that_do_not_fit(case: str) -> None:
    kind, f, y, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        likelihood_named(kind).check(f, y)


@pytest.mark.parametrize("kind", KINDS)
def test_accepts_targets_that_fit(kind: str) -> None:
    likelihood_named(kind).check(outputs(), targets(kind, 6, 4))


@pytest.mark.parametrize("name", ["poisson", "Classification", ""])
def test_unknown_likelihoods_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"classification.*regression"):
        likelihood_named(name)
