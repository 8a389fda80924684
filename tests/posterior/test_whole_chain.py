"""From fit to checkpoint, for every kind of network, in both precisions."""

import io
import math

import pytest
import torch
from models import MODELS, targets
from posterior_cases import close, hyper_parameters, loader_of, posterior_of
from torch.utils.data import DataLoader, Subset, TensorDataset

NAMES = ["transformer", "LSTM", "GRU", "convolutions and pooling", "partly frozen"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def generator():
    return torch.Generator().manual_seed(4)


def probabilities(p, n, dtype):
    assert p.shape == (n, 3)
    assert p.dtype == dtype
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(n, dtype=dtype), rtol=1e-5, atol=1e-5)


def fit_to_thirty(name, likelihood, dtype, **options):
    model, X = MODELS[name](dtype=dtype)
    y = targets(likelihood, dtype=dtype)
    data = TensorDataset(X, y)
    la = posterior_of(model, likelihood, **hyper_parameters(likelihood), **options)
    la.fit(DataLoader(Subset(data, range(30)), batch_size=8, shuffle=True), n_data=40)
    return la, data


def check_draws(la, x, dtype):
    for pred_type in ("glm", "nn"):
        draws = la.functional_samples(x, pred_type=pred_type, n_samples=5, generator=generator())
        assert draws.shape == (5, len(x), 3)
        assert draws.dtype == dtype
        assert bool(draws.isfinite().all())
        assert float(draws.std(0).min()) > 0
        passed = la.predictive_samples(x, pred_type=pred_type, n_samples=5, generator=generator())
        expected = torch.softmax(draws, -1) if la.likelihood == "classification" else draws
        torch.testing.assert_close(passed, expected)
    weights = la.sample(3, generator=generator())
    assert weights.shape == (3, la.n_params)
    assert weights.dtype == dtype
    assert math.isfinite(float(la.log_prob(weights[0])))


def check_classification(la, x, dtype):
    for link in ("probit", "mc", "bridge", "bridge_norm"):
        probabilities(la(x, link_approx=link, n_samples=20, generator=generator()), len(x), dtype)
    p = la(x, pred_type="nn", link_approx="mc", n_samples=6, generator=generator())
    probabilities(p, len(x), dtype)
    torch.testing.assert_close(p, la.predictive_samples(x, "nn", 6, generator=generator()).mean(0))


def check_regression(la, x, dtype):
    mean, variance = la(x)
    torch.testing.assert_close(mean, la.model(x))
    assert bool((torch.linalg.eigvalsh(variance) > 0).all())
    joint_mean, joint = la(x, joint=True)
    torch.testing.assert_close(joint_mean, mean.flatten())
    for i in range(len(x)):
        block = joint[3 * i : 3 * i + 3, 3 * i : 3 * i + 3]
        torch.testing.assert_close(block, variance[i], rtol=1e-4, atol=1e-6)
    mean, variance = la(x, pred_type="nn", link_approx="mc", n_samples=6, generator=generator())
    draws = la.functional_samples(x, "nn", 6, generator=generator())
    torch.testing.assert_close(mean, draws.mean(0))
    torch.testing.assert_close(variance, draws.var(0))


def check_tuning(la, validation):
    before = float(la.log_marginal_likelihood())
    for structure in ("scalar", "layerwise", "diag"):
        la.optimize_prior_precision(method="marglik", n_steps=15, prior_structure=structure, init_prior_prec=0.4)
        assert la.prior_precision.numel() == {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}[structure]
        assert float(la.log_marginal_likelihood()) > before
    la.optimize_prior_precision(
        method="gridsearch", val_loader=validation, grid_size=3, log_prior_prec_min=-9.0, log_prior_prec_max=9.0
    )
    assert la.prior_precision.numel() == 1


def check_round_trip(la, x, data):
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    loaded = posterior_of(la.model, la.likelihood)
    loaded.load_state_dict(state)
    assert repr(loaded) == repr(la)
    for key, value in la.state_dict().items():
        found = loaded.state_dict()[key]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, key
    for ours, theirs in zip(la(x), loaded(x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(la.sample(2, generator=generator()), loaded.sample(2, generator=generator()))
    close(loaded.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-9)
    loaders = DataLoader(Subset(data, range(30, 40))), DataLoader(Subset(data, range(30)), batch_size=7)
    first, second = la.held_out_kl(*loaders), loaded.held_out_kl(*loaders)
    assert math.isfinite(first.value)
    assert first.n == 10
    assert first.standard_error == 0.0  # all samples outside the fit were given
    assert (first - second).value == pytest.approx(0, abs=1e-6 * abs(first.value))


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_classification_from_fit_to_checkpoint(name, dtype):
    la, data = fit_to_thirty(name, "classification", DTYPES[dtype], complement="diagonal")
    x = data.tensors[0][:4]
    check_classification(la, x, DTYPES[dtype])
    check_draws(la, x, DTYPES[dtype])
    check_round_trip(la, x, data)
    check_tuning(la, DataLoader(Subset(data, range(30, 40)), batch_size=6))


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_regression_from_fit_to_checkpoint(name, dtype):
    la, data = fit_to_thirty(name, "regression", DTYPES[dtype], rank=15)
    x = data.tensors[0][:4]
    check_regression(la, x, DTYPES[dtype])
    check_draws(la, x, DTYPES[dtype])
    check_round_trip(la, x, data)
    check_tuning(la, DataLoader(Subset(data, range(30, 40)), batch_size=6))


@pytest.mark.parametrize(
    "name", ["convolutions and pooling", "transformer", "LSTM", "BatchNorm", "LayerNorm and raw parameters"]
)
def test_gradients_with_respect_to_the_inputs(name):
    model, X = MODELS[name]()
    la = posterior_of(model, "classification", enable_backprop=True, **hyper_parameters("classification"))
    la.fit(loader_of(X, targets("classification")))
    direction = torch.randn(X[:2].shape, dtype=X.dtype, generator=generator())

    def score(x):
        return la(x)[:, 0].sum()

    x = X[:2].clone().requires_grad_()
    score(x).backward()
    step = 1e-6
    expected = (score(X[:2] + step * direction) - score(X[:2] - step * direction)) / (2 * step)
    close((x.grad * direction).sum(), expected.detach(), 1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_repr_says_what_it_is():
    la, _ = fit_to_thirty("LSTM", "classification", torch.float64, rank=5)
    shown = repr(la)
    assert all(part in shown for part in ("classification", "rank=5", "held_out", "15 + 15 of 40"))
    assert "not fitted" in repr(posterior_of(la.model, "classification"))
