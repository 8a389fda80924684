import pytest
import torch

from debiased_laplace.cli import arguments


@pytest.mark.parametrize("available", [["cuda", "mps"], ["mps"], ["xpu"], []], ids=str)
def test_an_automatic_device_is_an_accelerator_if_there_is_one(available, monkeypatch):
    for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("xpu", torch.xpu)):
        monkeypatch.setattr(module, "is_available", lambda name=name: name in available)
    # the device itself is not on this machine
    monkeypatch.setattr(arguments.torch, "zeros", lambda *_, **__: torch.ones(1))
    assert arguments.device_named("auto").type == (available or ["cpu"])[0]


def test_a_device_that_cannot_be_used_is_named():
    with pytest.raises(ValueError, match="--device 'abacus' cannot be used"):
        arguments.device_named("abacus")
