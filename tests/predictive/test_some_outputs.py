"""Predictions of some outputs alone are those of all outputs, indexed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace

N, CHOSEN = 12, [5, 0, -2]


def fitted(kind, **options):
    torch.manual_seed(2)
    X = torch.randn(N, 1, 3, 2).double()
    inner = {
        "vectors": nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8)),
        "tokens": nn.Sequential(nn.Flatten(2), nn.Flatten(0, 1), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8)),
        "pixels": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)),
    }[kind]
    model = nn.Sequential(inner, nn.Unflatten(1, (4, 2))) if kind == "tokens" else inner
    model = model.double()
    y = torch.randn_like(model(X))
    la = DebiasedLaplace(model, "regression", sigma_noise=0.6, prior_precision=3.0, **options)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    return la, X


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("kind", ["vectors", "tokens", "pixels"])
def test_some_outputs_are_those_of_all(kind, subset):
    last = {"vectors": "3", "tokens": "0.4", "pixels": "2"}[kind]
    options = {} if subset == "all" else {"subset_of_weights": "last_layer", "last_layer_name": last}
    la, X = fitted(kind, hessian_structure="full", **options)
    f = la.model(X).detach()
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(la.model, la._fit.selection.unflatten(w), (X,)), la.mean
    )
    covariance = la.posterior_covariance
    J = J.flatten(1, -2)[:, CHOSEN]
    mean, spread = la(X, outputs=CHOSEN)
    torch.testing.assert_close(mean, f.flatten(1)[:, CHOSEN])
    torch.testing.assert_close(spread, J @ covariance @ J.mT)
    torch.testing.assert_close(la(X, outputs=CHOSEN, diagonal_output=True)[1], spread.diagonal(dim1=1, dim2=2))
    rows = J.flatten(0, 1)
    joint_mean, joint = la(X, outputs=torch.tensor(CHOSEN), joint=True)
    torch.testing.assert_close(joint_mean, mean.flatten())
    torch.testing.assert_close(joint, rows @ covariance @ rows.T)
    for pred_type in ("glm", "nn"):
        draws = (
            la.functional_samples(X, pred_type, 5, generator=torch.Generator().manual_seed(1), **which)
            for which in ({}, {"outputs": CHOSEN})
        )
        whole, some = draws
        torch.testing.assert_close(some, whole.flatten(2)[..., CHOSEN])
    drawn = la(X, "nn", link_approx="mc", n_samples=5, generator=torch.Generator().manual_seed(1), outputs=CHOSEN)
    torch.testing.assert_close(drawn, (some.mean(0), some.var(0)))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([8], r"Expected outputs below 8, or negative ones counted from the end; got \[8\]"),
        ([-9], "Expected outputs below 8"),
        ([0.5], "Expected outputs as a vector of whole numbers"),
        ([True, False], "Expected outputs as a vector of whole numbers"),
        ([], "Expected outputs as a vector of whole numbers"),
        ([[1]], "Expected outputs as a vector of whole numbers"),
        ("all", "Expected outputs as whole numbers; got 'all'"),
    ],
)
def test_wrong_outputs_say_what_was_expected(outputs, message):
    la, X = fitted("vectors")
    with pytest.raises(ValueError, match=message):
        la(X, outputs=outputs)


def test_labels_take_all_logits_and_draws_of_some():
    X, y = torch.randn(20, 3), torch.randint(4, (20,))
    la = DebiasedLaplace(nn.Linear(3, 4), "classification", prior_precision=3.0)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=5))
    with pytest.raises(ValueError, match=r"outputs= is of means and variances; the probability of a label takes all"):
        la(X, outputs=[1])
    draws = [
        la.functional_samples(X, n_samples=4, generator=torch.Generator().manual_seed(0), outputs=chosen)
        for chosen in (None, [1, 3])
    ]
    torch.testing.assert_close(draws[1], draws[0][..., [1, 3]])
