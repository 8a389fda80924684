"""Fits that one or several processes make, run as `python fits.py RANK SIZE FOLDER`; each writes what it found."""

import copy
import os
import pickle
import signal
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from laplace.curvature import CurvlinopsEF, CurvlinopsHessian
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from debiased_laplace import (
    DebiasedLaplace,
    DebiasedNewton,
    diagnose,
    evaluate,
    fit_checkpoint,
    held_out_kl,
    newton_step,
    processes,
)
from debiased_laplace.curvature.drawn_rows import RowScorer

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


def made(options, *, shares="all", size=1, rank=0, device="cpu", shard_directions=False, **fit):
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
    options["shard_directions"] = shard_directions
    la = DebiasedLaplace(model.to(device), likelihood, prior_precision=3.0, temperature=0.7, **options)
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


def loaded(X, y, *, shares="all", size=1, rank=0, batch_size=7):
    data, sampler = TensorDataset(X, y), None
    if shares == "sampler":
        sampler = DistributedSampler(data, size, rank, shuffle=True)
    return DataLoader(data, batch_size=batch_size, sampler=sampler)


def join(rank, size, folder, name, *, backend="gloo", timeout=100):
    """Join the group of several processes."""
    if size > 1:
        store, limit = f"file://{folder}/store_of_{name}_{size}", timedelta(seconds=timeout)
        distributed.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=limit)


def seeded():
    return torch.Generator().manual_seed(8)


