"""Every form of regression predictions, what it says of observation noise, and what is refused."""

import numpy as np
import pytest
import torch

from debiased_laplace.calibration import Gaussian, Samples, calibration_report
from debiased_laplace.calibration.predictions.regression import read_regression

N, D, S = 20, 3, 7


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    mean, y = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    A = torch.randn(N, D, D, generator=generator, dtype=torch.float64)
    f = torch.randn(S, N, D, generator=generator, dtype=torch.float64)
    return mean, A @ A.mT, f, y


def test_noise_is_added_as_a_variance(data) -> None:
    mean, C, f, y = data
    sigma = torch.tensor([0.5, 1.0, 2.0]).double()
    std = C.diagonal(dim1=1, dim2=2).sqrt()
    expected = torch.sqrt(std.square() + sigma.square())
    forms = {
        "deviation": Gaussian(mean, standard_deviation=std, observation_noise=sigma),
        "covariance": Gaussian(mean, covariance=C, observation_noise=sigma.tolist()),
        "per sample": Gaussian(mean, covariance=C, observation_noise=sigma.expand(N, D)),
    }
    for name, form in forms.items():
        read = read_regression(name, form, y)
        torch.testing.assert_close(read.standard_deviation, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(read.noise, sigma.expand(N, D))
    mixture = read_regression("m", Samples(f, observation_noise=sigma), y)
    torch.testing.assert_close(mixture.mean, f.mean(dim=0))
    torch.testing.assert_close(mixture.standard_deviation, (f.var(dim=0, correction=0) + sigma**2).sqrt())


def test_noise_beside_the_predictions_is_the_same_as_in_them(data) -> None:
    mean, C, f, y = data
    for bare, form in (((mean, C), Gaussian(mean, covariance=C)), (f, Samples(f)), (f.numpy(), Samples(f))):
        stated = type(form)(**{**vars(form), "observation_noise": 0.7})
        a = read_regression("a", bare, y, observation_noise=0.7)
        b = read_regression("a", stated, y)
        assert torch.equal(a.standard_deviation, b.standard_deviation)
        assert torch.equal(a.z_scores, b.z_scores)


def test_one_output_in_all_its_shapes(data) -> None:
    mean, C, f, y = data
    m, v, t = mean[:, :1], C[:, :1, :1], y[:, :1]
    whole = read_regression("a", (m, v), t, observation_noise=0.3)
    flat = read_regression(
        "a", Gaussian(m[:, 0], standard_deviation=v[:, 0, 0].sqrt(), observation_noise=[0.3]), t[:, 0]
    )
    torch.testing.assert_close(whole.z_scores, flat.z_scores, rtol=1e-12, atol=1e-12)
    a = read_regression("a", Samples(f[:, :, 0], noise_included=True), t[:, 0])
    b = read_regression("a", Samples(f[:, :, :1], noise_included=True), t)
    assert torch.equal(a.z_scores, b.z_scores)


def test_covariance_off_by_the_rounding_of_float32_is_accepted(data) -> None:
    mean, C, _, y = data
    rough = C.float() * (1 + 1e-6 * torch.randn(C.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(rough, rough.mT)
    read = read_regression("a", Gaussian(mean, covariance=rough + 0.1 * torch.eye(D), noise_included=True), y)
    L = read.distribution.cholesky
    torch.testing.assert_close(L @ L.mT, C + 0.1 * torch.eye(D), rtol=0, atol=1e-4)


def test_a_function_known_exactly_is_allowed_once_noise_is_added(data) -> None:
    mean, C, _, y = data
    singular = torch.zeros_like(C)
    assert read_regression("a", (mean, singular), y, observation_noise=0.5).standard_deviation.unique().tolist() == [
        0.5
    ]
    with pytest.raises(ValueError, match="every variance must be positive"):
        read_regression("a", Gaussian(mean, covariance=singular, noise_included=True), y)


def bad_covariance(C: torch.Tensor, row: int, change) -> torch.Tensor:
    C = C.clone()
    change(C[row])
    return C


WRONG = {
    "samples without a word on noise": (
        lambda m, C, f: f,
        "samples says nothing of the observation noise.*noise_included",
    ),
    "covariance without a word": (lambda m, C, f: (m, C), "a covariance says nothing of the observation noise"),
    "Samples without a word": (lambda m, C, f: Samples(f), "says nothing of the observation noise"),
    "Gaussian covariance without a word": (lambda m, C, f: Gaussian(m, covariance=C), "says nothing"),
    "not positive definite": (
        lambda m, C, f: Gaussian(m, covariance=bad_covariance(C, 4, lambda c: c.fill_(1.0)), noise_included=True),
        "positive definite; 1 of 20 are not, the first in row 4 .smallest eigenvalue",
    ),
    "asymmetric": (
        lambda m, C, f: Gaussian(m, covariance=bad_covariance(C, 7, lambda c: c[0, 1].add_(0.5)), noise_included=True),
        "symmetric; 1 of 20 are not, the first in row 7",
    ),
    "NaN in a covariance": (
        lambda m, C, f: Gaussian(m, covariance=bad_covariance(C, 2, lambda c: c.fill_(np.nan)), noise_included=True),
        "covariance must be finite; 9 of 180 are not, the first in row 2",
    ),
    "NaN in a sample": (
        lambda m, C, f: Samples(torch.where(f == f[3, 5, 1], torch.nan, f), observation_noise=1.0),
        "samples must be finite; 1 of 420",
    ),
    "covariance of other outputs": (
        lambda m, C, f: Gaussian(m, covariance=C[:, :2, :2], noise_included=True),
        "one shape",
    ),
    "samples of other rows": (lambda m, C, f: Samples(f[:, :5], noise_included=True), r"\(20, 3\); got \(7, 5, 3\)"),
    "one sample": (lambda m, C, f: Samples(f[:1], noise_included=True), "at least two samples; got 1"),
    "equal samples": (
        lambda m, C, f: Samples(m.expand(4, N, D), noise_included=True),
        "every standard deviation must be",
    ),
    "noise of 0": (lambda m, C, f: Samples(f, observation_noise=0.0), "must be positive; got 0"),
    "negative noise": (lambda m, C, f: Samples(f, observation_noise=-1.0), "must be positive; got -1"),
    "noise for other outputs": (
        lambda m, C, f: Samples(f, observation_noise=[1.0, 2.0]),
        r"\(3,\) or \(20, 3\); got \(2,\)",
    ),
    "NaN noise": (lambda m, C, f: Samples(f, observation_noise=np.nan), "observation noise must be finite"),
    "absurdly small deviation": (
        lambda m, C, f: (m, torch.full((N, D), 1e-80, dtype=torch.float64)),
        "within 1e.70 standard deviations",
    ),
    "negative deviation with noise": (
        lambda m, C, f: Gaussian(m, standard_deviation=-m.abs(), observation_noise=1.0),
        "standard deviation must be 0 or more",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_forms_are_named(data, case: str) -> None:
    mean, C, f, y = data
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_regression("net", make(mean, C, f), y)


CONTRADICTIONS = {
    "both spreads": lambda: Gaussian([0.0], standard_deviation=[1.0], covariance=[[[1.0]]]),
    "no spread": lambda: Gaussian([0.0]),
    "noise twice": lambda: Gaussian([0.0], covariance=[[[1.0]]], observation_noise=1.0, noise_included=True),
    "noise twice in samples": lambda: Samples([[0.0]], observation_noise=1.0, noise_included=True),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_where_they_are_made(case: str) -> None:
    with pytest.raises(ValueError, match=r"got both or neither|drop one"):
        CONTRADICTIONS[case]()


def report(predictions, y, **options):
    return calibration_report(predictions, y, task="regression", n_resamples=20, **options)


def test_one_noise_for_all_goes_to_the_forms_that_lack_it(data) -> None:
    mean, C, f, y = data
    ready = Samples(f, noise_included=True)
    m = report({"cov": (mean, C), "smp": f, "ready": ready}, y, observation_noise=0.4).metrics
    assert m["cov"]["std_noise"].value == pytest.approx(0.4)
    assert m["smp"]["std_noise"].value == pytest.approx(0.4)
    assert "std_noise" not in m["ready"]


def test_one_noise_for_all_is_ambiguous_beside_a_pair(data) -> None:
    mean, _, f, y = data
    pair = (mean, torch.ones(N, D))
    with pytest.raises(
        ValueError, match=r"pair \(mean, standard deviation\) of 'map' holds its noise.*Name the methods"
    ):
        report({"map": pair, "smp": f}, y, observation_noise=0.4)
    named = report({"map": pair, "smp": f}, y, observation_noise={"smp": [0.4, 0.5, 0.6]}).metrics
    assert named["map"]["sharpness"].value == 1
    assert named["smp"]["std_noise"].value == pytest.approx(0.5)
    added = report({"map": pair}, y, observation_noise={"map": 1.0}).metrics
    assert added["map"]["sharpness"].value == pytest.approx(2**0.5)


def test_split_of_the_spread(data) -> None:
    mean, C, _, y = data
    m = report({"la": (mean, C)}, y, observation_noise=0.4).metrics["la"]
    assert m["std_epistemic"].value == pytest.approx(C.diagonal(dim1=1, dim2=2).sqrt().mean().item())


REFUSED = {
    "unknown method": ({"observation_noise": {"lap": 1.0}}, "names 'lap'; the methods are 'la'"),
    "noise stated twice": ({"observation_noise": {"la": 1.0}}, "state their noise themselves"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_noise_is_named(data, case: str) -> None:
    mean, C, _, y = data
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        report({"la": Gaussian(mean, covariance=C, noise_included=True)}, y, **options)


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_units_whose_squares_are_no_floats_are_refused(unit: float) -> None:
    deviation = np.array([1.0, 1.0, 2.0]) * unit
    with pytest.raises(ValueError, match=r"every standard deviation must lie between.*3 of 3"):
        report({"la": (0 * deviation, deviation)}, deviation)


def test_options_of_regression_are_refused_elsewhere() -> None:
    for options in ({"observation_noise": 1.0}, {"target_unit": "m"}):
        with pytest.raises(ValueError, match="belong to task='regression'"):
            calibration_report({"a": [0.2, 0.7]}, [0, 1], task="binary", **options)


def test_few_samples_raise_a_warning(data) -> None:
    _, _, f, y = data
    warnings = report({"smp": Samples(f, observation_noise=1.0)}, y).warnings
    assert any("smp: the predictive is known by 7 samples" in w for w in warnings)


def test_single_sample_of_every_form(data) -> None:
    mean, C, f, y = (x[..., :1, :] if x.ndim == 2 else x[:, :1] if len(x) == S else x[:1] for x in data)
    given = {"pair": (mean, torch.ones(1, D)), "cov": (mean, C), "smp": f}
    result = report(given, y, observation_noise={"cov": 1.0, "smp": 1.0})
    assert result.metrics["smp"]["nll"].low is None
    assert "</html>" in result.to_html()
    assert result.to_json()
