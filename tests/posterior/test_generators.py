"""Draws come from the generator that is passed, and from nothing else."""

import pytest
import torch
from posterior_cases import fitted, loader_of, problem
from torch.utils.data import DataLoader, Subset, TensorDataset

DRAWS = {
    "glm mc": ("classification", lambda la, x, g: la(x, link_approx="mc", n_samples=7, generator=g)),
    "glm mc, outputs apart": (
        "classification",
        lambda la, x, g: la(x, link_approx="mc", n_samples=7, diagonal_output=True, generator=g),
    ),
    "nn": ("classification", lambda la, x, g: la(x, pred_type="nn", link_approx="mc", n_samples=7, generator=g)),
    "nn regression": ("regression", lambda la, x, g: la(x, "nn", link_approx="mc", n_samples=7, generator=g)[1]),
    "weights": ("classification", lambda la, x, g: la.sample(7, generator=g)),
    "functions, glm": ("classification", lambda la, x, g: la.functional_samples(x, "glm", 7, generator=g)),
    "functions, glm, outputs apart": (
        "regression",
        lambda la, x, g: la.functional_samples(x, "glm", 7, diagonal_output=True, generator=g),
    ),
    "functions, nn": ("regression", lambda la, x, g: la.functional_samples(x, "nn", 7, generator=g)),
    "predictions, glm": ("classification", lambda la, x, g: la.predictive_samples(x, "glm", 7, generator=g)),
    "predictions, nn": ("classification", lambda la, x, g: la.predictive_samples(x, "nn", 7, generator=g)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_the_generator_decides(draw):
    likelihood, call = DRAWS[draw]
    la, X, _, _ = fitted("MLP", likelihood, rank=8)
    state = torch.random.get_rng_state()
    first = call(la, X[:3], torch.Generator().manual_seed(1))
    again = call(la, X[:3], torch.Generator().manual_seed(1))
    other = call(la, X[:3], torch.Generator().manual_seed(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)


@pytest.mark.parametrize("draw", DRAWS)
def test_without_a_generator_the_global_one_decides(draw):
    likelihood, call = DRAWS[draw]
    la, X, _, _ = fitted("MLP", likelihood, rank=8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = call(la, X[:3], None)
        torch.manual_seed(1)
        again = call(la, X[:3], None)
        assert torch.equal(first, again)
        assert not torch.equal(first, call(la, X[:3], None))


@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_fit_and_held_out_kl_leave_the_global_state_alone():
    _, X, y, _ = problem("transformer", "classification")
    data = TensorDataset(X, y)
    state = torch.random.get_rng_state()
    la, *_ = fitted("transformer", "classification", direction_samples=10, magnitude_samples=12)
    for part in (la.split.direction_indices, la.split.magnitude_indices):
        assert bool((part.diff() > 0).all())
    used = la.split.used_indices
    rest = [i for i in range(40) if i not in set(used.tolist())]
    la.held_out_kl(DataLoader(Subset(data, rest), shuffle=True), DataLoader(Subset(data, used.tolist()), shuffle=True))
    la(X[:2])
    la.log_marginal_likelihood()
    la.optimize_prior_precision(n_steps=2)
    la.optimize_prior_precision(
        method="gridsearch",
        pred_type="nn",
        n_samples=3,
        val_loader=loader_of(X, y),
        grid_size=3,
        log_prior_prec_min=-8.0,
        log_prior_prec_max=8.0,
    )
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_the_seed_fixes_the_fit_whatever_the_global_state(solver):
    options = {"rank": 6, "solver": solver, "direction_samples": 10, "magnitude_samples": 10}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, *_ = fitted("MLP", "classification", seed=5, **options)
        torch.manual_seed(2)
        again, *_ = fitted("MLP", "classification", seed=5, **options)
        other, *_ = fitted("MLP", "classification", seed=6, **options)
    assert torch.equal(first.split.direction_indices, again.split.direction_indices)
    assert torch.equal(first.directions, again.directions)
    assert torch.equal(first.directional_curvatures, again.directional_curvatures)
    assert not torch.equal(first.split.direction_indices, other.split.direction_indices)
