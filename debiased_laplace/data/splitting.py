"""Random split of the samples into direction and magnitude samples, by position and before loading."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64
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
        copies: positions of further samples that equal one of these, which counts with the sum of their weights.
        weight: sum of the weights of all samples, copies included; None: their number.
        of_rows: whether these are the samples of drawn rows, of which one may give directions and another magnitudes.

    Raises:
        OverlapError: if the sets overlap without being shared or differ although shared, or a sample occurs twice.
        ValueError: if n_data is below the number of samples, or the folds do not match the samples.
    """

    direction_indices: Int64[Tensor, " a"]
    magnitude_indices: Int64[Tensor, " b"]
    n_data: int | float
    shared: bool
    folds: Int64[Tensor, " a"] | None = None
    copies: Int64[Tensor, " c"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    weight: float | None = None
    of_rows: bool = False

    def __post_init__(self) -> None:
        for indices in (self.direction_indices, self.magnitude_indices):
            if len(indices.unique()) != len(indices):
                raise OverlapError(f"Expected distinct positions in a sub-batch; got {indices.tolist()}.")
        if self.shared and not torch.equal(self.direction_indices, self.magnitude_indices):
            raise OverlapError("Expected the same samples in shared sub-batches; got different ones.")
        n_common = int(torch.isin(self.direction_indices, self.magnitude_indices).sum())
        if not self.shared and not self.of_rows and n_common:
            raise OverlapError(f"Expected disjoint direction and magnitude samples; got {n_common} in both sets.")
        if self.folds is not None and (not self.shared or self.folds.shape != self.direction_indices.shape):
            raise ValueError("Expected folds only for shared samples, one number for each.")
        if self.n_data < self.total_weight * (1 - 1e-6):
            total = f"{self.n_samples}" if self.weight is None else f"the sum of their weights, {self.weight:g}"
            raise ValueError(
                f"n_data is the size of the data set, including the given samples: expected at least {total}, "
                f"got {self.n_data:g}."
            )

    @property
    def used_indices(self) -> Int64[Tensor, " n"]:
        """Positions of all samples of the estimate."""
        if self.shared:
            return self.direction_indices
        if self.of_rows:
            return torch.cat([self.direction_indices, self.magnitude_indices]).unique()
        return torch.cat([self.direction_indices, self.magnitude_indices])

    @property
    def n_samples(self) -> int:
        """Number of samples of the estimate."""
        return len(self.used_indices)

    @property
    def total_weight(self) -> float:
        """Sum of the weights of all samples, copies included."""
        return self.n_samples if self.weight is None else self.weight

    @property
    def n_data_in_samples(self) -> float:
        """Size N of the data set as a number of samples with the mean weight of these."""
        # exactly the number of samples if they are all the data
        return self.n_samples * (self.n_data / self.total_weight)

    def merged(self, kept: Bool[Tensor, " n"], *, n_data: int | float, weight: float | None, seed: int) -> "SubBatches":
        """Return the sub-batches without copies of their samples, which are dealt to folds anew.

        Args:
            kept: mask of `used_indices`.
            n_data: size N of the data set.
            weight: sum of the weights of all samples, copies included; None: their number.
            seed: of the folds.

        Raises:
            ValueError: if too few distinct samples are left.
        """
        used = self.used_indices
        n_directions = len(self.direction_indices)
        first, second = used[:n_directions][kept[:n_directions]], used[n_directions:][kept[n_directions:]]
        copies = used[~kept].sort().values
        sizes = [len(first)] if self.shared else [len(first), len(second)]
        if sizes[-1] < 2 or min(sizes) < 1:
            raise ValueError(
                f"Expected at least 2 distinct samples for the magnitudes, and 1 for the directions; {len(used)} "
                f"samples have {int(kept.sum())} distinct ones, in sets of {sizes}."
            )
        folds = self.folds
        if folds is not None and len(copies):
            n_folds = min(int(folds.max()) + 1, len(first))
            folds = deal(len(first), n_folds, torch.Generator().manual_seed(seed))
        return SubBatches(
            first, first if self.shared else second, n_data, self.shared, folds, copies=copies, weight=weight
        )


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
