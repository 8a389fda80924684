import pytest
import torch

from debiased_laplace.data.splitting import SubBatches, deal, draw_sub_batches
from debiased_laplace.errors import OverlapError

POSITIONS = torch.tensor([3, 90, 7, 41, 0, 55, 12, 13, 77, 60, 22, 31, 8, 9, 5, 99, 70, 71, 66, 2])


def draw(indices=POSITIONS, **options):
    defaults = {
        "direction_samples": 0.5,
        "magnitude_samples": None,
        "shared": False,
        "n_data": None,
        "seed": 0,
    }
    return draw_sub_batches(indices, **{**defaults, **options})


# options, number of direction samples, number of magnitude samples
AMOUNTS = {
    "half and the rest": ({}, 10, 10),
    "a share and the rest": ({"direction_samples": 0.3}, 6, 14),
    "numbers": ({"direction_samples": 4, "magnitude_samples": 7}, 4, 7),
    "shares of all given samples": ({"direction_samples": 0.25, "magnitude_samples": 0.5}, 5, 10),
    "a number and a share": ({"direction_samples": 1, "magnitude_samples": 0.1}, 1, 2),
    "one direction sample": ({"direction_samples": 1}, 1, 19),
    "all but two": ({"direction_samples": 18}, 18, 2),
    "a share that rounds to zero gives one": ({"direction_samples": 0.001}, 1, 19),
}


@pytest.mark.parametrize("case", AMOUNTS)
def test_amounts(case: str) -> None:
    options, n_directions, n_magnitudes = AMOUNTS[case]
    split = draw(**options)
    assert len(split.direction_indices) == n_directions
    assert len(split.magnitude_indices) == n_magnitudes
    assert split.n_samples == n_directions + n_magnitudes
    assert not split.shared


@pytest.mark.parametrize("case", AMOUNTS)
@pytest.mark.parametrize("seed", range(5))
def test_the_sets_are_disjoint_sorted_positions_of_the_given_samples(case: str, seed: int) -> None:
    split = draw(**AMOUNTS[case][0], seed=seed)
    a, b = split.direction_indices.tolist(), split.magnitude_indices.tolist()
    assert not set(a) & set(b)
    assert set(a) | set(b) <= set(POSITIONS.tolist())
    assert a == sorted(set(a))
    assert b == sorted(set(b))
    for indices in (split.direction_indices, split.magnitude_indices):
        assert indices.dtype == torch.int64
        assert indices.device.type == "cpu"
    assert torch.equal(split.used_indices, torch.cat([split.direction_indices, split.magnitude_indices]))


def test_every_sample_is_used_if_the_rest_gives_magnitudes() -> None:
    assert sorted(draw().used_indices.tolist()) == sorted(POSITIONS.tolist())


def test_shared_samples_are_in_both_sets() -> None:
    split = draw(direction_samples=4, magnitude_samples=7, shared=True)
    assert split.shared
    assert split.n_samples == 11
    assert torch.equal(split.direction_indices, split.magnitude_indices)
    assert torch.equal(split.used_indices, split.direction_indices)
    # the same samples as the split with the same amounts and seed
    apart = draw(direction_samples=4, magnitude_samples=7)
    assert sorted(apart.used_indices.tolist()) == split.used_indices.tolist()


