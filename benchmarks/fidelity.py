"""How far approximate posteriors are from the full-batch one, against the samples that their curvature was read from.

    python -m benchmarks.fidelity --quick             # two tasks, two draws, the main configurations
    python -m benchmarks.fidelity --draws 5           # everything; hours, resumable at any point
    python -m benchmarks.fidelity --configurations "lowrank/*/none/free" "laplace-torch/kron" --sizes 64 128 N

Every fit is one configuration on the same B of N training samples, asked to stand for all N; low-rank ones share their
directions and folds, and "auto" its trials over the priors. The reference is the dense
full-batch GGN posterior in double precision; `fidelity_criteria.py` says what is measured. Draws go outermost: an
interrupted run has the same draws of everything. Results of earlier runs are kept under --cache and not computed again.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

# laplace-torch's own imports still use torch.jit.script, a dozen times
warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from tqdm import tqdm

from benchmarks import fidelity_figure, fidelity_table
from benchmarks.fidelity_criteria import Reference, coverage, distances, reference
from benchmarks.fidelity_posteriors import (
    AUTO,
    BASELINE,
    MAIN,
    SHRINKAGE,
    Examination,
    configurations,
    fit,
    loader_of,
    name_of,
    set_prior,
)
from benchmarks.fidelity_ranking import ranking
from benchmarks.fidelity_results import VERSION, Record, Store, key_of, summarize
from benchmarks.fidelity_shared import Kinds, SharedFit
from benchmarks.fidelity_tasks import RECIPES, SHIPPED, Task, load_task
from benchmarks.fidelity_verdicts import verdicts
from debiased_laplace import held_out_kl

SIZES = (32, 64, 128, 256, 512, 1024, "N")
PRIORS = (1.0, 10.0, 100.0)
QUICK = {"tasks": ["digits", "diabetes"], "sizes": ["64", "128", "256", "N"], "draws": 2, "configurations": MAIN}
HELD_OUT = 512
LARGEST_HELD_OUT = 6_000  # rows: at many classes and samples, a held-out KL costs more than everything else
FEWEST_HELD_OUT = 64  # with fewer samples it cannot rank
LEADING = 10
NOT_JUDGED = (f"{BASELINE}/last_layer_kron", f"{BASELINE}/ella")  # no posteriors over all parameters


@dataclass(eq=False)
class Benchmark:
    """A task being measured.

    Attributes:
        task: with its dense full-batch curvature.
        priors: prior precisions of each fit.
        held_out_draws: draws of which the held-out KL is computed too.
    """

    task: Task
    priors: list[float]
    held_out_draws: int
    _references: dict[float, Reference] = field(default_factory=dict)

    def reference(self, prior: float) -> Reference:
        """The full-batch posterior at a prior precision."""
        if prior not in self._references:
            task = self.task
            self._references[prior] = reference(
                task.curvature,
                task.jacobians,
                task.outputs,
                weight=task.n_data / task.sigma_noise**2,
                prior=prior,
                noise=task.sigma_noise if task.likelihood == "regression" else None,
            )
        return self._references[prior]

    def keys(self, B: int, draw: int, name: str) -> list[Record]:
        """What distinguishes the results of a fit, one for each prior."""
        shared = {"version": VERSION, "task": self.task.name, "weights": self.task.weights}
        return [
            {**shared, "B": B, "n_data": self.task.n_data, "draw": draw, "configuration": name, "prior": prior}
            for prior in self.priors
        ]

    def measure(self, B: int, draw: int, kinds: Kinds) -> Iterator[list[Record]]:
        """Fit and judge at every prior, the results of one configuration after the other; a failure is one too."""
        weights = {name: kind["weight"] for name, kind in kinds.items() if name.startswith(SHRINKAGE)}
        alone = {name: kind for name, kind in kinds.items() if name.startswith(("kron", "full", BASELINE))}
        together = {name: kind for name, kind in kinds.items() if name.startswith("lowrank")}
        loader = loader_of(self.task, self.task.order(draw)[:B])
        for name, kind in alone.items():
            yield self._attempted(B, draw, name, partial(self._alone, B, draw, name, kind))
        if not together and not weights and AUTO not in kinds:
            return
        shared = SharedFit(self.task, loader, seed=draw)
        for name, la, seconds in chain(shared.posteriors(together), shared.shrunk(weights) if weights else ()):
            yield self._attempted(B, draw, name, partial(self.judged, B, draw, name, la, seconds))
        if AUTO in kinds and self.task.n_data > B:
            yield self._attempted(B, draw, AUTO, partial(self._automatic, B, draw, kinds[AUTO], shared))

    def _attempted(self, B: int, draw: int, name: str, work: Callable[[], list[Record]]) -> list[Record]:
        keys = self.keys(B, draw, name)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = work()
        except Exception as error:
            return [{**key, "error": f"{type(error).__name__}: {error}"[:500]} for key in keys]
        said = sorted({str(w.message)[:300] for w in caught if issubclass(w.category, UserWarning)})
        return [
            {**key, **result, **({"warnings": said} if said else {})} for key, result in zip(keys, found, strict=True)
        ]

    def _alone(self, B: int, draw: int, name: str, options: dict[str, Any]) -> list[Record]:
        start = time.perf_counter()
        la = fit(self.task, name, options, self.task.order(draw)[:B], seed=draw)
        return self.judged(B, draw, name, la, time.perf_counter() - start)

    def _automatic(self, B: int, draw: int, kind: dict[str, Any], shared: SharedFit) -> list[Record]:
        """What "auto" chooses at each prior, and how far that is from the full batch."""
        choices, seconds = shared.choices(kind, self.priors)
        names = {prior: name_of(choice.chosen) for prior, choice in choices.items()}
        table = configurations()
        by_name = {
            name: self.judged(B, draw, name, la, seconds)
            for name, la, _ in shared.posteriors({name: table[name] for name in set(names.values())})
        }
        return [{**by_name[names[prior]][i], "chosen": names[prior]} for i, prior in enumerate(self.priors)]

    def judged(self, B: int, draw: int, name: str, la: Any, seconds: float) -> list[Record]:
        """The criteria of a fitted posterior at every prior."""
        task, order = self.task, self.task.order(draw)
        examination = Examination(task, la)
        ours = not name.startswith(BASELINE)
        shared = {"fit_seconds": round(seconds, 3), **(self._of_directions(examination, name) if ours else {})}
        affordable = LARGEST_HELD_OUT // task.outputs.shape[1] - B
        left_out = order[B : B + min(HELD_OUT, max(0, affordable))]
        judged = draw < self.held_out_draws and len(left_out) >= FEWEST_HELD_OUT and name not in NOT_JUDGED
        # laplace-torch has N by its temperature, which is not that of the full batch
        target = {} if ours else {"n_data": task.n_data, "temperature": 1.0}
        results = []
        for prior in self.priors:
            start = time.perf_counter()
            set_prior(la, prior)
            result = {**shared, **distances(examination.approximation(prior), self.reference(prior))}
            if name.endswith("none/free"):
                best = distances(examination.with_true_curvatures(prior), self.reference(prior))
                result["least_parameter_kl"] = best["parameter_kl"]
            result["evaluation_seconds"] = round(time.perf_counter() - start, 3)
            if judged:
                kl = held_out_kl(la, loader_of(task, left_out), loader_of(task, order[:B]), **target)
                result.update(held_out_kl=kl.value, held_out_kl_standard_error=kl.standard_error)
            results.append(result)
        return results

    def _of_directions(self, examination: Examination, name: str) -> Record:
        """Curvatures used along the leading directions over the full batch's, and intervals that contain those."""
        la = examination.la
        result: Record = {"rank": la.rank, "n_magnitude_samples": len(la.split.magnitude_indices)}
        if name.startswith(("kron", "full", SHRINKAGE)):
            return result
        truth, used, errors = examination.true_curvatures(), la.directional_curvatures.double(), la.standard_errors
        leading = used[:LEADING] / truth[:LEADING]
        if len(used):
            result |= {"curvature_ratio": float(leading.mean()), "largest_curvature_ratio": float(leading[0])}
        if name.endswith("none/free") and bool((errors > 0).any()):
            result["coverage"] = coverage(used, errors.double(), truth, la.confidence_intervals().double())
        return result


