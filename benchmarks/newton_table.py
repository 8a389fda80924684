"""Means over draws of the Newton benchmark, as verdicts, rows of a table and a figure."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

POINTS = (1, 2, 3, 5, 10, 20)  # iterations; the last of the values that are kept is the end of the step
SHOWN = (0, 2, 4, 5)  # of POINTS, in the results
CHANGES = (*(f"q_{POINTS[i]}" for i in SHOWN), "q_stopped", f"loss_{POINTS[-1]}", "loss_stopped")
COLUMNS = (
    *("task", "checkpoint", "batch", "damping", "method", "shrinkage"),
    *(f"{name}{kind}" for name in CHANGES for kind in ("", "_error")),
    *("above", "iterations", "gradients"),
)
_METHODS = ("same_batch", "held_out", "cross_fitted")
_COLORS = dict(zip(_METHODS, ("tab:red", "tab:orange", "tab:blue"), strict=True))

Records = Iterable[dict[str, Any]]


class Cell(NamedTuple):
    """Where methods compare."""

    checkpoint: str
    batch: int
    damping: float

    def __str__(self) -> str:
        return f"{self.checkpoint}, batch {self.batch}, damping {self.damping:g}"


class Kind(NamedTuple):
    """Of step."""

    method: str
    shrinkage: bool
    stopping: str


class Changes(NamedTuple):
    """Relative to the start, one row for each draw, one column for each of POINTS and one for the end.

    And what a step takes, over draws: iterations of a pass and gradients of one sample, means; seconds, median.
    """

    quadratic: np.ndarray
    loss: np.ndarray
    iterations: float
    gradients: float
    seconds: float


def changes_of(records: Records) -> dict[Cell, dict[Kind, Changes]]:
    """The records by cell and kind of step."""
    rows: dict[Cell, dict[Kind, list[dict[str, Any]]]] = {}
    for record in records:
        cell = rows.setdefault(Cell(*record["key"][:3]), {})
        for row in record["steps"]:
            cell.setdefault(Kind(row["method"], row["shrinkage"], row["stopping"]), []).append(row)
    return {
        cell: {
            kind: Changes(
                np.array([row["quadratic"] for row in found]),
                np.array([row["loss"] for row in found]),
                *(float(np.mean([row[name] for row in found])) for name in ("iterations", "gradients")),
                float(np.median([row["seconds"] for row in found])),  # a first step takes longer
            )
            for kind, found in kinds.items()
        }
        for cell, kinds in rows.items()
    }


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over draws."""
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def raised(values: np.ndarray) -> np.ndarray:
    """Where the mean is above the start by more than its standard error."""
    mean, error = mean_and_error(values)
    return mean > error


