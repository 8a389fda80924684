"""By what a sample is known, so that one that was fitted is recognized wherever it turns up."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SampleIdentities:
    """Hashes of samples, and their positions in the data set for when hashes cannot tell.

    A sample is its input and target. Where loading is random (augmentation) the same sample hashes differently each
    time, and its position in the root data set, below any chain of `Subset`, is its identity.

    Attributes:
        hashes: of input and target, as loaded once.
        positions: in the root data set.
        n_root: length of the root data set.
        augmented: whether loading is random.
        root: the root data set itself; None after loading from a state.
    """

    hashes: Int64[Tensor, " n"]
    positions: Int64[Tensor, " n"]
    n_root: int
    augmented: bool
    root: Any = None

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def n_repeated(self) -> int:
        """Samples that are equal to another one."""
        return 0 if self.augmented else len(self.hashes) - len(self.hashes.unique())

    def by_position(self, other: "SampleIdentities") -> bool:
        """Whether these two sets have to be compared by position."""
        return self.augmented or other.augmented

    def same_root(self, other: "SampleIdentities") -> bool:
        """Whether positions of the two sets mean the same samples, as far as can be known."""
        if self.root is None or other.root is None:
            return self.n_root == other.n_root
        return self.root is other.root

    def shared_with(self, other: "SampleIdentities") -> int:
        """How many of these samples the other set has too.

        Warns:
            UserWarning: if they come from different data sets whose loading is random: nothing can tell.
        """
        if not self.by_position(other):
            return int(torch.isin(self.hashes, other.hashes).sum())
        if self.same_root(other):
            return int(torch.isin(self.positions, other.positions).sum())
        warnings.warn(
            "Two sets of samples from different data sets whose loading is random (augmentation) cannot "
            "be compared: whether they share samples is not known. Take both as Subsets of one data set.",
            stacklevel=3,
        )
        return 0

    def keys(self, other: "SampleIdentities") -> tuple[Tensor, Tensor]:
        """What identifies the samples of both sets, in a form that compares."""
        if self.by_position(other):
            return self.positions, other.positions
        return self.hashes, other.hashes
