"""Options left open: what is chosen by held-out KL is the posterior that one gets by asking for it."""

import copy
import io
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian
from posterior_cases import PRIOR, SIGMA, TEMPERATURE, close, hyper_parameters, loader_of, problem
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.debiasing.choice import Choice
from debiased_laplace.debiasing.options import SHARES
from debiased_laplace.errors import NotFittedError

OPEN = ("magnitudes", "complement", "rank", "metric", "direction_samples")
EVERYTHING = dict.fromkeys(OPEN, "auto")
SEVERAL = {"magnitudes": "auto", "complement": "auto", "direction_samples": "auto", "rank": 6}
SAMPLES = {"magnitudes": "held_out", "sampling": "uniform"}
FEW = {"magnitudes": "cross_fitted", "complement": "auto", "rank": 5}
MONTE_CARLO = {"backend": CurvlinopsGGN, "backend_kwargs": {"stochastic": True, "num_samples": 2}}


def unfitted(name: str = "MLP", likelihood: str = "classification", **options: Any) -> Any:
    model = problem(name, likelihood)[0]
    if options.get("hessian_structure", "lowrank") == "lowrank":
        options = {"complement": "none", **options}
    return DebiasedLaplace(model, likelihood, **{**hyper_parameters(likelihood), **SAMPLES, **options})


def data(name: str = "MLP", likelihood: str = "classification") -> TensorDataset:
    return _data(name, likelihood)


@cache
def _data(name: str, likelihood: str) -> TensorDataset:
    # one object, whose positions mean the same to every loader
    return TensorDataset(*problem(name, likelihood)[1:3])


def fitted(
    name: str = "MLP", likelihood: str = "classification", *, n: int = 40, n_data: int | None = 70, **options: Any
) -> Any:
    la = unfitted(name, likelihood, **options)
    la.fit(DataLoader(Subset(data(name, likelihood), range(n)), batch_size=16), n_data=n_data)
    return la


def closed(la: Any, **options: Any) -> dict[str, Any]:
    """The options, with what was chosen in the place of what was left open."""
    chosen = la.choice.chosen
    answers = {name: getattr(chosen.options, name) for name in OPEN if name != "direction_samples"}
    answers["direction_samples"] = chosen.direction_share
    return {name: answers[name] if value == "auto" else value for name, value in options.items()}


def assert_equal(found: Any, expected: Any) -> None:
    close(found.posterior_precision.to_dense(), expected.posterior_precision.to_dense(), 1e-10)
    for name in ("directional_curvatures", "in_sample_curvatures", "standard_errors", "loss"):
        close(getattr(found, name), getattr(expected, name), 1e-9)
    for name in ("direction_indices", "magnitude_indices"):
        assert torch.equal(getattr(found.split, name), getattr(expected.split, name))
    assert (found.split.folds is None) == (expected.split.folds is None)
    if found.split.folds is not None:
        assert torch.equal(found.split.folds, expected.split.folds)
    assert found.fit_result.options == expected.fit_result.options
    assert (found.n_data, found.rank) == (expected.n_data, expected.rank)


