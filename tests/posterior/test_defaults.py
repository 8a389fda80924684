"""What a posterior is of which nothing was said, and what those say who meet a default that does not suit them."""

import pickle
import warnings
from dataclasses import fields
from inspect import signature

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsHessian
from models import mlp, targets
from posterior_cases import PRIOR, close, hyper_parameters, loader_of, problem
from torch.utils.data import DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.posterior.factory import CLASSES
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace

DEFAULTS = {
    "rank": None,
    "magnitudes": "cross_fitted",
    "direction_samples": 0.5,
    "magnitude_samples": None,
    "n_folds": 8,
    "complement": None,
    "metric": "euclidean",
    "inverse_correction": "none",
    "solver": "auto",
    "seed": 0,
}
HYPER = hyper_parameters("classification")


def defaults_of(function) -> dict:
    return {p.name: p.default for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def fitted(make, *names: str, **options):
    model, X = mlp()
    la = make(model, "classification", *names, **HYPER, **options)
    la.fit(loader_of(X, targets("classification")), n_data=70)
    return la


def test_the_defaults_are_these_wherever_they_stand() -> None:
    of_factory = defaults_of(DebiasedLaplace)
    assert {name: of_factory[name] for name in DEFAULTS} == DEFAULTS
    of_estimator = {field.name: field.default for field in fields(EstimatorOptions) if field.name != "structure"}
    of_class = {p.name: p.default for p in signature(DebiasedParametricLaplace).parameters.values()}
    del of_class["model"], of_class["likelihood"], of_class["estimator"]
    assert of_factory == of_estimator | of_class
    assert all(cls.__init__ is DebiasedParametricLaplace.__init__ for cls in CLASSES.values())


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_every_front_door_leads_to_them(subset: str, structure: str) -> None:
    said = {"magnitudes": "cross_fitted", "n_folds": 8, "sampling": "curvature"}
    said |= {"complement": "kron"} if structure == "lowrank" else {}
    expected = fitted(DebiasedLaplace, subset, structure, **said)
    for la in (
        fitted(DebiasedLaplace, subset, structure),
        fitted(Laplace, subset, f"debiased_{structure}"),
        fitted(CLASSES[subset, structure]),
    ):
        assert repr(la) == repr(expected)
        assert torch.equal(la.posterior_precision.to_dense(), expected.posterior_precision.to_dense())
    assert expected.split.shared
    # 40 samples stand for 70: they are dealt, and all of their rows drawn
    assert float(expected.rows.inclusion_probabilities.min()) == 1
    samples_and_folds = torch.stack([expected.rows.positions[:, 0], expected.rows.part], dim=1).unique(dim=0)
    assert samples_and_folds[:, 0].tolist() == list(range(40))
    assert samples_and_folds[:, 1].bincount().tolist() == [5] * 8


def test_low_rank_is_what_a_call_without_names_gives() -> None:
    assert repr(fitted(DebiasedLaplace)) == repr(fitted(DebiasedLaplace, "all", "lowrank"))


# --- structures without a complement ---


@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("complement", [None, "none"])
def test_the_default_complement_means_nothing_to_other_structures(complement: str | None, structure: str) -> None:
    silent = fitted(DebiasedLaplace, "all", structure)
    said = fitted(DebiasedLaplace, "all", structure, complement=complement)
    assert torch.equal(said.posterior_precision.to_dense(), silent.posterior_precision.to_dense())
    state = silent.state_dict()
    assert state["option_complement"] == "none"
    loaded = DebiasedLaplace(silent.model, "classification", "all", structure)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.posterior_precision.to_dense(), silent.posterior_precision.to_dense())
    for other in ("diagonal", "kron"):
        with pytest.raises(ValueError, match=f"requires hessian_structure='lowrank'; got complement='{other}'"):
            DebiasedLaplace(mlp()[0], "classification", "all", structure, complement=other)


def test_the_default_complement_does_not_let_the_options_of_its_basis_through() -> None:
    with pytest.raises(ValueError, match="kron_basis requires hessian_structure='kron'"):
        DebiasedLaplace(mlp()[0], "classification", "all", "full", kron_basis="kfac")
    assert fitted(DebiasedLaplace, kron_basis="kfac").posterior_precision.basis is not None


# --- a prior for every parameter ---

OUT = r"because its basis mixes .* take hessian_structure='lowrank' with complement='diagonal' or 'none'"