def verdicts(records: Records) -> list[str]:
    """What was to be shown, a sentence each, true or not."""
    cells = changes_of(records)
    n_draws = {len(next(iter(kinds.values())).quadratic) for kinds in cells.values()}
    default, forced = Kind("cross_fitted", True, "held_out"), Kind("cross_fitted", True, "none")
    lines = [
        f"{len(cells)} cells (checkpoint, batch size, damping), {'/'.join(map(str, sorted(n_draws)))} draws each; "
        f"judged after {', '.join(map(str, POINTS))} iterations and at the end of the step.",
        _above(cells, default, "full-batch quadratic, cross_fitted with shrinkage and held-out stopping (the default)"),
        _above(cells, forced, f"full-batch quadratic, the same without stopping, to {POINTS[-1]} iterations"),
    ]
    for method, stopping in product(("held_out", "cross_fitted"), ("held_out", "none")):
        for shrinkage in (False, True):
            kind = Kind(method, shrinkage, stopping)
            if kind not in (default, forced):
                lines.append(_above(cells, kind, f"full-batch quadratic, {_named(kind)}"))
    biased = Kind("same_batch", False, "none")
    lines.append(_above(cells, biased, "full-batch quadratic, same_batch"))
    above = [cell for cell, kinds in cells.items() if raised(kinds[biased].quadratic).any()]
    lines.append(f"same_batch is above somewhere: {'yes' if above else 'no'}{_listed(above)}")
    late = {cell: kinds for cell, kinds in cells.items() if cell.checkpoint == "late"}
    for kind in (default, forced, biased) if late else ():
        lines.append(_above(late, kind, f"training loss near the minimum, {_named(kind)}", lambda c: c.loss))
    for kind in (default, biased):
        text = f"training loss at the end of the step, any checkpoint, {_named(kind)}"
        lines.append(_above(cells, kind, text, lambda c: c.loss[:, -1:]))
    lines += [_cost(cells, kind, biased) for kind in (default, Kind("held_out", True, "held_out"), forced)]
    differences = {
        "where debiasing loses, at best: same_batch, stopped where its mean is lowest, against the default": {
            cell: k[biased].quadratic[:, [_best(k[biased])]] - k[default].quadratic[:, -1:] for cell, k in cells.items()
        },
        f"where debiasing loses: same_batch after {POINTS[-1]} iterations, against the default": {
            cell: (k[biased].quadratic - k[default].quadratic)[:, -1:] for cell, k in cells.items()
        },
    }
    for text, values in differences.items():
        lower = [cell for cell, v in values.items() if raised(-v).all()]
        higher = sum(bool(raised(v).all()) for v in values.values())
        lines.append(
            f"{text}: the full-batch quadratic is higher in {higher} of {len(cells)} cells, lower in {len(lower)}, "
            f"each by more than the standard error of the difference{_listed(lower)}"
        )
    return [line if line.endswith(".") else f"{line}." for line in lines]


def _best(found: Changes) -> int:
    return int(found.quadratic.mean(0).argmin())


def _above(
    cells: dict[Cell, dict[Kind, Changes]],
    kind: Kind,
    text: str,
    of: Callable[[Changes], np.ndarray] = lambda c: c.quadratic,
) -> str:
    above = [cell for cell, kinds in cells.items() if raised(of(kinds[kind])).any()]
    kept = len(cells) - len(above)
    return f"{text}: never above the start by more than its standard error in {kept} of {len(cells)} cells" + (
        f"; above{_listed(above)}" if above else ""
    )


def _cost(cells: dict[Cell, dict[Kind, Changes]], kind: Kind, of: Kind) -> str:
    """What a step takes in comparison, over the cells."""
    texts = []
    for name in ("gradients", "seconds"):
        ratios = np.array([getattr(kinds[kind], name) / getattr(kinds[of], name) for kinds in cells.values()])
        texts.append(f"{np.median(ratios):.2f} of its {name} in the median cell, {ratios.max():.2f} at most")
    return f"cost of {_named(kind)}, against {_named(of)} on the same samples: {'; '.join(texts)}"


def _named(kind: Kind) -> str:
    if kind.method == "same_batch":
        return "same_batch" + (" with shrinkage" if kind.shrinkage else "")
    shrunk = "with" if kind.shrinkage else "without"
    return f"{kind.method} {shrunk} shrinkage, {'held-out' if kind.stopping == 'held_out' else 'no'} stopping"


def _listed(cells: list[Cell]) -> str:
    """Their names, or where they are many, how many there are at each checkpoint."""
    if len(cells) > 8:
        n_cells = Counter(cell.checkpoint for cell in cells)
        return f": {', '.join(f'{checkpoint} {n}' for checkpoint, n in n_cells.items())}"
    return f": {'; '.join(map(str, cells))}" if cells else ""


