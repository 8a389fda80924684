from typing import Any

import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from models import transformer_classifier
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, diagnose, directional_derivatives, evaluate, newton_step
from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.memory import free_memory


def mixed_modes() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), nn.Dropout())
    model.train()
    model[1][1].eval()  # a frozen normalization in a model that trains
    model[2].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_submodule_returns_to_its_own_mode() -> None:
    model = mixed_modes()
    before = modes(model)
    assert len(set(before)) == 2
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before


def test_modes_return_after_an_exception() -> None:
    model = mixed_modes()
    before = modes(model)
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == before


def settings() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn attention": cuda.cudnn_sdp_enabled(),
    }


def apply(values: dict[str, bool]) -> None:
    cuda = torch.backends.cuda
    torch.backends.mha.set_fastpath_enabled(values["fast path"])
    torch.backends.cudnn.enabled = values["cudnn"]
    cuda.enable_flash_sdp(values["flash"])
    cuda.enable_mem_efficient_sdp(values["memory-efficient"])
    cuda.enable_math_sdp(values["math"])
    cuda.enable_cudnn_sdp(values["cudnn attention"])


@pytest.fixture(autouse=True)
def _settings_of_the_other_tests():
    before = settings()
    yield
    apply(before)


USERS = {
    "torch's defaults": {},
    "fast path off": {"fast path": False},
    "flash attention off": {"flash": False},
    "math attention off": {"math": False},
    "only memory-efficient attention": {"flash": False, "math": False, "cudnn attention": False},
    "cuDNN off": {"cudnn": False},
}


@pytest.mark.parametrize("fails", [False, True], ids=["normally", "after an exception"])
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.LSTM(2, 2)], ids=["linear", "recurrent"])
def test_the_users_kernels_return(model: nn.Module, user: str, fails: bool) -> None:
    before = {**settings(), **USERS[user]}
    apply(before)
    assert settings() == before
    try:
        with differentiable_kernels(model):
            inside = settings()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert settings() == before
    assert inside["math"]
    assert not inside["flash"]
    assert not inside["memory-efficient"]
    assert not inside["fast path"]
    # cuDNN is switched off only where a recurrent layer needs it
    assert inside["cudnn"] == (before["cudnn"] and not isinstance(model, nn.LSTM))


def test_attention_has_directional_derivatives_inside_and_not_outside() -> None:
    model, X = transformer_classifier()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def derivative() -> torch.Tensor:
        return jvp(lambda p: functional_call(model, p, (X,)), (parameters,), (parameters,))[1]

    with pytest.raises((NotImplementedError, RuntimeError)):
        derivative()  # fails once torch supports it, and the context can be dropped
    with differentiable_kernels(model):
        inside = derivative()
    assert bool(inside.isfinite().all())
    assert float(inside.abs().max()) > 0.1


def test_free_memory_is_a_number_of_bytes() -> None:
    found = free_memory(torch.device("cpu"))
    assert isinstance(found, int)
    assert 2**20 < found < 2**50


class Autocast(nn.Module):
    """A network that runs under autocast, whatever its caller does."""

    def __init__(self, network: nn.Module, *, as_float: bool):
        super().__init__()
        self.network, self.as_float = network, as_float

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = self.network(x)
        return outputs.float() if self.as_float else outputs


def _network() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 4)
    )
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return network


def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 1, 6, 6, generator=generator), torch.randint(4, (48,), generator=generator)


def _fitted(model: nn.Module, *kind: str, **options: Any) -> DebiasedLaplace:
    la = DebiasedLaplace(model, "classification", *kind, prior_precision=0.4, temperature=1.3, **options)
    X, y = _images()
    la.fit(DataLoader(TensorDataset(X[:32], y[:32]), batch_size=8), n_data=48)
    return la


def _posterior(model: nn.Module, *kind: str, **options: Any) -> Tensor:
    la, (X, y) = _fitted(model, *kind, **options), _images()
    generator = torch.Generator().manual_seed(2)
    la.optimize_prior_precision(n_steps=3)
    numbers = [
        la(X[:5]),
        la(X[:5], pred_type="nn", link_approx="mc", n_samples=5, generator=generator),
        la.functional_samples(X[:5], n_samples=3, generator=generator),
        la.functional_variance(la.backend.jacobians(X[:3])[0]),
        la.sample(3, generator=generator),
        la.log_prob(la.mean + 0.1),
        la.log_marginal_likelihood(),
        torch.tensor(la.held_out_kl([(X[32:], y[32:])], [(X[:32], y[:32])]).value),
    ]
    return torch.cat([number.detach().flatten() for number in numbers])


def _along(model: nn.Module, curvature: str) -> Tensor:
    U = torch.randn(
        sum(p.numel() for p in model.parameters() if p.requires_grad), 3, generator=torch.Generator().manual_seed(3)
    )
    found = directional_derivatives(model, "classification", _images(), U, curvature=curvature)
    return torch.cat([found.slopes, found.curvatures])


