"""Reports of binary labels, counts and predicted noise, from posteriors to numbers."""

import numpy as np
import pytest
import torch
from likelihoods import PRIOR, N, fitted
from scipy import stats
from sklearn.metrics import mean_poisson_deviance
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, calibration_report, evaluate
from debiased_laplace.calibration import Gaussian


def drawn(la, X, batch_size):
    """The functions that `evaluate` draws."""
    return torch.cat(
        [la.functional_samples(x, generator=torch.Generator().manual_seed(0)) for x in X.split(batch_size)], dim=1
    )


def test_one_label_is_evaluated_as_two_classes(tmp_path):
    la, X, y = fitted("binary", 1)
    loader = DataLoader(TensorDataset(X, y), batch_size=11)
    for link in (None, "probit", "mc"):
        report = evaluate({"laplace": la}, loader, link_approx=link)
        assert report.task == "binary"
        p = la(X)[:, 0] if link is None else None
        if p is not None:
            nll = -(y[:, 0] * p.log() + (1 - y[:, 0]) * (1 - p).log()).mean()
            assert report.metrics["laplace"]["nll"].value == pytest.approx(float(nll), rel=1e-6)
            f = la.model(X).detach()
            of_map = la._spec.likelihood.per_sample_loss(f, y).mean()
            assert report.metrics["map"]["nll"].value == pytest.approx(float(of_map), rel=1e-6)
    report.save(tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"'laplace' has the likelihood 'binary'; got task='multiclass'"):
        evaluate({"laplace": la}, loader, task="multiclass")


@pytest.mark.parametrize("n_outputs", [2, 4])
def test_predicted_noise_is_evaluated_as_a_regression(n_outputs):
    la, X, y = fitted("heteroscedastic", n_outputs)
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(X, y), batch_size=11))
    assert report.task == "regression"
    y = y.reshape(N, -1)
    m, s = drawn(la, X, 11).chunk(2, dim=-1)
    mixture = torch.distributions.Normal(m, (s / 2).exp()).log_prob(y).sum(-1).exp().mean(0)
    T = n_outputs // 2
    assert report.metrics["laplace"]["nll"].value == pytest.approx(-float(mixture.log().mean()) / T, rel=1e-6)
    assert report.metrics["laplace"]["rmse"].value == pytest.approx(float((m.mean(0) - y).square().mean().sqrt()))
    m, s = la.model(X).detach().chunk(2, dim=1)
    nll = -torch.distributions.Normal(m, (s / 2).exp()).log_prob(y).mean()
    assert report.metrics["map"]["nll"].value == pytest.approx(float(nll), rel=1e-6)


def test_a_heteroscedastic_posterior_beside_a_regression():
    both, X, y = fitted("heteroscedastic", 2)
    single = nn.Linear(4, 1).double()
    regression = DebiasedLaplace(single, "regression", sigma_noise=0.8, prior_precision=PRIOR)
    regression.fit(DataLoader(TensorDataset(X, y), batch_size=7))
    loader = DataLoader(TensorDataset(X, y), batch_size=11)
    for posteriors in ({"r": regression, "h": both}, {"h": both, "r": regression}):
        report = evaluate({"of_r": single, "of_h": both.model, **posteriors}, loader, sigma_noise=0.8)
        m, s = both.model(X).detach().unbind(1)
        nll = -torch.distributions.Normal(m, (s / 2).exp()).log_prob(y).mean()
        assert report.metrics["of_h"]["nll"].value == pytest.approx(float(nll), rel=1e-6)
        nll = -torch.distributions.Normal(single(X).detach()[:, 0], 0.8).log_prob(y).mean()
        assert report.metrics["of_r"]["nll"].value == pytest.approx(float(nll), rel=1e-6)


@pytest.mark.parametrize("n_outputs", [2, 4])
def test_the_parts_of_a_predicted_spread_are_in_the_report(n_outputs):
    la, X, y = fitted("heteroscedastic", n_outputs)
    far = DataLoader(TensorDataset(4 * X), batch_size=11)
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(X, y), batch_size=11), ood_loaders={"far": far})
    metrics = report.metrics
    m, s = drawn(la, X, 11).chunk(2, dim=-1)
    assert metrics["laplace"]["function_std"].value == pytest.approx(m.std(0, correction=0).mean().item())
    assert metrics["laplace"]["noise_std"].value == pytest.approx(s.exp().mean(0).sqrt().mean().item())
    assert metrics["map"]["function_std"].value == 0
    # the network has no spread of its function, so that the whole one stands in
    scores = report.ood["far"].metrics
    assert set(scores["laplace"]) == {"standard_deviation", "function_std"}
    assert set(scores["map"]) == {"standard_deviation"}
    compared = {(c.score, c.baseline_score) for c in report.ood["far"].comparisons}
    assert compared == {("standard_deviation", "standard_deviation"), ("function_std", "standard_deviation")}
    means = (drawn(la, x, 11).chunk(2, dim=-1)[0] for x in (X, 4 * X))
    inside, outside = (m.std(0, correction=0).log().mean(1) for m in means)
    area = (outside[:, None] > inside).double().mean().item()
    assert scores["laplace"]["function_std"]["auroc"].value == pytest.approx(area)


