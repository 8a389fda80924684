"""Every likelihood, and positions, through loaders without length and iterable data sets."""

import pytest
import torch
from likelihoods import fitted, likelihood_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate
from debiased_laplace.curvature.positions import IGNORED

PRIOR = 3.0


class Stream(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return iter(zip(self.X, self.y, strict=True))


class WithoutLength:
    def __init__(self, X, y):
        self.batches = list(DataLoader(TensorDataset(X, y), batch_size=6))

    def __iter__(self):
        return iter(self.batches)


def tokens():
    torch.manual_seed(3)
    X, y = torch.randn(30, 5, 4).double(), torch.randint(3, (30, 5))
    y[torch.rand(30, 5) < 0.3] = IGNORED
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), X, y


def problem_of(name):
    if name == "tokens":
        return (*tokens(), "classification")
    la, X, y = fitted(name, 2 if name in ("heteroscedastic", "poisson") else 1)
    return la.model, X, y, likelihood_of(name)


@pytest.mark.parametrize("kind", ["stream", "without length"])
@pytest.mark.parametrize("name", ["tokens", "binary", "poisson", "heteroscedastic", "ordinal"])
@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:.*than the plain network")
def test_streams_go_through_all_of_it(name, kind):
    model, X, y, likelihood = problem_of(name)

    def streamed(some=slice(None)):
        return (
            DataLoader(Stream(X[some], y[some]), batch_size=6) if kind == "stream" else WithoutLength(X[some], y[some])
        )

    def stored(some=slice(None)):
        return DataLoader(TensorDataset(X[some], y[some]), batch_size=6)

    found = []
    for loader in (streamed, stored):
        la = DebiasedLaplace(model, likelihood, prior_precision=PRIOR, temperature=0.7)
        la.fit(loader(slice(20)), n_data=30)
        kl = la.held_out_kl(loader()).value
        precision = la.posterior_precision.to_dense()
        la.optimize_prior_precision(method="gridsearch", val_loader=loader(slice(20, None)), grid_size=3)
        tuned = float(la.prior_precision)
        nll = 0 if name == "ordinal" else evaluate(la, loader(slice(20, None))).metrics["laplace"]["nll"].value
        found.append((kl, tuned, nll, precision))
    assert found[0][:3] == pytest.approx(found[1][:3])
    torch.testing.assert_close(found[0][3], found[1][3])
