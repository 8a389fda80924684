"""Derivatives by a backend of laplace-torch, on copies of the model.

A backend is used only for features that agree with torch.func on a few samples.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from laplace.curvature import CurvatureInterface
from laplace.curvature.backpack import CTX
from laplace.curvature.curvlinops import CurvlinopsInterface
from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from debiased_laplace.curvature.as_found import raise_interrupt
from debiased_laplace.curvature.derivatives import looped_rows
from debiased_laplace.curvature.kfac import KfacApproximation, KfacSums
from debiased_laplace.curvature.kronecker import KroneckerFactors
from debiased_laplace.curvature.likelihoods import in_columns
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection, call_with, logits_of
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs, MappingKeys

BackendFeature = Literal["rows", "kfac", "hessian"]
Drawn = Literal["drawn kfac"]


class BackendDerivatives:
    """Backend of laplace-torch on copies of the model, for derivatives with respect to the selected parameters.

    Args:
        backend: a class of laplace-torch's.
        root: of the curvature that it stands for; None for the Hessian.
        network: as met; the model itself is never handed to the backend.
        keys: where a mapping holds what.
        of_mappings: whether inputs are mappings.
    """

    def __init__(
        self, backend: type, root: OutputRoot | None, network: Network, keys: MappingKeys, *, of_mappings: bool
    ):
        self.name = backend.__name__
        self._cls, self._root, self._selection, self._keys = backend, root, network.selection, keys
        self._of_mappings = of_mappings
        self._likelihood, self._n_outputs = network.likelihood, network.n_outputs
        self._last_layer = network.selection.last_layer is not None
        self._backends: dict[str, CurvatureInterface] = {}
        self._hooks: dict[str, list[RemovableHandle]] = {}
        self._factored: tuple[str, ...] = ()
        self._right: set[BackendFeature] = set()
        self._approximation: str | None = None

    def try_feature(
        self, feature: BackendFeature, network: Network, some: Batch, kfac: KfacApproximation | None
    ) -> str | None:
        """Use the backend for a feature if it is right on some samples; otherwise return the reason why not."""
        agrees = {"rows": self._rows_agree, "kfac": self._kfac_agrees, "hessian": self._hessian_agrees}[feature]
        try:
            fine = agrees(network, some, kfac)
        # whatever a backend raises for a model that it does not know
        except Exception as error:
            raise_interrupt(error)
            first_line = (str(error).splitlines() or [""])[0]
            return f"{type(error).__name__}: {first_line}"
        if not fine:
            return "its numbers are not those of one sample at a time"
        self._right.add(feature)
        self._approximation = kfac
        return None

    def offers_rows(self, root: OutputRoot) -> bool:
        """Return whether the backend computes the rows of this root."""
        return "rows" in self._right and root == self._root

    def offers_kfac(self, root: OutputRoot, approximation: str) -> bool:
        """Return whether the backend computes the Kronecker factors of this approximation."""
        return "kfac" in self._right and root == self._root and approximation == self._approximation

    def offers_hessian(self) -> bool:
        """Return whether the backend computes the Hessian of the loss."""
        return "hessian" in self._right

    def rows(self, batch: Batch, root: OutputRoot, targets_or_noise: Tensor) -> Tensor:
        """Return rows from the backend's Jacobians (GGN) or gradients (empirical Fisher).

        Raises:
            ValueError: if they have another shape than they should.
        """
        n, C, P = len(batch), self._n_outputs, self._selection.n_parameters
        with self._asked("rows") as backend:
            if root.kind == "EF":
                G = self._own(backend.gradients(batch.inputs, self._targets(batch))[0].detach())
                _check_shape(G, (n, P), "gradients")
                # laplace-torch's are of the squared error, twice the gradient of the negative log-likelihood
                return G[:, None, :] * backend.factor
            ask = backend.last_layer_jacobians if self._last_layer else backend.jacobians
            J, outputs = (t.detach() for t in ask(batch.inputs))
            J = self._own(J)
            _check_shape(J, (n, C, P), "Jacobians")
            return root.transposed(outputs, targets_or_noise, J)

    def _targets(self, batch: Batch) -> Tensor:
        return in_columns(batch.targets, self._n_outputs)

    def kfac(self, batches: Iterable[Batch], n_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the backend's factors of every parameter, as a mean over samples."""
        n_draws = self._n_draws
        options: dict[str, Any] = {"kfac_approx": self._approximation} if self._is_curvlinops else {}
        if n_draws and self._is_curvlinops:
            options["mc_samples"] = n_draws
        # BackPACK and ASDL draw one target a sample: the mean over calls is the mean over draws
        calls = n_draws if n_draws and not self._is_curvlinops else 1
        repeated = (batch for batch in batches for _ in range(calls))
        found = self._factors("drawn kfac" if n_draws else "kfac", repeated, n_samples * calls, options)
        return {name: found[name] for name in self._factored}

    def _factors(
        self, feature: BackendFeature | Drawn, batches: Iterable[Batch], n_samples: int, options: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            with self._asked(feature) as backend:
                # Curvlinops would draw the same for every batch
                seed = {"seed": int(torch.randint(2**31 - 1, ()))} if "mc_samples" in options else {}
                factors = backend.kron(batch.inputs, self._targets(batch), N=n_samples, **options, **seed)[1].kfacs
            # the empirical Fisher of the squared error is twice that of the negative log-likelihood
            weight = (backend.factor if isinstance(self._root, EmpiricalFisher) else 1.0) / n_samples
            for name, pair in zip(self._names, factors, strict=True):
                left = pair[0].detach().double() * weight
                right = pair[1].detach().double() if len(pair) == 2 else left.new_ones(1)
                if name in sums:
                    left = sums[name][0] + left
                    right = sums[name][1] + right if len(pair) == 2 else right
                sums[name] = (left, right)
        return sums

    def hessian(self, batch: Batch) -> Tensor:
        """Return the backend's dense Hessian."""
        # laplace-torch's unit matrix has the default dtype and device, which may be neither of the model's
        with self._asked("hessian") as backend, _defaults_of(next(self._selection.model.parameters())):
            H = backend.full(batch.inputs, self._targets(batch))[1].detach()
        if self._last_layer:
            return H
        own = self._selection.indices.to(H.device)
        return H[own][:, own]

    @contextmanager
    def _asked(self, feature: BackendFeature | Drawn) -> Iterator[CurvatureInterface]:
        """Yield the backend for a feature, while it computes.

        Gradients are on, and the backends' own warnings (deprecated hooks, scripted functions) kept to themselves.
        BackPACK keeps the handles of all models' hooks in one list, and removes all of them after computing Jacobians:
        every feature has a list of its own.
        """
        elsewhere, CTX.hook_handles = CTX.hook_handles, self._hooks.get(feature, [])
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield self._backend(feature)
        finally:
            self._hooks[feature], CTX.hook_handles = CTX.hook_handles, elsewhere

    def _backend(self, feature: BackendFeature | Drawn) -> CurvatureInterface:
        if feature not in self._backends:
            model = copy.deepcopy(self._selection.model).eval()
            options: dict[str, Any] = {"stochastic": True} if feature == "drawn kfac" else {}
            name = self._selection.last_layer
            if self._of_mappings:
                model, name = _TakesMapping(model), f"model.{name}"
            if self._last_layer:
                model = FeatureExtractor(model, last_layer_name=name)
                options["last_layer"] = True
            model.output_size = self._n_outputs  # type: ignore[assignment]
            likelihood = "classification" if self._likelihood.name == "classification" else "regression"
            keys = {"dict_key_x": self._keys.dict_key_x, "dict_key_y": self._keys.dict_key_y}
            self._backends[feature] = self._cls(model, likelihood, **keys, **options)
        return self._backends[feature]

    @property
    def _is_curvlinops(self) -> bool:
        return issubclass(self._cls, CurvlinopsInterface)

    @property
    def _n_draws(self) -> int:
        """Number of draws of the Monte-Carlo GGN; 0 for other curvatures."""
        return self._root.n_draws if isinstance(self._root, MonteCarloGaussNewton) else 0

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of the parameters in the order of the backend's factors."""
        if self._last_layer:
            return self._selection.names
        return ParameterSelection.all_weights(self._selection.model).names

    def _own(self, of_all: Tensor) -> Tensor:
        """Return the columns of the selected parameters."""
        if self._last_layer or of_all.shape[-1] == self._selection.n_parameters:
            return of_all
        return of_all[..., self._selection.indices.to(of_all.device)]

    def _rows_agree(self, network: Network, some: Batch, kfac: KfacApproximation | None) -> bool:  # noqa: ARG002
        root = self._root
        assert root is not None  # for the type checker
        some = some.first(2)
        targets_or_noise = root.targets_or_noise(some.targets, network.n_outputs, torch.Generator().manual_seed(0))

        def cotangents(outputs: Tensor, known: Tensor) -> Tensor:
            return root.columns(outputs, known, slice(None))

        expected, _ = looped_rows(network.selection, network.parameters, some.inputs, targets_or_noise, cotangents)
        return _close(self.rows(some, root, targets_or_noise), expected)

    def _hessian_agrees(self, network: Network, some: Batch, kfac: KfacApproximation | None) -> bool:  # noqa: ARG002
        whole = network.selection if self._last_layer else ParameterSelection.all_weights(network.selection.model)
        P = whole.n_parameters
        if network.available_memory < 3 * 8 * P * P:
            raise NotImplementedError(f"its dense Hessian of {P} parameters does not fit into a quarter of the memory")
        some = some.first(2)
        derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, some)
        U = torch.randn(network.n_parameters, 2, generator=torch.Generator().manual_seed(1)).to(network.like)
        return _close(self.hessian(some).to(U.dtype) @ U, derivatives.products(some, U))

    def _kfac_agrees(self, network: Network, some: Batch, kfac: KfacApproximation | None) -> bool:
        if kfac != "expand" and not self._is_curvlinops:
            raise NotImplementedError(f"it has no kfac_approx={kfac!r}")
        self._approximation = kfac
        # draws differ from draws: the Monte-Carlo factors are right where the exact ones by the same hooks are
        known = GaussNewton(network.likelihood) if self._n_draws else self._root
        assert known is not None  # for the type checker
        assert kfac is not None
        options = {"kfac_approx": kfac} if self._is_curvlinops else {}
        found = self._factors("kfac", [some], len(some), options)
        sums = KfacSums(network, known, kfac)
        sums.add(some, known.targets_or_noise(some.targets, network.n_outputs, torch.Generator().manual_seed(0)))
        ours = sums.factors()
        self._factored = tuple(ours)
        if self._n_draws:
            self.kfac([some], len(some))
        return set(found) >= set(ours) and all(_same_product(found[name], ours[name]) for name in ours)


