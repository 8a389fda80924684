"""How often `confidence_intervals()` contains the full batch's curvature, and how wide it is, by number of samples.

    python -m benchmarks.interval_coverage                      # all tasks, ten draws
    python -m benchmarks.interval_coverage --tasks diabetes --draws 3
    python -m benchmarks.interval_coverage --drawn --tasks digits 30_classes    # of drawn rows, 200 draws

Every fit is a posterior of all N samples from some of them or, with `--drawn`, from some rows of all of them, of every
rank that these support and without a complement; the truth along its directions is in the dense full-batch curvature.
Directions with an estimate above a millionth of the largest count, all of them and the leading 50 (`--drawn`: 20).
Results are kept under --cache and not computed again.
"""

import argparse
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

# laplace-torch's own imports still use torch.jit.script, a dozen times
warnings.filterwarnings("ignore", message="`torch.jit.script")

from torch import Tensor
from tqdm import tqdm

from benchmarks.fidelity_criteria import Z_95, coverage
from benchmarks.fidelity_posteriors import Examination, fit
from benchmarks.fidelity_tasks import RECIPES, SHIPPED, Task, load_task

SIZES = {"held_out": (64, 128, 256, 512, 700, 1024), "cross_fitted": (64, 128, 256, 512, 700)}
DRAWN = "cross_fitted, rows"
ROWS = (256, 640)
LEADING = {DRAWN: 20}


def counted(values: Tensor, errors: Tensor, truth: Tensor, ends: Tensor, leading: int) -> dict[str, float]:
    """Counts of intervals and hits among the leading directions, and the median width over that of plain ones."""
    k = slice(0, leading)
    found = coverage(values[k], errors[k], truth[k], ends[k])
    width = (ends[k, 1] - ends[k, 0]) / (2 * Z_95 * errors[k])
    return {**found, "width": float(width.median())}


def measure(task: Task, magnitudes: str, B: int, draw: int) -> dict[str, Any]:
    """Fit once, and look at all directions and at the leading ones."""
    options: dict[str, Any] = {"magnitudes": magnitudes, "complement": "none", "rank": None}
    samples = task.order(draw)[:B]
    if magnitudes == DRAWN:
        options |= {"magnitudes": "cross_fitted", "sampling": "curvature", "n_rows": B}
        samples = task.order(draw)
    la = fit(task, f"lowrank/{magnitudes}", options, samples, seed=draw)
    truth = Examination(task, la).true_curvatures()
    known = la.directional_curvatures.double(), la.standard_errors.double(), truth, la.confidence_intervals().double()
    return {
        "samples": B if magnitudes == DRAWN else len(la.split.magnitude_indices),
        "all": counted(*known, len(truth)),
        "lead": counted(*known, LEADING.get(magnitudes, 50)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not known yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(RECIPES), default=SHIPPED)
    parser.add_argument("--drawn", action="store_true", help="rows drawn in proportion to their curvature")
    parser.add_argument("--draws", type=int, help="10, or 200 of drawn rows")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fidelity"))
    options = parser.parse_args(arguments)
    store = options.cache / "interval_coverage.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    tasks = {name: load_task(name, options.cache) for name in options.tasks}
    work = [
        (name, magnitudes, B, draw)
        for draw in range(options.draws or (200 if options.drawn else 10))
        for name, task in tasks.items()
        for magnitudes, sizes in ({DRAWN: ROWS} if options.drawn else SIZES).items()
        for B in sizes
        if 0.75 * task.n_data > B
    ]
    rows = defaultdict(list)
    for name, magnitudes, B, draw in tqdm(work, desc="[Intervals]"):
        key = f"{name} {tasks[name].weights} {magnitudes} {B} {draw}"
        if key not in known:
            known[key] = measure(tasks[name], magnitudes, B, draw)
            store.write_text(json.dumps(known))
        rows[magnitudes, known[key]["samples"], name].append(known[key])
    for which, title in (("all", "All directions"), ("lead", "The leading ones")):
        print(f"{title}: covered (by plain intervals), width over that of plain ones\n\n{table(rows, which)}\n")


def table(rows: dict[tuple[str, int, str], list[dict[str, Any]]], which: str) -> str:
    """Shares of intervals that contain the truth, by estimator and number of samples, and task."""
    tasks = sorted({name for *_, name in rows})
    lines = [f"| `magnitudes` | magnitude samples, or rows | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for magnitudes, n in sorted({key[:2] for key in rows}, key=lambda key: (key[0] == "cross_fitted", key[1])):
        cells = [_cell([draw[which] for draw in rows.get((magnitudes, n, name), [])]) for name in tasks]
        lines.append(f"| `{magnitudes}` | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: list[dict[str, float]]) -> str:
    total = sum(c["n"] for c in found)
    if not total:
        return "–"
    covered, plain = (sum(c[kind] for c in found) / total for kind in ("interval", "plain"))
    return f"{covered:.0%} ({plain:.0%}), {sum(c['width'] for c in found) / len(found):.1f}"


if __name__ == "__main__":
    main()
