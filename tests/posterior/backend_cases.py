"""Every backend with every structure, subset of weights and likelihood: who computes, and what has to come out.

The table `CASES` is what the tests run through and what `docs/backends.md` is generated from. The dense counterparts
below it import nothing from the package: per-sample curvatures by plain autograd, projections as the method says.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from laplace.curvature import (
    AsdlEF,
    AsdlGGN,
    AsdlHessian,
    BackPackEF,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
)
from torch import Tensor, nn

DRAWS = 2
N_SAMPLES, N_DIRECTION, N_MAGNITUDE, N_DATA = 24, 10, 8, 30
BATCH = 7  # of 10 and of 8 samples: the last batches have 3 and 1


@dataclass(frozen=True)
class Backend:
    """A backend as the user names it, and the curvature that it stands for."""

    cls: type | None
    kind: str  # "GGN", "EF", "Hessian" or "Monte-Carlo GGN"

    @property
    def arguments(self):
        draws = {"stochastic": True, "num_samples": DRAWS} if self.kind == "Monte-Carlo GGN" else None
        return {"backend": self.cls, "backend_kwargs": draws}


BACKENDS = {
    "None": Backend(None, "GGN"),
    "CurvlinopsGGN": Backend(CurvlinopsGGN, "GGN"),
    "BackPackGGN": Backend(BackPackGGN, "GGN"),
    "AsdlGGN": Backend(AsdlGGN, "GGN"),
    "CurvlinopsEF": Backend(CurvlinopsEF, "EF"),
    "BackPackEF": Backend(BackPackEF, "EF"),
    "AsdlEF": Backend(AsdlEF, "EF"),
    "CurvlinopsHessian": Backend(CurvlinopsHessian, "Hessian"),
    "AsdlHessian": Backend(AsdlHessian, "Hessian"),
    "None, stochastic": Backend(None, "Monte-Carlo GGN"),
    "CurvlinopsGGN, stochastic": Backend(CurvlinopsGGN, "Monte-Carlo GGN"),
    "BackPackGGN, stochastic": Backend(BackPackGGN, "Monte-Carlo GGN"),
    "AsdlGGN, stochastic": Backend(AsdlGGN, "Monte-Carlo GGN"),
}

STRUCTURES = {
    "lowrank": {"hessian_structure": "lowrank"},
    "full": {"hessian_structure": "full"},
    "kron": {"hessian_structure": "kron"},
    "kron, K-FAC's factors": {
        "hessian_structure": "kron",
        "kron_basis": "kfac",
        "kron_magnitudes": "kronecker",
    },
}
SUBSETS = ("all", "last_layer", "subnetwork")
LIKELIHOODS = {  # name of laplace-torch's, and outputs
    "classification": ("classification", 3),
    "regression": ("regression", 3),
    "regression, one output": ("regression", 1),
    "reward modeling": ("reward_modeling", 2),
}


@dataclass(frozen=True)
class Who:
    """Who computes a cell.

    Attributes:
        methods: the backend's own that saw every sample used.
        torch_func: whether torch.func computes too.
        reasons: what the warnings say where torch.func stands in for the backend.
    """

    methods: tuple[str, ...] = ()
    torch_func: bool = False
    reasons: tuple[str, ...] = ()


OTHER_NUMBERS = "its numbers are not those of one sample at a time"
SHAPE_OF_JACOBIANS = "ValueError: its Jacobians have the shape"
SHAPE_OF_GRADIENTS = "ValueError: its gradients have the shape"
UNAVAILABLE = "NotImplementedError: Unavailable through Backpack."

# Backend, subsets and likelihoods where its rows (or its Hessian) are wrong or missing, and what the warning says.
# Reward models evaluate the two inputs of a pair one after the other, which only torch.func's own derivatives see
# through.
ROWS_FAIL = {
    ("CurvlinopsGGN", "last_layer", "reward modeling"): SHAPE_OF_JACOBIANS,
    ("BackPackGGN", "all", "reward modeling"): OTHER_NUMBERS,
    ("BackPackGGN", "last_layer", "reward modeling"): SHAPE_OF_JACOBIANS,
    ("BackPackGGN", "subnetwork", "reward modeling"): OTHER_NUMBERS,
    ("AsdlGGN", "all", "reward modeling"): SHAPE_OF_JACOBIANS,
    ("AsdlGGN", "last_layer", "reward modeling"): SHAPE_OF_JACOBIANS,
    ("AsdlGGN", "subnetwork", "reward modeling"): SHAPE_OF_JACOBIANS,
    **{("CurvlinopsEF", "last_layer", likelihood): OTHER_NUMBERS for likelihood in LIKELIHOODS},
    **{("BackPackEF", subset, "reward modeling"): SHAPE_OF_GRADIENTS for subset in SUBSETS},
    **{("AsdlEF", "last_layer", likelihood): SHAPE_OF_GRADIENTS for likelihood in LIKELIHOODS},
    ("AsdlEF", "all", "reward modeling"): SHAPE_OF_GRADIENTS,
    ("AsdlEF", "subnetwork", "reward modeling"): SHAPE_OF_GRADIENTS,
    **{
        ("AsdlHessian", "last_layer", likelihood): "appears to not have been used in the graph"
        for likelihood in LIKELIHOODS
    },
    ("AsdlHessian", "last_layer", "reward modeling"): "Expected input batch_size (4)",
}

# The same of K-FAC's factors.
KFAC_FAIL = {
    **{("BackPackEF", subset, likelihood): (UNAVAILABLE,) for subset in SUBSETS for likelihood in LIKELIHOODS},
    **{
        (backend, subset, "reward modeling"): (reason,)
        for subset in SUBSETS
        for backend, reason in {
            "CurvlinopsGGN": OTHER_NUMBERS,
            "BackPackGGN": "Compared shapes [7, 2] and [14, 1] do not match",
            "AsdlGGN": OTHER_NUMBERS,
            "CurvlinopsEF": OTHER_NUMBERS,
            "AsdlEF": OTHER_NUMBERS,
            "CurvlinopsGGN, stochastic": OTHER_NUMBERS,
            "BackPackGGN, stochastic": "Compared shapes [7, 2] and [14, 1] do not match",
            "AsdlGGN, stochastic": OTHER_NUMBERS,
        }.items()
    },
    **{
        (backend, "last_layer", "reward modeling"): ("Expected input batch_size (14)",)
        for backend in ("AsdlGGN", "AsdlEF", "AsdlGGN, stochastic")
    },
}


def _who_has_rows(backend: str, subset: str, likelihood: str) -> Who:
    """Who computes rows, or the dense Hessian."""
    cls, kind = BACKENDS[backend].cls, BACKENDS[backend].kind
    if cls is None or kind == "Monte-Carlo GGN":  # the house draws the targets itself, by its own seed
        return Who(torch_func=True)
    if (backend, subset, likelihood) in ROWS_FAIL:
        return Who(torch_func=True, reasons=(ROWS_FAIL[backend, subset, likelihood],))
    jacobians = "last_layer_jacobians" if subset == "last_layer" else "jacobians"
    return Who(({"GGN": jacobians, "EF": "gradients"}.get(kind, "full"),))


def _who_has_factors(backend: str, subset: str, likelihood: str) -> Who:
    """Who computes K-FAC's factors, and the exact diagonal of parameters of which only some entries are selected."""
    cls, kind = BACKENDS[backend].cls, BACKENDS[backend].kind
    if kind == "Hessian":  # which has no such factors: those of its dense blocks serve
        return _who_has_rows(backend, subset, likelihood)
    failed = () if cls is None else KFAC_FAIL.get((backend, subset, likelihood), ())
    factors = Who(torch_func=True, reasons=failed) if cls is None or failed else Who(("kron",))
    rows = _who_has_rows(backend, subset, likelihood)
    reasons = rows.reasons + factors.reasons  # rows are tried even where they are not needed
    if subset != "subnetwork":
        return Who(factors.methods, factors.torch_func, reasons)
    return Who(factors.methods + rows.methods, factors.torch_func or rows.torch_func, reasons)


