"""Structures over subsets of the weights, and their dense counterparts: everything about all weights, then a selection.

Which positions of the flat vector belong to a subset is computed here from the model alone.
"""

import copy
from dataclasses import dataclass
from functools import cache

import torch
from models import MODELS, targets
from oracles import (
    block_diagonal,
    dense_ggn,
    dense_jacobian,
    dense_kronecker_posterior,
    dense_kronecker_product,
    dense_low_rank_posterior,
    flat_parameters,
    mean_of,
    partial_traces,
    trainable,
)
from posterior_cases import close, hyper_parameters, posterior_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

SUBSETS = ["all", "last_layer", "subnetwork"]
STRUCTURES = ["lowrank", "kron", "full"]
LIKELIHOODS = {
    "classification": ("classification", 3),
    "regression, several outputs": ("regression", 3),
    "regression, one output": ("regression", 1),
}
LAST_LAYER = {
    "transformer": "head",
    "ResNet with BatchNorm": "6",
    "reused module": "head",
    "partly frozen": "4",
    "LayerNorm and raw parameters": "head",
}
NAMES = list(LAST_LAYER)


@dataclass(frozen=True)
class Cell:
    """One of the combinations that are tested, with the model that it is tested on."""

    structure: str
    subset: str
    likelihood: str
    name: str

    @property
    def kind(self):
        return LIKELIHOODS[self.likelihood][0]

    @property
    def n_outputs(self):
        return LIKELIHOODS[self.likelihood][1]


def cells():
    """Every structure, subset and likelihood; models take turns so that each meets every structure and every subset."""
    found = {}
    for s, structure in enumerate(STRUCTURES):
        for u, subset in enumerate(SUBSETS):
            for i, likelihood in enumerate(LIKELIHOODS):
                name = NAMES[(s + 3 * u + 2 * i) % len(NAMES)]
                found[f"{structure}, {subset}, {likelihood}, {name}"] = Cell(structure, subset, likelihood, name)
    return found


CELLS = cells()


@cache
def problem(name, likelihood, n_outputs):
    """Model, inputs, targets and GGNs of every sample over all weights; never to be written to."""
    model, X = MODELS[name](n_outputs)
    per_sample = [H.detach() for H in dense_ggn(model, X, likelihood)[0]]
    return model, X, targets(likelihood, n_outputs=n_outputs), per_sample


@cache
def jacobians(name, n_outputs, n=5):
    """Jacobians (n, C, P) of the first samples over all weights."""
    model, X = MODELS[name](n_outputs)
    return torch.stack([dense_jacobian(model, x) for x in X[:n]]).detach()


def positions(name, model, subset):
    """Positions of the selected entries in the flat vector of all trainable parameters.

    From the last parameter to the first, a subnetwork has one as a whole, every other entry of the next, nothing of
    the third, the fourth as a whole, and so on.
    """
    chosen, start = [], 0
    selectable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for i, (of, p) in zip(range(len(selectable) - 1, -1, -1), selectable, strict=True):
        own = torch.arange(start, start + p.numel())
        start += p.numel()
        if subset == "all" or (subset == "last_layer" and of.startswith(LAST_LAYER[name] + ".")):
            chosen.append(own)
        elif subset == "subnetwork" and i % 4 != 2:
            chosen.append(own[::2] if i % 4 == 1 else own)
    return torch.cat(chosen)


