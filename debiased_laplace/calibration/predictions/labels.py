"""True classes, checked."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import as_tensor


def read_labels(targets: Any, *, n: int, n_classes: int, where: str) -> Int[Tensor, " n"]:
    """Labels from labels (n,) or one-hot rows (n, C).

    Args:
        targets: labels or one-hot rows.
        n: samples that were predicted.
        n_classes: classes C that were predicted.
        where: whose predictions, for messages.

    Raises:
        ValueError: for another shape, labels outside [0, C), or rows that are not one-hot.
    """
    y = as_tensor(targets, "Targets")
    if y.shape not in ((n,), (n, n_classes)):
        raise ValueError(
            f"{where} have {n} rows and {n_classes} classes, so targets must be labels of shape "
            f"({n},) or one-hot rows of shape ({n}, {n_classes}); got {tuple(y.shape)}."
        )
    if y.is_floating_point() and not bool((y.isfinite() & (y == y.round())).all()):
        raise ValueError(f"Targets must be whole numbers; got {y.dtype} with others among them.")
    y = y.to(torch.int64)
    if y.ndim == 2:
        if not bool(((y == 0) | (y == 1)).all() and (y.sum(dim=1) == 1).all()):
            raise ValueError("One-hot targets must have a single 1 per row and zeros elsewhere.")
        return y.argmax(dim=1)
    if int(y.min()) < 0 or int(y.max()) >= n_classes:
        raise ValueError(
            f"Labels must lie in [0, {n_classes}) for {n_classes} classes; got {int(y.min())} to {int(y.max())}."
        )
    return y
