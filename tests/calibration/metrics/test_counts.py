"""Predictions of counts against SciPy, scikit-learn and simulated counts."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_poisson_deviance

from debiased_laplace.calibration import Counts, Gaussian, calibration_report
from debiased_laplace.calibration.distributions import RegressionPredictions
from debiased_laplace.calibration.regression import read_regression


def drawn(n=40, n_outputs=2, n_samples=7, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rates = (1.2 * torch.randn(n_samples, n, n_outputs, generator=generator, dtype=torch.float64)).exp() + 0.1
    # of the first draw, so that the mixture is not right
    return rates, torch.poisson(rates[0], generator=generator)


@pytest.mark.parametrize(("n_outputs", "n_samples"), [(1, 1), (1, 7), (2, 1), (2, 7)])
def test_scores_and_quantiles_are_those_of_scipy(n_outputs, n_samples):
    rates, y = drawn(n_outputs=n_outputs, n_samples=n_samples)
    p = read_regression("net", Counts(rates), y)
    law, k = stats.poisson(rates.numpy()), np.arange(400)[:, None, None]
    joint = np.exp(law.logpmf(y.numpy()).sum(-1)).mean(0)
    np.testing.assert_allclose(p.negative_log_density, -np.log(joint) / n_outputs)
    below = np.stack([law.cdf(i).mean(0) for i in range(400)])
    np.testing.assert_allclose(p.ranked_probability_score, ((below - (k >= y.numpy())) ** 2).sum(0), atol=1e-12)
    for level in (0.03, 0.5, 0.97):
        np.testing.assert_array_equal(p.quantile(level), (below < level).sum(0))
    at = np.take_along_axis(below, y.long().numpy()[None], 0)[0]
    before = at - law.pmf(y.numpy()).mean(0)
    u = (p.probability_transform.numpy() - before) / (at - before)
    assert u.min() > 0
    assert u.max() < 1
    assert u.std() > 0.2
    deviances = [mean_poisson_deviance(y[:, j], rates.mean(0)[:, j]) for j in range(n_outputs)]
    assert p.deviance.mean().item() == pytest.approx(np.mean(deviances))
    mixed = rates.var(0, correction=0) + rates.mean(0)
    torch.testing.assert_close(p.standard_deviation, mixed.sqrt())
    function, noise = p.parts
    torch.testing.assert_close(function.square() + noise.square(), mixed)


@pytest.mark.parametrize(("factor", "is_right"), [(1.0, True), (1.3, False)])
def test_the_transform_is_uniform_and_intervals_hold_if_rates_are_right(factor, is_right):
    rates = drawn(n=3000, n_outputs=1, n_samples=5)[0]
    generator = torch.Generator().manual_seed(1)
    which = torch.randint(5, (1, 3000, 1), generator=generator)
    y = torch.poisson(rates.gather(0, which)[0], generator=generator)
    report = calibration_report({"net": Counts(factor * rates)}, y, task="regression", confidence_level=0.999)
    metrics = report.metrics["net"]
    assert (metrics["pit_ks_p_value"].value > 1e-3) == is_right
    assert (metrics["picp"].low <= 0.9 <= metrics["picp"].high) or not is_right
    assert (metrics["z_scale"].low <= 1 <= metrics["z_scale"].high) or not is_right


def test_simulated_errors_have_the_moments_of_the_mixture():
    rates, y = drawn(n=5)
    p = read_regression("net", Counts(rates), y)
    errors = p.draw_errors(40_000, torch.Generator().manual_seed(2))
    size = p.standard_deviation / 200
    assert bool((errors.mean(0).abs() < 4.5 * size).all())
    assert bool(((errors + p.mean - (errors + p.mean).round()).abs() < 1e-9).all())
    torch.testing.assert_close(errors.std(0), p.standard_deviation, rtol=0.08, atol=0)


def test_large_counts_are_scored_as_gaussians():
    rates = torch.tensor([[[8e5], [5e6]], [[8.2e5], [5e6]]], dtype=torch.float64)
    y = torch.tensor([[8.01e5], [5.003e6]], dtype=torch.float64)
    p = read_regression("net", Counts(rates[:, :1]), y[:1])
    gaussian = RegressionPredictions(p.values, p.targets, p.noise).ranked_probability_score
    assert p.ranked_probability_score.item() == pytest.approx(gaussian.item(), rel=1e-4)
    both = read_regression("net", Counts(rates), y).ranked_probability_score
    assert both[0].item() == pytest.approx(gaussian.item())
    assert bool(both.isfinite().all())


def test_a_large_count_does_not_change_the_scores_of_others():
    rates, y = torch.tensor([[0.1, 5.0, 2e6]]).double(), torch.tensor([0.0, 3e4, 2e6]).double()
    alone = [read_regression("a", Counts(rates[:, [i]]), y[[i]]).ranked_probability_score for i in range(3)]
    together = read_regression("a", Counts(rates), y).ranked_probability_score
    torch.testing.assert_close(together, torch.cat(alone))
    assert float(together[0]) == pytest.approx(0.00908, abs=1e-5)


def test_a_constant_rate_is_scored_without_the_sample_itself():
    y = torch.tensor([0.0, 3.0, 1.0, 4.0], dtype=torch.float64)
    found = calibration_report({"net": Counts(torch.full((1, 4), 2.5))}, y, task="regression").constant
    rates = (y.sum() - y).numpy() / 3
    assert found["nll"] == pytest.approx(-stats.poisson.logpmf(y, rates).mean())
    assert found["deviance"] == pytest.approx(mean_poisson_deviance(y, rates))
    single = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert calibration_report({"net": Counts(torch.ones(1, 4))}, single, task="regression").constant == {}


RATES, Y = torch.full((3, 6), 2.0), torch.arange(6.0)
WRONG = {
    "negative rates": (Counts(-RATES), Y, {}, "every rate must be positive"),
    "fractions": (Counts(RATES), Y / 2, {}, r"every target must be a count \(a whole number of at least 0\)"),
    "negative counts": (Counts(RATES), Y - 1, {}, "every target must be a count"),
    "rates of one dimension": (Counts(RATES[0]), Y, {}, r"expected rates of shape \(samples, n\) or .* got \(6,\)"),
    "noise": (Counts(RATES), Y, {"observation_noise": {"net": 0.3}}, "that state their noise themselves"),
    "a scaled row": (Counts(RATES), Y, {"temperature_scaling": "cross_fitted"}, "Counts have no standard deviation"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_counts_say_what_is_expected(case):
    prediction, y, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        calibration_report({"net": prediction}, y, task="regression", **options)


def test_counts_are_not_compared_with_densities():
    both = {"counts": Counts(RATES), "gaussian": Gaussian(RATES[0], RATES[0])}
    with pytest.raises(ValueError, match=r"Expected Counts\(rates\) of every .* got other forms of 'gaussian'"):
        calibration_report(both, Y, task="regression")
