"""One report of every task, with everything in it that a caller can give."""

import pytest
import torch

from debiased_laplace.calibration import CalibrationReport, ReportFigure, ReportTable, calibration_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text>x</text></svg>'


@pytest.fixture(scope="session")
def stored_reports() -> dict[str, CalibrationReport]:
    generator = torch.Generator().manual_seed(31)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    extra = {
        "description": 'two\n\nparagraphs with , and "',
        "metadata": {"rank": 3, "λ": 0.5, "note": "a <b>"},
        "tables": [ReportTable("Cost", ["method", "seconds"], [["map", 1], ["b", None]], note="wall time")],
        "figures": [ReportFigure("Figure", SVG, "an x", note="n")],
        "n_resamples": 60,
    }
    logits = 1.5 * normal(240, 4)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    p = {"map": (2 * logits).softmax(1), "b": logits.softmax(1)}
    away = {"noise": {"map": normal(50, 4).softmax(1), "b": normal(50, 4).softmax(1)}}
    two = torch.stack([-logits[:, 0], logits[:, 0]], dim=1)
    z = torch.multinomial(two.softmax(1), 1, generator=generator)[:, 0]
    mean, std = normal(240, 2), 0.5 + torch.rand(240, 2, generator=generator, dtype=torch.float64)
    t = mean + std * normal(240, 2)
    groups = {"site": ["a", "b", "b"] * 80}
    gate = {"thresholds": "default"}
    return {
        "multiclass": calibration_report(
            p, y, task="multiclass", class_names=list("wxyz"), ood=away, groups=groups, **gate, **extra
        ),
        "binary": calibration_report(
            {"map": (2 * two).softmax(1), "b": two.softmax(1)}, z, task="binary", **gate, **extra
        ),
        "regression": calibration_report(
            {"map": (mean[:, 0], std[:, 0]), "b": (mean[:, 0], 2 * std[:, 0])},
            t[:, 0],
            task="regression",
            **gate,
            **extra,
        ),
        "two outputs": calibration_report(
            {"map": (mean, std), "b": (mean, 2 * std)}, t, task="regression", target_unit="mm", **gate, **extra
        ),
    }
