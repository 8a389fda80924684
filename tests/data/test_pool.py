"""Pools of samples: read samples stay read, and every sample occurs once, whichever loaders yield it."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset, TensorDataset, random_split

from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.data.pool import AppendedSource, Pool
from debiased_laplace.data.source import SampleSource, sample_source

N = 23
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)
DATA = TensorDataset(X, Y)


class Numbered(Dataset[tuple[Tensor, Tensor]]):
    """Data set without a length."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i], Y[i]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Data set that adds noise at every access."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + torch.rand(()), Y[i]


def over(dataset: Any, indices: Any = None, **options: Any) -> SampleSource:
    dataset = dataset if indices is None else Subset(dataset, list(indices))
    return sample_source(DataLoader(dataset, **{"batch_size": 5, **options}), seed=2)


def labels(source: SampleSource, positions: Tensor) -> list[int]:
    """Return the targets, which identify the samples."""
    return torch.cat([batch.targets for batch in source.batches(positions, seed=2)]).tolist()


def as_mappings(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*items, strict=True)
    return {"input_ids": torch.stack(x), "labels": torch.stack(y)}


def numbered(stop: int) -> SampleSource:
    class InOrder(Sampler[int]):
        def __iter__(self) -> Any:
            return iter(range(stop))

    return sample_source(DataLoader(Numbered(), batch_size=5, sampler=InOrder()), seed=2)


