"""Segmentation-shaped predictions as rows."""

import numpy as np
import pytest
import torch

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.predictions.drawing import draw_positions
from debiased_laplace.calibration.predictions.pixels import draw_pixels, lay_out


def softmax(*shape: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(dim=dim)


def labels(*shape: int, n_classes: int) -> torch.Tensor:
    return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(1))


def read(p, y, task: str = "multiclass", max_samples: int = 1000, seed: int = 0):
    rows, targets, pixels = lay_out({"net": p}, y, task=task, max_samples=max_samples, seed=seed)
    return rows["net"], targets, pixels


SHAPES = {"sequence": (5, 3, 7), "image": (4, 3, 5, 6), "volume": (2, 3, 4, 3, 2)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pixels_are_rows_in_order(shape: tuple[int, ...]) -> None:
    p, y = softmax(*shape, dim=1), labels(shape[0], *shape[2:], n_classes=3)
    rows, targets, pixels = read(p, y)
    torch.testing.assert_close(rows, p.flatten(2).movedim(1, 2).reshape(-1, 3), rtol=0, atol=0)
    assert torch.equal(targets, y.flatten())
    assert torch.equal(pixels.image, torch.arange(shape[0]).repeat_interleave(y[0].numel()))


def test_samples_of_pixels_and_their_mean_layout() -> None:
    p, y = softmax(6, 4, 3, 5, 2, dim=2), labels(4, 5, 2, n_classes=3)
    rows, _, _ = read(p, y)
    assert rows.shape == (6, 40, 3)
    torch.testing.assert_close(rows[2], read(p[2], y)[0], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5)])
def test_binary_probabilities_of_one_class(shape: tuple[int, ...]) -> None:
    p, y = torch.rand(shape, dtype=torch.float64), labels(*shape, n_classes=2)
    rows, targets, _ = read(p, y, "binary")
    assert torch.equal(rows, p.flatten())
    assert torch.equal(targets, y.flatten())


def test_a_draw_is_the_same_for_every_method_and_the_targets() -> None:
    p, y = softmax(6, 3, 8, 8, dim=1), labels(6, 8, 8, n_classes=3)
    given = {"a": p, "b": p.float(), "samples": torch.stack([p, p])}
    rows, targets, pixels = lay_out(given, y, task="multiclass", max_samples=50, seed=3)
    assert rows["a"].shape == (50, 3)
    torch.testing.assert_close(rows["b"].double(), rows["a"], rtol=0, atol=1e-6)
    assert torch.equal(rows["samples"][1], rows["a"])
    where = pixels.image, pixels.place // 8, pixels.place % 8
    assert torch.equal(targets, y[where])
    assert torch.equal(rows["a"], p.movedim(1, -1)[where])
    assert not torch.equal(lay_out(given, y, task="multiclass", max_samples=50, seed=4)[2].place, pixels.place)


@pytest.mark.parametrize(("total", "most"), [(10, 10), (10, 20), (100, 60), (10**6, 50), (10**12, 1000)])
def test_positions_are_distinct_rising_and_in_range(total: int, most: int) -> None:
    drawn = draw_positions(total, most, seed=0)
    assert drawn.numel() == min(total, most)
    assert bool((drawn.diff() > 0).all())
    assert 0 <= drawn[0] <= drawn[-1] < total


@pytest.mark.parametrize("total", [40, 200], ids=["by permutation", "by rejection"])
def test_every_position_is_as_likely(total: int) -> None:
    counts = torch.zeros(total)
    for seed in range(2000):
        counts[draw_positions(total, 20, seed=7919 * seed)] += 1
    chance = 20 / total
    z = (counts - 2000 * chance) / (2000 * chance * (1 - chance)) ** 0.5
    assert z.abs().max() < 4.5
    assert 0.8 < z.std() < 1.2


