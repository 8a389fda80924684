"""Posteriors of one small network, of both libraries; prior precision, noise and temperature are never 1."""

from functools import cache

import torch
from laplace import Laplace
from laplace.baselaplace import BaseLaplace
from models import mlp, targets
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace

N, B, C, P = 40, 24, 3, 93
PRIOR, SIGMA, TEMPERATURE = 0.4, 0.7, 1.3
TASKS = {"classification": "multiclass", "regression": "regression"}
MODEL, X = mlp()


def data(likelihood="classification"):
    return TensorDataset(X, targets(likelihood))


def loader(likelihood="classification", indices=range(N), batch_size=8):
    return DataLoader(Subset(data(likelihood), indices), batch_size=batch_size)


def _make(library, likelihood, subset, structure, options):
    noise = {"sigma_noise": SIGMA} if likelihood == "regression" else {}
    indices = {"subnetwork_indices": torch.arange(10, 50)} if subset == "subnetwork" else {}
    options = {"prior_precision": PRIOR, "temperature": TEMPERATURE, **noise, **indices, **options}
    return library(MODEL, likelihood, subset, structure, **options)


@cache
def debiased(likelihood="classification", subset="all", structure="lowrank", n=B, **options):
    la = _make(DebiasedLaplace, likelihood, subset, structure, options)
    la.fit(loader(likelihood, range(n)), n_data=N)
    return la


@cache
def of_laplace_torch(likelihood="classification", subset="all", structure="kron", **options):
    la = _make(Laplace, likelihood, subset, structure, options)
    la.fit(loader(likelihood))
    return la


class WithoutModel(BaseLaplace):
    """A posterior that has no network, as an ensemble of them."""

    def __init__(self):
        self.likelihood, self.n_data, self.temperature = "classification", N, TEMPERATURE

    @property
    def prior_precision(self):
        return torch.tensor(PRIOR, dtype=torch.float64)

    def log_marginal_likelihood(self):
        raise NotImplementedError("it has none")
