"""The held-out KL of laplace-torch's own posteriors, alone and against this package's."""

from copy import deepcopy

import pytest
import torch
from laplace import LowRankLaplace
from laplace_torch_cases import (
    CASES,
    FITTED,
    PRIOR,
    SIGMA,
    TEMPERATURE,
    N,
    P,
    data_of,
    dense_curvatures,
    dense_full_batch,
    dense_precision,
    fitted,
    loaders,
    positions,
    problem,
    theirs,
)
from oracles import dense_kl, dense_posterior_precision
from posterior_cases import posterior_of
from torch.utils.data import DataLoader, Subset

from debiased_laplace import held_out_kl
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

FULL_BATCH = {"n_data": N, "temperature": TEMPERATURE}
LIKELIHOODS = ["classification", "regression"]


def j_of(precision, full):
    """J of a posterior against a full batch, densely."""
    return float(0.5 * (torch.trace(torch.linalg.solve(precision, full)) + torch.linalg.slogdet(precision)[1]))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_with_all_other_samples_held_out_it_is_the_kl(case, likelihood):
    la, full = fitted(case, likelihood), dense_full_batch(case, likelihood)
    found = held_out_kl(la, *loaders(likelihood), **FULL_BATCH)
    precision = dense_precision(la).detach()
    assert found.value == pytest.approx(j_of(precision, full), rel=1e-9)
    if torch.linalg.eigvalsh(full)[0] > 0:
        constant = 0.5 * (len(full) + float(torch.linalg.slogdet(full)[1]))
        assert found.value - constant == pytest.approx(dense_kl(precision, full), rel=1e-7)
    assert (found.n, found.standard_error, found.exact) == (N - FITTED, 0.0, False)


PAIRS = {
    "diagonal, and low rank": ("diagonal", {"hessian_structure": "lowrank", "rank": 9}),
    "Kronecker, and Kronecker": ("Kronecker", {"hessian_structure": "kron"}),
    "full, and low rank with a complement": ("full", {"complement": "isotropic", "rank": 6}),
    "full, and full of halves": ("full", {"hessian_structure": "full"}),
    "last layer, Kronecker and full": ("Kronecker of the last layer", {"hessian_structure": "full"}),
    "last layer, full and Kronecker": ("full of the last layer", {"hessian_structure": "kron"}),
    "subnetwork, diagonal and low rank": ("diagonal of a subnetwork out of order", {}),
    "prior per parameter tensor": ("Kronecker, prior per parameter tensor", {"hessian_structure": "kron"}),
    "subnetwork, prior per parameter": ("subnetwork, prior per parameter", {}),
    "prior per parameter": ("full, prior per parameter", {"complement": "diagonal", "rank": 6}),
    "EF": ("EF", {"hessian_structure": "kron"}),
}


