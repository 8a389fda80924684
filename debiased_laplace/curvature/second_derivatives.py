r"""Second derivatives of losses: $u^\top \nabla^2 \ell_n u$ of each sample, and products $\sum_n \nabla^2 \ell_n x$.

Forward mode twice gives the quadratics of all samples of a batch at once. Operations without it fall back to backward
mode twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from debiased_laplace.curvature.as_found import raise_interrupt
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch

_TOGETHER = 16  # directions at once
_ASYMMETRY, _ASYMMETRY_OF_HALF = 0.01, 0.2  # relative to the Hessian, by rounding
_WITHOUT_HESSIAN = (
    "Expected curvature='ggn' or 'ef' (of a posterior: a backend of the GGN, or None), which take first derivatives "
    "only."
)


class SecondDerivatives:
    """Hessians of the samples' losses with respect to the selected parameters, by the fastest mode that works.

    Raises:
        ValueError: if the model cannot be differentiated twice, or torch's Hessian of it is not symmetric.
    """

    def __init__(
        self, selection: ParameterSelection, parameters: dict[str, Tensor], likelihood: Likelihood, batch: Batch
    ):
        self.selection, self.parameters, self.likelihood = selection, parameters, likelihood
        generator = torch.Generator().manual_seed(0)
        U = torch.randn(selection.n_parameters, 2, generator=generator).to(selection.vector())
        batch = batch.first(2)
        try:
            products = self._looped_products(batch, U)
        except RuntimeError as error:
            raise ValueError(f"The model could not be differentiated twice: {error}. {_WITHOUT_HESSIAN}") from error
        self._check_symmetry(U, products)
        self.forward_quadratics = _agrees(
            lambda: self._forward_bilinears(batch, U, U.flip(1)), self._looped_bilinears(batch, U, U.flip(1))
        )
        self.forward_products = _agrees(lambda: self._forward_products(batch, U), products)

    def _check_symmetry(self, U: Tensor, products: Tensor) -> None:
        r"""Check $u^\top H v = v^\top H u$ for two vectors of independent standard normal numbers.

        Raises:
            ValueError: if they differ, as an operation's derivative of second order is then wrong.
        """
        bilinears = U.mT @ products
        is_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.selection.model.parameters())
        # the difference is of the size of the norm of H - H', and the norms of products are those of H
        most = (_ASYMMETRY_OF_HALF if is_half else _ASYMMETRY) * products.norm(dim=0).max()
        if not bool((bilinears[0, 1] - bilinears[1, 0]).abs() <= most):
            raise ValueError(
                "The Hessian by double backward is not symmetric: an operation of the model has a wrong second "
                f"derivative (a custom autograd.Function whose backward cannot be differentiated?). {_WITHOUT_HESSIAN}"
            )

    def quadratics(self, batch: Batch, directions: Tensor) -> Tensor:
        r"""Return per-sample $u_i^\top \nabla^2 \ell_n u_i$ (n, k) along directions (P, k)."""
        return self.bilinears(batch, directions, directions)

    def bilinears(self, batch: Batch, left: Tensor, right: Tensor) -> Tensor:
        r"""Return per-sample $u_i^\top \nabla^2 \ell_n v_i$ (n, k), for the columns of two matrices (P, k)."""
        how = self._forward_bilinears if self.forward_quadratics else self._looped_bilinears
        pairs = zip(left.split(_TOGETHER, dim=1), right.split(_TOGETHER, dim=1), strict=True)
        return torch.cat([how(batch, U, V) for U, V in pairs], dim=1)

    def products(self, batch: Batch, X: Tensor) -> Tensor:
        """Return the sum over the samples of their Hessians times X (P, b)."""
        how = self._forward_products if self.forward_products else self._looped_products
        return torch.cat([how(batch, part) for part in X.split(_TOGETHER, dim=1)], dim=1)

    def _losses(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        losses = self.likelihood.per_sample_loss(self.selection.call(parameters, batch.inputs), batch.targets)
        return batch.scaled(losses)

    def _forward_bilinears(self, batch: Batch, U: Tensor, V: Tensor) -> Tensor:
        def along(u: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
            def slope(p: dict[str, Tensor]) -> Tensor:
                return jvp(lambda q: self._losses(q, batch), (p,), (u,))[1]  # type: ignore[no-any-return]

            return jvp(slope, (self.parameters,), (v,))[1]  # type: ignore[no-any-return]

        values: Tensor = vmap(along, out_dims=1)(self.selection.unflatten(U.mT), self.selection.unflatten(V.mT))
        return values

    def _looped_bilinears(self, batch: Batch, U: Tensor, V: Tensor) -> Tensor:
        rows = []
        for sample in batch.chunks(1):
            HV = self._looped_products(sample, V)
            rows.append((U * HV).sum(0))
        return torch.stack(rows)

    def _forward_products(self, batch: Batch, X: Tensor) -> Tensor:
        gradient = grad(lambda p: self._losses(p, batch).sum())

        def along(x: dict[str, Tensor]) -> Tensor:
            return self.selection.flatten(jvp(gradient, (self.parameters,), (x,))[1])

        products: Tensor = vmap(along, out_dims=1)(self.selection.unflatten(X.mT))
        return products

    def _looped_products(self, batch: Batch, X: Tensor) -> Tensor:
        leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        values = list(leaves.values())
        with torch.enable_grad():
            loss = self._losses(leaves, batch).sum()
            gradients = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True, materialize_grads=True)
            gradient = self.selection.flatten(dict(zip(leaves, gradients, strict=True)))
            columns = []
            for x in X.unbind(1):
                product = torch.autograd.grad(
                    gradient @ x, values, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                columns.append(self.selection.flatten(dict(zip(leaves, product, strict=True))))
        return torch.stack(columns, dim=1).detach()


def _agrees(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    """Return whether the fast mode runs and agrees with the slow one."""
    try:
        found = compute()
    # torch raises many types for operations that it cannot transform
    except Exception as error:
        raise_interrupt(error)
        return False
    rounding = 1e4 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((found - expected).abs() <= rounding + 1e-3 * expected.abs()).all())
