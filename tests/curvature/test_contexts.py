import pytest
import torch
from models import transformer_classifier
from torch import nn
from torch.func import functional_call, jvp

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
