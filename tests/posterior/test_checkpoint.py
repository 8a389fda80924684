"""A state is bound to the weights it was fitted at, and shares nothing with the posterior."""

import copy
import io

import pytest
import torch
from models import mlp
from posterior_cases import fitted, loader_of, posterior_of
from torch import Tensor, nn

from debiased_laplace.errors import NotFittedError


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_state_is_tensors_strings_and_numbers():
    la, *_ = fitted("MLP", "classification", rank=5)
    assert {type(v) for v in la.state_dict().values()} <= {Tensor, str, int, float, bool}


def test_loaded_posterior_is_the_fitted_one():
    la, X, y, _ = fitted("BatchNorm", "regression", complement="diagonal", seed=3, prior_mean=0.2)
    loaded = posterior_of(la.model, "regression")
    loaded.load_state_dict(through_a_file(la.state_dict()))
    assert torch.equal(loaded.posterior_precision.to_dense(), la.posterior_precision.to_dense())
    assert torch.equal(loaded.standard_errors, la.standard_errors)
    assert torch.equal(loaded.in_sample_curvatures, la.in_sample_curvatures)
    assert torch.equal(loaded.split.magnitude_indices, la.split.magnitude_indices)
    assert loaded.log_marginal_likelihood() == la.log_marginal_likelihood()
    assert loaded.curvature_source == la.curvature_source
    assert loaded.fit_result.fingerprint == la.fit_result.fingerprint
    for found, expected in zip(loaded(X), la(X), strict=True):
        assert torch.equal(found, expected)
    # a loaded posterior can be fitted again, with the options it was fitted with
    loaded.fit(loader_of(X, y))
    assert torch.equal(loaded.split.direction_indices, la.split.direction_indices)
    assert torch.equal(loaded.directional_curvatures, la.directional_curvatures)


def test_a_loaded_posterior_keeps_the_graph_where_the_fitted_one_did():
    la, X, _, _ = fitted("MLP", "regression", enable_backprop=True)
    loaded = posterior_of(la.model, "regression")
    loaded.load_state_dict(la.state_dict())
    assert loaded(X.clone().requires_grad_())[1].requires_grad


def test_neither_state_nor_posterior_changes_with_the_other():
    la, X, _, _ = fitted("MLP", "classification")
    state = la.state_dict()
    kept, before = copy.deepcopy(state), la(X)
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    assert torch.equal(la(X), before)
    loaded = posterior_of(la.model, "classification")
    given = copy.deepcopy(kept)
    loaded.load_state_dict(given)
    for value in given.values():
        if isinstance(value, Tensor):
            value.zero_()
    assert torch.equal(loaded(X), before)
    state = loaded.state_dict()
    loaded.prior_precision = 9.0
    loaded.mean.zero_()
    for key, value in kept.items():
        assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value


def other_weights():
    model, _ = mlp()
    with torch.no_grad():
        model[2].bias[0] += 1e-6
    return posterior_of(model, "classification")


def other_statistics():
    la, *_ = fitted("BatchNorm", "classification", rank=3)
    model = copy.deepcopy(la.model)
    model[1].running_mean += 1e-6
    return posterior_of(model, "classification"), la.state_dict()


def test_loading_beside_other_weights_or_buffers_is_refused():
    la, *_ = fitted("MLP", "classification", rank=3)
    with pytest.raises(ValueError, match="other weights"):
        other_weights().load_state_dict(la.state_dict())
    fresh, state = other_statistics()
    with pytest.raises(ValueError, match="other weights"):
        fresh.load_state_dict(state)
    with pytest.raises(NotFittedError):
        fresh.state_dict()


BELONGS_ELSEWHERE = {
    "another likelihood": ("likelihood", "regression", "likelihood"),
    "another class": ("cls_name", "DiagLaplace", "DiagLaplace"),
    "another version": ("version", 99, "version"),
    "fewer parameters": ("mean", torch.zeros(5), "parameters"),
    "another fingerprint": ("weights_fingerprint", "0" * 64, "other weights"),
}


@pytest.mark.parametrize("case", BELONGS_ELSEWHERE)
def test_what_belongs_elsewhere_is_refused(case):
    key, value, message = BELONGS_ELSEWHERE[case]
    la, X, _, _ = fitted("MLP", "classification", rank=3)
    before = la(X)
    with pytest.raises(ValueError, match=message):
        la.load_state_dict({**la.state_dict(), key: value})
    assert torch.equal(la(X), before)


NOT_OF_A_STATE = {
    "directions that are not finite": ("curvature_directions", lambda t: t.clone().fill_(float("nan")), "finite"),
    "one magnitude that is not finite": (
        "magnitudes_values",
        lambda t: torch.cat([t[:-1], t.new_tensor([float("inf")])]),
        "finite numbers in the state; 'magnitudes_values'",
    ),
    "a loss that is not finite": ("loss", lambda _: float("nan"), "finite numbers in the state; 'loss'"),
    "a loss that is an integer": ("loss", int, "'loss' as float"),
    "a fraction of a sample": ("n_data", lambda n: n + 0.5, "'n_data' as int; got"),
    "no number of outputs": ("n_outputs", lambda _: None, "'n_outputs' as int; got None"),
    "another number of outputs": ("n_outputs", lambda n: n + 1, "checksum"),
    "a truth that is a word": ("enable_backprop", lambda _: "yes", "'enable_backprop' as bool"),
    "a temperature that is a word": ("temperature", lambda _: "1.3", "'temperature' as float"),
    "another temperature": ("temperature", lambda t: 2 * t, "checksum"),
    "positions that are fractions": ("samples_positions", lambda t: t.double(), "'samples_positions' as a tensor"),
    "one hash changed": ("samples_hashes", lambda t: t ^ (torch.arange(len(t)) == 3).long(), "checksum"),
    "one direction turned round": (
        "curvature_directions",
        lambda t: t * torch.tensor([1.0, -1.0, 1.0], dtype=t.dtype),
        "checksum",
    ),
    "one bit of a weight": (
        "curvature_weights",
        lambda t: (t.view(torch.int64) ^ (torch.arange(len(t)) == 1).long()).view(t.dtype),
        "checksum",
    ),
}


