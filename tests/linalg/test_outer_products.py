"""Factorization of outer products, and of other matrices, which have none."""

import pytest
import torch

from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.outer_products import outer_factors

N, O, I = 6, 20, 25  # noqa: E741  rows and columns


def stack(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(N, O, generator=generator, dtype=torch.float64)
    a = torch.randn(N, I, generator=generator, dtype=torch.float64)
    return (g[:, :, None] * a[:, None, :]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_factors_multiply_to_the_matrices(scale, dtype):
    M = scale * stack(dtype)
    M[2] = 0
    M[3, :5] = 0
    g, a = outer_factors(M)
    torch.testing.assert_close(g[:, :, None] * a[:, None, :], M, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)


OTHERS = {
    "every matrix has rank two": lambda M: M + stack(seed=1),
    "one matrix has rank two": lambda M: torch.cat([M[:-1], (M + stack(seed=1))[-1:]]),
    "rank two by a millionth": lambda M: M + 1e-6 * stack(seed=1),
    "one entry is off": lambda M: M + 1e-9 * torch.eye(O, I, dtype=M.dtype)[None],
    "small matrices": lambda M: M[:, :4, :4],
    "vectors": lambda M: M[:, :, :1],
    "no matrices": lambda M: M[:0],
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_stacks_have_no_factors(case):
    assert outer_factors(OTHERS[case](stack())) is None


def orthogonal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("rows", ["outer products", "other matrices", "a mixture"])
@pytest.mark.parametrize("sides", ["both", "left", "right", "neither"])
def test_summed_squares_are_those_of_the_coordinates(sides, rows):
    left = orthogonal(O, 1) if sides in ("both", "left") else None
    right = orthogonal(I, 2) if sides in ("both", "right") else None
    basis = KroneckerBasis((BasisBlock(O, I, left, right), BasisBlock(3, 1)))
    M = stack()
    if rows != "outer products":
        M[2 if rows == "a mixture" else slice(None)] += stack(seed=1)[0]
    x = torch.cat([M.flatten(1), torch.ones(N, 3, dtype=torch.float64)], dim=1).reshape(2, 3, -1)
    found = basis.summed_squares(x)
    torch.testing.assert_close(found, basis.coordinates(x).square().sum(1), rtol=1e-10, atol=1e-12)
