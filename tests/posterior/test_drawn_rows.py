"""Posteriors of rows that are drawn where the curvature is, against dense estimates from the same rows."""

import pytest
import torch
from laplace.curvature import CurvlinopsEF
from models import MODELS, targets
from oracles import (
    dense_empirical_fisher,
    dense_ggn,
    dense_jacobian,
    dense_kl,
    dense_posterior_precision,
    non_increasing,
    output_gradient,
    output_hessian,
)
from posterior_cases import PRIOR, SIGMA, TEMPERATURE, close, hyper_parameters, loader_of, posterior_of, problem
from torch import nn

N = 40
DRAWN = {"sampling": "curvature", "seed": 3}


def drawn_posterior(name, likelihood, **options):
    """A posterior of drawn rows, and the problem it was fitted to."""
    model, X, y, per_sample = problem(name, likelihood)
    la = posterior_of(model, likelihood, **{**hyper_parameters(likelihood), **DRAWN, **options})
    la.fit(loader_of(X, y))
    return la, model, X, y, per_sample


def all_rows(model, X, y, likelihood, kind="GGN"):
    """Rows (n, r, P) of all samples, from the eigenvectors of each output's curvature, the largest first."""
    rows = []
    for x, target in zip(X, y, strict=True):
        J, f = dense_jacobian(model, x), model(x[None])[0].detach()
        if kind == "EF":
            rows.append((output_gradient(f, target, likelihood) @ J)[None])
            continue
        values, Q = torch.linalg.eigh(output_hessian(f, likelihood))
        rows.append((Q * values.clamp_min(0).sqrt()).T.flip(0) @ J)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("kind", ["GGN", "EF"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("magnitudes", ["same_batch", "cross_fitted", "held_out"])
@pytest.mark.parametrize("name", ["MLP", pytest.param("convolutions and pooling", marks=pytest.mark.slow)])
def test_all_rows_are_the_full_batch(name, magnitudes, structure, kind):
    backend = {"GGN": None, "EF": CurvlinopsEF}[kind]
    la, model, X, y, per_sample = drawn_posterior(
        name, "classification", hessian_structure=structure, magnitudes=magnitudes, n_rows=10**6, backend=backend
    )
    H = sum(per_sample) / N if kind == "GGN" else dense_empirical_fisher(model, X, y, "classification")[1]
    assert float(la.rows.inclusion_probabilities.min()) == 1
    assert la.rows.known_share == pytest.approx(1, rel=1e-9)
    if structure == "kron":
        uniform = posterior_of(
            model, "classification", hessian_structure="kron", magnitudes="same_batch", backend=backend,
            **hyper_parameters("classification"),
        )  # fmt: skip
        uniform.fit(loader_of(X, y))
        if magnitudes != "held_out":
            close(la.posterior_precision.to_dense(), uniform.posterior_precision.to_dense(), 1e-4)
        close(la.posterior_precision.to_dense().trace(), uniform.posterior_precision.to_dense().trace(), 1e-5)
    elif magnitudes == "held_out":
        # the directions are those of half of the rows, the curvature along them is exact
        U = la.directions
        close(la.directional_curvatures, (U * (H @ U)).sum(0), 1e-5)
    else:
        expected = dense_posterior_precision(H, n_data=N, prior_precision=PRIOR, temperature=TEMPERATURE)
        # all directions above a millionth of the largest
        assert float((la.posterior_precision.to_dense() - expected).abs().max()) < 5e-6 * float(expected.abs().max())
    assert float(la.standard_errors.abs().max()) < 1e-6 * float(la.directional_curvatures.max())
    close(la.loss, posterior_loss(model, X, y), 1e-6)


def posterior_loss(model, X, y):
    return torch.nn.functional.cross_entropy(model(X), y, reduction="sum").detach()


@pytest.mark.parametrize("n_data", [N, 64])
@pytest.mark.parametrize("n_rows", [25, 60])
@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
@pytest.mark.parametrize("magnitudes", ["same_batch", "cross_fitted", "held_out"])
def test_estimates_are_those_of_the_dense_rows(magnitudes, complement, n_rows, n_data):
    """Of all samples rows are dealt, of 40 samples that stand for 64 it is the samples."""
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(
        model, "classification", magnitudes=magnitudes, complement=complement, n_rows=n_rows, n_folds=4, rank=5,
        **({"direction_samples": 0.4} if magnitudes == "held_out" else {}),
        **hyper_parameters("classification"), **DRAWN,
    )  # fmt: skip
    la.fit(loader_of(X, y), n_data=n_data)
    V = all_rows(model, X, y, "classification")
    sample, _, j = la.rows.positions.unbind(1)
    v, pi, part = V[sample, j], la.rows.inclusion_probabilities, la.rows.part
    f = N / n_data
    k, w, p = 1 / n_data, 1 / (N * pi), pi * f
    dimension = v.shape[1]

    def curvature(rows, weights):
        return (rows.T * weights) @ rows

    def leading(H, rank=5):
        values, U = torch.linalg.eigh(H)
        return values.flip(0)[:rank], U.flip(1)[:, :rank]

    def outside(U, H):
        I = torch.eye(dimension, dtype=H.dtype)  # noqa: E741
        return (I - U @ U.T) @ H @ (I - U @ U.T)

    def errors_of(z, rows, n, sampled=f):
        """Squared standard error of the sum of z over rows; with samples that are a draw, from n of them."""
        given = ((1 - pi[rows])[:, None] * z.square()).sum(0)
        if n_data == N:
            return given
        totals = torch.zeros(N, z.shape[1], dtype=z.dtype).index_add(0, sample[rows], z)
        squares = totals.square().sum(0) - totals.sum(0).square() / n
        return (1 - sampled) * n / (n - 1) * squares + sampled * given

    every = torch.ones(len(v), dtype=torch.bool)
    if magnitudes == "same_batch":
        values, U = leading(curvature(v, w))
        m, trace, residual = values, w @ v.square().sum(1), torch.diagonal(outside(U, curvature(v, w)))
        errors = errors_of((v @ U).square() * w[:, None], every, N).sqrt()
    elif magnitudes == "cross_fitted":
        _, U = leading(curvature(v, w))
        known = curvature(v, torch.full_like(p, k))
        rest, residual = torch.zeros(5, dtype=v.dtype), torch.diagonal(outside(U, known))
        z = torch.zeros(len(v), 5, dtype=v.dtype)
        for fold in range(4):
            _, u = leading(curvature(v[part != fold], w[part != fold]))
            held = curvature(v[part == fold], (w - k)[part == fold])
            z[part == fold] = ((v @ u).square() * w[:, None])[part == fold]
            rest += (u * (held @ u)).sum(0)
            residual = residual + torch.diagonal(outside(u, held))
        own = (U * (known @ U)).sum(0)
        # of all samples the sum is made non-increasing, of some the others' part
        m = non_increasing(own + rest) if n_data == N else own + non_increasing(rest)
        trace, errors = w @ v.square().sum(1), errors_of(z, every, N).sqrt()
        if n_data > N:
            assert all(len(part[sample == i].unique()) < 2 for i in range(N))
    else:
        q = 0.6
        a, b = part == 0, part == 1
        assert 0 < int(a.sum()) < len(a)
        _, U = leading(curvature(v[a], w[a]))
        of_b = 1 / (q * p[b]) - (1 - q) / q
        H = curvature(v[a], torch.full_like(p[a], k)) + curvature(v[b], of_b / n_data)
        m, trace, residual = (U * (H @ U)).sum(0), torch.trace(H), torch.diagonal(outside(U, H))
        z = (v[b] @ U).square() * of_b[:, None] / n_data
        if n_data == N:
            errors = ((1 - 1 / of_b)[:, None] * z.square()).sum(0).sqrt()
        else:
            assert set(sample[a].tolist()).isdisjoint(sample[b].tolist())
            errors = errors_of(z, b, q * N, sampled=q * N / (n_data - (1 - q) * N)).sqrt()
    close(la.directional_curvatures, m.clamp_min(0), 1e-5)
    close(la.standard_errors, errors, 1e-5)
    C = {
        "none": torch.zeros(dimension, dimension, dtype=v.dtype),
        "isotropic": (trace - m.sum()) / (dimension - 5) * outside(U, torch.eye(dimension, dtype=v.dtype)),
        "diagonal": torch.diag(residual),
    }[complement]
    expected = dense_posterior_precision(
        U @ torch.diag(m) @ U.T + C, n_data=n_data, prior_precision=PRIOR, temperature=TEMPERATURE
    )
    close(la.posterior_precision.to_dense(), expected, 1e-5)


def trained(seed=0):
    """A classifier that is sure of most of 400 samples, as trained networks are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        X = torch.randn(400, 4, dtype=torch.float64)
        y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 1).long()
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(400):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(X), y).backward()
            optimizer.step()
        return model.eval(), X, y


@pytest.fixture(scope="module")
def confident():
    model, X, y = trained()
    return model, X, y, sum(H.detach() for H in dense_ggn(model, X, "classification")[0]) / len(X)


def check_over_draws(posteriors, H, magnitudes, errors_within):
    """Check bias and standard errors of the curvature along the directions, against that of all samples."""
    errors, biases, squared, estimated = [], [], [], []
    for la in posteriors:
        U = la.directions
        truth = (U * (H @ U)).sum(0)
        errors.append((la.directional_curvatures.sum() - truth.sum()) / truth.sum())
        biases.append((la.in_sample_curvatures.sum() - truth.sum()) / truth.sum())
        squared.append((la.directional_curvatures - truth).square().sum())
        estimated.append(la.standard_errors.square().sum())
    errors, biases = torch.stack(errors), torch.stack(biases)
    of_mean = float(errors.std()) / len(errors) ** 0.5
    # what the rows say themselves is biased, beyond doubt
    assert float(biases.mean()) > 3.5 * float(biases.std()) / len(biases) ** 0.5
    assert abs(float(errors.mean())) < (3.5 * of_mean if magnitudes == "held_out" else 0.4 * float(biases.mean()))
    # variances are right on average, heavy tails or not
    low, high = errors_within
    ratio = float(torch.stack(estimated).mean() / torch.stack(squared).mean())
    assert low < ratio < high, ratio


@pytest.mark.slow
@pytest.mark.parametrize("magnitudes", ["held_out", "cross_fitted"])
def test_estimates_have_little_bias_and_honest_errors(confident, magnitudes):
    model, X, y, H = confident
    posteriors = [
        posterior_of(
            model, "classification", magnitudes=magnitudes, sampling="curvature", n_rows=60, rank=5, seed=seed,
            prior_precision=PRIOR,
        )
        for seed in range(60)
    ]  # fmt: skip
    for la in posteriors:
        la.fit(loader_of(X, y, batch_size=100))
    check_over_draws(posteriors, H, magnitudes, (0.6, 1.6))


@pytest.mark.slow
def test_rows_are_closer_to_the_full_batch_than_samples_for_the_same_passes(confident):
    model, X, y, H = confident
    excess = {"curvature": [], "uniform": []}
    full = dense_posterior_precision(H, n_data=400, prior_precision=PRIOR)
    for seed in range(5):
        rows = posterior_of(
            model, "classification", magnitudes="cross_fitted", complement="kron", sampling="curvature", n_rows=90,
            seed=seed, prior_precision=PRIOR,
        )  # fmt: skip
        rows.fit(loader_of(X, y, batch_size=100))
        samples = posterior_of(
            model, "classification", magnitudes="cross_fitted", complement="kron", seed=seed, prior_precision=PRIOR
        )
        chosen = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:30]
        samples.fit(loader_of(X[chosen], y[chosen]), n_data=400)
        excess["curvature"].append(dense_kl(rows.posterior_precision.to_dense(), full))
        excess["uniform"].append(dense_kl(samples.posterior_precision.to_dense(), full))
        assert rows.rows.design_effect < 0.5
    assert max(excess["curvature"]) < min(excess["uniform"])


@pytest.mark.parametrize("subset", ["all", "last_layer", "subnetwork"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_rows_predict_and_tune_as_all_posteriors_do(structure, subset):
    options = {"subnetwork_indices": torch.arange(5, 60, 2)} if subset == "subnetwork" else {}
    la, model, X, *_ = drawn_posterior(
        "MLP", "classification", hessian_structure=structure, subset_of_weights=subset, magnitudes="cross_fitted",
        n_rows=50, **options,
    )  # fmt: skip
    assert la(X[:5]).sum(1).allclose(torch.ones(5, dtype=X.dtype))
    la.optimize_prior_precision(method="marglik", n_steps=3)
    assert la.confidence_intervals().shape == (len(la.directional_curvatures), 2)
    again = posterior_of(
        model, "classification", hessian_structure=structure, subset_of_weights=subset, magnitudes="cross_fitted",
        **hyper_parameters("classification"), **DRAWN, **options,
    )  # fmt: skip
    again.load_state_dict(la.state_dict())
    close(again(X[:5]), la(X[:5]))
    assert again.split.of_rows
    assert again.rows is None
    assert f"fitted on drawn rows of {la.split.n_samples} of 40 samples" in repr(la)


def test_what_was_drawn_can_be_seen():
    la, *_ = drawn_posterior("MLP", "classification", n_rows=30, magnitudes="held_out")
    rows = la.rows
    assert rows.n == len(rows.positions) == len(rows.part) == len(rows.inclusion_probabilities)
    assert set(rows.positions[:, 0].tolist()) == {
        *la.split.direction_indices.tolist(),
        *la.split.magnitude_indices.tolist(),
    }
    assert 0 < rows.known_share < 1
    assert f"{rows.n} rows of" in repr(rows)
    fewer = drawn_posterior("MLP", "classification", n_rows=15)[0].rows
    assert {tuple(r) for r in fewer.positions.tolist()} < {tuple(r) for r in rows.positions.tolist()}
    assert drawn_posterior("MLP", "classification")[0].rows.n == 80  # two rows of three have curvature


def test_the_order_of_the_loader_makes_no_difference():
    model, X, y, _ = problem("MLP", "classification")
    found = []
    for options in ({"batch_size": 7}, {"batch_size": 16, "shuffle": True}):
        la = posterior_of(model, "classification", n_rows=30, magnitudes="cross_fitted", **DRAWN)
        la.fit(loader_of(X, y, **options))
        found.append(la.posterior_precision.to_dense())
    close(*found)


@pytest.mark.parametrize("name", ["MLP", "partly frozen"])
def test_a_regression_draws_uniformly(name):
    la, *_ = drawn_posterior(name, "regression", n_rows=40, magnitudes="cross_fitted")
    p = la.rows.inclusion_probabilities
    torch.testing.assert_close(p, torch.full_like(p, 40 / 120))
    assert la.rows.design_effect == pytest.approx(1, rel=1e-6)
    assert SIGMA["regression"] != 1


NOT_BUILT = {
    "metric='kron'": {"metric": "kron", "complement": "kron"},
    "metric='auto'": {"metric": "auto", "complement": "kron"},
    "kron_magnitudes='kronecker'": {"hessian_structure": "kron", "complement": None, "kron_magnitudes": "kronecker"},
    "numbers of samples": {"direction_samples": 10, "magnitudes": "held_out"},
}


@pytest.mark.parametrize("case", NOT_BUILT)
def test_what_is_not_built_is_refused(case):
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(model, "classification", **{**DRAWN, **NOT_BUILT[case]})
    with pytest.raises(ValueError, match=f"the default, is not built for {case}; expected .*, or sampling='uniform'"):
        la.fit(loader_of(X, y))


def test_other_refusals():
    model, X, y, _ = problem("MLP", "classification")
    with pytest.raises(ValueError, match="n_rows"):
        posterior_of(model, "classification", sampling="curvature", n_rows=1)
    la = drawn_posterior("MLP", "classification", n_rows=30)[0]
    with pytest.raises(ValueError, match="expected at least 40, got 39"):
        la.fit(loader_of(X, y), n_data=39)
    with pytest.raises(ValueError, match="raise n_rows"):
        posterior_of(model, "classification", **{**DRAWN, "n_rows": 2, "seed": 1}).fit(loader_of(X, y))
    with pytest.raises(ValueError, match="finite"):
        la.fit([(torch.nan * X, y)])
    with pytest.raises(ValueError, match="yields no samples"):
        la.fit(iter([]))
    assert la.rows is not None  # as it was


def test_a_network_without_curvature_has_no_rows():
    model = MODELS["MLP"]()[0]
    with torch.no_grad():
        model[-1].weight.mul_(0)
        model[-1].bias.copy_(torch.tensor([800.0, 0.0, 0.0]))
    X, y = MODELS["MLP"]()[1], targets("classification")
    with pytest.raises(ValueError, match="0 rows were drawn of 0"):
        posterior_of(model, "classification", **DRAWN).fit(loader_of(X, y))


@pytest.mark.parametrize("kind", ["EF", "binary"])
def test_the_design_effect_is_against_rows_that_have_curvature(kind):
    """Of two classes one row of two is null, and the empirical Fisher has one row a sample."""
    model, X = MODELS["MLP"](n_outputs=2)
    y = targets("classification", n_outputs=2)
    la = posterior_of(model, "classification", n_rows=12, backend=CurvlinopsEF if kind == "EF" else None, **DRAWN)
    la.fit(loader_of(X, y))
    rows = all_rows(model, X, y, "classification", "EF") if kind == "EF" else all_rows(model, X, y, "classification")
    norms = rows[:, 0].square().sum(1)
    sample, p = la.rows.positions[:, 0], la.rows.inclusion_probabilities
    assert set(la.rows.positions[:, 2].tolist()) == {0}
    uniform = 12 / N
    own = ((1 - p) * (norms[sample] / p) ** 2).sum()
    expected = own / ((1 - uniform) / uniform * norms[sample] ** 2 / p).sum()
    assert la.rows.design_effect == pytest.approx(float(expected), rel=1e-5)


class SureWhereItMatters(nn.Module):
    """A classifier whose rows are longest where it is most certain, which a forward pass does not tell."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        at = x[:, :1] * torch.tensor([1.0, 0.0, -1.0])
        return at + x[:, :1].square() * (x[:, 1:] @ (self.weight - self.weight.detach()).mT)


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_rows_are_drawn_again_where_scores_mislead(tolerance):
    generator = torch.Generator().manual_seed(2)
    X = torch.cat([torch.randint(1, 5, (300, 1), generator=generator), torch.randn(300, 4, generator=generator)], 1)
    y = torch.randint(3, (300,), generator=generator)
    la = posterior_of(SureWhereItMatters(), "classification", n_rows=150, **DRAWN)
    la.fit(loader_of(X, y), tolerance=tolerance)
    assert la.rows.design_effect < 1.1
    # equal scores, and a tenth in proportion to the sizes within a sample
    assert 0.2 < float(la.rows.inclusion_probabilities.min()) < float(la.rows.inclusion_probabilities.max()) < 0.4
    # one pass is all that there is: as drawn first
    once = posterior_of(SureWhereItMatters(), "classification", n_rows=150, **DRAWN)
    once.fit(iter([(X, y)]))
    assert once.rows.design_effect > 1.2


def test_of_many_classes_all_rows_are_the_full_batch(monkeypatch):
    """Leading classes by eigenvectors, the others by rows of their own."""
    monkeypatch.setattr("debiased_laplace.curvature.output_rows.MOST_EIGENVECTORS", 2)
    monkeypatch.setattr("debiased_laplace.curvature.output_rows.MOST_LEADING", 2)
    la, *_, per_sample = drawn_posterior(
        "MLP", "classification", hessian_structure="full", n_rows=10**6, magnitudes="cross_fitted"
    )
    assert la.rows.n == 3 * N
    assert int(la.rows.positions[:, 2].max()) > 2
    expected = dense_posterior_precision(sum(per_sample) / N, n_data=N, prior_precision=PRIOR, temperature=TEMPERATURE)
    close(la.posterior_precision.to_dense(), expected, 1e-4)
