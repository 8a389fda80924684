"""Arguments of several commands: seeds, devices, files, and models and loaders given as module:callable."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from debiased_laplace.curvature.likelihoods import names_of_likelihoods
from debiased_laplace.files import check_replaceable

Commands = Any
"""Type of the result of `add_subparsers`, which argparse keeps private."""


def seed(text: str) -> int:
    """Parse a seed in the range of torch.

    Raises:
        ArgumentTypeError: if it is out of range.
    """
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^63 - 1; got {text}")
    return value


def device_named(name: str) -> torch.device:
    """Return a usable device; "auto" is torch's accelerator (cuda, mps, xpu, …) if there is one.

    Raises:
        ValueError: if the device cannot be used.
    """
    try:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = torch.device(name) if name != "auto" else accelerator or torch.device("cpu")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {error}") from error
    return device


def check_writable(path: Path, option: str) -> None:
    """Check that a file can be written, before any long work.

    Raises:
        ValueError: if the path is a folder, or its folder does not exist.
        OSError: if the file cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{option} must be a file; {path} is a folder.")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: there is no folder {path.parent}.")
    check_replaceable(path)


def check_folder(path: Path) -> None:
    """Check that --out is not a file.

    Raises:
        ValueError: if it is.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out must be a folder; {path} is a file.")


def make_folder(path: Path) -> None:
    """Create a folder for files, before any long work.

    Raises:
        OSError: if it cannot be created, or files in it cannot.
    """
    path.mkdir(parents=True, exist_ok=True)
    check_replaceable(path / "report.json")


def add_model(parser: argparse._ActionsContainer) -> None:
    """Add the options for a trained model, its data and its likelihood."""
    add_network(parser)
    parser.add_argument("--loader", required=True, metavar="MODULE:CALLABLE", help="returns the training DataLoader")
    parser.add_argument("--likelihood", required=True, choices=names_of_likelihoods())


def add_network(parser: argparse._ActionsContainer) -> None:
    """Add the options for a trained model."""
    parser.add_argument("--model", required=True, metavar="MODULE:CALLABLE", help="returns the torch.nn.Module")
    parser.add_argument("--weights", type=Path, help="state dict of the trained model (loaded with weights_only=True)")


def trained_model(parsed: argparse.Namespace) -> nn.Module:
    """Return the model with the trained weights.

    Raises:
        ValueError: if it is not a module, or the weights do not fit it.
    """
    model = call(parsed.model, "--model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {parsed.model!r} must return a torch.nn.Module; got {type(model).__name__}.")
    if parsed.weights is not None:
        weights = load_tensors(parsed.weights, "--weights")
        try:
            model.load_state_dict(_state_dict(weights, model))
        except Exception as error:
            raise ValueError(f"--weights {parsed.weights} does not fit the model: {error}") from error
    return model


def _state_dict(loaded: Any, model: nn.Module) -> Mapping[str, Any]:
    """Return the model's state dict in a checkpoint: under "state_dict", or with a prefix such as "module.".

    Raises:
        ValueError: if there is none.
    """
    for key in ("state_dict", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        found = f"a mapping of {', '.join(map(repr, loaded))}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f"expected a state dict, names to tensors, as model.state_dict() gives it; got {found}")
    names = set(model.state_dict())
    # DataParallel, torch.compile and training frameworks put a prefix before every name
    for prefix in {name.removesuffix(own) for own in sorted(names)[:1] for name in loaded if name.endswith(own)}:
        if {name.removeprefix(prefix) for name in loaded} == names and len(loaded) == len(names):
            return {name.removeprefix(prefix): value for name, value in loaded.items()}
    return loaded


def call(name: str, option: str) -> Any:
    """Call `module:callable`, with the working directory on the import path, and return the result.

    The directory stays on the path, since workers of a loader import the module too; `main` restores the path.

    Raises:
        ValueError: if there is no such module or callable, or the call fails.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{option} must be given as module:callable; got {name!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name!r} cannot be found: {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option} {name!r} cannot be imported: {_described(error)}") from error
    if not isinstance(function, Callable):  # type: ignore[arg-type]
        raise ValueError(f"{option} must be a callable without arguments; {name!r} is a {type(function).__name__}.")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option} {name!r} failed: {_described(error)}") from error


def _described(error: BaseException) -> str:
    """Return an exception in one line, with the place where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def load_tensors(path: Path, option: str) -> Any:
    """Load a file of tensors without executing code from it.

    Raises:
        ValueError: if it is not such a file.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path} is not a file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{option} {path} cannot be loaded with weights_only=True: {first}") from error
