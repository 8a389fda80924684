"""Summaries of posteriors against dense computations, and held-out differences against `held_out_kl`."""

import math

import pytest
import torch
from fitted_posteriors import (
    MODEL,
    PRIOR,
    SIGMA,
    TASKS,
    TEMPERATURE,
    B,
    N,
    P,
    WithoutModel,
    debiased,
    loader,
    of_laplace_torch,
)
from laplace.curvature import CurvlinopsEF

from debiased_laplace import DebiasedLaplace
from debiased_laplace.calibration.contents import PosteriorSummary
from debiased_laplace.calibration.posteriors import compare_held_out, summarize_posterior, summarize_posteriors
from debiased_laplace.errors import NotFittedError, OverlapError


def effective_parameters(precision):
    """Trace of the data's part of a dense precision times its inverse."""
    data_part = precision - PRIOR * torch.eye(len(precision), dtype=precision.dtype)
    return torch.trace(torch.linalg.solve(precision, data_part)).item()


@pytest.mark.parametrize("likelihood", TASKS)
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_facts_and_directions_of_a_debiased_posterior(structure, likelihood):
    la = debiased(likelihood, "all", structure)
    s = summarize_posterior("la", la, 0.9)
    expected = {
        "class": type(la).__name__,
        "weights": "all weights",
        "structure": structure,
        "curvature": "GGN",
        "computed by": la.curvature_source,
        "parameters": P,
        "data set, N": N,
        "samples for the curvature": B,
        "directions": la.rank,
        "curvature along them": "from other folds (cross_fitted)",
        "curvature outside them": s.facts.get("curvature outside them"),  # see below
        "prior precision": PRIOR,
        "observation noise": SIGMA if likelihood == "regression" else None,
        "temperature": TEMPERATURE,
        "effective parameters": pytest.approx(effective_parameters(la.posterior_precision.to_dense()), rel=1e-6),
        "log marginal likelihood": pytest.approx(la.log_marginal_likelihood().item()),
        "time of the fit": s.facts["time of the fit"],
    }
    assert list(s.facts.items()) == [(label, value) for label, value in expected.items() if value is not None]
    assert 0 < float(s.facts["time of the fit"].removesuffix(" s")) < 60
    assert s.prior_precision == (PRIOR, PRIOR)
    weight = N / (TEMPERATURE * (SIGMA**2 if likelihood == "regression" else 1))
    values = [p.precision for p in s.spectrum]
    assert values[0] == pytest.approx(weight * la.directional_curvatures.max().item(), rel=1e-9)
    assert values == sorted(values, reverse=True)
    order, intervals = la.in_sample_curvatures.argsort(descending=True), la.confidence_intervals(level=0.9)
    assert 10 < len(s.directions) <= 24
    assert [d.place for d in s.directions][:2] == [1, 2]
    for d in s.directions:
        i = order[d.place - 1]
        numbers = (la.in_sample_curvatures[i], la.directional_curvatures[i], *intervals[i])
        assert (d.in_sample, d.curvature, d.low, d.high) == pytest.approx(tuple(map(float, numbers)))
    assert s.directions[0].inflation > 1


def test_samples_and_curvature_outside_the_directions():
    s = summarize_posterior("la", debiased(magnitudes="held_out", complement="none"))
    assert s.facts["samples for the curvature"] == f"{B // 2} for directions, {B // 2} for magnitudes"
    assert s.facts["curvature outside them"] == "none"
    s = summarize_posterior("la", debiased(magnitudes="same_batch"))
    assert s.facts["samples for the curvature"] == B
    assert s.directions == ()  # a batch shows no inflation of its own

    for complement in ("isotropic", "diagonal", "kron"):
        la = debiased(complement=complement, rank=3)
        trace = (torch.trace(la.posterior_precision.to_dense()) - P * PRIOR) * TEMPERATURE / N
        share = 100 * (1 - la.directional_curvatures.sum() / trace).item()
        assert share > 5
        shown = summarize_posterior("la", la).facts["curvature outside them"]
        assert shown == f"{complement}, {share:.2g} % of the trace"


def test_kronecker_magnitudes_have_no_intervals_and_say_so():
    s = summarize_posterior("la", debiased(structure="kron", kron_magnitudes="kronecker", sampling="uniform"))
    assert {(d.low, d.high) for d in s.directions} == {(None, None)}
    assert any("No intervals" in note for note in s.notes)


