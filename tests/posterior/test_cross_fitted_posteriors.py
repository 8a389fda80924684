"""Cross-fitting from the loader to the folds: what cannot be folded, and how many folds there are."""

import pytest
import torch
from models import MODELS, targets
from posterior_cases import close, posterior_of
from torch.utils.data import DataLoader, Subset, TensorDataset


def data_with_repeats() -> TensorDataset:
    _, X = MODELS["MLP"]()
    y = targets("classification")
    return TensorDataset(torch.cat([X[:15], X[3:4]]), torch.cat([y[:15], y[3:4]]))


def test_equal_samples_are_one_sample_in_one_fold() -> None:
    la = posterior_of(MODELS["MLP"]()[0], "classification", magnitudes="cross_fitted", n_folds=5)
    la.fit(DataLoader(data_with_repeats(), batch_size=4), n_data=40)
    assert la.split.n_samples == 15
    assert la.split.copies.tolist() == [15]
    assert la.split.folds.bincount().tolist() == [3] * 5


@pytest.mark.parametrize("kind", ["lowrank", "lowrank, kron complement", "kron", "full"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_of_fewer_samples_than_folds_each_is_a_fold(n: int, kind: str) -> None:
    structure, _, complement = kind.partition(", ")
    options = {"complement": "kron"} if complement else {}
    few = DataLoader(Subset(data_with_repeats(), range(n)))
    found = []
    for n_folds in (8, n):
        la = posterior_of(
            MODELS["MLP"]()[0],
            "classification",
            "all",
            structure,
            magnitudes="cross_fitted",
            n_folds=n_folds,
            **options,
        )
        la.fit(few, n_data=40)
        assert la.split.folds.sort().values.tolist() == list(range(n))
        assert bool(la.directional_curvatures.isfinite().all())
        assert bool((la.standard_errors > 0).any())
        found.append(la.posterior_precision.to_dense())
    close(*found, 1e-9)
    assert float(torch.linalg.eigvalsh(found[0]).min()) > 0


@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
def test_the_number_of_folds_is_ignored_where_there_are_none(magnitudes: str) -> None:
    """As scikit-learn does: one set of arguments goes with every kind of magnitudes."""
    found = []
    for n_folds in (8, 500):
        la = posterior_of(MODELS["MLP"]()[0], "classification", magnitudes=magnitudes, n_folds=n_folds)
        la.fit(DataLoader(Subset(data_with_repeats(), range(15))))
        assert la.split.folds is None
        found.append(la.directional_curvatures)
    close(*found, 1e-9)


def test_the_sizes_of_the_sub_batches_count_together() -> None:
    la = posterior_of(
        MODELS["MLP"]()[0],
        "classification",
        magnitudes="cross_fitted",
        direction_samples=4,
        magnitude_samples=5,
        n_folds=3,
    )
    la.fit(DataLoader(Subset(data_with_repeats(), range(15))), n_data=30)
    assert la.split.n_samples == 9
    assert la.split.folds.bincount().tolist() == [3, 3, 3]
    assert "9 of 30" in repr(la)
    assert torch.equal(la.split.direction_indices, la.split.magnitude_indices)
