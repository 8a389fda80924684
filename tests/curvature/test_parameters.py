import copy

import pytest
import torch
from models import MODELS
from oracles import flat_parameters
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from debiased_laplace.curvature.parameters import ParameterSelection

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_the_vector_is_the_trainable_parameters_in_their_order(name: str) -> None:
    model, _ = MODELS[name]()
    selection = ParameterSelection.all_weights(model)
    expected = parameters_to_vector(p for p in model.parameters() if p.requires_grad)
    assert torch.equal(selection.vector(), expected)
    assert torch.equal(selection.vector(), flat_parameters(model))
    assert selection.n_parameters == len(expected) == sum(selection.sizes)
    assert selection.names == tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert not selection.vector().requires_grad


@every_model
@pytest.mark.parametrize("lead", [(), (3,), (2, 4)], ids=["one vector", "three", "two by four"])
def test_flattening_undoes_unflattening(name: str, lead: tuple[int, ...]) -> None:
    selection = ParameterSelection.all_weights(MODELS[name]()[0])
    vectors = torch.randn(*lead, selection.n_parameters, generator=torch.Generator().manual_seed(0))
    parts = selection.unflatten(vectors)
    for part, shape in zip(parts.values(), selection.shapes, strict=True):
        assert part.shape == lead + shape
    assert torch.equal(selection.flatten(parts, n_lead=len(lead)), vectors)


def test_changing_the_vector_does_not_change_the_model() -> None:
    model = nn.Linear(3, 2)  # of one parameter, a flat view would do
    model.register_parameter("bias", None)
    before = model.weight.detach().clone()
    ParameterSelection.all_weights(model).vector().fill_(7.0)
    assert torch.equal(model.weight, before)


@every_model
def test_calling_with_a_vector_is_the_model_at_that_vector_and_leaves_no_trace(name: str) -> None:
    model, X = MODELS[name]()
    selection = ParameterSelection.all_weights(model)
    state = copy.deepcopy(model.state_dict())
    shifted = selection.vector() + 0.1
    outputs = selection.call(selection.unflatten(shifted), X)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.grad is None for p in model.parameters())
    at_vector = copy.deepcopy(model)
    with torch.no_grad():
        start = 0
        for p in at_vector.parameters():
            if p.requires_grad:
                p.copy_(shifted[start : start + p.numel()].reshape(p.shape))
                start += p.numel()
    assert torch.allclose(outputs, at_vector(X), rtol=1e-12)
    assert not torch.allclose(outputs, model(X), rtol=1e-3)


def test_frozen_parameters_do_not_count() -> None:
    model, _ = MODELS["partly frozen"]()
    assert ParameterSelection.all_weights(model).names == ("0.weight", "0.bias", "4.weight")


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    selection = ParameterSelection.all_weights(model)
    assert selection.names == ("0.weight", "0.bias", "1.bias")
    assert selection.n_parameters == 15


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        ParameterSelection.all_weights(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameters"):
        ParameterSelection.all_weights(nn.Tanh())


def test_trainable_parameters_of_two_dtypes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"float32 on cpu, torch\.float64 on cpu"):
        ParameterSelection.all_weights(model)
    model[1].requires_grad_(False)
    assert ParameterSelection.all_weights(model).n_parameters == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(not frozen))
    selection = ParameterSelection.all_weights(model)
    selection.check_finite()
    with torch.no_grad():
        model[1].bias[1] = value
    with pytest.raises(ValueError, match=r"1\.bias"):
        selection.check_finite()


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("shift", torch.zeros(2))
        self.register_buffer("rotation", torch.ones(2), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.rotation + self.shift


def fingerprint(model: nn.Module) -> str:
    return ParameterSelection.all_weights(model).fingerprint()


CHANGES = {
    "a trainable weight": lambda m: m.layer.weight[1, 0].add_(1e-6),
    "a frozen weight": lambda m: m.frozen[0].add_(1e-6),
    "a buffer": lambda m: m.shift[1].add_(1e-6),
    "a buffer that is not saved": lambda m: m.rotation[1].add_(1e-6),
    "a boolean buffer": lambda m: m.mask.logical_not_(),
    "an integer scalar": lambda m: m.count.add_(1),
    "the dtype": lambda m: m.double(),
    "two weights exchanged": lambda m: m.layer.bias.copy_(m.layer.bias.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_changes_with(change: str) -> None:
    torch.manual_seed(0)
    model = Buffered()
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    with torch.no_grad():
        CHANGES[change](model)
    assert fingerprint(model) != before


@every_model
def test_the_fingerprint_survives_saving_and_changes_with_every_tensor(name: str) -> None:
    model, _ = MODELS[name]()
    before = fingerprint(model)
    other, _ = MODELS[name]()
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) == before
    assert fingerprint(other.train()) == before
    for key, value in other.state_dict().items():
        saved = value.clone()
        value.add_(1)
        assert fingerprint(other) != before, key
        value.copy_(saved)
    assert fingerprint(other) == before