def test_the_seed_decides_and_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    first = draw(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = draw(seed=1)
    assert torch.equal(first.direction_indices, again.direction_indices)
    assert torch.equal(first.magnitude_indices, again.magnitude_indices)
    different = {tuple(draw(seed=seed).direction_indices.tolist()) for seed in range(8)}
    assert len(different) == 8


def test_the_order_in_which_a_loader_yields_does_not_matter() -> None:
    shuffled = POSITIONS[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(draw(POSITIONS).direction_indices, draw(shuffled).direction_indices)


def test_every_sample_is_drawn_with_the_same_probability() -> None:
    n_draws = 2000
    chosen = torch.zeros(100)
    for seed in range(n_draws):
        chosen[draw(direction_samples=5, seed=seed).direction_indices] += 1
    counts = chosen[POSITIONS]
    expected, deviation = n_draws * 0.25, (n_draws * 0.25 * 0.75) ** 0.5
    assert float(((counts - expected) / deviation).abs().max()) < 4
    assert float(counts.sum()) == 5 * n_draws


@pytest.mark.parametrize("n_data", [None, 20, 5000])
def test_the_size_of_the_data_set(n_data: int | None) -> None:
    split = draw(direction_samples=5, n_data=n_data)
    assert split.n_data == (n_data or 20)


WRONG = {
    "no samples": ({"indices": torch.tensor([], dtype=torch.int64)}, "no samples"),
    "no direction samples": ({"direction_samples": 0}, "between 1 and the 20"),
    "negative": ({"direction_samples": -3}, "between 1 and the 20"),
    "more than there are": ({"direction_samples": 21}, "between 1 and the 20"),
    "share 0": ({"direction_samples": 0.0}, "between 0 and 1"),
    "share 1": ({"direction_samples": 1.0}, "between 0 and 1"),
    "share above 1": ({"direction_samples": 1.5}, "between 0 and 1"),
    "negative share": ({"direction_samples": -0.1}, "between 0 and 1"),
    "share NaN": ({"direction_samples": float("nan")}, "between 0 and 1"),
    "a boolean": ({"direction_samples": True}, "number of samples"),
    "all samples": ({"direction_samples": 20}, "leave 0 for the"),
    "all samples but one": ({"direction_samples": 19}, "leave 1 for the"),
    "one magnitude sample": ({"direction_samples": 4, "magnitude_samples": 1}, "at least 2"),
    "no magnitude samples": ({"magnitude_samples": 0}, "magnitude_samples must be between"),
    "magnitude share above 1": ({"magnitude_samples": 2.5}, "magnitude_samples as a share"),
    "more than there are together": ({"direction_samples": 12, "magnitude_samples": 9}, "12 \\+ 9 disjoint"),
    "shares above 1 together": ({"direction_samples": 0.6, "magnitude_samples": 0.5}, "12 \\+ 10 disjoint"),
    "n_data below the given samples": ({"n_data": 19}, "at least 20, got 19"),
    "n_data below the given samples, though few are used": (
        {"direction_samples": 2, "magnitude_samples": 2, "n_data": 10},
        "at least 20, got 10",
    ),
    "one shared sample": ({"indices": torch.tensor([4]), "shared": True}, "at least 2 samples"),
    "one sample to split": ({"indices": torch.tensor([4])}, "at least 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_amounts_out_of_range_are_refused(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        draw(**options)


@pytest.mark.parametrize("amount", ["auto", None, [3]])
@pytest.mark.parametrize("name", ["direction_samples", "magnitude_samples"])
def test_amounts_of_other_types_are_refused(name: str, amount: object) -> None:
    if name == "magnitude_samples" and amount is None:
        return
    # the run-time type check may raise first
    with pytest.raises(Exception, match=name):
        draw(**{name: amount})


def sub_batches(a: list[int], b: list[int], n_data: int = 100, *, shared: bool = False) -> SubBatches:
    return SubBatches(torch.tensor(a), torch.tensor(b), n_data, shared)


OVERLAPS = {
    "one sample in both": ([1, 2, 3], [3, 4], False),
    "a sample twice for directions": ([1, 1, 3], [4, 5], False),
    "a sample twice for magnitudes": ([1, 3], [4, 5, 4], False),
    "shared but different": ([1, 2, 3], [1, 2, 4], True),
    "the same but not shared": ([1, 2], [1, 2], False),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_sub_batches_are_refused(case: str) -> None:
    a, b, shared = OVERLAPS[case]
    with pytest.raises(OverlapError):
        sub_batches(a, b, shared=shared)


def test_sub_batches_larger_than_the_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4, got 3"):
        sub_batches([1, 2], [3, 4], n_data=3)
    assert sub_batches([1, 2], [1, 2], n_data=2, shared=True).n_samples == 2


# --- folds ---

FOLDS = {
    "a multiple": (20, 5, [4] * 5),
    "not a multiple": (19, 5, [3, 4, 4, 4, 4]),
    "two": (7, 2, [3, 4]),
    "as many folds as samples": (6, 6, [1] * 6),
    "one fold of two samples": (9, 8, [1] * 7 + [2]),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folds_are_balanced_and_have_every_sample_once(case: str) -> None:
    n, n_folds, sizes = FOLDS[case]
    split = draw(POSITIONS[:n], shared=True, n_folds=n_folds)
    assert split.shared
    assert split.folds is not None
    assert split.folds.shape == split.direction_indices.shape == (n,)
    assert split.folds.dtype == torch.int64
    assert sorted(split.folds.bincount(minlength=n_folds).tolist()) == sizes


def test_only_used_samples_have_folds() -> None:
    split = draw(direction_samples=5, magnitude_samples=6, shared=True, n_folds=4)
    assert split.folds is not None
    assert split.folds.bincount().tolist() == [3, 3, 3, 2]
    assert torch.equal(
        split.direction_indices, draw(direction_samples=5, magnitude_samples=6).used_indices.sort().values
    )


def test_the_seed_decides_on_the_folds_and_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    folds = [draw(shared=True, n_folds=4, seed=seed).folds for seed in (1, 1, 2, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(folds[0], folds[1])
    assert len({tuple(f.tolist()) for f in folds}) == 3
    # dealt at random, not in the order of the data set
    assert not torch.equal(folds[0], torch.arange(20) % 4)
    # the samples themselves are the same with folds and without
    assert torch.equal(
        draw(shared=True, n_folds=4, direction_samples=4, magnitude_samples=4).direction_indices,
        draw(shared=True, direction_samples=4, magnitude_samples=4).direction_indices,
    )


def test_two_samples_share_a_fold_with_the_probability_of_a_random_deal() -> None:
    n_draws = 1500
    together = sum(
        int(f[0] == f[1]) for f in (draw(shared=True, n_folds=4, seed=seed).folds for seed in range(n_draws))
    )
    expected = 4 / 19  # 4 of the 19 others are in the same fold of 5
    deviation = (n_draws * expected * (1 - expected)) ** 0.5
    assert abs(together - n_draws * expected) < 4 * deviation


def test_with_fewer_samples_than_folds_every_sample_is_a_fold() -> None:
    for n, amounts in ((20, {}), (6, {"direction_samples": 2, "magnitude_samples": 4}), (2, {"direction_samples": 1})):
        positions = POSITIONS[:n] if n == 2 else POSITIONS
        split = draw(positions, shared=True, n_folds=21, **amounts)
        assert split.folds is not None
        assert split.folds.sort().values.tolist() == list(range(n))


def test_more_folds_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="n_folds=21 needs a sample for every fold; expected at least 21, got 20"):
        deal(20, 21, torch.Generator())


WRONG_FOLDS = {
    "of a split": (torch.tensor([0, 1]), [1, 2], [3, 4], False),
    "one too few": (torch.tensor([0]), [1, 2], [1, 2], True),
    "one too many": (torch.tensor([0, 1, 0]), [1, 2], [1, 2], True),
}


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_folds_that_do_not_match_the_samples_are_refused(case: str) -> None:
    folds, a, b, shared = WRONG_FOLDS[case]
    # the run-time type check may raise first
    with pytest.raises(Exception, match=r"one number for each|folds"):
        SubBatches(torch.tensor(a), torch.tensor(b), 10, shared, folds)
