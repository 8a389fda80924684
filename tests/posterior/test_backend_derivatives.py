"""Backends at work: on copies, with hooks and randomness of their own, and only on what they can hold."""

import copy
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from backend_cases import BACKENDS, BATCH, TwoLayers, data_of, mean_curvature, remembering
from backpack import extend
from backpack.context import CTX
from laplace.curvature import (
    AsdlGGN,
    AsdlHessian,
    BackPackGGN,
    CurvlinopsHessian,
)
from posterior_cases import close, loader_of, posterior_of
from torch import nn

import debiased_laplace.curvature.first_pass as first_pass
import debiased_laplace.posterior.backend_derivatives as module
from debiased_laplace.curvature.first_pass import prepare_network
from debiased_laplace.curvature.kfac import KfacSums
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import GaussNewton, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.posterior.backend_derivatives import BackendDerivatives

NAMES = [name for name in BACKENDS if not name.startswith("None")]
# asks for everything that a backend has: rows and factors, or the Hessian
EVERYTHING = {"hessian_structure": "kron", "kron_basis": "kfac"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Most of a small fit is finding out what torch.func can do with the model."""
    monkeypatch.setattr(first_pass, "find_capabilities", remembering(first_pass.find_capabilities))


def fit(model, X, y, backend, subset="all", **options):
    options = {**EVERYTHING, **BACKENDS[backend].arguments, **options}
    la = posterior_of(model, "classification", subset, prior_precision=0.4, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot compute the")
        la.fit(loader_of(X, y, BATCH))
    return la


def traces_of_use(model):
    """Everything by which a model differs from one that nobody touched."""
    return (
        {name: sorted(vars(m)) for name, m in model.named_modules()},
        {name: sorted(vars(p)) for name, p in model.named_parameters()},
        [len(hooks) for m in model.modules() for key, hooks in sorted(vars(m).items()) if key.endswith("_hooks")],
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        len(CTX.hook_handles),
        CTX.active_exts,
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("ending", ["as it should", "an exception midway"])
def test_the_users_model_is_not_touched(ending, backend, subset, monkeypatch):
    _, X, y = data_of("classification")
    model = copy.deepcopy(data_of("classification")[0]).train()
    model[2].eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    before, values = traces_of_use(model), [p.detach().clone() for p in model.parameters()]
    if ending == "as it should":
        fit(model, X, y, backend, subset)
    else:
        calls = {"n": 0}
        original = module.BackendDerivatives._asked

        def failing(self, task):
            calls["n"] += 1
            if self._right and calls["n"] > 3:
                raise RuntimeError("out of luck")
            return original(self, task)

        monkeypatch.setattr(module.BackendDerivatives, "_asked", failing)
        falls_back = backend == "AsdlHessian" and subset == "last_layer"  # torch.func, which is not out of luck
        with nullcontext() if falls_back else pytest.raises(RuntimeError, match="out of luck"):
            fit(model, X, y, backend, subset)
    assert traces_of_use(model) == before
    for p, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, torch.full_like(p, 0.3))
    parameters = dict(model.named_parameters())
    J = torch.func.jacrev(lambda q: torch.func.functional_call(model, q, (X[:2],)))(parameters)
    assert all(j.isfinite().all() for j in J.values())


def test_hooks_of_other_models_stay():
    mine = extend(nn.Linear(4, 2))
    handles = list(CTX.hook_handles)
    model, X, y = data_of("classification")
    try:
        fit(model, X, y, "BackPackGGN")
        assert CTX.hook_handles == handles
        assert len(mine._forward_hooks) == 1
    finally:
        CTX.remove_hooks()


def test_factors_after_jacobians_are_of_the_new_samples():
    # BackPACK forgets the hooks of all models after computing Jacobians, and then leaves the factors as they were
    derivatives, network, batch = at_work("BackPackGGN", "classification")
    root = GaussNewton(network.likelihood)
    assert derivatives.try_feature("rows", network, batch, None) is None
    assert derivatives.try_feature("kfac", network, batch, "expand") is None
    derivatives.rows(batch, root, root.targets_or_noise(batch.targets, 3, torch.Generator()))
    other = Batch(2 * batch.inputs, batch.targets)
    for name, (left, right) in derivatives.kfac([other], len(other)).items():
        expected = kfac_of(network, other)[name]
        close(left.trace() * right.sum(), expected.left.trace() * expected.right.sum())


def at_work(backend, likelihood, n_draws=1):
    model, X, y = data_of(likelihood)
    loss = likelihood_named(likelihood)
    chosen = BACKENDS[backend]
    root = MonteCarloGaussNewton(loss, n_draws) if chosen.kind == "Monte-Carlo GGN" else GaussNewton(loss)
    batch = Batch(X[:8], y[:8])
    network = prepare_network(ParameterSelection.all_weights(model), loss, batch)
    keys = MappingKeys("input_ids", "labels")
    return BackendDerivatives(chosen.cls, root, network, keys, of_mappings=False), network, batch


def kfac_of(network, batch):
    sums = KfacSums(network, GaussNewton(network.likelihood), "expand")
    sums.add(batch, torch.zeros(len(batch)))
    return sums.factors()


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("backend", [name for name in NAMES if "stochastic" in name])
def test_drawn_factors_are_the_ggns_on_average(backend, likelihood):
    derivatives, network, batch = at_work(backend, likelihood, 3)
    with torch.random.fork_rng():
        torch.manual_seed(21)
        assert derivatives.try_feature("kfac", network, batch, "expand") is None
        found = [derivatives.kfac([batch.first(5), batch], 13) for _ in range(120)]
    doubled = Batch(torch.cat([batch.inputs[:5], batch.inputs]), torch.cat([batch.targets[:5], batch.targets]))
    for name, expected in kfac_of(network, doubled).items():
        # the traces of the gradients' factor, and of the whole where the inputs' factor is not random
        lefts = torch.stack([f[name][0].trace() * f[name][1].sum() for f in found])
        right = expected.right.sum()
        exact = expected.left.trace() * right
        error = lefts.std() / len(lefts) ** 0.5
        assert error < 0.1 * exact  # a factor of 2, or of num_samples, would be seen
        assert abs(lefts.mean() - exact) < 4 * error
        entries = torch.stack([f[name][0] for f in found])
        spread = entries.std(0) / len(entries) ** 0.5
        scale = expected.left.trace() / entries.mean(0).trace()
        assert ((entries.mean(0) * scale - expected.left).abs() <= 5 * spread * scale).all()


@pytest.mark.parametrize("backend", [name for name in NAMES if "stochastic" in name])
def test_more_draws_scatter_less(backend):
    def scatter(n_draws):
        derivatives, network, batch = at_work(backend, "regression", n_draws)
        assert derivatives.try_feature("kfac", network, batch, "expand") is None
        found = [derivatives.kfac([batch], 8)["0.weight"][0].trace() for _ in range(60)]
        return torch.stack(found).var()

    with torch.random.fork_rng():
        torch.manual_seed(22)
        ratio = scatter(1) / scatter(16)
    assert 16 / 2.5 < ratio < 16 * 2.5  # 16 expected; F(59, 59) leaves this interval once in 1,000


@pytest.mark.parametrize("backend", [name for name in NAMES if "stochastic" in name])
def test_draws_follow_the_seed(backend):
    model, X, y = data_of("classification")
    options = {"kron_magnitudes": "kronecker"}
    torch.manual_seed(1)
    one = fit(model, X, y, backend, seed=5, **options).posterior_precision.to_dense()
    torch.manual_seed(2)
    again = fit(model, X, y, backend, seed=5, **options).posterior_precision.to_dense()
    other = fit(model, X, y, backend, seed=6, **options).posterior_precision.to_dense()
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, rtol=1e-3)


def test_drawn_rows_are_the_ggns_on_average():
    model, X, y = data_of("regression, one output")
    options = {"direction_samples": 12, "backend": BackPackGGN, "backend_kwargs": {"stochastic": True}}
    traces = []
    for seed in range(30):
        la = posterior_of(model, "regression", "last_layer", "full", seed=seed, prior_precision=0.4, **options)
        la.fit(loader_of(X, y, 24))
        P = la.posterior_precision.to_dense()
        traces.append((P - 0.4 * torch.eye(len(P), dtype=P.dtype)).trace() / len(X))
    traces = torch.stack(traces)
    exact = mean_curvature("GGN", "last_layer", "regression, one output", torch.arange(len(X))).trace()
    error = traces.std() / len(traces) ** 0.5
    assert error < 0.1 * exact
    assert abs(traces.mean() - exact) < 4 * error


@pytest.mark.parametrize("backend", ["None, stochastic", "CurvlinopsGGN, stochastic"])
def test_draws_that_chose_the_basis_are_not_its_magnitudes(backend, monkeypatch):
    redrawn = []
    original = RowCurvature.redrawn
    monkeypatch.setattr(RowCurvature, "redrawn", lambda self: redrawn.append(self) or original(self))
    model, X, y = data_of("classification")
    fit(model, X, y, backend, kron_magnitudes="kronecker")
    assert len(redrawn) == 1


@pytest.mark.parametrize("backend", NAMES)
def test_fitted_posteriors_can_be_copied_and_pickled(backend):
    model, X, y = data_of("classification")
    la = fit(model, X, y, backend, "last_layer")
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        close(other(X[:3]), la(X[:3]))
        assert other.curvature_source == la.curvature_source


@pytest.mark.parametrize("cls", [CurvlinopsHessian, AsdlHessian], ids=lambda cls: cls.__name__)
def test_hessian_that_does_not_fit_into_memory_is_left_to_products(cls, monkeypatch):
    model, X, y = data_of("classification")
    la = posterior_of(model, "classification", rank=4, solver="lanczos", backend=cls)
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match="dense Hessian of 43 parameters does not fit"):
        la.fit(loader_of(X, y, BATCH))
    assert la.curvature_source == "torch.func products"
    monkeypatch.undo()
    own = posterior_of(model, "classification", rank=4, solver="lanczos", backend=cls)
    own.fit(loader_of(X, y, BATCH))
    assert own.curvature_source == cls.__name__
    close(la.posterior_precision.to_dense(), own.posterior_precision.to_dense(), 1e-5)


def test_curvlinops_hessian_has_the_models_precision():
    # laplace-torch multiplies by a unit matrix of the default dtype
    model, X, y = data_of("classification")
    samples = torch.arange(24)
    la = posterior_of(
        model, "classification", "all", "full", backend=CurvlinopsHessian, magnitudes="same_batch", prior_precision=0.4
    )
    la.fit(loader_of(X, y, BATCH))
    values = torch.linalg.eigvalsh(mean_curvature("Hessian", "all", "classification", samples)).flip(0)
    found = la.directional_curvatures
    torch.testing.assert_close(found[:8], values[:8], rtol=1e-11, atol=0)
    assert torch.get_default_dtype() == torch.float32


def test_layer_without_curvature_is_no_reason_to_distrust_a_backend():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = TwoLayers(3).double()
    with torch.no_grad():
        model[2].weight.zero_()  # nothing reaches the first layer's gradients
    _, X, y = data_of("classification")
    la = posterior_of(model, "classification", **EVERYTHING, kron_magnitudes="kronecker", backend=AsdlGGN)
    la.fit(loader_of(X, y, BATCH))
    assert la.curvature_source == "AsdlGGN"


@pytest.mark.slow
def test_the_warning_points_to_the_users_line():
    # in a process of its own: the test run's checks of types stand between the frames
    program = (
        "import warnings, torch\n"
        "warnings.simplefilter('ignore')\n"
        "from laplace.curvature import CurvlinopsEF\n"
        "from debiased_laplace import DebiasedLaplace\n"
        "la = DebiasedLaplace(torch.nn.Sequential(torch.nn.Linear(2, 2)), 'regression', 'last_layer', "
        "backend=CurvlinopsEF, sampling='uniform')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    la.fit([(torch.randn(8, 2), torch.randn(8, 2))])\n"
        "print([(w.filename, w.lineno) for w in caught if 'CurvlinopsEF' in str(w.message)])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[('<string>', 8)]", done.stderr
