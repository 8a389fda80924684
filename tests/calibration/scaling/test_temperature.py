"""The fit of one temperature against SciPy, closed forms, and logits whose temperature is known."""

from math import log, sqrt

import pytest
import torch
from scipy.optimize import minimize_scalar

from debiased_laplace.calibration.scaling.temperature import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    fit_temperature,
    negative_log_likelihood_at,
)


def draw(n: int, *, temperature: float, seed: int, n_classes: int = 10, scale: float = 1.5):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(dim=1), 1, generator=generator)[:, 0]
    logits = temperature * z
    return logits - logits.amax(dim=1, keepdim=True), labels


def mean_loss(logits, labels, temperature: float) -> float:
    return torch.nn.functional.cross_entropy(logits / temperature, labels).item()


CASES = {
    "calibrated": {"temperature": 1.0},
    "over-confident": {"temperature": 2.7},
    "under-confident": {"temperature": 0.2},
    "two classes": {"temperature": 1.4, "n_classes": 2},
    "stiff: gaps of a hundred nats": {"temperature": 3.0, "scale": 30.0},
    "flat: gaps of a hundredth": {"temperature": 0.9, "scale": 0.05, "n": 20000},
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_scipy(case: str) -> None:
    logits, labels = draw(**{"n": 400, "seed": 3, **CASES[case]})
    fit = fit_temperature(logits, labels)
    reference = minimize_scalar(
        lambda beta: mean_loss(logits, labels, 1 / beta), bracket=(0.5, 1.0), method="brent", options={"xtol": 1e-12}
    )
    # a minimiser of the loss alone knows the place to the root of a rounding error, so the slope decides
    beta = torch.tensor(1 / fit.temperature, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(beta * logits, labels)
    (slope,) = torch.autograd.grad(loss, beta, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, beta)
    assert fit.at_bound is None
    assert fit.temperature == pytest.approx(1 / reference.x, rel=1e-6)
    assert abs(slope / curvature) < 1e-9 * beta
    assert fit.n_iterations < 15


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_recovers_the_temperature_within_its_standard_error(temperature: float) -> None:
    z = []
    for seed in range(40):
        fit = fit_temperature(*draw(1500, temperature=temperature, seed=seed))
        z.append((fit.temperature - temperature) / fit.standard_error)
    z = torch.tensor(z)
    assert abs(z.mean().item()) < 3.5 / sqrt(40)
    assert 0.65 < z.std().item() < 1.4
    assert fit.standard_error < 0.05 * temperature  # the assertion above has power


def test_two_classes_and_one_gap_by_hand() -> None:
    """With one gap g and a share s of right labels the likeliest gap is logit(s)."""
    logits = torch.tensor([[0.0, -3.0]], dtype=torch.float64).expand(10, 2)
    labels = torch.tensor([0] * 8 + [1] * 2)
    fit = fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(3 / log(0.8 / 0.2), rel=1e-10)
    # slope of each loss in beta is -g (y - s): the sandwich is sd(y) g / sqrt(n - 1) over s (1 - s) g^2
    beta_error = sqrt(0.8 * 0.2 / 9) * 3 / (0.8 * 0.2 * 9)
    assert fit.standard_error == pytest.approx(beta_error * fit.temperature**2, rel=1e-9)
    assert (fit.n, fit.at_bound) == (10, None)


def test_rows_are_a_choice_and_the_start_is_forgotten() -> None:
    logits, labels = draw(600, temperature=1.8, seed=5)
    rows = torch.arange(0, 600, 3)
    chosen = fit_temperature(logits, labels, rows=rows)
    alone = fit_temperature(logits[rows], labels[rows])
    assert chosen.temperature == pytest.approx(alone.temperature, rel=1e-12)
    assert chosen.n == 200
    for start in (1e-3, 0.05, 40.0, 1e3):
        assert fit_temperature(logits, labels, start=start).temperature == pytest.approx(
            fit_temperature(logits, labels).temperature, rel=1e-9
        )


def test_portions_change_nothing(monkeypatch) -> None:
    from debiased_laplace.calibration.predictions import probabilities

    logits, labels = draw(500, temperature=1.8, seed=6)
    whole = fit_temperature(logits, labels)
    monkeypatch.setattr(probabilities, "NUMBERS_AT_ONCE", 70)
    assert fit_temperature(logits, labels).temperature == pytest.approx(whole.temperature, rel=1e-12)


def test_bounds_are_reported() -> None:
    logits, _ = draw(200, temperature=1.0, seed=7)
    separable = fit_temperature(logits, logits.argmax(dim=1))
    assert (separable.temperature, separable.at_bound, separable.standard_error) == (LOWEST_TEMPERATURE, "lowest", None)
    misleading = fit_temperature(logits, logits.argmin(dim=1))
    assert misleading.temperature == pytest.approx(HIGHEST_TEMPERATURE)
    assert misleading.at_bound == "highest"
    flat = fit_temperature(torch.zeros(20, 4, dtype=torch.float64), torch.arange(20) % 4)
    assert (flat.temperature, flat.standard_error) == (1.0, None)  # any temperature is as good


def test_clusters_of_copies_are_worth_one_sample_each() -> None:
    logits, labels = draw(80, temperature=1.5, seed=8)
    clusters = torch.arange(80).repeat(6)
    alone = fit_temperature(logits, labels)
    copied = fit_temperature(logits.repeat(6, 1), labels.repeat(6), clusters=clusters)
    assert copied.temperature == pytest.approx(alone.temperature, rel=1e-9)
    assert copied.standard_error == pytest.approx(alone.standard_error, rel=1e-7)


def test_loss_at_row_temperatures() -> None:
    logits, labels = draw(50, temperature=1.5, seed=9)
    temperature = torch.linspace(0.5, 3, 50, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits / temperature[:, None], labels, reduction="none")
    torch.testing.assert_close(negative_log_likelihood_at(logits, labels, temperature), expected)
