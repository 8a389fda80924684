"""The stopping rule and its gains, against dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from debiased_laplace.debiasing.held_out_kl import KLTerms
from debiased_laplace.debiasing.stopping import Stage, Stopping, stage, stage_sizes

SIZES = {
    "doubled to the end": (32, 100, [32, 64, 100]),
    "a power of two": (32, 128, [32, 64, 128]),
    "one more than a stage": (4, 9, [4, 8, 9]),
    "fewer than the first stage": (32, 20, [20]),
    "as many as the first stage": (32, 32, [32]),
    "from what was read on": (100, 350, [100, 200, 350]),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_double(case: str) -> None:
    first, n, expected = SIZES[case]
    assert list(stage_sizes(first, n)) == expected


# stages, tolerance, available samples -> enough, reason
DECISIONS = {
    "a single stage": ([Stage(32)], 5.0, 400, False, None),
    "gained more": ([Stage(32), Stage(64, 7.0, 0.1)], 5.0, 400, False, None),
    "gained less, far beyond the error": (
        [Stage(32), Stage(64, 1.25, 0.5)],
        5.0,
        400,
        True,
        "stopped: doubling from 32 to 64 samples gained 1.25 ± 0.5 nats, less than the tolerance of 5 by over two "
        "standard errors.\n  64 samples: gained 1.25 ± 0.5 nats",
    ),
    "gained less, but perhaps by chance": ([Stage(32), Stage(64, 4.5, 0.3)], 5.0, 400, False, None),
    "gained exactly the tolerance": ([Stage(32), Stage(64, 5.0, 0.0)], 5.0, 400, False, None),
    "lost": ([Stage(32), Stage(64, -3.0, 1.0)], 0.5, 400, True, "gained -3 ± 1 nats, below zero by"),
    "lost, with an unknown error": ([Stage(32), Stage(64, -3.0, math.inf)], 0.5, 400, False, None),
    "only the last stage counts": ([Stage(32), Stage(64, 0.1, 0.01), Stage(128, 3.0, 0.01)], 1.0, 400, False, None),
    "the end, with a gain": (
        [Stage(32), Stage(64, 9.0, 1.0), Stage(100, 6.0, 0.0)],
        0.5,
        100,
        False,
        "all 100 samples were used: going from 64 to 100 samples gained 6 ± 0 nats (tolerance 0.5).\n"
        "  64 samples: gained 9 ± 1 nats\n  100 samples: gained 6 ± 0 nats",
    ),
    "the end, with too few unseen samples": (
        [Stage(32), Stage(64)],
        0.5,
        64,
        False,
        "all 64 samples were used: the gain of doubling from 32 to 64 samples is unknown, because too few unseen "
        "samples were left (tolerance 0.5).\n  64 samples: gained unknown",
    ),
    "the end at once": ([Stage(20)], 0.5, 20, False, "all 20 samples were used: too few to double them."),
    "the end, which was enough": (
        [Stage(32), Stage(64, 0.1, 0.0)],
        0.5,
        64,
        True,
        "all 64 samples were used: doubling",
    ),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_decisions(case: str) -> None:
    stages, tolerance, n_available, enough, said = DECISIONS[case]
    stopping = Stopping(tuple(stages), tolerance, n_available)
    assert stopping.enough is enough
    if said is not None:
        assert said in str(stopping)


# --- the gain, of posteriors that are given as dense matrices ---

P, TAU, PRIOR = 4, 1.7, torch.tensor([0.4, 0.7, 0.3, 2.0], dtype=torch.float64)


def curvatures(n: int, seed: int = 0) -> Tensor:
    """Of every sample (n, P, P), in one row each."""
    rows = torch.randn(n, P, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.mT


def posterior(H: Tensor, n_data: int) -> Tensor:
    return n_data * TAU * H.mean(0) + torch.diag(PRIOR)


def terms_of(precision: Tensor, n_data: int) -> KLTerms:
    trace = torch.trace(torch.linalg.solve(precision, torch.diag(PRIOR)))
    return KLTerms(float(trace), float(torch.logdet(precision)), n_data * TAU)


def sample_terms(precision: Tensor, H: Tensor, n_data: int) -> Tensor:
    return 0.5 * n_data * TAU * torch.linalg.solve(precision, H).diagonal(dim1=1, dim2=2).sum(1)


def kl_to(full: Tensor, precision: Tensor) -> Tensor:
    """Return the KL divergence of two Gaussians with the same mean."""
    return 0.5 * (torch.trace(torch.linalg.solve(precision, full)) - P + torch.logdet(precision) - torch.logdet(full))


def gained(H: Tensor, n: int, m: int, *, drawn: bool = False, redrawn: Tensor | None = None) -> Stage:
    """By samples n, …, n + m - 1, of posteriors of the first n / 2 and the first n samples."""
    N = len(H)
    smaller, larger = posterior(H[: n // 2], N), posterior(H[:n], N)
    H = H if redrawn is None else redrawn
    of_smaller, of_larger = (sample_terms(precision, H, N) for precision in (smaller, larger))
    difference = of_smaller - of_larger
    terms = terms_of(smaller, N), terms_of(larger, N)
    return stage(*terms, difference[:n], difference[n : n + m], n_data=N, n_unseen=m, drawn=drawn)


def true_gain(H: Tensor, n: int) -> float:
    N = len(H)
    full = posterior(H, N)
    return float(kl_to(full, posterior(H[: n // 2], N)) - kl_to(full, posterior(H[:n], N)))


EXACT = {
    "all data read": (40, 40, 0),
    "the unseen samples are all the others": (40, 24, 16),
    "one sample is left, and it is unseen": (40, 39, 1),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_gain_is_exact_if_all_samples_are_used(case: str) -> None:
    N, n, m = EXACT[case]
    H = curvatures(N)
    found = gained(H, n, m)
    assert found.n_samples == n
    assert found.gain == pytest.approx(true_gain(H, n), rel=1e-10)
    assert found.standard_error == 0


def test_a_single_unseen_sample_has_an_infinite_error() -> None:
    assert gained(curvatures(40), 16, 1).standard_error == math.inf
    assert gained(curvatures(40), 16, 1).at_most == math.inf


ORDERS = 600


def test_the_gain_is_unbiased_over_unseen_samples_and_its_error_is_theirs() -> None:
    # one pair of posteriors, whose unseen samples are drawn again and again
    H, n, m = curvatures(60), 12, 16
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(ORDERS):
        rest = n + torch.randperm(len(H) - n, generator=generator)
        found.append(gained(torch.cat([H[:n], H[rest]]), n, m))
    gains = torch.tensor([f.gain for f in found], dtype=torch.float64)
    spread = gains.std()
    z = (gains.mean() - true_gain(H, n)) / (spread / ORDERS**0.5)
    assert abs(float(z)) < 3.5
    # power: the terms of the posteriors' own samples are many errors away
    N = len(H)
    smaller, larger = posterior(H[: n // 2], N), posterior(H[:n], N)
    own = sample_terms(smaller, H[:n], N).mean() - sample_terms(larger, H[:n], N).mean()
    a, b = terms_of(smaller, N), terms_of(larger, N)
    biased = own + (a.prior_trace + a.log_det - b.prior_trace - b.log_det) / 2
    assert abs(float(biased) - true_gain(H, n)) > 20 * float(spread) / ORDERS**0.5
    variances = torch.tensor([f.standard_error for f in found], dtype=torch.float64).square()
    assert float(variances.mean() / spread.square()) == pytest.approx(1, abs=0.15)
    # the finite population matters here: without it, the error would be far too large
    assert 1 - m / (N - n) < 0.7
    # a tolerance that was gained exactly: half of the estimates are below it, and few by two errors (of 16 skewed
    # samples; one in 50 if they were many and normal)
    truth = true_gain(H, n)
    assert float((gains < truth).double().mean()) > 0.4
    stops = [Stopping((Stage(n // 2), f), truth, N).enough for f in found]
    assert 0 < sum(stops) / ORDERS < 0.12


def test_draws_leave_an_error_if_all_data_were_read() -> None:
    # every draw of a sample's curvature is its mean, or far from it
    N, n = 40, 40
    mean = curvatures(N)
    generator = torch.Generator().manual_seed(2)

    def draw() -> Tensor:
        factors = -torch.log(torch.rand(N, 1, 1, dtype=torch.float64, generator=generator))
        return mean * factors

    fitted = draw()
    full = posterior(mean, N)
    smaller, larger = posterior(fitted[: n // 2], N), posterior(fitted, N)
    truth = float(kl_to(full, smaller) - kl_to(full, larger))
    found = [gained(fitted, n, 0, drawn=True, redrawn=draw()) for _ in range(ORDERS)]
    gains = torch.tensor([f.gain for f in found], dtype=torch.float64)
    z = (gains.mean() - truth) / (gains.std() / ORDERS**0.5)
    assert abs(float(z)) < 3.5
    # power: the draws that the larger posterior was fitted to prefer it
    assert gained(fitted, n, 0, drawn=True).gain - truth > 10 * gains.std() / ORDERS**0.5
    # at least the true error, and at most twice: samples differ too
    ratio = torch.tensor([f.standard_error for f in found]).square().mean() / gains.var()
    assert 1 < float(ratio) < 4
    assert gained(mean, n, 0).standard_error == 0


def test_drawn_curvatures_have_no_finite_population_factor() -> None:
    H = curvatures(40)
    exact, drawn = gained(H, 24, 16), gained(H, 24, 16, drawn=True)
    assert exact.gain == drawn.gain
    assert exact.standard_error == 0
    N, f = 40, 24 / 40
    smaller, larger = posterior(H[:12], N), posterior(H[:24], N)
    d = sample_terms(smaller, H, N) - sample_terms(larger, H, N)
    expected = f**2 * d[:24].var(correction=1) / 24 + (1 - f) ** 2 * d[24:].var(correction=1) / 16
    assert drawn.standard_error == pytest.approx(float(expected) ** 0.5, rel=1e-10)


def test_a_negative_gain_is_not_called_enough() -> None:
    stopping = Stopping((Stage(32), Stage(64, -1.18, 0.31)), tolerance=1.0, n_available=300)
    assert stopping.enough
    assert "gained -1.18 ± 0.31 nats, below zero by over two standard errors" in stopping.reason
    assert "below zero" not in Stopping((Stage(32), Stage(64, -0.5, 0.31)), 1.0, 300).reason
