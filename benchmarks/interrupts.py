"""Whether Ctrl-C or a second thread ever leaves a model or the process other than it was found.

    python -m benchmarks.interrupts --n 500              interrupts of fits, predictions, Newton steps and diagnoses
    python -m benchmarks.interrupts --threads 24         two fits at once, of two models and of one

An interrupt is a `KeyboardInterrupt`: raised at a random exchange of a parameter by torch, as a random context is
entered or left, by a signal at a random time, or by another thread at a random time. Each hits a random call on a fresh
model; tensors, contents, gradients, hooks and modes of every module, the posterior, the optimizer and the switches of
the process are compared with what they were.
"""

import argparse
import ctypes
import itertools
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import _named_member_accessor
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", message="`torch.jit.script")
from laplace import Laplace
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from debiased_laplace import (
    DebiasedLaplace,
    DebiasedNewton,
    diagnose,
    directional_derivatives,
    evaluate,
    newton_step,
)

KINDS = ("exchange", "context", "signal", "thread")
DATA_SIZE = 24
_KEPT = ("_precision", "_fit")  # by a prediction, which may have ended before another one is interrupted


class Attention(nn.Module):
    """A transformer layer between two linear ones, with dropout, and a batch normalization and a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.normalize = nn.BatchNorm1d(3)
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.layer(self.normalize(self.embed(x))).mean(1))


@dataclass(frozen=True)
class Setting:
    """A fresh model in training mode, data, and posteriors that were fitted to it."""

    model: nn.Module
    data: TensorDataset
    fitted: Any
    of_laplace_torch: Any
    newton: DebiasedNewton

    @classmethod
    def fresh(cls, seed: int) -> "Setting":
        """Make one, by seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Attention()
            model.head.register_forward_hook(lambda module, arguments, output: None)  # noqa: ARG005
            data = TensorDataset(torch.randn(DATA_SIZE, 3, 4), torch.randint(3, (DATA_SIZE,)))
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            fitted = DebiasedLaplace(model, "classification", prior_precision=3.0, complement="none", rank=5)
            fitted.fit(DataLoader(data, 8))
            other = Laplace(model.eval(), "classification", hessian_structure="diag", prior_precision=3.0)
            other.fit(DataLoader(data, 8))
            model.train()
        newton = DebiasedNewton(model.parameters(), model, "classification", max_iterations=3)
        return cls(model, data, fitted, other, newton)

    def state(self) -> dict[str, Any]:
        """Everything that should be as found: of the model, the posterior and the optimizer."""
        optimizer = {f"state of the optimizer: {i}": str(s) for i, s in enumerate(self.newton.state.values())}
        posterior = {f"posterior: {k}": id(v) for k, v in vars(self.fitted).items() if k not in _KEPT}
        return {**model_state(self.model), **optimizer, **posterior}

    def loader(self) -> DataLoader:
        """Return a loader of all samples."""
        return DataLoader(self.data, 8, shuffle=True)


def _fit(s: Setting) -> None:
    la = DebiasedLaplace(s.model, "classification", prior_precision=3.0)
    la.fit(s.loader())


def _fit_last_layer(s: Setting) -> None:
    la = DebiasedLaplace(s.model, "classification", "last_layer", "kron", prior_precision=3.0)
    la.fit(s.loader())


def _predict(s: Setting) -> None:
    X = s.data.tensors[0]
    s.fitted(X)
    # of its own: otherwise a prediction that has ended has drawn from torch's
    generator = torch.Generator().manual_seed(0)
    s.fitted(X, pred_type="nn", link_approx="mc", n_samples=6, generator=generator)


def _tune(s: Setting) -> None:
    s.fitted.optimize_prior_precision(method="gridsearch", val_loader=s.loader(), grid_size=3)


def _set_prior(s: Setting) -> None:
    la = DebiasedLaplace(s.model, "classification", prior_precision=3.0, rank=5)
    la.fit(s.loader())
    # fits again, with a complement that allows one precision per parameter
    la.prior_precision = torch.linspace(1, 2, la.n_params)


def _evaluate(s: Setting) -> None:
    methods = {"debiased": s.fitted, "diagonal": s.of_laplace_torch}
    evaluate(methods, s.loader(), task="multiclass", pred_type="nn", n_samples=6, n_resamples=10)


def _diagnose(s: Setting) -> None:
    diagnose(s.model, "classification", s.loader(), batch_sizes=[6], n_draws=1)


def _derive(s: Setting) -> None:
    U = torch.ones(sum(p.numel() for p in s.model.parameters()), 1)
    directional_derivatives(s.model, "classification", s.loader(), U, curvature="hessian")


OPERATIONS: dict[str, Callable[[Setting], None]] = {
    "fit": _fit,
    "fit, last layer": _fit_last_layer,
    "predict": _predict,
    "optimize_prior_precision": _tune,
    "prior_precision": _set_prior,
    "evaluate": _evaluate,
    "newton_step": lambda s: newton_step(s.model, "classification", s.data.tensors, max_iterations=3) and None,
    "DebiasedNewton.step": lambda s: s.newton.step(lambda: s.data.tensors) and None,
    "diagnose": _diagnose,
    "directional_derivatives": _derive,
}


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that should be as found; tensors by identity, memory, contents and gradient."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for kind, entries in vars(module).items():
            if isinstance(entries, dict):
                state[f"{name}: {kind}"] = {key: id(entry) for key, entry in entries.items()}
        state[f"{name}: attributes"] = sorted(vars(module))
        state[f"{name}: training"] = module.training
    for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
        try:
            state[f"contents of {name}"] = t.data_ptr(), t.requires_grad, id(t.grad), t.detach().clone().tolist()
        except RuntimeError as error:  # without storage
            state[f"contents of {name}"] = str(error)
    return state


def process_state() -> dict[str, Any]:
    """The switches of the process and of this thread that differentiation and drawing touch."""
    cuda, functorch = torch.backends.cuda, torch._C._functorch
    return {
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "cuDNN": torch.backends.cudnn.enabled,
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "cuDNN attention": cuda.cudnn_sdp_enabled(),
        "warnings": (id(warnings.filters), list(warnings.filters), warnings.showwarning),
        "random numbers": (
            torch.get_rng_state().sum().item(),
            torch.get_rng_state().tolist()[:64],
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            np.random.get_state()[2],  # noqa: NPY002
        ),
        "depth of functorch": functorch.get_dynamic_layer_stack_depth(),
        "nesting of jvp": eager_transforms.JVP_NESTING,
        "level of forward mode": forward_ad._current_level,
        "forward mode": torch._C._is_fwd_grad_enabled(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "hooks of saved tensors": torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        "default dtype": torch.get_default_dtype(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "function modes": torch._C._len_torch_function_stack(),
        "tracing": (dict(vars(_is_tracing)), nn.Module.__call__, nn.Module.__getattr__),
        "other globals of torch": _globals_of_torch(),
    }


# per thread in newer versions of torch
_is_tracing = getattr(_symbolic_trace, "_is_fx_tracing_tls", None) or threading.local()
_NOISY = ("_count", "next_id", "counter", "_cache", "_ids", "cnt")


def _globals_of_torch() -> dict[str, Any]:
    """Plain values in torch's own modules, by name; counters excepted."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "torch" or module is None:
            continue
        for key, value in list(vars(module).items()):
            # by type: isinstance asks torch's deprecated names, which warn
            plain = type(value) in (bool, int, str, type(None))
            if plain and not key.startswith("__") and not key.lower().endswith(_NOISY):
                found[f"{name}.{key}"] = value
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the entries that differ; what a module imported meanwhile brings is none."""
    found = [key for key in before if key != "other globals of torch" and before[key] != after.get(key)]
    name = "other globals of torch"
    if name in before:
        old, new = before[name], after[name]
        found += [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if key in new and old[key] != new[key]]
    return found + [key for key in after if key not in before]


@contextmanager
def exchanges(at: int | None = None) -> Iterator[list[int]]:
    """Count torch's exchanges of parameters, and interrupt one of them halfway."""
    original, n = _named_member_accessor.swap_tensor, [0]

    def swap(module: nn.Module, name: str, *rest: Any, **options: Any) -> Tensor:
        n[0] += 1
        before = original(module, name, *rest, **options)
        if n[0] == at:
            raise KeyboardInterrupt
        return before

    _named_member_accessor.swap_tensor = swap
    try:
        yield n
    finally:
        _named_member_accessor.swap_tensor = original


@contextmanager
def contexts(at: int | None = None) -> Iterator[list[int]]:
    """Count contexts that are entered or left, and interrupt one before it does anything."""
    n = [0]

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name in ("__enter__", "__exit__"):
            n[0] += 1
            if n[0] == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(called)
    try:
        yield n
    finally:
        sys.setprofile(None)


def _by_signal(work: Callable[[], None], after: float) -> bool:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def _by_thread(work: Callable[[], None], after: float) -> bool:
    target, over, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def interrupt() -> None:
        if not over.wait(after):
            with lock:
                if not over.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(target), ctypes.py_object(KeyboardInterrupt)
                    )

    timer = threading.Thread(target=interrupt)
    try:
        # the first interrupts come before it returns
        timer.start()
        work()
        with lock:
            over.set()
    except KeyboardInterrupt:
        return True
    finally:
        over.set()
        timer.join()
    return False


@dataclass(frozen=True)
class Cost:
    """Time, exchanges of parameters and contexts of an operation that nothing interrupts."""

    seconds: float
    exchanges: int
    contexts: int


def cost_of(operation: str) -> Cost:
    """Measure an operation twice, the first time to load what torch loads on first use."""
    for _ in range(2):
        setting = Setting.fresh(0)
        started = time.perf_counter()
        OPERATIONS[operation](setting)
        seconds = time.perf_counter() - started
    setting = Setting.fresh(0)
    with exchanges() as n_exchanges, contexts() as n_contexts:
        OPERATIONS[operation](setting)
    return Cost(seconds, n_exchanges[0], n_contexts[0])


def interrupt_once(operation: str, kind: str, cost: Cost, seed: int) -> tuple[bool, list[str]]:
    """Interrupt an operation at random.

    Returns:
        Whether it was interrupted before it ended, and what is not as found.
    """
    # outside, where no interrupt hits: it is the caller's mode that should be as found
    with torch.set_grad_enabled(bool(seed % 3)):
        return _interrupted(operation, kind, cost, seed)


def _interrupted(operation: str, kind: str, cost: Cost, seed: int) -> tuple[bool, list[str]]:
    draw = random.Random(seed)
    setting = Setting.fresh(seed)
    before, process = setting.state(), process_state()

    def work() -> None:
        OPERATIONS[operation](setting)

    if kind in ("exchange", "context"):
        interrupted = False
        n, count = (cost.exchanges, exchanges) if kind == "exchange" else (cost.contexts, contexts)
        try:
            with count(draw.randint(1, n)):
                work()
        except KeyboardInterrupt:
            interrupted = True
    else:
        interrupted = {"signal": _by_signal, "thread": _by_thread}[kind](work, draw.uniform(0, cost.seconds))
    found = differences(process, process_state())
    # a step that ended before the interrupt has moved the weights
    if interrupted:
        found += differences(before, setting.state())
    return interrupted, found


def interrupts(n: int, seed: int) -> Iterator[tuple[str, str, bool, list[str]]]:
    """Interrupt operations by random kinds, until n were interrupted before they ended."""
    draw = random.Random(seed)
    costs = {operation: cost_of(operation) for operation in OPERATIONS}
    while n > 0:
        operation, kind = draw.choice(list(OPERATIONS)), draw.choice(KINDS)
        interrupted, found = interrupt_once(operation, kind, costs[operation], draw.randrange(2**31))
        n -= interrupted
        yield operation, kind, interrupted, found


def two_fits(*, shared: bool, seed: int) -> tuple[list[str], list[str]]:
    """Fit in two threads at once.

    Returns:
        What is not as found, and the errors of the fits.
    """
    settings = [Setting.fresh(seed)] * 2 if shared else [Setting.fresh(seed), Setting.fresh(seed + 1)]
    before, process = [model_state(s.model) for s in settings], process_state()
    barrier, errors = threading.Barrier(2), []

    def work(setting: Setting) -> None:
        try:
            barrier.wait()
            _fit(setting)
        except Exception as error:  # reported
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

    threads = [threading.Thread(target=work, args=(setting,)) for setting in settings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = differences(process, process_state())
    for state, setting in zip(before, settings, strict=True):
        found += differences(state, model_state(setting.model))
    return found, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="interrupts")
    parser.add_argument("--threads", type=int, default=0, help="trials of two fits at once, instead of interrupts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.threads:
        changed, refused = 0, Counter()
        for i in range(options.threads):
            found, errors = two_fits(shared=bool(i % 2), seed=options.seed + i)
            changed += bool(found)
            refused.update(errors)
            if found:
                print(f"{'one model' if i % 2 else 'two models'}: {'; '.join(found)[:300]}", flush=True)
        print(f"{changed} of {options.threads} trials changed a model or the process")
        for error, count in refused.items():
            print(f"{count} fits refused: {error}")
        return
    n_trials, done, damaged = 0, Counter(), Counter()
    for operation, kind, interrupted, found in interrupts(options.n, options.seed):
        n_trials += 1
        done[operation, kind] += interrupted
        if found:
            damaged[operation, kind] += 1
            print(f"{operation}, {kind}: {'; '.join(found)[:400]}", flush=True)
    for key in sorted(done):
        print(f"{key[0]:>26}  {key[1]:>9}  {done[key]:4} interrupted  {damaged[key]:3} not as found")
    print(f"{damaged.total()} of {n_trials} not as found; {done.total()} were interrupted before they ended")


if __name__ == "__main__":
    main()
