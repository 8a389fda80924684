"""Debiased Newton steps against a naive transcription on dense matrices, and against SciPy's conjugate gradients."""

import copy
import math
from itertools import combinations

import jaxtyping
import numpy as np
import pytest
import torch
from models import mlp, targets
from oracles import dense_ggn, dense_gradients, flat_parameters, naive_directional_steps
from quadratic_cases import CURVATURES, N, built, close, dense_regularizer, oracle, regularizer
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn

from debiased_laplace import Regularizer, newton_step, quadratic_along
from debiased_laplace.curvature import derivatives as module
from debiased_laplace.data.batches import Batch
from debiased_laplace.newton.directional_steps import (
    DirectionalMeasurement,
    DirectionalSteps,
    directional_steps,
    step_along,
)
from debiased_laplace.newton.finite_population import FinitePopulation
from debiased_laplace.newton.options import StepOptions
from debiased_laplace.newton.split import disjoint_halves
from debiased_laplace.quadratics.batch_quadratic import batch_quadratic
from debiased_laplace.quadratics.preparation import prepare_network_and_batch
from debiased_laplace.quadratics.regularizer import as_penalty

DAMPING = 0.03
NAMES = ["MLP", "convolutions and pooling", "BatchNorm", "LayerNorm and raw parameters", "transformer", "GRU"]


def naive(name: str, likelihood: str, curvature: str, rows: tuple[Tensor, Tensor], **options):
    model = built(name, likelihood)[0]
    _, g, H = oracle(name, likelihood, curvature)
    _, r_gradient, r_hessian = dense_regularizer(model)
    damped = r_hessian + DAMPING * torch.eye(len(r_gradient), dtype=g.dtype)
    a, b = ((g[i], H[i]) for i in rows)
    return naive_directional_steps(a, b, r_gradient, damped, **options)


def check_steps(found: DirectionalSteps, expected, rtol: float = 1e-7) -> None:
    close(found.directions, torch.stack(expected.directions, 1), rtol)
    close(found.slopes, torch.tensor(expected.slopes, dtype=torch.float64), rtol)
    close(found.slope_standard_errors, torch.tensor(expected.errors, dtype=torch.float64), rtol)
    close(found.curvatures, torch.tensor(expected.curvatures, dtype=torch.float64), rtol)
    close(found.step_lengths, torch.tensor(expected.steps, dtype=torch.float64), rtol)
    close(found.predicted_decreases, torch.tensor(expected.decreases, dtype=torch.float64), rtol)
    close(found.update, expected.update, rtol)


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize(("name", "likelihood"), [*((n, "classification") for n in NAMES), ("BatchNorm", "regression")])
def test_naive_transcription(name: str, likelihood: str, curvature: str, shrinkage: bool) -> None:
    model, X, y = built(name, likelihood)
    iterations = 6
    rows = disjoint_halves(Batch(X, y), seed=3)
    expected = [
        naive(name, likelihood, curvature, pair, iterations=iterations, shrinkage=shrinkage)
        for pair in (rows, rows[::-1])
    ]
    prior = regularizer(len(flat_parameters(model)))
    options = {"shrinkage": shrinkage, "max_iterations": iterations, "regularizer": prior, "curvature": curvature}
    found = newton_step(model, likelihood, (X, y), DAMPING, **options, stopping="none", seed=3)
    for steps, naive_steps in zip(found.passes, expected, strict=True):
        check_steps(steps, naive_steps)
    close(found.update, (expected[0].update + expected[1].update) / 2, 1e-7)
    close(found.directions @ found.step_lengths, found.update)
    assert found.iterations == found.products == found.outcome.derivatives == 2 * iterations
    assert found.outcome.status == "iteration limit"
    assert found.predicted_decrease == pytest.approx(sum(expected[0].decreases + expected[1].decreases) / 2, rel=1e-6)
    losses = oracle(name, likelihood, curvature)[0]
    assert found.loss == pytest.approx(float(losses.mean()) + dense_regularizer(model)[0], rel=1e-9)
    held_out = newton_step(model, likelihood, (X, y), DAMPING, "held_out", **options, stopping="none", seed=3)
    check_steps(held_out.passes[0], expected[0])
    assert torch.equal(held_out.update, found.passes[0].update)
    assert held_out.outcome.products == held_out.outcome.derivatives == iterations


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling", "LSTM"])
def test_the_biased_step_uses_the_same_samples_twice(name: str, curvature: str, shrinkage: bool) -> None:
    model, X, y = built(name)
    everyone = torch.arange(N)
    expected = naive(name, "classification", curvature, (everyone, everyone), iterations=6, shrinkage=shrinkage)
    prior = regularizer(len(flat_parameters(model)))
    options = {"shrinkage": shrinkage, "max_iterations": 6, "regularizer": prior, "curvature": curvature}
    found = newton_step(model, "classification", (X, y), DAMPING, "same_batch", **options)
    check_steps(found.passes[0], expected)
    assert found.outcome.derivatives == 0


