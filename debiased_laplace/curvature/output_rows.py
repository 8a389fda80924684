r"""Rows of the curvature with respect to the outputs, $\Lambda_n = \sum_j c_{nj} c_{nj}^\top$, chosen one by one.

The curvature of a sample is the sum of $v_{nj} v_{nj}^\top$ over the rows $v_{nj} = J_n^\top c_{nj}$ of its cotangents
$c_{nj}$. Their sizes $\|c_{nj}\|^2$ follow from the outputs alone, without a backward pass.

- Empirical Fisher: the gradient of the loss.
- GGN of a likelihood whose outputs are independent (regression, binary, Poisson, …): unit vectors, times the root of
  their curvature.
- GGN of a classification with at most 128 classes: eigenvectors of $\Lambda_n = \mathrm{diag}(p) - p p^\top$.
- More classes: $\Lambda_n = \sum_c p_c (e_c - p)(e_c - p)^\top$, where classes that are confused with each other have
  nearly the same direction. Of the 32 most probable classes T, the eigenvectors of their part of the sum are taken;
  every other class has the row $\sqrt{p_c} (e_c - p)$. No C x C matrix is formed.
- GGN of any other likelihood: eigenvectors of $\Lambda_n$.

Eigenvectors are those of the Gram matrix of the vectors $\sqrt{p_c} (e_c - p)$, c in T. All of it is computed in
double precision from differences that do not cancel: a sample with $1 - p = 10^{-20}$ has rows of that size.

Samples' weights (`Likelihood.weights`) are not included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from debiased_laplace.curvature.classification import Classification
from debiased_laplace.curvature.likelihood import IndependentOutputs, Likelihood
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.positions import PositionWise
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, OutputRoot
from debiased_laplace.linalg.accumulation import accumulation_dtype

MOST_EIGENVECTORS = 128
"""Largest number of classes of which all eigenvectors are computed."""

MOST_LEADING = 32
"""Number of classes in T where there are more classes than that."""

_ROUNDING = 1e-12
"""Eigenvalues below this fraction of a sample's largest are rounding errors."""


def row_sizes(root: OutputRoot, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, "n r"]:
    r"""Return the squared norms $\|c_{nj}\|^2$ of all rows, in double precision; 0 for slots without a row.

    Eigenvectors come first, by decreasing size; with more than 128 classes, class c has slot 32 + c.

    Args:
        root: of the GGN or the empirical Fisher.
        outputs: finite outputs; their sizes do not depend on the other samples.
        targets: as the likelihood takes them.
    """
    f = outputs.to(accumulation_dtype(outputs))
    if (of_positions := _with_positions(root)) is not None:
        return _sizes_by_position(root, of_positions, f, targets)
    if isinstance(root, EmpiricalFisher):
        return _gradient(root.likelihood, f, targets).square().sum(1, keepdim=True)
    if _has_softmax(root):
        return torch.cat([_softmax_sizes(part) for part in f.split(_samples_together(f.shape[1]))])
    return _eigenpairs(root, f)[0]


def cotangents(
    root: OutputRoot,
    outputs: Float[Tensor, "n C"],
    targets: Tensor,
    samples: Int64[Tensor, " R"],
    rows: Int64[Tensor, " R"],
) -> Float[Tensor, "R _"]:
    r"""Return the cotangents $c_{nj}$ of chosen rows, in double precision.

    Eigenvectors of equal eigenvalues are arbitrary: choose all rows of a sample in one call, so that they are of one
    basis.

    With positions, slots count those of one position after the other, and cotangents are (R, C) of the row's position.

    Args:
        root: as for `row_sizes`.
        outputs: as for `row_sizes`.
        targets: as for `row_sizes`.
        samples: index n of each row's sample, in any order.
        rows: slot j of each row within its sample; the cotangent of an empty slot is 0.
    """
    f, samples, rows = outputs.to(accumulation_dtype(outputs)), samples.to(outputs.device), rows.to(outputs.device)
    if (whole := _with_positions(root)) is not None:
        base, r = GaussNewton(whole.base), n_slots(whole.layout.n_classes)
        T = f.shape[1] // whole.layout.n_classes
        of_positions, t = whole.by_position(f).flatten(0, 1), rows // r
        found = cotangents(base, of_positions, of_positions[:, 0], samples * T + t, rows % r)
        return found * whole.factors(f, targets)[samples, t].sqrt()[:, None]
    if isinstance(root, EmpiricalFisher):
        return _gradient(root.likelihood, f[samples], targets[samples.to(targets.device)])
    if _has_softmax(root):
        used, owner = samples.unique(return_inverse=True)
        found = f.new_zeros(len(samples), f.shape[1])
        step = _samples_together(f.shape[1])
        for start in range(0, len(used), step):
            mine = ((owner >= start) & (owner < start + step)).nonzero()[:, 0]
            found[mine] = _softmax_cotangents(f[used[start : start + step]], owner[mine] - start, rows[mine])
        return found
    used, owner = samples.unique(return_inverse=True)
    values, vectors = _eigenpairs(root, f[used])
    return values[owner, rows].sqrt()[:, None] * vectors(owner, rows)


