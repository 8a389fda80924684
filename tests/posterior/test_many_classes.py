"""A thousand classes: the numbers of few, and no tensor of batch x C x P or batch x C x C.

The network has one hidden layer, so that its derivatives can be written down by hand.
"""

import math
from functools import cache

import pytest
import torch
from laplace.curvature import CurvlinopsEF
from posterior_cases import close, posterior_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

BATCH, INPUTS, HIDDEN, MANY = 64, 10, 16, 1000
HYPER = {"prior_precision": 0.4, "temperature": 1.3}
STOCHASTIC = {"backend_kwargs": {"stochastic": True, "num_samples": 2}}


@cache
def problem(dtype=torch.float64):
    """Model, and two batches of inputs and labels; never to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(31)
        model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, MANY)).to(dtype)
        X = torch.randn(2 * BATCH, INPUTS).to(dtype)
        labels = torch.randint(MANY, (2 * BATCH,))
    with torch.no_grad():
        model[2].weight.mul_(6)  # some classes are much likelier than others
    return model.eval(), X, labels


@cache
def fitted(dtype=torch.float64, **options):
    """A posterior that is never to be changed."""
    return fit(dtype, **options)


def fit(dtype=torch.float64, backend_kwargs=None, **options):
    model, X, labels = problem(dtype)
    la = posterior_of(model, "classification", backend_kwargs=backend_kwargs, **{**HYPER, **options})
    la.fit(DataLoader(TensorDataset(X, labels), batch_size=BATCH), n_data=200)
    return la


def parts(model, u):
    """A flat vector as the four parameters."""
    sizes = [p.numel() for p in model.parameters()]
    return [piece.reshape(p.shape) for piece, p in zip(u.split(sizes), model.parameters(), strict=True)]


@torch.no_grad()
def pushed(model, X, u):
    """J u (n, C) by the product rule."""
    W, b, V, _ = model.parameters()
    dW, db, dV, dc = parts(model, u)
    h = torch.tanh(X @ W.T + b)
    dh = (1 - h**2) * (X @ dW.T + db)
    return h @ dV.T + dh @ V.T + dc


@torch.no_grad()
def pulled(model, X, g):
    """The sum over samples of J' g (P,) by the chain rule, for g (n, C)."""
    W, b, V, _ = model.parameters()
    h = torch.tanh(X @ W.T + b)
    dh = (g @ V) * (1 - h**2)
    return torch.cat([(dh.T @ X).flatten(), dh.sum(0), (g.T @ h).flatten(), g.sum(0)])


def weighted(p, d):
    """(diag(p) - p p') d of each sample."""
    return p * (d - (p * d).sum(1, keepdim=True))


def quadratics(model, X, u):
    """u' H_n u of each sample."""
    p, d = torch.softmax(model(X).detach(), 1), pushed(model, X, u)
    return (d * weighted(p, d)).sum(1)


