"""The optimizer: its steps, acceptance test, state and damping, and a network trained from scratch."""

import copy
import io
import math

import jaxtyping
import pytest
import torch
from models import batch_norm_net, layer_norm_net, mlp, targets
from quadratic_cases import close
from sklearn.datasets import load_digits
from torch import nn

from debiased_laplace import DebiasedNewton, quadratic_along
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.data.batches import Batch
from debiased_laplace.newton import optimizer as newton_optimizer
from debiased_laplace.newton.acceptance import adapt_damping
from debiased_laplace.newton.split import disjoint_split


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def small(likelihood: str = "classification", dtype=torch.float64):
    model, X = mlp(dtype=dtype)
    return model, X, targets(likelihood, dtype=dtype)


def test_a_step_is_the_newton_step_of_two_parts_tested_on_the_third() -> None:
    model, X, _ = small("regression")
    y = X[:, :3] - 2 * X[:, 1:]  # there is something to learn
    before = flat(model)
    optimizer = DebiasedNewton(
        model.parameters(), model, "regression", damping=0.7, weight_decay=0.04, max_iterations=5, seed=3
    )
    a, b, held_out = disjoint_split(Batch(X, y), (0.375, 0.375, 0.25), 3)
    assert (len(a), len(b), len(held_out)) == (15, 15, 10)
    # the two passes of newton_step
    updates = []
    for first, second in ((a, b), (b, a)):
        rows = torch.cat([first, second])
        expected = _held_out_by_position(model, X[rows], y[rows], len(first), 0.7, 0.04)
        updates.append(expected)
    loss = optimizer.step(lambda: (X, y))
    report = optimizer.last_step
    assert report is not None
    assert report.accepted
    assert report.damping == 0.7
    close(flat(model) - before, report.acceptance.scale * (updates[0] + updates[1]) / 2, 1e-6)
    decay = 0.02 * float(before.square().sum())
    outputs = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(before, outputs.parameters())
    losses = likelihood_named("regression").per_sample_loss(outputs(X), y).detach()
    assert loss == report.loss == pytest.approx(float(losses.mean()) + decay, rel=1e-9)
    # the acceptance test, from the losses of the held-out samples
    after = likelihood_named("regression").per_sample_loss(model(X), y).detach()
    changes = (after - losses)[held_out]
    change = float(changes.mean()) + 0.02 * float(flat(model).square().sum()) - decay
    assert report.acceptance.change == pytest.approx(change, rel=1e-6)
    assert report.acceptance.standard_error == pytest.approx(float(changes.std()) / 10**0.5, rel=1e-6)
    step = (flat(model) - before)[:, None] / report.acceptance.scale
    torch.nn.utils.vector_to_parameters(before, outputs.parameters())
    q = quadratic_along(outputs, "regression", (X[held_out], y[held_out]), step)
    torch.nn.utils.vector_to_parameters(before + step[:, 0], outputs.parameters())
    changes = (likelihood_named("regression").per_sample_loss(outputs(X), y).detach() - losses)[held_out]
    model_error = float(changes.mean()) - (float(q(torch.ones(1))) - q.value)
    assert report.acceptance.model_error == pytest.approx(model_error, rel=1e-6, abs=1e-12)
    damped = float(q.curvature_matrix) + (0.7 + 0.04) * float(step.square().sum())
    assert report.acceptance.quadratic_term == pytest.approx(damped / 2, rel=1e-6)
    assert report.acceptance.trials == 1 - math.log2(report.acceptance.scale)


