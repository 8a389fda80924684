"""Whom a sample belongs to: groups that are judged apart, and clusters that depend on each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

MOST_GROUPS = 100


@dataclass(frozen=True, eq=False)
class Grouping:
    """Samples in groups.

    Attributes:
        name: of the grouping.
        labels: name of each group, in the order of their values.
        codes: number of each sample's group.
    """

    name: str
    labels: tuple[str, ...]
    codes: Int[Tensor, " n"]


def read_groupings(groups: Any) -> tuple[Grouping, ...]:
    """Groupings from a mapping of names to the group of each sample, or from one such sequence.

    Raises:
        ValueError: for names that are not text, missing groups, or more than a hundred groups.
    """
    if groups is None:
        return ()
    named = groups if isinstance(groups, Mapping) else {"group": groups}
    found = []
    for name, ids in named.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"The name of a grouping must be text; got {name!r}.")
        grouping = read_ids(ids, name, where=f"groups[{name!r}]")
        if len(grouping.labels) > MOST_GROUPS:
            raise ValueError(
                f"groups[{name!r}] has {len(grouping.labels)} groups; a table holds at most {MOST_GROUPS}. "
                "Samples that depend on each other are told by clusters=."
            )
        found.append(grouping)
    return tuple(found)


def read_ids(ids: Any, name: str, *, where: str) -> Grouping:
    """Numbers for ids of any kind that can be compared.

    Args:
        ids: one per sample; an array of more dimensions is read row by row.
        name: of the grouping.
        where: what they are, for messages.

    Raises:
        ValueError: for no sequence, or missing ids (None, NaN).
    """
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, (str, bytes, Mapping)) or not hasattr(ids, "__len__"):
        raise ValueError(f"{where} must hold one id for each sample; got {type(ids).__name__}.")
    array = ids if isinstance(ids, np.ndarray) else None
    if array is None or array.dtype.kind not in "biufUS":
        return _number_objects(list(ids) if array is None else array.ravel().tolist(), name, where)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{where} must not be missing; {int(np.isnan(array).sum())} of {array.size} are NaN.")
    values, codes = np.unique(array.ravel(), return_inverse=True)
    return Grouping(name, tuple(str(v) for v in values.tolist()), torch.from_numpy(codes.ravel().astype(np.int64)))


def _number_objects(ids: list[Any], name: str, where: str) -> Grouping:
    missing = [i for i, v in enumerate(ids) if v is None or v != v]  # NaN alone differs from itself
    if missing:
        raise ValueError(
            f"{where} must not be missing; {len(missing)} of {len(ids)} are, the first of sample {missing[0]}."
        )
    try:
        distinct = set(ids)
    except TypeError as error:
        raise ValueError(f"{where} must be ids such as text or whole numbers; got {type(ids[0]).__name__}.") from error
    try:
        ordered = sorted(distinct)
    except TypeError:  # ids of several kinds
        ordered = sorted(distinct, key=lambda v: (type(v).__name__, str(v)))
    number = {v: i for i, v in enumerate(ordered)}
    codes = torch.tensor([number[v] for v in ids], dtype=torch.int64)
    return Grouping(name, tuple(str(v) for v in ordered), codes)