def plan(options: argparse.Namespace, tasks: list[Benchmark]) -> list[tuple[Benchmark, int, int]]:
    """Samples in the order of work, draws outermost: an interrupted run has the same draws of everything."""
    work = []
    for draw in range(options.draws):
        for benchmark in tasks:
            n_data = benchmark.task.n_data
            sizes = sorted({n_data if size == "N" else int(size) for size in options.sizes})
            # all data are all data in every draw
            work += [(benchmark, B, draw) for B in sizes if n_data > B or (n_data == B and draw == 0)]
    return work


def run(options: argparse.Namespace, tasks: list[Benchmark], store: Store) -> None:
    """Do what is not done yet."""
    table = {
        name: kind
        for name, kind in configurations().items()
        if any(fnmatch(name, pattern) for pattern in options.configurations)
    }
    with tqdm(plan(options, tasks), desc="[Fidelity]", disable=options.silent) as bar:
        for benchmark, B, draw in bar:
            bar.set_postfix_str(f"draw {draw}, {benchmark.task.name}, B = {B}")
            again = {name for name in table if any(fnmatch(name, pattern) for pattern in options.redo)}
            left = {
                name: kind
                for name, kind in table.items()
                if name in again or any(key_of(key) not in store.records for key in benchmark.keys(B, draw, name))
            }
            for records in benchmark.measure(B, draw, left):
                store.append(records)


