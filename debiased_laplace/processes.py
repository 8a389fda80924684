"""Processes of torch.distributed that share passes over samples.

Every process runs the whole of a fit; only passes over samples are shared out, and what they find is exchanged, so that
all processes have the same numbers afterwards. A single process exchanges nothing, and imports nothing.
"""

import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from threading import Timer
from typing import Any, TypeVar

import torch
from torch import Tensor

from debiased_laplace.errors import ProcessError

PATIENCE = 60.0
"""Seconds of waiting for other processes after which a warning says so."""

Value = TypeVar("Value")
Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class Processes:
    """Processes of a group, each of which calls every method in the same order.

    Attributes:
        group: of torch.distributed; None for a single process, or the default group.
        rank: number of this process.
        size: number of processes.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Any = None) -> "Processes":
        """Return the processes of a group; None: of the default one if there is one, else this process alone.

        Raises:
            ValueError: if the group is none of torch.distributed, or this process does not belong to it.
        """
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            if group is not None:
                raise ValueError(
                    f"Expected process_group as a group of torch.distributed, after init_process_group; got {group!r}."
                )
            return ALONE
        try:
            rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"Expected process_group as a group of torch.distributed; got {group!r}.") from error
        if rank < 0:
            raise ValueError("This process does not belong to process_group; expected one of its own.")
        return cls(group, rank, size) if size > 1 else ALONE

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.size > 1

    # Groups cannot be copied or pickled, and a copy belongs to whoever makes it.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _alone, ()

    def is_mine(self, number: int) -> bool:
        """Return whether the part of a pass with this number is done by this process."""
        return number % self.size == self.rank

    def gathered(self, what: str, value: Value, device: torch.device | None = None) -> list[Value]:
        """Return the values of all processes, by rank.

        Args:
            what: the value is, the same in all processes.
            value: of this process; picklable.
            device: of this process, for tensors that are not on the CPU.

        Raises:
            ProcessError: if another process has failed, or does something else.
        """
        if not self.several:
            return [value]
        return [unpacked(one, device) for one in self._met(what, packed(value))]

    def shared_out(
        self, parts: Iterable[Part], compute: Callable[[Part], Value], device: torch.device
    ) -> Iterator[Value]:
        """Yield what a function returns for each part, in their order, each computed by one of the processes."""
        if not self.several:
            yield from map(compute, parts)
            return
        remaining = iter(parts)
        while together := list(islice(remaining, self.size)):
            mine = compute(together[self.rank]) if self.rank < len(together) else None
            yield from self.gathered("a shared pass", mine, device)[: len(together)]  # type: ignore[misc]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add the tensors of all processes, in place.

        Raises:
            ProcessError: if another process has failed, or does something else.
        """
        if not self.several:
            return
        self._met("add", None)
        distributed = sys.modules["torch.distributed"]
        for tensor in tensors:
            on_device = self._placed(tensor)
            distributed.all_reduce(on_device, group=self.group)
            if on_device is not tensor:
                tensor.copy_(on_device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a failure of one process within the block be one of all of them, instead of an endless wait.

        Raises:
            ProcessError: if another process has failed.
        """
        if not self.several:
            yield
            return
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            # an interrupt may have come within an exchange, after which no other one can follow
            self._tell(f"{type(error).__name__}: {error}")
            raise
        self._met("end", None)

    def check_same(self, **described: object) -> None:
        """Check that descriptions, by what they are of, are the same in all processes.

        Raises:
            ValueError: if one differs.
        """
        if not self.several:
            return
        found = self.gathered("options", {name: str(value) for name, value in described.items()})
        for name, expected in found[0].items():
            for rank, one in enumerate(found):
                if one.get(name) != expected:
                    first, other = from_first_difference(expected, str(one.get(name)))
                    raise ValueError(
                        f"Expected {name} to be the same in all {self.size} processes; process 0 has {first}, process "
                        f"{rank} has {other}."
                    )

    def _tell(self, failure: str) -> None:
        try:
            self._met("failure", None, failure)
        except (ProcessError, RuntimeError):
            # the failure itself is raised, not that it was told
            return

    def _met(self, what: str, value: Value, failure: str | None = None) -> list[Value]:
        """Exchange values, and whether all processes do the same."""
        distributed = sys.modules["torch.distributed"]
        found: list[Any] = [None] * self.size
        patience = Timer(PATIENCE, self._warn_of_waiting)
        patience.daemon = True
        patience.start()
        try:
            distributed.all_gather_object(found, (what, failure, value), group=self.group)
        finally:
            patience.cancel()
        failures = [f"process {rank} of {self.size}: {text}" for rank, (_, text, _) in enumerate(found) if text]
        if failures:
            raise ProcessError(f"Another process has failed ({'; '.join(failures)}).")
        if len({kind for kind, _, _ in found}) > 1:
            kinds = ", ".join(kind for kind, _, _ in found)
            raise ProcessError(
                f"Expected all processes to call the same methods in the same order; they are at: {kinds}."
            )
        return [value for _, _, value in found]

    def _warn_of_waiting(self) -> None:
        warnings.warn(
            f"Process {self.rank} of {self.size} has waited for {PATIENCE:g} s for other processes. fit, held_out_kl, "
            "optimize_prior_precision, evaluate, diagnose and Newton steps have to be called in all of them; to call "
            "one in some alone, give the posterior a process_group of these.",
            stacklevel=2,
        )

    def _placed(self, tensor: Tensor) -> Tensor:
        """Return a tensor where the group's backend can send it from."""
        distributed = sys.modules["torch.distributed"]
        if distributed.get_backend(self.group) == "nccl":
            return tensor.cuda().contiguous()
        return (tensor if tensor.is_cuda else tensor.cpu()).contiguous()


def from_first_difference(one: str, other: str) -> tuple[str, str]:
    """Return two texts, of long ones what is about the first difference."""
    i = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = i - 60 if i > 100 else 0
    shown = [f"{'…' if start else ''}{text[start : start + 300]}" for text in (one, other)]
    return shown[0], shown[1]


def packed(value: Any) -> bytes:
    """Return a value as bytes; tensors of a device by way of the CPU, since another process has another device."""
    stream = BytesIO()
    _Sender(stream).dump(value)
    return stream.getvalue()


def unpacked(sent: bytes, device: torch.device | None) -> Any:
    """Return the value of such bytes, with the tensors that were not on the CPU on this device."""
    return _Receiver(sent, device).load()


class _Sender(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Tensor | None:
        return obj.detach().cpu() if isinstance(obj, Tensor) and obj.device.type != "cpu" else None

    def reducer_override(self, obj: Any) -> Any:
        # a view would take all of its storage with it
        if type(obj) is Tensor and obj.untyped_storage().nbytes() > obj.nbytes:
            return obj.detach().clone().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


class _Receiver(pickle.Unpickler):
    def __init__(self, sent: bytes, device: torch.device | None):
        super().__init__(BytesIO(sent))
        self._device = device

    def persistent_load(self, pid: Tensor) -> Tensor:
        return pid if self._device is None else pid.to(self._device)


ALONE = Processes()


def _alone() -> Processes:
    return ALONE
