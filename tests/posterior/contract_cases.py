"""The cells of the contract (estimator, subset, likelihood, network, backend), and the dense posterior of each.

Everything is computed for all weights and then selected; which positions of the flat vector belong to a subset is
found here from the model alone.
"""

import copy
from dataclasses import dataclass
from functools import cache

import torch
from backend_cases import BACKENDS
from models import MODELS, targets
from oracles import (
    block_diagonal,
    dense_cross_fitted_posterior,
    dense_empirical_fisher,
    dense_folds,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
    dense_kronecker_posterior,
    dense_kronecker_product,
    dense_low_rank_posterior,
    dense_posterior_precision,
    flat_parameters,
    mean_of,
    partial_traces,
    trainable,
)
from posterior_cases import close, hyper_parameters, posterior_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

Shapes = list[tuple[int, tuple[int, int] | None]]
SUBSETS = ["all", "last_layer", "subnetwork"]
LIKELIHOODS = {
    "classification": ("classification", 3),
    "regression": ("regression", 3),
    "one output": ("regression", 1),
    "two classes": ("classification", 2),
}
LAST_LAYER = {
    "MLP": "4",
    "transformer": "head",
    "ResNet with BatchNorm": "6",
    "reused module": "head",
    "convolutions and pooling": "7",
    "LayerNorm and raw parameters": "head",
    "BatchNorm": "7",
    "partly frozen": "4",
}
CROSS_FITTED = {"magnitudes": "cross_fitted", "n_folds": 5}
SAME_BATCH = {"magnitudes": "same_batch"}
# ranks that are multiples of 3: a regression's last layer has every eigenvalue once for each output
ESTIMATORS = {
    "low rank": {},
    "low rank of 3 by Lanczos, isotropic": {"rank": 3, "solver": "lanczos", "complement": "isotropic"},
    "low rank, diagonal": {"complement": "diagonal"},
    "low rank of 6, Kronecker": {"rank": 6, "complement": "kron"},
    "low rank, isotropic, unequal halves": {
        "complement": "isotropic",
        "direction_samples": 17,
        "magnitude_samples": 9,
    },
    "low rank, same batch": SAME_BATCH,
    "low rank of 3, diagonal, same batch": {"rank": 3, "complement": "diagonal", **SAME_BATCH},
    "low rank, Kronecker, same batch": {"complement": "kron", **SAME_BATCH},
    "low rank, cross-fitted": CROSS_FITTED,
    "low rank of 3, isotropic, cross-fitted": {"rank": 3, "complement": "isotropic", **CROSS_FITTED},
    "low rank, diagonal, cross-fitted": {"complement": "diagonal", **CROSS_FITTED},
    "low rank of 6, Kronecker, cross-fitted": {"rank": 6, "complement": "kron", **CROSS_FITTED},
    "Kronecker": {"hessian_structure": "kron"},
    "Kronecker, same batch": {"hessian_structure": "kron", **SAME_BATCH},
    "Kronecker by factors": {"hessian_structure": "kron", "kron_magnitudes": "kronecker"},
    "Kronecker in K-FAC's basis": {"hessian_structure": "kron", "kron_basis": "kfac"},
    "Kronecker, cross-fitted": {"hessian_structure": "kron", **CROSS_FITTED},
    "full": {"hessian_structure": "full"},
    "full, same batch": {"hessian_structure": "full", **SAME_BATCH},
    "full, cross-fitted": {"hessian_structure": "full", **CROSS_FITTED},
}
N_GIVEN, N_DATA = 30, 50


