"""How close links from Gaussian logits to class probabilities are to the expected softmax, and what they cost.

    python -m benchmarks.links                 # accuracy, many classes, limits, cost: half an hour
    python -m benchmarks.links --parts accuracy

The expected softmax is a mean over 131,072 scrambled Sobol' points.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

warnings.filterwarnings("ignore", message="`torch.jit.script")

import torch
from laplace import Laplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fidelity_posteriors import Examination, loader_of, set_prior
from benchmarks.fidelity_tasks import RECIPES, SHIPPED, Task, load_task
from debiased_laplace import DebiasedLaplace
from debiased_laplace.predictive import links
from debiased_laplace.predictive.mean_field import GaussianLogits

PRIORS = (1.0, 10.0, 100.0)
TASKS = [name for name in SHIPPED if RECIPES[name].likelihood == "classification"]
N_POINTS = 2**17
OURS = {
    "lowrank": ("all", {}),
    "lowrank, no complement": ("all", {"complement": "none"}),
    "kron": ("all", {"hessian_structure": "kron"}),
    "last layer lowrank": ("last_layer", {}),
    "last layer kron": ("last_layer", {"hessian_structure": "kron"}),
    "last layer full": ("last_layer", {"hessian_structure": "full"}),
}
THEIRS = {"laplace-torch diag": "diag", "laplace-torch kron": "kron"}


def mean_field_on_pairs(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean-field softmax of Lu, Ie & Sha (2020), with variances times a weight."""

    def link(mean: Tensor, covariance: Tensor) -> Tensor:
        own = covariance.diagonal(dim1=-2, dim2=-1)
        V = (own[:, :, None] + own[:, None, :] - 2 * covariance).clamp_min(0)
        differences = mean[:, :, None] - mean[:, None, :]
        return (-(-differences / (1 + weight * V).sqrt()).logsumexp(-1)).softmax(-1)

    return link


def centred_probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """The probit link on logits less their mean over the classes."""
    C = mean.shape[1]
    H = torch.eye(C, dtype=mean.dtype) - 1 / C
    return links.probit(mean @ H, (H @ covariance @ H).diagonal(dim1=-2, dim2=-1))


LINKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_field": lambda m, S: GaussianLogits.of_covariance(m, S).probabilities(),
    "probit": lambda m, S: links.probit(m, S.diagonal(dim1=-2, dim2=-1)),
    "centred probit": centred_probit,
    "pairs, pi/8": mean_field_on_pairs(math.pi / 8),
    "pairs, 3/pi²": mean_field_on_pairs(3 / math.pi**2),
    "bridge_norm": lambda m, S: links.bridge(m, S, normalized=True),
    "100 draws": lambda m, S: mean_over_draws(m, S, 100),
}


def mean_over_draws(mean: Tensor, covariance: Tensor, n: int) -> Tensor:
    """What `link_approx="mc"` gives."""
    generator = torch.Generator().manual_seed(0)
    return links.gaussian_draws(mean, covariance, n_samples=n, generator=generator).softmax(-1).mean(0)


