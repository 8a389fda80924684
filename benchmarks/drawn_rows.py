"""Distance to the full-batch posterior of drawn rows, against whole samples for as many backward passes.

    python -m benchmarks.drawn_rows                               # everything; resumable at any point
    python -m benchmarks.drawn_rows --tasks digits --draws 2
    python -m benchmarks.drawn_rows --draws 0                     # the report of what is measured
    python -m benchmarks.drawn_rows --results benchmarks/results --figures docs/figures

Every posterior stands for all N samples and has the defaults: cross-fitted, Kronecker complement. B is a number of
backward passes, of N·C: drawn rows, or samples times outputs. The reference and the criteria are those of
`benchmarks.fidelity`. Single results are kept under --cache and not computed again.
"""

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# laplace-torch's own imports still use torch.jit.script, a dozen times
warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from tqdm import tqdm

from benchmarks import drawn_rows_figure
from benchmarks.fidelity_criteria import Approximation, Reference, distances, reference
from benchmarks.fidelity_posteriors import BASELINE, Examination, fit, set_prior
from benchmarks.fidelity_results import VERSION, Cell, Mean, Record, Store, Summary, key_of, summarize
from benchmarks.fidelity_tasks import RECIPES, Task, load_task

PRIORS = (1.0, 10.0, 100.0)
UNIFORM, DRAWN, KFAC, PRIOR_ONLY = "uniform", "drawn", f"{BASELINE}/kron", "prior only"
METHODS: dict[str, dict[str, Any]] = {
    UNIFORM: {"sampling": "uniform"},
    DRAWN: {"sampling": "curvature"},
    "uniform, same_batch, no complement": {"sampling": "uniform", "magnitudes": "same_batch", "complement": "none"},
    "drawn, same_batch": {"sampling": "curvature", "magnitudes": "same_batch"},
    KFAC: {"kind": "kron"},
}
GOALS = {64: (8.0, 2.5), 24: (4.0, 1.5)}
"""Samples of the uniform estimator: how many times closer as many drawn rows should be in nats, in total variation."""
SHARES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""One in so many of all N·C backward passes."""
FEWEST = 8
"""Samples: one for each fold."""
NEAR = {"parameter_kl": 10.0, "total_variation": 0.01}
NAMES = {"parameter_kl": "nats", "total_variation": "total variation"}
TENTH = ("digits", "mnist")
CURVES = ("digits", "mnist", "30_classes")


@dataclass(frozen=True, eq=False)
class Measured:
    """A task, and the full-batch posterior at every prior."""

    task: Task
    references: dict[float, Reference]

    @classmethod
    def load(cls, name: str, cache: Path) -> "Measured":
        """From the cache, where it is there."""
        task = load_task(name, cache)
        noise = task.sigma_noise if task.likelihood == "regression" else None
        weight = task.n_data / task.sigma_noise**2
        return cls(
            task,
            {
                prior: reference(task.curvature, task.jacobians, task.outputs, weight=weight, prior=prior, noise=noise)
                for prior in PRIORS
            },
        )

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.task.outputs.shape[1]

    def passes(self, share: int) -> int:
        """One in `share` of all backward passes, a multiple of C."""
        return self.task.n_data // share * self.n_outputs

    def fits(self) -> Iterator[tuple[int, str]]:
        """Backward passes and methods, cheap ones first."""
        C = self.n_outputs
        yield 0, PRIOR_ONLY
        for n_samples in GOALS:
            yield from ((n_samples * C, method) for method in (UNIFORM, DRAWN))
        yield from ((64 * C, method) for method in METHODS if "same_batch" in method)
        if C > 1:  # fewer than ten rows are now and then none
            yield round(6.4 * C), DRAWN
        if self.task.name in TENTH:
            yield self.passes(1), KFAC
            yield self.passes(10), DRAWN
        for share in SHARES:
            if self.task.n_data >= FEWEST * share:
                yield from ((self.passes(share), method) for method in (UNIFORM, DRAWN))

    def keys(self, B: int, method: str, draw: int) -> list[Record]:
        """What distinguishes the results of a fit, one for each prior."""
        task = self.task
        shared = {"version": VERSION, "task": task.name, "weights": task.weights, "n_data": task.n_data}
        return [{**shared, "B": B, "draw": draw, "configuration": method, "prior": prior} for prior in PRIORS]

    def measure(self, B: int, method: str, draw: int) -> list[Record]:
        """Fit and judge at every prior."""
        examination = None if method == PRIOR_ONLY else Examination(self.task, self.fitted(B, method, draw))
        results = []
        for key, full in zip(self.keys(B, method, draw), self.references.values(), strict=True):
            if examination is None:
                found = prior_only(self.task, full, key["prior"])
            else:
                set_prior(examination.la, key["prior"])
                found = examination.approximation(key["prior"])
            results.append({**key, **distances(found, full)})
        return results

    def fitted(self, B: int, method: str, draw: int) -> Any:
        """The posterior of B backward passes."""
        options, samples = METHODS[method], self.task.order(draw)
        if options.get("sampling") == "uniform":
            samples = samples[: B // self.n_outputs]
        elif method != KFAC:
            options = {**options, "n_rows": B}
        with warnings.catch_warnings():
            # directions below the threshold of rank=None matter at a prior precision of 1 only
            warnings.filterwarnings("ignore", message="rank=None left out")
            return fit(self.task, method, options, samples, seed=draw)


def prior_only(task: Task, full: Reference, prior: float) -> Approximation:
    """A posterior that has seen no data."""
    P = len(full.precision)
    J, trace = task.jacobians, float(full.precision.trace()) / prior
    return Approximation(J @ J.mT / prior, trace, P * float(torch.tensor(prior).double().log()))


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not known yet, and report everything that is known by then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--largest-share", type=float, default=1.0, help="of all backward passes, for a quick look")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fidelity"))
    parser.add_argument("--results", type=Path, help="folder of drawn_rows.csv, .json and .md; default: --cache")
    parser.add_argument("--figures", type=Path, help="folder of the figure; default: --results")
    options = parser.parse_args(arguments)
    store = Store(options.cache / "drawn_rows.jsonl")
    tasks = {name: Measured.load(name, options.cache) for name in options.tasks}
    work = [
        (task, B, method, draw)
        for draw in range(options.draws)
        for task in tasks.values()
        for B, method in task.fits()
        # all data are all data in every draw
        if options.largest_share * task.passes(1) >= B or method == KFAC
        if draw == 0 or (0 < B < task.passes(1))
    ]
    for task, B, method, draw in tqdm(work, desc="[Drawn rows]"):
        if any(key_of(key) not in store.records for key in task.keys(B, method, draw)):
            store.append(task.measure(B, method, draw))
    current = {name: task.task.weights for name, task in tasks.items()}
    summary = summarize(r for r in store.records.values() if current.get(r["task"]) == r["weights"])
    results = options.results or options.cache
    lines = [*equal_cost(summary, tasks), *a_tenth_of_the_rows(summary, tasks), *against_kfac(summary, tasks)]
    summary.save(results, "drawn_rows", verdicts=lines)
    text = "\n\n".join([*(table(summary, task) for task in tasks.values()), shares(summary, tasks)])
    text += "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    (results / "drawn_rows.md").write_text(text)
    print(text)
    curves = {name: [tasks[name].passes(share) for share in SHARES] for name in CURVES if name in tasks}
    drawn_rows_figure.draw(summary, curves, (options.figures or results) / "drawn_rows.png", prior=10.0)


def table(summary: Summary, measured: Measured) -> str:
    """Distances of a task at the numbers of backward passes that are multiples of C."""
    C, task = measured.n_outputs, measured.task
    rows: list[tuple[float, str]] = [(64, method) for method in METHODS if method != KFAC]
    rows += [(24, UNIFORM), (24, DRAWN), (6.4, DRAWN)]
    lines = [
        f"**{task.title}** (N = {task.n_data:,}, C = {C}, P = {len(task.curvature):,})\n",
        "| backward passes | | " + " | ".join(f"prior {p:g}: nats | TV" for p in PRIORS) + " |",
        "|---" * (2 + 2 * len(PRIORS)) + "|",
    ]
    for n_samples, method in rows:
        B = round(n_samples * C)
        cells = [
            shown(summary.cells.get(Cell(task.name, B, prior), {}).get(method, {}).get(criterion))
            for prior in PRIORS
            for criterion in NEAR
        ]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {B:,} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(mean: Mean | None) -> str:
    """Mean and standard error, in three digits and one."""
    if mean is None:
        return "–"
    error = f" ± {_rounded(mean.standard_error, 1)}" if mean.n > 1 else ""
    return f"{_rounded(mean.mean, 3)}{error}"


def _rounded(value: float, digits: int) -> str:
    value = float(f"{value:.{digits}g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def equal_cost(summary: Summary, tasks: dict[str, Measured]) -> Iterator[str]:
    """How many times closer drawn rows are than as many backward passes for whole samples."""
    for n_samples, goals in GOALS.items():
        for (criterion, name), goal in zip(NAMES.items(), goals, strict=True):
            found = {
                (task, prior): ratio
                for task, measured in tasks.items()
                for prior in PRIORS
                if (
                    ratio := _ratio(summary, task, prior, criterion, (n_samples, UNIFORM), (n_samples, DRAWN), measured)
                )
            }
            counted = [r for (task, _), r in found.items() if tasks[task].task.likelihood == "classification"]
            cells = ", ".join(
                f"{task} " + " / ".join(f"{found[task, p]:.3g}" for p in PRIORS if (task, p) in found) for task in tasks
            )
            middle = f"{median(counted):.3g}" if counted else "not measured"
            yield (
                f"{n_samples} samples: {name} of uniform samples over drawn rows, median over {len(counted)} cells of "
                f"classification (goal: {goal:g}): {middle}; at priors {PRIORS}: {cells}"
            )


def a_tenth_of_the_rows(summary: Summary, tasks: dict[str, Measured]) -> Iterator[str]:
    """Where a tenth of the rows is further than whole samples."""
    for criterion, name in NAMES.items():
        ratios = {
            f"{task} at prior {prior:g}": ratio
            for task, measured in tasks.items()
            for prior in PRIORS
            if (ratio := _ratio(summary, task, prior, criterion, (6.4, DRAWN), (64, UNIFORM), measured))
        }
        further = ", ".join(f"{cell}: {ratio:.3g} times" for cell, ratio in ratios.items() if ratio > 1)
        yield f"a tenth of 64 C rows further in {name} than 64 uniform samples (goal: none): {further or 'none'}"


def against_kfac(summary: Summary, tasks: dict[str, Measured]) -> Iterator[str]:
    """A tenth of all backward passes against laplace-torch's K-FAC of all of them."""
    for name in (name for name in TENTH if name in tasks):
        cells = []
        for prior in PRIORS:
            ours, theirs = (
                summary.mean(Cell(name, tasks[name].passes(share), prior), method, "total_variation")
                for share, method in ((10, DRAWN), (1, KFAC))
            )
            cells.append(f"{ours / theirs:.2g} ({ours:.2g} / {theirs:.2g})" if ours and theirs else "not measured")
        yield (
            f"{name}, total variation of a tenth of all rows over {KFAC} of all data at priors {PRIORS} "
            f"(goal: 0.33): {', '.join(cells)}"
        )


