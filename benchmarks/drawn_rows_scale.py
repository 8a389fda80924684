"""Time of a default fit to drawn rows, against a forward pass over the same data, and its memory per sample.

    python -m benchmarks.drawn_rows_scale

Every fit runs in a process of its own, which holds all the data whatever the number of samples that it is fitted to:
the difference between two peaks is what the fit takes for the further samples.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.fidelity_tasks import mlp
from debiased_laplace import DebiasedLaplace

CASES = {20_000: (24, 64, 64, 2), 200_000: (24, 60, 50, 10)}
"""Widths of the network, by number of samples."""
FEW = 2_000
PASSES, SECONDS, BYTES = 3, 60, 64
"""Goals: so many forward passes plus seconds at most, and so many bytes a sample."""


def problem(n_data: int) -> tuple[nn.Module, TensorDataset]:
    """A network after three epochs on labels of a random one, a tenth of them wrong."""
    torch.manual_seed(0)
    widths = CASES[n_data]
    X = torch.randn(n_data, widths[0])
    with torch.no_grad():
        y = (3 * mlp(widths[0], 32, widths[-1])(X)).argmax(1)
    wrong = torch.rand(n_data) < 0.1
    y[wrong] = torch.randint(0, widths[-1], (int(wrong.sum()),))
    model = mlp(*widths)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):
        for batch in torch.randperm(n_data).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval(), TensorDataset(X, y)


def measure(n_data: int, n_samples: int) -> dict[str, float]:
    """Wall and processor seconds of a forward pass and of a fit, and the peak memory of this process in bytes."""
    model, data = problem(n_data)
    loader = DataLoader(Subset(data, range(n_samples)), batch_size=512)
    la: Any = DebiasedLaplace(model, "classification", sampling="curvature")
    start = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for inputs, _ in loader:
            model(inputs)
    middle = time.perf_counter(), time.process_time()
    la.fit(loader)
    end = time.perf_counter(), time.process_time()
    return {
        "pass": middle[0] - start[0],
        "pass_processor": middle[1] - start[1],
        "fit": end[0] - middle[0],
        "fit_processor": end[1] - middle[1],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": la.rows.n,
    }


def child(n_data: int, n_samples: int) -> dict[str, float]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.drawn_rows_scale", "--child", str(n_data), str(n_samples)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=int, nargs=2, help="N, and samples to fit to, in this process")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    print("| N | P | rows | forward pass, s (processor) | fit, s (processor) |\n|---|---|---|---|---|")
    for n_data, widths in CASES.items():
        found = child(n_data, n_data)
        P = sum(p.numel() for p in mlp(*widths).parameters())
        print(
            f"| {n_data:,} | {P:,} | {found['rows']:,} | {found['pass']:.1f} ({found['pass_processor']:.1f}) | "
            f"{found['fit']:.1f} ({found['fit_processor']:.1f}) |",
            flush=True,
        )
    print(f"goal: at most {PASSES} forward passes and {SECONDS} s")
    # of the largest N: where samples are few, what the allocator keeps outweighs them
    of_a_sample = (found["peak"] - child(n_data, FEW)["peak"]) / (n_data - FEW)
    print(f"peak memory of {n_data:,} samples beyond that of {FEW:,}: {of_a_sample:.0f} bytes a sample (goal: {BYTES})")


if __name__ == "__main__":
    main()
