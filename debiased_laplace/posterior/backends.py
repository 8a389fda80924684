"""laplace-torch's curvature backends: which curvature each stands for, and its own derivatives where they are right.

A backend works on a copy of the user's model, because BackPACK and ASDL leave hooks and attributes behind. Before it is
used, what it gives on two samples is compared with torch.func; where it fails or disagrees, torch.func computes
instead, a warning says why, and `curvature_source` names who did.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.curvature.asdl import AsdlHessian
from laplace.curvature.backpack import BackPackInterface
from laplace.curvature.curvlinops import CurvlinopsHessian, CurvlinopsInterface
from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn

from debiased_laplace.curvature.derivatives import looped_rows
from debiased_laplace.curvature.kronecker import KfacSums
from debiased_laplace.curvature.likelihoods import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection, takes_keywords
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, MonteCarloGaussNewton, OutputRoot
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs, MappingKeys
from debiased_laplace.posterior.hyperparameters import integer

CurvatureKind = Literal["GGN", "Monte-Carlo GGN", "EF", "Hessian"]
Task = Literal["rows", "kfac", "hessian"]


@dataclass(frozen=True)
class BackendChoice:
    """The backend that the user asked for.

    Attributes:
        backend: a class of laplace-torch's; None: torch.func.
        kind: which curvature it stands for.
        n_draws: of the Monte-Carlo GGN.
        kwargs: passed to the backend's constructor.
    """

    backend: type | None
    kind: CurvatureKind
    n_draws: int
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, backend: Any, kwargs: dict[str, Any] | None) -> "BackendChoice":
        """What the constructor's `backend` and `backend_kwargs` say.

        Raises:
            ValueError: if it is no backend that can be used, or an option is not known.
        """
        left = dict(kwargs or {})
        stochastic, n_draws = bool(left.pop("stochastic", False)), left.pop("num_samples", None)
        if left:
            raise ValueError(
                f"backend_kwargs may hold 'stochastic' and 'num_samples'; got {sorted(left)}. last_layer and "
                "subnetwork_indices follow from subset_of_weights."
            )
        kind = _kind(backend)
        if (stochastic or n_draws is not None) and kind != "GGN":
            raise ValueError(f"stochastic and num_samples are of the GGN; {backend.__name__} computes the {kind}.")
        if n_draws is not None and not stochastic:
            raise ValueError("num_samples is of stochastic=True; expected both in backend_kwargs.")
        n_draws = 1 if n_draws is None else integer(n_draws, "num_samples")
        if n_draws < 1:
            raise ValueError(f"num_samples must be at least 1; got {n_draws}.")
        options = {"stochastic": True} if stochastic else {}
        return cls(backend, "Monte-Carlo GGN" if stochastic else kind, n_draws, options)

    def root(self, likelihood: Likelihood) -> OutputRoot | None:
        """The root of the curvature; None for the Hessian, which has none."""
        if self.kind == "GGN":
            return GaussNewton(likelihood)
        if self.kind == "EF":
            return EmpiricalFisher(likelihood)
        if self.kind == "Monte-Carlo GGN":
            return MonteCarloGaussNewton(likelihood, self.n_draws)
        return None

    def attached(self, network: Network, some: Batch, keys: MappingKeys, *, kfac: str | None) -> Network:
        """The network with the backend's derivatives, as far as they are right on some samples.

        Args:
            network: as met.
            some: a few samples.
            keys: where a mapping holds what.
            kfac: K-FAC's approximation, if its factors are needed.

        Warns:
            UserWarning: for each task that torch.func has to do instead, and why.
        """
        if self.backend is None:
            return network
        root = self.root(network.likelihood)
        tasks: list[Task] = ["hessian"] if root is None else ["rows"] if self.kind != "Monte-Carlo GGN" else []
        if kfac is not None and root is not None:
            tasks.append("kfac")
        if not tasks:
            return network
        foreign = BackendDerivatives(self, network, keys)
        for task in tasks:
            reason = foreign.try_task(task, network, some, root, kfac)
            if reason is not None:
                what = {"rows": "Jacobians or gradients", "kfac": "Kronecker factors", "hessian": "Hessian"}[task]
                warnings.warn(
                    f"{self.backend.__name__} cannot compute the {what} of this model ({reason}); torch.func does. "
                    "backend=CurvlinopsGGN or backend=None work for every model.",
                    stacklevel=6,
                )
        return replace(network, foreign=foreign)


def _kind(backend: Any) -> CurvatureKind:
    names = "CurvlinopsGGN, CurvlinopsEF, CurvlinopsHessian, BackPackGGN, BackPackEF, AsdlGGN, AsdlEF, AsdlHessian"
    if backend is None:
        return "GGN"
    if not isinstance(backend, type) or not issubclass(backend, CurvatureInterface):
        raise ValueError(f"Expected backend as None or one of laplace-torch's classes {names}; got {backend!r}.")
    if "asdfghjkl" in backend.__name__.lower():
        raise ValueError(
            f"{backend.__name__} needs a package that is not on the package index; expected one of {names}."
        )
    if issubclass(backend, GGNInterface):
        return "GGN"
    if issubclass(backend, EFInterface):
        return "EF"
    if issubclass(backend, CurvlinopsHessian | AsdlHessian):
        return "Hessian"
    raise ValueError(f"Expected backend as one of {names}; got {backend.__name__}, which says no curvature.")


class BackendDerivatives:
    """A backend on a copy of the model, asked for derivatives with respect to the selected parameters."""

    def __init__(self, choice: BackendChoice, network: Network, keys: MappingKeys):
        assert choice.backend is not None  # for the type checker
        self.name = choice.backend.__name__
        self._choice, self._selection, self._keys = choice, network.selection, keys
        self._likelihood, self._n_outputs = network.likelihood, network.n_outputs
        self._last_layer = network.selection.last_layer is not None
        self._backends: dict[Task, CurvatureInterface] = {}
        self._right: set[Task] = set()
        self._approximation: str | None = None

    def try_task(
        self, task: Task, network: Network, some: Batch, root: OutputRoot | None, kfac: str | None
    ) -> str | None:
        """Use the backend for a task if it does it right on some samples; else say why not."""
        try:
            with _quiet():
                fine = {"rows": self._rows_agree, "kfac": self._kfac_agrees, "hessian": self._hessian_agrees}[task](
                    network, some, root, kfac
                )
        # whatever a backend raises for a model that it does not know
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            return f"{type(error).__name__}: {first_line}"
        if not fine:
            return "its numbers are not those of one sample at a time"
        self._right.add(task)
        self._approximation = kfac
        return None

    def offers_rows(self, root: OutputRoot) -> bool:
        """For the root of its own curvature."""
        return "rows" in self._right and root.kind == self._choice.kind

    def offers_kfac(self, root: OutputRoot, approximation: str) -> bool:
        """For the approximation that was tried."""
        return "kfac" in self._right and root.kind == self._choice.kind and approximation == self._approximation

    def offers_hessian(self) -> bool:
        """Of the loss."""
        return "hessian" in self._right

    def rows(self, batch: Batch, root: OutputRoot, side: Tensor) -> Tensor:
        """Rows through the backend's Jacobians (GGN) or gradients (empirical Fisher)."""
        backend = self.backend("rows")
        with _quiet():
            if root.kind == "EF":
                G = backend.gradients(batch.inputs, batch.targets)[0].detach()
                # laplace-torch's are of the squared error, twice the gradient of the negative log-likelihood
                return self._own(G)[:, None, :] * backend.factor
            if self._last_layer:
                J, outputs = backend.last_layer_jacobians(batch.inputs)
            else:
                J, outputs = backend.jacobians(batch.inputs)
                J = self._own(J)
            return root.transposed(outputs.detach(), side, J.detach())

    def kfac(self, batches: Iterable[Batch], n_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The backend's factors of every parameter, as a mean over samples."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        # the empirical Fisher of the squared error is twice that of the negative log-likelihood
        backend = self.backend("kfac")
        weight = (backend.factor if self._choice.kind == "EF" else 1.0) / n_samples
        for batch in batches:
            with _quiet():
                options = {"kfac_approx": self._approximation} if self._takes_approximation else {}
                if self._choice.kind == "Monte-Carlo GGN" and self._takes_approximation:
                    options["mc_samples"] = self._choice.n_draws  # type: ignore[assignment]
                factors = backend.kron(batch.inputs, batch.targets, N=n_samples, **options)[1].kfacs
            for name, pair in zip(self._names, factors, strict=True):
                left = pair[0].detach().double() * weight
                right = pair[1].detach().double() if len(pair) == 2 else left.new_ones(1)
                if name in sums:
                    left = sums[name][0] + left
                    right = sums[name][1] + right if len(pair) == 2 else right
                sums[name] = (left, right)
        return sums

    def hessian(self, batch: Batch) -> Tensor:
        """The backend's dense Hessian."""
        with _quiet():
            H = self.backend("hessian").full(batch.inputs, batch.targets)[1].detach()
        if self._last_layer:
            return H
        own = self._selection.indices.to(H.device)
        return H[own][:, own]

    def backend(self, task: Task) -> CurvatureInterface:
        """The backend for a task, made at its first use: BackPACK forgets its hooks after computing Jacobians."""
        if task not in self._backends:
            cls = self._choice.backend
            assert cls is not None  # for the type checker
            model = copy.deepcopy(self._selection.model).eval()
            options, name = dict(self._choice.kwargs), self._selection.last_layer
            if takes_keywords(model, [self._keys.dict_key_x]):
                model, name = _TakesMapping(model), f"model.{name}"
            if self._last_layer:
                model = FeatureExtractor(model, last_layer_name=name)
                options["last_layer"] = True
            model.output_size = self._n_outputs  # type: ignore[assignment]
            likelihood = "classification" if self._likelihood.name == "classification" else "regression"
            keys = {"dict_key_x": self._keys.dict_key_x, "dict_key_y": self._keys.dict_key_y}
            self._backends[task] = cls(model, likelihood, **keys, **options)
        return self._backends[task]

    @property
    def _takes_approximation(self) -> bool:
        return issubclass(self._choice.backend or object, CurvlinopsInterface)

    @property
    def _names(self) -> tuple[str, ...]:
        """Parameters in the order of the backend's factors."""
        if self._last_layer:
            return self._selection.names
        return ParameterSelection.all_weights(self._selection.model).names

    def _own(self, of_all: Tensor) -> Tensor:
        """Columns of the selected parameters."""
        if self._last_layer or of_all.shape[-1] == self._selection.n_parameters:
            return of_all
        return of_all[..., self._selection.indices.to(of_all.device)]

    def _rows_agree(self, network: Network, some: Batch, root: OutputRoot | None, kfac: str | None) -> bool:  # noqa: ARG002
        assert root is not None  # for the type checker
        some = some.first(2)
        side = root.side(some.targets, network.n_outputs, torch.Generator().manual_seed(0))

        def cotangents(outputs: Tensor, known: Tensor) -> Tensor:
            return root.columns(outputs, known, slice(None))

        expected, _ = looped_rows(network.selection, network.parameters, some.inputs, side, cotangents)
        return _close(self.rows(some, root, side), expected)

    def _hessian_agrees(self, network: Network, some: Batch, root: OutputRoot | None, kfac: str | None) -> bool:  # noqa: ARG002
        some = some.first(2)
        derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, some)
        U = torch.randn(network.n_parameters, 2, generator=torch.Generator().manual_seed(1)).to(network.like)
        return _close(self.hessian(some).to(U.dtype) @ U, derivatives.products(some, U))

    def _kfac_agrees(self, network: Network, some: Batch, root: OutputRoot | None, kfac: str | None) -> bool:
        assert root is not None  # for the type checker
        if kfac != "expand" and not self._takes_approximation:
            raise NotImplementedError(f"it has no kfac_approx={kfac!r}")
        self._approximation = kfac
        found = self.kfac([some], len(some))
        if self._choice.kind == "Monte-Carlo GGN":
            # draws differ: only what is known to be wrong is told apart
            convolutional = any(p.ndim > 2 for p in network.selection.model.parameters())
            if isinstance(self.backend("kfac"), BackPackInterface) and convolutional:
                raise NotImplementedError("its factors of convolutions are too large by the number of positions")
        sums = KfacSums(network, root, kfac)  # type: ignore[arg-type]
        sums.add(some, root.side(some.targets, network.n_outputs, torch.Generator().manual_seed(0)))
        ours = sums.factors()
        if not set(found) >= set(ours):
            return False
        for name, expected in ours.items():
            left, right = found[name]
            if left.shape != expected.left.shape or right.shape != expected.right.shape:
                return False
            if self._choice.kind == "Monte-Carlo GGN":
                continue
            if not _close(_product(left, right), _product(expected.left, expected.right)):
                return False
        return True


class _TakesMapping(nn.Module):
    """A Hugging Face model as laplace-torch's backends call it: one mapping in, logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits."""
        outputs = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        logits: Tensor = getattr(outputs, "logits", outputs)
        return logits


def _product(left: Tensor, right: Tensor) -> Tensor:
    """What identifies left ⊗ right, whichever factor carries the scale: its trace, and both factors of trace 1."""
    traces = [f.diagonal().sum() if f.ndim == 2 else f.sum() for f in (left, right)]
    size = traces[0] * traces[1]
    parts = [(f / t).flatten() * size for f, t in zip((left, right), traces, strict=True)]
    return torch.cat([*parts, size[None]])


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    rounding = 200 * torch.finfo(torch.float32).eps * expected.abs().max()
    return bool(((found - expected).abs() <= rounding + 1e-3 * expected.abs()).all())


@contextmanager
def _quiet() -> Iterator[None]:
    """Gradients on, and the backends' own warnings (deprecated hooks, scripted functions) kept to themselves."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
