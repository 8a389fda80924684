"""Arguments of wrong types, tried without the tests' type checks: what a user meets. Prints one JSON object."""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from models import mlp, targets  # noqa: E402
from posterior_cases import posterior_of  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


def loader(likelihood="classification"):
    return DataLoader(TensorDataset(mlp()[1], targets(likelihood)), batch_size=16)


def fresh(likelihood="classification", **options):
    return posterior_of(mlp()[0], likelihood, **options)


def fitted(likelihood="classification", **options):
    la = fresh(likelihood, rank=3, **options)
    la.fit(loader(likelihood))
    return la


def subnetwork(indices):
    return posterior_of(mlp()[0], "classification", "subnetwork", subnetwork_indices=indices)


def kron(**options):
    return posterior_of(mlp()[0], "classification", "all", "kron", **options)


X = mlp()[1]
CASES = {
    "rank: float": lambda: fresh(rank=2.5),
    "rank: bool": lambda: fresh(rank=True),
    "seed: text": lambda: fresh(seed="1"),
    "seed: bool": lambda: fresh(seed=True),
    "n_folds: one": lambda: fresh(n_folds=1),
    "n_folds: text": lambda: fresh(n_folds="ten"),
    "magnitudes: unknown": lambda: fresh(magnitudes="jackknife"),
    "complement: unknown": lambda: fresh(complement="block"),
    "metric: unknown": lambda: fresh(metric="fisher"),
    "inverse_correction: unknown": lambda: fresh(inverse_correction="third_order"),
    "rank: auto with kron": lambda: kron(rank="auto"),
    "direction_samples: auto with cross_fitted": lambda: fresh(magnitudes="cross_fitted", direction_samples="auto"),
    "solver: unknown": lambda: fresh(solver="power"),
    "direction_samples: text": lambda: fresh(direction_samples="half"),
    "direction_samples: bool": lambda: fresh(direction_samples=True),
    "magnitude_samples: text": lambda: fresh(magnitude_samples="rest"),
    "prior_precision: text": lambda: fresh(prior_precision="big"),
    "prior_precision: None": lambda: fresh(prior_precision=None),
    "prior_mean: text": lambda: fresh(prior_mean="zero"),
    "temperature: text": lambda: fresh(temperature="cold"),
    "temperature: several": lambda: fresh(temperature=torch.ones(2)),
    "sigma_noise: a matrix": lambda: fresh("regression", sigma_noise=torch.ones(3, 2)),
    "likelihood: unknown": lambda: fresh("bernoulli"),
    "subset: unknown": lambda: posterior_of(mlp()[0], "classification", "first_layer"),
    "structure: unknown": lambda: posterior_of(mlp()[0], "classification", "all", "tree"),
    "subnetwork: no indices": lambda: subnetwork(None),
    "subnetwork: a list": lambda: subnetwork([0, 1]),
    "subnetwork: floats": lambda: subnetwork(torch.tensor([0.0, 1.0])),
    "subnetwork: a mask": lambda: subnetwork(torch.ones(93, dtype=torch.bool)),
    "last_layer_name: a number": lambda: posterior_of(mlp()[0], "classification", "last_layer", last_layer_name=4),
    "kron_basis: unknown": lambda: kron(kron_basis="ekfac"),
    "kron_magnitudes: unknown": lambda: kron(kron_magnitudes="eigenvalues"),
    "kfac_approx: unknown": lambda: kron(kron_basis="kfac", kfac_approx="sum"),
    "backend: no class of laplace-torch's": lambda: fresh(backend=object),
    "backend: its name": lambda: fresh(backend="CurvlinopsGGN"),
    "backend_kwargs: unknown": lambda: fresh(backend_kwargs={"last_layer": True}),
    "backend_kwargs: draws: text": lambda: fresh(backend_kwargs={"stochastic": True, "num_samples": "many"}),
    "loader: a number": lambda: fresh().fit(7),
    "loader: None": lambda: fresh().fit(None),
    "loader: a tensor": lambda: fresh().fit(X),
    "loader: a generator": lambda: fresh().fit(b for b in loader()),
    "loader: batches of text": lambda: fresh().fit([("a", "b")]),
    "loader: batches of four": lambda: fresh().fit([(X, X, X, X)]),
    "n_data: float": lambda: fresh().fit(loader(), n_data=40.0),
    "n_data: bool": lambda: fresh().fit(loader(), n_data=True),
    "override: text": lambda: fresh().fit(loader(), override="no"),
    "override: a number": lambda: fresh().fit(loader(), override=0),
    "tolerance: text": lambda: fresh().fit(loader(), tolerance="small"),
    "tolerance: bool": lambda: fresh().fit(loader(), tolerance=True),
    "tolerance: several": lambda: fresh().fit(loader(), tolerance=torch.ones(2)),
    "x: list": lambda: fitted()([[1.0, 2.0, 3.0, 4.0]]),
    "x: None": lambda: fitted().functional_samples(None),
    "n_samples: float": lambda: fitted()(X, link_approx="mc", n_samples=2.5),
    "n_samples: bool": lambda: fitted().sample(True),
    "generator: seed": lambda: fitted()(X, link_approx="mc", generator=3),
    "generator: seed of weights": lambda: fitted().sample(3, generator=3),
    "generator: seed of functions": lambda: fitted().functional_samples(X, generator=3),
    "state: text": lambda: fitted().load_state_dict("weights.pt"),
    "init_prior_prec: text": lambda: fitted().optimize_prior_precision(init_prior_prec="big"),
    "val_loader: a number": lambda: fitted().optimize_prior_precision(method="gridsearch", val_loader=3),
    "grid_size: float": lambda: fitted().optimize_prior_precision(
        method="gridsearch", grid_size=2.5, val_loader=loader()
    ),
    "loss: text": lambda: fitted().optimize_prior_precision(method="gridsearch", loss="nll", val_loader=loader()),
    "held-out loader: a number": lambda: fitted(direction_samples=10, magnitude_samples=10).held_out_kl(3),
}


def outcome(call):
    try:
        call()
    except BaseException as error:
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return [], ""


if __name__ == "__main__":
    print(json.dumps({case: outcome(call) for case, call in CASES.items()}))
