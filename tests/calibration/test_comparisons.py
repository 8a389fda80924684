import pytest
import torch
from scipy.stats import norm

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.comparisons import adjust_by_holm, compare_methods, compare_shares
from debiased_laplace.calibration.skewness import lean_of, straighten


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_holm_by_hand() -> None:
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_by_holm([0.4, None, 0.9]) == [0.8, None, 0.9]
    assert adjust_by_holm([0.7, 0.6]) == [1.0, 1.0]
    assert adjust_by_holm([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_holm_against_its_definition(seed: int) -> None:
    """Adjusted p = the smallest level at which the step-down procedure rejects, found by trying levels."""
    p = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3).tolist()
    adjusted = adjust_by_holm(list(p))
    for level in [k / 400 + 1e-7 for k in range(400)]:
        rejected, order = set(), sorted(range(6), key=lambda i: p[i])
        for step, i in enumerate(order):
            if p[i] > level / (6 - step):
                break
            rejected.add(i)
        assert rejected == {i for i in range(6) if adjusted[i] <= level}


def test_difference_by_hand() -> None:
    scores = {"map": {"nll": tensor([1.0, 2.0, 3.0, 4.0])}, "la": {"nll": tensor([0.5, 1.0, 2.5, 3.0])}}
    (c,) = compare_methods(scores, ("map",), confidence_level=0.9)
    standard_error = tensor([0.5, 1.0, 0.5, 1.0]).std().item() / 2
    assert (c.method, c.baseline, c.metric) == ("la", "map", "nll")
    assert c.difference == -0.75
    assert c.standard_error == pytest.approx(standard_error)
    # no skewness, so the interval is the normal one
    assert c.high == pytest.approx(-0.75 + norm.ppf(0.95) * standard_error)
    assert c.p_value == c.adjusted_p_value == pytest.approx(2 * norm.cdf(-0.75 / standard_error))
    assert c.verdict == "better"


def test_a_skewed_difference_is_straightened() -> None:
    d = tensor([0.0, 0.0, 0.0, 0.1, 0.2, 3.0])
    (c,) = compare_methods({"a": {"nll": 0 * d}, "b": {"nll": d}}, ("a",), confidence_level=0.9)
    t = d.mean() / (d.std() / 6**0.5)
    assert c.p_value == pytest.approx(2 * norm.cdf(-straighten(t.item(), lean_of(d - d.mean()))))
    assert c.high - c.difference > 2 * (c.difference - c.low)


def test_pairing_sees_what_separate_intervals_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = 3 * torch.rand(200, generator=generator, dtype=torch.float64)
    noise = 0.02 * torch.randn(200, generator=generator, dtype=torch.float64)
    scores = {"map": {"nll": hard}, "la": {"nll": hard + 0.01 + noise}}
    (c,) = compare_methods(scores, ("map",), confidence_level=0.95)
    assert c.verdict == "worse"
    assert c.standard_error < 0.03 * hard.std().item() / 200**0.5


def test_adjustment_runs_over_methods_metrics_and_references() -> None:
    """A lone p-value of 0.02 decides; among four tests it no longer does."""
    d = tensor([1.0, -1.0] * 50)
    d = d - d.mean() + norm.isf(0.01) * d.std() / 10
    zero = torch.zeros(100, dtype=torch.float64)
    (alone,) = compare_methods({"a": {"nll": zero}, "b": {"nll": d}}, ("a",), confidence_level=0.95)
    assert alone.p_value == pytest.approx(0.02, abs=1e-9)
    assert alone.verdict == "worse"
    scores = {"a": {"nll": zero, "brier": zero}, **{m: {"nll": d, "brier": zero + 1e-3 * d.flip(0)} for m in "bc"}}
    among = compare_methods(scores, ("a",), confidence_level=0.95)
    assert len(among) == 4
    assert among[0].adjusted_p_value == pytest.approx(0.08, abs=1e-8)
    assert {c.verdict for c in among} == {"no detectable difference"}


def test_two_references_and_who_is_compared_with_whom() -> None:
    x = tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    scores = {m: {"nll": x + i, "error": x} for i, m in enumerate(["map", "scaled", "la"])}
    found = compare_methods(scores, ("map", "scaled"), confidence_level=0.95)
    assert [(c.method, c.baseline, c.metric) for c in found] == [
        ("scaled", "map", "nll"),  # its errors are those of map by construction
        ("la", "map", "nll"),
        ("la", "map", "error"),
        ("la", "scaled", "nll"),
        ("la", "scaled", "error"),
    ]
    assert [c.difference for c in found] == [1, 2, 0, 1, 0]


def test_the_error_of_a_fit_widens_its_own_comparisons_only() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {
        m: {"nll": torch.rand(50, generator=generator, dtype=torch.float64), "brier": tensor([0.0] * 49 + [1.0])}
        for m in ("map", "scaled", "la")
    }
    plain = compare_methods(scores, ("map", "scaled"), confidence_level=0.95)
    wide = compare_methods(scores, ("map", "scaled"), confidence_level=0.95, fitting_errors={"scaled": 0.2})
    for a, b in zip(plain, wide, strict=True):
        if "scaled" in (a.method, a.baseline) and a.metric == "nll":
            assert b.standard_error == pytest.approx((a.standard_error**2 + 0.2**2) ** 0.5)
            assert b.high - b.low > 1.5 * (a.high - a.low)
            assert b.p_value > a.p_value
        else:
            assert (a.low, a.high, a.p_value) == (b.low, b.high, b.p_value)


def test_paired_proportions_by_hand() -> None:
    """Bonett and Price: 6 + 1 and 2 + 1 disagreements of 40 + 2."""
    d = tensor([1.0] * 6 + [-1.0] * 2 + [0.0] * 32)
    e, p = compare_shares(d, confidence_level=0.95)
    shrunk = 4 / 42
    error = ((10 / 42 - shrunk**2) / 42) ** 0.5
    assert (e.value, e.standard_error) == (0.1, pytest.approx(error))
    assert (e.low, e.high) == pytest.approx((shrunk - norm.ppf(0.975) * error, shrunk + norm.ppf(0.975) * error))
    assert p == pytest.approx(2 * norm.cdf(-shrunk / error))
    same, one = compare_shares(0 * d, confidence_level=0.95)
    assert one == 1.0
    assert same.low < 0 < same.high  # no disagreement among 40 does not prove that there is none


@pytest.mark.parametrize("metric", ["nll", "rmsce2_debiased"])
@pytest.mark.parametrize(
    ("difference", "p_value", "verdict"),
    [
        ([0.0] * 5, 1.0, "no detectable difference"),
        ([0.25] * 5, 0.0, "worse"),
        ([0.25], None, "no detectable difference"),
    ],
    ids=["identical", "constant", "one sample"],
)
def test_differences_without_spread(metric, difference, p_value, verdict) -> None:
    d = tensor(difference)
    (c,) = compare_methods({"a": {metric: 0 * d}, "b": {metric: d}}, ("a",), confidence_level=0.95)
    assert (c.p_value, c.verdict) == (p_value, verdict)


@pytest.mark.parametrize("metric", ["nll", "error", "rmsce2_debiased"])
def test_clusters_of_copies_count_once(metric: str) -> None:
    d = tensor([1.0, 0.0, -1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    clusters = torch.arange(8).repeat_interleave(9)
    copies = {"a": {metric: torch.zeros(72, dtype=torch.float64)}, "b": {metric: d.repeat_interleave(9)}}
    (c,) = compare_methods(copies, ("a",), confidence_level=0.95, clusters=clusters)
    assert c.standard_error == pytest.approx(d.std().item() / 8**0.5)
    (naive,) = compare_methods(copies, ("a",), confidence_level=0.95)
    assert naive.p_value < 0.2 * c.p_value


def test_agrees_with_a_paired_bootstrap(draw_classification) -> None:
    """The same resampled samples for both methods: mean, deviation and studentized ends of 4,000 test sets."""
    p, y, _ = draw_classification(500, sharpness=1.5, seed=3)
    q, _, _ = draw_classification(500, sharpness=1.0, seed=3)
    report = calibration_report({"map": p, "la": q}, y, task="multiclass", n_resamples=10, temperature_scaling="none")
    c = next(c for c in report.comparisons if c.metric == "nll")
    d = (p.gather(1, y[:, None]) / q.gather(1, y[:, None])).log()[:, 0]
    drawn = torch.randint(500, (4000, 500), generator=torch.Generator().manual_seed(4))
    means, deviations = d[drawn].mean(dim=1), d[drawn].std(dim=1)
    assert c.difference == pytest.approx(d.mean().item())
    assert means.mean().item() == pytest.approx(c.difference, abs=4 * c.standard_error / 4000**0.5)
    assert means.std().item() == pytest.approx(c.standard_error, rel=0.05)
    t = torch.quantile((means - d.mean()) / deviations, tensor([0.975, 0.025])) * d.std()
    assert [c.low, c.high] == pytest.approx((d.mean() - t).tolist(), abs=0.08 * (c.high - c.low))


@pytest.mark.slow
def test_no_more_false_verdicts_than_the_level_and_power(draw_classification) -> None:
    """Two equally wrong methods: any verdict at all is an error of the family."""
    n_sets, wrong, found = 400, 0, 0
    for seed in range(n_sets):
        p, y, _ = draw_classification(200, sharpness=1.0, seed=seed)
        swapped = torch.where(torch.rand(200, 1, generator=torch.Generator().manual_seed(seed)) < 0.5, p.roll(1, 1), p)
        mirrored = torch.where((swapped == p).all(dim=1, keepdim=True), p.roll(1, 1), p)
        sharp = p**2 / (p**2).sum(dim=1, keepdim=True)
        report = calibration_report(
            {"a": swapped, "b": mirrored, "c": sharp}, y, task="multiclass", n_resamples=2, temperature_scaling="none"
        )
        verdicts = {(c.method, c.metric): c.verdict for c in report.comparisons}
        assert len(verdicts) == 8
        wrong += any(verdicts["b", m] != "no detectable difference" for m in ("nll", "brier", "error"))
        found += verdicts["c", "brier"] == "better"
    level = 0.05
    assert wrong < level * n_sets + 3.5 * (level * (1 - level) * n_sets) ** 0.5
    assert found > 0.7 * n_sets
