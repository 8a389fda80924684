"""Single Newton steps, judged by the quadratic and by the loss of all training data.

`python -m benchmarks.newton` measures `same_batch`, `held_out` and `cross_fitted` steps, each with and without
shrinkage, at an early, a middle and a late checkpoint of two tasks, and writes `newton.csv`, `newton.json` and figures.
Every measured draw is kept in `--cache`, so an interrupted run goes on where it was. `--quick` takes a minute. Whole
training runs are in `newton_runs.py`.
"""

import argparse
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from benchmarks.newton_cache import Records, write_csv, write_json
from benchmarks.newton_table import COLUMNS, POINTS, draw_figure, rows, verdicts
from benchmarks.newton_tasks import CHECKPOINTS, TASKS, checkpoint, newton_task
from benchmarks.newton_work import step_work
from debiased_laplace import quadratic_along
from debiased_laplace.newton.directional_steps import DirectionalSteps
from debiased_laplace.newton.step import newton_step

VERSION = 2
BATCH_SIZES = (128, 256, 512, 1024)
DAMPINGS = (1e-3, 1e-2, 1e-1)
DRAWS = 6
KINDS = [
    (method, shrinkage, stopping)
    for method, shrinkage in product(("same_batch", "held_out", "cross_fitted"), (False, True))
    # which has no effect on same_batch
    for stopping in (("none",) if method == "same_batch" else ("none", "held_out"))
]
QUICK: dict[str, list[Any]] = {"checkpoints": ["early", "middle"], "batch_sizes": [128, 512], "dampings": [1e-3]}

Key = tuple[str, int, float, int]


def reached(passes: tuple[DirectionalSteps, ...]) -> Tensor:
    """Where the average of some passes is after each of POINTS iterations, and at its end: (P, points + 1).

    A step along several directions of conjugate gradients together counts once all of its iterations are done.
    """
    ends = []
    for one in passes:
        path = (one.directions.double() * one.step_lengths).cumsum(1)
        path = torch.cat([torch.zeros_like(one.update, dtype=path.dtype)[:, None], path], dim=1)
        done = torch.tensor(one.iterations, dtype=torch.long).cumsum(0)
        at = torch.searchsorted(done, torch.tensor(POINTS), right=True).tolist()
        ends.append(path[:, [*at, path.shape[1] - 1]])
    return (sum(ends[1:], ends[0]) / len(ends)).to(passes[0].update.dtype)


def measure(model: nn.Module, data: tuple[Tensor, Tensor], n: int, damping: float, draw: int) -> list[dict[str, Any]]:
    """All kinds of steps from one batch, what they do to the quadratic of all data and to its loss."""
    X, y = data
    some = torch.randperm(len(X), generator=torch.Generator().manual_seed(draw))[:n]
    batch = X[some], y[some]
    rows: list[dict[str, Any]] = []
    paths: list[Tensor] = []
    for method, shrinkage, stopping in KINDS:
        started = time.process_time()
        step = newton_step(
            model,
            "classification",
            batch,
            damping,
            method,
            shrinkage=shrinkage,
            stopping=stopping,
            max_iterations=POINTS[-1],
            n_data=len(X),
            seed=draw,
        )
        seconds = time.process_time() - started
        rows.append(
            {
                "method": method,
                "shrinkage": shrinkage,
                "stopping": stopping,
                "iterations": step.iterations / len(step.passes),
                "gradients": step_work(step.outcome, method, n),
                "seconds": seconds,
            }
        )
        paths.append(reached(step.passes))

    # paths have many points in common: those before a pass was stopped, and those after
    ends, index = torch.unique(torch.cat(paths, dim=1), dim=1, return_inverse=True)
    q = quadratic_along(model, "classification", data, ends)
    changes = {
        "quadratic": q(torch.eye(ends.shape[1], dtype=q.slopes.dtype)) - q.value,
        "loss": training_losses(model, data, ends),
    }
    for name, values in changes.items():
        for row, found in zip(rows, values[index].reshape(len(rows), -1).tolist(), strict=True):
            row[name] = found
    return rows


