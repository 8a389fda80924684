"""Commands on models: `demo`, `fit` and `diagnose`."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from laplace import curvature

from debiased_laplace.cli.arguments import (
    Commands,
    add_model,
    call,
    check_folder,
    check_writable,
    device_named,
    load_tensors,
    make_folder,
    seed,
    trained_model,
)
from debiased_laplace.diagnosis import diagnose
from debiased_laplace.files import replacing
from debiased_laplace.posterior.factory import DebiasedLaplace
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace
from debiased_laplace.processes import Processes

_BACKENDS = (
    "CurvlinopsGGN",
    "CurvlinopsEF",
    "CurvlinopsHessian",
    "BackPackGGN",
    "BackPackEF",
    "AsdlGGN",
    "AsdlEF",
    "AsdlHessian",
)
_LAPLACE_ARGUMENTS = (
    "subset_of_weights",
    "hessian_structure",
    "rank",
    "magnitudes",
    "direction_samples",
    "magnitude_samples",
    "n_folds",
    "complement",
    "metric",
    "inverse_correction",
    "solver",
    "seed",
    "kron_basis",
    "kron_magnitudes",
    "class_weights",
    "sampling",
    "n_rows",
    "memory",
    "directions_dtype",
    "directions_device",
    "kfac_approx",
    "prior_precision",
    "prior_mean",
    "sigma_noise",
    "temperature",
    "last_layer_name",
    "dict_key_x",
    "dict_key_y",
)
"""Arguments passed unchanged to `DebiasedLaplace`; options that are not given keep its defaults."""

_MODEL_ARGUMENTS = (
    "--model and --loader are callables without arguments, given as module:callable and imported with the "
    "working directory on the path."
)


def add_to(commands: Commands) -> None:
    """Add the commands."""
    _add_demo(commands)
    _add_fit(commands)
    _add_diagnose(commands)


# --- demo ---


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small network on scikit-learn's digits, fit three posteriors, write a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report; may exist")
    parser.add_argument("--seed", type=seed, default=0, help="seed of all random draws")
    parser.add_argument("--device", default="auto", help='device: "cpu", "cuda", … or "auto"')
    parser.set_defaults(run=_run_demo)


def _run_demo(parsed: argparse.Namespace) -> int:
    check_folder(parsed.out)
    make_folder(parsed.out)
    device = device_named(parsed.device)
    # only the demo needs scikit-learn
    from debiased_laplace import demo

    demo.run(parsed.out, parsed.seed, device)
    return 0


# --- fit ---


def _add_fit(commands: Commands) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit a posterior of a trained model and write its state",
        description=(
            f"Fit a Laplace posterior of a trained model. {_MODEL_ARGUMENTS} Options not given have the defaults "
            "of DebiasedLaplace; its documentation describes them."
        ),
    )
    _add_inputs(parser)
    _add_options(parser)
    parser.set_defaults(run=_run_fit)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("model, data and output")
    add_model(inputs)
    inputs.add_argument("--out", type=Path, required=True, help="file of the state; replaced if it exists")
    inputs.add_argument("--n-data", type=int, help="size of the data set of the likelihood")
    inputs.add_argument(
        "--checkpoint-dir",
        type=Path,
        help="folder to keep finished parts in, from which the same command goes on after an interruption",
    )
    inputs.add_argument(
        "--tolerance", type=float, help="stop doubling the samples when the held-out KL gains less than so many nats"
    )
    inputs.add_argument(
        "--dry-run", action="store_true", help="print what the fit would take, estimated from two batches, and stop"
    )
    inputs.add_argument("--device", default="auto", help='device: "cpu", "cuda", … or "auto" (default)')
    inputs.add_argument(
        "--tune-prior",
        action="store_true",
        help="tune the prior precision by marginal likelihood, or on the data of --validation-loader",
    )
    inputs.add_argument(
        "--validation-loader",
        metavar="MODULE:CALLABLE",
        help="returns a DataLoader of samples not used in training, for a grid search by --tune-prior",
    )
    inputs.add_argument(
        "--prior-structure",
        choices=("scalar", "layerwise", "diag"),
        default="scalar",
        help="of --tune-prior by marginal likelihood: one prior precision, one per tensor, or one per parameter",
    )
    inputs.add_argument("--no-progress", action="store_true", help="show no progress bars")


def _add_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("arguments of DebiasedLaplace")
    options.add_argument("--subset-of-weights", choices=("all", "last_layer", "subnetwork"))
    options.add_argument("--hessian-structure", choices=("lowrank", "kron", "full"))
    options.add_argument("--rank", type=_or_auto(int), help='a number of directions, or "auto"')
    options.add_argument("--magnitudes", choices=("held_out", "cross_fitted", "same_batch", "auto"))
    options.add_argument(
        "--direction-samples",
        type=_or_auto(_amount),
        help='a share (0.5), or with --sampling uniform a number (64), of the samples, or "auto"',
    )
    options.add_argument(
        "--magnitude-samples", type=_amount, help="likewise, with --sampling uniform; all the rest if not given"
    )
    options.add_argument("--n-folds", type=int, help="of cross-fitted magnitudes")
    options.add_argument("--complement", choices=("none", "isotropic", "diagonal", "kron", "auto"))
    options.add_argument("--metric", choices=("euclidean", "kron", "auto"))
    options.add_argument("--inverse-correction", choices=("none", "second_order"))
    options.add_argument("--solver", choices=("auto", "gram", "lanczos"))
    options.add_argument("--seed", type=seed)
    options.add_argument("--kron-basis", choices=("row_matrices", "kfac"))
    options.add_argument("--kron-magnitudes", choices=("exact", "kronecker"))
    options.add_argument("--kfac-approx", choices=("expand", "reduce"))
    options.add_argument("--prior-precision", type=float)
    options.add_argument("--prior-mean", type=float)
    options.add_argument("--sigma-noise", type=float)
    options.add_argument(
        "--class-weights", type=float, nargs="+", metavar="W", help="(classification) one for each class"
    )
    options.add_argument(
        "--sampling",
        choices=("uniform", "curvature"),
        help="all rows of the samples, or (default) rows drawn where the curvature is",
    )
    options.add_argument("--n-rows", type=int, help="number of rows; a few thousand, or all, if not given")
    options.add_argument(
        "--memory", type=int, metavar="BYTES", help="that a fit may take beyond the model, samples and directions"
    )
    options.add_argument("--directions-dtype", choices=("model", "bfloat16"))
    options.add_argument("--directions-device", choices=("model", "cpu", "disk"))
    options.add_argument("--temperature", type=float)
    options.add_argument("--last-layer-name")
    options.add_argument("--subnetwork-indices", type=Path, help="file of a LongTensor, written by torch.save")
    options.add_argument("--dict-key-x")
    options.add_argument("--dict-key-y")
    options.add_argument("--backend", choices=_BACKENDS)
    options.add_argument("--stochastic", action="store_true", help="Monte-Carlo GGN")
    options.add_argument("--num-samples", type=int, help="targets drawn for each sample by --stochastic")


def _amount(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _or_auto(parse: Callable[[str], int | float]) -> Callable[[str], int | float | str]:
    """Return a parser that also accepts "auto"."""

    def number_or_auto(text: str) -> int | float | str:
        return text if text == "auto" else parse(text)

    return number_or_auto


def _run_fit(parsed: argparse.Namespace) -> int:
    check_writable(parsed.out, "--out")
    if parsed.weights is not None and parsed.weights.exists() and parsed.out.resolve() == parsed.weights.resolve():
        raise ValueError(f"--out {parsed.out} is the file of --weights; expected another one.")
    if parsed.validation_loader is not None and not parsed.tune_prior:
        raise ValueError("--validation-loader requires --tune-prior; got it without.")
    if parsed.prior_structure != "scalar" and (not parsed.tune_prior or parsed.validation_loader is not None):
        raise ValueError(
            f"--prior-structure {parsed.prior_structure} requires --tune-prior without --validation-loader, whose grid "
            "is of one number."
        )
    device = device_named(parsed.device)
    with _launched_processes(device) as (processes, own):
        return _fit_on(parsed, own, processes)


@contextmanager
def _launched_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun has started, if it has; each of several GPUs belongs to one of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        yield Processes.of(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes.of(), device
    finally:
        torch.distributed.destroy_process_group()


def _fit_on(parsed: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    """Fit on a device, together with other processes; the first one writes."""
    model = trained_model(parsed).to(device)
    la = DebiasedLaplace(model, parsed.likelihood, **_options(parsed))
    loader = call(parsed.loader, "--loader")
    if parsed.dry_run:
        print(la.cost(loader))
        return 0
    validation = None
    if parsed.validation_loader is not None:
        validation = call(parsed.validation_loader, "--validation-loader")
        if not isinstance(validation, Iterable):
            raise ValueError(
                f"--validation-loader {parsed.validation_loader!r} must return a DataLoader; got "
                f"{type(validation).__name__}."
            )
    la.fit(
        loader,
        n_data=parsed.n_data,
        tolerance=parsed.tolerance,
        progress_bar=not parsed.no_progress,
        checkpoint_dir=parsed.checkpoint_dir,
    )
    if parsed.tune_prior:
        method = "marglik" if validation is None else "gridsearch"
        la.optimize_prior_precision(
            method=method,
            prior_structure=parsed.prior_structure,
            val_loader=validation,
            progress_bar=not parsed.no_progress and processes.rank == 0,
        )
    if processes.rank > 0:
        return 0
    _save(la.state_dict(), parsed.out)
    _print_fit(la, parsed)
    return 0


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a state; an earlier one stays where that fails."""
    try:
        with replacing(path) as (part,), part.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's, of a full disk
        raise OSError(f"--out {path} cannot be written: {str(error).splitlines()[0]}") from error


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the given arguments of `DebiasedLaplace`."""
    options = {name: getattr(parsed, name) for name in _LAPLACE_ARGUMENTS if getattr(parsed, name) is not None}
    if parsed.subnetwork_indices is not None:
        options["subnetwork_indices"] = load_tensors(parsed.subnetwork_indices, "--subnetwork-indices")
    if parsed.backend is not None:
        options["backend"] = getattr(curvature, parsed.backend)
    kwargs = {"stochastic": True} if parsed.stochastic else {}
    if parsed.num_samples is not None:
        kwargs["num_samples"] = parsed.num_samples
    return {**options, "backend_kwargs": kwargs} if kwargs else options


def _print_fit(la: DebiasedParametricLaplace, parsed: argparse.Namespace) -> None:
    print(la)
    for summary in (la.choice, la.stopping, la.prior_search):
        if summary is not None:
            print(summary)
    print(f"curvature: {la.curvature_source}; log marginal likelihood {float(la.log_marginal_likelihood()):.4g} nats")
    print(f"wrote {parsed.out}; load it into a DebiasedLaplace of the same model and options with")
    print(f'  la.load_state_dict(torch.load("{parsed.out}", weights_only=True))')


# --- diagnose ---


def _add_diagnose(commands: Commands) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="measure the bias of a mini-batch's curvature and slope",
        description=(
            "Measure, for a range of batch sizes, by how much the leading curvatures of a batch are too large, which "
            "share of its slope is real, and what debiasing would change; and, by one forward pass over all samples, "
            f"how few rows carry the curvature. {_MODEL_ARGUMENTS}"
        ),
    )
    add_model(parser)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", help="default: powers of two from 32 to 256, as data allow"
    )
    parser.add_argument("--draws", type=int, default=3, help="draws of every batch (3)")
    parser.add_argument("--n-data", type=int, help="size of the data set of the likelihood")
    parser.add_argument("--curvature", choices=("ggn", "ef"), default="ggn")
    parser.add_argument("--damping", type=float, default=1e-3, help="damping of conjugate gradients (0.001)")
    parser.add_argument(
        "--prior-precision", type=float, default=1.0, help="prior precision of the posteriors compared (1)"
    )
    parser.add_argument(
        "--no-posteriors", action="store_true", help="compare no posteriors, which takes most of the time"
    )
    parser.add_argument(
        "--figure", type=Path, help="file of a figure of the findings (.svg, .png, …); replaced if it exists"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the draws (0)")
    parser.add_argument("--device", default="auto", help='device: "cpu", "cuda", … or "auto" (default)')
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    parser.set_defaults(run=_run_diagnose)


def _check_format(path: Path) -> None:
    """Check that matplotlib can write the format of a suffix, before any long work.

    Raises:
        ValueError: if it cannot.
    """
    from matplotlib.figure import Figure  # only figures need it

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--figure must end in one of {', '.join(sorted(known))}; got {path}.")


def _run_diagnose(parsed: argparse.Namespace) -> int:
    if parsed.figure is not None:
        check_writable(parsed.figure, "--figure")
        _check_format(parsed.figure)
    device = device_named(parsed.device)
    diagnosis = diagnose(
        trained_model(parsed).to(device),
        parsed.likelihood,
        call(parsed.loader, "--loader"),
        batch_sizes=parsed.batch_sizes,
        n_draws=parsed.draws,
        n_data=parsed.n_data,
        curvature=parsed.curvature,
        damping=parsed.damping,
        prior_precision=None if parsed.no_posteriors else parsed.prior_precision,
        seed=parsed.seed,
        progress_bar=not parsed.no_progress,
    )
    print(diagnosis)
    if parsed.figure is not None:
        diagnosis.save_figure(parsed.figure)
        print(f"figure: {parsed.figure}")
    return 0
