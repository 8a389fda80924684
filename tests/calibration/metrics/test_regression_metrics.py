"""Scores and errors against integrals, torch, SciPy, scikit-learn and values by hand."""

from math import sqrt

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest, norm, spearmanr
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, root_mean_squared_error

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.metrics.curves import tabulate_coverage, tabulate_pit
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.metrics.regression import (
    correlate_error_and_spread,
    interval_score,
    negative_log_likelihood,
    ranked_probability_score,
)
from debiased_laplace.calibration.metrics.spread import calibrate_spread
from debiased_laplace.calibration.predictions.forms import Gaussian, Samples
from debiased_laplace.calibration.predictions.regression import read_regression


def measure(mean, std, y, **options):
    return calibration_report({"net": (mean, std)}, y, task="regression", **options).metrics["net"]


def calibrate(predictions):
    return calibrate_spread(predictions, confidence_level=0.9, n_resamples=2, seed=0)


def integrate_crps(cdf, y: float) -> float:
    """The integral that defines the score, of the squared distance to a step at the target."""
    below = quad(lambda x: cdf(x) ** 2, -np.inf, y, epsabs=1e-12, limit=200)[0]
    return below + quad(lambda x: (1 - cdf(x)) ** 2, y, np.inf, epsabs=1e-12, limit=200)[0]


@pytest.mark.parametrize(("mean", "std", "y"), [(0.0, 1.0, 0.0), (1.5, 0.4, 2.3), (-2.0, 3.0, 4.0)])
def test_crps_is_the_integral_that_defines_it(mean: float, std: float, y: float) -> None:
    crps = ranked_probability_score(read_regression("net", ([mean], [std]), [y])).item()
    assert crps == pytest.approx(integrate_crps(lambda x: norm.cdf(x, mean, std), y), abs=1e-9)


@pytest.mark.parametrize("S", [1, 2, 5, 6])
def test_crps_of_a_mixture_is_the_integral_that_defines_it(S: int) -> None:
    f = 2 * torch.randn(S, 1, generator=torch.Generator().manual_seed(S), dtype=torch.float64)
    mixture = read_regression("net", Samples(f, observation_noise=0.7), [0.4])
    expected = integrate_crps(lambda x: norm.cdf(x, f[:, 0].numpy(), 0.7).mean(), 0.4)
    assert ranked_probability_score(mixture).item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("S", [2, 3, 8])
def test_crps_of_samples_is_the_fair_double_sum(S: int) -> None:
    generator = torch.Generator().manual_seed(S)
    x = torch.randn(S, 7, 2, generator=generator, dtype=torch.float64) + 100
    y = torch.randn(7, 2, generator=generator, dtype=torch.float64) + 100
    pairs = (x[:, None] - x[None]).abs().sum(dim=(0, 1)) / (S * (S - 1))
    expected = (x - y).abs().mean(dim=0) - pairs / 2
    mine = ranked_probability_score(read_regression("net", Samples(x, noise_included=True), y))
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


def test_fair_score_does_not_depend_on_the_number_of_samples() -> None:
    # the expected score of N(0, 1) on targets of N(0, 1) is 1 / sqrt(pi); the unfair form is 1 / (S sqrt(pi)) above
    n, S = 40_000, 2
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((S, n), (n,)))
    score = ranked_probability_score(read_regression("net", Samples(x, noise_included=True), y))
    error = score.std().item() / sqrt(n)
    assert abs(score.mean().item() - 1 / sqrt(np.pi)) < 3.5 * error
    assert 1 / (S * sqrt(np.pi)) > 30 * error  # the other form would be found out


def test_nll_is_that_of_torch_averaged_over_outputs(draw_regression) -> None:
    mean, std, y = draw_regression(50, scale=1.0, seed=0, n_outputs=3)
    expected = -torch.distributions.Normal(mean, std).log_prob(y).mean(dim=1)
    mine = negative_log_likelihood(read_regression("net", (mean, std), y))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_joint_nll_is_that_of_the_multivariate_normal_of_torch(draw_regression) -> None:
    mean, _, y = draw_regression(50, scale=1.0, seed=0, n_outputs=3)
    A = torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    C = A @ A.mT + 0.3 * torch.eye(3)
    expected = -torch.distributions.MultivariateNormal(mean, C).log_prob(y) / 3
    mine = negative_log_likelihood(read_regression("net", Gaussian(mean, covariance=C, noise_included=True), y))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    diagonal = torch.diag_embed(C.diagonal(dim1=1, dim2=2))
    alone = read_regression("net", Gaussian(mean, covariance=diagonal, noise_included=True), y)
    pair = read_regression("net", (mean, C.diagonal(dim1=1, dim2=2).sqrt()), y)
    torch.testing.assert_close(negative_log_likelihood(alone), negative_log_likelihood(pair), rtol=1e-12, atol=1e-12)
    # all other metrics are those of the marginals
    joint = calibration_report({"net": Gaussian(mean, covariance=C, noise_included=True)}, y, task="regression").metrics
    marginal = measure(mean, C.diagonal(dim1=1, dim2=2).sqrt(), y)
    for name in set(marginal) - {"nll", "ence_noise_floor", "ence_p_value"}:
        if "equal_mass_" not in name:
            assert joint["net"][name].value == pytest.approx(marginal[name].value, rel=1e-9), name
    assert abs(joint["net"]["nll"].value - marginal["nll"].value) > 0.01


