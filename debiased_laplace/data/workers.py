"""Worker processes of a loader, started once for all passes over parts of its data set."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

_Request = tuple[int, int, list[int]]
"""Number of the pass, its seed, and the positions of a batch."""


class Workers:
    """Workers that load any positions of one data set, pass after pass.

    Random numbers of a pass depend on its seed, not on the passes before.
    """

    def __init__(self) -> None:
        self._passes, self._busy = _Passes(), False
        self._dataset: Any = None
        self._loader: DataLoader[Any] | None = None

    def load(self, dataset: Any, batches: list[list[int]], seed: int, options: dict[str, Any]) -> Iterator[Any]:
        """Yield the collated batches at these positions.

        Args:
            dataset: the workers are started again if it is another one than before.
            batches: positions of the samples of each batch.
            seed: of the random numbers in the workers.
            options: of `DataLoader`: workers, collate function and pinning.
        """
        if self._busy:
            # a pass within a pass has workers of its own
            yield from Workers().load(dataset, batches, seed, options)
            return
        if self._loader is None or self._dataset is not dataset:
            self.stop()
            changed = {
                "worker_init_fn": _InitializedAs(options["worker_init_fn"]),
                "persistent_workers": True,
                "generator": torch.Generator().manual_seed(seed),
            }
            # any object stands for a batch, as the data set knows it
            requests: Any = self._passes
            self._loader = DataLoader(_ByRequest(dataset), batch_sampler=requests, **(options | changed))
            self._dataset = dataset
            _RUNNING.add(self)
        self._passes.begin(batches, seed)
        self._busy = True
        try:
            yield from self._loader
        except GeneratorExit:
            # whoever needed only the first batches; torch drops the others as the next pass begins
            raise
        except BaseException:
            self.stop()
            raise
        finally:
            self._busy = False

    def stop(self) -> None:
        """Stop the workers; a later pass starts new ones."""
        running = getattr(self._loader, "_iterator", None)
        self._loader, self._dataset = None, None
        _RUNNING.discard(self)
        if running is not None:
            # now, and not when the frames of an error are released
            running._shutdown_workers()

    # a copy or a pickle of a fit starts its own
    def __deepcopy__(self, memo: dict[int, Any]) -> "Workers":
        return Workers()

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, ()


def stop_workers() -> None:
    """Stop all workers that run."""
    for workers in list(_RUNNING):
        workers.stop()


_RUNNING: WeakSet[Workers] = WeakSet()
if hasattr(os, "register_at_fork"):
    # they are no children of a forked process
    os.register_at_fork(after_in_child=_RUNNING.clear)


class _Passes:
    """Batch sampler whose batches are set before each pass."""

    def __init__(self) -> None:
        self._n, self._seed = 0, 0
        self._batches: list[list[int]] = []

    def begin(self, batches: list[list[int]], seed: int) -> None:
        """Set the batches and the seed of the next pass."""
        self._n, self._seed, self._batches = self._n + 1, seed, batches

    def __iter__(self) -> Iterator[_Request]:
        return iter([(self._n, self._seed, batch) for batch in self._batches])

    def __len__(self) -> int:
        return len(self._batches)


class _ByRequest(Dataset[Any]):
    """Data set that seeds a worker at the beginning of each pass."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._pass: int | None = None

    def __getitems__(self, request: _Request) -> list[Any]:
        n, seed, positions = request
        if n != self._pass:
            self._pass = n
            info = get_worker_info()
            _seed_all(seed, 0 if info is None else info.id)
        many = getattr(self.dataset, "__getitems__", None)
        found: list[Any] = many(positions) if callable(many) else [self.dataset[i] for i in positions]
        return found


@dataclass(frozen=True)
class _InitializedAs:
    """The user's initialization of a worker, which is shown the user's data set."""

    function: Callable[[int], Any] | None

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        if info is not None:
            # attributes of a worker's description are read-only
            object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[attr-defined]
        if self.function is not None:
            self.function(worker_id)


def _seed_all(seed: int, worker_id: int) -> None:
    # as torch seeds new workers: a base drawn by the seed, and the worker's number
    base = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed)))
    torch.manual_seed(base + worker_id)
    random.seed(base + worker_id)
    np.random.seed(np.random.SeedSequence([base, worker_id]).generate_state(4))  # noqa: NPY002
