"""Weights of samples and classes, soft labels, and equal samples, which are one sample with a weight."""

import pytest
import torch
from laplace import FullLaplace
from laplace.curvature import AsdlEF, CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian
from models import MODELS, N_SAMPLES, targets
from oracles import (
    dense_cross_fitted_posterior,
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
    dense_kl,
    dense_log_likelihood,
    dense_low_rank_posterior,
    dense_posterior_precision,
    flat_parameters,
)
from posterior_cases import PRIOR, SIGMA, TEMPERATURE, close, hyper_parameters, loader_of, posterior_of, problem
from torch.nn.functional import one_hot
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from debiased_laplace import DebiasedLaplace, DebiasedNewton, diagnose, directional_derivatives, newton_step
from debiased_laplace.quadratics.quadratic import quadratic_along

TIMES = torch.arange(N_SAMPLES) % 4 + 1  # 1, 2, 3, 4, 1, …
FLOATS = 0.3 + torch.rand(N_SAMPLES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
COPIES = torch.arange(N_SAMPLES).repeat_interleave(TIMES)[
    torch.randperm(int(TIMES.sum()), generator=torch.Generator().manual_seed(6))
]


def curvatures(kind, model, X, y, likelihood):
    """Curvature of every sample."""
    if kind == "GGN":
        return [H.detach() for H in dense_ggn(model, X, likelihood)[0]]
    dense = dense_empirical_fisher if kind == "EF" else dense_hessian
    return [H.detach() for H in dense(model, X, y, likelihood)[0]]


BACKENDS = {"GGN": None, "EF": CurvlinopsEF, "Hessian": CurvlinopsHessian}
STRUCTURES = {
    "low rank": {"hessian_structure": "lowrank", "complement": "none"},
    "low rank, Kronecker complement": {"hessian_structure": "lowrank", "complement": "kron", "rank": 9},
    "low rank, Lanczos": {"hessian_structure": "lowrank", "complement": "none", "solver": "lanczos", "rank": 12},
    "kron": {"hessian_structure": "kron"},
    "kron, K-FAC": {"hessian_structure": "kron", "kron_basis": "kfac", "kron_magnitudes": "kronecker"},
    "full": {"hessian_structure": "full"},
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("subset", ["all", pytest.param("last_layer", marks=SLOW)])
@pytest.mark.parametrize(
    "structure",
    [pytest.param(name, marks=SLOW if "Lanczos" in name or "complement" in name else ()) for name in STRUCTURES],
)
@pytest.mark.parametrize("magnitudes", [pytest.param("same_batch", marks=SLOW), "cross_fitted"])
def test_copies_give_the_posterior_of_weighted_samples(magnitudes, structure, subset):
    model, X, y, _ = problem("MLP", "classification")
    options = {**STRUCTURES[structure], "subset_of_weights": subset, "magnitudes": magnitudes}
    options |= hyper_parameters("classification")
    copies, weighted = (posterior_of(model, "classification", **options) for _ in range(2))
    copies.fit(loader_of(X[COPIES], y[COPIES]))
    weighted.fit(DataLoader(TensorDataset(X, y, TIMES), batch_size=16))
    assert copies.n_data == weighted.n_data == len(COPIES)
    close(copies.posterior_precision.to_dense(), weighted.posterior_precision.to_dense())
    close(copies.loss, weighted.loss)
    close(copies.log_marginal_likelihood(), weighted.log_marginal_likelihood())


@pytest.mark.parametrize("kind", ["GGN", "EF", pytest.param("Hessian", marks=SLOW)])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_of_all_the_data_the_full_posterior_is_the_weighted_sum(kind, likelihood):
    model, X, y, _ = problem("MLP", likelihood)
    la = posterior_of(
        model, likelihood, hessian_structure="full", backend=BACKENDS[kind], magnitudes="cross_fitted",
        **hyper_parameters(likelihood),
    )  # fmt: skip
    la.fit(DataLoader(TensorDataset(X, y, FLOATS), batch_size=16))
    total = float(FLOATS.sum())
    H = sum(m * H for m, H in zip(FLOATS, curvatures(kind, model, X, y, likelihood), strict=True)) / total
    assert la.n_data == pytest.approx(total, rel=1e-12)
    if kind == "Hessian":
        values, U = torch.linalg.eigh(H)
        H = U @ torch.diag(values.clamp(min=0)) @ U.T
    expected = dense_posterior_precision(
        H, n_data=total, prior_precision=PRIOR, sigma_noise=SIGMA[likelihood], temperature=TEMPERATURE
    )
    close(la.posterior_precision.to_dense(), expected, 1e-5)


def test_laplace_torch_on_copies_agrees():
    model, X, y, _ = problem("MLP", "classification")
    hyper = hyper_parameters("classification")
    ours = posterior_of(model, "classification", hessian_structure="full", magnitudes="cross_fitted", **hyper)
    ours.fit(loader_of(X[COPIES], y[COPIES]))
    theirs = FullLaplace(model, "classification", backend=CurvlinopsGGN, **hyper)
    theirs.fit(loader_of(X[COPIES], y[COPIES]))
    close(ours.posterior_precision.to_dense(), theirs.posterior_precision, 1e-5)
    close(ours.loss, theirs.loss, 1e-5)


@pytest.mark.parametrize("given", ["copies", "weights"])
@pytest.mark.parametrize("magnitudes", ["held_out", "cross_fitted"])
def test_estimates_agree_with_the_dense_one(magnitudes, given):
    """The dense estimator takes m H of each distinct sample, and N over the mean of m as their number."""
    model, X, y, per_sample = problem("MLP", "classification")
    n_data = 400
    la = posterior_of(model, "classification", magnitudes=magnitudes, n_folds=5, **hyper_parameters("classification"))
    if given == "copies":
        dataset, m, kind = TensorDataset(X[COPIES], y[COPIES]), TIMES.double(), COPIES
    else:
        dataset, m, kind = TensorDataset(X, y, FLOATS), FLOATS, torch.arange(N_SAMPLES)
    la.fit(DataLoader(dataset, batch_size=16), n_data=n_data)
    a, b = (kind[indices] for indices in (la.split.direction_indices, la.split.magnitude_indices))
    assert sorted({*a.tolist(), *b.tolist()}) == list(range(N_SAMPLES))
    assert len(la.split.copies) == len(kind) - N_SAMPLES
    weighted = [w * H for w, H in zip(m, per_sample, strict=True)]
    options = {
        "n_data": n_data / float(m.mean()),
        "prior_precision": PRIOR,
        "sigma_noise": SIGMA["classification"],
        "temperature": TEMPERATURE,
    }
    if magnitudes == "held_out":
        assert not {*a.tolist()} & {*b.tolist()}
        expected = dense_low_rank_posterior(model, X, "classification", a, b, per_sample=weighted, **options)
    else:
        expected = dense_cross_fitted_posterior(weighted, a, la.split.folds, **options)
    close(la.posterior_precision.to_dense(), expected.posterior_precision, 1e-5)
    close(la.directional_curvatures * float(m.mean()), expected.magnitudes, 1e-5)
    close(la.standard_errors * float(m.mean()), expected.standard_errors, 1e-5)


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


# no backend knows weights of soft labels: torch.func computes then, and a warning says so
@pytest.mark.filterwarnings("ignore:.*torch.func computes the same instead:UserWarning")
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_class_weights_and_soft_labels_are_those_of_torch(kind, labels):
    """Curvature and loss of torch's cross entropy with a weight, differentiated twice by torch."""
    model, X, y, _ = problem("MLP", "classification")
    if labels == "soft":
        y = torch.softmax(torch.randn(N_SAMPLES, 3, generator=torch.Generator().manual_seed(2), dtype=X.dtype), 1)
    la = posterior_of(
        model, "classification", hessian_structure="full", magnitudes="cross_fitted", class_weights=CLASS_WEIGHTS,
        backend={"EF": AsdlEF}.get(kind, BACKENDS[kind]), **hyper_parameters("classification"),
    )  # fmt: skip
    la.fit(loader_of(X, y))
    soft = y if labels == "soft" else one_hot(y, 3).to(X)
    m = soft @ CLASS_WEIGHTS
    close(la.n_data, m.sum())
    close(la.loss, torch.nn.functional.cross_entropy(model(X), y, weight=CLASS_WEIGHTS, reduction="sum").detach())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    flat = flat_parameters(model)
    P = len(flat)

    def losses(theta):
        pieces = dict(zip(parameters, theta.split([p.numel() for p in parameters.values()]), strict=True))
        f = torch.func.functional_call(model, {n: v.view_as(parameters[n]) for n, v in pieces.items()}, (X,))
        return -(CLASS_WEIGHTS * soft * torch.log_softmax(f, 1)).sum(1)

    if kind == "Hessian":
        total = torch.func.hessian(lambda t: losses(t).sum())(flat)
        values, U = torch.linalg.eigh(total)
        total = U @ torch.diag(values.clamp(min=0)) @ U.T
    elif kind == "EF":
        g = torch.func.jacrev(losses)(flat)
        total = (g.T / m) @ g  # m (g / m) (g / m)', g being m times the gradient without weights
    else:
        total = sum(w * H for w, H in zip(m, dense_ggn(model, X, "classification")[0], strict=True)).detach()
    expected = total / TEMPERATURE + PRIOR * torch.eye(P, dtype=X.dtype)
    close(la.posterior_precision.to_dense(), expected, 1e-5)


def test_one_hot_soft_labels_are_labels():
    model, X, y, _ = problem("MLP", "classification")
    fits = []
    for target in (y, one_hot(y, 3).to(X)):
        la = posterior_of(model, "classification", backend=CurvlinopsEF, magnitudes="cross_fitted")
        la.fit(loader_of(X, target), n_data=100)
        la.optimize_prior_precision(
            method="gridsearch", val_loader=loader_of(X, target), log_prior_prec_max=7, grid_size=5
        )
        fits.append(la)
    close(fits[0].loss, fits[1].loss)
    close(*(torch.as_tensor(fit.prior_search.losses) for fit in fits))


def test_a_mapping_has_its_weights_under_sample_weights():
    class Net(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x["input_ids"])

    model, X, y, _ = problem("MLP", "classification")
    wrapped = Net(model)
    la = posterior_of(wrapped, "classification", magnitudes="cross_fitted")
    la.fit([{"input_ids": X, "labels": y, "sample_weights": FLOATS}])
    pair = posterior_of(model, "classification", magnitudes="cross_fitted")
    pair.fit([(X, y, FLOATS)])
    close(la.posterior_precision.to_dense(), pair.posterior_precision.to_dense())
    close(la({"input_ids": X, "sample_weights": FLOATS}), la({"input_ids": X}))


@pytest.mark.parametrize("given", ["copies", "weights"])
def test_held_out_kl_of_weighted_samples_is_the_exact_one(given):
    """With all the data given, the difference of two posteriors is that of their dense KLs."""
    model, X, y, per_sample = problem("MLP", "classification")
    hyper = hyper_parameters("classification")
    if given == "copies":
        order = COPIES.sort(stable=True).values  # the copies of a sample are adjacent
        dataset, m = TensorDataset(X[order], y[order]), TIMES.double()
        cut = int(TIMES[:25].sum())
    else:
        dataset, m, cut = TensorDataset(X, y, FLOATS), FLOATS, 25
    n_data = float(m.sum())
    fitted, rest = (DataLoader(Subset(dataset, part), batch_size=9) for part in (range(cut), range(cut, len(dataset))))
    n = round(n_data) if given == "copies" else n_data
    if given == "weights":
        # N is an integer where it is given: so many times the weights that it is one
        scale = 40 / n_data
        dataset = TensorDataset(X, y, FLOATS * scale)
        fitted, rest = (DataLoader(Subset(dataset, p), batch_size=9) for p in (range(cut), range(cut, len(dataset))))
        n, n_data, m = 40, 40.0, FLOATS * scale
    full = dense_posterior_precision(
        sum(w * H for w, H in zip(m, per_sample, strict=True)) / n_data,
        n_data=n_data, prior_precision=PRIOR, temperature=TEMPERATURE,
    )  # fmt: skip
    found, exact = [], []
    for magnitudes in ("same_batch", "cross_fitted"):
        la = posterior_of(model, "classification", magnitudes=magnitudes, **hyper)
        la.fit(fitted, n_data=n)
        found.append(la.held_out_kl(rest, fitted))
        exact.append(dense_kl(la.posterior_precision.to_dense(), full))
    assert found[0].standard_error < 1e-9
    close((found[0] - found[1]).value, exact[0] - exact[1], 1e-6)
    assert abs(exact[0] - exact[1]) > 0.05


@pytest.mark.parametrize("given", ["copies", "weights"])
def test_the_gain_of_the_last_stage_is_the_exact_one(given):
    """Of all the data, the gain is the difference of the KLs of both posteriors to the full batch."""
    model, X, y, per_sample = problem("MLP", "classification")
    hyper = hyper_parameters("classification")
    if given == "copies":
        # two copies of 16 of 40 samples, the first stage being 32 of the 56
        kind = torch.cat([torch.arange(N_SAMPLES), torch.arange(16)])
        dataset, m = (
            TensorDataset(X[kind], y[kind]),
            torch.ones(N_SAMPLES).double().index_add(0, kind[N_SAMPLES:], torch.ones(16).double()),
        )
    else:
        kind, m = torch.arange(N_SAMPLES), FLOATS * (N_SAMPLES / FLOATS.sum())
        dataset = TensorDataset(X, y, m)
    la = posterior_of(model, "classification", magnitudes="same_batch", **hyper)
    la.fit(DataLoader(dataset, batch_size=16), n_data=len(kind), tolerance=1e-9)
    assert [stage.n_samples for stage in la.stopping.stages] == [la.stopping.stages[0].n_samples, N_SAMPLES]
    first = la.fit_result.pool.reading_order(la.fit_result.options.seed)[:32].sort().values
    smaller = posterior_of(model, "classification", magnitudes="same_batch", **hyper)
    smaller.fit(DataLoader(Subset(dataset, first.tolist()), batch_size=16), n_data=len(kind))
    full = dense_posterior_precision(
        sum(w * H for w, H in zip(m, per_sample, strict=True)) / len(kind),
        n_data=len(kind), prior_precision=PRIOR, temperature=TEMPERATURE,
    )  # fmt: skip
    gain = dense_kl(smaller.posterior_precision.to_dense(), full) - dense_kl(la.posterior_precision.to_dense(), full)
    last = la.stopping.stages[-1]
    assert last.standard_error == 0
    close(last.gain, gain, 1e-5)
    assert gain > 0.1


def test_the_likelihood_counts_copies():
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(model, "classification", magnitudes="held_out", **hyper_parameters("classification"))
    la.fit(loader_of(X[COPIES], y[COPIES]))
    close(
        la.log_likelihood, dense_log_likelihood(model, X[COPIES], y[COPIES], "classification", temperature=TEMPERATURE)
    )
    assert f"of {len(COPIES)} samples" in repr(la)


def test_four_binary_features_can_be_fitted():
    """300 rows of 16 kinds."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randint(0, 2, (300, 4), generator=generator).double()
    y = (X.sum(1) > 2).long()
    model, _ = MODELS["MLP"](n_outputs=2)
    for magnitudes in ("held_out", "cross_fitted", "same_batch"):
        la = DebiasedLaplace(model, "classification", magnitudes=magnitudes, prior_precision=0.4)
        la.fit(loader_of(X, y))
        assert la.split.n_samples == len(X.unique(dim=0))
        assert la.n_data == 300
        assert bool(la(X[:5]).isfinite().all())
    assert diagnose(model, "classification", loader_of(X, y), batch_sizes=[32], n_draws=2).summary()


def test_a_step_is_that_of_the_weighted_mean_loss():
    model, X, y, per_sample = problem("MLP", "classification")
    step = newton_step(
        model, "classification", (X, y, FLOATS), damping=0.3, magnitudes="same_batch", shrinkage=False,
        max_iterations=200, tolerance=1e-12, stopping="none",
    )  # fmt: skip
    m = FLOATS / FLOATS.sum()
    H = sum(w * H for w, H in zip(m, per_sample, strict=True))
    losses = torch.nn.functional.cross_entropy(model(X), y, reduction="none")
    loss = float((m * losses).detach().sum())
    gradients = torch.autograd.grad((m * losses).sum(), list(model.parameters()))
    g = torch.cat([part.reshape(-1) for part in gradients])
    expected = torch.linalg.solve(H + 0.3 * torch.eye(len(g), dtype=g.dtype), -g)
    close(step.update, expected, 1e-4)
    close(step.loss, loss)
    U = torch.randn(len(g), 3, generator=torch.Generator().manual_seed(3), dtype=g.dtype)
    for data in ((X, y, FLOATS), DataLoader(TensorDataset(X, y, FLOATS), batch_size=9)):
        found = directional_derivatives(model, "classification", data, U)
        close(found.slopes, U.T @ g)
        close(found.curvatures, (U * (H @ U)).sum(0))
        close(quadratic_along(model, "classification", data, U).curvature_matrix, U.T @ H @ U)


@pytest.mark.parametrize("curvature", ["ef", pytest.param("hessian", marks=SLOW)])
def test_weights_are_factors_of_every_curvature(curvature):
    model, X, y, _ = problem("MLP", "classification")
    kind = {"ef": "EF", "hessian": "Hessian"}[curvature]
    per_sample = curvatures(kind, model, X, y, "classification")
    H = sum(w * H for w, H in zip(FLOATS / FLOATS.sum(), per_sample, strict=True))
    U = torch.randn(len(H), 3, generator=torch.Generator().manual_seed(3), dtype=H.dtype)
    found = directional_derivatives(model, "classification", (X, y, FLOATS), U, curvature=curvature)
    close(found.curvatures, (U * (H @ U)).sum(0), 1e-5)


def test_an_optimizer_takes_weights():
    _, X = MODELS["MLP"]()
    y = targets("classification")
    losses = []
    for weights in (None, torch.full((N_SAMPLES,), 3.0), FLOATS):
        net, _ = MODELS["MLP"]()
        optimizer = DebiasedNewton(net.parameters(), net, "classification", damping=0.1)
        batch = (X, y) if weights is None else (X, y, weights)
        losses.append([float(optimizer.step(lambda batch=batch: batch)) for _ in range(3)])
    close(losses[0], losses[1])
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


def wrong(weights):
    _, X, y, _ = problem("MLP", "classification")
    return [(X, y, weights)]


REFUSED = {
    "a negative weight": (lambda: wrong(torch.linspace(-1, 1, N_SAMPLES)), {}, "not negative; got -0.9"),
    "a weight that is not finite": (lambda: wrong(torch.full((N_SAMPLES,), torch.inf)), {}, "finite sample_weights"),
    "only zeros": (lambda: wrong(torch.zeros(N_SAMPLES)), {}, "positive weight"),
    "too few weights": (lambda: wrong(torch.ones(3)), {}, "sample_weights 3"),
    "a matrix of weights": (lambda: wrong(torch.ones(N_SAMPLES, 1)), {}, r"sample_weights of shape \(n,\)"),
    "weights in some batches": (
        lambda: [*wrong(torch.ones(N_SAMPLES)), problem("MLP", "classification")[1:3]],
        {},
        "all batches or in none",
    ),
    "more weight than N": (lambda: wrong(torch.full((N_SAMPLES,), 2.0)), {"n_data": 50}, "sum of their weights, 80"),
    "all samples equal": (
        lambda: [(torch.ones(9, 4, dtype=torch.float64), torch.zeros(9, dtype=torch.int64))],
        {},
        "at least 2 distinct samples",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_weights_are_refused(case):
    make, options, message = REFUSED[case]
    la = posterior_of(problem("MLP", "classification")[0], "classification")
    with pytest.raises(ValueError, match=message):
        la.fit(make(), **options)


@pytest.mark.parametrize(
    ("likelihood", "weights", "message"),
    [
        ("regression", torch.ones(3), "for likelihood='classification'"),
        ("classification", torch.tensor([1.0, -1.0, 1.0]), "none negative"),
        ("classification", "balanced", "one for each class"),
        ("classification", torch.ones(3, 1), "one number for each class"),
    ],
)
def test_wrong_class_weights_are_refused(likelihood, weights, message):
    with pytest.raises(ValueError, match=message):
        DebiasedLaplace(problem("MLP", likelihood)[0], likelihood, class_weights=weights)


def test_class_weights_of_another_number_of_classes_are_refused():
    model, X, y, _ = problem("MLP", "classification")
    with pytest.raises(ValueError, match="Expected 3 class_weights, one for each output; got 4"):
        DebiasedLaplace(model, "classification", class_weights=torch.ones(4)).fit(loader_of(X, y))


@pytest.mark.parametrize("soft", [torch.full((N_SAMPLES, 3), 0.5), torch.eye(3)[torch.zeros(N_SAMPLES).long()] * -1])
def test_soft_labels_are_probabilities(soft):
    model, X, _, _ = problem("MLP", "classification")
    with pytest.raises(ValueError, match="soft labels as probabilities"):
        posterior_of(model, "classification").fit(loader_of(X, soft))


def test_metrics_take_no_weights():
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(model, "classification")
    la.fit(loader_of(X, y))
    with pytest.raises(ValueError, match="losses are not weighted"):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(X, y, FLOATS)])


def test_samples_drawn_with_replacement_are_refused_with_the_way_out():
    model, X, y, _ = problem("MLP", "classification")
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(N_SAMPLES), N_SAMPLES, replacement=True)
    with pytest.raises(ValueError, match=r"\(inputs, targets, sample_weights\); to weight classes, use class_weights"):
        posterior_of(model, "classification").fit(DataLoader(TensorDataset(X, y), batch_size=8, sampler=sampler))


def test_a_concatenation_with_copies_is_one_sample_each():
    model, X, y, _ = problem("MLP", "classification")
    data = TensorDataset(X, y)
    la = posterior_of(model, "classification", magnitudes="held_out")
    la.fit(DataLoader(ConcatDataset([Subset(data, range(30)), Subset(data, [2, 7])]), batch_size=8))
    assert la.n_data == 32
    assert la.split.copies.tolist() == [30, 31]
    assert not torch.isin(la.split.direction_indices, la.split.magnitude_indices).any()
    state = la.state_dict()
    again = posterior_of(model, "classification", magnitudes="held_out")
    again.load_state_dict(state)
    assert again.split.total_weight == 32
    assert again.split.copies.tolist() == [30, 31]


def test_a_state_of_other_class_weights_is_refused():
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(model, "classification", class_weights=CLASS_WEIGHTS, magnitudes="cross_fitted")
    la.fit(loader_of(X[:30], y[:30]), n_data=100)
    same, other = (posterior_of(model, "classification", class_weights=w) for w in (CLASS_WEIGHTS.float(), None))
    same.load_state_dict(la.state_dict())
    first, rest = loader_of(X[:30], y[:30]), loader_of(X[30:], y[30:])
    assert abs((la.held_out_kl(rest, first) - same.held_out_kl(rest, first)).value) < 1e-9
    with pytest.raises(ValueError, match=r"has 'classification with class_weights \[0.5, 2.0, 1.25\]'"):
        other.load_state_dict(la.state_dict())
    other.fit(loader_of(X[:30], y[:30]), n_data=100)
    with pytest.raises(ValueError, match="class_weights"):
        la.held_out_kl(rest, first) - other.held_out_kl(rest, first)


@pytest.mark.parametrize("weights", [TIMES, FLOATS])
def test_a_state_of_a_part_of_weighted_data_is_loaded(weights):
    model, X, y, _ = problem("MLP", "classification")
    options = {"direction_samples": 0.3, "magnitude_samples": 0.4, "magnitudes": "held_out"}
    la = posterior_of(model, "classification", **options)
    la.fit(DataLoader(TensorDataset(X, y, weights), batch_size=16))
    used = la.split.used_indices
    assert la.n_data == pytest.approx(float(weights[used].double().mean()) * N_SAMPLES)
    again = posterior_of(model, "classification", **options)
    again.load_state_dict(la.state_dict())
    assert again.n_data == la.n_data
    close(again.posterior_precision.to_dense(), la.posterior_precision.to_dense())


def test_weights_in_single_precision_are_a_whole_number_together():
    model, X, y, _ = problem("MLP", "classification")
    for loader, options in (
        ([(X, y, torch.full((N_SAMPLES,), 1.2))], {}),
        ([(X, y)], {"class_weights": [1.2] * 3}),
    ):
        la = posterior_of(model, "classification", **options)
        la.fit(loader)
        assert la.n_data == 48
        la.fit(loader, n_data=48)


def test_weights_that_are_all_zero_are_refused_everywhere():
    model, X, y, _ = problem("MLP", "classification")
    U = torch.randn(sum(p.numel() for p in model.parameters()), 2, dtype=torch.float64)
    zero = (X, y, torch.zeros(N_SAMPLES))
    for call in (
        lambda: newton_step(model, "classification", zero),
        lambda: directional_derivatives(model, "classification", zero, U),
        lambda: quadratic_along(model, "classification", zero, U),
    ):
        with pytest.raises(ValueError, match="positive sample_weights of at least one sample"):
            call()


def test_held_out_kl_asks_for_the_weights_of_the_fit():
    model, X, y, _ = problem("MLP", "classification")
    la = posterior_of(model, "classification", magnitudes="cross_fitted")
    la.fit(DataLoader(TensorDataset(X[:30], y[:30], FLOATS[:30])), n_data=60)
    first, rest = (DataLoader(TensorDataset(X[p], y[p], FLOATS[p])) for p in (slice(30), slice(30, None)))
    assert la.held_out_kl(rest, first).value == la.held_out_kl(rest, first).value
    with pytest.raises(ValueError, match="weights that they were fitted with: expected a sum of"):
        la.held_out_kl(loader_of(X[30:], y[30:]), loader_of(X[:30], y[:30]))
    with pytest.raises(ValueError, match="sample_weights from both loaders"):
        la.held_out_kl(loader_of(X[30:], y[30:]), first)
