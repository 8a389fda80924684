"""Fitted posteriors and their dense counterparts, for the tests of this room."""

from functools import cache

import torch
from models import MODELS, targets
from oracles import dense_ggn, dense_jacobian, naive_mean_field
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.predictive.mean_field import nodes as fixed_nodes

SIGMA = {"classification": 1.0, "regression": 0.7}
TEMPERATURE = 1.3
PRIOR = 0.4


@cache
def problem(name, likelihood):
    """Model, inputs, targets and the GGN of every sample; never to be written to."""
    model, X = MODELS[name]()
    per_sample = [H.detach() for H in dense_ggn(model, X, likelihood)[0]]
    return model, X, targets(likelihood), per_sample


@cache
def jacobians(name, n):
    """Jacobians (n, C, P) of the first n samples, one output at a time."""
    model, X = MODELS[name]()
    return torch.stack([dense_jacobian(model, x) for x in X[:n]])


def mean_field(f, covariance):
    """Class probabilities of Gaussian logits by the default link, one input at a time."""
    nodes = fixed_nodes(f.shape[1] - 1, torch.float64, torch.device("cpu")).T
    return torch.stack([naive_mean_field(m.double(), S.double(), nodes) for m, S in zip(f, covariance, strict=True)])


def loader_of(X, y, batch_size=16, **options):
    return DataLoader(TensorDataset(X, y), batch_size=batch_size, **options)


def hyper_parameters(likelihood):
    return {"sigma_noise": SIGMA[likelihood], "prior_precision": PRIOR, "temperature": TEMPERATURE}


PLAIN = {"magnitudes": "held_out", "complement": "none", "sampling": "uniform"}
"""What tests take where they say nothing else, whatever the package's defaults are."""


def posterior_of(model, likelihood, *args, **options):
    """A posterior, plain but for what is said."""
    return DebiasedLaplace(model, likelihood, *args, **{**PLAIN, **options})


def fitted(name, likelihood, *, n_data=None, **options):
    """A posterior of one of the models, and the problem it was fitted to."""
    model, X, y, per_sample = problem(name, likelihood)
    la = posterior_of(model, likelihood, **{**hyper_parameters(likelihood), **options})
    la.fit(loader_of(X, y, shuffle=True), n_data=n_data)
    return la, X, y, per_sample


def close(found, expected, rtol=1e-6):
    """Entries equal up to rounding of the largest."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).detach(),
        expected,
        rtol=rtol,
        atol=1e-7 * float(expected.abs().max()) if expected.numel() else 0.0,
    )
