"""The second-order correction of an inverse: closed forms, and its effect on noisy estimates."""

import pytest
import torch

from debiased_laplace.debiasing.complement import LowRankCurvature, second_order


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# curvature, variance of its estimate, the rest of the precision, corrected curvature
CASES = {
    "no error: nothing to correct": (3.0, 0.0, 0.4, 3.0),
    "a tenth of the precision": (1.6, 0.04, 0.4, 1.62),
    "no curvature, an error all the same": (0.0, 0.02, 0.4, 0.05),
    "an error as large as the precision": (1.6, 4.0, 0.4, 3.6),
    "an error far larger: not more than the precision once more": (1.6, 400.0, 0.4, 3.6),
    "negative weight, as beside an isotropic part": (-0.5, 0.09, 2.0, -0.44),
}


@pytest.mark.parametrize("case", CASES)
def test_the_variance_over_the_precision_is_added(case: str) -> None:
    m, variance, rest, expected = CASES[case]
    found = second_order(tensor(m), tensor(variance), tensor(rest))
    torch.testing.assert_close(found, tensor(expected), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("n", [40, 160])
def test_the_bias_of_the_inverse_is_removed_to_second_order(n: int) -> None:
    """For means of n gamma variables the plain inverse is too large, the corrected one much less so."""
    generator = torch.Generator().manual_seed(n)
    rest, draws = 0.3, 200_000
    samples = torch._standard_gamma(torch.full((draws, 1), 0.8 * n, dtype=torch.float64), generator=generator) / n
    m, variance = samples[:, 0], samples[:, 0] / n  # of a gamma variable with unit scale
    truth = 1 / (0.8 + rest)

    def bias_and_error(precision: torch.Tensor) -> tuple[float, float]:
        return float((1 / precision).mean() - truth), float((1 / precision).std() / draws**0.5)

    plain, error = bias_and_error(m + rest)
    corrected, _ = bias_and_error(second_order(m, variance, torch.tensor(rest).double()) + rest)
    leading = truth * (0.8 / n) / (0.8 + rest) ** 2
    assert plain > 20 * error  # there is something to correct
    assert plain == pytest.approx(leading, rel=6 / n + 0.02)
    assert abs(corrected) < 0.1 * plain


def test_the_expected_kl_to_the_truth_is_lower_if_the_variance_is_known() -> None:
    """An estimated variance is large where the value is, and then corrects in the wrong direction."""
    generator = torch.Generator().manual_seed(3)
    m = torch._standard_gamma(torch.full((100_000,), 16.0, dtype=torch.float64), generator=generator) / 20
    rest, truth, variance = torch.tensor(0.3).double(), 0.8 + 0.3, 0.8 / 20

    def kl(w: torch.Tensor) -> torch.Tensor:
        return 0.5 * (truth / w - 1 + (w / truth).log())

    known = second_order(m, torch.full_like(m, variance), rest) + rest
    gain = kl(m + rest) - kl(known)
    assert float(gain.mean()) > 5 * float(gain.std()) / len(m) ** 0.5
    estimated = kl(m + rest) - kl(second_order(m, m / 20, rest) + rest)
    assert float(estimated.mean()) < 0.6 * float(gain.mean())


def curvature(diagonal: torch.Tensor, k: int, variances: torch.Tensor) -> LowRankCurvature:
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))[0][:, :k]
    weights = torch.linspace(2, 0.5, k, dtype=torch.float64) if k else tensor()
    return LowRankCurvature(diagonal, U, weights, error_variances=variances)


def test_the_rest_along_a_direction_is_the_inverse_of_the_diagonal_s_inverse_there() -> None:
    D, variances = torch.linspace(0.1, 0.6, 6, dtype=torch.float64), tensor(0.3, 0.02, 0.1)
    found = curvature(D, 3, variances)
    weight, prior = 7.0, tensor(0.2, 0.2, 0.3, 0.3, 0.5, 0.5)
    rest = 1 / torch.stack([(u.square() / (weight * D + prior)).sum() for u in found.directions.T])
    m = weight * found.weights
    expected = (
        torch.diag(weight * D + prior)
        + found.directions
        @ torch.diag(m + torch.minimum(weight**2 * variances / (m + rest), m + rest))
        @ found.directions.T
    )
    torch.testing.assert_close(found.precision(weight, prior).to_dense(), expected)


def test_without_directions_the_diagonal_is_corrected() -> None:
    D, variances = torch.linspace(0.1, 0.6, 6, dtype=torch.float64), torch.linspace(0.02, 0.0, 6, dtype=torch.float64)
    found = curvature(D, 0, variances).precision(7.0, torch.tensor(0.2).double())
    v = 7 * D + 0.2
    torch.testing.assert_close(found.diagonal, v + torch.minimum(49 * variances / v, v))


def test_without_directions_and_errors_nothing_is_corrected() -> None:
    """At rank 0 the errors are those of the directions, which are none, and not of the diagonal."""
    D = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    found = curvature(D, 0, tensor()).precision(7.0, torch.tensor(0.2).double())
    torch.testing.assert_close(found.to_dense(), torch.diag(7 * D + 0.2))


@pytest.mark.parametrize("diagonal", [torch.tensor(0.0).double(), torch.full((6,), 0.2, dtype=torch.float64)])
def test_is_differentiable_in_prior_and_weight(diagonal: torch.Tensor) -> None:
    found = curvature(diagonal, 3, tensor(0.3, 0.02, 0.1))
    weight, prior = tensor(7.0)[0].requires_grad_(), tensor(0.4)[0].requires_grad_()
    torch.autograd.gradcheck(lambda w, p: found.diagonal_and_weights(w, p), (weight, prior))
