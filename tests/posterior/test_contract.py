"""The contract of every posterior: each of its numbers against one dense posterior in double precision, cell by cell.

`contract_cases` has the cells and the dense posterior. Prior precision, noise and temperature are never 1, the
prior mean is not 0, and N is larger than the samples. A posterior is fitted once; tests change copies of it.
"""

import copy
import io
import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from contract_cases import (
    CELLS,
    ESTIMATORS,
    LAST_LAYER,
    LIKELIHOODS,
    N_DATA,
    N_GIVEN,
    SUBSETS,
    Cell,
    Dense,
    dense,
    fitted,
    loader,
    network_at,
    unfitted,
)
from oracles import dense_log_likelihood, dense_log_marginal_likelihood, flat_parameters
from posterior_cases import close, mean_field
from torch import Tensor

from debiased_laplace.predictive import links

HELD_OUT = torch.arange(N_GIVEN, N_GIVEN + 7)


@dataclass
class Subject:
    """A fitted posterior in a copy of its own, and what it has to be."""

    cell: Cell
    la: object
    dense: Dense

    @property
    def precision(self) -> Tensor:
        la = self.la
        return self.dense.precision(la.prior_precision_diag.detach(), float(la.sigma_noise), la.temperature)

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)

    @property
    def fitted_samples(self) -> Tensor:
        return torch.cat([self.la.split.direction_indices, self.la.split.magnitude_indices]).unique()

    @property
    def log_likelihood(self) -> float:
        """Log likelihood of N samples like those that were fitted."""
        _, X, y, _ = self.cell.problem
        used = self.fitted_samples
        scales = {"sigma_noise": float(self.la.sigma_noise), "temperature": self.la.temperature}
        return dense_log_likelihood(self.la.model, X[used], y[used], self.cell.kind, n_data=N_DATA, **scales)

    @property
    def evidence(self) -> float:
        prior, mean = self.la.prior_precision_diag, self.la.prior_mean
        return dense_log_marginal_likelihood(self.log_likelihood, self.precision, prior, self.dense.center, mean)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """A few inputs, the outputs at the mean, and the Jacobians."""
        x = self.cell.problem[1][: len(self.dense.jacobians)]
        return x, self.la.model(x).detach(), self.dense.jacobians


# of the module, so that all checks of a cell follow one another, in one process
@pytest.fixture(scope="module", params=CELLS)
def key(request) -> str:
    return request.param


