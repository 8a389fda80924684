from math import log

import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.metrics.classification import brier_score, negative_log_likelihood, signed_root
from debiased_laplace.calibration.predictions.classification import read_classification


def measure(p, y, task="multiclass", **options):
    return calibration_report({"net": p}, y, task=task, n_resamples=200, **options).metrics["net"]


def test_scores_by_hand() -> None:
    r = read_classification("net", [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]], [1, 0], task="multiclass")
    assert negative_log_likelihood(r).tolist() == pytest.approx([log(2), 0.0])
    assert brier_score(r).tolist() == pytest.approx([0.0625 + 0.25 + 0.0625, 0.0])


def test_proper_scores_are_those_of_scikit_learn(draw_classification) -> None:
    p, y, _ = draw_classification(700, sharpness=1.5, seed=1)
    m = measure(p, y)
    assert m["nll"].value == pytest.approx(log_loss(y, p, labels=range(10)), abs=1e-12)
    assert m["brier"].value == pytest.approx(
        brier_score_loss(y, p.numpy(), labels=range(10), scale_by_half=False), abs=1e-12
    )
    assert m["accuracy"].value == pytest.approx(accuracy_score(y, p.argmax(dim=1)), abs=1e-12)


def test_binary_brier_is_twice_the_one_probability_form(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=1.5, seed=2, n_classes=2)
    brier = measure(p[:, 1], y, "binary")["brier"].value
    assert brier == pytest.approx(2 * brier_score_loss(y, p[:, 1].numpy()), abs=1e-12)


def test_names_are_those_of_the_contract(draw_classification) -> None:
    p, y, _ = draw_classification(100, sharpness=1.0, seed=3)
    names = {"nll", "brier", "accuracy", "ece", "ece_noise_floor", "ece_p_value", "mce", "ace", "confidence_gap"}
    names |= {"rmsce2_debiased", "skce", "ece_equal_mass", "ece_sweep", "classwise_ece", "classwise_ece_noise_floor"}
    assert names <= set(measure(p, y))
    assert "ece_positive" not in measure(p, y)
    p, y, _ = draw_classification(100, sharpness=1.0, seed=3, n_classes=2)
    assert names | {"ece_positive"} <= set(measure(p[:, 1], y, "binary"))


SHARDS = {
    "saturated": (torch.eye(10)[torch.arange(60) % 10], torch.arange(60) % 7),
    "one class": (torch.full((60, 10), 0.1), torch.full((60,), 4)),
    "two of ten classes": (torch.full((60, 10), 0.1), torch.arange(60) % 2),
    "one sample": (torch.full((1, 10), 0.1), torch.tensor([3])),
    "rounding above 1": (torch.tensor([[1.0000001, 0.0], [0.4, 0.6]] * 30), torch.tensor([0, 1] * 30)),
}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_that_are_hard_have_every_metric(shard: str, dtype: torch.dtype) -> None:
    p, y = SHARDS[shard]
    m = measure(p.to(dtype), y)
    for name in ("nll", "brier", "accuracy", "ece", "classwise_ece", "ece_equal_mass", "ece_sweep"):
        assert m[name].value is not None
    confidence, right = p.double().clamp(max=1).max(dim=1).values, (p.argmax(dim=1) == y).double()
    if confidence.unique().numel() == 1:  # one confidence: every partition has one bin
        gap = abs(right.mean().item() - confidence[0].item())
        assert m["ece"].value == pytest.approx(gap, abs=1e-6)
        assert m["ece_equal_mass"].value == pytest.approx(gap, abs=1e-6)
        assert m["ece_sweep"].value == pytest.approx(gap, abs=1e-6)


def test_the_gap_tells_over_from_under_confidence(draw_classification) -> None:
    gaps = {}
    for sharpness in (0.5, 1.0, 2.0):
        p, y, _ = draw_classification(3000, sharpness=sharpness, seed=4)
        gaps[sharpness] = measure(p, y)["confidence_gap"]
    assert gaps[0.5].high < 0 < gaps[2.0].low
    assert abs(gaps[1.0].value) < 3.5 * gaps[1.0].standard_error


def test_every_estimate_has_an_interval_or_a_reason(draw_classification) -> None:
    p, y, _ = draw_classification(200, sharpness=1.0, seed=5)
    m = measure(p, y)
    without = {name for name, e in m.items() if e.low is None}
    binned = {"ece", "ece_noise_floor", "ece_p_value", "mce", "ace", "ece_equal_mass", "ece_sweep"}
    assert binned | {"classwise_ece", "classwise_ece_noise_floor", "classwise_rmsce2_debiased"} <= without
    assert without.isdisjoint({"nll", "brier", "accuracy", "confidence_gap", "rmsce2_debiased", "skce"})
    for name, e in m.items():
        assert (e.reason is None) == (name not in without)
        assert e.n == 200
        assert name in without or e.low < e.value < e.high


def test_zero_for_the_true_class_stays_finite_and_is_reported() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    report = calibration_report({"net": p, "other": p.double()}, [1, 0, 1], task="multiclass", n_resamples=10)
    first, second = (report.metrics[m]["nll"].value for m in ("net", "other"))
    assert first == pytest.approx((-log(torch.finfo(torch.float32).tiny) + log(2)) / 3)
    assert second == pytest.approx((-log(torch.finfo(torch.float64).tiny) + log(2)) / 3)
    for method in ("net", "other"):
        assert any(w.startswith(f"{method}: 1 of 3") and "probability 0" in w for w in report.warnings)
        assert f"{method}: 1 of 3" in report.to_html()


def test_all_right_with_certainty() -> None:
    m = measure([[1.0, 0.0], [0.0, 1.0]] * 20, [0, 1] * 20)
    assert m["accuracy"].value == 1
    assert m["accuracy"].low < 1
    assert m["ece"].value == pytest.approx(0, abs=1e-12)
    assert m["ece_noise_floor"].value == 0
    assert m["ece_p_value"].value == 1
    assert m["nll"].value == m["brier"].value == m["confidence_gap"].value == 0


def test_number_of_bins_and_level_reach_the_metrics(draw_classification) -> None:
    p, y, _ = draw_classification(500, sharpness=1.5, seed=6)
    few, many = (measure(p, y, n_bins=n)["ece"].value for n in (2, 50))
    assert few < many
    wide, narrow = (measure(p, y, confidence_level=level)["confidence_gap"] for level in (0.99, 0.5))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.5758293 / 0.6744898, rel=1e-6)


def test_signed_root() -> None:
    assert [signed_root(x) for x in (0.04, 0.0, -0.09)] == pytest.approx([0.2, 0.0, -0.3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_give_the_same_report(draw_classification, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    p, y, _ = draw_classification(400, sharpness=1.5, seed=7)
    here = calibration_report({"net": p}, y, task="multiclass")
    there = calibration_report({"net": p.cuda()}, y.cuda(), task="multiclass")
    for name, e in here.metrics["net"].items():
        assert there.metrics["net"][name].value == pytest.approx(e.value, rel=1e-10, abs=1e-12)
