"""Models whose forward pass writes to a buffer: a counter, a running mean of what it has seen, the last batch."""

import pytest
import torch
from models import batch_norm_net, targets
from posterior_cases import hyper_parameters, loader_of, posterior_of
from torch import nn

from debiased_laplace import diagnose, directional_derivatives, evaluate, newton_step
from debiased_laplace.curvature.parameters import ParameterSelection


def count(model, x):
    model.calls += 1


def count_in_a_new_tensor(model, x):
    model.calls = model.calls + 1


def keep_the_mean(model, x):
    model.calls.copy_(x.detach().mean())


WRITES = {"in place": count, "in a new tensor": count_in_a_new_tensor, "from the batch": keep_the_mean}


class Writing(nn.Module):
    def __init__(self, write=None):
        super().__init__()
        self.inner, _ = batch_norm_net()
        self.write = write
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.write is not None:
            self.write(self, x)
        return self.inner(x)


X, Y = batch_norm_net()[1], targets("classification")


def fitted(model, **options):
    la = posterior_of(model.eval(), "classification", **hyper_parameters("classification"), **options)
    la.fit(loader_of(X, Y))
    return la


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("structure", ["lowrank", "kron"])
def test_the_posterior_is_that_of_the_model_without_the_buffer(write, structure) -> None:
    model = Writing(WRITES[write])
    la = fitted(model, hessian_structure=structure)
    expected = fitted(Writing(), hessian_structure=structure)
    assert float(model.calls) == 0
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected.posterior_precision.to_dense())
    torch.testing.assert_close(la(X), expected(X))
    assert float(model.calls) == 0


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_every_derivative_is_that_of_the_model_without_the_buffer(write) -> None:
    U = torch.ones(sum(p.numel() for p in Writing().parameters()), 1, dtype=torch.float64)
    model, plain = Writing(WRITES[write]).eval(), Writing().eval()

    def numbers(m):
        along = directional_derivatives(m, "classification", (X, Y), U, curvature="hessian")
        step = newton_step(m, "classification", (X, Y), damping=0.3)
        found = diagnose(m, "classification", loader_of(X, Y), batch_sizes=[8], n_draws=1)
        return along.curvatures, along.slopes, step.update, found.batches[0].leading.unbiased

    for a, b in zip(numbers(model), numbers(plain), strict=True):
        torch.testing.assert_close(a, b)
    assert float(model.calls) == 0


@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize("write", WRITES)
def test_the_users_own_evaluations_do_not_outdate_a_posterior(write, sampling) -> None:
    model = Writing(WRITES[write])
    la = fitted(model, sampling=sampling)
    state = la.state_dict()
    expected, kl = la(X), la.held_out_kl(None, loader_of(X, Y)).value
    model(X + 1)
    found = float(model.calls)
    assert found != 0
    assert torch.equal(la(X), expected)
    assert la.held_out_kl(None, loader_of(X, Y)).value == pytest.approx(kl, rel=1e-12)
    evaluate({"la": la}, loader_of(X, Y), task="multiclass", n_resamples=10)
    other = posterior_of(model, "classification", **hyper_parameters("classification"))
    other.load_state_dict(state)
    torch.testing.assert_close(other(X), expected)
    assert float(model.calls) == found


def test_a_buffer_that_evaluation_only_reads_still_outdates_a_posterior() -> None:
    model = Writing(count)
    la = fitted(model)
    model.inner[1].running_mean += 0.1
    with pytest.raises(ValueError, match="weights or buffers have changed"):
        evaluate({"la": la}, loader_of(X, Y), task="multiclass")


def test_a_fingerprint_says_which_buffers_do_not_count() -> None:
    model = Writing()
    selection = ParameterSelection.all_weights(model)
    fingerprint = selection.fingerprint(without={"calls"})
    assert fingerprint.endswith("\ncalls")
    model.calls += 1
    assert selection.matches(fingerprint)
    assert not selection.matches(selection.fingerprint() + "\ncalls")
    model.inner[1].running_var += 1
    assert not selection.matches(fingerprint)
