import pytest
import torch

from debiased_laplace.cli import arguments


@pytest.mark.parametrize("available", ["cuda", "mps", "xpu", None])
def test_an_automatic_device_is_an_accelerator_if_there_is_one(available, monkeypatch):
    # builds of torch have an accelerator that the machine may not have
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(available or "cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available is not None)
    # the device itself is not on this machine
    monkeypatch.setattr(arguments.torch, "zeros", lambda *_, **__: torch.ones(1))
    assert arguments.device_named("auto").type == (available or "cpu")


def test_a_device_that_cannot_be_used_is_named():
    with pytest.raises(ValueError, match="--device 'abacus' cannot be used"):
        arguments.device_named("abacus")
