"""Held-out KL differences in a report are those of `held_out_kl`."""

from functools import cache

import pytest
import torch
from laplace import Laplace
from models import mlp, targets
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate
from debiased_laplace.errors import OverlapError

N, B, PRIOR, TEMPERATURE = 40, 16, 0.4, 1.3
DATA = TensorDataset(mlp()[1], targets("classification"))
MODEL = mlp()[0]


def loader(indices):
    return DataLoader(Subset(DATA, indices), batch_size=8)


# not all that are left, which would make the differences exact
HELD_OUT_INDICES = range(B, 34)
FITTED, HELD_OUT, ALL = loader(range(B)), loader(HELD_OUT_INDICES), DataLoader(DATA, batch_size=8)


@cache
def posterior(magnitudes, n=B, rank=None):
    la = DebiasedLaplace(
        MODEL,
        "classification",
        magnitudes=magnitudes,
        complement="none",
        rank=rank,
        prior_precision=PRIOR,
        temperature=TEMPERATURE,
    )
    la.fit(loader(range(n)), n_data=N)
    return la


def judged(methods, **options):
    return evaluate(methods, ALL, task="multiclass", temperature_scaling="none", **options).posteriors


def test_differences_are_paired_against_the_first():
    a, b = posterior("cross_fitted"), posterior("cross_fitted", rank=1)
    found = judged({"a": a, "b": b}, held_out_loader=HELD_OUT, fitted_loader=FITTED)
    expected = b.held_out_kl(HELD_OUT, FITTED) - a.held_out_kl(HELD_OUT, FITTED)
    assert found["a"].held_out is None
    h = found["b"].held_out
    assert (h.reference, h.n) == ("a", len(HELD_OUT_INDICES))
    assert h.difference == pytest.approx(expected.value)
    assert h.standard_error == pytest.approx(expected.standard_error)
    assert h.high - h.low == pytest.approx(2 * 1.959964 * expected.standard_error, rel=1e-5)
    # a single direction is further from the full batch, and clearly so
    assert h.difference > 3 * h.standard_error
    assert h.verdict == "further"
    assert judged({"b": b, "a": a}, held_out_loader=HELD_OUT)["a"].held_out.verdict == "closer"


def test_the_same_posterior_is_no_further():
    a = posterior("cross_fitted")
    h = judged({"a": a, "again": a}, held_out_loader=HELD_OUT)["again"].held_out
    assert (h.difference, h.p_value, h.verdict) == (0.0, 1.0, "no detectable difference")


def test_a_posterior_of_all_data_beside_one_of_a_batch():
    full, batch = posterior("same_batch", n=N), posterior("cross_fitted")
    found = judged(
        {"full": full, "batch": batch}, held_out_loader=HELD_OUT, fitted_loader={"full": ALL, "batch": FITTED}
    )
    expected = batch.held_out_kl(HELD_OUT, FITTED) - full.held_out_kl(None, ALL)
    assert found["batch"].held_out.difference == pytest.approx(expected.value)
    assert found["batch"].held_out.difference > 0


def test_laplace_torchs_posteriors_need_the_fitted_samples():
    # n / N of the samples at the temperature that makes it the posterior of N
    la = Laplace(MODEL, "classification", "all", "kron", prior_precision=PRIOR, temperature=TEMPERATURE)
    la.fit(ALL)
    note = judged({"a": posterior("cross_fitted"), "la": la}, held_out_loader=HELD_OUT)["la"]
    assert note.held_out is None
    assert any("fitted_loader" in n for n in note.notes)


def test_what_cannot_be_compared_says_why():
    other = DebiasedLaplace(MODEL, "classification", prior_precision=7.0, temperature=TEMPERATURE)
    other.fit(FITTED, n_data=N)
    s = judged({"a": posterior("cross_fitted"), "other": other}, held_out_loader=HELD_OUT)["other"]
    assert s.held_out is None
    assert any("Not comparable with a" in note and "prior precision" in note for note in s.notes)


def test_a_missing_share_is_noted():
    found = judged({"a": posterior("cross_fitted")}, held_out_loader=HELD_OUT)
    assert any("exact share" in note for note in found["a"].notes)
    found = judged({"a": posterior("cross_fitted")}, held_out_loader=HELD_OUT, fitted_loader=FITTED)
    assert not found["a"].notes


def test_overlap_is_refused():
    with pytest.raises(OverlapError):
        judged({"a": posterior("cross_fitted")}, held_out_loader=ALL)


def test_the_random_state_and_the_model_are_as_they_were():
    before, modes = torch.get_rng_state(), [m.training for m in MODEL.modules()]
    judged({"a": posterior("cross_fitted"), "b": posterior("same_batch")}, held_out_loader=HELD_OUT)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in MODEL.modules()] == modes
