"""laplace-torch's backends: every cell of the table against the dense oracle, and nothing of the user's is touched."""

import copy
import runpy
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from backend_cases import (
    ARCHITECTURES,
    BACKENDS,
    BATCH,
    CASES,
    DRAWS,
    LIKELIHOODS,
    N_DATA,
    N_DIRECTION,
    N_MAGNITUDE,
    OWN_FACTORS,
    OWN_ROWS,
    STRUCTURES,
    architecture,
    data_of,
    expected_curvature,
    fixed_noise,
    indices_of,
    remembering,
)
from laplace import marglik_training
from laplace.curvature import AsdlEF, AsdlGGN, AsdlHessian, BackPackEF, BackPackGGN, CurvlinopsGGN
from laplace.curvature.curvlinops import CurvlinopsInterface
from posterior_cases import close, loader_of, posterior_of
from torch import nn

import debiased_laplace.curvature.first_pass as first_pass
from debiased_laplace.curvature.roots import MonteCarloGaussNewton
from debiased_laplace.posterior.backend_derivatives import BackendDerivatives
from debiased_laplace.posterior.backends import BackendChoice

PRIOR, SIGMA, TEMPERATURE = 0.4, 0.7, 1.3
METHODS = ("jacobians", "last_layer_jacobians", "gradients", "full", "kron")
TRIED = 7  # samples at most that a backend is tried on before it is used


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Most of a small fit is finding out what torch.func can do with the model."""
    monkeypatch.setattr(first_pass, "find_capabilities", remembering(first_pass.find_capabilities))


@pytest.fixture
def known_draws(monkeypatch):
    """The house's draws are what the oracle says, the backends' are replaced by their expectation."""
    monkeypatch.setattr(
        MonteCarloGaussNewton, "targets_or_noise", lambda self, targets, C, generator: fixed_noise(targets)
    )


def spied(monkeypatch, cls):
    """The samples that each method of a backend sees, by method."""
    seen = defaultdict(set)

    def spy(name, method):
        def spying(self, x, *args, **kwargs):
            seen[name] |= {tuple(row.flatten().tolist()) for row in x}
            if name != "kron" or not getattr(self, "stochastic", False):
                return method(self, x, *args, **kwargs)
            self.stochastic = False
            assert kwargs.pop("mc_samples", DRAWS) == DRAWS
            try:
                return method(self, x, *args, **kwargs)
            finally:
                self.stochastic = True

        return spying

    for name in METHODS if cls is not None else ():
        monkeypatch.setattr(cls, name, spy(name, getattr(cls, name)))
    return seen


def posterior(backend, structure, subset, likelihood, **options):
    model = data_of(likelihood)[0]
    kind = LIKELIHOODS[likelihood][0]
    return posterior_of(
        model,
        kind,
        subset,
        **STRUCTURES[structure],
        **BACKENDS[backend].arguments,
        subnetwork_indices=indices_of(subset, likelihood) if subset == "subnetwork" else None,
        direction_samples=N_DIRECTION,
        magnitude_samples=N_MAGNITUDE,
        prior_precision=PRIOR,
        sigma_noise=SIGMA if kind == "regression" else 1.0,
        temperature=TEMPERATURE,
        **options,
    )


def marked(cell):
    """The cells that other cells stand for where the clock counts: all of them take more than a minute."""
    backend, structure, subset, likelihood = cell
    seldom = likelihood in ("regression, one output", "reward modeling") and backend not in ("None", "CurvlinopsGGN")
    seldom |= structure == "full" and ("stochastic" in backend or "EF" in backend)
    seldom |= likelihood == "regression" and subset != "all" and backend not in ("None", "CurvlinopsGGN")
    return pytest.param(cell, id=", ".join(cell), marks=[pytest.mark.slow] * seldom)


@pytest.mark.parametrize("cell", [marked(cell) for cell in CASES])
def test_cell_is_computed_by_whom_the_table_says_and_is_right(cell, monkeypatch, known_draws):
    backend, _, _, likelihood = cell
    who, cls = CASES[cell], BACKENDS[backend].cls
    _, X, y = data_of(likelihood)
    seen = spied(monkeypatch, cls)
    la = posterior(*cell)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.fit(loader_of(X, y, BATCH), n_data=N_DATA)
    said = [str(w.message) for w in caught if "torch.jit" not in str(w.message)]
    assert len(said) == len(who.reasons), said
    for reason, message in zip(who.reasons, said, strict=True):
        assert message.startswith(f"{cls.__name__} cannot compute")
        assert reason in message
        assert "torch.func computes the same instead" in message

    used = {name for name, rows in seen.items() if len(rows) == N_DIRECTION + N_MAGNITUDE}
    assert used == set(who.methods)
    assert all(len(rows) <= TRIED for name, rows in seen.items() if name not in used)
    assert ("torch.func" in la.curvature_source) == who.torch_func
    assert (cls is not None and cls.__name__ in la.curvature_source) == bool(who.methods)

    a, b = la.split.direction_indices, la.split.magnitude_indices
    H = expected_curvature(*cell, a, b)
    tau = 1 / ((SIGMA if y.is_floating_point() else 1) ** 2 * TEMPERATURE)
    expected = N_DATA * tau * H + PRIOR * torch.eye(len(H), dtype=H.dtype)
    close(la.posterior_precision.to_dense(), expected)
    assert float((N_DATA * tau * H).abs().max()) > PRIOR / 10  # the curvature is not lost in the prior

    seen.clear()
    la(X[:2, 0] if likelihood == "reward modeling" else X[:2])
    assert not seen


def of_architecture(name, backend, **options):
    model, X, y = architecture(name)
    options = {"kron_basis": "kfac", **BACKENDS[backend].arguments, **options}
    la = posterior_of(model, "classification", "all", "kron", temperature=TEMPERATURE, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.fit(loader_of(X, y, BATCH))
    return la, [str(w.message) for w in caught if "torch.jit" not in str(w.message)]


@cache
def without_backend(name, kind):
    """The posterior precision of a kind of curvature where torch.func computes everything."""
    backend = next(backend for backend, of in BACKENDS.items() if of.kind == kind and of.cls is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackendDerivatives, "try_feature", lambda *_: "it is not asked")
        la, _ = of_architecture(name, backend)
    assert "torch.func" in la.curvature_source
    assert BACKENDS[backend].cls.__name__ not in la.curvature_source
    return la.posterior_precision.to_dense()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith("None")])
def test_architecture_is_computed_by_the_backend_only_where_it_is_right(backend, name):
    kind, cls = BACKENDS[backend].kind, BACKENDS[backend].cls
    la, said = of_architecture(name, backend)
    tried = {
        "Jacobians or gradients": kind in ("GGN", "EF") and backend not in OWN_ROWS[name],
        "Hessian": kind == "Hessian" and backend not in OWN_ROWS[name],
        "Kronecker factors": kind != "Hessian" and backend not in OWN_FACTORS[name],
    }
    expected = [what for what, failed in tried.items() if failed]
    assert [message.split("cannot compute the ")[1].split(" of this model")[0] for message in said] == expected
    own = [backend in OWN_ROWS[name], *[backend in OWN_FACTORS[name]] * (kind != "Hessian")]
    assert (cls.__name__ in la.curvature_source) == any(own)
    assert ("torch.func" in la.curvature_source) == (not all(own))

    if kind != "Monte-Carlo GGN":  # whose factors are drawn anew by whoever computes
        tolerance = 1e-3 if "single" in name else 1e-6
        close(la.posterior_precision.to_dense(), without_backend(name, kind), tolerance)


def test_reduced_kfac_is_curvlinops_own_and_what_the_others_cannot():
    la, said = of_architecture("sequences", "CurvlinopsGGN", kfac_approx="reduce")
    without, _ = of_architecture("sequences", "None", kfac_approx="reduce")
    expanded, _ = of_architecture("sequences", "None")
    assert la.curvature_source == "CurvlinopsGGN"
    assert not said
    close(la.posterior_precision.to_dense(), without.posterior_precision.to_dense())
    assert not torch.allclose(la.posterior_precision.to_dense(), expanded.posterior_precision.to_dense())
    for backend in ("BackPackGGN", "AsdlGGN"):
        la, said = of_architecture("ReLU", backend, kfac_approx="reduce", kron_magnitudes="kronecker")
        assert "it has no kfac_approx='reduce'" in said[0]
        assert la.curvature_source == "torch.func rows"


class AsdfghjklGGN(CurvlinopsGGN):
    """A name that laplace-torch has for a package that is not on the package index."""


REFUSED = {
    "a name": ("CurvlinopsGGN", None, "one of laplace-torch's classes CurvlinopsGGN, .*; got 'CurvlinopsGGN'"),
    "an instance": (
        CurvlinopsGGN(nn.Linear(2, 2), "classification"),
        None,
        "one of laplace-torch's classes CurvlinopsGGN, .*; got <.*CurvlinopsGGN object",
    ),
    "another class": (nn.Linear, None, "one of laplace-torch's classes CurvlinopsGGN"),
    "a class that says no curvature": (CurvlinopsInterface, None, "one of CurvlinopsGGN, .* says no curvature"),
    "the old package": (AsdfghjklGGN, None, "not on the package index; expected one of CurvlinopsGGN"),
    "options that are no mapping": (CurvlinopsGGN, [("stochastic", True)], "backend_kwargs as a mapping"),
    "last_layer": (CurvlinopsGGN, {"last_layer": True}, r"got \['last_layer'\].*follow from subset_of_weights"),
    "an option of another backend": (AsdlGGN, {"low_rank": 3}, r"'stochastic' and 'num_samples'; got \['low_rank'\]"),
    "stochastic as a word": (CurvlinopsGGN, {"stochastic": "yes"}, "stochastic as True or False; got 'yes'"),
    "stochastic empirical Fisher": (
        BackPackEF,
        {"stochastic": True},
        "BackPackEF computes the EF. Expected them with CurvlinopsGGN, BackPackGGN, AsdlGGN or backend=None",
    ),
    "stochastic Hessian": (AsdlHessian, {"stochastic": True}, "AsdlHessian computes the Hessian. Expected them with"),
    "draws of an empirical Fisher": (AsdlEF, {"num_samples": 2}, "AsdlEF computes the EF. Expected them with"),
    "draws without stochastic": (CurvlinopsGGN, {"num_samples": 2}, "num_samples is of stochastic=True"),
    "no draws": (CurvlinopsGGN, {"stochastic": True, "num_samples": 0}, "at least 1; got 0"),
    "fewer than no draws": (None, {"stochastic": True, "num_samples": -1}, "at least 1; got -1"),
    "half a draw": (None, {"stochastic": True, "num_samples": 1.5}, "num_samples must be an integer; got 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    backend, kwargs, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        BackendChoice.of(backend, kwargs)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN, BackPackGGN], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("likelihood", ["classification", "regression, one output"])
def test_training_by_marginal_likelihood(likelihood, structure, backend):
    """laplace-torch's training hands no other options on: of whatever the defaults are, this has to come out."""
    model, X, y = data_of(likelihood)
    model = copy.deepcopy(model)
    la, _, margliks, _ = marglik_training(
        model,
        loader_of(X, y, 12),
        LIKELIHOODS[likelihood][0],
        f"debiased_{structure}",
        backend=backend,
        n_epochs=2,
        n_hypersteps=5,
        lr_hyp=0.02,
        prior_prec_init=PRIOR,
        sigma_noise_init=SIGMA,
    )
    # drawn rows are computed by torch.func, whatever the backend
    assert la.curvature_source == "torch.func rows"
    assert len(margliks) == 10
    assert margliks[4] < margliks[0]  # negative log marginal likelihoods, within one fit
    assert margliks[9] < margliks[5]
    assert la.prior_precision.shape == (4,)  # layerwise
    assert not torch.allclose(la.prior_precision, torch.full((4,), PRIOR, dtype=torch.float64))
    assert la.posterior_precision.to_dense().isfinite().all()


def test_page_is_generated_from_these_cases():
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "backend_table.py"))
    assert script["PAGE"].read_text() == script["text"]()
