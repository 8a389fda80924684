"""The choice among estimators against dense matrices, and the quality of the choice."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from models import MODELS, targets
from oracles import (
    averaged_over_null_blocks,
    dense_cross_fitted_kronecker,
    dense_cross_fitted_posterior,
    dense_folds,
    dense_ggn,
    dense_hessian,
    dense_kl,
    dense_kronecker_basis,
    dense_kronecker_posterior,
    dense_low_rank_posterior,
    eigenpairs_above,
    mean_of,
    non_increasing,
)
from sub_batches import network_of, rows_of, samples_of, small_network
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.roots import MonteCarloGaussNewton
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.debiasing import choice as module
from debiased_laplace.debiasing.choice import Choice, RunnerUp, Weighting, choose, ranked, split_for, trial_terms
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.options import RANKS, SHARES, EstimatorOptions, Request, Trial
from debiased_laplace.debiasing.whitened import FLOOR

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(9))
SIGMA, TEMPERATURE, SEED = 0.6, 1.3, 3


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


def options(magnitudes: str, **chosen: object) -> EstimatorOptions:
    usual = {"rank": None, "complement": "none", "solver": "auto", "seed": SEED, "n_folds": 3}
    return EstimatorOptions(**{**usual, "magnitudes": magnitudes, **chosen})


def trial(magnitudes: str, share: float = 0.5, **chosen: object) -> Trial:
    return Trial(options(magnitudes, **chosen), share)


def weight(n_data: int) -> float:
    return n_data / (SIGMA**2 * TEMPERATURE)


@cache
def per_sample(name: str, likelihood: str) -> list[Tensor]:
    model, X = MODELS[name]()
    return [H.detach() for H in dense_ggn(model, X, likelihood)[0]]


# --- what samples set aside say, with dense matrices only ---


def dense_split(positions: Tensor, trial: Trial) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return samples of directions and of magnitudes, and folds, as the seed deals them."""
    n, generator = len(positions), torch.Generator().manual_seed(SEED)
    if trial.options.magnitudes == "held_out":
        order, n_a = torch.randperm(n, generator=generator), round(trial.direction_share * n)
        return positions[order[:n_a].sort().values], positions[order[n_a:].sort().values], None
    if trial.options.magnitudes == "cross_fitted":
        folds = (torch.arange(n) % trial.options.n_folds)[torch.randperm(n, generator=generator)]
        return positions, None, folds
    return positions, None, None


def dense_curvature(name: str, likelihood: str, trial: Trial, positions: Tensor, n_data: int) -> Tensor:
    """Return a trial's estimate (P, P) from the samples at some positions."""
    a, b, folds = dense_split(positions, trial)
    model, X = MODELS[name]()
    Hs, asked = per_sample(name, likelihood), trial.options
    if asked.structure == "kron":
        return _dense_kronecker(model, Hs, a, b, folds, n_data)[0]
    if asked.metric == "kron":
        return _dense_whitened(model, Hs, a, b, folds, n_data, asked.rank)
    full = asked.structure == "full"
    threshold = 1e-10 if full or asked.rank is not None else 1e-6
    complement = "isotropic" if full else asked.complement
    if folds is not None:
        return dense_cross_fitted_posterior(
            Hs, a, folds, n_data=n_data, complement=complement, rank=asked.rank, threshold=threshold,
            basis_of=(lambda H: dense_kronecker_basis(model, H)) if complement == "kron" else None,
        ).curvature  # fmt: skip
    magnitudes = {"magnitudes": asked.magnitudes, "rank": asked.rank, "threshold": threshold, "per_sample": Hs}
    both = a if b is None else b
    if complement != "kron":
        return dense_low_rank_posterior(
            model, X, likelihood, a, both, n_data=n_data, complement=complement, **magnitudes
        ).curvature
    found = dense_low_rank_posterior(model, X, likelihood, a, both, n_data=n_data, **magnitudes)
    H_a, f = mean_of(Hs, a), len(a) / n_data
    H = H_a if b is None else f * H_a + (1 - f) * mean_of(Hs, b)
    K = dense_kronecker_basis(model, H_a)
    outside = torch.eye(len(H), dtype=H.dtype) - found.directions @ found.directions.T
    return found.curvature + K @ torch.diag(torch.diagonal(K.T @ outside @ H @ outside @ K)) @ K.T


