"""Newton steps whose curvature is that of drawn rows."""

import pytest
import torch
from oracles import dense_ggn
from quadratic_cases import built, close, regularizer

from debiased_laplace import DebiasedNewton, newton_step
from debiased_laplace.curvature.roots import GaussNewton
from debiased_laplace.data.batches import Batch
from debiased_laplace.quadratics.batch_quadratic import batch_quadratic
from debiased_laplace.quadratics.drawn_rows import DrawnRowsQuadratic
from debiased_laplace.quadratics.preparation import prepare_network_and_batch

DAMPING = 0.03
EVERY = 10**6


@pytest.mark.parametrize("magnitudes", ["cross_fitted", "same_batch"])
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize(
    ("name", "likelihood"),
    [("MLP", "classification"), ("BatchNorm", "regression"), ("GRU", "classification"), ("transformer", "regression")],
)
def test_all_rows_give_the_step_of_all_samples(name: str, likelihood: str, curvature: str, magnitudes: str) -> None:
    model, X, y = built(name, likelihood)
    weights = torch.linspace(0.5, 2, len(X)).double()
    prior = regularizer(sum(p.numel() for p in model.parameters()))
    options = {"curvature": curvature, "max_iterations": 5, "stopping": "none", "regularizer": prior, "seed": 3}
    arguments = (model, likelihood, (X, y, weights), DAMPING, magnitudes)
    expected, found = (newton_step(*arguments, n_rows=n, **options) for n in (None, EVERY))
    for key in ("update", "directions", "slopes", "curvatures", "slope_standard_errors", "curvature_standard_errors"):
        close(getattr(found, key), getattr(expected, key), 1e-7)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


def test_some_rows_are_unbiased_and_few() -> None:
    model, X, y = built("MLP")
    network, samples = prepare_network_and_batch(model, "classification", Batch(X, y))
    H = dense_ggn(model, X, "classification")[1]
    U = torch.randn(len(H), 3, generator=torch.Generator().manual_seed(1)).double()
    along, products, sizes = [], [], []
    unused = U.new_zeros(len(X), 3, 3)
    for seed in range(300):
        drawn = DrawnRowsQuadratic(network, samples, GaussNewton(network.likelihood), n_rows=12, seed=seed)
        along.append(drawn.curvatures(U, unused).mean(0))
        products.append(drawn.product(U[:, 0]) @ U)
        sizes.append(len(drawn.samples))
        close(drawn.curvature_matrix(U, unused).diagonal() / len(X), along[-1])
    assert 11 < sum(sizes) / len(sizes) < 13
    expected = (U * (H @ U)).sum(0), U.T @ H @ U[:, 0]
    for found, truth in zip((torch.stack(along), torch.stack(products)), expected, strict=True):
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - truth).abs() < 4 * error).all())
        # an error of a tenth would be seen
        assert bool((error[0] < 0.025 * truth[0].abs()).all())


def test_positions_follow_the_quadratic_of_the_drawn_rows() -> None:
    model, X, y = built("MLP")
    network, samples = prepare_network_and_batch(model, "classification", Batch(X, y))
    drawn = DrawnRowsQuadratic(network, samples, GaussNewton(network.likelihood), n_rows=9, seed=2)
    V = drawn.scale * drawn.rows.dense()[:, 0]
    U = torch.randn(V.shape[1], 2, generator=torch.Generator().manual_seed(1)).double()
    position = drawn.position()
    position.prepare(U)
    before = position.along(1)
    position.move(0, 0.7)
    slopes, curvatures = position.along(1)
    of_sample = (drawn.samples[:, None] == torch.arange(len(X))).double()
    close(slopes - before[0], of_sample.T @ ((V @ U[:, 1]) * (V @ U[:, 0] * 0.7)))
    close(curvatures, of_sample.T @ (V @ U[:, 1]).square())
    whole = batch_quadratic(network, samples, "ggn")
    close(before[0], whole.slopes(whole.pushed(U))[:, 1])


def test_no_product_passes_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, X, y = built("MLP")
    network, samples = prepare_network_and_batch(model, "classification", Batch(X, y))
    drawn = DrawnRowsQuadratic(network, samples, GaussNewton(network.likelihood), n_rows=9, seed=2)
    monkeypatch.setattr(type(drawn._linearized), "pulled", None)
    monkeypatch.setattr(type(drawn._linearized), "pushed", None)
    assert bool((drawn.product(network.like.new_ones(network.n_parameters)) != 0).any())


def test_a_batch_without_curvature_takes_the_step_of_the_damping() -> None:
    model, X, y = built("MLP")
    with torch.no_grad():
        # one probability is 1 and the others 0, and so is every entry of the softmax's curvature
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([0.0, 1e4, 0.0]))
    step = newton_step(model, "classification", (X, y), DAMPING, "same_batch", n_rows=5, shrinkage=False)
    plain = newton_step(model, "classification", (X, y), DAMPING, "same_batch", shrinkage=False)
    close(step.update, plain.update)


def test_the_seed_fixes_the_draw() -> None:
    model, X, y = built("MLP")
    one, same, other = (
        newton_step(model, "classification", (X, y), 0.03, "same_batch", n_rows=6, seed=seed).update
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("curvature", ["ggn", "ef"])
def test_an_optimizer_lowers_the_loss_with_few_rows(curvature: str) -> None:
    model = built("MLP")[0]
    X = torch.randn(200, 4, generator=torch.Generator().manual_seed(5)).double()
    y = (X[:, 0] > 0).long() + (X[:, 1] * X[:, 2] > 0.5).long()
    optimizer = DebiasedNewton(model.parameters(), model, "classification", curvature=curvature, n_rows=40)
    losses = [optimizer.step(lambda: (X, y)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.untyped
def test_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, X, y = built("MLP")
    with pytest.raises(ValueError, match="no rows to draw"):
        newton_step(model, "classification", (X, y), curvature="hessian", n_rows=10)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="n_rows"):
            newton_step(model, "classification", (X, y), n_rows=wrong)
    with pytest.raises(ValueError, match="n_rows"):
        DebiasedNewton(model.parameters(), model, "classification", n_rows=0)

    def one_row_of_each_half() -> None:
        for seed in range(50):
            newton_step(model, "classification", (X, y), n_rows=1, seed=seed)

    with pytest.raises(ValueError, match="drew no row"):
        one_row_of_each_half()
    monkeypatch.setattr("debiased_laplace.curvature.network.Network.available_memory", 100)
    with pytest.raises(ValueError, match="expected a smaller n_rows"):
        newton_step(model, "classification", (X, y), n_rows=10)