def test_nll_of_a_mixture_is_joint_over_its_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    f = torch.randn(4, 6, 2, generator=generator, dtype=torch.float64)
    y, sigma = torch.randn(6, 2, generator=generator, dtype=torch.float64), torch.tensor([0.5, 1.5]).double()
    component = torch.distributions.Independent(torch.distributions.Normal(f.transpose(0, 1), sigma), 1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(6, 4).double()), component
    )
    mine = negative_log_likelihood(read_regression("net", Samples(f, observation_noise=[0.5, 1.5]), y))
    torch.testing.assert_close(mine, -mixture.log_prob(y) / 2, rtol=1e-12, atol=1e-12)


def test_a_single_function_with_noise_is_a_gaussian(draw_regression) -> None:
    mean, _, y = draw_regression(60, scale=1.0, seed=4)
    options = {"task": "regression", "n_resamples": 20}
    one = calibration_report({"a": Samples(mean[None], observation_noise=0.8)}, y, **options).metrics["a"]
    other = calibration_report(
        {"a": Gaussian(mean, standard_deviation=torch.zeros(60), observation_noise=0.8)}, y, **options
    )
    for name, estimate in other.metrics["a"].items():
        assert one[name].value == (None if estimate.value is None else pytest.approx(estimate.value, abs=1e-9)), name
    assert one["std_epistemic"].value == 0
    assert one["std_noise"].value == pytest.approx(0.8)


def test_interval_score_is_a_sum_of_pinball_losses(draw_regression) -> None:
    mean, std, y = draw_regression(200, scale=1.5, seed=5)
    score = interval_score(read_regression("net", (mean, std), y), 0.8).mean().item()
    losses = [mean_pinball_loss(y, norm.ppf(q, mean, std), alpha=q) for q in (0.1, 0.9)]
    assert score == pytest.approx(2 / 0.2 * sum(losses), rel=1e-12)