@dataclass(frozen=True)
class Cell:
    """One combination."""

    estimator: str
    subset: str
    likelihood: str
    model: str
    backend: str = "None"

    @property
    def options(self) -> dict:
        return {"hessian_structure": "lowrank", **ESTIMATORS[self.estimator]}

    @property
    def structure(self) -> str:
        return self.options["hessian_structure"]

    @property
    def kind(self) -> str:
        return LIKELIHOODS[self.likelihood][0]

    @property
    def in_basis(self) -> bool:
        """Whether there is a Kronecker basis, which mixes the entries of a parameter tensor."""
        return self.structure == "kron" or self.options.get("complement") == "kron"

    @property
    def problem(self) -> tuple:
        return problem(self.model, self.kind, LIKELIHOODS[self.likelihood][1], BACKENDS[self.backend].kind)

    @property
    def positions(self) -> Tensor:
        return positions(self.model, self.problem[0], self.subset)


FURTHER = [  # frozen weights, two classes, and backends
    Cell("full, same batch", "all", "classification", "partly frozen"),
    Cell("Kronecker, cross-fitted", "all", "regression", "partly frozen"),
    Cell("low rank, diagonal", "all", "two classes", "MLP", "CurvlinopsEF"),
    Cell("full", "subnetwork", "regression", "partly frozen", "CurvlinopsEF"),
    Cell("Kronecker", "all", "classification", "MLP", "CurvlinopsEF"),
    Cell("low rank, cross-fitted", "subnetwork", "two classes", "partly frozen", "CurvlinopsEF"),
    Cell("low rank, same batch", "all", "two classes", "partly frozen", "CurvlinopsHessian"),
    Cell("Kronecker", "subnetwork", "one output", "partly frozen", "CurvlinopsHessian"),
    Cell("Kronecker, same batch", "all", "two classes", "partly frozen", "CurvlinopsGGN"),
    Cell("low rank, isotropic, unequal halves", "last_layer", "regression", "MLP", "CurvlinopsGGN"),
    Cell("full, cross-fitted", "subnetwork", "classification", "MLP", "CurvlinopsGGN"),
]


def cells() -> dict[str, Cell]:
    """Every estimator over every subset, where likelihoods and models take turns, and further cells."""
    likelihoods, models = list(LIKELIHOODS)[:3], list(LAST_LAYER)[:-1]
    found = []
    for e, estimator in enumerate(ESTIMATORS):
        for s, subset in enumerate(SUBSETS):
            # Lanczos has a cheap one
            model = "reused module" if "Lanczos" in estimator else models[(e + 2 * s) % len(models)]
            found.append(Cell(estimator, subset, likelihoods[(e + s) % 3], model))
    found += FURTHER
    return {
        "; ".join([c.estimator, c.subset, c.likelihood, c.model, c.backend]).removesuffix("; None"): c for c in found
    }


CELLS = cells()


@cache
def problem(name: str, likelihood: str, n_outputs: int, curvature: str = "GGN"):
    """Model, inputs, targets and curvatures of every sample over all weights; never to be written to."""
    model, X = MODELS[name](n_outputs)
    y = targets(likelihood, n_outputs=n_outputs)
    if curvature == "GGN":
        per_sample = dense_ggn(model, X, likelihood)[0]
    else:
        per_sample = {"EF": dense_empirical_fisher, "Hessian": dense_hessian}[curvature](model, X, y, likelihood)[0]
    return model, X, y, [H.detach() for H in per_sample]


@cache
def jacobians(name: str, n_outputs: int, n: int = 3) -> Tensor:
    """Jacobians (n, C, P) of the first samples over all weights."""
    model, X = MODELS[name](n_outputs)
    return torch.stack([dense_jacobian(model, x) for x in X[:n]]).detach()


def positions(name: str, model: nn.Module, subset: str) -> Tensor:
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


def selected_shapes(model: nn.Module, indices: Tensor) -> Shapes:
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


def unfitted(cell: Cell, **options):
    """The posterior as a user asks for it; the last layer is left to be found."""
    if cell.subset == "subnetwork":
        options["subnetwork_indices"] = cell.positions
    asked = {**hyper_parameters(cell.kind), **cell.options, **BACKENDS[cell.backend].arguments, "prior_mean": 0.3}
    return posterior_of(cell.problem[0], cell.kind, cell.subset, **{**asked, **options})


