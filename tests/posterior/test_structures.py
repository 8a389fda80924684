"""Nine classes by name, the subset that each is over, and the options that belong to another."""

import copy

import pytest
import torch
from laplace import FullLaplace, Laplace, ParametricLaplace
from models import mlp, targets
from posterior_cases import PLAIN, close, hyper_parameters, loader_of, posterior_of
from torch import nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior import factory
from debiased_laplace.posterior.factory import CLASSES

NAMES = {
    ("all", "lowrank"): "DebiasedLowRankLaplace",
    ("all", "kron"): "DebiasedKronLaplace",
    ("all", "full"): "DebiasedFullLaplace",
    ("last_layer", "lowrank"): "DebiasedLowRankLLLaplace",
    ("last_layer", "kron"): "DebiasedKronLLLaplace",
    ("last_layer", "full"): "DebiasedFullLLLaplace",
    ("subnetwork", "lowrank"): "DebiasedLowRankSubnetLaplace",
    ("subnetwork", "kron"): "DebiasedKronSubnetLaplace",
    ("subnetwork", "full"): "DebiasedFullSubnetLaplace",
}
every_class = pytest.mark.parametrize("key", NAMES, ids=" ".join)


def subset_options(subset):
    return {"subnetwork_indices": torch.arange(20, 60)} if subset == "subnetwork" else {}


def fitted(subset, structure, make=DebiasedLaplace):
    model, X = mlp()
    given = {**PLAIN, **hyper_parameters("classification"), **subset_options(subset)}
    la = make(model, "classification", subset, structure, **given)
    la.fit(loader_of(X, targets("classification")))
    return la, X


@every_class
def test_each_class_has_its_own_key(key):
    subset, structure = key
    cls = getattr(factory, NAMES[key])
    assert cls._key == (subset, f"debiased_{structure}")
    assert CLASSES[key] is cls
    la = posterior_of(mlp()[0], "classification", subset, structure, **subset_options(subset))
    assert type(la) is cls
    assert isinstance(la, ParametricLaplace)
    assert set(CLASSES) == set(NAMES)
    assert len({c._key for c in CLASSES.values()}) == 9


@pytest.mark.parametrize("key", [key for key in NAMES if key[0] != "subnetwork"], ids=" ".join)
def test_laplace_torch_finds_the_classes_by_name(key):
    subset, structure = key
    theirs, X = fitted(subset, f"debiased_{structure}", Laplace)
    ours, _ = fitted(subset, structure)
    assert type(theirs) is type(ours) is CLASSES[key]
    close(theirs.posterior_precision.to_dense(), ours.posterior_precision.to_dense(), 1e-9)
    close(theirs(X), ours(X), 1e-9)


def test_laplace_torchs_own_classes_are_still_found_by_theirs():
    assert type(Laplace(mlp()[0], "classification", "all", "full")) is FullLaplace


def test_laplace_torch_has_no_other_structures_for_subnetworks_than_its_own():
    with pytest.raises(ValueError, match="full or diagonal"):
        Laplace(mlp()[0], "classification", "subnetwork", "debiased_full", subnetwork_indices=torch.arange(20, 60))


def test_names_may_be_laplace_torchs_enums():
    from laplace.utils.enums import HessianStructure, Likelihood, SubsetOfWeights

    la = posterior_of(
        mlp()[0], Likelihood.REGRESSION, SubsetOfWeights.LAST_LAYER, HessianStructure.KRON, prior_precision=0.4
    )
    assert type(la) is CLASSES["last_layer", "kron"]
    assert la.likelihood == "regression"


# --- the last layer, known only after a forward pass ---


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_a_last_layer_is_found_at_the_fit(structure):
    model, X = mlp()
    la = posterior_of(model, "classification", "last_layer", structure, **hyper_parameters("classification"))
    assert (la.n_params, la.n_layers, la.mean) == (None, None, None)
    assert repr(la).startswith(f"{NAMES['last_layer', structure]}(classification, last layer, ")
    assert repr(la).endswith("not fitted)")
    with pytest.raises(NotFittedError):
        _ = la.selection
    la.fit(loader_of(X, targets("classification")))
    assert (la.n_params, la.n_layers) == (18, 2)
    assert la.selection.names == ("4.weight", "4.bias")
    assert torch.equal(la.mean, torch.cat([model[4].weight.flatten(), model[4].bias]).detach())
    named, _ = mlp()
    other = posterior_of(
        named, "classification", "last_layer", structure, last_layer_name="4", **hyper_parameters("classification")
    )
    assert other.n_params == 18
    other.fit(loader_of(X, targets("classification")))
    close(other.posterior_precision.to_dense(), la.posterior_precision.to_dense(), 1e-9)


