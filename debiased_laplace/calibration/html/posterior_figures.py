"""Figures of the posteriors: inflation of the curvature, and precisions of the data beside the prior's."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.formatting import format_number
from debiased_laplace.calibration.html.panels import (
    BAND,
    DASHED,
    Panel,
    draw_markers,
    list_looks,
    read_columns,
    start_figure,
    tabulate,
)
from debiased_laplace.calibration.tables import make_table

WIDEST = 8.0  # of the axis of inflation, up and down
FAR_BELOW = 300.0  # times below the prior precision, where the axis of the spectrum ends


def draw_inflation(contents: ReportContents) -> Iterator[Panel]:
    """Draw how inflated the curvature of a single batch is, for each posterior that has held-out curvatures."""
    shown = {name: [d for d in s.directions if d.inflation] for name, s in contents.posteriors.items()}
    shown = {name: directions for name, directions in shown.items() if directions}
    every = [d for directions in shown.values() for d in directions]
    ratios = [x for d in every for x in (d.inflation, d.inflation_low, d.inflation_high) if x]
    widest = 1.15 * min(WIDEST, max([1.5, *(max(x, 1 / x) for x in ratios)]))
    for posterior, look in list_looks(contents, shown):
        directions, table = shown[posterior], tabulate(shown[posterior])
        for column in ("inflation", "inflation_low", "inflation_high"):
            table[column.replace("_", ", ")] = pd.Series([getattr(d, column) for d in directions], dtype=object)
        figure, axes = start_figure(2.5, "direction, by decreasing curvature")
        _scale_logarithmically(axes, max(d.place for d in every), (1 / widest, widest), base=2)
        axes.axhline(1.0, **DASHED)
        place, ratio, edge = read_columns(directions)["place"], table["inflation"].astype(float), widest / 1.06
        ends = [table[f"inflation, {end}"].astype(float) for end in ("low", "high")]
        barred = table["interval from"].notna()
        low, high = ends[0].fillna(1 / widest)[barred], ends[1].fillna(widest)[barred]
        axes.vlines(place[barred], low, high, color=look.color, linewidth=1.2)
        at = ratio.clip(1 / edge, edge)
        draw_markers(axes, place, at, look, is_hollow=at != ratio, size=4.5)
        first = format_number(directions[0].inflation)
        alt = f"Curvature of a single batch over the full batch's, {posterior}: {first} along the first direction."
        yield Panel(posterior, figure, alt, table)


def draw_spectrum(contents: ReportContents) -> Iterator[Panel]:
    """Draw the precisions that the data give beside the prior's, for each posterior whose spectrum is known."""
    shown = {name: s for name, s in contents.posteriors.items() if s.spectrum}
    points = [p for s in shown.values() for p in s.spectrum]
    values = [p.precision for p in points]
    priors = [x for s in shown.values() for x in s.prior_precision if x > 0]
    # far below the prior nothing depends on the data
    lowest = max([min(values, default=1.0), *([min(priors) / FAR_BELOW] if priors else [])])
    for posterior, look in list_looks(contents, shown):
        spectrum, (low, high) = shown[posterior].spectrum, shown[posterior].prior_precision
        figure, axes = start_figure(2.5, "place of the value")
        limits = lowest / 1.6, 1.6 * max(values + priors)
        _scale_logarithmically(axes, max(p.place for p in points), limits, base=10)
        axes.axhspan(low, high, **BAND)
        axes.axhline(low, **DASHED)
        axes.plot([p.place for p in spectrum], [p.precision for p in spectrum], color=look.color, linewidth=1.8)
        above = max((p.place for p in spectrum if p.precision > low), default=0)
        alt = (
            f"Precisions that the data give {posterior}: the prior precision is {format_number(low)}, and the values "
            f"are above it up to about place {above}."
        )
        rows = [[p.place, p.precision] for p in spectrum[:: max(1, len(spectrum) // 20)]]
        yield Panel(posterior, figure, alt, make_table(["place", "precision from the data"], rows))


def _scale_logarithmically(axes: Axes, most: int, limits: tuple[float, float], *, base: int) -> None:
    """Logarithmic axes with plain numbers on them."""
    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    axes.set(xlim=(0.8, max(most, 2) * 1.25), ylim=limits)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(base=base, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.5g}" if 1e-3 <= y < 1e6 else f"{y:.0e}"))
    axes.minorticks_off()
