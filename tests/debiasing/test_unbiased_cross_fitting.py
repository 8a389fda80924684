"""Over draws of samples, cross-fitted magnitudes are nearly right along their directions, same-batch ones are not."""

import pytest
import torch
from oracles import dense_kl, dense_posterior_precision
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.sub_batch import DirectionalMoments
from debiased_laplace.debiasing.cross_fitting import each_fold, extended, pooled
from debiased_laplace.debiasing.magnitudes import cross_fitted
from debiased_laplace.linalg.gram import GramFactor
from debiased_laplace.linalg.held_out_rows import HeldOutRows
from debiased_laplace.linalg.row_matrix import RowMatrix

N, N_FOLDS, LEADING = 300, 8, 10
PRIOR, TEMPERATURE = 0.4, 1.3


class Population:
    """A small classifier, its data, and the root rows of every sample's GGN."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.X = torch.randn(N, 5).double()
            self.y = torch.randint(4, (N,))
            self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(2)
        parameters = {k: p.detach() for k, p in self.model.named_parameters()}

        def outputs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.model, parameters, (x[None],))[0]

        jacobian = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(parameters, self.X)
        J = torch.cat([jacobian[k].flatten(2) for k in parameters], dim=2)
        p = torch.softmax(self.model(self.X).detach(), -1)
        S = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
        self.rows = S.mT @ J
        flat = self.rows.flatten(0, 1)
        self.H = flat.T @ flat / N
        self.full = dense_posterior_precision(self.H, n_data=N, prior_precision=PRIOR, temperature=TEMPERATURE)

    def estimates(self, chosen: Tensor, folds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Directions, their true curvatures, and the eigenvalues and the cross-fitted values of some samples."""
        r = self.rows.shape[1]
        factor = GramFactor(RowMatrix((self.rows[chosen],)))
        pairs = factor.eigenpairs(1e-6)
        found = []
        for fold in each_fold(folds):
            rows = HeldOutRows.of(factor, torch.isin(factor.sample_of_row, fold.held), 1e-6, len(pairs.values))
            values = rows.projections.square().unflatten(0, (-1, r)).sum(1)
            moments = DirectionalMoments(len(values), values.mean(0), values.std(0, correction=1))
            found.append(extended(moments, len(pairs.values)))
        magnitudes = cross_fitted(pairs.values, pooled(found), n_data=N, decreasing=True)
        U = pairs.vectors
        return U, (U * (self.H @ U)).sum(0), pairs.values, magnitudes.values

    def kl(self, U: Tensor, magnitudes: Tensor) -> float:
        """Return the KL of the posterior with these directions and no complement to that of all data."""
        precision = N / TEMPERATURE * (U * magnitudes) @ U.T + PRIOR * torch.eye(len(U), dtype=U.dtype)
        return dense_kl(precision, self.full)


@pytest.fixture(scope="module")
def population() -> Population:
    return Population()


def draws(n: int, n_draws: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.arange(n) % N_FOLDS
    return [
        (
            torch.randperm(N, generator=generator)[:n].sort().values,
            dealt[torch.randperm(n, generator=generator)],
        )
        for _ in range(n_draws)
    ]


def test_population_is_the_package_s(population: Population) -> None:
    """Exact partner: a fit gives the same as the formulas above with its folds."""
    chosen = draws(24, 1, 1)[0][0]
    la = DebiasedLaplace(
        population.model,
        "classification",
        magnitudes="cross_fitted",
        n_folds=N_FOLDS,
        complement="none",
        sampling="uniform",
        prior_precision=PRIOR,
        temperature=TEMPERATURE,
    )
    la.fit([(population.X[chosen], population.y[chosen])], n_data=N)
    U, _, in_sample, values = population.estimates(chosen, la.split.folds)
    torch.testing.assert_close(la.in_sample_curvatures, in_sample, rtol=1e-9, atol=0)
    torch.testing.assert_close(la.directional_curvatures, values, rtol=1e-9, atol=0)
    found = dense_kl(la.posterior_precision.to_dense(), population.full)
    assert found == pytest.approx(population.kl(U, values), rel=1e-8)


@pytest.mark.parametrize("n", [16, 32])
def test_cross_fitting_removes_the_bias_of_the_same_batch(n: int, population: Population) -> None:
    errors: dict[str, list[Tensor]] = {"same_batch": [], "cross_fitted": []}
    for chosen, folds in draws(n, 100, 2):
        _, truth, in_sample, values = population.estimates(chosen, folds)
        errors["same_batch"].append((in_sample - truth)[:LEADING])
        errors["cross_fitted"].append((values - truth)[:LEADING])
    biased, ours = (torch.stack(errors[name]) for name in ("same_batch", "cross_fitted"))
    # every leading eigenvalue is too large, which these draws can tell
    z = biased.mean(0) / (biased.std(0) / len(biased) ** 0.5)
    assert float(z[:5].min()) > 6
    # values of nearly equal index swap places between folds, so that a little is left of each, but not of their sum
    assert float(ours.mean(0).abs().sum()) < 0.3 * float(biased.mean(0).abs().sum())
    z_of_sums = [float(e.sum(1).mean() / (e.sum(1).std() / len(e) ** 0.5)) for e in (biased, ours)]
    assert z_of_sums[0] > 20
    assert abs(z_of_sums[1]) < 4


@pytest.mark.parametrize(("n", "ratio"), [(16, 1.3), (32, 2.0), (64, 1.5)])
def test_the_posterior_is_closer_to_the_full_batch(n: int, ratio: float, population: Population) -> None:
    ours, biased = [], []
    for chosen, folds in draws(n, 12, 3):
        U, _, in_sample, values = population.estimates(chosen, folds)
        ours.append(population.kl(U, values))
        biased.append(population.kl(U, in_sample))
    assert sum(biased) > ratio * sum(ours)
    assert sum(b > o for b, o in zip(biased, ours, strict=True)) >= 11  # of 12 draws


def test_missing_directions_filled_with_the_trailing_values_are_better_than_zeros(population: Population) -> None:
    filled, zeros = [], []
    for chosen, folds in draws(16, 8, 4):
        U, truth, _, values = population.estimates(chosen, folds)
        filled.append(population.kl(U, values))
        # as many as the others of the smallest fold support: the trailing ones of all samples have no match there
        known = 3 * (len(chosen) - 2)
        zeros.append(population.kl(U, torch.where(torch.arange(len(truth)) < known, values, 0 * values)))
    assert sum(zeros) > 1.2 * sum(filled)
