"""Training runs over gradient-equivalent passes, as sentences, rows of a table and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

FIRST_ORDER = ("SGD", "Adam")
DEFAULT = "cross_fitted, shrinkage"
COLORS = {
    "same_batch": "tab:red",
    "held_out": "tab:orange",
    "cross_fitted": "tab:blue",
    "SGD": "0.55",
    "Adam": "black",
}

Runs = Mapping[str, list[dict[str, Any]]]
Rates = Mapping[str, tuple[float, ...]]


def along(runs: list[dict[str, Any]], name: str, grid: np.ndarray, axis: str = "passes") -> np.ndarray:
    """What each run has come to by then, (runs, points): the last value that was measured, not the next."""
    rows = []
    for run in runs:
        last = np.searchsorted(run[axis], grid + 1e-9, side="right") - 1
        rows.append(np.array(run[name], dtype=float)[last])
    return np.array(rows)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Over runs; a run that has left the numbers makes both infinite."""
    if not np.isfinite(values).all():
        return np.inf, np.inf
    return float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5


def shown_at(passes: float) -> np.ndarray:
    """The passes that the results show."""
    return np.array([passes / 20, passes / 5, passes])


def tuned(chosen: Mapping[str, float], rates: Rates) -> list[str]:
    """What was tuned, a sentence each."""
    edges = {method: rate in (rates[method][0], rates[method][-1]) for method, rate in chosen.items()}
    return [
        f"{method}: learning rate {rate:g}, {'at the edge' if edges[method] else 'inside'} of the grid."
        for method, rate in chosen.items()
    ]


def compared(runs: Runs, passes: float) -> list[str]:
    """How the default compares, a sentence each."""
    return [
        f"{'Training' if name == 'training' else 'Test'} loss after {at:g} passes: {_compared(runs, name, at)}."
        for name in ("training", "test")
        for at in shown_at(passes)
        if DEFAULT in runs
    ]


def _compared(runs: Runs, name: str, at: float) -> str:
    """The default against each other method, seed by seed."""
    against: dict[str, list[str]] = {"lower than": [], "higher than": [], "not told apart from": []}
    for method, others in runs.items():
        if method == DEFAULT:
            continue
        mine, theirs = (along(r, name, np.array([at]))[:, 0] for r in (runs[DEFAULT], others))
        difference, error = mean_and_error(mine - theirs)
        word = "not told apart from" if abs(difference) <= 2 * error else None
        against[word or ("lower than" if difference < 0 else "higher than")].append(f"`{method}`")
    said = [f"{word} {', '.join(names)}" for word, names in against.items() if names]
    return f"`{DEFAULT}` is " + "; ".join(said) + " (two standard errors of the paired difference)"


def rows(runs: Runs, passes: float) -> list[dict[str, str]]:
    """A row for each method, `…_error` being standard errors over seeds.

    `lowest_test_loss` is that of each seed's run, in hindsight; `accuracy` that at the end, of test samples; `seconds`
    of CPU, of the steps alone; `raised` counts accepted steps that raised the training loss by more than the standard
    error of the estimated change.
    """
    grid = shown_at(passes)
    found = []
    for method, of_method in runs.items():
        values = {
            f"{name}_loss_{at:g}": at_point
            for name in ("training", "test")
            for at, at_point in zip(grid, along(of_method, name, grid).T, strict=True)
        }
        values["lowest_test_loss"] = np.array([min(run["test"]) for run in of_method])
        values["accuracy"] = along(of_method, "accuracy", grid[-1:])[:, 0]
        row = {"method": method}
        for name, at_point in values.items():
            row[name], row[f"{name}_error"] = _entry(at_point)
        row["seconds"] = f"{np.mean([run['seconds'][-1] for run in of_method]):.1f}"
        for count in ("steps", "accepted", "raised") if method not in FIRST_ORDER else ("steps",):
            row[count] = f"{np.mean([run[count] for run in of_method]):.1f}"
        found.append(row)
    return found


def _entry(values: np.ndarray) -> tuple[str, str]:
    """Mean and standard error, with as many digits as the error says."""
    mean, error = mean_and_error(values)
    if not np.isfinite(mean):
        return "diverged", ""
    digits = 3 if error == 0 else max(0, 1 - int(np.floor(np.log10(error))))
    return f"{mean:.{digits}f}", f"{error:.{digits}f}"


def draw_figure(tasks: Mapping[str, Runs], passes: float, path: Path) -> None:
    """Training loss over passes and over seconds, test loss over passes: means over seeds, bands from least to most."""
    figure = Figure(figsize=(11.5, 3.3 * len(tasks) + 0.7), layout="constrained")
    axes = figure.subplots(len(tasks), 3, squeeze=False)
    for row, (title, runs) in zip(axes, tasks.items(), strict=True):
        for axis, name, over in zip(
            row, ("training", "training", "test"), ("passes", "seconds", "passes"), strict=True
        ):
            _panel(axis, runs, name, over, passes)
            axis.set_title(f"{title}: {name} loss", fontsize=10)
            axis.set_xlabel("gradient-equivalent passes" if over == "passes" else "seconds of CPU")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("Training from scratch: means over seeds, bands from the lowest to the highest seed", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel(axis: Axes, runs: Runs, name: str, over: str, passes: float) -> None:
    lasts = {method: passes if over == "passes" else min(r[over][-1] for r in found) for method, found in runs.items()}
    first = 1.0 if over == "passes" else max(lasts.values()) / 300
    for method, found in runs.items():
        kind, _, shrinkage = method.partition(", ")
        grid = np.geomspace(first, max(lasts[method], first), 200)
        values = along(found, name, grid, over)
        values[:, ~np.isfinite(values).all(0)] = np.nan
        newton = kind not in FIRST_ORDER
        style = "--" if newton and not shrinkage else "-"
        axis.plot(grid, values.mean(0), style, color=COLORS[kind], linewidth=1.5, label=method)
        axis.fill_between(grid, values.min(0), values.max(0), color=COLORS[kind], alpha=0.12, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter("{x:g}")
