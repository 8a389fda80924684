import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.data.source import SampleSource, sample_source
from debiased_laplace.data.sub_batch import SubBatch

N = 23
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)
DATA = TensorDataset(X, Y)


class Counting(Dataset[tuple[Tensor, Tensor]]):
    """Data set that records which items were loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(i)
        return X[i], Y[i]


class Augmenting(Dataset[tuple[Tensor, Tensor]]):
    """Data set that adds noise of one of the global generators."""

    def __init__(self, noise: str):
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        size = {"torch": lambda: torch.rand(()), "numpy": np.random.rand, "python": random.random}[self.noise]()
        return X[i] + 0.1 * float(size), Y[i]


class EverySecond(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(N - 1, -1, -2))

    def __len__(self) -> int:
        return (N + 1) // 2


class TensorPositions(Sampler[Tensor]):
    def __iter__(self) -> Iterator[Any]:
        return iter(torch.tensor([4, 2, 9]))

    def __len__(self) -> int:
        return 3


class Uneven(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[5, 1], [0], [7, 3, 2, 9]])

    def __len__(self) -> int:
        return 3


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(N)])


def read(source: SampleSource, indices: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    batches = list(source.batches(source.indices if indices is None else indices, seed))
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def times_ten(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate function that multiplies the inputs by ten."""
    return torch.stack([x for x, _ in batch]) * 10, torch.stack([y for _, y in batch])


# loader, positions, batch size
LOADERS: dict[str, tuple[Any, list[int], int]] = {
    "in order": (lambda: DataLoader(DATA, batch_size=5), list(range(N)), 5),
    "single samples": (lambda: DataLoader(DATA), list(range(N)), 1),
    "shuffling": (lambda: DataLoader(DATA, batch_size=5, shuffle=True), list(range(N)), 5),
    "in order, last batch dropped": (lambda: DataLoader(DATA, batch_size=5, drop_last=True), list(range(20)), 5),
    "custom sampler": (
        lambda: DataLoader(DATA, batch_size=4, sampler=EverySecond()),
        list(range(0, N, 2)),
        4,
    ),
    "custom sampler, last batch dropped": (
        lambda: DataLoader(DATA, batch_size=5, sampler=EverySecond(), drop_last=True),
        list(range(4, N, 2)),
        5,
    ),
    "positions as tensors": (lambda: DataLoader(DATA, batch_size=2, sampler=TensorPositions()), [2, 4, 9], 2),
    "a list as sampler": (lambda: DataLoader(DATA, batch_size=2, sampler=[8, 3, 1]), [1, 3, 8], 2),
    "random subset": (
        lambda: DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([9, 2, 4])),
        [2, 4, 9],
        2,
    ),
    "batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 6, drop_last=False)),
        list(range(N)),
        6,
    ),
    "batches of different sizes": (lambda: DataLoader(DATA, batch_sampler=Uneven()), [0, 1, 2, 3, 5, 7, 9], 4),
    "lists of positions as batches": (lambda: DataLoader(DATA, batch_sampler=[[3, 1], [7]]), [1, 3, 7], 2),
    "random sampler over some of the samples, without replacement": (
        lambda: DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, replacement=False)),
        list(range(N)),
        5,
    ),
    "a Subset": (lambda: DataLoader(Subset(DATA, [4, 9, 1]), batch_size=2, shuffle=True), [0, 1, 2], 2),
    "list of batches": (lambda: [(X[:9], Y[:9]), (X[9:], Y[9:])], list(range(N)), 14),
    "tuple of lists": (lambda: ([X[:9], Y[:9]], [X[9:12], Y[9:12]]), list(range(12)), 9),
}


@pytest.mark.parametrize("name", LOADERS)
def test_positions_and_samples_of_a_loader(name: str) -> None:
    make, positions, batch_size = LOADERS[name]
    loader = make()
    source = sample_source(loader, seed=3)
    assert source.indices.tolist() == positions
    assert source.indices.dtype == torch.int64
    assert source.batch_size == batch_size
    inputs, labels = read(source)
    dataset = loader.dataset if isinstance(loader, DataLoader) else DATA
    assert torch.equal(inputs, torch.stack([dataset[i][0] for i in positions]))
    assert labels.tolist() == [int(dataset[i][1]) for i in positions]


