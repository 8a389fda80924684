"""Rows by parameter that are put together from batches."""

import pytest
import torch

from debiased_laplace.linalg.row_matrix import OuterRows, flat, placed

R, O, I = 2, 4, 3  # noqa: E741  rows of a sample, rows and columns of the parameter


def outer(n, positions, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, *s, generator=generator).double() for s in ((R, positions, O), (1, positions, I)))
    return OuterRows(left, right)


CASES = {
    "as many positions": [outer(2, 3, 0), outer(3, 3, 1)],
    "more positions": [outer(2, 1, 0), outer(3, 3, 1)],
    "fewer positions": [outer(2, 3, 0), outer(1, 2, 1), outer(2, 3, 2)],
    "flat after factors": [outer(2, 3, 0), outer(3, 3, 1).dense()],
    "factors after flat": [outer(2, 3, 0).dense(), outer(3, 1, 1)],
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_batches_are_those_of_all_samples(case):
    parts, total, start = CASES[case], None, 0
    for part in parts:
        total = placed(part, start, 5, total)
        start += part.shape[0]
    torch.testing.assert_close(flat(total), torch.cat([flat(part) for part in parts]))
    assert isinstance(total, OuterRows) == all(isinstance(part, OuterRows) for part in parts)
