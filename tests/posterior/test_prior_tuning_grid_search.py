"""The grid search against a dense transcription, and what it says when the best prior does harm."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torchmetrics
from laplace import Laplace
from laplace.utils.enums import LinkApprox, PredType, TuningMethod
from laplace.utils.metrics import RunningNLLMetric
from oracles import naive_mean_field
from posterior_cases import PRIOR, SIGMA, fitted, jacobians, loader_of, posterior_of, problem

from debiased_laplace.curvature.network import Network
from debiased_laplace.posterior import validation
from debiased_laplace.posterior.prior_tuning import PriorSearch, against_map
from debiased_laplace.posterior.validation import negative_log_likelihoods
from debiased_laplace.predictive.mean_field import nodes as fixed_nodes

GRID = [10.0**e for e in (-2, -1, 0, 1, 2)]
SEARCH = {"method": "gridsearch", "log_prior_prec_min": -2, "log_prior_prec_max": 2, "grid_size": 5}
HARMLESS = ["ignore:The best prior precision", "ignore:Even the best prior precision"]


def quiet(la, loader, **options):
    """A search whose warnings are not what is tested."""
    with warnings.catch_warnings():
        for rule in HARMLESS:
            warnings.filterwarnings(*rule.split(":"))
        la.optimize_prior_precision(**{**SEARCH, "val_loader": loader, **options})
    return la.prior_search


def dense_losses(la, X, y, prior, sigma):
    """Each sample's negative log-likelihood under another prior, from the dense precision; and the plain network's."""
    J = jacobians("MLP", len(X))[:, :, la.selection.indices]
    P = la.posterior_precision.to_dense() + (prior - PRIOR) * torch.eye(J.shape[2], dtype=torch.float64)
    covariance = torch.linalg.inv(P)
    of_laplace, of_map = [], []
    for i, x in enumerate(X):
        f = la.model(x[None])[0].detach()
        variance = torch.stack([j @ covariance @ j for j in J[i]])
        if la.likelihood == "classification":
            nodes = fixed_nodes(len(f) - 1, torch.float64, f.device).T
            of_laplace.append(-naive_mean_field(f, J[i] @ covariance @ J[i].T, nodes)[y[i]].log())
            of_map.append(f.logsumexp(0) - f[y[i]])
            continue
        for found, total in ((of_laplace, variance + sigma**2), (of_map, torch.full_like(f, sigma**2))):
            densities = [torch.distributions.Normal(m, v**0.5) for m, v in zip(f, total, strict=True)]
            found.append(-sum(d.log_prob(t) for d, t in zip(densities, y[i], strict=True)) / len(f))
    return torch.stack(of_laplace), torch.stack(of_map)


STRUCTURES = {
    "low rank": ("all", "lowrank", {"rank": 9}),
    "low rank with the Kronecker complement": ("all", "lowrank", {"complement": "kron"}),
    "Kronecker": ("all", "kron", {}),
    "full": ("all", "full", {}),
    "last layer, low rank": ("last_layer", "lowrank", {}),
    "last layer, Kronecker": ("last_layer", "kron", {}),
    "subnetwork": ("subnetwork", "lowrank", {"subnetwork_indices": torch.arange(20, 60)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("case", STRUCTURES)
def test_losses_errors_and_comparison_are_the_dense_ones(case, likelihood):
    subset, structure, options = STRUCTURES[case]
    options = {key: value for key, value in options.items() if structure == "lowrank"}
    if structure != "lowrank":
        options["complement"] = "none"
    la, X, y, _ = fitted("MLP", likelihood, subset_of_weights=subset, hessian_structure=structure, **options)
    expected = [dense_losses(la, X, y, prior, SIGMA[likelihood]) for prior in GRID]
    search = quiet(la, loader_of(X, y, 9))
    losses = torch.stack([of_laplace.mean() for of_laplace, _ in expected])
    assert float(losses.max() - losses.min()) > 1e-3  # the losses tell the priors apart
    torch.testing.assert_close(search.grid, torch.tensor(GRID, dtype=torch.float64))
    torch.testing.assert_close(search.losses, losses, rtol=1e-6, atol=0)
    errors = torch.stack([of_laplace.std() / len(X) ** 0.5 for of_laplace, _ in expected])
    torch.testing.assert_close(search.standard_errors, errors, rtol=1e-5, atol=0)
    best = int(losses.argmin())
    assert search.chosen == pytest.approx(GRID[best])
    assert float(la.prior_precision) == pytest.approx(GRID[best])
    of_laplace, of_map = expected[best]
    assert search.map_loss == pytest.approx(float(of_map.mean()))
    found = search.against_map
    assert found.laplace_loss == pytest.approx(float(losses[best]), rel=1e-6)
    assert found.difference == pytest.approx(float((of_laplace - of_map).mean()), rel=1e-5)
    assert found.standard_error == pytest.approx(float((of_laplace - of_map).std()) / len(X) ** 0.5, rel=1e-5)
    assert search.worse_than_map == (found.difference > 0)
    assert search.n == len(X)


def test_the_observation_noise_is_part_of_every_loss():
    la, X, y, _ = fitted("MLP", "regression")
    without = [dense_losses(la, X, y, prior, 1e-9)[0].mean() for prior in GRID]
    search = quiet(la, loader_of(X, y))
    assert min(abs(float(a - b)) for a, b in zip(search.losses, without, strict=True)) > 0.1
    noisy, _, _, _ = fitted("MLP", "regression", sigma_noise=1.9)
    louder = quiet(noisy, loader_of(X, y))
    squared = float((la.model(X).detach() - y).square().mean())
    for found, sigma in ((search, SIGMA["regression"]), (louder, 1.9)):
        expected = math.log(sigma) + squared / (2 * sigma**2) + math.log(2 * math.pi) / 2
        assert found.map_loss == pytest.approx(expected)


def softened(model, X):
    """Labels that a less confident network would draw: neither the weakest prior is best nor the strongest."""
    p = torch.softmax(model(X).detach() / 1.5, dim=-1)
    return torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5))[:, 0]


def sure(likelihood):
    """A problem on which the plain network cannot be beaten: its own predictions are the truth."""
    la, X, _, _ = fitted("MLP", likelihood)
    f = la.model(X).detach()
    return la, X, f.argmax(1) if likelihood == "classification" else f


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_a_posterior_that_does_harm_is_never_set_silently(likelihood):
    la, X, y = sure(likelihood)
    of_laplace, of_map = dense_losses(la, X, y, 100.0, SIGMA[likelihood])
    excess = of_laplace - of_map
    with pytest.warns(UserWarning, match="worse than the plain network") as caught:
        la.optimize_prior_precision(**SEARCH, val_loader=loader_of(X, y))
    (said,) = [str(w.message) for w in caught if "worse than" in str(w.message)]
    assert f"{float(of_laplace.mean()):.4g} against {float(of_map.mean()):.4g}, a paired difference" in said
    assert f"{float(excess.mean()):+.2g} ± {float(excess.std()) / len(X) ** 0.5:.1g}" in said
    assert la.prior_search.worse_than_map is True
    assert "worse than the plain network" in repr(la.prior_search)
    assert float(la.prior_precision) == pytest.approx(100.0)


def test_harm_within_its_error_is_called_that():
    excess = torch.tensor([0.9, -0.8, 0.7, -0.6], dtype=torch.float64)
    plain = torch.full((4,), 0.5, dtype=torch.float64)
    found = against_map(plain + excess, plain, rounding=1e-9)
    assert found.difference == pytest.approx(0.05)
    assert found.doubtful
    assert not found.worse
    search = search_of([2.0, 1.0, 3.0], against_map=found)
    assert search.cautions == []
    assert "not detectably different from the plain network (MAP): negative log-likelihood 0.55" in repr(search)


def test_rounding_is_no_harm():
    plain = torch.full((4,), 0.5, dtype=torch.float64)
    assert not against_map(plain + 1e-8, plain, rounding=1e-7).worse
    assert against_map(plain + 1e-6, plain, rounding=1e-7).worse


def test_one_sample_has_no_standard_error():
    one = torch.tensor([0.5], dtype=torch.float64)
    found = against_map(one + 0.1, one, rounding=1e-7)
    assert math.isnan(found.standard_error)
    assert found.doubtful
    la, X, y, _ = fitted("MLP", "classification")
    assert bool(quiet(la, [(X[:1], y[:1])]).standard_errors.isnan().all())


def search_of(losses, against_map=None):
    values = torch.tensor(losses, dtype=torch.float64)
    grid = torch.logspace(-1, 1, len(losses), dtype=torch.float64)
    best = min((v, i) for i, v in enumerate(losses) if math.isfinite(v))[1]
    return PriorSearch(grid, values, None, float(grid[best]), against_map, "Brier", 7)


EDGES = {
    "inside": ([2.0, 1.0, 3.0], None, []),
    "lower": ([1.0, 2.0, 3.0], "lower", ["0.1, is at the lower edge of the grid of 3 from 0.1 to 10", "_min"]),
    "upper": ([3.0, 2.0, 1.0], "upper", ["10, is at the upper edge of the grid of 3 from 0.1 to 10", "_max"]),
    "next to what has no loss": ([math.nan, 1.0, 3.0], None, []),
    "a grid of one": ([1.0], None, []),
    "flat": ([1.0, 1.0 + 1e-9, 1.0], "lower", ["the same for every prior precision of 3", "squared error"]),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges(case):
    losses, edge, words = EDGES[case]
    search = search_of(losses)
    assert search.at_edge == edge
    assert len(search.cautions) == bool(words)
    for word in words:
        assert word in search.cautions[0]
    assert ("edge of the grid" in repr(search)) == (edge is not None)
    assert ("1 of the grid's priors have no finite loss" in repr(search)) == (math.nan in losses)


@pytest.mark.filterwarnings("ignore:Even the best")
@pytest.mark.parametrize("edge", ["lower", "upper"])
def test_the_edge_is_warned_of(edge):
    la, X, y = sure("classification")
    if edge == "lower":
        y = (y + 1) % 3  # the network is wrong everywhere, so that it cannot be doubted enough
    with pytest.warns(UserWarning, match=f"{edge} edge of the grid of 5 from 0.01 to 100"):
        la.optimize_prior_precision(**SEARCH, val_loader=loader_of(X, y))
    assert la.prior_search.at_edge == edge
    assert la.prior_search.chosen == pytest.approx(0.01 if edge == "lower" else 100.0)


class Counted:
    """How many samples had their Jacobians computed."""

    def __init__(self, monkeypatch):
        self.n = 0
        computed = Network.jacobians

        def counting(network, inputs, **options):
            self.n += len(inputs)
            return computed(network, inputs, **options)

        by_parameter = Network.jacobians_by_parameter

        def counting_parts(network, inputs):
            found = by_parameter(network, inputs)
            self.n += 0 if found is None else len(inputs)
            return found

        monkeypatch.setattr(Network, "jacobians", counting)
        monkeypatch.setattr(Network, "jacobians_by_parameter", counting_parts)


@pytest.mark.parametrize("link", ["mean_field", "probit", "mc", "bridge_norm"])
def test_jacobians_are_kept_as_far_as_memory_goes(link, monkeypatch):
    la, X, y, _ = fitted("MLP", "classification")
    n_bytes = 3 * la.n_params * 8  # of a sample
    losses, counts = [], []
    for room in (10**9, 20 * n_bytes, 0):
        monkeypatch.setattr("debiased_laplace.curvature.memory.free_memory", lambda _, room=room: 4 * room)
        with monkeypatch.context() as m:
            counted = Counted(m)
            losses.append(quiet(la, loader_of(X, y, 16), link_approx=link).losses)
            counts.append(counted.n)
    # a first one, and then five priors and the comparison
    assert counts == [40 + 1, 16 + 1 + 6 * 24, 1 + 6 * 40]
    for others in losses[1:]:
        torch.testing.assert_close(others, losses[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_every_prior_meets_the_same_draws(pred_type):
    la, X, y, _ = fitted("MLP", "classification")
    options = {"pred_type": pred_type, "link_approx": "mc", "n_samples": 15}
    search = quiet(la, loader_of(X, y, 9), **options)
    losses = []
    for prior in GRID:
        la.prior_precision = prior
        generator, found = torch.Generator(), []
        for number, (x, t) in enumerate(zip(X.split(9), y.split(9), strict=True)):
            # the same networks for every batch
            generator.manual_seed(0 if pred_type == "nn" else number)
            p = la(x, pred_type, link_approx="mc", n_samples=15, generator=generator)
            found.append(-p.gather(1, t[:, None]).log())
        losses.append(float(torch.cat(found).mean()))
    assert search.losses.tolist() == pytest.approx(losses, rel=1e-9)
    torch.manual_seed(3)
    again = quiet(la, loader_of(X, y, 9), **options)
    assert torch.equal(again.losses, search.losses)


def test_networks_of_a_regression():
    la, X, y, _ = fitted("MLP", "regression")
    search = quiet(la, loader_of(X, y, 40), pred_type="nn", n_samples=12)
    for prior, loss in zip(GRID, search.losses, strict=True):
        la.prior_precision = prior
        mean, variance = la(X, "nn", link_approx="mc", n_samples=12, generator=torch.Generator().manual_seed(0))
        total = variance + SIGMA["regression"] ** 2
        expected = torch.nn.functional.gaussian_nll_loss(mean, y, total, full=True)
        assert float(loss) == pytest.approx(float(expected))


def squared_calibration(mean, covariance, y):
    return ((y - mean).square() / (covariance.diagonal(dim1=1, dim2=2) + 0.49) - 1).square().mean()


def test_the_users_own_loss_chooses_and_likelihoods_are_compared():
    la, X, y, _ = fitted("MLP", "regression")
    own = quiet(la, loader_of(X, y), loss=squared_calibration)
    assert own.loss_name == "squared_calibration"
    assert own.standard_errors is None
    for prior, loss in zip(GRID, own.losses, strict=True):
        la.prior_precision = prior
        assert float(loss) == pytest.approx(float(squared_calibration(*la(X), y)))
    position = int(own.losses.argmin())
    default = quiet(la, loader_of(X, y))
    assert own.against_map.laplace_loss == pytest.approx(float(default.losses[position]), rel=1e-6)
    assert own.map_loss == pytest.approx(default.map_loss)


def test_targets_of_the_users_own_loss_need_not_be_the_likelihoods():
    la, X, y, _ = fitted("MLP", "classification")
    signs = 2 * torch.nn.functional.one_hot(y, 3).double() - 1
    search = quiet(la, loader_of(X, signs), loss=lambda p, t: (p - t).square().sum(-1).mean())
    assert search.against_map is None
    assert search.map_loss is None
    assert search.worse_than_map is None
    assert "not compared with the plain network" in repr(search)


@pytest.mark.parametrize("loss", [torchmetrics.MeanSquaredError(num_outputs=3), None])
def test_the_call_of_a_laplace_torch_user_in_regression(loss):
    la, X, y, _ = fitted("MLP", "regression")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(
            pred_type="glm",
            method="gridsearch",
            val_loader=loader_of(X, y),
            loss=loss,
            log_prior_prec_min=-4,
            log_prior_prec_max=4,
            grid_size=9,
            n_samples=10,
            verbose=False,
            progress_bar=False,
        )
    said = any("same for every prior precision" in str(w.message) for w in caught)
    assert said == (loss is not None)  # the squared error of the mean cannot choose a prior


@pytest.mark.parametrize("link", ["probit", "bridge_norm"])
def test_the_same_call_chooses_laplace_torchs_prior(link, capsys):
    model, X, _, _ = problem("MLP", "classification")
    y = softened(model, X)
    ours = posterior_of(model, "classification", "all", "full", magnitudes="same_batch")
    theirs = Laplace(model, "classification", "all", "full")
    for la in (ours, theirs):
        la.fit(loader_of(X, y))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="By default `link_approx`")
            for rule in HARMLESS:
                warnings.filterwarnings(*rule.split(":"))
            la.optimize_prior_precision(
                PredType.GLM,
                TuningMethod.GRIDSEARCH,
                val_loader=loader_of(X, y),
                loss=lambda p, t: RunningNLLMetric()(p, t),
                log_prior_prec_min=-2,
                log_prior_prec_max=3,
                grid_size=11,
                link_approx=LinkApprox(link),
                verbose=True,
            )
    assert float(ours.prior_precision) == pytest.approx(float(theirs.prior_precision))
    assert float(ours.prior_precision) not in (pytest.approx(0.01), pytest.approx(1000.0))
    assert capsys.readouterr().out.count("Optimized prior precision is") == 2


def test_a_probability_that_underflows_costs_much_and_not_everything():
    la, *_ = fitted("MLP", "classification")
    p = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]], dtype=torch.float32)
    found = negative_log_likelihoods(la, [(p, torch.tensor([2, 1]))])
    assert found.tolist() == pytest.approx([-math.log(torch.finfo(torch.float32).tiny), math.log(2)])


def test_a_prior_that_cannot_be_decomposed_is_passed_over(monkeypatch):
    la, X, y, _ = fitted("MLP", "classification")
    spread_of = validation.Spreads.of_outputs

    def failing(spreads, rows, **options):
        if float(la.prior_precision) == pytest.approx(0.01):
            raise torch.linalg.LinAlgError("not positive definite")
        return spread_of(spreads, rows, **options)

    monkeypatch.setattr(validation.Spreads, "of_outputs", failing)
    search = quiet(la, loader_of(X, y))
    assert search.losses.isnan().tolist() == [True, False, False, False, False]
    assert "1 of the grid's priors have no finite loss" in repr(search)


def test_what_was_found_goes_with_the_fit():
    la, X, y, _ = fitted("MLP", "classification")
    assert la.prior_search is None
    before = set(la.state_dict())
    search = quiet(la, loader_of(X, y))
    assert la.prior_search is search
    assert set(la.state_dict()) == before
    assert repr(pickle.loads(pickle.dumps(search))) == repr(search)
    assert copy.deepcopy(la).prior_search.chosen == search.chosen
    with pytest.raises(ValueError, match="grid_size"):
        la.optimize_prior_precision(**{**SEARCH, "grid_size": 0}, val_loader=loader_of(X, y))
    assert la.prior_search is search
    loaded = posterior_of(la.model, "classification")
    quiet_state = la.state_dict()
    loaded.load_state_dict(quiet_state)
    assert loaded.prior_search is None
    assert float(loaded.prior_precision) == pytest.approx(search.chosen)
    la.load_state_dict(quiet_state)
    assert la.prior_search is None
    quiet(la, loader_of(X, y))
    la.optimize_prior_precision(n_steps=1)
    assert la.prior_search is None
    quiet(la, loader_of(X, y))
    la.fit(loader_of(X, y))
    assert la.prior_search is None


def test_what_was_found_reads_well():
    la, X, y, _ = fitted("MLP", "classification")
    lines = repr(quiet(la, loader_of(X, y))).splitlines()
    assert lines[0] == f"prior precision {float(la.prior_precision):.4g}, the best of 5 from 0.01 to 100, on 40 " + (
        "validation samples"
    )
    assert "negative log-likelihood" in lines[1]
    assert " ± " in lines[1]
    assert "plain network" in lines[2]


NO_EFFECT = {
    "validation data of the marginal likelihood": (
        {"method": "marglik", "n_steps": 1, "val_loader": [1]},
        "val_loader has no effect with method='marglik'",
    ),
    "structure of the grid": ({**SEARCH, "prior_structure": "layerwise"}, "prior_structure='layerwise' has no effect"),
}


@pytest.mark.filterwarnings(*HARMLESS)
@pytest.mark.parametrize("case", NO_EFFECT)
def test_arguments_of_the_other_method_are_pointed_out(case):
    options, message = NO_EFFECT[case]
    la, X, y, _ = fitted("MLP", "classification")
    with pytest.warns(UserWarning, match=message):
        la.optimize_prior_precision(**{"val_loader": loader_of(X, y), **options})


WRONG = {
    "edges the wrong way round": ({"log_prior_prec_min": 3, "log_prior_prec_max": 1}, "must not be above .* 3 and 1"),
    "no base": ({"log_prior_prec_base": 1}, "log_prior_prec_base must be a finite number above 1; got 1"),
    "priors beyond double precision": ({"log_prior_prec_max": 400}, "every prior_precision of the grid"),
    "a loss of every sample": ({"loss": lambda p, y: p[:, 0]}, "loss must return one number; <lambda> returned"),
    "a batch without samples": ({"val_loader": [(torch.zeros(0, 4).double(), torch.zeros(0).long())]}, "no batches"),
    "structure in other words": ({"prior_structure": "block"}, "prior_structure"),
    "no finite loss": ({"loss": lambda p, y: math.nan}, r"between 0\.01 and 100 gives a finite loss .*nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_searches_say_what_was_expected_and_leave_the_prior(case):
    options, message = WRONG[case]
    la, X, y, _ = fitted("MLP", "classification", rank=4)
    with pytest.raises(ValueError, match=message):
        la.optimize_prior_precision(**{**SEARCH, "val_loader": loader_of(X, y), **options})
    assert float(la.prior_precision) == pytest.approx(PRIOR)
    assert la.prior_search is None


def test_priors_beyond_single_precision():
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(copy.deepcopy(model).float(), "classification", rank=4, prior_precision=PRIOR)
    la.fit(loader_of(X.float(), y))
    with pytest.raises(ValueError, match=r"every prior_precision of the grid, in torch\.float32"):
        la.optimize_prior_precision(**{**SEARCH, "log_prior_prec_max": 60}, val_loader=loader_of(X.float(), y))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal", "kron"])
def test_one_decomposition_serves_the_whole_grid(likelihood, complement, monkeypatch):
    la, X, y, _ = fitted("MLP", likelihood, complement=complement, rank=9)
    once = quiet(la, loader_of(X, y, 9), grid_size=300)
    assert la.prior_search is once
    monkeypatch.setattr(validation.Shifted, "of", classmethod(lambda *_, **__: None))
    singly = quiet(la, loader_of(X, y, 9), grid_size=300)
    torch.testing.assert_close(once.losses, singly.losses, rtol=1e-8, atol=0)
    assert once.chosen == singly.chosen
    assert once.against_map.laplace_loss == pytest.approx(singly.against_map.laplace_loss, rel=1e-8)


def test_the_correction_of_the_inverse_is_made_for_every_prior():
    la, X, y, _ = fitted("MLP", "classification", rank=9, inverse_correction="second_order")
    search = quiet(la, loader_of(X, y, 9))
    for prior, loss in zip(GRID, search.losses, strict=True):
        la.prior_precision = prior
        assert float(loss) == pytest.approx(float(-la(X).gather(1, y[:, None]).log().mean()))


@pytest.mark.parametrize("patience", [0.0, 1e6])
def test_a_long_search_shows_progress_unasked(patience, monkeypatch, capsys):
    monkeypatch.setattr(validation, "_PATIENCE", patience)
    la, X, y, _ = fitted("MLP", "classification", rank=9)
    quiet(la, loader_of(X, y, 9))
    assert ("[Grid search]" in capsys.readouterr().err) == (patience == 0)
    quiet(la, loader_of(X, y, 9), progress_bar=False)
    assert capsys.readouterr().err == ""
