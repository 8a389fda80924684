import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MODELS
from oracles import dense_jacobian, flat_parameters, output_hessian
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from debiased_laplace import DebiasedLaplace, evaluate
from debiased_laplace.curvature import derivatives
from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection, takes_keywords
from debiased_laplace.data.batches import Batch

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
    model = nn.Linear(3, 2)  # with one parameter, a flat view would suffice
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


class Tied(nn.Module):
    """A weight in two places, first as an embedding and then transposed in the head; a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.embed = nn.Linear(4, 4)
            self.middle = nn.Linear(4, 4)
            self.again = self.middle
            self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.middle(self.embed(x).tanh()).tanh()).tanh())


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randn(5, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


WITH_TIES = {**MODELS, "tied weights": tied}

# model, name of the layer, positions in the flat vector of all trainable parameters
LAYERS = {
    "the last linear layer": ("MLP", "4", range(75, 93)),
    "a convolution": ("convolutions and pooling", "0", range(40)),
    "a layer without a bias": ("LayerNorm and raw parameters", "head", range(73, 91)),
    "a module with children": ("transformer", "layer", range(154)),
    "a frozen bias": ("partly frozen", "4", range(30, 45)),
    "tied to an earlier layer": ("tied weights", "head", [*range(16), *range(40, 44)]),
    "tied to a later layer": ("tied weights", "embed", range(20)),
    "a module under its second name": ("tied weights", "again", range(20, 40)),
    "the model itself": ("MLP", "", range(93)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_the_columns_of_its_parameters(case: str) -> None:
    name, layer, positions = LAYERS[case]
    model, X = WITH_TIES[name]()
    everything = ParameterSelection.all_weights(model)
    selection = everything.layer(layer)
    assert selection.indices.tolist() == list(positions)
    assert selection.last_layer == layer
    assert selection.subset == f"last layer {layer!r}"
    assert everything.last_layer is None
    check_selection(selection, model, X)


# positions as a function of P
SUBNETWORKS = {
    "all": lambda P: range(P),
    "the first": lambda P: [0],
    "the last": lambda P: [P - 1],
    "every third": lambda P: range(1, P, 3),
    "one whole parameter and part of the next": lambda P: range(min(P, 40)),
    "without the first": lambda P: range(1, P),
    "first and last": lambda P: [0, P - 1],
}


@pytest.mark.parametrize("case", SUBNETWORKS)
@pytest.mark.parametrize("name", ["MLP", "LayerNorm and raw parameters", "partly frozen", "GRU", "tied weights"])
def test_a_subnetwork_is_the_columns_of_its_entries(name: str, case: str) -> None:
    model, X = WITH_TIES[name]()
    everything = ParameterSelection.all_weights(model)
    indices = torch.tensor(list(SUBNETWORKS[case](everything.n_parameters)))
    selection = everything.subnetwork(indices)
    assert torch.equal(selection.indices, indices)
    assert selection.subset == f"{len(indices)} entries"
    check_selection(selection, model, X)
    # a parameter keeps its shape only if all of it is selected
    for parameter, shape, entries in zip(selection.names, selection.shapes, selection.entries, strict=True):
        own = dict(model.named_parameters())[parameter]
        assert (entries is None) == (shape.numel() == own.numel())
        assert shape == (own.shape if entries is None else (len(entries),))
    if case == "all":
        assert selection.description == everything.description


def check_selection(selection: ParameterSelection, model: nn.Module, X: Tensor) -> None:
    """Values, calls and derivatives with respect to the selected entries are those of the model, and only those."""
    theta, J = flat_parameters(model), torch.stack([dense_jacobian(model, x) for x in X[:3]])
    before = copy.deepcopy(model.state_dict())
    chosen = selection.indices
    assert selection.n_parameters == len(chosen) == sum(selection.sizes)
    assert torch.equal(selection.vector(), theta[chosen])
    lead = torch.randn(2, 3, len(chosen), generator=torch.Generator().manual_seed(0))
    assert torch.equal(selection.flatten(selection.unflatten(lead), n_lead=2), lead)

    found = jacrev(lambda v: selection.call(selection.unflatten(v), X[:3]))(selection.vector())
    assert torch.allclose(found, J[..., chosen], rtol=1e-9, atol=1e-12 * float(J.abs().max()))

    shifted = theta.clone()
    shifted[chosen] += torch.linspace(0.1, 0.4, len(chosen), dtype=theta.dtype)
    outputs = selection.call(selection.unflatten(shifted[chosen]), X)
    assert torch.allclose(outputs, at_vector(model, shifted, X), rtol=1e-10)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())


def at_vector(model: nn.Module, values: Tensor, X: Tensor) -> Tensor:
    """The oracle: the values written into a copy."""
    other, start = copy.deepcopy(model), 0
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.copy_(values[start : start + p.numel()].reshape(p.shape))
                start += p.numel()
        return other(X)


def test_parameters_outside_the_selection_have_no_gradient_through_it() -> None:
    model, X = MODELS["MLP"]()
    everything = ParameterSelection.all_weights(model)
    for selection in (everything.layer("4"), everything.subnetwork(torch.tensor([3, 80]))):
        values = selection.vector().requires_grad_()
        selection.call(selection.unflatten(values), X).sum().backward()
        assert float(values.grad.abs().max()) > 0
        assert all(p.grad is None for p in model.parameters())


def test_a_subnetwork_of_a_layer_counts_in_both() -> None:
    model, X = MODELS["MLP"]()
    layer = ParameterSelection.all_weights(model).layer("2")
    selection = layer.subnetwork(torch.tensor([0, 34, 35, 39]))
    assert selection.indices.tolist() == [35, 69, 70, 74]
    check_selection(selection, model, X)


DIFFERENT = {
    "all and a layer": lambda s: (s, s.layer("4")),
    "two layers": lambda s: (s.layer("0"), s.layer("2")),
    "all and all but one": lambda s: (s, s.subnetwork(torch.arange(1, 93))),
    "as many entries of one parameter": lambda s: (
        s.subnetwork(torch.tensor([0, 1])),
        s.subnetwork(torch.tensor([0, 2])),
    ),
    "as many entries of two parameters": lambda s: (s.subnetwork(torch.tensor([0])), s.subnetwork(torch.tensor([28]))),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_descriptions_tell_selections_apart(case: str) -> None:
    model, _ = MODELS["MLP"]()
    first, second = DIFFERENT[case](ParameterSelection.all_weights(model))
    again, _ = DIFFERENT[case](ParameterSelection.all_weights(MODELS["MLP"]()[0]))
    assert first.description != second.description
    assert first.description == again.description


def test_missing_layers_are_refused() -> None:
    selection = ParameterSelection.all_weights(MODELS["partly frozen"]()[0])
    with pytest.raises(ValueError, match=r"\['0', '1', '2', '3', '4'\]; got 'head'"):
        selection.layer("head")
    for without in ("1", "2"):  # an activation, and a frozen layer
        with pytest.raises(ValueError, match=f"{without}' has no trainable parameters"):
            selection.layer(without)


def model_with(forward: Any) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Linear(2, 2).double()
    # a bound method, as every forward is
    model.forward = forward.__get__(model)
    return model


# forward, keys of the mapping, whether they are passed by name
FORWARDS = {
    "all keys named": (lambda self, input_ids, mask: 0, ["input_ids", "mask"], True),
    "all keys named, and defaults": (lambda self, input_ids, mask=None, labels=None: 0, ["input_ids"], True),
    "keys only by name": (lambda self, *, input_ids, mask=None: 0, ["mask", "input_ids"], True),
    "a key that is not named, which the model may refuse": (lambda self, input_ids: 0, ["input_ids", "mask"], True),
    "one mapping by default": (lambda self, batch=None: 0, ["input_ids", "mask"], False),
    "any keys": (lambda self, **kwargs: 0, ["input_ids", "mask"], True),
    "one key named, and any others": (lambda self, input_ids, **kwargs: 0, ["input_ids", "mask"], True),
    "any keys, and a required argument": (lambda self, batch, **kwargs: 0, ["input_ids", "mask"], False),
    "one mapping": (lambda self, batch: 0, ["input_ids", "mask"], False),
    "one mapping, and options": (lambda self, batch, scale=1.0: 0, ["input_ids"], False),
    "a key of the mapping's own name": (lambda self, x: 0, ["x"], True),
    "required arguments that are missing": (lambda self, input_ids, mask: 0, ["input_ids"], False),
    "only by position": (lambda self, input_ids, /: 0, ["input_ids"], False),
    "any positions": (lambda self, *inputs: 0, ["input_ids"], False),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_mappings_go_in_by_name_where_the_model_names_their_keys(case: str) -> None:
    forward, keys, expected = FORWARDS[case]
    assert takes_keywords(model_with(forward), keys) == expected
    assert takes_keywords(model_with(forward), dict.fromkeys(keys)) == expected


# what the model returns for x and mask; all of them are the same function
STYLES = {
    "by name": lambda self, x, mask: self.layer(x) * mask[:, None],
    "by name, in another order": lambda self, mask, x=None: self.layer(x) * mask[:, None],
    "one mapping": lambda self, batch: self.layer(batch["x"]) * batch["mask"][:, None],
    "any names": lambda self, **batch: self.layer(batch["x"]) * batch["mask"][:, None],
    "an output with logits": lambda self, x, mask: SimpleNamespace(loss=None, logits=self.layer(x) * mask[:, None]),
    "logits of one mapping": lambda self, b: SimpleNamespace(logits=self.layer(b["x"]) * b["mask"][:, None]),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_model_of_mappings_is_called_in_its_own_way(style: str) -> None:
    model = model_with(STYLES[style])
    inputs = {
        "x": torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        "mask": torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64),
    }
    selection = ParameterSelection.all_weights(model)
    values = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.7, -0.2], dtype=torch.float64)
    W, b = values[:4].reshape(2, 2), values[4:]
    expected = (inputs["x"] @ W.T + b) * inputs["mask"][:, None]
    assert torch.allclose(selection.call(selection.unflatten(values), inputs), expected, rtol=1e-12)
    assert torch.allclose(selection.evaluated(selection.unflatten(values), inputs), expected, rtol=1e-12)


def test_further_keyword_arguments_join_a_mapping_and_win() -> None:
    model = model_with(lambda self, x, scale=1.0: scale * self.layer(x))
    selection = ParameterSelection.all_weights(model)
    parameters, x = selection.unflatten(selection.vector()), torch.ones(3, 2, dtype=torch.float64)
    plain = selection.call(parameters, {"x": x})
    assert torch.allclose(selection.call(parameters, {"x": x}, {"scale": 3.0}), 3 * plain, rtol=1e-12)
    assert torch.allclose(selection.call(parameters, x, {"scale": 3.0}), 3 * plain, rtol=1e-12)
    both = selection.call(parameters, {"x": x, "scale": torch.tensor(5.0)}, {"scale": 3.0})
    assert torch.allclose(both, 3 * plain, rtol=1e-12)


NO_TENSORS = {
    "a tuple": (lambda self, x: (self.layer(x), None), r"got tuple of \(3, 2\), NoneType\. .* the one element"),
    "a dictionary without logits": (lambda self, x: {"scores": self.layer(x)}, r"got dict with keys \['scores'\]"),
    "logits that are no tensor": (lambda self, x: SimpleNamespace(logits=[1.0]), "got list of float"),
    "nothing": (lambda self, x: None, "got NoneType"),
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_refuses_outputs_that_are_no_tensor(case: str) -> None:
    forward, message = NO_TENSORS[case]
    selection = ParameterSelection.all_weights(model_with(forward))
    with pytest.raises(ValueError, match=f"tensor of logits; {message}"):
        selection.call(selection.unflatten(selection.vector()), torch.ones(3, 2, dtype=torch.float64))


class Wrapper(nn.Module):
    """Passes on whatever it gets, as adapters and compilers do."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def of_tokens(forward: Any, wrapped: bool = False) -> nn.Module:
    model = model_with(forward)
    return Wrapper(model) if wrapped else model


