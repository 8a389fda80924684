"""What a report says of a posterior is what the posterior says of itself."""

from functools import cache

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsEF
from models import mlp, targets
from oracles import dense_ggn, mean_of
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace, calibration_report
from debiased_laplace.calibration.posteriors.summaries import DirectionSummary, PosteriorSummary
from debiased_laplace.calibration.posteriors.summarizing import (
    MOST_DIRECTIONS,
    MOST_SPECTRUM,
    _log_spaced,
    summarize_posterior,
)

N, B, PRIOR, SIGMA, TEMPERATURE = 40, 24, 0.4, 0.7, 1.3


def data(likelihood):
    return TensorDataset(mlp()[1], targets(likelihood))


def hyper_parameters(likelihood):
    options = {"prior_precision": PRIOR, "temperature": TEMPERATURE}
    return options | ({"sigma_noise": SIGMA} if likelihood == "regression" else {})


@cache
def fitted(likelihood, subset="all", structure="lowrank", n=B, **options):
    la = DebiasedLaplace(mlp()[0], likelihood, subset, structure, **hyper_parameters(likelihood), **options)
    la.fit(DataLoader(Subset(data(likelihood), range(n)), batch_size=8), n_data=N)
    return la


@cache
def theirs(subset, structure, likelihood="regression", **options):
    la = Laplace(mlp()[0], likelihood, subset, structure, **hyper_parameters(likelihood), **options)
    la.fit(DataLoader(data(likelihood), batch_size=8))
    return la


def effective_parameters(precision, data_part):
    return torch.trace(torch.linalg.solve(precision, data_part)).item()


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_numbers_of_a_debiased_posterior(structure, likelihood):
    la = fitted(likelihood, "all", structure)
    s = summarize_posterior("la", la)
    assert (s.structure, s.curvature, s.n_parameters, s.n_data) == (structure, "GGN", 93, N)
    assert (s.n_direction_samples, s.n_magnitude_samples, s.shared_samples) == (B, B, True)
    assert (s.prior_low, s.prior_high, s.temperature) == (PRIOR, PRIOR, TEMPERATURE)
    assert s.sigma_noise == (SIGMA if likelihood == "regression" else None)
    assert s.rank == la.rank
    assert s.log_marginal_likelihood == pytest.approx(la.log_marginal_likelihood().item())
    dense = la.posterior_precision.to_dense()
    data_part = dense - PRIOR * torch.eye(93, dtype=dense.dtype)
    assert s.effective_parameters == pytest.approx(effective_parameters(dense, data_part), rel=1e-6)
    assert 0 < s.fit_seconds < 60
    weight = N / (TEMPERATURE * (SIGMA**2 if likelihood == "regression" else 1))
    top = weight * la.directional_curvatures.max().item()
    assert s.spectrum[0].precision == pytest.approx(top, rel=1e-9)
    values = [p.precision for p in s.spectrum]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_directions_with_their_inflation(structure):
    la = fitted("classification", "all", structure)
    s = summarize_posterior("la", la, confidence_level=0.9)
    order = la.in_sample_curvatures.argsort(descending=True)
    intervals = la.confidence_intervals(level=0.9)
    assert s.shows_inflation
    assert s.directions[0].place == 1
    for d in s.directions:
        i = order[d.place - 1]
        assert d.in_sample == pytest.approx(la.in_sample_curvatures[i].item())
        assert d.curvature == pytest.approx(la.directional_curvatures[i].item())
        assert (d.low, d.high) == pytest.approx(tuple(intervals[i].tolist()))
        assert d.inflation == pytest.approx(d.in_sample / d.curvature)
        assert d.inflation_low == pytest.approx(d.in_sample / intervals[i, 1].item())
    assert s.directions[0].inflation > 1
    assert len(s.directions) <= MOST_DIRECTIONS
    assert len(s.spectrum) <= MOST_SPECTRUM


def test_a_curvature_that_may_be_zero_has_no_upper_end_of_inflation():
    d = DirectionSummary(1, in_sample=2.0, curvature=1.0, low=0.0, high=4.0)
    assert (d.inflation, d.inflation_low, d.inflation_high) == (2.0, 0.5, None)
    assert DirectionSummary(1, 2.0, 0.0, 0.0, 0.0).inflation is None


def test_a_single_batch_shows_no_inflation_of_its_own():
    s = summarize_posterior("la", fitted("classification", magnitudes="same_batch"))
    assert not s.shows_inflation
    assert s.directions[0].curvature > 0  # there is something to look at
    assert all(d.inflation == 1 for d in s.directions if d.curvature > 0)