@pytest.mark.parametrize("name", LOADERS)
def test_positions_are_found_without_a_change_of_the_random_state(name: str) -> None:
    loader = LOADERS[name][0]()
    torch.manual_seed(8)
    before = torch.get_rng_state()
    source = sample_source(loader, seed=3)
    assert not source.augments(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_loaded_before_the_split() -> None:
    dataset = Counting()
    source = sample_source(DataLoader(dataset, batch_size=4, shuffle=True), seed=0)
    assert dataset.loaded == []
    read(source, torch.tensor([7, 2]))
    assert dataset.loaded == [7, 2]


GENERATORS = {
    "the loader's own": lambda g: DataLoader(DATA, batch_size=5, shuffle=True, drop_last=True, generator=g),
    "the sampler's": lambda g: DataLoader(DATA, batch_size=5, drop_last=True, sampler=RandomSampler(DATA, generator=g)),
    "that of the sampler in a batch sampler": lambda g: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=g), 5, drop_last=True)
    ),
    "that of a random subset": lambda g: DataLoader(
        DATA, batch_size=5, drop_last=True, sampler=SubsetRandomSampler(range(N), generator=g)
    ),
}


@pytest.mark.parametrize("owner", GENERATORS)
def test_a_generator_of_the_user_is_restored(owner: str) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = GENERATORS[owner](generator)
    before = generator.get_state()
    source = sample_source(loader, seed=3)
    assert len(source.indices) == 20
    read(source)
    assert torch.equal(generator.get_state(), before)


def test_the_seed_decides_which_samples_a_shuffling_loader_drops() -> None:
    def kept(seed: int) -> list[int]:
        loader = DataLoader(DATA, batch_size=10, shuffle=True, drop_last=True)
        return sample_source(loader, seed).indices.tolist()

    assert len(kept(1)) == 20
    torch.manual_seed(77)
    first = kept(1)
    torch.manual_seed(78)
    assert kept(1) == first
    assert len({tuple(kept(seed)) for seed in range(6)}) > 1


REFUSED: dict[str, tuple[Any, str]] = {
    "with replacement": (
        lambda: DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True, num_samples=100)),
        "more than once.*without replacement",
    ),
    "weighted": (
        lambda: DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * N, 60)),
        "more than once.*sample_weights.*class_weights",
    ),
    "a batch sampler that repeats": (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [1, 2]]), "1 of its 4 samples"),
    "empty sampler": (lambda: DataLoader(DATA, sampler=[]), "no samples"),
    "empty Subset": (lambda: DataLoader(Subset(DATA, [])), "no samples"),
    "the only batch is dropped": (
        lambda: DataLoader(DATA, batch_size=100, drop_last=True),
        "no samples",
    ),
    "a stream": (lambda: DataLoader(Stream(), batch_size=4), r"map-style.*list\(stream\)"),
    "no batches": (lambda: DataLoader(DATA, batch_size=None), "batch_size=None"),
    "positions that are not integers": (lambda: DataLoader(DATA, sampler=["a", "b"]), "integer positions"),
    "an empty list": (lambda: [], "empty"),
    "a list of empty batches": (lambda: [(X[:0], Y[:0])], "no samples"),
    "a list of tensors": (lambda: [X, Y], "two tensors"),
    "a list of batches whose inputs differ in shape": (lambda: [(X, Y), (X[:, :2], Y)], "shape"),
    "a generator": (lambda: iter([(X, Y)]), "list of"),
    "a data set": (lambda: DATA, "Expected a torch DataLoader.*TensorDataset"),
    "a string": (lambda: "train", "Expected a torch DataLoader"),
    "nothing": (lambda: None, "Expected a torch DataLoader"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsuitable_loaders_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        sample_source(make(), seed=0)


def test_samples_are_loaded_in_the_requested_order_and_number() -> None:
    source = sample_source(DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True), seed=0)
    batches = list(source.batches(torch.tensor([20, 3, 11, 5, 8, 1]), seed=0))
    assert [b.targets.tolist() for b in batches] == [[20, 3, 11, 5], [8, 1]]


def test_a_collate_function_is_kept() -> None:
    source = sample_source(DataLoader(DATA, batch_size=4, collate_fn=times_ten), seed=0)
    assert torch.equal(read(source)[0], 10 * X)


def test_workers_and_their_collate_function_are_kept() -> None:
    source = sample_source(DataLoader(DATA, batch_size=4, num_workers=2, collate_fn=times_ten, prefetch_factor=3), 0)
    assert source.options["num_workers"] == 2
    assert source.options["prefetch_factor"] == 3
    inputs, labels = read(source, torch.arange(N).flip(0))
    assert torch.equal(inputs, 10 * X.flip(0))
    assert labels.tolist() == list(range(N))[::-1]


MERGING = {
    "makes one sample of all": lambda items: (torch.stack([x for x, _ in items]).mean(0)[None], torch.zeros(1)),
    "makes two samples of each": lambda items: (torch.stack([x for x, _ in items] * 2), torch.zeros(2 * len(items))),
}


