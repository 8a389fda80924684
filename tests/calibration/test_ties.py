"""Ties by rounding: scores of predictions that are equal up to the order of their samples."""

import pytest
import torch

from debiased_laplace.calibration import calibration_report
from debiased_laplace.calibration.ties import merge_ties

N, M = 200, 90


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffle(draws: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """The same draws (S, ...) for n samples, each in an order of its own: (S, n, ...)."""
    order = torch.rand(len(draws), n, generator=torch.Generator().manual_seed(seed)).argsort(dim=0)
    return draws[order]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_a_constant_spread_from_samples_has_the_risk_of_a_random_order(dtype, shift: float) -> None:
    mean, z = 3 * normal(N, seed=1) + shift, normal(60, seed=2)
    samples = (mean + 0.7 * shuffle(z, N, 3)).to(dtype)
    y = mean + 1.1 * normal(N, seed=4)
    options = {"task": "regression", "observation_noise": 0.3, "n_resamples": 20, "temperature_scaling": "none"}
    found = calibration_report({"a": samples}, y, **options).metrics["a"]
    assert found["aurc"].known == pytest.approx(found["rmse"].known ** 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_probabilities_share_a_rank_a_bin_and_a_class(dtype) -> None:
    draws = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.6, 0.2, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64)
    p = shuffle(draws.repeat(5, 1), N, 5).to(dtype)  # means 0.4, 0.4 and 0.2: an edge of 15 bins, and two classes tie
    y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(6))
    found = calibration_report({"a": p}, y, task="multiclass", n_resamples=20, temperature_scaling="none")
    share = (y == 0).double().mean().item()
    assert found.metrics["a"]["accuracy"].known == pytest.approx(share)
    assert found.metrics["a"]["aurc"].known == pytest.approx(1 - share)
    assert found.metrics["a"]["ece"].known == pytest.approx(abs(0.4 - share), abs=1e-6)
    assert [b.n for b in found.methods["a"].curves.bins if b.n] == [N]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_of_equal_samples_on_both_sides_count_half(dtype) -> None:
    """Of two kinds of prediction the test set has a third of the uncertain one, the other set two thirds."""
    sure, unsure = (k * normal(20, 4, seed=7) for k in (3.0, 0.5))
    spread, narrow = (k * normal(30, seed=8) for k in (2.0, 0.4))

    def draw(n: int, share: float, seed: int):
        which = torch.arange(n) < share * n
        p = torch.where(which[:, None], *(shuffle(z.softmax(1), n, seed) for z in (unsure, sure)))
        f = 5 * normal(n, seed=seed) + torch.where(which, *(shuffle(z, n, seed + 1) for z in (spread, narrow)))
        return p.to(dtype), f.to(dtype)

    (p, f), (far_p, far_f) = draw(N - 2, 1 / 3, 9), draw(M, 2 / 3, 11)
    area = 2 / 3 * 2 / 3 + (2 / 3 * 1 / 3 + 1 / 3 * 2 / 3) / 2  # above, or equal and half
    labels, options = torch.arange(N - 2) % 4, {"n_resamples": 20, "temperature_scaling": "none"}
    found = calibration_report({"a": p}, labels, task="multiclass", ood={"far": {"a": far_p}}, **options)
    scores = found.ood["far"].metrics["a"]
    assert {"entropy", "max_probability", "mutual_information"} == set(scores)
    for name in ("entropy", "max_probability"):
        assert scores[name]["auroc"].known == pytest.approx(area, abs=1e-12)
    assert abs(scores["mutual_information"]["auroc"].known - 0.5) == pytest.approx(area - 0.5, abs=1e-12)
    options |= {"task": "regression", "observation_noise": 0.2}
    found = calibration_report({"a": f}, f.mean(0), ood={"far": {"a": far_f}}, **options).ood["far"].metrics["a"]
    assert found["standard_deviation"]["auroc"].known == pytest.approx(area, abs=1e-12)
    # 95 % of the set are recognised only with all of the test set
    assert found["standard_deviation"]["fpr95"].known == 1.0


def test_predictions_that_differ_by_rounding_have_no_difference() -> None:
    p, y = (1.5 * normal(300, 4, seed=12)).softmax(1), torch.arange(300) % 4
    predictions = {"map": p, "same": p.float() * 1.00000006}
    found = calibration_report(predictions, y, task="multiclass", n_resamples=20, temperature_scaling="none")
    for c in found.comparisons:
        assert (c.difference, c.p_value, c.verdict) == (0.0, 1.0, "no detectable difference") or c.metric[0] == "r"
    assert "same is not detectably different from map (NLL 0 [0, 0])" in found.summary[0]


def test_small_probabilities_keep_their_logarithm() -> None:
    tiny = torch.tensor([1e-20, 2e-17, 1e-15, 0.3], dtype=torch.float64)
    p, y = torch.stack([tiny, 1 - tiny], dim=1), torch.zeros(4, dtype=torch.int64)
    found = calibration_report({"a": p}, y, task="multiclass", n_resamples=20, temperature_scaling="none")
    assert found.metrics["a"]["nll"].known == pytest.approx(-tiny.log().mean().item(), rel=1e-12)


def test_a_limit_that_is_met_up_to_rounding_is_kept() -> None:
    p = torch.tensor([[0.7, 0.3]] * 10, dtype=torch.float64)
    found = calibration_report({"a": p}, [0] * 7 + [1] * 3, task="binary", n_resamples=20, temperature_scaling="none")
    for limit in (found.metrics["a"]["accuracy"].known * (1 + s * 1e-15) for s in (-1, 0, 1)):
        gate = {"metric": "accuracy", "judge": "estimate"}
        (outcome,) = found.check([{**gate, "min": limit, "max": limit}]).outcomes
        assert outcome.status == "passed"
        (outcome,) = found.check([{**gate, "max": limit - 1e-6}]).outcomes
        assert outcome.status == "failed"


def test_only_rounding_is_merged() -> None:
    x = torch.tensor([0.3, 0.3 + 1e-16, 0.3 + 1e-10, 0.1, 0.0, 1e-15, 1e-13], dtype=torch.float64)
    assert merge_ties(x).tolist() == [0.3, 0.3, 0.3 + 1e-10, 0.1, 0.0, 0.0, 1e-13]
    chain = 1 + 1e-13 * torch.arange(1000, dtype=torch.float64)  # neighbours are close, the ends are not
    assert torch.equal(merge_ties(chain), chain)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    noisy = 0.7 + 1e-16 * torch.arange(1000) % 7
    assert torch.equal(merge_ties(noisy[order]), merge_ties(noisy)[order])
    assert len(merge_ties(noisy).unique()) == 1
    assert merge_ties(x[:1]).tolist() == [0.3]