def _sizes_by_position(
    root: OutputRoot, likelihood: PositionWise, outputs: Float[Tensor, "n TC"], targets: Tensor
) -> Float[Tensor, "n Tr"]:
    """Return the sizes of the rows of all positions, one after the other."""
    if not isinstance(root, GaussNewton):
        raise ValueError(
            "Rows of the empirical Fisher of outputs with positions are not drawn; expected the GGN, or "
            "sampling='uniform'."
        )
    of_positions = likelihood.by_position(outputs).flatten(0, 1)
    sizes = row_sizes(GaussNewton(likelihood.base), of_positions, of_positions[:, 0])
    factors = likelihood.factors(outputs, targets)
    return (sizes.unflatten(0, (len(outputs), -1)) * factors[..., None]).flatten(1)


def _with_positions(root: OutputRoot) -> PositionWise | None:
    likelihood = root.likelihood if isinstance(root, GaussNewton | EmpiricalFisher) else None
    return likelihood if isinstance(likelihood, PositionWise) else None


def n_slots(n_classes: int) -> int:
    """Return the number of slots of rows of the GGN for outputs of so many classes."""
    return n_classes if n_classes <= MOST_EIGENVECTORS else MOST_LEADING + n_classes


def _has_softmax(root: OutputRoot) -> bool:
    return isinstance(root, GaussNewton) and isinstance(root.likelihood, Classification)


def _gradient(likelihood: Likelihood, outputs: Float[Tensor, "n C"], targets: Tensor) -> Float[Tensor, "n C"]:
    """Return the gradient of the loss; of a classification, without cancellation in 1 - p."""
    g = likelihood.gradient(outputs, targets)
    if not isinstance(likelihood, Classification):
        return g
    # labels and probabilities have the same sum; where a label was subtracted, the other classes give the difference
    top = outputs.argmax(1, keepdim=True)
    of_top, of_others = g.gather(1, top), g.scatter(1, top, 0.0).sum(1, keepdim=True)
    return g.scatter(1, top, torch.where(of_top > 0, of_top, -of_others))


def _eigenpairs(
    root: OutputRoot, outputs: Float[Tensor, "n C"]
) -> tuple[Float[Tensor, "n C"], Callable[[Tensor, Tensor], Tensor]]:
    r"""Return the eigenvalues of $\Lambda_n$ by decreasing size, and the map from samples and slots to eigenvectors."""
    if not isinstance(root, GaussNewton):
        raise NotImplementedError(f"Rows of {root!r} are not built.")
    if isinstance(root.likelihood, IndependentOutputs):
        diagonal = root.likelihood.hessian_diagonal(outputs)
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        return diagonal.gather(1, order), lambda n, j: one_hot(order[n, j], outputs.shape[1]).to(outputs)
    values, vectors = torch.linalg.eigh(root.likelihood.hessian(outputs))
    values, vectors = values.flip(1), vectors.flip(2)
    values = torch.where(values > _ROUNDING * values[:, :1], values, 0.0)
    return values, lambda n, j: vectors[n, :, j]


