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


CASES = {
    "two classes": (2, {}),
    "three classes, hardly any variance": (3, {"spread": 0.05}),
    "ten classes": (10, {}),
    "ten classes, a wide posterior": (10, {"spread": 8.0}),
    "ten classes, rank 2": (10, {"rank": 2}),
    "thirty classes, nothing known": (30, {"logits": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_close_to_the_mean_over_draws(case):
    C, options = CASES[case]
    mean, covariance = gaussians(C, **options)
    exact = draws(mean, covariance)
    logits = GaussianLogits.of_covariance(mean, covariance)
    p, information = logits.probabilities_and_information()
    # docs/predictive.md: the wider the posterior, the further the nodes
    assert total_variation(p, exact.mean(0)) < (0.03 if options.get("spread") == 8 else 0.015)
    torch.testing.assert_close(p, logits.probabilities())
    expected = torch.special.entr(exact.mean(0)).sum(-1) - torch.special.entr(exact).sum(-1).mean(0)
    torch.testing.assert_close(information, expected, rtol=0.05, atol=2e-3)
    if options.get("spread") != 0.05:
        # the probit link takes the shared variance for doubt about the label
        probit = links.probit(mean, covariance.diagonal(dim1=-2, dim2=-1))
        assert options.get("logits") == 0.1 or total_variation(probit, exact.mean(0)) > 0.05


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
        mackay = 1 / (1 + math.exp(-m / math.sqrt(1 + math.pi / 8 * variance)))
        assert float(found) == pytest.approx(mackay, abs=0.02)


def test_exact_to_second_order_in_the_variance():
    mean, covariance = gaussians(6)
    s = mean.softmax(-1)
    d = covariance.diagonal(dim1=-2, dim2=-1)
    V = d[:, :, None] + d[:, None, :] - 2 * covariance
    v = (V @ s[:, :, None])[..., 0]
    slope = s * (v - (s * v).sum(-1, keepdim=True)) / 2
    small = 1e-5
    found = (GaussianLogits.of_covariance(mean, small * covariance).probabilities() - s) / small
    torch.testing.assert_close(found, slope, rtol=1e-2, atol=1e-4 * float(slope.abs().max()))


def test_without_variance_it_is_the_softmax():
    mean, covariance = gaussians(7)
    p, information = GaussianLogits.of_covariance(mean, 0 * covariance).probabilities_and_information()
    torch.testing.assert_close(p, mean.softmax(-1), rtol=1e-9, atol=1e-12)
    assert float(information.max()) < 1e-9


def test_what_all_logits_share_has_no_effect():
    mean, covariance = gaussians(8)
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    moved = GaussianLogits.of_covariance(mean + 17.0, covariance + 1e4)
    torch.testing.assert_close(moved.probabilities(), p, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(
        moved.total_variance, GaussianLogits.of_covariance(mean, covariance).total_variance, rtol=1e-6, atol=1e-6
    )


def test_classes_have_no_order():
    mean, covariance = gaussians(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    turned = GaussianLogits.of_covariance(mean[:, order], covariance[:, order][:, :, order]).probabilities()
    torch.testing.assert_close(turned, p[:, order], rtol=1e-9, atol=1e-12)


EXTREMES = {
    "logits of 10,000": (1e4, 1.0),
    "a variance of 1e12": (1.0, 1e12),
    "an infinite variance": (1.0, math.inf),
    "both": (1e4, 1e12),
    "nothing": (0.0, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_stay_probabilities(case, dtype):
    logit, variance = EXTREMES[case]
    mean = torch.tensor([[logit, 0.0, -logit, 0.3 * logit]], dtype=dtype).requires_grad_()
    covariance = torch.full((1, 4, 4), variance) if variance == math.inf else variance * torch.eye(4)[None]
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    assert p.dtype == dtype
    assert bool((p >= 0).all())
    assert float(p.detach().double().sum()) == pytest.approx(1, abs=4 * torch.finfo(dtype).eps)
    p[0, 0].backward()
    assert bool(mean.grad.isfinite().all())


def test_covariances_that_rounding_made_indefinite_are_mended():
    mean, covariance = gaussians(6, rank=2)
    spoilt = covariance - 1e-5 * torch.eye(6, dtype=torch.float64)
    found = GaussianLogits.of_covariance(mean, spoilt).probabilities()
    torch.testing.assert_close(found, GaussianLogits.of_covariance(mean, covariance).probabilities(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="covariance of the logits has NaN"):
        GaussianLogits.of_covariance(mean, covariance * math.nan).probabilities()


def test_derivatives():
    mean, covariance = gaussians(4)
    root = torch.linalg.cholesky(covariance)[:2].requires_grad_()
    mean = mean[:2].requires_grad_()

    def probabilities(m, L):
        return GaussianLogits.of_covariance(m, L @ L.mT).probabilities()

    assert torch.autograd.gradcheck(probabilities, (mean, root))


@pytest.mark.parametrize("n_leading", [3, 64])
def test_independent_logits(n_leading):
    mean, covariance = gaussians(7)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    of_variances = GaussianLogits.of_variances(mean, variance, n_leading)
    dense = GaussianLogits.of_covariance(mean, torch.diag_embed(variance), n_leading)
    for name in ("order", "means", "covariance", "variances", "total_variance"):
        torch.testing.assert_close(getattr(of_variances, name), getattr(dense, name))


def test_total_variance_is_that_of_centred_logits():
    mean, covariance = gaussians(5)
    H = torch.eye(5, dtype=torch.float64) - 1 / 5
    expected = (H @ covariance @ H).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(GaussianLogits.of_covariance(mean, covariance, 3).total_variance, expected)


@pytest.mark.parametrize("n_leading", [3, 5, 12])
def test_remaining_classes_have_average_weights(n_leading):
    mean, covariance = gaussians(12)
    found = GaussianLogits.of_covariance(mean, covariance, n_leading)
    p = found.probabilities()
    for i in range(N):
        nodes = mean_field._nodes(min(n_leading, 12) - 1, torch.float64, torch.device("cpu")).T
        expected = naive_mean_field(mean[i], covariance[i], nodes)
        torch.testing.assert_close(p[i], expected, rtol=1e-5, atol=1e-6)
    p, information = found.probabilities_and_information()
    torch.testing.assert_close(p.sum(-1), torch.ones(N, dtype=torch.float64))
    assert bool((information > 0.01).all())


@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_two_hundred_classes_of_which_some_lead(spread):
    generator = torch.Generator().manual_seed(4)
    mean = 2 * torch.randn(N, 200, generator=generator, dtype=torch.float64)
    A = spread * torch.randn(N, 200, 200, generator=generator, dtype=torch.float64) / 200**0.5
    covariance = A @ A.mT
    p = GaussianLogits.of_covariance(mean, covariance).probabilities()
    exact = draws(mean, covariance, n=20_000).mean(0)
    # draws: about 0.4 sqrt(200 / 20,000) times the share of a softmax that moves
    assert total_variation(p, exact) < 0.004 + 0.01 * spread
    assert total_variation(mean.softmax(-1), exact) > 4 * total_variation(p, exact)


def test_nodes_have_the_moments_of_a_normal_and_touch_no_generator():
    state = torch.random.get_rng_state()
    z = mean_field._nodes(11, torch.float64, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(z @ z.T / z.shape[1], torch.eye(11, dtype=torch.float64), rtol=0, atol=1e-12)
    third = torch.einsum("is,js,ks->ijk", z, z, z) / z.shape[1]
    assert float(third.abs().max()) < 1e-12


def test_inputs_in_portions(monkeypatch):
    mean, covariance = gaussians(6)
    logits = GaussianLogits.of_covariance(mean, covariance)
    whole = logits.probabilities_and_information()
    monkeypatch.setattr(mean_field, "CHUNK_BYTES", 4 * 7 * 512 * 8 * 3)
    for found, expected in zip(logits.probabilities_and_information(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_inference_mode_made_can_be_differentiated_later():
    mean_field._nodes.cache_clear()
    mean, covariance = gaussians(6)
    with torch.inference_mode():
        GaussianLogits.of_covariance(mean, covariance).probabilities()
    mean = mean.clone().requires_grad_()
    GaussianLogits.of_covariance(mean, covariance.clone()).probabilities()[:, 0].sum().backward()
    assert float(mean.grad.abs().max()) > 0
