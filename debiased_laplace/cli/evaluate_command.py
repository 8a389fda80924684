"""The command `evaluate`: from the states of posteriors and a loader to a report."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from laplace import curvature
from torch import nn

from debiased_laplace.calibration.contents import Task
from debiased_laplace.calibration.evaluate import evaluate
from debiased_laplace.calibration.predict import infer_task
from debiased_laplace.cli.arguments import (
    Commands,
    add_network,
    call,
    check_folder,
    device_named,
    load_tensors,
    make_folder,
    trained_model,
)
from debiased_laplace.cli.report_commands import add_presentation, presentation, publish, read_given_thresholds
from debiased_laplace.curvature.likelihoods import WITH_CLASS_WEIGHTS
from debiased_laplace.posterior.factory import CLASSES, DebiasedLaplace
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace

_BACKENDS: dict[str, dict[str, Any]] = {
    "GGN": {},
    "Monte-Carlo GGN": {"backend_kwargs": {"stochastic": True}},
    "EF": {"backend": curvature.CurvlinopsEF},
    "Hessian": {"backend": curvature.CurvlinopsHessian},
}
"""Constructor arguments by the kind of curvature; predictions do not depend on who computed it."""

_LOADERS = {
    "validation_loader": "labelled samples outside of training and test set, for temperature scaling of the baseline",
    "held_out_loader": "training samples left out of every fit, to compare the posteriors by their held-out KL",
    "fitted_loader": "the samples that were fitted, for their exact share of the held-out KL",
}


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="write a calibration report of stored posteriors on a test loader",
        description=(
            "Predict a test set with the network and with one or more posteriors that `fit` has written, in one pass, "
            "and write a calibration report. --model and the loaders are callables without arguments, given as "
            "module:callable and imported with the working directory on the path."
        ),
    )
    inputs = parser.add_argument_group("model, posteriors and data")
    add_network(inputs)
    inputs.add_argument(
        "--state", type=Path, nargs="+", required=True, help="states of posteriors; each is named as its file"
    )
    inputs.add_argument("--loader", required=True, metavar="MODULE:CALLABLE", help="returns the test DataLoader")
    inputs.add_argument(
        "--ood-loader",
        action="append",
        default=[],
        metavar="NAME=MODULE:CALLABLE",
        help="returns a DataLoader of inputs out of distribution; may be repeated",
    )
    for name, text in _LOADERS.items():
        inputs.add_argument(f"--{name.replace('_', '-')}", metavar="MODULE:CALLABLE", help=f"returns {text}")
    inputs.add_argument("--subnetwork-indices", type=Path, help="as of `fit`, for posteriors of a subnetwork")
    inputs.add_argument("--dict-key-x", default="input_ids")
    inputs.add_argument("--dict-key-y", default="labels")
    inputs.add_argument("--device", default="auto", help='device: "cpu", "cuda", … or "auto" (default)')
    inputs.add_argument("--no-progress", action="store_true", help="show no progress bars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report; may exist")
    add_presentation(parser)
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    check_folder(parsed.out)
    names = [path.stem for path in parsed.state]
    if len(set(names)) < len(names):
        raise ValueError(f"--state: posteriors are named as their files; expected different names, got {names}.")
    device = device_named(parsed.device)
    model = trained_model(parsed).to(device).eval()
    posteriors = {path.stem: _posterior(path, model, parsed) for path in parsed.state}
    task: Task = parsed.task or _task_of(next(iter(posteriors.values())))
    thresholds = read_given_thresholds(parsed, task)
    loaders: dict[str, Any] = {
        name: _loader(getattr(parsed, name), name) for name in _LOADERS if getattr(parsed, name) is not None
    }
    ood = dict(_named_loader(text) for text in parsed.ood_loader)
    loader = _loader(parsed.loader, "loader")
    make_folder(parsed.out)
    report = evaluate(
        posteriors,
        loader,
        task=task,
        ood_loaders=ood or None,
        **loaders,
        progress_bar=not parsed.no_progress,
        thresholds=thresholds,
        **presentation(parsed),
    )
    return publish(report, parsed)


def _task_of(la: DebiasedParametricLaplace) -> Task:
    task = infer_task({"": la})
    return "binary" if task == "multiclass" and la.n_outputs == 2 else task


def _posterior(path: Path, model: nn.Module, parsed: argparse.Namespace) -> DebiasedParametricLaplace:
    """Return the posterior of a state.

    Raises:
        ValueError: if it is not the state of a posterior of this model.
    """
    state = load_tensors(path, "--state")
    keys = {cls.__name__: key for key, cls in CLASSES.items()}
    known = isinstance(state, dict) and state.get("cls_name") in keys and state.get("curvature") in _BACKENDS
    if not known:
        raise ValueError(f"--state {path} is not the state of a posterior, as `fit` writes it.")
    options: dict[str, Any] = {"dict_key_x": parsed.dict_key_x, "dict_key_y": parsed.dict_key_y}
    subset, structure = keys[state["cls_name"]]
    if subset == "subnetwork":
        if parsed.subnetwork_indices is None:
            raise ValueError(f"--state {path} is of a subnetwork: expected --subnetwork-indices, as of `fit`.")
        options["subnetwork_indices"] = load_tensors(parsed.subnetwork_indices, "--subnetwork-indices")
    likelihood, _, weights = str(state.get("likelihood")).partition(WITH_CLASS_WEIGHTS)
    try:
        if weights:
            options["class_weights"] = json.loads(weights)
        la = DebiasedLaplace(model, likelihood, subset, structure, **options, **_BACKENDS[state["curvature"]])
        la.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"--state {path}: {error}") from error
    return la


def _loader(name: str, option: str) -> Iterable[Any]:
    option = f"--{option.replace('_', '-')}"
    loader: Any = call(name, option)
    if not isinstance(loader, Iterable):
        raise ValueError(f"{option} {name!r} must return a DataLoader; got {type(loader).__name__}.")
    return loader


def _named_loader(text: str) -> tuple[str, Iterable[Any]]:
    name, _, function = text.partition("=")
    if not name or not function:
        raise ValueError(f"--ood-loader must be given as name=module:callable; got {text!r}.")
    return name, _loader(function, "ood_loader")
