"""Predictions with positions (segmentation) as rows: some positions, the same ones for every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from debiased_laplace.calibration.inputs import as_tensor, check_whole_number
from debiased_laplace.calibration.probabilities import PosteriorPredictive, draw_rows

Layout = Literal["rows", "positions", "samples of positions", "positions of one class"]


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of N images: the image (rising) and place, row by row, of each; targets have the shape (N, ...)."""

    shape: tuple[int, ...]
    image: Int[Tensor, " m"]
    place: Int[Tensor, " m"]

    @classmethod
    def draw(cls, shape: tuple[int, ...], *, max_samples: int, seed: int) -> "Positions":
        """Draw `max_samples` positions of images (N, ...), each equally likely, or take all if there are no more."""
        total, per_image = prod(shape), prod(shape[1:])
        if total <= 4 * max_samples:
            drawn = draw_rows(total, max_samples, seed=seed)
        else:  # without a list of all positions
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.empty(0, dtype=torch.int64)
            while drawn.numel() < max_samples:  # a random part of distinct draws is a random set
                drawn = torch.cat([drawn, torch.randint(total, (max_samples,), generator=generator)]).unique()
            drawn = drawn[torch.randperm(drawn.numel(), generator=generator)[:max_samples]].sort().values
        return cls(shape, drawn // per_image, drawn % per_image)

    def pick(self, values: Shaped[Tensor, "..."], layout: Layout) -> Shaped[Tensor, "..."]:
        """Return the drawn positions of (N, C, ...), (S, N, C, ...) or (N, ...) as (m, C), (S, m, C) or (m,)."""
        image, place = self.image.to(values.device), self.place.to(values.device)
        if layout == "positions of one class":
            return values.flatten(1)[image, place]
        dim = 2 if layout == "positions" else 3
        return values.flatten(dim).movedim(dim - 1, -1)[..., image, place, :]

    def spread(self, ids: Int[Tensor, " k"]) -> Int[Tensor, " m"]:
        """Return the ids of images, or of positions, for the drawn positions."""
        n_images, n_positions = self.shape[0], prod(self.shape)
        if ids.numel() == n_images:
            return ids[self.image]
        if ids.numel() == n_positions:
            return ids[self.image * (n_positions // n_images) + self.place]
        raise ValueError(
            f"clusters must hold an id for each of {n_images} images or {n_positions} pixels; got {len(ids)}."
        )


def as_rows(
    predictions: Mapping[str, Any], targets: Any, *, task: str, max_samples: int, seed: int
) -> tuple[dict[str, Any], Any, Positions | None]:
    """Lay predictions with positions out as rows; others stay as they are.

    Probabilities are (N, C, ...) or samples (S, N, C, ...), for a binary task also (N, ...); labels are (N, ...).

    Returns:
        Predictions, targets, and the positions drawn; None for the last where samples have none.
    """
    check_whole_number("max_samples", max_samples, 1)
    y = as_tensor(targets, "Targets")
    if y.ndim < 2 or any(isinstance(p, PosteriorPredictive) for p in predictions.values()):
        return dict(predictions), targets, None
    rows = {method: as_tensor(p, f"Predictions of {method!r}") for method, p in predictions.items()}
    if task == "binary":  # (N, 1, ...) is P(class 1)
        rows = {m: p[:, 0] if p.ndim == y.ndim + 1 and p.shape[1] == 1 else p for m, p in rows.items()}
    layouts = {method: _tell_layout(method, p, y, task) for method, p in rows.items()}
    if all(layout == "rows" for layout in layouts.values()):
        return rows, y, None
    if "rows" in layouts.values():
        raise ValueError(f"All methods must have positions, or none; got {layouts} for targets {tuple(y.shape)}.")
    if y.numel() == 0:
        raise ValueError(f"At least one pixel is needed; got targets of shape {tuple(y.shape)}.")
    positions = Positions.draw(tuple(y.shape), max_samples=max_samples, seed=seed)
    rows = {method: positions.pick(p, layouts[method]) for method, p in rows.items()}
    return rows, positions.pick(y, "positions of one class"), positions


def _tell_layout(method: str, p: Tensor, y: Tensor, task: str) -> Layout:
    """Return what the axes of `p` are, by the shape of labels (N, ...) or one-hot rows (n, C)."""
    shape, labels = tuple(p.shape), tuple(y.shape)
    one_hot = y.ndim == 2 and shape in (labels, (*shape[:-2], *labels)) and p.ndim in (2, 3)
    if task == "binary" and shape == labels and (shape[-1:] != (2,) or y.ndim > 2):
        return "positions of one class"
    if p.ndim == y.ndim + 1 and (shape[0], *shape[2:]) == labels:
        return _tell_apart(method, p) if one_hot else "positions"
    if one_hot or p.ndim == 2:
        return "rows"
    if p.ndim == y.ndim + 2 and (shape[1], *shape[3:]) == labels:
        return "samples of positions"
    n, place = labels[0], ", ".join(map(str, labels[1:]))
    binary = f", or P(class 1) ({n}, {place})" if task == "binary" else ""
    raise ValueError(
        f"Predictions of {method!r}: for targets of shape {labels}, expected probabilities ({n}, C, {place}), samples "
        f"(S, {n}, C, {place}) of them{binary}, or rows (n, C) for one-hot targets; got {shape}."
    )


def _tell_apart(method: str, p: Tensor) -> Layout:
    """Tell (N, C, L) from samples (S, n, C) with one-hot targets by the axis that sums to 1, that of the classes."""
    along = [bool(((p[0].double().sum(dim=d) - 1).abs() < 1e-3).all()) for d in (0, 1)]
    if along[0] == along[1]:
        raise ValueError(
            f"Predictions of {method!r} of shape {tuple(p.shape)} may be samples (S, n, C) with one-hot targets or "
            "positions (N, C, L): give the targets of samples as labels (n,)."
        )
    return "positions" if along[0] else "rows"