@pytest.mark.parametrize("case", NOT_OF_A_STATE)
def test_what_was_not_written_is_not_loaded(case):
    key, change, message = NOT_OF_A_STATE[case]
    la, X, _, _ = fitted("MLP", "classification", rank=3)
    state, before, n_outputs = la.state_dict(), la(X), la.n_outputs
    with pytest.raises(ValueError, match=message):
        la.load_state_dict({**state, key: change(state[key])})
    assert torch.equal(la(X), before)
    assert la.n_outputs == n_outputs
    la.load_state_dict(state)


def test_no_flipped_bit_of_a_file_is_loaded(tmp_path):
    la, *_ = fitted("MLP", "classification", rank=3)
    path, expected = tmp_path / "posterior.pt", la.posterior_precision.to_dense()
    torch.save(la.state_dict(), path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(4)
    n_loaded = 0
    for place in torch.randint(8 * len(content), (120,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        loaded = posterior_of(la.model, "classification")
        try:
            state = torch.load(path, weights_only=True)
        except Exception:  # whatever torch says of its own format
            continue
        try:
            loaded.load_state_dict(state)
        except ValueError:
            continue
        n_loaded += 1  # padding between the parts of a file, or its table of contents
        assert torch.equal(loaded.posterior_precision.to_dense(), expected)
        assert loaded.state_dict()["checksum"] == la.state_dict()["checksum"]
    assert 0 < n_loaded < 120


def test_another_dtype_is_named():
    la, *_ = fitted("MLP", "classification", rank=3)
    single = copy.deepcopy(la.model).float()
    with pytest.raises(ValueError, match=r"dtype torch.float64; this model has torch.float32.*model.to"):
        posterior_of(single, "classification").load_state_dict(la.state_dict())


MISSED = {
    "low rank": {"rank": 3},
    "Kronecker, a parameter of axes and the errors": {"hessian_structure": "kron"},
    "Kronecker, magnitudes without errors": {"hessian_structure": "kron", "kron_magnitudes": "kronecker"},
    "last layer, every direction": {"subset_of_weights": "last_layer", "hessian_structure": "full"},
}


@pytest.mark.parametrize("case", MISSED)
def test_every_entry_is_missed(case):
    la, X, _, _ = fitted("LayerNorm and raw parameters", "classification", **MISSED[case])
    state, before = la.state_dict(), la(X)
    for key in state:
        with pytest.raises(ValueError, match=key):
            la.load_state_dict({k: v for k, v in state.items() if k != key})
    assert torch.equal(la(X), before)


def test_states_of_laplace_torch_are_refused():
    la, *_ = fitted("MLP", "classification", rank=3)
    with pytest.raises(ValueError, match="no entry 'version'"):
        la.load_state_dict({"mean": la.mean, "H": torch.zeros(3), "cls_name": "FullLaplace"})


def test_frozen_weights_count_for_the_fingerprint_too():
    la, *_ = fitted("partly frozen", "classification", rank=3)
    model = copy.deepcopy(la.model)
    with torch.no_grad():
        model[2].weight += 1e-9
    with pytest.raises(ValueError, match="other weights"):
        posterior_of(model, "classification").load_state_dict(la.state_dict())


@pytest.mark.parametrize(
    "call",
    [
        lambda la, x: la(x),
        lambda la, x: la(x, pred_type="nn", link_approx="mc"),
        lambda la, x: la.sample(3),
        lambda la, x: la.functional_samples(x),
        lambda la, x: la.predictive_samples(x),
        lambda la, x: la.functional_variance(torch.zeros(1, 3, la.n_params)),
        lambda la, x: la.functional_covariance(torch.zeros(1, 3, la.n_params)),
        lambda la, x: la.log_marginal_likelihood(),
        lambda la, x: la.log_likelihood,
        lambda la, x: la.scatter,
        lambda la, x: la.posterior_covariance,
        lambda la, x: la.posterior_variance,
        lambda la, x: la.backend.jacobians(x),
        lambda la, x: la.posterior_precision,
        lambda la, x: la.log_det_posterior_precision,
        lambda la, x: la.held_out_kl(None, None),
        lambda la, x: la.state_dict(),
        lambda la, x: la.split,
        lambda la, x: la.directions,
        lambda la, x: la.directional_curvatures,
        lambda la, x: la.in_sample_curvatures,
        lambda la, x: la.standard_errors,
        lambda la, x: la.confidence_intervals(),
        lambda la, x: la.curvature_source,
        lambda la, x: la.fit_result.fingerprint,
    ],
)
def test_before_fit_everything_says_so(call):
    la = posterior_of(nn.Linear(2, 3), "classification", rank=2, prior_precision=0.4)
    for error in (NotFittedError, ValueError, AttributeError):
        with pytest.raises(error, match="not fitted"):
            call(la, torch.zeros(1, 2))
    assert la.rank == 2
