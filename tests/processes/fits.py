"""Fits that one or several processes make, run as `python fits.py RANK SIZE FOLDER`; each writes what it found."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from laplace.curvature import CurvlinopsEF, CurvlinopsHessian
from torch import distributed, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from debiased_laplace import DebiasedLaplace

N = 61


class Stream(IterableDataset):
    """Samples of this process alone."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return iter(zip(self.X, self.y, strict=True))


def problem(likelihood="classification"):
    torch.manual_seed(4)
    X = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3)
    y = torch.randint(3, (N,)) if likelihood == "classification" else torch.randn(N, 3, dtype=torch.float64)
    y = y.abs().round() if likelihood == "poisson" else y
    return nn.Sequential(*layers).double(), X, y


CASES = {
    "default": {},
    "few rows": {"n_rows": 40},
    "diagonal": {"n_rows": 40, "complement": "diagonal"},
    "held out": {"n_rows": 60, "magnitudes": "held_out"},
    "same batch": {"n_rows": 60, "magnitudes": "same_batch"},
    "isotropic": {"n_rows": 60, "complement": "isotropic", "rank": 7},
    "Lanczos": {"n_rows": 60, "solver": "lanczos", "rank": 5, "complement": "none"},
    "kron": {"n_rows": 60, "hessian_structure": "kron"},
    "full": {"n_rows": 60, "hessian_structure": "full"},
    "last layer": {"subset_of_weights": "last_layer", "n_rows": 60},
    "subnetwork": {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.arange(5, 400, 11)},
    "uniform": {"sampling": "uniform"},
    "uniform Lanczos": {"sampling": "uniform", "solver": "lanczos", "rank": 5, "complement": "none"},
    "uniform kron": {"sampling": "uniform", "hessian_structure": "kron", "n_rows": 60},
    "Hessian": {"backend": CurvlinopsHessian, "n_rows": 60},
    "empirical Fisher": {"backend": CurvlinopsEF, "n_rows": 40},
    "chosen": {"n_rows": 60, "rank": "auto"},
    "poisson": {"likelihood": "poisson", "n_rows": 60},
}


def made(options, loader=None, *, shares="all", size=1, rank=0, **fit):
    """Return a fitted posterior; `shares` says what the loader of each process yields."""
    options = dict(options)
    likelihood = options.pop("likelihood", "classification")
    model, X, y = problem(likelihood)
    data, sampler = TensorDataset(X, y), None
    if shares == "sampler":
        sampler = DistributedSampler(data, size, rank, shuffle=True)
    if shares == "streams":
        mine = slice(rank * N // size, (rank + 1) * N // size)
        data = Stream(X[mine], y[mine])
    la = DebiasedLaplace(model, likelihood, prior_precision=3.0, temperature=0.7, **options)
    la.fit(DataLoader(data, batch_size=7, sampler=sampler), **fit)
    return la, X


def found(la, X):
    """Return what has to be the same everywhere."""
    rows = la.rows
    return {
        "precision": la.posterior_precision.to_dense(),
        "magnitudes": la.directional_curvatures,
        "errors": la.standard_errors,
        "loss": torch.as_tensor(la.loss),
        "rows": torch.zeros(0) if rows is None else rows.positions,
        "samples": la.split.direction_indices,
        "variances": la(X[:4], diagonal_output=True)[1] if la.likelihood == "poisson" else la(X[:4]),
    }


def main(rank, size, folder):
    """Make all fits, and keep what they found, or how they failed."""
    if size > 1:
        store = f"file://{folder}/store"
        distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=100)
        )
    kept = {name: found(*made(options)) for name, options in CASES.items()}
    kept["tolerance"] = found(*made({"n_rows": 100}, tolerance=0.5))
    if size > 1:
        for shares in ("sampler", "streams"):
            kept[shares] = found(*made(CASES["diagonal"], shares=shares, size=size, rank=rank))
        kept["failures"] = failures(rank, size)
    torch.save(kept, Path(folder) / f"{size}_{rank}.pt")


