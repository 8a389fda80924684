import math

import pytest
import torch
from oracles import naive_mean_field
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from debiased_laplace.predictive import links, mean_field
from debiased_laplace.predictive.mean_field import GaussianLogits

N = 4


def gaussians(C, logits=3.0, spread=2.0, rank=None, seed=0):
    """Means and covariances of N inputs' logits, most of the variance shared by all logits."""
    generator = torch.Generator().manual_seed(seed)
    mean = logits * torch.randn(N, C, generator=generator, dtype=torch.float64)
    A = spread * torch.randn(N, C, rank or C, generator=generator, dtype=torch.float64) / (rank or C) ** 0.5
    return mean, A @ A.mT + 9 * spread**2


def draws(mean, covariance, n=200_000):
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    noise = torch.randn(n // 2, *mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    deviations = torch.einsum("sni,nji->snj", noise, root)
    return torch.cat([mean + deviations, mean - deviations]).softmax(-1)


def total_variation(p, q):
    return float((p - q).abs().sum(-1).mean() / 2)


CASES = {  # and a bound of the total variation, about twice the observed one
    "two classes": (2, {}, 0.001),
    "three classes, hardly any variance": (3, {"spread": 0.05}, 2e-5),
    "ten classes": (10, {}, 0.007),
    "ten classes, a wide posterior": (10, {"spread": 8.0}, 0.03),
    "ten classes, rank 2": (10, {"rank": 2}, 0.007),
    "thirty classes, nothing known": (30, {"logits": 0.1}, 0.025),
}


@pytest.mark.parametrize("case", CASES)
def test_close_to_the_mean_over_draws(case):
    C, options, tolerance = CASES[case]
    mean, covariance = gaussians(C, **options)
    exact = draws(mean, covariance)
    logits = GaussianLogits.of_covariance(mean, covariance)
    p, information = logits.probabilities_and_information()
    assert total_variation(p, exact.mean(0)) < tolerance
    torch.testing.assert_close(p, logits.probabilities())
    expected = torch.special.entr(exact.mean(0)).sum(-1) - torch.special.entr(exact).sum(-1).mean(0)
    torch.testing.assert_close(information, expected, rtol=0.05, atol=1e-5)
    # power: the variance matters, and the probit link counts a common shift as uncertainty
    probit = links.probit(mean, covariance.diagonal(dim1=-2, dim2=-1))
    for other in (mean.softmax(-1), probit) if options.get("logits") != 0.1 else (mean.softmax(-1),):
        assert total_variation(other, exact.mean(0)) > 3 * tolerance


@pytest.mark.parametrize("variance", [1e-4, 0.3, 5.0, 80.0, 1e4])
def test_two_classes_are_the_logistic_gaussian_integral_of_their_difference(variance):
    means = torch.tensor([-3.0, -0.4, 0.0, 0.7, 2.5, 30.0], dtype=torch.float64)
    mean = torch.stack([torch.zeros_like(means), means], dim=1)
    covariance = torch.tensor([[variance / 4, -variance / 4], [-variance / 4, variance / 4]], dtype=torch.float64)
    p = GaussianLogits.of_covariance(mean, covariance.expand(6, 2, 2)).probabilities()[:, 1]
    s = math.sqrt(variance)
    for found, m in zip(p, means.tolist(), strict=True):
        expected, _ = quad(lambda z, m=m: norm.pdf(z) * expit(m + s * z), -9, 9, points=[-m / s], limit=500)
        assert float(found) == pytest.approx(expected, abs=2e-3)


def test_exact_to_first_order_in_the_covariance():
    mean, covariance = gaussians(6)
    s = mean.softmax(-1)
    d = covariance.diagonal(dim1=-2, dim2=-1)
    V = d[:, :, None] + d[:, None, :] - 2 * covariance
    v = (V @ s[:, :, None])[..., 0]
    slope = s * (v - (s * v).sum(-1, keepdim=True)) / 2
    small = 1e-5
    found = (GaussianLogits.of_covariance(mean, small * covariance).probabilities() - s) / small
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))


def test_without_variance_it_is_the_softmax():
    mean, covariance = gaussians(7)
    p, information = GaussianLogits.of_covariance(mean, 0 * covariance).probabilities_and_information()
    torch.testing.assert_close(p, mean.softmax(-1), rtol=1e-9, atol=1e-12)
    assert float(information.max()) < 1e-9