def population(n: int = 60, dtype=torch.float64):
    """Return a briefly trained network with more samples than models.py gives."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model, _ = mlp(dtype=torch.float64)
        X = torch.randn(n, 4, dtype=torch.float64)
        y = (X @ torch.randn(4, 3, dtype=torch.float64) + 0.5 * torch.randn(n, 3, dtype=torch.float64)).argmax(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(15):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), y).backward()
            optimizer.step()
        model.zero_grad()
    return model.to(dtype), X.to(dtype), y


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("extra", [0, 1, 25])
def test_naive_transcription_with_a_known_number_of_samples(curvature: str, extra: int) -> None:
    """The samples of the directions count with their share of N, the others for the rest."""
    model, X, y = built("MLP")
    rows, n_data = disjoint_halves(Batch(X, y), seed=3), N + extra
    prior = Regularizer(0.4, n_data=n_data)
    weights = flat_parameters(model)
    precision = 0.4 / n_data
    _, g, H = oracle("MLP", "classification", curvature)
    damping = 2.0 if curvature == "hessian" else DAMPING  # positive definite
    damped = (damping + precision) * torch.eye(len(weights), dtype=g.dtype)
    options = {"max_iterations": 3, "curvature": curvature, "stopping": "none", "seed": 3}
    for shrinkage in (True, False):
        found = newton_step(
            model, "classification", (X, y), damping, regularizer=0.4, n_data=n_data, shrinkage=shrinkage, **options
        )
        for one, (a, b) in zip(found.passes, (rows, rows[::-1]), strict=True):
            sets = (g[a], H[a]), (g[b], H[b])
            expected = naive_directional_steps(
                *sets, precision * weights, damped, 3, shrinkage=shrinkage, n_data=n_data
            )
            check_steps(one, expected)
        # n_data is the N of the regularizer too
        again = newton_step(
            model, "classification", (X, y), damping, regularizer=prior, n_data=n_data, shrinkage=shrinkage, **options
        )
        assert torch.equal(found.update, again.update)
    if extra == 0:  # all samples are observed
        assert float(found.slope_standard_errors.max()) == 0


def test_slopes_weighted_by_shares_are_unbiased_for_all_samples() -> None:
    """For a fixed direction, the mean over all held-out sets is the slope of all samples."""
    model, X, y = population(n=9)
    a, others = [0, 2, 3, 7], [1, 4, 5, 6, 8]
    network, samples = prepare_network_and_batch(model, "classification", Batch(X, y))
    penalty = as_penalty(0.4, network.selection.vector(), 9).damped(DAMPING)
    options = StepOptions(True, 1, 1e-9, "none")
    own = batch_quadratic(network, samples.at(torch.tensor(a)), "ggn")
    found = [
        directional_steps(own, batch_quadratic(network, samples.at(torch.tensor(b)), "ggn"), penalty, options, 9)
        for b in combinations(others, 3)
    ]
    p = found[0].directions[:, 0]
    g = torch.stack(list(dense_gradients(model, X, y, "classification"))).mean(0) + 0.4 / 9 * flat_parameters(model)
    H = torch.stack(dense_ggn(model, X, "classification")[0]).mean(0) + (0.4 / 9 + DAMPING) * torch.eye(
        len(g), dtype=g.dtype
    )
    slopes = torch.cat([one.slopes for one in found])
    assert float(slopes.mean()) == pytest.approx(float(p @ g), rel=1e-9)
    assert float(torch.cat([one.curvatures for one in found]).mean()) == pytest.approx(float(p @ H @ p), rel=1e-9)
    # and so is the square of the standard error
    squares = torch.cat([one.slope_standard_errors for one in found]).square()
    assert float(squares.mean()) == pytest.approx(float(slopes.var(correction=0)), rel=1e-9)
    # the held-out samples alone are biased by far more
    alone = directional_steps(own, batch_quadratic(network, samples.at(torch.tensor(others)), "ggn"), penalty, options)
    assert abs(float(alone.slopes) - float(p @ g)) > 0.1 * abs(float(p @ g))


def test_a_biased_step_of_all_samples_has_no_error_to_shrink_by() -> None:
    model, X, y = built("MLP")
    plain = newton_step(model, "classification", (X, y), DAMPING, "same_batch", shrinkage=False)
    found = newton_step(model, "classification", (X, y), DAMPING, "same_batch", n_data=N)
    close(found.update, plain.update)
    part = newton_step(model, "classification", (X, y), DAMPING, "same_batch", n_data=4 * N)
    unknown = newton_step(model, "classification", (X, y), DAMPING, "same_batch")
    close(part.slope_standard_errors[:1], unknown.slope_standard_errors[:1] * 0.75**0.5)


@pytest.mark.parametrize("n_data", [N - 1, 0, True])
def test_an_invalid_n_data_is_a_value_error(n_data) -> None:
    model, X, y = built("MLP")
    with pytest.raises(ValueError, match=f"n_data must be an integer of at least {N}"):
        newton_step(model, "classification", (X, y), n_data=n_data)


@pytest.mark.parametrize("shrinkage", [True, False])
def test_stopping_by_the_held_out_decrease(shrinkage: bool) -> None:
    model, X, y = population()
    g = torch.stack(list(dense_gradients(model, X, y, "classification")))
    H = torch.stack(dense_ggn(model, X, "classification")[0])
    P = g.shape[1]
    extra = DAMPING * torch.eye(P, dtype=g.dtype)
    statuses, sizes = [], set()
    for seed in range(12):
        rows = disjoint_halves(Batch(X, y), seed)
        a, b = ((g[i], H[i]) for i in rows)
        expected = naive_directional_steps(a, b, 0 * g[0], extra, 8, shrinkage=shrinkage, stopping=True)
        options = {"shrinkage": shrinkage, "max_iterations": 8, "seed": seed}
        found = newton_step(model, "classification", (X, y), DAMPING, "held_out", **options)
        check_steps(found.passes[0], expected, 1e-5)  # rounding grows with the iterations
        statuses.append(found.outcome.status)
        sizes |= set(found.passes[0].iterations)
        assert found.iterations == found.products == sum(found.passes[0].iterations)
        assert found.outcome.derivatives == len(expected.steps)
        if statuses[-1] == "no held-out decrease":
            assert found.passes[0].iterations[-1] == 1
            assert "no slope beyond chance" in found.outcome.reason
    # the case covers both ways to end, and segments of several lengths
    assert set(statuses) == {"no held-out decrease", "iteration limit"}
    assert {1, 4} <= sizes


@pytest.mark.parametrize("shrinkage", [True, False])
def test_there_is_no_step_along_a_slope_within_three_standard_errors(shrinkage: bool) -> None:
    model, X, y = population()
    left_out = taken = 0
    for seed in range(6):
        step = newton_step(model, "classification", (X, y), DAMPING, shrinkage=shrinkage, seed=seed)
        s, e, c = step.slopes, step.slope_standard_errors, step.curvatures
        falls = s.abs() > 3 * e
        kept = 1 - (e / s).square() if shrinkage else torch.ones_like(s)
        close(step.step_lengths, torch.where(falls, -kept * s / c, 0.0) / 2)
        assert torch.equal(step.predicted_decreases == 0, ~falls)
        left_out, taken = left_out + int((~falls).sum()), taken + int(falls.sum())
    assert min(left_out, taken) > 5


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0])
def test_predicted_decreases_are_unbiased(shrinkage: bool, ratio: float) -> None:
    """Slopes have normal noise of standard error 1 around a true slope of `ratio`."""
    slopes = ratio + torch.randn(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    infinite, c = FinitePopulation(0.0, 1.0), 2.5
    measured = [DirectionalMeasurement(float(s), c, 1.0, 0.0) for s in slopes]
    steps = [step_along(m, (0.0, 0.0), infinite, shrinkage=shrinkage) for m in measured]
    actual = torch.tensor([-(step.length * ratio + step.length**2 * c / 2) for step in steps])
    difference = torch.tensor([step.decrease for step in steps]) - actual
    error = float(difference.std()) / len(slopes) ** 0.5
    assert abs(float(difference.mean())) < 4 * error
    assert error < 0.01
    if shrinkage and ratio == 0:
        # without Stein's correction the prediction is far too large
        naive = torch.tensor([step.length**2 * c / 2 for step in steps])
        assert float((naive - actual).mean()) > 20 * error


def test_steps_on_the_full_batch_are_conjugate_gradients_of_scipy() -> None:
    model, X, y = population()
    g = torch.stack(list(dense_gradients(model, X, y, "classification"))).mean(0)
    H = dense_ggn(model, X, "classification")[1]
    operator = LinearOperator(H.shape, lambda v: H.numpy() @ v, dtype=np.float64)
    for iterations in (1, 3, 8):
        theirs, _ = cg(operator, -g.numpy(), rtol=0.0, maxiter=iterations)
        ours = newton_step(
            model, "classification", (X, y), 0.0, "same_batch", shrinkage=False, max_iterations=iterations
        )
        close(ours.update, torch.from_numpy(theirs), 1e-7)
    # with a preconditioner
    jacobi = 1 / (H.diagonal() + 0.02)
    theirs, _ = cg(operator, -g.numpy(), rtol=0.0, maxiter=6, M=np.diag(jacobi.numpy()))
    ours = newton_step(
        model,
        "classification",
        (X, y),
        0.0,
        "same_batch",
        shrinkage=False,
        max_iterations=6,
        preconditioner=lambda r: jacobi * r,
    )
    close(ours.update, torch.from_numpy(theirs), 1e-7)


def test_the_step_reaches_the_minimum_of_the_damped_quadratic() -> None:
    model, X, y = population()
    g = torch.stack(list(dense_gradients(model, X, y, "classification"))).mean(0)
    H = dense_ggn(model, X, "classification")[1]
    step = newton_step(
        model, "classification", (X, y), DAMPING, "same_batch", shrinkage=False, max_iterations=200, tolerance=1e-10
    )
    assert step.outcome.status == "converged"
    close(step.update, torch.linalg.solve(H + DAMPING * torch.eye(len(g), dtype=g.dtype), -g), 1e-7)
    # without a correction for noise, the in-sample decrease is exact
    q = quadratic_along(model, "classification", (X, y), step.update[:, None], regularizer=None)
    damped = float(q(torch.ones(1))) + DAMPING * float(step.update.square().sum()) / 2
    steps = step.passes[0]
    in_sample = (steps.slopes.square() / steps.curvatures / 2).sum()
    assert q.value - damped == pytest.approx(float(in_sample), rel=1e-8)


def test_steps_never_raise_the_quadratic_of_the_held_out_samples() -> None:
    """Steps computed separately raised it in half of the draws; sequential steps cannot, shrunken or not."""
    model, X, y = population()
    for seed in range(4):
        b = disjoint_halves(Batch(X, y), seed)[1]
        for shrinkage in (True, False):
            step = newton_step(
                model,
                "classification",
                (X, y),
                DAMPING,
                "held_out",
                shrinkage=shrinkage,
                max_iterations=10,
                stopping="none",
                seed=seed,
            )
            one = step.passes[0]
            path = torch.cat([torch.zeros_like(one.update)[:, None], (one.directions * one.step_lengths).cumsum(1)], 1)
            q = quadratic_along(model, "classification", (X[b], y[b]), path)
            damping = DAMPING * path.square().sum(0) / 2
            values = q(torch.eye(path.shape[1])) + damping
            assert bool((values.diff() <= 1e-12).all())


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
def test_slopes_and_curvatures_on_held_out_samples_are_unbiased(magnitudes: str) -> None:
    """z-scores, over draws of b, of the first slope and of all curvatures for the samples that b is drawn from."""
    model, X, y = population(60)
    g = torch.stack(list(dense_gradients(model, X, y, "classification")))
    H = torch.stack(dense_ggn(model, X, "classification")[0])
    k, draws = 3, 120
    errors = []
    for draw in range(draws):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(draw))
        batch = order[:24] if magnitudes == "held_out" else order[:12]
        data, options = (X[batch], y[batch]), {"max_iterations": k, "stopping": "none", "seed": 1}
        step = newton_step(model, "classification", data, DAMPING, magnitudes, **options)
        U = step.directions
        a = batch[disjoint_halves(Batch(*data), 1)[0]] if magnitudes == "held_out" else batch
        rest = torch.tensor([i for i in range(60) if i not in a.tolist()])
        truth = ((U * (H[rest].mean(0) @ U)).sum(0) + DAMPING * U.square().sum(0), g[rest].mean(0) @ U[:, 0])
        scale = U.square().sum(0)
        errors.append(torch.cat([(step.curvatures - truth[0]) / scale, ((step.slopes[0] - truth[1]) / scale[0])[None]]))
    E = torch.stack(errors)
    z = E.mean(0) / (E.std(0) / draws**0.5)
    if magnitudes == "held_out":
        assert float(z.abs().max()) < 4
    else:
        # the same number of samples for both: curvature along the first direction too large, slope too steep
        assert float(z[0]) > 6
        assert float(z[-1]) < -6


def test_halves_swap_roles() -> None:
    model, X, y = population()
    step = newton_step(model, "classification", (X, y), seed=7, max_iterations=5, stopping="none")
    a, b = disjoint_halves(Batch(X, y), 7)
    for one, first in zip(step.passes, (a, b), strict=True):
        G = torch.stack(list(dense_gradients(model, X[first], y[first], "classification"))).mean(0)
        close(one.directions[:, 0], -G)


def test_the_seed_determines_the_step() -> None:
    model, X, y = population()
    first, again, other = (newton_step(model, "classification", (X, y), seed=s) for s in (5, 5, 6))
    assert torch.equal(first.update, again.update)
    assert torch.equal(first.slopes, again.slopes)
    assert not torch.equal(first.update, other.update)
    before = torch.get_rng_state()
    newton_step(model, "classification", (X, y), seed=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_samples_stay_in_one_half() -> None:
    X = torch.arange(20.0).repeat_interleave(torch.tensor([3, 1] * 10))[:, None]
    y = torch.zeros(len(X), dtype=torch.int64)
    for seed in range(20):
        a, b = disjoint_halves(Batch(X, y), seed)
        assert torch.equal(torch.cat([a, b]).sort().values, torch.arange(len(X)))
        assert not torch.isin(X[a], X[b]).any()
        assert abs(len(a) - len(b)) <= 3
    a, b = disjoint_halves(Batch(torch.arange(7.0)[:, None], y[:7]), 0)
    assert (len(a), len(b)) == (3, 4)
    assert not torch.equal(a, disjoint_halves(Batch(torch.arange(7.0)[:, None], y[:7]), 1)[0])


@pytest.mark.parametrize("shrinkage", [True, False])
def test_a_hessian_with_negative_curvature(shrinkage: bool) -> None:
    model, X, y = built("MLP", "regression")
    _, g, H = oracle("MLP", "regression", "hessian")
    rows = disjoint_halves(Batch(X, y), 0)
    smallest = min(float(torch.linalg.eigvalsh(H[i].mean(0))[0]) for i in rows)
    assert smallest < -0.1
    step = newton_step(
        model, "regression", (X, y), 1e-3, shrinkage=shrinkage, curvature="hessian", max_iterations=60, stopping="none"
    )
    assert step.outcome.status == "negative curvature"
    assert bool(step.update.isfinite().all())
    assert step.iterations < 120
    for one, (a, b) in zip(step.passes, (rows, rows[::-1]), strict=True):
        k = one.directions.shape[1]
        U = one.directions
        close(one.curvatures, (U * (H[b].mean(0) @ U)).sum(0) + 1e-3 * U.square().sum(0), 1e-6)
        # no step where the held-out samples have no minimum
        assert bool((one.step_lengths[one.curvatures <= 0] == 0).all())
        if k:
            close(U[:, 0], -g[a].mean(0), 1e-7)
    assert step.outcome.negative_curvatures == int((step.curvatures <= 0).sum())
    # with enough damping, the quadratic is convex
    damping = 2.0 - smallest
    damped = newton_step(model, "regression", (X, y), damping, curvature="hessian", stopping="none")
    assert damped.outcome.status in ("converged", "iteration limit")
    assert damped.outcome.negative_curvatures == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling", "LayerNorm and raw parameters", "LSTM"])
def test_naive_transcription_with_the_hessian(name: str) -> None:
    model, X, y = built(name)
    _, g, H = oracle(name, "classification", "hessian")
    rows = disjoint_halves(Batch(X, y), 2)
    damping = 1.0 - min(float(torch.linalg.eigvalsh(H[i].mean(0))[0]) for i in rows)
    extra = damping * torch.eye(g.shape[1], dtype=g.dtype)
    for shrinkage in (True, False):
        step = newton_step(
            model,
            "classification",
            (X, y),
            damping,
            shrinkage=shrinkage,
            curvature="hessian",
            max_iterations=5,
            stopping="none",
            seed=2,
        )
        for one, (a, b) in zip(step.passes, (rows, rows[::-1]), strict=True):
            sets = (g[a], H[a]), (g[b], H[b])
            check_steps(one, naive_directional_steps(*sets, 0 * g[0], extra, 5, shrinkage=shrinkage))
    everyone = torch.arange(N)
    both = (g[everyone], H[everyone])
    biased = newton_step(
        model, "classification", (X, y), damping, "same_batch", curvature="hessian", max_iterations=5, shrinkage=False
    )
    check_steps(biased.passes[0], naive_directional_steps(both, both, 0 * g[0], extra, 5, shrinkage=False))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_single_precision_agrees_with_double(curvature: str) -> None:
    exact = population()
    single = population(dtype=torch.float32)
    options = {"curvature": curvature, "max_iterations": 4, "stopping": "none"}
    expected = newton_step(exact[0], "classification", exact[1:], 0.5, **options)
    found = newton_step(single[0], "classification", single[1:], 0.5, **options)
    assert found.update.dtype == torch.float32
    assert found.slopes.dtype == torch.float64
    close(found.update, expected.update, 1e-2)
    close(found.passes[0].curvatures[:2], expected.passes[0].curvatures[:2], 1e-3)


def test_a_model_without_forward_mode_gives_the_same_step(monkeypatch) -> None:
    model, X, y = built("convolutions and pooling")
    expected = newton_step(model, "classification", (X, y), DAMPING, max_iterations=5, stopping="none")

    def refused(*args, **kwargs):
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(module, "columns", refused)
    found = newton_step(model, "classification", (X, y), DAMPING, max_iterations=5, stopping="none")
    close(found.update, expected.update, 1e-7)


def test_a_network_that_is_linearized_once_gives_the_same_step(monkeypatch) -> None:
    from debiased_laplace.quadratics import batch_quadratic

    model, X, y = built("convolutions and pooling")
    expected = newton_step(model, "classification", (X, y), DAMPING, max_iterations=6, stopping="none")
    traced = []
    original = module._linearize
    monkeypatch.setattr(module, "_linearize", lambda *given: traced.append(1) or original(*given))
    monkeypatch.setattr(batch_quadratic, "_MIN_WORK_FOR_TRACING", 0)
    found = newton_step(model, "classification", (X, y), DAMPING, max_iterations=6, stopping="none")
    assert len(traced) == 3  # one trial, then once per half
    close(found.update, expected.update, 1e-7)


def test_the_model_is_left_as_it_was() -> None:
    model, X, y = built("BatchNorm")
    model.train()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = copy.deepcopy(model.state_dict())
    for data in ((X, y), (X[:, :, :, :2], y)):
        try:
            newton_step(model, "classification", data, max_iterations=3)
        except ValueError:
            assert data[0] is not X
        assert model.training
        assert not model[1].training
        assert all(bool((p.grad == 0.5).all()) for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        newton_step(model, "classification", (X, y), max_iterations=2)


def test_frozen_parameters_have_no_update() -> None:
    model, X, y = built("partly frozen")
    step = newton_step(model, "classification", (X, y), max_iterations=3)
    assert len(step.update) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "NewtonStep(" in repr(step)


def test_a_mapping_of_inputs_gives_the_same_step() -> None:
    class Net(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids):
            return self.inner(input_ids)

    model, X, y = built("MLP")
    expected = newton_step(model, "classification", (X, y), max_iterations=3)
    for data in ({"input_ids": X, "labels": y}, ({"input_ids": X}, y)):
        found = newton_step(Net(model), "classification", data, max_iterations=3)
        # halves are drawn by position, so that they do not depend on the hashes of the samples
        close(found.update, expected.update, 1e-9)


def test_at_a_minimum_there_is_no_step() -> None:
    """At the least-squares solution of a linear model, the gradient of all samples is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        X, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(X, y).solution.T)
    biased = newton_step(model, "regression", (X, y), 0.0, "same_batch", shrinkage=False)
    assert float(biased.update.abs().max()) < 1e-12
    debiased = newton_step(model, "regression", (X, y), 0.0)
    unshrunken = newton_step(model, "regression", (X, y), 0.0, shrinkage=False, stopping="none")
    assert float(debiased.update.norm()) <= float(unshrunken.update.norm())


