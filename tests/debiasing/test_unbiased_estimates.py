"""Over draws of samples, estimates from a split are unbiased, and same-batch ones are biased."""

import math

import pytest
import torch
from oracles import dense_kl, dense_posterior_precision
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.sub_batch import DirectionalMoments
from debiased_laplace.debiasing.held_out_kl import KLTerms, estimate_held_out_kl, sample_terms
from debiased_laplace.debiasing.magnitudes import held_out, same_batch
from debiased_laplace.linalg.gram import GramFactor
from debiased_laplace.linalg.row_matrix import RowMatrix

N, A, B, K = 400, 60, 60, 12
DRAWS = 500


class Population:
    """A briefly trained small classifier, and root rows of all N samples' GGN."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            X = torch.randn(N, 6, dtype=torch.float64)
            y = (X @ torch.randn(6, 4, dtype=torch.float64) + 0.7 * torch.randn(N, 4)).argmax(1)
            self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
            optimizer = torch.optim.Adam(self.model.parameters(), lr=0.03)
            for _ in range(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(X), y).backward()
                optimizer.step()
        self.model.zero_grad()
        self.data = TensorDataset(X, y)
        names = dict(self.model.named_parameters())

        def outputs(parameters, x):
            return torch.func.functional_call(self.model, parameters, (x[None],))[0]

        parameters = {k: p.detach() for k, p in names.items()}
        jacobian = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(parameters, X)
        J = torch.cat([jacobian[k].flatten(2) for k in names], dim=2)
        p = torch.softmax(self.model(X).detach(), -1)
        S = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
        self.rows = S.mT @ J
        flat = self.rows.flatten(0, 1)
        self.H = flat.T @ flat / N

    def eigenpairs(self, indices):
        rows = self.rows[indices]
        return GramFactor(RowMatrix((rows,))).eigenpairs(1e-6, K)

    def quadratics(self, U):
        """u' H_n u of every sample, (N, k)."""
        return (self.rows @ U).square().sum(1)


@pytest.fixture(scope="module")
def population():
    return Population()


def moments(quadratics):
    return DirectionalMoments(len(quadratics), quadratics.mean(0), quadratics.std(0, correction=1))


def z_of(errors):
    """Return the z-scores of the rows' mean: of each column, and of all together."""
    n, k = errors.shape
    each = errors.mean(0) / (errors.std(0) / n**0.5)
    covariance = torch.cov(errors.T).reshape(k, k)
    T = n * errors.mean(0) @ torch.linalg.solve(covariance, errors.mean(0))
    return each, float((T - k) / math.sqrt(2 * k))


