from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from debiased_laplace.calibration.estimates import Estimate, estimate_mean, wilson_interval
from debiased_laplace.calibration.metrics.detection import (
    ScoredSample,
    Separation,
    difference_of_aurocs,
    estimate_aupr,
    estimate_auroc,
    estimate_fpr95,
)

LEVEL = 0.95
ESTIMATORS = {"auroc": estimate_auroc, "aupr": estimate_aupr, "fpr95": estimate_fpr95}


def separate(inside, outside, clusters: tuple[Tensor | None, Tensor | None] = (None, None)) -> Separation:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (inside, outside))
    return Separation(ScoredSample(a, clusters[0]), ScoredSample(b, clusters[1]))


def measure(separation: Separation) -> dict[str, Estimate]:
    return {name: f(separation, confidence_level=LEVEL) for name, f in ESTIMATORS.items()}


def draw(n: int, m: int, *, seed: int, shift: float = 1.0, step: float | None = None) -> Separation:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, generator=generator, dtype=torch.float64)
    b = shift + 1.4 * torch.randn(m, generator=generator, dtype=torch.float64)
    return separate(*((x / step).round() * step if step else x for x in (a, b)))


def naive(separation: Separation) -> dict[str, float]:
    """Pairs, thresholds and all, straight from the definitions."""
    a, b = separation.inside.scores.tolist(), separation.outside.scores.tolist()
    auroc = sum((y > x) + (y == x) / 2 for y in b for x in a) / (len(a) * len(b))
    precision = [sum(z >= y for z in b) / (sum(z >= y for z in b) + sum(x >= y for x in a)) for y in b]
    for threshold in sorted({*a, *b}, reverse=True):
        if sum(y >= threshold for y in b) >= 0.95 * len(b) - 1e-9:
            break
    fpr = sum(x >= threshold for x in a) / len(a)
    return {"auroc": auroc, "aupr": sum(precision) / len(b), "fpr95": fpr}


CASES = {
    "no ties": {"n": 80, "m": 50},
    "ties": {"n": 80, "m": 50, "step": 0.5},
    "hardly any value": {"n": 60, "m": 40, "step": 4.0},
    "one sample inside": {"n": 1, "m": 20},
    "one sample outside": {"n": 20, "m": 1},
    "apart the wrong way": {"n": 40, "m": 40, "shift": -20.0},
}


@pytest.mark.parametrize("case", CASES)
def test_values_agree_with_the_definitions_and_scikit_learn(case: str) -> None:
    separation = draw(seed=1, **CASES[case])
    a, b = separation.inside.scores, separation.outside.scores
    m = {name: e.value for name, e in measure(separation).items()}
    assert m == pytest.approx(naive(separation), abs=1e-12)
    labels, scores = [0] * len(a) + [1] * len(b), torch.cat([a, b]).numpy()
    rates = roc_curve(labels, scores, drop_intermediate=False)
    assert m == pytest.approx(
        {
            "auroc": roc_auc_score(labels, scores),
            "aupr": average_precision_score(labels, scores),
            "fpr95": rates[0][(rates[1] >= 0.95 - 1e-12).argmax()],
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("step", [None, 0.5], ids=["no ties", "ties"])
def test_fpr95_agrees_with_torchmetrics(step: float | None) -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    separation = draw(400, 160, seed=2, step=step)
    scores = torch.cat([separation.inside.scores, separation.outside.scores])
    labels = torch.cat([torch.zeros(400, dtype=torch.int64), torch.ones(160, dtype=torch.int64)])
    squeezed = (scores - scores.min()) / (scores.max() - scores.min())
    specificity, _ = classification.binary_specificity_at_sensitivity(squeezed, labels, min_sensitivity=0.95)
    assert measure(separation)["fpr95"].known == pytest.approx(1 - specificity.item(), abs=1e-6)


def test_constant_scores_are_chance() -> None:
    m = measure(separate([1.0] * 300, [1.0] * 100))
    assert {name: e.value for name, e in m.items()} == {"auroc": 0.5, "aupr": 0.25, "fpr95": 1.0}


def test_perfect_separation_has_an_interval() -> None:
    m = measure(separate([0.1, 0.2] * 50, [0.8, 0.9] * 100))
    assert {name: e.value for name, e in m.items()} == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    assert m["auroc"].low == wilson_interval(1.0, 100, confidence_level=LEVEL)[0]
    assert m["auroc"].high == 1.0
    assert m["fpr95"].low == 0
    assert (m["fpr95"].high or 0) >= wilson_interval(0.0, 100, confidence_level=LEVEL)[1]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 50), (50, 1)])
