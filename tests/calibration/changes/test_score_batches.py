import numpy as np
import pytest
import torch
from scipy import stats

from debiased_laplace.calibration.changes.batches import N_BATCHES, paired_spread, sum_scores


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sums_of_interleaved_batches() -> None:
    sums = sum_scores({"nll": draw(200, 1)}, None)
    assert set(sums) == {"samples", "nll"}
    assert len(sums["nll"]) == N_BATCHES
    assert sums["samples"] == tuple([4.0] * 8 + [3.0] * 56)
    for b in (0, 7, 63):
        assert sums["nll"][b] == pytest.approx(draw(200, 1)[b::N_BATCHES].sum().item(), abs=1e-12)


def test_few_samples_are_a_batch_each_which_gives_the_paired_t_test() -> None:
    old, new = draw(50, 2), draw(50, 2) + 0.3 * draw(50, 3) + 0.1
    spread = paired_spread(sum_scores({"a": old}, None), sum_scores({"a": new}, None), "a")
    assert spread.degrees_of_freedom == 49
    t = (new - old).mean().item() / spread.standard_error
    assert t == pytest.approx(stats.ttest_rel(new.numpy(), old.numpy()).statistic, rel=1e-12)


def test_unequal_batches_are_weighted_by_their_size() -> None:
    """Against a transcription with the batches' own sizes."""
    n = 130
    old, new = draw(n, 4), draw(n, 5) + 2.0
    spread = paired_spread(sum_scores({"a": old}, None), sum_scores({"a": new}, None), "a")
    d = (new - old).numpy()
    residuals = [np.sum(d[b::N_BATCHES] - d.mean()) for b in range(N_BATCHES)]
    expected = np.sqrt(N_BATCHES / (N_BATCHES - 1) * np.sum(np.square(residuals))) / n
    assert spread.standard_error == pytest.approx(expected, rel=1e-12)


def test_a_cluster_stays_in_one_batch() -> None:
    clusters = torch.arange(300) // 3
    old, new = draw(300, 6), draw(100, 7).repeat_interleave(3)  # equal within clusters
    spread = paired_spread(sum_scores({"a": 0 * old}, clusters), sum_scores({"a": new}, clusters), "a")
    independent = paired_spread(sum_scores({"a": 0 * old}, None), sum_scores({"a": new}, None), "a")
    truth = new.std().item() / 10  # of 100 clusters
    assert spread.standard_error == pytest.approx(truth, rel=0.25)
    assert independent.standard_error < 0.75 * truth


UNPAIRED = {
    "no sums": ({}, {}),
    "another score": ({"b": (1.0, 2.0)}, {}),
    "other batches": ({"samples": (2.0, 3.0)}, {}),
    "a single batch": ({"samples": (5.0,), "a": (1.0,)}, {"samples": (5.0,), "a": (2.0,)}),
    "too few sums": ({"a": (1.0,)}, {}),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_what_cannot_be_paired_is_not(case: str) -> None:
    good = {"samples": (3.0, 2.0), "a": (1.0, 2.0)}
    assert paired_spread(good, good, "a") is not None
    changes, others = UNPAIRED[case]
    old = changes if case in ("no sums", "another score") else good | changes
    assert paired_spread(old, good | others, "a") is None
