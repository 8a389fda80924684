"""Draws: computations shared by batches and posteriors, and batches that are too large for a posterior."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from models import mlp, targets
from oracles import dense_ggn, mean_of
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.splitting import deal
from debiased_laplace.diagnosis import Diagnosis, diagnose, draws, posteriors
from debiased_laplace.diagnosis.posteriors import RANK

# importing it from the package would give the function of the same name
module = importlib.import_module("debiased_laplace.diagnosis.diagnose")
N_DATA, PRIOR, SEED = 60, 3.0, 3


def given() -> tuple[torch.nn.Module, TensorDataset]:
    model, X = mlp()
    return model, TensorDataset(X, targets("classification"))


def found(**options) -> Diagnosis:
    model, data = given()
    options = {"batch_sizes": [10, 16], "n_draws": 2, "n_data": N_DATA, "prior_precision": PRIOR, **options}
    return diagnose(model, "classification", DataLoader(data, batch_size=7), seed=SEED, **options)


def drawn(draw: int) -> torch.Tensor:
    return torch.randperm(40, generator=torch.Generator().manual_seed(SEED + 1000 * draw))


@pytest.mark.slow
@pytest.mark.filterwarnings(f"ignore:rank={RANK} was asked for")
def test_the_gain_is_the_difference_of_held_out_kls_of_two_fitted_posteriors(monkeypatch):
    # all rows in place of mixtures, as in held_out_kl
    monkeypatch.setattr(posteriors, "MIXTURES", 3)
    diagnosis = found(n_reference=20)
    model, data = given()
    for draw, (i, size) in [(0, (0, 10)), (1, (1, 16))]:
        order = drawn(draw)
        batch = DataLoader(Subset(data, order[:size].sort().values.tolist()), batch_size=5)
        unseen = DataLoader(Subset(data, order[16:36].tolist()), batch_size=9)
        values = []
        for magnitudes in ("same_batch", "cross_fitted"):
            kind = {"magnitudes": magnitudes, "rank": RANK, "complement": "kron", "sampling": "uniform"}
            la = DebiasedLaplace(model, "classification", prior_precision=PRIOR, seed=SEED + 1000 * draw, **kind)
            la.fit(batch, n_data=N_DATA)
            values.append(la.held_out_kl(unseen, batch))
        gain = float(diagnosis.batches[i].posterior[draw])
        assert gain == pytest.approx((values[0] - values[1]).value, rel=1e-6)
        assert abs(gain) > 0.1
    assert "nats gained by debiasing" in diagnosis.table().columns


@pytest.fixture
def samples_with_rows(monkeypatch) -> Iterator[list[int]]:
    counts: list[int] = []
    row_matrix = Network.row_matrix

    def counted(self, inputs, *arguments):
        counts.append(len(inputs))
        return row_matrix(self, inputs, *arguments)

    monkeypatch.setattr(Network, "row_matrix", counted)
    return counts


def test_rows_of_a_sample_are_computed_once(samples_with_rows):
    found(n_draws=1, n_reference=20)
    # rows of the larger batch contain those of the smaller; mixtures, two in place of three rows, are computed anew
    assert sum(samples_with_rows) == 16 + 20 + 10 + 16


@pytest.mark.slow
def test_one_bar_counts_the_scored_samples_and_one_all_other_work(capsys):
    found(n_reference=20, progress_bar=True)
    shown = capsys.readouterr().err
    # two draws of directions and posteriors of 10 + 16 samples, and of 20 reference samples
    assert f"| {2 * (2 * 26 + 20)}/{2 * (2 * 26 + 20)} [" in shown
    assert "batch of 16, draw 2: posteriors" in shown
    assert "[Scoring rows]: 100%|██████████| 40/40 [" in shown
    bars = {line.split("]")[0] for line in shown.replace("\n", "\r").split("\r") if line.strip()}
    assert bars == {"[Scoring rows", "[Diagnosing"}


def test_a_draw_shows_no_progress_by_default(capsys):
    found(n_draws=1)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_of_large_batches_only_leading_eigenvectors_are_computed(monkeypatch):
    # three rows per sample: 30 are allowed, 48 are not
    monkeypatch.setattr(draws, "MAX_ROWS", 40)
    diagnosis = found()
    small, large = diagnosis.batches
    assert small.trailing.own.shape[1] > 0
    assert large.trailing.own.shape[1] == 0
    assert small.posterior is not None
    assert large.posterior is None
    model, data = given()
    own = mean_of(dense_ggn(model, data.tensors[0], "classification")[0], drawn(0)[:16])
    expected = torch.linalg.eigvalsh(own).flip(0)[: large.leading.own.shape[1]]
    torch.testing.assert_close(large.leading.own[0], expected, rtol=1e-6, atol=1e-9)
    rows = diagnosis.table().rows
    assert [row[-1] == "\u2013" for row in rows] == [False, True]
    assert "nats for batches of 10." in diagnosis.summary()
    assert "last tenth" in diagnosis.figure().svg


def test_equal_samples_are_in_one_fold(monkeypatch):
    """So that debiasing helps a posterior of copies as it helps one of the distinct samples."""
    model, data = given()
    twice = TensorDataset(*(torch.cat([t[:12]] * 4) for t in data.tensors))
    seen = []
    monkeypatch.setattr(posteriors, "deal", lambda n, k, generator: seen.append((n, k)) or deal(n, k, generator))
    found = diagnose(model, "classification", DataLoader(twice, batch_size=7), batch_sizes=[30], n_draws=2)
    assert all(n <= 12 for n, _ in seen)
    assert len(seen) == 2
    assert found.summary()


@pytest.mark.slow
def test_by_default_only_posteriors_of_small_batches_are_compared(monkeypatch):
    monkeypatch.setattr(module, "SIZES", (5, 10))
    P, rows = 93, 3 * 5
    monkeypatch.setattr(module, "MAX_PRODUCTS", rows * rows * P)
    by_default, asked = found(batch_sizes=None), found(batch_sizes=[5, 10])
    assert [batch.posterior is None for batch in by_default.batches] == [False, True]
    assert [batch.posterior is None for batch in asked.batches] == [False, False]
    assert torch.equal(by_default.batches[0].posterior, asked.batches[0].posterior)
    monkeypatch.setattr(module, "MAX_PRODUCTS", rows * rows * P - 1)
    assert found(batch_sizes=None).batches[0].posterior is None
