"""Magnitude samples that do not fit into memory are loaded again at each pass; direction samples never are."""

import pytest
import torch
from models import mlp, targets
from posterior_cases import posterior_of
from torch.utils.data import DataLoader, Dataset

from debiased_laplace.curvature import first_pass as first_pass_module


class Counting(Dataset):
    """Counts how often each sample is loaded; after its first loading a sample changes if it is told to."""

    def __init__(self, X, y, *, drift=0.0):
        self.X, self.y, self.drift, self.loads = X, y, drift, torch.zeros(len(X), dtype=torch.int64)

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        self.loads[i] += 1
        return self.X[i] + self.drift * (self.loads[i] - 1), self.y[i]


def fitted(data, **options):
    model, _ = mlp()
    la = posterior_of(model, "classification", prior_precision=0.3, **options)
    la.fit(DataLoader(data, batch_size=3))
    return la


@pytest.fixture
def problem():
    _, X = mlp()
    return X, targets("classification")


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
def test_streamed_magnitudes_equal_held_ones(problem, monkeypatch, complement):
    held = fitted(Counting(*problem), complement=complement)
    monkeypatch.setattr(first_pass_module, "KEEP_BYTES", 0)
    data = Counting(*problem)
    streamed = fitted(data, complement=complement)
    torch.testing.assert_close(streamed.directional_curvatures, held.directional_curvatures, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        streamed.posterior_precision.to_dense(), held.posterior_precision.to_dense(), rtol=1e-10, atol=1e-12
    )
    a, b = streamed.split.direction_indices, streamed.split.magnitude_indices
    # some samples are probed for augmentation; of the others, b is loaded for the first pass and once more, a only once
    assert data.loads[a].min() == 1
    assert data.loads[b].min() == 2


def test_direction_samples_are_loaded_as_often_for_many_products_as_for_none(problem, monkeypatch):
    monkeypatch.setattr(first_pass_module, "KEEP_BYTES", 0)
    gram, lanczos = Counting(*problem), Counting(*problem)
    fitted(gram, rank=4, solver="gram")
    la = fitted(lanczos, rank=4, solver="lanczos")
    assert la.fit_result.estimate.outcome.products > 10
    a = la.split.direction_indices
    assert torch.equal(lanczos.loads[a], gram.loads[a])


def test_random_loading_gives_lanczos_and_gram_the_same_directions(problem, monkeypatch):
    """A sample that changes at every loading: the solvers agree only if each sees one version of it throughout."""
    monkeypatch.setattr(first_pass_module, "KEEP_BYTES", 0)
    found = [fitted(Counting(*problem, drift=0.5), rank=4, solver=solver) for solver in ("gram", "lanczos")]
    torch.testing.assert_close(found[0].in_sample_curvatures, found[1].in_sample_curvatures, rtol=1e-8, atol=0)
