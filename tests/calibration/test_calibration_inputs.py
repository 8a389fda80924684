"""What the readers of arrays, labels, clusters and options take, and what they refuse."""

import datetime

import numpy as np
import pytest
import torch

from debiased_laplace.calibration.inputs import Settings, as_tensor, read_clusters, read_labels

READERS = {
    "array": lambda values: as_tensor(values, "X"),
    "labels": lambda values: read_labels(values, n=3, n_classes=3, where="P"),
    "clusters": read_clusters,
    "settings": lambda options: Settings(**{"n_bins": 1000, "n_resamples": 2, "seed": 0, **options}),
}
EXPECTED = {"array": [[0.25, 0.75]], "labels": [1, 2, 1], "clusters": [1, 0, 1]}
FORMS = {
    "array: half precision": np.array([[0.25, 0.75]], dtype=np.float16),
    "array: read-only": np.broadcast_to([0.25, 0.75], (1, 2)),
    "array: negative strides": np.array([[0.75, 0.25]])[:, ::-1],
    "array: big-endian": np.array([[0.25, 0.75]], dtype=">f8"),
    "array: objects": np.array([[0.25, 0.75]], dtype=object),
    "array: list of tensors": [torch.tensor([0.25, 0.75], requires_grad=True)],
    "array: bfloat16 with gradient": torch.tensor([[0.25, 0.75]], dtype=torch.bfloat16, requires_grad=True),
    "labels: whole floats": torch.tensor([1.0, 2.0, 1.0]),
    "labels: one-hot floats": np.eye(3)[[1, 2, 1]],
    "labels: one-hot booleans": np.eye(3, dtype=bool)[[1, 2, 1]],
    "clusters: text": ["b", "a", "b"],
    "clusters: tensor": torch.tensor([20, 3, 20]),
    "clusters: tuples": [("site", 10), ("site", 9), ("site", 10)],
    "clusters: dates": [datetime.date(2020, 1, day) for day in (2, 1, 2)],
    "clusters: numpy dates": np.array(["2020-01-02", "2020-01-01", "2020-01-02"], dtype="datetime64[D]"),
    "clusters: numbers and text": ["x", 3, "x"],
    "clusters: rows": np.array([[20], [3], [20]]),
}


@pytest.mark.parametrize("case", FORMS)
def test_every_form_of_the_same_values_reads_the_same(case: str) -> None:
    reader = case.split(":")[0]
    x = READERS[reader](FORMS[case])
    assert (x.tolist(), x.requires_grad) == (EXPECTED[reader], False)
    assert x.dtype == {"array: half precision": torch.float16}.get(case, x.dtype if reader == "array" else torch.int64)


WRONG = {
    "array: nothing": (None, "X: expected an array or tensor of numbers; got NoneType"),
    "array: a gap": ([0.5, None], "X: expected an array or tensor of numbers; got list .*not all of its entries"),
    "labels: negative and too large": ([0, -1, 3], r"\[0, 3\) for 3 classes; got -1 to 3"),
    "labels: fractions": ([0, 1, 0.5], "whole numbers"),
    "labels: probabilities, NaN among them": (np.full((3, 3), np.nan), "whole numbers"),
    "labels: too few": ([0, 1], r"P have 3 rows and 3 classes.*\(3,\).*\(3, 3\); got \(2,\)"),
    "labels: two ones": ([[1, 1, 0], [1, 0, 0], [0, 0, 1]], "single 1"),
    "clusters: None among them": (["a", None], "missing; 1 of 2 are, the first at 1"),
    "clusters: NaN in a list": ([float("nan"), 1.0], "the first at 0"),
    "clusters: no date": (np.array(["2020-01-02", "NaT"], dtype="datetime64[D]"), "missing"),
    "clusters: a word": ("abc", "one id for each sample; got str"),
    "clusters: a set, which has no order": ({1, 3}, "got set"),
    "clusters: lists": ([[1], [2]], "ids such as text or whole numbers; got list"),
    "settings: too many bins": (
        {"n_bins": 1001},
        "n_bins must be a whole number of at least 2 and at most 1000; got 1001",
    ),
    "settings: boolean": ({"n_resamples": True}, "n_resamples.*got True"),
    "settings: negative seed": ({"seed": -1}, "seed must be a whole number of at least 0; got -1"),
    "settings: a percentage": ({"confidence_level": 95.0}, "got 95.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case: str) -> None:
    values, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        READERS[case.split(":")[0]](values)
