"""What several commands share: how objects, devices and files are named on the command line."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Commands = Any
"""What `add_subparsers` returns."""


def seed(text: str) -> int:
    """A seed as torch takes it."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1; got {text}")
    return value


def device_named(name: str) -> torch.device:
    """A device that can be computed on; "auto" takes a GPU where there is one.

    Raises:
        ValueError: if it cannot be used.
    """
    try:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {error}") from error
    return device


def called(name: str, option: str) -> Any:
    """What the callable `module:callable` returns; modules of the working directory are found.

    Raises:
        ValueError: if there is no such module or callable, or it fails.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{option} names a callable as module:callable; got {name!r}.")
    try:
        with _working_directory_importable():
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name!r} cannot be found: {error}") from error
    if not isinstance(found, Callable):  # type: ignore[arg-type]
        raise ValueError(f"{option} names a callable without arguments; {name!r} is a {type(found).__name__}.")
    try:
        with _working_directory_importable():
            return found()
    except Exception as error:
        raise ValueError(f"{option} {name!r} failed: {type(error).__name__}: {error}") from error


def file_to_write(path: Path, option: str) -> None:
    """Find out now, not after the work, that a file cannot be written.

    Raises:
        ValueError: if the path is a folder.
        OSError: if it cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{option} must be a file; {path} is a folder.")
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
