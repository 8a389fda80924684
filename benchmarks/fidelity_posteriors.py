"""What is compared: a table of configurations, how each is fitted, and what the criteria need to know of it."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from laplace import ELLA, Laplace
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from benchmarks.fidelity_criteria import Approximation, dense_covariances
from benchmarks.fidelity_tasks import Task
from debiased_laplace import DebiasedLaplace
from debiased_laplace.debiasing.options import RANKS, Trial
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

MAGNITUDES = ("same_batch", "held_out", "cross_fitted")
COMPLEMENTS = ("none", "isotropic", "diagonal", "kron")
WHITENED = "kron_metric"
"""The Kronecker complement with directions in its metric."""
BASELINE = "laplace-torch"
AUTO = "auto"
SHRINKAGE = "shrinkage"
"""Towards the cross-fitted Kronecker estimate; with the weight of the samples' own curvature. Not in the package."""
CORRECTED = "lowrank/cross_fitted/none/free/corrected"
"""With the bias of the inverse taken off to second order."""
MAIN = (
    *(f"lowrank/{magnitudes}/none/free" for magnitudes in MAGNITUDES),
    *(f"lowrank/{magnitudes}/none/100" for magnitudes in MAGNITUDES[::2]),
    "lowrank/cross_fitted/kron/100",
    "lowrank/cross_fitted/kron/free",
    f"lowrank/cross_fitted/{WHITENED}/free",
    "kron/cross_fitted",
    AUTO,
    f"{BASELINE}/kron",
)
"""What `--quick` compares."""


def configurations() -> dict[str, dict[str, Any]]:
    """Names, and keyword arguments of `DebiasedLaplace`; for laplace-torch, what its posterior is called there."""
    table: dict[str, dict[str, Any]] = {}
    for magnitudes, complement, rank in product(MAGNITUDES, (*COMPLEMENTS, WHITENED), RANKS):
        kind = {"magnitudes": magnitudes, "complement": complement, "rank": rank}
        if complement == WHITENED:
            kind |= {"complement": "kron", "metric": "kron"}
        table[f"lowrank/{magnitudes}/{complement}/{rank or 'free'}"] = kind
    table[CORRECTED] = {"magnitudes": "cross_fitted", "complement": "none", "inverse_correction": "second_order"}
    for structure in ("kron", "full"):
        for magnitudes in MAGNITUDES:
            table[f"{structure}/{magnitudes}"] = {"hessian_structure": structure, "magnitudes": magnitudes}
    table |= {f"{SHRINKAGE}/{weight}": {"weight": weight} for weight in (0.3, 0.5, 0.7)}
    table[AUTO] = {"magnitudes": "auto", "complement": "auto", "rank": "auto", "metric": "auto"}
    for kind in ("diag", "kron", "last_layer_kron", "ella"):
        table[f"{BASELINE}/{kind}"] = {"kind": kind}
    return table


def name_of(trial: Trial) -> str:
    """The configuration that a trial of "auto" is."""
    options = trial.options
    complement = WHITENED if options.metric == "kron" else options.complement
    return f"lowrank/{options.magnitudes}/{complement}/{options.rank or 'free'}"


def fit(task: Task, name: str, options: dict[str, Any], samples: list[int], seed: int) -> Any:
    """A posterior of all N training samples, estimated from some of them."""
    loader = loader_of(task, samples)
    if name.startswith(BASELINE):
        return fit_baseline(task, options["kind"], samples, loader, seed)
    structure = options.get("hessian_structure", "lowrank")
    others = {key: value for key, value in options.items() if key != "hessian_structure"} | {"sampling": "uniform"}
    la = DebiasedLaplace(
        task.model, task.likelihood, "all", structure, sigma_noise=task.sigma_noise, seed=seed, **others
    )
    la.fit(loader, n_data=task.n_data)
    return la


def loader_of(task: Task, samples: list[int]) -> DataLoader[tuple[Tensor, ...]]:
    """Training samples by their positions."""
    return DataLoader(Subset(task.train, samples), batch_size=256)


