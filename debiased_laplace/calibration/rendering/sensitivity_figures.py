"""Panels of the calibration error over the number of its bins: how much of it is the choice of bins."""

from debiased_laplace.calibration.contents import ClassificationCurves, MethodResult, ReportTable, curves_of
from debiased_laplace.calibration.metrics.bin_sensitivity import BinSensitivity
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

TABLE_STEP = 5  # numbers of bins between rows of the table


def draw_sensitivity(results: dict[str, MethodResult], looks: dict[str, Look]) -> list[Panel]:
    """One panel per method, all with the same axes; none where the numbers were not kept."""
    tables = {m: c.sensitivity for m, c in curves_of(results, ClassificationCurves).items() if c.sensitivity}
    most = max((max(s.error, s.noise_floor) for table in tables.values() for s in table), default=0.0) or 1e-3
    return [
        _draw_one(method, table, looks[method], index=i, most=1.1 * most)
        for i, (method, table) in enumerate(tables.items())
    ]


def _draw_one(method: str, table: tuple[BinSensitivity, ...], look: Look, *, index: int, most: float) -> Panel:
    figure = new_figure(height=2.1)
    axes = add_axes(figure, bottom=0.42, top=2.0)
    n_bins = [s.n_bins for s in table]
    axes.fill_between(n_bins, [s.noise_floor for s in table], color=GREY, alpha=BAND_ALPHA, linewidth=0)
    axes.plot(n_bins, [s.error for s in table], color=look.colour, linewidth=1.5)
    axes.set(xlim=(n_bins[0] - 1, n_bins[-1] + 1), ylim=(0, most))
    axes.locator_params(axis="y", nbins=4)
    axes.set_xlabel("number of bins", fontsize=FONT_SIZE)
    axes.set_ylabel("ECE", fontsize=FONT_SIZE)
    low, high = min(s.error for s in table), max(s.error for s in table)
    floors = table[0].noise_floor, table[-1].noise_floor
    alt = (
        f"Expected calibration error of {method} with {n_bins[0]} to {n_bins[-1]} bins: between {format_number(low)} "
        f"and {format_number(high)}; chance alone would make {format_number(floors[0])} with the fewest and "
        f"{format_number(floors[1])} with the most."
    )
    rows = [[s.n_bins, round(s.error, 5), round(s.noise_floor, 5)] for s in table if s.n_bins % TABLE_STEP == 0]
    numbers = ReportTable(method, ["bins", "calibration error", "chance alone"], rows)
    return finish(figure, name=f"sensitivity-{index}", caption=method, alt=alt, table=numbers)