MAPPED = {
    "one mapping": lambda: of_tokens(lambda self, batch: self.layer(batch["x"]) * batch["mask"][:, None]),
    "one mapping, in a wrapper": lambda: of_tokens(
        lambda self, batch: self.layer(batch["x"]) * batch["mask"][:, None], True
    ),
    "by name, in a wrapper": lambda: of_tokens(lambda self, x, mask, index: self.layer(x) * mask[:, None], True),
    "a mapping of outputs": lambda: of_tokens(
        lambda self, batch: {"logits": self.layer(batch["x"]) * batch["mask"][:, None]}
    ),
    "a plain net": lambda: of_tokens(lambda self, inputs: self.layer(inputs.tanh().atanh())),
    "a plain net, in a wrapper": lambda: of_tokens(lambda self, inputs: self.layer(inputs), True),
    "some of the columns": lambda: of_tokens(lambda self, x, mask: self.layer(x) * mask[:, None]),
}


@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize("case", MAPPED)
def test_mappings_find_their_way_into_every_entry_point(case: str, sampling: str) -> None:
    """The mask is 1, for the nets that do not see it; the posterior is that of tensors."""
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 2, generator=g, dtype=torch.float64), torch.randint(2, (40,), generator=g)
    batch = {"mask": torch.ones(40, dtype=torch.float64), "index": torch.arange(40), "x": X, "label": y}
    # which fold a sample is in depends on its tensors, if rows are drawn of some of the data
    options, n_data = {"prior_precision": 0.4, "sampling": sampling}, 90 if sampling == "uniform" else 40
    plain = DebiasedLaplace(model_with(lambda self, x: self.layer(x)), "classification", **options)
    plain.fit([(X, y)], n_data=n_data)
    model, keys = MAPPED[case](), {"dict_key_x": "x", "dict_key_y": "label"}
    nn.utils.vector_to_parameters(plain.mean, model.parameters())
    la = DebiasedLaplace(model, "classification", **options, **keys)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.fit([batch], n_data=n_data)
        report = evaluate({"la": la}, [batch], task="multiclass", **keys)
        found = la(batch)
    dropped = [str(w.message) for w in caught if "dropped" in str(w.message)]
    assert dropped == (["Module.forward takes no index: dropped from the mappings of inputs."] * (case[:4] == "some"))
    assert torch.allclose(la.directional_curvatures, plain.directional_curvatures, rtol=1e-9)
    assert torch.allclose(found, plain(X), rtol=1e-9)
    expected = evaluate({"la": plain}, [(X, y)], task="multiclass")
    for name in ("map", "la"):
        assert report.metrics[name]["nll"].value == pytest.approx(expected.metrics[name]["nll"].value, rel=1e-9)


