"""A diagnosis against dense matrices, and its bias for data whose full batch is known."""

import math

import pytest
import torch
from models import mlp, targets
from oracles import dense_empirical_fisher, dense_ggn, dense_gradients, mean_of, naive_conjugate_gradients
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace.diagnosis import Diagnosis, Ratio, diagnose
from debiased_laplace.diagnosis.draws import STEPS

SIZES = [8, 12]


@pytest.fixture(scope="module")
def problem():
    model, X = mlp()
    return model, X, targets("classification")


def found(problem, **options) -> Diagnosis:
    model, X, y = problem
    options = {"batch_sizes": SIZES, "n_draws": 2, "damping": 0.03, "prior_precision": None, "seed": 3, **options}
    return diagnose(model, "classification", DataLoader(TensorDataset(X, y), batch_size=7), **options)


def drawn(draw: int, seed: int = 3) -> torch.Tensor:
    return torch.randperm(40, generator=torch.Generator().manual_seed(seed + 1000 * draw))


@pytest.mark.parametrize("kind", ["ggn", "ef"])
def test_own_and_unbiased_values_are_those_of_dense_matrices(problem, kind):
    model, X, y = problem
    n_data = 50
    diagnosis = found(problem, curvature=kind, n_reference=20, n_data=n_data)
    samples = dense_ggn(model, X, "classification")[0] if kind == "ggn" else None
    if samples is None:
        samples = dense_empirical_fisher(model, X, y, "classification")[0]
    gradients = dense_gradients(model, X, y, "classification")
    for draw in range(2):
        order = drawn(draw)
        c = order[12:32]
        for batch in diagnosis.batches:
            B = batch.batch_size
            a, f = order[:B], B / n_data
            own = mean_of(samples, a)
            unbiased = f * own + (1 - f) * mean_of(samples, c)
            g, truth = gradients[a].mean(0), f * gradients[a].mean(0) + (1 - f) * gradients[c].mean(0)
            values, U = (t.flip(-1) for t in torch.linalg.eigh(own))
            k = batch.leading.own.shape[1]
            assert k > 3
            torch.testing.assert_close(batch.leading.own[draw], values[:k], rtol=1e-8, atol=1e-12)
            expected = ((U[:, :k].T @ unbiased) * U[:, :k].T).sum(1)
            torch.testing.assert_close(batch.leading.unbiased[draw], expected, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(batch.gradient.own[draw], (g @ g)[None])
            torch.testing.assert_close(batch.gradient.unbiased[draw], (g @ truth)[None])
            damped = own + 0.03 * torch.eye(len(own), dtype=own.dtype)
            for j, steps in enumerate(STEPS[:2]):
                x = naive_conjugate_gradients(damped, -g, steps)[0]
                torch.testing.assert_close(batch.decrease.own[draw, j], -(g @ x + x @ own @ x / 2))
                torch.testing.assert_close(batch.decrease.unbiased[draw, j], -(truth @ x + x @ unbiased @ x / 2))


def test_trailing_curvatures_are_the_last_ones_within_the_numerical_rank(problem):
    model, X, _ = problem
    diagnosis = found(problem, batch_sizes=[16], n_draws=1)
    own = mean_of(dense_ggn(model, X, "classification")[0], drawn(0)[:16])
    values = torch.linalg.eigvalsh(own).flip(0)
    supported = values[values > 1e-6 * values[0]]
    assert len(supported) > 20
    trailing = diagnosis.batches[0].trailing
    torch.testing.assert_close(trailing.own[0, -1], supported[-1], rtol=1e-6, atol=1e-14)
    assert trailing.own.shape[1] <= 10
    assert bool((trailing.own[0] <= supported[-len(supported) // 10 - 1]).all())


@pytest.mark.slow
def test_unbiased_values_have_the_full_batch_as_their_mean():
    """Over draws of a linear network, whose curvature is independent of its weights; the batch's own are biased."""
    torch.manual_seed(0)
    n, P = 300, 20
    X = torch.randn(n, P, dtype=torch.float64) * torch.arange(1, P + 1, dtype=torch.float64).pow(-0.5)
    y = X @ torch.randn(P, 1, dtype=torch.float64) + 0.5 * torch.randn(n, 1, dtype=torch.float64)
    model = nn.Linear(P, 1, bias=False).double()
    loader = DataLoader(TensorDataset(X, y), batch_size=50)
    draws = 40
    options = {"batch_sizes": [30], "n_draws": draws, "prior_precision": None, "damping": 0.1}
    diagnosis = diagnose(model, "regression", loader, **options)
    H = X.T @ X / n
    batch = diagnosis.batches[0]
    own, unbiased = batch.leading.own[:, 0], batch.leading.unbiased[:, 0]
    truth = []
    for draw in range(draws):
        a = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * draw))[:30]
        u = torch.linalg.eigh(X[a].T @ X[a] / 30).eigenvectors[:, -1]
        truth.append(u @ H @ u)
    truth = torch.stack(truth)
    # batch and 270 reference samples are the full batch, so that the unbiased value is exact
    torch.testing.assert_close(unbiased, truth)
    z = (own - truth).mean() / ((own - truth).std() / draws**0.5)
    assert z > 5
    assert batch.leading.ratio(slice(0, 1)).low > 1.05
    few = diagnose(model, "regression", loader, n_reference=25, **options)
    difference = few.batches[0].leading.unbiased[:, 0] - truth
    assert difference.abs().max() > 0.05
    assert abs(difference.mean() / (difference.std() / draws**0.5)) < 3


@pytest.mark.slow
def test_the_seed_determines_the_findings_and_the_model_is_left_as_it_was(problem):
    model = problem[0]
    model.train()
    before = [p.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    one, two, other = found(problem), found(problem), found(problem, seed=4)
    assert model.training
    model.eval()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.batches[0].leading.own, two.batches[0].leading.own)
    assert not torch.equal(one.batches[0].leading.own, other.batches[0].leading.own)


def test_table_figure_and_text_show_the_findings(problem):
    diagnosis = found(problem)
    table = diagnosis.table()
    assert [row[0] for row in table.rows] == ["8", "12"]
    figure = diagnosis.figure()
    assert figure.alt == diagnosis.summary()
    assert "samples in the batch" in figure.svg
    text = str(diagnosis)
    assert text.startswith("The first curvature of a batch of 8 is ")
    assert all(len(line) < 130 for line in text.splitlines()[2:10])
    assert "nan" not in text + figure.svg
    assert repr(diagnosis) == "Diagnosis(93 parameters, batches of 8, 12, 2 draws)"


def test_one_draw_has_no_error_bars(problem):
    text = str(found(problem, n_draws=1))
    assert "±" not in text.split("Mean over")[0]
    assert "nan" not in text
    assert found(problem, n_draws=1).enough is None
    assert "With one draw" in text
    assert "detect" not in text.split("Mean over")[0]


def test_enough_is_the_smallest_size_from_which_on_no_excess_is_detected():
    from dataclasses import replace

    from debiased_laplace.diagnosis.findings import BatchFindings, Pairs

    def batch(size: int, excess: float) -> BatchFindings:
        noise = torch.tensor([[-0.01], [0.01], [0.0]], dtype=torch.float64)
        pairs = Pairs(1 + excess + noise, torch.ones(3, 1, dtype=torch.float64))
        return BatchFindings(size, pairs, pairs, pairs, pairs, pairs, None)

    base = Diagnosis((batch(32, 0.5), batch(64, 0.3), batch(128, 0.05)), (1,), 3, 9, 99, 9, "ggn", 0.1, None, 0.0)
    assert base.enough == 128
    assert replace(base, batches=base.batches[:2]).enough is None
    assert replace(base, batches=(batch(32, 0.0), batch(64, 0.3), batch(128, 0.05))).enough == 128
    assert "From batches of 128 on" in base.summary()


def test_the_summary_says_where_debiasing_or_a_step_does_harm(problem):
    from dataclasses import replace

    base = found(problem)
    better, worse = (
        replace(b, posterior=torch.tensor([x, x + 1]), decrease=replace(b.decrease, unbiased=0 * b.decrease.own + x))
        for b, x in zip((base.batches[0],) * 2, (2.0, -2.0), strict=True)
    )
    words = ("further away", "raise the quadratic of all data")
    for batch, told in ((better, False), (worse, True)):
        summary = replace(base, batches=(batch,), prior_precision=0.7).summary()
        assert [w in summary for w in words] == [told, told]


def test_the_standard_error_of_a_ratio_is_that_over_draws():
    a, b = torch.tensor([2.0, 4.0, 3.0]), torch.tensor([1.0, 2.0, 1.5])
    assert Ratio.of_means(a, b) == Ratio(2.0, 0.0)
    assert math.isnan(Ratio.of_means(a, 0 * b).value)
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.1 * torch.randn(20000, 30, generator=generator, dtype=torch.float64)
    y = 2 + 0.3 * torch.randn(20000, 30, generator=generator, dtype=torch.float64) + 0.5 * x
    ratios = (x.mean(1) / y.mean(1)).std()
    error = torch.tensor([Ratio.of_means(x[i], y[i]).standard_error for i in range(500)]).mean()
    assert error == pytest.approx(float(ratios), rel=0.05)


WRONG = {
    "no sizes": ({"batch_sizes": []}, "batch_sizes"),
    "all samples": ({"batch_sizes": [40]}, "leaving some of the 40"),
    "size 1": ({"batch_sizes": [1]}, "from 2 to 38"),
    "no draws": ({"n_draws": 0}, "n_draws must be an integer of at least 1"),
    "negative damping": ({"damping": -0.5}, "damping must be a finite number of at least 0"),
    "no prior": ({"prior_precision": 0.0}, "prior_precision must be positive"),
    "n_data too small": ({"n_data": 39}, "n_data must be an integer of at least 40"),
    "too few for the default sizes": ({"batch_sizes": None}, "Pass batch_sizes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(problem, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        found(problem, **options)
