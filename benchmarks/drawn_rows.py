"""Distance to the full-batch posterior of drawn rows, against as many backward passes for whole samples.

python -m benchmarks.drawn_rows            # an hour; four tasks, 5 draws
python -m benchmarks.drawn_rows --tasks digits --draws 2
"""

import argparse
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from torch.utils.data import DataLoader, Subset

from benchmarks.fidelity_criteria import Approximation, Reference, distances, reference
from benchmarks.fidelity_tasks import RECIPES, Task, load_task
from debiased_laplace import DebiasedLaplace

PRIORS = (1.0, 10.0, 100.0)
N_SAMPLES = 64
METHODS = {
    "samples, biased": (1.0, {"sampling": "uniform", "magnitudes": "same_batch", "complement": "none"}),
    "samples": (1.0, {"sampling": "uniform"}),
    "rows": (1.0, {"sampling": "curvature"}),
    "rows, same_batch": (1.0, {"sampling": "curvature", "magnitudes": "same_batch"}),
    "a fifth of the rows": (0.2, {"sampling": "curvature"}),
}


def fitted(task: Task, method: str, draw: int) -> tuple[DebiasedLaplace, float]:
    """The posterior of a method, and the seconds of its fit."""
    share, options = METHODS[method]
    n_outputs = task.outputs.shape[1]
    la = DebiasedLaplace(task.model, task.likelihood, seed=draw, sigma_noise=task.sigma_noise, **options)
    data = task.train
    if options["sampling"] == "curvature":
        la = DebiasedLaplace(
            task.model, task.likelihood, seed=draw, sigma_noise=task.sigma_noise,
            n_rows=round(share * N_SAMPLES * n_outputs), **options,
        )  # fmt: skip
    else:
        data = Subset(task.train, task.order(draw)[:N_SAMPLES])
    start = time.process_time()
    with warnings.catch_warnings():
        # directions below the threshold of rank=None matter at a prior precision of 1 only
        warnings.filterwarnings("ignore", message="rank=None left out")
        la.fit(DataLoader(data, batch_size=256), n_data=task.n_data)
    return la, time.process_time() - start


def measured(la: DebiasedLaplace, task: Task, full: Reference, prior: float) -> tuple[float, float]:
    """Parameter KL in nats, and the mean total variation between predictives."""
    la.prior_precision = prior
    precision = la.posterior_precision.to_dense().double()
    L = torch.linalg.cholesky(precision)
    X = torch.linalg.solve_triangular(L, task.jacobians.flatten(0, 1).T, upper=False)
    X = X.T.unflatten(0, task.jacobians.shape[:2])
    trace = float(torch.cholesky_solve(full.precision, L).diagonal().sum())
    approximation = Approximation(X @ X.mT, trace, 2 * float(L.diagonal().log().sum()))
    found = distances(approximation, full)
    return float(found["parameter_kl"] or 0), float(found["total_variation"] or 0)


def shown(values: list[float]) -> str:
    """Mean and its standard error over draws."""
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std()) / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return f"{float(x.mean()):.3g} ± {error:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("fidelity-cache"))
    options = parser.parse_args()
    for name in options.tasks:
        task = load_task(name, options.cache)
        weight = task.n_data / task.sigma_noise**2
        noise = task.sigma_noise if task.likelihood == "regression" else None
        fulls = [
            reference(task.curvature, task.jacobians, task.outputs, weight=weight, prior=prior, noise=noise)
            for prior in PRIORS
        ]
        n_rows = N_SAMPLES * task.outputs.shape[1]
        print(f"\n{task.title}: N = {task.n_data}, P = {len(task.curvature):,}, {n_rows} rows, {options.draws} draws")
        print("| method | seconds | " + " | ".join(f"prior {p:g}: nats | TV" for p in PRIORS) + " |")
        for method in METHODS:
            cells: list[list[tuple[float, float]]] = [[] for _ in PRIORS]
            seconds, rows = [], None
            for draw in range(options.draws):
                la, took = fitted(task, method, draw)
                seconds.append(took)
                rows = la.rows
                for found, full, prior in zip(cells, fulls, PRIORS, strict=True):
                    found.append(measured(la, task, full, prior))
            values = " | ".join(f"{shown([c[i] for c in found])}" for found in cells for i in (0, 1))
            print(f"| {method} | {sum(seconds) / len(seconds):.2g} | {values} |", flush=True)
            if rows is not None:
                print(f"    last draw: {rows}")


if __name__ == "__main__":
    main()
