"""Which samples rows are drawn from: streams, augmented, weighted, equal ones, some of N; and how many rows."""

import copy
import pickle

import pytest
import torch
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian
from models import MODELS
from oracles import dense_empirical_fisher, dense_ggn, dense_hessian, dense_jacobian, dense_posterior_precision
from posterior_cases import PRIOR, TEMPERATURE, close, hyper_parameters, loader_of, posterior_of
from test_drawn_rows import all_rows, check_over_draws, trained
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

ALL = 10**6
OPTIONS = {**hyper_parameters("classification"), "sampling": "curvature", "seed": 3, "magnitudes": "cross_fitted"}


@pytest.fixture(scope="module")
def sure():
    """A network that is sure of most of 400 samples, and their mean curvature."""
    model, X, y = trained()
    return model, X, y, sum(H.detach() for H in dense_ggn(model, X, "classification")[0]) / len(X)


def of_rows(model, loader, *, n_data=None, **options):
    la = posterior_of(model, "classification", **{**OPTIONS, **options})
    la.fit(loader, n_data=n_data)
    return la


def dense_of(H, n_data):
    return dense_posterior_precision(H, n_data=n_data, prior_precision=PRIOR, temperature=TEMPERATURE)


def same_up_to_the_threshold(found, expected):
    """Equal, but for directions below a millionth of the largest eigenvalue, which are left out."""
    assert float((found - expected).abs().max()) < 5e-6 * float(expected.abs().max())


def batches_of(X, y, size=50, weights=None):
    parts = [X, y] if weights is None else [X, y, weights]
    return [tuple(t[i : i + size] for t in parts) for i in range(0, len(X), size)]


