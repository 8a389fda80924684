"""A fit that grows: more data give the fit of all of them, and doubling stops where that gains too little."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from laplace.curvature import CurvlinopsGGN, CurvlinopsHessian
from models import MODELS, mlp, targets
from oracles import dense_ggn, mean_of
from posterior_cases import close, hyper_parameters, posterior_of
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.source import sample_source
from debiased_laplace.errors import OverlapError
from debiased_laplace.posterior import growing

CLASSIFICATION, REGRESSION = "classification", "regression"


def loader(dataset: Any, indices: Any = None, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    some = dataset if indices is None else Subset(dataset, list(indices))
    return DataLoader(some, batch_size=batch_size, **options)


@cache
def data(name: str = "MLP", likelihood: str = CLASSIFICATION, n_outputs: int = 3) -> TensorDataset:
    return TensorDataset(MODELS[name](n_outputs)[1], targets(likelihood, n_outputs=n_outputs))


def posterior(name: str = "MLP", likelihood: str = CLASSIFICATION, n_outputs: int = 3, **options: Any) -> Any:
    model = MODELS[name](n_outputs)[0]
    return posterior_of(model, likelihood, **{**hyper_parameters(likelihood), "seed": 5, **options})


def assert_equal(grown: Any, at_once: Any, **tolerance: float) -> None:
    """All that a fit finds out, to the last bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name in ("directional_curvatures", "in_sample_curvatures", "loss"):
        found, expected = (torch.as_tensor(getattr(la, name)) for la in (grown, at_once))
        torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(grown.H[1], at_once.H[1], **tolerance)  # directions
    if at_once.fit_result.estimate.magnitudes.standard_errors is not None:
        torch.testing.assert_close(grown.standard_errors, at_once.standard_errors, **tolerance)
    found, expected = (la.posterior_precision.to_dense() for la in (grown, at_once))
    torch.testing.assert_close(found, expected, **tolerance)
    assert grown.n_data == at_once.n_data
    assert grown.split.n_samples == at_once.split.n_samples
    assert torch.equal(
        grown.fit_result.identities.hashes.sort().values, at_once.fit_result.identities.hashes.sort().values
    ), "the samples themselves"
    assert torch.equal(grown.fit_result.identities.hashes, at_once.fit_result.identities.hashes), (
        "what each is used for"
    )


# --- more data: the fit of the union ---

ESTIMATORS = {
    "lowrank, held out": {"magnitudes": "held_out"},
    "lowrank, held out, a Kronecker complement": {"magnitudes": "held_out", "complement": "kron", "rank": 5},
    "lowrank, cross-fitted": {"magnitudes": "cross_fitted", "n_folds": 5, "complement": "diagonal"},
    "lowrank, same batch": {"magnitudes": "same_batch", "complement": "isotropic"},
    "lowrank in the metric of a Kronecker estimate": {"complement": "kron", "metric": "kron", "rank": 4},
    "lowrank by Lanczos": {"magnitudes": "held_out", "solver": "lanczos", "rank": 4},
    "kron, held out": {"hessian_structure": "kron"},
    "kron, cross-fitted, in K-FAC's basis": {
        "hessian_structure": "kron",
        "magnitudes": "cross_fitted",
        "kron_basis": "kfac",
        "n_folds": 4,
    },
    "kron, same batch, products of factors": {
        "hessian_structure": "kron",
        "magnitudes": "same_batch",
        "kron_magnitudes": "kronecker",
    },
    "full, held out": {"hessian_structure": "full"},
    "full, cross-fitted": {"hessian_structure": "full", "magnitudes": "cross_fitted", "n_folds": 3},
    "full, same batch": {"hessian_structure": "full", "magnitudes": "same_batch"},
    "numbers of samples": {"direction_samples": 3, "magnitude_samples": 5},
    "shares of samples": {"direction_samples": 0.3, "magnitude_samples": 0.4},
    "Monte-Carlo draws": {"backend": CurvlinopsGGN, "backend_kwargs": {"stochastic": True, "num_samples": 2}},
    "a Hessian": {"backend": CurvlinopsHessian, "rank": 3},
    "a choice": {"rank": 5, "complement": "auto"},
}
# subset, model, likelihood, outputs
WHERE = {
    "all weights": ("all", "MLP", CLASSIFICATION, 3),
    "last layer": ("last_layer", "LayerNorm and raw parameters", REGRESSION, 2),
    "a subnetwork": ("subnetwork", "reused module", CLASSIFICATION, 3),
}
UNION_CASES = [(case, where) for where in ("all weights", "last layer") for case in ESTIMATORS]
UNION_CASES.remove(("lowrank by Lanczos", "last layer"))  # nothing new, and slow
UNION_CASES += [("lowrank, cross-fitted", "a subnetwork"), ("kron, held out", "a subnetwork")]