def _samples_together(n_outputs: int) -> int:
    """Return the number of samples whose rows are computed at once."""
    k = _n_leading(n_outputs)
    return max(1, CHUNK_BYTES // (8 * (8 * n_outputs + 8 * k**2)))


def _n_leading(n_outputs: int) -> int:
    """Return the number of classes in T."""
    return n_outputs if n_outputs <= MOST_EIGENVECTORS else MOST_LEADING


@dataclass(frozen=True, eq=False)
class _Softmax:
    """Probabilities of samples, and what follows from them without cancellation.

    Attributes:
        p: probabilities.
        complements: 1 - p.
        others: sum of the other classes' squared probabilities.
        largest: the classes in T, by decreasing probability; of equal ones, the first.
    """

    p: Float[Tensor, "n C"]
    complements: Float[Tensor, "n C"]
    others: Float[Tensor, "n C"]
    largest: Int64[Tensor, "n k"]

    @classmethod
    def of(cls, outputs: Float[Tensor, "n C"]) -> "_Softmax":
        """Return the probabilities of outputs."""
        n, C = outputs.shape
        p, k = torch.softmax(outputs, dim=1), _n_leading(C)
        # topk takes any of equal classes, and another one on another device
        last = p.topk(k).values[:, -1:]
        above, equal = p > last, p == last
        chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        by_class = chosen.nonzero()[:, 1].view(n, k)
        largest = by_class.gather(1, p.gather(1, by_class).argsort(dim=1, descending=True, stable=True))
        # only the largest probability can be close to 1, or its square be nearly the sum of all squares
        top = largest[:, :1]
        rest = p.scatter(1, top, 0.0)
        squares = p.square()
        complements = (1 - p).scatter(1, top, rest.sum(1, keepdim=True))
        others = squares.sum(1, keepdim=True) - squares
        return cls(p, complements, others.scatter(1, top, rest.square().sum(1, keepdim=True)), largest)

    @property
    def squared_distances(self) -> Float[Tensor, "n C"]:
        r"""Squared norms $1 - 2 p_c + \|p\|^2$ of $e_c - p$."""
        return self.complements.square() + self.others

    def roots(self) -> Float[Tensor, "n k"]:
        r"""Return $\sqrt{p_c}$ of the classes in T."""
        return self.p.gather(1, self.largest).sqrt()

    def eigenpairs(self) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k k"]]:
        r"""Return eigenvalues and eigenvectors, in columns, of the vectors' Gram matrix by decreasing eigenvalue.

        The Gram matrix is $\sqrt{p_c p_d}\,(e_c - p)^\top (e_d - p)$, c and d in T.
        """
        p, q, s = (x.gather(1, self.largest) for x in (self.p, self.complements, self.others))
        # |p|² - p_c² - p_d², where d is the less probable class
        others = (s[:, :, None] - p.square()[:, None, :]).triu(1)
        products = others + others.mT - (p * q)[:, :, None] - (p * q)[:, None, :]
        products = products.diagonal_scatter(q.square() + s, dim1=1, dim2=2)
        roots = self.roots()
        gram = roots[:, :, None] * roots[:, None, :] * products
        # tiny matrices would underflow in solvers that do not scale them, as LAPACK does
        trace = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        scale = torch.where(trace > 0, trace, 1.0)
        values, vectors = torch.linalg.eigh(gram / scale[:, :, None])
        values, vectors = values.flip(1), vectors.flip(2)
        return scale * torch.where(values > _ROUNDING * values[:, :1], values, 0.0), vectors

    def combined(
        self, samples: Int64[Tensor, " R"], classes: Int64[Tensor, "R k"], coefficients: Float[Tensor, "R k"]
    ) -> Float[Tensor, "R C"]:
        r"""Return $\sum_c a_c (e_c - p)$ for coefficients a of some classes of each row's sample."""
        p, q, top = self.p[samples], self.complements[samples], self.largest[samples, :1]
        sums = -p * coefficients.sum(1, keepdim=True)
        sums.scatter_add_(1, classes, coefficients)
        # the largest p, which may be nearly 1: a (1 - p) less p times the other coefficients
        own = torch.where(classes == top, coefficients, 0.0).sum(1, keepdim=True)
        rest = torch.where(classes == top, 0.0, coefficients).sum(1, keepdim=True)
        return sums.scatter(1, top, own * q.gather(1, top) - p.gather(1, top) * rest)


def _softmax_sizes(outputs: Float[Tensor, "n C"]) -> Float[Tensor, "n r"]:
    softmax = _Softmax.of(outputs)
    values, _ = softmax.eigenpairs()
    if values.shape == outputs.shape:
        return values
    of_classes = softmax.p * softmax.squared_distances
    return torch.cat([values, of_classes.scatter(1, softmax.largest, 0.0)], dim=1)


def _softmax_cotangents(
    outputs: Float[Tensor, "n C"], samples: Int64[Tensor, " R"], rows: Int64[Tensor, " R"]
) -> Float[Tensor, "R C"]:
    softmax = _Softmax.of(outputs)
    values, vectors = softmax.eigenpairs()
    k = values.shape[1]
    weights = torch.where(values[:, None] > 0, vectors, 0.0) * softmax.roots()[:, :, None]
    of_eigenvectors = weights[samples, :, rows.clamp_max(k - 1)]
    largest = softmax.largest[samples]
    c = (rows - k).clamp_min(0)[:, None]
    leading = (largest == c).any(1, keepdim=True)
    root = torch.where(leading, 0.0, softmax.p[samples[:, None], c].sqrt())
    of_class = torch.cat([root, root.new_zeros(len(root), k - 1)], dim=1)
    is_eigenvector = (rows < k)[:, None]
    return softmax.combined(
        samples, torch.where(is_eigenvector, largest, c), torch.where(is_eigenvector, of_eigenvectors, of_class)
    )
