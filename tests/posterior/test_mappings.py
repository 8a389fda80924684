"""Mappings of tensors as inputs: the same posterior as of the same network on plain tensors, and clear refusals."""

from collections import UserDict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from oracles import dense_low_rank_posterior
from posterior_cases import close, hyper_parameters, posterior_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from debiased_laplace.errors import OverlapError

N, LENGTH = 30, 5
X_KEYS = ("input_ids", "attention_mask")


class Tokens(nn.Module):
    """A mean over the tokens that are not masked, then two layers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(9, 3)
            self.hidden = nn.Linear(3, 4)
            self.head = nn.Linear(4, 3)
        self.double().eval()

    def read(self, ids, mask):
        mean = (self.embedding(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(torch.tanh(self.hidden(mean)))


class Packed(Tokens):
    """Token ids and mask in one tensor (n, 2, length)."""

    def forward(self, x):
        return self.read(x[:, 0], x[:, 1])


class Keywords(Tokens):
    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None
        return self.read(input_ids, attention_mask)


class AnyKeywords(Tokens):
    def forward(self, **inputs):
        assert set(inputs) == set(X_KEYS)
        return self.read(inputs["input_ids"], inputs["attention_mask"])


class OneMapping(Tokens):
    def forward(self, data):
        assert set(data) == set(X_KEYS)
        return self.read(data["input_ids"], data["attention_mask"])


class Logits(Tokens):
    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.read(input_ids, attention_mask), hidden_states=None)


class LogitsOfOneMapping(Tokens):
    def forward(self, data, **options):
        return SimpleNamespace(logits=self.read(data["input_ids"], data["attention_mask"]))


MODELS = {
    "keywords": Keywords,
    "any keywords": AnyKeywords,
    "one mapping": OneMapping,
    "keywords to an output with logits": Logits,
    "one mapping to an output with logits": LogitsOfOneMapping,
}


def tokens(likelihood="classification"):
    """Ids, mask and targets; every sample has at least one token that is not masked."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(9, (N, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (N,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = torch.randint(3, (N,), generator=generator)
    if likelihood == "regression":
        labels = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return ids, mask, labels


