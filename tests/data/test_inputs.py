import pytest
import torch
from torch import Tensor

from debiased_laplace.data.inputs import (
    DEFAULT_KEYS,
    Inputs,
    MappingKeys,
    as_one,
    dtype_of,
    first,
    moved,
    n_samples_of,
    on_each,
    one_by_one,
    shape_of,
    split,
    tensors_of,
)

TENSOR = torch.arange(14.0).reshape(7, 2)
MAPPING = {"b": torch.arange(21).reshape(7, 3), "a": torch.arange(7) % 2 == 0}
BOTH: dict[str, Inputs] = {"a tensor": TENSOR, "a mapping": MAPPING}
either = pytest.mark.parametrize("inputs", BOTH.values(), ids=BOTH)


def assert_same(found: Inputs, expected: Inputs) -> None:
    assert type(found) is type(expected)
    assert list(tensors_of(found)) == list(tensors_of(expected))
    for key, value in tensors_of(expected).items():
        assert tensors_of(found)[key].dtype == value.dtype
        assert torch.equal(tensors_of(found)[key], value), key


def taken(inputs: Inputs, index: object) -> Inputs:
    """Index every tensor: the oracle."""
    return inputs[index] if isinstance(inputs, Tensor) else {key: value[index] for key, value in inputs.items()}


@either
def test_the_number_of_samples_and_the_first_ones(inputs: Inputs) -> None:
    assert n_samples_of(inputs) == 7
    for n in (0, 1, 3, 7, 100):
        assert_same(first(inputs, n), taken(inputs, slice(n)))


@either
@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_splitting_keeps_every_sample_once_and_in_order(inputs: Inputs, size: int, lengths: list[int]) -> None:
    parts = list(split(inputs, size))
    assert [n_samples_of(part) for part in parts] == lengths
    start = 0
    for part in parts:
        assert_same(part, taken(inputs, slice(start, start + size)))
        start += size


@either
def test_parts_used_after_the_loop_have_their_own_indices(inputs: Inputs) -> None:
    # functions made in a loop must not all use its last index
    singles, parts = list(one_by_one(inputs)), list(split(inputs, 2))
    for i in range(7):
        assert_same(singles[i], taken(inputs, i))
    assert_same(parts[0], taken(inputs, slice(2)))


@either
def test_a_single_sample_as_a_batch_of_one(inputs: Inputs) -> None:
    for i, single in enumerate(one_by_one(inputs)):
        assert_same(as_one(single), taken(inputs, slice(i, i + 1)))


@either
def test_a_function_of_every_tensor_leaves_the_inputs_unchanged(inputs: Inputs) -> None:
    before = taken(inputs, slice(None))
    assert_same(on_each(inputs, lambda t: t.flip(0)), taken(inputs, torch.arange(6, -1, -1)))
    assert_same(inputs, before)


@either
def test_moving(inputs: Inputs) -> None:
    found = moved(inputs, torch.device("meta"))
    assert type(found) is type(inputs)
    assert {t.device.type for t in tensors_of(found).values()} == {"meta"}


def test_names_shapes_and_dtypes_for_messages() -> None:
    assert tensors_of(TENSOR) == {"inputs": TENSOR}
    assert tensors_of(MAPPING) is MAPPING
    assert shape_of(TENSOR) == (7, 2)
    assert str(shape_of(MAPPING)) == "{'a': (7,), 'b': (7, 3)}"
    assert dtype_of(TENSOR) == torch.float32
    assert dtype_of(MAPPING) == {"b": torch.int64, "a": torch.bool}


def test_the_targets_are_not_inputs() -> None:
    loaded = {**MAPPING, "labels": torch.zeros(7)}
    found = MappingKeys("b", "labels").inputs(loaded)
    assert list(found) == ["b", "a"]
    assert found["b"] is MAPPING["b"]
    assert list(loaded) == ["b", "a", "labels"]
    # without targets, as in prediction
    assert list(MappingKeys("b", "labels").inputs(MAPPING)) == ["b", "a"]
    assert list(MappingKeys("b", "a").inputs(loaded)) == ["b", "labels"]


def test_the_default_keys_are_those_of_hugging_face() -> None:
    assert (DEFAULT_KEYS.dict_key_x, DEFAULT_KEYS.dict_key_y) == ("input_ids", "labels")


WRONG = {
    "an entry is not a tensor": (
        {"input_ids": [1, 2], "mask": torch.ones(2)},
        r"mapping of tensors; got \{'input_ids': 'list'\}",
    ),
    "the targets are not a tensor": ({"input_ids": torch.ones(2), "labels": None}, "'labels': 'NoneType'"),
    "input missing": (
        {"ids": torch.ones(2), "labels": torch.ones(2)},
        r"dict_key_x='input_ids'; got keys \['ids', 'lab",
    ),
    "empty": ({}, r"dict_key_x='input_ids'; got keys \[\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_mappings_are_refused(case: str) -> None:
    loaded, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        DEFAULT_KEYS.inputs(loaded)
