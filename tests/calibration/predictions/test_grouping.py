import datetime

import numpy as np
import pytest
import torch

from debiased_laplace.calibration.predictions.grouping import MOST_GROUPS, read_groupings, read_ids

FORMS = {
    "text": ["b", "a", "b"],
    "whole numbers": [20, 3, 20],
    "numpy": np.array([20, 3, 20]),
    "torch": torch.tensor([20, 3, 20]),
    "booleans": [True, False, True],
    "tuples": [("site", 2), ("site", 1), ("site", 2)],
    "dates": [datetime.date(2020, 1, 2), datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)],
    "numpy text": np.array(["b", "a", "b"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_any_kind_are_numbered_by_rising_value(form: str) -> None:
    assert read_ids(FORMS[form], "g", where="ids").codes.tolist() == [1, 0, 1]


def test_labels_are_the_values_in_order() -> None:
    assert read_ids([20, 3, 100], "g", where="ids").labels == ("3", "20", "100")
    assert read_ids(["x", 3, "a"], "g", where="ids").labels == ("3", "a", "x")


def test_a_single_grouping_and_named_ones() -> None:
    (one,) = read_groupings(["a", "b"])
    assert (one.name, one.labels) == ("group", ("a", "b"))
    assert [g.name for g in read_groupings({"sex": ["f", "m"], "site": [1, 2]})] == ["sex", "site"]
    assert read_groupings(None) == ()


WRONG = {
    "None among them": (["a", None], "missing; 1 of 2"),
    "NaN in a list": ([1.0, float("nan")], "missing"),
    "NaN in an array": (np.array([1.0, np.nan]), "1 of 2 are NaN"),
    "a word": ("abc", "one id for each sample; got str"),
    "a number": (3, "one id for each sample; got int"),
    "lists": ([[1], [2]], "ids such as text"),
    "too many": (list(range(MOST_GROUPS + 1)), "clusters="),
    "no name": ({"": [1]}, "must be text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_groups_are_named(case: str) -> None:
    groups, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_groupings(groups)