def ours_like(case, likelihood, **options):
    """A debiased posterior of the same model, subset, prior and noise, fitted to the same samples."""
    subset, _, given = CASES[case]
    prior = given.get("prior_precision", PRIOR)
    if subset == "subnetwork":
        options["subnetwork_indices"], order = positions(case).sort()
        prior = prior[order] if isinstance(prior, torch.Tensor) else prior
    la = posterior_of(
        problem(likelihood)[0],
        likelihood,
        subset,
        prior_precision=prior,
        sigma_noise=SIGMA[likelihood],
        temperature=TEMPERATURE,
        backend=given.get("backend"),
        **options,
    )
    la.fit(DataLoader(Subset(data_of(likelihood), range(FITTED)), batch_size=8), n_data=N)
    return la


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("pair", PAIRS)
def test_differences_between_the_libraries_are_differences_of_the_kl(pair, likelihood):
    case, options = PAIRS[pair]
    la, ours = fitted(case, likelihood), ours_like(case, likelihood, **options)
    full = dense_full_batch(case, likelihood)
    back = positions(case).argsort().argsort()  # from increasing positions to the posterior's own order
    kls = [dense_kl(dense_precision(la).detach(), full)]
    kls.append(dense_kl(ours.posterior_precision.to_dense()[back][:, back], full))
    difference = held_out_kl(la, *loaders(likelihood), **FULL_BATCH) - held_out_kl(ours, *loaders(likelihood))
    assert difference.value == pytest.approx(kls[0] - kls[1], rel=1e-8)
    assert abs(difference.value) > 0.01
    assert difference.standard_error == 0.0

    # of some samples: paired, with the spread of the pairs
    some = range(20, 33)
    parts = [held_out_kl(la, *loaders(likelihood, some), **FULL_BATCH), ours.held_out_kl(*loaders(likelihood, some))]
    weight = 0.5 * N / (SIGMA[likelihood] ** 2 * TEMPERATURE)
    apart = torch.linalg.inv(dense_precision(la).detach())
    apart = apart - torch.linalg.inv(ours.posterior_precision.to_dense())[back][:, back]
    terms = torch.stack([weight * torch.trace(apart @ H) for H in dense_curvatures(case, likelihood)])
    error = (1 - FITTED / N) * terms[list(some)].std() * ((1 - 13 / 24) / 13) ** 0.5
    paired = parts[0] - parts[1]
    assert paired.standard_error == pytest.approx(float(error), rel=1e-6)
    expected = difference.value + (1 - FITTED / N) * (terms[list(some)].mean() - terms[FITTED:].mean())
    assert paired.value == pytest.approx(float(expected), rel=1e-7)
    assert (parts[1] - parts[0]).value == -paired.value


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_by_default_it_stands_for_the_samples_that_were_fitted(likelihood):
    la = theirs(likelihood, structure="kron", temperature=0.7)
    found = held_out_kl(la, None, loaders(likelihood)[1])
    full = dense_posterior_precision(
        sum(dense_curvatures("Kronecker", likelihood)[:FITTED]) / FITTED,
        n_data=FITTED,
        prior_precision=PRIOR,
        sigma_noise=SIGMA[likelihood],
        temperature=0.7,
    )
    assert found.value == pytest.approx(j_of(dense_precision(la), full), rel=1e-9)
    assert (found.exact, found.n) == (True, 0)
    # the temperature of the full batch may be another one
    hotter = held_out_kl(la, None, loaders(likelihood)[1], temperature=1.4)
    assert hotter.value < found.value
    with pytest.raises(ValueError, match=r"temperature 0\.7.*temperature 1\.4"):
        _ = found - hotter


def test_the_same_function_judges_ours():
    la = ours_like("full", "regression")
    inside = loaders("regression")
    assert held_out_kl(la, *inside).value == la.held_out_kl(*inside).value
    assert held_out_kl(la, *inside, n_data=N, temperature=TEMPERATURE).value == la.held_out_kl(*inside).value
    with pytest.warns(UserWarning, match="40% of the data"):
        held_out_kl(la, inside[0])


def test_hyper_parameters_changed_after_predicting():
    # laplace-torch's full posterior goes on predicting with the scale that it has cached; its precision is right
    la = theirs("regression", structure="full")
    la(problem("regression")[1][:2])
    la.temperature = TEMPERATURE * FITTED / N / 3
    stale = la.posterior_covariance
    full = dense_full_batch("full", "regression")
    found = held_out_kl(la, *loaders("regression"), **FULL_BATCH)
    assert found.value == pytest.approx(j_of(la.posterior_precision, full), rel=1e-9)
    assert found.value != pytest.approx(j_of(torch.linalg.inv(stale), full), rel=1e-3)
    assert found.value > held_out_kl(fitted("full", "regression"), *loaders("regression"), **FULL_BATCH).value


def low_rank(monkeypatch, U, values):
    """laplace-torch's low rank, whose package is not on the package index, as its fit would leave it."""
    monkeypatch.setattr("laplace.baselaplace.find_spec", lambda name: True)
    from laplace.curvature.asdfghjkl import AsdfghjklHessian

    model = deepcopy(problem("classification")[0])
    la = LowRankLaplace(model, "classification", AsdfghjklHessian, prior_precision=PRIOR, temperature=0.52)
    la.H, la.n_data, la.n_outputs = (U, values), FITTED, 3
    la.mean = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return la