@pytest.mark.parametrize(
    ("case", "where"),
    [pytest.param(*union, marks=[pytest.mark.slow] * ("Lanczos" in union[0])) for union in UNION_CASES],
)
def test_more_data_give_the_fit_of_the_union(case: str, where: str) -> None:
    subset, *problem = WHERE[where]
    dataset, options = data(*problem), {"subset_of_weights": subset, **ESTIMATORS[case]}
    if subset == "subnetwork":
        options["subnetwork_indices"] = torch.arange(1, 30, 3)
    grown, at_once = posterior(*problem, **options), posterior(*problem, **options)
    # in pieces, in any order, and with some samples once more
    grown.fit(loader(dataset, range(12, 24), shuffle=True), n_data=60)
    first = grown.posterior_precision.to_dense()
    grown.fit(loader(dataset, range(8)), override=False)
    grown.fit(loader(dataset, range(4, 20), shuffle=True), override=False)
    at_once.fit(loader(dataset, range(24)), n_data=60)
    assert_equal(grown, at_once)
    assert grown.split.used_indices.tolist() == at_once.split.used_indices.tolist()
    assert grown.stopping is None
    assert not torch.equal(first, grown.posterior_precision.to_dense())
    assert float(grown.log_marginal_likelihood()) == float(at_once.log_marginal_likelihood())


def taken(dataset: TensorDataset, indices: Any) -> TensorDataset:
    """Some samples in a data set of their own."""
    return TensorDataset(*(t[list(indices)] for t in dataset.tensors))


def batches(dataset: TensorDataset, indices: Any) -> list[tuple[Tensor, ...]]:
    return [tuple(t[list(indices)] for t in dataset.tensors)]


class Mapped(Dataset[dict[str, Tensor]]):
    """Samples as mappings."""

    def __init__(self, inner: TensorDataset):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y = self.inner[i]
        return {"input_ids": x, "labels": y}


