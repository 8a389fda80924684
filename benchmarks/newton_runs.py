"""Whole training runs from scratch: debiased Newton steps against SGD and Adam, over gradient-equivalent passes.

`python -m benchmarks.newton_runs` trains two tasks with `DebiasedNewton`, each kind of step with and without
shrinkage, and with SGD and Adam, whose learning rates are tuned on the training loss at the end, on seeds of their own.
It writes `newton_runs.csv`, `newton_runs.json` and a figure. Every run is kept in `--cache`, so an interrupted
benchmark goes on where it was. `--quick` takes a minute. Seconds of CPU are of this process: set OMP_NUM_THREADS=1
where they are to be compared.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from itertools import product
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.newton_cache import Records, write_csv, write_json
from benchmarks.newton_runs_table import compared, draw_figure, rows, tuned
from benchmarks.newton_tasks import TASKS, NewtonTask, newton_task
from benchmarks.newton_work import DERIVATIVE, FORWARD, step_work
from debiased_laplace import DebiasedNewton
from debiased_laplace.newton.optimizer import StepReport

VERSION = 2
STEPS = tuple(product(("same_batch", "held_out", "cross_fitted"), (False, True)))
RATES = {"SGD": (0.03, 0.1, 0.3, 1.0, 3.0), "Adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
PASSES, BATCH, SEEDS, TUNING_SEEDS = 600, 256, 5, (100, 101)
QUICK_PASSES, QUICK_SEEDS = 30, 2
MEASURED_EVERY = 1.03  # passes of SGD and Adam, relative to the last measurement; Newton steps are measured each


class Run(NamedTuple):
    """What a run is kept by: an optimizer with its options, a seed, and how long it lasts."""

    method: str
    shrinkage: bool | None
    rate: float | None
    seed: int
    batch: int
    passes: float

    @property
    def name(self) -> str:
        """As the results show it."""
        return self.method + (", shrinkage" if self.shrinkage else "")


def newton_gradients(report: StepReport, magnitudes: str, n: int, judging_share: float) -> float:
    """Gradients of one sample that a step of `DebiasedNewton` on n samples is worth, where N is known."""
    held_out = judging_share * n
    total = held_out * FORWARD + step_work(report.outcome, magnitudes, n - held_out)
    if report.acceptance is not None:
        # every sample of the batch is looked at anew for each share that is tried
        total += held_out * DERIVATIVE + report.acceptance.trials * n * FORWARD
    return total


def optimizer_of(run: Run, model: nn.Module, n_data: int) -> torch.optim.Optimizer:
    """Untouched, with the options of the run."""
    if run.rate is None:
        return DebiasedNewton(
            model.parameters(),
            model,
            "classification",
            magnitudes=run.method,
            shrinkage=bool(run.shrinkage),
            n_data=n_data,
            seed=run.seed,
        )
    if run.method == "SGD":
        return torch.optim.SGD(model.parameters(), run.rate, momentum=0.9)
    return torch.optim.Adam(model.parameters(), run.rate)


def batches(n: int, run: Run) -> Iterator[Tensor]:
    """Without end: the samples in another order each time, what is left over of it not used."""
    generator = torch.Generator().manual_seed(run.seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n // run.batch * run.batch].split(run.batch)


def step_on(optimizer: torch.optim.Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """One step, and how many gradients of one sample it is worth."""
    n = len(batch[1])
    if isinstance(optimizer, DebiasedNewton):
        optimizer.step(lambda: batch)
        return newton_gradients(optimizer.last_step, optimizer.magnitudes, n, optimizer.judging_share)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return float(n)


@torch.no_grad()
def losses_of(model: nn.Module, task: NewtonTask) -> dict[str, float]:
    """Of all training and all test samples."""
    X, y = task.test
    outputs = model(X).double()
    training = float(nn.functional.cross_entropy(model(task.train[0]).double(), task.train[1]))
    return {
        "training": training if isfinite(training) else inf,
        "test": float(nn.functional.cross_entropy(outputs, y)) if isfinite(training) else inf,
        "accuracy": float((outputs.argmax(1) == y).double().mean()),
    }


def followed(run: Run, task: NewtonTask) -> dict[str, Any]:
    """Train, and say how the losses went: a value each at the start, after steps, and at the end."""
    X, y = task.train
    model = task.network()
    optimizer = optimizer_of(run, model, len(X))
    points = [{"passes": 0.0, "seconds": 0.0, **losses_of(model, task)}]
    counts = {"steps": 0, "accepted": 0, "raised": 0}
    passes = seconds = due = 0.0
    newton = isinstance(optimizer, DebiasedNewton)
    for some in batches(len(X), run):
        started = time.process_time()
        passes += step_on(optimizer, model, (X[some], y[some])) / len(X)
        seconds += time.process_time() - started
        counts["steps"] += 1
        if newton or passes >= min(due, run.passes):
            points.append({"passes": passes, "seconds": seconds, **losses_of(model, task)})
            due = passes * MEASURED_EVERY
        if newton and optimizer.last_step.accepted:
            rise = points[-1]["training"] - points[-2]["training"]
            counts["accepted"] += 1
            counts["raised"] += rise > optimizer.last_step.acceptance.standard_error
        if passes >= run.passes or points[-1]["training"] == inf:
            break
    return {**{name: [point[name] for point in points] for name in points[0]}, **counts}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PASSES} passes, {QUICK_SEEDS} seeds")
    parser.add_argument("--cache", type=Path, default=Path("newton-runs-cache"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of newton_runs.csv and .json; default: --cache")
    parser.add_argument("--figures", type=Path, help="folder of the figure; default: --results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--passes", type=float, help=f"over the training data, in gradients; default: {PASSES}")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples of a step; default: {BATCH}")
    parser.add_argument("--seeds", type=int, help=f"data, start and batches of each its own; default: {SEEDS}")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report methods with all their seeds")
    found = parser.parse_args(arguments)
    found.passes = found.passes or (QUICK_PASSES if found.quick else PASSES)
    found.seeds = found.seeds or (QUICK_SEEDS if found.quick else SEEDS)
    found.tuning_seeds = TUNING_SEEDS[:1] if found.quick else TUNING_SEEDS
    found.results = found.results or found.cache
    found.figures = found.figures or found.results
    if found.seeds < 2:
        parser.error("--seeds must be at least 2: a mean has a standard error from two seeds on")
    return found


def follow(runs: list[Run], records: Records, task: str) -> None:
    """Every run that has not been kept yet."""
    missing = [run for run in runs if run not in records.found]
    # what the first step of a process costs beside is no run's
    for run in {run.method: run for run in missing}.values():
        followed(run._replace(passes=0.0), newton_task(task, run.seed))
    for run in tqdm(missing, desc=f"[Training runs, {task}]") if missing else ():
        records.append(run, **followed(run, newton_task(task, run.seed)))


def best_rate(method: str, o: argparse.Namespace, records: Records) -> float | None:
    """With the lowest mean training loss at the end, over the tuning seeds; None where a run is missing."""

    def loss(rate: float) -> float:
        runs = [Run(method, None, rate, seed, o.batch, o.passes) for seed in o.tuning_seeds]
        return sum(records.found[run]["training"][-1] for run in runs)

    try:
        return min(RATES[method], key=loss)
    except KeyError:
        return None


def trained(o: argparse.Namespace, task: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """The runs of each method, a seed after the other, and the learning rates that were chosen."""
    records = Records(o.cache / f"{task}.jsonl", VERSION)
    tuning = [
        Run(method, None, rate, seed, o.batch, o.passes)
        for seed, method in product(o.tuning_seeds, RATES)
        for rate in RATES[method]
    ]
    if not o.report_only:
        follow(tuning, records, task)
    rates = {method: rate for method in RATES if (rate := best_rate(method, o, records)) is not None}
    kinds = [(*step, None) for step in STEPS] + [(method, None, rate) for method, rate in rates.items()]
    # one seed of every method before the next, so that a benchmark that is ended early has as many of each
    runs = [Run(*kind, seed, o.batch, o.passes) for seed in range(o.seeds) for kind in kinds]
    if not o.report_only:
        follow(runs, records, task)
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run.name, []).extend([records.found[run]] if run in records.found else [])
    return {name: kept for name, kept in found.items() if len(kept) == o.seeds}, rates


def main(arguments: list[str] | None = None) -> None:
    """Train what is not in the cache, write the results, draw the figure."""
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*")
    warnings.filterwarnings("ignore", message="There is a performance drop")
    o = parsed(arguments)
    for folder in (o.results, o.figures):
        folder.mkdir(parents=True, exist_ok=True)
    results = {task: trained(o, task) for task in o.tasks}
    results = {task: found for task, found in results.items() if found[0]}
    if not results:
        raise SystemExit(f"No method has all of its {o.seeds} seeds in {o.cache}.")
    findings = {task: [*tuned(rates, RATES), *compared(runs, o.passes)] for task, (runs, rates) in results.items()}
    found = [{"task": task, **row} for task, (runs, _) in results.items() for row in rows(runs, o.passes)]
    for task, lines in findings.items():
        print("\n- ".join([TASKS[task], *lines]))
    write_csv(o.results / "newton_runs.csv", dict.fromkeys(name for row in found for name in row), found)
    write_json(o.results / "newton_runs.json", findings)
    figure = {TASKS[task]: runs for task, (runs, _) in results.items()}
    draw_figure(figure, o.passes, o.figures / "newton_runs.png")


if __name__ == "__main__":
    main()
