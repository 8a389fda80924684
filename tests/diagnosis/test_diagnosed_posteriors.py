"""Random mixtures of rows: the formulas of their root, and their mean curvature."""

import pytest
import torch
from sub_batches import rows_of, small_network

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.diagnosis.posteriors import MIXTURES, MixedGaussNewton, with_mixed_rows
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

LIKELIHOODS = ["classification", "regression"]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_columns_transposed_and_product_are_of_the_same_root(likelihood):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 4, 2, generator=generator, dtype=torch.float64)
    root = MixedGaussNewton(likelihood_named(likelihood), 3)
    signs = root.targets_or_noise(torch.zeros(6), 4, generator)
    assert root.n_columns(4) == signs.shape[2] == 3
    S = torch.stack([root.columns(o, z, slice(None)) for o, z in zip(outputs, signs, strict=True)])
    expected = root.likelihood.root(outputs, slice(None)) @ signs.double() / 3**0.5
    torch.testing.assert_close(S, expected)
    torch.testing.assert_close(root.columns(outputs[0], signs[0], slice(1, 3)), S[0, :, 1:])
    torch.testing.assert_close(root.transposed(outputs, signs, x), S.mT @ x)
    torch.testing.assert_close(root.product(outputs, signs, x[..., 0]), (S @ S.mT @ x)[..., 0])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_mean_over_all_sign_patterns_is_the_curvature(likelihood):
    """So mixtures are unbiased for any outputs."""
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    root = MixedGaussNewton(likelihood_named(likelihood), 1)
    patterns = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 3)
    S = torch.cat([root.columns(outputs, z[None, :, None].expand(5, 3, 1), slice(None)) for z in patterns], dim=2)
    exact = root.likelihood.root(outputs, slice(None))
    torch.testing.assert_close(S @ S.mT / len(patterns), exact @ exact.mT)


def test_traces_of_mixtures_have_the_exact_trace_as_their_mean():
    network, X, y = small_network("MLP")
    P = network.n_parameters
    exact = rows_of(network, X, y)
    precision = LowRankPlusDiagonal(
        exact.network.like.new_ones(P) * 2.0, network.like.new_zeros(P, 0), network.like.new_zeros(0)
    )
    with differentiable_kernels(network.selection.model):
        truth = exact.traces(precision).mean()
        draws = torch.stack(
            [with_mixed_rows(rows_of(network, X, y), seed).traces(precision).mean() for seed in range(60)]
        )
    assert draws.std() > 0.01 * truth
    assert abs((draws.mean() - truth) / (draws.std() / 60**0.5)) < 3.5


def test_few_outputs_need_no_mixing_and_the_seed_decides():
    network, X, y = small_network("MLP")
    with differentiable_kernels(network.selection.model):
        one, same, other = (next(with_mixed_rows(rows_of(network, X, y), seed).rows()) for seed in (1, 1, 2))
        assert one.shape[1] == MIXTURES
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        few = with_mixed_rows(rows_of(network, X, y), 0)
        assert with_mixed_rows(few, 0) is few