def loader(cell: Cell, samples: Tensor) -> DataLoader:
    return DataLoader(Subset(TensorDataset(*cell.problem[1:3]), samples.tolist()), batch_size=8)


@dataclass
class Dense:
    """What a posterior has to be, over the selected entries."""

    indices: Tensor
    shapes: Shapes
    per_sample: list[Tensor]
    jacobians: Tensor
    center: Tensor
    directions: Tensor | None  # None in a Kronecker basis
    in_sample: Tensor | None
    magnitudes: Tensor
    standard_errors: Tensor | None
    curvature: Tensor  # the estimate of the mean curvature

    def precision(self, prior: Tensor, sigma: float, temperature: float) -> Tensor:
        scales = {"prior_precision": prior, "sigma_noise": sigma, "temperature": temperature}
        return dense_posterior_precision(self.curvature, n_data=N_DATA, **scales)


@cache
def fitted(key: str):
    """A posterior of the first 30 of 40 samples, which stand for 50; nobody writes to it."""
    la = unfitted(CELLS[key])
    la.fit(loader(CELLS[key], torch.arange(N_GIVEN)), n_data=N_DATA)
    return la


@cache
def dense(key: str) -> Dense:
    """The dense posterior of the samples that a posterior says it was fitted to."""
    cell, la = CELLS[key], fitted(key)
    model, _, _, of_all = cell.problem
    at = cell.positions
    shapes = selected_shapes(model, at)
    per_sample = [H[at][:, at] for H in of_all]
    K = torch.eye(len(at), dtype=torch.float64)
    if cell.in_basis:
        K = la.posterior_precision.basis.to_dense().double()
        H_a = mean_of(per_sample, la.split.direction_indices)
        check_basis(K, None if "K-FAC" in cell.estimator else H_a, shapes)
    estimate = _kronecker if cell.structure == "kron" else _low_rank
    found = estimate(cell, la, per_sample, K, shapes)
    of_inputs = jacobians(cell.model, LIKELIHOODS[cell.likelihood][1])[..., at]
    return Dense(at, shapes, per_sample, of_inputs, flat_parameters(model)[at], *found)


def _low_rank(cell: Cell, la, per_sample: list[Tensor], K: Tensor, shapes: Shapes):
    """Directions, values on the direction samples, magnitudes, errors and the mean curvature."""
    a, b, full = la.split.direction_indices, la.split.magnitude_indices, cell.structure == "full"
    complement = "isotropic" if full else cell.options.get("complement", "none")
    options = {"rank": cell.options.get("rank"), "threshold": 1e-10 if full else 1e-6, "n_data": N_DATA}
    magnitudes = cell.options.get("magnitudes", "held_out")
    if magnitudes != "cross_fitted":
        # the Kronecker complement is a diagonal one in the coordinates of its basis
        rotated = [K.T @ H @ K for H in per_sample]
        options |= {"magnitudes": magnitudes, "complement": {"kron": "diagonal"}.get(complement, complement)}
        d = dense_low_rank_posterior(*cell.problem[:2], cell.kind, a, b, per_sample=rotated, **options)
        return K @ d.directions, d.in_sample, d.magnitudes, d.standard_errors, K @ d.curvature @ K.T
    of_oracle = "none" if complement == "kron" else complement
    d = dense_cross_fitted_posterior(per_sample, a, la.split.folds, complement=of_oracle, **options)
    curvature = d.curvature
    if complement == "kron":
        # vectors of a fold's null space are arbitrary, and so is what it says along them; sums over a parameter are not
        outside = torch.eye(len(curvature), dtype=torch.float64) - d.directions @ d.directions.T
        of_folds = dense_folds(per_sample, a, la.split.folds, len(d.magnitudes), threshold=1e-6).residual
        f, own = len(a) / N_DATA, torch.diagonal(outside @ mean_of(per_sample, a) @ outside)
        D = la.fit_result.estimate.curvature.diagonal
        check_sums(D, f * own + (1 - f) * of_folds, shapes)
        curvature = curvature + K @ torch.diag(D) @ K.T
    return d.directions, d.in_sample, d.magnitudes, d.standard_errors, curvature


