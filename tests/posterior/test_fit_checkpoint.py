"""Fits that were interrupted go on from what they have kept, to the same posterior."""

import pytest
import torch
from laplace.curvature import CurvlinopsEF
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from debiased_laplace import DebiasedLaplace, fit_checkpoint
from debiased_laplace.curvature.drawn_rows import RowScorer
from debiased_laplace.curvature.row_curvature import RowCurvature

N = 50


class InterruptedFitError(Exception):
    """What ends the first attempt."""


class Counting(TensorDataset):
    """Data set that counts what is loaded, and ends at a number."""

    def __init__(self, X, y, last=None):
        super().__init__(X, y)
        self.n, self.last = 0, last

    def __getitem__(self, i):
        self.n += 1
        if self.n == self.last:
            raise InterruptedFitError
        return super().__getitem__(i)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(N))


def problem():
    torch.manual_seed(3)
    X, y = torch.randn(N, 6), torch.randint(3, (N,))
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)), X, y


CASES = {
    "default": {},
    "few rows": {"n_rows": 40},
    "a diagonal, held out": {"n_rows": 40, "complement": "diagonal", "magnitudes": "held_out"},
    "Kronecker": {"n_rows": 40, "hessian_structure": "kron"},
    "full": {"n_rows": 40, "hessian_structure": "full"},
    "chosen": {"n_rows": 40, "rank": "auto"},
    "uniform": {"sampling": "uniform"},
    "Monte Carlo": {"sampling": "uniform", "backend_kwargs": {"stochastic": True}},
    "empirical Fisher": {"sampling": "uniform", "backend": CurvlinopsEF},
}


@pytest.fixture(autouse=True)
def kept_at_every_batch(monkeypatch):
    monkeypatch.setattr(fit_checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(fit_checkpoint, "_SHARE", float("inf"))


def posterior(options):
    model = problem()[0]
    return DebiasedLaplace(model, "classification", prior_precision=3.0, temperature=0.7, **options)


def assert_equal(found, expected):
    assert torch.equal(found.posterior_precision.to_dense(), expected.posterior_precision.to_dense())
    assert torch.equal(found.directional_curvatures, expected.directional_curvatures)
    assert torch.equal(found.standard_errors, expected.standard_errors)
    assert found.loss == expected.loss
    assert torch.equal(found.split.direction_indices, expected.split.direction_indices)


@pytest.mark.parametrize("name", CASES)
def test_a_fit_that_was_interrupted_while_rows_were_computed_equals_one_that_was_not(name, tmp_path, monkeypatch):
    _, X, y = problem()
    loader = DataLoader(TensorDataset(X, y), batch_size=7)
    for module in ("row_curvature", "network"):
        # several blocks
        monkeypatch.setattr(f"debiased_laplace.curvature.{module}.CHUNK_BYTES", 3_000)
    original, calls, most = RowCurvature._kept, 0, 10**9

    def counted(self, chunk, what, compute):
        def counting():
            nonlocal calls
            calls += 1
            if calls > most:
                raise InterruptedFitError
            return compute()

        return original(self, chunk, what, counting)

    monkeypatch.setattr(RowCurvature, "_kept", counted)
    unbroken = posterior(CASES[name])
    unbroken.fit(loader, checkpoint_dir=tmp_path)
    # deleted at the end
    assert list(tmp_path.iterdir()) == []
    calls, n_calls, most = 0, calls, calls - 1
    with pytest.raises(InterruptedFitError):
        posterior(CASES[name]).fit(loader, checkpoint_dir=tmp_path)
    calls, most = 0, 10**9
    resumed = posterior(CASES[name])
    resumed.fit(loader, checkpoint_dir=tmp_path)
    assert_equal(resumed, unbroken)
    assert n_calls >= 4
    assert calls == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"n_rows": 40}, {"subset_of_weights": "last_layer", "n_rows": 40}])
@pytest.mark.parametrize("stream", [False, True])
def test_samples_that_were_scored_are_not_scored_again(options, stream, tmp_path, monkeypatch):
    _, X, y = problem()

    def loader(data):
        return DataLoader(Stream(data) if stream else data, batch_size=7)

    whole = posterior(options)
    whole.fit(loader(TensorDataset(X, y)))
    # 16 samples are probed where there are positions; 4 batches are scored
    with pytest.raises(InterruptedFitError):
        posterior(options).fit(loader(Counting(X, y, 1 + 4 * 7 + 16 * (not stream))), checkpoint_dir=tmp_path)
    scored, original = [], RowScorer.scored
    monkeypatch.setattr(RowScorer, "scored", lambda self, batch: scored.append(len(batch)) or original(self, batch))
    resumed = posterior(options)
    resumed.fit(loader(TensorDataset(X, y)), checkpoint_dir=tmp_path)
    assert_equal(resumed, whole)
    assert sum(scored) == N - 4 * 7


def test_another_fit_is_refused(tmp_path):
    _, X, y = problem()
    data = TensorDataset(X, y)
    with pytest.raises(InterruptedFitError):
        posterior({"n_rows": 40}).fit(DataLoader(Counting(X, y, 40), batch_size=7), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="holds an interrupted fit with other options"):
        posterior({"n_rows": 41}).fit(DataLoader(data, batch_size=7), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"with other samples: 50 samples .*; got 49 samples"):
        posterior({"n_rows": 40}).fit(DataLoader(TensorDataset(X[1:], y[1:]), batch_size=7), checkpoint_dir=tmp_path)
    other = posterior({"n_rows": 40})
    with torch.no_grad():
        other.model[0].bias.add_(1)
    changed = posterior({"n_rows": 40})
    changed.model[1].forward = torch.relu
    with pytest.raises(ValueError, match="with other outputs or losses"):
        changed.fit(DataLoader(data, batch_size=7), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="with other weights or parameters"):
        other.fit(DataLoader(data, batch_size=7), checkpoint_dir=tmp_path)
    for file in (tmp_path / "debiased_laplace_fit").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged; delete it"):
        posterior({"n_rows": 40}).fit(DataLoader(data, batch_size=7), checkpoint_dir=tmp_path)
    la = posterior({"n_rows": 40})
    la.fit(DataLoader(data, batch_size=7))
    with pytest.raises(ValueError, match="checkpoint_dir is of a fit of all samples; got it with override=False"):
        la.fit([(X + 1, y)], override=False, checkpoint_dir=tmp_path)


def test_a_stream_in_another_order_is_refused(tmp_path):
    _, X, y = problem()
    with pytest.raises(InterruptedFitError):
        posterior({"n_rows": 40}).fit(DataLoader(Stream(Counting(X, y, 29)), batch_size=7), checkpoint_dir=tmp_path)
    # after the samples by which a network is known
    order = torch.cat([torch.arange(8), torch.arange(8, N).flip(0)])
    other = Stream(TensorDataset(X[order], y[order]))
    with pytest.raises(ValueError, match="yields other samples, or another order, than the interrupted fit"):
        posterior({"n_rows": 40}).fit(DataLoader(other, batch_size=7), checkpoint_dir=tmp_path)
