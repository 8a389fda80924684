"""`debiased-laplace fit`: a posterior of a trained model, written as a state that `DebiasedLaplace` loads again."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from laplace import curvature

from debiased_laplace.cli.arguments import Commands, called, device_named, file_to_write, seed
from debiased_laplace.cli.models import add_model, loaded, trained_model
from debiased_laplace.posterior.factory import DebiasedLaplace
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace

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
_OF_THE_POSTERIOR = (
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
    "kfac_approx",
    "prior_precision",
    "prior_mean",
    "sigma_noise",
    "temperature",
    "last_layer_name",
    "dict_key_x",
    "dict_key_y",
)
"""Arguments of `DebiasedLaplace` that go to it as they are; those not given keep its defaults."""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "fit",
        help="fit a posterior of a trained model and write its state",
        description=(
            "Fit a Laplace posterior of a trained model. --model and --loader name callables without arguments as "
            "module:callable; modules of the working directory are found. Options that are not given have the defaults "
            "of DebiasedLaplace, whose documentation says what they mean."
        ),
    )
    _add_inputs(parser)
    _add_options(parser)
    parser.set_defaults(run=_run)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    given = parser.add_argument_group("what to fit")
    add_model(given)
    given.add_argument("--out", type=Path, required=True, help="file of the state; replaced if it exists")
    given.add_argument("--n-data", type=int, help="size of the data set that the likelihood stands for")
    given.add_argument("--tolerance", type=float, help="nats of held-out KL: read samples until that gains less")
    given.add_argument("--device", default="auto", help='where to compute: "cpu", "cuda", … or "auto" (default)')
    given.add_argument(
        "--tune-prior",
        action="store_true",
        help="tune the prior precision: by marginal likelihood, or on the data of --validation-loader",
    )
    given.add_argument(
        "--validation-loader",
        metavar="MODULE:CALLABLE",
        help="returns a DataLoader of samples that were not trained on, for a grid search by --tune-prior",
    )
    given.add_argument("--no-progress", action="store_true", help="show no progress")


def _add_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("arguments of DebiasedLaplace")
    options.add_argument("--subset-of-weights", choices=("all", "last_layer", "subnetwork"))
    options.add_argument("--hessian-structure", choices=("lowrank", "kron", "full"))
    options.add_argument("--rank", type=_or_auto(int), help='a number of directions, or "auto"')
    options.add_argument("--magnitudes", choices=("held_out", "cross_fitted", "same_batch", "auto"))
    options.add_argument(
        "--direction-samples", type=_or_auto(_amount), help='a number (64) or a share (0.5) of the samples, or "auto"'
    )
    options.add_argument("--magnitude-samples", type=_amount, help="likewise; all the rest if not given")
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


def _or_auto(read: Callable[[str], int | float]) -> Callable[[str], int | float | str]:
    """Reads a number, or the word that leaves it to be chosen."""

    def number_or_auto(text: str) -> int | float | str:
        return text if text == "auto" else read(text)

    return number_or_auto


def _run(parsed: argparse.Namespace) -> int:
    file_to_write(parsed.out, "--out")
    if parsed.validation_loader is not None and not parsed.tune_prior:
        raise ValueError("--validation-loader is what --tune-prior searches on; got it without --tune-prior.")
    device = device_named(parsed.device)
    model = trained_model(parsed).to(device)
    la = DebiasedLaplace(model, parsed.likelihood, **_options(parsed))
    loader = called(parsed.loader, "--loader")
    validation = None
    if parsed.validation_loader is not None:
        validation = called(parsed.validation_loader, "--validation-loader")
    la.fit(loader, n_data=parsed.n_data, tolerance=parsed.tolerance, progress_bar=not parsed.no_progress)
    if parsed.tune_prior:
        method = "marglik" if validation is None else "gridsearch"
        la.optimize_prior_precision(method=method, val_loader=validation, progress_bar=not parsed.no_progress)
    torch.save(la.state_dict(), parsed.out)
    _report(la, parsed)
    return 0


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `DebiasedLaplace`, as far as they were given."""
    options = {name: getattr(parsed, name) for name in _OF_THE_POSTERIOR if getattr(parsed, name) is not None}
    if parsed.subnetwork_indices is not None:
        options["subnetwork_indices"] = loaded(parsed.subnetwork_indices, "--subnetwork-indices")
    if parsed.backend is not None:
        options["backend"] = getattr(curvature, parsed.backend)
    kwargs = {"stochastic": True} if parsed.stochastic else {}
    if parsed.num_samples is not None:
        kwargs["num_samples"] = parsed.num_samples
    return {**options, "backend_kwargs": kwargs} if kwargs else options


def _report(la: DebiasedParametricLaplace, parsed: argparse.Namespace) -> None:
    print(la)
    for found in (la.choice, la.stopping, la.prior_search):
        if found is not None:
            print(found)
    print(f"curvature: {la.curvature_source}; log marginal likelihood {float(la.log_marginal_likelihood()):.4g} nats")
    print(f"written to {parsed.out}; to use it, make a DebiasedLaplace of the same model and options, then")
    print(f'  la.load_state_dict(torch.load("{parsed.out}", weights_only=True))')
