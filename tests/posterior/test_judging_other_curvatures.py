"""The held-out KL of posteriors with other curvatures than the GGN, and which of them compare."""

from functools import cache

import pytest
import torch
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian
from models import reused_module_net, targets
from oracles import dense_empirical_fisher, dense_ggn, dense_hessian, dense_kl, dense_posterior_precision
from posterior_cases import SIGMA, TEMPERATURE, hyper_parameters, posterior_of
from torch.utils.data import DataLoader, Subset, TensorDataset

KINDS = {
    "GGN": {},
    "GGN by a backend": {"backend": CurvlinopsGGN},
    "Monte-Carlo GGN": {"backend_kwargs": {"stochastic": True, "num_samples": 2}},
    "EF": {"backend": CurvlinopsEF},
    "Hessian": {"backend": CurvlinopsHessian},
}
SUBSETS = {
    "all": (torch.arange(35), {}),
    "last_layer": (torch.arange(20, 35), {}),
    "subnetwork": (torch.arange(4, 30), {"subnetwork_indices": torch.arange(4, 30)}),
}


@cache
def curvatures(kind, likelihood):
    """Curvature of each of the 40 samples; a Monte-Carlo GGN stands for the GGN."""
    model, X = reused_module_net()
    y = targets(likelihood)
    if kind == "EF":
        found = dense_empirical_fisher(model, X, y, likelihood)[0]
    elif kind == "Hessian":
        found = dense_hessian(model, X, y, likelihood)[0]
    else:
        found = dense_ggn(model, X, likelihood)[0]
    return [H.detach() for H in found]


@cache
def judged(kind, likelihood="classification", subset="all", structure="lowrank", **options):
    model, X = reused_module_net()
    data = TensorDataset(X, targets(likelihood))
    given = {**hyper_parameters(likelihood), **KINDS[kind], **SUBSETS[subset][1], **options}
    la = posterior_of(model, likelihood, subset, structure, **given)
    la.fit(DataLoader(Subset(data, range(16)), batch_size=8), n_data=40)
    found = la.held_out_kl(
        DataLoader(Subset(data, range(16, 40)), batch_size=9), DataLoader(Subset(data, range(16)), batch_size=5)
    )
    return la, found


CASES = [
    ("GGN by a backend", "all", "lowrank"),
    ("Monte-Carlo GGN", "all", "lowrank"),
    ("Monte-Carlo GGN", "last_layer", "kron"),
    ("EF", "all", "kron"),
    ("EF", "subnetwork", "full"),
    ("Hessian", "all", "lowrank"),
    ("Hessian", "last_layer", "full"),
    ("Hessian", "subnetwork", "kron"),
]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_with_all_other_samples_held_out_it_is_the_kl(case, likelihood):
    kind, subset, structure = case
    la, found = judged(kind, likelihood, subset, structure)
    at = SUBSETS[subset][0]
    per_sample = [H[at][:, at] for H in curvatures(kind, likelihood)]
    options = {
        "n_data": 40,
        "prior_precision": 0.4,
        "sigma_noise": SIGMA[likelihood],
        "temperature": TEMPERATURE,
    }
    full = dense_posterior_precision(sum(per_sample) / 40, **options)
    ours = la.posterior_precision.to_dense()
    value = 0.5 * (torch.trace(torch.linalg.solve(ours, full)) + torch.linalg.slogdet(ours)[1])
    assert found.value == pytest.approx(float(value), rel=1e-7)
    if kind != "Hessian":
        constant = 0.5 * (len(full) + float(torch.linalg.slogdet(full)[1]))
        assert found.value - constant == pytest.approx(dense_kl(ours, full), rel=1e-6)
    # by the GGN it would be another number
    if kind in ("EF", "Hessian") and not (kind == "Hessian" and subset == "last_layer"):
        ggn = sum(H[at][:, at] for H in curvatures("GGN", likelihood)) / 40
        other = torch.trace(torch.linalg.solve(ours, dense_posterior_precision(ggn, **options)))
        assert found.value != pytest.approx(float(0.5 * (other + torch.linalg.slogdet(ours)[1])), rel=1e-3)


def test_negative_curvature_counts_where_it_is_held_out():
    # directions and magnitudes are floored, what they are judged by is not
    per_sample = curvatures("Hessian", "regression")
    assert float(torch.linalg.eigvalsh(sum(per_sample) / 40)[0]) < -1e-2
    la, found = judged("Hessian", "regression", "all", "kron")
    assert la.fit_result.estimate.magnitudes.n_floored > 0
    covariance = torch.linalg.inv(la.posterior_precision.to_dense())
    weight = 0.5 * 40 / (SIGMA["regression"] ** 2 * TEMPERATURE)
    terms = torch.stack([weight * torch.trace(covariance @ H) for H in per_sample[16:]])
    assert float(terms.min()) < 0
    torch.testing.assert_close(found.terms.sort().values, (1 - 16 / 40) * terms.sort().values, rtol=1e-7, atol=1e-9)