CASES = {
    cell: (_who_has_factors if "K-FAC" in cell[1] else _who_has_rows)(cell[0], cell[2], cell[3])
    for cell in product(BACKENDS, STRUCTURES, SUBSETS, LIKELIHOODS)
}


class TwoLayers(nn.Sequential):
    """Two linear layers with a tanh between."""

    def __init__(self, n_outputs: int):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, n_outputs))


class RewardModel(TwoLayers):
    """One reward for a single input; for pairs (n, 2, 4) two logits."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return super().forward(x)
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(len(x), 2)


@cache
def data_of(likelihood: str):
    """Model, inputs and targets; the model is never to be written to."""
    kind, C = LIKELIHOODS[likelihood]
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = (RewardModel() if kind == "reward_modeling" else TwoLayers(C)).double().eval()
    shape = (N_SAMPLES, 2, 4) if kind == "reward_modeling" else (N_SAMPLES, 4)
    X = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "regression":
        return model, X, torch.randn(N_SAMPLES, C, generator=generator, dtype=torch.float64)
    return model, X, torch.randint(C, (N_SAMPLES,), generator=generator)


def indices_of(subset: str, likelihood: str) -> Tensor:
    """Positions in the flat vector of the weights: 20 + 5 of the first layer, then the second's."""
    P = sum(p.numel() for p in data_of(likelihood)[0].parameters())
    if subset == "subnetwork":  # the first weight as a whole, of the others some entries
        return torch.tensor([*range(20), 21, 23, 26, 29])
    return torch.arange(25, P) if subset == "last_layer" else torch.arange(P)


