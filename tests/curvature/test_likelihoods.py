import math

import pytest
import torch
from models import targets
from oracles import output_gradient, output_hessian
from torch import Tensor
from torch.autograd.functional import hessian

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import Regression, likelihood_named

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
    "targets without the output dimension": ("regression", outputs(6, 4), torch.zeros(6), r"shape \(6, 4\)"),
    "too few targets of one output": ("regression", outputs(6, 1), torch.zeros(5), r"shape \(6, 1\)"),
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


@pytest.mark.parametrize("name", ["bernoulli", "Classification", ""])
def test_unknown_likelihoods_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"classification.*regression"):
        likelihood_named(name)


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_the_root_and_the_second_derivative_without_forming_them(kind: str) -> None:
    likelihood, f = likelihood_named(kind), outputs()
    X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    S = likelihood.root(f, ALL)
    H = torch.stack([output_hessian(o, kind) for o in f])
    torch.testing.assert_close(likelihood.root_transposed(f, X), S.mT @ X)
    torch.testing.assert_close(likelihood.hessian_product(f, X[..., 0]), (H @ X[..., :1])[..., 0])
    for i in range(6):
        torch.testing.assert_close(likelihood.root_transposed(f[i], X[i]), S[i].T @ X[i])
        torch.testing.assert_close(likelihood.hessian_product(f[i], X[i, :, 0]), H[i] @ X[i, :, 0])


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 3), slice(3, 4), slice(3, 9), slice(0, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_some_columns_of_the_root(kind: str, chosen: slice) -> None:
    likelihood = likelihood_named(kind)
    torch.testing.assert_close(likelihood.root(outputs(), chosen), likelihood.root(outputs(), ALL)[..., chosen])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_gradient_of_each_sample(kind: str) -> None:
    likelihood, f, y = likelihood_named(kind), outputs(), targets(kind, 6, 4)
    each = likelihood.per_sample_loss(f, y)
    assert each.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(each[i], likelihood.loss(f[i : i + 1], y[i : i + 1]))
    expected = torch.stack([output_gradient(o, t, kind) for o, t in zip(f, y, strict=True)])
    torch.testing.assert_close(likelihood.gradient(f, y), expected)
    torch.testing.assert_close(likelihood.gradient(f[2], y[2]), expected[2])
    torch.testing.assert_close(likelihood.gradient(f.float(), y).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_logits_have_finite_products_and_gradients(case: str, dtype: torch.dtype) -> None:
    f, likelihood = torch.tensor(EXTREME[case], dtype=dtype), likelihood_named("classification")
    S = likelihood.root(f, ALL)
    eye = torch.eye(3, dtype=dtype)
    assert torch.equal(likelihood.root_transposed(f, eye).isfinite(), torch.ones(3, 3, dtype=torch.bool))
    torch.testing.assert_close(likelihood.root_transposed(f, eye), S.mT, rtol=0, atol=1e-6)
    assert bool(likelihood.hessian_product(f, eye[0]).isfinite().all())
    for label in range(3):
        assert bool(likelihood.gradient(f, torch.tensor(label)).isfinite().all())
        drawn = likelihood.drawn_targets(f.expand(9, 3), torch.linspace(0.001, 0.999, 9)[:, None])
        # a class that is impossible is never drawn
        assert bool((torch.softmax(f, 0)[drawn] > 0).all())


def test_labels_are_drawn_by_the_inverse_of_the_distribution_function() -> None:
    f = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    noise = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.9999999], dtype=torch.float64)[:, None]
    found = likelihood_named("classification").drawn_targets(f.expand(6, 3), noise)
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
    # in single precision the probabilities do not add up to one: no label beyond the last
    f = torch.zeros(1000)
    last = likelihood_named("classification").drawn_targets(f, torch.tensor([1 - 1e-16], dtype=torch.float64))
    assert int(last) == 999


def test_real_targets_are_drawn_around_the_outputs() -> None:
    likelihood = likelihood_named("regression")
    noise = likelihood.noise(6, 4, torch.Generator().manual_seed(1))
    assert noise.shape == (6, 4)
    torch.testing.assert_close(likelihood.drawn_targets(outputs(), noise), outputs() + noise)
    assert likelihood.drawn_targets(outputs().float(), noise).dtype == torch.float32
    many = likelihood.noise(4000, 2, torch.Generator().manual_seed(2))
    assert abs(float(many.mean())) < 4.5 / 8000**0.5
    assert abs(float(many.var()) - 1) < 4.5 * (2 / 8000) ** 0.5


def test_reward_models_have_the_likelihood_of_a_pair() -> None:
    reward = likelihood_named("reward_modeling")
    f, y = outputs(6, 2), targets("classification", 6, 2)
    # Bradley and Terry: the logistic function of the difference of the two rewards
    difference = f.gather(1, y[:, None])[:, 0] - f.gather(1, 1 - y[:, None])[:, 0]
    torch.testing.assert_close(reward.per_sample_loss(f, y), -torch.nn.functional.logsigmoid(difference))


def test_targets_of_a_single_output_need_no_second_dimension() -> None:
    likelihood, f, y = likelihood_named("regression"), outputs(6, 1), targets("regression", 6, 1)
    likelihood.check(f, y[:, 0])
    for method in (likelihood.loss, likelihood.per_sample_loss, likelihood.gradient):
        assert torch.equal(method(f, y[:, 0]), method(f, y))
    assert torch.equal(likelihood.gradient(f[2], y[2, 0]), likelihood.gradient(f[2], y[2]))


NOISE = (0.5, 2.0, 0.8, 1.25)


def test_outputs_count_by_their_noise() -> None:
    likelihood, f, y = Regression(NOISE), outputs(), targets("regression", 6, 4)
    r = torch.tensor(NOISE, dtype=torch.float64)
    log_density = torch.distributions.Normal(f, r).log_prob(y) + r.log() + math.log(2 * math.pi) / 2
    torch.testing.assert_close(likelihood.per_sample_loss(f, y), -log_density.sum(1))
    torch.testing.assert_close(likelihood.loss(f, y), -log_density.sum())
    X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for i in range(6):
        at = f[i].clone().requires_grad_()
        (slope,) = torch.autograd.grad(likelihood.loss(at[None], y[i : i + 1]), at)
        torch.testing.assert_close(likelihood.gradient(f[i], y[i]), slope)
        H = hessian(lambda g, i=i: likelihood.loss(g[None], y[i : i + 1]), f[i])
        S = likelihood.root(f[i], ALL)
        torch.testing.assert_close(S @ S.T, H)
        torch.testing.assert_close(likelihood.root(f[i], slice(1, 3)), S[:, 1:3])
        torch.testing.assert_close(likelihood.root_transposed(f[i], X[i]), S.T @ X[i])
        torch.testing.assert_close(likelihood.hessian_product(f[i], X[i, :, 0]), H @ X[i, :, 0])
    noise = torch.ones(6, 4, dtype=torch.float64)
    torch.testing.assert_close(likelihood.drawn_targets(f, noise) - f, r.expand(6, 4))
    with pytest.raises(ValueError, match="one for each of 3 outputs; got 4"):
        likelihood.check(f[:, :3], y[:, :3])