# model, likelihood, samples, n_data, options
CASES: dict[str, tuple[str, str, int, int | None, dict[str, Any]]] = {
    "everything": ("MLP", "classification", 40, 70, EVERYTHING),
    "everything, of convolutions": ("convolutions and pooling", "classification", 30, 90, EVERYTHING),
    "several, in regression": ("LayerNorm and raw parameters", "regression", 36, 80, {**SEVERAL, "rank": "auto"}),
    "several, of all the data": ("MLP", "classification", 40, None, SEVERAL),
    "everything, of the fewest samples": ("MLP", "classification", 8, 70, {**EVERYTHING, "n_folds": 3}),
    "the rank": ("MLP", "classification", 40, 70, {"rank": "auto", "complement": "diagonal"}),
    "the rank, of samples that support few": (
        "MLP",
        "classification",
        10,
        70,
        {"rank": "auto", "complement": "isotropic"},
    ),
    "the share of the directions": ("MLP", "regression", 40, 70, {"direction_samples": "auto", "rank": 6}),
    "the magnitudes, of a share of the samples": (
        "MLP",
        "classification",
        40,
        70,
        {"magnitudes": "auto", "direction_samples": 0.3, "magnitude_samples": 0.45, "rank": 7},
    ),
    "the complement, of numbers of samples": (
        "MLP",
        "classification",
        40,
        70,
        {"complement": "auto", "direction_samples": 13, "rank": 7},
    ),
    "the metric": (
        "MLP",
        "classification",
        40,
        70,
        {"complement": "kron", "metric": "auto", "magnitudes": "cross_fitted", "rank": 9},
    ),
    "the complement, of the biased magnitudes": (
        "MLP",
        "regression",
        40,
        70,
        {"magnitudes": "same_batch", "complement": "auto", "rank": 9},
    ),
    "the magnitudes of a Kronecker posterior": (
        "MLP",
        "classification",
        40,
        70,
        {"hessian_structure": "kron", "magnitudes": "auto", "direction_samples": "auto"},
    ),
    "the share of a Kronecker posterior in K-FAC's basis": (
        "convolutions and pooling",
        "classification",
        40,
        70,
        {"hessian_structure": "kron", "direction_samples": "auto", "kron_basis": "kfac"},
    ),
    "the magnitudes of a full posterior": (
        "partly frozen",
        "classification",
        40,
        70,
        {"hessian_structure": "full", "magnitudes": "auto", "direction_samples": "auto"},
    ),
    "of the last layer": ("LayerNorm and raw parameters", "regression", 40, 70, {"subset_of_weights": "last_layer"}),
    "of a subnetwork": (
        "reused module",
        "classification",
        40,
        70,
        {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.arange(0, 30, 2)},
    ),
    "with corrected inverses": (
        "MLP",
        "classification",
        40,
        70,
        {"inverse_correction": "second_order", "rank": "auto", "complement": "auto"},
    ),
    "of the empirical Fisher": ("MLP", "regression", 40, 70, {**SEVERAL, "backend": CurvlinopsEF}),
    "of a Hessian": (
        "partly frozen",
        "classification",
        16,
        70,
        {**FEW, "metric": "auto", "n_folds": 3, "backend": CurvlinopsHessian},
    ),
    "of drawn targets, cross-fitted": (
        "MLP",
        "classification",
        40,
        70,
        {"magnitudes": "cross_fitted", "complement": "auto", "rank": "auto", **MONTE_CARLO},
    ),
    "of drawn targets of all the data": (
        "MLP",
        "classification",
        40,
        None,
        {"magnitudes": "same_batch", "complement": "auto", "rank": 8, **MONTE_CARLO},
    ),
    "by Lanczos": (
        "MLP",
        "classification",
        24,
        70,
        {"complement": "auto", "rank": 3, "solver": "lanczos", "direction_samples": 0.5},
    ),
}
for _case in ("of the last layer", "of a subnetwork"):
    CASES[_case][-1].update(SEVERAL)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_posterior_that_asks_for_what_was_chosen(case: str) -> None:
    name, likelihood, n, n_data, options = CASES[case]
    la = fitted(name, likelihood, n=n, n_data=n_data, **options)
    assert isinstance(la.choice, Choice)
    assert la.fit_result.options == la.choice.chosen.options
    if la.choice.runners_up:
        assert la.choice.n_samples == la.split.n_samples
    excess = [r.excess for r in la.choice.runners_up]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise([0.0, *excess]))
    fixed = fitted(name, likelihood, n=n, n_data=n_data, **closed(la, **options))
    assert fixed.choice is None
    assert_equal(la, fixed)
    X = data(name, likelihood).tensors[0][:3]
    found, expected = la(X), fixed(X)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-9)


def test_all_samples_are_used() -> None:
    for options in ({"magnitudes": "held_out", "direction_samples": "auto"}, {"magnitudes": "auto"}):
        la = fitted(rank=5, **options)
        assert la.split.n_samples == 40
        assert torch.equal(la.split.used_indices.sort().values, torch.arange(40))
        assert la.choice.n_samples == 40
        close(la.log_likelihood, fitted(rank=5).log_likelihood)


def test_what_there_was_to_choose_from() -> None:
    la = fitted(n=40, **EVERYTHING)
    trials = [la.choice.chosen, *(r.trial for r in la.choice.runners_up)]
    assert len(trials) == len(set(trials))
    # three shares of held-out directions, cross-fitted and the biased way; four complements, and kron in its own
    # metric; 25 directions or all: there are fewer than 100 parameters
    assert len(trials) == (3 + 1 + 1) * 5 * 2
    assert {t.direction_share for t in trials if t.options.magnitudes == "held_out"} == set(SHARES)
    lines = str(la.choice).splitlines()
    assert len(lines) == len(trials)
    assert lines[0].startswith("chosen by held-out KL on 40 samples (optimistic): magnitudes=")
    for line, runner_up in zip(lines[1:], la.choice.runners_up, strict=True):
        assert line == f"  + {runner_up.excess:.2f} ± {runner_up.standard_error:.2f} nats: {runner_up.trial}"
    assert any("magnitudes='held_out', direction_samples=0.25, rank=25, complement='kron', metric='kron'" in line
               for line in lines)  # fmt: skip


