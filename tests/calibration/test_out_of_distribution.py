import json

import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.metrics.out_of_distribution import HISTOGRAM_BINS, combine_scores
from debiased_laplace.calibration.predictions.probabilities import PosteriorPredictive


@pytest.fixture
def sets(draw_classification):
    """The second method is less sure out of distribution; only it has samples of its posterior."""
    generator = torch.Generator().manual_seed(0)
    p, y, _ = draw_classification(400, sharpness=1.0, seed=31)
    q, _, _ = draw_classification(150, sharpness=1.0, seed=32)

    def sample(p, spread):
        noise = spread * torch.randn(20, *p.shape, generator=generator, dtype=torch.float64)
        return (p.log()[None] + noise).softmax(dim=-1)

    predictions = {"map": p, "laplace": sample(p, 0.2)}
    return predictions, y, {"other": {"map": q, "laplace": sample(q, 1.0)}}


def options(ood, **further):
    return {"task": "multiclass", "n_resamples": 20, "temperature_scaling": "none", "ood": ood, **further}


def test_every_set_method_and_score_is_measured(sets) -> None:
    predictions, y, ood = sets
    report = calibration_report(predictions, y, **options(ood))
    metrics = report.ood["other"].metrics
    assert {m: list(scores) for m, scores in metrics.items()} == {
        "map": ["entropy", "max_probability"],
        "laplace": ["mutual_information", "entropy", "max_probability"],
    }
    labels = [0] * 400 + [1] * 150
    means = {"map": (predictions["map"], ood["other"]["map"])}
    means["laplace"] = tuple(x.mean(dim=0) for x in (predictions["laplace"], ood["other"]["laplace"]))
    for method, both in means.items():
        p = torch.cat(both)
        scores = {"max_probability": 1 - p.max(dim=1).values, "entropy": -(p * p.log()).sum(dim=1)}
        for score, values in scores.items():
            found = metrics[method][score]
            assert found["auroc"].known == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
            assert found["aupr"].known == pytest.approx(average_precision_score(labels, values), abs=1e-12)
            assert set(found) == {"auroc", "aupr", "fpr95"}
    assert metrics["laplace"]["mutual_information"]["auroc"].known > 0.9
    compared = {(c.method, c.score): c for c in report.ood["other"].comparisons}
    assert {score: c.baseline_score for (_, score), c in compared.items()} == {
        "mutual_information": "entropy",  # which the network alone does not have
        "entropy": "entropy",
        "max_probability": "max_probability",
    }
    better = compared["laplace", "entropy"]
    assert better.verdict == "better"
    expected = metrics["laplace"]["entropy"]["auroc"].known - metrics["map"]["entropy"]["auroc"].known
    assert better.difference == pytest.approx(expected, abs=1e-14)
    assert not any("is not judged by it" in w for w in report.warnings)


def test_verdicts_are_adjusted_over_all_sets(sets) -> None:
    predictions, y, ood = sets
    alone = calibration_report(predictions, y, **options(ood)).ood["other"].comparisons
    both = calibration_report(predictions, y, **options({"first": ood["other"], "again": ood["other"]})).ood
    assert [c.p_value for c in both["first"].comparisons] == [c.p_value for c in alone]
    for one, two in zip(alone, both["again"].comparisons, strict=True):
        assert (two.adjusted_p_value or 0) >= (one.adjusted_p_value or 0)
    smallest = min(alone, key=lambda c: c.p_value or 0)
    assert smallest.adjusted_p_value == pytest.approx(2 * (smallest.p_value or 0))
    swapped = calibration_report(predictions, y, **options(ood, baseline="laplace")).ood["other"].comparisons
    assert {(c.method, c.verdict) for c in swapped} == {("map", "worse")}


def test_histograms_hold_every_sample_and_share_their_edges(sets) -> None:
    predictions, y, ood = sets
    detections = calibration_report(predictions, y, **options(ood)).ood["other"].detections
    edges = {}
    for d in detections:
        assert len(d.histogram) == HISTOGRAM_BINS
        assert sum(b.n_inside for b in d.histogram) == 400
        assert sum(b.n_outside for b in d.histogram) == 150
        edges.setdefault(d.score, set()).add(tuple((b.left, b.right) for b in d.histogram))
    assert all(len(e) == 1 for e in edges.values())


