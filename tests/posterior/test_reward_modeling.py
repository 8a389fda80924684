"""Reward models: fitted to which of a pair was preferred, asked for the reward of a single input.

The model is laplace-torch's example: it takes pairs (n, 2, d) to two logits, and singles (n, d) to one reward.
"""

import math

import pytest
import torch
from laplace import FullLaplace
from oracles import dense_ggn, dense_jacobian, dense_kronecker_posterior, dense_low_rank_posterior
from posterior_cases import close, loader_of, mean_field, posterior_of
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

N, PRIOR, TEMPERATURE = 40, 0.4, 1.3


class Reward(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(31)
            self.inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.eval()

    def forward(self, x):
        if x.ndim == 3:
            return self.inner(x.reshape(-1, x.shape[-1])).reshape(-1, 2)
        return self.inner(x)


def data():
    generator = torch.Generator().manual_seed(32)
    pairs = torch.randn(N, 2, 3, generator=generator, dtype=torch.float64)
    return pairs, torch.randint(2, (N,), generator=generator)


SUBSETS = {"all": torch.arange(26), "last_layer": torch.arange(20, 26), "subnetwork": torch.arange(3, 21)}


def fitted(subset, structure, **options):
    pairs, preferred = data()
    given = {"prior_precision": PRIOR, "temperature": TEMPERATURE, **options}
    if subset == "subnetwork":
        given["subnetwork_indices"] = SUBSETS[subset]
    la = posterior_of(Reward(), "reward_modeling", subset, structure, **given)
    la.fit(DataLoader(Subset(TensorDataset(pairs, preferred), range(30)), batch_size=8), n_data=N)
    return la


def dense_precision(la, subset, structure):
    """A classification of two classes, whose logits are the rewards of a pair."""
    at = SUBSETS[subset]
    per_sample = [H.detach()[at][:, at] for H in dense_ggn(la.model, data()[0], "classification")[0]]
    a, b = la.split.direction_indices, la.split.magnitude_indices
    scales = {"n_data": N, "prior_precision": PRIOR, "temperature": TEMPERATURE}
    if structure == "kron":
        K = la.posterior_precision.basis.to_dense()
        return dense_kronecker_posterior(K, per_sample, a, b, **scales).posterior_precision, per_sample
    full = {"threshold": 1e-10, "complement": "isotropic"} if structure == "full" else {}
    dense = dense_low_rank_posterior(
        la.model, data()[0], "classification", a, b, per_sample=per_sample, **full, **scales
    )
    return dense.posterior_precision, per_sample


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("structure", ["lowrank", "kron", "full"])
def test_against_the_dense_posterior(structure, subset):
    la = fitted(subset, structure)
    precision, per_sample = dense_precision(la, subset, structure)
    close(la.posterior_precision.to_dense(), precision)
    covariance = torch.linalg.inv(precision)
    at, pairs = SUBSETS[subset], data()[0]
    singles = pairs[:4, 0]
    # rewards of single inputs, as in regression
    J = torch.stack([dense_jacobian(la.model, x) for x in singles]).detach()[..., at]
    mean, variance = la(singles)
    assert mean.shape == (4, 1)
    assert variance.shape == (4, 1, 1)
    close(mean, la.model(singles).detach())
    close(variance, J @ covariance @ J.mT)
    joint_mean, joint = la(singles, joint=True)
    close(joint_mean, mean.flatten())
    close(joint, J.flatten(0, 1) @ covariance @ J.flatten(0, 1).T)
    # which one of a pair is preferred, as in classification
    J = torch.stack([dense_jacobian(la.model, x) for x in pairs[:4]]).detach()[..., at]
    f = la.model(pairs[:4]).detach()
    spread = J @ covariance @ J.mT
    shrunk = f / (1 + math.pi / 8 * spread.diagonal(dim1=1, dim2=2)).sqrt()
    close(la(pairs[:4], fitting=True, link_approx="probit"), torch.softmax(shrunk, -1))
    close(la(pairs[:4], fitting=True), mean_field(f, spread))
    draws = la.functional_samples(singles, n_samples=3, generator=torch.Generator().manual_seed(1))
    assert draws.shape == (3, 4, 1)
    same = la.predictive_samples(singles, n_samples=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(same, draws)
    # nets at drawn weights, both ways
    mean, variance = la(singles, pred_type="nn", link_approx="mc", n_samples=5)
    assert mean.shape == variance.shape == (4, 1)
    probabilities = la(pairs[:4], pred_type="nn", link_approx="mc", n_samples=5, fitting=True)
    close(probabilities.sum(-1), torch.ones(4))
    check_held_out_kl(la, covariance, per_sample)


def check_held_out_kl(la, covariance, per_sample):
    whole = TensorDataset(*data())
    found = la.held_out_kl(DataLoader(Subset(whole, range(30, 40))), DataLoader(Subset(whole, range(30))))
    P0 = PRIOR * torch.eye(len(covariance), dtype=torch.float64)
    full = sum(per_sample) / TEMPERATURE + P0
    value = 0.5 * (torch.trace(covariance @ full) - torch.linalg.slogdet(covariance)[1])
    assert found.value == pytest.approx(float(value), rel=1e-8)


def test_every_direction_of_all_the_data_is_laplace_torchs():
    pairs, preferred = data()
    ours = posterior_of(
        Reward(),
        "reward_modeling",
        "all",
        "full",
        magnitudes="same_batch",
        prior_precision=PRIOR,
        temperature=TEMPERATURE,
    )
    theirs = FullLaplace(Reward(), "reward_modeling", prior_precision=PRIOR, temperature=TEMPERATURE)
    for la in (ours, theirs):
        la.fit(loader_of(pairs, preferred, batch_size=N))
    close(ours.posterior_precision.to_dense(), theirs.posterior_precision, 1e-5)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), 1e-6)
    for found, expected in zip(ours(pairs[:5, 1]), theirs(pairs[:5, 1]), strict=True):
        close(found, expected, 1e-5)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_grid_search_on_pairs(pred_type):
    la = fitted("all", "lowrank")
    pairs, preferred = (t[30:] for t in data())
    grid = torch.logspace(-2, 2, 5, dtype=torch.float64)
    scores = []
    for prior in grid:
        la.prior_precision = prior
        link = "mc" if pred_type == "nn" else "probit"
        noise = torch.Generator().manual_seed(0)
        p = la(pairs, pred_type=pred_type, link_approx=link, n_samples=30, generator=noise, fitting=True)
        scores.append(float(-p.gather(1, preferred[:, None]).log().mean()))
    best = min(range(5), key=scores.__getitem__)
    assert len({round(s, 5) for s in scores}) == 5
    la.prior_precision = PRIOR
    options = {"pred_type": pred_type, "n_samples": 30, "grid_size": 5}
    search = {"log_prior_prec_min": -2.0, "log_prior_prec_max": 2.0, "val_loader": [(pairs, preferred)], **options}
    if best in (0, 4):
        with pytest.warns(UserWarning, match="edge of the grid"):
            la.optimize_prior_precision(method="gridsearch", **search)
    else:
        la.optimize_prior_precision(method="gridsearch", **search)
    assert float(la.prior_precision) == pytest.approx(float(grid[best]))


