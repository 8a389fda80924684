"""Outputs with positions: tokens of sequences and pixels of images, some of which do not count."""

import math
import re

import pytest
import torch
from likelihoods import Ordinal
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, directional_derivatives, evaluate
from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.positions import IGNORED, OutputLayout, PositionWise

N, T, C = 14, 5, 3
PRIOR, TEMPERATURE = 3.0, 0.7
OPTIONS = {"prior_precision": PRIOR, "temperature": TEMPERATURE}


class Tagger(nn.Module):
    """Tokens (n, T) to outputs (n, T, C), each of which depends on its neighbours."""

    def __init__(self, n_outputs=C):
        super().__init__()
        self.embed, self.mix = nn.Embedding(6, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x):
        return self.head(self.mix(self.embed(x).mT).tanh().mT)


class Segmenter(nn.Module):
    """Images (n, 1, 3, 2) to outputs (n, C, 3, 2)."""

    def __init__(self, n_outputs=C):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, n_outputs, 1))

    def forward(self, x):
        return self.layers(x)


def made(kind):
    """Model, inputs and targets; the last number of `kind` is that of outputs at a position."""
    torch.manual_seed(5)
    g = torch.Generator().manual_seed(6)
    name, _, likelihood = kind.partition(" ")
    n_outputs = {"classification": C, "heteroscedastic": 2 if name == "tokens" else 4}.get(likelihood, 2)
    model = (Tagger if name == "tokens" else Segmenter)(n_outputs).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    positions = (T,) if name == "tokens" else (3, 2)
    X = torch.randint(6, (N, T), generator=g) if name == "tokens" else torch.randn(N, 1, 3, 2, generator=g).double()
    last = name == "tokens"

    def real(k):
        shape = (N, *positions, k) if last else (N, k, *positions)
        return torch.randn(shape, generator=g, dtype=torch.float64)

    if likelihood == "classification":
        y = torch.randint(C, (N, *positions), generator=g)
        # some tokens, a whole sample and most of another do not count
        y[torch.rand(y.shape, generator=g) < 0.2] = IGNORED
        y[3] = IGNORED
        y[4].view(-1)[1:] = IGNORED
    elif likelihood == "binary":
        y = (real(2) > 0).double()
    elif likelihood == "poisson":
        y = real(2).abs().round()
    else:
        y = real(n_outputs // 2 if likelihood == "heteroscedastic" else 2)
    return model, X, y, likelihood


KINDS = [
    "tokens classification",
    "pixels classification",
    "tokens binary",
    "tokens regression",
    "pixels regression",
    "tokens poisson",
    "tokens heteroscedastic",
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def fitted(kind, **options):
    model, X, y, likelihood = made(kind)
    noise = {"sigma_noise": 0.6} if likelihood == "regression" else {}
    la = DebiasedLaplace(model, likelihood, **{**OPTIONS, **noise, **options})
    la.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    return la, X, y


class Oracle:
    """Dense quantities, position by position."""

    def __init__(self, la, X, y):
        model, base = la.model, likelihood_named(la.likelihood)
        parameters = {k: p.detach() for k, p in model.named_parameters()}
        J = jacrev(lambda p: self.by_position(functional_call(model, p, (X,))))(parameters)
        self.J = torch.cat([j.flatten(3) for j in J.values()], dim=3)  # (n, T, C, P)
        self.f = self.by_position(model(X).detach())
        n, t, c = self.f.shape
        labels = la.likelihood == "classification"
        targets = y.flatten(1) if labels else self.by_position(y)
        self.counts = (targets != IGNORED) if labels else torch.ones(n, t, dtype=torch.bool)
        y = targets.clamp_min(0) if labels else targets
        each = base.per_sample_loss(self.f.flatten(0, 1), y.flatten(0, 1)).view(n, t)
        self.losses = (each * self.counts).sum(1)
        L = base.hessian(self.f.flatten(0, 1)).view(n, t, c, c) * self.counts[..., None, None]
        g = base.gradient(self.f.flatten(0, 1), y.flatten(0, 1)).view(n, t, c) * self.counts[..., None]
        self.H = torch.einsum("ntcp,ntcd,ntdq->npq", self.J, L, self.J)
        self.g = torch.einsum("ntcp,ntc->np", self.J, g)
        P = self.J.shape[-1]
        sigma = float(la.sigma_noise)
        self.weight = 1 / (TEMPERATURE * sigma**2)
        self.precision = self.weight * self.H.sum(0) + PRIOR * torch.eye(P).double()

    @staticmethod
    def by_position(values):
        return values.movedim(1, -1).flatten(1, 2) if values.ndim == 4 else values


def in_layout(values, like):
    """Values (n, T, C) as the model's outputs are."""
    return values if like.ndim == 3 else values.unflatten(1, (3, 2)).movedim(-1, 1)


@every_kind
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_the_full_posterior_of_all_data_is_the_dense_one(kind, sampling):
    la, X, y = fitted(kind, hessian_structure="full", magnitudes="same_batch", sampling=sampling)
    oracle = Oracle(la, X, y)
    torch.testing.assert_close(la.posterior_precision.to_dense(), oracle.precision, rtol=1e-6, atol=1e-7)
    assert float(la.loss) == pytest.approx(float(oracle.losses.sum()))
    covariance = torch.einsum("ntcp,pq,ntdq->ntcd", oracle.J, torch.linalg.inv(oracle.precision), oracle.J)
    with torch.no_grad():
        raw = la.model(X)
    if la.likelihood in ("classification", "binary"):
        found = la(X)
        assert found.shape == raw.shape
        draws = la(X, link_approx="mc", n_samples=4_000, generator=torch.Generator().manual_seed(1))
        assert draws.shape == raw.shape
        assert float((draws - found).abs().max()) < 0.04
    else:
        mean, variance = la(X, diagonal_output=True)
        torch.testing.assert_close(mean, raw)
        torch.testing.assert_close(
            variance, in_layout(covariance.diagonal(dim1=-2, dim2=-1), raw), rtol=1e-5, atol=1e-9
        )
        whole = la(X)[1]
        assert whole.ndim == raw.ndim + 1
    functions = la.functional_samples(X, n_samples=3)
    assert functions.shape == (3, *raw.shape)
    evidence = -oracle.weight * oracle.losses.sum() - 0.5 * (
        torch.linalg.slogdet(oracle.precision)[1] - len(la.mean) * math.log(PRIOR) + PRIOR * la.mean @ la.mean
    )
    if la.likelihood == "regression":
        evidence = evidence - raw.numel() * math.log(float(la.sigma_noise) * math.sqrt(2 * math.pi))
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(evidence))


@every_kind
@pytest.mark.parametrize(
    "options",
    [{}, {"hessian_structure": "kron"}, {"rank": 5, "magnitudes": "held_out", "complement": "diagonal"}],
    ids=["low rank", "Kronecker", "held out"],
)
def test_drawn_rows_of_positions(kind, options):
    la, X, y = fitted(kind, n_rows=60, **options)
    oracle = Oracle(la, X, y)
    n_positions = oracle.f.shape[1]
    rows = la.rows.positions
    assert rows.shape[1] == 3
    assert int(rows[:, 1].max()) < n_positions
    # none of a position that does not count
    assert bool(oracle.counts[rows[:, 0], rows[:, 1]].all())
    trace = float(la._fit.estimate.curvature.precision(1.0, torch.zeros(()).double() + 1e-9).to_dense().trace())
    assert trace == pytest.approx(float(oracle.H.mean(0).trace()), rel=0.5)
    kl = la.held_out_kl(DataLoader(TensorDataset(X, y), batch_size=6), n_rows=10_000)
    P = la.posterior_precision.to_dense()
    expected = 0.5 * ((torch.linalg.inv(P) @ oracle.precision).trace() + P.logdet())
    assert kl.value == pytest.approx(float(expected), rel=1e-6)
    other = DebiasedLaplace(la.model, la.likelihood, **{**OPTIONS, **options})
    other.load_state_dict(la.state_dict())
    torch.testing.assert_close(other(X), la(X))


def test_one_position_is_none():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)[:, None]

    X, y = torch.randn(20, 4).double(), torch.arange(20) % 3
    posteriors = []
    for model, targets in ((inner, y), (One(), y[:, None])):
        la = DebiasedLaplace(model, "classification", sampling="uniform", rank=6, magnitudes="held_out", **OPTIONS)
        la.fit(DataLoader(TensorDataset(X, targets), batch_size=6))
        posteriors.append(la)
    plain, with_position = posteriors
    torch.testing.assert_close(with_position.directional_curvatures, plain.directional_curvatures)
    torch.testing.assert_close(with_position(X), plain(X)[:, None])
    torch.testing.assert_close(with_position.log_marginal_likelihood(), plain.log_marginal_likelihood())


