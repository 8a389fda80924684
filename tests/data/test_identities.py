import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.randomness import undisturbed_randomness

ROOT, OTHER_ROOT = object(), object()


def identities(hashes, positions, *, augmented=False, root=ROOT, n_root=100) -> SampleIdentities:
    return SampleIdentities(torch.tensor(hashes), torch.tensor(positions), n_root, augmented, root)


PLAIN = identities([11, 12, 13], [1, 2, 3])

# other set, number of samples shared with PLAIN
OVERLAPS = {
    "the same": (PLAIN, 3),
    "equal samples at other positions": (identities([12, 99], [50, 51]), 1),
    "equal samples of another data set": (identities([12, 13], [50, 51], root=OTHER_ROOT), 2),
    "other samples at equal positions": (identities([98, 99], [1, 2], root=OTHER_ROOT), 0),
    "disjoint": (identities([21, 22], [4, 5]), 0),
    "augmented: equal positions of one data set": (identities([98, 99], [1, 4], augmented=True), 1),
    "augmented: equal hashes do not count": (identities([11, 12], [7, 8], augmented=True), 0),
    "augmented, root unknown, of the same length": (identities([98], [3], augmented=True, root=None), 1),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_shared_samples(case: str) -> None:
    other, expected = OVERLAPS[case]
    assert PLAIN.shared_with(other) == expected
    assert other.shared_with(PLAIN) == expected


@pytest.mark.parametrize(
    "other",
    [
        identities([98], [3], augmented=True, root=OTHER_ROOT),
        identities([98], [3], augmented=True, root=None, n_root=101),
    ],
    ids=["another data set", "root unknown, another length"],
)
def test_augmented_samples_of_different_data_sets_cannot_be_compared_with_a_warning(other: SampleIdentities) -> None:
    with pytest.warns(UserWarning, match="cannot be compared"):
        assert PLAIN.shared_with(other) == 0


def test_keys_are_hashes_or_positions_for_both_sets() -> None:
    other = identities([98, 99], [1, 4], augmented=True)
    assert PLAIN.by_position(other)
    assert other.by_position(PLAIN)
    assert [keys.tolist() for keys in PLAIN.keys(other)] == [[1, 2, 3], [1, 4]]
    plain = identities([13, 99], [1, 4])
    assert not PLAIN.by_position(plain)
    assert [keys.tolist() for keys in PLAIN.keys(plain)] == [[11, 12, 13], [13, 99]]


def test_equal_samples_are_merged_at_the_lowest_position_unless_loading_is_random() -> None:
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25])
    kept, together = identities([5, 5, 6, 5], [4, 2, 3, 1]).distinct(weights)
    assert kept.tolist() == [False, False, True, True]
    assert together.tolist() == [2.75, 2.75, 1.0, 2.75]
    kept, together = identities([5, 5, 6, 5], [4, 2, 3, 1], augmented=True).distinct(weights)
    assert bool(kept.all())
    assert torch.equal(together, weights)
    assert identities([5, 6], [4, 2]).at(torch.tensor([False, True])).hashes.tolist() == [6]
    assert len(PLAIN) == 3


DRAWS = {
    "torch": lambda: torch.rand(3).tolist(),
    "numpy": lambda: np.random.rand(3).tolist(),  # noqa: NPY002
    "python": lambda: [random.random() for _ in range(3)],
}


def interrupted(draw: Callable[[], list[float]]) -> None:
    with undisturbed_randomness(7):
        draw()
        raise KeyError


@pytest.mark.parametrize("library", DRAWS)
def test_randomness_is_seeded_inside_and_restored_outside(library: str) -> None:
    draw = DRAWS[library]
    with undisturbed_randomness(7):
        first = draw()
    with undisturbed_randomness(7):
        assert draw() == first
    with undisturbed_randomness(8):
        assert draw() != first
    with undisturbed_randomness(2**40):
        draw()
    # draws afterwards do not depend on what was drawn inside
    for seed_all in (torch.manual_seed, np.random.seed, random.seed):
        seed_all(4)
    expected = draw()
    for seed_all in (torch.manual_seed, np.random.seed, random.seed):
        seed_all(4)
    with pytest.raises(KeyError):
        interrupted(draw)
    assert draw() == expected