def test_a_shift_of_all_logits_has_no_effect():
    mean, covariance = gaussians(8)
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    moved = GaussianLogits.of_covariance(mean + 17.0, covariance + 1e4)
    torch.testing.assert_close(moved.probabilities(), p, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(
        moved.total_variance, GaussianLogits.of_covariance(mean, covariance).total_variance, rtol=1e-6, atol=1e-6
    )
    # in single precision up to the rounding of the shift
    single = GaussianLogits.of_covariance(mean.float(), (covariance + 1e4).float()).probabilities()
    assert total_variation(single.double(), p) < 1e-3


def test_the_order_of_classes_has_no_effect():
    mean, covariance = gaussians(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    turned = GaussianLogits.of_covariance(mean[:, order], covariance[:, order][:, :, order]).probabilities()
    torch.testing.assert_close(turned, p[:, order], rtol=1e-9, atol=1e-12)


def test_exchangeable_classes_have_about_equal_probabilities():
    C = 30
    p = GaussianLogits.of_covariance(torch.zeros(1, C), 25 * torch.eye(C)[None]).probabilities()
    assert float((p - 1 / C).abs().sum() / 2) < 0.05
    # two classes that change rank exchange nodes: a step of the size of the quadrature error
    mean = torch.tensor([[1.0 + 1e-6, 1.0, 0.3], [1.0 - 1e-6, 1.0, 0.3]], dtype=torch.float64)
    S = torch.tensor([[4.0, 1.0, 0.5], [1.0, 9.0, -2.0], [0.5, -2.0, 3.0]], dtype=torch.float64).expand(2, 3, 3)
    before, after = GaussianLogits.of_covariance(mean, S).probabilities()
    assert total_variation(before, after) < 0.005


EXTREMES = {
    "logits of 10,000": (1e4, 1.0),
    "a variance of 1e12": (1.0, 1e12),
    "both": (1e4, 1e12),
    "nothing": (0.0, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_stay_probabilities(case, dtype):
    logit, variance = EXTREMES[case]
    mean = torch.tensor([[logit, 0.0, -logit, 0.3 * logit]], dtype=dtype).requires_grad_()
    covariance = variance * torch.eye(4)[None]
    if dtype in (torch.float16, torch.bfloat16) and variance < 1e12:
        covariance = covariance.to(dtype)
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    assert p.dtype == dtype
    assert bool((p >= 0).all())
    assert float(p.detach().double().sum()) == pytest.approx(1, abs=4 * torch.finfo(dtype).eps)
    p[0, 0].backward()
    assert bool(mean.grad.isfinite().all())


def test_covariances_that_are_indefinite_by_rounding():
    mean, covariance = gaussians(6, rank=2)
    spoilt = covariance - 1e-5 * torch.eye(6, dtype=torch.float64)
    found = GaussianLogits.of_covariance(mean, spoilt).probabilities()
    torch.testing.assert_close(found, GaussianLogits.of_covariance(mean, covariance).probabilities(), rtol=0, atol=1e-3)


def test_invalid_gaussians_are_refused():
    mean, covariance = gaussians(140)
    own, last = covariance.clone(), int(mean[0].argmin())
    own[0, last, last] = math.inf  # of a remaining class
    wrong = {
        "finite means": (mean * math.inf, covariance),
        "finite covariance": (mean, covariance * math.nan),
        "finite variances": (mean, own),
    }
    for words, (m, S) in wrong.items():
        with pytest.raises(ValueError, match=words):
            GaussianLogits.of_covariance(m, S).probabilities()


@pytest.mark.parametrize("C", [4, 5])
def test_derivatives(C, monkeypatch):
    monkeypatch.setattr(mean_field, "LEADING", 4)
    mean, covariance = gaussians(C)
    root = torch.linalg.cholesky(covariance)[:2].requires_grad_()
    mean = mean[:2].requires_grad_()

    def probabilities(m, L):
        return GaussianLogits.of_covariance(m, L @ L.mT).probabilities()

    assert torch.autograd.gradcheck(probabilities, (mean, root))


@pytest.mark.parametrize("n_leading", [3, 64])
def test_independent_logits(n_leading, monkeypatch):
    monkeypatch.setattr(mean_field, "LEADING", n_leading)
    mean, covariance = gaussians(7)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    of_variances = GaussianLogits.of_variances(mean, variance)
    dense = GaussianLogits.of_covariance(mean, torch.diag_embed(variance))
    for name in ("order", "means", "covariance", "variances", "total_variance"):
        torch.testing.assert_close(getattr(of_variances, name), getattr(dense, name))


def test_total_variance_is_that_of_centred_logits(monkeypatch):
    monkeypatch.setattr(mean_field, "LEADING", 3)
    mean, covariance = gaussians(5)
    H = torch.eye(5, dtype=torch.float64) - 1 / 5
    expected = (H @ covariance @ H).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(GaussianLogits.of_covariance(mean, covariance).total_variance, expected)


@pytest.mark.parametrize("n_leading", [3, 5, 12])
def test_remaining_classes_have_one_weight(n_leading, monkeypatch):
    monkeypatch.setattr(mean_field, "LEADING", n_leading)
    mean, covariance = gaussians(12)
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    fixed = mean_field.nodes(n_leading - 1, torch.float64, torch.device("cpu")).T
    for i in range(N):
        expected = naive_mean_field(mean[i], covariance[i], fixed)
        torch.testing.assert_close(p[i], expected, rtol=1e-5, atol=1e-6)


MANY = {  # standard deviations of the means, of each logit, and of five common factors; total variation
    "little variance": (2.0, 0.5, 0.0, 0.01),
    "independent": (2.0, 1.5, 0.0, 0.025),
    "correlated": (2.0, 0.5, 1.5, 0.06),
    "equal means": (0.0, 1.0, 0.0, 0.06),
}


@pytest.mark.parametrize("case", MANY)
def test_two_hundred_classes(case):
    logits, own, factors, tolerance = MANY[case]
    generator = torch.Generator().manual_seed(4)
    mean = logits * torch.randn(N, 200, generator=generator, dtype=torch.float64)
    A = factors * torch.randn(N, 200, 5, generator=generator, dtype=torch.float64) / 5**0.5
    covariance = A @ A.mT + own**2 * torch.eye(200, dtype=torch.float64)
    p, information = GaussianLogits.of_covariance(mean, covariance).probabilities_and_information()
    exact = draws(mean, covariance, n=20_000)
    assert total_variation(p, exact.mean(0)) < tolerance
    torch.testing.assert_close(p.sum(-1), torch.ones(N, dtype=torch.float64))
    expected = torch.special.entr(exact.mean(0)).sum(-1) - torch.special.entr(exact).sum(-1).mean(0)
    torch.testing.assert_close(information, expected, rtol=0.25, atol=0)
    # power: without the information among the remaining classes, or with the softmax of the means
    assert logits == 0 or total_variation(mean.softmax(-1), exact.mean(0)) > 1.5 * total_variation(p, exact.mean(0))


def test_nodes_have_the_moments_of_a_normal_and_touch_no_generator():
    state = torch.random.get_rng_state()
    z = mean_field.nodes(11, torch.float64, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(z @ z.T / z.shape[1], torch.eye(11, dtype=torch.float64), rtol=0, atol=1e-12)
    third = torch.einsum("is,js,ks->ijk", z, z, z) / z.shape[1]
    assert float(third.abs().max()) < 1e-12


def test_inputs_in_chunks(monkeypatch):
    mean, covariance = gaussians(6)
    logits = GaussianLogits.of_covariance(mean, covariance)
    whole = logits.probabilities_and_information()
    monkeypatch.setattr(mean_field, "CHUNK_BYTES", 4 * 7 * 512 * 8 * 3)
    for found, expected in zip(logits.probabilities_and_information(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_nodes_made_in_inference_mode_can_be_differentiated_later():
    mean_field.nodes.cache_clear()
    mean, covariance = gaussians(6)
    with torch.inference_mode():
        GaussianLogits.of_covariance(mean, covariance).probabilities()
    mean = mean.clone().requires_grad_()
    GaussianLogits.of_covariance(mean, covariance.clone()).probabilities()[:, 0].sum().backward()
    assert float(mean.grad.abs().max()) > 0