def test_quantiles_of_a_mixture_are_those_of_its_distribution_function() -> None:
    f = torch.randn(9, 30, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 3
    mixture = read_regression("net", Samples(f, observation_noise=[0.3, 0.9]), torch.zeros(30, 2)).distribution
    for p in (0.025, 0.5, 0.95):
        below, above = mixture.probability_below(mixture.quantile(p))
        torch.testing.assert_close(below, torch.full((30, 2), p, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.equal(below, above)


def test_metrics_by_hand() -> None:
    m = measure([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 1.0, 2.0], [1.0, -2.0, 3.0, 0.0])
    assert m["rmse"].value == pytest.approx(sqrt(14 / 4))
    assert m["mae"].value == 1.5
    assert m["z_scale"].value == pytest.approx(sqrt(11 / 4))
    assert m["picp"].value == 0.75
    assert (m["picp_50"].value, m["picp_80"].value, m["picp_95"].value) == (0.25, 0.75, 0.75)
    assert m["sharpness"].value == 1.5
    assert m["mpiw"].value == pytest.approx(2 * norm.ppf(0.95) * 1.5)
    assert m["mpiw_50"].value == pytest.approx(2 * norm.ppf(0.75) * 1.5)
    assert m["interval_score"].value == pytest.approx(m["mpiw"].value + 20 * (3 - norm.ppf(0.95)) / 4)
    # the two bins of spread hold errors 1, 3 and 2, 0: RMSE sqrt(5) against 1 and sqrt(2) against 2
    assert m["ence"].value == pytest.approx((sqrt(5) - 1 + 1 - sqrt(2) / 2) / 2)
    assert m["uce"].value == pytest.approx((4 + 2) / 2)


def test_every_metric_is_defined_and_has_an_interval_or_a_reason(draw_regression) -> None:
    mean, std, y = draw_regression(80, scale=1.0, seed=1, n_outputs=2)
    f = mean + torch.randn(12, 80, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = {"net": (mean, std), "map": (mean, torch.ones(80, 2)), "drawn": f}
    report = calibration_report(given, y, task="regression", observation_noise={"drawn": 0.5}, levels=(0.33,))
    for metrics in report.metrics.values():
        assert set(metrics) <= set(define_metrics("regression"))
        assert all((e.low is None) != (e.reason is None) for e in metrics.values())
    assert {"picp", "picp_33", "mpiw", "mpiw_33"} <= set(report.metrics["net"])
    assert "picp_50" not in report.metrics["net"]
    assert set(report.metrics["drawn"]) - set(report.metrics["net"]) == {"std_epistemic", "std_noise"}


def test_errors_are_those_of_scikit_learn(draw_regression) -> None:
    mean, std, y = draw_regression(80, scale=2.0, seed=1)
    assert measure(mean, std, y)["rmse"].value == pytest.approx(root_mean_squared_error(y, mean), abs=1e-12)
    assert measure(mean, std, y)["mae"].value == pytest.approx(mean_absolute_error(y, mean), abs=1e-12)


def test_tests_and_correlation_are_those_of_scipy(draw_regression) -> None:
    mean, std, y = draw_regression(300, scale=1.2, seed=8)
    m = measure(mean, std, y)
    pit = norm.cdf(y, mean, std)
    assert m["pit_ks_p_value"].value == pytest.approx(kstest(pit, "uniform").pvalue, rel=1e-9)
    r = spearmanr((y - mean).abs(), std).statistic
    assert m["error_spread_correlation"].value == pytest.approx(r, abs=1e-12)
    assert m["error_spread_correlation"].low < r < m["error_spread_correlation"].high


@pytest.mark.parametrize("heterogeneity", [0.3, 3.0])
def test_interval_of_the_correlation_covers(heterogeneity: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int):
        std = (heterogeneity * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
        return torch.zeros(n), std, std * torch.randn(n, generator=generator, dtype=torch.float64)

    _, std, y = draw(200_000)
    truth, hits, repetitions = spearmanr(y.abs(), std).statistic, 0, 400
    for _ in range(repetitions):
        mean, std, y = draw(200)
        predictions = read_regression("net", (mean, std), y)
        e = correlate_error_and_spread(predictions, calibrate(predictions), confidence_level=0.95)
        hits += e.low <= truth <= e.high
    # 0.90 at this heterogeneity with the variance of independent ranks
    assert abs(hits / repetitions - 0.95) < 3 * sqrt(0.95 * 0.05 / repetitions)


def test_p_value_of_several_outputs_is_the_least_by_bonferroni(draw_regression) -> None:
    mean, std, y = draw_regression(300, scale=1.0, seed=9, n_outputs=3)
    y[:, 1] += 0.15
    pit = norm.cdf(y, mean, std)
    least = min(kstest(pit[:, j], "uniform").pvalue for j in range(3))
    assert 3 * least < 0.5
    assert measure(mean, std, y)["pit_ks_p_value"].value == pytest.approx(3 * least, rel=1e-9)


@pytest.mark.parametrize("n_outputs", [None, 3])
def test_the_scale_of_errors_is_found(draw_regression, n_outputs: int | None) -> None:
    mean, std, y = draw_regression(2000, scale=1.4, seed=2, n_outputs=n_outputs)
    m = measure(mean, std, y)
    assert abs(m["z_scale"].value - 1.4) < 3.5 * m["z_scale"].standard_error
    assert m["z_scale"].low > 1.2
    assert m["picp"].high < 0.9
    assert m["picp"].n == 2000


def test_constant_deviation_has_no_error_by_spread_and_says_why() -> None:
    y = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = measure(torch.zeros(40), torch.full((40,), 0.5), y)
    assert (m["sharpness"].low, m["sharpness"].high) == (0.5, 0.5)
    assert m["mpiw"].standard_error == 0
    without = {name for name, e in m.items() if e.value is None}
    errors = {"ence", "ence_equal_mass"}
    assert without == {"c_qce", "uce", "error_spread_correlation"} | errors | {
        f"{name}_{end}" for name in errors for end in ("noise_floor", "p_value")
    }
    assert {m[name].reason for name in without} == {"constant predictive standard deviation"}
    assert m["m_qce"].value > 0


def test_one_constant_output_of_three_is_left_out(draw_regression) -> None:
    mean, std, y = draw_regression(200, scale=1.0, seed=10, n_outputs=3)
    std[:, 1] = 0.7
    report = calibration_report({"net": (mean, std)}, y, task="regression", n_resamples=20)
    alone = [o.metrics["ence"].value for o in report.methods["net"].curves.outputs]
    assert alone[1] is None
    assert report.metrics["net"]["ence"].value == pytest.approx((alone[0] + alone[2]) / 2)


def test_outputs_alone_are_what_a_report_of_one_output_says(draw_regression) -> None:
    mean, std, y = draw_regression(150, scale=1.0, seed=11, n_outputs=2)
    both = calibration_report({"net": (mean, std)}, y, task="regression", n_resamples=20).methods["net"]
    for j, output in enumerate(both.curves.outputs):
        alone = measure(mean[:, j], std[:, j], y[:, j], n_resamples=20)
        for name, estimate in output.metrics.items():
            if not name.endswith(("noise_floor", "p_value")) or name == "pit_ks_p_value":
                assert estimate.value == pytest.approx(alone[name].value, rel=1e-9), name
    assert both.metrics["rmse"].value ** 2 == pytest.approx(
        np.mean([o.metrics["rmse"].value ** 2 for o in both.curves.outputs])
    )


TINY = {"std 1e-9 beside a mean of 1e6": (1e6, 1e-9), "std 1e-30": (0.0, 1e-30), "std 1e30": (0.0, 1e30)}


@pytest.mark.parametrize("case", TINY)
def test_any_unit_of_the_targets_gives_the_same_calibration(draw_regression, case: str) -> None:
    shift, unit = TINY[case]
    _, std, y = draw_regression(100, scale=1.3, seed=12)
    # errors that a float64 beside the mean can hold
    error = (shift + unit * 1e3 * y - shift) if shift else unit * y
    mean = torch.full_like(y, shift)
    std = std * (1e3 if shift else 1.0)
    m = measure(mean, std * unit, mean + error)
    expected = measure(torch.zeros_like(y), std, error / unit)
    for name in ("z_scale", "picp", "ence", "c_qce", "m_qce", "ence_equal_mass", "ence_noise_floor", "pit_ks_p_value"):
        assert m[name].value == pytest.approx(expected[name].value, rel=1e-9), name
    assert m["uce"].value == pytest.approx(expected["uce"].value * unit**2, rel=1e-9)


def test_coverage_curve_of_right_and_wrong_error_bars(draw_regression) -> None:
    for scale, right in ((1.0, True), (2.0, False)):
        mean, std, y = draw_regression(3000, scale=scale, seed=3)
        levels = tabulate_coverage(read_regression("net", (mean, std), y), confidence_level=0.999)
        assert [x.nominal for x in levels] == pytest.approx([k / 20 for k in range(1, 20)])
        assert all(x.low <= x.nominal <= x.high for x in levels) == right
        expected = [2 * norm.cdf(norm.ppf(0.5 + x.nominal / 2) / scale) - 1 for x in levels]
        assert all(x.low <= e <= x.high for x, e in zip(levels, expected, strict=True))


@pytest.mark.parametrize("S", [2, 20])
def test_coverage_of_exchangeable_samples_is_right_however_few(S: int) -> None:
    x = torch.randn(S + 1, 4000, generator=torch.Generator().manual_seed(S), dtype=torch.float64)
    right = read_regression("net", Samples(x[1:], noise_included=True), x[0])
    assert all(c.low <= c.nominal <= c.high for c in tabulate_coverage(right, confidence_level=0.999))
    narrow = read_regression("net", Samples(0.5 * x[1:], noise_included=True), x[0])
    assert not any(c.low <= c.nominal <= c.high for c in tabulate_coverage(narrow, confidence_level=0.999)[5:15])


def test_coverage_of_a_skewed_mixture_is_right_where_its_moments_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    f = -3 * torch.rand(200, 1, generator=generator, dtype=torch.float64).log().expand(200, 4000)
    chosen = torch.randint(200, (4000,), generator=generator)
    y = f[chosen, 0] + 0.1 * torch.randn(4000, generator=generator, dtype=torch.float64)
    mixture = read_regression("net", Samples(f, observation_noise=0.1), y)
    moments = read_regression("net", (mixture.mean, mixture.standard_deviation), y)
    inside = [
        [c.low <= c.nominal <= c.high for c in tabulate_coverage(p, confidence_level=0.999)] for p in (mixture, moments)
    ]
    assert all(inside[0])
    assert not all(inside[1])


def test_probability_transform_counts_by_hand() -> None:
    y = norm.ppf([0.05, 0.15, 0.151, 0.95])
    bins = tabulate_pit(read_regression("net", (np.zeros(4), np.ones(4)), y), confidence_level=0.9)
    assert [b.n for b in bins] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]


def test_extreme_targets_fall_in_the_outer_bins() -> None:
    bins = tabulate_pit(read_regression("net", (np.zeros(2), np.ones(2)), [-60.0, 60.0]), confidence_level=0.9)
    assert (bins[0].n, bins[-1].n) == (1, 1)


@pytest.mark.parametrize("values", [(0.905,), (1.0,), (0.0,), (-0.5, 0.9)])
def test_levels_are_whole_percents(values) -> None:
    with pytest.raises(ValueError, match="levels must be"):
        measure([0.0], [1.0], [0.0], levels=values)
