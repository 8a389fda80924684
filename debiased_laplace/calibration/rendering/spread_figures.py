"""Panels of a regression report: predicted against observed size of the errors, and single predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from debiased_laplace.calibration.contents import MethodResult, RegressionCurves, ReportTable, curves_of
from debiased_laplace.calibration.metrics.regression_curves import ExamplePrediction, SpreadBin
from debiased_laplace.calibration.rendering.formatting import format_number
from debiased_laplace.calibration.rendering.panels import (
    BAND_ALPHA,
    FONT_SIZE,
    GREY,
    LABEL_X,
    LABEL_Y,
    Look,
    Panel,
    add_axes,
    finish,
    new_figure,
    with_unit,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTPUTS_DRAWN = {"spread": 2, "examples": 1}  # of several; the JSON file holds the rest
_Row = TypeVar("_Row", SpreadBin, ExamplePrediction)


@dataclass(frozen=True)
class _Frame:
    """What a panel has in common with its neighbours: prefix of its ids, caption, unit, and the range of its axes."""

    name: str
    caption: str
    unit: str
    low: float
    high: float

    def label(self, what: str) -> str:
        return with_unit(what, self.unit)


def draw_spread(results: dict[str, MethodResult], looks: dict[str, Look], unit: str | None) -> list[list[Panel]]:
    """For each output a panel per method: root mean squared error against predicted standard deviation."""
    rows = {m: c.spread for m, c in curves_of(results, RegressionCurves).items()}
    return _draw_outputs(rows, "spread", unit, _ends_of_bin, lambda m, r, f: _draw_one_spread(r, looks[m], f))


def draw_examples(results: dict[str, MethodResult], looks: dict[str, Look], unit: str | None) -> list[list[Panel]]:
    """For each output a panel per method: predictions in ascending order with their intervals and targets."""
    rows = {m: c.examples for m, c in curves_of(results, RegressionCurves).items()}
    return _draw_outputs(
        rows,
        "examples",
        unit,
        lambda e: [e.low, e.high, e.target],
        lambda m, r, f: _draw_some_examples(r, looks[m], f),
    )


def _draw_outputs(
    rows: dict[str, tuple[_Row, ...]],
    kind: str,
    unit: str | None,
    ends_of: Callable[[_Row], list[float]],
    draw: Callable[[str, list[_Row], _Frame], Panel],
) -> list[list[Panel]]:
    """Every method's panel of the first outputs; the panels of one output share an axis."""
    several = any(row.output > 0 for table in rows.values() for row in table)
    panels: list[list[Panel]] = []
    for j in range(OUTPUTS_DRAWN[kind]):
        of_output = {m: [row for row in table if row.output == j] for m, table in rows.items()}
        ends = [x for table in of_output.values() for row in table for x in ends_of(row)]
        if not ends:
            break
        panels.append([])
        for i, (method, table) in enumerate(of_output.items()):
            caption = f"{method}, output {j}" if several else method
            frame = _Frame(f"{kind}-{j}-{i}", caption, unit or "", min(ends), max(ends))
            panels[-1].append(draw(method, table, frame))
    return panels


def _ends_of_bin(b: SpreadBin) -> list[float]:
    ends = [b.predicted, b.observed, b.consistent_low, b.consistent_high]
    return ends if b.low is None or b.high is None else [*ends, b.low, b.high]


