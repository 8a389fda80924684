from collections import UserDict

import pytest
import torch

from debiased_laplace.data.batches import Batch, as_batch, sample_hashes
from debiased_laplace.data.inputs import DEFAULT_KEYS, MappingKeys


def batch(n: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 2, 3, generator=generator), torch.arange(n))


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6])
def test_hashes_do_not_depend_on_batching(size: int) -> None:
    whole = sample_hashes(batch())
    assert whole.dtype == torch.int64
    assert whole.shape == (6,)
    assert torch.equal(torch.cat([sample_hashes(part) for part in batch().chunks(size)]), whole)


def test_hashes_do_not_depend_on_order_or_memory_layout() -> None:
    some = batch()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.equal(sample_hashes(Batch(some.inputs[order], some.targets[order])), sample_hashes(some)[order])
    strided = some.inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(sample_hashes(Batch(strided, some.targets)), sample_hashes(some))
    attached = Batch(some.inputs.clone().requires_grad_(), some.targets)
    assert torch.equal(sample_hashes(attached), sample_hashes(some))


def test_hashes_are_the_same_in_every_run() -> None:
    known = Batch(torch.tensor([[1.0, -2.5]]), torch.tensor([3]))
    # saved states contain hashes: another number here makes them unreadable
    assert sample_hashes(known).tolist() == [-8254860637661115932]
    known = Batch({"b": torch.tensor([[1.0, -2.5]]), "a": torch.tensor([True])}, torch.tensor([3]))
    assert sample_hashes(known).tolist() == [2220774875298513995]


CHANGES = {
    "another label": lambda b: Batch(b.inputs, b.targets + 1),
    "one entry of the input": lambda b: Batch(b.inputs + torch.eye(3)[:2] * 1e-6, b.targets),
    "another shape of the same numbers": lambda b: Batch(b.inputs.flatten(1), b.targets),
    "another dtype of the input": lambda b: Batch(b.inputs.double(), b.targets),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hashes_change_with(change: str) -> None:
    before, after = sample_hashes(batch()), sample_hashes(CHANGES[change](batch()))
    assert not torch.isin(before, after).any()


def test_a_label_is_the_same_in_any_integer_type() -> None:
    assert torch.equal(sample_hashes(batch()), sample_hashes(Batch(batch().inputs, batch().targets.int())))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_hashes_of_every_dtype(dtype: torch.dtype) -> None:
    inputs = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    assert len(sample_hashes(Batch(inputs, torch.zeros(3))).unique()) == 3


def test_scalar_inputs_and_vector_targets() -> None:
    some = Batch(torch.tensor([0.0, 1.0]), torch.zeros(2, 4))
    assert len(sample_hashes(some).unique()) == 2
    assert some.n_bytes == 4 * (2 + 8)


def test_chunks_keep_inputs_and_targets_together() -> None:
    parts = batch().chunks(4)
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch().inputs)
    assert parts[1].targets.tolist() == [4, 5]


def test_moving_a_batch() -> None:
    moved = batch().to(torch.device("meta"))
    assert moved.inputs.device.type == moved.targets.device.type == "meta"


