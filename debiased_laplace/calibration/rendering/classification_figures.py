"""Panels of a classification report: reliability diagrams and histograms of confidence."""

from typing import TYPE_CHECKING

from debiased_laplace.calibration.contents import ClassificationCurves, MethodResult, ReportTable, curves_of
from debiased_laplace.calibration.metrics.curves import ConfidenceBin
from debiased_laplace.calibration.rendering.formatting import format_number
from debiased_laplace.calibration.rendering.panels import (
    BAND_ALPHA,
    FONT_SIZE,
    GREY,
    Look,
    Panel,
    add_axes,
    finish,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_IN_BIN = 5  # below it a bin's marker is hollow
CORRECT_COLOUR, WRONG_COLOUR = "#009E73", "#D55E00"


def draw_reliability(results: dict[str, MethodResult], looks: dict[str, Look]) -> list[Panel]:
    """One reliability diagram per method, all with the same axes."""
    curves = curves_of(results, ClassificationCurves)
    most = max(b.n for c in curves.values() for b in c.bins)
    return [
        _draw_one_reliability(method, c.bins, looks[method], index=i, most=most)
        for i, (method, c) in enumerate(curves.items())
    ]


def draw_confidences(results: dict[str, MethodResult]) -> list[Panel]:
    """One pair of histograms per method: confidence where it was right, and where it was wrong."""
    curves = curves_of(results, ClassificationCurves)
    most = max(share for c in curves.values() for group in _share(c.bins) for share in group)
    return [_draw_one_histogram(method, c.bins, index=i, most=most) for i, (method, c) in enumerate(curves.items())]


def _draw_one_reliability(method: str, bins: tuple[ConfidenceBin, ...], look: Look, *, index: int, most: int) -> Panel:
    figure = new_figure(height=4.1)
    diagram = add_axes(figure, bottom=1.28, top=4.02)
    histogram = add_axes(figure, bottom=0.42, top=1.05)
    _draw_bins(diagram, bins, look)
    histogram.bar(
        [b.left for b in bins],
        [b.n for b in bins],
        width=bins[0].right,
        align="edge",
        color=look.colour,
        alpha=0.75,
    )
    histogram.set(xlim=(0, 1), ylim=(0, most), yticks=[0, most])
    histogram.set_xlabel("confidence", fontsize=FONT_SIZE)
    histogram.set_ylabel("samples", fontsize=FONT_SIZE, labelpad=-8)
    outside = sum(_is_outside(b) for b in bins)
    alt = (
        f"Reliability diagram of {method}: accuracy against confidence in {len(bins)} bins, "
        f"{sum(b.n > 0 for b in bins)} of them with samples; {outside} lie outside the band that "
        "right confidences would stay in."
    )
    return finish(
        figure,
        name=f"reliability-{index}",
        caption=method,
        alt=alt,
        table=_tabulate(method, bins),
    )


def _draw_bins(axes: "Axes", bins: tuple[ConfidenceBin, ...], look: Look) -> None:
    """Diagonal, consistency band, Wilson bars and markers of the bins that hold samples."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    full = [b for b in bins if b.n > 0]
    band = [(b.consistent_low or 0.0, b.consistent_high or 0.0) for b in full]
    axes.bar(
        [b.left for b in full],
        [high - low for low, high in band],
        width=bins[0].right,
        bottom=[low for low, _ in band],
        align="edge",
        color=GREY,
        alpha=BAND_ALPHA,
        linewidth=0,
    )
    for face, group in (
        (look.colour, [b for b in full if b.n >= FEW_IN_BIN]),
        ("none", [b for b in full if b.n < FEW_IN_BIN]),
    ):
        x = [b.confidence or 0.0 for b in group]
        ends = [b.low or 0.0 for b in group], [b.high or 0.0 for b in group]
        axes.vlines(x, *ends, color=look.colour, linewidth=1.3)
        axes.plot(
            x,
            [b.accuracy or 0.0 for b in group],
            linestyle="none",
            marker=look.marker,
            color=look.colour,
            markersize=5,
            markerfacecolor=face,
            clip_on=False,
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xticklabels=[])
    axes.set_ylabel("accuracy", fontsize=FONT_SIZE)


def _is_outside(b: ConfidenceBin) -> bool:
    if b.accuracy is None or b.consistent_low is None or b.consistent_high is None:
        return False
    return not b.consistent_low <= b.accuracy <= b.consistent_high


def _tabulate(method: str, bins: tuple[ConfidenceBin, ...]) -> ReportTable:
    columns = ["confidence from", "to", "samples", "correct", "mean confidence", "accuracy"]
    rows = [
        [
            round(b.left, 4),
            round(b.right, 4),
            b.n,
            b.n_correct,
            *(_round(x) for x in (b.confidence, b.accuracy, b.low, b.high)),
            *(_round(x) for x in (b.consistent_low, b.consistent_high)),
        ]
        for b in bins
    ]
    columns += ["interval from", "to", "usual accuracy from", "to"]
    return ReportTable(method, columns, rows)


def _round(x: float | None) -> float | None:
    return None if x is None else round(x, 4)


def _share(bins: tuple[ConfidenceBin, ...]) -> tuple[list[float], list[float]]:
    """Each bin's share of all correct, and of all wrong predictions."""
    correct, wrong = [b.n_correct for b in bins], [b.n - b.n_correct for b in bins]
    return [n / max(1, sum(correct)) for n in correct], [n / max(1, sum(wrong)) for n in wrong]


def _draw_one_histogram(method: str, bins: tuple[ConfidenceBin, ...], *, index: int, most: float) -> Panel:
    figure = new_figure(height=2.5)
    n_correct = sum(b.n_correct for b in bins)
    counts = {"correct": n_correct, "wrong": sum(b.n for b in bins) - n_correct}
    looks = {"correct": (CORRECT_COLOUR, CORRECT_COLOUR, ""), "wrong": ("none", WRONG_COLOUR, "////")}
    for label, shares in zip(("correct", "wrong"), _share(bins), strict=True):
        face, edge, hatch = looks[label]
        bottom = 1.46 if label == "correct" else 0.42
        axes = add_axes(figure, bottom=bottom, top=bottom + 0.92)
        axes.bar(
            [b.left for b in bins],
            shares,
            width=bins[0].right,
            align="edge",
            facecolor=face,
            edgecolor=edge,
            hatch=hatch,
            linewidth=0.8,
        )
        axes.set(xlim=(0, 1), ylim=(0, most))
        axes.locator_params(axis="y", nbins=3)
        axes.set_ylabel("share", fontsize=FONT_SIZE)
        axes.text(0.03, 0.84, f"{counts[label]} {label}", fontsize=FONT_SIZE, transform=axes.transAxes)
        if label == "correct":
            axes.set_xticklabels([])
        else:
            axes.set_xlabel("confidence", fontsize=FONT_SIZE)
    right, wrong = (_centre(shares, bins) for shares in _share(bins))
    alt = (
        f"Histograms of confidence of {method}: {counts['correct']} correct predictions{right}, "
        f"{counts['wrong']} wrong ones{wrong}."
    )
    table = ReportTable(
        method,
        ["confidence from", "to", "correct", "wrong"],
        [[round(b.left, 4), round(b.right, 4), b.n_correct, b.n - b.n_correct] for b in bins],
    )
    return finish(figure, name=f"confidence-{index}", caption=method, alt=alt, table=table)


def _centre(shares: list[float], bins: tuple[ConfidenceBin, ...]) -> str:
    """About where a histogram sits, in words; nothing for an empty one."""
    if sum(shares) == 0:
        return ""
    mean = sum(s * (b.left + b.right) / 2 for s, b in zip(shares, bins, strict=True))
    return f" around {format_number(mean, 2)}"