def test_one_sample_on_a_side_has_no_interval(n: int, m: int) -> None:
    for estimate in measure(draw(n, m, seed=3)).values():
        assert estimate.value is not None
        assert estimate.low is None
        assert "one independent sample" in (estimate.reason or "")
    assert difference_of_aurocs(draw(n, m, seed=3), draw(n, m, seed=4))[1] is None


def test_few_samples_outside_say_nothing_of_their_quantile() -> None:
    few, enough = draw(1000, 40, seed=5), draw(1000, 400, seed=5)
    assert measure(few)["fpr95"].high == 1.0  # the least of 40 may well lie above the 5 % quantile
    assert (measure(enough)["fpr95"].high or 1) < 1


def test_the_order_of_the_samples_does_not_matter() -> None:
    one = draw(300, 200, seed=6, step=0.25)
    a, b = one.inside.scores, one.outside.scores
    generator = torch.Generator().manual_seed(0)
    other = separate(a[torch.randperm(300, generator=generator)], b[torch.randperm(200, generator=generator)])
    for name, estimate in measure(one).items():
        again = measure(other)[name]
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((again.value, again.low, again.high))


def test_standard_error_is_delongs() -> None:
    separation = draw(60, 40, seed=7, step=0.5)
    a, b = separation.inside.scores, separation.outside.scores
    wins = (b[:, None] > a[None, :]).double() + (b[:, None] == a[None, :]).double() / 2
    variance = wins.mean(dim=1).var() / 40 + wins.mean(dim=0).var() / 60
    assert measure(separation)["auroc"].standard_error == pytest.approx(variance.sqrt().item(), rel=1e-12)


def test_influence_on_the_average_precision_is_its_derivative() -> None:
    separation = draw(50, 30, seed=8, step=0.5)
    a, b = separation.inside.scores, separation.outside.scores

    def weighted(w: Tensor, v: Tensor) -> float:
        above_a = torch.stack([(w * (a >= y)).sum() for y in b]) * 50
        above_b = torch.stack([(v * (b >= y)).sum() for y in b]) * 30
        return (v * above_b / (above_a + above_b)).sum().item()

    w, v = torch.full((50,), 1 / 50, dtype=torch.float64), torch.full((30,), 1 / 30, dtype=torch.float64)
    start, step = weighted(w, v), 1e-6
    assert start == pytest.approx(separation.average_precision, abs=1e-14)
    inside, outside = (x - x.mean() for x in separation.precision_influence)
    for i in range(0, 50, 7):
        moved = (1 - step) * w
        moved[i] += step
        assert inside[i].item() == pytest.approx((weighted(moved, v) - start) / step, abs=1e-4)
    for i in range(0, 30, 7):
        moved = (1 - step) * v
        moved[i] += step
        assert outside[i].item() == pytest.approx((weighted(w, moved) - start) / step, abs=1e-4)


def test_clusters_of_copies_are_worth_one_sample_each() -> None:
    one = draw(100, 80, seed=9)
    a, b = one.inside.scores, one.outside.scores
    clusters = (torch.arange(100).repeat_interleave(5), torch.arange(80).repeat_interleave(5))
    copies = separate(a.repeat_interleave(5), b.repeat_interleave(5), clusters)
    for name, estimate in measure(one).items():
        copied = measure(copies)[name]
        assert copied.value == pytest.approx(estimate.value)
        if estimate.standard_error is not None:
            assert copied.standard_error == pytest.approx(estimate.standard_error, rel=1e-6)
        assert (copied.high or 0) - (copied.low or 0) > 0.9 * ((estimate.high or 0) - (estimate.low or 0))
    alone = separate(a.repeat_interleave(5), b.repeat_interleave(5))
    assert (measure(alone)["auroc"].standard_error or 1) < 0.5 * (measure(one)["auroc"].standard_error or 0)


