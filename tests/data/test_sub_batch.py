from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch

X = torch.arange(24.0).reshape(12, 2)
Y = torch.arange(12)
# positions in the data set
USED = torch.tensor([0, 2, 3, 5, 7, 8, 10])
CPU = torch.device("cpu")


class Mappings(Dataset):
    """Data set of mappings."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": X[i], "attention_mask": X[i, 0] > 3, "labels": Y[i]}


LOADERS: dict[str, Callable[[], object]] = {
    "pairs": lambda: DataLoader(list(zip(X, Y, strict=True)), batch_size=3),
    "mappings": lambda: DataLoader(Mappings(), batch_size=3),
    "a list of batches": lambda: [(X[i : i + 5], Y[i : i + 5]) for i in range(0, 12, 5)],
}
# positions within the sub-batch
CHOSEN = {
    "some of every batch": [0, 2, 4, 6],
    "none of some batches": [5, 6],
    "across a batch's end": [2, 3],
    "all": [0, 1, 2, 3, 4, 5, 6],
    "one": [4],
}


def make(loader: str, *, kept: bool) -> SubBatch:
    sub_batch = SubBatch(sample_source(LOADERS[loader](), 0), USED, CPU, 0)
    return sub_batch.keeping(list(sub_batch)) if kept else sub_batch


def contents(sub_batch: SubBatch) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs by name, and the targets, of all batches."""
    batches = list(sub_batch)
    inputs = [b.inputs if isinstance(b.inputs, dict) else {"": b.inputs} for b in batches]
    return {k: torch.cat([i[k] for i in inputs]) for k in inputs[0]}, torch.cat([b.targets for b in batches])


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "loaded again"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", CHOSEN)
def test_part_at_some_positions(case: str, loader: str, kept: bool) -> None:
    positions = torch.tensor(CHOSEN[case])
    whole = make(loader, kept=kept)
    part = whole.at(positions)
    assert len(part) == len(positions)
    assert torch.equal(part.indices, USED[positions])
    assert (part.kept is None) is not kept
    inputs, y = contents(part)
    all_inputs, all_y = contents(whole)
    assert torch.equal(y, Y[USED[positions]])
    assert torch.equal(y, all_y[positions])
    assert inputs.keys() == all_inputs.keys()
    for name, values in inputs.items():
        assert torch.equal(values, all_inputs[name][positions])
    if kept:
        assert all(len(batch) > 0 for batch in part.kept)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "loaded again"])
def test_parts_of_parts_leave_the_whole_unchanged(kept: bool) -> None:
    whole = make("pairs", kept=kept)
    before = contents(whole)[1]
    part = whole.at(torch.tensor([1, 3, 4, 6])).at(torch.tensor([0, 3]))
    assert torch.equal(part.indices, USED[[1, 6]])
    assert torch.equal(contents(part)[1], Y[USED[[1, 6]]])
    assert torch.equal(contents(whole)[1], before)


def test_a_batch_at_some_positions() -> None:
    some = Batch({"a": X, "b": X[:, 0] > 5}, Y).at(torch.tensor([7, 2]))
    assert torch.equal(some.inputs["a"], X[[7, 2]])
    assert some.inputs["b"].tolist() == [True, False]
    assert some.targets.tolist() == [7, 2]
    assert torch.equal(Batch(X, Y).at(torch.tensor([11])).inputs, X[11:])