@pytest.fixture
def subject(key: str) -> Subject:
    return Subject(CELLS[key], copy.copy(fitted(key)), dense(key))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def unit_vectors(n: int, like: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    return [torch.eye(len(like), dtype=like.dtype)]


def evenly(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def all_close(found, expected, rtol: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        close(one, other, rtol)


def test_no_cell_is_left_out() -> None:
    found = list(CELLS.values())
    assert {(c.estimator, c.subset) for c in found} == set(product(ESTIMATORS, SUBSETS))
    three = list(LIKELIHOODS)[:3]
    structures = ("lowrank", "kron", "full")
    assert {(c.structure, c.subset, c.likelihood) for c in found} >= set(product(structures, SUBSETS, three))
    assert {(c.structure, c.model) for c in found} == set(product(structures, LAST_LAYER))
    assert {(c.subset, c.model) for c in found} >= set(product(SUBSETS, list(LAST_LAYER)[:-1]))


class TestContract:
    def test_directions_magnitudes_and_errors_are_the_dense_ones(self, subject: Subject) -> None:
        la, expected = subject.la, subject.dense
        assert la.n_data == N_DATA
        assert len(subject.fitted_samples) <= N_GIVEN < N_DATA
        close(la.in_sample_curvatures, expected.in_sample)
        close(la.directional_curvatures, expected.magnitudes)
        if expected.standard_errors is not None:
            close(la.standard_errors, expected.standard_errors, 1e-5)
            assert float(la.standard_errors.max()) > 0
        if subject.cell.structure == "kron":
            assert la.rank is None
            return
        U = la.directions
        assert la.rank == len(expected.magnitudes)
        close(U.T @ U, torch.eye(la.rank))
        if subject.cell.structure == "lowrank":  # of "full", the last vectors are lost in rounding
            close(U @ U.T, expected.directions @ expected.directions.T)

    def test_the_gaussian_is_the_dense_one(self, subject: Subject) -> None:
        la, expected = subject.la, subject.dense
        precision, covariance, P = subject.precision, subject.covariance, len(expected.center)
        found = la.posterior_precision
        close(found.to_matrix(), precision)
        close(found.to_dense(), precision)
        X = torch.randn(P, 3, dtype=torch.float64, generator=generator())
        close(found @ X, precision @ X)
        close(found @ X[:, 0], precision @ X[:, 0])
        log_det = torch.linalg.slogdet(precision)[1]
        close(found.logdet(), log_det, 1e-9)
        close(la.log_det_posterior_precision, log_det, 1e-9)
        close(la.posterior_covariance, covariance)
        close(la.posterior_variance, covariance.diagonal())
        root = la.posterior_scale
        close(root @ root.T, covariance)
        torch.testing.assert_close(la.mean_subnet, expected.center, rtol=0, atol=0)
        points = expected.center + 0.2 * X.T
        distances = torch.stack([(p - expected.center) @ precision @ (p - expected.center) for p in points])
        close(la.square_norm(points), distances)
        close(la.log_prob(points, normalized=False), -0.5 * distances)
        close(la.log_prob(points), 0.5 * (log_det - distances - P * math.log(2 * math.pi)))
        close(la.log_prob(points[0]), 0.5 * (log_det - distances[0] - P * math.log(2 * math.pi)))

    def test_predictions_are_those_of_the_dense_covariance(self, subject: Subject) -> None:
        la, covariance = subject.la, subject.covariance
        x, f, J = subject.inputs
        flat = J.flatten(0, 1)
        variance, jointly = J @ covariance @ J.mT, flat @ covariance @ flat.T
        close(la.functional_variance(J), variance)
        close(la.functional_covariance(J), jointly)
        close(la.functional_covariance(flat), jointly)
        all_close(la.backend.jacobians(x), (J, f))
        if subject.cell.subset == "last_layer":
            all_close(la.backend.last_layer_jacobians(x), (J, f))
        else:
            with pytest.raises(ValueError, match="Expected a posterior of the last layer"):
                la.backend.last_layer_jacobians(x)
        alone = variance.diagonal(dim1=1, dim2=2)
        if subject.cell.kind == "regression":
            all_close(la(x), (f, variance))
            all_close(la(x, diagonal_output=True), (f, alone))
            all_close(la(x, joint=True), (f.flatten(), jointly))
            return
        close(la(x), mean_field(f, variance))
        assert not torch.allclose(la(x), torch.softmax(f, -1), rtol=1e-3)
        close(la(x, diagonal_output=True), mean_field(f, torch.diag_embed(alone)))
        shrunk = torch.softmax(f / (1 + math.pi / 8 * alone).sqrt(), -1)
        for diagonal in (False, True):
            close(la(x, link_approx="probit", diagonal_output=diagonal), shrunk)
            draw, spread = (links.independent_draws, alone) if diagonal else (links.gaussian_draws, variance)
            draws = draw(f, spread, n_samples=20, generator=generator())
            found = la(x, link_approx="mc", n_samples=20, diagonal_output=diagonal, generator=generator())
            close(found, torch.softmax(draws, -1).mean(0))
        for link in ("bridge", "bridge_norm"):
            close(la(x, link_approx=link), links.bridge(f, variance, normalized=link == "bridge_norm"))

    def test_draws_are_the_root_times_noise(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        la, expected = subject.la, subject.dense
        trained = flat_parameters(la.model)
        whole = torch.arange(len(trained)) if subject.cell.subset == "subnetwork" else expected.indices
        torch.testing.assert_close(la.mean, trained[whole], rtol=0, atol=0)
        assert la.n_params == len(whole)
        weights = la.sample(3, generator=generator())
        deviations = torch.zeros(3, len(trained), dtype=torch.float64)
        deviations[:, whole] = weights - la.mean
        inside = deviations[:, expected.indices].clone()
        noise = torch.randn(3, len(expected.center), dtype=torch.float64, generator=generator())
        close(inside, noise @ la.posterior_scale.T)
        # entries outside the subset stay at their trained values
        deviations[:, expected.indices] = 0
        assert not deviations.any()
        x, f, J = subject.inputs
        functions = la.functional_samples(x, n_samples=3, generator=generator())
        close(functions, f + torch.einsum("ncp,sp->snc", J, inside))
        networks = la.functional_samples(x, "nn", 3, generator=generator())
        close(networks, torch.stack([network_at(la.model, whole, w)(x).detach() for w in weights]))
        classes = subject.cell.kind == "classification"
        for pred_type, draws in (("glm", functions), ("nn", networks)):
            passed = la.predictive_samples(x, pred_type, 3, generator=generator())
            close(passed, torch.softmax(draws, -1) if classes else draws)
        found = la(x, pred_type="nn", link_approx="mc", n_samples=3, generator=generator())
        if classes:
            close(found, torch.softmax(networks, -1).mean(0))
        else:
            all_close(found, (networks.mean(0), networks.var(0)))
        # the covariance of the maps of unit vectors is that of all draws
        for module in ("posterior.laplace", "predictive.predictive"):
            monkeypatch.setattr(f"debiased_laplace.{module}.standard_normal", unit_vectors)
        deviations = torch.zeros(len(expected.center), len(trained), dtype=torch.float64)
        deviations[:, whole] = la.sample(len(expected.center)) - la.mean
        inside = deviations[:, expected.indices]
        close(inside.T @ inside, subject.covariance)
        moved = (la.functional_samples(x, n_samples=len(expected.center)) - f).flatten(1)
        close(moved.T @ moved, J.flatten(0, 1) @ subject.covariance @ J.flatten(0, 1).T)

    def test_the_evidence_and_its_gradients_are_the_dense_ones(self, subject: Subject) -> None:
        la, expected = subject.la, subject.dense
        close(la.log_likelihood, subject.log_likelihood, 1e-9)
        close(la.scatter, (0.4 * (expected.center - 0.3) ** 2).sum(), 1e-9)
        close(la.log_marginal_likelihood(), subject.evidence, 1e-9)
        # gradients of the dense formula, by a prior for each parameter tensor and by the noise
        sizes = torch.tensor([n for n, _ in expected.shapes])
        assert la.n_layers == len(sizes)
        prior, sigma = evenly(0.3, 2.0, len(sizes)).requires_grad_(), torch.tensor([0.7]).double().requires_grad_()
        regression = subject.cell.kind == "regression"
        log_likelihood = torch.tensor(subject.log_likelihood)
        weight = torch.ones(1, dtype=torch.float64)
        if regression:
            n = N_DATA * la.n_outputs
            squares = log_likelihood + n * math.log(0.7 * (2 * math.pi) ** 0.5)
            weight = 0.7**2 / sigma**2
            log_likelihood = squares * weight - n * (sigma * (2 * math.pi) ** 0.5).log()
        P0 = prior.repeat_interleave(sizes)
        precision = weight * N_DATA / float(la.sigma_noise) ** 2 / la.temperature * expected.curvature + torch.diag(P0)
        ratio = torch.logdet(precision) - P0.log().sum()
        wanted = log_likelihood - 0.5 * (ratio + (P0 * (expected.center - 0.3) ** 2).sum())
        wanted.sum().backward()
        given = [t.detach().clone().requires_grad_() for t in (prior, sigma)]
        found = la.log_marginal_likelihood(given[0], given[1] if regression else None)
        found.sum().backward()
        close(found.sum(), wanted.detach().sum(), 1e-9)
        close(given[0].grad, prior.grad)
        if regression:
            close(given[1].grad, sigma.grad)

    @pytest.mark.parametrize("name", ["prior_precision", "prior of parameters", "prior_mean", "temperature", "sigma"])
    def test_hyper_parameters_take_effect_at_once(self, subject: Subject, name: str) -> None:
        la, P = subject.la, len(subject.dense.center)
        x, f, J = subject.inputs
        before = la.log_marginal_likelihood()
        if name == "prior_precision":
            prior = evenly(0.2, 3.0, la.n_layers)
            la.prior_precision = prior
            sizes = torch.tensor([n for n, _ in subject.dense.shapes])
            assert torch.equal(la.prior_precision_diag, prior.repeat_interleave(sizes))
        elif name == "prior of parameters":
            if subject.cell.in_basis:
                with pytest.raises(ValueError, match=f"its basis mixes the entries of a tensor; got {P}"):
                    la.prior_precision = evenly(0.1, 7.0, P)
                assert la.prior_precision.tolist() == pytest.approx([0.4])
                return
            la.prior_precision = evenly(0.1, 7.0, P)
            assert torch.equal(la.prior_precision_diag, evenly(0.1, 7.0, P))
        elif name == "prior_mean":
            la.prior_mean = evenly(-1, 1, P)
            close(la.scatter, (0.4 * (subject.dense.center - evenly(-1, 1, P)) ** 2).sum(), 1e-9)
        elif name == "temperature":
            la.temperature = 0.45
        elif subject.cell.kind == "classification":
            with pytest.raises(ValueError, match="sigma_noise"):
                la.sigma_noise = 1.9
            return
        else:
            la.sigma_noise = 1.9
        close(la.posterior_precision.to_dense(), subject.precision)
        close(la.log_det_posterior_precision, torch.linalg.slogdet(subject.precision)[1], 1e-9)
        close(la.log_marginal_likelihood(), subject.evidence, 1e-9)
        assert abs(float(la.log_marginal_likelihood() - before)) > 1e-3
        variance = J @ subject.covariance @ J.mT
        close(la.functional_variance(J), variance)
        root = la.posterior_scale
        close(root @ root.T, subject.covariance)
        if subject.cell.kind == "regression":
            close(la(x)[1], variance)
        else:
            shrunk = f / (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
            close(la(x, link_approx="probit"), torch.softmax(shrunk, -1))

    def test_the_held_out_kl_is_the_dense_one(self, subject: Subject) -> None:
        la, used = subject.la, subject.fitted_samples
        f = len(used) / N_DATA
        found = la.held_out_kl(loader(subject.cell, HELD_OUT), loader(subject.cell, used))
        weight = N_DATA / (float(la.sigma_noise) ** 2 * la.temperature)
        covariance = subject.covariance
        terms = torch.stack([0.5 * weight * torch.trace(covariance @ H) for H in subject.dense.per_sample])
        own = 0.5 * (0.4 * torch.trace(covariance) + torch.linalg.slogdet(subject.precision)[1])
        value = own + f * terms[used].mean() + (1 - f) * terms[HELD_OUT].mean()
        assert found.value == pytest.approx(float(value), rel=1e-7)
        unseen = 1 - len(HELD_OUT) / (N_DATA - len(used))
        error = (1 - f) * terms[HELD_OUT].std() * (unseen / len(HELD_OUT)) ** 0.5
        assert found.standard_error == pytest.approx(float(error), rel=1e-6)

    def test_a_tuned_prior_raises_the_evidence(self, subject: Subject) -> None:
        la, cell = subject.la, subject.cell
        before = float(la.log_marginal_likelihood(torch.tensor(6.0)))
        entries = {"scalar": 1, "layerwise": len(subject.dense.shapes), "diag": len(subject.dense.center)}
        for structure, n in entries.items():
            la.prior_precision = 0.4
            if structure == "diag" and cell.in_basis:
                with pytest.raises(ValueError, match="one per parameter tensor"):
                    la.optimize_prior_precision(n_steps=5, prior_structure="diag", init_prior_prec=6.0)
                assert la.prior_precision.tolist() == pytest.approx([0.4])
                continue
            la.optimize_prior_precision(n_steps=8, prior_structure=structure, init_prior_prec=6.0)
            assert la.prior_precision.numel() == n
            assert float(la.log_marginal_likelihood()) > before + 0.05
            close(la.posterior_precision.to_dense(), subject.precision)

    def test_a_state_restores_everything(self, subject: Subject) -> None:
        la, cell = subject.la, subject.cell
        la.prior_precision, la.prior_mean = evenly(0.3, 0.7, la.n_layers), evenly(-1, 1, len(subject.dense.center))
        state = la.state_dict()
        assert {type(v) for v in state.values()} <= {Tensor, str, int, float, bool}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        sigma = 2.2 if cell.kind == "regression" else 1.0
        loaded = unfitted(cell, prior_precision=3.0, temperature=0.6, sigma_noise=sigma, seed=9)
        # the last layer of a posterior that was never fitted is the state's
        assert (loaded.n_params is None) is (cell.subset == "last_layer")
        loaded.load_state_dict(state)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, state[name]) if isinstance(value, Tensor) else value == state[name], name
        assert torch.equal(loaded.mean, la.mean)
        close(loaded.posterior_precision.to_dense(), subject.precision)
        close(loaded.log_marginal_likelihood(), subject.evidence, 1e-9)
        all_close(loaded(subject.inputs[0]), la(subject.inputs[0]), 1e-10)
        close(loaded.sample(2, generator=generator()), la.sample(2, generator=generator()), 1e-10)
        assert (loaded.n_params, loaded.n_layers, repr(loaded)) == (la.n_params, la.n_layers, repr(la))
        folds = loaded.split.folds
        assert torch.equal(folds, la.split.folds) if folds is not None else la.split.folds is None
        if cell.subset == "last_layer":
            named = unfitted(cell, last_layer_name=LAST_LAYER[cell.model])
            assert named.n_params == la.n_params
            named.load_state_dict(state)
            close(named.posterior_precision.to_dense(), subject.precision)
        where = f" of last layer {LAST_LAYER[cell.model]!r}" if cell.subset == "last_layer" else ""
        P = len(subject.dense.center)
        assert repr(la).startswith(f"{type(la).__name__}({cell.kind}, {P:,} parameters{where}, magnitudes=")
        a, b = len(la.split.direction_indices), len(la.split.magnitude_indices)
        assert f"fitted on {a if la.split.shared else f'{a} + {b}'} of {N_DATA} samples)" in repr(la)
        assert ("rank=" in repr(la)) is (cell.structure != "kron")
        assert ("CurvlinopsGGN" in la.curvature_source) is (cell.backend == "CurvlinopsGGN")
