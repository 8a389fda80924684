from collections.abc import Callable
from math import ceil, log

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from debiased_laplace.calibration.estimates import wilson_interval
from debiased_laplace.calibration.metrics.risk_coverage import RankedLosses, rank_losses
from debiased_laplace.calibration.metrics.selective import (
    MAX_POINTS,
    count_kept,
    measure_selection,
    risk_intervals,
    trace_selection,
)

LEVEL = 0.95


def measure(errors: list[int] | Tensor, confidence: list[float] | Tensor, clusters: Tensor | None = None):
    losses = torch.as_tensor(errors, dtype=torch.float64)
    ranked = rank_losses(losses, torch.as_tensor(confidence, dtype=torch.float64), clusters=clusters)
    return measure_selection(ranked, confidence_level=LEVEL)


def values(*args) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in measure(*args).items()}


def harmonic(n: int) -> float:
    return sum(1 / k for k in range(1, n + 1))


def test_perfect_order() -> None:
    n, wrong = 20, 4
    m = measure([0] * (n - wrong) + [1] * wrong, [n - i for i in range(n)])
    area = sum((k - (n - wrong)) / k for k in range(n - wrong + 1, n + 1)) / n
    assert m["aurc"].value == pytest.approx(area, abs=1e-15)
    assert m["augrc"].value == pytest.approx(0.5 * (wrong / n) ** 2, abs=1e-15)
    assert m["e_aurc"].value == 0
    assert m["e_aurc"].low is None
    assert "best there is" in (m["e_aurc"].reason or "")
    assert m["risk_at_80_coverage"].value == 0
    assert m["coverage_at_5_risk"].value == 16 / 20  # 17 would hold an error of 5.9 %


def test_constant_confidence_is_the_share_of_errors_everywhere() -> None:
    m = values([1, 0, 0, 0, 0] * 8, [0.7] * 40)
    assert m["aurc"] == pytest.approx(0.2, abs=1e-15)
    assert m["augrc"] == pytest.approx(0.1, abs=1e-15)
    assert m["risk_at_80_coverage"] == pytest.approx(0.2, abs=1e-15)
    assert m["coverage_at_5_risk"] == 0


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_one_error(rank: int) -> None:
    n = 10
    errors = [int(k == rank) for k in range(1, n + 1)]
    m = measure(errors, [-float(k) for k in range(n)])
    assert m["aurc"].known == pytest.approx((harmonic(n) - harmonic(rank - 1)) / n, abs=1e-15)
    assert m["augrc"].known == pytest.approx((n - rank + 0.5) / n**2, abs=1e-15)
    assert m["coverage_at_5_risk"].value == (rank - 1) / n
    for name, estimate in m.items():
        if estimate.low is not None and estimate.high is not None:
            assert 0 <= estimate.low <= estimate.known <= estimate.high <= 1, name


def test_all_right() -> None:
    m = measure([0] * 50, list(range(50)))
    assert {name: e.value for name, e in m.items()} == {
        "aurc": 0.0,
        "e_aurc": 0.0,
        "augrc": 0.0,
        "coverage_at_5_risk": 1.0,
        "risk_at_80_coverage": 0.0,
    }
    assert m["aurc"].high == wilson_interval(0.0, 50, confidence_level=LEVEL)[1]
    assert m["augrc"].high == pytest.approx(m["aurc"].high / 2)
    assert m["risk_at_80_coverage"].high == pytest.approx(wilson_interval(0.0, 40, confidence_level=LEVEL)[1])
    assert (m["coverage_at_5_risk"].low, m["coverage_at_5_risk"].high) == (0.0, 1.0)  # 50 samples cannot show 5 %
    assert measure([0] * 200, list(range(200)))["coverage_at_5_risk"].low == 1.0


def test_all_wrong() -> None:
    m = measure([1] * 50, list(range(50)))
    assert [m[name].value for name in ("aurc", "augrc", "coverage_at_5_risk", "risk_at_80_coverage")] == [1, 0.5, 0, 1]
    assert m["aurc"].low is None
    assert "every prediction is wrong" in (m["aurc"].reason or "")