class Stream(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        yield from zip(self.X, self.y, strict=True)


def test_any_iterable_of_batches_is_read_once(sure):
    """A generator, a list and a stream give the rows of a loader with positions."""
    model, X, y, _ = sure
    expected = of_rows(model, loader_of(X, y), n_rows=100)
    passes = []

    def generator():
        passes.append(1)
        yield from batches_of(X, y)

    for loader in (generator(), batches_of(X, y, size=33), DataLoader(Stream(X, y), batch_size=64)):
        la = of_rows(model, loader, n_rows=100)
        assert torch.equal(la.rows.positions, expected.rows.positions)
        close(la.posterior_precision.to_dense(), expected.posterior_precision.to_dense())
        close(la.loss, expected.loss)
        assert la.n_data == 400
    assert passes == [1]


class Noisy(Dataset):
    """Another version of a sample each time; all versions are remembered."""

    def __init__(self, X, y):
        self.X, self.y, self.seen = X, y, []

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        x = self.X[i] + 0.1 * torch.randn(4, dtype=torch.float64)
        self.seen.append((i, x))
        return x, self.y[i]


def test_augmented_samples_are_used_as_they_were_scored(sure):
    model, X, y, _ = sure
    data = Noisy(X[:60], y[:60])
    la = of_rows(model, DataLoader(data, batch_size=16), n_rows=ALL)
    last = dict(data.seen[:60])  # the pass comes first, the check for random loading later
    assert len(last) == 60
    H = sum(h.detach() for h in dense_ggn(model, torch.stack([last[i] for i in range(60)]), "classification")[0]) / 60
    same_up_to_the_threshold(la.posterior_precision.to_dense(), dense_of(H, 60))


@pytest.mark.parametrize("kind", ["sample_weights", "class_weights", "both"])
def test_weights_multiply_the_curvature(sure, kind):
    model, X, y, _ = sure
    X, y = X[:60], y[:60]
    of_samples = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    of_samples[::7] = 0
    of_classes = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    weights = {"sample_weights": of_samples, "class_weights": of_classes[y], "both": of_samples * of_classes[y]}[kind]
    options = {} if kind == "sample_weights" else {"class_weights": of_classes}
    loader = batches_of(X, y, 20, None if kind == "class_weights" else of_samples)
    la = of_rows(model, loader, n_rows=ALL, **options)
    per_sample = dense_ggn(model, X, "classification")[0]
    H = sum(w * h.detach() for w, h in zip(weights, per_sample, strict=True)) / weights.sum()
    assert la.n_data == pytest.approx(float(weights.sum()))
    same_up_to_the_threshold(la.posterior_precision.to_dense(), dense_of(H, float(weights.sum())))
    drawn = of_rows(model, loader, n_rows=40, magnitudes="same_batch", complement="none", **options)
    # trace by inverse probability, with the weights in the rows and in their probabilities
    positions, _, rows = drawn.rows.positions.unbind(1)
    assert bool((weights[positions] > 0).all())
    norms = all_rows(model, X, y, "classification").square().sum(2)
    trace = (weights[positions] * norms[positions, rows] / drawn.rows.inclusion_probabilities).sum() / weights.sum()
    close(drawn.directional_curvatures.sum(), trace, 1e-4)


def test_equal_samples_are_one_with_their_number_as_weight(sure):
    """Their rows are drawn together, in one backward pass."""
    model, X, y, _ = sure
    chosen = torch.tensor([*range(40), *range(12), *range(5)])
    weights = torch.bincount(chosen).double()
    copies = of_rows(model, batches_of(X[chosen], y[chosen], 19), n_rows=ALL)
    weighted = of_rows(model, batches_of(X[:40], y[:40], 40, weights), n_rows=ALL)
    assert copies.rows.n == weighted.rows.n
    assert copies.n_data == weighted.n_data == 57
    close(copies.posterior_precision.to_dense(), weighted.posterior_precision.to_dense())
    few = of_rows(model, batches_of(X[chosen], y[chosen], 19), n_rows=30, magnitudes="held_out", n_data=100)
    positions = few.rows.positions
    assert len({(float(X[chosen][i, 0]), int(j)) for i, _, j in positions}) == len(positions)


@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_all_rows_of_some_samples_are_the_uniform_estimate(sure, structure):
    """With one sample a fold, which fold a sample is dealt to does not matter: values, errors and complement agree."""
    model, X, y, _ = sure
    found = [
        of_rows(
            model, loader_of(X[:20], y[:20]), n_data=50, n_folds=20, hessian_structure=structure, complement="diagonal"
            if structure == "lowrank" else None, **options,
        )
        for options in ({"n_rows": ALL}, {"sampling": "uniform"})
    ]  # fmt: skip
    rows, samples = found
    assert rows.rows.known_share == pytest.approx(20 / 50)
    close(rows.directional_curvatures, samples.directional_curvatures, 1e-5)
    close(rows.standard_errors, samples.standard_errors, 1e-5)
    close(rows.posterior_precision.to_dense(), samples.posterior_precision.to_dense(), 1e-5)
    close(rows.confidence_intervals(), samples.confidence_intervals(), 1e-4)
    close(rows.loss, samples.loss)


@pytest.mark.slow
@pytest.mark.parametrize("magnitudes", ["held_out", "cross_fitted"])
def test_some_samples_have_little_bias_and_honest_errors(sure, magnitudes):
    """Rows of 160 of the 400 samples, against the curvature of all 400 along the same directions."""
    model, X, y, H = sure
    chosen = [torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:160] for seed in range(80)]
    posteriors = [
        of_rows(
            model, [(X[some], y[some])], n_data=400, n_rows=60, rank=5, seed=seed, magnitudes=magnitudes,
            complement="none",
        )
        for seed, some in enumerate(chosen)
    ]  # fmt: skip
    check_over_draws(posteriors, H, magnitudes, (0.5, 1.7))


@pytest.mark.parametrize("magnitudes", ["same_batch", "cross_fitted", "held_out"])
def test_hessians_draw_samples(sure, magnitudes):
    model, X, y, _ = sure
    X, y = X[:60], y[:60]
    options = {"backend": CurvlinopsHessian, "magnitudes": magnitudes, "rank": 4, "complement": "none"}
    la = of_rows(model, loader_of(X, y), n_rows=ALL, **options)
    H = dense_hessian(model, X, y, "classification")[1]
    U = la.directions
    close(la.directional_curvatures, (U * (H @ U)).sum(0).clamp_min(0), 1e-4)
    some = of_rows(model, loader_of(X, y), n_rows=60, **options)
    # 20 samples have as many rows; each is drawn as a whole
    assert 10 < some.rows.n < 30
    assert set(some.rows.positions[:, 2].tolist()) == {0}
    if magnitudes == "same_batch":
        per_sample = torch.stack(dense_hessian(model, X, y, "classification")[0])
        w = 1 / (60 * some.rows.inclusion_probabilities)
        values = torch.linalg.eigvalsh((w[:, None, None] * per_sample[some.rows.positions[:, 0]]).sum(0))
        close(some.directional_curvatures, values.flip(0)[:4].clamp_min(0), 1e-4)