class Rows(Dataset):
    """One dictionary an item."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {key: values[i] for key, values in self.columns.items()}


def columns(likelihood="classification", names=("input_ids", "attention_mask", "labels")):
    return dict(zip(names, tokens(likelihood), strict=True))


def inputs(n=N, start=0, names=X_KEYS):
    ids, mask, _ = tokens()
    return dict(zip(names, (ids[start : start + n], mask[start : start + n]), strict=True))


def batches(of, wrap=dict, size=8):
    return [wrap({k: v[i : i + size] for k, v in of.items()}) for i in range(0, N, size)]


def packed(likelihood="classification"):
    ids, mask, labels = tokens(likelihood)
    return torch.stack([ids, mask], dim=1), labels


@cache
def reference(likelihood="classification", **options):
    """The posterior of the same network on plain tensors, never to be changed."""
    la = posterior_of(Packed(), likelihood, **{**hyper_parameters(likelihood), "rank": 6, **options})
    X, y = packed(likelihood)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=8), n_data=44)
    return la, X


def of_mappings(model=None, loader=None, likelihood="classification", n_data=44, **options):
    la = posterior_of(model or Keywords(), likelihood, **{**hyper_parameters(likelihood), "rank": 6, **options})
    la.fit(DataLoader(Rows(columns(likelihood)), batch_size=8) if loader is None else loader, n_data=n_data)
    return la


@cache
def fitted(likelihood="classification"):
    """A posterior of mappings, never to be changed."""
    return of_mappings(likelihood=likelihood)


def check_same(la, other, **options):
    """Equal up to the order of sums."""
    options = {"rtol": 1e-9, "atol": 1e-11, **options}
    assert torch.equal(la.split.direction_indices, other.split.direction_indices)
    torch.testing.assert_close(la.directional_curvatures, other.directional_curvatures, **options)
    torch.testing.assert_close(la.in_sample_curvatures, other.in_sample_curvatures, **options)
    torch.testing.assert_close(la.posterior_precision.to_dense(), other.posterior_precision.to_dense(), **options)
    torch.testing.assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood(), **options)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", MODELS)
def test_posterior_is_that_of_plain_tensors_and_the_dense_one(name, likelihood):
    la = of_mappings(MODELS[name](), likelihood=likelihood)
    other, X = reference(likelihood)
    check_same(la, other)
    dense = dense_low_rank_posterior(
        other.model,
        X,
        likelihood,
        la.split.direction_indices,
        la.split.magnitude_indices,
        n_data=44,
        rank=6,
        **hyper_parameters(likelihood),
    )
    close(la.directional_curvatures, dense.magnitudes)
    close(la.standard_errors, dense.standard_errors)
    close(la.posterior_precision.to_dense(), dense.posterior_precision)


LOADERS = {
    "a data set of dictionaries": lambda c: DataLoader(Rows(c), batch_size=8, shuffle=True),
    "batches that are mappings but no dictionaries": lambda c: DataLoader(
        Rows(c), batch_size=8, collate_fn=lambda items: UserDict({k: torch.stack([i[k] for i in items]) for k in c})
    ),
    "items that are mappings but no dictionaries": lambda c: DataLoader([UserDict(row) for row in Rows(c)]),
    "a list of dictionaries": lambda c: batches(c),
    "a list of mappings that are no dictionaries": lambda c: batches(c, UserDict),
    "pairs of a dictionary and targets": lambda c: [({k: b[k] for k in X_KEYS}, b["labels"]) for b in batches(c)],
    "pairs of a mapping with targets of its own, and targets": lambda c: [
        (UserDict(b), b["labels"]) for b in batches(c)
    ],
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_of_mappings(name):
    check_same(of_mappings(loader=LOADERS[name](columns())), reference()[0])


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer", "subnetwork"])
def test_structures_and_subsets(subset, structure):
    options = {"rank": 6 if structure == "lowrank" else None, "subset_of_weights": subset}
    if subset == "subnetwork":
        options["subnetwork_indices"] = torch.arange(1, 50, 2)
    la = of_mappings(hessian_structure=structure, **options)
    other, X = reference(hessian_structure=structure, **options)
    check_same(la, other)
    torch.testing.assert_close(la(inputs()), other(X), rtol=1e-9, atol=1e-11)


class OwnNames(Tokens):
    def forward(self, words, keep):
        return self.read(words, keep)


def test_names_of_ones_own():
    names = ("words", "keep", "answer")
    loader = DataLoader(Rows(columns(names=names)), batch_size=8)
    la = of_mappings(OwnNames(), loader, dict_key_x="words", dict_key_y="answer")
    other, X = reference()
    check_same(la, other)
    mine = {**inputs(names=("words", "keep")), "answer": tokens()[2]}
    torch.testing.assert_close(la(mine), other(X), rtol=1e-9, atol=1e-11)


def _generator():
    return torch.Generator().manual_seed(4)


PREDICTIVES = {
    "probit": ("classification", lambda la, x: la(x)),
    "draws": ("classification", lambda la, x: la(x, link_approx="mc", n_samples=7, generator=_generator())),
    "draws of every output on its own": (
        "classification",
        lambda la, x: la(x, link_approx="mc", n_samples=7, generator=_generator(), diagonal_output=True),
    ),
    "bridge": ("classification", lambda la, x: la(x, link_approx="bridge")),
    "normalized bridge": ("classification", lambda la, x: la(x, link_approx="bridge_norm")),
    "drawn networks": (
        "classification",
        lambda la, x: la(x, pred_type="nn", link_approx="mc", n_samples=5, generator=_generator()),
    ),
    "functions": ("classification", lambda la, x: la.functional_samples(x, n_samples=2, generator=_generator())),
    "functions of drawn networks": (
        "regression",
        lambda la, x: la.functional_samples(x, pred_type="nn", n_samples=4, generator=_generator()),
    ),
    "many functions": ("regression", lambda la, x: la.functional_samples(x, n_samples=9, generator=_generator())),
    "predictions": ("classification", lambda la, x: la.predictive_samples(x, n_samples=9, generator=_generator())),
    "mean and covariance": ("regression", lambda la, x: torch.cat([part.flatten() for part in la(x)])),
    "all outputs together": ("regression", lambda la, x: torch.cat([part.flatten() for part in la(x, joint=True)])),
    "variances alone": (
        "regression",
        lambda la, x: torch.cat([part.flatten() for part in la(x, diagonal_output=True)]),
    ),
}


@pytest.mark.parametrize("name", PREDICTIVES)
def test_predictives(name):
    likelihood, predict = PREDICTIVES[name]
    la, (other, X) = fitted(likelihood), reference(likelihood)
    expected = predict(other, X[3:8])
    x = inputs(5, start=3)
    forms = [x, UserDict(x), {**x, "labels": tokens(likelihood)[2][3:8]}, dict(reversed(x.items()))]
    for form in forms:
        torch.testing.assert_close(predict(la, form), expected, rtol=1e-8, atol=1e-11)
    # the mask is read: without it the numbers are others
    unmasked = {**x, "attention_mask": torch.ones_like(x["attention_mask"])}
    assert not torch.allclose(predict(la, unmasked), expected, rtol=1e-2)
    assert set(x) == set(X_KEYS)


def test_gradients_with_respect_to_a_tensor_of_the_mapping():
    class Soft(Tokens):
        def forward(self, input_ids, weights):
            return self.read(input_ids, weights)

    ids, mask, labels = tokens()
    weights = mask.double() + 0.1
    la = posterior_of(Soft(), "classification", rank=4, enable_backprop=True, **hyper_parameters("classification"))
    la.fit(batches({"input_ids": ids, "weights": weights, "labels": labels}))
    w = weights[:2].clone().requires_grad_()

    def score(w):
        return la({"input_ids": ids[:2], "weights": w})[:, 0].sum()

    (gradient,) = torch.autograd.grad(score(w), w)
    h, step = 1e-5, torch.zeros_like(weights[:2])
    step[1, 0] = h
    slope = (score(weights[:2] + step) - score(weights[:2] - step)) / (2 * h)
    torch.testing.assert_close(gradient[1, 0], slope.detach(), rtol=1e-5, atol=1e-9)
    assert abs(float(slope.detach())) > 1e-5


def test_every_tensor_goes_to_the_models_device(monkeypatch):
    moved = []
    to = torch.Tensor.to

    def spy(self, *arguments, **options):
        if arguments and arguments[0] == torch.device("cpu"):
            moved.append((self.dtype, self.ndim))
        return to(self, *arguments, **options)

    c = {**columns(), "attention_mask": columns()["attention_mask"].double()}
    monkeypatch.setattr(torch.Tensor, "to", spy)
    la = of_mappings(loader=batches(c))
    in_fit = {(torch.int64, 2), (torch.float64, 2), (torch.int64, 1)}
    assert in_fit <= set(moved)
    moved.clear()
    la({key: c[key][:4] for key in X_KEYS})
    assert {(torch.int64, 2), (torch.float64, 2)} <= set(moved)


def test_held_out_kl():
    c = columns()
    first, second = Subset(Rows(c), range(20)), Subset(Rows(c), range(20, N))
    X, y = packed()
    la = of_mappings(loader=DataLoader(first, batch_size=8))
    other = posterior_of(Packed(), "classification", rank=6, **hyper_parameters("classification"))
    tensors = TensorDataset(X, y)
    other.fit(DataLoader(Subset(tensors, range(20)), batch_size=8), n_data=44)
    found = la.held_out_kl(DataLoader(second, batch_size=4), DataLoader(first, batch_size=7))
    expected = other.held_out_kl(DataLoader(Subset(tensors, range(20, N))), DataLoader(Subset(tensors, range(20))))
    assert found.n == 10
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    overlapping = [{k: v[19:23] for k, v in c.items()}]
    with pytest.raises(OverlapError, match="1 of the 4"):
        la.held_out_kl(overlapping, DataLoader(first))


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_grid_search(pred_type):
    options = {"method": "gridsearch", "grid_size": 9, "n_samples": 11, "pred_type": pred_type}
    options |= {"log_prior_prec_min": -3.0, "log_prior_prec_max": 3.0}
    la, (other, _) = of_mappings(), reference.__wrapped__()
    validation = TensorDataset(*packed())
    for posterior, loader in ((la, batches(columns(), UserDict)), (other, DataLoader(validation, batch_size=8))):
        posterior.optimize_prior_precision(val_loader=loader, **options)
    assert float(la.prior_precision) == float(other.prior_precision)
    assert float(la.prior_precision) != 0.4


def test_marginal_likelihood():
    la, (other, _) = of_mappings(), reference.__wrapped__()
    for posterior in (la, other):
        posterior.optimize_prior_precision(n_steps=15)
    torch.testing.assert_close(la.prior_precision, other.prior_precision, rtol=1e-9, atol=0)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_loaded_state_meets_mappings(subset):
    la = of_mappings(subset_of_weights=subset)
    state = la.state_dict()
    loaded = posterior_of(Keywords(), "classification", subset)
    loaded.load_state_dict(state)
    x = inputs(4)
    torch.testing.assert_close(loaded(UserDict(x)), la(x), rtol=0, atol=0)
    c = {k: v[:4] for k, v in columns().items()}
    with pytest.raises(OverlapError, match="4 of the 4"), pytest.warns(UserWarning, match="exact share is missing"):
        loaded.held_out_kl([c])


class NoisyTokens(Rows):
    """Masks a token in random places."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return {**row, "input_ids": torch.where(torch.rand(LENGTH) < 0.5, 0, row["input_ids"])}