def test_the_split_says_which_samples_did_what():
    s = summarize_posterior("la", fitted("classification", magnitudes="held_out", complement="none"))
    assert (s.n_direction_samples, s.n_magnitude_samples, s.shared_samples) == (B // 2, B // 2, False)
    assert (s.magnitudes, s.complement, s.share_outside) == ("held_out", "none", 0.0)


@pytest.mark.parametrize("complement", ["isotropic", "diagonal", "kron"])
def test_the_share_outside_is_the_rest_of_the_trace(complement):
    la = fitted("classification", complement=complement, rank=3)
    s = summarize_posterior("la", la)
    trace = (torch.trace(la.posterior_precision.to_dense()) - 93 * PRIOR) * TEMPERATURE / N
    outside = 1 - la.directional_curvatures.sum() / trace
    assert s.share_outside == pytest.approx(outside.item(), rel=1e-6)
    assert s.share_outside > 0.05


def test_kronecker_magnitudes_have_no_intervals_and_say_so():
    la = fitted("classification", "all", "kron", kron_magnitudes="kronecker")
    s = summarize_posterior("la", la)
    assert s.directions
    assert all(d.low is None and d.high is None for d in s.directions)
    assert any("No intervals" in note for note in s.notes)


@pytest.mark.parametrize(
    ("subset", "structure"), [("all", "diag"), ("all", "kron"), ("all", "full"), ("last_layer", "full")]
)
def test_numbers_of_laplace_torchs_posteriors(subset, structure):
    la = theirs(subset, structure)
    s = summarize_posterior("la", la)
    precision = la.posterior_precision
    dense = (
        precision.to_matrix() if structure == "kron" else torch.diag(precision) if precision.ndim == 1 else precision
    )
    P = len(dense)
    data_part = dense - PRIOR * torch.eye(P, dtype=dense.dtype)
    assert (s.structure, s.n_parameters, s.n_data, s.sigma_noise) == (structure, P, N, pytest.approx(SIGMA))
    assert s.effective_parameters == pytest.approx(effective_parameters(dense, data_part), rel=1e-4)
    assert s.log_marginal_likelihood == pytest.approx(la.log_marginal_likelihood().item())
    assert s.spectrum[0].precision == pytest.approx(torch.linalg.eigvalsh(data_part)[-1].item(), rel=1e-5)
    # nobody knows these, and nothing is invented
    assert (s.directions, s.rank, s.magnitudes, s.fit_seconds, s.n_direction_samples) == ((), None, None, None, None)


def test_the_full_spectrum_is_that_of_the_full_batch():
    la = theirs("all", "full")
    H = mean_of(dense_ggn(mlp()[0], mlp()[1], "regression")[0], torch.arange(N)).detach()
    expected = N / (SIGMA**2 * TEMPERATURE) * torch.linalg.eigvalsh(H).flip(0)
    found = summarize_posterior("la", la).spectrum
    for point in found[:20]:
        assert point.precision == pytest.approx(expected[point.place - 1].item(), rel=1e-4)


def test_a_prior_of_several_numbers_and_another_curvature():
    prior = torch.linspace(0.3, 4.0, 6, dtype=torch.float64)
    la = Laplace(mlp()[0], "classification", "all", "diag", prior_precision=prior, backend=CurvlinopsEF)
    la.fit(DataLoader(data("classification"), batch_size=8))
    s = summarize_posterior("la", la)
    assert (s.prior_low, s.prior_high, s.curvature) == (pytest.approx(0.3), pytest.approx(4.0), "EF")


def test_log_spaced_places_hold_both_ends_and_few_others():
    assert _log_spaced(5, 10) == [1, 2, 3, 4, 5]
    places = _log_spaced(100_000, 24)
    assert (places[0], places[-1]) == (1, 100_000)
    assert len(places) <= 24
    assert places == sorted(set(places))
    assert _log_spaced(0, 10) == []


def test_reports_take_posteriors_or_summaries_and_refuse_the_rest():
    x, y = data("classification").tensors
    la = fitted("classification")
    p = {"la": la(x)}
    report = calibration_report(p, y, task="multiclass", posteriors={"la": la, "told": PosteriorSummary("mine")})
    assert report.posteriors["la"] == summarize_posterior("la", la)
    assert report.posteriors["told"] == PosteriorSummary("mine")
    with pytest.raises(ValueError, match="'x' must be a Laplace posterior or a PosteriorSummary; got float"):
        calibration_report(p, y, task="multiclass", posteriors={"x": 3.0})