def test_another_layer_by_name():
    model, X = mlp()
    la = posterior_of(model, "regression", "last_layer", last_layer_name="2", **hyper_parameters("regression"))
    la.fit(loader_of(X, targets("regression")))
    assert la.selection.names == ("2.weight", "2.bias")
    assert la.n_params == 40
    assert la.selection.indices.tolist() == list(range(35, 75))


def evenly(n):
    return torch.linspace(0.3, 0.7, n, dtype=torch.float64)


PRIORS_THAT_FIT = {
    "one number": (0.7, torch.full((18,), 0.7)),
    "one for each tensor": (evenly(2), torch.tensor([0.3] * 15 + [0.7] * 3)),
    "one for each parameter": (evenly(18), evenly(18)),
}


OF_STRUCTURES = [(s, c) for s in ("lowrank", "kron", "full") for c in PRIORS_THAT_FIT]
OF_STRUCTURES.remove(("kron", "one for each parameter"))  # one of those that do not fit


@pytest.mark.parametrize(("structure", "case"), OF_STRUCTURES)
def test_a_prior_that_came_before_its_layer(structure, case):
    prior, of_entries = PRIORS_THAT_FIT[case]
    model, X = mlp()
    options = {**hyper_parameters("classification"), "prior_precision": prior}
    la = posterior_of(model, "classification", "last_layer", structure, **options)
    la.fit(loader_of(X, targets("classification")))
    close(la.prior_precision_diag, of_entries)
    scalar = posterior_of(model, "classification", "last_layer", structure, **hyper_parameters("classification"))
    scalar.fit(loader_of(X, targets("classification")))
    P0 = torch.diag(of_entries.double() - 0.4)
    close(la.posterior_precision.to_dense(), scalar.posterior_precision.to_dense() + P0)


ONE_EACH = r"one per parameter tensor \(2\) or one per parameter \(18\); got"
PRIORS_THAT_DO_NOT = {
    "Kronecker, one for each parameter": ("kron", 18, r"one per parameter tensor \(2\).*basis mixes.*got 18"),
    "Kronecker, one for each tensor of the model": ("kron", 6, r"one per parameter tensor \(2\).*got 6"),
    "low rank, one for each tensor of the model": ("lowrank", 6, f"{ONE_EACH} 6"),
    "full, one for each parameter of the model": ("full", 93, f"{ONE_EACH} 93"),
}


@pytest.mark.parametrize("case", PRIORS_THAT_DO_NOT)
def test_a_prior_that_does_not_fit_its_layer_is_refused_at_the_fit(case):
    structure, n, message = PRIORS_THAT_DO_NOT[case]
    model, X = mlp()
    la = posterior_of(model, "classification", "last_layer", structure, prior_precision=evenly(n))
    with pytest.raises(ValueError, match=message):
        la.fit(loader_of(X, targets("classification")))
    # it is as before: not fitted, and a prior that fits can still be set
    assert la.n_params is None
    with pytest.raises(NotFittedError):
        la(X)
    la.prior_precision = 0.7
    la.fit(loader_of(X, targets("classification")))
    assert la.n_params == 18


def test_a_prior_mean_that_came_before_its_layer_is_checked_at_the_fit():
    model, X = mlp()
    la = posterior_of(model, "classification", "last_layer", prior_mean=torch.zeros(93), prior_precision=0.4)
    with pytest.raises(ValueError, match=r"prior_mean must be one number or one per parameter \(18\); got 93"):
        la.fit(loader_of(X, targets("classification")))
    assert la.n_params is None


