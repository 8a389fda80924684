"""Cross-fitting and the Kronecker complement from fit to checkpoint, against the same computed densely."""

import copy
import io
from functools import cache

import pytest
import torch
from models import MODELS, targets
from oracles import (
    dense_cross_fitted_posterior,
    dense_kronecker_basis,
    dense_log_likelihood,
    dense_log_marginal_likelihood,
    flat_parameters,
    mean_of,
)
from posterior_cases import PRIOR, close, hyper_parameters, mean_field, posterior_of
from subset_cases import check_basis, jacobians, positions, problem, selected_shapes
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace.errors import RepeatedSamplesError

MAGNITUDES = ["held_out", "cross_fitted", "same_batch"]
COMPLEMENTS = ["none", "isotropic", "diagonal", "kron"]
LOW_RANK = {
    **{f"lowrank, kron complement, {m}": ("lowrank", {"complement": "kron", "magnitudes": m}) for m in MAGNITUDES},
    **{
        f"lowrank, {c} complement, cross_fitted": ("lowrank", {"complement": c, "magnitudes": "cross_fitted"})
        for c in ("none", "isotropic", "diagonal")
    },
    "lowrank of rank 4, kron complement in K-FAC's basis": (
        "lowrank",
        {"complement": "kron", "magnitudes": "cross_fitted", "rank": 4, "kron_basis": "kfac"},
    ),
}
STRUCTURES = {
    **LOW_RANK,
    **{
        f"kron, {m} magnitudes in the basis of {b}": (
            "kron",
            {"magnitudes": "cross_fitted", "kron_magnitudes": m, "kron_basis": b},
        )
        for m in ("exact", "kronecker")
        for b in ("row_matrices", "kfac")
    },
    "full": ("full", {"magnitudes": "cross_fitted"}),
}
# subset, model, likelihood, outputs: models take turns over frozen weights, raw parameters and reused modules
WHERE = [
    ("all", "partly frozen", "classification", 3),
    ("last_layer", "LayerNorm and raw parameters", "regression", 2),
    ("subnetwork", "reused module", "classification", 3),
    ("all", "LayerNorm and raw parameters", "regression", 1),
]
CASES = {
    f"{structure}; {subset} of {name}, {likelihood}": (structure, (subset, name, likelihood, n_outputs))
    for structure in STRUCTURES
    for subset, name, likelihood, n_outputs in WHERE
}
every_case = pytest.mark.parametrize("case", CASES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def unfitted(case: str, **changed: object):
    structure, (subset, name, likelihood, n_outputs) = CASES[case]
    kind, options = STRUCTURES[structure]
    model = problem(name, likelihood, n_outputs)[0]
    if subset == "subnetwork":
        changed["subnetwork_indices"] = positions(name, model, subset)
    options = {**hyper_parameters(likelihood), "n_folds": 5, **options, **changed}
    return posterior_of(model, likelihood, subset, kind, **options)


@cache
def fitted(case: str):
    """A posterior of the first 24 of 40 samples, and all samples; nobody writes to them."""
    _, (_, name, likelihood, n_outputs) = CASES[case]
    _, X, y, _ = problem(name, likelihood, n_outputs)
    la, data = unfitted(case), TensorDataset(X, y)
    la.fit(DataLoader(Subset(data, range(24)), batch_size=8, shuffle=True), n_data=40)
    return la, data


def selected(case: str) -> Tensor:
    _, (subset, name, likelihood, n_outputs) = CASES[case]
    return positions(name, problem(name, likelihood, n_outputs)[0], subset)


@every_case
def test_everything_is_that_of_one_precision_matrix(case: str) -> None:
    la, data = fitted(case)
    structure, (_, name, likelihood, n_outputs) = CASES[case]
    at = selected(case)
    precision = la.posterior_precision.to_dense()
    covariance = torch.linalg.inv(precision)
    P = len(at)
    assert precision.shape == (P, P)
    A = la.posterior_precision.root(torch.eye(P, dtype=torch.float64)).T
    close(A @ A.T, covariance)
    J = jacobians(name, n_outputs)[..., at]
    X, y = data.tensors
    f, variance = la.model(X[:5]).detach(), J @ covariance @ J.mT
    if likelihood == "regression":
        close(la(X[:5])[0], f)
        close(la(X[:5])[1], variance)
    else:
        shrunk = f / (1 + torch.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
        close(la(X[:5], link_approx="probit"), torch.softmax(shrunk, -1))
        close(la(X[:5]), mean_field(f, variance))
    used = la.split.used_indices
    scales = {"sigma_noise": float(la.sigma_noise), "temperature": la.temperature}
    log_likelihood = dense_log_likelihood(la.model, X[used], y[used], likelihood, n_data=40, **scales)
    evidence = dense_log_marginal_likelihood(log_likelihood, precision, PRIOR, flat_parameters(la.model)[at])
    close(la.log_marginal_likelihood(), evidence, 1e-9)
    curvatures = la.directional_curvatures
    assert bool((curvatures >= 0).all())
    if STRUCTURES[structure][0] == "kron":
        return
    U = la.directions
    close(U.T @ U, torch.eye(len(curvatures), dtype=torch.float64))
    # along the directions: the eigenvectors' own values are those of the direction samples
    of_all = [H[at][:, at] for H in problem(name, likelihood, n_outputs)[3]]
    H_a = mean_of(of_all, la.split.direction_indices)
    close((U * (H_a @ U)).sum(0), la.in_sample_curvatures)


@every_case
def test_the_curvature_is_what_the_estimate_says(case: str) -> None:
    la, _ = fitted(case)
    structure, (subset, name, likelihood, n_outputs) = CASES[case]
    kind, options = STRUCTURES[structure]
    at = selected(case)
    of_all = [H[at][:, at] for H in problem(name, likelihood, n_outputs)[3]]
    model = la.model
    a = la.split.direction_indices
    basis = la.posterior_precision.basis
    assert (basis is not None) == ("kron" in (kind, options.get("complement")))
    if basis is not None and options.get("kron_basis") != "kfac":
        check_basis(basis.to_dense(), mean_of(of_all, a), selected_shapes(model, at))
    if kind == "kron" or options["magnitudes"] != "cross_fitted":
        return
    if options.get("complement") == "kron":
        scale = 40 / (float(la.sigma_noise) ** 2 * la.temperature)
        D = (la.posterior_precision.diagonal - PRIOR) / scale
        assert bool((D >= -1e-12).all())
        U, m = la.directions, la.directional_curvatures
        K = basis.to_dense()
        close(
            la.posterior_precision.to_dense(),
            scale * (K @ torch.diag(D) @ K.T + (U * m) @ U.T) + PRIOR * torch.eye(len(at)).double(),
        )
        if subset != "all" or name != "partly frozen" or "kron_basis" in options:
            return
    expected = dense_cross_fitted_posterior(
        of_all, a, la.split.folds, n_data=40, prior_precision=PRIOR,
        sigma_noise=float(la.sigma_noise), temperature=la.temperature,
        complement="isotropic" if kind == "full" else options["complement"],
        threshold=1e-10 if kind == "full" else 1e-6,
        basis_of=(lambda H: dense_kronecker_basis(model, H)) if options.get("complement") == "kron" else None,
    )  # fmt: skip
    close(la.directional_curvatures, expected.magnitudes, 1e-6)
    close(la.posterior_precision.to_dense(), expected.posterior_precision, 1e-6)
    close(la.standard_errors, expected.standard_errors, 1e-5)


@every_case
def test_state_and_what_it_says(case: str) -> None:
    la, data = fitted(case)
    state = la.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = unfitted(case, prior_precision=3.0, n_folds=3, seed=9)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key], key
    assert torch.equal(loaded.posterior_precision.to_dense(), la.posterior_precision.to_dense())
    if la.split.folds is None:
        assert loaded.split.folds is None
    else:
        assert torch.equal(loaded.split.folds, la.split.folds)
        assert la.split.folds.bincount().tolist() == [5, 5, 5, 5, 4]
    for found, wanted in zip(loaded(data.tensors[0][:3]), la(data.tensors[0][:3]), strict=True):
        assert torch.equal(found, wanted)
    assert repr(loaded) == repr(la)
    loaders = DataLoader(Subset(data, range(24, 31)), batch_size=4), DataLoader(Subset(data, range(24)), batch_size=8)
    first, second = la.held_out_kl(*loaders), loaded.held_out_kl(*loaders)
    assert (first - second).value == pytest.approx(0, abs=1e-8 * abs(first.value))
    # densely
    _, (_, name, likelihood, n_outputs) = CASES[case]
    at = selected(case)
    precision = la.posterior_precision.to_dense()
    covariance, tau = torch.linalg.inv(precision), 40 / (float(la.sigma_noise) ** 2 * la.temperature)
    terms = torch.stack([torch.trace(covariance @ H[at][:, at]) for H in problem(name, likelihood, n_outputs)[3]])
    traces = tau * (0.6 * terms[:24].mean() + 0.4 * terms[24:31].mean()) + PRIOR * torch.trace(covariance)
    assert first.value == pytest.approx(float(0.5 * (traces + torch.linalg.slogdet(precision)[1])), rel=1e-7)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("structure", LOW_RANK)
def test_tuning_the_prior(structure: str) -> None:
    case = next(c for c in CASES if c.startswith(structure))
    la = copy.copy(fitted(case)[0])
    before = float(la.log_marginal_likelihood(torch.tensor(6.0)))
    kron = la.posterior_precision.basis is not None
    n_entries = {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}
    for prior_structure, n in n_entries.items():
        la.prior_precision = PRIOR
        if prior_structure == "diag" and kron:
            with pytest.raises(ValueError, match=r"Kronecker posterior or complement .* one per parameter tensor"):
                la.optimize_prior_precision(n_steps=5, prior_structure="diag", init_prior_prec=6.0)
            assert la.prior_precision.tolist() == pytest.approx([PRIOR])
            continue
        la.optimize_prior_precision(n_steps=8, prior_structure=prior_structure, init_prior_prec=6.0)
        assert la.prior_precision.numel() == n
        assert float(la.log_marginal_likelihood()) > before + 0.05
    X, y = (t[24:] for t in fitted(case)[1].tensors)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=[(X, y)], grid_size=3, log_prior_prec_min=-2.0, log_prior_prec_max=2.0
    )
    assert float(la.prior_precision) in [pytest.approx(v) for v in (1e-2, 1.0, 1e2)]


