"""Newton steps whose curvature is that of drawn rows, against as many backward passes for whole samples.

    python -m benchmarks.newton_rows

The gradient is that of a batch of 1,024 samples. The curvature is of all of them, of 64 random ones, or of 64 C rows
drawn from the batch where its curvature is; the damped system is solved exactly. Then debiased steps of `newton_step`:
with the curvature of all samples of each half, and of 32 C rows drawn of each; seconds are processor time. A step is
judged by the damped quadratic of all training data: the share of the largest possible decrease, 1 for a full-batch
step, negative where it rises.
"""

import argparse
import time
import warnings
from pathlib import Path
from statistics import median

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from torch import Tensor, nn

from benchmarks.drawn_rows import shown
from benchmarks.fidelity_results import mean_of
from benchmarks.newton_tasks import CHECKPOINTS, TASKS, checkpoint, newton_task
from debiased_laplace import newton_step
from debiased_laplace.curvature.classification import Classification
from debiased_laplace.curvature.drawn_rows import RowSampler
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton
from debiased_laplace.data.batches import Batch

B, N_CURVATURE = 1024, 64
DAMPINGS = (1e-3, 1e-2, 1e-1)


def gradient_of(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean loss, in double precision."""
    loss = nn.functional.cross_entropy(model(X), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def curvatures(model: nn.Module, X: Tensor, y: Tensor, seed: int) -> dict[str, Tensor]:
    """Mean GGN (P, P) of a batch, by what it is estimated from."""
    batch, found = Batch(X, y), {}
    network = prepare_network(ParameterSelection.all_weights(model), Classification(), batch.first(8))
    n_rows = N_CURVATURE * network.n_outputs
    some = batch.at(torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:N_CURVATURE])
    for name, samples, n in (
        ("the whole batch", batch, 10**9),
        (f"{N_CURVATURE} samples", some, 10**9),
        (f"{N_CURVATURE} C drawn rows", batch, n_rows),
    ):
        sampler = RowSampler(network, GaussNewton(network.likelihood), samples.first(8), n_rows=n, seeds=(seed,))
        sampler.read([(torch.arange(len(samples)), samples)], total=None, progress_bar=False)
        found[name] = sampler.drawn().curvature().dense().double()
    return found


def shares(task: str, name: str, draws: int, cache: Path) -> dict[tuple[str, float], list[float]]:
    """Share of the largest decrease, by source of the curvature and damping."""
    X, y = newton_task(task, 0).train
    folder = cache / task
    folder.mkdir(parents=True, exist_ok=True)
    model = checkpoint(folder, task, name, 0)
    H = curvatures(model, X, y, 0)["the whole batch"]
    g = gradient_of(model, X, y)
    found: dict[tuple[str, float], list[float]] = {}
    for draw in range(draws):
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 + draw))[:B]
        g_batch = gradient_of(model, X[chosen], y[chosen])
        for source, H_batch in curvatures(model, X[chosen], y[chosen], draw).items():
            for damping in DAMPINGS:
                eye = damping * torch.eye(len(H), dtype=H.dtype)
                d, best = -torch.linalg.solve(H_batch + eye, g_batch), -torch.linalg.solve(H + eye, g)
                decrease = -(g @ d + 0.5 * d @ (H + eye) @ d)
                found.setdefault((source, damping), []).append(float(decrease / (-0.5 * g @ best)))
    return found


def debiased_shares(
    task: str, name: str, draws: int, cache: Path
) -> tuple[dict[tuple[str, float], list[float]], dict[str, list[float]]]:
    """The same of debiased steps, and their seconds."""
    X, y = newton_task(task, 0).train
    model = checkpoint(cache / task, task, name, 0)
    H, g = curvatures(model, X, y, 0)["the whole batch"], gradient_of(model, X, y)
    found: dict[tuple[str, float], list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for damping in DAMPINGS:
        damped = H + damping * torch.eye(len(H), dtype=H.dtype)
        best = 0.5 * g @ torch.linalg.solve(damped, g)
        for draw in range(draws):
            chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 + draw))[:B]
            batch, n_classes = (X[chosen], y[chosen]), int(y.max()) + 1
            for source, n_rows in (("newton_step", None), ("newton_step, drawn rows", N_CURVATURE // 2 * n_classes)):
                start = time.process_time()
                step = newton_step(model, "classification", batch, damping, n_data=len(y), n_rows=n_rows, seed=draw)
                seconds.setdefault(source, []).append(time.process_time() - start)
                d = step.update.double()
                decrease = -(g @ d + 0.5 * d @ damped @ d)
                found.setdefault((source, damping), []).append(float(decrease / best))
    return found, seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--cache", type=Path, default=Path(".cache/newton"))
    options = parser.parse_args()
    print("| task | checkpoint | curvature of | " + " | ".join(f"damping {d:g}" for d in DAMPINGS) + " | s |")
    print("|---" * (4 + len(DAMPINGS)) + "|")
    for task in TASKS:
        for name in CHECKPOINTS:
            arguments = task, name, options.draws, options.cache
            debiased, seconds = debiased_shares(*arguments)
            found = shares(*arguments) | debiased
            for source in dict.fromkeys(source for source, _ in found):
                cells = " | ".join(shown(mean_of(found[source, damping])) for damping in DAMPINGS)
                taken = f"{median(seconds[source]):.2f}" if source in seconds else ""
                print(f"| {TASKS[task]} | {name} | {source} | {cells} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
