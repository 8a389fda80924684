import pytest
import torch
from scipy.stats import norm

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.comparisons import adjust_by_holm, compare_to_baseline


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_holm_by_hand() -> None:
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_by_holm([0.4, None, 0.9]) == [0.8, None, 0.9]
    assert adjust_by_holm([0.7, 0.6]) == [1.0, 1.0]
    assert adjust_by_holm([]) == []


def test_difference_by_hand() -> None:
    scores = {"map": {"nll": tensor([1.0, 2.0, 3.0, 4.0])}, "la": {"nll": tensor([0.5, 1.0, 2.5, 4.0])}}
    (c,) = compare_to_baseline(scores, "map", confidence_level=0.9)
    standard_error = tensor([0.5, 1.0, 0.5, 0.0]).std().item() / 2
    assert (c.method, c.baseline, c.metric) == ("la", "map", "nll")
    assert c.difference == -0.5
    assert c.standard_error == pytest.approx(standard_error)
    assert c.high == pytest.approx(-0.5 + norm.ppf(0.95) * standard_error)
    assert c.p_value == c.adjusted_p_value == pytest.approx(2 * norm.cdf(-0.5 / standard_error))
    assert c.verdict == "better"


def test_pairing_sees_what_separate_intervals_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = 3 * torch.rand(200, generator=generator, dtype=torch.float64)
    noise = 0.02 * torch.randn(200, generator=generator, dtype=torch.float64)
    scores = {"map": {"nll": hard}, "la": {"nll": hard + 0.01 + noise}}
    (c,) = compare_to_baseline(scores, "map", confidence_level=0.95)
    assert c.verdict == "worse"
    assert c.standard_error < 0.03 * hard.std().item() / 200**0.5


def test_adjustment_runs_over_methods_and_metrics() -> None:
    """A lone p-value of 0.02 decides; among four tests it no longer does."""
    d = tensor([1.0, -1.0] * 50)
    d = d - d.mean() + norm.isf(0.01) * d.std() / 10
    zero = torch.zeros(100, dtype=torch.float64)
    (alone,) = compare_to_baseline({"a": {"nll": zero}, "b": {"nll": d}}, "a", confidence_level=0.95)
    assert alone.p_value == pytest.approx(0.02, abs=1e-9)
    assert alone.verdict == "worse"
    scores = {"a": {"nll": zero, "brier": zero}, **{m: {"nll": d, "brier": zero + 1e-3 * d.flip(0)} for m in "bc"}}
    among = compare_to_baseline(scores, "a", confidence_level=0.95)
    assert len(among) == 4
    assert among[0].adjusted_p_value == pytest.approx(0.08, abs=1e-8)
    assert {c.verdict for c in among} == {"no detectable difference"}


@pytest.mark.parametrize(
    ("difference", "p_value", "verdict"),
    [
        ([0.0] * 5, 1.0, "no detectable difference"),
        ([0.25] * 5, 0.0, "worse"),
        ([0.25], None, "no detectable difference"),
    ],
    ids=["identical", "constant", "one sample"],
)
def test_differences_without_spread(difference, p_value, verdict) -> None:
    d = tensor(difference)
    (c,) = compare_to_baseline({"a": {"nll": 0 * d}, "b": {"nll": d}}, "a", confidence_level=0.95)
    assert (c.p_value, c.verdict) == (p_value, verdict)


@pytest.mark.slow
def test_no_more_false_verdicts_than_the_level_and_power(draw_classification) -> None:
    """Two equally wrong methods: any verdict at all is an error of the family."""
    n_sets, wrong, found = 400, 0, 0
    for seed in range(n_sets):
        p, y, _ = draw_classification(200, sharpness=1.0, seed=seed)
        swapped = torch.where(torch.rand(200, 1, generator=torch.Generator().manual_seed(seed)) < 0.5, p.roll(1, 1), p)
        mirrored = torch.where((swapped == p).all(dim=1, keepdim=True), p.roll(1, 1), p)
        sharp = p**2 / (p**2).sum(dim=1, keepdim=True)
        report = calibration_report({"a": swapped, "b": mirrored, "c": sharp}, y, task="multiclass", n_resamples=2)
        verdicts = {(c.method, c.metric): c.verdict for c in report.comparisons}
        wrong += any(verdicts["b", m] != "no detectable difference" for m in ("nll", "brier"))
        found += verdicts["c", "brier"] == "better"
    level = 0.05
    assert wrong < level * n_sets + 3.5 * (level * (1 - level) * n_sets) ** 0.5
    assert found > 0.75 * n_sets