class OfMapping(nn.Module):
    """A network that wants a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


HALF, REST = random_split(data(), [17, 23], generator=torch.Generator().manual_seed(1))
# the loaders that follow each other, and one that yields the same at once
UNIONS = {
    "everything after a part": lambda D: ([loader(D, range(10)), loader(D, shuffle=True)], loader(D)),
    "halves of a random split": lambda D: ([loader(HALF), loader(REST)], loader(D)),
    "two data sets": lambda D: (
        [loader(taken(D, range(9))), loader(taken(D, range(9, 25)))],
        loader(ConcatDataset([taken(D, range(9)), taken(D, range(9, 25))])),
    ),
    "two data sets with samples in common": lambda D: (
        [loader(taken(D, range(9))), loader(taken(D, range(4, 25)))],
        loader(taken(D, range(25))),
    ),
    "three data sets": lambda D: (
        [loader(taken(D, some)) for some in (range(9), range(7, 12), range(10, 25))],
        loader(taken(D, range(25))),
    ),
    "lists of batches": lambda D: ([batches(D, range(9)), batches(D, range(9, 25))], batches(D, range(25))),
    "a data set that holds the list before it": lambda D: (
        [batches(D, range(9)), loader(D, range(25))],
        loader(D, range(25)),
    ),
    "batches of another size": lambda D: (
        [loader(D, range(9), batch_size=4), loader(D, range(9, 25), batch_size=10)],
        loader(D, range(25), batch_size=7),
    ),
}


@pytest.mark.parametrize("case", UNIONS)
def test_loaders_of_every_kind_join(case: str) -> None:
    dataset = data()
    loaders, together = UNIONS[case](dataset)
    for options in ({}, {"magnitudes": "cross_fitted", "n_folds": 5}):
        grown, at_once = posterior(**options), posterior(**options)
        for one in loaders:
            grown.fit(one, override=False)
        at_once.fit(together)
        # batches of other sizes are rounded otherwise
        assert_equal(grown, at_once, rtol=1e-9, atol=1e-9)
        close(grown(dataset.tensors[0]), at_once(dataset.tensors[0]).detach(), 1e-9)


def test_mappings_join() -> None:
    first, second, both = (loader(Mapped(taken(data(), some))) for some in (range(9), range(9, 25), range(25)))
    grown, at_once = (posterior_of(OfMapping(), CLASSIFICATION, seed=5, **HYPER) for _ in range(2))
    grown.fit(first)
    grown.fit(second, override=False)
    at_once.fit(both)
    assert_equal(grown, at_once, rtol=1e-9, atol=1e-9)


HYPER = hyper_parameters(CLASSIFICATION)


def test_a_first_fit_has_nothing_to_go_on_from() -> None:
    grown, at_once = posterior(), posterior()
    grown.fit(loader(data()), override=False)
    at_once.fit(loader(data()))
    assert_equal(grown, at_once)


def test_override_forgets_earlier_samples() -> None:
    again, at_once = posterior(), posterior()
    again.fit(loader(data(), range(20)), n_data=70)
    again.fit(loader(data(), range(20, 40)))
    at_once.fit(loader(data(), range(20, 40)))
    assert_equal(again, at_once)
    with pytest.raises(ValueError, match="all of them fitted before"):
        again.fit(loader(data(), range(20, 40)), override=False)


def test_n_data_stays_or_grows_with_the_samples() -> None:
    la = posterior()
    la.fit(loader(data(), range(10)))
    assert la.n_data == 10
    la.fit(loader(data(), range(5, 20)), override=False)
    assert la.n_data == 20
    la.fit(loader(data(), range(20, 25)), override=False, n_data=90)
    assert la.n_data == 90
    la.fit(loader(data(), range(25, 30)), override=False)
    assert la.n_data == 90
    with pytest.raises(ValueError, match="at least 40, got 31"):
        la.fit(loader(data(), range(30, 40)), override=False, n_data=31)
    assert la.split.n_samples == 30


def test_another_prior_in_between() -> None:
    # the curvature is that of the data alone
    grown, at_once = posterior(), posterior()
    grown.fit(loader(data(), range(20)))
    grown.prior_precision, grown.temperature = 2.5, 0.8
    grown.fit(loader(data(), range(20, 40)), override=False)
    at_once.prior_precision, at_once.temperature = 2.5, 0.8
    at_once.fit(loader(data()))
    assert_equal(grown, at_once)


def test_held_out_kl_knows_all_samples_of_a_grown_fit() -> None:
    # of two data sets: a sample is known wherever it turns up
    la = posterior()
    la.fit(loader(taken(data(), range(9))), n_data=40)
    la.fit(loader(taken(data(), range(9, 25))), override=False)
    assert la.held_out_kl(loader(data(), range(25, 40)), loader(data(), range(25))).n == 15
    for i in (0, 8, 9, 24):
        with pytest.raises(OverlapError, match="1 of the 3"):
            la.held_out_kl(loader(data(), [30, i, 35]), loader(data(), range(25)))


# --- what cannot go on ---


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Another version of a sample each time."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = data()[i]
        return x + 0.3 * torch.randn(4, dtype=torch.float64), y


def other_weights(la: Any) -> Any:
    with torch.no_grad():
        la.model[0].bias[2] += 0.1
    return la


def other_buffers(la: Any) -> Any:
    la.model[1].running_mean.add_(0.1)
    return la


def loaded(la: Any) -> Any:
    again = posterior()
    again.load_state_dict(la.state_dict())
    return again


def pickled(la: Any) -> Any:
    return pickle.loads(pickle.dumps(la))


def loaded_and_changed(la: Any) -> Any:
    return other_weights(loaded(la))


# what happens in between, the second loader, and what is said
REFUSED = {
    "no new sample": (lambda la: la, lambda: loader(data(), range(5, 15)), "10 samples, all of them fitted before"),
    "inputs of another width": (
        lambda la: la,
        lambda: [(torch.ones(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))],
        "one shape and dtype",
    ),
    "other weights": (other_weights, lambda: loader(data()), "weights or buffers have changed"),
    "a state, without some of its samples": (loaded, lambda: loader(data(), range(4, 40)), "4 of 20 are missing"),
    "a pickle, without its samples": (pickled, lambda: loader(data(), range(20, 40)), "20 of 20 are missing"),
    "a state, no new sample": (loaded, lambda: loader(data(), range(20)), "20 samples, all of them fitted before"),
    "a state, n_data too small": (loaded, lambda: loader(data()), "at least 40, got 39"),
    "a state, other weights": (loaded_and_changed, lambda: loader(data()), "weights or buffers have changed"),
    "a state, random loading of fewer samples": (loaded, lambda: loader(Noisy(), range(8)), "12 of 20 are missing"),
    "random loading of another data set": (lambda la: la, lambda: loader(Noisy()), "cannot be compared"),
    "n_data too small": (lambda la: la, lambda: loader(data()), "at least 40, got 39"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on(case: str) -> None:
    between, second, message = REFUSED[case]
    la = posterior()
    la.fit(loader(data(), range(20)))
    la = between(la)
    before, split = la.posterior_precision.to_dense(), la.split
    n_data = 39 if "n_data too small" in case else None
    with pytest.raises(ValueError, match=f"(?s){message}"):
        la.fit(second(), override=False, n_data=n_data)
    assert torch.equal(la.posterior_precision.to_dense(), before)
    assert la.split is split
    assert la.n_data == 20
    if between.__name__ == "<lambda>":
        la.fit(loader(data()), override=False)
        at_once = posterior()
        at_once.fit(loader(data()))
        assert_equal(la, at_once)


def test_other_buffers_cannot_go_on() -> None:
    la = posterior("BatchNorm")
    la.fit(loader(data("BatchNorm"), range(20)))
    other_buffers(la)
    with pytest.raises(ValueError, match="weights or buffers have changed"):
        la.fit(loader(data("BatchNorm")), override=False)


def test_augmented_samples_of_one_data_set_go_on() -> None:
    dataset = Noisy()
    grown, at_once = posterior(), posterior()
    grown.fit(loader(dataset, range(20)))
    grown.fit(loader(dataset, range(10, 40)), override=False)
    at_once.fit(loader(dataset))
    assert_equal(grown, at_once)


def test_copies_go_on_by_themselves() -> None:
    la = posterior()
    la.fit(loader(data(), range(20)))
    other = copy.deepcopy(la)
    other.fit(loader(data()), override=False)
    at_once = posterior()
    at_once.fit(loader(data()))
    assert_equal(other, at_once)
    assert la.split.n_samples == 20
    la.fit(loader(data(), range(20, 30)), override=False)
    assert la.split.n_samples == 30


@pytest.mark.parametrize("by", [loaded, pickled])
def test_a_loaded_posterior_goes_on_where_its_samples_are_yielded_again(by: Any) -> None:
    la, at_once = posterior(magnitudes="cross_fitted", n_folds=5), posterior(magnitudes="cross_fitted", n_folds=5)
    la.fit(loader(data(), range(5, 20)))
    again = by(la)
    # another data set in another order: samples are known by hash
    mixed = [*range(30, 40), *range(19, 4, -1)]
    again.fit(loader(taken(data(), mixed)), override=False)
    at_once.fit(loader(taken(data(), mixed)))
    assert_equal(again, at_once)
    assert again.n_data == 25
    # and from there on as any other fit
    again.fit(loader(data(), range(5)), override=False)
    assert again.n_data == 30


def test_a_loaded_posterior_keeps_the_size_of_the_data_set() -> None:
    la = posterior()
    la.fit(loader(data(), range(20)), n_data=70)
    again = loaded(loaded(la))
    again.fit(loader(data()), override=False)
    assert again.n_data == 70
    again = loaded(la)
    again.fit(loader(data()), override=False, n_data=90)
    assert again.n_data == 90


def test_a_loaded_posterior_of_augmented_samples_goes_by_their_positions() -> None:
    la, at_once = posterior(), posterior()
    la.fit(loader(Noisy(), range(12, 20)))
    again = loaded(la)
    again.fit(loader(Noisy(), range(10, 40)), override=False)
    at_once.fit(loader(Noisy(), range(10, 40)))
    assert_equal(again, at_once)
    with pytest.raises(ValueError, match="2 of 8 are missing"):
        loaded(la).fit(loader(Noisy(), range(14, 40)), override=False)
    with pytest.raises(ValueError, match="cannot be compared"):
        loaded(la).fit(loader(taken(data(), range(30))), override=False)


# --- doubling ---

N = 240


@dataclass(frozen=True)
class Large:
    """A small network, and enough data for several stages."""

    model: nn.Module
    data: TensorDataset
    per_sample: list[Tensor]


@cache
def large(likelihood: str = CLASSIFICATION) -> Large:
    """P = 4 * 3 + 4 + 3 * 4 + 3 = 31; nobody writes to it."""
    generator = torch.Generator().manual_seed(8)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    X = torch.randn(N, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.5, 1.0, 3.0])
    y = targets(likelihood, N)
    return Large(model, TensorDataset(X, y), [H.detach() for H in dense_ggn(model, X, likelihood)[0]])


PRIORS = torch.tensor([0.4, 1.7, 0.3, 2.2], dtype=torch.float64)


def doubling(likelihood: str = CLASSIFICATION, **options: Any) -> Any:
    """Of one prior per layer."""
    scales = {**hyper_parameters(likelihood), "prior_precision": PRIORS}
    return posterior_of(large(likelihood).model, likelihood, **{**scales, **options})


def order_of(dataset: Any, seed: int) -> list[int]:
    return Pool.of(sample_source(loader(dataset), seed), None).reading_order(seed).tolist()


def kl_to_full(la: Any, likelihood: str, n: int = N) -> float:
    """Of a posterior to that of the first n samples, densely."""
    sigma, T = float(la.sigma_noise), la.temperature
    full = n / (sigma**2 * T) * mean_of(large(likelihood).per_sample, torch.arange(n))
    full = full + torch.diag(la.prior_precision_diag)
    precision = la.posterior_precision.to_dense()
    trace = torch.trace(torch.linalg.solve(precision, full))
    return float(0.5 * (trace - len(full) + torch.logdet(precision) - torch.logdet(full)))


STRUCTURES = {
    f"{structure}, {magnitudes}": {"hessian_structure": structure, "magnitudes": magnitudes}
    for structure in ("lowrank", "kron", "full")
    for magnitudes in ("held_out", "cross_fitted", "same_batch")
}
EXACT = {
    **STRUCTURES,
    "lowrank, a Kronecker complement": {"complement": "kron", "rank": 4},
    "lowrank in the metric of a Kronecker estimate": {"complement": "kron", "metric": "kron", "rank": 4},
    "corrected for the bias of the inverse": {"inverse_correction": "second_order"},
    "only a part of the samples used": {"direction_samples": 0.3, "magnitude_samples": 0.4},
    "a choice": {"rank": "auto", "complement": "auto"},
}


def stages_of(la: Any, likelihood: str, sizes: list[int], seed: int, n: int, **options: Any) -> list[Any]:
    """Fits of the first samples of the order that the seed fixes, each made at once."""
    dataset, found = large(likelihood).data, []
    order = order_of(Subset(dataset, range(n)), seed)
    for size in sizes:
        found.append(doubling(likelihood, seed=seed, **options))
        found[-1].fit(loader(dataset, sorted(order[:size])), n_data=la.n_data)
    return found


@pytest.mark.parametrize("case", EXACT)
def test_gains_are_exact_where_all_data_are_read(case: str) -> None:
    # of 100 samples: 64 of them, the other 36 being unseen, then all
    n = 100
    likelihood = (CLASSIFICATION, REGRESSION)[list(EXACT).index(case) % 2]
    la = doubling(likelihood, seed=3, **EXACT[case])
    la.fit(loader(large(likelihood).data, range(n), shuffle=True), tolerance=1e-9)
    stages, sizes = la.stopping.stages, [32, 64, 100]
    assert [stage.n_samples for stage in stages] == sizes
    at_once = stages_of(la, likelihood, sizes, 3, n, **EXACT[case])
    distances = [kl_to_full(one, likelihood, n) for one in at_once]
    assert stages[0].gain is None
    for i in (1, 2):
        assert stages[i].gain == pytest.approx(distances[i - 1] - distances[i], rel=1e-7, abs=1e-9)
        assert stages[i].standard_error == 0
    assert_equal(la, at_once[-1], rtol=1e-9, atol=1e-9)
    assert "all 100 samples were used" in str(la.stopping)


# options, N where it is not the number of samples given
JUDGED = {
    "lowrank, held out": ({}, None),
    "lowrank, cross-fitted, for more data than given": ({"magnitudes": "cross_fitted", "n_folds": 4}, 900),
    "kron, same batch": ({"hessian_structure": "kron", "magnitudes": "same_batch"}, None),
    "full, held out, for more data than given": ({"hessian_structure": "full"}, 900),
    "only a part of the samples used": ({"direction_samples": 0.3, "magnitude_samples": 0.4, "rank": 5}, None),
    "last layer": ({"subset_of_weights": "last_layer", "prior_precision": 0.4}, 900),
}


@pytest.mark.parametrize("likelihood", [CLASSIFICATION, REGRESSION])
@pytest.mark.parametrize("case", JUDGED)
def test_gains_are_what_unseen_samples_say(case: str, likelihood: str) -> None:
    # densely: the 64 samples that were read with their share, 128 that neither has seen for the rest
    options, n_data = JUDGED[case]
    la = doubling(likelihood, seed=2, **options)
    la.fit(loader(large(likelihood).data), tolerance=1e9, n_data=n_data)
    order, n_data = order_of(large(likelihood).data, 2), n_data or N
    smaller, larger = stages_of(la, likelihood, [32, 64], 2, N, **options)
    used = set(la.split.used_indices.tolist())
    assert used <= set(order[:64])
    assert not used & set(order[64:])
    weight, f = n_data / (float(la.sigma_noise) ** 2 * la.temperature), 64 / n_data
    P = len(la.prior_precision_diag)
    prior = torch.diag(la.prior_precision_diag)
    inverses = [torch.linalg.inv(one.posterior_precision.to_dense()) for one in (smaller, larger)]
    own = [torch.trace(inverse @ prior) - torch.logdet(inverse) for inverse in inverses]
    difference = inverses[0] - inverses[1]
    # the last layer's are the last parameters
    terms = torch.stack([weight / 2 * (difference * H[-P:, -P:]).sum() for H in large(likelihood).per_sample])
    read, unseen = terms[order[:64]], terms[order[64:192]]
    gain = (own[0] - own[1]) / 2 + f * read.mean() + (1 - f) * unseen.mean()
    error = (1 - f) * unseen.std(correction=1) * ((1 - 128 / (n_data - 64)) / 128) ** 0.5
    last = la.stopping.stages[1]
    assert last.gain == pytest.approx(float(gain), rel=1e-8)
    assert last.standard_error == pytest.approx(float(error), rel=1e-8)


DRAWN = {"backend": CurvlinopsGGN, "backend_kwargs": {"stochastic": True, "num_samples": 1}}
OF_DRAWS = {
    "same batch": {"magnitudes": "same_batch"},
    "cross-fitted, the directions' share drawn again": {"magnitudes": "cross_fitted", "n_folds": 2},
}
SEEDS = range(16)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_DRAWS)
def test_gains_of_drawn_curvatures_rest_on_draws_of_their_own(case: str) -> None:
    # all data are read, so that nothing but draws is left to chance
    n, rows = 64, []
    for seed in SEEDS:
        la = doubling(seed=seed, **OF_DRAWS[case], **DRAWN)
        la.fit(loader(large().data, range(n), batch_size=64), tolerance=1e-9)
        (smaller,) = stages_of(la, CLASSIFICATION, [32], seed, n, **OF_DRAWS[case], **DRAWN)
        truth = kl_to_full(smaller, CLASSIFICATION, n) - kl_to_full(la, CLASSIFICATION, n)
        # with the draws that the larger one was fitted to in place of the full batch
        fitted, full = la.posterior_precision.to_dense(), mean_of(large().per_sample, torch.arange(n))
        off = fitted - torch.diag(la.prior_precision_diag) - n / la.temperature * full
        inverses = [torch.linalg.inv(one.posterior_precision.to_dense()) for one in (smaller, la)]
        flattering = truth + 0.5 * float(torch.trace((inverses[0] - inverses[1]) @ off))
        last = la.stopping.stages[-1]
        assert last.n_samples == n
        rows.append((last.gain - truth, last.standard_error, flattering - truth))
    error, standard_error, flattery = torch.tensor(rows, dtype=torch.float64).T
    of_mean = error.std() / len(SEEDS) ** 0.5
    assert abs(float(error.mean() / of_mean)) < 3.5
    assert 0.5 < float(standard_error.square().mean() / error.var()) < 4
    # the test has power
    assert float(flattery.mean()) > 5 * float(of_mean)


@pytest.mark.parametrize("case", OF_DRAWS)
def test_no_draw_is_both_fitted_and_judged_by(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the exact partner: which seeds drew what a stage was fitted to, and what judged it
    drawn: list[set[int]] = []
    judges: list[set[int]] = []
    batches, fit_curvature, judging = (
        RowCurvature.batches,
        growing.fit_curvature,
        growing._Growth._evaluation_curvatures,
    )

    def drawing(self: RowCurvature) -> Any:
        drawn[-1].add(self.seed)
        return batches(self)

    def fitting(*args: Any, **kwargs: Any) -> Any:
        drawn.append(set())
        found = fit_curvature(*args, **kwargs)
        drawn.append(set())
        return found

    def judged(*args: Any) -> Any:
        found = judging(*args)
        judges.append({curvature.seed for curvatures in found[:2] for curvature in curvatures})
        return found

    monkeypatch.setattr(RowCurvature, "batches", drawing)
    monkeypatch.setattr(growing, "fit_curvature", fitting)
    monkeypatch.setattr(growing._Growth, "_evaluation_curvatures", judged)
    doubling(seed=1, **OF_DRAWS[case], **DRAWN).fit(loader(large().data), tolerance=1e-9)
    fitted = drawn[::2]
    assert len(fitted) == 4
    assert len(judges) == 3
    for smaller, larger, seeds in zip(fitted, fitted[1:], judges, strict=False):
        assert seeds
        assert not seeds & (smaller | larger)
    if case != "same batch":
        assert all(len(seeds) > 1 for seeds in fitted), "drawn again"


def test_it_stops_by_the_tolerance_and_goes_on_where_it_stopped() -> None:
    dataset = large().data
    la = doubling(seed=1)
    la.fit(loader(dataset), tolerance=1e9)
    assert [stage.n_samples for stage in la.stopping.stages] == [32, 64]
    assert la.stopping.enough
    assert la.n_data == N
    assert la.split.n_samples == 64
    first = la.stopping.stages[1]
    assert str(la.stopping).startswith(f"stopped: doubling from 32 to 64 samples gained {first.shown_gain}, less than")
    la.fit(loader(dataset, shuffle=True), override=False, tolerance=1e-9)
    straight = doubling(seed=1)
    straight.fit(loader(dataset), tolerance=1e-9)
    assert [stage.n_samples for stage in straight.stopping.stages] == [32, 64, 128, 240]
    assert [stage.n_samples for stage in la.stopping.stages] == [64, 128, 240]
    assert straight.stopping.stages[1] == first
    assert la.stopping.stages[1:] == straight.stopping.stages[2:]
    assert_equal(la, straight)
    at_once = doubling(seed=1)
    at_once.fit(loader(dataset))
    assert_equal(la, at_once)


def test_all_the_rest_after_a_stop() -> None:
    dataset = large().data
    la, at_once = doubling(seed=1), doubling(seed=1)
    la.fit(loader(dataset, range(100)), tolerance=1e9)
    la.fit(loader(dataset), override=False)
    assert la.stopping is None
    at_once.fit(loader(dataset))
    assert_equal(la, at_once)


def test_other_samples_after_a_stop_join_those_that_were_read() -> None:
    # what the first loader offered and nobody read is counted, and not fitted
    dataset = large().data
    la, at_once = doubling(seed=1), doubling(seed=1)
    la.fit(loader(dataset, range(100)), tolerance=1e9)
    read = la.split.used_indices.tolist()
    la.fit(loader(dataset, range(100, 120)), override=False)
    assert la.n_data == 120
    at_once.fit(loader(dataset, sampler=[*read, *range(100, 120)]), n_data=120)
    assert_equal(la, at_once)


def test_doubling_from_what_other_fits_read() -> None:
    dataset = large().data
    la = doubling(seed=1)
    la.fit(loader(dataset, range(40)))
    la.fit(loader(dataset), override=False, tolerance=1e9)
    assert [stage.n_samples for stage in la.stopping.stages] == [40, 80]
    assert set(range(40)) < set(la.split.used_indices.tolist())
    at_once = doubling(seed=1)
    at_once.fit(loader(dataset, sorted(la.split.used_indices.tolist())), n_data=N)
    assert_equal(la, at_once)


# options, samples there are, n_data -> stages that are tried
FIRST_SIZES = {
    "32 are enough": ({}, 100, None, [32, 64, 100]),
    "fewer than 32": ({}, 20, None, [20]),
    "many folds": ({"magnitudes": "cross_fitted", "n_folds": 50}, 100, None, [32, 64, 100]),
    "a number of direction samples": ({"direction_samples": 63}, 240, None, [128, 240]),
    "a number of direction samples that leaves too few until the end": ({"direction_samples": 90}, 100, None, [100]),
}


@pytest.mark.parametrize("case", FIRST_SIZES)
def test_stages_begin_where_the_estimator_can(case: str) -> None:
    options, n, n_data, expected = FIRST_SIZES[case]
    la = doubling(seed=1, **options)
    la.fit(loader(large().data, range(n)), tolerance=1e-9, n_data=n_data)
    assert [stage.n_samples for stage in la.stopping.stages] == expected


def test_with_nobody_left_to_tell_all_are_used() -> None:
    # the loader's 70 samples stand for 500: of 64 there are too few others, of 70 none
    la = doubling(seed=1)
    la.fit(loader(large().data, range(70)), tolerance=1e9, n_data=500)
    assert [(stage.n_samples, stage.gain) for stage in la.stopping.stages] == [(32, None), (64, None), (70, None)]
    assert not la.stopping.enough
    assert "is unknown, because too few unseen samples were left" in str(la.stopping)
    assert la.n_data == 500


def test_numbers_of_both_kinds_leave_nothing_to_double() -> None:
    la = doubling(direction_samples=10, magnitude_samples=12)
    with pytest.raises(ValueError, match="as a share of them; got 10 and 12 samples"):
        la.fit(loader(large().data), tolerance=1.0)
    with pytest.raises(ValueError, match="not fitted"):
        la.log_marginal_likelihood()


def test_what_does_not_fit_the_samples_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "fit_curvature", no_long_work)
    for options, kwargs, message in (
        ({"direction_samples": 240}, {}, "leave 0 for the magnitudes"),
        ({}, {"n_data": 239}, "at least 240, got 239"),
        (
            {"magnitudes": "cross_fitted", "direction_samples": 0.5, "magnitude_samples": 130},
            {},
            "require 120 . 130 disjoint samples",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            doubling(**options).fit(loader(large().data), tolerance=1.0, **kwargs)


def no_long_work(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("long work has begun")


# --- a fit that fails on the way, and what a fit leaves behind ---


def damaged(position: int) -> TensorDataset:
    X, y = (t.clone() for t in large().data.tensors)
    X[position] = torch.nan
    return TensorDataset(X, y)


ORDER = order_of(large().data, 1)
BROKEN = {
    "a sample of the first stage is damaged": (lambda: damaged(ORDER[3]), ValueError, "finite"),
    "a sample of a later stage is damaged": (lambda: damaged(ORDER[150]), ValueError, "finite"),
    "a sample that only judges is damaged": (lambda: damaged(ORDER[70]), ValueError, "finite"),
}


def test_a_loader_that_augments_is_refused_but_its_batches_of_one_pass_are_not() -> None:
    noisy = loader(Noisy())
    la = posterior()
    with pytest.raises(ValueError, match=r"yields others at every pass.*list\(loader\)"):
        la.fit(noisy, tolerance=1.0)
    la.fit(list(noisy), tolerance=1e9)
    assert la.stopping.stages[0].n_samples == 32


@pytest.mark.parametrize("case", BROKEN)
def test_a_fit_that_fails_on_the_way_changes_nothing(case: str) -> None:
    make, error, message = BROKEN[case]
    la = doubling(seed=1)
    with pytest.raises(error, match=message):
        la.fit(loader(make()), tolerance=1e-9)
    with pytest.raises(ValueError, match="not fitted"):
        la(large().data.tensors[0])
    la.fit(loader(large().data, range(40)), tolerance=1e9)
    stopping, split, state = la.stopping, la.split, torch.random.get_rng_state()
    before = la.posterior_precision.to_dense()
    la.model.train()
    try:
        with pytest.raises(error, match=message):
            la.fit(loader(make()), tolerance=1e-9)
        assert all(module.training for module in la.model.modules())
    finally:
        la.model.eval()
    assert la.stopping is stopping
    assert la.split is split
    assert torch.equal(la.posterior_precision.to_dense(), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in la.model.parameters())
    la.fit(loader(large().data), override=False)
    assert la.split.n_samples == N


def test_a_stage_lets_go_of_the_rows_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    alive = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append([ref() for ref in seen if ref() is not None])
        found = fit_curvature(*args, **kwargs)
        seen.extend(weakref.ref(curvature) for curvature in found[1])
        return found

    fit_curvature = growing.fit_curvature
    monkeypatch.setattr(growing, "fit_curvature", watched)
    la = doubling(seed=1)
    la.fit(loader(large().data), tolerance=1e-9)
    assert len(seen) == 8
    assert alive == [[], [], [], []]


def test_copies_pickles_and_states_of_a_fit_that_stopped() -> None:
    la = doubling(seed=1)
    la.fit(
        loader(large().data, collate_fn=lambda items: tuple(map(torch.stack, zip(*items, strict=True)))), tolerance=1e9
    )
    expected = la.posterior_precision.to_dense()
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    state = doubling(seed=1)
    state.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la)), state):
        assert torch.equal(other.posterior_precision.to_dense(), expected)
        assert other.n_data == N
    assert pickle.loads(pickle.dumps(la)).stopping == la.stopping
    assert state.stopping is None


def test_doubling_goes_on_after_loading_a_state() -> None:
    la, straight = doubling(seed=1), doubling(seed=1)
    la.fit(loader(large().data), tolerance=1e9)
    used = la.split.n_samples
    again = doubling(seed=1)
    again.load_state_dict(la.state_dict())
    with pytest.raises(ValueError, match=f"of a fit to 240 samples; the loader yields {used + 1}"):
        again.fit(loader(large().data, [*la.split.used_indices.tolist(), extra(la)]), override=False)
    again.fit(loader(large().data, shuffle=True), override=False, tolerance=1e-9)
    straight.fit(loader(large().data), tolerance=1e-9)
    assert again.stopping.stages[0].n_samples == used
    assert_equal(again, straight)


def extra(la: Any) -> int:
    """A sample that the fit did not use."""
    return min(set(range(N)) - set(la.split.used_indices.tolist()))


def test_the_progress_line_shows_the_gain_and_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    la = doubling(seed=1)
    la.fit(loader(large().data), tolerance=1e9, progress_bar=True)
    shown = capsys.readouterr().err
    assert "64/240 [" in shown
    assert f"gained {la.stopping.stages[1].shown_gain}, tolerance 1e+09" in shown
    quiet = doubling(seed=1)
    quiet.fit(loader(large().data), tolerance=1e9)
    assert capsys.readouterr().err == ""


def test_only_the_posterior_that_is_kept_is_warned_of() -> None:
    # more directions than the samples of any stage have, so that every stage has something to say
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la = doubling(seed=1, rank=31)
        la.fit(loader(large().data, range(40)), tolerance=1e-9)
    expected = doubling(seed=1, rank=31)
    with warnings.catch_warnings(record=True) as of_one:
        warnings.simplefilter("always")
        expected.fit(loader(large().data, range(40)))
    assert len(of_one) >= 1
    assert [str(w.message) for w in caught] == [str(w.message) for w in of_one]