def test_curvature_along_the_directions():
    la = fitted(rank=5, solver="lanczos")
    model, X, _ = problem()
    a, b = X[la.split.direction_indices], X[la.split.magnitude_indices]
    f = len(a) / 200
    p = torch.softmax(model(a).detach(), 1)
    for i, u in enumerate(la.directions.T):
        Hu = pulled(model, a, weighted(p, pushed(model, a, u))) / len(a)
        in_sample = la.in_sample_curvatures[i]
        assert float((Hu - in_sample * u).norm()) < 1e-7 * float(la.in_sample_curvatures[0])
        close(in_sample, quadratics(model, a, u).mean(), rtol=1e-8)
        of_b = quadratics(model, b, u)
        close(la.directional_curvatures[i], f * in_sample + (1 - f) * of_b.mean(), rtol=1e-8)
        unseen = 1 - len(b) / (200 - len(a))
        close(la.standard_errors[i], (1 - f) * (unseen / len(b)) ** 0.5 * of_b.std(), rtol=1e-8)
    # none larger was missed: deflated power iteration from a random start stays below the last one
    x = torch.randn(len(la.directions), dtype=X.dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(30):
        x = x - la.directions @ (la.directions.T @ x)
        x = x / x.norm()
        x = pulled(model, a, weighted(p, pushed(model, a, x))) / len(a)
    assert float(x.norm()) < float(la.in_sample_curvatures[-1]) * (1 + 1e-9)


def test_predictions():
    la = fitted(rank=5, solver="lanczos")
    model, X, _ = problem()
    J = torch.stack([pulled(model, X[:1], unit[None]) for unit in torch.eye(MANY, dtype=X.dtype)])
    # Woodbury: (delta I + U M U')^-1
    U, M = la.directions, torch.diag(1 / (200 / HYPER["temperature"] * la.directional_curvatures))
    delta = HYPER["prior_precision"]
    JU = J @ U
    gain = JU @ torch.linalg.inv(M + torch.eye(5, dtype=J.dtype) / delta) @ JU.T / delta**2
    variance = (J @ J.T / delta - gain).diagonal()
    f = model(X[:1]).detach()
    expected = torch.softmax(f / (1 + math.pi / 8 * variance).sqrt(), 1)
    close(la(X[:1], link_approx="probit"), expected)
    assert not torch.allclose(expected, torch.softmax(f, 1), rtol=0.05)
    mean, found = la._glm_predictive_distribution(X[:1], diagonal_output=True)
    close(mean, f)
    close(found[0], variance)


def test_drawn_targets_are_unbiased_for_the_exact_curvature():
    la = fit(rank=5, **STOCHASTIC)
    model, X, _ = problem()
    f = len(la.split.direction_indices) / 200
    for i, u in enumerate(la.directions.T):
        exact, variance = 0.0, 0.0
        for weight, indices in ((f, la.split.direction_indices), (1 - f, la.split.magnitude_indices)):
            x = X[indices]
            p, d = torch.softmax(model(x).detach(), 1), pushed(model, x, u)
            of_target = (d - (p * d).sum(1, keepdim=True)) ** 2  # u' g g' u for every target that may be drawn
            mean = (p * of_target).sum(1)
            exact += weight * float(mean.mean())
            variance += weight**2 * float(((p * of_target**2).sum(1) - mean**2).sum()) / 2 / len(x) ** 2
        z = (float(la.directional_curvatures[i]) - exact) / variance**0.5
        assert abs(z) < 4
        assert variance**0.5 < 0.5 * exact  # power: twice the exact curvature would be noticed
    # the draws that the directions were chosen among are not those of the magnitudes
    assert float(la.in_sample_curvatures.sum()) > 1.5 * float(la.directional_curvatures.sum())


class LargestTensors(TorchDispatchMode):
    """Shapes of everything that any operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out

    def largest(self):
        return max(math.prod(shape) for shape in self.shapes)

    def squares_of_outputs(self, n):
        """Shapes that hold classes x classes for each of n samples."""
        return [shape for shape in self.shapes if shape.count(MANY) > 1 and n in shape]


FITS = {
    "low rank by products": {"rank": 5, "solver": "lanczos"},
    "low rank, solver of its own choice": {"rank": 5},
    "low rank, drawn targets": {"rank": 5, **STOCHASTIC},
    "low rank with a diagonal, drawn targets": {"rank": 5, "complement": "diagonal", **STOCHASTIC},
    "Kronecker, drawn targets": {"hessian_structure": "kron", **STOCHASTIC},
    "Kronecker in K-FAC's basis, drawn targets": {"hessian_structure": "kron", "kron_basis": "kfac", **STOCHASTIC},
    "low rank, empirical Fisher": {"rank": 5, "backend": CurvlinopsEF},
}


# torch.func takes the place of a backend that is not right
@pytest.mark.filterwarnings("ignore:CurvlinopsEF cannot compute")
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", FITS)
def test_memory_of_a_fit(name, subset):
    with LargestTensors() as made:
        la = fit(torch.float32, subset_of_weights=subset, **FITS[name])
    P = la.selection.n_parameters
    assert la.n_outputs == MANY
    assert not la.fit_result.estimate.curvature.directions.requires_grad
    # the rows of two drawn targets a sample, and nothing larger
    assert made.largest() <= 2 * BATCH * P
    assert made.squares_of_outputs(BATCH) == []


def test_memory_of_exact_rows():
    # a subnetwork's rows are short, but a backward pass computes whole parameters
    indices = torch.arange(0, 17176, 700)
    with LargestTensors() as made:
        la = fit(
            torch.float32,
            subset_of_weights="subnetwork",
            hessian_structure="full",
            subnetwork_indices=indices,
            direction_samples=4,
            magnitude_samples=4,
        )
    assert la.selection.n_parameters == 25
    assert made.largest() <= MANY * 17176
    assert made.squares_of_outputs(4) == []


@cache
def of_last_layer(structure):
    options = {"rank": 5} if structure == "lowrank" else {"kron_basis": "kfac"}
    return fit(torch.float32, subset_of_weights="last_layer", hessian_structure=structure, **options, **STOCHASTIC)


CALLS = {
    "mean field": lambda la, x: la(x),
    "scores": lambda la, x: la.gaussian_logits(x).probabilities_and_information()[0],
    "probit": lambda la, x: la(x, link_approx="probit"),
    "drawn networks": lambda la, x: la(x, pred_type="nn", link_approx="mc", n_samples=3),
    "draws of every output on its own": lambda la, x: la(x, link_approx="mc", diagonal_output=True, n_samples=3),
    "functions": lambda la, x: la.functional_samples(x, n_samples=5),
    "functions of drawn networks": lambda la, x: la.functional_samples(x, pred_type="nn", n_samples=3),
    "outputs on their own": lambda la, x: la.functional_samples(x, n_samples=5, diagonal_output=True),
    "predictions": lambda la, x: la.predictive_samples(x, n_samples=5),
}


@pytest.mark.parametrize("structure", ["lowrank", "kron"])
@pytest.mark.parametrize("name", CALLS)
def test_memory_of_predictions(name, structure):
    la = of_last_layer(structure)
    x = problem(torch.float32)[1][:3]
    with LargestTensors() as made:
        out = CALLS[name](la, x)
    assert out.shape[-2:] == (3, MANY)
    assert made.largest() <= MANY * la.selection.n_parameters
    assert made.squares_of_outputs(3) == []


def test_draws_cost_no_jacobian():
    la = fitted(torch.float32, rank=5)
    x = problem(torch.float32)[1][:BATCH]
    with LargestTensors() as made:
        la.functional_samples(x, n_samples=5)
        la(x, pred_type="nn", link_approx="mc", n_samples=5)
    assert made.largest() <= 5 * BATCH * MANY


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_memory_of_prior_tuning_and_of_the_held_out_kl():
    la = fit(torch.float32, rank=5, subset_of_weights="last_layer")
    X, labels = problem(torch.float32)[1:]
    P = la.selection.n_parameters
    with LargestTensors() as made:
        la.optimize_prior_precision(n_steps=3)
        assert float(la.prior_precision) != HYPER["prior_precision"]
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=[(X[:3], labels[:3])],
            grid_size=2,
            log_prior_prec_max=0.0,
            loss=lambda out, y: out.square().sum(),
        )
        new = torch.utils.data.TensorDataset(X[:2] + 1, labels[:2])
        with pytest.warns(UserWarning, match="exact share is missing"):
            la.held_out_kl(DataLoader(new))
    assert made.largest() <= MANY * P
    assert made.squares_of_outputs(3) == []