def test_evidence_and_state():
    la = fitted("last_layer", "kron")
    before = float(la.log_marginal_likelihood(torch.tensor(6.0)))
    la.optimize_prior_precision(n_steps=8, init_prior_prec=6.0)
    assert float(la.log_marginal_likelihood()) > before + 0.05
    loaded = posterior_of(la.model, "reward_modeling", "last_layer", "kron")
    loaded.load_state_dict(la.state_dict())
    singles = data()[0][:4, 0]
    for found, expected in zip(loaded(singles), la(singles), strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="Expected likelihood 'classification'; the state has 'reward_modeling'"):
        posterior_of(la.model, "classification", "last_layer", "kron").load_state_dict(la.state_dict())


def test_what_a_reward_model_is_not_given():
    with pytest.raises(ValueError, match=r"(?i)sigma.noise.*regression"):
        posterior_of(Reward(), "reward_modeling", sigma_noise=0.7)
    la = posterior_of(Reward(), "reward_modeling", prior_precision=PRIOR)
    pairs, preferred = data()
    with pytest.raises(ValueError, match="at least 2 outputs"):
        la.fit(loader_of(pairs[:, 0], preferred))
    with pytest.raises(ValueError, match="integers of shape"):
        la.fit(loader_of(pairs, preferred.double()))
