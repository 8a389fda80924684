"""The figures of the posteriors: inflation of the curvature, and precisions of the data beside the prior's."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from debiased_laplace.calibration.contents import DirectionSummary, ReportContents
from debiased_laplace.calibration.formatting import format_number
from debiased_laplace.calibration.html.panels import (
    BAND,
    DASHED,
    Look,
    Panel,
    draw_each,
    finish,
    label_axes,
    start_figure,
    tabulate,
)
from debiased_laplace.calibration.tables import make_table

WIDEST = 8.0  # of the axis of inflation, up and down
FAR_BELOW = 300.0  # times below the prior precision, where the axis of the spectrum ends


def draw_inflation(contents: ReportContents) -> list[Panel]:
    """Draw how inflated the curvature of a single batch is, for each posterior that can tell."""
    shown = {name: [d for d in s.directions if d.inflation] for name, s in contents.posteriors.items()}
    shown = {name: directions for name, directions in shown.items() if directions}
    every = [d for directions in shown.values() for d in directions]
    ratios = [x for d in every for x in (d.inflation, d.inflation_low, d.inflation_high) if x]
    widest = 1.15 * min(WIDEST, max([1.5, *(max(x, 1 / x) for x in ratios)]))

    def draw(posterior: str, look: Look, name: str) -> Panel:
        directions = shown[posterior]
        figure, axes = start_figure(2.5)
        _scale_logarithmically(axes, max(d.place for d in every), (1 / widest, widest), base=2)
        axes.axhline(1.0, **DASHED)
        _draw_directions(axes, directions, look, widest)
        label_axes(axes, "direction, by decreasing curvature")
        first = format_number(directions[0].inflation)
        alt = f"Curvature of a single batch over the full batch's, {posterior}: {first} along the first direction."
        table = tabulate(directions)
        for column in ("inflation", "inflation_low", "inflation_high"):
            table[column.replace("_", ", ")] = [getattr(d, column) for d in directions]
        return finish(figure, name, posterior, alt, table)

    return draw_each(contents, shown, "inflation", draw)


def draw_spectrum(contents: ReportContents) -> list[Panel]:
    """Draw the precisions that the data give beside the prior's, for each posterior whose spectrum is known."""
    shown = {name: s for name, s in contents.posteriors.items() if s.spectrum}
    values = [p.precision for s in shown.values() for p in s.spectrum]
    priors = [x for s in shown.values() for x in s.prior_precision if x > 0]
    # far below the prior nothing depends on the data
    lowest = max([min(values, default=1.0), *([min(priors) / FAR_BELOW] if priors else [])])

    def draw(posterior: str, look: Look, name: str) -> Panel:
        spectrum, (low, high) = shown[posterior].spectrum, shown[posterior].prior_precision
        figure, axes = start_figure(2.5)
        most = max(p.place for s in shown.values() for p in s.spectrum)
        _scale_logarithmically(axes, most, (lowest / 1.6, 1.6 * max(values + priors)), base=10)
        axes.axhspan(low, high, **BAND)
        axes.axhline(low, **DASHED)
        axes.plot([p.place for p in spectrum], [p.precision for p in spectrum], color=look.color, linewidth=1.8)
        label_axes(axes, "place of the value")
        above = max((p.place for p in spectrum if p.precision > low), default=0)
        alt = (
            f"Precisions that the data give {posterior}: the prior precision is {format_number(low)}, and the values "
            f"are above it up to about place {above}."
        )
        rows = [[p.place, p.precision] for p in spectrum[:: max(1, len(spectrum) // 20)]]
        return finish(figure, name, posterior, alt, make_table(["place", "precision from the data"], rows))

    return draw_each(contents, shown, "spectrum", draw)


def _draw_directions(axes: Axes, directions: Sequence[DirectionSummary], look: Look, widest: float) -> None:
    """Inflation with its intervals; markers beyond the edge are drawn hollow at it."""
    barred = [d for d in directions if d.low is not None]
    low, high = [d.inflation_low or 1 / widest for d in barred], [d.inflation_high or widest for d in barred]
    axes.vlines([d.place for d in barred], low, high, color=look.color, linewidth=1.2)
    edge = widest / 1.06
    for d in directions:
        ratio = d.inflation or 1.0
        shown = min(max(ratio, 1 / edge), edge)
        face = look.color if shown == ratio else "none"
        axes.plot([d.place], [shown], linestyle="none", **look._asdict(), markersize=4.5, markerfacecolor=face)


def _scale_logarithmically(axes: Axes, most: int, limits: tuple[float, float], *, base: int) -> None:
    """Logarithmic axes with plain numbers on them."""
    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    axes.set(xlim=(0.8, max(most, 2) * 1.25), ylim=limits)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(base=base, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.5g}" if 1e-3 <= y < 1e6 else f"{y:.0e}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
