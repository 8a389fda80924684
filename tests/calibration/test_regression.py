"""Predictive distributions against torch.distributions, SciPy, integrals and double loops, and how they are read."""

from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from debiased_laplace.calibration import Gaussian, Samples
from debiased_laplace.calibration.regression import read_regression, read_regressions

N, D, S, INF = 20, 3, 7, float("inf")
SIGMA = torch.tensor([0.5, 0.8, 2.0], dtype=torch.float64)


def randn(*shape: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = randn(N, D, D, seed=1)
MEAN, Y, F, C = randn(N, D), randn(N, D, seed=2), 2 * randn(S, N, D, seed=3), A @ A.mT + 0.1 * torch.eye(D)
STD, ONES = C.diagonal(dim1=1, dim2=2).sqrt(), torch.ones(N, D, dtype=torch.float64)
FORMS = {
    "deviation": Gaussian(MEAN, standard_deviation=STD),
    "covariance": Gaussian(MEAN, covariance=C, noise_included=True),
    "mixture": Samples(F, observation_noise=SIGMA),
    "samples": Samples(F, noise_included=True),
}


def read(form, y=Y, **options):
    return read_regression("net", form, y, **options)


def held(covariance):
    return read(Gaussian(MEAN, covariance=covariance, noise_included=True))


def close(one, other, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=tolerance, atol=tolerance)


def test_densities_are_those_of_torch_per_output() -> None:
    components = Independent(Normal(F.movedim(0, 1), SIGMA), 1)
    exact = {
        "deviation": Normal(MEAN, STD).log_prob(Y).sum(dim=1),
        "covariance": MultivariateNormal(MEAN, C).log_prob(Y),
        "mixture": MixtureSameFamily(Categorical(torch.ones(N, S).double()), components).log_prob(Y),
        "samples": Normal(F.mean(dim=0), F.std(dim=0)).log_prob(Y).sum(dim=1),
    }
    for form, log_density in exact.items():
        close(read(FORMS[form]).negative_log_density, -log_density / D)


@pytest.mark.parametrize("p", [1e-9, 0.025, 0.5, 0.95, 1 - 1e-9])
def test_quantiles_and_probabilities_are_those_of_torch_and_scipy(p: float) -> None:
    gaussian, mixture, samples = (read(FORMS[form]) for form in ("deviation", "mixture", "samples"))
    close(gaussian.quantile(p), norm.ppf(p, MEAN, STD))
    for end, q in zip(gaussian.interval(p), ((1 - p) / 2, (1 + p) / 2), strict=True):
        close(end, norm.ppf(q, MEAN, STD))
    close(read((MEAN, STD), MEAN + 60 * STD).normal_scores, 60 * ONES)
    components = Normal(F.movedim(0, -1), SIGMA[:, None])
    exact = MixtureSameFamily(Categorical(torch.ones(N, D, S).double()), components)
    close(exact.cdf(mixture.quantile(p)), p * ONES, 1e-14)
    close(mixture.probability_transform, exact.cdf(Y))
    close(torch.special.ndtr(mixture.normal_scores), exact.cdf(Y))
    rank, ordered = min(max(p * (S + 1), 1), S) - 1, F.sort(dim=0).values  # no further out
    close(samples.quantile(p), torch.lerp(ordered[int(rank)], ordered[min(int(rank) + 1, S - 1)], rank % 1))


@pytest.mark.parametrize("n_samples", [1, 2, 5, 6])
def test_crps_of_a_mixture_is_the_integral_and_of_samples_the_fair_double_sum(n_samples: int) -> None:
    f = 2 * randn(n_samples, 2, 1, seed=n_samples)
    found = read(Samples(f, observation_noise=0.7), [[0.4], [-3.0]]).ranked_probability_score
    for i, y in enumerate((0.4, -3.0)):
        parts = ((norm.cdf, -INF, y), (norm.sf, y, INF))
        areas = [quad(lambda x, g=g, i=i: g(x, f[:, i, 0], 0.7).mean() ** 2, *ends, epsabs=1e-12) for g, *ends in parts]
        assert found[i].item() == pytest.approx(areas[0][0] + areas[1][0], abs=1e-8)
    x = F[: n_samples + 1] + 100
    pairs = sum((x[i] - x[j]).abs() for i in range(n_samples + 1) for j in range(n_samples + 1))
    expected = (x - Y).abs().mean(dim=0) - pairs / (n_samples * (n_samples + 1)) / 2
    close(read(Samples(x, noise_included=True)).ranked_probability_score, expected)


def test_ranks_among_samples_are_wider_with_ties() -> None:
    x = torch.tensor([1.0, 2.0, 2.0, 4.0])[:, None].expand(4, 2000)
    for y, ends in ((0.0, (0.0, 0.2)), (2.0, (0.2, 0.8)), (3.0, (0.6, 0.8)), (5.0, (0.8, 1.0))):
        drawn = read(Samples(x, noise_included=True), [y] * 2000).probability_transform
        assert [drawn.min().item(), drawn.max().item()] == pytest.approx(ends, abs=0.005)


@pytest.mark.parametrize("form", FORMS)
def test_draws_have_the_moments_of_the_predictive(form: str) -> None:
    p, f, draws = read(FORMS[form]), F - F.mean(dim=0), 20_000
    e = p.draw_errors(draws, torch.Generator().manual_seed(1))
    between = torch.einsum("sni,snj->nij", f, f) / S  # outputs of one sample are drawn together
    expected = {"deviation": torch.diag_embed(STD.square()), "covariance": C, "samples": between}
    expected["mixture"] = between + torch.diag(SIGMA.square())
    scale = p.standard_deviation[:, :, None] * p.standard_deviation[:, None, :]
    assert ((torch.einsum("rni,rnj->nij", e, e) / draws - expected[form]) / scale).abs().max() < 0.06


@pytest.mark.parametrize("form", FORMS)
def test_scaling_multiplies_every_deviation_from_the_mean(form: str) -> None:
    factor = 0.5 + torch.rand(N, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = read(FORMS[form])
    scaled = replace(p.scaled(factor[:, 0]), targets=p.mean + factor * (Y - p.mean))
    close(scaled.standard_deviation, factor * p.standard_deviation)
    close(scaled.negative_log_density, p.negative_log_density + factor[:, 0].log())
    close(scaled.ranked_probability_score, factor * p.ranked_probability_score)
    close(scaled.quantile(0.3), p.mean + factor * (p.quantile(0.3) - p.mean), 1e-9)
    assert (p.n_samples, scaled.description) == (S if form in ("mixture", "samples") else None, p.description)


def test_noise_is_added_to_every_form_as_stated() -> None:
    given = {"cov": (MEAN, C), "samples": F, "mixture": FORMS["mixture"], "ready": FORMS["samples"], "map": (MEAN, STD)}
    given["covariance"] = Gaussian(MEAN, covariance=C, observation_noise=SIGMA.tolist())
    given["held"] = Gaussian(MEAN, covariance=C + SIGMA.square().diag(), noise_included=True)
    between, both = F.std(dim=0, correction=0), torch.hypot(STD, SIGMA)
    expected = {"mixture": torch.hypot(between, SIGMA), "ready": F.std(dim=0), "map": STD}
    expected |= {"covariance": both, "held": both}
    missing = {"cov": [MEAN, C.numpy()], "samples": F.numpy()}
    one = read_regressions({k: p for k, p in given.items() if k != "map"}, Y, observation_noise=0.4)
    each = read_regressions(given | missing, Y, observation_noise={"cov": SIGMA.expand(N, D), "samples": SIGMA})
    for found, sigma in ((one, 0.4 * ONES), (each, SIGMA.expand(N, D))):
        own = expected | {"cov": torch.hypot(STD, sigma), "samples": torch.hypot(between, sigma)}
        for method, p in found.items():
            close(p.standard_deviation, own[method])
            close(p.z_scores, (Y - p.mean) / own[method])
    close(read((MEAN, STD), observation_noise=SIGMA).standard_deviation, both)
    close(read((MEAN, 0 * C), observation_noise=0.7).standard_deviation, 0.7 * ONES)  # a function known exactly
    assert read(FORMS["mixture"], None).z_scores.abs().max() == 0  # without targets
    rough = C.float() * (1 + 1e-6 * randn(*C.shape).float())  # rounding of float32 is no asymmetry
    L = held(rough).cholesky
    close(L @ L.mT, C, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_output_in_all_its_shapes_and_precisions(dtype: torch.dtype) -> None:
    numbers = ([0.5, -1.0, 2.0], [0.5, 2.0, 0.25], [1.0, -3.0, 1.5])
    for shape in ((3,), (3, 1)):
        m, s, y = (torch.tensor(x, dtype=dtype, requires_grad=True).reshape(shape) for x in numbers)
        covariance = Gaussian(m, covariance=s.square().reshape(3, 1, 1), noise_included=True)
        drawn = Samples(torch.stack([m - s, m, m + s]), noise_included=True)
        for p in (read((m, s), y), read([m, s], numbers[2]), read(numbers[:2], y), read(covariance, y), read(drawn, y)):
            assert p.z_scores.tolist() == [[1.0], [-1.0], [-2.0]]
            assert (p.n, p.n_outputs, p.z_scores.dtype) == (3, 1, torch.float64)


PAIR, NAN, ROW = {"map": (MEAN, STD)}, float("nan"), torch.tensor([4])
WRONG = {
    "samples without a word on noise": (lambda: read(F), "samples says nothing of the observation noise.*_included"),
    "covariance without a word": (lambda: read((MEAN, C)), "a covariance says nothing of the observation noise"),
    "noise twice": (lambda: read(FORMS["mixture"], observation_noise=0.4), "state their noise themselves"),
    "samples hold the noise": (lambda: Samples(F, observation_noise=0.4, noise_included=True), "drop one"),
    "one noise for a pair": (lambda: read_regressions(PAIR, Y, observation_noise=0.4), "'map' includes.*Name the"),
    "unknown method": (lambda: read_regressions(PAIR, Y, observation_noise={"la": 0.4}), "'la'; the methods are 'map'"),
    "noise of 0": (lambda: read(F, observation_noise=0.0), "must be positive.*noise_included.*60 of 60"),
    "noise of other outputs": (
        lambda: read(F, observation_noise=[0.4, 0.5]),
        r"\(3,\) or \(20, 3\) or \(7, 20, 3\); got \(2,\)",
    ),
    "no spread": (lambda: Gaussian(MEAN), "got both or neither"),
    "not definite": (lambda: held(C.index_fill(0, ROW, 1.0)), "eigenvalues; 1 of 20 .* row 4"),
    "asymmetric": (lambda: held(C.triu()), "symmetric.*; 20 of 20 .* row 0"),
    "NaN": (lambda: held(C.index_fill(0, ROW, NAN)), "finite; 9 of 180 .* row 4"),
    "no variance": (lambda: held(0 * C), "must have positive eigenvalues"),
    "negative variance": (lambda: read(Gaussian(MEAN, None, -C, observation_noise=9)), "variance must be 0 or more"),
    "samples of other rows": (lambda: read(Samples(F[:, :5], observation_noise=0.4)), r"\(5, 3\); got \(20, 3\)"),
    "deviations of other rows": (lambda: read((MEAN, STD[:5])), r"\(20, 3\); got \(5, 3\)"),
    "one sample": (lambda: read(Samples(F[:1], noise_included=True)), "at least two samples"),
    "no pair": (lambda: read(MEAN[0]), r"pair.*got Tensor of shape \(3,\)"),
    "deviation of 0": (lambda: read((MEAN, STD.index_fill(0, ROW, 0.0))), "positive.*; 3 of 60 .* row 4, column 0"),
    "negative": (lambda: read((MEAN, -STD), observation_noise=0.4), "0 or more; 60 of 60"),
    "infinite target": (lambda: read((MEAN, STD), NAN * Y), "targets must be finite"),
    "tiny deviation": (lambda: read((MEAN, 1e-60 * STD), 1e20 * Y), "within 1e.70 standard deviations"),
    "a unit without squares": (lambda: read((Y, 1e200 * STD)), "must be positive, between.*60 of 60"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_predictions_are_named(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_samples_with_a_noise_of_each_are_a_mixture_of_unequal_gaussians(n_outputs):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, 30, n_outputs, generator=generator, dtype=torch.float64)
    noise = 0.2 + torch.rand(values.shape, generator=generator, dtype=torch.float64)
    y = torch.randn(30, n_outputs, generator=generator, dtype=torch.float64)
    given = (values, noise) if n_outputs > 1 else (values[..., 0], noise[..., 0])
    p = read_regression("net", Samples(given[0], observation_noise=given[1]), y)
    law = torch.distributions.Normal(values, noise)
    nll = -law.log_prob(y).sum(-1).exp().mean(0).log() / n_outputs
    torch.testing.assert_close(p.negative_log_density, nll)
    torch.testing.assert_close(p.standard_deviation, (values.var(0, correction=0) + noise.square().mean(0)).sqrt())
    torch.testing.assert_close(p.parts[1], noise.square().mean(0).sqrt())
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    below = law.cdf(grid[:, None, None, None].expand(-1, 5, 30, n_outputs)).mean(1)
    crps = torch.trapezoid((below - (grid[:, None, None] >= y).double()).square(), grid, dim=0)
    torch.testing.assert_close(p.ranked_probability_score, crps, rtol=0, atol=1e-3)
    torch.testing.assert_close(law.cdf(p.quantile(0.2).expand(5, -1, -1)).mean(0), torch.full_like(y, 0.2))
    torch.testing.assert_close(p.probability_transform, law.cdf(y.expand(5, -1, -1)).mean(0))
    errors = p.draw_errors(20_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(errors.std(0), p.standard_deviation, rtol=0.05, atol=0)
    wide = p.scaled(torch.full((30,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(wide.standard_deviation, 2 * p.standard_deviation)
    equal = read_regression("net", Samples(given[0], observation_noise=torch.full_like(given[0], 0.4)), y)
    one = read_regression("net", Samples(given[0], observation_noise=0.4), y)
    for name in ("negative_log_density", "ranked_probability_score", "standard_deviation"):
        torch.testing.assert_close(getattr(equal, name), getattr(one, name))
