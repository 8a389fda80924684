"""Covariances of a last layer's outputs in closed form, against the Jacobian and the dense inverse of the precision."""

import pytest
import torch
from models import MODELS, targets
from test_linear_layer import ROOTS, network_of

from debiased_laplace.curvature.layer_covariance import LayerCovariance
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

C, P = 3, 18  # of the small networks' last layer, with five features


def problem(dtype, name="MLP"):
    model, X = MODELS[name](C, dtype)
    network = network_of(model, X, targets("classification", dtype=dtype), "classification")
    features, outputs = network.features(X[:6])
    J = network.linear_layer.rows(features, torch.eye(C, dtype=dtype).expand(6, C, C))
    return network, features, outputs, J


def basis(blocks, generator):
    def orthogonal(n):
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]

    return KroneckerBasis(
        tuple(BasisBlock(o, i, orthogonal(o) if left else None, orthogonal(i) if right else None)
              for o, i, left, right in blocks)
    )  # fmt: skip


BASES = {
    "no basis": None,
    "bases of both sides": [(C, 5, True, True), (C, 1, True, False)],
    "a side that keeps its axes": [(C, 5, False, True), (C, 1, False, False)],
    "a layer's outputs that keep their axes": [(C, 5, True, False), (C, 1, False, False)],
}
RANKS = {"rank 0": 0, "rank 4": 4, "every direction but one": P - 1, "every direction": P}


def precision(rank, blocks, dtype, *, isotropic=False, largest=30.0):
    generator = torch.Generator().manual_seed(8)
    U = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0][:, :rank]
    diagonal = 0.4 + torch.rand(1 if isotropic else P, generator=generator, dtype=torch.float64)
    magnitudes = torch.logspace(torch.tensor(largest).log10(), -1, rank, dtype=torch.float64)
    K = None if blocks is None else basis(blocks, generator).to(dtype)
    return LowRankPlusDiagonal(diagonal.to(dtype), U.to(dtype), magnitudes.to(dtype), K)


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("blocks", BASES)
def test_covariances_are_those_of_the_jacobians(blocks, rank, isotropic, monkeypatch):
    network, features, outputs, J = problem(torch.float64)
    P_hat = precision(RANKS[rank], BASES[blocks], torch.float64, isotropic=isotropic)
    inverse = torch.linalg.inv(P_hat.to_dense())
    expected = J @ inverse @ J.mT
    # two samples at a time
    monkeypatch.setattr("debiased_laplace.curvature.layer_covariance.CHUNK_BYTES", 2 * 2 * 8 * C * max(1, P_hat.rank))
    covariance = LayerCovariance.of(network.linear_layer, P_hat, 2**30)
    parts = [part for _, part in covariance.of_features(features)]
    assert len(parts) == 3
    torch.testing.assert_close(torch.cat([part.dense() for part in parts]), expected)
    torch.testing.assert_close(torch.cat([part.variances() for part in parts]), expected.diagonal(dim1=1, dim2=2))
    flat = J.flatten(0, 1)
    torch.testing.assert_close(covariance.joint(features), flat @ inverse @ flat.T)
    for kind in ROOTS:
        root = ROOTS[kind](network.likelihood)
        noise = root.targets_or_noise(targets("classification")[:6], C, torch.Generator().manual_seed(1))
        S = torch.stack([root.columns(f, t, slice(None)) for f, t in zip(outputs, noise, strict=True)])
        found = covariance.traces(features, outputs, root, noise)
        torch.testing.assert_close(found, ((S @ S.mT) * expected).sum((1, 2)))


def test_a_frozen_bias():
    network, features, _, J = problem(torch.float64, "partly frozen")
    n = network.n_parameters
    assert J.shape[-1] == n == C * features.shape[1]
    P_hat = LowRankPlusDiagonal(torch.full((1,), 0.4).double(), J[0].new_zeros(n, 0), J.new_zeros(0))
    (_, part), *_ = LayerCovariance.of(network.linear_layer, P_hat, 2**30).of_features(features)
    torch.testing.assert_close(part.dense(), J @ J.mT / 0.4)


def test_stiff_directions_in_single_precision():
    """Variances of 1e-6 of the prior's are not lost in the difference of it and what the directions remove."""
    network, features, _, J = problem(torch.float32)
    features, J = features[:5], J[:5].double()
    # all directions but one that the inputs do not see
    U = torch.linalg.svd(J.flatten(0, 1)).Vh[: P - 1].T.float()
    P_hat = LowRankPlusDiagonal(torch.tensor(0.4), U, torch.full((P - 1,), 4e5))
    (_, part), *_ = LayerCovariance.of(network.linear_layer, P_hat, 2**30).of_features(features)
    torch.testing.assert_close(part.dense(), J @ J.mT / (0.4 + 4e5), rtol=1e-5, atol=1e-9)


def test_directions_that_do_not_fit_into_memory_use_rows():
    network, *_ = problem(torch.float64)
    assert LayerCovariance.of(network.linear_layer, precision(1, None, torch.float64), 2 * P) is None
    assert LayerCovariance.of(network.linear_layer, precision(0, None, torch.float64), 2 * P) is not None
