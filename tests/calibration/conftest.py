"""Data whose calibration is known, because the labels are drawn from the true probabilities."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hostile_texts import BAD_SVG, SUMMARY, SVG, TEXT
from torch import Tensor

from debiased_laplace.calibration import CalibrationReport, ReportFigure, ReportTable, calibration_report
from debiased_laplace.calibration.contents import (
    Better,
    ClassificationCurves,
    DataSummary,
    Estimate,
    MethodResult,
    MetricDefinition,
    PredictionRecord,
    ReportContents,
)


def _draw(n: int, *, sharpness: float, seed: int, n_classes: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    truth = logits.softmax(dim=1)
    labels = torch.multinomial(truth, 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(dim=1), labels, truth


def _draw_regression(n: int, *, scale: float, seed: int, n_outputs: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if n_outputs is None else (n, n_outputs)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    sigma = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return mean, sigma, mean + scale * sigma * noise


@pytest.fixture
def draw_classification() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Predicted probabilities, labels, true probabilities; sharpness 1 is calibrated, above 1 over-confident."""
    return _draw


@pytest.fixture
def draw_regression() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Mean, standard deviation and targets; the true errors are `scale` standard deviations."""
    return _draw_regression


EVERYTHING: dict[str, Any] = {
    "description": 'two\n\nparagraphs with , and "',
    "metadata": {"rank": 3, "λ": 0.5, "three": 3.0, "a/b ~ «»": 'a <b> "c" \u2028'},
    "tables": [ReportTable("Cost", ["method", "seconds"], [["map", 1], ["b", None]], note="wall time")],
    "figures": [ReportFigure("Figure", SVG, "an x", note="n")],
    "thresholds": "default",
    "n_resamples": 60,
}


@pytest.fixture(scope="session")
def classification_report() -> CalibrationReport:
    """Four classes, an over-confident `map` and a calibrated `b`, a set out of distribution, all optional parts."""
    p, y, truth = _draw(240, sharpness=2.0, seed=31, n_classes=4)
    away = {"noise": {"map": _draw(50, sharpness=2.0, seed=32, n_classes=4)[0], "b": truth[:50].flip(1)}}
    options = {"task": "multiclass", "class_names": list("wxyz"), "ood": away, **EVERYTHING}
    return calibration_report({"map": p, "b": truth}, y, **options)


@pytest.fixture(scope="session")
def regression_report() -> CalibrationReport:
    """Two outputs in mm, a right `map` and a `b` that is too wide, all optional parts."""
    mean, sigma, y = _draw_regression(240, scale=1.0, seed=33, n_outputs=2)
    methods = {"map": (mean, sigma), "b": (mean, 2 * sigma)}
    return calibration_report(methods, y, task="regression", target_unit="mm", **EVERYTHING)


@pytest.fixture(scope="session")
def make_contents() -> Callable[..., ReportContents]:
    """A report whose numbers are written by hand, with the good directions of metrics other than "lower"."""

    def make(
        metrics: Mapping[str, Mapping[str, Estimate]],
        better: Mapping[str, Better] | None = None,
        sums: Mapping[str, Mapping[str, tuple[float, ...]]] | None = None,
        **changes: Any,
    ) -> ReportContents:
        names, curves = [name for own in metrics.values() for name in own], ClassificationCurves((), ())
        given: dict[str, Any] = dict.fromkeys(("comparisons", "tables", "figures", "warnings"), ())
        given |= {"task": "multiclass", "title": "Title", "description": "", "created": "2026-01-01T00:00:00+00:00"}
        given |= {
            "software": {},
            "metadata": {},
            "settings": {"confidence_level": 0.95},
            "baseline": next(iter(metrics)),
        }
        given["data"] = DataSummary(600, 4, None, "digest")
        given["methods"] = {
            m: MethodResult(own, curves, score_sums=(sums or {}).get(m, {})) for m, own in metrics.items()
        }
        given["definitions"] = {name: MetricDefinition(name, (better or {}).get(name, "lower"), "") for name in names}
        return ReportContents(**(given | changes))

    return make


@pytest.fixture(scope="session")
def hostile_report() -> CalibrationReport:
    """Every text that a caller can give is all the hostile ones together."""
    p, y, truth = _draw(300, sharpness=3.0, seed=21, n_classes=3)
    report = calibration_report(
        {"map": p, TEXT: truth},
        y,
        task="multiclass",
        class_names=[TEXT] * 3,
        title=TEXT,
        description=f"{TEXT}\n\nsecond paragraph",
        metadata={TEXT: TEXT, "rank": 8, "a very long name without any space " + "x" * 80: 0.1},
        tables=[ReportTable(TEXT, [TEXT, *"abcdefgh"], [[TEXT, *[123456.789] * 7, None]], note=TEXT)],
        figures=[ReportFigure(TEXT, SVG, TEXT, note=TEXT), ReportFigure("bad", BAD_SVG, "bad")],
        ood={TEXT: dict.fromkeys(("map", TEXT), truth[:90].pow(0.2).softmax(1))},
        posteriors={TEXT: SUMMARY},
        thresholds=[{"metric": "nll", "max": 0.1}, {"metric": "brier", "max": 2}, {"metric": "ece", "max": 0.5}],
        n_resamples=50,
    )
    record = PredictionRecord("Laplace posterior", "glm", "mc", 100, 1.25, 3 * 2**20)
    return replace(report, predicted={TEXT: record})