def test_population_is_the_package_s(population):
    """Exact partner: a fit on drawn samples gives the same as the formulas below."""
    model, data = population.model, population.data
    la = DebiasedLaplace(
        model,
        "classification",
        magnitudes="held_out",
        complement="none",
        sampling="uniform",
        rank=K,
        direction_samples=A,
        prior_precision=0.4,
        seed=1,
    )
    given = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: A + B]
    la.fit(DataLoader(Subset(data, given.tolist()), batch_size=50), n_data=N)
    a, b = given[la.split.direction_indices], given[la.split.magnitude_indices]
    pairs = population.eigenpairs(a)
    found = held_out(pairs.values, moments(population.quadratics(pairs.vectors)[b]), n_a=A, n_data=N)
    torch.testing.assert_close(la.directional_curvatures, found.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(la.standard_errors, found.standard_errors, rtol=1e-9, atol=0)
    torch.testing.assert_close(la.in_sample_curvatures, found.in_sample, rtol=1e-9, atol=0)


def test_magnitudes_along_fixed_directions(population):
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(N, generator=generator)
    a, rest = order[:A], order[A:]
    pairs = population.eigenpairs(a)
    quadratics = population.quadratics(pairs.vectors)
    truth = (pairs.vectors * (population.H @ pairs.vectors)).sum(0)
    values, errors = [], []
    for _ in range(2 * DRAWS):
        b = rest[torch.randperm(N - A, generator=generator)[:B]]
        found = held_out(pairs.values, moments(quadratics[b]), n_a=A, n_data=N)
        values.append(found.values)
        errors.append(found.standard_errors)
    values, errors = torch.stack(values), torch.stack(errors)
    each, together = z_of(values - truth)
    assert float(each.abs().max()) < 4
    assert abs(together) < 4
    # without the share of a the same draws are seen to be wrong: the test has power
    alone = (values - A / N * pairs.values) / (1 - A / N)
    assert float(z_of(alone - truth)[0].abs().max()) > 10
    # the reported errors are those of the draws
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert float((ratio - 1).abs().max()) < 0.15


def test_magnitudes_over_draws_of_both(population):
    generator = torch.Generator().manual_seed(3)
    split, biased, shares = [], [], []
    for _ in range(DRAWS // 2):
        order = torch.randperm(N, generator=generator)
        a, b = order[:A], order[A : A + B]
        pairs = population.eigenpairs(a)
        U = pairs.vectors
        truth = (U * (population.H @ U)).sum(0)
        quadratics = population.quadratics(U)
        split.append(held_out(pairs.values, moments(quadratics[b]), n_a=A, n_data=N).values - truth)
        own = same_batch(pairs.values, moments(quadratics[a]), n_data=N)
        biased.append(own.values - truth)
        shares.append(own.values / truth)
    each, together = z_of(torch.stack(split))
    assert float(each.abs().max()) < 4
    assert abs(together) < 4
    each, _ = z_of(torch.stack(biased))
    assert float(each[:6].min()) > 10  # the leading values are too large, the trailing ones too small
    assert float(each[-1]) < -10
    assert float(torch.stack(shares).mean(0)[0]) > 1.1


def test_sums_of_leading_values_are_too_large_and_trailing_ones_too_small(population):
    """Ky Fan's and Jensen's inequalities, on matrices small enough to compute all eigenvalues."""
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.eigh(population.H)[1][:, -5:]
    rows = population.rows @ basis
    H = torch.einsum("nri,nrj->ij", rows, rows) / N
    truth = torch.linalg.eigvalsh(H)
    found = []
    for _ in range(DRAWS):
        some = rows[torch.randperm(N, generator=generator)[:40]]
        found.append(torch.linalg.eigvalsh(torch.einsum("nri,nrj->ij", some, some) / 40))
    errors = torch.stack(found) - truth
    each, _ = z_of(errors[:, [0]])
    assert float(each) < -4
    for k in range(1, 5):
        each, _ = z_of(errors[:, -k:].sum(1, keepdim=True))
        assert float(each) > 4


# --- the held-out KL ---

POSTERIORS = {
    "held out": {"direction_samples": 30},
    "same batch": {"magnitudes": "same_batch"},
    "rank 5": {"direction_samples": 30, "rank": 5},
    "rank 5, isotropic": {"direction_samples": 30, "rank": 5, "complement": "isotropic"},
    "rank 5, diagonal": {"direction_samples": 30, "rank": 5, "complement": "diagonal"},
    "rank 20, diagonal": {"direction_samples": 30, "rank": 20, "complement": "diagonal"},
    "same batch, rank 5, diagonal": {"magnitudes": "same_batch", "rank": 5, "complement": "diagonal"},
    "same batch, rank 20": {"magnitudes": "same_batch", "rank": 20},
}
PRIOR, TEMPERATURE, FITTED = 0.4, 1.3, 60


class Judged:
    """Posteriors fitted to the same samples, their true KL, and the terms of every other sample."""

    def __init__(self, population):
        self.rest = torch.arange(FITTED, N)
        self.full = dense_posterior_precision(population.H, n_data=N, prior_precision=PRIOR, temperature=TEMPERATURE)
        self.constant = 0.5 * (len(self.full) + float(torch.linalg.slogdet(self.full)[1]))
        self.posteriors, self.kl, self.parts = {}, {}, {}
        for name, options in POSTERIORS.items():
            la = DebiasedLaplace(
                population.model,
                "classification",
                prior_precision=PRIOR,
                temperature=TEMPERATURE,
                **{"magnitudes": "held_out", "complement": "none", "sampling": "uniform", **options},
            )
            la.fit(DataLoader(Subset(population.data, range(FITTED)), batch_size=32), n_data=N)
            operator = la.posterior_precision
            dense = operator.to_dense()
            terms = KLTerms(
                PRIOR * float(torch.trace(torch.linalg.inv(dense))),
                float(operator.log_det),
                N / TEMPERATURE,
            )
            self.posteriors[name] = la
            self.kl[name] = dense_kl(dense, self.full)
            self.parts[name] = terms, sample_terms(terms, map(operator.variance_trace, population.rows.split(100)))

    def estimate(self, name, c):
        terms, of_all = self.parts[name]
        return estimate_held_out_kl(
            terms,
            of_all[c],
            of_all[:FITTED],
            n_data=N,
            n_fitted=FITTED,
            n_held_out=len(c),
            sample_keys=c,
            context="",
        )


@pytest.fixture(scope="module")
def evaluated(population):
    return Judged(population)


@pytest.mark.parametrize("name", POSTERIORS)
def test_public_value_is_the_estimate_below(name, evaluated, population):
    """Exact partner of the statistical tests."""
    c = torch.arange(100, 180)
    loaders = [DataLoader(Subset(population.data, i), batch_size=32) for i in (range(100, 180), range(FITTED))]
    found, expected = evaluated.posteriors[name].held_out_kl(*loaders), evaluated.estimate(name, c)
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-7)


def draws_of(evaluated, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return [evaluated.rest[torch.randperm(len(evaluated.rest), generator=generator)[:n]] for _ in range(2 * DRAWS)]


@pytest.mark.parametrize("name", ["held out", "same batch", "rank 5, diagonal"])
def test_held_out_kl_is_the_kl_on_average(name, evaluated):
    estimates = [evaluated.estimate(name, c) for c in draws_of(evaluated, 80, 5)]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)[:, None]
    each, _ = z_of(values - evaluated.constant - evaluated.kl[name])
    assert abs(float(each)) < 4
    errors = torch.tensor([e.standard_error for e in estimates])
    assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("pair", [("same batch", "held out"), ("rank 5", "rank 5, diagonal")])
def test_differences_are_those_of_the_kls(pair, evaluated):
    differences = [evaluated.estimate(pair[0], c) - evaluated.estimate(pair[1], c) for c in draws_of(evaluated, 80, 6)]
    values = torch.tensor([d.value for d in differences], dtype=torch.float64)[:, None]
    truth = evaluated.kl[pair[0]] - evaluated.kl[pair[1]]
    each, _ = z_of(values - truth)
    assert abs(float(each)) < 4
    errors = torch.tensor([d.standard_error for d in differences])
    assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.15)
    # it has power, and pairing by sample takes noise away
    assert abs(float(z_of(values)[0])) > 10
    apart = [[evaluated.estimate(name, c).standard_error for name in pair] for c in draws_of(evaluated, 80, 6)[:50]]
    assert float(errors.mean()) < float(torch.tensor(apart).norm(dim=1).mean())


def test_on_the_fitted_samples_the_biased_posterior_looks_better(evaluated):
    """The reason why overlap is refused."""
    held, same = evaluated.parts["held out"], evaluated.parts["same batch"]

    def in_sample(terms, of_all):
        return 0.5 * terms.prior_trace + 0.5 * terms.log_det + float(of_all[:FITTED].mean())

    assert in_sample(*same) < in_sample(*held)
    assert evaluated.kl["same batch"] > evaluated.kl["held out"]


def test_it_orders_posteriors_as_the_kl_does(evaluated):
    names = list(POSTERIORS)
    agreements = []
    for c in draws_of(evaluated, 120, 7)[:20]:
        values = [evaluated.estimate(name, c).value for name in names]
        pairs = [(i, j) for i in range(len(names)) for j in range(i)]
        agree = [(values[i] - values[j]) * (evaluated.kl[names[i]] - evaluated.kl[names[j]]) > 0 for i, j in pairs]
        agreements.append(2 * sum(agree) / len(pairs) - 1)  # Kendall's tau
    assert sum(agreements) / len(agreements) > 0.8
