"""The forest plot: every paired difference to the baseline, and to it after scaling, with its interval."""

from typing import TYPE_CHECKING

from debiased_laplace.calibration.comparisons import Comparison, Verdict
from debiased_laplace.calibration.contents import ReportTable
from debiased_laplace.calibration.rendering.formatting import (
    choose_decimals,
    format_interval,
    format_signed,
    shorten,
)
from debiased_laplace.calibration.rendering.panels import (
    FONT_SIZE,
    GREY,
    Look,
    Panel,
    finish,
    new_rows,
    write_row,
)
from debiased_laplace.calibration.rendering.verdict import SHORT_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_HEIGHT = 0.52  # inches
HEADING_HEIGHT = 0.34
SHORT_VERDICTS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "no detectable difference": "not detectable",
}
NAME_LENGTH = 26  # characters of a method's name that fit beside its difference


def draw_differences(comparisons: tuple[Comparison, ...], looks: dict[str, Look]) -> list[Panel]:
    """One panel per metric, since every metric has its own unit."""
    metrics = [metric for metric in SHORT_NAMES if any(c.metric == metric for c in comparisons)]
    return [_draw_metric(metric, [c for c in comparisons if c.metric == metric], looks) for metric in metrics]


def _draw_metric(metric: str, rows: list[Comparison], looks: dict[str, Look]) -> Panel:
    """A group of rows per reference; a row is a method with its difference in words, and the interval under them."""
    references = list(dict.fromkeys(c.baseline for c in rows))
    height = len(rows) * ROW_HEIGHT + len(references) * HEADING_HEIGHT
    figure, axes = new_rows(height)
    texts: dict[str, str] = {}
    y = height  # of the axis, in inches from below
    for reference in references:
        y -= HEADING_HEIGHT
        heading = f"compared with {shorten(reference, NAME_LENGTH)}"
        write_row(axes, texts, y + 0.06, heading, weight="bold")
        axes.axhline(y, color=GREY, linewidth=0.5)
        for c in (c for c in rows if c.baseline == reference):
            y -= ROW_HEIGHT
            _draw_interval(axes, c, looks[c.method], y + 0.14)
            words = f"{shorten(c.method, NAME_LENGTH)}: {_show(c)}, {SHORT_VERDICTS[c.verdict]}"
            write_row(axes, texts, y + 0.3, words)
    _scale(axes, rows, height)
    name = SHORT_NAMES[metric]
    alt = f"Differences in {name}, below zero being better. " + " ".join(
        f"Compared with {reference}: " + "; ".join(_describe(c) for c in rows if c.baseline == reference) + "."
        for reference in references
    )
    return finish(
        figure,
        name=f"difference-{metric.replace('_', '-')}",
        caption=name[0].upper() + name[1:],
        alt=alt,
        table=_tabulate(name, rows),
        texts=texts,
    )


def _draw_interval(axes: "Axes", c: Comparison, look: Look, y: float) -> None:
    """The difference on its interval, filled where it was detected, and zero beside it."""
    axes.plot([0, 0], [y - 0.1, y + 0.1], color=GREY, linewidth=1)  # not through the words
    if c.low is not None and c.high is not None:
        axes.plot([c.low, c.high], [y, y], color=look.colour, linewidth=1.8)
    axes.plot(
        [c.difference],
        [y],
        marker=look.marker,
        color=look.colour,
        markersize=6.5,
        markerfacecolor="none" if c.verdict == "no detectable difference" else look.colour,
    )


def _scale(axes: "Axes", rows: list[Comparison], height: float) -> None:
    """Symmetric limits around zero, so that the direction is seen at once, and its name."""
    ends = [abs(x) for c in rows for x in (c.difference, c.low, c.high) if x is not None]
    half = 1.12 * max(ends) or 1.0
    axes.set(xlim=(-half, half))
    axes.locator_params(axis="x", nbins=5)
    below = -0.3 / height  # inches below the axis
    axes.text(0.0, below, "\u2190 better", fontsize=FONT_SIZE, va="top", transform=axes.transAxes)
    axes.text(1.0, below, "worse \u2192", fontsize=FONT_SIZE, va="top", ha="right", transform=axes.transAxes)


def _show(c: Comparison) -> str:
    return format_signed(c.difference, choose_decimals([c.standard_error]))


def _describe(c: Comparison) -> str:
    interval = format_interval(c.low, c.high, choose_decimals([c.standard_error]))
    return f"{c.method} {_show(c)} {interval}, {c.verdict}"


def _tabulate(name: str, rows: list[Comparison]) -> ReportTable:
    columns = ["method", "compared with", "difference", "interval from", "to", "p", "p, Holm", "verdict"]
    return ReportTable(
        name,
        columns,
        [[c.method, c.baseline, c.difference, c.low, c.high, c.p_value, c.adjusted_p_value, c.verdict] for c in rows],
    )