def main(arguments: list[str] | None = None) -> None:
    """Run, and report everything that is known by then."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    store = Store(options.cache / "results.jsonl")
    tasks = [Benchmark(load_task(name, options.cache), PRIORS, options.held_out_kl) for name in options.tasks]
    try:
        run(options, tasks, store)
    except KeyboardInterrupt:
        print("Interrupted; what was measured is kept, and the same command goes on from there.")
    current = {b.task.name: b.task.weights for b in tasks}
    summary = summarize(r for r in store.records.values() if current.get(r["task"]) == r["weights"])
    lines = verdicts(summary)
    summary.save(options.results, verdicts=lines, ranking=[asdict(rank) for rank in ranking(summary)])
    short = fidelity_table.in_short(summary)
    (options.results / "fidelity.md").write_text(f"{short}\n")
    figure = (options.figures or options.results) / "fidelity.png"
    fidelity_figure.draw(summary, figure, prior=10.0)
    print("\n".join([short, "", *lines]))
    for message, count in summary.errors.items():
        print(f"failed, {count} times: {message}")
    print(f"written: {figure} and fidelity.csv, .json and .md in {options.results}")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="draws of the samples and of the estimator's split (5)")
    parser.add_argument("--tasks", nargs="+", choices=list(RECIPES), help=f"default: {' '.join(SHIPPED)}")
    parser.add_argument("--sizes", nargs="+", help=f"numbers of curvature samples; N is all ({SIZES})")
    parser.add_argument("--configurations", nargs="+", help="names or patterns of them (all)")
    parser.add_argument("--redo", nargs="+", default=[], help="patterns of configurations to measure again")
    parser.add_argument("--quick", action="store_true", help="under ten minutes; the options above still count")
    parser.add_argument("--held-out-kl", type=int, default=1, help="draws of which the held-out KL is computed (1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--silent", action="store_true", help="no progress line")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fidelity"))
    parser.add_argument("--results", type=Path, help="folder of fidelity.csv, .json and .md; default: --cache")
    parser.add_argument("--figures", type=Path, help="folder of the figure; default: --results")
    options = parser.parse_args(arguments)
    defaults = {"tasks": SHIPPED, "sizes": SIZES, "draws": 5, "configurations": ["*"]}
    for name, value in ({**defaults, **QUICK} if options.quick else defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.results = options.results or options.cache
    return options


if __name__ == "__main__":
    main()
