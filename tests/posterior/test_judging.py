"""The held-out KL of fitted posteriors against the true KL, computed densely."""

import pytest
import torch
from oracles import dense_kl, dense_posterior_precision
from posterior_cases import PRIOR, SIGMA, TEMPERATURE, hyper_parameters, posterior_of, problem
from torch.utils.data import DataLoader, Subset, TensorDataset

OPTIONS = {
    "held out": {},
    "same batch": {"magnitudes": "same_batch"},
    "low rank": {"rank": 4},
    "isotropic": {"rank": 4, "complement": "isotropic"},
    "diagonal": {"rank": 4, "complement": "diagonal"},
    "cross-fitted": {"magnitudes": "cross_fitted", "n_folds": 4},
    "Kronecker complement": {"rank": 4, "complement": "kron", "magnitudes": "cross_fitted", "n_folds": 4},
    "Kronecker": {"hessian_structure": "kron"},
}


def judged(name, likelihood, indices, **options):
    model, X, y, per_sample = problem(name, likelihood)
    data = TensorDataset(X, y)
    la = posterior_of(model, likelihood, **hyper_parameters(likelihood), **options)
    la.fit(DataLoader(Subset(data, indices), batch_size=8), n_data=40)
    full = dense_posterior_precision(
        sum(per_sample) / 40,
        n_data=40,
        prior_precision=la.prior_precision_diag,
        sigma_noise=SIGMA[likelihood],
        temperature=TEMPERATURE,
    )
    return la, data, full


def constant_of(full):
    return 0.5 * (len(full) + float(torch.linalg.slogdet(full)[1]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", ["MLP", "LayerNorm and raw parameters"])
def test_with_all_other_samples_held_out_it_is_the_kl(name, likelihood, options):
    la, data, full = judged(name, likelihood, range(16), **OPTIONS[options])
    found = la.held_out_kl(
        DataLoader(Subset(data, range(16, 40)), shuffle=True, batch_size=5), DataLoader(Subset(data, range(16)))
    )
    kl = dense_kl(la.posterior_precision.to_dense(), full)
    assert found.value - constant_of(full) == pytest.approx(kl, rel=1e-7)
    assert found.standard_error == 0.0
    assert found.n == 24
    assert not found.exact


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_where_all_data_were_fitted_it_is_the_constant(likelihood):
    la, data, full = judged("MLP", likelihood, range(40), magnitudes="same_batch")
    found = la.held_out_kl(None, DataLoader(data, batch_size=6, shuffle=True))
    P = la.n_params
    # up to the curvature in directions below the threshold of rank=None
    assert found.value == pytest.approx(0.5 * (P + float(la.log_det_posterior_precision)), rel=1e-4)
    own = dense_kl(la.posterior_precision.to_dense(), full)
    assert 0 <= own < 1e-3
    assert found.value - constant_of(full) == pytest.approx(own, abs=1e-8)
    assert (found.standard_error, found.n, found.exact) == (0.0, 0, True)
    # against it, the held-out KL of another posterior is the KL itself
    part, _, _ = judged("MLP", likelihood, range(16))
    held_out = part.held_out_kl(DataLoader(Subset(data, range(16, 40))), DataLoader(Subset(data, range(16))))
    difference = held_out - found
    assert difference.value == pytest.approx(dense_kl(part.posterior_precision.to_dense(), full) - own, rel=1e-8)
    assert difference.standard_error == 0.0
    some = part.held_out_kl(DataLoader(Subset(data, range(16, 30))), DataLoader(Subset(data, range(16))))
    assert (some - found).standard_error == pytest.approx(some.standard_error)
    assert some.standard_error > 0
    assert (found - some).value == -(some - found).value


def test_all_data_fitted_and_split():
    la, data, full = judged("MLP", "classification", range(40), rank=7)
    found = la.held_out_kl(None, DataLoader(data, batch_size=6))
    kl = dense_kl(la.posterior_precision.to_dense(), full)
    assert kl > 1
    assert found.value - constant_of(full) == pytest.approx(kl, rel=1e-8)


@pytest.mark.parametrize("complement", ["none", "diagonal"])
def test_terms_value_and_error_densely(complement):
    la, data, _ = judged("MLP", "regression", range(10), complement=complement)
    _, _, _, per_sample = problem("MLP", "regression")
    c = list(range(20, 33))
    found = la.held_out_kl(DataLoader(Subset(data, c)), DataLoader(Subset(data, range(10))))
    covariance = torch.linalg.inv(la.posterior_precision.to_dense())
    tau = 1 / (SIGMA["regression"] ** 2 * TEMPERATURE)
    of_all = torch.stack([0.5 * 40 * tau * torch.trace(covariance @ H) for H in per_sample])
    own = 0.5 * (PRIOR * torch.trace(covariance) - torch.linalg.slogdet(covariance)[1])
    value = own + 0.25 * of_all[:10].mean() + 0.75 * of_all[c].mean()
    assert found.value == pytest.approx(float(value), rel=1e-8)
    error = 0.75 * of_all[c].std() * ((1 - 13 / 30) / 13) ** 0.5
    assert found.standard_error == pytest.approx(float(error), rel=1e-7)
    other, *_ = judged("MLP", "regression", range(10), rank=3)
    compared = found - other.held_out_kl(
        DataLoader(Subset(data, c[::-1]), batch_size=4), DataLoader(Subset(data, range(10)))
    )
    theirs = torch.linalg.inv(other.posterior_precision.to_dense())
    of_theirs = torch.stack([0.5 * 40 * tau * torch.trace(theirs @ H) for H in per_sample])
    paired = 0.75 * (of_all[c] - of_theirs[c]).std() * ((1 - 13 / 30) / 13) ** 0.5
    assert compared.standard_error == pytest.approx(float(paired), rel=1e-7)
    assert compared.n == 13
    # without the fitted samples, the held-out ones stand for all
    with pytest.warns(UserWarning, match="25% of the data"):
        alone = la.held_out_kl(DataLoader(Subset(data, c)))
    assert alone.value == pytest.approx(float(own + of_all[c].mean()), rel=1e-8)
    assert alone.standard_error == pytest.approx(float(of_all[c].std() * ((1 - 13 / 40) / 13) ** 0.5), rel=1e-7)


def test_one_held_out_sample_says_nothing_of_its_error():
    la, data, _ = judged("MLP", "classification", range(10))
    found = la.held_out_kl(DataLoader(Subset(data, [30])), DataLoader(Subset(data, range(10))))
    assert found.standard_error == float("inf")


def test_order_and_batches_of_the_loaders_do_not_matter():
    la, data, _ = judged("MLP", "classification", range(16))
    first = la.held_out_kl(DataLoader(Subset(data, range(16, 40))), DataLoader(Subset(data, range(16))))
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(3)) + 16
    second = la.held_out_kl(
        DataLoader(Subset(data, shuffled.tolist()), batch_size=9), DataLoader(Subset(data, range(15, -1, -1)))
    )
    assert second.value == pytest.approx(first.value, rel=1e-12)
    assert (second - first).value == pytest.approx(0, abs=1e-9)


def test_differences_are_paired_by_sample_whatever_the_order():
    la, data, _ = judged("MLP", "classification", range(16))
    fitted = DataLoader(Subset(data, range(16)))
    first, second = (
        la.held_out_kl(DataLoader(Subset(data, order)), fitted) for order in ([*range(16, 30)], [*range(29, 15, -1)])
    )
    assert first.standard_error > 0
    assert (second - first).standard_error == pytest.approx(0, abs=1e-9)