PATHS = {
    "low rank": lambda m: _posterior(m, rank=8),
    "Lanczos": lambda m: _posterior(m, rank=2, solver="lanczos", complement="none", magnitudes="same_batch"),
    "K-FAC basis": lambda m: _posterior(m, "all", "kron", kron_basis="kfac"),
    "last layer": lambda m: _posterior(m, "last_layer", "kron"),
    "last layer, low rank": lambda m: _posterior(m, "last_layer", rank=4),
    "a backend": lambda m: _posterior(m, "last_layer", "full", backend=CurvlinopsGGN),
    "diagnose": lambda m: diagnose(m, "classification", [_images()], batch_sizes=[12], n_draws=1).batches[0].posterior,
    "newton_step": lambda m: (
        newton_step(m, "classification", _images(), 0.1, stopping="none", shrinkage=False, max_iterations=3).update
    ),
    "newton_step, Hessian": lambda m: (
        newton_step(
            m,
            "classification",
            _images(),
            30.0,
            curvature="hessian",
            stopping="none",
            shrinkage=False,
            max_iterations=3,
        ).update
    ),
    "directional_derivatives": lambda m: _along(m, "ggn"),
    "directional_derivatives, Hessian": lambda m: _along(m, "hessian"),
    "evaluate": lambda m: torch.tensor(
        evaluate({"la": _fitted(m, rank=5)}, [_images()], task="multiclass").metrics["la"]["nll"].value
    ),
}


SLOW = ("Lanczos", "K-FAC basis", "newton_step, Hessian")


@pytest.mark.parametrize("path", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PATHS])
def test_autocast_in_the_model_and_around_calls_changes_no_digit(path: str) -> None:
    expected = PATHS[path](_network())
    assert bool((expected != 0).any())
    for as_float in (False, True):
        assert torch.equal(PATHS[path](Autocast(_network(), as_float=as_float)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PATHS[path](_network())
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected)


def test_a_network_whose_layers_are_in_half_precision_agrees_within_its_rounding() -> None:
    """Adapters in single precision beside frozen layers in bfloat16, which no autocast is to blame for."""

    class Adapted(nn.Module):
        def __init__(self, dtype: torch.dtype):
            super().__init__()
            self.dtype, self.base = dtype, _network()[2:].requires_grad_(False).to(dtype)
            self.down, self.up = nn.Linear(48, 2, bias=False), nn.Linear(2, 48, bias=False)
            for i, p in enumerate((self.down.weight, self.up.weight)):
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 7

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.unfold(x, 3)[:, :3].flatten(1)
            return self.base((x + self.up(self.down(x))).to(self.dtype))

    models, (X, _) = [Adapted(dtype) for dtype in (torch.bfloat16, torch.float32)], _images()
    pairs = {
        path: [PATHS[path](m) for m in models]
        for path in ("newton_step", "newton_step, Hessian", "directional_derivatives")
    }
    pairs["probabilities"] = [_fitted(m, rank=8)(X) for m in models]
    pairs["curvatures"] = [_fitted(m, rank=4, magnitudes="same_batch").directional_curvatures for m in models]
    for name, (found, expected) in pairs.items():
        assert (found - expected).norm() < 0.1 * expected.norm(), name


class Rounded(nn.Module):
    """A network in bfloat16 that is given single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _network().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.inner[0].weight.dtype))


@pytest.mark.parametrize(
    "path",
    # of a last layer, draws are turned with eigenvectors of nearly equal eigenvalues
    [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PATHS if "last layer" not in p],
)
def test_a_network_in_bfloat16_agrees_with_the_same_weights_in_single_precision(path: str) -> None:
    found, expected = PATHS[path](Rounded()), PATHS[path](Rounded().float())
    assert found.dtype == expected.dtype
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("subset", "structure"), [("all", "lowrank"), ("last_layer", "kron"), ("last_layer", "full")])
def test_of_a_network_in_bfloat16_vectors_are_in_single_precision(subset: str, structure: str) -> None:
    model, (X, y) = Rounded(), _images()
    la, other = (
        DebiasedLaplace(m, "classification", subset, structure, prior_precision=0.3) for m in (model, Rounded().float())
    )
    for posterior in (la, other):
        posterior.fit([(X, y)])
    capabilities, selection = la.fit_result.network.capabilities, la.fit_result.network.selection
    if subset == "all":
        assert capabilities.layers is not None
        assert capabilities.layers.names == set(selection.names)
    else:
        assert capabilities.linear_layer is not None
    assert la.mean.dtype == la.sample(2).dtype == la(X).dtype == torch.float32
    assert float(la.prior_precision) == pytest.approx(0.3, rel=1e-7)
    mean, covariance = la._glm_predictive_distribution(X)
    with torch.no_grad():
        assert torch.equal(mean, model(X).float())
    expected = other._glm_predictive_distribution(X)[1]
    assert 0 < (covariance - expected).norm() < 0.05 * expected.norm()
    again = DebiasedLaplace(model, "classification", subset, structure)
    again.load_state_dict(la.state_dict())
    assert torch.equal(again(X), la(X))


def test_parameters_of_float16_are_refused_by_name() -> None:
    message = r"float64 or bfloat16; got torch.float16 \(0.weight, 0.bias, 3.weight, …\)"
    with pytest.raises(ValueError, match=message):
        PATHS["newton_step"](_network().half())
