"""The Kronecker metric and the correction of the inverse, from the constructor to the checkpoint."""

import io

import pytest
import torch
from contract_cases import problem as contract_problem
from posterior_cases import PRIOR, TEMPERATURE, close, fitted, loader_of, posterior_of
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace

OPTIONS = {
    "metric": {"complement": "kron", "metric": "kron", "rank": 6},
    "metric, cross-fitted, corrected": {
        "complement": "kron",
        "metric": "kron",
        "magnitudes": "cross_fitted",
        "inverse_correction": "second_order",
    },
    "corrected, isotropic complement": {"complement": "isotropic", "inverse_correction": "second_order", "rank": 7},
    "corrected, no complement": {"inverse_correction": "second_order"},
    "corrected Kronecker": {"hessian_structure": "kron", "inverse_correction": "second_order"},
    "corrected full": {"hessian_structure": "full", "inverse_correction": "second_order"},
}


def dense_precision(la: DebiasedParametricLaplace) -> Tensor:
    """From the fitted attributes, the formula written out."""
    c = la.fit_result.estimate.curvature
    K = torch.eye(len(la.mean), dtype=torch.float64) if c.basis is None else c.basis.to_dense().double()
    scale = la.n_data / (float(la.sigma_noise) ** 2 * la.temperature)
    S = torch.eye(len(K), dtype=torch.float64) if c.metric is None else torch.diag(c.metric)
    P0 = K.T @ torch.diag(la.prior_precision_diag) @ K
    D = scale * torch.diag(c.diagonal.expand(len(K))) + P0
    if la.fit_result.options.inverse_correction == "none":
        weights = scale * c.weights
    elif len(c.weights) == 0:
        v = torch.diagonal(D)
        return K @ (D + torch.diag(torch.minimum((scale * la.standard_errors) ** 2 / v, v))) @ K.T
    else:
        # curvature along a direction u is (u'Su)² times its weight
        lengths = torch.diagonal(c.directions.T @ S @ c.directions)
        variances = (scale * la.standard_errors / lengths**2) ** 2
        F = S @ c.directions
        v = scale * c.weights + 1 / torch.diagonal(F.T @ torch.linalg.inv(D) @ F)
        weights = scale * c.weights + torch.minimum(variances / v, v)
    F = S @ c.directions
    return K @ (D + F @ torch.diag(weights) @ F.T) @ K.T


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_precision_evidence_and_predictions(case: str, likelihood: str) -> None:
    la, X, _, _ = fitted("MLP", likelihood, n_data=70, **OPTIONS[case])
    for prior in (PRIOR, torch.linspace(0.2, 1.9, la.n_layers, dtype=torch.float64)):
        la.prior_precision = prior
        P = dense_precision(la)
        close(la.posterior_precision.to_dense(), P)
        close(la.log_det_posterior_precision, torch.logdet(P), 1e-8)
        mean, variance = la._glm_predictive_distribution(X[:4])
        J = la.backend.jacobians(X[:4])[0] if la.backend is not None else None
        if J is not None:
            close(variance, J @ torch.linalg.inv(P) @ J.mT)
        assert mean.shape[0] == 4


@pytest.mark.parametrize("case", OPTIONS)
def test_evidence_has_the_gradient_of_its_differences(case: str) -> None:
    la, _, _, _ = fitted("MLP", "classification", **OPTIONS[case])

    def evidence(log_prior: Tensor) -> Tensor:
        return la.log_marginal_likelihood(log_prior.exp())

    at, step = torch.tensor([-0.7], dtype=torch.float64), 1e-4
    (gradient,) = torch.autograd.grad(evidence(at.requires_grad_()), at)
    difference = (evidence(at.detach() + step) - evidence(at.detach() - step)) / (2 * step)
    assert float(gradient) == pytest.approx(float(difference), rel=1e-5)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_state_restores_it(case: str) -> None:
    la, X, _, _ = fitted("MLP", "classification", **OPTIONS[case])
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    structure = OPTIONS[case].get("hessian_structure", "lowrank")
    again = posterior_of(la.model, "classification", "all", structure)
    again.load_state_dict(torch.load(file, weights_only=True))
    close(again(X), la(X), 1e-10)
    close(again.posterior_precision.to_dense(), la.posterior_precision.to_dense(), 1e-10)
    assert again.fit_result.options == la.fit_result.options
    if la.fit_result.options.structure != "kron":
        close(again.directions, la.directions, 1e-12)


def test_directions_are_unit_vectors_with_the_curvature_that_is_said_of_them() -> None:
    la, _, _, per_sample = fitted("MLP", "classification", complement="kron", metric="kron", rank=6, n_data=40)
    U = la.directions
    close(U.square().sum(0), torch.ones(6))
    # of all the data, the share of the direction samples and of the others together are the full batch
    H = sum(per_sample) / len(per_sample)
    close(la.directional_curvatures, (U * (H @ U)).sum(0), 1e-6)
    assert float((la.standard_errors).max()) == 0.0
    intervals = la.confidence_intervals()
    close(intervals[:, 0], la.directional_curvatures)


