"""The figure of drawn rows: distance to the full batch against backward passes, one panel per task."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.fidelity_results import Cell, Summary
from benchmarks.fidelity_tasks import RECIPES

LINES = {
    "uniform": ("uniform samples, all rows of each", "#0072B2", "o"),
    "drawn": ("rows drawn in proportion to their curvature", "#D55E00", "D"),
}
CRITERION = "parameter_kl"
LOWEST = 0.1
"""Where the axes end: a posterior of all data is the full batch but for single precision, and has no logarithm."""
_BELOW = 0.03 * LOWEST
"""Where lines that leave the axes go."""


def draw(summary: Summary, tasks: dict[str, list[int]], path: Path, prior: float) -> None:
    """Write the figure as PNG, of tasks with numbers of backward passes; bands of ± 1.96 standard errors."""
    figure = Figure(figsize=(max(3.3 * len(tasks), 6.0), 3.7), layout="constrained")
    panels = figure.subplots(1, max(len(tasks), 1), squeeze=False, sharey=True)[0]
    counts = set()
    for axes, (task, sizes) in zip(panels, tasks.items(), strict=False):
        counts |= _panel(axes, summary, [Cell(task, B, prior) for B in sorted(sizes)])
    panels[0].set_ylabel("KL to the full batch,\nparameters [nats]")
    panels[0].set_ylim(LOWEST, 2 * panels[0].get_ylim()[1])
    draws = "–".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"
    figure.supxlabel(
        f"backward passes (prior precision {prior:g}; means over {draws} draws, bands ± 1.96 standard errors; "
        "lines that leave the axes reach the full batch)",
        fontsize=9,
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(axes: Axes, summary: Summary, cells: list[Cell]) -> set[int]:
    """Draw a task, the largest number of passes being N·C; return the numbers of draws."""
    task, everything, prior = cells[-1].task, cells[-1].B, cells[-1].prior
    counts = set()
    for method, (label, colour, marker) in LINES.items():
        known = {c.B: m[method][CRITERION] for c in cells if method in (m := summary.cells.get(c, {}))}
        counts |= {mean.n for B, mean in known.items() if everything > B}
        half = [1.96 * m.standard_error if m.n > 1 else 0.0 for m in known.values()]
        low, middle, high = (
            [max(m.mean + sign * h, _BELOW) for m, h in zip(known.values(), half, strict=True)] for sign in (-1, 0, 1)
        )
        axes.fill_between(list(known), low, high, color=colour, alpha=0.25, lw=0)
        axes.plot(list(known), middle, color=colour, marker=marker, ms=4, lw=1.6, label=label)
    alone = summary.mean(Cell(task, 0, prior), "prior only", CRITERION)
    if alone is not None:
        axes.axhline(alone, color="#8A8A8A", lw=1, ls="--")
        axes.annotate("prior alone", (0.02, alone), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.axvline(everything, color="#8A8A8A", lw=1, ls=":")
    axes.set(xscale="log", yscale="log")
    axes.set_title(f"{RECIPES[task].title}\nN·C = {everything:,}", fontsize=10)
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, color="#DDDDDD")
    return counts
