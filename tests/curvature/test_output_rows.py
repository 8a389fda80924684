"""Rows of the outputs' curvature, chosen one by one, against dense second derivatives and gradients of the loss."""

import math
import time

import mpmath
import pytest
import torch
from oracles import output_gradient, output_hessian
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from debiased_laplace.curvature import output_rows
from debiased_laplace.curvature.classification import Classification
from debiased_laplace.curvature.likelihoods import Regression, likelihood_named
from debiased_laplace.curvature.output_rows import cotangents, row_sizes
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, Identity

GGN = GaussNewton(Classification())
CLASSES = pytest.mark.parametrize("C", [2, 3, 10, 128, 130, 1000])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(n, C, seed=0):
    """Outputs of samples that are sure, unsure, and unsure between two classes."""
    f = normal(n, C, seed=seed) * torch.linspace(0.3, 6, n, dtype=torch.float64)[:, None]
    f[1, :2] = f[1].max() + torch.tensor([9.0, 8.6], dtype=torch.float64)
    f[2, C - 1] = f[2].max() + 12
    return f


def unused(f):
    return f.new_zeros(len(f))


def all_rows(root, f, targets_or_noise):
    """Cotangents (n, r, C) of all slots, asked for in one call and in a random order."""
    n, r = row_sizes(root, f, targets_or_noise).shape
    order = torch.randperm(n * r, generator=torch.Generator().manual_seed(1))
    c = cotangents(root, f, targets_or_noise, order // r, order % r)
    assert c.dtype == torch.float64
    return torch.zeros_like(c).index_copy(0, order, c).view(n, r, f.shape[1])


def hessian(f):
    """Second derivative (C, C) of one sample's cross entropy, from differences that do not cancel."""
    p = torch.softmax(f.double(), 0)
    off = -torch.outer(p, p).fill_diagonal_(0)
    return off - torch.diag(off.sum(1))


def contract(root, f, targets_or_noise, expected, tolerance=1e-12):
    """Check that all rows have the sum of outer products that is expected, and their sizes."""
    sizes, c = row_sizes(root, f, targets_or_noise), all_rows(root, f, targets_or_noise)
    assert sizes.dtype == torch.float64
    assert sizes.shape == c.shape[:2]
    # rounding of small eigenvalues is relative to the largest
    largest = sizes.max(1, keepdim=True).values
    assert bool(((c.square().sum(2) - sizes).abs() <= 1e-10 * sizes + 1e-15 * largest).all())
    for rows, H in zip(c, expected, strict=True):
        error = float((rows.T @ rows - H).abs().max())
        assert error <= tolerance * float(H.abs().max())
    traces = torch.stack([H.trace() for H in expected])
    torch.testing.assert_close(sizes.sum(1), traces, rtol=10 * tolerance, atol=0)
    return sizes, c


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rows_of_classifications_sum_to_the_second_derivative(C, dtype):
    f = logits(5 if C < 1000 else 3, C).to(dtype)
    # what can be told from outputs in single precision is computed in double precision
    expected = [hessian(x) for x in f]
    if C <= 10:
        for x, H in zip(f, expected, strict=True):
            torch.testing.assert_close(output_hessian(x.double(), "classification"), H)
    elif C == 130:
        label = torch.tensor(3)
        torch.testing.assert_close(torch.func.hessian(cross_entropy)(f[0].double(), label), expected[0])
    sizes, c = contract(GGN, f, unused(f), expected)
    assert sizes.shape[1] == (C if C <= 128 else 32 + C)
    k = min(C, 128) if C <= 128 else 32
    assert bool((sizes[:, : k - 1] >= sizes[:, 1:k]).all())
    for rows, values, H in zip(c[:, :k], sizes[:, :k], expected, strict=True):
        # leading rows are orthogonal, up to rounding of the largest
        products = rows @ rows.T
        assert float((products - torch.diag(values)).abs().max()) < 1e-12 * float(values[0])
        if C <= 128:
            torch.testing.assert_close(values, torch.linalg.eigvalsh(H).flip(0), rtol=1e-12, atol=2e-12 * values[0])
            assert float(values[-1]) == 0 < float(values[0])


@pytest.mark.parametrize("C", [130, 1000])
def test_leading_classes_share_rows_and_every_other_class_has_its_own(C):
    f = logits(6, C)
    f[3] = 0  # none leads
    p = torch.softmax(f, 1)
    sizes, c = row_sizes(GGN, f, unused(f)), all_rows(GGN, f, unused(f))
    for i in range(len(f)):
        T = sorted(range(C), key=lambda k: (-float(p[i, k]), k))[:32]
        V = torch.stack([p[i, k].sqrt() * (torch.eye(C, dtype=p.dtype)[k] - p[i]) for k in T])
        torch.testing.assert_close(sizes[i, :32], torch.linalg.eigvalsh(V @ V.T).flip(0), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(c[i, :32].T @ c[i, :32], V.T @ V, rtol=0, atol=1e-14)
        own = p[i].sqrt()[:, None] * (torch.eye(C, dtype=p.dtype) - p[i])
        own[T] = 0
        torch.testing.assert_close(c[i, 32:], own, rtol=1e-8, atol=1e-15)
        assert bool((sizes[i, 32:] == 0).nonzero()[:, 0].tolist() == sorted(T))


@pytest.mark.parametrize("x", [0.3, 20.7, 40.0, 300.0, 700.0, 744.0])
@pytest.mark.parametrize("C", [2, 200])
def test_sure_samples_have_sizes_in_closed_form(C, x):
    """Of two classes: one eigenvalue 2 p (1 - p), with 1 - p = 1e-9 at 20.7, and below any rounding of 1 beyond."""
    f = torch.full((3, C), -1e4, dtype=torch.float64)
    f[:, 0], f[:, 1] = 5.0, 5.0 - x
    f[1] = f[1].flip(0)
    expected = 2 * math.exp(-x) / (1 + math.exp(-x)) ** 2
    sizes, c = contract(GGN, f, unused(f), [hessian(g) for g in f], 1e-12 if x < 700 else 1e-9)
    # at 744, 1 - p is the smallest positive number
    rounding = 1e-12 if x < 700 else 1e-9 if x == 700 else 0.5
    assert sizes.sum(1).tolist() == pytest.approx([expected] * 3, rel=rounding, abs=0)
    assert torch.equal(sizes[0], sizes[2])
    assert float(sizes[1, 0]) == pytest.approx(expected, rel=rounding, abs=0)
    largest = c[0, sizes[0].argmax()]
    torch.testing.assert_close(largest[0], -largest[1], rtol=1e-12, atol=0)
    if C == 2:
        assert (sizes > 0).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("shift", [0.0, -12.0, -25.0, -60.0, -400.0])
def test_several_eigenvalues_of_sure_samples_against_many_digits(shift):
    f = torch.tensor([0.7, 0.1, -0.4, -0.45, -8.0], dtype=torch.float64)
    f[1:] += shift
    with mpmath.workdps(400):
        e = [mpmath.exp(mpmath.mpf(float(x))) for x in f]
        p = [x / sum(e) for x in e]
        scale = 1 - p[0]
        H = mpmath.matrix(5, 5)
        for i in range(5):
            for j in range(5):
                H[i, j] = (p[i] * (1 - p[i]) if i == j else -p[i] * p[j]) / scale
        with mpmath.workdps(60):
            expected = sorted((float(v * scale) for v in mpmath.eigsy(H, eigvals_only=True)), reverse=True)
    sizes = row_sizes(GGN, f[None], unused(f[None]))[0]
    assert sizes[:4].tolist() == pytest.approx(expected[:4], rel=1e-9, abs=0)
    assert float(sizes[4]) == 0


@pytest.mark.parametrize("C", [3, 10, 1000])
def test_samples_without_curvature_have_no_rows(C):
    f = torch.zeros(3, C, dtype=torch.float32)
    f[0, 1], f[2, C - 1] = 2e3, 1e30
    f[1] = normal(C).float()
    for root in (GGN, EmpiricalFisher(Classification())):
        given = root.targets_or_noise(torch.tensor([1, 0, C - 1]), C, torch.Generator().manual_seed(0))
        sizes, c = row_sizes(root, f, given), all_rows(root, f, given)
        assert float(sizes[[0, 2]].abs().max()) == float(c[[0, 2]].abs().max()) == 0
        assert bool(sizes.isfinite().all() and c.isfinite().all())
        assert float(sizes[1].max()) > 0
        assert not bool((sizes < 0).any())


@CLASSES
def test_equal_rows_have_equal_sizes_in_any_company(C):
    f = logits(5, C)
    f = torch.cat([f, f.flip(0)])
    together = row_sizes(GGN, f, unused(f))
    assert torch.equal(together[:5], together[5:].flip(0))
    alone = torch.cat([row_sizes(GGN, x[None], unused(x[None])) for x in f])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=1e-300)
    assert torch.equal(alone > 0, together > 0)
    if C > 128:
        f[:, 40:] = f[:, 40:41] - 30  # classes of equal probability outside T
        of_classes = row_sizes(GGN, f, unused(f))[:, 72:]
        assert torch.equal(of_classes, of_classes[:, :1].expand_as(of_classes))


@pytest.mark.parametrize("C", [130, 1000])
def test_of_equal_classes_the_first_ones_lead_whatever_the_other_classes_are(C):
    f = torch.zeros(2, C, dtype=torch.float64)
    f[1, 100:] -= normal(C - 100).abs() + 1e-9
    f[1, 99] = 1e-9
    empty = row_sizes(GGN, f, unused(f))[:, 32:] == 0
    assert empty[0].nonzero()[:, 0].tolist() == [*range(32)]
    assert empty[1].nonzero()[:, 0].tolist() == [*range(31), 99]


def test_sizes_follow_the_classes():
    f, order = logits(4, 300), torch.randperm(300, generator=torch.Generator().manual_seed(2))
    sizes, permuted = row_sizes(GGN, f, unused(f)), row_sizes(GGN, f[:, order], unused(f))
    torch.testing.assert_close(permuted[:, :32], sizes[:, :32], rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(permuted[:, 32:], sizes[:, 32:][:, order], rtol=1e-10, atol=0)


@pytest.mark.parametrize("C", [10, 1000])
def test_two_confused_classes_have_one_direction(C):
    f = normal(2, C, seed=4) - 12
    f[:, 3], f[:, 7] = 0.2, -0.3
    sizes, c = row_sizes(GGN, f, unused(f)), all_rows(GGN, f, unused(f))
    assert float((sizes[:, 0] / sizes.sum(1)).min()) > 0.95
    # while the two classes' own rows would share it
    p = torch.softmax(f, 1)
    own = p[0, [3, 7]] * (torch.eye(C, dtype=p.dtype)[[3, 7]] - p[0]).square().sum(1)
    assert 0.3 < float(own[0] / own.sum()) < 0.7
    direction = c[0, 0] / c[0, 0].norm()
    assert float(direction[3] * direction[7]) == pytest.approx(-0.5, abs=0.01)


@pytest.mark.parametrize("noise", [None, (0.5, 3.0, 1.2, 0.5)], ids=["equal noise", "noise of each output"])
@pytest.mark.parametrize("C", [4, 300])
def test_rows_of_regressions_are_unit_vectors(C, noise):
    likelihood = Regression(None if noise is None else noise * (C // 4))
    root, f = GaussNewton(likelihood), normal(3, C)
    y = normal(1, C, seed=1)
    H = torch.func.hessian(lambda x: likelihood.loss(x[None], y))(f[0])
    sizes, c = contract(root, f, unused(f), [H] * 3, 1e-15)
    assert row_sizes(root, f, unused(f)).shape[1] == C
    assert torch.equal(sizes, H.diagonal().sort(descending=True).values.expand(3, C))
    assert bool(((c != 0).sum(2) == 1).all())
    sizes[0] = 0
    assert float(sizes[1].min()) > 0  # not memory of one sample
    torch.testing.assert_close(output_hessian(f[0], "regression") if noise is None else H, H)


def targets_of(kind, n, C):
    labels = torch.arange(n) % C
    if kind == "sure soft labels":
        return torch.zeros(n, C).scatter(1, labels[:, None], 1)
    real = normal(n, C, seed=6)
    return {"labels": labels, "soft labels": torch.softmax(2 * real, 1), "real": real}[kind]


@pytest.mark.parametrize("kind", ["labels", "soft labels", "sure soft labels"])
@pytest.mark.parametrize("weighted", [False, True], ids=["no class weights", "class weights"])
@pytest.mark.parametrize("C", [2, 10, 130])
def test_class_weights_and_soft_labels_are_those_of_torch(C, weighted, kind):
    """Times the samples' weights, rows are those of CrossEntropyLoss with class weights."""
    w = normal(C, seed=5).abs() if weighted else None
    likelihood = likelihood_named("classification", w)
    f, y = logits(5, C), targets_of(kind, 5, C)
    y = y.double() if y.is_floating_point() else y
    m = likelihood.weights(y)
    m = torch.ones(5, dtype=torch.float64) if m is None else m

    def loss(x, t):
        return cross_entropy(x, t, weight=w, reduction="sum")

    H = torch.stack([torch.func.hessian(loss)(x, t) for x, t in zip(f, y, strict=True)])
    sizes, c = row_sizes(GaussNewton(likelihood), f, unused(f)), all_rows(GaussNewton(likelihood), f, unused(f))
    torch.testing.assert_close(c.mT @ c * m[:, None, None], H, rtol=1e-9, atol=1e-13)
    g = torch.stack([torch.func.grad(loss)(x, t) for x, t in zip(f, y, strict=True)])
    root = EmpiricalFisher(likelihood)
    sizes, c = row_sizes(root, f, y), all_rows(root, f, y)
    torch.testing.assert_close(c[:, 0] * m[:, None], g, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(sizes[:, 0], c[:, 0].square().sum(1), rtol=1e-14, atol=0)


def test_a_soft_label_without_weight_has_the_gradient_of_the_likelihood():
    likelihood = likelihood_named("classification", [0.0, 0.0, 2.0])
    root, f = EmpiricalFisher(likelihood), logits(3, 3)
    y = torch.tensor([[0.4, 0.6, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(all_rows(root, f, y)[:, 0], likelihood.gradient(f, y))


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("C", [3, 130])
def test_the_empirical_fisher_has_the_gradient(kind, C):
    root, f = EmpiricalFisher(likelihood_named(kind)), logits(5, C)
    y = targets_of("labels" if kind == "classification" else "real", 5, C)
    g = torch.stack([output_gradient(x, t, kind) for x, t in zip(f, y, strict=True)])
    _, c = contract(root, f, y, g[:, :, None] * g[:, None], 1e-9)
    torch.testing.assert_close(c[:, 0], g, rtol=1e-9, atol=1e-15)  # with its sign
    if C == 3 and kind == "regression":
        one = EmpiricalFisher(Regression())
        flat = row_sizes(one, f[:, :1], y[:, 0])
        torch.testing.assert_close(flat[:, 0], (f[:, 0] - y[:, 0]) ** 2)


@pytest.mark.parametrize("x", [20.7, 40.0, 300.0])
@pytest.mark.parametrize("kind", ["labels", "sure soft labels"])
def test_gradients_of_sure_samples_do_not_cancel(kind, x):
    f = torch.full((3, 3), -x, dtype=torch.float64)
    f[:, 1] = 0
    q = 2 * math.exp(-x) / (1 + 2 * math.exp(-x))
    root = EmpiricalFisher(Classification())
    c = all_rows(root, f, targets_of(kind, 3, 3))[:, 0]
    assert c[1].tolist() == pytest.approx([q / 2, -q, q / 2], rel=1e-13)
    assert c[0].tolist() == pytest.approx([-1 + q / 2, 1 - q, q / 2], rel=1e-13)
    assert float(row_sizes(root, f, targets_of(kind, 3, 3))[1]) == pytest.approx(1.5 * q**2, rel=1e-12, abs=0)


@pytest.mark.parametrize("C", [10, 1000])
def test_chosen_rows_do_not_depend_on_what_else_is_chosen(C, monkeypatch):
    f = logits(7, C)
    sizes, c = row_sizes(GGN, f, unused(f)), all_rows(GGN, f, unused(f))
    r = c.shape[1]
    samples = torch.tensor([5, 0, 5, 2, 2, 6, 5])  # out of order, twice the same, some of none
    rows = torch.tensor([1, 0, 1, r - 2, 3, r - 1, 0])
    torch.testing.assert_close(cotangents(GGN, f, unused(f), samples, rows), c[samples, rows])
    none = torch.zeros(0, dtype=torch.long)
    assert cotangents(GGN, f, unused(f), none, none).shape == (0, C)
    assert row_sizes(GGN, f[:0], unused(f[:0])).shape == (0, r)
    # nor on how many samples are computed at once
    monkeypatch.setattr(output_rows, "CHUNK_BYTES", 2 * 8 * (8 * C + 8 * min(C, 32) ** 2) + 1)
    operations = _Operations()
    with operations:
        torch.testing.assert_close(row_sizes(GGN, f, unused(f)), sizes, rtol=1e-10, atol=1e-300)
    assert operations.names.count("aten._softmax.default") == 4
    torch.testing.assert_close(all_rows(GGN, f, unused(f)), c)


class _Operations(TorchDispatchMode):
    """Record the operations, and the largest number of elements that one of them returns."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return found


ROOTS = {
    "GGN": GGN,
    "EF": EmpiricalFisher(Classification()),
    "GGN of a regression": GaussNewton(Regression()),
    "EF of a regression": EmpiricalFisher(Regression()),
}


@pytest.mark.parametrize("name", ROOTS)
def test_a_vocabulary_takes_little_memory_and_time(name):
    C, n, root = 49_152, 16, ROOTS[name]
    f = 2 * normal(n, C)
    f[:, 5] = torch.linspace(0, 40, n, dtype=torch.float64)
    f[3, 6] = f[3, 5] = 30
    given = targets_of("real", n, C) if "regression" in name else torch.arange(n)
    given = root.targets_or_noise(given, C, torch.Generator().manual_seed(1))
    r = row_sizes(root, f, given).shape[1]
    samples = torch.arange(n).repeat_interleave(3)
    rows = torch.tensor([0, min(2, r - 1), min(32 + 17, r - 1)]).repeat(n)
    counted = _Operations()
    start = time.perf_counter()
    with counted:
        sizes, c = row_sizes(root, f, given), cotangents(root, f, given, samples, rows)
    assert time.perf_counter() - start < 20  # a tenth of a second, on a machine that does nothing else
    assert counted.largest <= max(n * r, len(c) * C)  # no C x C matrix, of one sample or of all
    few, f2, given2, samples2, rows2 = _Operations(), f[:2], given[:2], samples[:6], rows[:6]
    with few:
        row_sizes(root, f2, given2)
        cotangents(root, f2, given2, samples2, rows2)
    assert len(few.names) == len(counted.names)  # no loop over samples or classes
    assert sizes.shape == (n, r)
    torch.testing.assert_close(c.square().sum(1), sizes[samples, rows], rtol=1e-9, atol=1e-300)
    if name == "GGN":
        # tr Λ = 1 - |p|² = sum of p (1 - p)
        p = torch.softmax(f, 1)
        q = (1 - p).scatter(1, f.argmax(1, keepdim=True), p.sort(1).values[:, :-1].sum(1, keepdim=True))
        torch.testing.assert_close(sizes.sum(1), (p * q).sum(1), rtol=1e-12, atol=0)
        assert float(sizes[15].sum()) < 1e-10
        assert float(sizes[3, 0] / sizes[3].sum()) > 0.999  # two confused classes


def test_other_roots_are_refused():
    f = normal(2, 3)
    with pytest.raises(NotImplementedError, match="Identity"):
        row_sizes(Identity(), f, unused(f))
    with pytest.raises(NotImplementedError, match="Identity"):
        cotangents(Identity(), f, unused(f), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("C", [3, 10, 128, 1000])
def test_rows_are_the_same_on_a_gpu(C):
    f = logits(5, C)
    sizes = row_sizes(GGN, f.cuda(), unused(f).cuda())
    torch.testing.assert_close(sizes.cpu(), row_sizes(GGN, f, unused(f)), rtol=1e-9, atol=1e-16)
    r = sizes.shape[1]
    c = cotangents(GGN, f.cuda(), unused(f).cuda(), torch.arange(5).repeat_interleave(r), torch.arange(r).repeat(5))
    c = c.view(5, r, C)
    H = torch.stack([hessian(x) for x in f])
    torch.testing.assert_close((c.mT @ c).cpu(), H, rtol=1e-9, atol=1e-14)
