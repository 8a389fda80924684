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


def fitted(subset="all", structure="lowrank", **options):
    model, X = mlp()
    la = DebiasedLaplace(
        model, "classification", subset, structure, **{**hyper_parameters("classification"), **options}
    )
    la.fit(loader_of(X, targets("classification")), n_data=70)
    return la, X


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_dense_covariance_that_does_not_fit_is_refused(monkeypatch):
    la, _ = fitted()
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"dense matrix of 93 parameters .* `posterior_variance`"):
        _ = la.posterior_covariance


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


def test_indices_of_a_subnetwork_are_sorted_with_a_note():
    model, X = mlp()
    given = {"subset_of_weights": "subnetwork", **hyper_parameters("classification")}
    with pytest.warns(UserWarning, match="subnetwork_indices were sorted"):
        la = DebiasedLaplace(model, "classification", subnetwork_indices=torch.tensor([50, 3, 20]), **given)
    assert la.selection.indices.tolist() == [3, 20, 50]
    la.fit(loader_of(X, targets("classification")))
    ordered = DebiasedLaplace(model, "classification", subnetwork_indices=torch.tensor([3, 20, 50]), **given)
    ordered.fit(loader_of(X, targets("classification")))
    close(la.posterior_precision.to_matrix(), ordered.posterior_precision.to_matrix())


@pytest.mark.parametrize("given", [None, "pick_last", FeatureReduction.AVERAGE])
def test_a_feature_reduction_is_accepted(given):
    la, X = fitted("last_layer", "kron", feature_reduction=given)
    close(la(X), fitted("last_layer", "kron")[0](X))


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
    close(la.posterior_precision.to_matrix(), said.posterior_precision.to_matrix())
    for prior in (0.4, torch.linspace(0.3, 2.0, 6, dtype=torch.float64)):
        assert fitted(prior_precision=prior)[0].fit_result.options.complement == "kron"


def test_a_posterior_is_one_class_over_laplace_torchs():
    assert [c.__module__.split(".")[0] for c in type(fitted()[0]).__mro__] == ["debiased_laplace"] * 2 + [
        "laplace",
        "laplace",
        "builtins",
    ]
