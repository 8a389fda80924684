"""Which samples give the directions and which the magnitudes: drawn first, by index, and once."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.errors import OverlapError

Amount = int | float


@dataclass(frozen=True, eq=False)
class SubBatches:
    """Index sets of the direction and the magnitude samples.

    Attributes:
        direction_indices: positions in the data set, increasing, on the CPU.
        magnitude_indices: likewise; disjoint from the direction indices unless `shared`.
        n_data: size N of the data set that the likelihood stands for.
        shared: both sets are the same samples (every sample does both jobs).
        folds: of cross-fitting, the fold (0, 1, …) of every sample; None without.

    Raises:
        OverlapError: if the sets overlap without being shared, or a sample comes twice.
        ValueError: if n_data is below the number of samples.
    """

    direction_indices: Int64[Tensor, " a"]
    magnitude_indices: Int64[Tensor, " b"]
    n_data: int
    shared: bool
    folds: Int64[Tensor, " a"] | None = None

    def __post_init__(self) -> None:
        for indices in (self.direction_indices, self.magnitude_indices):
            if len(indices.unique()) != len(indices):
                raise OverlapError("A sample stands twice in a sub-batch.")
        if self.shared and not torch.equal(self.direction_indices, self.magnitude_indices):
            raise OverlapError("Shared sub-batches must be the same samples.")
        if not self.shared and bool(torch.isin(self.direction_indices, self.magnitude_indices).any()):
            raise OverlapError("Direction and magnitude samples must be disjoint.")
        if self.folds is not None and (not self.shared or self.folds.shape != self.direction_indices.shape):
            raise ValueError("Folds are of shared samples, one number for each.")
        if self.n_data < self.n_samples:
            raise ValueError(
                f"n_data is the size of the data set that the likelihood stands for, the given samples "
                f"included: expected at least {self.n_samples}, got {self.n_data}."
            )

    @property
    def used_indices(self) -> Int64[Tensor, " n"]:
        """All samples that the estimate uses."""
        if self.shared:
            return self.direction_indices
        return torch.cat([self.direction_indices, self.magnitude_indices])

    @property
    def n_samples(self) -> int:
        """Number of samples used."""
        return len(self.used_indices)

    @property
    def direction_share(self) -> float:
        """The share f of the direction samples in the whole data set."""
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
    """Draw the sub-batches from the samples that a loader yields.

    Args:
        indices: positions in the data set.
        direction_samples: how many (int), or which share of the given samples (float below 1).
        magnitude_samples: likewise; None takes all the rest.
        shared: let every drawn sample do both jobs.
        n_data: size of the data set that the likelihood stands for; None: the given samples.
        seed: of the draw.
        n_folds: of cross-fitting, into which shared samples are dealt out evenly, one for each at most; None: without.

    Returns:
        The index sets.

    Raises:
        ValueError: if the amounts are out of range or do not fit into the given samples.
    """
    n = len(indices)
    if n == 0:
        raise ValueError("The loader yields no samples; expected at least 2.")
    n_directions = _count(direction_samples, n, "direction_samples")
    rest = n - n_directions
    n_magnitudes = rest if magnitude_samples is None else _count(magnitude_samples, n, "magnitude_samples")
    if n_directions + n_magnitudes > n:
        raise ValueError(
            f"direction_samples={direction_samples} and magnitude_samples={magnitude_samples} ask for "
            f"{n_directions} + {n_magnitudes} disjoint samples; the loader yields {n}."
        )
    if not shared and n_magnitudes < 2:
        raise ValueError(
            f"Of {n} samples, {n_directions} for the directions leave {n_magnitudes} for the "
            "magnitudes; expected at least 2, for a value and its standard error."
        )
    if shared and n_directions + n_magnitudes < 2:
        raise ValueError(f"Expected at least 2 samples for a curvature and its error; got {n}.")
    n_data = n if n_data is None else n_data
    if n_data < n:
        raise ValueError(
            "n_data is the size of the data set that the likelihood stands for, the given samples "
            f"being part of it: expected at least {n}, got {n_data}."
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
    """The fold of every sample, sizes differing by one at most."""
    if n < n_folds:
        raise ValueError(f"n_folds={n_folds} needs a sample for every fold; expected at least {n_folds}, got {n}.")
    return (torch.arange(n) % n_folds)[torch.randperm(n, generator=generator)]


def _count(amount: Amount, n: int, name: str) -> int:
    """An amount as a number of samples."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ValueError(f"{name} is a number of samples (int) or a share of them (float); got {amount!r}.")
    if isinstance(amount, float):
        if not 0 < amount < 1:
            raise ValueError(f"{name} as a share must lie between 0 and 1; got {amount}.")
        return max(1, round(amount * n))
    if not 1 <= amount <= n:
        raise ValueError(f"{name} must be between 1 and the {n} samples of the loader; got {amount}.")
    return amount
