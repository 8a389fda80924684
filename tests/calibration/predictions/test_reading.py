import numpy as np
import pytest
import torch

from debiased_laplace.calibration.predictions.classification import read_classification
from debiased_laplace.calibration.predictions.regression import read_regression

P = [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]
Y = [1, 2, 1]


def read(p=P, y=Y, task="multiclass"):
    return read_classification("net", p, y, task=task)


FORMS = {
    "lists": (P, Y),
    "numpy": (np.array(P), np.array(Y)),
    "numpy int32 labels": (np.array(P), np.array(Y, dtype=np.int32)),
    "torch": (torch.tensor(P, dtype=torch.float64), torch.tensor(Y)),
    "torch with gradient": (torch.tensor(P, dtype=torch.float64, requires_grad=True), torch.tensor(Y)),
    "one-hot floats": (np.array(P), np.eye(3)[Y]),
    "one-hot bools": (np.array(P), np.eye(3, dtype=bool)[Y]),
    "whole float labels": (np.array(P), np.array(Y, dtype=float)),
    "list of tensor rows": ([torch.tensor(row, dtype=torch.float64) for row in P], Y),
    "reversed view": (np.array(P)[::-1][::-1], np.array(Y)[::-1][::-1]),
}


def exact(predictions) -> torch.Tensor:
    """The probabilities that the reduction saw."""
    return torch.cat([p for _, p in predictions.source.portions()], dim=-2)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_numbers_reads_the_same(form: str) -> None:
    r = read(*FORMS[form])
    assert exact(r).dtype == torch.float64
    assert not exact(r).requires_grad
    torch.testing.assert_close(exact(r), torch.tensor(P, dtype=torch.float64), rtol=0, atol=1e-15)
    assert r.targets.tolist() == Y
    assert r.confidence.tolist() == [0.5, 0.8, 0.6]
    assert r.correct.tolist() == [1, 1, 0]
    assert (r.n, r.n_classes) == (3, 3)


def test_read_only_arrays_are_left_alone() -> None:
    p = np.array(P)
    p.setflags(write=False)
    read(p)
    assert not p.flags.writeable