@pytest.mark.parametrize("case", ["all diag", "all kron", "all full", "last_layer full"])
def test_facts_of_laplace_torchs_posteriors(case):
    subset, structure = case.split()
    la = of_laplace_torch("regression", subset, structure)
    s, dense = summarize_posterior("la", la), la.posterior_precision
    dense = dense.to_matrix() if structure == "kron" else torch.diag(dense) if dense.ndim == 1 else dense
    # what is not known is left out
    assert s.facts == {
        "class": type(la).__name__,
        "weights": "all weights" if subset == "all" else "last layer '4'",
        "structure": structure,
        "curvature": "GGN",
        "parameters": len(dense),
        "data set, N": N,
        "prior precision": pytest.approx(PRIOR),
        "observation noise": pytest.approx(SIGMA),
        "temperature": TEMPERATURE,
        "effective parameters": pytest.approx(effective_parameters(dense), rel=1e-4),
        "log marginal likelihood": pytest.approx(la.log_marginal_likelihood().item()),
    }
    values = (torch.linalg.eigvalsh(dense) - PRIOR).flip(0).tolist()
    assert [p.precision for p in s.spectrum[:15]] == pytest.approx(values[:15], rel=1e-3)
    assert s.directions == ()


def test_a_prior_of_several_numbers_and_another_curvature():
    prior = torch.linspace(0.3, 4.0, 6, dtype=torch.float64)
    la = of_laplace_torch("classification", "all", "diag", prior_precision=prior, backend=CurvlinopsEF)
    s = summarize_posterior("la", la)
    assert s.prior_precision == pytest.approx((0.3, 4.0))
    assert (s.facts["prior precision"], s.facts["curvature"]) == ("0.3 to 4", "EF")


def test_a_posterior_without_a_network_is_described_as_far_as_it_is_known():
    s = summarize_posterior("la", WithoutModel())
    assert s.facts == {"class": "WithoutModel", "data set, N": N, "prior precision": PRIOR, "temperature": TEMPERATURE}
    assert [note.split(":")[0] for note in s.notes] == ["No log marginal likelihood", "No posterior precision"]


def test_summaries_are_taken_as_they_are_and_the_rest_is_refused():
    told = PosteriorSummary({"class": "mine"}, (0.2, 0.3))
    assert summarize_posteriors({"told": told}, 0.9) == {"told": told}
    with pytest.raises(ValueError, match="'x' must be a Laplace posterior or a PosteriorSummary; got float"):
        summarize_posteriors({"x": 3.0}, 0.9)
    with pytest.raises(NotFittedError, match="'x' is not fitted"):
        summarize_posterior("x", DebiasedLaplace(MODEL, "classification"))


# not all that are left, which would make the differences exact
HELD_OUT_INDICES = range(B, 36)
FITTED, HELD_OUT = loader(indices=range(B)), loader(indices=HELD_OUT_INDICES)


def compared(posteriors, held_out=HELD_OUT, fitted=FITTED):
    return compare_held_out(posteriors, summarize_posteriors(posteriors, 0.95), held_out, fitted, 0.95)


def test_differences_are_paired_against_the_first():
    a, b = debiased(complement="none"), debiased(complement="none", rank=10)
    found = compared({"a": a, "again": a, "b": b})
    again, h = found["again"].held_out, found["b"].held_out
    assert (again.difference, again.p_value, again.verdict) == (0.0, 1.0, "no detectable difference")
    expected = b.held_out_kl(HELD_OUT, FITTED) - a.held_out_kl(HELD_OUT, FITTED)
    assert (found["a"].held_out, found["a"].notes) == (None, ())
    assert (h.reference, h.n) == ("a", len(HELD_OUT_INDICES))
    assert (h.difference, h.standard_error) == pytest.approx((expected.value, expected.standard_error))
    assert h.high - h.low == pytest.approx(2 * 1.959964 * expected.standard_error, rel=1e-5)
    # Holm's step of the smaller of two p-values
    assert (h.adjusted_high - h.adjusted_low, h.adjusted_level) == pytest.approx(
        (2 * 2.241403 * h.standard_error, 0.975)
    )
    single = math.erfc(expected.value / expected.standard_error / 2**0.5)
    assert h.p_value == pytest.approx(2 * single, rel=1e-6, abs=0)  # Holm's adjustment of the smaller of two
    # with fewer directions it is further from the full batch, and clearly so
    assert h.difference > 3 * h.standard_error
    assert h.verdict == "further"
    assert compared({"b": b, "a": a})["a"].held_out.verdict == "closer"


def test_a_posterior_of_all_data_beside_one_of_a_batch():
    full, batch, everything = debiased(n=N, magnitudes="same_batch"), debiased(), loader()
    h = compared({"full": full, "batch": batch}, fitted={"full": everything, "batch": FITTED})["batch"].held_out
    expected = batch.held_out_kl(HELD_OUT, FITTED) - full.held_out_kl(None, everything)
    assert h.difference == pytest.approx(expected.value)
    assert h.difference > 0


def test_what_cannot_be_compared_says_why_and_overlap_is_refused():
    other = debiased(prior_precision=7.0)
    found = compared({"a": debiased(), "other": other, "theirs": of_laplace_torch()}, fitted=None)
    for name, words in {"a": "exact share", "other": "No comparison with a", "theirs": "fitted_loader"}.items():
        assert found[name].held_out is None
        assert words in " ".join(found[name].notes)
    with pytest.raises(OverlapError):
        compared({"a": debiased()}, held_out=loader())