def test_a_prior_for_every_parameter_is_told_the_way_out() -> None:
    prior = torch.linspace(0.2, 3.0, 93, dtype=torch.float64)
    with pytest.raises(ValueError, match=OUT):
        DebiasedLaplace(mlp()[0], "classification", prior_precision=prior, complement="kron")
    la = fitted(DebiasedLaplace, complement="kron")
    with pytest.raises(ValueError, match=OUT):
        la.prior_precision = prior
    with pytest.raises(ValueError, match=OUT):
        la.optimize_prior_precision(prior_structure="diag", n_steps=2)
    close(la.prior_precision, [PRIOR])
    la.optimize_prior_precision(prior_structure="layerwise", n_steps=2)
    assert la.prior_precision.shape == (la.n_layers,)
    for options in ({"complement": "diagonal"}, {"complement": "none"}, {"hessian_structure": "full"}):
        other = fitted(DebiasedLaplace, **options)
        other.prior_precision = prior
        other.optimize_prior_precision(prior_structure="diag", n_steps=2)
        assert other.prior_precision.shape == (93,)


@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize("how", ["named nothing", "chosen", "held out", "by tolerance"])
def test_a_prior_for_every_parameter_may_come_after_the_fit(how: str, sampling: str) -> None:
    options = {
        "named nothing": {},
        "chosen": {"complement": "auto", "magnitudes": "cross_fitted"},
        "held out": {"magnitudes": "held_out"},
        "by tolerance": {},
    }[how]
    options["sampling"] = sampling
    # what is judged by rows needs all samples
    n_data = 40 if sampling == "curvature" and how in {"chosen", "by tolerance"} else 70
    prior = torch.linspace(0.2, 3.0, 93, dtype=torch.float64)
    fit = {"tolerance": 1e-9} if how == "by tolerance" else {}
    model, X, y, _ = problem("MLP", "classification")
    la, fresh = (DebiasedLaplace(model, "classification", prior_precision=p, **options) for p in (PRIOR, prior))
    for each in (la, fresh):
        each.fit(loader_of(X, y), n_data=n_data, **fit)
    stopping = la.stopping
    la.prior_precision = prior
    assert torch.equal(la.prior_precision, prior)
    assert la.fit_result.options.complement == fresh.fit_result.options.complement != "kron"
    close(la.posterior_precision.to_matrix(), fresh.posterior_precision.to_matrix())
    assert la.log_marginal_likelihood() == fresh.log_marginal_likelihood()
    assert la.stopping is stopping
    assert "a prior precision per parameter" in repr(la)
    assert f"complement={fresh.fit_result.options.complement!r}" in repr(la)
    la.fit(loader_of(X, y), n_data=n_data)
    close(la.posterior_precision.to_matrix(), fresh.posterior_precision.to_matrix())


def test_tuning_a_prior_for_every_parameter_leaves_the_basis_of_the_default_complement() -> None:
    la = fitted(DebiasedLaplace)
    other = fitted(DebiasedLaplace, complement="diagonal")
    for each, start in ((la, 0.7), (other, 0.7)):
        each.optimize_prior_precision(prior_structure="diag", n_steps=5, init_prior_prec=start)
    assert la.prior_precision.shape == (93,)
    assert la.prior_precision.unique().numel() > 80
    close(la.prior_precision, other.prior_precision)
    close(la.posterior_precision.to_matrix(), other.posterior_precision.to_matrix())
    vector = fitted(DebiasedLaplace)
    vector.optimize_prior_precision(n_steps=5, init_prior_prec=torch.full((93,), 0.7))
    close(vector.prior_precision, other.prior_precision)
    failed = fitted(DebiasedLaplace)
    before = failed.posterior_precision.to_matrix()
    with pytest.raises(ValueError, match="n_steps"):
        failed.optimize_prior_precision(prior_structure="diag", n_steps=-1)
    assert failed.fit_result.options.complement == "kron"
    close(failed.posterior_precision.to_matrix(), before)
    scalar = fitted(DebiasedLaplace)
    for structure, n in (("scalar", 1), ("layerwise", 6)):
        scalar.optimize_prior_precision(prior_structure=structure, n_steps=2)
        assert scalar.prior_precision.shape == (n,)
        assert scalar.fit_result.options.complement == "kron"


