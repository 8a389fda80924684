"""laplace-torch's backends: every cell of the table against the dense oracle, and nothing of the user's is touched."""

import warnings
from collections import defaultdict

import pytest
import torch
from backend_cases import (
    BACKENDS,
    BATCH,
    CASES,
    DRAWS,
    LIKELIHOODS,
    N_DATA,
    N_DIRECTION,
    N_MAGNITUDE,
    STRUCTURES,
    data_of,
    expected_curvature,
    fixed_noise,
    indices_of,
)
from posterior_cases import close, loader_of

import debiased_laplace.curvature.survey as surveying
from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.roots import MonteCarloGaussNewton

PRIOR, SIGMA, TEMPERATURE = 0.4, 0.7, 1.3
METHODS = ("jacobians", "last_layer_jacobians", "gradients", "full", "kron")
TRIED = 7  # samples at most that a backend is tried on before it is used
CAPABILITIES = {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What torch.func can do with a model is found out once."""
    find = surveying.find_capabilities

    def found_once(selection, parameters, inputs):
        key = (selection.description, id(selection.model))
        if key not in CAPABILITIES:
            CAPABILITIES[key] = (selection.model, find(selection, parameters, inputs))
        return CAPABILITIES[key][1]

    monkeypatch.setattr(surveying, "find_capabilities", found_once)


@pytest.fixture
def known_draws(monkeypatch):
    """The house's draws are what the oracle says, the backends' are replaced by their expectation."""
    monkeypatch.setattr(MonteCarloGaussNewton, "side", lambda self, targets, C, generator: fixed_noise(targets))


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
    return DebiasedLaplace(
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


@pytest.mark.parametrize("cell", CASES, ids=", ".join)
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