# --- the prior, the noise and the temperature ---


def test_another_prior_may_choose_something_else() -> None:
    name, options = "convolutions and pooling", {**EVERYTHING, "magnitudes": "cross_fitted", "direction_samples": 0.5}
    la = fitted(name, prior_precision=0.01, **options)
    weak = la.choice
    la.prior_precision = 40.0
    assert la.choice is weak, "only a fit chooses"
    la.fit(loader_of(*data(name).tensors), n_data=70)
    strong = la.choice
    assert strong.chosen != weak.chosen
    assert (weak.chosen.options.rank, weak.chosen.options.metric) == (25, "kron")
    excess = {str(r.trial): r.excess for r in strong.runners_up}
    assert excess[str(weak.chosen)] > 0
    # what is the best under the strong prior is far off under the weak one: 80 is all that there is of 100 directions
    other = copy.deepcopy(strong.chosen.options)
    (far,) = [
        r for r in weak.runners_up
        if (r.trial.options.complement, r.trial.options.metric) == (other.complement, other.metric)
        and (r.trial.options.rank or 0) > 25
    ]  # fmt: skip
    assert far.excess > 5 * far.standard_error > 0


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_only_what_is_said_relative_to_the_prior_matters(likelihood: str) -> None:
    """A prior and a likelihood c times as strong: the same posterior but for the scale."""
    options = {"magnitudes": "auto", "complement": "auto", "rank": 8}
    first = fitted("MLP", likelihood, **options).choice
    others = [fitted("MLP", likelihood, prior_precision=4 * PRIOR, temperature=TEMPERATURE / 4, **options)]
    if likelihood == "regression":
        others.append(
            fitted("MLP", likelihood, prior_precision=4 * PRIOR, sigma_noise=SIGMA[likelihood] / 2, **options)
        )
    for other in others:
        assert other.choice.chosen == first.chosen
        for one, two in zip(first.runners_up, other.choice.runners_up, strict=True):
            assert two.excess == pytest.approx(one.excess, rel=1e-6, abs=1e-7)
    colder = fitted("MLP", likelihood, prior_precision=PRIOR, temperature=TEMPERATURE / 4, **options).choice
    assert colder.runners_up[-1].excess > 1.2 * first.runners_up[-1].excess


def test_a_prior_for_every_layer() -> None:
    n_layers = fitted(rank=5).n_layers
    prior = torch.linspace(0.05, 3.0, n_layers).double()
    la = fitted(prior_precision=prior, **FEW)
    assert "kron" in {r.trial.options.complement for r in la.choice.runners_up} | {la.fit_result.options.complement}
    assert_equal(la, fitted(prior_precision=prior, **closed(la, **FEW)))
    uniform = fitted(prior_precision=torch.full((n_layers,), PRIOR).double(), **FEW)
    scalar = fitted(**FEW)
    assert uniform.choice.chosen == scalar.choice.chosen
    for one, two in zip(uniform.choice.runners_up, scalar.choice.runners_up, strict=True):
        assert one.excess == pytest.approx(two.excess, rel=1e-6)


def test_a_prior_for_every_parameter_has_no_kronecker_complement() -> None:
    P = fitted(rank=5).n_params
    prior = torch.linspace(0.05, 3.0, P).double()
    options = {**SEVERAL, "metric": "auto"}
    la = fitted(prior_precision=prior, **options)
    trials = [la.choice.chosen, *(r.trial for r in la.choice.runners_up)]
    assert {t.options.complement for t in trials} == {"none", "isotropic", "diagonal"}
    assert {t.options.metric for t in trials} == {"euclidean"}
    assert_equal(la, fitted(prior_precision=prior, **closed(la, **options)))


