"""Segmentation-shaped predictions as rows: some pixels, the same for every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import as_tensor
from debiased_laplace.calibration.predictions.drawing import draw_positions
from debiased_laplace.calibration.predictions.probabilities import PosteriorPredictive

Kind = Literal["rows", "pixels", "samples of pixels", "pixels of one class"]


@dataclass(frozen=True, eq=False)
class PixelDraw:
    """Which pixels of N images are looked at.

    Attributes:
        shape: of the targets, (N, ...).
        image: image of each drawn pixel, rising.
        place: its place in the image, row by row.
    """

    shape: tuple[int, ...]
    image: Int[Tensor, " m"]
    place: Int[Tensor, " m"]

    @property
    def n_pixels(self) -> int:
        """All pixels, drawn or not."""
        return prod(self.shape)

    def pick(self, values: Shaped[Tensor, "..."], kind: Kind) -> Shaped[Tensor, "..."]:
        """The drawn pixels of probabilities of a kind; only they are copied.

        Args:
            values: (N, C, ...), samples (S, N, C, ...), or one value a pixel (N, ...).
            kind: which of the three.

        Returns:
            (m, C), (S, m, C) or (m,).
        """
        image, place = self.image.to(values.device), self.place.to(values.device)
        dim = {"pixels": 2, "samples of pixels": 3}.get(kind, 1)
        flat = values.flatten(dim)
        if kind == "pixels of one class":
            return flat[image, place]
        return flat.movedim(dim - 1, -1)[..., image, place, :]

    def spread(self, ids: Int[Tensor, " k"], where: str) -> Int[Tensor, " m"]:
        """Ids of images, or of pixels, for the drawn pixels.

        Raises:
            ValueError: for another number of ids.
        """
        if ids.numel() == self.shape[0]:
            return ids[self.image]
        if ids.numel() == self.n_pixels:
            return ids[self.image * (self.n_pixels // self.shape[0]) + self.place]
        raise ValueError(
            f"{where} must hold one id for each of {self.shape[0]} images, or for each of {self.n_pixels} pixels; got "
            f"{ids.numel()}."
        )


def draw_pixels(shape: tuple[int, ...], *, max_samples: int, seed: int) -> PixelDraw:
    """All pixels of images (N, ...), or `max_samples` of them, each as likely as the other."""
    drawn = draw_positions(prod(shape), max_samples, seed=seed)
    per_image = prod(shape[1:])
    return PixelDraw(tuple(shape), drawn // per_image, drawn % per_image)


def lay_out(
    predictions: Mapping[str, Any], targets: Any, *, task: str, max_samples: int, seed: int
) -> tuple[dict[str, Any], Any, PixelDraw | None]:
    """Predictions and targets as rows; what is not segmentation-shaped stays as it is.

    Args:
        predictions: method to probabilities: (N, C, ...) or samples (S, N, C, ...), for a binary task also (N, ...).
        targets: labels (N, ...).
        task: "binary" or "multiclass".
        max_samples: most pixels to draw.
        seed: of the draw.

    Returns:
        Predictions, targets, and the pixels drawn; None for the last where the samples are no pixels.

    Raises:
        ValueError: for shapes that do not fit the targets.
    """
    if isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 1:
        raise ValueError(f"max_samples must be a whole number of at least 1; got {max_samples!r}.")
    y = as_tensor(targets, "Targets")
    if y.ndim < 2 or any(isinstance(p, PosteriorPredictive) for p in predictions.values()):
        return dict(predictions), targets, None
    given = {method: as_tensor(p, f"Predictions of {method!r}") for method, p in predictions.items()}
    kinds = {method: _tell_kind(method, p, y, task) for method, p in given.items()}
    if all(kind == "rows" for kind in kinds.values()):
        return dict(given), y, None
    if "rows" in kinds.values():
        raise ValueError(f"All methods must be segmentation-shaped, or none; got {kinds} for targets {tuple(y.shape)}.")
    if y.numel() == 0:
        raise ValueError(f"At least one pixel is needed; got targets of shape {tuple(y.shape)}.")
    pixels = draw_pixels(tuple(y.shape), max_samples=max_samples, seed=seed)
    rows = {method: pixels.pick(p, kinds[method]) for method, p in given.items()}
    return rows, pixels.pick(y, "pixels of one class"), pixels


def _tell_kind(method: str, p: Tensor, y: Tensor, task: str) -> Kind:
    """What the axes of `p` are, by the shape of labels (N, ...) or one-hot rows (n, C)."""
    shape, labels = tuple(p.shape), tuple(y.shape)
    one_hot = y.ndim == 2 and shape in (labels, (*shape[:-2], *labels)) and p.ndim in (2, 3)
    if task == "binary" and shape == labels and shape[-1:] != (2,):
        return "pixels of one class"
    is_pixels = p.ndim == y.ndim + 1 and (shape[0], *shape[2:]) == labels
    if is_pixels and one_hot:
        return _tell_apart(method, p)
    if is_pixels:
        return "pixels"
    if one_hot or p.ndim == 2:
        return "rows"
    if p.ndim == y.ndim + 2 and (shape[1], *shape[3:]) == labels:
        return "samples of pixels"
    if task == "binary" and shape == labels and y.ndim > 2:
        return "pixels of one class"
    raise ValueError(
        f"Predictions of {method!r}: for targets of shape {labels}, probabilities must have shape "
        f"{_expected(labels, task)}; got {shape}."
    )


def _tell_apart(method: str, p: Tensor) -> Kind:
    """Both (N, C, L) and samples (S, n, C) fit one-hot-shaped targets: the classes are the axis that sums to 1."""
    first = p[0].to(torch.float64)
    along = [bool(((first.sum(dim=d) - 1).abs() < 1e-3).all()) for d in (0, 1)]
    if along[0] == along[1]:
        raise ValueError(
            f"Predictions of {method!r} of shape {tuple(p.shape)} may be samples (S, n, C) with one-hot targets or "
            "segmentation (N, C, L): give the targets of samples as labels (n,)."
        )
    return "pixels" if along[0] else "rows"


def _expected(labels: tuple[int, ...], task: str) -> str:
    n, *rest = labels
    place = ", ".join(map(str, rest))
    expected = [f"({n}, C, {place})", f"samples (S, {n}, C, {place})"]
    if task == "binary":
        expected.append(f"P(class 1) ({n}, {place})")
    if len(rest) == 1:
        expected += [f"({n}, {rest[0]}) for one-hot targets", f"samples (S, {n}, {rest[0]}) of these"]
    return ", ".join(expected[:-1]) + f" or {expected[-1]}"