def _dense_kronecker(
    model: nn.Module, Hs: list[Tensor], a: Tensor, b: Tensor | None, folds: Tensor | None, n_data: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the curvature, its diagonal in the basis, and the basis."""
    K = dense_kronecker_basis(model, mean_of(Hs, a))
    if folds is None:
        d = dense_kronecker_posterior(K, Hs, a, b, n_data=n_data).magnitudes
    else:
        d = dense_cross_fitted_kronecker(
            Hs, a, folds, n_data=n_data,
            basis_of=lambda some: dense_kronecker_basis(model, mean_of(Hs, some)),
            averaged=lambda H, values: averaged_over_null_blocks(model, H, values),
        )[0]  # fmt: skip
    return K @ torch.diag(d) @ K.T, d, K


def _dense_whitened(
    model: nn.Module,
    Hs: list[Tensor],
    a: Tensor,
    b: Tensor | None,
    folds: Tensor | None,
    n_data: int,
    rank: int | None,
) -> Tensor:
    _, d, K = _dense_kronecker(model, Hs, a, b, folds, n_data)
    S, f, threshold = d + FLOOR * d.mean(), len(a) / n_data, 1e-6 if rank is None else 1e-10
    T = K @ torch.diag(S.rsqrt())
    H_a = T.T @ mean_of(Hs, a) @ T
    m, U = eigenpairs_above(H_a, threshold, rank)
    outside = torch.eye(len(S), dtype=S.dtype) - U @ U.T
    residual = torch.diagonal(outside @ H_a @ outside)
    if folds is not None:
        found = dense_folds(
            Hs, a, folds, len(m), threshold=threshold,
            whitening_of=lambda H: dense_kronecker_basis(model, H) @ torch.diag(S.rsqrt()),
        )  # fmt: skip
        m = f * m + (1 - f) * non_increasing(found.values)
        residual = f * residual + (1 - f) * found.residual
    elif b is not None:
        H_b = T.T @ mean_of(Hs, b) @ T
        m = f * m + (1 - f) * torch.diagonal(U.T @ H_b @ U)
        residual = f * residual + (1 - f) * torch.diagonal(outside @ H_b @ outside)
    back = torch.linalg.inv(T)
    return back.T @ (U @ torch.diag(m) @ U.T + torch.diag(residual)) @ back


def dense_terms(
    name: str, likelihood: str, trials: list[Trial], weightings: list[Weighting], samples: Tensor, n_data: int
) -> Tensor:
    """Return the terms, part by part: ½ [tr(P⁻¹ P₀) + log det P + Nτ (f tr(P⁻¹ H_rest) + (1 - f) tr(P⁻¹ H_n))]."""
    Hs, n = per_sample(name, likelihood), len(samples)
    n_parts = min(4, n // 4)
    parts = (torch.arange(n) % n_parts)[torch.randperm(n, generator=torch.Generator().manual_seed(SEED))]
    f = n / n_data
    columns = []
    for number in range(n_parts):
        rest, held = samples[parts != number], samples[parts == number]
        H_rest = mean_of(Hs, rest)
        # N is reduced, so that the share of the rest is the same
        curvatures = [dense_curvature(name, likelihood, t, rest, round(n_data * len(rest) / n)) for t in trials]
        for position in held.tolist():
            column = []
            for w in weightings:
                P0 = torch.diag(w.prior.double().expand(len(H_rest)))
                of_trials = []
                for C in curvatures:
                    P = w.likelihood_weight * C + P0
                    H = f * H_rest + (1 - f) * Hs[position]
                    trace = torch.trace(torch.linalg.solve(P, P0 + w.likelihood_weight * H))
                    of_trials.append(0.5 * (trace + torch.logdet(P)))
                column.append(torch.stack(of_trials))
            columns.append(torch.stack(column))
    return torch.stack(columns, dim=-1)


def prior_of_blocks(name: str) -> Tensor:
    sizes = torch.tensor([p.numel() for p in MODELS[name]()[0].parameters() if p.requires_grad])
    return torch.linspace(0.2, 3.1, len(sizes)).double().repeat_interleave(sizes)


def all_weightings(name: str, n_data: int) -> list[Weighting]:
    return [
        Weighting(weight(n_data), torch.tensor(0.37).double()),
        Weighting(0.2 * weight(n_data), torch.tensor(23.0).double()),
        Weighting(weight(n_data), prior_of_blocks(name)),
    ]


COMPLEMENTS = ("none", "isotropic", "diagonal", "kron")
# model, likelihood, samples, n_data, trials
CASES = {
    "low rank, every complement, held out": (
        "MLP",
        "classification",
        23,
        61,
        [trial("held_out", rank=7, complement=c) for c in COMPLEMENTS],
    ),
    "low rank, every complement, cross-fitted": (
        "LayerNorm and raw parameters",
        "regression",
        17,
        40,
        [trial("cross_fitted", rank=6, complement=c) for c in COMPLEMENTS],
    ),
    "low rank, every complement, same batch": (
        "MLP",
        "regression",
        14,
        30,
        [trial("same_batch", complement=c) for c in COMPLEMENTS],
    ),
    "low rank, several ranks, shares and ways": (
        "convolutions and pooling",
        "classification",
        20,
        47,
        [
            *(trial("held_out", share, rank=rank) for share in SHARES for rank in (3, None)),
            *(trial("cross_fitted", rank=rank, complement="diagonal") for rank in (3, 9, None)),
            trial("same_batch", complement="isotropic"),
        ],
    ),
    "low rank, more rows than parameters": (
        "partly frozen",
        "classification",
        31,
        50,
        [trial(kind, rank=rank) for kind in ("held_out", "cross_fitted", "same_batch") for rank in (8, None)],
    ),
    "in the Kronecker metric and out of it": (
        "MLP",
        "classification",
        18,
        50,
        [
            trial(kind, rank=rank, complement="kron", metric=metric)
            for kind in ("held_out", "cross_fitted", "same_batch")
            for metric, rank in (("euclidean", 5), ("kron", 5), ("kron", None))
        ],
    ),
    "Kronecker": (
        "MLP",
        "classification",
        36,
        64,
        [
            *(trial("held_out", share, structure="kron") for share in SHARES),
            *(trial(kind, structure="kron") for kind in ("cross_fitted", "same_batch")),
        ],
    ),
    "full": (
        "partly frozen",
        "regression",
        21,
        33,
        [
            *(trial("held_out", share, structure="full") for share in SHARES),
            *(trial(kind, structure="full") for kind in ("cross_fitted", "same_batch")),
        ],
    ),
    "all the data": (
        "MLP",
        "classification",
        19,
        19,
        [trial(kind, rank=6, complement="kron") for kind in ("held_out", "cross_fitted", "same_batch")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_terms_against_dense_matrices(case: str) -> None:
    name, likelihood, n, n_data, trials = CASES[case]
    network, X, y = small_network(name, likelihood)
    samples, weightings = ORDER[:n].sort().values, all_weightings(name, n_data)
    found = trial_terms(rows_of(network, X, y, samples), trials, weightings, n_data=n_data, seed=SEED)
    expected = dense_terms(name, likelihood, trials, weightings, samples, n_data)
    assert found.shape == (len(weightings), len(trials), n)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-6)


def test_a_prior_of_its_own_for_every_parameter() -> None:
    network, X, y = small_network("MLP")
    samples, P = ORDER[:16].sort().values, network.n_parameters
    weighting = Weighting(weight(40), torch.linspace(0.1, 2.0, P).double(), of_blocks=False)
    trials = [trial("cross_fitted", complement=c) for c in COMPLEMENTS[:3]]
    found = trial_terms(rows_of(network, X, y, samples), trials, [weighting], n_data=40, seed=SEED)
    expected = dense_terms("MLP", "classification", trials, [weighting], samples, 40)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-6)


def test_terms_do_not_depend_on_which_trials_are_fitted_together() -> None:
    network, X, y = small_network("MLP")
    batch, weighting = rows_of(network, X, y, ORDER[:20].sort().values), all_weightings("MLP", 40)[0]
    trials = Request(options("held_out"), frozenset({"magnitudes", "complement", "direction_samples"})).trials(0.5, 30)
    assert len(trials) == (3 + 1 + 1) * 4
    together = trial_terms(batch, trials, [weighting], n_data=40, seed=SEED)
    for i, one in enumerate(trials):
        alone = trial_terms(batch, [one], [weighting], n_data=40, seed=SEED)
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-9, atol=1e-9)


# --- which samples are set aside ---


def linear_problem(n: int) -> SubBatchCurvature:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model, X = nn.Linear(3, 2).double(), torch.randn(n, 3, dtype=torch.float64)
    y = torch.arange(n) % 2
    return rows_of(network_of(model, X, y, "classification"), X, y, batch_size=100)


# samples, parts, total number of samples set aside
PARTS = {
    "the fewest": (8, 2, 8),
    "fewer than four of at least four": (15, 3, 15),
    "quarters": (40, 4, 40),
    "quarters that are not equal": (43, 4, 43),
    "all four are needed": (64, 4, 64),
    "three set enough aside": (100, 4, 75),
    "two set enough aside": (150, 4, 76),
    "one sets enough aside": (256, 4, 64),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, n_parts, n_aside = PARTS[case]
    dealt, aside = recorded_parts(monkeypatch)
    terms = trial_terms(
        linear_problem(n), [trial("same_batch")], [Weighting(2.0 * n, torch.tensor(0.3))], n_data=3 * n, seed=SEED
    )
    assert dealt == [(n, n_parts)]
    assert terms.shape == (1, 1, n_aside)
    assert min(len(held) for _, held in aside) >= 4
    everybody = torch.cat([held for _, held in aside])
    assert len(everybody.unique()) == len(everybody) == n_aside
    for rest, held in aside:
        assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(n))


@pytest.mark.parametrize("how", ["asked for", "where nothing else fits"])
def test_lanczos_has_two_parts(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, X, y = small_network("MLP")
    if how == "where nothing else fits":
        monkeypatch.setattr(module, "choose_solver", lambda curvature, rank: "lanczos")
    solver = "lanczos" if how == "asked for" else "auto"
    dealt, _ = recorded_parts(monkeypatch)
    trials = [trial("same_batch", rank=rank, solver=solver) for rank in (2, 3)]
    trial_terms(rows_of(network, X, y), trials, all_weightings("MLP", 50), n_data=50, seed=SEED)
    assert dealt == [(40, 2)]


def recorded_parts(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], list[tuple[Tensor, Tensor]]]:
    """Deal samples into parts; return what each part leaves and sets aside."""
    dealt: list[tuple[int, int]] = []
    aside: list[tuple[Tensor, Tensor]] = []
    deal, each_fold = module.deal, module.each_fold

    def recording(n: int, n_parts: int, generator: torch.Generator) -> Tensor:
        dealt.append((n, n_parts))
        return deal(n, n_parts, generator)

    def noting(*args: object, **kwargs: object) -> Iterator[object]:
        for part in each_fold(*args, **kwargs):
            aside.append((part.others, part.held))
            yield part

    monkeypatch.setattr(module, "deal", recording)
    monkeypatch.setattr(module, "each_fold", noting)
    return dealt, aside


@pytest.mark.parametrize("n", [4, 7])
def test_too_few_samples(n: int) -> None:
    network, X, y = small_network("MLP")
    batch = rows_of(network, X, y, torch.arange(n))
    with pytest.raises(ValueError, match=f"expected at least 8, got {n}"):
        choose(batch, [trial("same_batch"), trial("cross_fitted")], all_weightings("MLP", 40)[0], n_data=40, seed=0)


def test_the_split_of_a_trial_has_its_share() -> None:
    network, X, y = small_network("MLP")
    batch = rows_of(network, X, y, ORDER[:30].sort().values)
    for share, n_a in ((0.25, 8), (0.5, 15), (0.75, 22), (0.001, 1), (0.99, 28)):
        split = split_for(batch, trial("held_out", share), 60, SEED)
        a, b = split.directions.samples.indices, split.magnitudes.samples.indices
        assert len(a) == n_a
        assert torch.equal(torch.cat([a, b]).sort().values, batch.samples.indices)
    dealt = split_for(batch, trial("cross_fitted"), 60, SEED)
    assert dealt.magnitudes is None
    assert dealt.folds.bincount().tolist() == [10, 10, 10]
    # no more folds than four
    assert len(split_for(batch, trial("cross_fitted", n_folds=99), 60, SEED).folds.unique()) == 4
    biased = split_for(batch, trial("same_batch"), 60, SEED)
    assert (biased.magnitudes, biased.folds) == (None, None)


# --- where all samples are all the data ---


def test_the_kl_is_exact_if_the_samples_are_all_the_data() -> None:
    """The samples set aside have weight 0, and folds have no effect."""
    network, X, y = small_network("MLP")
    samples = ORDER[:20].sort().values
    trials = [trial(kind, rank=5, complement="isotropic") for kind in ("held_out", "cross_fitted", "same_batch")]
    trials.append(trial("cross_fitted", rank=5, complement="isotropic", n_folds=7))
    w = all_weightings("MLP", 20)[0]
    terms = trial_terms(rows_of(network, X, y, samples), trials, [w], n_data=20, seed=SEED)[0]
    parts = (torch.arange(20) % 4)[torch.randperm(20, generator=torch.Generator().manual_seed(SEED))]
    Hs, P0 = per_sample("MLP", "classification"), w.prior * torch.eye(network.n_parameters).double()
    for number, of_part in enumerate(terms.split(5, dim=1)):
        torch.testing.assert_close(of_part, of_part[:, :1].expand_as(of_part), rtol=1e-13, atol=0)
        rest = samples[parts != number]
        full = w.likelihood_weight * mean_of(Hs, rest) + P0
        constant = 0.5 * (len(full) + torch.logdet(full))
        for t, found in zip(trials, of_part[:, 0], strict=True):
            own = w.likelihood_weight * dense_curvature("MLP", "classification", t, rest, len(rest)) + P0
            assert float(found) == pytest.approx(dense_kl(own, full) + float(constant), rel=1e-8)
    torch.testing.assert_close(terms[1], terms[2], rtol=1e-12, atol=0)
    torch.testing.assert_close(terms[1], terms[3], rtol=1e-12, atol=0)


def test_drawn_targets_leave_an_error_even_on_all_the_data() -> None:
    network, X, y = small_network("MLP")
    batch = rows_of(network, X, y, root=lambda likelihood: MonteCarloGaussNewton(likelihood, 1))
    trials = [trial("cross_fitted", rank=5), trial("same_batch", rank=5)]
    terms = trial_terms(batch, trials, [all_weightings("MLP", 40)[0]], n_data=40, seed=SEED)[0]
    assert bool((terms[0] - terms[1]).abs().min() > 1e-3)


# --- drawn targets ---


def test_evaluation_uses_draws_of_its_own() -> None:
    network, X, y = small_network("MLP")
    batch = rows_of(network, X, y, root=lambda likelihood: MonteCarloGaussNewton(likelihood, 2))
    rest = batch.part(torch.arange(5, 40))
    evaluation = module._evaluation_curvature(rest)
    assert torch.equal(evaluation.samples.indices, rest.samples.indices)
    drawn = [some.stacked_rows().rows.dense().flatten(0, 1) for some in (rest, rest.redrawn(), evaluation)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            same = (one == other).all(1).double().mean()
            assert 0.1 < float(same) < 0.9  # with few classes, some labels are drawn again
    exact = rows_of(network, X, y)
    assert module._evaluation_curvature(exact) is exact


@pytest.mark.slow
def test_evaluation_with_fresh_draws_is_unbiased() -> None:
    """On average over draws, the samples' own share equals that of their exact GGN."""
    network, X, y = small_network("MLP")
    samples, P0 = ORDER[:24].sort().values, torch.tensor(50.0).double()
    H = mean_of(per_sample("MLP", "classification"), samples)
    w, differences = 400.0, []
    for seed in range(200):
        rest = rows_of(
            network, X, y, samples, lambda likelihood: MonteCarloGaussNewton(likelihood, 1), 1000 * seed, batch_size=24
        )
        rest.keep_rows()
        split = split_for(rest, trial("cross_fitted"), 25, seed)
        precision = estimate(split, options("cross_fitted")).curvature.precision(w, P0)
        truth = float(torch.trace(torch.linalg.solve(precision.to_dense(), H)))
        evaluations = (module._evaluation_curvature(rest), rest.redrawn())
        differences.append([w * (float(one.traces(precision).mean()) - truth) for one in evaluations])
    found = torch.tensor(differences)
    z = found.mean(0) / found.std(0) * len(found) ** 0.5
    assert abs(float(z[0])) < 3
    assert float(z[1]) < -4, "power: draws that the posterior was fitted to are optimistic"


# --- the order ---


def test_ranked() -> None:
    trials = [trial("same_batch", rank=rank) for rank in (1, 2, 3, 4)]
    generator = torch.Generator().manual_seed(0)
    shared = 50 * torch.randn(30, generator=generator).double()
    own = torch.randn(4, 30, generator=generator).double()
    values = shared + own + torch.tensor([4.0, 1.0, 9.0, 1000.0])[:, None]
    found = ranked(trials, values)
    assert found.n_samples == 30
    assert found.chosen is trials[1]
    assert [r.trial.options.rank for r in found.runners_up] == [1, 3, 4]
    for runner_up, i in zip(found.runners_up, (0, 2, 3), strict=True):
        d = (values[i] - values[1]).tolist()
        mean = sum(d) / 30
        variance = sum((x - mean) ** 2 for x in d) / 29
        assert runner_up.excess == pytest.approx(mean)
        # paired: common terms of the samples are no error
        assert runner_up.standard_error == pytest.approx((variance / 30) ** 0.5)
        assert runner_up.standard_error < 0.5
    shown = str(found).splitlines()
    assert shown[0] == "chosen by held-out KL on 30 samples (optimistic): magnitudes='same_batch', rank=2, " + (
        "complement='none'"
    )
    assert shown[1].startswith(f"  + {found.runners_up[0].excess:.2f} ± {found.runners_up[0].standard_error:.2f} nats")
    assert len(shown) == 4


def test_the_first_of_equal_trials_is_chosen() -> None:
    trials = [trial("same_batch", rank=rank) for rank in (1, 2, 3)]
    values = torch.tensor([[2.0, 3.0], [1.0, 2.0], [2.0, 1.0]]).double()
    assert ranked(trials, values).chosen is trials[1]
    assert ranked(trials, values.flip(0)).chosen is trials[0]


def test_a_single_trial_is_chosen_without_evaluation() -> None:
    network, X, y = small_network("MLP")
    only = trial("same_batch", rank=3)
    found = choose(rows_of(network, X, y, torch.arange(3)), [only], all_weightings("MLP", 40)[0], n_data=40, seed=0)
    assert found == Choice(only, (), 0)
    assert str(found) == f"the only candidate: {only}"


def test_the_rank_of_a_choice_is_limited_to_the_directions_found() -> None:
    other = RunnerUp(trial("same_batch"), 1.0, 0.1)
    found = Choice(trial("held_out", rank=25), (other,), 9)
    assert found.found(25) == found.found(0) == found
    assert found.found(12) == Choice(trial("held_out", rank=12), (other,), 9)
    every = Choice(trial("held_out"), (other,), 9)
    assert every.found(12) == every


# --- what is offered ---


def ranks_offered(batch: SubBatchCurvature, trials: list[Trial], weighting: Weighting) -> list[int | None]:
    return [t.options.rank for t in module._offered(batch, trials, weighting)]


def test_ranks_that_give_the_same_estimate_are_offered_once() -> None:
    network, X, y = small_network("MLP")
    weighting = all_weightings("MLP", 100)[0]
    P = network.n_parameters
    assert 15 < 24 < P < 100, P

    def ranks(n: int, magnitudes: str, share: float = 0.5) -> list[int | None]:
        trials = [trial(magnitudes, share, rank=rank) for rank in RANKS]
        return ranks_offered(rows_of(network, X, y, torch.arange(n)), trials, weighting)

    # 3 rows per sample
    assert ranks(40, "same_batch") == [25, 100, None]
    assert ranks(8, "same_batch") == [25, None]
    assert ranks(10, "same_batch") == [25, 100, None]
    assert ranks(10, "held_out") == [25, None]
    assert ranks(20, "held_out", 0.25) == [25, None]
    assert ranks(40, "held_out", 0.25) == [25, 100, None]


def test_with_lanczos_large_ranks_equal_rank_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANCZOS_RANK", 20)
    network, X, y = small_network("MLP")
    batch, weighting = rows_of(network, X, y), all_weightings("MLP", 100)[0]
    trials = [trial("same_batch", rank=rank, solver="lanczos") for rank in (2, 19, 20, 40, None)]
    assert ranks_offered(batch, trials, weighting) == [2, 19, 20, None]
    assert ranks_offered(batch, trials[:-1], weighting) == [2, 19, 20, 40]


def test_infeasible_trials_are_not_offered() -> None:
    network, X, y = small_network("MLP")
    trials = [trial("same_batch", complement=c) for c in COMPLEMENTS]
    trials.append(trial("same_batch", complement="kron", metric="kron"))
    prior = torch.linspace(0.1, 2.0, network.n_parameters).double()
    rows = rows_of(network, X, y, torch.arange(12))
    assert module._offered(rows, trials, Weighting(90.0, prior)) == trials
    assert module._offered(rows, trials, Weighting(90.0, prior, of_blocks=False)) == trials[:3]
    # a Hessian has no rows to whiten
    hessian = hessian_of(torch.arange(12))
    assert module._offered(hessian, trials, Weighting(90.0, prior)) == trials[:4]
    # if no trial is feasible, the estimator raises the error
    assert module._offered(hessian, trials[4:], Weighting(90.0, prior)) == trials[4:]


def hessian_of(indices: Tensor) -> HessianCurvature:
    network, X, y = small_network("MLP")
    second = SecondDerivatives(network.selection, network.parameters, network.likelihood, Batch(X[:4], y[:4]))
    return HessianCurvature(network, samples_of(X, y, indices), second)


def test_a_hessian_is_evaluated_by_hessians() -> None:
    samples = ORDER[:13].sort().values
    model, X = MODELS["MLP"]()
    Hs = [H.detach() for H in dense_hessian(model, X[samples], targets("classification")[samples], "classification")[0]]
    one, w, f = trial("same_batch", rank=3, complement="isotropic"), 50.0, 13 / 30
    prior = torch.tensor(9.0).double()
    terms = trial_terms(hessian_of(samples), [one], [Weighting(w, prior)], n_data=30, seed=SEED)[0, 0]
    parts = (torch.arange(13) % 3)[torch.randperm(13, generator=torch.Generator().manual_seed(SEED))]
    expected = []
    for number in range(3):
        rest = (parts != number).nonzero().flatten()
        H = mean_of(Hs, rest)
        values, vectors = torch.linalg.eigh(H)
        m, U = values.flip(0)[:3], vectors.flip(1)[:, :3]
        P = len(H)
        c = max(float(torch.trace(H) - m.sum()), 0.0) / (P - 3)
        eye = torch.eye(P).double()
        precision = w * (U @ torch.diag(m) @ U.T + c * (eye - U @ U.T)) + prior * eye
        for i in (parts == number).nonzero().flatten().tolist():
            full = w * (f * H + (1 - f) * Hs[i]) + prior * eye
            trace = torch.trace(torch.linalg.solve(precision, full))
            expected.append(0.5 * (trace + torch.logdet(precision)))
    torch.testing.assert_close(terms, torch.stack(expected), rtol=1e-7, atol=1e-6)


# --- whether it chooses well ---


@cache
def population(n: int = 500) -> tuple[SubBatchCurvature, Tensor]:
    """Return a synthetic problem of four unequal classes and a network that was briefly trained on it."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        y = torch.randint(4, (n,))
        centers = 1.5 * torch.randn(4, 6).double()
        X = centers[y] + torch.randn(n, 6).double() * torch.tensor([0.3, 0.5, 0.8, 1.0, 1.5, 2.0])
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), y).backward()
            optimizer.step()
    batch = rows_of(network_of(model, X, y, "classification"), X, y, batch_size=100)
    batch.keep_rows()
    return batch, batch.dense()


@pytest.mark.slow
def test_the_choice_is_nearly_as_good_as_the_best_trial() -> None:
    """The mean KL to the full batch over draws, of the choice and of every fixed trial, for weak and strong priors."""
    everybody, H = population()
    N, P = everybody.n_samples, len(H)
    trials = [
        trial(kind, rank=rank, complement=complement, n_folds=4)
        for kind in ("held_out", "cross_fitted", "same_batch")
        for rank, complement in ((10, "none"), (None, "none"), (10, "isotropic"), (10, "kron"), (30, "kron"))
    ]
    priors = (0.05, 0.5, 3.0)
    weightings = [Weighting(N / TEMPERATURE, torch.tensor(prior).double()) for prior in priors]
    full = [w.likelihood_weight * H + w.prior * torch.eye(P).double() for w in weightings]
    n_draws, n = 12, 80
    fixed, auto = torch.zeros(n_draws, len(priors), len(trials)), torch.zeros(n_draws, len(priors))
    for draw in range(n_draws):
        some = torch.randperm(N, generator=torch.Generator().manual_seed(draw))[:n].sort().values
        batch = everybody.part(some)
        estimates = [estimate(split_for(batch, t, N, draw), t.options).curvature for t in trials]
        terms = trial_terms(batch, trials, weightings, n_data=N, seed=draw)
        for j, (w, reference) in enumerate(zip(weightings, full, strict=True)):
            for i, found in enumerate(estimates):
                precision = found.precision(w.likelihood_weight, w.prior).to_dense()
                fixed[draw, j, i] = dense_kl(precision, reference)
            auto[draw, j] = fixed[draw, j, trials.index(ranked(trials, terms[j]).chosen)]
    of_trials, of_auto = fixed.mean(0), auto.mean(0)
    best = of_trials.min(1).values
    assert bool((of_auto <= 1.1 * best).all()), (of_auto, best)
    # power: a random choice would be worse, and some choices far worse
    assert bool((of_trials.mean(1) > 1.15 * best).all()), of_trials
    worst, single = of_trials.max(1).values / of_auto, fixed.max(2).values / auto
    assert bool((worst > torch.tensor([8.0, 2.0, 1.4])).all()), worst
    # in every draw, if the prior leaves a choice
    assert bool((single[:, :2].min(0).values > torch.tensor([5.0, 1.3])).all()), single