def test_a_last_layer_that_is_found_by_fit_meets_such_a_prior_only_then() -> None:
    where = {"subset_of_weights": "last_layer"}
    P = len(fitted(rank=3, **where).mean)
    prior = torch.linspace(0.05, 3.0, P).double()
    la = fitted(prior_precision=prior, complement="auto", rank=3, **where)
    assert "kron" not in {r.trial.options.complement for r in la.choice.runners_up}
    with pytest.raises(ValueError, match="one per parameter tensor"):
        fitted(prior_precision=prior, complement="kron", magnitudes="auto", rank=3, **where)


# --- ranks that the samples do not have ---


@pytest.mark.parametrize("magnitudes", ["held_out", "cross_fitted", "same_batch"])
@pytest.mark.parametrize("n", [9, 12])
def test_no_rank_is_chosen_that_there_is_not(magnitudes: str, n: int) -> None:
    """Without a warning: nobody has asked for it. Warnings are errors here."""
    for seed in range(2):
        la = fitted(n=n, rank="auto", complement="isotropic", magnitudes=magnitudes, n_folds=3, seed=seed)
        assert la.fit_result.options.rank in (None, la.rank)
        assert la.choice.chosen.options.rank == la.fit_result.options.rank
        assert la.rank <= 2 * n  # softmax rows of three classes


def test_a_rank_that_was_asked_for_is_still_warned_of() -> None:
    with pytest.warns(UserWarning, match="rank=30 was asked for"):
        la = fitted(n=10, rank=30, complement="auto", magnitudes="cross_fitted")
    assert la.fit_result.options.rank == 30


# --- copies, states, more data ---


def test_a_state_restores_what_was_chosen_and_what_was_left_open() -> None:
    la = fitted(**SEVERAL)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["open_options"].split() == ["complement", "direction_samples", "magnitudes"]
    again = unfitted(magnitudes="same_batch", rank=2, complement="none")
    again.load_state_dict(state)
    assert again.fit_result.options == la.fit_result.options
    assert again.choice is None, "what the others would have cost is not in a state"
    assert_equal(again, la)
    assert repr(again) == repr(la)
    X = data().tensors[0][:4]
    close(again(X), la(X), 1e-10)
    # a fit chooses anew
    again.fit(loader_of(*data().tensors), n_data=70)
    assert again.choice == la.choice
    assert_equal(again, la)


def test_a_copy_has_the_choice_too() -> None:
    la = fitted(**FEW)
    again = copy.deepcopy(la)
    assert again.choice == la.choice
    assert_equal(again, la)
    again.fit(DataLoader(Subset(data(), range(20)), batch_size=16), n_data=70)
    assert again.choice.n_samples == 20
    assert la.choice.n_samples == 40


def test_another_fit_chooses_anew() -> None:
    la = fitted(n=20, **SEVERAL)
    few = la.choice
    la.fit(loader_of(*data().tensors), n_data=70)
    at_once = fitted(**SEVERAL)
    assert la.choice != few
    assert la.choice == at_once.choice
    assert_equal(la, at_once)


def test_more_data_choose_anew_among_all() -> None:
    la = fitted(n=20, **SEVERAL)
    la.fit(DataLoader(Subset(data(), range(10, 40)), batch_size=16), override=False)
    at_once = fitted(**SEVERAL)
    assert la.choice.chosen == at_once.choice.chosen
    assert la.choice.n_samples == 40
    assert_equal(la, at_once)


def test_doubling_keeps_the_choice_of_the_stage_that_it_keeps() -> None:
    la = unfitted(**FEW)
    la.fit(loader_of(*data().tensors), n_data=70, tolerance=1e-9)
    assert [stage.n_samples for stage in la.stopping.stages] == [32, 40]
    assert la.choice.n_samples == 40
    assert_equal(la, fitted(**FEW))


# --- what a fit leaves alone ---


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    options = {**FEW, "magnitudes": "auto"}
    first, again = fitted(**options), fitted(**options)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.choice == again.choice
    assert torch.equal(first.posterior_precision.to_dense(), again.posterior_precision.to_dense())
    other = fitted(seed=3, **options)
    assert [r.excess for r in other.choice.runners_up] != [r.excess for r in first.choice.runners_up]


