"""Detection: scikit-learn, DeLong's variance pair by pair, simulations, and sets out of distribution in reports."""

from math import sqrt

import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

import debiased_laplace.calibration.metrics.detection as dt
from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.intervals import Units, student_quantile, wilson_interval
from debiased_laplace.calibration.probabilities import PosteriorPredictive

LEVEL = 0.95


def separate(test, ood, codes: tuple[Tensor | None, Tensor | None] = (None, None)) -> dt.Separation:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (test, ood))
    return dt.Separation(a, b, Units(len(a), LEVEL, codes[0]), Units(len(b), LEVEL, codes[1]))


def measure(s: dt.Separation):
    return {"auroc": dt.estimate_auroc(s), "aupr": dt.estimate_aupr(s), "fpr95": dt.estimate_fpr95(s)}


def draw(n: int, m: int, seed, *, shift: float = 1.0, step: float | None = None, cluster: int = 0) -> dt.Separation:
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    a, b = (torch.randn(k, generator=g, dtype=torch.float64) for k in (n, m))
    codes = tuple(torch.arange(k) // cluster if cluster else None for k in (n, m))
    if cluster:
        a, b = (x + torch.randn(len(x) // cluster, generator=g)[c] for x, c in zip((a, b), codes, strict=True))
    return separate(*((x / step).round() if step else x for x in (a, shift + 1.4 * b)), codes)


def compare(one: dt.Separation, other: dt.Separation):
    return dt.measure_set({"map": {"entropy": one}, "la": {"entropy": other}}, "map").comparisons[0]


def area(test: Tensor, ood: Tensor) -> float:
    return float(roc_auc_score([0] * len(test) + [1] * len(ood), torch.cat([test, ood])))


CASES = {
    "no ties": {"n": 80, "m": 50},
    "ties": {"n": 80, "m": 50, "step": 0.5},
    "one sample in distribution": {"n": 1, "m": 20},
    "one sample out of distribution": {"n": 20, "m": 1},
    "apart the wrong way": {"n": 40, "m": 40, "shift": -20.0},
    "apart the right way": {"n": 40, "m": 60, "shift": 20.0},
    "constant": {"n": 30, "m": 10, "step": 1e9},
    "95 percent is no whole number": {"n": 40, "m": 10},
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_scikit_learns(case: str) -> None:
    s = draw(seed=1, **CASES[case])
    labels, scores, found = [0] * s.units.n + [1] * s.ood_units.n, torch.cat([s.test, s.ood]), measure(s)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    expected = {"auroc": area(s.test, s.ood), "aupr": average_precision_score(labels, scores)}
    expected["fpr95"] = false[(true >= 0.95 - 1e-12).argmax()]
    assert {name: e.value for name, e in found.items()} == pytest.approx(expected, abs=1e-12)
    e = found["auroc"]  # Newcombe's interval
    size = e.known * (1 - e.known) / e.standard_error**2 if e.standard_error else float(s.fewest_units)
    assert "one sample" in case or (e.low, e.high) == pytest.approx(wilson_interval(e.known, size, LEVEL))
    if "one sample" in case:
        assert all("one independent sample" in e.reason for e in found.values())
        assert (compare(s, s).low, compare(s, s).p_value, compare(s, s).verdict[:2]) == (None, None, "no")


def test_the_ends_of_fpr95_are_those_of_its_threshold_and_of_its_rate() -> None:
    def rate(s: dt.Separation, share: float) -> float:
        return (s.test >= s.ood.sort(descending=True).values[int(-(-share * 400 // 1)) - 1]).double().mean().item()

    half = norm.ppf(0.975) * sqrt(0.95 * 0.05 / 400)
    for s, is_smooth in ((draw(1000, 400, 5), True), (draw(1000, 400, 5, step=1.0), False)):
        value, e = rate(s, 0.95), dt.estimate_fpr95(s)
        ends = zip(wilson_interval(value, 1000.0, LEVEL), (0.95 - half, 0.95 + half), strict=True)
        parts = [(abs(end - value), abs(rate(s, share) - value)) for end, share in ends]
        low, high = (sqrt(a**2 + b**2) if is_smooth else a + b for a, b in parts)
        assert (e.value, e.low, e.high) == pytest.approx((value, max(0, value - low), min(1, value + high)), abs=1e-12)
    assert dt.estimate_fpr95(draw(1000, 40, 5)).high == 1.0  # the least of 40 may well lie above the 5 % quantile


def test_standard_errors_and_paired_differences_are_delongs() -> None:
    one, other = draw(60, 40, 7, step=0.5), draw(60, 40, 8, step=0.5)
    other = separate(one.test + 0.3 * other.test, one.ood + 0.3 * other.ood)
    wins = [(s.ood[:, None] > s.test).double() + (s.ood[:, None] == s.test).double() / 2 for s in (one, other)]
    errors = [(w.mean(dim=1).var() / 40 + w.mean(dim=0).var() / 60).sqrt().item() for w in (wins[0], wins[1] - wins[0])]
    assert dt.estimate_auroc(one).standard_error == pytest.approx(errors[0], rel=1e-12)
    c, value, half = compare(one, other), (wins[1] - wins[0]).mean().item(), norm.ppf(0.975) * errors[1]
    assert (c.difference, c.standard_error) == pytest.approx((value, errors[1]))
    assert (c.low, c.high) == pytest.approx((value - half, value + half))
    assert (c.p_value, errors[1] < 0.6 * errors[0]) == (pytest.approx(2 * norm.sf(abs(value) / errors[1])), True)
    assert (compare(one, one).difference, compare(one, one).standard_error, compare(one, one).p_value) == (0, 0, 1)


def test_influence_on_the_average_precision_is_its_derivative() -> None:
    s, step = draw(50, 30, 8, step=0.5), 1e-6
    above = [(x[None, :] >= s.ood[:, None]).double() for x in (s.test, s.ood)]

    def weighted(w: Tensor, v: Tensor) -> float:
        ours = above[1] @ v * 30
        return (v * ours / (above[0] @ w * 50 + ours)).sum().item()

    even, (value, influence) = [torch.full((k,), 1 / k, dtype=torch.float64) for k in (50, 30)], s.average_precision()
    assert value == pytest.approx(weighted(*even), abs=1e-14)
    for side, i in ((0, 0), (0, 17), (0, 49), (1, 0), (1, 11), (1, 29)):
        moved = list(even)
        moved[side] = (1 - step) * even[side] + step * (torch.arange(len(even[side])) == i)
        slope = (weighted(*moved) - value) / step
        assert (influence[side] - influence[side].mean())[i].item() == pytest.approx(slope, abs=1e-4)


def test_a_cluster_of_copies_is_one_unit_and_order_is_nothing() -> None:
    one, codes = draw(100, 80, 9, step=0.05), [torch.arange(k).repeat(5) for k in (100, 80)]
    a, b, order = one.test.repeat(5), one.ood.repeat(5), torch.randperm(500, generator=torch.Generator())
    copies, shuffled = separate(a, b, tuple(codes)), separate(a[order], b.flip(0), (codes[0][order], codes[1].flip(0)))
    once = separate(one.test, one.ood, (torch.arange(100), torch.arange(80)))
    for e, again, single in zip(*(measure(s).values() for s in (copies, shuffled, once)), strict=True):
        assert (again.low, again.value, again.high) == pytest.approx((e.low, e.value, e.high), abs=1e-12)
        assert (e.low, e.value, e.high) == pytest.approx((single.low, single.value, single.high), abs=0.01)
    errors = [dt.estimate_auroc(s).standard_error for s in (copies, once, separate(a, b))]
    assert (errors[0], errors[2] < 0.5 * errors[0]) == (pytest.approx(errors[1], rel=1e-9), True)
    e, widening = dt.estimate_auroc(copies), student_quantile(LEVEL, 79) / norm.ppf(0.975)
    size = e.known * (1 - e.known) / (widening * e.standard_error) ** 2
    assert (e.low, e.high) == pytest.approx(wilson_interval(e.known, size, LEVEL))
    c = compare(copies, separate(-a, b, tuple(codes)))
    assert c.difference - c.low == pytest.approx(student_quantile(LEVEL, 79) * c.standard_error)


@pytest.mark.parametrize("case", [(300, 200, 0.1, None, 0), (500, 100, 2.5, 0.5, 0), (1000, 1000, 1.0, None, 20)])
def test_intervals_cover(case) -> None:
    (n, m, shift, step, cluster), generator, n_sets, narrow = case, torch.Generator().manual_seed(12), 200, 0
    how = {"shift": shift, "step": step, "cluster": cluster}  # almost chance, far apart with ties, clusters
    large = measure(draw(200_000, 200_000 * m // n, generator, **how))
    truth, hits = {name: e.known for name, e in large.items()}, dict.fromkeys(large, 0)
    for _ in range(n_sets):
        found = measure(draw(n, m, generator, **how))
        for name, e in found.items():
            hits[name] += e.low <= truth[name] <= e.high
        narrow += abs(truth["auroc"] - found["auroc"].known) <= (found["auroc"].high - found["auroc"].low) / 4
    assert all(hit / n_sets >= 0.9 for hit in hits.values()), hits
    assert narrow / n_sets < 0.85  # half the width would miss: the test could fail


def report(predictions, y, ood, **further):
    options = {"task": "multiclass", "n_resamples": 2, "temperature_scaling": "none", "ood": ood, **further}
    return calibration_report(predictions, y, **options)


@pytest.fixture
def sets(draw_classification):
    p, y, _ = draw_classification(400, sharpness=1.0, seed=31)
    q, _, _ = draw_classification(150, sharpness=1.0, seed=32)
    a, b = (torch.rand(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (400, 150))
    b[0, :40] = a[0, :40]  # ties
    blurred = (0.4 * q.log()).softmax(dim=1)
    ood = {"other": {"map": q, "laplace": PosteriorPredictive(blurred, b[0], b[1] + 0.8)}}
    return {"map": p, "laplace": PosteriorPredictive(p, *a)}, y, ood


def test_every_set_method_and_score_is_measured(sets) -> None:
    (predictions, y, ood), one = sets, report(*sets).ood["other"]
    inside, outside, metrics = predictions["laplace"], ood["other"]["laplace"], one.metrics
    pairs = {k: (getattr(inside, k), getattr(outside, k)) for k in ("mutual_information", "logit_variance")}
    places = [(a[:, None], (a, b)) for a, b in pairs.values()]
    ranks = [[((a < x).double() + (a == x) / 2).mean(dim=0) for x in both] for a, both in places]
    pairs = {"conformal": tuple(torch.maximum(*two) for two in zip(*ranks, strict=True)), **pairs}
    pairs["entropy"] = tuple(torch.special.entr(x.mean).sum(dim=1) for x in (inside, outside))
    pairs["max_probability"] = tuple(1 - x.mean.max(dim=1).values for x in (inside, outside))
    assert (list(metrics["map"]), list(metrics["laplace"])) == (["entropy", "max_probability"], list(pairs))
    for score, pair in pairs.items():
        assert metrics["laplace"][score]["auroc"].known == pytest.approx(area(*pair), abs=1e-12)
    compared, of_map = {c.score: c for c in one.comparisons}, metrics["map"]
    stand_ins = dict.fromkeys(list(pairs)[:4], "entropy") | {"max_probability": "max_probability"}
    assert {score: c.baseline_score for score, c in compared.items()} == stand_ins  # the network alone has two scores
    for score, c in compared.items():
        expected = area(*pairs[score]) - of_map[stand_ins[score]]["auroc"].known
        assert (c.difference, c.below_chance) == (pytest.approx(expected, abs=1e-14), False)
        assert c.verdict == "better" or score == "mutual_information"
    for name, n in (("n_in_distribution", 400), ("n_out_of_distribution", 150)):
        assert {sum(getattr(b, name) for b in d.histogram) for d in one.detections} == {n}
    edges = {(d.score, tuple((b.left, b.right) for b in d.histogram)) for d in one.detections}
    assert (len(edges), len(one.detections[0].histogram)) == (5, dt.HISTOGRAM_BINS)  # methods share them
    warned = report({**predictions, "laplace": inside.mean}, y, ood)
    assert "laplace: no mutual information on the test set, so that other is not judged by it." in warned.warnings


def test_verdicts_are_adjusted_over_all_sets_and_turn_with_the_baseline(sets) -> None:
    predictions, y, ood = sets
    alone = report(*sets).ood["other"].comparisons
    both = report(predictions, y, {"a": ood["other"], "b": ood["other"]}).ood
    assert [c.p_value for c in both["a"].comparisons] == [c.p_value for c in alone]
    best = min(range(5), key=lambda i: alone[i].p_value)
    assert both["b"].comparisons[best].adjusted_p_value == pytest.approx(10 * alone[best].p_value)
    for c in (c for one in both.values() for c in one.comparisons):
        assert (c.adjusted_low <= 0 <= c.adjusted_high) == (c.verdict == "no detectable difference")
        half = norm.ppf(0.5 + c.adjusted_level / 2) * c.standard_error
        assert (c.adjusted_low, c.adjusted_high) == pytest.approx((c.difference - half, c.difference + half))
    assert both["a"].comparisons[best].adjusted_level == pytest.approx(1 - 0.05 / 10)
    swapped = report(*sets, baseline="laplace").ood["other"].comparisons
    assert {(c.method, c.baseline, c.verdict) for c in swapped} >= {("map", "laplace", "worse")}
    surer = {"surer": {m: (k * ood["other"]["map"].log()).softmax(-1) for m, k in (("map", 4.0), ("laplace", 1.8))}}
    judged = report(predictions, y, surer).ood["surer"].comparisons  # both are surer there than on the test set
    assert {(c.verdict, c.below_chance) for c in judged} == {("better", True)}


def test_regression_is_detected_by_its_spread(draw_regression) -> None:
    mean, std, y = draw_regression(200, scale=1.3, seed=33)
    # a constant in two precisions: float32's 1.2 lies above float64's
    far = {"map": (mean[:50], torch.full((50,), 1.2)), "laplace": (mean[:50], 2 * std[:50])}
    predictions = {"map": (mean, torch.full_like(std, 1.2)), "laplace": (mean, std)}
    found = report(predictions, y, {"far": far}, task="regression").ood["far"]
    e, constant = (found.metrics[m]["standard_deviation"]["auroc"].known for m in ("laplace", "map"))
    assert (e, constant) == (pytest.approx(area(std, 2 * std[:50]), abs=1e-12), 0.5)
    assert (found.comparisons[0].verdict, found.comparisons[0].below_chance) == ("better", False)
    samples = [torch.randn(40, n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (60, 30)]
    options = {"task": "regression", "observation_noise": [0.7, 0.2]}
    noisy = report({"m": samples[0]}, torch.zeros(60, 2), {"far": {"m": samples[1]}}, **options).ood["far"].metrics
    noise = torch.tensor([0.49, 0.04], dtype=torch.float64)
    deviations = [(x.var(dim=0, correction=0) + noise).log().mean(dim=1) for x in samples]
    assert noisy["m"]["standard_deviation"]["auroc"].known == pytest.approx(area(*deviations), abs=1e-12)
