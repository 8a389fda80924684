"""Predictions with positions as rows, against explicit indexing."""

import pytest
import torch

from debiased_laplace.calibration.positions import Positions, as_rows
from debiased_laplace.calibration.probabilities import PosteriorPredictive


def softmax(*shape: int, dim: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=dim)


def labels(*shape: int, n_classes: int = 3) -> torch.Tensor:
    return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(1))


def read(p, y, task: str = "multiclass", max_samples: int = 1000, seed: int = 5):
    given = {"net": p, "other": p}  # the draw is the same for every method
    rows, targets, positions = as_rows(given, y, task=task, max_samples=max_samples, seed=seed)
    assert rows["net"] is rows["other"] or torch.equal(rows["net"], rows["other"])
    return rows["net"], targets, positions


SHAPES = {
    "sequence": (5, 3, 7),
    "as many places as images, told by the sum": (4, 4, 3),
    "image": (4, 3, 5, 6),
    "volume": (2, 3, 4, 3, 2),
}


@pytest.mark.parametrize("S", [None, 4])
@pytest.mark.parametrize("max_samples", [1000, 25, 3], ids=["all", "by permutation", "by rejection"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_are_the_drawn_positions(shape: tuple[int, ...], max_samples: int, S: int | None) -> None:
    p = softmax(*shape, dim=1) if S is None else softmax(S, *shape, dim=2)
    y, size = labels(shape[0], *shape[2:]), labels(*shape[2:]).numel()
    rows, targets, positions = read(p, y, max_samples=max_samples)
    flat = positions.image * size + positions.place
    assert (len(flat), positions.shape) == (min(max_samples, y.numel()), tuple(y.shape))
    assert bool((flat.diff() > 0).all())
    for k, place in enumerate(flat.tolist()):
        image, *at = torch.unravel_index(torch.tensor(place), y.shape)
        assert targets[k] == y[(image, *at)]
        pixel = p[(image, slice(None), *at)] if S is None else p[(slice(None), image, slice(None), *at)]
        assert torch.equal(rows[..., k, :], pixel)
    of_one_class = labels(*y.shape) / 3  # in a binary task
    assert torch.equal(read(of_one_class, y, "binary", max_samples=max_samples)[0], of_one_class.flatten()[flat])
    assert torch.equal(positions.spread(torch.arange(y.numel())), flat)  # ids of pixels, and of images
    assert torch.equal(positions.spread(torch.arange(shape[0]) + 3), positions.image + 3)
    with pytest.raises(ValueError, match=rf"{shape[0]} images or {y.numel()} pixels; got 1"):
        positions.spread(torch.arange(1))


@pytest.mark.parametrize("n_images", [4, 20], ids=["by permutation", "by rejection"])
def test_every_position_is_as_likely(n_images: int) -> None:
    counts, chance = torch.zeros(n_images * 10), 2 / n_images
    for seed in range(2000):
        drawn = Positions.draw((n_images, 5, 2), max_samples=20, seed=7919 * seed)
        counts[drawn.image * 10 + drawn.place] += 1
    z = (counts - 2000 * chance) / (2000 * chance * (1 - chance)) ** 0.5
    assert z.abs().max() < 4.5
    assert 0.8 < z.std() < 1.2
    assert len(Positions.draw((10**6, 10**6), max_samples=1000, seed=0).place) == 1000  # needs no list of all


ONE_HOT = torch.eye(3)[labels(5)]


def test_predictions_without_positions_stay_as_they_are() -> None:
    predictive = PosteriorPredictive(softmax(5, 3, dim=1), torch.zeros(5))
    samples = softmax(4, 5, 3, dim=2), softmax(5, 5, 3, dim=2)  # the second: as many as rows, told by the sum
    for p, y in ((samples[0], labels(5)), *((p, ONE_HOT) for p in (*samples, softmax(5, 3, dim=1), predictive))):
        rows, targets, positions = read(p, y)
        assert positions is None
        assert rows is p or torch.equal(rows, p)
        assert torch.equal(targets, y)


WRONG = {
    "other places": ({"net": softmax(4, 3, 5, 5, dim=1)}, labels(4, 5, 6), 9, r"'net'.*\(4, C, 5, 6\)"),
    "classes last": ({"net": softmax(4, 5, 6, 3, dim=3)}, labels(4, 5, 6), 9, r"\(4, C, 5, 6\).*\(4, 5, 6, 3\)"),
    "neither": ({"net": softmax(4, 5, 3, dim=1)}, labels(6, 2), 9, "one-hot"),
    "both, with either sum": ({"net": torch.full((3, 3, 3), 1 / 3)}, torch.eye(3), 9, r"labels \(n,\)"),
    "no pixel": ({"net": torch.zeros(0, 3, 4, 4)}, torch.zeros(0, 4, 4), 9, "At least one pixel"),
    "kinds": ({"a": softmax(5, 3, dim=1), "b": softmax(5, 2, 3, dim=1)}, ONE_HOT, 9, "must have positions, or none"),
    "max_samples of 0": ({}, [0], 0, "max_samples must be a whole number of at least 1; got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_shapes_that_do_not_fit_are_named(case: str) -> None:
    p, y, max_samples, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        as_rows(p, y, task="multiclass", max_samples=max_samples, seed=0)