def test_paired_difference_is_sharper_than_two_intervals() -> None:
    generator = torch.Generator().manual_seed(10)
    a, b = torch.randn(500, generator=generator), 1 + torch.randn(300, generator=generator)
    noise = (0.2 * torch.randn(500, generator=generator), 0.2 * torch.randn(300, generator=generator))
    one, other = separate(a, b), separate(a + noise[0], b + noise[1])
    difference, error = difference_of_aurocs(one, other)
    first, second = (measure(s)["auroc"] for s in (one, other))
    assert difference == pytest.approx(first.known - second.known, abs=1e-14)
    assert error is not None
    assert error < 0.4 * (first.standard_error or 0)
    assert difference_of_aurocs(one, one) == (0.0, 0.0)


def _normal(shift: float, *, step: float | None = None, spread: float = 1.0) -> Callable[..., Separation]:
    def drawn(n: int, m: int, generator: torch.Generator) -> Separation:
        a = torch.randn(n, generator=generator, dtype=torch.float64)
        b = shift + spread * torch.randn(m, generator=generator, dtype=torch.float64)
        return separate(*((x / step).round() if step else x for x in (a, b)))

    return drawn


def _clustered(n: int, m: int, generator: torch.Generator) -> Separation:
    sides, clusters = [], []
    for size, shift in ((n, 0.0), (m, 1.0)):
        clusters.append(torch.arange(size) // 20)
        shared = torch.randn(size // 20, generator=generator, dtype=torch.float64)[clusters[-1]]
        own = torch.randn(size, generator=generator, dtype=torch.float64)
        sides.append(shift + 0.7 * (shared + own))
    return separate(*sides, (clusters[0], clusters[1]))


SIMULATIONS: dict[str, tuple[int, int, Callable[..., Separation], float]] = {
    "200 and 200": (200, 200, _normal(1.0), 0.90),
    "1000 and 100": (1000, 100, _normal(1.0), 0.90),
    "100 and 1000, far apart": (100, 1000, _normal(2.0), 0.89),
    "500 and 500, hardly mixed": (500, 500, _normal(3.0), 0.90),
    "scores with ties": (1000, 300, _normal(1.0, step=0.5), 0.90),
    "score without use": (1000, 300, _normal(0.0), 0.90),
    "wider outside": (500, 500, _normal(1.0, spread=2.0), 0.90),
    "50 clusters of 20 on each side": (1000, 1000, _clustered, 0.90),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SIMULATIONS)
def test_intervals_of_detection_cover(case: str) -> None:
    n, m, drawn, least = SIMULATIONS[case]
    generator = torch.Generator().manual_seed(12)
    size = 1_000_000
    large = drawn(size, size * m // n // 20 * 20, generator)
    truth = {
        "auroc": large.components[1].mean().item(),
        "aupr": large.average_precision,
        "fpr95": large.false_positive_rate_at(0.95),
    }
    repetitions = 400
    hits, narrow = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(repetitions):
        for name, e in measure(drawn(n, m, generator)).items():
            assert e.low is not None
            assert e.high is not None
            hits[name] += e.low <= truth[name] <= e.high
            narrow[name] += abs(truth[name] - e.known) <= (e.high - e.low) / 4
    for name in truth:
        assert hits[name] / repetitions >= least, (name, hits[name] / repetitions)
    assert narrow["auroc"] / repetitions < 0.85  # half the width would miss: the test could fail


@pytest.mark.slow
def test_paired_test_has_its_size_and_power() -> None:
    from scipy.special import ndtr

    generator = torch.Generator().manual_seed(13)
    rejected = {"equal": 0, "different": 0}
    for _ in range(400):
        a, b = torch.randn(300, generator=generator), 1 + torch.randn(200, generator=generator)
        noisy = [
            (a + 0.3 * torch.randn(300, generator=generator), b + 0.3 * torch.randn(200, generator=generator))
            for _ in range(2)
        ]
        one, equal, worse = separate(*noisy[0]), separate(*noisy[1]), separate(noisy[1][0], noisy[1][1] - 0.2)
        for name, other in (("equal", equal), ("different", worse)):
            difference, error = difference_of_aurocs(one, other)
            rejected[name] += 2 * ndtr(-abs(difference) / (error or 1)) < 0.05
    assert 0.025 <= rejected["equal"] / 400 <= 0.08
    assert rejected["different"] / 400 > 0.9


def test_components_have_the_area_as_both_means() -> None:
    separation = draw(90, 70, seed=14, step=0.25)
    inside, outside = (estimate_mean(x, confidence_level=LEVEL).known for x in separation.components)
    assert inside == pytest.approx(outside, abs=1e-14)