def test_same_bytes_and_any_order_of_the_samples(sets, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    predictions, y, ood = sets
    one, two = (calibration_report(predictions, y, **options(ood)) for _ in range(2))
    assert one.to_json() == two.to_json()
    assert one.to_html() == two.to_html()
    order, other = np.random.default_rng(1).permutation(400), np.random.default_rng(2).permutation(150)
    shuffled = calibration_report(
        {m: p[..., order, :] for m, p in predictions.items()},
        y[order],
        **options({"other": {m: p[..., other, :] for m, p in ood["other"].items()}}),
    )

    def numbers(report):
        metrics = [e for d in report.ood["other"].detections for e in d.metrics.values()]
        metrics += [report.metrics[m][k] for m in report.methods for k in ("aurc", "augrc", "coverage_at_5_risk")]
        return [x for e in metrics for x in (e.value, e.low, e.high)]

    assert numbers(shuffled) == pytest.approx(numbers(one), rel=1e-9, abs=1e-12)


def test_samples_on_one_set_only_are_told(sets) -> None:
    predictions, y, ood = sets
    mean = {"map": predictions["map"], "laplace": predictions["laplace"].mean(dim=0)}
    report = calibration_report(mean, y, **options(ood))
    assert "laplace: no mutual information on the test set, so that other is not judged by it." in report.warnings
    assert "mutual_information" not in report.ood["other"].metrics["laplace"]


def test_pixels_are_rows_that_are_clustered_by_image(draw_classification) -> None:
    p, y, _ = draw_classification(1800, sharpness=1.0, seed=35)
    q, _, _ = draw_classification(600, sharpness=0.5, seed=36)

    def as_images(rows, n):
        return rows.reshape(n, 60, *rows.shape[1:]).movedim(1, -1).unflatten(-1, (6, 10))

    images = {"map": as_images(p, 30)}, as_images(y, 30)
    one = calibration_report(*images, **options({"other": {"map": as_images(q, 10)}}))
    rows = calibration_report(
        {"map": p}, y, **options({"other": {"map": q}}, clusters=torch.arange(30).repeat_interleave(60))
    )
    found, expected = (r.ood["other"].metrics["map"]["entropy"]["auroc"] for r in (one, rows))
    assert found.value == pytest.approx(expected.value, abs=1e-12)
    assert found.n == 2400
    assert found.standard_error != expected.standard_error  # rows outside are taken for independent, pixels are not
    with pytest.raises(ValueError, match="other"):
        calibration_report(*images, **options({"other": {"map": as_images(q, 10)[:, :4]}}))


WRONG = {
    "no mapping": (lambda ood: [1], "ood must map names of sets"),
    "no mapping of methods": (lambda ood: {"other": ood["other"]["map"]}, r"ood\['other'\] must map methods"),
    "a method is missing": (lambda ood: {"other": {"map": ood["other"]["map"]}}, "It lacks 'laplace'"),
    "a method too many": (lambda ood: {"other": {**ood["other"], "swag": 1}}, "It also has 'swag'"),
    "another number of classes": (
        lambda ood: {"other": {**ood["other"], "map": torch.full((150, 4), 0.25)}},
        r"ood\['other'\]\['map'\] must have the 10 classes of the test set's predictions; got 4",
    ),
    "not a number": (
        lambda ood: {"other": {**ood["other"], "map": torch.full((150, 10), float("nan"))}},
        "Predictions of 'map on the set other': probabilities must be finite",
    ),
    "logits": (lambda ood: {"other": {**ood["other"], "map": torch.ones(150, 10) * 3}}, "on the set other'"),
    "unequal numbers of samples": (
        lambda ood: {"other": {**ood["other"], "map": ood["other"]["map"][:9]}},
        "must predict the same samples; got",
    ),
    "no sample": (lambda ood: {"other": {**ood["other"], "map": torch.ones(0, 10)}}, "at least one sample"),
    "no name": (lambda ood: {" ": ood["other"]}, "must be printable text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sets_are_refused(sets, case: str) -> None:
    predictions, y, ood = sets
    change, message = WRONG[case]
    if case.startswith("no mapping"):
        message += "|Type-check error"  # comes first in the test run
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        calibration_report(predictions, y, **options(change(ood)))


@pytest.fixture
def spreads(draw_regression):
    mean, std, y = draw_regression(200, scale=1.0, seed=33)
    far = {"map": (mean[:50], torch.ones(50)), "laplace": (mean[:50], 2 * std[:50])}
    return {"map": (mean, torch.ones_like(std)), "laplace": (mean, std)}, y, {"far": far}


def test_regression_is_detected_by_its_spread(spreads) -> None:
    predictions, y, ood = spreads
    report = calibration_report(predictions, y, task="regression", n_resamples=20, ood=ood)
    metrics = report.ood["far"].metrics
    assert list(metrics["laplace"]) == ["standard_deviation"]
    scores = torch.cat([predictions["laplace"][1], ood["far"]["laplace"][1]])
    expected = roc_auc_score([0] * 200 + [1] * 50, scores)
    assert metrics["laplace"]["standard_deviation"]["auroc"].known == pytest.approx(expected, abs=1e-12)
    assert metrics["map"]["standard_deviation"]["auroc"].value == 0.5
    assert report.ood["far"].comparisons[0].verdict == "better"


def test_one_constant_in_two_precisions_detects_nothing(spreads) -> None:
    predictions, y, _ = spreads
    mean = predictions["map"][0]
    predictions = {"map": (mean, torch.full((200,), 1.2, dtype=torch.float64))}
    single = {"far": {"map": (mean[:50], torch.full((50,), 1.2, dtype=torch.float32))}}
    assert single["far"]["map"][1].double()[0] > predictions["map"][1][0]  # the trap
    report = calibration_report(predictions, y, task="regression", n_resamples=20, ood=single)
    assert report.ood["far"].metrics["map"]["standard_deviation"]["auroc"].value == 0.5


def test_regression_refuses_another_number_of_outputs(spreads) -> None:
    predictions, y, ood = spreads
    two = torch.ones(50, 2)
    with pytest.raises(ValueError, match="must have the 1 outputs of the test set's predictions; got 2"):
        calibration_report(predictions, y, task="regression", ood={"far": {**ood["far"], "map": (two, two)}})


def test_selection_of_a_regressor(spreads) -> None:
    predictions, y, _ = spreads
    report = calibration_report(predictions, y, task="regression", n_resamples=20)
    errors, std = (predictions["laplace"][0] - y).square(), predictions["laplace"][1]
    risk = errors[std.argsort()].cumsum(0) / torch.arange(1, 201)
    aurc = report.metrics["laplace"]["aurc"]
    assert aurc.known == pytest.approx(risk.mean().item(), rel=1e-12)
    assert aurc.low is not None
    assert aurc.low < aurc.known < (aurc.high or 0)
    constant = report.metrics["map"]["aurc"]
    assert constant.known == pytest.approx(report.metrics["map"]["rmse"].known ** 2, rel=1e-12)
    scaled = [m for m in report.methods if m not in predictions]
    assert all("aurc" not in report.metrics[m] for m in scaled)  # a factor changes no order


def test_selection_of_several_outputs_is_the_mean_over_them(draw_regression) -> None:
    mean, std, y = draw_regression(120, scale=1.0, seed=34, n_outputs=3)
    several = calibration_report({"m": (mean, std)}, y, task="regression", n_resamples=20)
    single = [
        calibration_report({"m": (mean[:, j], std[:, j])}, y[:, j], task="regression", n_resamples=20)
        for j in range(3)
    ]  # fmt: skip
    for name in ("aurc", "e_aurc"):
        expected = sum(r.metrics["m"][name].known for r in single) / 3
        assert several.metrics["m"][name].known == pytest.approx(expected, rel=1e-12)
    curves = [r.methods["m"].selection for r in (several, *single)]
    assert all(c is not None for c in curves)
    assert curves[0].points[7].risk == pytest.approx(sum(c.points[7].risk for c in curves[1:]) / 3)


@pytest.mark.slow
def test_100_000_samples_take_seconds(draw_classification) -> None:
    import time

    from debiased_laplace.calibration.metrics.detection import ScoredSample, Separation
    from debiased_laplace.calibration.metrics.out_of_distribution import measure_set
    from debiased_laplace.calibration.metrics.risk_coverage import rank_losses
    from debiased_laplace.calibration.metrics.selective import measure_selection, trace_selection

    generator = torch.Generator().manual_seed(0)
    s = torch.rand(100_000, generator=generator, dtype=torch.float64)
    errors = (torch.rand(100_000, generator=generator) < 0.3 * (1 - s)).double()
    start = time.process_time()
    ranked = rank_losses(errors, s)
    measure_selection(ranked, confidence_level=0.95)
    trace_selection(ranked, confidence_level=0.95, loss="", is_share=True)
    measure_set(
        {"m": {"entropy": Separation(ScoredSample(s), ScoredSample(s.square()))}}, "m", confidence_level=0.95
    )  # fmt: skip
    assert time.process_time() - start < 10


def test_json_has_what_the_figures_show(sets) -> None:
    predictions, y, ood = sets
    stored = json.loads(calibration_report(predictions, y, **options(ood)).to_json())
    selection = stored["methods"]["map"]["selection"]
    assert len(selection["points"]) == 100
    assert set(selection["points"][0]) == {"coverage", "risk", "low", "high", "oracle"}
    assert [k["coverage"] for k in selection["kept"]] == [0.8, 0.9, 0.95]
    one = stored["ood"]["other"]
    assert one["n"] == 150
    assert {(d["method"], d["score"]) for d in one["detections"]} >= {("laplace", "mutual_information")}
    assert one["detections"][0]["metrics"]["auroc"]["better"] == "higher"
    assert one["comparisons"][0]["verdict"] == "better"


def test_the_conformal_score_is_large_where_any_score_is_unusual() -> None:
    generator = torch.Generator().manual_seed(5)
    inside = torch.rand(2, 60, generator=generator, dtype=torch.float64)
    outside = torch.rand(2, 25, generator=generator, dtype=torch.float64) + torch.tensor([[0.0], [0.4]])
    outside[0, :5] = inside[0, :5]  # ties
    found = combine_scores(list(zip(inside, outside, strict=True)))

    def rank(value, others):
        return float(((others < value).double() + (others == value).double() / 2).mean())

    expected = [max(rank(s[i], s) for s in inside) for i in range(60)]
    assert found[0].tolist() == pytest.approx(expected)
    expected = [max(rank(b[j], a) for a, b in zip(inside, outside, strict=True)) for j in range(25)]
    assert found[1].tolist() == pytest.approx(expected)


def test_ties_speak_for_neither_set() -> None:
    coins = torch.tensor([0.0, 1.0]).repeat(100)
    inside, outside = combine_scores([(coins, coins.flip(0)), (coins, coins.flip(0))])
    assert roc_auc_score([0] * 200 + [1] * 200, torch.cat([inside, outside])) == pytest.approx(0.5, abs=0.01)


def test_a_posterior_has_the_conformal_score(draw_classification) -> None:
    generator = torch.Generator().manual_seed(6)
    p, y, _ = draw_classification(300, sharpness=1.0, seed=41)
    q, _, _ = draw_classification(120, sharpness=1.0, seed=42)
    scores = {n: torch.rand(2, n, generator=generator, dtype=torch.float64) for n in (300, 120)}
    inside = PosteriorPredictive(p, scores[300][0], scores[300][1])
    outside = PosteriorPredictive(q, scores[120][0], scores[120][1] + 0.9)
    report = calibration_report(
        {"map": p, "laplace": inside}, y, **options({"far": {"map": q, "laplace": outside}}, baseline="map")
    )
    metrics = report.ood["far"].metrics["laplace"]
    assert list(metrics) == ["conformal", "mutual_information", "logit_variance", "entropy", "max_probability"]
    both = combine_scores([(scores[300][i], (scores[120][0], scores[120][1] + 0.9)[i]) for i in (0, 1)])
    area = roc_auc_score([0] * 300 + [1] * 120, torch.cat(both))
    assert metrics["conformal"]["auroc"].known == pytest.approx(area, abs=1e-12)
    assert area > 0.85
    assert abs(metrics["mutual_information"]["auroc"].known - 0.5) < 0.1


def test_better_is_no_praise_below_chance(draw_classification) -> None:
    """Both methods are surer out of distribution than on the test set, one of them less so."""
    p, y, _ = draw_classification(400, sharpness=1.0, seed=43)
    q, _, _ = draw_classification(300, sharpness=1.0, seed=44)

    def tempered(rows, power):
        return (power * rows.log()).softmax(-1)

    ood = {"surer": {"map": tempered(q, 4.0), "other": tempered(q, 1.8)}}
    report = calibration_report({"map": p, "other": p}, y, **options(ood, baseline="map"))
    (compared,) = [c for c in report.ood["surer"].comparisons if c.score == "entropy"]
    assert compared.verdict == "better"
    assert compared.below_chance
    (text,) = [line for line in report.to_markdown().splitlines() if "| other | predictive entropy" in line]
    assert text.endswith("better, below chance |")
    upright = {"other": {"map": tempered(q, 0.8), "other": tempered(q, 0.3)}}
    comparisons = calibration_report({"map": p, "other": p}, y, **options(upright, baseline="map")).ood["other"]
    assert not any(c.below_chance for c in comparisons.comparisons)
