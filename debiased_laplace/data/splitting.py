"""Random split of the samples into direction and magnitude samples, by position and before loading."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.checks import integer
from debiased_laplace.errors import OverlapError

Amount = int | float


@dataclass(frozen=True, eq=False)
class SubBatches:
    """Positions of the direction and the magnitude samples.

    Attributes:
        direction_indices: positions in the data set, increasing, on the CPU.
        magnitude_indices: likewise; disjoint from the direction indices unless `shared`.
        n_data: size N of the data set of the likelihood.
        shared: whether both sets are the same samples.
        folds: fold (0, 1, …) of every sample for cross-fitting; None without.

    Raises:
        OverlapError: if the sets overlap without being shared or differ although shared, or a sample occurs twice.
        ValueError: if n_data is below the number of samples, or the folds do not match the samples.
    """

    direction_indices: Int64[Tensor, " a"]
    magnitude_indices: Int64[Tensor, " b"]
    n_data: int
    shared: bool
    folds: Int64[Tensor, " a"] | None = None

    def __post_init__(self) -> None:
        for indices in (self.direction_indices, self.magnitude_indices):
            if len(indices.unique()) != len(indices):
                raise OverlapError(f"Expected distinct positions in a sub-batch; got {indices.tolist()}.")
        if self.shared and not torch.equal(self.direction_indices, self.magnitude_indices):
            raise OverlapError("Expected the same samples in shared sub-batches; got different ones.")
        n_common = int(torch.isin(self.direction_indices, self.magnitude_indices).sum())
        if not self.shared and n_common:
            raise OverlapError(f"Expected disjoint direction and magnitude samples; got {n_common} in both sets.")
        if self.folds is not None and (not self.shared or self.folds.shape != self.direction_indices.shape):
            raise ValueError("Expected folds only for shared samples, one number for each.")
        if self.n_data < self.n_samples:
            raise ValueError(
                f"n_data is the size of the data set, including the given samples: expected at least {self.n_samples}, "
                f"got {self.n_data}."
            )

    @property
    def used_indices(self) -> Int64[Tensor, " n"]:
        """Positions of all samples of the estimate."""
        if self.shared:
            return self.direction_indices
        return torch.cat([self.direction_indices, self.magnitude_indices])

    @property
    def n_samples(self) -> int:
        """Number of samples of the estimate."""
        return len(self.used_indices)

    @property
    def direction_share(self) -> float:
        """Share f of the direction samples in the data set."""
        return len(self.direction_indices) / self.n_data


def draw_sub_batches(
    indices: Int64[Tensor, " n"],
    *,
    direction_samples: Amount,
    magnitude_samples: Amount | None,
    shared: bool,
    n_data: int | None,
    seed: int,
    n_folds: int | None = None,
) -> SubBatches:
    """Draw direction and magnitude samples from the samples of a loader.

    Args:
        indices: positions of the samples in the data set.
        direction_samples: number (int), or share of the given samples (float below 1).
        magnitude_samples: likewise; None: all others.
        shared: use every drawn sample for directions and magnitudes.
        n_data: size of the data set of the likelihood; None: number of given samples.
        seed: seed of the draw.
        n_folds: number of folds for cross-fitting of shared samples, reduced to their number; None: no folds.

    Returns:
        The sub-batches.

    Raises:
        ValueError: if an amount or n_data is out of range, or the amounts exceed the given samples.
    """
    n = len(indices)
    if n == 0:
        raise ValueError("The loader yields no samples; expected at least 2.")
    n_directions = _count(direction_samples, n, "direction_samples")
    rest = n - n_directions
    n_magnitudes = rest if magnitude_samples is None else _count(magnitude_samples, n, "magnitude_samples")
    if n_directions + n_magnitudes > n:
        raise ValueError(
            f"direction_samples={direction_samples} and magnitude_samples={magnitude_samples} require "
            f"{n_directions} + {n_magnitudes} disjoint samples; the loader yields {n}."
        )
    if not shared and n_magnitudes < 2:
        raise ValueError(
            f"Of {n} samples, {n_directions} for the directions leave {n_magnitudes} for the magnitudes; expected "
            "at least 2, for a mean and its standard error."
        )
    if shared and n_directions + n_magnitudes < 2:
        raise ValueError(f"Expected at least 2 samples, for a mean curvature and its standard error; got {n}.")
    n_data = n if n_data is None else n_data
    if n_data < n:
        raise ValueError(
            f"n_data is the size of the data set, including the given samples: expected at least {n}, got {n_data}."
        )
    generator = torch.Generator().manual_seed(seed)
    order = indices.sort().values[torch.randperm(n, generator=generator)]
    first = order[:n_directions].sort().values
    second = order[n_directions : n_directions + n_magnitudes].sort().values
    if shared:
        both = torch.cat([first, second]).sort().values
        folds = None if n_folds is None else deal(len(both), min(n_folds, len(both)), generator)
        return SubBatches(both, both, n_data, shared=True, folds=folds)
    return SubBatches(first, second, n_data, shared=False)


def deal(n: int, n_folds: int, generator: torch.Generator) -> Tensor:
    """Deal n samples randomly to folds whose sizes differ by at most one, and return the fold of each.

    Raises:
        ValueError: if there are fewer samples than folds.
    """
    if n < n_folds:
        raise ValueError(f"n_folds={n_folds} needs a sample for every fold; expected at least {n_folds}, got {n}.")
    return (torch.arange(n) % n_folds)[torch.randperm(n, generator=generator)]


def _count(amount: Amount, n: int, name: str) -> int:
    """Return an amount as a number of samples."""
    if isinstance(amount, float):
        if not 0 < amount < 1:
            raise ValueError(f"{name} as a share must be between 0 and 1; got {amount}.")
        return max(1, round(amount * n))
    number = integer(amount, name, also=" (number of samples) or a float (share of them)")
    if not 1 <= number <= n:
        raise ValueError(f"{name} must be between 1 and the {n} samples of the loader; got {number}.")
    return number