def test_errors_of_a_model_are_not_hidden_by_other_ways_of_calling_it() -> None:
    selection = ParameterSelection.all_weights(model_with(lambda self, batch: self.layer(batch["x"]).missing))
    with pytest.raises(ValueError, match="has no attribute 'missing'"):
        selection.evaluated(selection.unflatten(selection.vector()), {"x": torch.ones(3, 2, dtype=torch.float64)})


def test_inputs_that_a_model_cannot_read_are_described_in_the_error() -> None:
    selection = ParameterSelection.all_weights(model_with(lambda self, x, mask: self.layer(x) * mask))
    parameters = selection.unflatten(selection.vector())
    with pytest.raises(ValueError, match=r"inputs of shape \(3, 5\) and torch.float64: .*mask"):
        selection.evaluated(parameters, torch.ones(3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \{'mask': \(3, 1\), 'x': \(3, 5\)\} and \{'x': torch.float64, 'mask'"):
        selection.evaluated(parameters, {"x": torch.ones(3, 5, dtype=torch.float64), "mask": torch.ones(3, 1)})


class Tokens(nn.Module):
    """Mean of the tokens' embeddings; the padding is token 0, as `F.embedding` or as a module sees it."""

    def __init__(self, style: str, **options: Any):
        super().__init__()
        self.functional = style == "by the function"
        self.embedding = (nn.EmbeddingBag if style == "a bag" else nn.Embedding)(7, 3, **options)
        self.layer = nn.Linear(3, 7)
        if style == "tied":
            self.layer.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.embedding, nn.EmbeddingBag):
            return self.layer(self.embedding(x).tanh())
        embedded = functional.embedding(x, self.embedding.weight, 0) if self.functional else self.embedding(x)
        return self.layer(embedded.tanh().mean(1))


EMBEDDINGS = {
    "padding": ("a module", {"padding_idx": 0}),
    "padding, counted from the end": ("a module", {"padding_idx": -7}),
    "padding, tied weights": ("tied", {"padding_idx": 0}),
    "padding by the function": ("by the function", {}),
    "padding of a bag": ("a bag", {"padding_idx": 0}),
    "gradients by frequency": ("a module", {"scale_grad_by_freq": True}),
    "gradients by frequency, a bag": ("a bag", {"scale_grad_by_freq": True}),
    "sparse gradients": ("a module", {"sparse": True, "padding_idx": 0}),
}


def naive_outputs(model: Tokens, x: Tensor, theta: Tensor, *, padded: bool) -> Tensor:
    """The model at other weights, token by token; of a padding the embedding stays as it was."""
    own, bag = list(model.parameters()), isinstance(model.embedding, nn.EmbeddingBag)
    parts = theta.split([p.numel() for p in own])
    E, *rest = (part.reshape(p.shape) for part, p in zip(parts, own, strict=True))
    W, b = rest if len(rest) == 2 else (E, rest[0])
    rows = []
    for tokens in x.tolist():
        at = [own[0].detach()[0] if padded and t == 0 else E[t] for t in tokens if not (bag and padded and t == 0)]
        rows.append(torch.stack(at).mean(0).tanh() if bag else torch.stack(at).tanh().mean(0))
    return torch.stack(rows) @ W.T + b


def finite_differences(model: Tokens, x: Tensor, *, padded: bool) -> Tensor:
    """Jacobian (n, C, P) of the naive outputs."""
    theta = flat_parameters(model)
    assert torch.allclose(naive_outputs(model, x, theta, padded=padded), model(x).detach(), rtol=1e-12)
    steps = 1e-5 * torch.eye(len(theta), dtype=theta.dtype)
    ends = [[naive_outputs(model, x, theta + s * h, padded=padded) for s in (1, -1)] for h in steps]
    return torch.stack([(right - left) / 2e-5 for right, left in ends], dim=-1)


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_all_modes_take_the_padding_of_an_embedding_as_a_constant(case: str) -> None:
    style, options = EMBEDDINGS[case]
    model = Tokens(style, **options).double()
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 1], [2, 2, 0, 0], [0, 3, 0, 5]])
    J = finite_differences(model, x, padded="padding" in case or "sparse" in case)
    generator = torch.Generator().manual_seed(1)
    U = torch.randn(J.shape[-1], 5, generator=generator, dtype=J.dtype)
    W = torch.randn(4, 7, generator=generator, dtype=J.dtype)
    selection, likelihood = ParameterSelection.all_weights(model), likelihood_named("classification")
    with differentiable_kernels(model):
        network = prepare_network(selection, likelihood, Batch(x, x[:, 0]))
        of_vmap = torch.cat([part for part, _ in network.jacobians(x)])
        eye = derivatives.identity_cotangents
        of_loop, _ = derivatives.looped_rows(selection, network.parameters, x, torch.zeros(4), eye)
        batch = network.linearized(x)
        along = [batch.pushed(U)] if network.capabilities.columns else []
        pulled = batch.pulled(W)
    found = [of_vmap, of_loop, *along, pulled]
    expected = [J, J, *[J @ U for _ in along], torch.einsum("nc,ncp->p", W, J)]
    for value, at in zip(found, expected, strict=True):
        assert torch.allclose(value, at, rtol=1e-6, atol=1e-8)
    assert along or style == "a bag"


