"""Directions and rows of which each of several processes holds the entries of adjacent parameters.

Vectors of all parameters are whole in every process, as the model is. Sums over parameters are those of all processes.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.processes import Processes

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Shard:
    """Adjacent parameters, whose entries of directions and rows this process holds.

    Attributes:
        processes: each of which holds some; all of them call every method in the same order.
        sizes: number of entries of every parameter.
        numbers: of the parameters.
    """

    processes: Processes
    sizes: tuple[int, ...]
    numbers: slice

    @classmethod
    def of(cls, processes: Processes, sizes: Sequence[int]) -> "Shard":
        """Divide parameters among processes, about evenly and at least one for each.

        Raises:
            ValueError: if there are fewer parameters than processes.
        """
        n, total = len(sizes), sum(sizes)
        if n < processes.size:
            raise ValueError(
                f"shard_directions divides parameter tensors among processes: expected at least {processes.size} of "
                f"them; got {n}."
            )
        ends, edges = [0, *accumulate(sizes)], [0]
        for number in range(1, processes.size):
            least, most = edges[-1] + 1, n - (processes.size - number)
            target = total * number / processes.size
            edges.append(min(range(least, most + 1), key=lambda i, target=target: abs(ends[i] - target)))  # type: ignore[misc]
        own = list(pairwise([*edges, n]))[processes.rank]
        return cls(processes, tuple(sizes), slice(*own))

    # a copy belongs to the same processes; in another process the entries would be taken for all
    def __deepcopy__(self, memo: dict[int, Any]) -> "Shard":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise pickle.PicklingError(
            "A posterior whose directions are divided among processes cannot be pickled; expected state_dict() of each "
            "process, which load_state_dict joins."
        )

    @property
    def place(self) -> slice:
        """Place of the entries in a vector of all parameters."""
        ends = [0, *accumulate(self.sizes)]
        return slice(ends[self.numbers.start], ends[self.numbers.stop])

    @property
    def n_parameters(self) -> int:
        """Number of entries of all parameters."""
        return sum(self.sizes)

    @property
    def share(self) -> float:
        """Share of all entries that this process holds."""
        return sum(self.sizes[self.numbers]) / max(1, self.n_parameters)

    def own(self, x: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch p"]:
        """Return the entries of vectors that belong to this process."""
        return x[..., self.place]

    def joined(self, own: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch P"]:
        """Return vectors of all parameters from the entries of all processes."""
        return torch.cat(self.processes.gathered("entries of vectors", own, own.device), dim=-1)

    def summed(self, own: Tensor) -> Tensor:
        """Return the sum over the parameters of all processes."""
        total = own.contiguous().clone()
        self.processes.add([total])
        return total

    def same(self, value: Value, device: torch.device) -> Value:
        """Return the value of the first process, for decompositions that are not unique."""
        sent = value if self.processes.rank == 0 else None
        return self.processes.gathered("a decomposition", sent, device)[0]  # type: ignore[return-value]

    def hyper_parameter(self, value: Any) -> Any:
        """Return a hyper-parameter as it is, whose gradient is the sum over the parameters of all processes."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        return _HyperParameter.apply(value, self)


class _HyperParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Shard) -> Tensor:
        """Return the value."""
        ctx.shard = shard
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """Return the sum of the gradients of all processes."""
        return ctx.shard.summed(upstream[0]), None