def selected_shapes(model, indices):
    """Of every parameter with selected entries: how many, and (rows, columns) where it has a two-sided basis,

    (n, 1) where it has a one-sided one, None where it keeps its axes.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    biases = {id(layer.bias) for layer in layers}
    shapes, start = [], 0
    for p in trainable(model):
        n = int(((indices >= start) & (indices < start + p.numel())).sum())
        start += p.numel()
        whole = n == p.numel()
        if whole and p.ndim >= 2:
            shapes.append((n, (len(p), n // len(p))))
        elif whole and id(p) in biases:
            shapes.append((n, (n, 1)))
        elif n:
            shapes.append((n, None))
    return shapes


def fit(cell, n_data=40, **options):
    """A posterior of the first 30 samples, and all samples."""
    _, X, y, _ = problem(cell.name, cell.kind, cell.n_outputs)
    data = TensorDataset(X, y)
    la = unfitted(cell, **options)
    la.fit(DataLoader(Subset(data, range(30)), batch_size=8, shuffle=True), n_data=n_data)
    return la, data


def unfitted(cell, **options):
    """The posterior as a user asks for it; the last layer is left to be found."""
    model = problem(cell.name, cell.kind, cell.n_outputs)[0]
    if cell.subset == "subnetwork":
        options["subnetwork_indices"] = positions(cell.name, model, "subnetwork")
    return posterior_of(model, cell.kind, cell.subset, cell.structure, **{**hyper_parameters(cell.kind), **options})


@dataclass
class Dense:
    """What a posterior has to be: its precision over the selected entries, and everything it is made of."""

    indices: Tensor
    per_sample: list[Tensor]
    jacobians: Tensor
    center: Tensor
    in_sample: Tensor
    magnitudes: Tensor
    standard_errors: Tensor
    precision: Tensor
    likelihood_part: Tensor  # the precision without the prior

    @property
    def covariance(self):
        return torch.linalg.inv(self.precision)


def dense(la, cell):
    """The dense posterior of the samples that a posterior says it was fitted to, under its hyper-parameters."""
    model, X, _, of_all = problem(cell.name, cell.kind, cell.n_outputs)
    at = positions(cell.name, model, cell.subset)
    per_sample = [H[at][:, at] for H in of_all]
    scales = {
        "prior_precision": la.prior_precision_diag,
        "sigma_noise": float(la.sigma_noise),
        "temperature": la.temperature,
        "n_data": la.n_data,
    }
    a, b = la.split.direction_indices, la.split.magnitude_indices
    if cell.structure == "kron":
        K = la.posterior_precision.basis.to_dense().double()
        check_basis(K, mean_of(per_sample, a), selected_shapes(model, at))
        found = dense_kronecker_posterior(K, per_sample, a, b, **scales)
    else:
        full = {"threshold": 1e-10, "complement": "isotropic"} if cell.structure == "full" else {}
        found = dense_low_rank_posterior(model, X, cell.kind, a, b, per_sample=per_sample, **full, **scales)
    return Dense(
        at,
        per_sample,
        jacobians(cell.name, cell.n_outputs)[..., at],
        flat_parameters(model)[at],
        found.in_sample,
        found.magnitudes,
        found.standard_errors,
        found.posterior_precision,
        found.posterior_precision - torch.diag(la.prior_precision_diag),
    )


def check_basis(K, H, shapes):
    """Orthogonal, one block for each parameter, and the eigenvectors of the partial traces of its curvature."""
    P = len(H)
    close(K.T @ K, torch.eye(P, dtype=K.dtype), 1e-9)
    blocks, start = [], 0
    for n, matrix in shapes:
        block, own = H[start : start + n, start : start + n], K[start : start + n, start : start + n]
        start += n
        if matrix is None:
            torch.testing.assert_close(own, torch.eye(n, dtype=K.dtype))
        else:
            left, right = partial_traces(block, *matrix)
            rotated = own.T @ dense_kronecker_product(left, right) @ own
            close(rotated, torch.diag(rotated.diagonal()), 1e-9)
            by_rows = rotated.diagonal().reshape(matrix)
            tiny = 1e-9 * by_rows.max()
            assert bool((by_rows.diff(dim=0) <= tiny).all())
            assert bool((by_rows.diff(dim=1) <= tiny).all())
        blocks.append(own)
    assert torch.equal(K, block_diagonal(blocks))


def network_at(model, indices, values):
    """A copy of a model with other values of these entries of its trainable parameters."""
    other = copy.deepcopy(model)
    flat = flat_parameters(model)
    flat[indices] = values
    with torch.no_grad():
        for p, part in zip(trainable(other), flat.split([p.numel() for p in trainable(model)]), strict=True):
            p.copy_(part.reshape(p.shape))
    return other
