"""Where the loss comes from: every method's loss beside what a single fitted number would leave of it."""

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.rendering.formatting import (
    choose_common_decimals,
    choose_decimals,
    format_number,
    format_signed,
    format_with_interval,
    shorten,
)
from debiased_laplace.calibration.rendering.panels import Look, Panel, finish, new_rows, write_row

ROW_HEIGHT = 0.5  # inches
NAME_LENGTH = 24


def draw_decomposition(contents: ReportContents, looks: dict[str, Look]) -> Panel | None:
    """One row per method, from the loss after scaling (hollow) to the loss itself (filled); None without any."""
    rows = {m: e for m, e in contents.metrics.items() if "nll_calibration_loss" in e}
    if not rows:
        return None
    height = len(rows) * ROW_HEIGHT
    figure, axes = new_rows(height)
    texts: dict[str, str] = {}
    for i, (method, metrics) in enumerate(rows.items()):
        y, look = height - (i + 1) * ROW_HEIGHT + 0.14, looks[method]
        whole, left = metrics["nll"].known, metrics["nll_refinement_loss"].known
        axes.plot([left, whole], [y, y], color=look.colour, linewidth=3)
        axes.plot([left], [y], marker=look.marker, color=look.colour, markersize=6.5, markerfacecolor="none")
        axes.plot([whole], [y], marker=look.marker, color=look.colour, markersize=6.5)
        write_row(axes, texts, y + 0.16, f"{shorten(method, NAME_LENGTH)}: {_show_sum(metrics)}")
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    what = "temperature" if contents.task != "regression" else "factor of the standard deviations"
    alt = f"NLL after fitting one {what} plus what that repairs: " + "; ".join(
        f"{method} {_show_sum(metrics)}" for method, metrics in rows.items()
    )
    return finish(
        figure,
        name="decomposition",
        caption="NLL = what remains + what one number repairs",
        alt=alt + ".",
        table=_tabulate(rows),
        texts=texts,
    )


def _show_sum(metrics: dict[str, Estimate]) -> str:
    whole, part = metrics["nll"], metrics["nll_calibration_loss"]
    decimals = choose_decimals([part.standard_error])
    left = metrics["nll_refinement_loss"]
    repaired = format_signed(part.value, decimals)
    sign, size = ("+", repaired.lstrip("+")) if not repaired.startswith("\u2212") else ("\u2212", repaired[1:])
    return f"{format_number(whole.value, decimals)} = {format_number(left.value, decimals)} {sign} {size}"


def _tabulate(rows: dict[str, dict[str, Estimate]]) -> ReportTable:
    cells = []
    for method, metrics in rows.items():
        shown = [method]
        for name in ("nll", "nll_refinement_loss", "nll_calibration_loss", "temperature_optimal"):
            if name not in metrics:
                continue
            e = metrics[name]
            shown.append(format_with_interval(e.value, e.low, e.high, choose_common_decimals([e])))
        cells.append(shown)
    columns = ["method", "NLL", "remains", "repaired", "temperature"]
    return ReportTable("Where the loss comes from", columns[: len(cells[0])], cells)