def _ratio(
    summary: Summary,
    task: str,
    prior: float,
    criterion: str,
    first: tuple[float, str],
    second: tuple[float, str],
    measured: Measured,
) -> float | None:
    a, b = (
        summary.mean(Cell(task, round(n_samples * measured.n_outputs), prior), method, criterion)
        for n_samples, method in (first, second)
    )
    return a / b if a and b else None


def shares(summary: Summary, tasks: dict[str, Measured], prior: float = 10.0) -> str:
    """First share of all backward passes, of those measured, whose mean distance is near enough."""
    heads = [f"{limit:g} {NAMES[criterion]}" for criterion, limit in NEAR.items()]
    lines = [
        f"Share of all N·C backward passes that reaches a distance to the full batch (prior precision {prior:g}), and "
        "the distance of the prior alone.\n",
        "| | N·C | " + " | ".join(f"prior alone | {head}: uniform | drawn" for head in heads) + " |",
        "|---" * (2 + 3 * len(NEAR)) + "|",
    ]
    for name, measured in tasks.items():
        cells = [f"{measured.task.title} | {measured.passes(1):,}"]
        for criterion, limit in NEAR.items():
            alone = summary.mean(Cell(name, 0, prior), PRIOR_ONLY, criterion)
            cells.append("–" if alone is None else _rounded(alone, 3))
            for method in (UNIFORM, DRAWN):
                found = {
                    share: d
                    for share in SHARES
                    if (d := summary.mean(Cell(name, measured.passes(share), prior), method, criterion)) is not None
                }
                first = next((share for share, d in found.items() if d <= limit), None)
                never = "never" if 1 in found else f"not by 1/{min(found)}" if found else "–"
                cells.append(never if first is None else f"1/{first}" if first > 1 else "all")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
