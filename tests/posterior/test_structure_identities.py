"""Posteriors that have to be the same one: subsets that are everything, estimates of all the data, full, low rank."""

import pytest
import torch
from models import mlp, targets
from oracles import dense_ggn, flat_parameters, mean_of
from posterior_cases import PRIOR, close, fitted, hyper_parameters, loader_of, posterior_of, problem
from torch import nn

STRUCTURES = ["lowrank", "kron", "full", "kron by K-FAC"]


def fitted_on(model, X, likelihood, subset, structure, **options):
    la = posterior_of(model, likelihood, subset, structure, **{**hyper_parameters(likelihood), **options})
    la.fit(loader_of(X, targets(likelihood)), n_data=60)
    return la


def only_a_last_layer():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
        return model.eval(), torch.randn(40, 2, 2, dtype=torch.float64)


ALL_BUT_IN_NAME = {
    "last layer of a model that has no other": (only_a_last_layer, "last_layer", lambda n: {}),
    "last layer by its name": (only_a_last_layer, "last_layer", lambda n: {"last_layer_name": "1"}),
    "subnetwork of all entries": (mlp, "subnetwork", lambda n: {"subnetwork_indices": torch.arange(n)}),
}


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", ALL_BUT_IN_NAME)
def test_a_subset_that_is_everything_is_everything(case, structure, likelihood):
    make, subset, options_of = ALL_BUT_IN_NAME[case]
    model, X = make()
    kfac = {"kron_basis": "kfac", "kron_magnitudes": "kronecker"} if structure == "kron by K-FAC" else {}
    structure = structure.split()[0]
    n = len(flat_parameters(model))
    whole = fitted_on(model, X, likelihood, "all", structure, **kfac)
    part = fitted_on(model, X, likelihood, subset, structure, **options_of(n), **kfac)
    close(part.posterior_precision.to_dense(), whole.posterior_precision.to_dense(), 1e-9)
    close(part.log_marginal_likelihood(), whole.log_marginal_likelihood(), 1e-9)
    for found, expected in zip(part(X), whole(X), strict=True):
        close(found, expected, 1e-9)
    draws = [la.sample(3, torch.Generator().manual_seed(2)) for la in (part, whole)]
    close(draws[0], draws[1])
    assert torch.equal(part.mean, whole.mean)
    # the two are told apart
    inside, rest = (loader_of(X[some], targets(likelihood)[some]) for some in (range(20), range(20, 40)))
    for la in (part, whole):
        la.fit(inside, n_data=40)
    close(part.held_out_kl(rest, inside).value, whole.held_out_kl(rest, inside).value, 1e-9)
    with pytest.raises(ValueError, match="compare only between posteriors of the same"):
        _ = part.held_out_kl(rest, inside) - whole.held_out_kl(rest, inside)


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
@pytest.mark.parametrize("basis", ["row_matrices", "kfac"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_exact_kronecker_magnitudes_keep_the_trace_of_the_ggn(likelihood, basis, magnitudes):
    name = "LayerNorm and raw parameters"
    la, _, _, per_sample = fitted(name, likelihood, hessian_structure="kron", kron_basis=basis, magnitudes=magnitudes)
    H = sum(per_sample) / len(per_sample)
    assert len(la.directional_curvatures) == len(H)
    close(la.directional_curvatures.sum(), torch.trace(H), 1e-10)
    K = la.posterior_precision.basis.to_dense()
    close(la.directional_curvatures, (K.T @ H @ K).diagonal(), 1e-9)


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_full_is_low_rank_of_every_direction_with_their_mean_outside(likelihood, magnitudes):
    # fewer direction rows than parameters: most directions are in the null space of H_a
    options = {"magnitudes": magnitudes, "direction_samples": 8, "magnitude_samples": 9}
    full, *_ = fitted("MLP", likelihood, hessian_structure="full", **options)
    low, *_ = fitted("MLP", likelihood, hessian_structure="lowrank", complement="isotropic", **options)
    assert full.rank == low.rank < 93
    close(full.posterior_precision.to_dense(), low.posterior_precision.to_dense(), 1e-9)
    weights = full.n_data / (float(full.sigma_noise) ** 2 * full.temperature)
    null_space = torch.linalg.eigvalsh(full.posterior_precision.to_dense())
    # one value for all of them, more than the prior's
    c = weights * float(full.fit_result.estimate.curvature.diagonal)
    # on the direction samples themselves there is nothing outside
    assert c > 1e-3 if magnitudes == "held_out" else c < 1e-9
    assert int(((null_space - c - 0.4).abs() < 1e-8 * (c + 0.4)).sum()) >= 93 - full.rank


def test_full_keeps_directions_that_low_rank_takes_for_unsupported():
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model, X = nn.Linear(3, 2).double(), torch.randn(40, 3, dtype=torch.float64)
    X[:, 0] *= 1e-4  # its curvature is 1e-8 of the largest
    y = targets("regression", n_outputs=2)
    options = {"magnitudes": "same_batch", **hyper_parameters("regression"), "prior_precision": 1e-9}
    full = posterior_of(model, "regression", "all", "full", **options)
    full.fit(loader_of(X, y))
    assert full.rank == 8
    H = dense_ggn(model, X, "regression")[1]
    weight = 40 / (float(full.sigma_noise) ** 2 * full.temperature)
    found = torch.linalg.eigvalsh(full.posterior_precision.to_dense())
    close(found, torch.linalg.eigvalsh(weight * H) + 1e-9, 1e-6)
    assert float(found[1]) == pytest.approx(float(torch.linalg.eigvalsh(weight * H)[1]) + 1e-9, rel=1e-4)
    low = posterior_of(model, "regression", "all", "lowrank", **options)
    with pytest.warns(UserWarning, match="rank=None left out directions"):
        low.fit(loader_of(X, y))
    assert low.rank == 6


@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
def test_everything_given_makes_directional_curvatures_those_of_the_full_batch(rank, magnitudes):
    la, _, _, per_sample = fitted("MLP", "classification", rank=rank, magnitudes=magnitudes)
    H = sum(per_sample) / len(per_sample)
    close(la.directional_curvatures, (la.directions * (H @ la.directions)).sum(0), rtol=1e-9)
    assert not la.standard_errors.any()
    if magnitudes == "held_out":
        assert not torch.allclose(la.in_sample_curvatures, la.directional_curvatures, rtol=1e-3)


def test_everything_given_and_full_rank_keeps_the_trace_of_the_full_batch():
    # 17 + 1 trainable parameters are fewer than the direction samples' rows
    la, _, _, per_sample = fitted("partly frozen", "regression", complement="isotropic", direction_samples=0.7)
    H = sum(per_sample) / len(per_sample)
    close(
        torch.trace(la.posterior_precision.to_dense() - la.prior_precision * torch.eye(la.n_params)),
        la.n_data * la._H_factor * torch.trace(H),
        rtol=1e-9,
    )
    close(la.directional_curvatures, (la.directions * (H @ la.directions)).sum(0), rtol=1e-9)


def test_float32_agrees_with_float64():
    model32, X32 = mlp(dtype=torch.float32)
    la32 = posterior_of(model32, "classification", rank=10, **hyper_parameters("classification"))
    la32.fit(loader_of(X32, targets("classification"), shuffle=True))
    la64, X, _, _ = fitted("MLP", "classification", rank=10)
    assert la32.directions.dtype == torch.float32
    torch.testing.assert_close(la32.directional_curvatures.double(), la64.directional_curvatures, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(la32(X32).double(), la64(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("lowrank", {"complement": c}) for c in ("none", "isotropic", "diagonal", "kron")] + [("kron", {}), ("full", {})],
)
@pytest.mark.parametrize("name", ["partly frozen", "reused module"])
def test_of_all_the_data_every_estimate_but_the_split_is_the_full_batch(name: str, kind: str, options: dict) -> None:
    model, X, y, of_all = problem(name, "classification")
    found = {}
    for magnitudes in ("cross_fitted", "same_batch"):
        la = posterior_of(
            model, "classification", "all", kind, magnitudes=magnitudes, **options, **hyper_parameters("classification")
        )
        la.fit(loader_of(X, y, batch_size=9, shuffle=True))
        found[magnitudes] = la.posterior_precision.to_dense()
        assert not la.standard_errors.any()
        close(la.directional_curvatures, la.in_sample_curvatures)
    close(found["cross_fitted"], found["same_batch"])
    if kind != "kron":
        H = mean_of(of_all, torch.arange(40))
        full = 40 / la.temperature * H + PRIOR * torch.eye(len(H), dtype=H.dtype)
        # what rank=None leaves out is a millionth of the largest curvature
        close(found["cross_fitted"], full, 1e-5)