FIRST, SECOND = random_split(DATA, [11, 12], generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Join:
    """Two loaders, the samples of the first that were read, and the expected pool: all samples and the fresh ones."""

    old: Callable[[], SampleSource]
    new: Callable[[], SampleSource]
    samples: set[int]
    fresh: set[int]
    read: Callable[[SampleSource], Tensor] = lambda source: source.indices
    dataset: Any = DATA
    """Data set of the positions in the pool; None: the concatenation of both."""


def other_data(*indices: int) -> TensorDataset:
    """Return a new data set of some of the samples."""
    return TensorDataset(X[list(indices)], Y[list(indices)])


CONCATENATED = ConcatDataset([Subset(DATA, range(4)), Subset(DATA, range(4, 9))])
ALL = set(range(N))
JOINS = {
    "disjoint Subsets": Join(
        lambda: over(DATA, range(6)), lambda: over(DATA, range(6, 15)), set(range(15)), set(range(6, 15))
    ),
    "Subsets that overlap": Join(
        lambda: over(DATA, range(6)), lambda: over(DATA, range(3, 15)), set(range(15)), set(range(6, 15))
    ),
    "halves of a random split": Join(lambda: over(FIRST), lambda: over(SECOND), ALL, set(SECOND.indices)),
    "a Subset of a Subset in reverse order": Join(
        lambda: over(Subset(DATA, range(9, -1, -1)), range(4)),
        lambda: over(DATA, range(8, 12)),
        {6, 7, 8, 9, 10, 11},
        {10, 11},
    ),
    "the same loader, part of it read": Join(
        lambda: over(DATA), lambda: over(DATA), ALL, set(range(5, N)), read=lambda s: s.indices[:5]
    ),
    "part read, others only from the new loader": Join(
        lambda: over(DATA, range(6)),
        lambda: over(DATA, range(4, 15)),
        set(range(15)),
        set(range(2, 15)) - {2, 3},
        read=lambda s: s.indices[:2],
    ),
    "everything after a part": Join(lambda: over(DATA, range(6)), lambda: over(DATA), ALL, set(range(6, N))),
    "one data set through two samplers": Join(
        lambda: over(DATA, sampler=[3, 1, 2]), lambda: over(DATA, sampler=[4, 2]), {1, 2, 3, 4}, {4}
    ),
    "another data set": Join(
        lambda: over(other_data(0, 1, 2)), lambda: over(other_data(5, 3)), {0, 1, 2, 3, 5}, {3, 5}, dataset=None
    ),
    "another data set with some of the same samples": Join(
        lambda: over(other_data(0, 1, 2)), lambda: over(other_data(2, 7, 0)), {0, 1, 2, 7}, {7}, dataset=None
    ),
    "another data set with samples of the first that were not read": Join(
        lambda: over(other_data(0, 1, 2)),
        lambda: over(other_data(2, 7)),
        {0, 1, 2, 7},
        {2, 7},
        read=lambda s: s.indices[:2],
        dataset=None,
    ),
    "another data set with all of the samples and others": Join(
        lambda: over(other_data(4, 0)), lambda: over(DATA), ALL, ALL - {0, 4}
    ),
    "a concatenation that contains the first": Join(
        lambda: over(DATA, range(4)), lambda: over(CONCATENATED), set(range(9)), set(range(4, 9)), dataset=CONCATENATED
    ),
    "lists of batches": Join(
        lambda: sample_source([(X[:4], Y[:4]), (X[4:7], Y[4:7])], 2),
        lambda: sample_source([(X[5:12], Y[5:12])], 2),
        set(range(12)),
        set(range(7, 12)),
        dataset=None,
    ),
    "a loader after a list": Join(
        lambda: sample_source([(X[:4], Y[:4])], 2),
        lambda: over(DATA, range(9, 12)),
        {0, 1, 2, 3, 9, 10, 11},
        {9, 10, 11},
        dataset=None,
    ),
    "a data set without a length": Join(
        lambda: numbered(4), lambda: over(other_data(8, 9)), {0, 1, 2, 3, 8, 9}, {8, 9}, dataset=None
    ),
    "collate functions of their own": Join(
        lambda: over(other_data(0, 1, 2), collate_fn=as_mappings),
        lambda: over(other_data(6, 5), collate_fn=as_mappings, batch_size=2),
        {0, 1, 2, 5, 6},
        {5, 6},
        dataset=None,
    ),
}


def joined(case: str) -> tuple[Pool, Pool]:
    join = JOINS[case]
    old = join.old()
    before = Pool.of(old, None).with_read(join.read(old))
    return before, before.join(join.new(), None, seed=2)


@pytest.mark.parametrize("case", JOINS)
def test_every_sample_occurs_once(case: str) -> None:
    before, after = joined(case)
    join = JOINS[case]
    source = after.source
    assert sorted(labels(source, source.indices)) == sorted(join.samples)
    assert sorted(labels(source, after.read)) == sorted(labels(before.source, before.read))
    assert set(labels(source, after.fresh)) == join.fresh
    assert after.size == len(join.samples)
    for positions in (source.indices, after.read, after.fresh, after.available):
        assert bool((positions.diff() > 0).all()), "increasing"


@pytest.mark.parametrize("case", JOINS)
def test_positions_are_in_the_common_data_set(case: str) -> None:
    before, after = joined(case)
    if JOINS[case].dataset is not None:
        dataset, positions = after.source.root()
        assert dataset is JOINS[case].dataset
        items = [int(dataset[i][1]) for i in positions[after.source.indices].tolist()]
        assert items == labels(after.source, after.source.indices)
        return
    n = len(before.source.indices)
    assert torch.equal(after.source.indices[:n], before.source.indices)
    assert len(after.source.dataset) > int(after.source.indices.max())
    assert [int(after.source.dataset[i][1]) for i in after.source.indices.tolist()] == labels(
        after.source, after.source.indices
    )


def test_a_third_data_set_joins_two() -> None:
    pool = Pool.of(over(other_data(0, 1, 2)), None)
    pool = pool.with_read(pool.available).join(over(other_data(3, 4), batch_size=2), None, seed=2)
    pool = pool.with_read(pool.available).join(over(other_data(4, 5, 0)), None, seed=2)
    assert labels(pool.source, pool.source.indices) == [0, 1, 2, 3, 4, 5]
    assert labels(pool.source, pool.fresh) == [5]


def test_samples_of_two_data_sets_are_loaded_in_the_requested_order() -> None:
    _, pool = joined("another data set")
    assert isinstance(pool.source, AppendedSource)
    mixed = pool.source.indices[[3, 0, 4, 1, 2]]
    batches = list(pool.source.batches(mixed, seed=2))
    assert [batch.targets.tolist() for batch in batches] == [[5], [0], [3], [1, 2]]
    assert not pool.source.augments(2)


def test_mappings_stay_mappings() -> None:
    _, pool = joined("collate functions of their own")
    (first, second) = pool.source.batches(pool.source.indices, seed=2)
    assert isinstance(first.inputs, dict)
    assert isinstance(second.inputs, dict)
    torch.testing.assert_close(second.inputs["input_ids"], X[[6, 5]], rtol=0, atol=0)


# --- refused joins ---


def noise() -> SampleSource:
    return over(Noisy())


REFUSED = {
    "no new sample": (lambda: over(DATA, range(6)), lambda: over(DATA, range(2, 5)), "3 samples, all of them fitted"),
    "no new sample, in a data set of its own": (
        lambda: over(DATA, range(6)),
        lambda: over(other_data(0, 4)),
        "2 samples, all of them fitted",
    ),
    "random loading of two data sets": (noise, noise, "cannot be compared.*Subsets of one data set"),
    "inputs of another shape": (
        lambda: over(DATA, range(6)),
        lambda: over(TensorDataset(X[:, :3], Y)),
        r"one shape and dtype.*\(1, 4\) of torch.float32.*\(1, 3\) of torch.float32",
    ),
    "inputs of another dtype": (
        lambda: over(DATA, range(6)),
        lambda: over(TensorDataset(X.double(), Y)),
        r"\(1, 4\) of torch.float32.*\(1, 4\) of torch.float64",
    ),
    "a tensor after a mapping": (
        lambda: over(DATA, range(6), collate_fn=as_mappings),
        lambda: over(other_data(8, 9)),
        r"\{'input_ids': \(1, 4\)\} of .*\(1, 4\) of torch.float32",
    ),
    "random loading of the first only": (noise, lambda: over(DATA), "cannot be compared"),
    "random loading of the second only": (lambda: over(DATA), noise, "cannot be compared"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_joins_that_are_refused(case: str) -> None:
    old, new, message = REFUSED[case]
    pool = Pool.of(old(), None)
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pool.with_read(pool.available).join(new(), None, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_loading_of_one_data_set_is_compared_by_position() -> None:
    dataset = Noisy()
    pool = Pool.of(over(dataset, range(6)), None)
    pool = pool.with_read(pool.available).join(over(dataset, range(4, 9)), None, seed=2)
    assert pool.fresh.tolist() == [6, 7, 8]
    assert pool.read.tolist() == [0, 1, 2, 3, 4, 5]


# --- N ---


def test_the_size_is_as_given_or_all_samples() -> None:
    pool = Pool.of(over(DATA, range(6)), None)
    read = pool.with_read(pool.available)
    assert pool.size == 6
    assert read.join(over(DATA, range(4, 9)), None, seed=2).size == 9
    assert read.join(over(DATA, range(4, 9)), 40, seed=2).size == 40
    given = Pool.of(over(DATA, range(6)), 17).with_read(pool.available)
    assert given.size == 17
    assert given.join(over(DATA, range(4, 9)), None, seed=2).size == 17
    assert given.join(over(DATA, range(4, 9)), 18, seed=2).size == 18


def test_a_size_below_the_samples() -> None:
    with pytest.raises(ValueError, match="at least 6, got 5"):
        Pool.of(over(DATA, range(6)), 5)
    pool = Pool.of(over(DATA, range(6)), 7)
    # two of six were read; the four unread ones count although the new loader does not yield them
    with pytest.raises(ValueError, match="at least 9, got 7"):
        pool.with_read(pool.available[:2]).join(over(DATA, range(6, 9)), None, seed=2)


# --- order, copies and pickles ---


def test_the_order_depends_on_the_seed_but_not_on_the_read_samples() -> None:
    pool = Pool.of(over(DATA), None)
    order = pool.reading_order(4)
    assert sorted(order.tolist()) == list(range(N))
    assert torch.equal(order, pool.reading_order(4))
    assert not torch.equal(order, pool.reading_order(5))
    for n in (1, 8, N):
        assert torch.equal(pool.with_read(order[:n]).reading_order(4), order)
    half = pool.with_read(torch.arange(0, N, 2)).reading_order(4)
    assert half[:12].sort().values.tolist() == list(range(0, N, 2))
    assert half[12:].tolist() == [i for i in order.tolist() if i % 2]


def test_copies_share_the_pool_and_pickles_leave_it_out() -> None:
    pool = Pool.of(over(DATA, collate_fn=lambda items: items), None)
    assert copy.deepcopy({"pool": pool})["pool"] is pool
    assert pickle.loads(pickle.dumps({"pool": pool})) == {"pool": None}


def test_data_sets_of_a_joined_pool_can_be_pickled() -> None:
    # a pickle of the posterior contains the data set, but not the loaders' functions
    old, new = (over(other_data(i, i + 1), collate_fn=lambda items: as_mappings(items)) for i in (0, 2))
    pool = Pool.of(old, None)
    after = pool.with_read(pool.available).join(new, None, seed=2)
    again = pickle.loads(pickle.dumps(after.source.dataset))
    assert [int(again[i][1]) for i in range(len(again))] == [0, 1, 2, 3]


def test_keys_of_mappings_are_kept() -> None:
    keys = MappingKeys("input_ids", "classes")
    batches = [{"input_ids": X[:3], "classes": Y[:3]}], [{"input_ids": X[3:6], "classes": Y[3:6]}]
    old, new = (sample_source(part, 2, keys) for part in batches)
    pool = Pool.of(old, None)
    after = pool.with_read(pool.available).join(new, None, seed=2)
    assert labels(after.source, after.source.indices) == [0, 1, 2, 3, 4, 5]