WRONG_BATCHES = {
    "scalar inputs": (lambda: Batch(torch.tensor(1.0), torch.tensor([1])), r"shapes inputs \(\), targets \(1,\)"),
    "scalar targets": (lambda: Batch(torch.ones(1, 2), torch.tensor(1)), r"shapes inputs \(1, 2\), targets \(\)"),
    "lengths that differ": (lambda: Batch(torch.ones(3, 2), torch.ones(2)), "3 inputs but 2 targets"),
    "a tensor alone": (lambda: as_batch(torch.ones(2, 2), DEFAULT_KEYS), "came as Tensor"),
    "four parts": (lambda: as_batch((torch.ones(2),) * 4, DEFAULT_KEYS), "came as tuple .*Tensor.*Tensor.*Tensor"),
    "one part": (lambda: as_batch([torch.ones(2)], DEFAULT_KEYS), "came as list"),
    "a target that is not a tensor": (lambda: as_batch((torch.ones(2, 2), [0, 1]), DEFAULT_KEYS), "'Tensor', 'list'"),
    "nested inputs": (lambda: as_batch(((torch.ones(2),) * 2, torch.ones(2)), DEFAULT_KEYS), "'tuple', 'Tensor'"),
    "nothing": (lambda: as_batch(None, DEFAULT_KEYS), "came as NoneType"),
    "a string": (lambda: as_batch("ab", DEFAULT_KEYS), "came as str"),
    "a mapping: no targets": (lambda: as_batch({"input_ids": torch.ones(2)}, DEFAULT_KEYS), "dict_key_y='labels'.*inp"),
    "a mapping: targets that are not a tensor": (
        lambda: as_batch({"input_ids": torch.ones(2), "labels": [0, 1]}, DEFAULT_KEYS),
        "tensor under dict_key_y='labels'",
    ),
    "a mapping: targets under another key": (
        lambda: as_batch({"input_ids": torch.ones(2), "labels": torch.ones(2)}, MappingKeys(dict_key_y="y")),
        "dict_key_y='y'",
    ),
    "a mapping: no inputs": (
        lambda: as_batch({"tokens": torch.ones(2), "labels": torch.ones(2)}, DEFAULT_KEYS),
        r"dict_key_x='input_ids'; got keys \['labels', 'tokens'\]",
    ),
    "a mapping: an entry that is not a tensor": (
        lambda: as_batch({"input_ids": torch.ones(2), "labels": torch.ones(2), "names": ["a", "b"]}, DEFAULT_KEYS),
        "mapping of tensors; got {'names': 'list'}",
    ),
    "a mapping: a scalar entry": (
        lambda: Batch({"input_ids": torch.ones(2), "scale": torch.tensor(2.0)}, torch.ones(2)),
        r"scale \(\)",
    ),
    "a mapping: an entry of another length": (
        lambda: Batch({"input_ids": torch.ones(2, 3), "mask": torch.ones(3, 3)}, torch.ones(2)),
        "input_ids 2, mask 3, targets 2",
    ),
    "a mapping: an entry named targets, of another length": (
        lambda: Batch({"input_ids": torch.ones(2), "targets": torch.ones(3)}, torch.ones(2)),
        "targets 3, targets 2",
    ),
    "an empty mapping": (lambda: Batch({}, torch.ones(2)), "empty mapping"),
    "a pair of a mapping and a list": (lambda: as_batch(({"input_ids": torch.ones(2)}, [1, 2]), DEFAULT_KEYS), "dict"),
    "a pair of a mapping without inputs": (
        lambda: as_batch(({"tokens": torch.ones(2)}, torch.ones(2)), DEFAULT_KEYS),
        "dict_key_x='input_ids'",
    ),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_invalid_batches_are_refused(case: str) -> None:
    make, message = WRONG_BATCHES[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_are_batches(kind: type) -> None:
    assert len(as_batch(kind([torch.ones(5, 2), torch.zeros(5)]), DEFAULT_KEYS)) == 5


def tokens(n: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(9, (n, 4), generator=generator),
        "attention_mask": torch.randint(2, (n, 4), generator=generator).bool(),
        "weights": torch.randn(n, generator=generator),
    }


MAPPINGS = {
    "a dictionary with its targets": ({**tokens(), "labels": torch.arange(6)}, DEFAULT_KEYS),
    "a class of another library": (UserDict({**tokens(), "labels": torch.arange(6)}), DEFAULT_KEYS),
    "a pair": ((tokens(), torch.arange(6)), DEFAULT_KEYS),
    "a pair as a list, the mapping of another class": ([UserDict(tokens()), torch.arange(6)], DEFAULT_KEYS),
    "a pair whose mapping has targets too": (({**tokens(), "labels": torch.zeros(6)}, torch.arange(6)), DEFAULT_KEYS),
    "other keys": ({**tokens(), "y": torch.arange(6)}, MappingKeys(dict_key_x="weights", dict_key_y="y")),
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_inputs_of_a_mapping_are_all_entries_except_the_targets(case: str) -> None:
    loaded, keys = MAPPINGS[case]
    found = as_batch(loaded, keys)
    assert type(found.inputs) is dict
    assert sorted(found.inputs) == ["attention_mask", "input_ids", "weights"]
    assert next(iter(found.inputs)) == keys.dict_key_x
    assert all(torch.equal(found.inputs[key], value) for key, value in tokens().items())
    assert torch.equal(found.targets, torch.arange(6))
    assert len(found) == 6


def test_an_input_may_have_the_default_key_of_the_targets() -> None:
    found = as_batch(
        {"input_ids": torch.ones(2), "labels": torch.ones(2), "y": torch.zeros(2)}, MappingKeys("labels", "y")
    )
    assert list(found.inputs) == ["labels", "input_ids"]  # dict_key_x first


def test_a_batch_of_a_mapping_is_split_moved_and_measured_as_a_whole() -> None:
    some = Batch(tokens(), torch.arange(6))
    parts = some.chunks(4)
    assert [len(part) for part in parts] == [4, 2]
    for key, value in tokens().items():
        assert torch.equal(torch.cat([part.inputs[key] for part in parts]), value)
        assert torch.equal(some.first(2).inputs[key], value[:2])
    assert parts[1].targets.tolist() == [4, 5]
    assert some.first(2).targets.tolist() == [0, 1]
    assert some.n_bytes == 6 * (4 * 8 + 4 * 1 + 4 + 8)
    moved = some.to(torch.device("meta"))
    assert {t.device.type for t in (*moved.inputs.values(), moved.targets)} == {"meta"}


def test_hashes_of_a_mapping_depend_on_every_entry_and_its_name_but_not_on_their_order() -> None:
    before = sample_hashes(Batch(tokens(), torch.arange(6)))
    assert len(before.unique()) == 6
    backwards = dict(reversed(tokens().items()))
    assert torch.equal(sample_hashes(Batch(backwards, torch.arange(6))), before)
    parts = [sample_hashes(part) for part in Batch(tokens(), torch.arange(6)).chunks(4)]
    assert torch.equal(torch.cat(parts), before)
    assert torch.equal(sample_hashes(Batch(tokens(), torch.arange(6, dtype=torch.uint8))), before)
    ids, mask, weights = tokens().values()
    others = {
        "ids": {"input_ids": ids + 1, "attention_mask": mask, "weights": weights},
        "mask": {"input_ids": ids, "attention_mask": ~mask, "weights": weights},
        "weights": {"input_ids": ids, "attention_mask": mask, "weights": weights.nextafter(torch.ones(()))},
        "a name": {"input_ids": ids, "mask": mask, "weights": weights},
        "an entry less": {"input_ids": ids, "attention_mask": mask},
        "an entry more": {**tokens(), "more": weights},
    }
    for change, mapping in others.items():
        assert not torch.isin(sample_hashes(Batch(mapping, torch.arange(6))), before).any(), change
    assert not torch.isin(sample_hashes(Batch(tokens(), torch.arange(6) + 1)), before).any()


def test_hashes_change_if_entries_are_exchanged_or_named_targets() -> None:
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    y = torch.zeros(5)
    exchanged = sample_hashes(Batch({"a": a, "b": b}, y)), sample_hashes(Batch({"a": b, "b": a}, y))
    assert not torch.isin(*exchanged).any()
    named = sample_hashes(Batch({"a": a, "targets": b}, y)), sample_hashes(Batch({"a": a, "targets": a}, y))
    assert not torch.isin(*named).any()


def test_the_error_names_the_entry_that_is_not_finite() -> None:
    some = Batch(tokens(), torch.zeros(6))
    some.check_finite()
    some.inputs["weights"][1:3] = float("inf")
    with pytest.raises(ValueError, match="finite weights; 2 of 6"):
        some.check_finite()


NOT_FINITE = {
    "input NaN": (lambda b: b.inputs[2, 0, 0].fill_(float("nan")), "finite inputs; 1 of 6"),
    "input infinite": (lambda b: b.inputs[2:4].fill_(float("-inf")), "finite inputs; 2 of 6"),
    "target NaN": (lambda b: b.targets[1:4].fill_(float("nan")), "finite targets; 3 of 6"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_samples_that_are_not_finite_are_refused(case: str) -> None:
    spoil, message = NOT_FINITE[case]
    some = Batch(batch().inputs, torch.zeros(6))
    some.check_finite()
    spoil(some)
    with pytest.raises(ValueError, match=message):
        some.check_finite()


def test_integers_are_finite() -> None:
    Batch(torch.ones(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.int64)).check_finite()