def test_monte_carlo_compares_with_the_ggn_that_it_estimates():
    exact, drawn, named = (judged(kind)[1] for kind in ("GGN", "Monte-Carlo GGN", "GGN by a backend"))
    assert (drawn - exact).value == pytest.approx(drawn.value - exact.value)
    assert (drawn - exact).value != pytest.approx(0, abs=1e-3)
    assert (named - exact).value == pytest.approx(0, abs=1e-6)
    # its draws do not enter what it is judged by
    (la, _), precision = judged("Monte-Carlo GGN"), judged("Monte-Carlo GGN")[0].posterior_precision.to_dense()
    ggn = sum(curvatures("GGN", "classification")) / 40
    full = dense_posterior_precision(ggn, n_data=40, prior_precision=0.4, temperature=TEMPERATURE)
    value = 0.5 * (torch.trace(torch.linalg.solve(precision, full)) + la.log_det_posterior_precision)
    assert drawn.value == pytest.approx(float(value), rel=1e-7)


COMPARED = {
    "other structures": (("GGN", "classification", "all", "kron"), ("GGN", "classification", "all", "full")),
    "GGN and Monte-Carlo GGN of a last layer": (
        ("GGN", "classification", "last_layer", "kron"),
        ("Monte-Carlo GGN", "classification", "last_layer", "lowrank"),
    ),
    "Hessians": (("Hessian", "regression", "all", "kron"), ("Hessian", "regression", "all", "lowrank")),
}


@pytest.mark.parametrize("case", COMPARED)
def test_posteriors_of_one_curvature_and_subset_compare(case):
    (_, first), (_, second) = (judged(*arguments) for arguments in COMPARED[case])
    assert (first - second).value == pytest.approx(first.value - second.value)
    assert first.value != pytest.approx(second.value, rel=1e-6)


REFUSED = {
    "GGN and EF": (("GGN",), ("EF",)),
    "GGN and Hessian": (("GGN",), ("Hessian",)),
    "EF and Hessian": (("EF",), ("Hessian",)),
    "all and last layer": (("GGN",), ("GGN", "classification", "last_layer")),
    "all and subnetwork": (("GGN",), ("GGN", "classification", "subnetwork")),
    "last layer and subnetwork": (
        ("GGN", "classification", "last_layer"),
        ("GGN", "classification", "subnetwork"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_posteriors_of_other_curvatures_or_subsets_do_not(case):
    (_, first), (_, second) = (judged(*arguments) for arguments in REFUSED[case])
    for one, other in ((first, second), (second, first)):
        with pytest.raises(ValueError, match="compare only between posteriors of the same model"):
            _ = one - other


def test_subnetworks_of_as_many_other_entries_do_not_compare():
    found = []
    for start in (4, 5):
        model, X = reused_module_net()
        data = TensorDataset(X, targets("classification"))
        la = posterior_of(
            model,
            "classification",
            "subnetwork",
            subnetwork_indices=torch.arange(start, start + 20),
            **hyper_parameters("classification"),
        )
        la.fit(DataLoader(Subset(data, range(16)), batch_size=8), n_data=40)
        found.append(la.held_out_kl(DataLoader(Subset(data, range(16, 40))), DataLoader(Subset(data, range(16)))))
    with pytest.raises(ValueError, match="20 entries"):
        _ = found[0] - found[1]


@pytest.mark.parametrize("kind", ["Monte-Carlo GGN", "EF", "Hessian"])
def test_states_say_which_curvature_they_are_of(kind):
    la, found = judged(kind)
    model, X = reused_module_net()
    plain = posterior_of(model, "classification")
    with pytest.raises(ValueError, match=f"with the GGN; it has the {kind}"):
        plain.load_state_dict(la.state_dict())
    loaded = posterior_of(model, "classification", **KINDS[kind])
    loaded.load_state_dict(la.state_dict())
    assert torch.equal(loaded(X), la(X))
    assert kind in repr(loaded)
    data = TensorDataset(X, targets("classification"))
    again = loaded.held_out_kl(DataLoader(Subset(data, range(16, 40))), DataLoader(Subset(data, range(16))))
    assert (again - found).value == pytest.approx(0, abs=1e-8)
