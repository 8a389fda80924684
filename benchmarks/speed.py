"""What the estimator and its predictions cost, as ratios to what they are made of.

    python -m benchmarks.speed            # all of it, each part in a process of its own
    python -m benchmarks.speed gram       # one part

Every figure is the median over repetitions of a ratio of two times measured in turn, with the range. The network is a
CNN of 105,866 parameters on scikit-learn's digits, enlarged to 28 x 28.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from laplace import Laplace
from laplace.baselaplace import ParametricLaplace
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.roots import GaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.lanczos import lanczos

FIRST, SECOND = 0, -1  # in place of a number of repetitions


def problem(device: str) -> tuple[nn.Module, TensorDataset]:
    """The network, a little trained, and its data."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    X = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    X = nn.functional.interpolate(X, size=(28, 28), mode="bilinear").to(device)
    y = torch.tensor(labels, device=device)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in torch.randperm(len(X)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
        optimizer.step()
    return model, TensorDataset(X, y)


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one run."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], device: str, repeats: int) -> None:
    """Print the ratio of two times, measured in turn after one warm-up each.

    Without repetitions, only one of the two is run, once: for the peak memory of that one.
    """
    if repeats <= 0:
        (ours if repeats == FIRST else theirs)()
        return
    ours(), theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"{name}: ratio {statistics.median(ratios):.2f} (range {ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"{a:.3f} s against {b:.3f} s, {repeats} pairs)",
        flush=True,
    )


def fit(device: str, repeats: int) -> None:
    """Held-out against same-batch magnitudes at the same total number of samples."""
    model, data = problem(device)
    samples = TensorDataset(*(t[:256] for t in data.tensors))

    def fitting(magnitudes: str, rank: int | None) -> Callable[[], None]:
        kind = {"magnitudes": magnitudes, "complement": "none", "rank": rank, "sampling": "uniform"}
        la = DebiasedLaplace(model, "classification", prior_precision=3.0, **kind)
        return lambda: la.fit(DataLoader(samples, batch_size=64))

    for rank in (40, None):
        label = "every direction" if rank is None else f"rank {rank}"
        compare(
            f"fit, 256 samples, {label}: held_out over same_batch",
            fitting("held_out", rank),
            fitting("same_batch", rank),
            device,
            repeats,
        )


def lanczos_step(device: str, repeats: int) -> None:
    """A Lanczos step over 100 of them, against one JVP and one VJP over the same batch."""
    model, data = problem(device)
    curvature = curvature_of(model, TensorDataset(*(t[:128] for t in data.tensors)))
    network = curvature.network
    inputs = next(iter(curvature.samples)).inputs
    noise = torch.randn(network.n_parameters, device=device)
    tangent = network.selection.unflatten(noise / noise.norm())

    def call(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (inputs,))

    def one_of_each() -> None:
        for _ in range(100):
            pushed = jvp(call, (network.parameters,), (tangent,))[1]
            vjp(call, network.parameters)[1](pushed)

    with evaluating(model), differentiable_kernels(model):
        products = curvature.linear_map()

        def steps() -> None:
            # a basis of 100 that no tolerance ends early
            lanczos(products, network.like, 50, tolerance=1e-30, max_products=100)

        compare("Lanczos, 100 steps at batch 128: over 100 (JVP + VJP)", steps, one_of_each, device, repeats)


def gram(device: str, repeats: int) -> None:
    """The Gram solver against its parts: rows, V V', V' W and the small eigenproblem.

    The solver keeps V V' in double precision, without which no direction a million times below the largest is
    orthogonal to it; the parts are timed with that product in double and, for comparison, in single precision.
    """
    model, data = problem(device)
    samples = TensorDataset(*(t[:128] for t in data.tensors))

    def ours(rank: int | None) -> None:
        curvature_of(model, samples).stacked_rows().eigenpairs(1e-6, rank)

    def parts(rank: int | None, dtype: torch.dtype) -> None:
        V = curvature_of(model, samples).stacked_rows().rows
        converted = V.to(dtype)
        values, W = torch.linalg.eigh((converted @ converted.T).double())
        k = rank or int((values > 1e-6 * values[-1]).sum())
        V.T @ W[:, -k:].to(V.dtype)

    with evaluating(model), differentiable_kernels(model):
        for rank in (40, None):
            for dtype in (torch.float64, torch.float32):
                compare(
                    f"Gram solver, 1,280 rows, {rank or 'every'} directions: over its parts, V V' in {dtype}",
                    lambda rank=rank: ours(rank),
                    lambda rank=rank, dtype=dtype: parts(rank, dtype),
                    device,
                    repeats,
                )