def test_low_rank(monkeypatch):
    # from a power iteration: orthonormal to its tolerance only
    generator = torch.Generator().manual_seed(9)
    U = torch.linalg.qr(torch.randn(P, 5, generator=generator, dtype=torch.float64))[0]
    U = U + 1e-3 * torch.randn(P, 5, generator=generator, dtype=torch.float64)
    values = torch.tensor([9.0, 5.0, 2.0, 0.3, 0.01], dtype=torch.float64)
    la = low_rank(monkeypatch, U, values)
    precision = U @ torch.diag(values * la._H_factor) @ U.T + PRIOR * torch.eye(P, dtype=torch.float64)
    full = dense_full_batch("Hessian", "classification") - (90 - PRIOR) * torch.eye(P, dtype=torch.float64)
    found = held_out_kl(la, *loaders("classification"), **FULL_BATCH)
    assert found.value == pytest.approx(j_of(precision, full), rel=1e-9)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_single_precision(structure):
    exact = held_out_kl(theirs("classification", structure=structure), *loaders("classification"), **FULL_BATCH)
    la = theirs("classification", structure=structure, dtype=torch.float32)
    found = held_out_kl(la, *loaders("classification", dtype=torch.float32), **FULL_BATCH)
    assert found.value == pytest.approx(exact.value, rel=1e-4)


@pytest.mark.parametrize("case", ["Kronecker", "full of the last layer"])
def test_a_batch_of_rows_at_a_time_and_progress_of_all(case, monkeypatch):
    shapes, totals, updates = [], [], []
    plain = LowRankPlusDiagonal.variance_trace

    def noting(self, rows):
        shapes.append(tuple(rows.shape))
        return plain(self, rows)

    class Bar:
        def __init__(self, total, disable, desc):
            totals.append((total, disable))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, n):
            updates.append(n)

    monkeypatch.setattr(LowRankPlusDiagonal, "variance_trace", noting)
    monkeypatch.setattr("debiased_laplace.posterior.held_out_kl.tqdm", Bar)
    held_out_kl(fitted(case, "regression"), *loaders("regression", batch_size=4), **FULL_BATCH, progress_bar=True)
    held_out_kl(fitted(case, "regression"), *loaders("regression", batch_size=4), **FULL_BATCH)
    # a last linear layer needs no rows
    assert shapes == ([] if "last layer" in case else [(4, 3, len(positions(case)))] * 20)
    assert totals == [(N, False), (N, True)]
    assert sum(updates) == 2 * N


LEFT = ["diagonal", "Kronecker of the last layer", "full of a subnetwork out of order", "GGN by BackPACK"]


@pytest.mark.parametrize("case", LEFT)
def test_their_model_is_left_as_it_was(case):
    subset, structure, options = CASES[case]
    la = theirs("classification", subset, structure, **options)
    la.model.train()
    la.model.zero_grad()
    parameters = {name: p.detach().clone() for name, p in la.model.named_parameters()}
    features = dict(getattr(la.model, "_features", {}))
    before = {module: dict(module.__dict__) for module in la.model.modules()}
    hooks = [list(m._forward_hooks.items()) + list(m._backward_hooks.items()) for m in la.model.modules()]
    assert any(hooks) == (case in LEFT[1::2])
    held_out_kl(la, *loaders("classification"), **FULL_BATCH)
    assert [list(m._forward_hooks.items()) + list(m._backward_hooks.items()) for m in la.model.modules()] == hooks
    assert all(module.training for module in la.model.modules())
    assert {module: dict(module.__dict__) for module in la.model.modules()} == before
    assert all(torch.equal(p, parameters[name]) and p.grad is None for name, p in la.model.named_parameters())
    kept = getattr(la.model, "_features", {})
    assert kept.keys() == features.keys()
    assert all(kept[name] is features[name] for name in features)