def test_float32_rows_are_renormalised_in_float64() -> None:
    p = torch.rand(50, 7, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    r = read(p, torch.zeros(50, dtype=torch.int64))
    assert (p.double().sum(dim=1) - 1).abs().max() > 1e-9  # there was something to do
    torch.testing.assert_close(exact(r).sum(dim=1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-15)


def test_probability_just_above_one_is_rounding() -> None:
    r = read([[1.0000001, 0.0], [0.4, 0.6]], [0, 1])
    assert r.confidence.max().item() == 1.0
    assert exact(read([1.0000001, 0.25], [1, 0], "binary")).tolist() == [[0, 1], [0.75, 0.25]]


def test_both_binary_forms_agree() -> None:
    p = np.array([0.9, 0.2, 0.5])
    one, two = read(p, [1, 0, 0], "binary"), read(np.stack([1 - p, p], axis=1), [1, 0, 0], "binary")
    assert torch.equal(exact(one), exact(two))
    assert torch.equal(one.targets, two.targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zero_for_the_true_class_is_counted(dtype: torch.dtype) -> None:
    r = read(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=dtype), [1, 0, 0])
    assert r.n_impossible == 2
    assert 0 < r.smallest_probability < 1e-37


WRONG = {
    "NaN": (([[0.5, float("nan")]], [0]), "finite"),
    "infinity": (([[float("inf"), 0.0]], [0]), "finite"),
    "negative": (([[1.1, -0.1]], [0]), r"\[0, 1\]"),
    "logits": (([[3.0, -2.0, 0.5]], [0]), "logits"),
    "log-probabilities": ((np.log(P), Y), "log-probabilities"),
    "sum 1.01": (([[0.5, 0.51]], [0]), "row 0 sums to 1.01"),
    "positive logits": (([[0.9, 0.8, 0.7]], [0]), "softmax"),
    "label too large": ((P, [0, 1, 3]), r"\[0, 3\).*0 to 3"),
    "label negative": ((P, [0, 1, -1]), r"-1 to 1"),
    "half label": ((P, [0, 1, 0.5]), "whole numbers"),
    "NaN label": ((P, [0, 1, float("nan")]), "whole numbers"),
    "too few labels": ((P, [0, 1]), r"3 rows .* \(2,\)"),
    "two ones": ((P, [[1, 1, 0], [1, 0, 0], [0, 0, 1]]), "single 1"),
    "soft labels": ((P, P), "whole numbers"),
    "one class": (([[1.0], [1.0]], [0, 0]), r"C >= 2.*\(2, 1\)"),
    "no sample": ((np.zeros((0, 3)), []), "at least one sample"),
    "one-dimensional": (([0.3, 0.7], [0, 1]), r"\(n, C\)"),
    "four-dimensional": ((np.full((2, 2, 2, 2), 0.5), [0, 1]), r"\(2, 2, 2, 2\)"),
    "text": (([["a", "b"]], [0]), "array or tensor of numbers"),
    "ragged": (([[0.5, 0.5], [1.0]], [0, 0]), "array or tensor of numbers"),
    "complex": ((np.full((1, 2), 0.5 + 0j), [0]), "real numbers"),
    "nothing": ((None, [0]), "array or tensor of numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_classification_input_is_named(case: str) -> None:
    (p, y), message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read(p, y)


@pytest.mark.parametrize(
    ("p", "message"),
    [(P, r"\(n,\) or \(n, 2\)"), ([-0.1, 0.5, 0.5], "sigmoid"), ([[0.5], [0.5], [0.5]], r"\(3, 1\)")],
    ids=["three classes", "logits", "one column"],
)
def test_wrong_binary_input_is_named(p, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(p, [0, 1, 1], "binary")


def test_the_message_says_which_method_and_where() -> None:
    p = np.array(P)
    p[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"'net'.*1 of 9 are not, the first in row 2, column 1"):
        read(p)


MEAN, STD, TARGETS = [0.5, -1.0, 2.0], [0.5, 2.0, 0.25], [1.0, -3.0, 1.5]


@pytest.mark.parametrize("column", [False, True], ids=["(n,)", "(n, 1)"])
def test_regression_forms_agree(column: bool) -> None:
    arrays = [np.array(x, dtype=np.float32) for x in (MEAN, STD, TARGETS)]
    if column:
        arrays = [x[:, None] for x in arrays]
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    for mean, std, y in (arrays, tensors):
        r = read_regression("net", (mean, std), y)
        assert r.z_scores.tolist() == [[1.0], [-1.0], [-2.0]]
        assert r.z_scores.dtype == torch.float64
        assert (r.n, r.n_outputs) == (3, 1)


WRONG_REGRESSION = {
    "no pair": ((np.array(MEAN), TARGETS), "pair"),
    "a triple": (((MEAN, STD, STD), TARGETS), "length 3"),
    "zero deviation": (((MEAN, [0.5, 0.0, 1.0]), TARGETS), "positive.*row 1"),
    "negative deviation": (((MEAN, [0.5, -1.0, 1.0]), TARGETS), "smallest: -1"),
    "NaN mean": ((([0.0, float("nan"), 0.0], STD), TARGETS), "mean must be finite"),
    "infinite target": (((MEAN, STD), [0.0, 1.0, float("inf")]), "targets must be finite"),
    "other length": (((MEAN, STD), [0.0, 1.0]), r"one shape.*\(2, 1\)"),
    "one deviation": (((MEAN, [0.5]), TARGETS), "one shape"),
    "empty": ((([], []), []), "at least one sample"),
    "scalar": (((1.0, 1.0), 1.0), r"got \(\)"),
}


@pytest.mark.parametrize("case", WRONG_REGRESSION)
def test_wrong_regression_input_is_named(case: str) -> None:
    (prediction, targets), message = WRONG_REGRESSION[case]
    with pytest.raises(ValueError, match=message):
        read_regression("net", prediction, targets)