def test_positions_of_a_sample_are_no_samples():
    la, _, _ = fitted("tokens classification", hessian_structure="full", magnitudes="same_batch")
    assert la.n_data == N
    assert la.rows.n <= N * T * C
    assert len(la.split.direction_indices) <= N


@pytest.mark.parametrize("kind", ["tokens classification", "pixels classification", "tokens regression"])
def test_slopes_and_curvatures_along_directions(kind):
    model, X, y, likelihood = made(kind)
    la, _, _ = fitted(kind)
    la.sigma_noise = None if likelihood != "regression" else 1.0
    oracle = Oracle(la, X, y)
    U = torch.linalg.qr(torch.randn(oracle.H.shape[1], 2, generator=torch.Generator().manual_seed(0)).double())[0]
    found = directional_derivatives(model, likelihood, DataLoader(TensorDataset(X, y), batch_size=5), U)
    torch.testing.assert_close(found.curvatures, (U * (oracle.H.mean(0) @ U)).sum(0))
    torch.testing.assert_close(found.slopes, U.T @ oracle.g.mean(0))


@pytest.mark.parametrize("kind", ["tokens classification", "tokens regression", "tokens poisson"])
@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:.*than the plain network", "ignore:sigma_noise")
def test_the_prior_is_tuned_by_losses_of_whole_samples(kind):
    la, X, y = fitted(kind)
    loader = DataLoader(TensorDataset(X, y), batch_size=6)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader, log_prior_prec_min=-1, log_prior_prec_max=2, grid_size=4
    )
    found = la.prior_search
    if kind == "tokens classification":
        log_p = la(X).log()
        counts = y != IGNORED
        losses = -(log_p.gather(2, y.clamp_min(0)[..., None])[..., 0] * counts).sum(1)
        assert str(f"{float(losses.mean()):.4g}") in str(found)


