"""How long a diagnosis with its defaults takes, and how much memory, at about 100,000 parameters.

A CNN of 98,950 parameters on scikit-learn's digits, a few epochs of training on 1,200 images of which a fifth carry a
wrong label. Seconds are those of one run on this machine, with whatever else it was doing; processor time, summed over
threads, says what a quiet machine would need.

    python -m benchmarks.diagnose_scale
    python -m benchmarks.diagnose_scale --draws 1 --profile     and where the time goes
"""

import argparse
import cProfile
import os
import pstats
import resource
import time
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore", message="`torch.jit.script")
from debiased_laplace import diagnose
from debiased_laplace.demo.digits import load
from debiased_laplace.diagnosis import Diagnosis

EPOCHS = 5
BATCH = 64


def problem() -> tuple[nn.Module, DataLoader]:
    """The network, a little trained, and a loader of its training data."""
    torch.manual_seed(0)
    data = load(seed=0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 180), nn.ReLU(), nn.Linear(180, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for images, labels in DataLoader(data.train, batch_size=BATCH, shuffle=True, generator=generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model, DataLoader(data.train, batch_size=BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="default: that of diagnose")
    parser.add_argument("--sizes", type=int, nargs="+", help="default: those of diagnose")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="show the functions that take most of the time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, loader = problem()
    chosen = {} if options.draws is None else {"n_draws": options.draws}

    profile = cProfile.Profile()
    before, processor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if options.profile:
        profile.enable()
    found = diagnose(model, "classification", loader, batch_sizes=options.sizes, progress_bar=True, **chosen)
    profile.disable()
    processor = time.process_time() - processor
    show(found, processor, before, options.threads)
    if options.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)


def show(found: Diagnosis, processor: float, before: int, threads: int) -> None:
    """Findings, times and memory."""
    print(found)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"\n{found!r}, {threads} threads")
    print(f"{found.seconds:.0f} s wall time, {processor:.0f} s processor time, {peak:.1f} GiB above the training")
    print(f"load of the machine over the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
