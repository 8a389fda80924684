"""The held-out KL by rows drawn of all training samples, against the dense KL to the full batch."""

import math

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsEF, CurvlinopsHessian
from oracles import dense_empirical_fisher, dense_ggn, dense_hessian, dense_posterior_precision
from posterior_cases import PRIOR, TEMPERATURE, hyper_parameters, loader_of, posterior_of
from test_drawn_rows import trained

from debiased_laplace import held_out_kl

ALL = 10**6


@pytest.fixture(scope="module")
def sure():
    model, X, y = trained()
    return model, X, y, sum(H.detach() for H in dense_ggn(model, X, "classification")[0]) / len(X)


@pytest.fixture(scope="module")
def posteriors(sure):
    """Posteriors of rows, of some samples and of all of them."""
    model, X, y, _ = sure
    found = {
        "rows": posterior_of(
            model, "classification", sampling="curvature", n_rows=60, **hyper_parameters("classification")
        ),
        "other rows": posterior_of(
            model, "classification", sampling="curvature", n_rows=60, seed=5, magnitudes="cross_fitted",
            **hyper_parameters("classification"),
        ),
        "some samples": posterior_of(model, "classification", sampling="uniform", **hyper_parameters("classification")),
        "all samples": posterior_of(
            model, "classification", sampling="uniform", magnitudes="same_batch", **hyper_parameters("classification")
        ),
    }  # fmt: skip
    for name, la in found.items():
        chosen = slice(0, 50) if name == "some samples" else slice(None)
        la.fit(loader_of(X[chosen], y[chosen]), n_data=400)
    return found


def criterion(precision, H, prior_precision=PRIOR, temperature=TEMPERATURE):
    """J of a dense precision."""
    full = dense_posterior_precision(H, n_data=400, prior_precision=prior_precision, temperature=temperature)
    return 0.5 * float(torch.linalg.solve(precision, full).trace() + torch.linalg.slogdet(precision).logabsdet)


@pytest.mark.parametrize("name", ["rows", "other rows", "some samples", "all samples"])
def test_all_rows_give_the_exact_value(sure, posteriors, name):
    """Whatever a posterior was fitted to."""
    _, X, y, H = sure
    kl = posteriors[name].held_out_kl(loader_of(X, y), n_rows=ALL)
    assert kl.value == pytest.approx(criterion(posteriors[name].posterior_precision.to_dense(), H), rel=1e-6)
    assert kl.standard_error == 0
    assert not kl.exact


@pytest.mark.slow
def test_some_rows_are_unbiased_with_honest_errors_far_below_those_of_samples(sure, posteriors):
    model, X, y, H = sure
    la, other = posteriors["some samples"], posteriors["rows"]
    per_sample = dense_ggn(model, X, "classification")[0]
    truth = {p: criterion(p.posterior_precision.to_dense(), H) for p in (la, other)}
    z, of_difference = [], []
    for seed in range(60):
        first, second = (p.held_out_kl(loader_of(X, y), n_rows=100, seed=seed) for p in (la, other))
        z.append((first.value - truth[la]) / first.standard_error)
        difference = first - second
        of_difference.append((difference.value - truth[la] + truth[other]) / difference.standard_error)
        assert difference.standard_error < first.standard_error
    for values in map(torch.tensor, (z, of_difference)):
        assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(60)
        assert 0.6 < float(values.std()) < 1.6
    # against as many rows of 33 whole samples, whose errors follow from the spread over all samples
    for posterior, found in ((la, first), (other, second)):
        P = posterior.posterior_precision.to_dense()
        terms = torch.tensor([float(torch.linalg.solve(P, h.detach()).trace()) for h in per_sample])
        of_samples = 0.5 * 400 / TEMPERATURE * float(terms.std()) * ((1 - 33 / 400) / 33) ** 0.5
        assert found.standard_error < 0.5 * of_samples


def test_default_rows_and_seed_pair_all_posteriors(sure, posteriors):
    """Without options, values of any two posteriors may be subtracted."""
    _, X, y, H = sure
    values = [
        la.held_out_kl(loader_of(X, y, batch_size=size))
        for la, size in zip(posteriors.values(), (16, 50, 400, 7), strict=True)
    ]
    found = values[0] - values[2]
    assert found.n == values[0].n
    exact = [criterion(posteriors[name].posterior_precision.to_dense(), H) for name in ("rows", "some samples")]
    assert found.value == pytest.approx(exact[0] - exact[1], abs=4 * found.standard_error + 1e-6)
    assert "drawn rows" in repr(values[0])
    few = posteriors["rows"].held_out_kl(loader_of(X, y), n_rows=50)
    with pytest.raises(ValueError, match="the same loader, n_rows and seed"):
        values[0] - few
    with pytest.raises(ValueError, match="the same loader, n_rows and seed"):
        posteriors["rows"].held_out_kl(loader_of(X, y), n_rows=50, seed=1) - few
    exactly = posteriors["all samples"].held_out_kl(None, loader_of(X, y))
    assert (exactly - few).standard_error == few.standard_error
    sampled = posteriors["some samples"].held_out_kl(loader_of(X[50:], y[50:]), loader_of(X[:50], y[:50]))
    with pytest.raises(ValueError, match="One held-out KL is from held-out samples, the other from rows"):
        sampled - few


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_posteriors_of_laplace_torch_on_all_data_are_judged(sure, structure):
    model, X, y, H = sure
    theirs = Laplace(model, "classification", "all", structure, prior_precision=PRIOR)
    theirs.fit(loader_of(X, y, batch_size=100))
    kl = held_out_kl(theirs, loader_of(X, y), n_rows=ALL)
    if structure == "full":
        P = theirs.posterior_precision.detach()
    elif structure == "diag":
        P = theirs.posterior_precision.detach().diag()
    else:
        P = theirs.posterior_precision.to_matrix(exponent=1).detach()
    assert kl.value == pytest.approx(criterion(P, H, temperature=1.0), rel=1e-4)
    ours = posterior_of(model, "classification", sampling="curvature", n_rows=200, prior_precision=PRIOR)
    ours.fit(loader_of(X, y))
    few = held_out_kl(theirs, loader_of(X, y), n_rows=150)
    assert few.standard_error > 0
    assert (held_out_kl(ours, loader_of(X, y), n_rows=150) - few).n == few.n