def test_a_prediction_of_tokens_has_their_shape():
    la, X, y = fitted("tokens heteroscedastic")
    p = la.predict(X)
    assert p.mean.shape == p.std.shape == y.shape
    assert p.samples(4).shape == (4, *y.shape)
    assert p.interval(0.9)[0].shape == y.shape
    la, X, y = fitted("pixels regression")
    p = la.predict(X)
    assert p.mean.shape == p.std.shape == y.shape
    draws = p.samples(3_000, torch.Generator().manual_seed(0))
    assert float(((draws.mean(0) - p.mean) / p.std).abs().max()) < 4.5 / 3_000**0.5
    torch.testing.assert_close(draws.std(0), p.std, rtol=0.08, atol=0)
    la, X, y = fitted("tokens classification")
    assert la.predict(X).samples(2).shape == (2, N, T, C)


@pytest.mark.parametrize("kind", ["tokens poisson", "pixels poisson", "pixels heteroscedastic"])
def test_moments_of_targets_at_positions_are_those_of_their_draws(kind):
    la, X, y = fitted(kind)
    p = la.predict(X)
    assert p.mean.shape == p.std.shape == y.shape
    f, variance = (Oracle.by_position(x) for x in la(X, diagonal_output=True))
    mean = noise = (f + variance / 2).exp()
    if kind == "pixels heteroscedastic":
        mean, noise = f[..., :2], mean[..., 2:]
    torch.testing.assert_close(Oracle.by_position(p.mean), mean)
    torch.testing.assert_close(Oracle.by_position(p.noise_std).square(), noise)
    draws = p.samples(3_000, torch.Generator().manual_seed(0))
    assert draws.shape == (3_000, *y.shape)
    assert float(((draws.mean(0) - p.mean) / p.std).abs().max()) < 4.5 / 3_000**0.5
    low, high = p.interval(0.8)
    covered = ((draws >= low) & (draws <= high)).double().mean(0)
    assert float(covered.min()) > 0.76
    assert kind.endswith("poisson") or float(covered.max()) < 0.84
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(X, y), batch_size=4))
    assert report.metrics["map"]["nll"].value == pytest.approx(float(Oracle(la, X, y).losses.sum() / y.numel()))


