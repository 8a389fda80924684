import math
from collections.abc import Callable

import pytest
import torch
from models import targets
from oracles import output_gradient, output_hessian
from torch import Tensor
from torch.func import vmap

from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.roots import (
    EmpiricalFisher,
    GaussNewton,
    Identity,
    MonteCarloGaussNewton,
    OutputRoot,
)

KINDS = ["classification", "regression"]
n_samples, C = 6, 4
every_kind = pytest.mark.parametrize("kind", KINDS)

ROOTS: dict[str, Callable[[str], OutputRoot]] = {
    "GGN": lambda kind: GaussNewton(likelihood_named(kind)),
    "EF": lambda kind: EmpiricalFisher(likelihood_named(kind)),
    "Monte Carlo, one draw": lambda kind: MonteCarloGaussNewton(likelihood_named(kind), 1),
    "Monte Carlo, three draws": lambda kind: MonteCarloGaussNewton(likelihood_named(kind), 3),
    "Monte Carlo, more draws than outputs": lambda kind: MonteCarloGaussNewton(likelihood_named(kind), 9),
    "Jacobian": lambda kind: Identity(),
}
N_COLUMNS = dict(zip(ROOTS, [C, 1, 1, 3, 9, C], strict=True))
every_root = pytest.mark.parametrize("name", ROOTS)


def outputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(n_samples, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def known(root: OutputRoot, kind: str, seed: int = 0) -> Tensor:
    return root.targets_or_noise(targets(kind, n_samples, C), C, torch.Generator().manual_seed(seed))


def dense(root: OutputRoot, f: Tensor, targets_or_noise: Tensor) -> Tensor:
    """Return S of each sample, computed one at a time."""
    return torch.stack([root.columns(f[i], targets_or_noise[i], slice(None)) for i in range(len(f))])


@every_kind
@every_root
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_columns_transposed_and_product_are_of_one_root(name: str, kind: str, dtype: torch.dtype) -> None:
    root, f = ROOTS[name](kind), outputs(dtype)
    targets_or_noise = known(root, kind)
    S = dense(root, f, targets_or_noise)
    r = root.n_columns(C)
    assert r == N_COLUMNS[name]
    assert S.shape == (n_samples, C, r)
    assert S.dtype == dtype
    assert len(targets_or_noise) == n_samples
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(n_samples, C, 5, generator=generator, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(root.transposed(f, targets_or_noise, X), S.mT @ X)
    for x in X.unbind(-1):
        torch.testing.assert_close(root.product(f, targets_or_noise, x), (S @ S.mT @ x[..., None])[..., 0])


@every_kind
@every_root
def test_columns_come_a_few_at_a_time_and_for_all_samples_at_once(name: str, kind: str) -> None:
    root, f = ROOTS[name](kind), outputs()
    targets_or_noise = known(root, kind)
    S = dense(root, f, targets_or_noise)
    r = root.n_columns(C)
    for step in {1, 2, r}:
        blocks = [slice(i, i + step) for i in range(0, r, step)]
        for found in (
            [
                torch.stack([root.columns(f[i], targets_or_noise[i], block) for i in range(n_samples)])
                for block in blocks
            ],
            [vmap(lambda o, s, block=block: root.columns(o, s, block))(f, targets_or_noise) for block in blocks],
        ):
            torch.testing.assert_close(torch.cat(found, -1), S)


@every_kind
@every_root
@pytest.mark.parametrize("chunk", [2**20, 1], ids=["all columns at once", "one column at a time"])
def test_sums_and_quadratic_forms_are_those_of_the_columns(name: str, kind: str, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr("debiased_laplace.curvature.roots.CHUNK_BYTES", chunk)
    root, f = ROOTS[name](kind), outputs()
    targets_or_noise = known(root, kind)
    S = dense(root, f, targets_or_noise)
    generator = torch.Generator().manual_seed(5)
    Q, weights = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((C, 3), (n_samples,)))
    torch.testing.assert_close(root.quadratics(f, targets_or_noise, Q), (S.mT @ Q).square().sum(1))
    torch.testing.assert_close(root.quadratics(f, targets_or_noise, None), S.square().sum(2))
    torch.testing.assert_close(
        root.weighted_sum(f, targets_or_noise, weights), (weights[:, None, None] * (S @ S.mT)).sum(0)
    )


@pytest.mark.parametrize("doubt", [1e-3, 1e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("n_classes", [10, 300])
def test_the_curvature_of_confident_samples_is_not_lost(doubt: float, n_classes: int) -> None:
    """Outputs in single precision, whose most probable class has 1 - p = doubt; the oracle's origin is that class."""
    generator = torch.Generator().manual_seed(6)
    f = torch.randn(3, n_classes, generator=generator)
    top = torch.tensor([4, 0, n_classes - 1])
    f = f.scatter(1, top[:, None], 0.0)
    others = f.scatter(1, top[:, None], -torch.inf).logsumexp(1)
    f = f.scatter(1, top[:, None], (others - math.log(doubt))[:, None])
    Q, _ = torch.linalg.qr(torch.randn(n_classes, n_classes, generator=generator, dtype=torch.float64))
    # weights of the classes relative to the most probable one, whose vector is the origin
    w = (f.double() - f.double().gather(1, top[:, None])).exp()
    total, x = w.sum(1, keepdim=True), Q - Q[top][:, None]
    first, second = (torch.einsum("nc,nck->nk", w, x.pow(i)) for i in (1, 2))
    expected = second / total - (first / total).square()
    root = GaussNewton(likelihood_named("classification"))
    found = root.quadratics(f, torch.zeros(3), Q)
    torch.testing.assert_close(expected.sum(1) / doubt, torch.full((3,), 2.0).double(), rtol=0.1, atol=0.0)
    torch.testing.assert_close(found / doubt, expected / doubt, rtol=1e-9, atol=1e-13)
    weights = torch.tensor([0.5, 2.0, 3.0])
    of_sum = (Q * (root.weighted_sum(f, torch.zeros(3), weights) @ Q)).sum(0)
    torch.testing.assert_close(of_sum / doubt, (weights.double() @ expected) / doubt, rtol=1e-9, atol=1e-12)


@every_kind
def test_the_ggns_root_squares_to_the_second_derivative(kind: str) -> None:
    root, f = GaussNewton(likelihood_named(kind)), outputs()
    S = dense(root, f, known(root, kind))
    torch.testing.assert_close(S @ S.mT, torch.stack([output_hessian(o, kind) for o in f]))


@every_kind
def test_the_empirical_fisher_is_of_the_negative_log_likelihoods_gradient(kind: str) -> None:
    root, f, y = EmpiricalFisher(likelihood_named(kind)), outputs(), targets(kind, n_samples, C)
    S = dense(root, f, known(root, kind))
    g = torch.stack([output_gradient(o, t, kind) for o, t in zip(f, y, strict=True)])
    torch.testing.assert_close(S @ S.mT, g[:, :, None] * g[:, None, :])
    torch.testing.assert_close(S[..., 0], g)  # including its sign: rows are gradients of the loss
    # and the oracle is the gradient of the loss as torch has it
    leaf = f.clone().requires_grad_()
    likelihood_named(kind).loss(leaf, y).backward()
    torch.testing.assert_close(leaf.grad, g)


def test_the_plain_jacobian_has_unit_roots() -> None:
    S = dense(Identity(), outputs(), torch.zeros(n_samples))
    assert torch.equal(S, torch.eye(C, dtype=torch.float64).expand(n_samples, C, C))


@every_kind
@pytest.mark.parametrize("n_draws", [1, 3])
def test_monte_carlo_is_unbiased_for_the_ggn(kind: str, n_draws: int) -> None:
    root, n = MonteCarloGaussNewton(likelihood_named(kind), n_draws), 50_000
    f = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    targets_or_noise = root.targets_or_noise(targets(kind, n, 3), 3, torch.Generator().manual_seed(1))
    S = root.columns(f.expand(n, 3), targets_or_noise, slice(None))
    drawn, expected = S @ S.mT, output_hessian(f, kind)
    errors = drawn.std(0) / n**0.5
    z = (drawn.mean(0) - expected) / errors
    assert float(z.abs().max()) < 4.5
    # power: a curvature that is 5 % off would be significant
    assert float((0.05 * expected.diagonal() / errors.diagonal()).min()) > 4.5
    # more draws, less spread: the variance of a mean
    once = MonteCarloGaussNewton(likelihood_named(kind), 1)
    other = once.targets_or_noise(targets(kind, n, 3), 3, torch.Generator().manual_seed(2))
    alone = once.columns(f.expand(n, 3), other, slice(None))
    ratios = ((alone @ alone.mT).var(0) / drawn.var(0)).diagonal()
    assert float((ratios / n_draws - 1).abs().max()) < 0.1


def test_monte_carlo_over_every_label_is_exactly_the_ggn() -> None:
    # the partner of the statistical test: labels weighted by their probabilities instead of drawn
    f = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    likelihood, p = likelihood_named("classification"), torch.softmax(f, 0)
    gradients = [likelihood.gradient(f, torch.tensor(label)) for label in range(3)]
    total = sum(w * torch.outer(g, g) for w, g in zip(p, gradients, strict=True))
    torch.testing.assert_close(total, output_hessian(f, "classification"))


@every_kind
def test_draws_do_not_depend_on_the_targets(kind: str) -> None:
    root = MonteCarloGaussNewton(likelihood_named(kind), 3)
    y = targets(kind, n_samples, C)
    sides = [root.targets_or_noise(t, C, torch.Generator().manual_seed(1)) for t in (y, y.flip(0) * 0)]
    assert torch.equal(*sides)
    assert not torch.equal(root.targets_or_noise(y, C, torch.Generator().manual_seed(2)), sides[0])
    # draws of different samples, and of one sample, are independent
    assert len(sides[0].flatten(2)[..., 0].flatten().unique()) == 3 * n_samples


@every_kind
def test_draws_can_be_split_into_batches(kind: str) -> None:
    root = MonteCarloGaussNewton(likelihood_named(kind), 3)
    targets_or_noise = known(root, kind)
    whole = dense(root, outputs(), targets_or_noise)
    parts = [dense(root, f, s) for f, s in zip(outputs().split(4), targets_or_noise.split(4), strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_kinds_have_the_names_of_the_field() -> None:
    assert [ROOTS[name]("regression").kind for name in ROOTS] == ["GGN", "EF", *["Monte-Carlo GGN"] * 3, "Jacobian"]