def fit_baseline(task: Task, kind: str, samples: list[int], loader: DataLoader[Any], seed: int) -> Any:
    """laplace-torch, given the scaling to N that it lacks, by its temperature."""
    shared = {"sigma_noise": task.sigma_noise, "temperature": len(samples) / task.n_data}
    if kind == "ella":
        size = min(len(samples), 512)
        la = ELLA(task.model, task.likelihood, size, min(size // 2, 256), seed=seed, **shared)
    else:
        subset = "last_layer" if kind.startswith("last_layer") else "all"
        la = Laplace(task.model, task.likelihood, subset, kind.removeprefix("last_layer_"), **shared)
    la.fit(loader)
    return la


def set_prior(la: Any, prior: float) -> None:
    """Set the prior precision of a fitted posterior, of either library."""
    la.prior_precision = torch.tensor(prior) if isinstance(la, ELLA) else prior


@dataclass(eq=False)
class Examination:
    """A fitted posterior seen by the criteria; keeps what does not depend on the prior.

    Attributes:
        task: with curvature and Jacobians in double precision.
        la: the fitted posterior.
    """

    task: Task
    la: Any
    _kept: dict[str, Any] = field(default_factory=dict)

    @property
    def _weight(self) -> float:
        return self.task.n_data / self.task.sigma_noise**2

    def approximation(self, prior: float) -> Approximation:
        """What the criteria need, at a prior precision that the posterior has been set to."""
        if isinstance(self.la, ELLA):
            jacobians = self.task.jacobians.to(self.la.dual_directions.dtype)
            return Approximation(self.la.functional_variance(jacobians).double())
        P = self.la.posterior_precision
        J = self.task.jacobians
        if isinstance(P, LowRankPlusDiagonal):
            return self._of_operator(P, prior)
        if isinstance(P, Tensor):
            R_diagonal = self._weight * self.task.curvature.diagonal() + prior
            D = P.detach().double()
            return Approximation((J / D) @ J.mT, float((R_diagonal / D).sum()), float(D.log().sum()))
        matrix = P.to_matrix().detach().double()
        over_all = len(matrix) == len(self.task.curvature)
        return self._of_dense(matrix, prior) if over_all else self._of_last_parameters(matrix)

    def _of_last_parameters(self, matrix: Tensor) -> Approximation:
        """A last layer's precision: the other weights do not vary, so there is no KL over all of them."""
        J = self.task.jacobians[..., -len(matrix) :]
        return Approximation(dense_covariances(torch.linalg.cholesky(matrix), J))

    def _of_dense(self, matrix: Tensor, prior: float) -> Approximation:
        L = torch.linalg.cholesky(matrix)
        inverse = torch.cholesky_inverse(L)
        trace = self._weight * float((inverse * self.task.curvature).sum()) + prior * float(inverse.trace())
        covariances = dense_covariances(L, self.task.jacobians)
        return Approximation(covariances, trace, 2 * float(L.diagonal().log().sum()))

    def _of_operator(self, P: LowRankPlusDiagonal, prior: float) -> Approximation:
        D = P.diagonal.detach().double().flatten()
        m = P.magnitudes.detach().double()
        H, J, U = self._rotated(P)
        if not (D - D[0]).any() and not self._in_a_metric:
            return self._isotropic(D[0], m, prior, P)
        if 4 * len(m) > len(H):
            if "low_rank" not in self._kept:
                self._kept["low_rank"] = (U * m) @ U.T
            matrix = self._kept["low_rank"] + torch.diag(D)
            L, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                return self._in_coordinates(L, H, J, prior)
        whitened, upper = torch.linalg.qr(U / D.sqrt()[:, None])
        s, Z = torch.linalg.eigh((upper * m) @ upper.T)
        s, V = floored(s, P), whitened @ Z
        half = V / D.sqrt()[:, None]
        removed = s / (1 + s)
        along = self._weight * (half * (H @ half)).sum(0) + prior * half.square().sum(0)
        trace = float(((self._weight * H.diagonal() + prior) / D).sum() - removed @ along)
        parallel = J @ half
        covariances = (J / D) @ J.mT - (parallel * removed) @ parallel.mT
        return Approximation(covariances, trace, float(D.log().sum() + s.log1p().sum()))

    def _in_coordinates(self, L: Tensor, H: Tensor, J: Tensor, prior: float) -> Approximation:
        """As `_of_dense`, in the coordinates of a basis."""
        inverse = torch.cholesky_inverse(L)
        trace = self._weight * float((inverse * H).sum()) + prior * float(inverse.trace())
        return Approximation(dense_covariances(L, J), trace, 2 * float(L.diagonal().log().sum()))

    def _isotropic(self, D: Tensor, m: Tensor, prior: float, P: LowRankPlusDiagonal) -> Approximation:
        """D a multiple of the identity: whatever costs P² is the same at every prior."""
        H, J, U = self._rotated(P)
        if "along" not in self._kept:
            parallel = J @ U
            self._kept["along"] = (U * (H @ U)).sum(0), parallel, J @ J.mT - parallel @ parallel.mT
        along, parallel, outside = self._kept["along"]
        s = floored(m / D, P)
        traces = self._weight * H.trace() + prior * len(H), self._weight * along + prior
        trace = float((traces[0] - (s / (1 + s)) @ traces[1]) / D)
        covariances = (outside + (parallel / (1 + s)) @ parallel.mT) / D
        return Approximation(covariances, trace, float(len(H) * D.log() + s.log1p().sum()))

    def _rotated(self, P: LowRankPlusDiagonal) -> tuple[Tensor, Tensor, Tensor]:
        """Full-batch curvature and Jacobians in the coordinates of the operator's basis, and its directions."""
        if "rotated" not in self._kept:
            H, J = self.task.curvature, self.task.jacobians
            if P.basis is not None:
                K = in_double_precision(P.basis)
                J = K.coordinates(J)
                H = K.coordinates(K.coordinates(H).T)
            U = P.directions.detach().double()
            # in a metric the columns are not meant to be orthonormal
            self._kept["rotated"] = H, J, U if self._in_a_metric else orthonormalized(U)
        return self._kept["rotated"]

    def with_true_curvatures(self, prior: float) -> Approximation:
        """The same directions with the full batch's own curvature along them, and nothing outside.

        No magnitudes along orthonormal directions are closer to the full batch in KL.
        """
        truth = self._weight * self.true_curvatures()
        return self._isotropic(truth.new_tensor(prior), truth, prior, self.la.posterior_precision)

    def true_curvatures(self) -> Tensor:
        """The full batch's mean curvature along the directions of a posterior in the axes' coordinates."""
        U = self.la.directions.double()
        U = U / torch.linalg.vector_norm(U, dim=0) if self._in_a_metric else orthonormalized(U)
        return (U * (self.task.curvature @ U)).sum(0)

    @property
    def _in_a_metric(self) -> bool:
        return self.la.fit_result.estimate.curvature.metric is not None


def floored(s: Tensor, P: LowRankPlusDiagonal) -> Tensor:
    """Whitened eigenvalues as the operator uses them: none that makes it singular."""
    return s.clamp_min(8 * torch.finfo(P.directions.dtype).eps - 1)


def orthonormalized(U: Tensor) -> Tensor:
    """Columns that are orthonormal to single precision, made so to double (one Newton-Schulz step)."""
    return 1.5 * U - 0.5 * U @ (U.T @ U)


def in_double_precision(basis: KroneckerBasis) -> KroneckerBasis:
    """The basis, orthogonal to double precision."""
    return KroneckerBasis(
        tuple(
            BasisBlock(
                b.rows,
                b.columns,
                *(None if side is None else orthonormalized(side.double()) for side in (b.left, b.right)),
            )
            for b in basis.blocks
        )
    )