def test_states_of_other_subsets_are_refused():
    last, _ = fitted("last_layer", "lowrank")
    part, _ = fitted("subnetwork", "lowrank")
    model, state = last.model, last.state_dict()
    with pytest.raises(ValueError, match="state is over other parameters"):
        posterior_of(model, "classification", "last_layer", last_layer_name="2").load_state_dict(state)
    with pytest.raises(ValueError, match="Expected the state of a DebiasedLowRankLaplace"):
        posterior_of(model, "classification").load_state_dict(state)
    # as many entries, other ones
    shifted = posterior_of(part.model, "classification", "subnetwork", subnetwork_indices=torch.arange(21, 61))
    with pytest.raises(ValueError, match="state is over other parameters"):
        shifted.load_state_dict(part.state_dict())
    with pytest.raises(ValueError, match="one of the modules"):
        posterior_of(model, "classification", "last_layer").load_state_dict({**state, "last_layer_name": "head"})


class Unregistered(nn.Module):
    """Parameters of its own, and no layer with any."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers) if layers else None
        self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double())

    def forward(self, x):
        x = x @ self.weight
        return x if self.layers is None else self.layers(x)


def frozen_head():
    model, _ = mlp()
    model[4].requires_grad_(False)
    return model


LAYERS = {
    "no module of that name": (mlp()[0], "head", "one of the modules.*got 'head'"),
    "a module without parameters": (mlp()[0], "3", "no trainable parameters"),
    "a frozen module": (frozen_head(), "4", "no trainable parameters"),
    "parameters outside layers": (
        Unregistered(nn.Tanh()),
        None,
        "could not be found.*Pass last_layer_name, or take subset_of_weights='all'",
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_that_cannot_be_taken(case):
    model, name, message = LAYERS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        posterior_of(model, "classification", "last_layer", last_layer_name=name).fit(
            loader_of(mlp()[1], targets("classification"))
        )


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3).double(), Unregistered])
def test_a_model_without_layers_is_its_own_last_one(make):
    model = make()
    found = []
    for subset in ("last_layer", "all"):
        la = posterior_of(model, "classification", subset, "kron", prior_precision=0.4)
        la.fit(loader_of(mlp()[1], targets("classification")))
        found.append(la)
    close(found[0].posterior_precision.to_dense(), found[1].posterior_precision.to_dense(), 1e-12)
    loaded = posterior_of(model, "classification", "last_layer", "kron")
    loaded.load_state_dict(found[0].state_dict())
    close(loaded(mlp()[1]), found[0](mlp()[1]), 1e-9)


def test_a_frozen_head_leaves_the_layer_before_it():
    la = posterior_of(frozen_head(), "classification", "last_layer", prior_precision=0.4)
    la.fit(loader_of(mlp()[1], targets("classification")))
    assert la.selection.last_layer == "2"


def test_looking_for_the_last_layer_leaves_no_hooks():
    model, X = mlp()
    model.train()
    la = posterior_of(model, "classification", "last_layer", prior_precision=0.4)
    la.fit(loader_of(X, targets("classification")))
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


# --- indices and options that do not fit ---

INDICES = {
    "none": (None, "got none"),
    "empty": (torch.zeros(0, dtype=torch.int64), r"torch.int64 of shape \(0,\)"),
    "floats": (torch.tensor([1.0, 2.0]), r"torch.float32 of shape \(2,\)"),
    "a mask": (torch.ones(93, dtype=torch.bool), r"torch.bool of shape \(93,\)"),
    "32 bits": (torch.tensor([1, 2], dtype=torch.int32), r"torch.int32 of shape \(2,\)"),
    "two dimensions": (torch.tensor([[1, 2]]), r"torch.int64 of shape \(1, 2\)"),
    "twice": (torch.tensor([1, 2, 2, 5]), r"duplicates: pass indices\.unique"),
    "out of range": (torch.tensor([1, 93]), "in the 93 trainable parameters; got 1 to 93"),
    "negative": (torch.tensor([-1, 4]), "in the 93 trainable parameters; got -1 to 4"),
}


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("case", INDICES)
def test_indices_that_cannot_be_taken(case, structure):
    indices, message = INDICES[case]
    with pytest.raises(ValueError, match=f"distinct positions.*{message}"):
        posterior_of(mlp()[0], "classification", "subnetwork", structure, subnetwork_indices=indices)


def test_indices_are_the_posteriors_own():
    model, X = mlp()
    indices = torch.arange(20, 60)
    la = posterior_of(model, "classification", "subnetwork", "full", subnetwork_indices=indices, prior_precision=0.4)
    before = copy.deepcopy(la.selection.description)
    indices += 1
    la.fit(loader_of(X, targets("classification")))
    assert la.selection.description == before
    assert la.selection.indices.tolist() == list(range(20, 60))


OPTIONS = {
    "rank of a Kronecker posterior": ("kron", {"rank": 5}, "rank requires hessian_structure='lowrank'; got rank=5"),
    "rank of every direction": ("full", {"rank": 5}, "rank requires hessian_structure='lowrank'; got rank=5"),
    "complement of a Kronecker posterior": ("kron", {"complement": "diagonal"}, "complement requires .*'lowrank'"),
    "complement of every direction": ("full", {"complement": "isotropic"}, "complement requires .*'lowrank'"),
    "solver of a Kronecker posterior": ("kron", {"solver": "lanczos"}, "solver requires .*'lowrank'"),
    "solver of every direction": ("full", {"solver": "gram"}, "solver requires .*'lowrank'"),
    "basis of low rank": ("lowrank", {"kron_basis": "kfac"}, "kron_basis requires .*'kron'; got kron_basis='kfac'"),
    "basis of every direction": ("full", {"kron_basis": "kfac"}, "kron_basis requires .*'kron'"),
    "Kronecker magnitudes of low rank": ("lowrank", {"kron_magnitudes": "kronecker"}, "kron_magnitudes requires"),
    "K-FAC's approximation of every direction": ("full", {"kfac_approx": "reduce"}, "kfac_approx requires .*'kron'"),
    "K-FAC's approximation of row matrices": ("kron", {"kfac_approx": "reduce"}, "requires kron_basis='kfac'"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_another_structure_are_refused(case):
    structure, options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        posterior_of(mlp()[0], "classification", "all", structure, **options)


OF_ANOTHER_SUBSET = {
    "a layer's name for all weights": ("all", {"last_layer_name": "4"}, "last_layer_name .*'last_layer'"),
    "a layer's name for a subnetwork": (
        "subnetwork",
        {"last_layer_name": "4", "subnetwork_indices": torch.arange(3)},
        "last_layer_name .*'last_layer'",
    ),
    "indices for all weights": ("all", {"subnetwork_indices": torch.arange(3)}, "subnetwork_indices .*'subnetwork'"),
    "indices for a last layer": (
        "last_layer",
        {"subnetwork_indices": torch.arange(3)},
        "subnetwork_indices .*'subnetwork'",
    ),
}


@pytest.mark.parametrize("case", OF_ANOTHER_SUBSET)
def test_options_of_another_subset_are_refused(case):
    subset, options, message = OF_ANOTHER_SUBSET[case]
    with pytest.raises(ValueError, match=message):
        posterior_of(mlp()[0], "classification", subset, "lowrank", **options)


# --- what a Kronecker posterior does not have ---


def test_a_kronecker_posterior_says_what_it_has_instead():
    la, _ = fitted("all", "kron")
    assert la.rank is None
    assert "rank" not in repr(la)
    with pytest.raises(ValueError, match="no matrix of directions; expected hessian_structure='lowrank' or 'full'"):
        _ = la.directions
    assert la.directional_curvatures.shape == (93,)
    model, X = mlp()
    by_factors = posterior_of(model, "classification", "all", "kron", kron_magnitudes="kronecker", prior_precision=0.4)
    by_factors.fit(loader_of(X, targets("classification")))
    with pytest.raises(ValueError, match=r"no standard errors.*expected kron_magnitudes='exact'"):
        _ = by_factors.standard_errors
    # a state says so too
    loaded = posterior_of(model, "classification", "all", "kron")
    loaded.load_state_dict(by_factors.state_dict())
    with pytest.raises(ValueError, match="no standard errors"):
        _ = loaded.standard_errors