def _draw_one_spread(bins: list[SpreadBin], look: Look, frame: _Frame) -> Panel:
    figure = new_figure(height=3.3)
    axes = add_axes(figure, bottom=0.42, top=3.2)
    margin = 0.06 * (frame.high - frame.low)
    vertical = (max(0.0, frame.low - margin), frame.high + margin)
    predicted = [b.predicted for b in bins]
    # every panel has its own width: spreads that hardly differ would lie on each other beside those that do
    margin = max(0.08 * (predicted[-1] - predicted[0]), (0.01 if len(bins) > 1 else 0.06) * predicted[-1])
    horizontal = (max(0.0, predicted[0] - margin), predicted[-1] + margin)
    axes.plot(horizontal, horizontal, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    usual = ([b.consistent_low for b in bins], [b.consistent_high for b in bins])
    if len(bins) > 1:
        axes.fill_between(predicted, *usual, color=GREY, alpha=BAND_ALPHA, linewidth=0)
    else:
        axes.vlines(predicted, *usual, color=GREY, alpha=BAND_ALPHA, linewidth=12)
    for b in bins:
        if b.low is not None and b.high is not None:
            axes.vlines(b.predicted, b.low, b.high, color=look.colour, linewidth=1.2)
    axes.plot(
        predicted, [b.observed for b in bins], color=look.colour, marker=look.marker, markersize=4.5, linestyle="none"
    )
    axes.set(xlim=horizontal, ylim=vertical)
    _label(axes, 5)
    outside = sum(not b.consistent_low <= b.observed <= b.consistent_high for b in bins)
    alt = (
        f"Root mean squared error against predicted standard deviation, {frame.caption}: {outside} of {len(bins)} bins "
        f"outside the usual range. Predicted {_show_range(predicted)}, observed "
        f"{_show_range([b.observed for b in bins])}{_after(frame.unit)}."
    )
    columns = ["samples", "predicted", "observed", "interval from", "to", "usual from", "to"]
    rows = [[b.n, b.predicted, b.observed, b.low, b.high, b.consistent_low, b.consistent_high] for b in bins]
    return finish(
        figure,
        name=frame.name,
        caption=frame.caption,
        alt=alt,
        table=ReportTable(frame.caption, columns, rows),
        texts={LABEL_X: frame.label("predicted standard deviation"), LABEL_Y: frame.label("root mean squared error")},
    )


def _draw_some_examples(rows: list[ExamplePrediction], look: Look, frame: _Frame) -> Panel:
    figure = new_figure(height=2.9)
    axes = add_axes(figure, bottom=0.3, top=2.8)
    margin = 0.04 * (frame.high - frame.low) or 1.0
    place = range(len(rows))
    # broken lines: one element of the page instead of sixty
    pause = float("nan")
    intervals = [y for e in rows for y in (e.low, e.high, pause)]
    means = [y for e in rows for y in (e.mean, e.mean, pause)]
    axes.plot([i for i in place for _ in range(3)], intervals, color=look.colour, alpha=0.45, linewidth=2)
    axes.plot([i + step for i in place for step in (-0.4, 0.4, 0)], means, color=look.colour, linewidth=1.2)
    missed = [not e.low <= e.target <= e.high for e in rows]
    for is_missed, marker, size in ((False, "o", 2.4), (True, "X", 5.5)):
        chosen = [i for i in place if missed[i] == is_missed]
        axes.plot(
            chosen, [rows[i].target for i in chosen], color="black", marker=marker, markersize=size, linestyle="none",
            markeredgewidth=0, clip_on=False,
        )  # fmt: skip
    axes.set(xlim=(-1, len(rows)), ylim=(frame.low - margin, frame.high + margin), xticks=[])
    _label(axes, 5)
    alt = (
        f"{len(rows)} test samples in the order of their predicted mean with central 90 % intervals, {frame.caption}: "
        f"{sum(missed)} targets outside of theirs, {format_number(0.1 * len(rows), 0)} being usual."
    )
    columns = ["sample", "predicted mean", "interval from", "to", "target", "inside"]
    table = [
        [e.sample, e.mean, e.low, e.high, e.target, "no" if miss else "yes"]
        for e, miss in zip(rows, missed, strict=True)
    ]
    return finish(
        figure,
        name=frame.name,
        caption=frame.caption,
        alt=alt,
        table=ReportTable(frame.caption, columns, table),
        texts={LABEL_X: "test samples in the order of their prediction", LABEL_Y: frame.label("prediction and target")},
    )


def _label(axes: "Axes", ticks: int) -> None:
    axes.locator_params(axis="y", nbins=ticks)
    if len(axes.get_xticks()):
        axes.locator_params(axis="x", nbins=ticks)
    axes.set_xlabel(LABEL_X, fontsize=FONT_SIZE)
    axes.set_ylabel(LABEL_Y, fontsize=FONT_SIZE)


def _show_range(values: list[float]) -> str:
    low, high = format_number(min(values)), format_number(max(values))
    return low if low == high else f"{low} to {high}"


def _after(unit: str) -> str:
    return f" {unit}" if unit else ""
