"""The figure of drawn rows: distance to the full batch against backward passes, one panel per task."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.fidelity_results import Summary
from benchmarks.fidelity_tasks import RECIPES

LINES = {
    "uniform": ("uniform samples, all rows of each", "#0072B2", "o"),
    "drawn": ("rows drawn in proportion to their curvature", "#D55E00", "D"),
}
LOWEST = 0.1
"""Where the axes end: a posterior of all data is the full batch but for single precision, and has no logarithm."""
_BELOW = 0.01 * LOWEST


def draw(summary: Summary, tasks: dict[str, int], path: Path, prior: float) -> None:
    """Write the figure as PNG, of tasks with their N·C; means over draws, bands of ± 1.96 standard errors."""
    figure = Figure(figsize=(max(3.4 * len(tasks), 6.0), 3.6), layout="constrained")
    panels = figure.subplots(1, max(len(tasks), 1), squeeze=False, sharey=True)[0]
    n_draws = {_panel(axes, summary, task, n, prior) for axes, (task, n) in zip(panels, tasks.items(), strict=False)}
    panels[0].set_ylabel("KL to the full batch,\nparameters [nats]")
    over = "–".join(str(n) for n in sorted({min(n_draws), max(n_draws)})) if n_draws else "0"
    figure.supxlabel(
        f"backward passes (prior precision {prior:g}; means over {over} draws, bands ± 1.96 standard errors)",
        fontsize=9,
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(axes: Axes, summary: Summary, task: str, n_passes: int, prior: float) -> int:
    """Draw a task; return the number of draws."""
    n_draws = 0
    for method, (label, colour, marker) in LINES.items():
        points = [
            (cell.B, found["parameter_kl"])
            for cell, methods in summary.cells.items()
            if cell.task == task and cell.prior == prior and (found := methods.get(method, {}))
        ]
        B = [b for b, _ in points]
        half = [1.96 * m.standard_error if m.n > 1 else 0.0 for _, m in points]
        low, middle, high = (
            [max(m.mean + sign * h, _BELOW) for (_, m), h in zip(points, half, strict=True)] for sign in (-1, 0, 1)
        )
        n_draws = max([n_draws, *(m.n for _, m in points)])
        axes.fill_between(B, low, high, color=colour, alpha=0.25, lw=0)
        axes.plot(B, middle, color=colour, marker=marker, ms=4, lw=1.6, label=label)
    alone = next(
        (
            m["prior only"]["parameter_kl"].mean
            for c, m in summary.cells.items()
            if (c.task, c.B, c.prior) == (task, 0, prior)
        ),
        None,
    )
    if alone is not None:
        axes.axhline(alone, color="#8A8A8A", lw=1, ls="--")
        axes.annotate("prior alone", (0.02, alone), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.axvline(n_passes, color="#8A8A8A", lw=1, ls=":")
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=LOWEST)
    axes.set_title(f"{RECIPES[task].title}\nN·C = {n_passes:,}", fontsize=10)
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, color="#DDDDDD")
    return n_draws