def test_samples_and_segmentation_are_told_apart_by_the_targets() -> None:
    p = softmax(4, 5, 3, dim=2)  # samples (4, 5, 3) over classes
    for y in (labels(5, n_classes=3), torch.eye(3)[labels(5, n_classes=3)]):
        assert read(p, y)[2] is None
    q = softmax(4, 5, 3, dim=1)  # four sequences of three over five classes
    assert read(q, labels(4, 3, n_classes=5))[2] is not None


def test_where_both_fit_the_axis_that_sums_to_one_decides() -> None:
    y = labels(4, 3, n_classes=2)  # as one-hot: (n, C) = (4, 3); as labels: 4 sequences of 3
    assert read(softmax(4, 4, 3, dim=1), y)[2] is not None
    assert read(softmax(4, 4, 3, dim=2), y)[2] is None
    with pytest.raises(ValueError, match=r"labels \(n,\)"):
        read(torch.full((3, 3, 3), 1 / 3), torch.eye(3))


WRONG = {
    "other places": (softmax(4, 3, 5, 5, dim=1), labels(4, 5, 6, n_classes=3), r"\(4, C, 5, 6\)"),
    "classes last": (softmax(4, 5, 6, 3, dim=3), labels(4, 5, 6, n_classes=3), r"\(4, C, 5, 6\).*\(4, 5, 6, 3\)"),
    "neither": (softmax(4, 5, 3, dim=1), labels(6, 2, n_classes=3), "one-hot"),
}


@pytest.mark.parametrize("case", WRONG)
def test_shapes_that_do_not_fit(case: str) -> None:
    p, y, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read(p, y)


def test_methods_of_different_kinds_are_refused() -> None:
    y = torch.eye(3)[labels(4, n_classes=3)].long()
    with pytest.raises(ValueError, match="segmentation-shaped, or none"):
        lay_out({"a": softmax(4, 3, dim=1), "b": softmax(4, 2, 3, dim=1)}, y, task="multiclass", max_samples=9, seed=0)


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_a_wrong_cap_is_named(wrong) -> None:
    with pytest.raises(ValueError, match="max_samples"):
        lay_out({"net": [0.2]}, [0], task="binary", max_samples=wrong, seed=0)


def test_ids_of_images_and_of_pixels_follow_the_draw() -> None:
    pixels = draw_pixels((5, 4, 2), max_samples=11, seed=0)
    of_pixel = torch.arange(40)
    assert torch.equal(pixels.spread(of_pixel, "ids") // 8, pixels.image)
    assert torch.equal(pixels.spread(torch.arange(5), "ids"), pixels.image)
    with pytest.raises(ValueError, match="5 images, or for each of 40 pixels; got 7"):
        pixels.spread(torch.arange(7), "ids")


def test_a_report_of_pixels_is_that_of_the_rows_clustered_by_image() -> None:
    p, y = softmax(40, 3, 6, 6, dim=1).float(), labels(40, 6, 6, n_classes=3)
    options = {"task": "multiclass", "n_resamples": 50, "temperature_scaling": "none"}
    of_pixels = calibration_report({"net": p.numpy()}, y.numpy(), **options)
    rows = p.flatten(2).movedim(1, 2).reshape(-1, 3)
    of_rows = calibration_report({"net": rows}, y.flatten(), clusters=np.repeat(np.arange(40), 36), **options)
    assert of_pixels.metrics == of_rows.metrics
    assert of_pixels.metrics["net"]["nll"].estimator.endswith("40 clusters")
    assert any("40 images" in w for w in of_pixels.warnings)
    independent = calibration_report({"net": rows}, y.flatten(), **options).metrics["net"]
    assert independent["nll"].value == of_pixels.metrics["net"]["nll"].value
    assert independent["accuracy"].low != of_pixels.metrics["net"]["accuracy"].low


def test_a_drawn_report_says_so() -> None:
    p, y = softmax(40, 3, 6, 6, dim=1), labels(40, 6, 6, n_classes=3)
    report = calibration_report({"net": p}, y, task="multiclass", max_samples=500, n_resamples=200)
    assert report.data.n == 500
    assert any("500 of 1440 pixels" in w for w in report.warnings)
