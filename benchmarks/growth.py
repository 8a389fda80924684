"""How time and memory of a fit and of predictions grow with parameters, samples, classes, rows and rank.

    python -m benchmarks.growth --figures docs/figures

Every point is a process of its own with one thread: a network with two hidden layers, random weights and labels, is
fitted, and 64 inputs are predicted. Memory is the peak beyond that before the fit. Slopes are those of the logarithms
over the last two points of a line: 1 is linear growth.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fidelity_tasks import mlp
from benchmarks.scale import _peak, _reset_peak
from debiased_laplace import DebiasedLaplace

INPUTS, PREDICTED = 64, 64


@dataclass(frozen=True)
class Setting:
    """What is fitted.

    Attributes:
        width: of the hidden layers.
        n_samples: number of samples N.
        n_classes: number of classes C.
        n_rows: rows that are drawn.
        rank: number of directions (lowrank).
    """

    width: int = 300
    n_samples: int = 4_000
    n_classes: int = 10
    n_rows: int = 256
    rank: int = 20


VARIED: dict[str, tuple[str, tuple[int, ...]]] = {
    "parameters P": ("width", (100, 300, 1_000, 2_500)),
    "samples N": ("n_samples", (1_000, 10_000, 100_000, 400_000)),
    "classes C": ("n_classes", (3, 10, 100, 1_000)),
    "rows": ("n_rows", (64, 256, 1_024, 2_048)),
    "rank": ("rank", (5, 20, 80, 240)),
}
"""Panels: what varies, and its values; the rest is as in `Setting`."""

LINES: dict[str, tuple[dict[str, Any], str, str]] = {
    "lowrank": ({"hessian_structure": "lowrank"}, "rank 20, Kronecker complement", "#D55E00"),
    "isotropic": ({"hessian_structure": "lowrank", "complement": "isotropic"}, "rank 20, isotropic", "#009E73"),
    "kron": ({"hessian_structure": "kron"}, "kron", "#0072B2"),
}
MEASURES = {"fit": "fit [s]", "predict": f"la(x), {PREDICTED} inputs [s]", "mebibytes": "memory of the fit [MiB]"}


def measured(line: str, setting: Setting) -> dict[str, float]:
    """Return the processor seconds of a fit and of predictions, the memory of the fit, and P."""
    torch.manual_seed(0)
    model: nn.Module = mlp(INPUTS, setting.width, setting.width, setting.n_classes).eval()
    X = torch.randn(setting.n_samples, INPUTS)
    y, x = torch.randint(0, setting.n_classes, (setting.n_samples,)), torch.randn(PREDICTED, INPUTS)
    options = dict(LINES[line][0])
    if line != "kron":
        options["rank"] = setting.rank
    la = DebiasedLaplace(model, "classification", prior_precision=30.0, n_rows=setting.n_rows, **options)
    with torch.no_grad():
        model(X[:256])
    _reset_peak()
    before, start = _peak(), time.process_time()
    la.fit(DataLoader(TensorDataset(X, y), batch_size=256))
    fit, grew = time.process_time() - start, _peak() - before
    start = time.process_time()
    la(x)
    first = time.process_time() - start
    start = time.process_time()
    la(x)
    again = time.process_time() - start
    return {"fit": fit, "predict": min(first, again), "mebibytes": grew / 2**20, "P": float(la.n_params)}


def points() -> Iterator[tuple[str, str, int, Setting]]:
    """Yield panel, line, value and setting of every point."""
    for panel, (name, values) in VARIED.items():
        for line in LINES:
            if panel != "rank" or line != "kron":
                for value in values:
                    yield panel, line, value, replace(Setting(), **{name: value})


def child(line: str, setting: Setting) -> dict[str, float]:
    """Return what is measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--child", line, json.dumps(asdict(setting))]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **one_thread}, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the logarithms over the last two points."""
    return math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Write the figure as PNG."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(VARIED), squeeze=False, sharey="row")
    for row, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for axes, panel in zip(row, VARIED, strict=True):
            _panel(axes, [r for r in results if r["panel"] == panel], measure)
        row[0].set_ylabel(label)
    for axes, panel in zip(panels[-1], VARIED, strict=True):
        axes.set_xlabel(panel)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _panel(axes: Axes, results: list[dict[str, Any]], measure: str) -> None:
    for (line, (_, title, colour)), shift in zip(LINES.items(), (6, -12, -3), strict=True):
        own = [r for r in results if r["line"] == line]
        if not own:
            continue
        xs, ys = [r["x"] for r in own], [max(r[measure], 1e-3) for r in own]
        axes.plot(xs, ys, color=colour, marker="o", ms=4, lw=1.6, label=title)
        # no minus sign before a zero
        text = f"{round(slope(xs, ys), 1) + 0.0:.1f}"
        axes.annotate(text, (xs[-1], ys[-1]), (5, shift), textcoords="offset points", color=colour, fontsize=9)
    axes.set(xscale="log", yscale="log")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(lw=0.4, color="#DDDDDD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="folder of growth.png; none without it")
    parser.add_argument("--results", type=Path, help="folder of growth.json; none without it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        line, setting = options.child
        print(json.dumps(measured(line, Setting(**json.loads(setting)))))
        return
    results = []
    print("| varied | value | line | fit, s | predictions, s | memory, MiB |\n|---|---|---|---|---|---|")
    for panel, line, value, setting in points():
        found = child(line, setting)
        x = found["P"] if panel == "parameters P" else value
        results.append({"panel": panel, "line": line, "x": x, **found})
        fit, predict, mebibytes = (found[measure] for measure in MEASURES)
        print(f"| {panel} | {x:,.0f} | {line} | {fit:.2f} | {predict:.3f} | {mebibytes:,.0f} |", flush=True)
    print("\n| slopes over the last two points | line | fit | predictions | memory |\n|---|---|---|---|---|")
    for panel in VARIED:
        for line in LINES:
            own = [r for r in results if r["panel"] == panel and r["line"] == line]
            if own:
                xs = [r["x"] for r in own]
                slopes = (slope(xs, [max(r[measure], 1e-3) for r in own]) for measure in MEASURES)
                print(f"| {panel} | {line} | {' | '.join(f'{s:.2f}' for s in slopes)} |")
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.figures:
        draw(results, options.figures / "growth.png")


if __name__ == "__main__":
    main()
