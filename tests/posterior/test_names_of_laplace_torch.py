"""Attributes and arguments of laplace-torch's posteriors that users reach for, against dense matrices."""

import pytest
import torch
from laplace import Laplace
from laplace.utils import LargestVarianceDiagLaplaceSubnetMask
from laplace.utils.feature_extractor import FeatureReduction
from models import mlp, targets
from posterior_cases import hyper_parameters, loader_of, posterior_of
from torch.distributions import MultivariateNormal

from debiased_laplace import DebiasedLaplace
from debiased_laplace.posterior.factory import CLASSES

SUBNETWORK = {"subnetwork_indices": torch.arange(20, 60)}
KEYS = [
    (subset, structure) for subset in ("all", "last_layer", "subnetwork") for structure in ("lowrank", "kron", "full")
]


def fitted(subset="all", structure="lowrank", likelihood="classification", **options):
    model, X = mlp()
    given = {**hyper_parameters(likelihood), **(SUBNETWORK if subset == "subnetwork" else {}), **options}
    la = DebiasedLaplace(model, likelihood, subset, structure, **given)
    la.fit(loader_of(X, targets(likelihood)), n_data=70)
    return la, X


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("key", KEYS, ids=" ".join)
def test_covariance_scale_and_variance_are_those_of_the_precision(key):
    la, _ = fitted(*key)
    covariance = torch.linalg.inv(la.posterior_precision.to_matrix())
    close(la.posterior_covariance, covariance)
    close(la.posterior_scale @ la.posterior_scale.T, covariance)
    close(la.posterior_variance, covariance.diagonal())


def test_a_dense_covariance_that_does_not_fit_is_refused(monkeypatch):
    la, _ = fitted()
    monkeypatch.setattr("debiased_laplace.posterior.laplace.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"dense matrix of 93 parameters .* `posterior_variance`"):
        _ = la.posterior_covariance


def test_the_precision_multiplies_and_has_a_log_determinant_by_torchs_names():
    precision = fitted()[0].posterior_precision
    P = precision.to_matrix()
    x = torch.randn(93, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(precision @ x, P @ x)
    close(precision @ x[:, 0], P @ x[:, 0])
    close(precision.logdet(), torch.logdet(P))


@pytest.mark.parametrize("key", KEYS, ids=" ".join)
def test_jacobians_have_the_width_of_the_posterior(key):
    la, X = fitted(*key, likelihood="regression")
    J, f = la.backend.jacobians(X[:5])
    parameters = {name: p.detach() for name, p in la.model.named_parameters()}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(la.model, p, (X[:5],)))(parameters)
    expected = torch.cat([rows[name].flatten(2) for name in parameters], dim=2)[..., la.selection.indices]
    close(J, expected)
    close(f, la.model(X[:5]).detach())
    mean, variance = la(X[:5])
    close(la.functional_variance(J), variance)
    close(f, mean)
    if key[0] == "last_layer":
        close(la.backend.last_layer_jacobians(X[:5])[0], expected)
    else:
        with pytest.raises(ValueError, match="Expected a posterior of the last layer"):
            la.backend.last_layer_jacobians(X[:5])


def test_jacobians_keep_their_graph_on_request():
    la, X = fitted()
    x = X[:2].clone().requires_grad_()
    assert la.backend.jacobians(x, enable_backprop=True)[0].requires_grad
    assert not la.backend.jacobians(x)[0].requires_grad


def test_before_the_fit_densities_are_those_of_the_prior():
    model, _ = mlp()
    prior, mean = torch.linspace(0.3, 2.0, 93, dtype=torch.float64), torch.linspace(-1, 1, 93, dtype=torch.float64)
    la = posterior_of(model, "classification", complement="diagonal", prior_precision=prior, prior_mean=mean)
    values = torch.randn(3, 93, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    close(la.log_prob(values), MultivariateNormal(mean, precision_matrix=torch.diag(prior)).log_prob(values))
    close(la.log_prob(values, normalized=False), -((values - mean).square() * prior).sum(1) / 2)


def test_densities_after_the_fit_are_those_of_the_posterior():
    la, _ = fitted()
    values = la.mean + 0.1 * torch.randn(3, 93, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = MultivariateNormal(la.mean, precision_matrix=la.posterior_precision.to_matrix()).log_prob(values)
    close(la.log_prob(values), expected)


def test_indices_of_a_subnetwork_are_sorted_with_a_note():
    model, X = mlp()
    given = {"subset_of_weights": "subnetwork", **hyper_parameters("classification")}
    with pytest.warns(UserWarning, match="subnetwork_indices were sorted"):
        la = DebiasedLaplace(model, "classification", subnetwork_indices=torch.tensor([50, 3, 20]), **given)
    assert la.selection.indices.tolist() == [3, 20, 50]
    la.fit(loader_of(X, targets("classification")))
    ordered = DebiasedLaplace(model, "classification", subnetwork_indices=torch.tensor([3, 20, 50]), **given)
    ordered.fit(loader_of(X, targets("classification")))
    assert torch.equal(la.posterior_precision.to_matrix(), ordered.posterior_precision.to_matrix())


@pytest.mark.parametrize("given", [None, "pick_last", FeatureReduction.AVERAGE])
def test_a_feature_reduction_is_accepted(given):
    la, X = fitted("last_layer", "kron", feature_reduction=given)
    assert torch.equal(la(X), fitted("last_layer", "kron")[0](X))


def test_an_unknown_feature_reduction_is_refused():
    with pytest.raises(ValueError, match=r"feature_reduction must be None or one of .*'pick_last'.*got 'middle'"):
        fitted("last_layer", "kron", feature_reduction="middle")


def test_noise_is_the_third_positional_argument_of_the_classes():
    model, _ = mlp()
    assert float(CLASSES["all", "kron"](model, "regression", 0.3, 2.5).sigma_noise) == pytest.approx(0.3)
    la = Laplace(model, "regression", "all", "debiased_kron", 0.3, 2.5)
    assert float(la.sigma_noise) == pytest.approx(0.3)
    assert float(la.prior_precision) == pytest.approx(2.5)


def test_laplace_torchs_mask_of_the_largest_variances_takes_our_posterior():
    la, X = fitted()
    loader = loader_of(X, targets("classification"))
    mask = LargestVarianceDiagLaplaceSubnetMask(la.model, n_params_subnet=7, diag_laplace_model=la)
    chosen = mask.select(loader)
    assert chosen.tolist() == la.posterior_variance.topk(7).indices.sort().values.tolist()


def test_the_default_complement_suits_the_prior():
    per_parameter = torch.linspace(0.3, 2.0, 93, dtype=torch.float64)
    la, _ = fitted(prior_precision=per_parameter)
    assert la.fit_result.options.complement == "diagonal"
    said, _ = fitted(prior_precision=per_parameter, complement="diagonal")
    assert torch.equal(la.posterior_precision.to_matrix(), said.posterior_precision.to_matrix())
    for prior in (0.4, torch.linspace(0.3, 2.0, 6, dtype=torch.float64)):
        assert fitted(prior_precision=prior)[0].fit_result.options.complement == "kron"


def test_a_posterior_is_one_class_over_laplace_torchs():
    assert [c.__module__.split(".")[0] for c in type(fitted()[0]).__mro__] == ["debiased_laplace"] * 2 + [
        "laplace",
        "laplace",
        "builtins",
    ]
