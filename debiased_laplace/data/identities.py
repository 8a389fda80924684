"""Identification of samples by hash, or by position if loading is random."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SampleIdentities:
    """Hashes and positions of samples, by which two sets of samples are compared.

    A sample is identified by the hash of its input and target. If loading is random (augmentation), hashes differ at
    every pass, and it is identified by its position in the root data set, the one below all `Subset`s.

    Attributes:
        hashes: hashes of input and target, as loaded once.
        positions: positions in the root data set.
        n_root: length of the root data set.
        augmented: whether loading is random.
        root: the root data set; None if restored from a state.
    """

    hashes: Int64[Tensor, " n"]
    positions: Int64[Tensor, " n"]
    n_root: int
    augmented: bool
    root: Any = None

    def __len__(self) -> int:
        return len(self.hashes)

    def at(self, chosen: Bool[Tensor, " n"]) -> "SampleIdentities":
        """Return the identities of some of the samples."""
        return replace(self, hashes=self.hashes[chosen], positions=self.positions[chosen])

    def distinct(self, weights: Float[Tensor, " n"]) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """Merge equal samples: the one at the lowest position stands for all of them, with the sum of their weights.

        Args:
            weights: weight of each sample.

        Returns:
            Mask of the samples that are kept, and the weight of every sample with its copies. If loading is random,
            equal samples are not known, and all are kept.
        """
        if self.augmented:
            return torch.ones(len(self), dtype=torch.bool), weights
        kinds, kind = torch.unique(self.hashes, return_inverse=True)
        lowest = self.positions.new_full((len(kinds),), torch.iinfo(torch.int64).max)
        lowest = lowest.scatter_reduce(0, kind, self.positions, "amin")
        return lowest[kind] == self.positions, weights.new_zeros(len(kinds)).index_add(0, kind, weights)[kind]

    def by_position(self, other: "SampleIdentities") -> bool:
        """Return whether the two sets have to be compared by position."""
        return self.augmented or other.augmented

    def same_root(self, other: "SampleIdentities") -> bool:
        """Return whether the positions of both sets refer to the same data set."""
        # without the data set itself, equal lengths are the best evidence
        if self.root is None or other.root is None:
            return self.n_root == other.n_root
        return self.root is other.root

    def shared_with(self, other: "SampleIdentities") -> int:
        """Return how many of these samples are in the other set.

        Warns:
            UserWarning: if the sets are of different data sets and loading is random, so that they cannot be compared.
        """
        if not self.by_position(other):
            return int(torch.isin(self.hashes, other.hashes).sum())
        if self.same_root(other):
            return int(torch.isin(self.positions, other.positions).sum())
        warnings.warn(
            "Samples of different data sets cannot be compared if loading is random (augmentation); assuming that "
            "the two sets share no samples. Use Subsets of one data set for both.",
            stacklevel=3,
        )
        return 0

    def keys(self, other: "SampleIdentities") -> tuple[Tensor, Tensor]:
        """Return comparable identifiers of the samples of both sets: positions or hashes."""
        if self.by_position(other):
            return self.positions, other.positions
        return self.hashes, other.hashes