@pytest.mark.parametrize("n_data", [40, 160])
def test_held_out_samples_stand_for_all_that_are_not_in_the_step(n_data: int) -> None:
    model, X, _ = small("regression")
    y = X[:, :3] - 2 * X[:, 1:]
    optimizer = DebiasedNewton(model.parameters(), model, "regression", weight_decay=0.04, n_data=n_data, seed=3)
    before, per_sample = copy.deepcopy(model), likelihood_named("regression").per_sample_loss
    optimizer.step(lambda: (X, y))
    acceptance = optimizer.last_step.acceptance
    assert acceptance.accepted
    a, b, held_out = disjoint_split(Batch(X, y), (0.375, 0.375, 0.25), 3)
    changes = (per_sample(model(X), y) - per_sample(before(X), y)).detach()
    own = 30 / n_data
    decay = 0.02 * float(flat(model).square().sum() - flat(before).square().sum())
    change = own * float(changes[torch.cat([a, b])].mean()) + (1 - own) * float(changes[held_out].mean()) + decay
    assert acceptance.change == pytest.approx(change, rel=1e-9)
    if n_data == 40:  # there are no other samples
        assert change == pytest.approx(float(changes.mean()) + decay, rel=1e-9)
        assert acceptance.standard_error == 0
    else:
        error = (1 - own) * float(changes[held_out].std()) * ((1 - 10 / 130) / 10) ** 0.5
        assert acceptance.standard_error == pytest.approx(error, rel=1e-9)


def test_n_data_below_a_batch_is_a_value_error() -> None:
    model, X, y = small()
    optimizer = DebiasedNewton(model.parameters(), model, "classification", n_data=39)
    with pytest.raises(ValueError, match="n_data must be an integer of at least 40"):
        optimizer.step(lambda: (X, y))


def _held_out_by_position(model, X, y, n_first: int, damping: float, decay: float) -> torch.Tensor:
    """Return the update with directions from the first samples and steps from the others, by dense matrices."""
    from oracles import dense_ggn, dense_gradients, naive_directional_steps

    g = torch.stack(list(dense_gradients(model, X, y, "regression")))
    H = torch.stack(dense_ggn(model, X, "regression")[0])
    extra = (damping + decay) * torch.eye(g.shape[1], dtype=g.dtype)
    sets = (g[:n_first], H[:n_first]), (g[n_first:], H[n_first:])
    return naive_directional_steps(*sets, decay * flat(model), extra, 5, shrinkage=True).update


def test_only_parameters_in_the_groups_move_and_each_group_has_its_own_decay() -> None:
    model, X, y = small()
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    groups = [{"params": model[0].parameters(), "weight_decay": 3.0}, {"params": [model[4].weight]}]
    optimizer = DebiasedNewton(groups, model, "classification")
    for _ in range(5):
        optimizer.step(lambda: (X, y))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, frozen[k])}
    assert moved == {"0.weight", "0.bias", "4.weight"}
    # weight decay shrinks the first layer
    assert float(model[0].weight.detach().norm()) < float(frozen["0.weight"].norm())
    model2, _, _ = small()
    plain = DebiasedNewton([*model2[0].parameters(), model2[4].weight], model2, "classification")
    for _ in range(5):
        plain.step(lambda: (X, y))
    assert float(model[0].weight.detach().norm()) < float(model2[0].weight.detach().norm())
    optimizer.add_param_group({"params": [model[2].bias], "weight_decay": 0.1})
    optimizer.step(lambda: (X, y))


def test_frozen_parameters_stay() -> None:
    model, X, y = small()
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    optimizer = DebiasedNewton(model.parameters(), model, "classification")
    optimizer.step(lambda: (X, y))
    assert torch.equal(model[2].weight, before)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        optimizer.step(lambda: (X, y))


def test_a_loaded_state_continues_the_run() -> None:
    model, X, y = small()
    optimizer = DebiasedNewton(model.parameters(), model, "classification", seed=5)
    for _ in range(3):
        optimizer.step(lambda: (X, y))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small()[0]
    other.load_state_dict(saved["model"])
    resumed = DebiasedNewton(other.parameters(), other, "classification", seed=5)
    assert resumed.damping == 0.1
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.damping == optimizer.damping != 0.1
    for _ in range(2):
        assert optimizer.step(lambda: (X, y)) == resumed.step(lambda: (X, y))
    assert torch.equal(flat(model), flat(other))
    assert optimizer.damping == resumed.damping


def test_batches_are_split_anew_at_every_step(monkeypatch) -> None:
    seeds = []

    def recorded(batch, shares, seed):
        seeds.append(seed)
        return disjoint_split(batch, shares, seed)

    monkeypatch.setattr(newton_optimizer, "disjoint_split", recorded)
    model, X, y = small()
    optimizer = DebiasedNewton(model.parameters(), model, "classification", seed=5)
    for _ in range(3):
        optimizer.step(lambda: (X, y))
    assert len(set(seeds)) == 3


