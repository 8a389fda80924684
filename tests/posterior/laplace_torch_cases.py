"""laplace-torch's own posteriors, fitted to 16 of 40 samples, and what they should be judged against, densely."""

import warnings
from copy import deepcopy
from functools import cache

import torch
from laplace import Laplace
from laplace.curvature import AsdlEF, BackPackGGN, CurvlinopsEF, CurvlinopsHessian
from models import targets
from oracles import dense_empirical_fisher, dense_ggn, dense_hessian, dense_posterior_precision
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

N, FITTED = 40, 16
PRIOR, TEMPERATURE = 0.4, 1.3
SIGMA = {"classification": 1.0, "regression": 0.75}
P, SIZES = 43, [20, 5, 15, 3]
LAST = torch.arange(25, P)
SHUFFLED = torch.randperm(P, generator=torch.Generator().manual_seed(7))[:24]
PRIORS = torch.linspace(0.3, 4.0, P, dtype=torch.float64)

CASES = {
    "diagonal": ("all", "diag", {}),
    "Kronecker": ("all", "kron", {}),
    "full": ("all", "full", {}),
    "diagonal of the last layer": ("last_layer", "diag", {}),
    "Kronecker of the last layer": ("last_layer", "kron", {}),
    "full of the last layer": ("last_layer", "full", {}),
    "diagonal of a subnetwork out of order": ("subnetwork", "diag", {}),
    "full of a subnetwork out of order": ("subnetwork", "full", {}),
    "Kronecker, prior per parameter tensor": ("all", "kron", {"prior_precision": PRIORS[::12]}),
    "last layer, Kronecker, prior per parameter tensor": ("last_layer", "kron", {"prior_precision": PRIORS[5::20]}),
    "diagonal, prior per parameter tensor": ("all", "diag", {"prior_precision": PRIORS[::12]}),
    "full, prior per parameter": ("all", "full", {"prior_precision": PRIORS}),
    # laplace-torch takes a prior per parameter of a subnetwork only where there are as many as tensors of the model
    "subnetwork, prior per parameter": (
        "subnetwork",
        "full",
        {"prior_precision": PRIORS[::12], "subnetwork_indices": SHUFFLED[:4]},
    ),
    "Monte-Carlo GGN": ("all", "full", {"backend_kwargs": {"stochastic": True}}),
    "GGN by BackPACK": ("all", "kron", {"backend": BackPackGGN}),
    "EF": ("all", "full", {"backend": CurvlinopsEF}),
    "EF by ASDL": ("all", "diag", {"backend": AsdlEF}),
    "Hessian": ("all", "full", {"backend": CurvlinopsHessian, "prior_precision": 90.0}),
}


@cache
def problem(likelihood, dtype=torch.float64):
    """Model, inputs and targets; the model is never to be written to."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        X = torch.randn(N, 4)
    return model.to(dtype).eval(), X.to(dtype), targets(likelihood, dtype=dtype)


@cache
def curvatures(kind, likelihood):
    """Curvature (P, P) of each sample with respect to all weights."""
    model, X, y = problem(likelihood)
    if kind == "EF":
        found = dense_empirical_fisher(model, X, y, likelihood)[0]
    elif kind == "Hessian":
        found = dense_hessian(model, X, y, likelihood)[0]
    else:
        found = dense_ggn(model, X, likelihood)[0]
    return [H.detach() for H in found]


def data_of(likelihood, dtype=torch.float64):
    _, X, y = problem(likelihood, dtype)
    return TensorDataset(X, y)


def loaders(likelihood, outside=range(FITTED, N), inside=range(FITTED), dtype=torch.float64, batch_size=5):
    """Held-out and fitted samples."""
    data = data_of(likelihood, dtype)
    return tuple(DataLoader(Subset(data, some), batch_size=batch_size, shuffle=True) for some in (outside, inside))


def theirs(likelihood, subset="all", structure="diag", *, dtype=torch.float64, **options):
    """A posterior of laplace-torch's with the curvature of its 16 samples scaled up to 40, as its users do it."""
    # a copy: BackPACK leaves hooks on a model
    model = deepcopy(problem(likelihood, dtype)[0])
    given = {"prior_precision": PRIOR, "sigma_noise": SIGMA[likelihood], "temperature": TEMPERATURE * FITTED / N}
    if subset == "subnetwork":
        given["subnetwork_indices"] = SHUFFLED
    la = Laplace(model, likelihood, subset, structure, **{**given, **options})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(8)
        la.fit(DataLoader(Subset(data_of(likelihood, dtype), range(FITTED)), batch_size=8))
    return la


@cache
def fitted(case, likelihood):
    """One of the cases, never to be written to."""
    subset, structure, options = CASES[case]
    return theirs(likelihood, subset, structure, **options)


def positions(case):
    """Of a posterior's parameters, in its own order, among all."""
    subset, _, options = CASES[case]
    return {"all": torch.arange(P), "last_layer": LAST, "subnetwork": options.get("subnetwork_indices", SHUFFLED)}[
        subset
    ]


def dense_precision(la):
    """The precision, in the posterior's own order."""
    precision = la.posterior_precision
    if isinstance(precision, torch.Tensor):
        return torch.diag(precision) if precision.ndim == 1 else precision
    return precision.to_matrix()


def dense_prior(case):
    """The prior precision of every parameter."""
    subset, _, options = CASES[case]
    prior = torch.as_tensor(options.get("prior_precision", PRIOR), dtype=torch.float64)
    if prior.ndim == 0 or len(prior) == len(positions(case)):
        return prior
    sizes = SIZES if subset == "all" else SIZES[2:]
    return torch.cat([p.repeat(n) for p, n in zip(prior, sizes, strict=True)])


def dense_curvatures(case, likelihood):
    """Curvature of each sample, of the posterior's kind, in its own order."""
    backend = CASES[case][2].get("backend")
    kind = "GGN" if backend is None else next((k for k in ("EF", "Hessian") if k in backend.__name__), "GGN")
    at = positions(case)
    return [H[at][:, at] for H in curvatures(kind, likelihood)]


def dense_full_batch(case, likelihood):
    """Precision of the full-batch posterior of 40 samples."""
    return dense_posterior_precision(
        sum(dense_curvatures(case, likelihood)) / N,
        n_data=N,
        prior_precision=dense_prior(case),
        sigma_noise=SIGMA[likelihood],
        temperature=TEMPERATURE,
    )