def test_the_representation_says_which_axis_is_the_class():
    assert "outputs (n, T, 3)" in repr(fitted("tokens classification")[0])
    assert "outputs (n, 3, H, W)" in repr(fitted("pixels classification")[0])
    assert str(OutputLayout(2, 3)) == "(n, 2, D, H, W)"
    assert str(OutputLayout(2, 4)) == "(n, 2, …, D, H, W)"


def test_sequences_of_other_lengths():
    model, X, y, _ = made("tokens classification")
    data = [(x[:3], t[:3]) if i < 6 else (x, t) for i, (x, t) in enumerate(zip(X, y, strict=True))]

    def padded(samples):
        # each batch to its own longest sequence
        tokens, labels = zip(*samples, strict=True)
        pad = nn.utils.rnn.pad_sequence
        return pad(tokens, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORED)

    la = DebiasedLaplace(model, "classification", hessian_structure="full", magnitudes="same_batch", **OPTIONS)
    la.fit(DataLoader(data, batch_size=3, collate_fn=padded))
    assert la(X[:2, :4]).shape == (2, 4, C)
    short, long = Oracle(la, X[:6, :3], y[:6, :3]), Oracle(la, X[6:], y[6:])
    expected = short.precision + long.precision - PRIOR * torch.eye(len(la.mean)).double()
    torch.testing.assert_close(la.posterior_precision.to_dense(), expected, rtol=1e-6, atol=1e-7)


WRONG = {
    "classes first": (lambda m, y: (nn.Sequential(m, Transposed()), y), r"return outputs\.mT from the model"),
    "a label for each sample": (lambda m, y: (m, y[:, 0].abs()), r"targets of shape \(8, 5\).*got shape \(8,\)"),
    "a label too large": (lambda m, y: (m, y.masked_fill(y == 1, 7)), "between 0 and 2 for 3 outputs; got"),
    "probabilities": (lambda m, y: (nn.Sequential(m, nn.Softmax(-1)), y), "outputs are probabilities"),
}


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


@pytest.mark.parametrize("case", WRONG)
def test_wrong_targets_and_outputs_say_what_was_expected(case):
    model, X, y, _ = made("tokens classification")
    change, message = WRONG[case]
    model, y = change(model, y)
    with pytest.raises(ValueError, match=message):
        DebiasedLaplace(model, "classification").fit(DataLoader(TensorDataset(X, y), batch_size=8))


def test_what_is_not_built_for_positions_says_so():
    la, X, _ = fitted("tokens classification")
    with pytest.raises(ValueError, match="expected la"):
        la.gaussian_logits(X)
    la, X, _ = fitted("tokens regression")
    with pytest.raises(ValueError, match="joint=True"):
        la(X, joint=True)
    assert re.search("regression", repr(la))


