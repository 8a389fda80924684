"""Metrics of groups are those of a report on the group alone."""

import numpy as np
import pytest
import torch

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.metrics.groups import FEW_IN_GROUP

OPTIONS = {"n_resamples": 200, "temperature_scaling": "none"}


def same(one, other) -> bool:
    parts = ("value", "low", "high", "standard_error")
    numbers = [(getattr(one, p), getattr(other, p)) for p in parts]
    return all(a is b is None or a == pytest.approx(b, rel=1e-9, abs=1e-12) for a, b in numbers)


def test_each_group_is_a_report_of_its_own(draw_classification) -> None:
    p, y, _ = draw_classification(300, sharpness=1.5, seed=1)
    q, _, _ = draw_classification(300, sharpness=1.0, seed=1)
    sex = np.array(["m", "f", "f"] * 100)
    report = calibration_report({"map": p, "laplace": q}, y, task="multiclass", groups={"sex": sex}, **OPTIONS)
    assert [(g.grouping, g.group, g.n, g.few) for g in report.groups] == [
        ("sex", "f", 200, False),
        ("sex", "m", 100, False),
    ]
    for g in report.groups:
        rows = torch.from_numpy(sex == g.group)
        alone = calibration_report({"map": p[rows], "laplace": q[rows]}, y[rows], task="multiclass", **OPTIONS).metrics
        assert set(g.metrics) == {"map", "laplace"}
        for method, metrics in g.metrics.items():
            assert set(metrics) == {"nll", "brier", "accuracy", "confidence_gap", "ece", "ece_noise_floor"}
            assert all(same(e, alone[method][name]) for name, e in metrics.items())


def test_clusters_reach_the_groups(draw_classification) -> None:
    p, y, _ = draw_classification(200, sharpness=1.5, seed=2)
    patient, site = np.arange(200) // 5, np.where(np.arange(200) < 100, "a", "b")
    report = calibration_report({"net": p}, y, task="multiclass", groups=site, clusters=patient, **OPTIONS)
    first = calibration_report({"net": p[:100]}, y[:100], task="multiclass", clusters=patient[:100], **OPTIONS)
    for name in ("nll", "accuracy", "confidence_gap"):
        assert same(report.groups[0].metrics["net"][name], first.metrics["net"][name])


def test_small_groups_are_marked(draw_classification) -> None:
    p, y, _ = draw_classification(100, sharpness=1.5, seed=3)
    ids = ["one"] + ["few"] * (FEW_IN_GROUP - 1) + ["many"] * (100 - FEW_IN_GROUP)
    report = calibration_report({"net": p}, y, task="multiclass", groups=ids, **OPTIONS)
    assert {g.group: g.few for g in report.groups} == {"one": True, "few": True, "many": False}
    assert report.groups[-1].metrics["net"]["nll"].low is None  # "one" has no deviation
    page = report.to_html()
    assert "one (few)" in page
    assert "2 groups have too few samples" in page


def test_regression_groups(draw_regression) -> None:
    mean, std, y = draw_regression(120, scale=1.5, seed=4, n_outputs=2)
    site = np.repeat([7, 8], 60)
    report = calibration_report({"net": (mean, std)}, y, task="regression", groups={"site": site}, **OPTIONS)
    alone = calibration_report({"net": (mean[60:], std[60:])}, y[60:], task="regression", **OPTIONS).metrics["net"]
    group = report.groups[1]
    assert (group.grouping, group.group, group.n) == ("site", "8", 60)
    assert set(group.metrics["net"]) == {"nll", "crps", "rmse", "z_scale", "picp"}
    assert all(same(e, alone[name]) for name, e in group.metrics["net"].items() if name in alone)
    assert "<h2>Groups</h2>" in report.to_html()


@pytest.mark.parametrize("argument", ["groups", "clusters"])
def test_another_number_of_ids_is_named(draw_classification, argument: str) -> None:
    p, y, _ = draw_classification(40, sharpness=1.0, seed=5)
    with pytest.raises(ValueError, match=f"{argument}.*each of 40 samples; got 39"):
        calibration_report({"net": p}, y, task="multiclass", **{argument: list(range(39))})
