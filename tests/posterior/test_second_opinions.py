"""What careful users ran into: models that keep things, enter nothing, come wrapped, or serve under inference mode."""

import copy
import pickle

import pytest
import torch
from models import MODELS, targets
from posterior_cases import loader_of, posterior_of
from torch import nn

PRIOR = 0.4


def data(n=24):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def built(module, *arguments):
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return module(*arguments).double().eval()


def fitted(model, likelihood="classification", **options):
    X, y = data()
    la = posterior_of(model, likelihood, **{"prior_precision": PRIOR, "temperature": 1.3, **options})
    la.fit(loader_of(X, y))
    return la, X


@pytest.mark.parametrize("name", ["MLP", "LSTM", "GRU"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_loaded_posterior_serves_under_inference_mode(subset, structure, name):
    model, X = MODELS[name]()
    options = {"subset_of_weights": subset, "hessian_structure": structure, "prior_precision": PRIOR}
    la = posterior_of(model, "classification", **options)
    la.fit(loader_of(X, targets("classification")))
    expected = la(X[:3])
    served = posterior_of(model, "classification", **options)
    with torch.inference_mode():
        served.load_state_dict(la.state_dict())
        found = served(X[:3].clone())
        served.sample(2)
        served(X[:3].clone(), pred_type="nn", link_approx="mc", n_samples=2)
    torch.testing.assert_close(found.clone(), expected)
    # what was kept from then on can still be differentiated
    served.optimize_prior_precision(n_steps=2)
    with torch.inference_mode():
        la.optimize_prior_precision(n_steps=2)
    torch.testing.assert_close(served.prior_precision, la.prior_precision)


class Keeping(nn.Module):
    """Keeps its features, as many models keep attention weights."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x):
        self.features = torch.tanh(self.body(x))
        self.calls += 1
        return self.head(self.features)


@pytest.mark.parametrize("kept_before", [False, True])
def test_nothing_of_a_transformation_stays_on_the_model(kept_before):
    model = built(Keeping)
    if kept_before:
        with torch.no_grad():
            model(data()[0])
    before = dict(model.__dict__)
    la, X = fitted(model, hessian_structure="kron")
    la(X[:2])
    assert model.__dict__.keys() == before.keys()
    assert model.calls == int(kept_before)
    if kept_before:
        assert model.features is before["features"]
    for again in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        torch.testing.assert_close(again(X[:2]), la(X[:2]))


class Strange(nn.Module):
    """A layer that K-FAC does not understand as it is called, between two that it does."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.middle, self.head = nn.Linear(4, 6), nn.Linear(3, 3), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        positions = hidden.reshape(len(x), 2, 3)
        if self.how == "as usual":
            positions = self.middle(positions)
        elif self.how == "positions first":
            positions = self.middle(positions.transpose(0, 1)).transpose(0, 1)
        elif self.how == "positions among the samples":
            positions = self.middle(positions.reshape(-1, 3)).reshape(positions.shape)
        elif self.how == "without a batch":
            positions = positions + self.middle(self.table)
        elif self.how == "one sample at a time":
            positions = torch.stack([self.middle(p[0])[None] + p for p in positions])
        elif self.how == "without a gradient":
            with torch.no_grad():
                shift = self.middle(positions)
            positions = positions + shift
        return self.head(torch.tanh(positions).flatten(1))


STRANGE = [
    "positions first",
    "positions among the samples",
    "without a batch",
    "one sample at a time",
    "without a gradient",
]


NO_MATTER = ("positions first", "positions among the samples")


@pytest.mark.parametrize("magnitudes", ["exact", "kronecker"])
@pytest.mark.parametrize("how", NO_MATTER)
def test_where_positions_stand_does_not_matter_when_each_is_a_sample(how, magnitudes):
    options = {"hessian_structure": "kron", "kron_basis": "kfac", "kron_magnitudes": magnitudes}
    la, _ = fitted(built(Strange, how), **options)
    usual, _ = fitted(built(Strange, "as usual"), **options)
    torch.testing.assert_close(la.directional_curvatures, usual.directional_curvatures)


@pytest.mark.parametrize("magnitudes", ["exact", "kronecker"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("how", STRANGE)
def test_layers_that_kfac_does_not_understand_have_row_matrices(how, approximation, magnitudes):
    if approximation == "expand" and how in NO_MATTER:
        pytest.skip("it does, above")
    options = {"hessian_structure": "kron", "kron_magnitudes": magnitudes, "magnitudes": "same_batch"}
    la, _ = fitted(built(Strange, how), kron_basis="kfac", kfac_approx=approximation, **options)
    rows, _ = fitted(built(Strange, how), **options)
    start = 4 * 6 + 6 + 6  # the table comes first
    own = slice(start, start + 9)
    torch.testing.assert_close(la.directional_curvatures[own], rows.directional_curvatures[own], rtol=1e-6, atol=1e-9)
    known = slice(start + 12, start + 30)
    different = (la.directional_curvatures[known] - rows.directional_curvatures[known]).abs().max()
    assert float(different) > 1e-6, "the head has K-FAC's own basis"


class WithAnEmptyParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(3, 0))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_an_empty_parameter_is_no_parameter(structure):
    la, X = fitted(built(WithAnEmptyParameter), hessian_structure=structure)
    plain, _ = fitted(built(WithAnEmptyParameter).head, hessian_structure=structure)
    torch.testing.assert_close(la(X[:3]), plain(X[:3]))
    again = posterior_of(la.model, "classification", hessian_structure=structure)
    again.load_state_dict(la.state_dict())
    torch.testing.assert_close(again(X[:3]), la(X[:3]))


class WithAnAuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        outputs = self.head(hidden)
        self.aux(hidden)
        return outputs


def test_the_last_layer_is_one_that_the_outputs_depend_on():
    la, _ = fitted(built(WithAnAuxiliaryHead), subset_of_weights="last_layer")
    assert la.selection.last_layer == "head"
    assert "last layer 'head'" in repr(la)


DEAD = {
    "a layer": {"subset_of_weights": "last_layer", "last_layer_name": "aux"},
    "entries": {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.tensor([44, 45])},
}


@pytest.mark.parametrize("case", DEAD)
def test_parameters_that_enter_nothing_are_refused(case):
    with pytest.raises(ValueError, match="outputs do not depend on the selected parameters"):
        fitted(built(WithAnAuxiliaryHead), **DEAD[case])


def test_a_compiled_model_is_the_model_inside():
    model = built(Keeping)
    la, X = fitted(model, hessian_structure="kron")
    compiled = torch.compile(model, backend="eager")
    other, _ = fitted(compiled, hessian_structure="kron")
    torch.testing.assert_close(other(X[:3]), la(X[:3]))
    again = posterior_of(model, "classification", hessian_structure="kron")
    again.load_state_dict(other.state_dict())
    torch.testing.assert_close(again(X[:3]), la(X[:3]))


def test_a_parallel_wrapper_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"inside DataParallel: pass model\.module"):
        posterior_of(nn.DataParallel(built(Keeping)), "classification")


def _cut(key):
    def change(state):
        state[key] = state[key][:-1]

    return change


def _set(key, value):
    def change(state):
        state[key] = value

    return change


DAMAGED = {
    "another structure": _set("option_structure", "lowrank"),
    "magnitudes cut short": _cut("magnitudes_values"),
    "in-sample values cut short": _cut("magnitudes_in_sample"),
    "errors cut short": _cut("magnitudes_standard_errors"),
    "skewness cut short": _cut("magnitudes_skewness"),
    "hashes cut short": _cut("samples_hashes"),
    "indices cut short": _cut("split_direction_indices"),
    "a mean that is a string": _set("mean", "x"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_state_is_refused_and_changes_nothing(case):
    la, X = fitted(built(Keeping), hessian_structure="kron")
    state = la.state_dict()
    DAMAGED[case](state)
    expected = la(X[:2])
    with pytest.raises(ValueError, match=r"state|Expected|damaged"):
        la.load_state_dict(state)
    torch.testing.assert_close(la(X[:2]), expected)


@pytest.mark.parametrize("basis", ["row_matrices", "kfac"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_everything_is_in_the_precision_of_the_model(structure, basis):
    if structure != "kron" and basis == "kfac":
        pytest.skip("of kron only")
    model, X = MODELS["MLP"](dtype=torch.float32)
    options = {"kron_basis": basis} if structure == "kron" else {}
    la = posterior_of(model, "classification", hessian_structure=structure, prior_precision=PRIOR, **options)
    la.fit(loader_of(X, targets("classification")))
    found = [la.directional_curvatures, la.in_sample_curvatures, la.standard_errors, la(X[:2]), la.sample(2), *la.H]
    assert {t.dtype for t in found} == {torch.float32}
