"""The figure: distance to the full batch against curvature samples, one column per task."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.fidelity_posteriors import BASELINE
from benchmarks.fidelity_results import Cell, Summary
from benchmarks.fidelity_tasks import RECIPES

LINES = {
    "lowrank/same_batch/none/free": ("same batch (biased)", "#D55E00", "o"),
    "lowrank/held_out/none/free": ("held out (split)", "#E69F00", "s"),
    "lowrank/cross_fitted/none/free": ("cross-fitted", "#0072B2", "o"),
    "lowrank/cross_fitted/kron/free": ("cross-fitted + Kronecker (the default)", "#009E73", "D"),
    "auto": ("automatic", "#000000", "*"),
    f"{BASELINE}/kron": ("laplace-torch's K-FAC", "#8A8A8A", "^"),
}
ROWS = {
    "parameter_kl": "KL to the full batch,\nparameters [nats]",
    "total_variation": "total variation of\npredictive probabilities",
}
ALL_DATA = "laplace-torch's K-FAC on all the data"
LOWEST = {"parameter_kl": 0.3, "total_variation": 1e-4}
"""Where the axes end: a posterior of all the data is the full batch but for single precision, and has no logarithm."""
_BELOW = 0.03
"""Of the axes' end: where lines that leave the axes go."""


def draw(summary: Summary, path: Path, prior: float) -> None:
    """Write the figure as PNG; means over draws, bands of ± 1.96 standard errors."""
    tasks = [task for task in RECIPES if task in summary.n_data]
    figure = Figure(figsize=(max(3.1 * len(tasks), 9.0) + 0.5, 6.0), layout="constrained")
    grid = figure.subplots(len(ROWS), max(len(tasks), 1), squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        for row, (criterion, label) in enumerate(ROWS.items()):
            axes = grid[row, column]
            _panel(axes, summary, task, prior, criterion)
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(f"{RECIPES[task].title}\nN = {summary.n_data[task]:,}", fontsize=10)
    figure.supxlabel(f"curvature samples (prior precision {prior:g}; {_draws(summary, prior)})", fontsize=10)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [label for label in (*(label for label, _, _ in LINES.values()), ALL_DATA) if label in handles]
    if shown:
        place = "outside upper center"
        figure.legend([handles[k] for k in shown], shown, loc=place, ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _draws(summary: Summary, prior: float) -> str:
    """How many draws the means are over."""
    counts = {
        mean.n
        for cell, configurations in summary.cells.items()
        if cell.prior == prior and summary.n_data[cell.task] > cell.B
        for name in LINES
        for mean in configurations.get(name, {}).values()
    }
    shown = "–".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"
    return f"means over {shown} draws, bands ± 1.96 standard errors; lines that leave the axes reach the full batch"


def _panel(axes: Axes, summary: Summary, task: str, prior: float, criterion: str) -> None:
    n_data = summary.n_data[task]
    floor = _BELOW * LOWEST[criterion]
    for name, (label, colour, marker) in LINES.items():
        points = [
            (cell.B, found[criterion])
            for cell, configurations in summary.cells.items()
            if cell.task == task and cell.prior == prior and criterion in (found := configurations.get(name, {}))
        ]
        if not points:
            continue
        B = [b for b, _ in points]
        half = [1.96 * m.standard_error if m.n > 1 else 0.0 for _, m in points]
        low = [max(m.mean - h, floor) for (_, m), h in zip(points, half, strict=True)]
        high = [max(m.mean + h, floor) for (_, m), h in zip(points, half, strict=True)]
        axes.fill_between(B, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(B, [max(m.mean, floor) for _, m in points], color=colour, marker=marker, ms=4, lw=1.6, label=label)
    everything = summary.mean(Cell(task, n_data, prior), f"{BASELINE}/kron", criterion)
    if everything is not None:
        axes.axhline(everything, color="#8A8A8A", lw=1, ls="--", label=ALL_DATA)
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LOWEST[criterion]))
    sizes = sorted({cell.B for cell in summary.cells if cell.task == task})
    axes.set_xticks(sizes, [_tick(B, n_data) for B in sizes], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 100 * bottom else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, color="#DDDDDD")


def _tick(B: int, n_data: int) -> str:
    """All the data have a name; labels too close to it are left out."""
    if n_data == B:
        return "N"
    return str(B) if n_data / B > 1.4 else ""