def test_instead_of_monte_carlo_rows_those_of_the_ggn_are_drawn(sure):
    model, X, y, _ = sure
    found = [
        of_rows(model, loader_of(X, y), n_rows=80, backend=backend, backend_kwargs=kwargs)
        for backend, kwargs in ((CurvlinopsGGN, {"stochastic": True}), (None, None))
    ]
    close(*(la.posterior_precision.to_dense() for la in found))


def test_a_further_loader_goes_on_with_the_draw(sure):
    """The posterior is that of a single fit of all samples, overlap or not; the earlier one stays as it was."""
    model, X, y, _ = sure
    la = of_rows(model, [(X[:200], y[:200])], n_rows=100)
    before, first = copy.deepcopy(la), la.posterior_precision.to_dense()
    la.fit([(X[150:], y[150:])], override=False)
    both = of_rows(model, [(X, y)], n_rows=100)
    assert la.n_data == both.n_data == 400
    close(la.posterior_precision.to_dense(), both.posterior_precision.to_dense())
    close(la.loss, both.loss)
    close(before.posterior_precision.to_dense(), first)
    with pytest.raises(ValueError, match="all of them fitted before"):
        la.fit([(X[:50], y[:50])], override=False)
    with pytest.raises(ValueError, match="yields others at every pass"):
        la.fit(DataLoader(Noisy(X, y), batch_size=64), override=False)
    uniform = posterior_of(model, "classification", **{**OPTIONS, "sampling": "uniform"})
    uniform.load_state_dict(la.state_dict())
    with pytest.raises(ValueError, match="goes on with the sampling of the earlier fit, 'curvature'; got 'uniform'"):
        uniform.fit([(X, y)], override=False)


def test_after_loading_a_state_the_loader_yields_the_fitted_samples_again(sure):
    model, X, y, _ = sure
    la = of_rows(model, [(X[:200], y[:200])], n_rows=100)
    again = posterior_of(model, "classification", **OPTIONS, n_rows=100)
    again.load_state_dict(la.state_dict())
    with pytest.raises(ValueError, match=r"\d+ of \d+ are missing"):
        again.fit([(X[200:], y[200:])], override=False)
    again.fit([(X, y)], override=False)
    close(again.posterior_precision.to_dense(), of_rows(model, [(X, y)], n_rows=100).posterior_precision.to_dense())


def test_a_prior_per_parameter_is_fitted_to_the_same_rows(sure):
    model, X, y, _ = sure
    prior = torch.linspace(1, 2, 67, dtype=torch.float64)
    la = of_rows(model, loader_of(X, y), n_rows=100, complement=None)
    pickled = pickle.loads(pickle.dumps(la))
    la.prior_precision = prior
    direct = of_rows(model, loader_of(X, y), n_rows=100, complement=None, prior_precision=prior)
    close(la.posterior_precision.to_dense(), direct.posterior_precision.to_dense())
    assert torch.equal(la.rows.positions, direct.rows.positions)
    assert pickled.fit_result.drawn is None
    with pytest.raises(ValueError, match="not in a state or a pickle"):
        pickled.prior_precision = prior


def test_rows_are_doubled_until_that_gains_little(sure):
    model, X, y, _ = sure
    la = posterior_of(model, "classification", **OPTIONS, n_rows=800, complement="kron")
    la.fit(loader_of(X, y), tolerance=1.0)
    stopping = la.stopping
    assert [stage.n_samples for stage in stopping.stages] == [128, 256, 512]
    assert 0.8 * 512 < la.rows.n < 1.2 * 512
    assert "rows gained" in str(stopping)
    # the gain is the difference of the KLs to the full batch
    smaller, larger = (of_rows(model, loader_of(X, y), n_rows=n, complement="kron") for n in (256, 512))
    exact = (
        smaller.held_out_kl(loader_of(X, y), n_rows=ALL).value - larger.held_out_kl(loader_of(X, y), n_rows=ALL).value
    )
    stage = stopping.stages[-1]
    assert abs(stage.gain - exact) < 4 * stage.standard_error + 1e-6
    with pytest.raises(ValueError, match="judged by rows of all 500 samples; the loader yields 400"):
        posterior_of(model, "classification", **OPTIONS).fit(loader_of(X, y), tolerance=1.0, n_data=500)


