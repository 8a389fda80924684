"""The three formulas for magnitudes, and the non-increasing step of cross-fitting."""

import pytest
import torch
from oracles import non_increasing
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from debiased_laplace.curvature.sub_batch import DirectionalMoments
from debiased_laplace.debiasing.magnitudes import Magnitudes, cross_fitted, same_batch


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_folds(c: Tensor, n: int = 16) -> DirectionalMoments:
    return DirectionalMoments(n, c, 0.1 + torch.arange(len(c), dtype=c.dtype))


def drawn(k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linspace(3, 0.1, k, dtype=torch.float64) + torch.randn(k, dtype=torch.float64, generator=generator)


MEANS = {
    "already decreasing": tensor(5.0, 3.0, 1.0),
    "increasing: one block": tensor(1.0, 3.0, 5.0),
    "one pair the wrong way round": tensor(5.0, 1.0, 3.0, 0.5),
    "equal values": tensor(2.0, 2.0, 2.0),
    "one": tensor(0.3),
    "many, noisy": drawn(40, 0),
    "negative ones, of a Hessian": drawn(12, 1) - 1.5,
}


@pytest.mark.parametrize("case", MEANS)
def test_cross_fitted_values_are_made_non_increasing_and_keep_their_sum(case: str) -> None:
    c = MEANS[case]
    in_sample = torch.linspace(9, 8, len(c), dtype=torch.float64)
    f = 16 / 50
    found = cross_fitted(in_sample, of_folds(c), n_data=50, decreasing=True)
    fitted = non_increasing(c)
    torch.testing.assert_close(
        fitted, torch.tensor(isotonic_regression(c.numpy(), increasing=False).tolist(), dtype=c.dtype)
    )
    torch.testing.assert_close(found.values, (f * in_sample + (1 - f) * fitted).clamp_min(0))
    assert bool((found.values.diff() <= 1e-12).all())
    if found.n_floored == 0:
        assert float(found.values.sum()) == pytest.approx(float((f * in_sample + (1 - f) * c).sum()), rel=1e-12)


def test_values_along_unordered_vectors_are_not_made_decreasing() -> None:
    c = tensor(1.0, 3.0, 2.0)
    found = cross_fitted(tensor(4.0, 1.0, 7.0), of_folds(c, 10), n_data=40, decreasing=False)
    torch.testing.assert_close(found.values, 0.25 * tensor(4.0, 1.0, 7.0) + 0.75 * c)


def test_all_the_data_give_the_eigenvalues() -> None:
    values = tensor(4.1, 2.3, 0.1)
    found = cross_fitted(values, of_folds(tensor(1.0, 7.0, 3.0), 16), n_data=16, decreasing=True)
    assert torch.equal(found.values, values)
    assert not found.standard_errors.any()
    assert torch.equal(found.in_sample, values)


def test_standard_errors_have_the_finite_population_factor() -> None:
    c = tensor(3.0, 2.0, 1.0)
    found = cross_fitted(c + 1, of_folds(c, 16), n_data=64, decreasing=True)
    torch.testing.assert_close(found.standard_errors, (0.75 / 16) ** 0.5 * tensor(0.1, 1.1, 2.1))


def test_negative_values_are_floored_and_counted_after_weighting() -> None:
    c = tensor(3.0, -0.1, -5.0)
    found = cross_fitted(tensor(4.0, 1.0, 0.5), of_folds(c, 25), n_data=50, decreasing=True)
    torch.testing.assert_close(found.values, tensor(3.5, 0.45, 0.0))
    assert found.n_floored == 1


def test_fresh_draws_replace_the_eigenvalues() -> None:
    c, again = tensor(3.0, 2.0), DirectionalMoments(10, tensor(2.5, 1.5), tensor(1.0, 1.0))
    found = cross_fitted(tensor(9.0, 8.0), of_folds(c, 10), n_data=40, redrawn=again, decreasing=True)
    torch.testing.assert_close(found.values, 0.25 * again.means + 0.75 * c)
    # drawn curvatures are never exact, and their errors have no finite-population factor
    torch.testing.assert_close(found.standard_errors, 0.1**0.5 * tensor(0.1, 1.1))
    torch.testing.assert_close(found.in_sample, tensor(9.0, 8.0))
    all_data = cross_fitted(tensor(9.0, 8.0), of_folds(c, 10), n_data=10, redrawn=again, decreasing=True)
    assert bool((all_data.standard_errors > 0).all())


def test_no_directions() -> None:
    found = cross_fitted(tensor(), of_folds(tensor(), 10), n_data=40, decreasing=True)
    assert found.values.shape == found.standard_errors.shape == (0,)


def test_the_precision_is_that_of_the_eigenvalues() -> None:
    found = cross_fitted(tensor(3.0, 1.0).float(), of_folds(tensor(1.0, 2.0), 10), n_data=40, decreasing=True)
    assert {found.values.dtype, found.standard_errors.dtype, found.in_sample.dtype} == {torch.float32}
    again = Magnitudes(found.values, None, found.in_sample, 0).to(torch.float64)
    assert again.values.dtype == torch.float64
    assert again.standard_errors is None


def test_same_batch_keeps_the_eigenvalues() -> None:
    found = same_batch(tensor(3.0, 1.0), DirectionalMoments(16, tensor(3.0, 1.0), tensor(2.0, 4.0)), n_data=64)
    assert torch.equal(found.values, found.in_sample)
    torch.testing.assert_close(found.standard_errors, (0.75 / 16) ** 0.5 * tensor(2.0, 4.0))
