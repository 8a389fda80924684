"""Classification metrics against scikit-learn, netcal, closed forms and simulated calibrated test sets."""

from math import log

import numpy as np
import pytest
import torch
from netcal.metrics import ECE
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units, wilson_interval
from debiased_laplace.calibration.metrics import classification as room
from debiased_laplace.calibration.metrics.binned import BinnedConfidences, expected_error_by_chance
from debiased_laplace.calibration.metrics.definitions import CLASSIFICATION
from debiased_laplace.calibration.probabilities import read_probabilities, reduce_classification


def read(p, y, n_bins: int = 15):
    return reduce_classification(read_probabilities("net", p, task="multiclass"), torch.as_tensor(y), n_bins=n_bins)


def measure(p, y, *, n_bins: int = 15, level: float = 0.9, clusters=None):
    settings = Settings(n_bins, confidence_level=level, n_resamples=20)
    return room.measure_classification(read(p, y, n_bins), Units(len(y), level, clusters), settings)


@pytest.mark.parametrize(("n_classes", "n_bins"), [(2, 5), (10, 15)])
def test_metrics_are_those_of_scikit_learn_and_netcal(draw_classification, n_classes: int, n_bins: int) -> None:
    p, y, _ = draw_classification(700, sharpness=1.5, seed=1, n_classes=n_classes)
    m, classes, units = measure(p, y, n_bins=n_bins).metrics, range(n_classes), Units(700, 0.9)
    each = [ECE(bins=n_bins).measure(p[:, c].numpy(), (y == c).long().numpy()) for c in classes]
    accuracy = accuracy_score(y, p.argmax(dim=1))
    brier = brier_score_loss(y, p.numpy() if n_classes > 2 else p[:, 1], labels=classes, scale_by_half=False)
    expected = {"nll": log_loss(y, p, labels=classes), "brier": brier, "accuracy": accuracy}
    expected |= {"confidence_gap": p.max(dim=1).values.mean().item() - accuracy, "classwise_ece": np.mean(each)}
    expected["ece"] = ECE(bins=n_bins).measure(p.max(dim=1).values.numpy(), (p.argmax(dim=1) == y).long().numpy())
    assert {name: m[name].value for name in expected} == pytest.approx(expected, abs=1e-9)
    errors, floors = room.measure_each_class(read(p, y, n_bins))
    assert errors.tolist() == pytest.approx(each, abs=1e-9)
    own = [BinnedConfidences(p[:, c].contiguous(), (y == c).double(), n_bins) for c in classes]
    assert floors.tolist() == pytest.approx([expected_error_by_chance(bins) for bins in own])
    scores = room.scores_of(read(p, y), units, n_bins=n_bins)
    own = {name: 1 - accuracy if name == "error" else m[name].value for name in scores}
    assert {name: x.mean().item() for name, x in scores.items()} == pytest.approx(own, abs=1e-12)
    assert units.standard_error(scores["rmsce2_debiased"]) == pytest.approx(m["rmsce2_debiased"].standard_error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_certain_and_hard_shards_have_every_metric(dtype: torch.dtype) -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    worst = -log(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny)
    for labels, nll, share, p_value in (([0, 1, 0, 1], 0, 0, 1), ([0, 1, 1, 1], worst / 4, 0.25, 1 / 21)):
        m = {name: e.value for name, e in measure(certain, torch.tensor(labels)).metrics.items()}
        gap = dict.fromkeys(("confidence_gap", "ece", "mce", "ace"), share)
        expected = {"nll": nll, "brier": 2 * share, "accuracy": 1 - share, "ece_noise_floor": 0, "ece_p_value": p_value}
        assert m | expected | gap == pytest.approx(m)
    for n, labels in ((60, [4] * 60), (60, [0, 1] * 30), (1, [0])):  # one class, two of ten, one sample
        m, gap = measure(torch.full((n, 10), 0.1), torch.tensor(labels)).metrics, abs(labels.count(0) / n - 0.1)
        assert (m["ece"].value, m["mce"].value) == pytest.approx((gap, gap), abs=1e-6)  # ties go to the first class


def test_table_of_classes_and_clusters(draw_classification) -> None:
    p, y, _ = draw_classification(400, sharpness=1.5, seed=5, n_classes=4)
    y[y == 0] = 1
    for c, row in enumerate(measure(p, y).curves.classes):
        hits, n = int(((p.argmax(dim=1) == y) & (y == c)).sum()), int((y == c).sum())
        assert (row.label, row.n, row.n_correct) == (c, n, hits)
        ends = (None, None) if n == 0 else pytest.approx(wilson_interval(hits / n, float(n), 0.9))
        assert (row.low, row.high) == ends
        assert (row.error, row.noise_floor) == tuple(x[c].item() for x in room.measure_each_class(read(p, y)))
    copies = [(p.repeat(k, 1), y.repeat(k), torch.arange(400).repeat(k)) for k in (1, 2)]
    one, twice = (measure(p, y, clusters=ids).metrics for p, y, ids in copies)
    for name in ("nll", "brier", "accuracy", "confidence_gap", "rmsce2_debiased"):  # copies add nothing
        pairs = [(e[name].value, e[name].low, e[name].high) for e in (one, twice)]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-9), name
    assert all("400 clusters" in twice[f"ece_{x}"].reason for x in ("noise_floor", "p_value"))


def test_directions_of_the_definitions_and_intervals_or_reasons(draw_classification) -> None:
    p, y, truth = draw_classification(3000, sharpness=1.0, seed=4)
    noise = 2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    good, bad, shy = (measure(z.softmax(1), y).metrics for z in (truth.log(), p.log() + noise, p.log() / 2))
    assert set(good) == set(CLASSIFICATION)
    for name, e in good.items():
        assert (e.low is None) == (e.reason is not None) == ("ece" in name or name in ("mce", "ace"))
        sign = {"lower": 1, "higher": -1}.get(CLASSIFICATION[name].better)
        assert sign is None or sign * (bad[name].value - e.value) > 0, name
    assert [name for name in good if CLASSIFICATION[name].better == "zero"] == ["confidence_gap"]
    assert ["skewness" in good[name].estimator for name in ("nll", "brier", "confidence_gap")] == [True, True, False]
    assert shy["confidence_gap"].high < 0 < bad["confidence_gap"].low
