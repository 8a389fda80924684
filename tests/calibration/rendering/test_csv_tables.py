import csv
import io

import pytest

from debiased_laplace.calibration import calibration_report

HEADER = ["method", "metric", "value", "low", "high", "standard_error", "n", "estimator", "reason", "better"]


@pytest.fixture
def csv_report(draw_classification):
    p, y, _ = draw_classification(200, sharpness=2.0, seed=61)
    q, _, _ = draw_classification(200, sharpness=1.0, seed=61)
    away, _, _ = draw_classification(40, sharpness=0.1, seed=62)

    def make(**options):
        given = {"n_resamples": 20, "temperature_scaling": "none"} | options
        return calibration_report({'map, "x"': p, "b": q}, y, task="multiclass", **given)

    make.away = {'map, "x"': away, "b": away}
    return make


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_one_row_for_every_method_and_metric(csv_report) -> None:
    report = csv_report()
    text = report.to_csv()
    assert text.splitlines()[0].split(",") == HEADER
    rows = read(text)
    assert [(r["method"], r["metric"]) for r in rows] == [
        (m, k) for m, metrics in report.metrics.items() for k in metrics
    ]
    for row in rows:
        estimate = report.metrics[row["method"]][row["metric"]]
        for name in ("value", "low", "high", "standard_error"):
            number = getattr(estimate, name)
            assert row[name] == ("" if number is None else repr(number))  # all digits
        assert int(row["n"]) == estimate.n
        assert row["reason"] == (estimate.reason or "")
    assert {r["better"] for r in rows if r["metric"] == "accuracy"} == {"higher"}


def test_comparisons_are_a_table_of_their_own(csv_report) -> None:
    report = csv_report()
    rows = read(report.to_csv("comparisons"))
    assert [(r["method"], r["baseline"], r["metric"]) for r in rows] == [
        (c.method, c.baseline, c.metric) for c in report.comparisons
    ]
    assert [float(r["difference"]) for r in rows] == [c.difference for c in report.comparisons]
    assert [r["verdict"] for r in rows] == [c.verdict for c in report.comparisons]


def test_sets_out_of_distribution_are_a_third(csv_report, tmp_path) -> None:
    report = csv_report(ood={"away": csv_report.away})
    rows = read(report.to_csv("ood"))
    assert {r["set"] for r in rows} == {"away"}
    aurocs = {r["method"]: float(r["value"]) for r in rows if (r["metric"], r["score"]) == ("auroc", "max_probability")}
    assert aurocs == {
        d.method: d.metrics["auroc"].value for d in report.ood["away"].detections if d.score == "max_probability"
    }
    names = [path.name for path in report.save(tmp_path, formats=("csv", "md"))]
    assert names == ["report.csv", "report_comparisons.csv", "report_ood.csv", "report.md"]


def test_the_time_is_not_in_it(csv_report, monkeypatch, tmp_path) -> None:
    texts = []
    for epoch in ("1700000000", "1800000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        paths = csv_report().save(tmp_path / epoch, formats=("csv",))
        texts.append([path.read_bytes() for path in paths])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    assert b"\r" not in texts[0][0]


def test_an_unknown_table_is_an_error(csv_report) -> None:
    from debiased_laplace.calibration.rendering.csv_tables import render_csv

    with pytest.raises(Exception, match="metrics"):
        render_csv(csv_report(), "curves")
