"""Intervals of fitted posteriors against per-sample curvatures taken from dense matrices, one direction at a time."""

import math

import pytest
import torch
from oracles import eigenpairs_above, fold_sets, mean_of, non_increasing
from posterior_cases import close, fitted, posterior_of, problem
from scipy.optimize import brentq
from scipy.stats import t as student
from torch import Tensor

N_DATA, LEVEL = 130, 0.9


def along(per_sample: list[Tensor], samples: Tensor, U: Tensor) -> Tensor:
    """u' H_n u of some samples, (n, k)."""
    return torch.stack([(U * (per_sample[i] @ U)).sum(0) for i in samples.tolist()])


def ends(estimate: Tensor, q: Tensor, factor: float, share: float, mismatch: Tensor | None = None) -> Tensor:
    """Estimate ± quantiles of Hall's transformation; the error of the mean of q enters times a factor."""
    n = len(q)
    z = float(student.ppf((1 + LEVEL) / 2, n - 1))
    A = (2 - share) / (6 * math.sqrt(1 - share))
    B = math.sqrt(1 - share) / 2 - A
    rows = []
    for i, m in enumerate(estimate.tolist()):
        spread = float(q[:, i].std(correction=1))
        g = float(((q[:, i] - q[:, i].mean()) ** 3).mean()) / spread**3 / math.sqrt(n)
        standard_error = factor * spread * math.sqrt((1 - share) / n)
        kappa = 2 * A * g
        assert abs(kappa) * z < 0.9, "beyond that there is a cap"
        T = brentq(lambda T, k=kappa, g=g: math.expm1(k * T) / k + B * g + z, -99, 0)
        T_above = brentq(lambda T, k=kappa, g=g: math.expm1(k * T) / k + B * g - z, 0, 99)
        bias = 0.0 if mismatch is None else float(mismatch[i])
        lower = m - standard_error * max(z, T_above) - max(bias, 0)
        rows.append([max(lower, 0.0), m + standard_error * max(z, -T) + max(-bias, 0)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_held_out(likelihood: str) -> None:
    la, _, _, per_sample = fitted("MLP", likelihood, rank=6, magnitudes="held_out", n_data=N_DATA, seed=1)
    n_a, b = len(la.split.direction_indices), la.split.magnitude_indices
    f, share = n_a / N_DATA, len(b) / (N_DATA - n_a)
    q = along(per_sample, b, la.directions)
    close(la.directional_curvatures, f * la.in_sample_curvatures + (1 - f) * q.mean(0))
    close(la.confidence_intervals(level=LEVEL), ends(la.directional_curvatures, q, 1 - f, share))


def test_cross_fitted() -> None:
    la, _, _, per_sample = fitted(
        "MLP", "classification", rank=6, magnitudes="cross_fitted", n_folds=4, n_data=N_DATA, seed=1
    )
    samples, f = la.split.direction_indices, len(la.split.direction_indices) / N_DATA
    parts = []
    for held, others in fold_sets(samples, la.split.folds):
        parts.append(along(per_sample, held, eigenpairs_above(mean_of(per_sample, others), 1e-6, 6)[1]))
    q = torch.cat(parts)
    c = non_increasing(q.mean(0))
    close(la.directional_curvatures, f * la.in_sample_curvatures + (1 - f) * c)
    mismatch = (1 - f) * (c - la.in_sample_curvatures) / 7
    assert float(mismatch[0]) < 0
    close(la.confidence_intervals(level=LEVEL), ends(la.directional_curvatures, q, 1.0, f, mismatch))


def test_exact_magnitudes_of_a_kronecker_basis() -> None:
    la, _, _, per_sample = fitted("MLP", "classification", hessian_structure="kron", n_data=N_DATA, seed=1)
    n_a, b = len(la.split.direction_indices), la.split.magnitude_indices
    f, share = n_a / N_DATA, len(b) / (N_DATA - n_a)
    leading = la.directional_curvatures.argsort(descending=True)[:12]
    q = along(per_sample, b, la.posterior_precision.basis.to_dense()[:, leading])
    expected = ends(la.directional_curvatures[leading], q, 1 - f, share)
    close(la.confidence_intervals(level=LEVEL)[leading], expected)
    assert la.confidence_intervals().shape == (la.n_params, 2)


@pytest.mark.parametrize("magnitudes", ["held_out", "cross_fitted", "same_batch"])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_ends_enclose_what_is_used_and_are_it_on_all_the_data(structure: str, magnitudes: str) -> None:
    options = {"hessian_structure": structure, "magnitudes": magnitudes}
    la, *_ = fitted("MLP", "classification", n_data=N_DATA, **options)
    lower, upper = la.confidence_intervals().T
    m = la.directional_curvatures
    assert bool(((lower >= 0) & (lower <= m) & (m <= upper)).all())
    assert float((upper - lower).max()) > 0.1 * float(m.max())
    wider = la.confidence_intervals(level=0.99)
    assert bool(((wider[:, 0] <= lower) & (wider[:, 1] >= upper)).all())
    whole, *_ = fitted("MLP", "classification", **options)
    assert torch.equal(whole.confidence_intervals(), whole.directional_curvatures[:, None].expand(-1, 2))


def test_the_biased_estimate_has_intervals_that_know_nothing_of_its_bias() -> None:
    la, _, _, per_sample = fitted("MLP", "classification", rank=6, magnitudes="same_batch", n_data=N_DATA, seed=1)
    samples = la.split.direction_indices
    q = along(per_sample, samples, la.directions)
    close(la.confidence_intervals(level=LEVEL), ends(la.in_sample_curvatures, q, 1.0, len(samples) / N_DATA))


@pytest.mark.parametrize("structure", ["lowrank", "kron"])
def test_a_loaded_posterior_has_the_same_intervals(structure: str) -> None:
    options = {"hessian_structure": structure, "magnitudes": "cross_fitted"}
    la, *_ = fitted("MLP", "classification", n_data=N_DATA, **options)
    loaded = posterior_of(la.model, "classification", hessian_structure=structure)
    loaded.load_state_dict(la.state_dict())
    assert torch.equal(loaded.confidence_intervals(level=0.7), la.confidence_intervals(level=0.7))


def test_draws_of_targets_leave_something_to_estimate_on_all_the_data() -> None:
    la, *_ = fitted("MLP", "classification", rank=4, backend_kwargs={"stochastic": True}, magnitudes="cross_fitted")
    lower, upper = la.confidence_intervals().T
    assert bool((lower < la.directional_curvatures).all())
    assert bool((upper > la.directional_curvatures).all())


def test_what_has_no_intervals_says_why() -> None:
    model, *_ = problem("MLP", "classification")
    with pytest.raises(ValueError, match="not fitted"):
        posterior_of(model, "classification").confidence_intervals()
    la, *_ = fitted("MLP", "classification", hessian_structure="kron", kron_magnitudes="kronecker", n_data=N_DATA)
    with pytest.raises(ValueError, match="expected kron_magnitudes='exact'"):
        la.confidence_intervals()
    la, *_ = fitted("MLP", "classification", rank=3, n_data=N_DATA)
    with pytest.raises(ValueError, match=r"such as 0\.95, must be between 0 and 1; got 95"):
        la.confidence_intervals(level=95.0)
