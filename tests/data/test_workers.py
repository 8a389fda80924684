"""Workers of a loader are started once for everything that is loaded, and load what new ones would."""

import multiprocessing
import random

import numpy as np
import pytest
import torch
from models import mlp
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, get_worker_info

from debiased_laplace import DebiasedLaplace, diagnose
from debiased_laplace.data.source import sample_source
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.data.workers import stop_workers

N = 24
X = mlp()[1][:N]
Y = torch.arange(N) % 3


class Noisy(Dataset):
    """Data set with noise of three generators, which knows what its workers did."""

    def __init__(self, noise=0.0, fails_at=None):
        self.noise, self.fails_at, self.opened = noise, fails_at, None

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == self.fails_at:
            raise RuntimeError("no such file")
        drawn = float(torch.rand(())) + random.random() + np.random.rand()  # noqa: NPY002
        return X[i] + self.noise * drawn, Y[i]


class Recorder:
    """Initialization of workers that writes a line for each, and opens the data set for them."""

    def __init__(self, path):
        self.path = path

    def __call__(self, worker_id):
        dataset = get_worker_info().dataset
        dataset.opened = worker_id
        with self.path.open("a") as file:
            file.write(f"{type(dataset).__name__} {worker_id}\n")

    def started(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.unlink(missing_ok=True)
        return sorted(lines)


def loader_of(dataset, recorder=None, num_workers=2, **options):
    return DataLoader(dataset, 4, num_workers=num_workers, worker_init_fn=recorder, **options)


def posterior(**options):
    return DebiasedLaplace(mlp()[0], "classification", prior_precision=3.0, **options)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("magnitudes", ["cross_fitted", "held_out"])
def test_a_fit_starts_each_worker_once(tmp_path, persistent, magnitudes):
    recorder = Recorder(tmp_path / "started")
    la = posterior(magnitudes=magnitudes)
    la.fit(loader_of(Noisy(), recorder, persistent_workers=persistent))
    assert recorder.started() == ["Noisy 0", "Noisy 1"]
    expected = posterior(magnitudes=magnitudes)
    expected.fit(DataLoader(Noisy(), 4))
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected.posterior_precision.to_dense())
    assert not multiprocessing.active_children()
    la.held_out_kl(None, loader_of(Noisy(), recorder))
    assert recorder.started() == ["Noisy 0", "Noisy 1"]


def test_a_fit_that_goes_on_and_a_diagnosis_start_each_worker_once(tmp_path):
    recorder, data = Recorder(tmp_path / "started"), Noisy()
    la = posterior()
    la.fit(loader_of(Subset(data, range(12)), recorder, num_workers=1))
    recorder.started()
    la.fit(loader_of(data, recorder, num_workers=1), override=False)
    assert recorder.started() == ["Noisy 0"]
    diagnose(mlp()[0], "classification", loader_of(data, recorder, num_workers=1), batch_sizes=[6], n_draws=2)
    assert recorder.started() == ["Noisy 0"]


def passes(dataset, seeds, **options):
    source = sample_source(loader_of(dataset, **options), 0)
    return [torch.cat([batch.inputs for batch in SubBatch(source, torch.arange(N), X.device, s)]) for s in seeds]


def test_the_noise_of_a_pass_depends_on_its_seed_alone():
    first, other, again = passes(Noisy(0.1), [5, 6, 5])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # all workers have noise of their own
    noise = first - X
    assert len(noise[:, 0].unique()) == N
    (alone,) = passes(Noisy(0.1), [5])
    assert torch.equal(first, alone)


def test_a_pass_that_is_left_early_does_not_disturb_the_next():
    source = sample_source(loader_of(Noisy()), 0)
    for _ in range(3):
        assert torch.equal(next(source.batches(torch.arange(N), 0)).inputs, X[:4])
    assert torch.equal(torch.cat([batch.inputs for batch in source.batches(torch.arange(N), 0)]), X)


def test_a_pass_within_a_pass_loads_its_own_samples():
    source = sample_source(loader_of(Noisy(), num_workers=1), 0)
    outer, inner = source.batches(torch.arange(8), 0), source.batches(torch.arange(8, 16), 0)
    found = [(a.inputs, b.inputs) for a, b in zip(outer, inner, strict=True)]
    assert torch.equal(torch.cat([a for a, _ in found]), X[:8])
    assert torch.equal(torch.cat([b for _, b in found]), X[8:16])


def test_after_an_error_in_a_worker_loading_starts_again():
    data = Noisy(fails_at=9)
    source = sample_source(loader_of(data), 0)
    with pytest.raises(RuntimeError, match="no such file"):
        list(source.batches(torch.arange(N), 0))
    assert torch.equal(torch.cat([batch.inputs for batch in source.batches(torch.arange(8), 0)]), X[:8])
    stop_workers()
    assert not multiprocessing.active_children()


def test_no_worker_outlives_a_fit_that_fails():
    with pytest.raises(RuntimeError, match="no such file"):
        posterior().fit(loader_of(Noisy(fails_at=9)))
    assert not multiprocessing.active_children()


class Many(Noisy):
    def __getitems__(self, positions):
        return [(X[i] + 100, Y[i]) for i in positions]


def test_a_data_set_that_loads_a_batch_at_once_does_so():
    assert torch.equal(passes(Many(), [0])[0], X + 100)
    assert len(passes(ConcatDataset([Noisy()]), [0])[0]) == N
