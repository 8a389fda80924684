"""Draws in chunks: the same numbers as drawn at once, and never all of them in memory."""

import pytest
import torch
from models import MODELS, targets
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.predictive import predictive as module
from debiased_laplace.predictive.predictive import standard_normal

SIZES = {
    "lengths that are no multiple of 16": (10, 37, 3),
    "a multiple of 16": (5, 16, 2),
    "fewer than 16 numbers at a time": (7, 3, 1),
    "fewer than 16 numbers": (4, 3, 1),
    "the last chunk is smaller": (100, 1001, 13),
    "all at once": (6, 21, 50),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", SIZES)
def test_chunks_are_the_numbers_drawn_at_once(case, dtype, monkeypatch):
    n, P, size = SIZES[case]
    like = torch.zeros(P, dtype=dtype)
    monkeypatch.setattr(module, "CHUNK_BYTES", size * P * like.element_size())
    whole, chunked = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = torch.randn(n, P, generator=whole, dtype=dtype)
    chunks = list(standard_normal(n, like, chunked))
    assert max(map(len, chunks)) == min(size, n)
    assert torch.equal(torch.cat(chunks), expected)
    # what is drawn afterwards is the same too
    assert torch.equal(torch.randn(5, generator=whole), torch.randn(5, generator=chunked))


@pytest.mark.parametrize("options", [{}, {"subset_of_weights": "last_layer"}], ids=["all weights", "last layer"])
def test_samples_do_not_depend_on_chunks_whose_draws_are_never_in_memory_together(options, monkeypatch):
    model, X = MODELS["MLP"]()
    la = DebiasedLaplace(
        model, "regression", sigma_noise=0.7, prior_precision=0.4, temperature=1.3, sampling="uniform", **options
    )
    la.fit(DataLoader(TensorDataset(X, targets("regression")), batch_size=16))
    x, P = X[:5], len(la.mean_subnet)

    def draw():
        def generator():
            return torch.Generator().manual_seed(8)

        return (
            la.sample(11, generator=generator()),
            la.functional_samples(x, n_samples=11, generator=generator()),
            la.functional_samples(x, "nn", 11, generator=generator()),
            la.predictive_samples(x, n_samples=11, generator=generator()),
            *la(x, "nn", link_approx="mc", n_samples=11, generator=generator()),
            la.predict(x).samples(11, generator()),
        )

    expected, sizes, root = draw(), [], LowRankPlusDiagonal.root

    def noted(self, noise):
        sizes.append(len(noise))
        return root(self, noise)

    monkeypatch.setattr(LowRankPlusDiagonal, "root", noted)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * P * 8)
    found = draw()
    assert set(sizes) == {4, 3}
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
