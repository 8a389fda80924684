"""CPU seconds of a fit in each of several processes: scoring, backward passes, exchange, all; and its memory.

    python -m benchmarks.processes [--sizes 1 2] [--samples 2000] [--rows 800] [--shard]

A convolutional network of 107,018 parameters with random weights is fitted to random images, by processes of one thread
each; the largest number of any process is printed. "waiting" is wall time in exchanges, most of it for other processes.
A single process has copies of itself beside it, up to the largest size, since cores share memory and caches; the
smallest of their numbers is printed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.drawn_rows import RowScorer
from debiased_laplace.curvature.network import Network
from debiased_laplace.processes import Processes

TIMED = [
    ("scoring", RowScorer, "scored"),
    ("backward passes", Network, "row_matrix"),
    ("exchange", Processes, "gathered"),
    ("exchange", Processes, "add"),
]


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        start, on_the_wall = time.process_time(), time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.process_time() - start
            if name == "exchange":
                seconds["waiting"] += time.perf_counter() - on_the_wall

    return call


def fit(rank: int, size: int, folder: Path, n: int, n_rows: int, *, shard: bool) -> None:
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    widths, layers = (3, 32, 64, 64), []
    for i, o in pairwise(widths):
        layers += [nn.Conv2d(i, o, 3), nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    model = nn.Sequential(*layers, *head)
    data = TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(10, (n,)))
    seconds = {**dict.fromkeys([key for key, *_ in TIMED], 0.0), "waiting": 0.0}
    patches = [patch.object(owner, m, timed(getattr(owner, m), seconds, k)) for k, owner, m in TIMED]
    la = DebiasedLaplace(model, "classification", n_rows=n_rows, complement="diagonal", shard_directions=shard)
    for one in patches:
        one.start()
    start, before = time.process_time(), getrusage(RUSAGE_SELF).ru_maxrss
    la.fit(DataLoader(data, batch_size=100))
    seconds["all"] = time.process_time() - start
    megabytes = {
        "directions": la.fit_result.estimate.curvature.directions.nbytes / 1e6,
        "peak beyond the process": (getrusage(RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6,
    }
    torch.save((seconds, megabytes), folder / f"{size}_{rank}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--shard", action="store_true", help="divide directions and rows among the processes")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        rank, size, folder = options.process
        fit(int(rank), int(size), Path(folder), options.samples, options.rows, shard=options.shard)
        return
    command = [sys.executable, "-m", "benchmarks.processes", "--samples", str(options.samples)]
    command += ["--rows", str(options.rows), *(["--shard"] if options.shard else []), "--process"]
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            groups = [Path(folder) / str(copy) for copy in range(max(options.sizes) if size == 1 else 1)]
            members = [(group, rank) for group in groups for rank in range(size)]
            for group in groups:
                group.mkdir()
            running = [subprocess.Popen([*command, str(rank), str(size), group]) for group, rank in members]
            codes = [one.wait() for one in running]
            if any(codes):
                raise SystemExit("a process has failed")
            found = [torch.load(group / f"{size}_{rank}.pt") for group, rank in members]
        chosen = min if size == 1 else max
        seconds, megabytes = ({name: chosen(one[i][name] for one in found) for name in found[0][i]} for i in (0, 1))
        shown = [f"{name} {s:.2f} s" for name, s in seconds.items()] + [f"{k} {v:.0f} MB" for k, v in megabytes.items()]
        print(f"{size} process{'es' if size > 1 else ''}: " + ", ".join(shown))


if __name__ == "__main__":
    main()
