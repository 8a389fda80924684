"""Predictions of targets, against dense Jacobians and the normal distribution."""

import math

import pytest
import torch
from models import MODELS, targets
from oracles import dense_jacobian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace

SIGMA = torch.tensor([0.4, 1.7, 0.9], dtype=torch.float64)


def regression(n_outputs=3, sigma=0.7, flat=False):
    model, X = MODELS["MLP"](n_outputs=n_outputs)
    y = targets("regression", len(X), n_outputs)
    la = DebiasedLaplace(model, "regression", sigma_noise=sigma, prior_precision=0.4, temperature=1.3)
    la.fit(DataLoader(TensorDataset(X, y[:, 0] if flat else y), batch_size=16))
    return la, X[:7]


def dense(la, X):
    J = torch.stack([dense_jacobian(la.model, x) for x in X])
    covariance = torch.linalg.inv(la.posterior_precision.to_matrix())
    return la.model(X).detach(), (J @ covariance @ J.mT).diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("sigma", [0.7, SIGMA], ids=["one noise", "one per output"])
def test_standard_deviations_include_the_observation_noise(sigma):
    la, X = regression(sigma=sigma)
    found = la.predict(X)
    mean, variance = dense(la, X)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.function_std, variance.sqrt())
    torch.testing.assert_close(found.std, (variance + torch.as_tensor(sigma) ** 2).sqrt())
    low, high = found.interval(0.9)
    normal = torch.distributions.Normal(mean, found.std)
    torch.testing.assert_close(normal.cdf(high) - normal.cdf(low), torch.full_like(mean, 0.9))
    torch.testing.assert_close(high - mean, mean - low)
    assert repr(found).startswith("RegressionPrediction(mean and std of shape (7, 3), std from")


def test_predictions_have_the_shape_of_the_targets():
    flat, X = regression(1, flat=True)
    column, _ = regression(1)
    a, b = flat.predict(X), column.predict(X)
    assert a.mean.shape == a.std.shape == a.interval()[0].shape == (7,)
    assert a.samples(4).shape == (4, 7)
    assert b.mean.shape == (7, 1)
    torch.testing.assert_close(a.std, b.std[:, 0])
    loaded = DebiasedLaplace(flat.model, "regression")
    loaded.load_state_dict(flat.state_dict())
    torch.testing.assert_close(loaded.predict(X).std, a.std)


def test_samples_are_functions_with_noise_at_every_input():
    la, X = regression(sigma=SIGMA)
    found = la.predict(X)
    J = torch.cat([dense_jacobian(la.model, x) for x in X])
    covariance = J @ torch.linalg.inv(la.posterior_precision.to_matrix()) @ J.T
    la.prior_precision = 50.0  # draws stay those of the prediction
    n = 20_000
    draws = (found.samples(n, torch.Generator().manual_seed(1)) - found.mean).flatten(1)
    expected = covariance + torch.diag(SIGMA.square().repeat(7))
    error = draws.T @ draws / n - expected
    variance = expected.diagonal()
    z = error / ((variance[:, None] * variance + expected.square()) / n).sqrt()
    assert float(z.abs().max()) < 5
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    assert float((off_diagonal / ((variance[:, None] * variance) / n).sqrt()).abs().max()) > 10  # a shared function


def test_networks_can_be_drawn_instead():
    la, X = regression()
    generator = torch.Generator().manual_seed(4)
    found = la.predict(X, "nn", n_samples=30, generator=generator)
    draws = la.functional_samples(X, "nn", 30, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found.mean, draws.mean(0))
    torch.testing.assert_close(found.std, (draws.var(0) + 0.49).sqrt())
    functions = la.functional_samples(X, "nn", 5, generator=torch.Generator().manual_seed(6))
    again = found.samples(5, torch.Generator().manual_seed(6))
    assert float((again - functions).std()) == pytest.approx(0.7, rel=0.3)


def test_classes():
    model, X = MODELS["MLP"]()
    la = DebiasedLaplace(model, "classification", prior_precision=0.4, temperature=1.3)
    la.fit(DataLoader(TensorDataset(X, targets("classification")), batch_size=16))
    found = la.predict(X[:7])
    assert torch.equal(found.probs, la(X[:7]))
    assert torch.equal(la.predict(X[:7], link_approx="probit").probs, la(X[:7], link_approx="probit"))
    drawn = found.samples(6, torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        drawn, la.predictive_samples(X[:7], n_samples=6, generator=torch.Generator().manual_seed(2))
    )
    networks = la.predict(X[:7], "nn", n_samples=9, generator=torch.Generator().manual_seed(2))
    again = la(X[:7], "nn", link_approx="mc", n_samples=9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(networks.probs, again)
    assert not hasattr(found, "std")
    with pytest.raises(ValueError, match="expected link_approx='mc'"):
        la.predict(X[:7], "nn", link_approx="probit")


class Reward(nn.Module):
    """Pairs (n, 2, 4) to two logits, single inputs to a reward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 1).double()

    def forward(self, x):
        return self.inner(x)[..., 0] if x.ndim == 3 else self.inner(x)


def test_rewards_have_no_observation_noise():
    model, X = Reward(), MODELS["MLP"]()[1]
    la = DebiasedLaplace(model, "reward_modeling", prior_precision=0.4)
    la.fit(DataLoader(TensorDataset(X.reshape(20, 2, 4), torch.arange(20) % 2), batch_size=5))
    found = la.predict(X[:7])
    torch.testing.assert_close(found.mean, model(X[:7]).detach())
    torch.testing.assert_close(found.std, la(X[:7], diagonal_output=True)[1].sqrt())


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, math.nan, True])
def test_levels_are_probabilities(level):
    la, X = regression()
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        la.predict(X).interval(level)


def test_a_plot_of_one_input_and_one_output():
    from matplotlib.figure import Figure

    x = torch.linspace(-2, 2, 20, dtype=torch.float64).flip(0)[:, None]
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    la = DebiasedLaplace(model, "regression", sigma_noise=0.3, prior_precision=0.4)
    la.fit(DataLoader(TensorDataset(x, x[:, 0].sin()), batch_size=5))
    found = la.predict(x)
    axes = found.plot(x[:, 0].sin(), level=0.9, axes=Figure().subplots())
    line, points = axes.get_lines()
    assert list(line.get_xdata()) == sorted(x[:, 0].tolist())
    assert list(line.get_ydata()) == found.mean.flip(0).tolist()
    assert len(points.get_xdata()) == 20
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    low, high = found.interval(0.9)
    assert (heights.min(), heights.max()) == pytest.approx((float(low.min()), float(high.max())))
    wide, X = regression()
    with pytest.raises(ValueError, match=r"inputs of shape .*got inputs \(7, 4\)"):
        wide.predict(X).plot()
    with pytest.raises(ValueError, match="a target for each of 20"):
        found.plot(x[:3], axes=Figure().subplots())
