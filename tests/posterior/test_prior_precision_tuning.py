"""Tuning the prior precision: the grid search scores what it says it scores, the evidence ascends."""

import math
import warnings

import pytest
import torch
import torchmetrics
from laplace.utils.enums import PredType, PriorStructure, TuningMethod
from models import mlp
from posterior_cases import close, fitted, loader_of, posterior_of

from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior.prior_tuning import AgainstMap, search_grid
from debiased_laplace.posterior.validation import Scoring


class Recorded(torchmetrics.Metric):
    """The mean of the negative log probabilities, and of all its results."""

    def __init__(self):
        super().__init__()
        self.results = []
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64))
        self.add_state("n", torch.tensor(0))

    def update(self, probabilities, y):
        self.total += -probabilities.gather(1, y[:, None]).log().sum()
        self.n += len(y)

    def compute(self):
        return self.total / self.n


def search(la, X, y, **options):
    defaults = {"log_prior_prec_min": -3.0, "log_prior_prec_max": 3.0, "grid_size": 7, "val_loader": loader_of(X, y, 9)}
    la.optimize_prior_precision(method="gridsearch", **{**defaults, **options})


def scores(la, X, y, grid, loss):
    """Each grid point on its own, in one batch."""
    found = []
    for prior in grid:
        la.prior_precision = prior
        found.append(float(loss(la, X, y)))
    return found


def cross_entropy(la, X, y, **options):
    return -la(X, **options).gather(1, y[:, None]).log().mean()


def gaussian_nll(la, X, y):
    mean, covariance = la(X)
    total = covariance.diagonal(dim1=1, dim2=2) + la.sigma_noise**2
    return torch.nn.functional.gaussian_nll_loss(mean, y, total, full=True)


GRID = torch.logspace(-3, 3, 7)
CASES = {
    "classification": ("classification", {}, cross_entropy),
    "classification, bridge": (
        "classification",
        {"link_approx": "bridge"},
        lambda la, X, y: cross_entropy(la, X, y, link_approx="bridge"),
    ),
    "classification, own metric": ("classification", {"loss": Recorded()}, cross_entropy),
    "classification, own function": (
        "classification",
        {"loss": lambda p, y: -p.gather(1, y[:, None]).log().mean()},
        cross_entropy,
    ),
    "classification, networks": (
        "classification",
        {"pred_type": "nn", "n_samples": 20},
        lambda la, X, y: (
            torch.stack(
                [
                    -la(x, "nn", link_approx="mc", n_samples=20, generator=torch.Generator().manual_seed(0))
                    .gather(1, t[:, None])
                    .log()
                    .sum()
                    for x, t in zip(X.split(9), y.split(9), strict=True)
                ]
            ).sum()
            / len(y)
        ),
    ),
    "regression": ("regression", {}, gaussian_nll),
    "regression, own function": (
        "regression",
        {"loss": lambda mean, variance, y: ((variance.diagonal(dim1=1, dim2=2) - 1) ** 2).mean()},
        lambda la, X, y: ((la(X)[1].diagonal(dim1=1, dim2=2) - 1) ** 2).mean(),
    ),
}


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("case", CASES)
def test_the_grid_search_chooses_the_best_of_independent_scores(case):
    likelihood, options, loss = CASES[case]
    la, X, y, _ = fitted("MLP", likelihood)
    search(la, X, y, **options)
    chosen = float(la.prior_precision)
    expected = scores(la, X, y, GRID, loss)
    assert la.prior_search.losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert chosen == pytest.approx(float(GRID[expected.index(min(expected))]))
    assert max(expected) - min(expected) > 1e-3  # the scores tell the priors apart


@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_a_metric_of_the_users_is_left_as_it_was():
    la, X, y, _ = fitted("MLP", "classification")
    metric = Recorded()
    metric.update(torch.full((2, 3), 1 / 3, dtype=torch.float64), torch.tensor([0, 1]))
    before = metric.compute()
    search(la, X, y, loss=metric)
    assert torch.equal(metric.compute(), before)
    found = la.prior_search.losses
    search(la, X, y, loss=Recorded())
    assert torch.equal(la.prior_search.losses, found)  # what it held before is part of no score


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_not_chosen(bad):
    la, X, y, _ = fitted("MLP", "classification")
    values = iter([5.0, bad, 3.0, 4.0, bad, 6.0, 7.0])
    search(la, X, y, loss=lambda p, y: next(values))
    assert float(la.prior_precision) == pytest.approx(0.1)


def test_no_score_at_all_leaves_the_prior():
    la, X, y, _ = fitted("MLP", "classification")
    with pytest.raises(ValueError, match=r"gives a finite loss on the validation data"):
        search(la, X, y, loss=lambda p, y: math.nan)
    assert float(la.prior_precision) == pytest.approx(0.4)