def test_augmentation_is_noticed():
    assert not fitted().fit_result.identities.augmented
    la = of_mappings(loader=DataLoader(NoisyTokens(columns()), batch_size=8))
    assert la.fit_result.identities.augmented
    again = of_mappings(loader=DataLoader(NoisyTokens(columns()), batch_size=8, shuffle=True))
    check_same(la, again, rtol=0, atol=0)


def test_samples_are_told_apart_by_every_entry():
    c = columns()
    c["attention_mask"] = torch.ones_like(c["attention_mask"])
    c["input_ids"][1], c["labels"][1] = c["input_ids"][0], c["labels"][0]
    assert len(of_mappings(loader=batches(c)).split.copies) == 1
    c["attention_mask"][1, -1] = 0
    assert len(of_mappings(loader=batches(c)).split.copies) == 0


def padded(items):
    """Every batch as long as its longest sample."""
    longest = max(int(item["attention_mask"].sum()) for item in items)
    return UserDict(
        {
            "input_ids": torch.stack([item["input_ids"][:longest] for item in items]),
            "attention_mask": torch.stack([item["attention_mask"][:longest] for item in items]),
            "labels": torch.stack([item["labels"] for item in items]),
        }
    )


def test_batches_padded_to_their_longest_sample():
    c = columns()
    # a sample's length depends on its company: known by position, and of the same curvature whatever its padding
    loader = DataLoader(Rows(c), batch_size=4, collate_fn=padded)
    assert len({batch["input_ids"].shape[1] for batch in loader}) > 1
    la = of_mappings(loader=loader)
    assert la.fit_result.identities.augmented
    check_same(la, reference()[0])
    with pytest.raises(ValueError, match=r"of one shape.*Pad"):
        of_mappings(loader=list(loader))
    data = Rows(c)
    options = {"batch_size": 4, "collate_fn": padded}
    la = of_mappings(loader=DataLoader(Subset(data, range(20)), **options), n_data=N)
    inside, outside = (DataLoader(Subset(data, part), **options) for part in (range(20), range(20, N)))
    assert la.held_out_kl(outside, inside).n == 10
    with pytest.raises(OverlapError):
        la.held_out_kl(DataLoader(Subset(data, range(18, 22)), **options), inside)


