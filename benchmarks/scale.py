"""What fits and predictions cost at the sizes that users have, in forward passes of the same network.

    python -m benchmarks.scale                          # all jobs
    python -m benchmarks.scale last_layer_kron_10       # some jobs

Every job runs in a process of its own with one thread. A fit is given in forward passes over its samples (fwd), a
prediction in forward passes over its inputs (MAP), both in seconds of processor time measured in the same process.
Memory is the peak beyond that of the model, its data and a forward pass. ResNet-18 and ViT-B/16, torchvision's (`pip
install --editable '.[benchmarks]'`), and a network of GPT-2's size have random weights and synthetic inputs; the MNIST
network and SmolLM2 are pretrained, and come with their data in packages.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch
from laplace import Laplace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.scale_problems import Problem, gpt2_lora, mnist_pretrained, resnet18, smollm2, smollm2_tokens, vit_b_16
from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.contexts import at_weights
from debiased_laplace.curvature.derivatives import vmapped_rows
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch

_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """A line of the table.

    Attributes:
        job: what was measured.
        seconds: processor time.
        ratio: to the unit; None where the job failed.
        unit: "fwd" or "MAP".
        grew: bytes of memory beyond the model's; None: not known.
        failed: message of the error; None: it did not fail.
    """

    job: str
    seconds: float
    ratio: float | None
    unit: str
    grew: int | None = None
    failed: str | None = None


class Clock:
    """Costs of a problem, in forward passes that are measured beside them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        problem.forward()
        self.units = {"fwd": _median(problem.forward, 3), "MAP": _median(problem.predict, _REPEATS)}
        self.costs: list[Cost] = []

    def measure(self, job: str, run: Callable[[], Any], unit: str = "fwd", *, repeats: int = 1) -> Any:
        """Add the cost of what a function does; return what it returns, or None if it fails."""
        forward = self.problem.forward if unit == "fwd" else self.problem.predict
        _reset_peak()
        before, times, found = _peak(), [], None
        try:
            for _ in range(repeats):
                seconds, found = _seconds(run)
                times.append(seconds)
        except (RuntimeError, MemoryError, ValueError) as error:
            message = "out of memory" if "memory" in str(error) else f"{type(error).__name__}: {error}".splitlines()[0]
            self.costs.append(Cost(job, 0.0, None, unit, _peak() - before, message[:60]))
            return None
        grew = _peak() - before
        # the machine may have become slower or faster since the start
        again = _median(forward, max(1, min(repeats, _REPEATS)))
        own = (self.units[unit] + again) / 2
        self.costs.append(Cost(job, statistics.median(times), statistics.median(times) / own, unit, grew))
        return found


def last_layer(n_classes: int, n: int, **options: Any) -> list[Cost]:
    """Fit and predictions of the last layer of ResNet-18, and those of laplace-torch."""
    clock = Clock(resnet18(n_classes, n))
    problem = clock.problem
    shared = {"subset_of_weights": "last_layer", "prior_precision": 3.0}
    uniform = options.get("sampling") == "uniform"

    def ours() -> Any:
        la: Any = DebiasedLaplace(problem.model, "classification", **shared, **options)
        # a uniform sample is of a larger data set
        la.fit(problem.loader(), n_data=10 * n if uniform else None)
        return la

    def theirs() -> Any:
        # its low rank is for all weights
        structure = options["hessian_structure"].replace("lowrank", "full")
        la: Any = Laplace(problem.model, "classification", **shared, hessian_structure=structure)
        la.fit(problem.loader())
        return la

    la = clock.measure(f"fit, n = {n:,}", ours)
    if la is not None:
        _predictions(clock, "", la, "mean_field")
        others = DataLoader(TensorDataset(torch.randn_like(problem.X), problem.y), batch_size=128)
        judges = others if uniform else problem.loader()
        clock.measure(f"held_out_kl, n = {n:,}", lambda: la.held_out_kl(judges))
    la = clock.measure(f"laplace-torch: fit, n = {n:,}", theirs)
    if la is not None:
        _predictions(clock, "laplace-torch: ", la, "probit")
    return clock.costs


def rows() -> list[Cost]:
    """Rows of all weights of ResNet-18: one for each sample, by layers and by vmap."""
    clock = Clock(resnet18(10, 16))
    problem = clock.problem
    batch = Batch(problem.X, problem.y)

    def gradients() -> None:
        loss = nn.functional.cross_entropy(problem.model(problem.X), problem.y)
        torch.autograd.grad(loss, list(problem.model.parameters()))

    network = clock.measure("tests of a network before a fit", lambda: _prepared(problem, batch))
    if network is not None:
        cotangents = torch.randn(16, 10)
        arguments = problem.X, cotangents, lambda _, c: c[:, None]
        clock.measure("a gradient of every sample together", gradients, repeats=_REPEATS)
        clock.measure("a row of every sample, factors", lambda: network.row_matrix(*arguments), repeats=_REPEATS)
        clock.measure(
            "a row of every sample, by vmap", lambda: vmapped_rows(network.selection, network.parameters, *arguments)
        )
    return clock.costs