def test_one_noise_for_all_samples_adds_no_score():
    X, y = torch.randn(N, 4).double(), torch.randn(N, 1).double()
    la = DebiasedLaplace(nn.Linear(4, 1).double(), "regression", sigma_noise=0.8, prior_precision=PRIOR)
    loader = DataLoader(TensorDataset(X, y), batch_size=7)
    la.fit(loader)
    report = evaluate({"laplace": la}, loader, ood_loaders={"far": loader})
    assert set(report.ood["far"].metrics["laplace"]) == {"standard_deviation"}
    assert report.metrics["laplace"]["noise_std"].value == pytest.approx(0.8)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_counts_are_evaluated_as_mixtures_of_drawn_rates(pred_type, tmp_path):
    la, X, y = fitted("poisson", 2)
    loader = DataLoader(TensorDataset(X, y), batch_size=N)
    fixed = torch.full((1, N, 2), 1.7).double()
    methods = {"laplace": la, "mine": lambda x: fixed[:, : len(x)]}
    far = DataLoader(TensorDataset(2 * X), batch_size=11)
    report = evaluate(methods, loader, pred_type=pred_type, n_samples=120, seed=4, ood_loaders={"far": far})
    f = la.functional_samples(X, pred_type, 120, generator=torch.Generator().manual_seed(4)).exp().numpy()
    of_samples = np.exp(stats.poisson.logpmf(y.numpy(), f).sum(-1)).mean(0)
    assert report.metrics["laplace"]["nll"].value == pytest.approx(-np.log(of_samples).mean() / 2)
    of_map = la.model(X).detach().exp()
    assert report.metrics["map"]["nll"].value == pytest.approx(-stats.poisson.logpmf(y, of_map).mean())
    assert report.metrics["mine"]["nll"].value == pytest.approx(-stats.poisson.logpmf(y, 1.7).mean())
    deviances = [mean_poisson_deviance(y[:, j], of_map[:, j]) for j in range(2)]
    assert report.metrics["map"]["deviance"].value == pytest.approx(np.mean(deviances))
    assert report.predicted["laplace"].n_samples == 120
    assert report.predicted["map"].n_samples is None
    report.save(tmp_path)
    assert "Poisson deviance" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=r"Expected Counts\(rates\) of every method or of none"):
        evaluate({"laplace": la, "mine": lambda x: (fixed[0], fixed[0])}, loader)


@pytest.mark.parametrize("link", [None, "probit", "mc"])
def test_every_label_is_a_row_and_those_of_a_sample_a_cluster(link):
    la, X, y = fitted("binary", 3)
    loader, names = DataLoader(TensorDataset(X, y), batch_size=11), ["sweet", "sour", "salty"]
    options = {"n_resamples": 100, "temperature_scaling": "none"}
    report = evaluate({"laplace": la}, loader, link_approx=link, class_names=names, **options)
    assert report.data.n == 3 * N
    logits = la.model(X).detach()
    p = la(X, link_approx=link or "mean_field") if link != "mc" else None
    if p is None:
        draws = [
            la.predictive_samples(x, n_samples=100, generator=torch.Generator().manual_seed(0)).mean(0)
            for x in X.split(11)
        ]
        p = torch.cat(draws)
    clusters = torch.arange(N).repeat_interleave(3)
    flat = {"map": torch.sigmoid(logits).flatten(), "laplace": p.flatten()}
    expected = calibration_report(flat, y.flatten().long(), task="binary", clusters=clusters, **options)
    for name in ("nll", "brier", "ece", "classwise_ece"):
        for method in ("map", "laplace"):
            found, wanted = report.metrics[method][name], expected.metrics[method][name]
            assert found.value == pytest.approx(wanted.value, rel=1e-6), (name, method)
            assert found.low is None or found.low == pytest.approx(wanted.low, rel=1e-5), (name, method)
    (table,) = (t for t in report.tables if t.title == "Labels")
    assert [row[0] for row in table.rows] == [*names, "mean over labels"]
    for c, row in enumerate(table.rows[:3]):
        alone = calibration_report({"laplace": p[:, c]}, y[:, c].long(), task="binary", **options).metrics["laplace"]
        cells = dict(zip(table.columns, row, strict=True))
        assert cells["share of 1"] == pytest.approx(y[:, c].mean().item())
        assert cells["laplace: NLL"] == pytest.approx(alone["nll"].value, rel=1e-6)
        assert cells["laplace: ECE"] == pytest.approx(alone["classwise_ece"].value, rel=1e-6)
        assert 0 < cells["laplace: noise floor"] < 0.4
    means = torch.tensor([row[1:] for row in table.rows[:3]]).mean(0)
    assert list(table.rows[3][1:]) == pytest.approx(means.tolist(), rel=1e-6)


