"""The forest plot: every paired difference to the baseline with its interval."""

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
    add_axes,
    finish,
    new_figure,
)
from debiased_laplace.calibration.rendering.verdict import SHORT_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_HEIGHT = 0.52  # inches
SHORT_VERDICTS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "no detectable difference": "not detectable",
}
NAME_LENGTH = 26  # characters of a method's name that fit beside its difference


def draw_differences(comparisons: tuple[Comparison, ...], looks: dict[str, Look]) -> list[Panel]:
    """One panel per metric, since every metric has its own unit."""
    metrics = list(dict.fromkeys(c.metric for c in comparisons))
    return [_draw_metric(metric, [c for c in comparisons if c.metric == metric], looks) for metric in metrics]


def _draw_metric(metric: str, rows: list[Comparison], looks: dict[str, Look]) -> Panel:
    """One row per method: its name and difference in words, and the interval under them."""
    figure = new_figure(height=len(rows) * ROW_HEIGHT + 0.5)
    axes = add_axes(figure, bottom=0.45, top=len(rows) * ROW_HEIGHT + 0.45)
    axes.set_position((0.03, axes.get_position().y0, 0.94, axes.get_position().height))
    axes.spines["left"].set_visible(False)
    texts = {}
    for i, c in enumerate(rows):
        y = len(rows) - i - 0.72
        _draw_interval(axes, c, looks[c.method], y)
        # names enter after drawing: matplotlib would read dollar signs and miss other scripts
        placeholder = f"row {i}"
        texts[placeholder] = f"{shorten(c.method, NAME_LENGTH)}: {_show(c)}, {SHORT_VERDICTS[c.verdict]}"
        axes.text(0.0, y + 0.3, placeholder, fontsize=FONT_SIZE, transform=axes.get_yaxis_transform())
    _scale(axes, rows)
    name = SHORT_NAMES[metric]
    alt = f"Differences in {name} to {rows[0].baseline}, below zero being better: " + "; ".join(
        f"{c.method} {_show(c)} {format_interval(c.low, c.high, choose_decimals([c.standard_error]))}, {c.verdict}"
        for c in rows
    )
    return finish(
        figure,
        name=f"difference-{metric}",
        caption=name,
        alt=alt + ".",
        table=_tabulate(name, rows),
        texts=texts,
    )


def _draw_interval(axes: "Axes", c: Comparison, look: Look, y: float) -> None:
    """The difference on its interval, filled where it was detected, and zero beside it."""
    axes.plot([0, 0], [y - 0.2, y + 0.2], color=GREY, linewidth=1)  # not through the words
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


def _scale(axes: "Axes", rows: list[Comparison]) -> None:
    """Symmetric limits around zero, so that the direction is seen at once, and its name."""
    ends = [abs(x) for c in rows for x in (c.difference, c.low, c.high) if x is not None]
    half = 1.12 * max(ends) or 1.0
    axes.set(xlim=(-half, half), ylim=(0, len(rows) - 0.1), yticks=[])
    axes.locator_params(axis="x", nbins=5)
    below = -0.3 / (len(rows) * ROW_HEIGHT)  # inches below the axis
    axes.text(0.0, below, "\u2190 better", fontsize=FONT_SIZE, va="top", transform=axes.transAxes)
    axes.text(1.0, below, "worse \u2192", fontsize=FONT_SIZE, va="top", ha="right", transform=axes.transAxes)


def _show(c: Comparison) -> str:
    return format_signed(c.difference, choose_decimals([c.standard_error]))


def _tabulate(name: str, rows: list[Comparison]) -> ReportTable:
    columns = ["method", "difference", "interval from", "to", "p", "p, Holm", "verdict"]
    return ReportTable(
        name,
        columns,
        [[c.method, c.difference, c.low, c.high, c.p_value, c.adjusted_p_value, c.verdict] for c in rows],
    )