@pytest.mark.parametrize("error", [0, 1])
def test_one_sample_has_no_interval(error: int) -> None:
    for estimate in measure([error], [0.5]).values():
        assert estimate.value in (0, 0.5, 1)
        assert estimate.low is None
        assert estimate.reason
    assert all(e.low is None for e in measure([1, 0, 0], [0.1, 0.2, 0.3], torch.zeros(3, dtype=torch.int64)).values())


def test_generalized_area_is_what_its_authors_derive() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = (12 * torch.rand(500, generator=generator, dtype=torch.float64)).floor()
    errors = (torch.rand(500, generator=generator, dtype=torch.float64) < 0.5 - confidence / 30).double()
    a = 1 - errors.mean().item()
    auroc = roc_auc_score((1 - errors).numpy(), confidence.numpy())
    expected = (1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2
    assert measure(errors, confidence)["augrc"].known == pytest.approx(expected, abs=1e-14)


def naive(errors: Tensor, confidence: Tensor) -> dict[str, float]:
    """Straight from the definitions, for confidences without ties."""
    order = confidence.argsort(descending=True)
    n, lost = len(errors), errors[order].cumsum(0)
    risk = [lost[k - 1].item() / k for k in range(1, n + 1)]
    best = [errors.sort().values[:k].mean().item() for k in range(1, n + 1)]
    return {
        "aurc": sum(risk) / n,
        "e_aurc": (sum(risk) - sum(best)) / n,
        "augrc": sum(
            (errors[i] * ((confidence[i] > confidence).double().sum() + 0.5)).item() for i in range(n)
        )
        / n**2,
        "coverage_at_5_risk": max([k / n for k in range(1, n + 1) if risk[k - 1] <= 0.05], default=0.0),
        "risk_at_80_coverage": risk[ceil(0.8 * n) - 1],
    }  # fmt: skip


@pytest.mark.parametrize("n", [2, 7, 250])
def test_values_agree_with_the_definitions(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    confidence = torch.rand(n, generator=generator, dtype=torch.float64)
    errors = (torch.rand(n, generator=generator, dtype=torch.float64) < 0.6 * (1 - confidence)).double()
    assert values(errors, confidence) == pytest.approx(naive(errors, confidence), abs=1e-13)


def test_share_of_samples_is_rounded_up() -> None:
    assert [count_kept(n, 0.8) for n in (1, 4, 5, 10, 11)] == [1, 4, 4, 8, 9]
    assert count_kept(1000, 0.95) == 950


def test_interval_of_the_risk_of_all_samples_is_wilsons() -> None:
    generator = torch.Generator().manual_seed(3)
    confidence = torch.rand(400, generator=generator, dtype=torch.float64)
    errors = (torch.rand(400, generator=generator, dtype=torch.float64) < 0.2).double()
    ranked = rank_losses(errors, confidence)
    low, high = risk_intervals(ranked, torch.tensor([400.0], dtype=torch.float64), confidence_level=LEVEL)
    expected = wilson_interval(errors.mean().item(), 399, confidence_level=LEVEL)  # a variance has one degree less
    assert (low.item(), high.item()) == pytest.approx(expected, abs=1e-12)


def test_curve_is_thinned_and_ends_with_all_samples() -> None:
    generator = torch.Generator().manual_seed(4)
    confidence = torch.rand(3217, generator=generator, dtype=torch.float64)
    errors = (torch.rand(3217, generator=generator, dtype=torch.float64) < 0.4 * (1 - confidence)).double()
    ranked = rank_losses(errors, confidence)
    curves = trace_selection(ranked, confidence_level=LEVEL, loss="share of errors", is_share=True)
    assert len(curves.points) == MAX_POINTS
    assert curves.points[-1].coverage == 1
    assert curves.points[-1].risk == pytest.approx(errors.mean().item(), abs=1e-15)
    for p in curves.points:
        k = round(p.coverage * 3217)
        assert p.risk == pytest.approx(ranked.risk[k - 1].item(), abs=1e-15)
        assert p.oracle == pytest.approx(ranked.oracle.risk[k - 1].item(), abs=1e-15)
        assert p.low is not None
        assert p.high is not None
        assert p.low <= p.risk <= p.high
    assert [k.coverage for k in curves.kept] == [0.8, 0.9, 0.95]
    risk = measure_selection(ranked, confidence_level=LEVEL)["risk_at_80_coverage"]
    kept = curves.kept[0].accuracy
    assert (kept.value, kept.low, kept.high) == (1 - risk.known, 1 - (risk.high or 0), 1 - (risk.low or 0))
    few = trace_selection(rank_losses(errors[:3], confidence[:3]), confidence_level=LEVEL, loss="", is_share=True)
    assert len(few.points) == 3


Draw = Callable[[int, torch.Generator], RankedLosses]


def _independent(base: float, slope: float, *, n_values: int | None = None) -> Draw:
    def draw(n: int, generator: torch.Generator) -> RankedLosses:
        s = torch.rand(n, generator=generator, dtype=torch.float64)
        errors = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(base - slope * s)
        return rank_losses(errors.double(), (s * n_values).floor() if n_values else s)

    return draw


def _clustered(n: int, generator: torch.Generator) -> RankedLosses:
    """Twenty samples of a cluster are confident together and wrong together."""
    clusters = torch.arange(n) // 20
    shared = torch.randn(2, n // 20, generator=generator, dtype=torch.float64)[:, clusters]
    s = torch.special.ndtr((shared[0] + torch.randn(n, generator=generator, dtype=torch.float64)) / 2**0.5)
    errors = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(shared[1] - 0.5 - 4 * s)
    return rank_losses(errors.double(), s, clusters=clusters)


CASES: dict[str, tuple[int, Draw, float]] = {
    "200 samples, 12 % errors": (200, _independent(-0.5, 4), 0.90),
    "1000 samples, 12 % errors": (1000, _independent(-0.5, 4), 0.90),
    "1000 samples, 2 % errors": (1000, _independent(-2, 5), 0.90),
    "200 samples, 2 % errors": (200, _independent(-2, 5), 0.90),
    "1000 samples, a third wrong": (1000, _independent(1, 4), 0.88),
    "confidence without use": (500, _independent(-1.4, 0), 0.90),
    "ten values of confidence": (1000, _independent(-0.5, 4, n_values=10), 0.90),
    "50 clusters of 20": (1000, _clustered, 0.90),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_intervals_cover(case: str) -> None:
    n, draw, least = CASES[case]
    generator = torch.Generator().manual_seed(11)
    large = draw(1_000_000, generator)
    fine = (large.risk[1000:] <= 0.05).nonzero()
    truth = {
        "aurc": large.area,
        "e_aurc": large.area - large.oracle.area,
        "augrc": large.generalized_area,
        "coverage_at_5_risk": (fine[-1].item() + 1001) / large.n if fine.numel() else 0.0,
        "risk_at_80_coverage": large.risk_at(torch.tensor([0.8 * large.n], dtype=torch.float64)).item(),
    }
    repetitions = 400
    hits = dict.fromkeys(truth, 0)
    narrow = dict.fromkeys(truth, 0)
    for _ in range(repetitions):
        for name, e in measure_selection(draw(n, generator), confidence_level=LEVEL).items():
            if e.low is None or e.high is None:
                hits[name] += 1  # says that it does not know
                continue
            hits[name] += e.low <= truth[name] <= e.high
            half = (e.high - e.low) / 4
            narrow[name] += abs(truth[name] - e.known) <= half
    for name in truth:
        assert hits[name] / repetitions >= least, (name, hits[name] / repetitions)
    if n * large.risk[-1].item() >= 10:  # with fewer errors the intervals are wide on purpose
        assert narrow["augrc"] / repetitions < 0.85  # half the width would miss: the test could fail


def test_the_area_of_a_random_order_is_the_share_of_errors() -> None:
    generator = torch.Generator().manual_seed(8)
    errors = (torch.rand(20_000, generator=generator) < 0.3).double()
    m = measure(errors, torch.rand(20_000, generator=generator, dtype=torch.float64))
    r = errors.mean().item()
    assert m["aurc"].known == pytest.approx(r, abs=4 * (m["aurc"].standard_error or 0))
    assert m["e_aurc"].known == pytest.approx(m["aurc"].known - (r + (1 - r) * log(1 - r)), abs=1e-3)
