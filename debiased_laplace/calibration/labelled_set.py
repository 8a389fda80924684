"""The samples of a report: pixels as rows, who belongs together, and who is judged apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from debiased_laplace.calibration.estimates import count_units
from debiased_laplace.calibration.predictions.arrays import as_tensor
from debiased_laplace.calibration.predictions.grouping import Grouping, read_groupings, read_ids
from debiased_laplace.calibration.predictions.pixels import PixelDraw, lay_out

FEW_CLUSTERS = 30


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Predictions and targets as rows, with what is known of the samples.

    Attributes:
        predictions: method to predictions, one row per sample.
        targets: one row per sample.
        clusters: number of the cluster that each sample belongs to; None where all samples are independent.
        groupings: groups that are judged apart.
        pixels: the pixels drawn, where samples are pixels.
        warnings: what the reader must know of the samples.
    """

    predictions: Mapping[str, Any]
    targets: Any
    clusters: Int[Tensor, " n"] | None
    groupings: tuple[Grouping, ...]
    pixels: PixelDraw | None
    warnings: tuple[str, ...] = ()

    def lay_out_logits(self, logits: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Logits of the same pixels; as they are where samples are no pixels."""
        if self.pixels is None:
            return logits or {}
        given = {method: as_tensor(z, f"Logits of {method!r}") for method, z in (logits or {}).items()}
        return {method: self.pixels.pick(z, "pixels") if z.ndim > 2 else z for method, z in given.items()}


def lay_out_test_set(
    predictions: Mapping[str, Any], targets: Any, *, task: str, groups: Any, clusters: Any, max_samples: int, seed: int
) -> LabelledSet:
    """Rows, clusters and groups of a test set.

    Args:
        predictions: method to predictions in any form.
        targets: in any form.
        task: of the report.
        groups: a grouping, or names to groupings; one group per sample (of images: per image or per pixel).
        clusters: one id per sample (of images: per image), or None. Pixels are clustered by image in any case.
        max_samples: most pixels to draw.
        seed: of the draw.

    Raises:
        ValueError: for shapes that do not fit, wrong numbers of ids, or clusters of regression samples.
    """
    groupings = read_groupings(groups)
    if task == "regression":
        if clusters is not None:
            raise ValueError("clusters= is built for classification; regression takes samples as independent so far.")
        n = len(as_tensor(targets, "Targets")) if groupings else 0
        return LabelledSet(predictions, targets, None, tuple(_of_samples(g, n) for g in groupings), None)
    rows, y, pixels = lay_out(predictions, targets, task=task, max_samples=max_samples, seed=seed)
    ids = None if clusters is None else read_ids(clusters, "clusters", where="clusters")
    if pixels is None:
        n = len(as_tensor(y, "Targets")) if groupings or ids else 0
        known = None if ids is None else _number(_of_samples(ids, n).codes)
        return LabelledSet(rows, y, known, tuple(_of_samples(g, n) for g in groupings), None, _warn(known, pixels))
    own = pixels.image if ids is None else pixels.spread(ids.codes, "clusters")
    spread = tuple(Grouping(g.name, g.labels, pixels.spread(g.codes, f"groups[{g.name!r}]")) for g in groupings)
    known = _number(own)
    return LabelledSet(rows, y, known, spread, pixels, _warn(known, pixels))


def _of_samples(grouping: Grouping, n: int) -> Grouping:
    if grouping.codes.numel() != n:
        where = "clusters" if grouping.name == "clusters" else f"groups[{grouping.name!r}]"
        raise ValueError(f"{where} must hold one id for each of {n} samples; got {grouping.codes.numel()}.")
    return grouping


def _number(ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Numbers without gaps: an image of which no pixel was drawn is no cluster."""
    return torch.unique(ids, return_inverse=True)[1]


def _warn(clusters: Int[Tensor, " n"] | None, pixels: PixelDraw | None) -> tuple[str, ...]:
    if clusters is None:
        return ()
    n_clusters = count_units(clusters.numel(), clusters)
    what = "images" if pixels is not None else "clusters"
    warnings = [
        f"The {clusters.numel()} samples come in {n_clusters} {what}. Intervals and verdicts allow for samples of one "
        "cluster that depend on each other; noise floors and the p-value of calibration cannot, so that the p-value is "
        "too small."
    ]
    if n_clusters < FEW_CLUSTERS:
        warnings.append(f"Only {n_clusters} {what}: intervals and verdicts are rough below {FEW_CLUSTERS}.")
    if pixels is not None and pixels.image.numel() < pixels.n_pixels:
        warnings.append(
            f"{pixels.image.numel()} of {pixels.n_pixels} pixels were drawn at random, the same for every method; "
            "every number rests on these."
        )
    return tuple(warnings)