def fixed_noise(targets: Tensor) -> Tensor:
    """What stands in for the noise (n, draws, …) of drawn targets, so that a Monte-Carlo curvature is known exactly."""
    if targets.is_floating_point():
        return torch.stack([torch.sin((3 + d) * targets) * 1.3 for d in range(DRAWS)], dim=1)
    return torch.stack([((targets + 1) * (0.23 + 0.31 * d)) % 1 for d in range(DRAWS)], dim=1).double()[..., None]


def _output_roots(outputs: Tensor, target: Tensor, kind: str) -> list[Tensor]:
    """Vectors s with sum s s^T the curvature of one sample's loss with respect to its outputs (C,)."""
    regression = target.is_floating_point()
    p = outputs.softmax(0)
    unit = torch.eye(len(outputs), dtype=outputs.dtype)
    if kind == "GGN":
        values, vectors = torch.linalg.eigh(unit if regression else torch.diag(p) - torch.outer(p, p))
        return [v.clamp_min(0).sqrt() * vectors[:, i] for i, v in enumerate(values)]
    if kind == "EF":
        return [outputs - target if regression else p - unit[int(target)]]
    roots = []
    for noise in fixed_noise(target[None])[0]:
        drawn = int((p.cumsum(0) < float(noise[0])).sum())
        roots.append((-noise if regression else p - unit[drawn]) / DRAWS**0.5)
    return roots


@cache
def per_sample(kind: str, likelihood: str) -> list[Tensor]:
    """The curvature (P, P) of every sample with respect to all weights."""
    model, X, y = data_of(likelihood)
    found = []
    for x, target in zip(X, y, strict=True):
        if kind == "Hessian":
            found.append(_hessian(model, x, target))
            continue
        outputs = model(x[None])[0]
        H = 0
        for s in _output_roots(outputs.detach(), target, kind):
            row = torch.autograd.grad(outputs @ s, list(model.parameters()), retain_graph=True)
            row = torch.cat([g.reshape(-1) for g in row])
            H = H + torch.outer(row, row)
        found.append(H)
    return found


def _hessian(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    sizes, shapes = [p.numel() for p in model.parameters()], [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True)]
        outputs = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x[None],))[0]
        if target.is_floating_point():
            return 0.5 * (outputs - target).square().sum()
        return outputs.logsumexp(0) - outputs[int(target)]

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, theta)


def mean_curvature(kind: str, subset: str, likelihood: str, samples: Tensor) -> Tensor:
    """Mean over some samples, of the selected weights."""
    own = indices_of(subset, likelihood)
    everything = per_sample(kind, likelihood)
    return (sum(everything[i] for i in samples.tolist()) / len(samples))[own][:, own]


def expected_curvature(backend: str, structure: str, subset: str, likelihood: str, a: Tensor, b: Tensor) -> Tensor:
    """The estimate (P, P) of the mean curvature: directions from a, magnitudes from f H_a + (1 - f) H_b."""
    kind = BACKENDS[backend].kind
    f = len(a) / N_DATA
    H_a, H_b = (mean_curvature(kind, subset, likelihood, s) for s in (a, b))
    H = f * H_a + (1 - f) * H_b
    if structure in ("lowrank", "full"):
        return _along_eigenvectors(H_a, H, structure)
    if "K-FAC" in structure and kind != "Hessian":
        if kind == "Monte-Carlo GGN" and "kron" in CASES[backend, structure, subset, likelihood].methods:
            kind = "GGN"  # the tests put the expectation in place of the backend's draws
        of_a, of_b = (_kfac_factors(kind, subset, likelihood, s) for s in (a, b))
        exact = {"diagonal": H.diagonal()}
        return _in_kronecker_basis(of_a, f, of_b, subset, likelihood, exact)
    of_a, of_b = (_partial_traces(M, subset, likelihood) for M in (H_a, H_b))
    if "K-FAC" in structure:
        return _in_kronecker_basis(of_a, f, of_b, subset, likelihood, {})
    return _in_kronecker_basis(of_a, f, of_b, subset, likelihood, {"matrix": H})


