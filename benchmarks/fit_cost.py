"""What `la.cost(loader)` says of a fit, beside what the fit takes.

    python -m benchmarks.fit_cost

Networks with random weights, synthetic inputs, torch's default number of threads; wall time. Both are one measurement,
on a machine whose load may change in between.
"""

import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace

HELD_OUT = {"sampling": "uniform", "magnitudes": "held_out"}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "MLP, defaults": ("mlp", 20_000, {}),
    "CNN, 512 rows": ("cnn", 2_000, {"n_rows": 512}),
    "CNN, kron, 512 rows": ("cnn", 2_000, {"n_rows": 512, "hessian_structure": "kron"}),
    "CNN, rank 20 by Lanczos": ("cnn", 512, {**HELD_OUT, "rank": 20, "solver": "lanczos", "complement": "none"}),
    "CNN, last layer, kron": ("cnn", 2_000, {"subset_of_weights": "last_layer", "hessian_structure": "kron"}),
}
"""Network, number of samples and options of each line."""


def problem(kind: str, n: int) -> tuple[nn.Module, DataLoader[Any]]:
    """A network, and samples for it."""
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 10))
        X = torch.randn(n, 20)
    else:
        model = nn.Sequential()
        for inputs, outputs in ((1, 16), (16, 32)):
            model.extend([nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.MaxPool2d(2)])
        model.extend([nn.Flatten(), nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, 10)])
        X = torch.randn(n, 1, 28, 28)
    return model, DataLoader(TensorDataset(X, torch.randint(10, (n,))), batch_size=128)


def main() -> None:
    print("| fit | estimated, s | taken, s | the estimate itself, s |\n|---|---|---|---|")
    for name, (kind, n, options) in CASES.items():
        model, loader = problem(kind, n)
        la: Any = DebiasedLaplace(model, "classification", prior_precision=3.0, **options)
        start = time.perf_counter()
        cost = la.cost(loader)
        estimated = time.perf_counter()
        la.fit(loader)
        taken = time.perf_counter() - estimated
        print(f"| {name} | {sum(cost.seconds.values()):.2g} | {taken:.2g} | {estimated - start:.2g} |", flush=True)


if __name__ == "__main__":
    main()
