"""Several binary labels of a sample, one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from debiased_laplace.calibration.contents import ReportTable
from debiased_laplace.calibration.inputs import Settings, read_labels
from debiased_laplace.calibration.metrics.classification import measure_each_class, negative_log_likelihood
from debiased_laplace.calibration.probabilities import Probabilities, read_probabilities, reduce_classification


def tabulate_labels(
    predictions: Mapping[str, Any],
    targets: Any,
    labels: Int[Tensor, " rows"],
    n_labels: int,
    names: Sequence[str] | None,
    settings: Settings,
) -> ReportTable:
    """Return a table with the share, and each method's loss and calibration, of every label, and their means.

    Args:
        predictions: method to probabilities (rows, 2).
        targets: 0 or 1 of each row.
        labels: which label it is of.
        n_labels: number of labels.
        names: of the labels; None: their numbers.
        settings: of the report.

    Raises:
        ValueError: if there is not a name for each label, or a target is neither 0 nor 1.
    """
    if names is not None and len(names) != n_labels:
        raise ValueError(f"class_names must have one name for each of {n_labels} labels; got {len(names)}.")
    sources = {method: read_probabilities(method, p, task="binary") for method, p in predictions.items()}
    y = read_labels(targets, n=len(labels), n_classes=2, where="Predictions")
    rows, shown = [], []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        numbers = [y[own].double().mean().item()]
        for source in sources.values():
            reduced = reduce_classification(Probabilities(source.values[..., own, :]), y[own], n_bins=settings.n_bins)
            error, floor = (of_class[1].item() for of_class in measure_each_class(reduced))
            numbers += [negative_log_likelihood(reduced).mean().item(), error, floor]
        rows.append(numbers)
        shown.append(str(label) if names is None else names[label])
    rows.append(torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist())
    columns = [f"{method}: {what}" for method in sources for what in ("NLL", "ECE", "noise floor")]
    return ReportTable(
        "Labels",
        ["label", "share of 1", *columns],
        [[name, *numbers] for name, numbers in zip([*shown, "mean over labels"], rows, strict=True)],
        note="ECE of the probability of 1, label by label, with the error that right probabilities would show. The "
        "last row weighs labels equally (macro average). All else in the report takes the labels together (micro "
        "average), with those of a sample as a cluster.",
    )