@pytest.mark.parametrize("case", MERGING)
def test_a_collate_function_that_mixes_samples_is_refused(case: str) -> None:
    source = sample_source(DataLoader(DATA, batch_size=4, collate_fn=MERGING[case]), seed=0)
    with pytest.raises(ValueError, match="a sample must stay one sample"):
        read(source)


@pytest.mark.parametrize("noise", ["torch", "numpy", "python"])
def test_augmentation_is_detected(noise: str) -> None:
    source = sample_source(DataLoader(Augmenting(noise), batch_size=4), seed=0)
    torch.manual_seed(1)
    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    assert source.augments(0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (repr(np.random.get_state()), random.getstate()) == states[1:]  # noqa: NPY002


def test_augmentation_in_workers_is_detected() -> None:
    source = sample_source(DataLoader(Augmenting("torch"), batch_size=4, num_workers=2), seed=0)
    assert source.augments(0)


def test_augmentation_of_a_single_sample_is_detected() -> None:
    assert sample_source(DataLoader(Augmenting("torch"), sampler=[3]), seed=0).augments(0)


def test_fixed_data_are_not_taken_for_augmented() -> None:
    assert not sample_source(DataLoader(DATA, batch_size=4, shuffle=True), seed=0).augments(0)
    assert not sample_source(DataLoader(Subset(DATA, [3]), batch_size=4), seed=0).augments(0)


ROOTS: dict[str, tuple[Any, list[int]]] = {
    "no Subset": (lambda: DATA, list(range(N))),
    "one Subset": (lambda: Subset(DATA, [4, 9, 1]), [4, 9, 1]),
    "Subset of a Subset": (lambda: Subset(Subset(DATA, [4, 9, 1, 7]), [3, 0]), [7, 4]),
    "three deep": (lambda: Subset(Subset(Subset(DATA, range(5, 15)), [0, 2, 4, 6]), [3, 1]), [11, 7]),
    "positions as a tensor": (lambda: Subset(DATA, torch.tensor([4, 9, 1])), [4, 9, 1]),
    "positions as an array": (lambda: Subset(DATA, np.array([4, 9, 1])), [4, 9, 1]),
}


@pytest.mark.parametrize("case", ROOTS)
def test_positions_in_the_root_data_set(case: str) -> None:
    make, expected = ROOTS[case]
    source = sample_source(DataLoader(make(), batch_size=2, shuffle=True), seed=0)
    dataset, positions = source.root()
    assert dataset is DATA
    assert positions[source.indices].tolist() == expected
    inputs, _ = read(source)
    assert torch.equal(inputs, X[expected])


def test_two_parts_of_a_random_split_have_different_positions() -> None:
    parts = random_split(DATA, [0.5, 0.5], generator=torch.Generator().manual_seed(1))
    found = []
    for part in parts:
        source = sample_source(DataLoader(part, batch_size=4, shuffle=True), seed=0)
        found += source.root()[1][source.indices].tolist()
    assert sorted(found) == list(range(N))


def test_a_data_set_that_is_not_a_subset_is_its_own_root() -> None:
    joined = ConcatDataset([DATA, DATA])
    source = sample_source(DataLoader(joined, batch_size=4, sampler=SequentialSampler(joined)), seed=0)
    assert source.root()[0] is joined
    assert len(source.indices) == 2 * N


def test_root_positions_of_a_sampler_over_a_subset() -> None:
    source = sample_source(DataLoader(Subset(DATA, [4, 9, 1, 7]), batch_size=2, sampler=[2, 0]), seed=0)
    assert source.root()[1][source.indices].tolist() == [4, 1]


def test_samples_can_be_loaded_repeatedly_or_kept() -> None:
    dataset = Counting()
    source = sample_source(DataLoader(dataset, batch_size=4), seed=0)
    samples = SubBatch(source, torch.tensor([9, 2, 5, 6, 1]), torch.device("cpu"), seed=0)
    assert len(samples) == 5
    first = list(samples)
    assert [b.targets.tolist() for b in first] == [[9, 2, 5, 6], [1]]
    assert torch.equal(sample_hashes(next(iter(samples))), sample_hashes(first[0]))
    n_loaded = len(dataset.loaded)
    kept = samples.keeping(first)
    assert [b.targets.tolist() for b in kept] == [[9, 2, 5, 6], [1]]
    assert len(kept) == 5
    assert len(dataset.loaded) == n_loaded
    assert torch.equal(kept.indices, samples.indices)


def test_samples_are_moved_to_the_device() -> None:
    source = sample_source([(X, Y)], seed=0)
    for batch in SubBatch(source, torch.arange(4), torch.device("meta"), seed=0):
        assert batch.inputs.device.type == "meta"


IDS, MASK = torch.arange(3 * N).reshape(N, 3), torch.arange(3 * N).reshape(N, 3) % 2 == 0
KEYS = MappingKeys("ids", "y")


class Mappings(Dataset[dict[str, Tensor]]):
    """Data set of mappings, as those of Hugging Face."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"ids": IDS[i], "y": Y[i], "mask": MASK[i]}


def mapping(part: slice) -> dict[str, Tensor]:
    return {"ids": IDS[part], "mask": MASK[part], "y": Y[part]}


OF_MAPPINGS: dict[str, tuple[Any, list[int], int]] = {
    "a loader": (lambda: DataLoader(Mappings(), batch_size=5, shuffle=True), list(range(N)), 5),
    "a loader over a Subset": (lambda: DataLoader(Subset(Mappings(), [4, 9]), batch_size=5), [4, 9], 5),
    "a list of mappings": (lambda: [mapping(slice(9)), mapping(slice(9, N))], list(range(N)), 14),
    "a list of one mapping": (lambda: [mapping(slice(4, 6))], [4, 5], 2),
    "a list of mappings, keys in another order": (
        lambda: [mapping(slice(9)), dict(reversed(mapping(slice(9, N)).items()))],
        list(range(N)),
        14,
    ),
    "a list of pairs of mappings and targets": (
        lambda: [({"ids": IDS[:7], "mask": MASK[:7]}, Y[:7]), ({"ids": IDS[7:9], "mask": MASK[7:9]}, Y[7:9])],
        list(range(9)),
        7,
    ),
    "a list with an empty batch": (lambda: [mapping(slice(0)), mapping(slice(3))], [0, 1, 2], 3),
}


@pytest.mark.parametrize("case", OF_MAPPINGS)
def test_samples_that_are_mappings(case: str) -> None:
    make, expected, batch_size = OF_MAPPINGS[case]
    source = sample_source(make(), 3, KEYS)
    assert source.batch_size == batch_size
    assert not source.augments(3)
    batches = list(source.batches(source.indices, 0))
    assert max(len(batch) for batch in batches) == min(batch_size, len(expected))
    for batch in batches:
        assert set(batch.inputs) == {"ids", "mask"}
    assert torch.equal(torch.cat([batch.inputs["ids"] for batch in batches]), IDS[expected])
    assert torch.equal(torch.cat([batch.inputs["mask"] for batch in batches]), MASK[expected])
    assert torch.cat([batch.targets for batch in batches]).tolist() == expected
    # the hash of a sample does not depend on its source
    hashes = torch.cat([sample_hashes(batch) for batch in batches])
    assert torch.equal(hashes, sample_hashes(Batch({"mask": MASK[expected], "ids": IDS[expected]}, Y[expected])))


REFUSED_MAPPINGS: dict[str, tuple[Any, str]] = {
    "entries of two shapes": (lambda: [mapping(slice(4)), {**mapping(slice(4)), "ids": IDS[:4, :2]}], "one shape"),
    "an entry missing": (lambda: [mapping(slice(4)), {"ids": IDS[:4], "y": Y[:4]}], "one shape"),
    "mappings and tensors": (lambda: [mapping(slice(4)), (IDS[:4], Y[:4])], "one shape"),
    "targets of two shapes": (lambda: [mapping(slice(4)), {**mapping(slice(4)), "y": Y[:4, None]}], "one shape"),
    "no targets": (lambda: [{"ids": IDS}], "dict_key_y='y'"),
    "no inputs": (lambda: [{"mask": MASK, "y": Y}], "dict_key_x='ids'"),
    "only empty batches": (lambda: [mapping(slice(0))], "no samples"),
}


@pytest.mark.parametrize("case", REFUSED_MAPPINGS)
def test_lists_of_unequal_mappings_are_refused(case: str) -> None:
    make, message = REFUSED_MAPPINGS[case]
    with pytest.raises(ValueError, match=message):
        sample_source(make(), 0, KEYS)


def test_samples_of_mappings_can_be_kept_and_moved() -> None:
    source = sample_source(DataLoader(Mappings(), batch_size=4), 0, KEYS)
    samples = SubBatch(source, torch.tensor([9, 2, 5, 6, 1]), torch.device("cpu"), seed=0)
    kept = samples.keeping(list(samples))
    assert [b.inputs["ids"][:, 0].tolist() for b in kept] == [[27, 6, 15, 18], [3]]
    moved = SubBatch(source, torch.arange(4), torch.device("meta"), 0)
    assert {t.device.type for b in moved for t in b.inputs.values()} == {"meta"}