def test_open_options_are_chosen_by_rows_that_no_trial_has_seen(sure):
    model, X, y, H = sure
    la = of_rows(model, loader_of(X, y), n_rows=90, magnitudes="auto", complement="auto")
    choice = la.choice
    assert "rows (optimistic)" in str(choice)
    # of the differences between trials, the estimates are right within their errors
    exact = {}
    full = dense_of(H, 400)
    for trial in (choice.chosen, *(r.trial for r in choice.runners_up)):
        chosen = trial.options
        one = of_rows(
            model, loader_of(X, y), n_rows=90, magnitudes=chosen.magnitudes, complement=chosen.complement, n_folds=4,
            direction_samples=trial.direction_share if chosen.magnitudes == "held_out" else 0.5,
        )  # fmt: skip
        P = one.posterior_precision.to_dense()
        exact[trial] = 0.5 * float(torch.linalg.solve(P, full).trace() + torch.linalg.slogdet(P).logabsdet)
    for runner_up in choice.runners_up:
        difference = exact[runner_up.trial] - exact[choice.chosen]
        assert abs(runner_up.excess - difference) < 4.5 * runner_up.standard_error + 1e-6


def test_a_uniform_sample_can_be_of_as_many_rows(sure):
    model, X, y, _ = sure
    la = of_rows(model, loader_of(X, y), n_rows=90, sampling="uniform")
    assert la.rows is None
    assert la.split.n_samples == 30  # of three rows each
    assert la.n_data == 400
    other = of_rows(model, loader_of(X, y), n_rows=90, sampling="uniform", seed=4)
    assert not torch.equal(la.split.direction_indices, other.split.direction_indices)
    with pytest.raises(ValueError, match="n_rows with sampling='uniform' is of a new fit"):
        la.fit([(X + 1, y)], override=False)


@pytest.mark.parametrize("scale", [1e-10, 1e-20])
def test_tiny_curvatures_do_not_underflow_in_single_precision(scale):
    """A float32 network that is sure of all samples: lambda down to 1e-20, whose square is zero in float32."""
    model, X = MODELS["MLP"]()
    model = copy.deepcopy(model).float()
    X = X.float()
    with torch.no_grad():
        model[-1].weight.mul_(1e-3)
        model[-1].bias.copy_(torch.tensor([0.0, float(torch.tensor(scale).log()), -200.0]))
    y = torch.zeros(len(X), dtype=torch.int64)
    la = posterior_of(model, "classification", **{**OPTIONS, "prior_precision": 1e-18}, rank=3, n_rows=40)
    la.fit(loader_of(X, y))
    exact = copy.deepcopy(model).double()
    H = torch.zeros(la.n_params, la.n_params, dtype=torch.float64)
    for x in X.double():
        p = torch.softmax(exact(x[None])[0].detach(), 0)
        # e_c - p without cancellation: 1 - p of the first class is the sum of the others
        E = torch.eye(3, dtype=torch.float64) - p
        E[0, 0] = p[1:].sum()
        J = dense_jacobian(exact, x)
        H += (J.T @ E.T) @ (p[:, None] * (E @ J)) / len(X)
    U = la.directions.double()
    truth = (U * (H @ U)).sum(0)
    assert 0 < float(truth[0]) < 100 * scale
    torch.testing.assert_close(la.directional_curvatures[:1].double(), truth[:1], rtol=0.2, atol=0)


def test_an_empirical_fisher_of_some_samples_is_exact_where_all_rows_are_drawn(sure):
    model, X, y, _ = sure
    la = of_rows(model, TensorLoader(X[:60], y[:60]), n_rows=ALL, backend=CurvlinopsEF)
    H = dense_empirical_fisher(model, X[:60], y[:60], "classification")[1]
    same_up_to_the_threshold(la.posterior_precision.to_dense(), dense_of(H, 60))


class TensorLoader:
    """An iterable of batches that is no DataLoader and has no length."""

    def __init__(self, X, y):
        self.data = TensorDataset(X, y)

    def __iter__(self):
        return iter(DataLoader(self.data, batch_size=7))