def _along_eigenvectors(H_a: Tensor, H: Tensor, structure: str) -> Tensor:
    values, U = torch.linalg.eigh(H_a)
    threshold = {"lowrank": 1e-6, "full": 1e-10}[structure] * values.max()
    assert not bool(((values > threshold / 1.2) & (values < threshold * 1.2)).any()), (
        "the rank would be a matter of luck"
    )
    U = U[:, values > threshold]
    m = torch.stack([(u @ H @ u).clamp_min(0) for u in U.T])
    P, k = U.shape
    c = 0.0
    if structure == "full" and k < P:  # one mean value for what a says nothing about
        c = max(0.0, float(H.trace() - m.sum()) / (P - k))
    return U @ torch.diag(m) @ U.T + c * (torch.eye(P, dtype=H.dtype) - U @ U.T)


def blocks_of(subset: str, likelihood: str):
    """Name, shape (rows, columns) and whether all of it is selected, of every selected parameter."""
    own, start = set(indices_of(subset, likelihood).tolist()), 0
    for name, p in data_of(likelihood)[0].named_parameters():
        chosen = len(own & set(range(start, start + p.numel())))
        start += p.numel()
        if chosen == p.numel():
            yield name, (p.shape[0], p.numel() // p.shape[0]), True
        elif chosen:
            yield name, (chosen, 1), False


def _partial_traces(H: Tensor, subset: str, likelihood: str) -> list[tuple[Tensor, Tensor]]:
    """Sum M M^T and sum M^T M of the rows as matrices, the second of trace 1."""
    factors, start = [], 0
    for _, (o, i), whole in blocks_of(subset, likelihood):
        block = H[start : start + o * i, start : start + o * i].reshape(o, i, o, i)
        start += o * i
        left = sum(block[:, j, :, j] for j in range(i))
        right = sum(block[j, :, j, :] for j in range(o))
        right = right / right.trace() if right.trace() else right
        factors.append((left if whole else torch.diag(left.diagonal()), right))
    return factors


def _kfac_factors(kind: str, subset: str, likelihood: str, samples: Tensor) -> list[tuple[Tensor, Tensor]]:
    """K-FAC's: second moments of layer inputs (mean over positions) and of output gradients (sum over positions)."""
    model, X, y = data_of(likelihood)
    first, second = model[0], model[2]
    A, G = {0: 0, 2: 0}, {0: 0, 2: 0}
    for n in samples.tolist():
        positions = X[n].reshape(-1, 4)  # two for a pair, one for everything else
        z1 = positions @ first.weight.T + first.bias
        a1 = z1.tanh()
        z2 = a1 @ second.weight.T + second.bias
        for layer, a in ((0, positions), (2, a1)):
            A[layer] = A[layer] + (a.T @ a).detach() / len(positions) / len(samples)
        outputs = z2.reshape(-1)
        for s in _output_roots(outputs.detach(), y[n], kind):
            for layer, g in zip((0, 2), torch.autograd.grad(outputs @ s, (z1, z2), retain_graph=True), strict=True):
                G[layer] = G[layer] + g.T @ g / len(samples)
    one = torch.ones(1, 1, dtype=X.dtype)
    return [
        (G[int(name[0])], A[int(name[0])] if name.endswith("weight") else one)
        for name, _, _ in blocks_of(subset, likelihood)
    ]


def _in_kronecker_basis(of_a, f: float, of_b, subset: str, likelihood: str, exact: dict[str, Tensor]) -> Tensor:
    """K diag(m) K^T with K from the factors of a.

    `exact` holds the matrix whose curvature along K is taken, or the diagonal that entries of parameters that are not
    selected as a whole get; without it, m are products of the factors' own curvatures.
    """
    blocks, start = [], 0
    for (L_a, R_a), (L_b, R_b), (_, (o, i), whole) in zip(of_a, of_b, blocks_of(subset, likelihood), strict=True):
        here = slice(start, start + o * i)
        start += o * i
        if not whole and "diagonal" in exact:
            blocks.append(torch.diag(exact["diagonal"][here]))
            continue
        Q_L = torch.linalg.eigh(L_a)[1] if whole else torch.eye(o, dtype=L_a.dtype)
        Q_R = torch.linalg.eigh(R_a)[1]
        K = torch.kron(Q_L, Q_R)
        if "matrix" in exact:
            m = (K.T @ exact["matrix"][here, here] @ K).diagonal()
        else:
            along = [
                torch.kron((Q_L.T @ L @ Q_L).diagonal(), (Q_R.T @ R @ Q_R).diagonal())
                for L, R in ((L_a, R_a), (L_b, R_b))
            ]
            m = f * along[0] + (1 - f) * along[1]
        blocks.append(K @ torch.diag(m.clamp_min(0)) @ K.T)
    return torch.block_diag(*blocks)


class _UsedTwice(nn.Module):
    """One layer at two places."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(hidden)))))


class _NotSequential(nn.Module):
    """Modules for every operation, put together by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.tanh, self.head = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tanh(self.first(x)))