class _TakesMapping(nn.Module):
    """Model of mappings as laplace-torch's backends call it: from one mapping to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the logits."""
        return logits_of(call_with(self.model, inputs, self.model))


def _same_product(found: tuple[Tensor, Tensor], expected: KroneckerFactors) -> bool:
    """Return whether two products left ⊗ right are equal, whichever factor carries the scale."""
    own = (expected.left, expected.right)
    if any(f.shape != e.shape for f, e in zip(found, own, strict=True)):
        return False
    return _close(_product(*found), _product(*own))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return a normal form of left ⊗ right: its trace, and both factors scaled to that trace."""
    traces = [f.diagonal().sum() if f.ndim == 2 else f.sum() for f in (left, right)]
    size = traces[0] * traces[1]
    if size == 0:
        return left.new_zeros(left.numel() + right.numel() + 1)
    parts = [(f / t).flatten() * size for f, t in zip((left, right), traces, strict=True)]
    return torch.cat([*parts, size[None]])


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    rounding = 200 * torch.finfo(torch.float32).eps * expected.abs().max()
    return bool(((found - expected).abs() <= rounding + 1e-3 * expected.abs()).all())


def _check_shape(found: Tensor, expected: tuple[int, ...], what: str) -> None:
    if found.shape != expected:
        raise ValueError(f"its {what} have the shape {tuple(found.shape)}, not {expected}")


@contextmanager
def _defaults_of(like: Tensor) -> Iterator[None]:
    """Make a tensor's dtype and device the defaults of new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with like.device:
            yield
    finally:
        torch.set_default_dtype(before)