WRONG = {
    "damping below zero": ({"damping": -1.0}, "damping"),
    "damping that is NaN": ({"damping": math.nan}, "damping"),
    "unknown magnitudes": ({"magnitudes": "jackknife"}, "magnitudes"),
    "unknown curvature": ({"curvature": "fisher"}, "curvature"),
    "unknown stopping": ({"stopping": "never"}, "stopping"),
    "no iterations": ({"max_iterations": 0}, "max_iterations"),
    "half an iteration": ({"max_iterations": 2.5}, "max_iterations"),
    "tolerance below zero": ({"tolerance": -1.0}, "tolerance"),
    "shrinkage that is a string": ({"shrinkage": "yes"}, "shrinkage"),
    "unknown likelihood": ({"likelihood": "bernoulli"}, "likelihood"),
    "regularizer below zero": ({"regularizer": -2.0}, "prior_precision"),
    "a loader": ({"batch": [1, 2, 3]}, "Expected batches"),
    "a preconditioner of another shape": ({"preconditioner": lambda r: r[:3]}, "preconditioner"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_value_error(name: str) -> None:
    model, X, y = built("MLP")
    given = {"likelihood": "classification", "batch": (X, y), "damping": 1e-3, **WRONG[name][0]}
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=WRONG[name][1]):
        newton_step(model, **given)


@pytest.mark.parametrize(
    ("magnitudes", "smallest"), [("cross_fitted", 4), ("held_out", 3), ("same_batch", 2), ("same_batch unshrunken", 1)]
)
def test_too_few_samples_are_a_value_error(magnitudes: str, smallest: int) -> None:
    model, X, y = built("MLP")
    kind, unshrunken = magnitudes.split()[0], "unshrunken" in magnitudes
    options = {"magnitudes": kind, "shrinkage": not unshrunken, "max_iterations": 2, "stopping": "none"}
    step = newton_step(model, "classification", (X[:smallest], y[:smallest]), **options)
    assert bool(step.update.isfinite().all())
    for n in range(smallest):
        with pytest.raises(ValueError, match="at least"):
            newton_step(model, "classification", (X[:n], y[:n]), **options)


def test_equal_samples_that_cannot_be_split_are_a_value_error() -> None:
    model, X, y = built("MLP")
    with pytest.raises(ValueError, match="equal"):
        newton_step(model, "classification", (X[:1].repeat(6, 1), y[:1].repeat(6)))
    rows = torch.tensor([0, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="stay in one half"):
        newton_step(model, "classification", (X[rows], y[rows]))


def test_labels_and_outputs_of_every_sample_are_checked() -> None:
    model, X = mlp()
    y = targets("classification")
    y[33] = 7
    with pytest.raises(ValueError, match="labels"):
        newton_step(model, "classification", (X, y))
    X[21, 0] = math.inf
    with pytest.raises(ValueError, match="finite"):
        newton_step(model, "classification", (X, y.clamp_max(2)))


def test_reliability_is_the_ratio_of_predicted_to_in_sample_decrease() -> None:
    model, X, y = population()
    biased = newton_step(model, "classification", (X, y), 0.1, "same_batch", shrinkage=False, max_iterations=6)
    assert biased.reliability == 1.0
    close(biased.passes[0].in_sample_decreases, biased.slopes.square() / biased.curvatures / 2, 1e-6)
    split = newton_step(model, "classification", (X, y), 0.1, stopping="none", max_iterations=6)
    in_sample = sum(float(one.in_sample_decreases.sum()) for one in split.passes) / 2
    assert split.reliability == pytest.approx(split.predicted_decrease / in_sample)
    assert 0 < split.reliability < 1


@pytest.mark.parametrize("stopping", ["none", "held_out"])
def test_slopes_that_overflow_end_a_step(stopping: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, X = nn.Linear(4, 3), torch.randn(40, 4)
    y = torch.full((40, 3), 1e19)  # whose squares are beyond single precision
    step = newton_step(model, "regression", (X, y), stopping=stopping)
    assert step.outcome.status == "breakdown"
    assert "not finite" in step.outcome.reason
    assert torch.equal(step.update, torch.zeros(15))
    fine = newton_step(model, "regression", (X, y / 1e3), stopping=stopping)
    assert fine.outcome.status != "breakdown"
    assert float(fine.update.norm()) > 0


def test_two_sizes_of_the_training_set_are_refused() -> None:
    model, X, y = built("MLP")
    with pytest.raises(ValueError, match="same n_data twice; got 20, and 30 in the regularizer"):
        newton_step(model, "classification", (X, y), n_data=20, regularizer=Regularizer(0.4, n_data=30))