def predictive(device: str, repeats: int) -> None:
    """The linearized predictive at batch 64 against laplace-torch's own on the same object."""
    model, data = problem(device)
    X = data.tensors[0][-64:]
    for rank, samples in ((20, 128), (40, 128), (None, 128)):
        kind = {"magnitudes": "same_batch", "complement": "none", "rank": rank, "sampling": "uniform"}
        la = DebiasedLaplace(model, "classification", prior_precision=3.0, **kind)
        la.fit(DataLoader(TensorDataset(*(t[:samples] for t in data.tensors)), batch_size=64))
        error = difference(la, X) if repeats > 0 else 0.0
        compare(
            f"predictive, batch 64, rank {la.rank}, relative difference {error:.0e}: laplace-torch's time over ours",
            lambda la=la: ParametricLaplace._glm_predictive_distribution(la, X),
            lambda la=la: la._glm_predictive_distribution(X),
            device,
            repeats,
        )


def kron(device: str, repeats: int) -> None:
    """Kronecker posteriors of 128 samples, ours with exact magnitudes against laplace-torch's K-FAC."""
    model, data = problem(device)
    loader = DataLoader(TensorDataset(*(t[:128] for t in data.tensors)), batch_size=64)
    for subset in ("all", "last_layer"):

        def ours(subset: str = subset) -> None:
            kind = {"magnitudes": "held_out", "sampling": "uniform"}
            la = DebiasedLaplace(model, "classification", subset, "kron", prior_precision=3.0, **kind)
            la.fit(loader)

        def theirs(subset: str = subset) -> None:
            Laplace(model, "classification", subset, "kron", prior_precision=3.0).fit(loader)

        compare(f"fit of kron over {subset}: ours / laplace-torch's", ours, theirs, device, repeats)


def difference(la: ParametricLaplace, X: Tensor) -> float:
    """Largest relative difference between our predictive and laplace-torch's own on the same object."""
    ours, theirs = la._glm_predictive_distribution(X), ParametricLaplace._glm_predictive_distribution(la, X)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(ours, theirs, strict=True))


def curvature_of(model: nn.Module, samples: TensorDataset) -> RowCurvature:
    """The curvature of some samples, nothing computed yet."""
    la = _fitted.setdefault(id(model), _small_fit(model, samples))
    source = sample_source(DataLoader(samples, batch_size=128), 0)
    device = samples.tensors[0].device
    network = la.fit_result.network
    return RowCurvature(network, SubBatch(source, source.indices, device, 0), GaussNewton(network.likelihood))


_fitted: dict[int, Any] = {}


def _small_fit(model: nn.Module, samples: TensorDataset) -> Any:
    """A small fit, for the network that it met."""
    if id(model) in _fitted:
        return _fitted[id(model)]
    la = DebiasedLaplace(model, "classification", rank=1, complement="none", prior_precision=3.0, sampling="uniform")
    la.fit(DataLoader(TensorDataset(*(t[:8] for t in samples.tensors)), batch_size=8))
    return la


PARTS = {"fit": fit, "lanczos": lanczos_step, "gram": gram, "predictive": predictive, "kron": kron}


def main() -> None:
    """Run the parts, each in its own process so that peak memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument(
        "--repeats", type=int, default=5, help="0: only the first of the two, once; -1: only the second, once"
    )
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.part is None:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}", flush=True)
        for part in PARTS:
            for repeats in (arguments.repeats, FIRST, SECOND):
                options = ["--repeats", str(repeats), "--device", arguments.device]
                subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.speed", part, *options], check=True)
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    PARTS[arguments.part](arguments.device, arguments.repeats)
    if arguments.repeats > 0:
        return
    side = "the first of the two" if arguments.repeats == FIRST else "the second"
    if arguments.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"{arguments.part}, {side}: peak memory {peak / 1024:,.0f} MiB above imports", flush=True)
    else:
        print(f"{arguments.part}, {side}: peak {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