def killed(rank, size, folder):
    """Fit until another process is killed, and keep how that ends."""
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    model, X, y = problem()

    class Dying(TensorDataset):
        def __getitem__(self, i):
            if rank == 1 and i > 30:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(i)

    started = time.monotonic()
    try:
        DebiasedLaplace(model, "classification").fit(DataLoader(Dying(X, y), batch_size=7))
        ended = "none"
    except Exception as error:
        ended = type(error).__name__
    torch.save({"ended": ended, "seconds": time.monotonic() - started}, Path(folder) / f"killed_{rank}.pt")
    # the group cannot be left in order any more
    os._exit(0)


def failures(rank, size):
    """Return the messages of fits that cannot be."""

    def other_weights():
        model, X, y = problem()
        with torch.no_grad():
            model[0].bias.add_(rank)
        DebiasedLaplace(model, "classification").fit(DataLoader(TensorDataset(X, y), batch_size=7))

    def one_raises():
        model, X, y = problem()

        class Failing(TensorDataset):
            def __getitem__(self, i):
                if rank == 1 and i == 10:
                    raise OSError("the disk is full")
                return super().__getitem__(i)

        DebiasedLaplace(model, "classification").fit(DataLoader(Failing(X, y), batch_size=7))

    def other_data():
        model, X, y = problem()
        DebiasedLaplace(model, "classification").fit([(X + rank, y)])

    def other_middle():
        model, X, y = problem()
        X = X.clone()
        X[1:-1] += rank
        DebiasedLaplace(model, "classification").fit([(X, y)])

    def other_prior():
        model, X, y = problem()
        DebiasedLaplace(model, "classification", prior_precision=3.0 + rank).fit([(X, y)])

    def other_likelihood():
        model, X, y = problem("poisson")
        DebiasedLaplace(model, "poisson" if rank else "regression").fit([(X, y)])

    def other_tolerance():
        made({"n_rows": 40}, **({"tolerance": 0.1} if rank else {}))

    def wrong_arguments_of_one():
        made({"n_rows": 40}, **({"tolerance": -1.0} if rank == 1 else {}))

    def the_same_stream():
        model, X, y = problem()
        DebiasedLaplace(model, "classification").fit(DataLoader(Stream(X, y), batch_size=7))

    def a_shard_as_a_list():
        model, X, y = problem()
        DebiasedLaplace(model, "classification").fit([(X[rank::size], y[rank::size])])

    def going_on():
        la, _ = made({"n_rows": 40})
        _, X, y = problem()
        la.fit([(X, y)], override=False)

    def other_options():
        made({"seed": rank})

    def empty_streams():
        model, X, y = problem()
        DebiasedLaplace(model, "classification").fit(DataLoader(Stream(X[:0], y[:0]), batch_size=7))

    messages = {}
    attempts = [other_weights, one_raises, other_data, other_middle, other_prior, other_likelihood, other_tolerance]
    attempts += [wrong_arguments_of_one, the_same_stream, a_shard_as_a_list, going_on, other_options, empty_streams]
    for attempt in attempts:
        try:
            attempt()
            messages[attempt.__name__] = "none"
        except Exception as error:
            messages[attempt.__name__] = f"{type(error).__name__}: {error}"
    # one process has no samples
    model, X, y = problem()
    # its hooks are of training
    model = nn.parallel.DistributedDataParallel(model)
    some = slice(None) if rank == 0 else slice(0)
    la = DebiasedLaplace(model, "classification", prior_precision=3.0, temperature=0.7, **CASES["diagonal"])
    la.fit(DataLoader(Stream(X[some], y[some]), batch_size=7))
    return messages | {"an empty shard": found(la, X)}


if __name__ == "__main__":
    run = killed if sys.argv[4:] == ["killed"] else main
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
