"""Arrays, labels and clusters as the caller gives them, checked once."""

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from debiased_laplace.checks import number, shown

MOST_BINS = 1000  # more say nothing at any size of test set, and take minutes


@dataclass(frozen=True)
class Settings:
    """Options of the numbers of a report: bins of confidence, coverage of intervals, draws behind p-values, seed."""

    n_bins: int = 15
    confidence_level: float = 0.95
    n_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest, highest in (("n_bins", 2, MOST_BINS), ("n_resamples", 2, 2**63 - 1), ("seed", 0, 2**63 - 1)):
            object.__setattr__(self, name, check_whole_number(name, getattr(self, name), lowest, highest))
        level = self.confidence_level
        level = number(level, "confidence_level", low=0, high=1, is_open=True)
        object.__setattr__(self, "confidence_level", level)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML with the standard library's parser, or its backport to Python 3.10."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def check_whole_number(name: str, value: Any, lowest: int, highest: int = 2**63 - 1) -> int:
    """Return a whole number of a range as an int, and refuse anything else."""
    try:
        found = lowest - 1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        found = lowest - 1
    if not lowest <= found <= highest:
        most = f" and at most {highest}" if highest < 2**63 - 1 else ""
        raise ValueError(f"{name} must be a whole number of at least {lowest}{most}; got {shown(value)}.")
    return found


def as_tensor(values: Any, where: str) -> Tensor:
    """Return numpy, torch or nested lists of real numbers as a detached tensor on its own device."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{where}: expected numbers without a mask; got {np.ma.count_masked(values)} masked ones.")
    try:
        x = values.detach() if isinstance(values, Tensor) else torch.as_tensor(_as_array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: expected an array or tensor of numbers; got {type(values).__name__} ({error})."
        ) from error
    if x.is_complex():
        raise ValueError(f"{where}: expected real numbers; got {x.dtype}.")
    return x.cpu() if x.device.type == "mps" else x  # MPS has no float64


def _as_array(values: Any) -> np.ndarray:
    """Return an array in a layout that torch takes; only read-only and strided arrays are copied."""
    if isinstance(values, Sequence) and any(isinstance(v, Tensor) for v in values):
        values = [v.detach().cpu().numpy() if isinstance(v, Tensor) else v for v in values]
    array = np.require(values, requirements=["C_CONTIGUOUS", "WRITEABLE"])
    if array.dtype.kind == "O":
        if not all(isinstance(v, Real) for v in array.flat):
            raise TypeError("not all of its entries are numbers")
        array = array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def name_labels(targets: Any, names: Sequence[str]) -> Any:
    """Return labels that are names of classes as numbers; numbers stay as they are.

    Raises:
        ValueError: for a name of no class, and for text without names of classes.
    """
    if isinstance(targets, Tensor | str) or not hasattr(targets, "__len__"):
        return targets
    array = np.asarray(targets, dtype=object)
    if not array.size or not isinstance(array.flat[0], str):
        return targets
    number_of = {name: i for i, name in enumerate(names)}
    unknown = sorted({str(x) for x in array.flat} - set(number_of))
    if unknown:
        known = f"names out of class_names {list(names)}" if names else "numbers, or names together with class_names"
        raise ValueError(f"Targets must be {known}; got {unknown[0]!r}.")
    return np.array([number_of[str(x)] for x in array.flat], dtype=np.int64).reshape(array.shape)


def name_validation(validation: Any, names: Sequence[str]) -> Any:
    """Return validation data whose targets are numbers."""
    if isinstance(validation, tuple) and len(validation) == 2:
        return validation[0], name_labels(validation[1], names)
    return validation


def first_bad(mask: Tensor, first_row: int = 0) -> str:
    """Describe how many entries of a mask are set, and where the first is; rows are counted from `first_row` on."""
    first = mask.nonzero()[0].tolist()
    place = f"row {first_row + first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")
    return f"{int(mask.sum())} of {mask.numel()} are not, the first in {place}"


def read_labels(targets: Any, *, n: int, n_classes: int, where: str) -> Int[Tensor, " n"]:
    """Return labels in [0, C) from labels (n,) or one-hot rows (n, C)."""
    y = as_tensor(targets, "Targets")
    if y.shape not in ((n,), (n, n_classes)):
        raise ValueError(
            f"{where} have {n} rows and {n_classes} classes, so targets must be labels of shape "
            f"({n},) or one-hot rows of shape ({n}, {n_classes}); got {tuple(y.shape)}."
        )
    if y.is_floating_point() and not bool((y.isfinite() & (y == y.round())).all()):
        raise ValueError(f"Targets must be whole numbers; got {y.dtype} with others among them.")
    y = y.to(torch.int64)
    if y.ndim == 2:
        if not bool(((y == 0) | (y == 1)).all() and (y.sum(dim=1) == 1).all()):
            raise ValueError("One-hot targets must have a single 1 per row and zeros elsewhere.")
        return y.argmax(dim=1)
    if int(y.min()) < 0 or int(y.max()) >= n_classes:
        raise ValueError(
            f"Labels must lie in [0, {n_classes}) for {n_classes} classes; got {int(y.min())} to {int(y.max())}."
        )
    return y


def read_clusters(clusters: Any) -> Int[Tensor, " n"]:
    """Number ids of any kind (text, numbers, dates) from 0 on; arrays of more dimensions are read row by row."""
    import pandas as pd

    if isinstance(clusters, Tensor):
        clusters = clusters.detach().cpu().numpy()
    if isinstance(clusters, (str, bytes, Mapping, set, frozenset)) or not hasattr(clusters, "__len__"):
        raise ValueError(f"clusters must hold one id for each sample; got {type(clusters).__name__}.")
    ids = clusters.ravel() if isinstance(clusters, np.ndarray) else pd.Series(list(clusters), dtype=object).to_numpy()
    try:
        codes, _ = pd.factorize(ids, sort=True)
    except TypeError as error:
        raise ValueError(f"clusters must be ids such as text or whole numbers; got {type(ids[0]).__name__}.") from error
    missing = np.flatnonzero(codes < 0)
    if missing.size:
        raise ValueError(
            f"clusters must not be missing; {missing.size} of {codes.size} are, the first at {missing[0]}."
        )
    return torch.from_numpy(codes.astype(np.int64))