def drawn_rows(
    problem: Problem,
    structure: str,
    n_rows: int,
    *,
    tests: bool = False,
    state: bool = False,
    n_draws: int = 0,
    **options: Any,
) -> list[Cost]:
    """Fit of drawn rows of all trainable weights, and predictions.

    Args:
        problem: network and data.
        structure: of the curvature.
        n_rows: number of rows.
        tests: also the tests of the network alone.
        state: also a state, written to a file and loaded again.
        n_draws: functions that predictions average; 0: the default link.
        options: of the posterior.
    """
    clock, x = Clock(problem), problem.test

    def posterior() -> Any:
        drawn = {"hessian_structure": structure, "n_rows": n_rows, "prior_precision": 30.0}
        return DebiasedLaplace(problem.model, "classification", **drawn, **options)

    def ours() -> Any:
        la = posterior()
        la.fit(problem.loader())
        return la

    if tests:
        batch = Batch(problem.X[:8], problem.y[:8])
        clock.measure("tests of a network before a fit", lambda: _prepared(problem, batch))
    estimated = sum(posterior().cost(problem.loader()).n_bytes.values()) / 2**20
    n = len(problem.X)
    la = clock.measure(f"fit, {n_rows} rows of {n:,} samples (la.cost: {estimated:,.0f} MiB)", ours)
    if la is not None:
        if structure == "lowrank":
            width = 2 if options.get("directions_dtype") == "bfloat16" else 4
            directions = la.rank * la.n_params * width / 2**20
            fit = clock.costs[-1]
            clock.costs[-1] = replace(fit, job=f"{fit.job}; directions: {directions:,.0f} MiB")
        drawn: dict[str, Any] = {"link_approx": "mc", "n_samples": n_draws} if n_draws else {}
        shown = f", {n_draws} draws" if n_draws else ""
        clock.measure(f"la(x), {len(x)} inputs{shown}", lambda: la(x, **drawn), "MAP")
    if la is not None and state:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            clock.measure("state, written to a file", lambda: torch.save(la.state_dict(), path))
            # a new process would not have it
            la, other = None, posterior()
            job = f"state of {path.stat().st_size / 2**20:,.0f} MiB, loaded"
            clock.measure(job, lambda: other.load_state_dict(torch.load(path, mmap=True, weights_only=True)))
            if other.rank:
                clock.measure(f"la(x), {len(x)} inputs, loaded", lambda: other(x), "MAP")
    return clock.costs


def _prepared(problem: Problem, batch: Batch) -> Network:
    """Test the network."""
    with at_weights(problem.model):
        return prepare_network(ParameterSelection.all_weights(problem.model), likelihood_named("classification"), batch)


def all_weights(structure: str, n: int, n_rows: int, n_test: int = 8, **options: Any) -> list[Cost]:
    """All weights of ResNet-18."""
    return drawn_rows(resnet18(10, n, n_test), structure, n_rows, **options)


def bfloat16() -> list[Cost]:
    """Directions in bfloat16 against those in the model's format: ResNet-18, all weights, rank 20."""
    clock = Clock(resnet18(10, 256))
    problem, posteriors = clock.problem, []
    for dtype in ("model", "bfloat16"):
        la: Any = DebiasedLaplace(
            problem.model,
            "classification",
            prior_precision=3.0,
            rank=20,
            n_rows=64,
            complement="isotropic",
            directions_dtype=dtype,
        )
        clock.measure(f"fit, directions_dtype={dtype!r}", partial(la.fit, problem.loader()))
        posteriors.append(la)
    variances, probabilities = zip(
        *((la._glm_predictive_distribution(problem.test)[1], la(problem.test)) for la in posteriors), strict=True
    )
    largest = float(((variances[1] - variances[0]).abs() / variances[0].abs().amax((1, 2), keepdim=True)).max())
    shift = float((probabilities[1] - probabilities[0]).abs().max())
    clock.measure(
        f"variances change by at most {largest:.1e} of the largest of an input, probabilities by {shift:.1e}",
        lambda: posteriors[1](problem.test),
        "MAP",
    )
    return clock.costs


def _predictions(clock: Clock, name: str, la: Any, link: str) -> None:
    """Measure predictions of a posterior."""
    x, draws = clock.problem.test, 20
    of_draws = f"{draws} draws, {len(x)} inputs"
    clock.measure(f"{name}la(x), {len(x)} inputs", lambda: la(x, link_approx=link), "MAP", repeats=_REPEATS)
    drawn = {"pred_type": "nn", "link_approx": "mc", "n_samples": draws}
    clock.measure(f'{name}la(x, "nn"), {of_draws}', lambda: la(x, **drawn), "MAP", repeats=_REPEATS)
    clock.measure(
        f"{name}functional_samples, {of_draws}",
        lambda: la.functional_samples(x, n_samples=draws),
        "MAP",
        repeats=_REPEATS,
    )