def _kronecker(cell: Cell, la, per_sample: list[Tensor], K: Tensor, shapes: Shapes):
    """The same along the basis K, which `check_basis` has judged; its columns are the directions."""
    a, b, magnitudes = (
        la.split.direction_indices,
        la.split.magnitude_indices,
        cell.options.get("magnitudes", "held_out"),
    )
    H, f = mean_of(per_sample, a), len(a) / N_DATA
    if cell.options.get("kron_magnitudes") == "kronecker":
        of_a, of_b = (_along(mean_of(per_sample, some), K, shapes) for some in (a, b))
        m = f * of_a + (1 - f) * of_b
        return None, of_a, m, None, K @ torch.diag(m) @ K.T
    if magnitudes != "cross_fitted":
        d = dense_kronecker_posterior(K, per_sample, a, b if magnitudes == "held_out" else None, n_data=N_DATA)
        return None, d.in_sample, d.magnitudes, d.standard_errors, d.curvature
    # as of the complement: every fold's vectors are its own, and the folds are of one size
    m = la.directional_curvatures
    check_sums(m, torch.diagonal(H), shapes)
    return None, torch.diagonal(K.T @ H @ K), m, None, K @ torch.diag(m) @ K.T


def _along(H: Tensor, K: Tensor, shapes: Shapes) -> Tensor:
    """Products of what a curvature's two factors say along a basis."""
    values, start = [], 0
    for n, matrix in shapes:
        block, own = H[start : start + n, start : start + n], K[start : start + n, start : start + n]
        start += n
        if matrix is not None:
            left, right = partial_traces(block, *matrix)
            block = dense_kronecker_product(left, right / torch.trace(right))
        values.append(torch.diagonal(own.T @ block @ own))
    return torch.cat(values)


def check_sums(found: Tensor, expected: Tensor, shapes: Shapes) -> None:
    """Not negative, and over every parameter the same sum."""
    assert bool((found >= -1e-12).all())
    sizes = [n for n, _ in shapes]
    close(torch.stack([t.sum() for t in found.split(sizes)]), torch.stack([t.sum() for t in expected.split(sizes)]))


def check_basis(K: Tensor, H: Tensor | None, shapes: Shapes) -> None:
    """Orthogonal, one block for each parameter, and the eigenvectors of the partial traces of its curvature H."""
    P = len(K)
    close(K.T @ K, torch.eye(P, dtype=K.dtype), 1e-9)
    blocks, start = [], 0
    for n, matrix in shapes:
        own = K[start : start + n, start : start + n]
        if matrix is None:
            torch.testing.assert_close(own, torch.eye(n, dtype=K.dtype))
        elif H is not None:
            left, right = partial_traces(H[start : start + n, start : start + n], *matrix)
            rotated = own.T @ dense_kronecker_product(left, right) @ own
            close(rotated, torch.diag(rotated.diagonal()), 1e-9)
            by_rows = rotated.diagonal().reshape(matrix)
            tiny = 1e-9 * by_rows.max()
            if by_rows.min() > -tiny:  # of a Hessian, products of negative eigenvalues have no order
                assert bool((by_rows.diff(dim=0) <= tiny).all())
                assert bool((by_rows.diff(dim=1) <= tiny).all())
        blocks.append(own)
        start += n
    assert torch.equal(K, block_diagonal(blocks))


def network_at(model: nn.Module, indices: Tensor, values: Tensor) -> nn.Module:
    """A copy of a model with other values of these entries of its trainable parameters."""
    other = copy.deepcopy(model)
    flat = flat_parameters(model)
    flat[indices] = values
    with torch.no_grad():
        for p, part in zip(trainable(other), flat.split([p.numel() for p in trainable(model)]), strict=True):
            p.copy_(part.reshape(p.shape))
    return other
