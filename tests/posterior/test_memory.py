"""The limit of memory that a posterior is given."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.memory import LEAST
from debiased_laplace.curvature.row_curvature import RowCurvature

FEW = 20_000
"""Bytes: less than the rows of the samples, and than a dense matrix of the parameters."""


def fitted(*, width=12, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()
    X, y = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 3
    options = {"sampling": "uniform", **options}
    la = DebiasedLaplace(model, "classification", prior_precision=3.0, **options)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=16))
    return la, X


@pytest.fixture
def _tiny_limits(monkeypatch):
    monkeypatch.setattr("debiased_laplace.posterior.laplace.LEAST", 1)


@pytest.mark.usefixtures("_tiny_limits")
@pytest.mark.parametrize("magnitudes", ["same_batch", "held_out", "cross_fitted"])
def test_products_take_the_place_of_rows_that_do_not_fit(magnitudes):
    options = {"rank": 6, "complement": "diagonal", "magnitudes": magnitudes}
    plenty, X = fitted(solver="gram", **options)
    little, _ = fitted(memory=FEW, **options)
    assert plenty.fit_result.estimate.outcome.solver != "lanczos"
    assert little.fit_result.estimate.outcome.solver == "lanczos"
    torch.testing.assert_close(little.directional_curvatures, plenty.directional_curvatures, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(little(X), plenty(X), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("_tiny_limits")
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 12},
        {"rank": 12, "magnitudes": "held_out"},
        {"rank": 12, "magnitudes": "same_batch", "complement": "isotropic"},
        {"rank": 30, "complement": "diagonal"},
        {"rank": None, "complement": "none"},
        {"hessian_structure": "kron"},
        {"hessian_structure": "full"},
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_computed_a_few_parameters_at_a_time(sampling, options, monkeypatch):
    monkeypatch.setattr("debiased_laplace.curvature.network.KEEP_BYTES", 0)
    options = {"width": 200, "sampling": sampling, "n_rows": 60, **options}
    plenty, X = fitted(**options)
    rows = plenty.rows.n if sampling == "curvature" else 60
    rows = rows // 2 if options.get("magnitudes") == "held_out" else rows
    groups = []
    compute = RowCurvature._rows_of
    monkeypatch.setattr(RowCurvature, "_rows_of", lambda self, chosen: groups.append(chosen) or compute(self, chosen))
    little, _ = fitted(memory=rows * 8 * 500, **options)
    assert len(set(groups) - {None}) > 1
    assert little.fit_result.estimate.outcome.solver == plenty.fit_result.estimate.outcome.solver
    # vectors of a Kronecker basis that a fold's other samples do not determine depend on the rounding
    in_basis = "kron" in (plenty.fit_result.options.complement or "kron", plenty.fit_result.options.structure)
    tolerance = {"rtol": 1e-3 if in_basis else 1e-6, "atol": 1e-9}
    torch.testing.assert_close(little(X), plenty(X), **tolerance)
    if plenty.rank:
        torch.testing.assert_close(little.directional_curvatures, plenty.directional_curvatures, **tolerance)


@pytest.mark.usefixtures("_tiny_limits")
def test_what_does_not_fit_is_refused_with_the_way_out():
    la, _ = fitted(rank=6, memory=FEW)
    with pytest.raises(ValueError, match=r"available memory .*expected fewer parameters, more memory"):
        _ = la.posterior_covariance
    with pytest.raises(ValueError, match=r"hessian_structure='full' .* available memory"):
        fitted(hessian_structure="full", memory=FEW)


@pytest.mark.usefixtures("_tiny_limits")
def test_fewer_rows_are_drawn_by_default():
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
    data = TensorDataset(torch.randn(200, 5), torch.arange(200) % 3)
    P = sum(p.numel() for p in model.parameters())
    la = DebiasedLaplace(model, "classification", prior_precision=3.0, memory=50 * 4 * P)
    la.fit(DataLoader(data, batch_size=50))
    assert 25 < la.rows.n < 75


def test_a_limit_belongs_to_the_machine_and_not_to_the_state():
    la, X = fitted(rank=6, memory=LEAST)
    assert la.memory == LEAST
    other = DebiasedLaplace(la.model, "classification", prior_precision=3.0, rank=6, memory=2 * LEAST)
    other.load_state_dict(la.state_dict())
    torch.testing.assert_close(other(X), la(X))
    assert other.memory == 2 * LEAST
    assert other.fit_result.network.memory == 2 * LEAST


@pytest.mark.untyped
@pytest.mark.parametrize("memory", [0, LEAST - 1, 1e9, "1GB"])
def test_other_limits_are_refused(memory):
    with pytest.raises(ValueError, match=r"memory must be an integer of at least 536870912 \(bytes; 512 MiB\)"):
        fitted(memory=memory)