def test_equal_priors_of_a_tensors_entries_need_no_other_complement() -> None:
    la, kron = fitted(DebiasedLaplace), fitted(DebiasedLaplace, hessian_structure="kron")
    sizes = torch.tensor([28, 7, 35, 5, 15, 3])
    by_tensor = torch.linspace(0.2, 3.0, 6, dtype=torch.float64)
    for each in (la, kron):
        each.prior_precision = by_tensor
        expected = each.posterior_precision.to_matrix()
        each.prior_precision = by_tensor.repeat_interleave(sizes)
        assert each.prior_precision.shape == (93,)
        close(each.posterior_precision.to_matrix(), expected)
        each.prior_precision = torch.full((93,), 0.6)
        same = each.posterior_precision.to_matrix()
        each.prior_precision = 0.6
        close(same, each.posterior_precision.to_matrix(), rtol=1e-5)
    assert la.fit_result.options.complement == "kron"


def test_a_loaded_posterior_cannot_leave_its_basis() -> None:
    la = fitted(DebiasedLaplace)
    loaded = DebiasedLaplace(la.model, "classification")
    loaded.load_state_dict(la.state_dict())
    prior = torch.linspace(0.2, 3.0, 93, dtype=torch.float64)
    for copied, match in ((loaded, OUT), (pickle.loads(pickle.dumps(la)), "not in a state or a pickle")):
        with pytest.raises(ValueError, match=match):
            copied.prior_precision = prior
        close(copied.prior_precision, [PRIOR])
    la.prior_precision = prior
    again = DebiasedLaplace(la.model, "classification")
    again.load_state_dict(la.state_dict())
    close(again.posterior_precision.to_matrix(), la.posterior_precision.to_matrix())
    again.prior_precision = prior.flip(0)
    la.prior_precision = prior.flip(0)
    close(again.posterior_precision.to_matrix(), la.posterior_precision.to_matrix())


def test_repr_says_which_complement_a_prior_will_have() -> None:
    plain = DebiasedLaplace(mlp()[0], "classification")
    vector = DebiasedLaplace(mlp()[0], "classification", prior_precision=torch.linspace(0.2, 3.0, 93))
    assert "complement='kron', not fitted" in repr(plain)
    assert "complement='diagonal', a prior precision per parameter, not fitted" in repr(vector)


# --- a Hessian that does not fit ---


@pytest.mark.slow
def test_a_hessian_that_does_not_fit_says_so_before_lanczos_and_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda device: 1000)
    from debiased_laplace.debiasing import directions

    found = directions.lanczos
    monkeypatch.setattr(directions, "lanczos", no_long_work)
    with warnings.catch_warnings():
        # the backend says that torch.func stands in for it
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=r"dense Hessian of 93 parameters .* complement='none'"):
            fitted(DebiasedLaplace, backend=CurvlinopsHessian, rank=2)
        monkeypatch.setattr(directions, "lanczos", found)
        la = fitted(DebiasedLaplace, backend=CurvlinopsHessian, rank=2, complement="none")
    assert la.rank == 2


def no_long_work(*args, **kwargs):
    raise AssertionError("long work has begun")


# --- few samples, and amounts of them that change nothing ---


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
@pytest.mark.parametrize("n", [4, 5, 7])
def test_fewer_samples_than_folds_are_enough(n: int, structure: str) -> None:
    model, X = mlp()
    data = TensorDataset(X, targets("classification"))
    la = DebiasedLaplace(model, "classification", "all", structure, **HYPER)
    la.fit(DataLoader(Subset(data, range(n)), batch_size=2), n_data=40)
    assert la.rows.part.unique().tolist() == list(range(n))
    predicted = la(X)
    assert bool(predicted.isfinite().all())
    assert bool((predicted > 0).all())


@pytest.mark.parametrize("magnitudes", ["cross_fitted", "same_batch"])
@pytest.mark.parametrize("amount", [0.25, 10])
def test_direction_samples_that_change_nothing_are_warned_of(amount: float, magnitudes: str) -> None:
    with pytest.warns(UserWarning, match=rf"direction_samples={amount} has no effect with magnitudes='{magnitudes}'"):
        la = fitted(DebiasedLaplace, magnitudes=magnitudes, direction_samples=amount)
    assert torch.equal(
        la.posterior_precision.to_dense(), fitted(DebiasedLaplace, magnitudes=magnitudes).posterior_precision.to_dense()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"magnitudes": "held_out", "direction_samples": 0.25},
        {"magnitudes": "auto", "direction_samples": 0.25},
        {"magnitudes": "cross_fitted", "direction_samples": 0.25, "magnitude_samples": 8},
    ],
    ids=str,
)
def test_direction_samples_that_count_are_not_warned_of(options: dict) -> None:
    la = fitted(DebiasedLaplace, rank=3, sampling="uniform", **options)
    assert la.split.n_samples == (18 if "magnitude_samples" in options else 40)
