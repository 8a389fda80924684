"""Binary, Poisson, heteroscedastic and own likelihoods, against torch.distributions and autograd."""

import pytest
import torch
from likelihoods import Ordinal, density, some_targets
from torch.autograd.functional import hessian, jacobian

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.output_rows import cotangents, row_sizes
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, MonteCarloGaussNewton

ALL = slice(None)
NAMES = ["binary", "poisson", "heteroscedastic"]
OUTPUTS = {"binary": 3, "poisson": 3, "heteroscedastic": 4, "ordinal": 1}
every_likelihood = pytest.mark.parametrize("name", [*NAMES, "ordinal"])


def setup(name, n=6):
    likelihood = Ordinal() if name == "ordinal" else likelihood_named(name)
    C = OUTPUTS[name]
    f = 1.3 * torch.randn(n, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return likelihood, f, some_targets(name, n, C)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_negative_log_density(name):
    likelihood, f, y = setup(name)
    assert isinstance(likelihood, Likelihood)
    assert likelihood.name == name
    likelihood.check(f, y)
    expected = -density(name, f).log_prob(y).sum(1)
    torch.testing.assert_close(likelihood.per_sample_loss(f, y), expected)
    torch.testing.assert_close(likelihood.loss(f, y), expected.sum())
    assert likelihood.weights(y) is None


@every_likelihood
def test_gradients_are_those_of_autograd(name):
    likelihood, f, y = setup(name)
    for i in range(len(f)):
        expected = jacobian(lambda g, i=i: likelihood.loss(g[None], y[i : i + 1]), f[i])
        torch.testing.assert_close(likelihood.gradient(f[i], y[i]), expected)
        torch.testing.assert_close(likelihood.gradient(f, y)[i], expected)
    assert likelihood.gradient(f.float(), y).dtype == torch.float32


@every_likelihood
def test_the_curvature_is_the_expected_second_derivative(name):
    likelihood, f, _ = setup(name, 3)
    # expectation over the targets by quadrature or sums: the curvature of the GGN is the Fisher matrix
    for i in range(3):
        if name == "heteroscedastic":
            # the second derivative is linear in the residual and its square, whose means are 0 and the variance
            m, s = f[i].chunk(2)
            around = [m, *(m + sign * (s / 2).exp() for sign in (-1, 1))]
            H = [hessian(lambda g, y=y: likelihood.loss(g[None], y[None]), f[i]) for y in around]
            expected = (H[1] + H[2]) / 2
        elif name == "ordinal":
            p = likelihood.log_probabilities(f[i]).exp()
            H = [hessian(lambda g, k=k: likelihood.loss(g[None], torch.tensor([k])), f[i]) for k in range(4)]
            expected = sum(p[k] * H[k] for k in range(4))
        else:
            # no target enters
            y = density(name, f[i]).sample()
            expected = hessian(lambda g, y=y: likelihood.loss(g[None], y[None]), f[i])
        torch.testing.assert_close(likelihood.hessian(f[i]), expected)


@every_likelihood
def test_all_forms_of_the_curvature_agree(name):
    likelihood, f, _ = setup(name)
    C = f.shape[1]
    H, S = likelihood.hessian(f), likelihood.root(f, ALL)
    g = torch.Generator().manual_seed(5)
    X, Q = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, C, 3), (C, 5)))
    torch.testing.assert_close(S @ S.mT, H)
    torch.testing.assert_close(likelihood.root(f[2], slice(0, 2)), S[2][:, :2])
    torch.testing.assert_close(likelihood.root(f.reshape(2, 3, C), ALL), S.reshape(2, 3, C, C))
    torch.testing.assert_close(likelihood.root_transposed(f, X), S.mT @ X)
    torch.testing.assert_close(likelihood.hessian_product(f, X[..., 0]), (H @ X[..., :1])[..., 0])
    torch.testing.assert_close(likelihood.hessian_quadratics(f, Q), ((Q.T @ H).mT * Q).sum(1))
    torch.testing.assert_close(likelihood.hessian_quadratics(f, None), H.diagonal(dim1=1, dim2=2))
    w = torch.rand(6, generator=g, dtype=torch.float64)
    torch.testing.assert_close(likelihood.hessian_sum(f, w), (w[:, None, None] * H).sum(0))


