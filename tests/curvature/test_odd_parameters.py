"""Parameters without entries, and matrices that are no weights of layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace


class Net(nn.Module):
    """A network with an empty parameter, a raw matrix, and a matrix in two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.empty = nn.Linear(5, 30), nn.Parameter(torch.zeros(0, 4))
        self.raw = nn.Parameter(torch.randn(30, 30) / 5)
        self.one, self.other, self.out = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 3)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = functional.linear(torch.tanh(self.first(x)), self.raw)
        return self.out(torch.tanh(self.other(torch.tanh(self.one(x)))))


@pytest.mark.parametrize(
    "options",
    [{"rank": 6}, {"hessian_structure": "kron"}, {"hessian_structure": "kron", "kron_basis": "kfac"}],
    ids=["low rank", "Kronecker", "K-FAC's basis"],
)
def test_rows_as_factors_give_what_flat_rows_give(options, monkeypatch):
    model, X = Net().double(), torch.randn(40, 5, generator=torch.Generator().manual_seed(1)).double()
    data = DataLoader(TensorDataset(X, torch.arange(40) % 3), batch_size=8)
    predicted = []
    for _ in range(2):
        la = DebiasedLaplace(model, "classification", prior_precision=3.0, n_rows=60, **options)
        la.fit(data)
        predicted.append(la(X))
        monkeypatch.setattr("debiased_laplace.curvature.row_curvature.RowCurvature._by_parameter", False)
        monkeypatch.setattr("debiased_laplace.curvature.network.Network.jacobians_by_parameter", lambda *_: None)
    torch.testing.assert_close(*predicted, rtol=1e-4, atol=1e-9)