def test_a_prior_for_every_parameter_tensor_enters_block_by_block() -> None:
    case = next(c for c in CASES if c.startswith("lowrank, kron complement, cross_fitted; all of partly frozen"))
    la = copy.copy(fitted(case)[0])
    before = la.posterior_precision.to_dense() - PRIOR * torch.eye(la.n_params, dtype=torch.float64)
    prior = torch.linspace(0.3, 2.0, la.n_layers, dtype=torch.float64)
    la.prior_precision = prior
    sizes = torch.tensor([n for n, _ in selected_shapes(la.model, selected(case))])
    close(la.posterior_precision.to_dense(), before + torch.diag(prior.repeat_interleave(sizes)))
    with pytest.raises(ValueError, match="one per parameter tensor"):
        la.prior_precision = torch.ones(la.n_params)


@pytest.mark.parametrize(
    ("kind", "options"), [("lowrank", {"complement": c}) for c in COMPLEMENTS] + [("kron", {}), ("full", {})]
)
@pytest.mark.parametrize("name", ["partly frozen", "reused module"])
def test_of_all_the_data_every_estimate_but_the_split_is_the_full_batch(name: str, kind: str, options: dict) -> None:
    model, X, y, of_all = problem(name, "classification", 3)
    found = {}
    for magnitudes in ("cross_fitted", "same_batch"):
        la = posterior_of(
            model, "classification", "all", kind, magnitudes=magnitudes, **options, **hyper_parameters("classification")
        )
        la.fit(DataLoader(TensorDataset(X, y), batch_size=9, shuffle=True))
        found[magnitudes] = la.posterior_precision.to_dense()
        assert not la.standard_errors.any()
        close(la.directional_curvatures, la.in_sample_curvatures)
    close(found["cross_fitted"], found["same_batch"])
    if kind != "kron":
        H = mean_of(of_all, torch.arange(40))
        full = 40 / la.temperature * H + PRIOR * torch.eye(len(H), dtype=H.dtype)
        # what rank=None leaves out is a millionth of the largest curvature
        close(found["cross_fitted"], full, 1e-5)