def rows(records: Records) -> list[dict[str, str]]:
    """A row for each cell and kind of step, changes relative to the start.

    `q_10` is the change of the full-batch quadratic (without damping) after ten iterations without stopping, `loss_20`
    that of the training loss; `…_stopped` are at the end of a step with held-out stopping, which `same_batch` has not,
    and so are `iterations` (of a pass). `…_error` are standard errors over draws, and `above` names the changes that
    are above the start by more than that. `gradients`: what the step takes for every sample of the batch.
    """
    found = []
    for cell, kinds in changes_of(records).items():
        for method, shrinkage in product(_METHODS, (False, True)):
            free, stopped = (kinds.get(Kind(method, shrinkage, s)) for s in ("none", "held_out"))
            if free is None:
                continue
            values = {f"q_{POINTS[i]}": free.quadratic[:, i] for i in SHOWN}
            values[f"loss_{POINTS[-1]}"] = free.loss[:, -1]
            if stopped:
                values |= {"q_stopped": stopped.quadratic[:, -1], "loss_stopped": stopped.loss[:, -1]}
            entries = {name: [float(v) for v in mean_and_error(of)] for name, of in values.items()}
            found.append(
                {
                    **{name: str(value) for name, value in cell._asdict().items()},
                    "method": method,
                    "shrinkage": str(shrinkage),
                    **{name: f"{mean:+.2g}" for name, (mean, _) in entries.items()},
                    **{f"{name}_error": f"{error:.1g}" for name, (_, error) in entries.items()},
                    "above": " ".join(name for name, (mean, error) in entries.items() if mean > error),
                    "iterations": f"{stopped.iterations:.1f}" if stopped else "",
                    "gradients": f"{(stopped or free).gradients / cell.batch:.1f}",
                }
            )
    return found


def draw_figure(records: Records, path: Path) -> None:
    """The change of the quadratic over iterations, for the least damping, at each checkpoint, small and large batch."""
    cells = changes_of(records)
    checkpoints = list(dict.fromkeys(cell.checkpoint for cell in cells))
    damping = min(cell.damping for cell in cells)
    batches = sorted({cell.batch for cell in cells})
    batches = sorted({batches[0], batches[-1]})
    figure = Figure(figsize=(3.4 * len(checkpoints) + 0.4, 2.6 * len(batches) + 0.7), layout="constrained")
    axes = figure.subplots(len(batches), len(checkpoints), squeeze=False)
    for i, batch in enumerate(batches):
        for j, checkpoint in enumerate(checkpoints):
            if (found := cells.get(Cell(checkpoint, batch, damping))) is not None:
                _panel(axes[i, j], found)
            axes[i, j].set_title(f"{checkpoint}, batch {batch}", fontsize=10)
            axes[i, j].set_xlabel("iterations" if i == len(batches) - 1 else "")
            axes[i, j].set_ylabel("change of full-batch quadratic" if j == 0 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.suptitle(f"Damping {damping:g}; mean over draws, bands of a standard error", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel(axis: Any, kinds: dict[Kind, Changes]) -> None:
    x = [0, *POINTS]
    lowest, highest = 0.0, 0.0
    for method, color in _COLORS.items():
        kind = Kind(method, method != "same_batch", "none")
        mean, error = (np.concatenate([[0], v[:-1]]) for v in mean_and_error(kinds[kind].quadratic))
        label = f"{method}, shrinkage, no stopping" if kind.shrinkage else method
        axis.plot(x, mean, color=color, label=label, linewidth=1.4, marker=".", markersize=4)
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        lowest, highest = min(lowest, *(mean - error)), max(highest, *(mean + error))
    stopped = kinds[Kind("cross_fitted", True, "held_out")]
    mean, error = (v[-1] for v in mean_and_error(stopped.quadratic))
    axis.errorbar(
        [stopped.iterations], [mean], [error], fmt="D", color="black", markersize=4, label="default: where it stopped"
    )
    axis.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    if highest > -5 * lowest:  # a biased step may be off by far more than the others do any good
        linear = max(-lowest, 1e-5, 1e-4 * highest)
        axis.set_yscale("symlog", linthresh=linear)
        axis.set_ylim(bottom=-3 * linear)