@pytest.mark.parametrize("kind", ["tokens classification", "pixels classification"])
def test_positions_that_count_are_rows_of_a_report_clustered_by_sample(kind):
    la, X, y = fitted(kind)
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    for link in ("mean_field", "mc"):
        report = evaluate({"laplace": la}, loader, link_approx=link)
        oracle = Oracle(la, X, y)
        counts = int(oracle.counts.sum())
        assert report.data.n == counts
        # a sample of which nothing counts is in no cluster
        assert f"in {int(oracle.counts.any(1).sum())} clusters" in " ".join(report.warnings)
        labels = y.flatten(1)[oracle.counts]
        log_p = Oracle.by_position(la(X)).log()[oracle.counts]
        nll = -log_p.gather(1, labels[:, None]).mean()
        alone = -oracle.f.log_softmax(-1)[oracle.counts].gather(1, labels[:, None]).mean()
        tolerance = 1e-6 if link == "mean_field" else 0.1
        assert report.metrics["laplace"]["nll"].value == pytest.approx(float(nll), rel=tolerance)
        assert report.metrics["map"]["nll"].value == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize("kind", ["tokens regression", "pixels regression", "tokens heteroscedastic"])
def test_regressions_with_positions_are_reported(kind):
    la, X, y = fitted(kind)
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(X, y), batch_size=4))
    if "heteroscedastic" in kind:
        draws = [la.functional_samples(x, generator=torch.Generator().manual_seed(0)) for x in X.split(4)]
        m, s = torch.cat(draws, dim=1).chunk(2, dim=-1)
        nll = -torch.distributions.Normal(m, (s / 2).exp()).log_prob(y).exp().mean(0).log().mean()
    else:
        p = la.predict(X)
        nll = -torch.distributions.Normal(p.mean, p.std).log_prob(y).mean()
    assert report.metrics["laplace"]["nll"].value == pytest.approx(float(nll), rel=1e-6)
    assert report.data.n == y.numel() // (1 if "hetero" in kind else 2)


@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:.*than the plain network", "ignore:sigma_noise")
def test_targets_of_one_output_at_a_position_may_be_flat():
    torch.manual_seed(0)
    model, X = Tagger(1).double(), torch.randint(6, (15, T))
    y = model(X)[..., 0].detach() + 0.1 * torch.randn(15, T).double()
    found = []
    for targets in (y, y[..., None]):
        la = DebiasedLaplace(model, "regression", prior_precision=PRIOR)
        la.fit(DataLoader(TensorDataset(X, targets), batch_size=4))
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=DataLoader(TensorDataset(X, targets), batch_size=5),
            grid_size=3,
            log_prior_prec_min=-1,
            log_prior_prec_max=1,
        )
        p = la.predict(X)
        assert p.mean.shape == p.samples(2)[0].shape == targets.shape
        found.append((float(la.sigma_noise), float(la.prior_precision)))
    assert found[0] == pytest.approx(found[1])
    assert found[0][0] == pytest.approx(0.1, rel=0.3)


def test_drawing_from_a_prediction_leaves_a_model_in_training_mode_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
    X, y = torch.randn(12, 1, 1, 2).double(), torch.randint(2, (12, 1, 2))
    model.train()
    la = DebiasedLaplace(model, "classification", **OPTIONS)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    p, before = la.predict(X), model[1].running_mean.clone()
    assert p.samples(2).shape == (2, 12, 2, 1, 2)
    assert torch.equal(model[1].running_mean, before)


def test_an_own_likelihood_with_positions_predicts_its_targets():
    class Sign(Ordinal):
        name = "sign"

    X = torch.randint(6, (12, T))
    la = DebiasedLaplace(Tagger(1).double(), Sign(), **OPTIONS)
    la.fit(DataLoader(TensorDataset(X, X % 4), batch_size=4))
    p = la.predict(X)
    assert p.mean.shape == (12, T)
    assert p.interval(0.5)[0].shape == (12, T)
    assert 0 <= float(p.mean.min()) <= float(p.mean.max()) <= 3