def test_drawn_targets_are_reproducible_and_their_choice_is_told_in_nats() -> None:
    options = {"magnitudes": "auto", "complement": "auto", "rank": 6, **MONTE_CARLO}
    la, again = fitted(**options), fitted(**options)
    assert la.choice == again.choice
    assert len(la.choice.runners_up) == 11
    assert torch.equal(la.posterior_precision.to_dense(), again.posterior_precision.to_dense())
    assert fitted(seed=2, **options).choice != la.choice


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    la = unfitted(**FEW)
    la.fit(loader_of(*data().tensors), n_data=70, progress_bar=True)
    shown = capsys.readouterr().err
    assert "[Choosing]: 100%" in shown
    assert "4/4" in shown.split("[Choosing]: 100%")[-1]
    assert "[Cross-fitting]: 100%" in shown.split("[Choosing]: 100%")[-1], "of the posterior that is kept"
    la.fit(loader_of(*data().tensors), n_data=70)
    assert capsys.readouterr().err == ""


def test_it_says_what_was_left_open_and_then_what_was_chosen() -> None:
    la = unfitted(**SEVERAL)
    assert repr(la).endswith("magnitudes='auto', complement='auto', not fitted)")
    with pytest.raises(NotFittedError):
        la.choice  # noqa: B018
    la.fit(loader_of(*data().tensors), n_data=70)
    chosen = la.choice.chosen.options
    assert f"magnitudes={chosen.magnitudes!r}, complement={chosen.complement!r}, rank={la.rank}" in repr(la)
    assert "auto" not in repr(la)
    assert fitted(rank=5).choice is None


def test_through_laplace_torch() -> None:
    model = problem("MLP", "classification")[0]
    la = Laplace(
        model, "classification", "all", "debiased_lowrank", **hyper_parameters("classification"), **{**SAMPLES, **FEW}
    )
    la.fit(loader_of(*data().tensors), n_data=70)
    assert_equal(la, fitted(**FEW))


# --- what cannot be ---

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank of another structure": ({"hessian_structure": "kron", "rank": "auto"}, "rank requires .*'lowrank'.*'kron'"),
    "complement of another structure": (
        {"hessian_structure": "full", "complement": "auto"},
        "complement requires .*'lowrank'.*'full'",
    ),
    "metric of another structure": (
        {"hessian_structure": "kron", "complement": "none", "metric": "auto"},
        "metric requires .*'lowrank'",
    ),
    "metric without a Kronecker complement": ({"metric": "auto", "complement": "isotropic"}, "complement='kron'"),
    "a share of directions that all give": (
        {"magnitudes": "cross_fitted", "direction_samples": "auto"},
        "direction_samples='auto' requires magnitudes='held_out' or 'auto'",
    ),
    "a share of directions that all give, the biased way": (
        {"magnitudes": "same_batch", "direction_samples": "auto"},
        "every sample gives directions",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        unfitted(**options)


class Counting(Dataset[tuple[Tensor, Tensor]]):
    """Counts the samples that are loaded."""

    def __init__(self) -> None:
        self.inner, self.n_loaded = data(), 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.n_loaded += 1
        return self.inner[i]


AMOUNTS: dict[str, tuple[dict[str, Any], str]] = {
    "a share to be chosen beside a number that is not": (
        {"direction_samples": "auto", "magnitude_samples": 10},
        "expected magnitude_samples=None; got 10",
    ),
    "held-out magnitudes without samples": (
        {"magnitudes": "auto", "direction_samples": 0.98},
        "Of 40 samples, 39 for the directions leave 1",
    ),
    "more than there are": ({"magnitudes": "auto", "direction_samples": 41}, "between 1 and the 40"),
}


@pytest.mark.parametrize("case", AMOUNTS)
def test_amounts_that_do_not_fit_are_refused_before_any_work(case: str) -> None:
    options, message = AMOUNTS[case]
    counting = Counting()
    la = unfitted(rank=5, **options)
    with pytest.raises(ValueError, match=message):
        la.fit(DataLoader(counting, batch_size=16))
    assert counting.n_loaded == 0
    assert "not fitted" in repr(la)


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="expected at least 8, got 7"):
        fitted(n=7, **{**FEW, "n_folds": 3})
    with pytest.raises(ValueError, match="yields no samples"):
        unfitted(**EVERYTHING).fit(DataLoader(Subset(data(), [])))


@pytest.mark.parametrize("magnitudes", ["same_batch", "auto"])
def test_samples_that_come_twice_do_not_judge_themselves(magnitudes: str) -> None:
    X, y = data().tensors
    la = unfitted(magnitudes=magnitudes, complement="auto", rank=5)
    la.fit(loader_of(torch.cat([X, X[:5]]), torch.cat([y, y[:5]])))
    assert len(la.split.copies) == 5
    assert la.n_data == len(X) + 5
    assert la.choice.n_samples <= len(X)
