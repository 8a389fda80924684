"""Interrupts, exceptions and second threads: models and the process are as they were."""

import multiprocessing
import os
import random
import signal
import threading
import warnings
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import pytest
import torch
from models import batch_norm_net, mlp
from torch import nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from benchmarks.interrupts import differences, model_state, process_state
from debiased_laplace.curvature.as_found import leaves_as_found, models_of, modules_reached, uninterrupted
from debiased_laplace.curvature.contexts import evaluating, keeping_buffers


@contextmanager
def everything_as_found(model):
    """Check that what a function damages is restored, and repair what is not, for the other tests."""
    before, process = model_state(model), process_state()
    try:
        yield
        assert differences(process, process_state()) == []
        assert differences(before, model_state(model)) == []
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def swapped_parameter(model):
    model[0]._parameters["weight"] = torch.zeros(2)


def removed_buffer(model):
    del model[1]._buffers["running_mean"]


def written_buffer(model):
    model[1].running_var += 1


def draw_in_the_weights(model):
    model[0].weight.data = torch.zeros_like(model[0].weight)


def other_gradient(model):
    model[0].weight.grad = torch.zeros_like(model[0].weight)


def frozen(model):
    model[0].weight.requires_grad_(False)


def hook(model):
    model[4].register_forward_hook(lambda *_: None)
    model[4].register_full_backward_hook(lambda *_: None)


def attribute_and_mode(model):
    model[5].cache = 3
    model[1].training = not model[1].training


def levels_of_functorch(model):
    eager_transforms._grad_increment_nesting()
    torch._C._functorch._vmap_increment_nesting(3, "error")
    eager_transforms.enter_jvp_nesting()
    forward_ad.enter_dual_level()


def forward_level_that_torch_has_not_counted(model):
    torch._C._enter_dual_level()


def modes(model):
    torch.set_grad_enabled(False)
    torch._C._set_fwd_grad_enabled(False)
    torch._C._autograd._saved_tensors_hooks_disable("no")
    torch.device("cpu").__enter__()
    torch.set_default_dtype(torch.float64)


def kernels(model):
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False


def filters_of_warnings(model):
    warnings.catch_warnings(record=True).__enter__()
    warnings.simplefilter("ignore")


def own_filters_of_warnings(model):
    warnings.simplefilter("ignore")


def random_numbers(model):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002


def methods_that_tracing_patches(model):
    nn.Module.__call__ = lambda self, *given: None


DAMAGES = [
    swapped_parameter,
    removed_buffer,
    written_buffer,
    draw_in_the_weights,
    other_gradient,
    frozen,
    hook,
    attribute_and_mode,
    levels_of_functorch,
    forward_level_that_torch_has_not_counted,
    modes,
    kernels,
    filters_of_warnings,
    own_filters_of_warnings,
    random_numbers,
    methods_that_tracing_patches,
]


@pytest.mark.untyped
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_an_exception_leaves_is_repaired(damage, error) -> None:
    model, _ = batch_norm_net()
    model.train()

    @leaves_as_found()
    def work(model):
        with torch.no_grad():
            damage(model)
        raise error

    with everything_as_found(model), pytest.raises(error):
        work(model)


def test_what_a_function_returns_normally_stays() -> None:
    model, _ = mlp()

    @leaves_as_found()
    def work(network, *, by):
        """Move a weight."""
        with torch.no_grad():
            network[0].weight += by
        return "moved"

    before = model[0].weight.detach().clone()
    assert work(by=2, network=model) == "moved"
    assert torch.equal(model[0].weight, before + 2)
    assert work.__doc__ == "Move a weight."


@pytest.mark.untyped
def test_a_restoration_that_is_interrupted_starts_again(monkeypatch) -> None:
    from debiased_laplace.curvature import as_found

    model, _ = mlp()
    original, calls = as_found.put_back, []

    def interrupted_twice(entries, before):
        calls.append(1)
        if len(calls) in (1, 5):
            raise KeyboardInterrupt
        original(entries, before)

    monkeypatch.setattr(as_found, "put_back", interrupted_twice)

    @leaves_as_found()
    def work(model):
        swapped_parameter(model)
        raise ValueError

    with everything_as_found(model), pytest.raises(KeyboardInterrupt):
        work(model)
    assert len(calls) > 5


@pytest.mark.untyped
def test_generators_that_an_interrupt_leaves_suspended_restore_nothing_later() -> None:
    """A context whose exit was interrupted would restore when its frame is released, after everything else."""
    model, _ = mlp()

    @contextmanager
    def late():
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float64)

    @leaves_as_found()
    def work(model):
        context = late()
        context.__enter__()
        raise KeyboardInterrupt

    with everything_as_found(model), suppress(KeyboardInterrupt):
        work(model)


class Mover(torch.optim.SGD):
    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.5, momentum=0.9)
        self.model = model

    @leaves_as_found(moves=True)
    def moved(self, *, fails):
        self.state[next(self.model.parameters())]["n"] = 1
        self.last = 3
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(1)
                if fails:
                    raise KeyboardInterrupt


def test_an_interrupt_that_a_context_turned_into_an_error_is_raised() -> None:
    model, _ = mlp()

    @leaves_as_found()
    def work(model):
        try:
            with eager_transforms.grad_increment_nesting():
                # as an interrupt of torch's own increment: the level is then removed twice
                eager_transforms._grad_decrement_nesting()
                raise KeyboardInterrupt
        except RuntimeError as error:
            raise ValueError("The model could not be evaluated.") from error

    with pytest.raises(KeyboardInterrupt):
        work(model)