@pytest.mark.parametrize("structure", ["lowrank", "kron"])
@pytest.mark.parametrize("name", MODELS)
def test_a_backend_takes_the_mapping(name, structure):
    options = {"hessian_structure": structure, "rank": 6 if structure == "lowrank" else None}
    la = of_mappings(MODELS[name](), backend=CurvlinopsGGN, **options)
    assert "CurvlinopsGGN" in la.curvature_source
    check_same(la, reference(**options)[0])


def without(mapping, *names):
    return {key: value for key, value in mapping.items() if key not in names}


WRONG_BATCHES = {
    "no targets": (lambda c: without(c, "labels"), r"targets.*dict_key_y='labels'.*attention_mask.*input_ids"),
    "no inputs": (lambda c: without(c, "input_ids"), r"inputs.*dict_key_x='input_ids'.*attention_mask"),
    "a text among the tensors": (lambda c: {**c, "text": ["a"] * len(c["labels"])}, r"mapping of tensors.*text.*list"),
    "targets as a list": (lambda c: {**c, "labels": c["labels"].tolist()}, r"targets.*as a tensor"),
    "a shorter mask": (lambda c: {**c, "attention_mask": c["attention_mask"][1:]}, r"attention_mask 7"),
    "fewer targets": (lambda c: {**c, "labels": c["labels"][1:]}, r"\d inputs but \d targets"),
    "a number among the tensors": (lambda c: {**c, "weight": torch.tensor(2.0)}, r"first dimension.*weight \(\)"),
    "an infinite entry": (
        lambda c: {**c, "attention_mask": c["attention_mask"] / torch.zeros(1)},
        r"finite attention_mask",
    ),
    "an empty mapping": (lambda c: {}, r"dict_key_y='labels'"),
    "no samples": (lambda c: {k: v[:0] for k, v in c.items()}, r"no samples"),
}


