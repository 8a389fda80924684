"""Class probabilities against loops over single numbers, SciPy and values by hand."""

from math import log

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from debiased_laplace.calibration import probabilities as room
from debiased_laplace.calibration.probabilities import PosteriorPredictive, Probabilities, uncertainty_scores

P = [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]


def read(p=P, task="multiclass") -> Probabilities:
    return room.read_probabilities("net", p, task=task)


def rows_of(p: Probabilities) -> torch.Tensor:
    return torch.cat([p.read(rows) for rows in p.portions()], dim=-2)


def draw(*shape: int) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).softmax(-1)


def check_against_loops(samples: torch.Tensor, n_bins: int) -> None:
    """Every number of a reduction, one probability after the other."""
    y = torch.arange(samples.shape[-2]) % min(10, samples.shape[-1])
    found, p = room.reduce_classification(read(samples), y, n_bins=n_bins), room.mean_prediction(samples)
    edges, sums = np.linspace(0, 1, n_bins + 1), np.zeros((3, p.shape[1], n_bins))
    for i, row in enumerate(p.numpy()):
        for c, value in enumerate(row.tolist()):
            b = min(n_bins - 1, np.searchsorted(edges, value, side="right") - 1)
            sums[:, c, b] += (c == y[i], value, value * (1 - value))
        first = int(np.argmax(row >= row.max() * (1 - 1e-12)))  # of classes that differ by rounding
        assert (found.predicted[i], found.correct[i]) == (first, first == y[i])
        vectors = (found.confidence, found.true_class_probability, found.squared_norm, found.uncertainty["entropy"])
        expected = (row.max(), row[y[i]], (row**2).sum(), entropy(row))
        assert [x[i].item() for x in vectors] == pytest.approx(expected, abs=1e-12)
    bins = [getattr(found.class_bins, name).numpy() for name in ("positives", "confidence", "variance")]
    np.testing.assert_allclose(np.stack(bins), sums, rtol=0, atol=1e-11)
    assert all((part[sums[1] == 0] == 0).all() for part in bins)  # no rounding in an empty bin
    assert len(found.uncertainty) == samples.ndim  # mutual information needs samples
    if samples.ndim == 3:
        information = entropy(p.numpy(), axis=-1) - entropy(samples.numpy(), axis=-1).mean(axis=0)
        np.testing.assert_allclose(found.uncertainty["mutual_information"].numpy(), information, rtol=0, atol=1e-12)
        assert information.min() > 0.01


@pytest.mark.parametrize(("shape", "n_bins"), [((60, 2), 2), ((60, 12), 7), ((5, 40, 4), 15), ((30, 1000), 15)])
@pytest.mark.parametrize("at_once", [1, 2500, 10**6])
def test_every_number_is_that_of_a_loop_whatever_the_portions(monkeypatch, shape, n_bins: int, at_once: int) -> None:
    monkeypatch.setattr(room, "NUMBERS_AT_ONCE", at_once)
    check_against_loops(draw(*shape), n_bins)


@pytest.mark.parametrize("n_bins", [7, 10, 15])
def test_probabilities_on_every_edge_belong_to_the_bin_above(n_bins: int) -> None:
    edges = np.linspace(0, 1, n_bins + 1)
    assert room.inner_edges(n_bins).tolist() == edges[1:-1].tolist()
    p = torch.from_numpy(np.concatenate([edges, np.nextafter(edges[1:], 0), np.nextafter(edges[:-1], 1)]))
    check_against_loops(torch.stack([p, 1 - p], dim=1), n_bins)
    check_against_loops(torch.full((1000, 3), 1 / 3, dtype=torch.float64), n_bins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_every_precision_sum_to_one_and_zeros_are_counted(dtype: torch.dtype) -> None:
    given = draw(80, 1000).to(dtype)
    p = rows_of(read(given))
    torch.testing.assert_close(p.sum(dim=1), torch.ones(80, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(p, given.double(), rtol=1e-3, atol=0)
    assert dtype == torch.float64 or (given.double().sum(dim=1) - 1).abs().max() > 1e-9  # there was something to do
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=dtype)
    found = room.reduce_classification(read(certain), torch.tensor([1, 0, 0]), n_bins=15)
    assert (found.n, found.n_impossible) == (3, 2)  # the true class has probability 0
    lowest = log(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny)
    assert found.source.take_logits(slice(None)).tolist() == [[0, lowest], [0, 0], [lowest, 0]]


def test_reduced_samples_and_both_binary_forms_say_the_same() -> None:
    samples, variance = draw(7, 50, 4), torch.arange(50.0).half()
    whole = uncertainty_scores(read(samples))
    reduced = read(PosteriorPredictive(samples.mean(dim=0), whole["mutual_information"], variance))
    torch.testing.assert_close(uncertainty_scores(reduced), whole, rtol=1e-12, atol=0)
    assert torch.equal(reduced.logit_variance, variance.double())
    binary = [[0.1, 0.9], [0.8, 0.2], [0.0, 1.0]]  # both forms; rounding above 1 is taken off
    torch.testing.assert_close(rows_of(read([0.9, 0.2, 1.0000001], "binary")), rows_of(read(binary, "binary")))


def test_a_temperature_divides_the_logits_of_the_mean() -> None:
    samples, T = draw(5, 20, 4), torch.linspace(0.5, 2.5, 20, dtype=torch.float64)
    known = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))  # they win over what was rounded
    for p, logits, z in ((samples, None, samples.mean(dim=0).log()), (samples[0], known, known.double())):
        scaled, rows = Probabilities(p, temperature=T, logits=logits), torch.tensor([7, 3, 3])
        torch.testing.assert_close(scaled.read(slice(3, 9)), (z / T[:, None]).softmax(dim=1)[3:9])
        torch.testing.assert_close(scaled.take_logits(rows), (z - z.amax(dim=1, keepdim=True))[rows])


NAN = float("nan")
WRONG = {
    "NaN in the third portion": ([[0.5, 0.5]] * 60 + [[0.5, NAN]], "'net': .*finite; 1 of 22 .* row 60, column 1"),
    "negative": ([[1.1, -0.1]], r"\[0, 1\].*range -0.1 to 1.1"),
    "logits": ([[3.0, -2.0, 0.5]], "If these are logits"),
    "log-probabilities": (np.log(P), "log-probabilities"),
    "positive logits": ([[0.9, 0.08, 0.02], [0.9, 0.8, 0.7]], "row 1 sums to 2.4. Logits need a softmax"),
    "sum in the third portion": ([[0.5, 0.5]] * 60 + [[0.5, 0.502]], "within 0.001; row 60 sums to 1.002"),
    "no sample": (np.zeros((0, 3)), "at least one sample"),
    "one of the posterior's samples": (np.array([[[0.5, 0.5]], [[0.5, 0.6]]]), "row 1 sums to 1.1"),
    "binary: three classes": (P, r"\(n,\) or \(n, 2\)"),
    "binary: logits": ([-0.1, 0.5], "sigmoid"),
    "binary: NaN": ([0.5, NAN], "row 1, column 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_probabilities_are_named(monkeypatch, case: str) -> None:
    p, message = WRONG[case]
    monkeypatch.setattr(room, "NUMBERS_AT_ONCE", 50)
    with pytest.raises(ValueError, match=message):
        read(p, "binary" if case.startswith("binary") else "multiclass")
