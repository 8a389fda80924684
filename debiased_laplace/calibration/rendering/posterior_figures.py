"""Panels of the posterior section: inflated curvatures, and the data's precisions beside the prior's."""

from typing import TYPE_CHECKING

from debiased_laplace.calibration.contents import ReportTable
from debiased_laplace.calibration.posteriors.summaries import DirectionSummary, PosteriorSummary
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

WIDEST = 8.0  # of the axis of inflation, up and down: trailing directions of few samples know no end
FAR_BELOW = 300.0  # times below the prior precision: where the axis of the spectrum ends
TABLED = 20  # values of a spectrum in its table, or a few more
LEADING = 10  # directions that the text alternative sums up


def draw_inflation(posteriors: dict[str, PosteriorSummary], looks: dict[str, Look]) -> list[Panel]:
    """One panel per posterior whose curvatures come from other samples than its directions; shared axes."""
    shown = {name: s for name, s in posteriors.items() if s.shows_inflation}
    ratios = [d.inflation for s in shown.values() for d in s.directions if d.inflation]
    if not ratios:
        return []
    ends = [x for s in shown.values() for d in s.directions for x in (d.inflation_low, d.inflation_high) if x]
    reach = [1.5, *(max(x, 1 / x) for x in ratios + ends)]
    widest = 1.15 * min(WIDEST, max(reach))
    limits = 1 / widest, widest
    most = max(d.place for s in shown.values() for d in s.directions)
    return [
        _draw_one_inflation(name, s.directions, looks[name], index=i, limits=limits, most=most)
        for i, (name, s) in enumerate(shown.items())
    ]


def draw_spectrum(posteriors: dict[str, PosteriorSummary], looks: dict[str, Look]) -> list[Panel]:
    """One panel per posterior whose eigenvalues are known; shared axes."""
    shown = {name: s for name, s in posteriors.items() if s.spectrum}
    if not shown:
        return []
    values = [p.precision for s in shown.values() for p in s.spectrum]
    priors = [x for s in shown.values() for x in (s.prior_low, s.prior_high) if x]
    # far below the prior nothing depends on the data
    lowest = max(min(values), min(priors) / FAR_BELOW) if priors else min(values)
    limits = lowest / 1.6, max(values + priors) * 1.6
    most = max(p.place for s in shown.values() for p in s.spectrum)
    return [
        _draw_one_spectrum(name, s, looks[name], index=i, limits=limits, most=most)
        for i, (name, s) in enumerate(shown.items())
    ]


def _draw_one_inflation(
    name: str,
    directions: tuple[DirectionSummary, ...],
    look: Look,
    *,
    index: int,
    limits: tuple[float, float],
    most: int,
) -> Panel:
    figure = new_figure(height=2.5)
    axes = add_axes(figure, bottom=0.42, top=2.42)
    _scale(axes, most, limits, base=2)
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    drawn = [d for d in directions if d.inflation]
    barred = [d for d in drawn if d.low is not None]
    axes.vlines(
        [d.place for d in barred],
        [d.inflation_low or limits[0] for d in barred],
        [d.inflation_high or limits[1] for d in barred],
        color=look.colour,
        linewidth=1.2,
    )
    edges = limits[0] * 1.06, limits[1] / 1.06
    for beyond, face in ((False, look.colour), (True, "none")):
        group = [(d.place, r) for d in drawn if (r := d.inflation) and (not edges[0] <= r <= edges[1]) == beyond]
        axes.plot(
            [place for place, _ in group],
            [min(max(r, edges[0]), edges[1]) for _, r in group],
            linestyle="none",
            marker=look.marker,
            color=look.colour,
            markersize=4.5,
            markerfacecolor=face,
        )
    axes.set_xlabel("direction, by decreasing curvature", fontsize=FONT_SIZE)
    leading = [d.inflation for d in drawn if d.inflation and d.place <= LEADING]
    above = sum(d.inflation_low is not None and d.inflation_low > 1 for d in drawn)
    alt = (
        f"Curvature of a single batch over the full batch's estimate along {len(drawn)} directions of {name}: "
        f"{format_number(drawn[0].inflation)} along the first, {format_number(sum(leading) / len(leading))} on average "
        f"over those shown among the first {LEADING}; {above} intervals lie above 1."
    )
    return finish(
        figure, name=f"inflation-{index}", caption=name, alt=alt, table=_tabulate_directions(name, directions)
    )


def _draw_one_spectrum(
    name: str, summary: PosteriorSummary, look: Look, *, index: int, limits: tuple[float, float], most: int
) -> Panel:
    figure = new_figure(height=2.5)
    axes = add_axes(figure, bottom=0.42, top=2.42)
    _scale(axes, most, limits, base=10)
    low, high = summary.prior_low, summary.prior_high
    if low is not None and high is not None:
        axes.axhspan(low, high, color=GREY, alpha=BAND_ALPHA, linewidth=0)
        axes.axhline(low, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot(
        [p.place for p in summary.spectrum],
        [p.precision for p in summary.spectrum],
        color=look.colour,
        linewidth=1.8,
    )
    axes.set_xlabel("place of the value", fontsize=FONT_SIZE)
    first, last = summary.spectrum[0], summary.spectrum[-1]
    alt = (
        f"Precisions that the data give {name}, from {format_number(first.precision)} at place 1 to "
        f"{format_number(last.precision)} at place {last.place}"
    )
    if low is not None:
        above = max((p.place for p in summary.spectrum if p.precision > low), default=0)
        alt += f"; the prior precision is {format_number(low)}, and the values are above it up to about place {above}"
    rows = summary.spectrum[:: max(1, len(summary.spectrum) // TABLED)]
    table = ReportTable(name, ["place", "precision from the data"], [[p.place, p.precision] for p in rows])
    return finish(figure, name=f"spectrum-{index}", caption=name, alt=alt + ".", table=table)


def _scale(axes: "Axes", most: int, limits: tuple[float, float], *, base: int) -> None:
    """Logarithmic axes with plain numbers on them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    axes.set(xlim=(0.8, max(most, 2) * 1.25), ylim=limits)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(base=base, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.5g}" if 1e-3 <= y < 1e6 else f"{y:.0e}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def _tabulate_directions(name: str, directions: tuple[DirectionSummary, ...]) -> ReportTable:
    columns = ["direction", "single batch", "full batch, estimated", "from", "to", "inflation", "from ", "to "]
    return ReportTable(
        name,
        columns,
        [
            [d.place, d.in_sample, d.curvature, d.low, d.high, d.inflation, d.inflation_low, d.inflation_high]
            for d in directions
        ],
    )
