"""Panels of a regression report: coverage curves and histograms of the probability transform."""

from debiased_laplace.calibration.contents import MethodResult, RegressionCurves, ReportTable, curves_of
from debiased_laplace.calibration.metrics.curves import CoverageLevel, HistogramBin
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


def draw_coverage(results: dict[str, MethodResult], looks: dict[str, Look]) -> list[Panel]:
    """One coverage curve per method: what central intervals hold against what they promise."""
    return [
        _draw_one_coverage(method, curves.coverage, looks[method], index=i)
        for i, (method, curves) in enumerate(curves_of(results, RegressionCurves).items())
    ]


def draw_pit(results: dict[str, MethodResult], looks: dict[str, Look]) -> list[Panel]:
    """One histogram per method of the predictive distribution function at the targets."""
    curves = curves_of(results, RegressionCurves)
    most = max(max(b.n, b.consistent_high) for c in curves.values() for b in c.pit)
    return [
        _draw_one_pit(method, c.pit, looks[method], index=i, most=1.08 * most)
        for i, (method, c) in enumerate(curves.items())
    ]


def _draw_one_coverage(method: str, levels: tuple[CoverageLevel, ...], look: Look, *, index: int) -> Panel:
    figure = new_figure(height=3.3)
    axes = add_axes(figure, bottom=0.42, top=3.2)
    nominal, observed = [x.nominal for x in levels], [x.observed for x in levels]
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.fill_between(
        nominal,
        [x.low for x in levels],
        [x.high for x in levels],
        color=look.colour,
        alpha=0.25,
        linewidth=0,
    )
    axes.plot(nominal, observed, color=look.colour, marker=look.marker, markersize=3.5, linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("nominal coverage of central intervals", fontsize=FONT_SIZE)
    axes.set_ylabel("observed coverage", fontsize=FONT_SIZE)
    at_90 = min(levels, key=lambda x: abs(x.nominal - 0.9))
    alt = (
        f"Coverage curve of {method}: central {at_90.nominal:.0%} intervals hold "
        f"{at_90.observed:.1%} of the targets, central "
        f"{levels[len(levels) // 2].nominal:.0%} intervals {levels[len(levels) // 2].observed:.1%}."
    )
    table = ReportTable(
        method,
        ["nominal", "observed", "interval from", "to"],
        [[round(v, 4) for v in (x.nominal, x.observed, x.low, x.high)] for x in levels],
    )
    return finish(figure, name=f"coverage-{index}", caption=method, alt=alt, table=table)


def _draw_one_pit(method: str, bins: tuple[HistogramBin, ...], look: Look, *, index: int, most: float) -> Panel:
    figure = new_figure(height=2.3)
    axes = add_axes(figure, bottom=0.42, top=2.2)
    low, high = bins[0].consistent_low, bins[0].consistent_high
    axes.bar(
        [b.left for b in bins],
        [b.n for b in bins],
        width=bins[0].right,
        align="edge",
        facecolor=look.colour,
        edgecolor=look.colour,
        alpha=0.75,
        linewidth=0.5,
    )
    axes.axhspan(low, high, color=GREY, alpha=BAND_ALPHA, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, most))
    axes.locator_params(axis="y", nbins=4, integer=True)
    axes.set_xlabel("predicted probability of a smaller target", fontsize=FONT_SIZE)
    axes.set_ylabel("targets", fontsize=FONT_SIZE)
    outer = (bins[0].n + bins[-1].n) / sum(b.n for b in bins)
    outside = sum(not b.consistent_low <= b.n <= b.consistent_high for b in bins)
    alt = (
        f"Histogram of the predictive distribution function at the targets, {method}: "
        f"{outside} of {len(bins)} bins outside the usual range; the two outermost bins hold "
        f"{format_number(100 * outer, 1)} % of the targets, {200 / len(bins):g} % being right."
    )
    table = ReportTable(
        method,
        ["from", "to", "targets", "usual from", "to"],
        [[b.left, b.right, b.n, round(low, 2), round(high, 2)] for b in bins],
    )
    return finish(figure, name=f"pit-{index}", caption=method, alt=alt, table=table)