WHERE = [
    ("last_layer", "LayerNorm and raw parameters", "regression", 2),
    ("subnetwork", "reused module", "classification", 3),
]


@pytest.mark.parametrize("where", WHERE)
def test_subsets_of_the_weights(where: tuple[str, str, str, int]) -> None:
    subset, name, likelihood, n_outputs = where
    found = contract_problem(name, likelihood, n_outputs)
    model, X, y = found[:3]
    indices = torch.tensor([0, 2, 3, 5, 7, 8, 11, 14, 15]) if subset == "subnetwork" else None
    la = posterior_of(
        model, likelihood, subset, complement="kron", metric="kron", magnitudes="cross_fitted", n_folds=5,
        subnetwork_indices=indices, prior_precision=PRIOR, temperature=TEMPERATURE,
        **({"sigma_noise": 0.7} if likelihood == "regression" else {}),
    )  # fmt: skip
    la.fit(loader_of(X, y))
    close(la.posterior_precision.to_dense(), dense_precision(la))


def test_the_metric_is_chosen_by_held_out_kl() -> None:
    la, X, y, _ = fitted(
        "MLP", "classification", n_data=70, magnitudes="cross_fitted", n_folds=4, complement="kron", metric="auto"
    )
    assert la.choice is not None
    options = [la.choice.chosen.options, *(r.trial.options for r in la.choice.runners_up)]
    assert sorted(option.metric for option in options) == ["euclidean", "kron"]
    assert la.fit_result.options == la.choice.chosen.options
    assert any("metric='kron'" in line for line in str(la.choice).splitlines())
    fixed = posterior_of(
        la.model, "classification", magnitudes="cross_fitted", n_folds=4, complement="kron",
        metric=la.choice.chosen.options.metric, prior_precision=PRIOR, temperature=TEMPERATURE,
    )  # fmt: skip
    fixed.fit(loader_of(X, y), n_data=70)
    close(la.posterior_precision.to_dense(), fixed.posterior_precision.to_dense())


def test_its_held_out_kl_compares_with_that_of_others() -> None:
    model, X, y = fitted("MLP", "classification")[0].model, *fitted("MLP", "classification")[1:3]
    data = TensorDataset(X, y)
    inside, outside = DataLoader(Subset(data, range(24))), DataLoader(Subset(data, range(24, 40)))
    values = []
    for metric in ("euclidean", "kron"):
        la = posterior_of(model, "classification", complement="kron", metric=metric, prior_precision=PRIOR, rank=5)
        la.fit(inside, n_data=40)
        values.append(la.held_out_kl(outside, inside))
    assert (values[0] - values[1]).n == 16


WRONG = {
    "metric without the Kronecker complement": ({"metric": "kron"}, "complement='kron'"),
    "metric to be chosen without it": ({"metric": "auto", "complement": "diagonal"}, "complement='kron'"),
    "metric of another structure": (
        {"metric": "kron", "complement": "kron", "hessian_structure": "full"},
        "hessian_structure='lowrank'",
    ),
    "correction without standard errors": (
        {"hessian_structure": "kron", "kron_magnitudes": "kronecker", "inverse_correction": "second_order"},
        "standard errors",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str) -> None:
    options, message = WRONG[case]
    options = dict(options)
    structure = options.pop("hessian_structure", "lowrank")
    with pytest.raises(ValueError, match=message):
        posterior_of(fitted("MLP", "classification")[0].model, "classification", "all", structure, **options)


def test_a_hessian_has_no_rows_to_whiten() -> None:
    from laplace.curvature import CurvlinopsHessian

    la, X, y, _ = fitted("MLP", "classification")
    hessian = posterior_of(
        la.model, "classification", complement="kron", metric="kron", backend=CurvlinopsHessian, prior_precision=PRIOR
    )
    with pytest.raises(ValueError, match="Hessian"):
        hessian.fit(loader_of(X, y))


@pytest.mark.parametrize("magnitudes", ["held_out", "cross_fitted", "same_batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_curvature_at_all_is_the_prior_in_any_metric(magnitudes: str, dtype: torch.dtype) -> None:
    """A saturated network: every softmax is exactly one class."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3)).to(dtype)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([3000.0, 0.0, 0.0]))
    X = torch.randn(16, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(X, torch.arange(16) % 3), batch_size=8)
    for options in ({"metric": "kron", "inverse_correction": "second_order"}, {"metric": "auto"}):
        options |= {"magnitudes": magnitudes, "complement": "kron", "sampling": "uniform"}
        la = DebiasedLaplace(model, "classification", prior_precision=PRIOR, **options)
        la.fit(loader, n_data=100)
        assert la.rank == 0
        close(la.posterior_precision.to_dense(), PRIOR * torch.eye(len(la.mean)))
        assert bool(la(X[:2]).isfinite().all())