# --- what cannot be folded ---


def data_with_repeats() -> TensorDataset:
    _, X = MODELS["MLP"]()
    y = targets("classification")
    return TensorDataset(torch.cat([X[:15], X[3:4]]), torch.cat([y[:15], y[3:4]]))


@pytest.mark.parametrize("kind", ["lowrank", "kron", "full"])
def test_repeated_samples_are_refused_because_they_would_be_in_two_folds(kind: str) -> None:
    la = posterior_of(MODELS["MLP"]()[0], "classification", "all", kind, magnitudes="cross_fitted")
    with pytest.raises(RepeatedSamplesError) as caught:
        la.fit(DataLoader(data_with_repeats(), batch_size=4))
    assert caught.value.positions.tolist() == [15]
    la.fit(DataLoader(Subset(data_with_repeats(), range(15)), batch_size=4))
    assert la.split.n_samples == 15


@pytest.mark.parametrize("kind", ["lowrank", "lowrank, kron complement", "kron", "full"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_of_fewer_samples_than_folds_each_is_a_fold(n: int, kind: str) -> None:
    structure, _, complement = kind.partition(", ")
    options = {"complement": "kron"} if complement else {}
    few = DataLoader(Subset(data_with_repeats(), range(n)))
    found = []
    for n_folds in (8, n):
        la = posterior_of(
            MODELS["MLP"]()[0],
            "classification",
            "all",
            structure,
            magnitudes="cross_fitted",
            n_folds=n_folds,
            **options,
        )
        la.fit(few, n_data=40)
        assert la.split.folds.sort().values.tolist() == list(range(n))
        assert bool(la.directional_curvatures.isfinite().all())
        assert bool((la.standard_errors > 0).any())
        found.append(la.posterior_precision.to_dense())
    assert torch.equal(*found)
    assert float(torch.linalg.eigvalsh(found[0]).min()) > 0


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
def test_the_number_of_folds_is_ignored_where_there_are_none(magnitudes: str) -> None:
    """As scikit-learn does: one set of arguments goes with every kind of magnitudes."""
    found = []
    for n_folds in (8, 500):
        la = posterior_of(MODELS["MLP"]()[0], "classification", magnitudes=magnitudes, n_folds=n_folds)
        la.fit(DataLoader(Subset(data_with_repeats(), range(15))))
        assert la.split.folds is None
        found.append(la.directional_curvatures)
    assert torch.equal(*found)


def test_the_sizes_of_the_sub_batches_count_together() -> None:
    la = posterior_of(
        MODELS["MLP"]()[0],
        "classification",
        magnitudes="cross_fitted",
        direction_samples=4,
        magnitude_samples=5,
        n_folds=3,
    )
    la.fit(DataLoader(Subset(data_with_repeats(), range(15))), n_data=30)
    assert la.split.n_samples == 9
    assert la.split.folds.bincount().tolist() == [3, 3, 3]
    assert "9 of 30" in repr(la)
    assert torch.equal(la.split.direction_indices, la.split.magnitude_indices)