def test_labels_with_positions_names_and_fewer_rows():
    torch.manual_seed(5)
    model, X = nn.Linear(4, 2).double(), torch.randn(N, 6, 4).double()
    y = torch.randint(2, (N, 6, 2)).double()
    la = DebiasedLaplace(model, "binary", prior_precision=PRIOR)
    loader = DataLoader(TensorDataset(X, y), batch_size=7)
    la.fit(loader)
    report = evaluate(
        {"laplace": la, "mine": lambda x: la(x)}, loader, link_approx="probit", temperature_scaling="none"
    )
    assert report.data.n == N * 6 * 2
    nll = nn.functional.binary_cross_entropy_with_logits(model(X), y).item()
    assert report.metrics["map"]["nll"].value == pytest.approx(nll)
    p = la(X)
    of_mine = nn.functional.binary_cross_entropy(p, y).item()
    assert report.metrics["mine"]["nll"].value == pytest.approx(of_mine)
    few = evaluate({"laplace": la}, loader, link_approx="probit", max_samples=1)
    assert len(few.tables[0].rows) == 2
    with pytest.raises(ValueError, match=r"clusters must hold an id for each of the 30 samples; got 360"):
        evaluate({"laplace": la}, loader, link_approx="probit", clusters=torch.arange(360))
    twice = evaluate({"laplace": la}, loader, link_approx="probit", class_names=["a", "a"]).tables[0]
    assert [row[0] for row in twice.rows] == ["a", "a", "mean over labels"]
    with pytest.raises(ValueError, match="class_names must have one name for each of 2 labels; got 3"):
        evaluate({"laplace": la}, loader, link_approx="probit", class_names=["a", "b", "c"])
    wrong = DataLoader(TensorDataset(X, torch.zeros(N, 6, 3)), batch_size=7)
    with pytest.raises(ValueError, match=r"Expected 2 binary labels of each sample or position; got shape \(42, 3\)"):
        evaluate({"laplace": la}, wrong, link_approx="probit")
    with pytest.raises(ValueError, match="'mine': with positions, expected probabilities as the network's outputs are"):
        evaluate({"laplace": la, "mine": lambda x: la(x).mean(0)}, loader, link_approx="probit")
    soft = DataLoader(TensorDataset(X, 0.5 * y), batch_size=7)
    with pytest.raises(ValueError, match="Targets must be whole numbers"):
        evaluate({"laplace": la}, soft, link_approx="probit")


def test_information_of_several_labels_is_that_of_each():
    la, X, y = fitted("binary", 3)
    logits = la.gaussian_logits(X)
    p, information = logits.probabilities_and_information()
    torch.testing.assert_close(p[:, 1].reshape(N, 3), la(X))
    assert information.shape == (3 * N,)
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(X, y), batch_size=11), ood_loaders={"far": [4 * X]})
    assert "mutual_information" in report.ood["far"].metrics["laplace"]


def test_a_log_variance_that_is_not_known_widens_tails_and_not_the_whole_predictive():
    # the moments of exp(s) are those of a few draws, which a Gaussian of these moments would give to all
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    X = torch.randn(50, 3)
    X[:, 2] *= 0.01
    la = DebiasedLaplace(model, "heteroscedastic", hessian_structure="full", prior_precision=0.02)
    la.fit(DataLoader(TensorDataset(X, torch.randn(50, 1)), batch_size=50))
    x = torch.tensor([[0.0, 0.0, 1.0]]).expand(40, 3) + 1e-4 * torch.randn(40, 3)
    report = evaluate({"laplace": la}, DataLoader(TensorDataset(x, torch.zeros(40, 1)), batch_size=40))
    y = la.predict(x).samples(4_000, torch.Generator().manual_seed(0))[:, :, 0]
    crps = float(y.abs().mean() - 0.5 * (y - y.flip(0)).abs().mean())
    assert la.predict(x).std.mean() > 1_000 * crps
    # of 100 draws, a few make up most of it
    assert crps / 3 < report.metrics["laplace"]["crps"].value < 3 * crps


def test_a_form_that_states_both_parts():
    mean, function = torch.zeros(40, dtype=torch.float64), torch.full((40,), 0.3, dtype=torch.float64)
    noise = torch.linspace(0.2, 0.9, 40, dtype=torch.float64)
    form = Gaussian(mean, standard_deviation=function, observation_noise=noise)
    metrics = calibration_report({"net": form, "pair": (mean, noise)}, mean + 0.1, task="regression").metrics
    assert metrics["net"]["sharpness"].value == pytest.approx((function**2 + noise**2).sqrt().mean().item())
    assert metrics["net"]["noise_std"].value == pytest.approx(noise.mean().item())
    assert "noise_std" not in metrics["pair"]
