"""What an interrupted fit has finished, kept in a folder, so that the next attempt goes on from there."""

import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch

from debiased_laplace.files import replacing
from debiased_laplace.processes import from_first_difference, packed, unpacked

Value = TypeVar("Value")

_SECONDS = 60.0
"""Shortest time between two copies of what a pass has found so far."""

_SHARE = 0.05
"""Largest share of a pass that such copies take."""


@dataclass(frozen=True, eq=False)
class FitCheckpoint:
    """Finished parts of a fit, by name; files are written beside the old ones, which are then replaced.

    Attributes:
        folder: of the files; None: nothing is kept.
    """

    folder: Path | None = None

    @classmethod
    def at(cls, directory: Any) -> "FitCheckpoint":
        """Return the checkpoint in a directory, which is created; None: one that keeps nothing.

        Raises:
            ValueError: if it is no path.
            OSError: if the directory cannot be created.
        """
        if directory is None:
            return NO_CHECKPOINT
        try:
            folder = Path(directory) / "debiased_laplace_fit"
        except TypeError as error:
            raise ValueError(f"Expected checkpoint_dir as the path of a folder; got {directory!r:.60}.") from error
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def __bool__(self) -> bool:
        return self.folder is not None

    # a copy belongs to whoever makes it
    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_kept, ()

    def kept(self, name: str, compute: Callable[[], Value], device: torch.device) -> Value:
        """Return what was kept under a name, or else compute and keep it."""
        if self.folder is None:
            return compute()
        found: Value | None = self.read(name, device)
        if found is None:
            found = compute()
            self.write(name, found)
        return found

    def read(self, name: str, device: torch.device) -> Any:
        """Return what was kept under a name; None if nothing was.

        Args:
            name: any text.
            device: of tensors that were not on the CPU.

        Raises:
            ValueError: if the file is damaged.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            return unpacked(path.read_bytes(), device)
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise ValueError(f"The checkpoint {path} is damaged; delete it. ({error})") from error

    def write(self, name: str, value: Any) -> None:
        """Keep a value under a name, in place of an earlier one."""
        if self.folder is not None:
            with replacing(self._path(name)) as (part,):
                part.write_bytes(packed(value))

    def expect(self, what: str, description: str) -> None:
        """Check that the fit is the one that was interrupted.

        Raises:
            ValueError: if another description was kept.
        """
        known = self.kept(f"description of {what}", lambda: description, torch.device("cpu"))
        if known != description:
            before, now = from_first_difference(known, description)
            raise ValueError(
                f"checkpoint_dir holds an interrupted fit with other {what}: {before}; got {now}. "
                "Expected the same fit, or another folder."
            )

    def remove(self) -> None:
        """Delete the files of a fit that has ended."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None  # for the type checker
        return self.folder / f"{sha256(name.encode()).hexdigest()[:32]}.pickle"


class Intervals:
    """Times at which to keep what a pass has found so far: after a minute or more, and rarely if that takes long."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def keep(self, write: Callable[[], None]) -> None:
        """Call a function that writes, if it is time to."""
        started = time.monotonic()
        if started - self._last < max(_SECONDS, self._cost / _SHARE):
            return
        write()
        self._last = time.monotonic()
        self._cost = self._last - started


NO_CHECKPOINT = FitCheckpoint()


def _nothing_kept() -> FitCheckpoint:
    return NO_CHECKPOINT
