"""CPU seconds of a fit in each of several processes: scoring, backward passes, exchange, all the rest.

    python -m benchmarks.processes [--sizes 1 2] [--samples 2000] [--rows 800]

A convolutional network of 120,202 parameters with random weights is fitted to random images, by processes of one thread
each; the largest number of any process is printed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.drawn_rows import RowScorer
from debiased_laplace.curvature.network import Network
from debiased_laplace.processes import Processes

TIMED = {
    "scoring": (RowScorer, "scored"),
    "backward passes": (Network, "row_matrix"),
    "exchange": (Processes, "_met"),
}


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.process_time() - start

    return call


def fit(rank: int, size: int, folder: Path, n: int, n_rows: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2304, 43), nn.ReLU(), nn.Linear(43, 10))
    data = TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(10, (n,)))
    seconds = dict.fromkeys(TIMED, 0.0)
    patches = [patch.object(owner, m, timed(getattr(owner, m), seconds, k)) for k, (owner, m) in TIMED.items()]
    la = DebiasedLaplace(model, "classification", n_rows=n_rows, complement="diagonal", rank=50)
    for one in patches:
        one.start()
    start = time.process_time()
    la.fit(DataLoader(data, batch_size=100))
    seconds["all"] = time.process_time() - start
    torch.save(seconds, folder / f"{size}_{rank}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        rank, size, folder = options.process
        fit(int(rank), int(size), Path(folder), options.samples, options.rows)
        return
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.processes", "--samples", str(options.samples)]
            command += ["--rows", str(options.rows), "--process"]
            running = [subprocess.Popen([*command, str(rank), str(size), folder]) for rank in range(size)]
            codes = [one.wait() for one in running]
            if any(codes):
                raise SystemExit("a process has failed")
            found = [torch.load(Path(folder) / f"{size}_{rank}.pt") for rank in range(size)]
        most = {name: max(one[name] for one in found) for name in found[0]}
        print(
            f"{size} process{'es' if size > 1 else ''}: " + ", ".join(f"{name} {s:.2f} s" for name, s in most.items())
        )


if __name__ == "__main__":
    main()
