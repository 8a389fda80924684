from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.subsets import WeightSubset, last_layer_of


class OutOfOrder(nn.Module):
    """Its head is registered first, and an unused layer last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(3, 2), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class ReturnsToTheFirst(nn.Module):
    """A layer that is used twice, the second time last."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.once(self.twice(x)))


class RawHead(nn.Module):
    """A custom layer that holds its weight beside a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(3, 4)), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) @ self.weight.T


class Wrapper(nn.Module):
    """A raw parameter outside all layers, used before them."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.body, self.head = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x + self.shift))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)[:, None]
        return self.attention(h, h, h)[0][:, 0]


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.embeddings = nn.Linear(3, 2), nn.Embedding(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        h = self.embeddings(input_ids) * attention_mask[..., None]
        return SimpleNamespace(logits=self.classifier(h.mean(1)))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
MAPPING = {"input_ids": torch.tensor([[1, 2], [0, 4]]), "attention_mask": torch.ones(2, 2)}


def built(build: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return build()


def frozen_head() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    return model


OF_MODELS = {
    "MLP": "4",
    "LayerNorm and raw parameters": "head",
    "LSTM": "head",
    "transformer": "head",
    "BatchNorm": "7",
}
LAST: dict[str, tuple[Any, Any, str]] = {
    **{name: (lambda name=name: MODELS[name]()[0], MODELS[name]()[1][:3], layer) for name, layer in OF_MODELS.items()},
    "registered first, called last": (OutOfOrder, X, "head"),
    "called twice": (ReturnsToTheFirst, X, "twice"),
    "an activation after it": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Flatten()), X, "0"),
    "a normalization at the end": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), X, "1"),
    "a frozen layer after it": (frozen_head, X, "0"),
    "inside another module": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), OutOfOrder())),
        X,
        "1.1.head",
    ),
    "recurrent": (lambda: nn.Sequential(nn.Linear(4, 4), nn.RNN(4, 3)), X, "1"),
    "weight_norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))),
        X,
        "1",
    ),
    "a raw weight beside a dropout": (lambda: nn.Sequential(nn.Linear(4, 4), RawHead()), X, "1"),
    "raw parameters beside all layers": (lambda: nn.Sequential(Wrapper()), X, "0.head"),
    "attention, which does not call its layers": (Attention, X, "attention"),
    "an encoder layer with a fused path": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        X[:, None],
        "1.norm2",
    ),
    "a mapping, and an output with logits": (Mapped, MAPPING, "classifier"),
}


@pytest.mark.parametrize("case", LAST)
def test_the_last_layer_is_the_one_that_is_called_last(case: str) -> None:
    build, inputs, layer = LAST[case]
    model = built(build)
    if case == "recurrent":  # it returns a pair
        model = nn.Sequential(model[0], Output(model[1]))
        layer = "1.recurrent"
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    selection = WeightSubset("last_layer").select_by(model, inputs)
    assert selection.last_layer == layer
    assert selection.names == ParameterSelection.all_weights(model).layer(layer).names
    assert last_layer_of(ParameterSelection.all_weights(model), inputs) == layer
    # nothing is left behind
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Output(nn.Module):
    """The outputs of a recurrent layer without its state."""

    def __init__(self, recurrent: nn.RNNBase):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x[:, None])[0][:, 0]


class OnlyRaw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Uncalled(nn.Module):
    """A model that uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.T


def test_without_a_called_layer_none_is_found() -> None:
    with pytest.raises(ValueError, match=r"could not be found.*last_layer_name.*subset_of_weights='all'"):
        WeightSubset("last_layer").select_by(built(Uncalled), X)


ONLY_ITSELF = {"a linear layer": lambda: nn.Linear(4, 3), "raw parameters": OnlyRaw}


@pytest.mark.parametrize("case", ONLY_ITSELF)
def test_a_model_without_layers_is_its_own_last_layer(case: str) -> None:
    model = built(ONLY_ITSELF[case])
    found = WeightSubset("last_layer").select_by(model, X)
    assert found.names == tuple(name for name, _ in model.named_parameters())
    assert found.last_layer == ""


def test_a_model_that_cannot_be_evaluated_is_left_without_hooks() -> None:
    model = built(OutOfOrder)
    with pytest.raises(ValueError, match=r"could not be evaluated on a batch of inputs of shape \(3, 2\)"):
        WeightSubset("last_layer").select_by(model, X[:, :2])
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_a_named_layer_needs_no_forward_pass() -> None:
    model = built(OutOfOrder)
    model.forward = None
    for found in (
        WeightSubset("last_layer", "body").select(model),
        WeightSubset("last_layer", "body").select_by(model, X),
    ):
        assert found.last_layer == "body"
        assert found.names == ("body.weight", "body.bias")
    assert WeightSubset("last_layer").select(model) is None


def test_all_weights_and_subnetworks_need_no_forward_pass() -> None:
    model = built(OutOfOrder)
    model.forward = None
    P = 4 * 2 + 5 * 3 + 3 * 2
    for found in (WeightSubset("all").select(model), WeightSubset("all").select_by(model, X)):
        assert found.indices.tolist() == list(range(P))
    indices = torch.tensor([0, 7, 20])
    for found in (
        WeightSubset("subnetwork", None, indices).select(model),
        WeightSubset("subnetwork", None, indices).select_by(model, X),
    ):
        assert found.indices.tolist() == [0, 7, 20]
    whole = WeightSubset("subnetwork", None, torch.arange(P)).select(model)
    assert whole.description == WeightSubset("all").select(model).description


SOME = torch.tensor([0, 3])
WRONG: dict[str, tuple[WeightSubset, str]] = {
    "a layer's name with all weights": (WeightSubset("all", "head"), "last_layer_name.*'all'"),
    "a layer's name with a subnetwork": (WeightSubset("subnetwork", "head", SOME), "last_layer_name.*'subnetwork'"),
    "indices with all weights": (WeightSubset("all", None, SOME), "subnetwork_indices.*'all'"),
    "indices with the last layer": (WeightSubset("last_layer", None, SOME), "subnetwork_indices.*'last_layer'"),
    "no such layer": (WeightSubset("last_layer", "tail"), r"\['head', 'body', 'unused'\]; got 'tail'"),
    "no indices": (WeightSubset("subnetwork"), "29 trainable parameters; got none"),
    "empty indices": (WeightSubset("subnetwork", None, SOME[:0]), r"torch.int64 of shape \(0,\)"),
    "indices of another type": (WeightSubset("subnetwork", None, SOME.int()), r"torch.int32 of shape \(2,\)"),
    "a mask": (WeightSubset("subnetwork", None, torch.ones(29).bool()), "torch.bool"),
    "indices of two dimensions": (WeightSubset("subnetwork", None, SOME[None]), r"shape \(1, 2\)"),
    "a negative index": (WeightSubset("subnetwork", None, SOME - 1), "got -1 to 2"),
    "an index too large": (WeightSubset("subnetwork", None, torch.tensor([0, 29])), "got 0 to 29"),
    "an index twice": (WeightSubset("subnetwork", None, torch.tensor([2, 2])), r"indices.unique\(\)"),
}


def test_indices_out_of_order_are_sorted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="were sorted"):
        subset = WeightSubset("subnetwork", None, torch.tensor([5, 2]))
    assert subset.select(built(OutOfOrder)).indices.tolist() == [2, 5]


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case: str) -> None:
    subset, message = WRONG[case]
    for ask in (lambda: subset.select(built(OutOfOrder)), lambda: subset.select_by(built(OutOfOrder), X)):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            ask()