def everything_else(shares="all", size=1, rank=0):
    """Return what the other passes over samples find, which has to be the same everywhere."""
    kept = {}
    share = {"shares": shares, "size": size, "rank": rank}
    for likelihood in ("classification", "regression"):
        la, _ = made({"likelihood": likelihood, "n_rows": 60})
        _, X, y = problem(likelihood)
        every, test = loaded(X, y, **share), loaded(X[:23] + 0.1, y[:23], **share, batch_size=5)
        kl = held_out_kl(la, every)
        kept[f"KL of rows, {likelihood}"] = [kl.value, kl.standard_error]
        uniform = DebiasedLaplace(la.model, likelihood, sampling="uniform", prior_precision=3.0)
        half = X[:30], y[:30]
        uniform.fit(loaded(*half, **share), n_data=N)
        kl = uniform.held_out_kl(loaded(X[30:], y[30:], **share), loaded(*half, **share))
        kept[f"KL of samples, {likelihood}"] = [kl.value, kl.standard_error]
        for options in ({}, {"link_approx": "mc"}, {"pred_type": "nn"}):
            la.optimize_prior_precision(method="gridsearch", val_loader=test, grid_size=5, n_samples=20, **options)
            kept[f"losses, {likelihood}, {options}"] = la.prior_search.losses.tolist()
        la.optimize_prior_precision(n_steps=3)
        ood = {"far": loaded(X + 3, y, **share)}
        report = evaluate(la, test, ood_loaders=ood, n_samples=100, n_resamples=50, validation_loader=every)
        kept[f"report, {likelihood}"] = [
            one.value for of_method in report.metrics.values() for one in of_method.values() if one.value is not None
        ]
        if likelihood == "classification":
            p = la(X, shared=True)
            assert not torch.equal(p[0], p[-1])
            kept["probabilities"] = p.tolist()
            kept["of drawn networks"] = la(
                X, "nn", link_approx="mc", n_samples=3, generator=seeded(), shared=True
            ).tolist()
        else:
            mean, covariance = la(X, shared=True, outputs=[0, 2])
            kept["moments"] = torch.cat([mean.flatten(), covariance.flatten()]).tolist()
        kept[f"functions, {likelihood}"] = la.functional_samples(
            X, n_samples=3, generator=seeded(), shared=True
        ).tolist()
        for sampling in ("curvature", "uniform"):
            again = DebiasedLaplace(
                la.model, likelihood, sampling=sampling, n_rows=60 if sampling == "curvature" else None
            )
            again.fit(loaded(X[:40], y[:40], **share))
            again.fit(loaded(X, y, **share), override=False)
            kept[f"joined, {likelihood}, {sampling}"] = again.directional_curvatures.tolist()
        model, X, y = problem(likelihood)
        found = diagnose(model, likelihood, loaded(X, y, **share), batch_sizes=[8, 16], n_draws=3)
        kept[f"diagnosis, {likelihood}"] = [
            b.leading.ratio().value for b in found.batches
        ] + found.rows.leading.tolist()
        mine = (slice(None),) if shares == "all" else (slice(rank * N // size, (rank + 1) * N // size),)
        for n_rows in (None, 40):
            # more iterations of conjugate gradients multiply what rounding differs by
            options = {"n_rows": n_rows, "stopping": "none", "max_iterations": 5}
            step = newton_step(model, likelihood, (X[mine], y[mine]), 0.1, **options)
            kept[f"step, {likelihood}, {n_rows}"] = step.update.tolist()
        optimizer = DebiasedNewton(model.parameters(), model, likelihood)
        losses = [optimizer.step(partial(tuple, (X[mine], y[mine]))) for _ in range(3)]
        kept[f"optimizer, {likelihood}"] = losses
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in kept.items()}


SHARDED = {
    "default": {"n_rows": 60},
    "no complement": {"n_rows": 60, "complement": "none", "magnitudes": "same_batch"},
    "isotropic": {"n_rows": 60, "complement": "isotropic", "rank": 7},
    "diagonal, held out": {"n_rows": 60, "complement": "diagonal", "magnitudes": "held_out"},
    "uniform, on disk": {"sampling": "uniform", "n_rows": 90, "directions_device": "disk"},
    "chosen": {"n_rows": 60, "rank": "auto", "complement": "auto"},
    "regression": {"likelihood": "regression", "n_rows": 60, "sigma_noise": 0.8},
}


FULLY = ("default", "regression")
"""Cases of which tuning on validation data and a report are compared too."""


def of_shards(la, X, y, *, fully):
    """Return what a posterior says whose directions are divided among processes."""
    operator, kept = la.posterior_precision, {}
    noise = torch.Generator().manual_seed(3)
    kept["precision"] = operator.to_dense()
    kept["covariance diagonal"] = la.posterior_variance
    kept["log determinant"] = torch.stack([la.log_det_posterior_precision, operator.variance_sum])
    kept["quadratic"] = la.square_norm(la.mean + torch.randn(2, len(la.mean), generator=noise).to(la.mean))
    kept["variances"] = operator.variances(torch.randn(3, len(la.mean), generator=noise).to(la.mean))
    kept["draws"] = la.sample(4, generator=noise)
    kept["directions"] = (la.directions * la.directional_curvatures) @ la.directions.T
    kept["functions"] = la.functional_samples(X[:5], n_samples=3, generator=noise)
    found = la(X[:5]) if la.likelihood == "classification" else la(X[:5])[1]
    kept["predictions"] = found
    kl = la.held_out_kl([(X, y)])
    kept["KL"] = torch.tensor([kl.value, kl.standard_error])
    la.optimize_prior_precision(n_steps=4)
    kept["prior"] = la.prior_precision
    prior_structure = "layerwise"
    la.optimize_prior_precision(n_steps=4, prior_structure=prior_structure)
    kept["priors of layers"] = la.prior_precision
    la.prior_precision = 3.0
    if fully:
        test = DataLoader(TensorDataset(X[:20] + 0.1, y[:20]), batch_size=6)
        la.optimize_prior_precision(method="gridsearch", val_loader=test, grid_size=3)
        kept["losses"] = la.prior_search.losses
        report = evaluate(la, test, n_resamples=50)
        kept["report"] = torch.tensor([report.metrics["laplace"]["nll"].value])
        la.prior_precision = 3.0
    return kept


def sharded(rank, size, folder):
    """Fit with directions divided among processes, write the shards, and load those of another number of processes."""
    join(rank, size, folder, "shards")
    kept = {}
    for name, options in SHARDED.items():
        la, X = made(options, shard_directions=True)
        y = problem(options.get("likelihood", "classification"))[2]
        held = la.fit_result.estimate.curvature.directions
        kept[name] = of_shards(la, X, y, fully=name in FULLY) | {"shape": torch.tensor(held.shape)}
        torch.save(la.state_dict(), Path(folder) / f"state_{name}_{rank}_of_{size}.pt")
        for other in (1, 2, 3):
            files = sorted(Path(folder).glob(f"state_{name}_*_of_{other}.pt"), reverse=True)
            if other == size or len(files) != other:
                continue
            again = DebiasedLaplace(la.model, la.likelihood, shard_directions=True)
            again.load_state_dict(torch.load(file) for file in files)
            kept[f"{name}, loaded from {other}"] = of_shards(again, X, y, fully=False)
    kept["refused"] = refused(rank, size, folder) if size > 1 else {}
    torch.save(kept, Path(folder) / f"shards_{size}_{rank}.pt")


def refused(rank, size, folder):
    """Return the messages of what is not built for divided directions."""
    la, X = made(SHARDED["default"], shard_directions=True)

    def other_inputs():
        la(X[rank : rank + 3])

    def gradients():
        la.enable_backprop = True
        la(X[:3])

    def one_shard_only():
        other = DebiasedLaplace(la.model, "classification", shard_directions=True)
        other.load_state_dict([torch.load(Path(folder) / f"state_default_0_of_{size}.pt")])

    def a_shard_as_a_state():
        other = DebiasedLaplace(la.model, "classification")
        other.load_state_dict(torch.load(Path(folder) / f"state_default_0_of_{size}.pt"))

    def last_layer():
        made({"subset_of_weights": "last_layer", "n_rows": 40}, shard_directions=True)

    def hessian():
        made({"backend": CurvlinopsHessian, "n_rows": 40}, shard_directions=True)

    def priors_of_entries():
        la.prior_precision = torch.full((len(la.mean),), 2.0) + torch.arange(len(la.mean)) % 2

    def pickled():
        assert torch.equal(copy.deepcopy(la)(X[:2]), la(X[:2]))
        pickle.dumps(la.posterior_precision)

    def sharded_parameters():
        model, X, y = problem()
        mesh = init_device_mesh("cpu", (size,))
        for layer in (model[0], model[3], model[5], model):
            fully_shard(layer, mesh=mesh)
        whole = problem()[0]
        whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        again = DebiasedLaplace(whole, "classification", prior_precision=3.0, temperature=0.7, n_rows=60)
        again.fit(DataLoader(TensorDataset(X, y), batch_size=7))
        torch.testing.assert_close(again.directional_curvatures, la.directional_curvatures, rtol=1e-9, atol=1e-12)
        DebiasedLaplace(model, "classification")

    messages = {}
    attempts = [other_inputs, gradients, one_shard_only, a_shard_as_a_state, last_layer, hessian, priors_of_entries]
    attempts += [sharded_parameters, pickled]
    for attempt in attempts:
        la.enable_backprop = False
        try:
            attempt()
            messages[attempt.__name__] = "none"
        except Exception as error:
            messages[attempt.__name__] = f"{type(error).__name__}: {error}"
    return messages


def main(rank, size, folder):
    """Make all fits, and keep what they found, or how they failed."""
    join(rank, size, folder, "fits")
    kept = {name: found(*made(options)) for name, options in CASES.items()}
    kept["tolerance"] = found(*made({"n_rows": 100}, tolerance=0.5))
    if size < 3:
        kept["everything else"] = everything_else()
    if size > 1:
        for shares in ("sampler", "streams"):
            kept[shares] = found(*made(CASES["diagonal"], shares=shares, size=size, rank=rank))
        kept["everything else, shared"] = everything_else("sampler", size, rank)
        kept["failures"] = failures(rank, size)
    torch.save(kept, Path(folder) / f"{size}_{rank}.pt")


def on_gpus(rank, size, folder):
    """Fit by NCCL, each process on a GPU of its own, and keep what was found."""
    torch.cuda.set_device(rank)
    join(rank, size, folder, "gpus", backend="nccl")
    kept = {}
    for shard in (False, True):
        la, X = made(CASES["diagonal"], device="cuda", shard_directions=shard)
        kept[shard] = {key: value.cpu() for key, value in found(la, X.cuda()).items()}
    torch.save(kept, Path(folder) / f"gpu_{rank}.pt")


def resumed(rank, size, folder):
    """Fit again what a killed process has interrupted, and keep what was found and how many samples were scored."""
    join(rank, size, folder, "resumed", timeout=20)
    scored, original = [], RowScorer.scored
    RowScorer.scored = lambda self, batch: scored.append(len(batch)) or original(self, batch)
    la, X = made(CASES["diagonal"], checkpoint_dir=Path(folder) / "kept")
    torch.save({"found": found(la, X), "scored": sum(scored)}, Path(folder) / f"resumed_{rank}.pt")


def killed(rank, size, folder):
    """Fit until another process is killed, and keep how that ends."""
    fit_checkpoint._SECONDS, fit_checkpoint._SHARE = 0.0, float("inf")
    join(rank, size, folder, "killed", timeout=20)
    model, X, y = problem()

    class Dying(TensorDataset):
        def __getitem__(self, i):
            # not one of those that stand for all, which are loaded first
            if rank == 1 and i == 39:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(i)

    started = time.monotonic()
    try:
        la = DebiasedLaplace(model, "classification", prior_precision=3.0, temperature=0.7, **CASES["diagonal"])
        la.fit(DataLoader(Dying(X, y), batch_size=7), checkpoint_dir=Path(folder) / "kept")
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

    def draws_without_a_generator():
        la, X = made({"n_rows": 40})
        la(X, link_approx="mc", shared=True)

    def other_inputs_of_a_shared_prediction():
        la, X = made({"n_rows": 40})
        la(X[rank:], shared=True)

    def other_options():
        made({"seed": rank})

    def empty_streams():
        model, X, y = problem()
        DebiasedLaplace(model, "classification").fit(DataLoader(Stream(X[:0], y[:0]), batch_size=7))

    def other_batches_of_an_iterable():
        la, X = made({"n_rows": 40})
        y = problem()[2]
        evaluate(la, iter([(X[rank::size], y[rank::size])]))

    def other_prior_of_a_kl():
        la, X = made({"n_rows": 40})
        la.prior_precision = 2.0 + rank
        la.held_out_kl([(X, problem()[2])])

    def other_validation_data():
        la, X = made({"n_rows": 40})
        la.optimize_prior_precision(method="gridsearch", val_loader=[(X[rank : rank + 20], problem()[2][:20])])

    def an_evaluation_of_one_fails():
        la, X = made({"n_rows": 40})

        def method(x):
            if rank == 1:
                raise OSError("the disk is full")
            return torch.softmax(la.model(x), dim=1)

        evaluate({"laplace": la, "own": method}, [(X, problem()[2])] * 3)

    def alone_for_a_while():
        processes.PATIENCE = 0.3
        time.sleep(1.5 * (rank == 1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made({"n_rows": 40})
        processes.PATIENCE = 60.0
        raise RuntimeError(str([str(one.message) for one in caught]))

    messages = {}
    attempts = [other_weights, one_raises, other_data, other_middle, other_prior, other_likelihood, other_tolerance]
    attempts += [wrong_arguments_of_one, the_same_stream, a_shard_as_a_list, other_options, empty_streams]
    attempts += [other_batches_of_an_iterable, other_prior_of_a_kl, other_validation_data, an_evaluation_of_one_fails]
    attempts += [alone_for_a_while, draws_without_a_generator, other_inputs_of_a_shared_prediction]
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
    run = {"killed": killed, "resumed": resumed, "sharded": sharded, "gpus": on_gpus}.get(sys.argv[-1], main)
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