_LARGE: dict[str, Any] = {"rank": 20, "complement": "isotropic"}

JOBS: dict[str, Callable[[], list[Cost]]] = {
    "last_layer_kron_10": partial(last_layer, 10, 512, hessian_structure="kron"),
    "last_layer_kron_10_uniform": partial(last_layer, 10, 512, hessian_structure="kron", sampling="uniform"),
    "last_layer_kron_1000": partial(last_layer, 1_000, 2_048, hessian_structure="kron"),
    "last_layer_kron_1000_uniform": partial(last_layer, 1_000, 2_048, hessian_structure="kron", sampling="uniform"),
    "last_layer_lowrank_10": partial(last_layer, 10, 128, hessian_structure="lowrank"),
    "last_layer_full_10": partial(last_layer, 10, 128, hessian_structure="full"),
    "rows": rows,
    "bfloat16": bfloat16,
    "all_kron": partial(all_weights, "kron", 1_024, 64),
    "all_kron_512": partial(all_weights, "kron", 4_096, 512, n_test=64),
    "all_kron_bounded": partial(all_weights, "kron", 1_024, 64, memory=3 * 2**30),
    "all_lowrank_100": partial(all_weights, "lowrank", 4_096, 512, n_test=64, rank=100),
    "all_lowrank_10": partial(all_weights, "lowrank", 1_024, 64, n_test=64, rank=10),
    "all_lowrank_20": partial(all_weights, "lowrank", 1_024, 64, rank=20),
    "all_lowrank_20_bounded": partial(all_weights, "lowrank", 1_024, 64, rank=20, memory=3 * 2**30),
    "all_lowrank_10_224": lambda: drawn_rows(resnet18(10, 64, 8, side=224), "lowrank", 64, rank=10),
    "vit_lowrank_20": lambda: drawn_rows(vit_b_16(64, 2), "lowrank", 64, tests=True, **_LARGE, memory=4 * 2**30),
    "vit_lowrank_20_bfloat16": lambda: drawn_rows(
        vit_b_16(64, 2), "lowrank", 64, tests=True, **_LARGE, memory=5 * 2**30, directions_dtype="bfloat16"
    ),
    "mnist_every_direction": lambda: drawn_rows(mnist_pretrained(), "lowrank", 4_096, complement="isotropic"),
    "mnist_every_direction_bounded": lambda: drawn_rows(
        mnist_pretrained(), "lowrank", 4_096, complement="isotropic", memory=3 * 2**30
    ),
    "smollm2_lowrank_20": lambda: drawn_rows(
        smollm2(64, 2), "lowrank", 64, tests=True, **_LARGE, memory=4 * 2**30, directions_dtype="bfloat16", state=True
    ),
    "smollm2_tokens": lambda: drawn_rows(smollm2_tokens(64, 1), "lowrank", 512, rank=20, n_draws=10),
    "gpt2_lora": lambda: drawn_rows(gpt2_lora(8, 8), "lowrank", 32, rank=4),
}
"""Functions that return the lines of a part of the table, by name."""


def _seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def _median(run: Callable[[], Any], repeats: int) -> float:
    run()
    return statistics.median(_seconds(run)[0] for _ in range(repeats))


def _reset_peak() -> None:
    """Forget the peak so far, where the system can."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def _peak() -> int:
    """Peak memory of this process in bytes since it was forgotten."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(s.split()[1]) for s in status.read_text().splitlines() if s.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(job: str, gigabytes: float) -> list[Cost]:
    """Costs of a job in a process of its own, with one thread and limited memory."""
    command = [sys.executable, "-m", "benchmarks.scale", "--child", job, "--memory", str(gigabytes)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, env={**os.environ, **one_thread}, text=True)
    if done.returncode:
        return [Cost("the job", 0.0, None, "", None, f"ended with {done.returncode}")]
    return [Cost(**line) for line in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; all without any")
    parser.add_argument("--child", choices=JOBS, help="run one job in this process")
    parser.add_argument("--memory", type=float, default=8.0, help="limit of the address space of a job, in GiB")
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        limit = int(options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(json.dumps([asdict(cost) for cost in JOBS[options.child]()]))
        return
    unknown = set(options.jobs) - set(JOBS)
    if unknown:
        parser.error(f"expected jobs of {', '.join(JOBS)}; got {', '.join(sorted(unknown))}")
    print("| job | what | cost | processor time, s | memory, MiB |\n|---|---|---|---|---|")
    for job in options.jobs or JOBS:
        for cost in child(job, options.memory):
            ratio = cost.failed if cost.ratio is None else f"{cost.ratio:.2f} {cost.unit}"
            grew = "–" if cost.grew is None else f"{cost.grew / 2**20:,.0f}"
            print(f"| {job} | {cost.job} | {ratio} | {cost.seconds:.3f} | {grew} |", flush=True)


if __name__ == "__main__":
    main()