@pytest.mark.parametrize("wrong", ["transposed", "flat", "classes last"])
def test_targets_of_other_positions_than_the_images_are_refused(wrong):
    model, X, y, _ = made("pixels classification")
    if wrong == "classes last":
        likelihood, targets = "regression", torch.randn(N, 3, 2, C).double()
    else:
        likelihood, targets = "classification", y.mT.contiguous() if wrong == "transposed" else y.reshape(N, 1, 6)
    with pytest.raises(ValueError, match=r"targets of shape \(8, 3, 2\) for outputs \(8, 3, 3, 2\)"):
        DebiasedLaplace(model, likelihood).fit(DataLoader(TensorDataset(X, targets), batch_size=8))


@pytest.mark.parametrize("length", [4, 6])
def test_wrong_validation_and_test_targets_say_what_was_expected(length):
    la, X, _ = fitted("tokens classification")
    wrong = DataLoader(TensorDataset(X, torch.randint(C, (N, length))), batch_size=4)
    with pytest.raises(ValueError, match=r"targets of shape \(4, 5\) for outputs \(4, 5, 3\), classes last; got"):
        la.optimize_prior_precision(method="gridsearch", val_loader=wrong)
    with pytest.raises(ValueError, match=rf"a target for each of 20 positions of a batch's outputs; got {4 * length}"):
        evaluate({"laplace": la}, wrong)
    with pytest.raises(ValueError, match=r"a target for each position of the outputs; got shape \(4,\)"):
        evaluate({"laplace": la}, DataLoader(TensorDataset(X, X[:, 0] % C), batch_size=4))


def test_a_report_draws_some_of_many_positions():
    la, X, y = fitted("pixels classification")
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    assert evaluate({"laplace": la}, loader, max_samples=20).data.n == 20
    ids = torch.arange(N) // 2
    report = evaluate({"laplace": la}, loader, clusters=ids)
    counted = (y != IGNORED).flatten(1).any(1)
    assert f"in {len(ids[counted].unique())} clusters" in " ".join(report.warnings)
    with pytest.raises(ValueError, match=rf"an id for each of the {N} samples; got {N - 1}"):
        evaluate({"laplace": la}, loader, clusters=torch.arange(N - 1))


def test_a_report_needs_positions_that_count():
    la, X, _ = fitted("tokens classification")
    with pytest.raises(ValueError, match="Expected positions that count; the labels of all of them are -100"):
        evaluate({"laplace": la}, DataLoader(TensorDataset(X, torch.full((N, T), IGNORED)), batch_size=4))


def test_draws_are_averaged_in_chunks(monkeypatch):
    la, X, _ = fitted("tokens classification")
    found = []
    for n_bytes in (2**27, 3 * N * T * C * 8):
        monkeypatch.setattr("debiased_laplace.predictive.predictive.CHUNK_BYTES", n_bytes)
        generator = torch.Generator().manual_seed(1)
        found.append(la(X, link_approx="mc", n_samples=10, generator=generator))
    torch.testing.assert_close(found[1], found[0])


def test_columns_of_a_root_are_those_of_their_positions():
    kind = PositionWise(likelihood_named("classification"), OutputLayout(C, 1))
    f = torch.randn(2, T * C, generator=torch.Generator().manual_seed(0)).double()
    whole = kind.root(f, slice(None))
    torch.testing.assert_close(whole @ whole.mT, kind.hessian(f))
    for chosen in (slice(0, 1), slice(2, 7), slice(6, 9), slice(13, 15), slice(4, 4), slice(10, 99)):
        torch.testing.assert_close(kind.root(f, chosen), whole[..., chosen])
        torch.testing.assert_close(kind.root(f[0], chosen), whole[0][..., chosen])