def test_a_refused_step_changes_nothing_but_the_damping() -> None:
    """Only the held-out samples have wrong labels, so that every step of the others raises their loss."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Linear(3, 2).double()
        X = torch.randn(40, 3, dtype=torch.float64)
    y = (X[:, 0] > 0).long()
    parts = disjoint_split(Batch(X, y), (0.375, 0.375, 0.25), 0)
    y[parts[2]] = 1 - y[parts[2]]
    parts_again = disjoint_split(Batch(X, y), (0.375, 0.375, 0.25), 0)
    assert all(torch.equal(p, q) for p, q in zip(parts, parts_again, strict=True))
    before = flat(model)
    optimizer = DebiasedNewton(model.parameters(), model, "classification")
    optimizer.step(lambda: (X, y))
    report = optimizer.last_step
    assert not report.accepted
    assert report.acceptance.change > 0
    assert report.acceptance.scale == 0.125
    assert torch.equal(flat(model), before)


def test_damping_grows_where_the_quadratic_cannot_be_trusted() -> None:
    """With an exponential, a Gauss-Newton step far from the minimum overshoots by orders of magnitude."""

    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.full((1, 1), -3.0, dtype=torch.float64))

        def forward(self, x):
            return torch.exp(x @ self.a)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        X = 1 + 0.1 * torch.randn(60, 1, dtype=torch.float64)
    y = torch.exp(X)
    model = Exponential()
    optimizer = DebiasedNewton(model.parameters(), model, "regression", damping=1e-4)
    dampings, losses = [], []
    for _ in range(30):
        losses.append(optimizer.step(lambda: (X, y)))
        dampings.append(optimizer.damping)
    assert max(dampings) > 1e-3
    assert losses[-1] < 1e-3 * losses[0]
    # near the minimum the quadratic is accurate again
    assert dampings[-1] < max(dampings) / 2


def test_damping_follows_the_relative_model_error() -> None:
    for error, factor in ((0.0, 2 / 3), (0.2, 2 / 3), (0.5, 1.0), (1.0, 1.5), (3.0, 4.0), (math.inf, 4.0)):
        assert adapt_damping(0.3, error) == pytest.approx(0.3 * factor)
    assert adapt_damping(1e-8, 0.0) == 1e-8
    assert adapt_damping(1e8, 9.0) == 1e8


@pytest.mark.parametrize("build", [batch_norm_net, layer_norm_net])
@pytest.mark.parametrize("magnitudes", ["cross_fitted", "held_out", "same_batch"])
def test_models_with_normalization_keep_modes_buffers_and_gradients(build, magnitudes: str) -> None:
    model, X = build()
    y = targets("classification")
    model.train()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    optimizer = DebiasedNewton(model.parameters(), model, "classification", magnitudes=magnitudes)
    first = optimizer.step(lambda: (X, y))
    for _ in range(6):
        last = optimizer.step(lambda: (X, y))
    assert last < first
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(bool((p.grad == 0.5).all()) for p in model.parameters())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("curvature", ["ggn", "ef", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_curvature_lowers_the_loss_in_both_precisions(curvature: str, dtype: torch.dtype) -> None:
    model, X, y = small(dtype=dtype)
    optimizer = DebiasedNewton(model.parameters(), model, "classification", curvature=curvature, damping=1.0)
    losses = [optimizer.step(lambda: (X, y)) for _ in range(6)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert flat(model).dtype == dtype


def test_the_seed_determines_the_steps() -> None:
    weights = []
    for seed in (1, 1, 2):
        model, X, y = small()
        optimizer = DebiasedNewton(model.parameters(), model, "classification", seed=seed)
        for _ in range(3):
            optimizer.step(lambda: (X, y))  # noqa: B023
        weights.append(flat(model))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_small_convolutional_network_is_trained_from_scratch_without_a_learning_rate() -> None:
    images, labels = load_digits(return_X_y=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 12, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)
        )
        order = torch.randperm(len(labels))[:800]
    X = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    optimizer = DebiasedNewton(model.parameters(), model, "classification", max_iterations=12, n_data=len(X))
    generator = torch.Generator().manual_seed(0)

    def losses() -> torch.Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(X), y, reduction="none")

    start = before = losses()
    accepted = 0
    for _ in range(40):
        drawn = torch.randperm(len(X), generator=generator)[:256]
        optimizer.step(lambda drawn=drawn: (X[drawn], y[drawn]))
        after, report = losses(), optimizer.last_step
        if report.accepted:
            accepted += 1
            # no accepted step raises the training loss by more than the standard error of its estimated change
            assert float((after - before).mean()) < report.acceptance.standard_error
            assert report.acceptance.change < -report.acceptance.standard_error
        else:
            assert torch.equal(after, before)
        before = after
    assert accepted >= 15
    assert float(start.mean()) > 2
    assert float(before.mean()) < 0.35


WRONG = {
    "no damping": ({"damping": 0.0}, "damping"),
    "negative damping": ({"damping": -1.0}, "damping"),
    "all samples held out": ({"judging_share": 1.0}, "judging_share"),
    "no samples held out": ({"judging_share": 0.0}, "judging_share"),
    "negative weight decay": ({"weight_decay": -0.1}, "weight_decay"),
    "unknown magnitudes": ({"magnitudes": "jackknife"}, "magnitudes"),
    "unknown likelihood": ({"likelihood": "bernoulli"}, "likelihood"),
    "no iterations": ({"max_iterations": 0}, "max_iterations"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_value_errors(name: str) -> None:
    model, _, _ = small()
    change, message = WRONG[name]
    given = {"params": model.parameters(), "model": model, "likelihood": "classification", **change}
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        DebiasedNewton(**given)


def test_wrong_use_is_a_value_error() -> None:
    model, X, y = small()
    with pytest.raises(ValueError, match="parameters of the model"):
        DebiasedNewton(nn.Linear(2, 2).parameters(), model, "classification")
    optimizer = DebiasedNewton(model.parameters(), model, "classification")
    with pytest.raises(ValueError, match="closure that returns the batch"):
        optimizer.step()
    with pytest.raises(ValueError, match="Expected batches"):
        optimizer.step(lambda: nn.functional.cross_entropy(model(X), y))
    with pytest.raises(ValueError, match="at least 2 samples in each"):
        optimizer.step(lambda: (X[:4], y[:4]))
    with pytest.raises(ValueError, match="labels"):
        optimizer.step(lambda: (X, y + 3))
    before = flat(model)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite weights"):
        optimizer.step(lambda: (X, y))
    with torch.no_grad():
        model[0].weight[0, 0] = before[0]
    assert math.isfinite(optimizer.step(lambda: (X, y)))


def test_without_a_step_there_is_nothing_to_adapt_the_damping_by() -> None:
    model, X, y = small("regression")
    with torch.no_grad():
        # residuals, and so gradients, are exactly zero, whatever the order of summation
        model[4].weight.zero_()
        model[4].bias.zero_()
    optimizer = DebiasedNewton(model.parameters(), model, "regression", damping=0.3)
    assert optimizer.step(lambda: (X, 0 * y)) == 0
    assert optimizer.last_step.acceptance is None
    assert optimizer.damping == 0.3


def test_a_copy_continues_like_the_original() -> None:
    model, X, y = small()
    optimizer = DebiasedNewton([{"params": []}, {"params": list(model.parameters())}], model, "classification")
    optimizer.step(lambda: (X, y))
    other, copied = copy.deepcopy((model, optimizer))
    for _ in range(2):
        assert optimizer.step(lambda: (X, y)) == copied.step(lambda: (X, y))
    assert torch.equal(flat(model), flat(other))
    assert copied.damping == optimizer.damping


def test_the_state_of_another_optimizer_is_refused() -> None:
    model, X, y = small()
    other = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    nn.functional.cross_entropy(model(X), y).backward()
    other.step()
    optimizer = DebiasedNewton(model.parameters(), model, "classification", damping=0.3)
    with pytest.raises(ValueError, match="damping and n_steps"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.damping == 0.3