@pytest.mark.parametrize("edge", [0, 6])
def test_the_edge_of_the_grid_is_pointed_out(edge):
    la, X, y, _ = fitted("MLP", "classification")
    values = iter([1.0 if i == edge else 2.0 for i in range(7)])
    with pytest.warns(UserWarning, match="edge of the grid"):
        search(la, X, y, loss=lambda p, y: next(values))
    assert float(la.prior_precision) == pytest.approx(float(GRID[edge]))


def test_an_error_in_the_loss_leaves_the_prior():
    la, X, y, _ = fitted("MLP", "classification")

    def loss(p, y):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        search(la, X, y, loss=loss)
    assert float(la.prior_precision) == pytest.approx(0.4)


def test_names_may_be_laplace_torchs_enums():
    la, X, y, _ = fitted("MLP", "regression", rank=5)
    la.optimize_prior_precision(PredType.GLM, TuningMethod.MARGLIK, n_steps=2, prior_structure=PriorStructure.LAYERWISE)
    assert la.prior_precision.numel() == la.n_layers
    search(la, X, y, pred_type=PredType.GLM, log_prior_prec_min=-9.0, log_prior_prec_max=9.0)
    assert la.prior_precision.numel() == 1


WRONG = {
    "no validation data": ({"method": "gridsearch"}, "val_loader"),
    "empty validation data": ({"method": "gridsearch", "val_loader": []}, "no batches"),
    "empty grid": ({"method": "gridsearch", "grid_size": 0, "val_loader": "given"}, "grid_size"),
    "negative grid": ({"method": "gridsearch", "grid_size": -1, "val_loader": "given"}, "grid_size"),
    "grid of nothing": ({"method": "gridsearch", "log_prior_prec_min": math.nan, "val_loader": "given"}, "prior_prec"),
    "unknown link": ({"method": "gridsearch", "link_approx": "logit", "val_loader": "given"}, "link_approx"),
    "unknown predictive": ({"method": "gridsearch", "pred_type": "gp", "val_loader": "given"}, "pred_type"),
    "unknown method": ({"method": "cv"}, "method"),
    "unknown structure": ({"prior_structure": "block"}, "prior_structure"),
    "start at zero": ({"init_prior_prec": 0.0}, "init_prior_prec"),
    "start at NaN": ({"init_prior_prec": math.nan}, "init_prior_prec"),
    "start of a wrong length": ({"init_prior_prec": torch.ones(5)}, r"one per parameter \(93\); got 5"),
    "negative steps": ({"n_steps": -1}, "n_steps"),
    "negative learning rate": ({"lr": -0.1}, "learning rate"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_say_so_and_leave_the_prior(case):
    la, X, y, _ = fitted("MLP", "classification", rank=4)
    options, message = WRONG[case]
    if options.get("val_loader") == "given":
        options = {**options, "val_loader": loader_of(X, y)}
    with pytest.raises(ValueError, match=f"(?i){message}"):
        la.optimize_prior_precision(**options)
    assert float(la.prior_precision) == pytest.approx(0.4)


BAD_VALIDATION = {
    "NaN inputs": ("classification", lambda X, y: (X.index_fill(0, torch.tensor([30]), math.nan), y), "finite"),
    "NaN targets": ("regression", lambda X, y: (X, y.index_fill(0, torch.tensor([30]), math.nan)), "finite"),
    "targets of one dimension": ("regression", lambda X, y: (X, y[:, 0]), "shape"),
    "labels out of range": ("classification", lambda X, y: (X, y + 1), "labels"),
}


@pytest.mark.parametrize("case", BAD_VALIDATION)
def test_validation_data_that_cannot_be_scored(case):
    likelihood, change, message = BAD_VALIDATION[case]
    la, X, y, _ = fitted("MLP", likelihood, rank=4)
    with pytest.raises(ValueError, match=message):
        search(la, *change(X, y))
    assert float(la.prior_precision) == pytest.approx(0.4)


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_ascent_leaves_a_prior_without_a_graph(structure):
    la, *_ = fitted("MLP", "regression", rank=6, prior_precision=1.5)
    before = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(prior_structure=structure, n_steps=20, init_prior_prec=1.5)
    assert not la.prior_precision.requires_grad
    assert la.prior_precision.grad_fn is None
    assert not la.log_marginal_likelihood().requires_grad
    assert float(la.log_marginal_likelihood()) > before


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_gradient_of_the_evidence_by_finite_differences(structure, complement):
    la, *_ = fitted("LayerNorm and raw parameters", "regression", rank=8, complement=complement)
    n = {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}[structure]
    prior = torch.linspace(0.3, 2.0, n, dtype=torch.float64).requires_grad_()
    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    la.log_marginal_likelihood(prior, sigma).backward()
    step = 1e-5
    for i in (0, n - 1):
        shift = torch.zeros(n, dtype=torch.float64)
        shift[i] = step
        sides = [float(la.log_marginal_likelihood((prior + s * shift).detach(), sigma.detach())) for s in (1, -1)]
        close(prior.grad[i], (sides[0] - sides[1]) / (2 * step), 1e-5)
    sides = [float(la.log_marginal_likelihood(prior.detach(), (sigma + s * step).detach())) for s in (1, -1)]
    close(sigma.grad, (sides[0] - sides[1]) / (2 * step), 1e-5)


def test_before_fit():
    la, X, y, _ = fitted("MLP", "classification")
    fresh = posterior_of(la.model, "classification")
    for method in ("marglik", "gridsearch"):
        with pytest.raises(NotFittedError):
            fresh.optimize_prior_precision(method=method, val_loader=loader_of(X, y))


@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_a_loader_that_can_be_read_once_is_enough():
    la, X, y, _ = fitted("MLP", "classification")
    scoring = Scoring("glm", "probit", 10, None)
    search_grid(la, torch.logspace(-9, 9, 3), iter([(X, y)]), scoring, progress_bar=False)
    assert float(la.prior_precision) != pytest.approx(0.4)


# --- harm done to the training data ---


def trained_to_certainty(scale, **options):
    """A network of large outputs, sure of its own predictions, which are the labels; and a posterior of it."""
    model, X = mlp()
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    y = model(X).argmax(1)
    return posterior_of(model, "classification", "all", "full", temperature=1.3, **options), X, y


def losses_of(p, y):
    return -p.detach().gather(1, y[:, None])[:, 0].log()


@pytest.mark.parametrize(
    "sampling", [{"sampling": "uniform"}, {"sampling": "curvature", "n_rows": 8}], ids=["samples", "rows"]
)
def test_tuning_that_harms_the_training_data_says_so(sampling):
    la, X, y = trained_to_certainty(60.0, **sampling)
    la.fit(loader_of(X, y))
    with pytest.warns(UserWarning, match="without validation data") as caught:
        la.optimize_prior_precision(n_steps=5, lr=0.01, init_prior_prec=0.4)
    excess = losses_of(la(X), y) - losses_of(torch.softmax(la.model(X), 1), y)
    error = float(excess.std()) / len(X) ** 0.5
    assert float(excess.mean()) - 2 * error > 0.03  # it does
    assert "40 of its own training samples worse than the plain network" in str(caught[0].message)
    assert f"a paired difference of {float(excess.mean()):+.2g} ± {error:.1g}" in str(caught[0].message)


@pytest.mark.parametrize("case", ["strong prior", "loaded", "validated"])
def test_tuning_without_harm_or_with_validation_data_does_not(case):
    la, X, y = trained_to_certainty(60.0)
    la.fit(loader_of(X, y))
    if case == "loaded":
        other = posterior_of(la.model, "classification", "all", "full")
        other.load_state_dict(la.state_dict())
        other.optimize_prior_precision(n_steps=5, lr=0.01, init_prior_prec=0.4)
    elif case == "strong prior":
        la.optimize_prior_precision(n_steps=1, lr=1e-6, init_prior_prec=1e6)
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search(la, X, y)
        assert not any("without validation data" in str(w.message) for w in caught)


def test_harm_is_judged_by_the_link_of_the_predictions_and_by_some_samples_of_many():
    la, X, _ = trained_to_certainty(60.0)
    many = torch.cat([X + 1e-3 * i for i in range(8)])
    la.fit(loader_of(many, la.model(many).argmax(1)))
    with pytest.warns(UserWarning, match="256 of its own") as caught:
        la.optimize_prior_precision(n_steps=1, lr=1e-6, init_prior_prec=0.4, link_approx="probit")
    said = str(caught[0].message)
    with pytest.warns(UserWarning, match="256 of its own") as caught:
        la.optimize_prior_precision(n_steps=1, lr=1e-6, init_prior_prec=0.4)
    assert str(caught[0].message) != said


def test_a_difference_within_two_standard_errors_is_not_worse():
    found = AgainstMap(0.072, 0.07227, 0.00027, 0.0006)
    assert not found.worse
    assert str(found).startswith("not detectably different from the plain network")


def test_scatter_and_prior_follow_changes_of_the_prior_mean():
    la, *_ = fitted("MLP", "classification", prior_precision=3.0)
    P, generator = la.selection.n_parameters, torch.Generator().manual_seed(0)
    for prior_mean in (0.3, torch.randn(P, generator=generator)):
        la.prior_mean = prior_mean
        for _ in range(2):
            delta = la.mean_subnet - la.prior_mean
            close(la.scatter, 3 * delta @ delta)
            la.prior_mean.add_(0.1)
    la.prior_mean.requires_grad_()
    (found,) = torch.autograd.grad(la.scatter, la.prior_mean)
    close(found, -6 * (la.mean_subnet - la.prior_mean).detach())
    la.prior_mean, la.prior_precision = 0.3, torch.full((P,), 3.0)
    close(la.scatter, 3 * (la.mean_subnet - la.prior_mean).square().sum())
    close(la.log_det_prior_precision, P * math.log(3.0))
    la.prior_precision = 3.0
    close(la.log_det_prior_precision, P * math.log(3.0))
