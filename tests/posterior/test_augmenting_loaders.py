"""Loaders that give another version of a sample each time: samples are then known by their position."""

import pytest
import torch
from models import mlp, targets
from posterior_cases import hyper_parameters, posterior_of
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from debiased_laplace.errors import OverlapError


class Augmented(Dataset):
    """Inputs with noise from torch's global generator."""

    def __init__(self):
        self.X, self.y = mlp()[1], targets("classification")

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return self.X[i] + 0.3 * torch.randn(4, dtype=torch.float64), self.y[i]


def posterior(loader, n_data=40, **options):
    la = posterior_of(mlp()[0], "classification", **hyper_parameters("classification"), **options)
    la.fit(loader, n_data=n_data)
    return la


def part(dataset, indices, **options):
    return DataLoader(Subset(dataset, list(indices)), batch_size=6, **options)


def test_a_fit_is_reproducible_for_a_seed():
    dataset = Augmented()
    state = torch.random.get_rng_state()
    first = posterior(part(dataset, range(20), shuffle=True), seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(3)
    again = posterior(part(dataset, range(20)), seed=2)
    other = posterior(part(dataset, range(20)), seed=3)
    assert torch.equal(first.posterior_precision.to_dense(), again.posterior_precision.to_dense())
    assert not torch.allclose(first.in_sample_curvatures[:5], other.in_sample_curvatures[:5], rtol=1e-4)
    assert first.fit_result.identities.augmented
    # every pass over the direction samples saw the same versions of them
    rows = first.in_sample_curvatures
    assert bool((rows.diff() <= 0).all())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_seed_decides_which_versions_of_the_samples_are_loaded(num_workers):
    loader = part(Augmented(), range(20), num_workers=num_workers)
    first, again, other = (
        posterior(loader, magnitudes="same_batch", seed=seed).fit_result.identities.hashes for seed in (2, 2, 3)
    )
    assert torch.equal(first, again)
    assert not bool((first == other).any())


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_the_direction_samples_are_loaded_once(solver):
    # Lanczos goes through them again and again: other versions would not let it converge
    la = posterior(part(Augmented(), range(20)), rank=5, solver=solver, magnitudes="same_batch")
    assert la.fit_result.estimate.outcome.converged
    U = la.directions
    torch.testing.assert_close(U.T @ U, torch.eye(5, dtype=U.dtype), rtol=0, atol=1e-10)


def test_held_out_kl_goes_by_position():
    dataset = Augmented()
    la = posterior(part(dataset, range(20)))
    inside = part(dataset, range(20), shuffle=True)
    found = la.held_out_kl(part(dataset, range(20, 40)), inside)
    assert found.n == 20
    assert sorted(found.sample_keys.tolist()) == list(range(20, 40))
    with pytest.raises(OverlapError, match="1 of the 4"):
        la.held_out_kl(part(dataset, [19, 20, 21, 22]), inside)
    with pytest.raises(ValueError, match="20 samples that were fitted"):
        la.held_out_kl(part(dataset, range(20, 40)), part(dataset, range(1, 21)))
    other = posterior(part(dataset, range(20)), rank=3)
    difference = found - other.held_out_kl(part(dataset, range(39, 19, -1)), inside)
    assert difference.n == 20


def test_a_chain_of_subsets_leads_to_the_same_samples():
    dataset = Augmented()
    half = Subset(dataset, list(range(39, 9, -1)))
    third = Subset(half, list(range(5, 30)))  # positions 34 down to 10
    la = posterior(part(third, range(20)))  # 34 down to 15
    assert sorted(la.fit_result.identities.positions.tolist()) == list(range(15, 35))
    with pytest.raises(OverlapError, match="2 of the 3"):
        la.held_out_kl(part(dataset, [14, 15, 34]), part(third, range(20)))
    found = la.held_out_kl(part(half, [0, 1, 25, 26]), part(dataset, range(15, 35)))
    assert sorted(found.sample_keys.tolist()) == [13, 14, 38, 39]


def test_positions_survive_the_state():
    dataset = Augmented()
    la = posterior(part(dataset, range(20)))
    loaded = posterior_of(la.model, "classification")
    loaded.load_state_dict(la.state_dict())
    with pytest.raises(OverlapError, match="1 of the 3"):
        loaded.held_out_kl(part(dataset, [19, 20, 21]), part(dataset, range(20)))


def test_other_data_sets_cannot_be_compared():
    la = posterior(part(Augmented(), range(4)), n_data=40, rank=2, direction_samples=2)
    with pytest.warns(UserWarning, match="cannot be compared"):
        la.held_out_kl(part(Augmented(), range(20, 40)))


def test_plain_samples_are_known_by_content_in_any_data_set():
    X, y = mlp()[1], targets("classification")
    la = posterior(part(TensorDataset(X, y), range(20)))
    copies = TensorDataset(X[18:22].clone(), y[18:22].clone())
    inside = part(TensorDataset(X.flip(0), y.flip(0)), range(20, 40))
    with pytest.raises(OverlapError, match="2 of the 4"):
        la.held_out_kl(DataLoader(copies), inside)
    assert la.held_out_kl(DataLoader(Subset(copies, [2, 3])), inside).n == 2