def test_an_error_within_the_handling_of_an_interrupt_stays_an_error() -> None:
    model, _ = mlp()

    @leaves_as_found()
    def work(model):
        raise ValueError("wrong")

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="wrong"):
            work(model)


def test_a_step_that_is_interrupted_has_moved_no_weight() -> None:
    model, _ = mlp()
    optimizer = Mover(model)
    optimizer.state[next(model.parameters())] = {"n": 0}
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        optimizer.moved(fails=True)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.state[next(model.parameters())] == {"n": 0}
    assert not hasattr(optimizer, "last")
    optimizer.moved(fails=False)
    assert all(torch.equal(p, b + 1) for p, b in zip(model.parameters(), before, strict=True))


def in_a_thread(work):
    """Return the result or the exception of a function in another thread."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def busy(model):
    """Start a function that uses a model in another thread; return how to end it."""
    started, end = threading.Event(), threading.Event()

    @leaves_as_found()
    def work(model):
        started.set()
        end.wait(20)

    thread, _ = in_a_thread(lambda: work(model))
    assert started.wait(20)

    def finish():
        end.set()
        thread.join(20)

    return finish


def shared_backbone(model):
    return nn.Sequential(model[0], nn.Tanh())


@pytest.mark.parametrize("view", [lambda m: m, shared_backbone, lambda m: {"a": m}, lambda m: lambda x: m(x)])
def test_a_model_that_another_thread_uses_is_refused(view) -> None:
    model, _ = mlp()
    finish = busy(model)
    try:
        with pytest.raises(ValueError, match="Another thread uses this model"):
            leaves_as_found()(lambda m: None)(view(model))
    finally:
        finish()
    leaves_as_found()(lambda m: None)(view(model))


@pytest.mark.parametrize("waits", [True, False], ids=["a prediction", "another model"])
def test_a_second_thread_waits(waits) -> None:
    model, _ = mlp()
    finish, order = busy(model), []
    subject = model if waits else mlp()[0]
    thread, found = in_a_thread(lambda: leaves_as_found(waits=waits)(lambda m: order.append("second"))(subject))
    thread.join(0.2)
    assert not order
    finish()
    thread.join(20)
    assert order == ["second"]
    assert found == [None]


def test_a_function_within_another_is_of_the_same_thread() -> None:
    model, _ = mlp()

    @leaves_as_found()
    def outer(model):
        return leaves_as_found()(lambda m: "inner")(model)

    assert outer(model) == "inner"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    model, _ = mlp()
    finish = busy(model)
    try:
        process = multiprocessing.get_context("fork").Process(target=leaves_as_found()(lambda m: None), args=(model,))
        process.start()
        process.join(20)
        assert process.exitcode == 0
    finally:
        finish()


NETWORK = mlp()[0]


class Predictor:
    def __init__(self, network):
        self.network = network

    def predict(self, x):
        return self.network(x)

    def __call__(self, x):
        return self.predict(x)


REACHED = {
    "global": lambda model: lambda x: NETWORK(x),
    "closure": lambda model: lambda x: model(x),
    "partial": lambda model: partial(lambda m, x: m(x), model),
    "default": lambda model: lambda x, m=model: m(x),
    "method": lambda model: Predictor(model).predict,
    "object": Predictor,
    "object in a closure": lambda model: (lambda p: lambda x: p.predict(x))(Predictor(model)),
    "function in a closure": lambda model: (lambda f: lambda x: f(x).exp())(lambda x: model(x)),
    "module": lambda model: model,
    "method of a module": lambda model: model.forward,
}


@pytest.mark.parametrize("kind", REACHED)
def test_the_network_of_a_callable_is_found(kind) -> None:
    model = NETWORK if kind == "global" else mlp()[0]
    assert list(modules_reached(REACHED[kind](model))) == [model]


def test_models_of_arguments() -> None:
    a, b = mlp()[0], mlp()[0]

    class Posterior:
        model = a

    assert list(models_of({"one": a, "two": lambda x: b(x), "three": Posterior()})) == [a, b, a]
    assert list(models_of(None)) == list(models_of(3)) == list(models_of(torch.relu)) == []
    assert list(modules_reached(lambda x: Posterior.model(x), skip=type)) == []


def test_an_interrupt_waits_for_a_computation_in_another_thread() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("this process was started with interrupts ignored, as background jobs of a shell are")
    done = []

    def compute():
        main = threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.2)
        done.append(threading.current_thread() is not main)
        return 5

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(compute)
    assert done == [True]
    assert uninterrupted(lambda: 5) == 5
    with pytest.raises(KeyError):
        uninterrupted(lambda: {}[0])


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("constant", torch.ones(2))
        self.register_buffer("empty", None)

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.constant.copy_(self.constant.clone())  # written, and the same
        return x


def test_evaluation_restores_buffers_and_names_those_it_wrote_to() -> None:
    model = nn.Sequential(Writer())
    before = model_state(model)
    with evaluating(model) as written:
        model(torch.ones(5))
        assert float(model[0].calls) == 1
    assert written == {"0.calls", "0.last"}
    assert differences(before, model_state(model)) == []
    with keeping_buffers([model]):
        model(torch.ones(5))
    assert differences(before, model_state(model)) == []