@torch.no_grad()
def training_losses(model: nn.Module, data: tuple[Tensor, Tensor], steps: Tensor) -> Tensor:
    """Change of the mean loss of all data by each step, exactly 0 where there is none."""
    X, y = data
    start = parameters_to_vector(model.parameters())
    losses = []
    for step in [torch.zeros_like(start), *steps.unbind(1)]:
        vector_to_parameters(start + step, model.parameters())
        losses.append(float(nn.functional.cross_entropy(model(X).double(), y)))
    vector_to_parameters(start, model.parameters())
    return torch.tensor(losses[1:], dtype=torch.float64) - losses[0]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 draws of a few cells")
    parser.add_argument("--cache", type=Path, default=Path("newton-cache"), help="folder of the measured draws")
    parser.add_argument("--results", type=Path, help="folder of newton.csv and newton.json; default: --cache")
    parser.add_argument("--figures", type=Path, help="folder of the figures; default: --results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, help="default: all")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help=f"default: {BATCH_SIZES}")
    parser.add_argument("--dampings", nargs="+", type=float, help=f"default: {DAMPINGS}")
    parser.add_argument("--draws", type=int, help=f"batches of each size; default: {DRAWS}")
    parser.add_argument("--report-only", action="store_true", help="measure nothing; report whole cells")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of training")
    found = parser.parse_args(arguments)
    whole = {"checkpoints": list(CHECKPOINTS), "batch_sizes": list(BATCH_SIZES), "dampings": list(DAMPINGS)}
    for name, default in (QUICK if found.quick else whole).items():
        setattr(found, name, getattr(found, name) or default)
    found.draws = found.draws or (2 if found.quick else DRAWS)
    found.results = found.results or found.cache
    found.figures = found.figures or found.results
    if found.draws < 2:
        parser.error("--draws must be at least 2: a mean has a standard error from two draws on")
    return found


def measured(o: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """The records of the cells that have all their draws; unless only a report is asked for, those are all cells."""
    folder = o.cache / (f"seed-{o.seed}" if task == "digits" else f"{task}-seed-{o.seed}")
    records = Records(folder / "newton.jsonl", VERSION)
    cells = list(product(o.checkpoints, o.batch_sizes, o.dampings))
    # one draw of everything before the next, so that a run that is ended early has as many of each
    keys: list[Key] = [(*cell, draw) for draw, cell in product(range(o.draws), cells)]
    missing = [key for key in keys if key not in records.found]
    if o.report_only:
        left_out = {key[:3] for key in missing}
        keys = [key for key in keys if key[:3] not in left_out]
    elif missing:
        models = {name: checkpoint(folder, task, name, o.seed) for name in dict.fromkeys(key[0] for key in missing)}
        data = newton_task(task, o.seed).train
        for key in tqdm(missing, desc=f"[Newton steps, {task}]"):
            name, n, damping, draw = key
            records.append(key, steps=measure(models[name], data, n, damping, draw))
    return [records.found[key] for key in keys]


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not in the cache, print the verdicts, write the results and the figures."""
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*")
    warnings.filterwarnings("ignore", message="There is a performance drop")
    o = parsed(arguments)
    for folder in (o.results, o.figures):
        folder.mkdir(parents=True, exist_ok=True)
    n_cells = len(o.checkpoints) * len(o.batch_sizes) * len(o.dampings)
    findings: dict[str, list[str]] = {}
    found: list[dict[str, str]] = []
    for task in o.tasks:
        if not (records := measured(o, task)):
            continue
        asked = f"Measured in {len(records) // o.draws} of {n_cells} cells that were asked for."
        findings[task] = [asked, *verdicts(records)]
        found += [{"task": task, **row} for row in rows(records)]
        draw_figure(records, o.figures / ("newton.png" if task == "digits" else f"newton_{task}.png"))
        print("\n- ".join([TASKS[task], *findings[task]]))
    if not findings:
        raise SystemExit(f"No cell has all of its {o.draws} draws in {o.cache}.")
    write_csv(o.results / "newton.csv", COLUMNS, found)
    write_json(o.results / "newton.json", findings)


if __name__ == "__main__":
    main()