class _RawParameter(nn.Module):
    """A weight that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.weight))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def _with_batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model[1].running_mean.normal_(std=0.5)
    model[1].running_var.uniform_(0.5, 3.0)
    return model


def _partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].requires_grad_(False)
    return model


ARCHITECTURES = {  # what builds it, shape of a sample, dtype
    "convolutions, single precision": (_convolutions, (1, 4, 4), torch.float32),
    "convolutions, double precision": (_convolutions, (1, 4, 4), torch.float64),
    "ReLU": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,), torch.float64),
    "BatchNorm": (_with_batch_norm, (4,), torch.float64),
    "LayerNorm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
        torch.float64,
    ),
    "a raw parameter": (_RawParameter, (4,), torch.float64),
    "a frozen layer": (_partly_frozen, (4,), torch.float64),
    "a module used twice": (_UsedTwice, (4,), torch.float64),
    "not a Sequential": (_NotSequential, (4,), torch.float64),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), _Mean(), nn.Linear(5, 3)), (3, 4), torch.float64),
}


@cache
def architecture(name: str):
    """Model, inputs and labels; the model is never to be written to."""
    build, shape, dtype = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = build().to(dtype).eval()
    X = torch.randn(N_SAMPLES, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return model, X, torch.randint(3, (N_SAMPLES,), generator=generator)


_ALL = tuple(name for name, chosen in BACKENDS.items() if chosen.cls is not None and "stochastic" not in name)
_WITH_FACTORS = ("CurvlinopsGGN", "AsdlGGN", "CurvlinopsEF", "AsdlEF")
_AND_DRAWN = (*_WITH_FACTORS, "CurvlinopsGGN, stochastic", "AsdlGGN, stochastic")

OWN_ROWS = {  # which backends' rows (or Hessians) are right, for all others torch.func computes
    "convolutions, single precision": _ALL,
    "convolutions, double precision": _ALL,
    "ReLU": _ALL,
    "BatchNorm": _ALL,
    "LayerNorm": ("CurvlinopsGGN", "AsdlGGN", "CurvlinopsEF", "AsdlEF", "AsdlHessian"),
    "a raw parameter": ("CurvlinopsGGN", "CurvlinopsEF", "CurvlinopsHessian", "AsdlHessian"),
    "a frozen layer": tuple(name for name in _ALL if "BackPack" not in name),
    "a module used twice": ("CurvlinopsGGN", "CurvlinopsEF", "CurvlinopsHessian", "AsdlHessian"),
    "not a Sequential": _ALL,
    "sequences": tuple(name for name in _ALL if name not in ("AsdlGGN", "AsdlEF")),
}
OWN_FACTORS = {  # the same of K-FAC's factors
    "convolutions, single precision": _AND_DRAWN,
    "convolutions, double precision": _AND_DRAWN,
    "ReLU": (*_AND_DRAWN, "BackPackGGN", "BackPackGGN, stochastic"),
    "BatchNorm": (),
    "LayerNorm": (),
    "a raw parameter": (),
    "a frozen layer": _AND_DRAWN,
    "a module used twice": (),
    "not a Sequential": _AND_DRAWN,
    "sequences": ("CurvlinopsGGN", "CurvlinopsEF", "CurvlinopsGGN, stochastic"),
}


_CAPABILITIES: dict[tuple[str, int], tuple] = {}


def remembering(find):
    """What torch.func can do with a model, found out once for each model and subset of its weights."""

    def found_once(selection, parameters, inputs):
        key = (selection.description, id(selection.model))
        if key not in _CAPABILITIES:  # the model is kept, so that no other takes its address
            _CAPABILITIES[key] = (selection.model, find(selection, parameters, inputs))
        return _CAPABILITIES[key][1]

    return found_once