def test_gram_matrix_lanczos_and_samples_agree_where_padding_comes_late() -> None:
    """Two samples without padding come first, which modes of differentiation are tested on."""
    model = Tokens("a module", padding_idx=0).double()
    X = torch.randint(1, 7, (30, 4), generator=torch.Generator().manual_seed(2))
    X[2:] = torch.tensor([[t, u, 0, 0] for t in range(1, 7) for u in range(1, 7)])[:28]
    y = torch.randint(7, (30,), generator=torch.Generator().manual_seed(3))
    options = {"rank": 3, "prior_precision": 0.7, "magnitudes": "same_batch", "complement": "none"}
    gram, lanczos = (DebiasedLaplace(model, "classification", solver=s, **options) for s in ("gram", "lanczos"))
    for la in (gram, lanczos):
        la.fit([(X, y)], n_data=300)
    assert torch.allclose(gram.directional_curvatures, lanczos.directional_curvatures, rtol=1e-9)
    J = finite_differences(model, X[2:4], padded=True)
    seeds = [torch.Generator().manual_seed(4) for _ in range(4)]
    theta = gram.sample(5, generator=seeds[0])
    linearized = model(X[2:4]).detach() + torch.einsum("ncp,sp->snc", J, theta - gram.mean)
    assert torch.allclose(gram.functional_samples(X[2:4], "glm", 5, generator=seeds[1]), linearized, rtol=1e-6)
    expected = torch.stack([naive_outputs(model, X[2:4], t, padded=True) for t in theta])
    assert torch.allclose(gram.functional_samples(X[2:4], "nn", 5, generator=seeds[2]), expected, rtol=1e-9)
    J = finite_differences(model, X, padded=True)
    H = sum(J_n.T @ output_hessian(f, "classification") @ J_n for J_n, f in zip(J, model(X).detach(), strict=True))
    values = torch.linalg.eigvalsh(H / 30).flip(0)[:3]
    assert torch.allclose(gram.directional_curvatures, values, rtol=1e-5)
