"""When, with what and on which test set a report was made."""

import hashlib
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

DISTRIBUTIONS = ("debiased-laplace", "netcal", "torch", "numpy", "matplotlib")


def current_time() -> str:
    """ISO 8601 time in UTC; `SOURCE_DATE_EPOCH`, where set, makes builds reproducible.

    Raises:
        ValueError: if that variable is no number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return datetime.now(timezone.utc).replace(microsecond=0).isoformat()
    if not epoch.isascii() or not epoch.isdigit():
        raise ValueError(f"SOURCE_DATE_EPOCH must be a number of seconds; got {epoch!r}.")
    return datetime.fromtimestamp(int(epoch), timezone.utc).isoformat()


def list_versions() -> dict[str, str]:
    """Versions of Python and of what computes and draws, without importing any of it."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a distribution"
    return versions


def digest_targets(targets: Tensor) -> str:
    """SHA-256 of the targets as little-endian int64 or float64 in C order."""
    array = targets.cpu().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
