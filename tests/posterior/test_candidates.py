"""The prior trace of every form of precision, and the strings that equal targets share."""

from dataclasses import replace

import pytest
import torch
from models import mlp

from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.posterior.candidates import Target, prior_trace

SIZES = [12, 3, 2]


def orthogonal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def precision(weight, *, with_basis, dtype=torch.float64):
    """Low rank plus diagonal in the coordinates of a basis that leaves the second parameter's axes, or of none."""
    blocks = (
        BasisBlock(4, 3, orthogonal(4, 4, 1).to(dtype), orthogonal(3, 3, 2).to(dtype)),
        BasisBlock(3, 1),
        BasisBlock(2, 1, orthogonal(2, 2, 3).to(dtype)),
    )
    return LowRankPlusDiagonal(
        torch.linspace(0.5, 3, 17, dtype=dtype),
        orthogonal(17, 11, 4).to(dtype),
        weight * torch.linspace(1, 2, 11, dtype=dtype),
        KroneckerBasis(blocks) if with_basis else None,
    )


PRIORS = {
    "one number": torch.full((17,), 0.4, dtype=torch.float64),
    "one number a parameter tensor": torch.tensor([0.4] * 12 + [3.0] * 3 + [0.9] * 2, dtype=torch.float64),
    "one number a parameter": torch.linspace(0.2, 5, 17, dtype=torch.float64),
    "other numbers only where the basis is the axes": torch.tensor([0.4] * 12 + [3.0, 1.0, 2.0] + [0.9] * 2).double(),
}


@pytest.mark.parametrize("with_basis", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_prior_trace(prior, with_basis):
    operator = precision(7.0, with_basis=with_basis)
    covariance = torch.linalg.inv(operator.to_dense())
    expected = torch.trace(covariance @ torch.diag(PRIORS[prior]))
    assert prior_trace(operator, PRIORS[prior]) == pytest.approx(float(expected), rel=1e-12)


def test_the_two_diagonals_differ_where_the_prior_does():
    operator = precision(7.0, with_basis=True)
    given = PRIORS["one number a parameter"]
    rotated = float((operator.coordinate_variances * given).sum())
    assert prior_trace(operator, given) != pytest.approx(rotated, rel=1e-3)


def test_single_precision_far_above_the_prior():
    # variances are below a ten-millionth of the prior's: a difference of numbers of the prior's size is noise
    generator = torch.Generator().manual_seed(5)
    Q = torch.linalg.qr(torch.randn(17, 17, generator=generator, dtype=torch.float64))[0]
    basis = precision(1.0, with_basis=True).basis
    blocks = tuple(
        BasisBlock(b.rows, b.columns, *(None if s is None else s.float() for s in (b.left, b.right)))
        for b in basis.blocks
    )
    weights = torch.logspace(7, 9, 17, dtype=torch.float64)
    operator = LowRankPlusDiagonal(torch.tensor([0.5]), Q.float(), weights.float(), KroneckerBasis(blocks))
    exact = LowRankPlusDiagonal(torch.tensor([0.5]).double(), Q, weights, basis)
    prior = torch.full((17,), 0.4)
    expected = float(0.4 * torch.linalg.inv(exact.to_dense()).trace())
    assert 0 < prior_trace(operator, prior) < 4 * expected


def target(**changes):
    model, _ = mlp()
    selection = ParameterSelection.all_weights(model)
    plain = Target(
        selection,
        likelihood_named("regression"),
        BackendChoice(None, "GGN", 1),
        torch.full((selection.n_parameters,), 0.4, dtype=torch.float64),
        0.7,
        1.3,
        40,
    )
    return replace(plain, **changes)


def layerwise(dtype):
    sizes = target().selection.sizes
    return torch.cat([torch.full((n,), 0.1 * (i + 3), dtype=dtype) for i, n in enumerate(sizes)])


SAME = {
    "a model of the same weights": ({}, {}),
    "Monte-Carlo estimates of the GGN": ({"choice": BackendChoice(None, "Monte-Carlo GGN", 3)}, {}),
    "a prior in single precision": ({"prior_precision": torch.full((93,), 0.4)}, {}),
    "priors per parameter in both precisions": (
        {"prior_precision": layerwise(torch.float64).float()},
        {"prior_precision": layerwise(torch.float64)},
    ),
    "noise in single precision": ({"sigma_noise": float(torch.tensor(0.7))}, {}),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_targets(case):
    one, other = SAME[case]
    assert target(**one).context == target(**other).context


def changed_weights():
    model, _ = mlp()
    with torch.no_grad():
        model[0].bias[0] += 1e-6
    return ParameterSelection.all_weights(model)


OTHERS = {
    "weights": lambda: {"selection": changed_weights()},
    "parameters": lambda: {"selection": ParameterSelection.all_weights(mlp()[0]).subnetwork(torch.arange(5))},
    "curvature": lambda: {"choice": BackendChoice(None, "EF", 1)},
    "prior": lambda: {"prior_precision": torch.full((93,), 0.41, dtype=torch.float64)},
    "prior of one parameter": lambda: {"prior_precision": torch.cat([torch.full((92,), 0.4), torch.tensor([0.5])])},
    "noise": lambda: {"sigma_noise": 0.71},
    "temperature": lambda: {"temperature": 1.31},
    "n_data": lambda: {"n_data": 41},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_targets(case):
    assert target(**OTHERS[case]()).context != target().context


def test_the_weight_of_the_likelihood():
    assert target().likelihood_weight == pytest.approx(40 / (0.49 * 1.3), rel=1e-14)
