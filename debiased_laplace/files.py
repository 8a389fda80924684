"""Writing of files: beside the old ones, which are then replaced."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Yield paths to write to; on exit the files there replace the given ones, after an exception none of them.

    Links are followed. A device or a pipe is written to directly.

    Args:
        paths: files to replace or create; their folders exist.

    Raises:
        OSError: if a file cannot be written.
    """
    pairs = [_beside(path) for path in paths]
    moves = [(part, target) for part, target in pairs if part != target]
    try:
        yield [part for part, _ in pairs]
        for part, target in moves:
            if target.exists():
                shutil.copymode(target, part)
        for part, target in moves:
            os.replace(part, target)
    finally:
        for part, _ in moves:
            part.unlink(missing_ok=True)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Check that `replacing` can write there, before any long work.

    Raises:
        OSError: if it cannot.
    """
    part, target = _beside(path)
    if target.exists():
        with target.open("ab"):
            pass
    if part != target:
        part.touch()
        part.unlink()


def _beside(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the path to write to, and the path that it replaces: the same for what is no regular file."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        return target, target
    # of the same suffix, which tells some writers the format
    return target.with_name(f".{os.getpid()}.{target.name}"), target