def expected_softmax(mean: Tensor, covariance: Tensor, n_points: int = N_POINTS, seed: int = 1) -> Tensor:
    """The mean over points of all C - 1 differences, in double precision."""
    C = mean.shape[1]
    H = torch.eye(C, dtype=mean.dtype) - 1 / C
    values, vectors = torch.linalg.eigh(H @ covariance @ H)
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]).flip(-1)[..., : C - 1]
    engine = torch.quasirandom.SobolEngine(C - 1, scramble=True, seed=seed)
    total = torch.zeros_like(mean)
    step = max(1, 40_000_000 // mean.numel())
    for start in range(0, n_points, step):
        z = torch.special.ndtri(engine.draw(min(step, n_points - start), dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
        total += (mean[..., None] + root @ z.T).softmax(1).sum(-1)
    return total / n_points


def total_variation(p: Tensor, q: Tensor) -> float:
    """Mean over inputs."""
    return float((p - q).abs().sum(-1).mean() / 2)


def gaussians_of(task: Task, n_samples: int) -> Iterator[tuple[str, float, Tensor]]:
    """Covariances of the logits at the test inputs: every structure, ours from some samples, theirs from all."""
    order = task.order(0)[:n_samples]
    for name, (subset, options) in OURS.items():
        la: Any = DebiasedLaplace(task.model, "classification", subset, seed=0, sampling="uniform", **options)
        la.fit(loader_of(task, order), n_data=task.n_data)
        J = task.jacobians[..., -la.selection.n_parameters :].to(la.mean_subnet.dtype)
        for prior in PRIORS:
            la.prior_precision = prior
            yield name, prior, la.posterior_precision.variance(J).double()
    for name, structure in THEIRS.items():
        la = Laplace(task.model, "classification", "all", structure)
        la.fit(loader_of(task, list(range(task.n_data))))
        examination = Examination(task, la)
        for prior in PRIORS:
            set_prior(la, prior)
            yield name, prior, examination.approximation(prior).covariances


def accuracy(options: argparse.Namespace) -> None:
    """Total variation to the expected softmax, by task, structure and prior."""
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    floor = []
    for name in TASKS:
        task = load_task(name, options.cache)
        for structure, prior, covariance in gaussians_of(task, options.samples):
            exact = expected_softmax(task.outputs, covariance)
            if prior == PRIORS[0] and structure in ("lowrank", "last layer full"):
                half = expected_softmax(task.outputs, covariance, N_POINTS // 2, seed=2)
                floor.append(total_variation(half, exact))
            found[name, structure, prior] = {
                link: total_variation(of(task.outputs, covariance), exact) for link, of in LINKS.items()
            }
            values = "  ".join(f"{link} {value:.4f}" for link, value in found[name, structure, prior].items())
            print(f"{name}, {structure}, prior {prior:g}: {values}", flush=True)
    print(f"half as many other points differ by {max(floor):.4f} at most\n")
    print("| prior precision | " + " | ".join(LINKS) + " |\n|---|" + "---|" * len(LINKS))
    for prior in PRIORS:
        cells = [cell for key, cell in found.items() if key[2] == prior]
        shown = [f"{median(c[link] for c in cells):.4f} / {max(c[link] for c in cells):.4f}" for link in LINKS]
        print(f"| {prior:g} | " + " | ".join(shown) + " |")
    ratios = [cell["mean_field"] / cell["probit"] for cell in found.values()]
    print(f"mean_field / probit: median {median(ratios):.3f}, largest {max(ratios):.3f}, of {len(ratios)} cells")


def clusters(n_classes: int, n_inputs: int, n: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Classes around random centres: training samples with labels, and 40 test inputs."""
    generator = torch.Generator().manual_seed(n_classes)
    centres = torch.randn(n_classes, n_inputs, generator=generator)
    y = torch.randint(n_classes, (n + 40,), generator=generator)
    X = centres[y] + spread * torch.randn(n + 40, n_inputs, generator=generator)
    return X[:n], y[:n], X[n:]


def many_classes(options: argparse.Namespace) -> None:  # noqa: ARG001
    """The same for a hundred and a thousand classes, of which at most 128 are integrated jointly."""
    for C, n, subset, structure in ((100, 3000, "all", "lowrank"), (1000, 20_000, "last_layer", "kron")):
        X, y, test = clusters(C, 20, n, 0.9)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, C))
        optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
        for _ in range(10):
            for batch in torch.randperm(n, generator=generator).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
                optimizer.step()
        further = {"sampling": "uniform", **({"rank": 100} if structure == "lowrank" else {})}
        la: Any = DebiasedLaplace(model, "classification", subset, structure, seed=0, **further)
        la.fit(DataLoader(TensorDataset(X[:64], y[:64]), batch_size=64), n_data=n)
        for prior in (1.0, 10.0, 100.0, 1000.0):
            la.prior_precision = prior
            mean, covariance = (t.double() for t in la._glm_predictive_distribution(test))
            exact = expected_softmax(mean, covariance, 2**14)
            floor = total_variation(expected_softmax(mean, covariance, 2**13, seed=2), exact)
            values = {
                "mean_field": la(test).double(),
                **{link: LINKS[link](mean, covariance) for link in ("probit", "pairs, 3/pi²", "100 draws")},
            }
            shown = "  ".join(f"{name} {total_variation(p, exact):.4f}" for name, p in values.items())
            confidence = float(exact.max(1).values.mean())
            case = f"{C} classes, {subset} {structure}, prior {prior:g} (confidence {confidence:.2f})"
            print(f"{case}: {shown}  other points {floor:.4f}", flush=True)


def limits(options: argparse.Namespace) -> None:  # noqa: ARG001
    """Two classes against the integral; tails; more equal classes than nodes can tell apart."""
    means, variances = torch.linspace(0, 30, 121), torch.logspace(-4, 4, 41)
    m, V = (t.double().flatten() for t in torch.meshgrid(means, variances, indexing="ij"))
    z = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    exact = torch.stack([torch.sigmoid(a + v.sqrt() * z).mean() for a, v in zip(m, V, strict=True)])
    covariance = V[:, None, None] * torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = GaussianLogits.of_covariance(torch.stack([torch.zeros_like(m), m], 1), covariance).probabilities()[:, 1]
    print(f"two classes: off by {float((found - exact).abs().max()):.4f} at most")
    mean = torch.tensor([[0.0, 0.0, -100.0]], dtype=torch.float64)
    covariance = 300 * torch.eye(3, dtype=torch.float64)[None]
    ours, theirs = (
        float(p[0, 2])
        for p in (
            GaussianLogits.of_covariance(mean, covariance).probabilities(),
            expected_softmax(mean, covariance, 2**21),
        )
    )
    print(f"three classes, variances of 300, one mean 100 below the others: {ours:.1e} for {theirs:.1e}")
    p = GaussianLogits.of_variances(torch.zeros(1, 1000), torch.full((1, 1000), 100.0)).probabilities()
    print(f"1,000 independent logits of equal means, variance 100: {float(p.min()):.1e} to {float(p.max()):.1e}")


def seconds_of(calls: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Median CPU seconds of each call, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: median(values) for name, values in times.items()}


def cost(options: argparse.Namespace) -> None:
    """CPU time of `la(x)` with one thread: 64 inputs of ten classes, and of a thousand."""
    torch.set_num_threads(1)
    task = load_task("digits", options.cache)
    inputs = task.train.tensors[0][:64]
    cases: list[tuple[str, Any, Tensor]] = []
    for name, (subset, further) in OURS.items():
        la: Any = DebiasedLaplace(
            task.model, "classification", subset, prior_precision=10.0, seed=0, sampling="uniform", **further
        )
        la.fit(loader_of(task, task.order(0)[:128]), n_data=task.n_data)
        cases.append((f"10 classes, {name}", la, inputs))
    cases.extend(of_a_thousand_classes())
    for name, la, x in cases:
        times = seconds_of({link: partial(la, x, link_approx=link) for link in ("probit", "mean_field")})
        ratio = times["mean_field"] / times["probit"]
        print(f"{name}: probit {1e3 * times['probit']:.1f} ms, mean_field {ratio:.2f} times that", flush=True)


def of_a_thousand_classes() -> Iterator[tuple[str, Any, Tensor]]:
    """A last layer of 1,000 classes behind a network of each kind."""
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        X, y = torch.randn(64, 3, 64, 64), torch.randint(1000, (64,))
        models = {
            "ResNet-18, 64 × 64": (resnet18(), X),
            "MLP of 64 × 512": (nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1000)), X[:, 0, 0]),
        }
    for name, (model, inputs) in models.items():
        kind = {"prior_precision": 10.0, "sampling": "uniform"}
        la = DebiasedLaplace(model.eval(), "classification", "last_layer", "kron", **kind)
        la.fit(DataLoader(TensorDataset(inputs[:16], y[:16]), batch_size=16))
        yield f"1,000 classes, last layer kron, {name}", la, inputs


PARTS = {"accuracy": accuracy, "many_classes": many_classes, "limits": limits, "cost": cost}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--samples", type=int, default=128, help="curvature samples of our posteriors")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fidelity"))
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