@every_likelihood
def test_rows_sum_to_the_curvature_by_decreasing_size(name):
    likelihood, f, y = setup(name)
    n, C = f.shape
    for root, expected in (
        (GaussNewton(likelihood), likelihood.hessian(f)),
        (EmpiricalFisher(likelihood), likelihood.gradient(f, y)[:, :, None] * likelihood.gradient(f, y)[:, None]),
    ):
        sizes = row_sizes(root, f, y)
        r = sizes.shape[1]
        assert bool((sizes.diff(dim=1) <= 0).all())
        order = torch.randperm(n * r, generator=torch.Generator().manual_seed(1))
        c = cotangents(root, f, y, order // r, order % r)
        rows = torch.zeros_like(c).index_copy(0, order, c).view(n, r, C)
        torch.testing.assert_close(rows.mT @ rows, expected)
        torch.testing.assert_close(rows.square().sum(2), sizes)


@every_likelihood
def test_monte_carlo_curvatures_have_the_expectation_of_the_exact_one(name):
    likelihood, f, y = setup(name, 2)
    draws = 60_000
    root = MonteCarloGaussNewton(likelihood, draws)
    noise = root.targets_or_noise(y, f.shape[1], torch.Generator().manual_seed(0))
    S = root.columns(f, noise, ALL)
    each = draws * S[:, :, None, :] * S[:, None, :, :]
    errors = (each.mean(-1) - likelihood.hessian(f)) / (each.std(-1) / draws**0.5).clamp_min(1e-12)
    assert float(errors.abs().max()) < 5
    assert float((each.std(-1) / draws**0.5 / likelihood.hessian(f).amax((1, 2), keepdim=True)).max()) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_drawn_targets_have_the_moments_of_the_density(name):
    likelihood, f, _ = setup(name, 2)
    n = 50_000
    g = torch.Generator().manual_seed(7)
    noise = likelihood.noise(2 * n, f.shape[1], g).unflatten(0, (n, 2))
    drawn = likelihood.drawn_targets(f.expand(n, -1, -1), noise).double()
    expected = density(name, f)
    z = (drawn.mean(0) - expected.mean) / (expected.variance / n).sqrt()
    assert float(z.abs().max()) < 4.5
    torch.testing.assert_close(drawn.var(0), expected.variance, rtol=0.08, atol=0)
    likelihood.check(f.expand(n, -1, -1)[:, 0], drawn[:, 0])


def test_counts_of_large_and_small_rates_are_quantiles():
    likelihood = likelihood_named("poisson")
    f = torch.tensor([-8.0, 0.0, 5.0, 12.0], dtype=torch.float64)
    scipy_stats = pytest.importorskip("scipy.stats")
    u = torch.tensor([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)
    found = likelihood.drawn_targets(f.expand(5, 4), u[:, None].expand(5, 4))
    expected = scipy_stats.poisson.ppf(u[:, None].numpy(), f.exp().numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["poisson", "heteroscedastic"])
def test_moments_of_targets_of_gaussian_outputs(name):
    likelihood, f, _ = setup(name, 2)
    f, variance = 0.4 * f, torch.rand(2, f.shape[1], generator=torch.Generator().manual_seed(1)).double()
    mean, of_mean, of_noise = likelihood.target_moments(f, variance)
    n = 400_000
    draws = f + variance.sqrt() * torch.randn(n, *f.shape, generator=torch.Generator().manual_seed(2)).double()
    at = density(name, draws)
    for found, values in ((mean, at.mean), (of_noise, at.variance)):
        assert float(((values.mean(0) - found) / (values.std(0) / n**0.5)).abs().max()) < 4.5
    torch.testing.assert_close(at.mean.var(0), of_mean, rtol=0.06, atol=0)


def test_one_binary_label_is_the_softmax_of_zero_and_its_logit():
    binary, softmax = likelihood_named("binary"), likelihood_named("classification")
    z = torch.tensor([-40.0, -1.0, 0.3, 45.0], dtype=torch.float64)
    y = torch.tensor([1, 0, 1, 1])
    pairs = torch.stack([torch.zeros_like(z), z], dim=1)
    for targets in (y, y[:, None], y.double(), y.bool()):
        binary.check(z[:, None], targets)
        torch.testing.assert_close(
            binary.per_sample_loss(z[:, None], targets), softmax.per_sample_loss(pairs, y), rtol=1e-14, atol=1e-18
        )
        gradient = softmax.gradient(pairs, y)[:, 1:]
        torch.testing.assert_close(binary.gradient(z[:, None], targets), gradient, rtol=1e-12, atol=1e-16)
    H = softmax.hessian_quadratics(pairs, None)[:, 1:]
    torch.testing.assert_close(binary.hessian_diagonal(z[:, None]), H, rtol=1e-12, atol=0)
    assert float(binary.gradient(z[-1:, None], y[-1:, None])) == pytest.approx(-torch.exp(-z[-1]).item(), rel=1e-12)


def test_a_constant_log_variance_is_a_regression_with_that_noise():
    both, sigma = likelihood_named("heteroscedastic"), 0.6
    m, y = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    f = torch.cat([m, torch.full_like(m, 2 * torch.tensor(sigma).log())], dim=1)
    regression = likelihood_named("regression")
    torch.testing.assert_close(both.gradient(f, y)[:, :2], regression.gradient(m, y) / sigma**2)
    torch.testing.assert_close(both.hessian(f)[:, :2, :2], regression.hessian(m) / sigma**2)
    constant = 2 * torch.log(torch.tensor(sigma * (2 * torch.pi) ** 0.5)).double()
    torch.testing.assert_close(both.per_sample_loss(f, y), regression.per_sample_loss(m, y) / sigma**2 + constant)


f = torch.zeros(6, 3)
UNFIT = {
    "labels of another shape": ("binary", f, torch.zeros(6, 2), r"shape \(6, 3\); got shape \(6, 2\)"),
    "flat labels of several": ("binary", f, torch.zeros(6), r"shape \(6, 3\); got shape \(6,\)"),
    "labels -1 and 1": ("binary", f[:, :1], torch.tensor([-1, 1, 1, 1, -1, 1]), "or probabilities; got -1 to 1"),
    "negative counts": ("poisson", f, -torch.ones(6, 3), "Expected counts .* got -1 to -1"),
    "counts that are none": ("poisson", f, torch.full((6, 3), 0.5), "some of them no whole numbers"),
    "an odd number of outputs": ("heteroscedastic", f, torch.zeros(6, 1), "two outputs for each target, .* has 3"),
    "targets for all outputs": ("heteroscedastic", f[:, :2], torch.zeros(6, 2), r"shape \(6, 1\) or \(6,\); got"),
    "targets as integers": ("heteroscedastic", f[:, :2], torch.zeros(6).long(), "as floats; got torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_refuses_targets_that_do_not_fit(case):
    name, outputs, y, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        likelihood_named(name).check(outputs, y)