@pytest.mark.parametrize("wrap", [dict, UserDict])
@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_batches_that_cannot_be_used(name, wrap):
    change, message = WRONG_BATCHES[name]
    la = posterior_of(Keywords(), "classification", rank=2, **hyper_parameters("classification"))
    with pytest.raises(ValueError, match=message):
        la.fit([wrap(change(batch)) for batch in batches(columns())])


def test_mappings_with_different_entries():
    first, second, *rest = batches(columns())
    la = posterior_of(Keywords(), "classification", rank=2, **hyper_parameters("classification"))
    with pytest.raises(ValueError, match="of one shape"):
        la.fit([first, without(second, "attention_mask"), *rest])


WRONG_INPUTS = {
    "no inputs": (lambda x: without(x, "input_ids"), r"dict_key_x='input_ids'"),
    "a text among the tensors": (lambda x: {**x, "text": "a"}, r"mapping of tensors.*'text': 'str'"),
    "a shorter mask": (lambda x: {**x, "attention_mask": x["attention_mask"][1:]}, r"as many samples.*\(3, 5\)"),
    "no samples": (lambda x: {k: v[:0] for k, v in x.items()}, r"at least one sample of input_ids"),
    "an infinite entry": (lambda x: {**x, "attention_mask": x["attention_mask"] / 0.0}, r"finite attention_mask"),
    "a number among the tensors": (lambda x: {**x, "weight": torch.tensor(2.0)}, r"at least one sample of weight"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_cannot_be_used(name):
    change, message = WRONG_INPUTS[name]
    with pytest.raises(ValueError, match=message):
        fitted()(change(inputs(4)))
