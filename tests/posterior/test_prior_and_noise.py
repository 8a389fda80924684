"""Prior and noise: what is set is what is kept."""

import pytest
import torch
from posterior_cases import posterior_of
from torch import Tensor, nn

GIVEN = {
    "number": 0.3,
    "tensor of no dimension": torch.tensor(0.3, dtype=torch.float64),
    "one per parameter tensor": torch.tensor([0.3, 0.7], dtype=torch.float64),
    "one per parameter": torch.linspace(0.1, 0.9, 8, dtype=torch.float64),
}


@pytest.mark.parametrize("case", GIVEN)
def test_numbers_keep_all_digits_of_a_double_precision_model(case: str) -> None:
    value = GIVEN[case]
    la = posterior_of(nn.Linear(3, 2).double(), "classification", prior_precision=value)
    assert la.prior_precision.dtype == torch.float64
    assert la.prior_precision.tolist() == torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist()
    if not isinstance(value, Tensor) or value.numel() in (1, 8):
        la.prior_mean = value
        assert la.prior_mean.reshape(-1).tolist() == la.prior_precision.tolist()


@pytest.mark.parametrize("case", GIVEN)
def test_numbers_take_the_precision_of_the_model(case: str) -> None:
    la = posterior_of(nn.Linear(3, 2), "classification", prior_precision=GIVEN[case])
    assert la.prior_precision.dtype == torch.float32
    assert la.prior_precision.ndim == 1
