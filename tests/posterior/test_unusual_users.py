"""Models and data sets that are unusual and legitimate, or wrong in ways that torch passes over in silence."""

import itertools
import warnings

import pytest
import torch
from posterior_cases import posterior_of
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from debiased_laplace.errors import OverlapError


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(X, torch.randint(0, 3, (24,), generator=generator))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def fitted(model, data, likelihood="classification", **options):
    la = posterior_of(model, likelihood, prior_precision=0.3, **options)
    la.fit(data if isinstance(data, DataLoader) else DataLoader(data, batch_size=7))
    return la


def test_a_module_that_is_used_twice_stays_whole(data):
    torch.manual_seed(1)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3)).double()
    X = data.tensors[0]
    before = model(X).detach()
    weight = shared.weight
    la = fitted(model, data)
    la(X, pred_type="nn", link_approx="mc", n_samples=5)
    assert shared.weight is weight
    assert isinstance(weight, nn.Parameter)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    # the derivative goes through both uses
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"0.weight": w}, (X[:1],), tie_weights=False)[0], weight.detach()
    )
    network = la.fit_result.network
    found = torch.cat([J for J, _ in network.jacobians(X[:1])])[0, :, :16]
    torch.testing.assert_close(found, J.flatten(1), rtol=1e-10, atol=1e-12)


def test_tied_parameters_of_two_modules_count_once(data):
    torch.manual_seed(1)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, 3)).double()
    b.weight = a.weight
    la = fitted(model, data)
    X = data.tensors[0]
    moved = {k: v + 0.1 for k, v in la.fit_result.network.parameters.items()}
    before = model(X).detach()
    changed = la.fit_result.network.selection.call(moved, X)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
        torch.testing.assert_close(model(X), changed)
        for p in model.parameters():
            p.sub_(0.1)
    torch.testing.assert_close(model(X), before)


class Stopping(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i == 20:
            raise StopIteration
        return self.data[i]


def test_a_data_set_that_ends_its_loader_early_is_refused(data):
    with pytest.raises(ValueError, match="StopIteration"):
        fitted(mlp(), Stopping(data))


def test_dropped_directions_that_matter_are_told_of():
    X, y = (torch.tensor(part) for part in load_breast_cancer(return_X_y=True))
    raw, standard = X.double(), ((X - X.mean(0)) / X.std(0)).double()
    model = nn.Linear(30, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)
    options = {"magnitudes": "same_batch"}
    with pytest.warns(UserWarning, match="standardize"):
        fitted(model, TensorDataset(raw, y), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(model, TensorDataset(standard, y), **options)


def test_a_state_of_other_parameters_of_the_same_size_is_refused(data):
    torch.manual_seed(1)
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
    model = nn.Sequential(a, b, c).double()
    a.requires_grad_(False)
    state = fitted(model, data).state_dict()
    a.requires_grad_(True)
    b.requires_grad_(False)
    with pytest.raises(ValueError, match="other parameters"):
        posterior_of(model, "classification").load_state_dict(state)


def test_a_damaged_state_leaves_the_posterior_as_it_was(data):
    model = mlp()
    la = fitted(model, Subset(data, range(12)))
    state = fitted(model, data).state_dict()
    damages = {
        "prior_precision": (torch.ones(7), r"one per parameter \(51\); got 7"),
        "curvature_directions": (torch.ones(5, 2), "directions of shape|damaged"),
        "curvature_diagonal": (None, "damaged"),
        "curvature_weights": (torch.full_like(state["curvature_weights"], float("nan")), "finite"),
    }
    for key, (value, told) in damages.items():
        with pytest.raises(ValueError, match=f"(?i){told}"):
            la.load_state_dict({**state, key: value})
        assert la.n_data == 12
        assert la.split.n_samples == 12


def centred(samples):
    X = torch.stack([x for x, _ in samples])
    return X - X.mean(0), torch.stack([y for _, y in samples])


def test_samples_whose_collate_depends_on_the_batch_are_known_by_position(data):
    loader = DataLoader(Subset(data, range(12)), batch_size=4, collate_fn=centred)
    la = posterior_of(mlp(), "classification", prior_precision=0.3)
    la.fit(loader, n_data=200)
    apart, overlapping = (
        DataLoader(Subset(data, some), batch_size=5, collate_fn=centred) for some in (range(12, 24), range(6, 18))
    )
    assert la.held_out_kl(apart, loader).n == 12
    with pytest.raises(OverlapError, match="6 of the 12"):
        la.held_out_kl(overlapping, loader)


def test_lanczos_through_group_normalization(data):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(), nn.Linear(24, 3)).double()
    X, y = torch.randn(24, 2, 8).double(), torch.randn(24, 3).double()
    found = [fitted(model, TensorDataset(X, y), "regression", rank=4, solver=s) for s in ("gram", "lanczos")]
    torch.testing.assert_close(*(la.directional_curvatures for la in found), rtol=1e-6, atol=0)


WRONG_INPUTS = {
    "another width": lambda x: torch.randn(3, 5).double(),
    "another dtype": lambda x: x.float(),
    "integers": lambda x: x.long(),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_after_the_fit_are_value_errors(data, case):
    la = fitted(mlp(), data, direction_samples=6, magnitude_samples=6)
    x = WRONG_INPUTS[case](data.tensors[0])
    y = torch.zeros(len(x), dtype=torch.int64)
    for call in (
        lambda: la(x),
        lambda: la.functional_samples(x),
        lambda: la(x, pred_type="nn", link_approx="mc"),
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)]),
    ):
        with pytest.raises(ValueError, match="could not be evaluated"):
            call()
    with pytest.raises(ValueError, match="Jacobians"):
        la.functional_variance(torch.randn(3, 3, 7).double())


def test_float16_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"float64 or bfloat16; got torch\.float16"):
        posterior_of(mlp().half(), "classification")


class Endless(Sampler):
    def __len__(self):
        return 24

    def __iter__(self):
        return itertools.cycle(range(24))


class Unsized(Sampler):
    def __iter__(self):
        return iter(range(24))


def test_an_endless_sampler_is_refused_and_one_without_length_works(data):
    with pytest.raises(ValueError, match="more than once"):
        fitted(mlp(), DataLoader(data, batch_size=5, sampler=Endless()))
    assert fitted(mlp(), DataLoader(data, batch_size=5, sampler=Unsized())).split.n_samples == 24


def test_log_density_of_many_parameter_vectors(data):
    la = fitted(mlp(), data)
    values = la.sample(3, torch.Generator().manual_seed(2))
    singles = torch.stack([la.log_prob(value) for value in values])
    torch.testing.assert_close(la.log_prob(values), singles)


def test_fit_under_inference_mode(data):
    model = mlp()
    with torch.inference_mode():
        inside = fitted(model, data)
    torch.testing.assert_close(inside.directional_curvatures, fitted(model, data).directional_curvatures)