@pytest.mark.parametrize("backend", [CurvlinopsEF, CurvlinopsHessian])
def test_other_curvatures_have_their_own_rows(sure, backend):
    """The empirical Fisher's gradients, and whole samples of a Hessian."""
    model, X, y, _ = sure
    la = posterior_of(
        model, "classification", sampling="uniform", backend=backend, rank=3, **hyper_parameters("classification")
    )
    la.fit(loader_of(X[:100], y[:100]), n_data=400)
    dense = dense_empirical_fisher if backend is CurvlinopsEF else dense_hessian
    kl = la.held_out_kl(loader_of(X, y), n_rows=ALL)
    expected = criterion(la.posterior_precision.to_dense(), dense(model, X, y, "classification")[1])
    assert kl.value == pytest.approx(expected, rel=1e-5)


def test_rows_of_a_fit_do_not_judge_it(sure):
    """With the fit's own rows its J would be far too small, whatever the seed."""
    _, X, y, H = sure
    model = sure[0]
    la = posterior_of(
        model, "classification", sampling="curvature", n_rows=40, seed=3, magnitudes="same_batch",
        **{**hyper_parameters("classification"), "prior_precision": 0.05},
    )  # fmt: skip
    la.fit(loader_of(X, y))
    truth = criterion(la.posterior_precision.to_dense(), H, prior_precision=0.05)
    kl = la.held_out_kl(loader_of(X, y), n_rows=40)
    assert abs(kl.value - truth) < 4 * kl.standard_error
    own = la.fit_result.drawn.curvature()
    of_fit = 0.5 * 400 / TEMPERATURE * float(own.traces(la.posterior_precision).mean())
    assert of_fit < float(kl.terms.sum()) - 3 * kl.standard_error


def test_weighted_samples_count_with_their_weights(sure):
    model, X, y, _ = sure
    weights = torch.rand(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    loader = [(X, y, weights)]
    la = posterior_of(model, "classification", sampling="curvature", n_rows=80, **hyper_parameters("classification"))
    la.fit(loader)
    H = sum(w * h.detach() for w, h in zip(weights, dense_ggn(model, X, "classification")[0], strict=True))
    full = dense_posterior_precision(H, n_data=1, prior_precision=PRIOR, temperature=TEMPERATURE)
    P = la.posterior_precision.to_dense()
    expected = 0.5 * float(torch.linalg.solve(P, full).trace() + torch.linalg.slogdet(P).logabsdet)
    assert la.held_out_kl(loader).value == pytest.approx(expected, rel=1e-6)


def test_refusals(sure, posteriors):
    model, X, y, _ = sure
    la, some = posteriors["rows"], posteriors["some samples"]
    with pytest.raises(ValueError, match=r"All 400 samples were fitted.*rows are drawn"):
        la.held_out_kl(loader_of(X[:100], y[:100]))
    with pytest.raises(ValueError, match=r"expected a loader of n_data=400 samples .*; it yields 300"):
        some.held_out_kl(loader_of(X[:300], y[:300]), n_rows=50)
    with pytest.raises(ValueError, match="50 of the 50 fitted ones are not among those"):
        some.held_out_kl(loader_of(X + 1, y), n_rows=50)
    with pytest.raises(ValueError, match="n_rows and seed are of rows drawn of all N samples"):
        some.held_out_kl(loader_of(X[50:], y[50:]), loader_of(X[:50], y[:50]), seed=3)
    with pytest.raises(ValueError, match="n_rows"):
        some.held_out_kl(loader_of(X, y), n_rows=1)
    theirs = Laplace(model, "classification", "all", "diag", prior_precision=PRIOR)
    theirs.fit(loader_of(X[:100], y[:100]))
    with pytest.raises(ValueError, match="or a loader of all the training samples"):
        held_out_kl(theirs, loader_of(X, y))


def test_rows_of_some_samples_are_judged_on_samples_that_were_not_scored(sure):
    """Of 150 scored samples that stand for 400: the others are held out, and the scored ones have their exact share."""
    model, X, y, H = sure
    la = posterior_of(model, "classification", sampling="curvature", n_rows=60, **hyper_parameters("classification"))
    la.fit(loader_of(X[:150], y[:150]), n_data=400)
    kl = la.held_out_kl(loader_of(X[150:], y[150:]), loader_of(X[:150], y[:150]))
    assert kl.value == pytest.approx(criterion(la.posterior_precision.to_dense(), H), rel=1e-6)
    assert kl.standard_error == 0
    unused = ~torch.isin(torch.arange(150), la.split.used_indices)
    with pytest.raises(ValueError, match="of the loader were fitted"):
        la.held_out_kl(loader_of(X[:150][unused], y[:150][unused]), loader_of(X[:150], y[:150]))
