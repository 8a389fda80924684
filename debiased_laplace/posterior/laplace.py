"""The posterior that users hold: laplace-torch's interface to a fit, the prior, and the predictive of both."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Float
from laplace.baselaplace import ParametricLaplace
from laplace.utils.feature_extractor import FeatureReduction
from torch import Tensor, nn

from debiased_laplace.checks import (
    boolean,
    finite,
    integer,
    name_of,
    network,
    number,
    one_of,
    one_positive,
    positive,
    shown,
    tensor,
    text,
)
from debiased_laplace.curvature.as_found import leaves_as_found
from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating, full_precision
from debiased_laplace.curvature.derivatives import find_capabilities
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.likelihoods import Regression, likelihood_named, shown_class_weights
from debiased_laplace.curvature.memory import LEAST, available_memory
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection, working_dtype
from debiased_laplace.curvature.positions import PositionWise
from debiased_laplace.curvature.subsets import SubsetOfWeights, WeightSubset
from debiased_laplace.data.batches import Batch, check_inputs
from debiased_laplace.data.drawing import Rows
from debiased_laplace.data.inputs import Inputs, MappingKeys, moved, n_samples_of, on_each
from debiased_laplace.data.sharing import digest, identified
from debiased_laplace.data.splitting import SubBatches
from debiased_laplace.debiasing.choice import Choice, Weighting
from debiased_laplace.debiasing.directions import SUPPORTED
from debiased_laplace.debiasing.held_out_kl import HeldOutKL
from debiased_laplace.debiasing.intervals import confidence_intervals
from debiased_laplace.debiasing.options import EstimatorOptions, Request, Structure
from debiased_laplace.debiasing.stopping import Stopping
from debiased_laplace.errors import NotFittedError, ProcessError
from debiased_laplace.fit_checkpoint import FitCheckpoint
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal, differentiable_log_det
from debiased_laplace.linalg.shard import Shard
from debiased_laplace.posterior import checkpoint, prior_tuning
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.posterior.candidates import Candidate, Target
from debiased_laplace.posterior.cost import FitCost, cost_of_fit
from debiased_laplace.posterior.drawn_fit import SamplingOptions
from debiased_laplace.posterior.fit import FitResult, FitSpec, SplitOptions
from debiased_laplace.posterior.growing import fit_again, fit_samples
from debiased_laplace.posterior.held_out_kl import estimate_for
from debiased_laplace.posterior.jacobian_backend import JacobianBackend
from debiased_laplace.posterior.noise import (
    as_noise,
    check_ratios,
    ratios_of,
    scale_of,
    shown_noise,
    warn_of_unit_noise,
)
from debiased_laplace.posterior.prior import (
    check_prior_mean,
    check_prior_precision,
    expand_prior,
    is_of_tensors,
    mixed_by_basis,
)
from debiased_laplace.predictive import links
from debiased_laplace.predictive.mean_field import GaussianLogits
from debiased_laplace.predictive.prediction import (
    ClassificationPrediction,
    Draws,
    RegressionPrediction,
    TargetPrediction,
)
from debiased_laplace.predictive.predictive import (
    Link,
    PredictionType,
    Predictive,
    check_draws,
    check_model_arguments,
    standard_normal,
)
from debiased_laplace.processes import Processes

_OF_LAPLACE_TORCH = ("classification", "regression", "reward_modeling")


class DebiasedParametricLaplace(ParametricLaplace):
    """A Laplace posterior whose curvature is estimated on split samples.

    Arguments up to `backend_kwargs` are those of laplace-torch's classes, in their order; all others are those of
    `DebiasedLaplace`, which makes the posterior.
    """

    _key: tuple[SubsetOfWeights, str]

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        sigma_noise: int | float | Tensor | None = None,
        prior_precision: int | float | Tensor = 1.0,
        prior_mean: int | float | Tensor = 0.0,
        temperature: int | float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        *,
        last_layer_name: str | None = None,
        subnetwork_indices: Tensor | None = None,
        feature_reduction: str | None = None,
        class_weights: Any = None,
        sampling: str = "curvature",
        n_rows: int | None = None,
        memory: int | None = None,
        process_group: Any = None,
        direction_samples: int | float | str = 0.5,
        magnitude_samples: int | float | None = None,
        **estimator: Any,
    ):
        network(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # its hooks are of training
            model = model.module
        self._given_processes = None if process_group is None else Processes.of(process_group)
        known = likelihood if isinstance(likelihood, Likelihood) else name_of(likelihood)
        kind = likelihood_named(known, class_weights)
        name = known.name if isinstance(known, Likelihood) else known
        keys = MappingKeys(text(dict_key_x, "dict_key_x"), text(dict_key_y, "dict_key_y"))
        if feature_reduction is not None and name_of(feature_reduction) not in {r.value for r in FeatureReduction}:
            expected = [r.value for r in FeatureReduction]
            raise ValueError(f"feature_reduction must be None or one of {expected}; got {feature_reduction!r}.")
        request = Request.of(self._structure, direction_samples, estimator)
        directions = 0.5 if "direction_samples" in request.open else direction_samples
        split = SplitOptions(directions, magnitude_samples, request.options.seed)  # type: ignore[arg-type]
        split.warn_of_no_effect(request, stacklevel=4)
        self._sampling = SamplingOptions(name_of(sampling), n_rows)  # type: ignore[arg-type]
        self._spec = FitSpec(
            model,
            kind,
            WeightSubset(self._key[0], last_layer_name, subnetwork_indices),
            BackendChoice.of(backend, backend_kwargs),
            keys,
            split,
            request,
            None if memory is None else integer(memory, "memory", minimum=LEAST, also=" (bytes; 512 MiB), or None"),
        )
        # None while only a forward pass can tell, as for the last layer
        self._selection: ParameterSelection | None = self._spec.subset.select(model)
        self._fit: FitResult | None = None
        # under the present hyper-parameters
        self._precision: LowRankPlusDiagonal | None = None
        self._distance: tuple[Tensor, Tensor, int, Tensor] | None = None
        self._prior_search: prior_tuning.PriorSearch | None = None
        self._noise_was_noted = False
        self._shared_memory: int | None = None
        super().__init__(
            model,
            # laplace-torch knows no others
            name if name in _OF_LAPLACE_TORCH else "classification",
            1.0,
            prior_precision,
            prior_mean,
            temperature,
            boolean(enable_backprop, "enable_backprop"),
            dict_key_x,
            dict_key_y,
        )
        self.likelihood = name
        self.sigma_noise = sigma_noise
        if self._selection is not None:
            self._take(self._selection)
        else:
            self.__dict__.update(n_params=None, n_layers=None, mean=None)

    @property
    def _dtype(self) -> torch.dtype:
        # of the trained parameters, which may be more precise than frozen ones
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return working_dtype(trained[0].dtype if trained else super()._dtype)

    @property
    def _processes(self) -> Processes:
        """Processes that share passes over samples: those given, or those of the default group of now."""
        return Processes.of() if self._given_processes is None else self._given_processes

    @property
    def is_sharded(self) -> bool:
        """Whether each of several processes holds some entries of the directions: all of them predict together."""
        return self._fit is not None and self._fit.estimate.curvature.shard is not None

    @property
    def _likelihood(self) -> Likelihood:
        """Likelihood of the flat outputs: where they have positions, the product over these."""
        return PositionWise.of(self._spec.likelihood, None if self._fit is None else self._fit.layout)

    @property
    def _structure(self) -> Structure:
        return self._key[1].removeprefix("debiased_")  # type: ignore[return-value]

    def _init_H(self) -> None:
        self.H: tuple[Tensor, ...] | None = None

    def _check_H_init(self) -> None:
        if self._fit is None:
            raise NotFittedError(f"This {type(self).__name__} is not fitted; call fit() first.")

    def __repr__(self) -> str:
        open_to_choice = self._spec.request.open if self._fit is None else frozenset()
        names = ["magnitudes", "complement"] if self._structure == "lowrank" else ["magnitudes"]
        resolved = self._options.resolved(prior_of_blocks=self._prior_is_of_blocks)
        shown = {name: "auto" if name in open_to_choice else getattr(resolved, name) for name in names}
        options = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        if not self._prior_is_of_blocks:
            options += ", a prior precision per parameter"
        backend = self._spec.backend
        if backend.kind != "GGN" or backend.backend is not None:
            options += f", {backend.kind}"
        over = "last layer" if self._selection is None else f"{self._selection.n_parameters:,} parameters"
        if self._selection is not None and self._selection.last_layer is not None:
            over = f"{over} of {self._selection.subset}"
        head = f"{type(self).__name__}({self.likelihood}, {over}, {options}"
        if self._fit is None:
            return f"{head}, not fitted)"
        split = self._fit.split
        used = (
            f"{split.n_samples}" if split.shared else f"{len(split.direction_indices)} + {len(split.magnitude_indices)}"
        )
        if split.of_rows:
            used = f"drawn rows of {split.n_samples}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        noise = "" if self.likelihood != "regression" else f", sigma_noise={self._shown_noise}"
        # where there are as many positions as classes, the shape does not tell them apart
        layout = "" if self._fit.layout is None else f", outputs {self._fit.layout}"
        return f"{head}{rank}{noise}{layout}, fitted on {used} of {split.n_data:.12g} samples)"

    @property
    def _shown_noise(self) -> str:
        shown = shown_noise(torch.as_tensor(self.sigma_noise))
        if not self._noise_is_open:
            return shown
        return f"{shown} ({'not given' if bool(self.noise_scale == 1) else 'tuned'})"

    # --- hyper-parameters: a change takes effect at once ---

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision: a tensor of one entry, one per parameter tensor, or one per parameter.

        One that differs between the entries of a parameter tensor has no place in a Kronecker basis. Set where the
        default complement has one, it makes the same samples be fitted again with complement="diagonal".
        """
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: int | float | Tensor) -> None:
        # a number goes to the model's precision directly: through torch's default dtype it would lose half its digits
        prior = torch.as_tensor(positive(value, "prior_precision"), dtype=self._dtype, device=self._device)
        prior = prior.reshape(1) if prior.ndim == 0 else prior
        mixed = prior.ndim == 1 and self._is_in_basis and self._fit is not None
        if mixed and len(prior) == self.selection.n_parameters and not is_of_tensors(prior, self.selection):
            self._leave_basis(prior)
            return
        check_prior_precision(prior, self._selection, in_basis=self._is_in_basis)
        self._prior_precision = prior
        self._precision = None

    @leaves_as_found()
    def _leave_basis(self, prior: Float[Tensor, " P"]) -> None:
        """Fit the same samples again, with a complement that allows a prior precision per parameter.

        Raises:
            ValueError: if structure or complement were asked for by name, or the samples are not known any more.
        """
        request, fit = self._spec.request, self.fit_result
        if self.is_sharded:
            raise ValueError(
                "One prior_precision per parameter needs another complement than the one fitted, 'kron'; with "
                "shard_directions=True, expected complement='diagonal' or 'none' of the posterior that was fitted."
            )
        if self._structure == "kron" or not (request.options.complement is None or "complement" in request.open):
            raise mixed_by_basis(len(prior), self.selection)
        if fit.pool is None and fit.drawn is None:
            raise ValueError(
                f"One prior_precision per parameter ({len(prior)}) needs another complement than the one fitted, "
                "'kron', and the fitted samples are not in a state or a pickle. Expected complement='diagonal' or "
                "'none' of the posterior that was fitted."
            )
        self._check_weights()
        before = dict(self.__dict__)
        try:
            self._fit, self._prior_precision = None, prior.detach()
            self._adopt(fit_again(self._spec, self._weighting, fit))
            self._prior_precision = prior
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    @property
    def _is_in_basis(self) -> bool:
        """Whether the posterior has a Kronecker basis, or is going to have one."""
        if self._fit is None:
            return self._structure == "kron" or self._options.complement == "kron"
        return self._structure == "kron" or self._fit.estimate.curvature.basis is not None

    @property
    def _prior_is_of_blocks(self) -> bool:
        """Whether there is one prior precision, or one per parameter tensor, or nothing is known of them yet."""
        selection, n = self._selection, len(self._prior_precision)
        return n == 1 or selection is None or n == len(selection.names)

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every parameter of the posterior, (P,)."""
        return expand_prior(self._prior_precision, self.selection)

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean: a tensor of one entry, or one per parameter."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: int | float | Tensor) -> None:
        finite(value, "prior_mean")
        mean = torch.as_tensor(value, dtype=self._dtype, device=self._device)
        check_prior_mean(mean, self._selection)
        self._prior_mean = mean

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise in units of the targets, one number or one per output.

        It is 1 in classification, and in regression until it is set, to None again included, or tuned.
        """
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: int | float | Tensor | None) -> None:
        noise = positive(self._unit_noise if value is None else value, "sigma_noise")
        noise = as_noise(torch.as_tensor(noise, dtype=self._dtype, device=self._device), self.likelihood)
        if self.likelihood == "regression":
            self._take_relative_noise(noise)
        self._sigma_noise, self._precision = noise, None
        self._noise_is_open = value is None and self.likelihood == "regression"

    @property
    def _unit_noise(self) -> float | list[float]:
        """Noise of scale 1, in the ratio that was fitted."""
        ratios = None if self._fit is None else getattr(self._spec.likelihood, "relative_noise", None)
        return 1.0 if ratios is None else list(ratios)

    def _take_relative_noise(self, noise: Tensor) -> None:
        """Weigh the outputs by their noise, as the curvature has to know before it is estimated.

        Raises:
            ValueError: if it was estimated with other weights.
        """
        known = getattr(self._spec.likelihood, "relative_noise", None)
        if self._fit is None:
            self._spec = replace(self._spec, likelihood=Regression(ratios_of(noise)))
        else:
            check_ratios(noise, known)

    @property
    def memory(self) -> int | None:
        """Bytes that a fit or a prediction may take beyond the model and the directions, as given.

        A state does not hold it.
        """
        return self._spec.memory

    @property
    def noise_scale(self) -> Tensor:
        """Noise in whose units curvature and loss are: sigma_noise, or the geometric mean over outputs."""
        noise = torch.as_tensor(self.sigma_noise)
        return scale_of(noise)

    @property
    def _H_factor(self) -> Tensor:
        return 1 / self.noise_scale.square() / self.temperature

    @property
    def temperature(self) -> float:
        """Temperature T of the likelihood: the posterior of N / T samples."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: int | float) -> None:
        self._temperature = float(one_positive(value, "temperature"))
        self._precision = None

    # --- the fit ---

    @leaves_as_found()
    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        n_data: int | None = None,
        tolerance: float | None = None,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Estimate the curvature of the full batch from the samples of a loader.

        Args:
            train_loader: any iterable of batches, read once; a batch is (inputs, targets), (inputs, targets,
                sample_weights) or a mapping of tensors. Order, shuffling and augmentation do not matter. With
                sampling="uniform" a `DataLoader` over a map-style data set, or a list of batches: samples are split by
                their position before any is loaded.
            override: forget earlier fits. False: continue from the fitted samples with those of the loader that were
                not fitted yet. The posterior equals that of a single fit of all of them, and costs as much. A state
                holds the identities of the samples, not the samples: after loading it, the loader yields both.
            progress_bar: show progress.
            n_data: size N of the data set that the likelihood stands for, including the given samples; default: as
                given before (`override=False`), or else all samples that loaders have yielded.
            tolerance: nats of held-out KL; double the rows (sampling="uniform": the samples), in an order that the seed
                fixes, until that gains less, by over two standard errors, or `n_rows` or all are used. `stopping`
                reports the gains. None: use all at once.
            checkpoint_dir: folder in which scores, drawn rows and blocks of computed rows are kept while the fit runs,
                and from which the same fit goes on after an interruption, to the same result; deleted at the end. It
                may take as much room as the rows. Files are pickles: take a folder that only you write to.

        Raises:
            ValueError: if loader, samples, weights or options cannot be used, or `checkpoint_dir` holds another fit;
                with `override=False` also if no sample is new, the weights have changed, or, after loading a state, the
                loader does not yield the fitted samples again. Model and posterior stay as they were.
        """
        processes = self._processes
        with processes.together():
            if hasattr(override, "shape"):
                raise ValueError(
                    "Expected fit(loader), with a DataLoader of (inputs, targets) or a list of such batches, as in "
                    f"fit([(X, y)]); got a second array, {shown(override)}, as override."
                )
            boolean(override, "override")
            boolean(progress_bar, "progress_bar")
            n_data = None if n_data is None else integer(n_data, "n_data")
            if isinstance(tolerance, bool):
                raise ValueError(f"tolerance is in nats of held-out KL, or None; got {tolerance!r}.")
            tolerance = None if tolerance is None else float(one_positive(tolerance, "tolerance (nats)"))
            earlier = None if override else self._fit
            checkpoint = FitCheckpoint.at(checkpoint_dir)
            if checkpoint and earlier is not None:
                raise ValueError("checkpoint_dir is of a fit of all samples; got it with override=False.")
            if checkpoint:
                checkpoint.expect("options", str((self._of_the_curvature, n_data, tolerance)))
            if processes.several:
                processes.check_same(
                    model=self._spec.model,
                    **self._of_the_curvature,
                    checkpoint_dir=bool(checkpoint),
                    prior_precision=_digest(self.prior_precision),
                    noise=(_digest(torch.as_tensor(self.noise_scale)), self.temperature),
                    n_data=n_data,
                    tolerance=tolerance,
                )
            if earlier is not None:
                self._check_weights()
            fit = fit_samples(
                replace(self._spec, processes=processes, checkpoint=checkpoint),
                self._weighting,
                train_loader,
                earlier,
                sampling=self._sampling,
                n_data=n_data,
                tolerance=tolerance,
                progress_bar=progress_bar and processes.rank == 0,
            )
            self._adopt(fit)
        checkpoint.remove()
        self._warn_of_dropped_directions()
        self._warn_of_default_noise()

    @property
    def _of_the_curvature(self) -> dict[str, object]:
        """What the estimate of the curvature depends on beside model and samples."""
        spec, weights = self._spec, getattr(self._spec.likelihood, "class_weights", None)
        return {
            "likelihood": self.likelihood,
            "class_weights": None if weights is None else weights.tolist(),
            "subset": (spec.subset.kind, spec.subset.last_layer_name, _digest(spec.subset.subnetwork_indices)),
            "options": (spec.split, spec.request.options, sorted(spec.request.open), spec.backend.kind, self._sampling),
        }

    @leaves_as_found()
    def cost(self, loader: Any) -> FitCost:
        """Estimate what `fit(loader)` would take, from two batches: passes, seconds and memory.

        Fits that try the candidates of open options ("auto") come on top.

        Args:
            loader: as for `fit`; its length must be known.

        Returns:
            The estimate; print it.

        Raises:
            ValueError: if loader or samples cannot be used, the number of samples is not known, two batches have no
                curvature, or the curvature is a Hessian.
        """
        return cost_of_fit(self._spec, self._sampling, loader, prior_of_blocks=self._prior_is_of_blocks)

    def _weighting(self, selection: ParameterSelection, n_data: int | float) -> Weighting:
        """Prior and likelihood weight of the posterior of these parameters."""
        prior = self.prior_precision.detach()
        check_prior_precision(prior, selection, in_basis=self._is_in_basis)
        weight = n_data / (float(self.noise_scale.detach()) ** 2 * self.temperature)
        return Weighting(weight, expand_prior(prior, selection), len(prior) in (1, len(selection.names)))

    def _adopt(self, fit: FitResult) -> None:
        """Become the posterior of a fit.

        Raises:
            ValueError: if prior precision or prior mean do not fit the parameters.
        """
        self._take(fit.selection)
        self._fit, self._precision, self._prior_search = fit, None, None
        self.mean = self._embed(fit.mean[None])[0]
        self.loss, self.n_data, self.n_outputs = fit.loss, fit.split.n_data, fit.n_outputs
        curvature = fit.estimate.curvature
        self.H = (curvature.diagonal, curvature.factor, curvature.weights)
        # processes that predict together take the same chunks
        self._shared_memory = self._spec.memory
        if curvature.shard is not None:
            own = available_memory(fit.mean.device, self._spec.memory)
            self._shared_memory = min(curvature.shard.processes.gathered("available memory", own))

    def _take(self, selection: ParameterSelection) -> None:
        """Be over these parameters; a prior that was set before they were known is checked now."""
        check_prior_precision(self._prior_precision, selection, in_basis=self._is_in_basis)
        check_prior_mean(self._prior_mean, selection)
        self._selection, self._precision = selection, None
        # as laplace-torch counts
        self.n_layers, self.n_params = len(selection.names), selection.n_parameters
        if self._key[0] == "subnetwork":
            self.n_params, self.n_params_subnet = sum(p.numel() for p in self.params), selection.n_parameters

    def _warn_of_dropped_directions(self) -> None:
        """Warn where `rank=None` left out directions that the posterior would have noticed."""
        # laplace-torch's training by marginal likelihood gives hyper-parameters that carry a graph
        dropped = self.n_data * float(torch.as_tensor(self._H_factor).detach()) * self.fit_result.estimate.dropped
        prior = float(self.prior_precision.detach().min())
        alone = self._structure == "lowrank" and self._options.complement == "none"
        if alone and self._options.rank is None and dropped > prior:
            warnings.warn(
                f"rank=None left out directions below {SUPPORTED:g} of the largest curvature. In them the data are "
                f"worth up to {dropped / prior:.3g} times as much as the prior: the posterior is too wide there. "
                "Inputs of very different scales cause this: standardize them, raise the rank, or take a complement.",
                stacklevel=4,
            )

    @property
    def residual_noise(self) -> Float[Tensor, ""]:
        """Root mean square of the fitted samples' residuals in regression: the noise, if the network were exact."""
        fit = self.fit_result
        squares = 2 * fit.loss / (fit.split.n_data * fit.n_outputs)
        return fit.mean.new_tensor(max(squares, torch.finfo(fit.mean.dtype).tiny)).sqrt()

    def _warn_of_default_noise(self) -> None:
        """Warn once where the noise is 1 because nobody said otherwise, and the residuals are of another size."""
        if not self._noise_is_open or self._noise_was_noted:
            return
        self._noise_was_noted = True
        warn_of_unit_noise(float(self.residual_noise), stacklevel=5)

    @property
    def _options(self) -> EstimatorOptions:
        """The estimator's options: as asked for, and once fitted as chosen."""
        return self._spec.request.options if self._fit is None else self._fit.options

    @property
    def fit_result(self) -> FitResult:
        """Everything that the fit found.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_H_init()
        assert self._fit is not None  # for the type checker
        return self._fit

    @property
    def selection(self) -> ParameterSelection:
        """Parameters of the posterior.

        Raises:
            NotFittedError: where only `fit` can find the last layer.
        """
        if self._selection is None:
            self._check_H_init()
        assert self._selection is not None  # for the type checker
        return self._selection

    @property
    def mean_subnet(self) -> Float[Tensor, " P"]:
        """Trained values of the parameters of the posterior."""
        return self.fit_result.mean

    @property
    def rank(self) -> int | None:
        """Number of directions: as fitted, or as asked for; None where there are none (Kronecker)."""
        if self._fit is None or self._structure == "kron":
            return self._options.rank
        return self._fit.estimate.curvature.directions.shape[1]

    @property
    def choice(self) -> Choice | None:
        """Choice of "auto", and the nats that the alternatives would have cost; None where nothing was open."""
        return self.fit_result.choice

    @property
    def stopping(self) -> Stopping | None:
        """Number of samples that `fit(tolerance=...)` used, and why; None without a tolerance."""
        return self.fit_result.stopping

    @property
    def rows(self) -> Rows | None:
        """Rows that were drawn with `sampling="curvature"`; None otherwise, and in a loaded posterior."""
        return self.fit_result.rows

    @property
    def split(self) -> SubBatches:
        """Sub-batches of the fit: index sets and N."""
        return self.fit_result.split

    @property
    def directions(self) -> Float[Tensor, "P k"]:
        """Orthonormal directions; with `metric="kron"` unit vectors that are orthogonal in that metric.

        Raises:
            ValueError: for a Kronecker posterior, whose P directions are products of small bases.
        """
        curvature = self.fit_result.estimate.curvature
        if self._structure == "kron":
            raise ValueError(
                "A Kronecker posterior holds no matrix of directions; expected hessian_structure='lowrank' or 'full'. "
                "`posterior_precision.basis` maps vectors to its coordinates, in which `directional_curvatures` stand."
            )
        U, basis = curvature.directions.to(self.fit_result.mean), curvature.basis
        U = U if basis is None else basis.vectors(U.T).T
        return U if curvature.shard is None else curvature.shard.joined(U.T).T

    @property
    def directional_curvatures(self) -> Float[Tensor, " k"]:
        """Magnitudes: estimates of the full batch's mean curvature along the directions.

        Of a Kronecker posterior, along its P basis vectors.
        """
        return self.fit_result.estimate.magnitudes.values

    @property
    def in_sample_curvatures(self) -> Float[Tensor, " k"]:
        """Biased curvatures along the directions on the direction samples themselves."""
        return self.fit_result.estimate.magnitudes.in_sample

    @property
    def standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the magnitudes.

        Raises:
            ValueError: for `kron_magnitudes="kronecker"`, which keeps no per-sample values.
        """
        errors = self.fit_result.estimate.magnitudes.standard_errors
        if errors is None:
            raise ValueError(
                "kron_magnitudes='kronecker' has no standard errors, because it looks at no sample on its own; "
                "expected kron_magnitudes='exact'."
            )
        return errors

    def confidence_intervals(self, *, level: float = 0.95) -> Float[Tensor, "k 2"]:
        """Return confidence intervals for the full batch's mean curvature along the directions.

        They allow for the skewness of the curvature over samples and, of cross-fitted values, for directions that
        change from fold to fold. Those of `magnitudes="same_batch"` ignore its bias: they are centred at values that
        are themselves too large, or too small.

        Args:
            level: nominal coverage, between 0 and 1.

        Returns:
            0 <= lower <= estimate <= upper; both the estimate where all data were used.

        Raises:
            ValueError: for another level, and for `kron_magnitudes="kronecker"`, which has no standard errors.
        """
        errors, magnitudes = self.standard_errors, self.fit_result.estimate.magnitudes
        assert magnitudes.error_shape is not None  # for the type checker
        return confidence_intervals(magnitudes.values, errors, magnitudes.error_shape, level=level)

    @property
    def curvature_source(self) -> str:
        """Backend or engine that computed the curvature along the directions."""
        return self.fit_result.estimate.source

    def _check_weights(self) -> None:
        """Refuse other weights or buffers than those that were fitted."""
        if not self.selection.matches(self.fit_result.fingerprint):
            raise ValueError(
                "The model's weights or buffers have changed since the fit; expected them as they were fitted. Restore "
                "them, or fit again."
            )

    # --- the Gaussian over the parameters ---

    def _diagonal_and_weights(self) -> tuple[Tensor, Tensor]:
        """D and m of the posterior precision D + U diag(m) U', attached to the hyper-parameters."""
        prior = self.prior_precision.reshape(()) if self.prior_precision.numel() == 1 else self.prior_precision_diag
        return self.fit_result.estimate.curvature.diagonal_and_weights(self.n_data * self._H_factor, prior)

    @property
    def posterior_precision(self) -> LowRankPlusDiagonal:
        r"""Posterior precision $N \tau H + P_0$ as an operator with `@`, `logdet()`, `to_matrix()` and more.

        Warns:
            UserWarning: if directions are in bfloat16, and their rounding widens the posterior by some per cent.
        """
        self._check_H_init()
        if self._precision is None:
            curvature = self.fit_result.estimate.curvature
            with torch.inference_mode(False), full_precision():
                diagonal, weights = (t.detach() for t in self._diagonal_and_weights())
            if curvature.directions.dtype == torch.bfloat16 and self.rank:
                _check_rounding(float(weights.max() * (1 / diagonal).mean()))
            shard = curvature.shard
            self._precision = LowRankPlusDiagonal(diagonal, curvature.factor, weights, curvature.basis, shard)
        return self._precision

    @property
    def posterior_variance(self) -> Float[Tensor, " P"]:
        """Marginal variance of every parameter."""
        return self.posterior_precision.covariance_diagonal

    @property
    def posterior_scale(self) -> Float[Tensor, "P P"]:
        """A root S of the posterior covariance, S S' = covariance; dense, for few parameters.

        Raises:
            ValueError: if it does not fit into `memory`.
        """
        mean = self.fit_result.mean
        P = len(mean)
        if available_memory(mean.device, self._spec.memory) < 3 * mean.element_size() * P * P:
            raise ValueError(
                f"The dense matrix of {P:,} parameters does not fit into the available memory (`memory`, by default a "
                "quarter of what is free); expected fewer parameters, more memory, or products with "
                "`posterior_precision`, `posterior_variance` and `sample`."
            )
        return self.posterior_precision.root(torch.eye(P, dtype=mean.dtype, device=mean.device)).T

    @property
    def posterior_covariance(self) -> Float[Tensor, "P P"]:
        """Posterior covariance; dense, for few parameters.

        Raises:
            ValueError: if it does not fit into `memory`.
        """
        scale = self.posterior_scale
        return scale @ scale.T

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of the posterior precision, differentiable in prior precision and noise."""
        operator = self.posterior_precision
        diagonal, weights = self._diagonal_and_weights()
        if diagonal.requires_grad or weights.requires_grad:
            return differentiable_log_det(diagonal, weights, operator)
        return operator.log_det

    def square_norm(self, value: Tensor) -> Tensor:
        """Return the squared distance of parameters (…, P) from the mean, in the metric of the posterior precision.

        Before `fit`, from the prior mean in the metric of the prior precision.
        """
        P = self.selection.n_parameters
        value = tensor(value, "parameters")
        if value.ndim == 0 or value.shape[-1] != P:
            raise ValueError(f"Expected parameters of shape (…, {P}); got {tuple(value.shape)}.")
        if self._fit is None:
            return (self.prior_precision_diag * (value - self.prior_mean).square()).sum(-1)
        with full_precision():
            return self.posterior_precision.quadratic(value - self._fit.mean)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Return the log density of parameters (…, P) in nats under the posterior, before `fit` under the prior.

        Args:
            value: parameters.
            normalized: include the constant.
        """
        exponent = -self.square_norm(value) / 2
        if not normalized:
            return exponent
        log_det = self.log_det_prior_precision if self._fit is None else self.log_det_posterior_precision
        return exponent + log_det / 2 - self.selection.n_parameters / 2 * math.log(2 * math.pi)

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of N samples at the mean, in nats; differentiable in the noise."""
        self._check_H_init()
        if self.likelihood != "regression":
            return -self._H_factor * self.loss
        normalizer = self.n_data * self.n_outputs * (self.noise_scale * math.sqrt(2 * math.pi)).log()
        return -self._H_factor * self.loss - normalizer

    @property
    def scatter(self) -> Tensor:
        """Squared distance of the mean to the prior mean, in the metric of the prior precision."""
        prior = self.prior_precision
        if len(prior) == 1:
            return prior[0] * self._squared_distance
        return (self.prior_precision_diag * (self.fit_result.mean - self.prior_mean).square()).sum()

    @property
    def _squared_distance(self) -> Float[Tensor, ""]:
        """Squared distance of the mean to the prior mean, kept until one of them is another tensor or is changed."""
        mean, prior_mean = self.fit_result.mean, self.prior_mean
        if prior_mean.requires_grad or prior_mean.is_inference():
            return (mean - prior_mean).square().sum()
        known = self._distance
        if known is None or known[0] is not mean or known[1] is not prior_mean or known[2] != prior_mean._version:
            self._distance = known = (mean, prior_mean, prior_mean._version, (mean - prior_mean).square().sum())
        return known[3]

    @property
    def log_det_prior_precision(self) -> Tensor:
        """Log determinant of the prior precision."""
        prior = self.prior_precision
        if len(prior) == 1:
            return self.selection.n_parameters * prior[0].log()
        return self.prior_precision_diag.log().sum()

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameters, (n_samples, P).

        Of a subnetwork posterior they are draws of all trainable parameters, those outside it at their trained values,
        as laplace-torch's are.

        Raises:
            NotFittedError: before `fit`.
        """
        mean = self.fit_result.mean
        check_draws(n_samples, generator, mean.device)
        draws, start = self.mean.new_empty(n_samples, len(self.mean)), 0
        with full_precision():
            for noise in standard_normal(n_samples, mean, generator):
                draws[start : start + len(noise)] = self._embed(mean + self.posterior_precision.root(noise))
                start += len(noise)
        return draws

    def _embed(self, draws: Float[Tensor, "S P"]) -> Float[Tensor, "S _"]:
        """Draws as laplace-torch shows them: of a subnetwork, among the trained values of all parameters."""
        if self._key[0] != "subnetwork":
            return draws
        full = ParameterSelection.all_weights(self.model).vector().repeat(len(draws), 1)
        full[:, self.selection.indices.to(full.device)] = draws
        return full

    # --- predictions ---

    @leaves_as_found(waits=True)
    def __call__(
        self,
        x: Tensor | Mapping[str, Tensor],
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "mean_field",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        *,
        outputs: Any = None,
        shared: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the posterior predictive, as laplace-torch's.

        Args:
            x: inputs (n, …), or a mapping of tensors as Hugging Face models take them.
            pred_type: "glm" (linearized network) or "nn" (network at drawn weights).
            joint: regression with "glm" only: the covariance of all outputs of the batch together.
            link_approx: "mean_field" (the expected softmax, deterministic), or laplace-torch's "probit", "mc",
                "bridge" and "bridge_norm"; "nn" has only "mc".
            n_samples: draws of "mc".
            diagonal_output: ignore covariances between outputs.
            generator: of the draws, on the model's device.
            fitting: reward models only: x holds pairs (n, 2, …), and the probabilities of which is preferred are
                returned; otherwise single inputs, and their reward as in regression.
            outputs: numbers (k,) of the outputs to predict, as if those of an input were flattened: their means (n, k)
                and variances, at the cost of k outputs. Not of labels, whose probabilities take all logits.
            shared: of several processes of torch.distributed that call this with the same inputs, each predicts some of
                them, and all return all. Draws take a generator, at the same state in all processes.
            **model_kwargs: passed to the model by "nn".

        Returns:
            Classification: probabilities (n, C), of "binary" those of every label. Otherwise mean (n, C) and variance
            of the outputs, (n, C, C) for "glm" ((n, C) with `diagonal_output`), (n, C) for "nn"; jointly (nC,) and
            (nC, nC). The variance is that of the function, without observation noise; `predict` has that of targets.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is none of the above.
        """
        link = name_of(link_approx)
        one_of(link, Link, "link_approx")
        flags = {"joint": joint, "diagonal_output": diagonal_output, "fitting": fitting, "shared": shared}
        for name, flag in flags.items():
            boolean(flag, name)
        inputs, pred_type = self._check_request(x, pred_type, n_samples, generator)
        check_model_arguments(self.model, pred_type, model_kwargs, DebiasedParametricLaplace.__call__)
        kind = self._likelihood
        regression = not kind.gives_probabilities or (self.likelihood == "reward_modeling" and not fitting)
        if pred_type == "nn" and link != "mc":
            raise ValueError(f"pred_type='nn' averages over drawn networks: expected link_approx='mc', got {link!r}.")
        if outputs is not None and not regression:
            raise ValueError(
                "outputs= is of means and variances; the probability of a label takes all logits. Expected "
                "la(x, link_approx='mc')[...], or la.functional_samples(x, outputs=...) for some logits."
            )
        if pred_type == "nn" and regression and n_samples < 2:
            raise ValueError(f"A variance over drawn networks needs n_samples of at least 2; got {n_samples}.")
        if shared and self._processes.several and not self.is_sharded:
            if joint:
                raise ValueError("joint=True is of all outputs together; expected shared=False.")
            own = partial(
                self,
                pred_type=pred_type,
                link_approx=link,
                n_samples=n_samples,
                diagonal_output=diagonal_output,
                fitting=fitting,
                outputs=outputs,
                **model_kwargs,
            )
            return self._shared_out(
                inputs, own, generator, draws=link == "mc" and not (regression and pred_type == "glm")
            )
        with self._predictive(inputs) as whole:
            predictive = whole.at_outputs(outputs)
            if pred_type == "nn":
                draws = predictive.network_draws(n_samples, generator, model_kwargs)
                values = (draws.mean(0), draws.var(0)) if regression else (kind.probabilities(draws).mean(0),)
                restored = tuple(predictive.restored(v) for v in values)
                return restored if regression else restored[0]  # type: ignore[return-value]
            if regression:
                return predictive.moments(joint=joint, diagonal_output=diagonal_output)
            return predictive.probabilities(link, n_samples, generator, diagonal_output=diagonal_output)

    def _shared_out(
        self,
        inputs: Inputs,
        predict: Callable[..., Tensor | tuple[Tensor, ...]],
        generator: torch.Generator | None,
        *,
        draws: bool,
        dim: int = 0,
    ) -> Any:
        """Return predictions of inputs that all processes have, of which each computes some.

        Args:
            inputs: the same in all processes.
            predict: function of some of them, and of a generator.
            generator: of the draws; each process draws from its state, and it moves on alike in all of them.
            draws: whether there are any.
            dim: of the inputs in what is returned.
        """
        processes, device = self._processes, self.fit_result.mean.device
        if draws and generator is None:
            raise ValueError("shared=True draws in several processes: expected a generator, at the same state in all.")
        state = None if generator is None else generator.get_state()
        known = None if state is None else digest(state.tolist())
        processes.check_same(inputs_and_generator=(_identified(inputs), known))

        def own(part: Tensor) -> tuple[Tensor, ...]:
            copied = None if generator is None else generator.clone_state()
            found = predict(on_each(inputs, lambda t: t[part[0] : part[-1] + 1]), generator=copied)
            return found if isinstance(found, tuple) else (found,)

        parts = torch.arange(n_samples_of(inputs)).chunk(processes.size)
        with processes.together():
            found = list(processes.shared_out(parts, own, device))
        if generator is not None:
            torch.empty(16, device=device).normal_(generator=generator)
        joined = tuple(torch.cat(values, dim=dim) for values in zip(*found, strict=True))
        return joined if len(joined) > 1 else joined[0]

    @leaves_as_found(waits=True)
    def predict(
        self,
        x: Tensor | Mapping[str, Tensor],
        pred_type: str = "glm",
        link_approx: str = "mean_field",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> RegressionPrediction | TargetPrediction | ClassificationPrediction:
        """Predict targets.

        Args:
            x: inputs, as of the posterior itself.
            pred_type: "glm" or "nn".
            link_approx: (classification) as of the posterior itself; of "nn" the default is "mc".
            n_samples: draws of "mc" and "nn".
            generator: of these draws.

        Returns:
            Regression and other targets: `mean`, `std` with the observation noise, `interval(level)`, in the shape of
            the targets that were fitted. Classification: `probs`. Both: `samples(n)`.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is not known.
        """
        kind = self._spec.likelihood
        classification = kind.gives_probabilities and self.likelihood != "reward_modeling"
        default = name_of(link_approx) == "mean_field"
        link = "mc" if default and name_of(pred_type) == "nn" else link_approx
        found = self(
            x, pred_type, link_approx=link, n_samples=n_samples, diagonal_output=not classification, generator=generator
        )
        inputs, pred_type = self._check_request(x, pred_type, n_samples, generator)
        with self._predictive(inputs) as predictive:
            draws = Draws(predictive, pred_type)
            if self.fit_result.layout is not None:
                _ = predictive.positions  # which evaluates the model, as drawing does not here
        if isinstance(found, Tensor):
            return ClassificationPrediction(found, draws)
        flat = self.fit_result.targets_are_flat
        if self.likelihood == "reward_modeling":
            # a reward is a function without observations
            return RegressionPrediction.of(*found, found[0].new_zeros(()), draws, flat=False)
        if self.likelihood == "regression":
            noise, layout = self.sigma_noise.detach(), self.fit_result.layout
            if layout is not None and not layout.is_last and noise.ndim:
                noise = noise.reshape(-1, *(1,) * layout.n_dimensions)
            return RegressionPrediction.of(*found, noise, draws, flat=flat)
        return TargetPrediction.of(*found, kind, draws, flat=flat)

    @leaves_as_found(waits=True)
    def gaussian_logits(self, x: Tensor | Mapping[str, Tensor]) -> GaussianLogits:
        """Return the Gaussian over the logits of each input, as the mean-field link takes it.

        Of "binary" it is that of (0, f) for each label, in rows: all labels of the first input, then of the second. It
        gives class probabilities, the mutual information of label and parameters, and the total variance of the
        centred logits (`total_variance`). For more than 128 classes no C x C matrix is formed, unless
        `enable_backprop` is set.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if outputs are no logits, as in regression.
        """
        self._check_H_init()
        if not self._spec.likelihood.gives_probabilities:
            raise ValueError(
                f"Expected a posterior of logits; got the likelihood {self.likelihood!r}. A regression has la(x), mean "
                "and variance."
            )
        with self._predictive(self._check_request(x, "glm", 1, None)[0]) as predictive:
            return predictive.gaussian_logits()

    @leaves_as_found(waits=True)
    def functional_samples(
        self,
        x: Tensor | Mapping[str, Tensor],
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        *,
        outputs: Any = None,
        shared: bool = False,
    ) -> Tensor:
        """Draw functions at x, (n_samples, n, C); each draw is one function at all inputs.

        With `diagonal_output` ("glm" only) every output is drawn on its own instead. `outputs` are numbers (k,) of the
        outputs to draw, as if those of an input were flattened, (n_samples, n, k). `shared` is as of `la(x)`.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is not known.
        """
        boolean(diagonal_output, "diagonal_output")
        boolean(shared, "shared")
        inputs, pred_type = self._check_request(x, pred_type, n_samples, generator)
        if shared and self._processes.several and not self.is_sharded:
            own = partial(
                self.functional_samples,
                pred_type=pred_type,
                n_samples=n_samples,
                diagonal_output=diagonal_output,
                outputs=outputs,
            )
            drawn: Tensor = self._shared_out(inputs, own, generator, draws=True, dim=1)
            return drawn
        with self._predictive(inputs) as whole:
            predictive = whole.at_outputs(outputs)
            if pred_type == "nn":
                return predictive.restored(predictive.network_draws(n_samples, generator))
            if diagonal_output:
                mean, variance = predictive.moments(diagonal_output=True)
                return links.independent_draws(mean, variance, n_samples=n_samples, generator=generator)
            return predictive.restored(predictive.linearized_draws(n_samples, generator))

    def predictive_samples(
        self,
        x: Tensor | Mapping[str, Tensor],
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw predictions: `functional_samples`, as probabilities in classification."""
        draws = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        kind, layout = self._spec.likelihood, self.fit_result.layout
        if not kind.gives_probabilities or self.likelihood == "reward_modeling":
            return draws
        if layout is None or layout.is_last:
            return kind.probabilities(draws)
        return kind.probabilities(draws.movedim(2, -1)).movedim(-1, 2)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return output covariances (n, C, C) for Jacobians (n, C, P)."""
        self._check_jacobian_width(Js)
        with full_precision():
            return self.posterior_precision.variance(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the covariance (nC, nC) of all outputs together, for Jacobians (n, C, P) or (nC, P)."""
        self._check_jacobian_width(Js)
        with full_precision():
            return self.posterior_precision.variance(Js.flatten(0, -2))

    def _check_jacobian_width(self, Js: Tensor) -> None:
        P = len(self.fit_result.mean)
        if tensor(Js, "Jacobians").ndim < 2 or Js.shape[-1] != P:
            raise ValueError(f"Expected Jacobians of shape (…, {P}); got {tuple(Js.shape)}.")

    @property
    def backend(self) -> JacobianBackend:  # type: ignore[override]
        """Jacobians with respect to the parameters of the posterior, by the names of laplace-torch's backends."""
        return JacobianBackend(self)

    def _glm_predictive_distribution(
        self, X: Inputs, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        with self._predictive(X) as predictive:
            return predictive.moments(joint=joint, diagonal_output=diagonal_output)

    @contextmanager
    def _predictive(self, x: Inputs) -> Iterator[Predictive]:
        """The predictive at some inputs, with the model in evaluation mode while the block runs.

        Inference mode is left: nothing can be differentiated in it, and tensors kept from here on would be unusable.
        """
        fit = self.fit_result
        with torch.inference_mode(False), evaluating(self.model), differentiable_kernels(self.model):
            inputs = on_each(moved(x, fit.mean.device), lambda t: t.clone() if t.is_inference() else t)
            shard = fit.estimate.curvature.shard
            if shard is not None and self.enable_backprop:
                raise ValueError("enable_backprop=True is not built for shard_directions=True.")
            if shard is not None:
                shard.processes.check_same(inputs=_identified(inputs))
            network = self._network(inputs)
            if network.linear_layer is None or self.enable_backprop:
                network.check_inputs(inputs)
            yield Predictive(network, inputs, fit.mean, self.posterior_precision, self.enable_backprop)

    def _network(self, inputs: Inputs) -> Network:
        """The network at the mean; that of a loaded posterior is prepared at its first inputs, and kept."""
        fit = self.fit_result
        if fit.network is not None:
            return replace(fit.network, memory=self._shared_memory) if self.is_sharded else fit.network
        parameters = {k: v.clone() for k, v in fit.selection.unflatten(fit.mean).items()}
        capabilities = find_capabilities(fit.selection, parameters, inputs)
        network = Network(
            fit.selection, parameters, self._likelihood, fit.n_outputs, capabilities, memory=self._shared_memory
        )
        self._fit = replace(fit, network=network)
        return network

    def _check_request(
        self, x: Any, pred_type: str, n_samples: int, generator: torch.Generator | None
    ) -> tuple[Inputs, str]:
        """Check what every prediction shares; return the inputs and the type of predictive as a plain string."""
        self._check_H_init()
        pred_type = name_of(pred_type)
        one_of(pred_type, PredictionType, "pred_type")
        inputs = check_inputs(x, self._spec.keys)
        check_draws(n_samples, generator, self.fit_result.mean.device)
        return inputs, pred_type

    # --- the distance to the full batch, the prior, the state ---

    @leaves_as_found()
    def held_out_kl(
        self,
        loader: Iterable[Any] | None,
        fitted_loader: Iterable[Any] | None = None,
        *,
        n_rows: int | None = None,
        seed: int | None = None,
        progress_bar: bool = False,
    ) -> HeldOutKL:
        """Estimate the distance to the full-batch posterior in nats, up to a constant shared by posteriors of a model.

        `debiased_laplace.held_out_kl` is the same for these and for laplace-torch's own posteriors.

        Args:
            loader: training samples left out of the fit, or all `n_data` training samples, of which rows are then
                drawn independently of any fit; None only where all samples were fitted.
            fitted_loader: the fitted samples, whose share is then exact.
            n_rows: number of rows drawn of all samples; None: as many as a default fit draws.
            seed: of that draw; None: the same one for all posteriors.
            progress_bar: show progress.

        Returns:
            The estimate, with its standard error; differences of two are paired by sample or row.

        Raises:
            OverlapError: if a sample of the loader was fitted.
            ValueError: if `fitted_loader` does not yield the fitted samples, or the model's weights have changed.

        Warns:
            UserWarning: if the fitted samples' share is above a tenth and missing.
        """
        with torch.inference_mode(False), full_precision(), self._processes.together():
            return estimate_for(
                self._candidate(), loader, fitted_loader, n_rows=n_rows, seed=seed, progress_bar=progress_bar
            )

    def _candidate(self) -> Candidate:
        """What the held-out KL needs of this posterior.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if the model's weights are not those that were fitted.
        """
        fit = self.fit_result
        self._check_weights()
        target = Target(
            fit.selection,
            self._likelihood,
            self._spec.backend,
            self.prior_precision_diag.detach(),
            float(self.noise_scale.detach()),
            float(self.temperature),
            self.n_data,
        )
        return Candidate(
            self.posterior_precision,
            target,
            self.model,
            lambda batch: self._network(batch.inputs),
            self._spec.keys,
            fit.options.seed,
            fit.split.total_weight,
            fit.identities if fit.scored is None else fit.scored,
            fit.split.of_rows and fit.scored is None,
            self._processes,
        )

    @property
    def prior_search(self) -> prior_tuning.PriorSearch | None:
        """Result of the last grid search; None before it, after `fit` or "marglik", and in a loaded posterior."""
        return self._prior_search

    @leaves_as_found()
    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: int | float = 1e-1,
        init_prior_prec: int | float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Callable[..., Any] | None = None,
        log_prior_prec_min: int | float = -4.0,
        log_prior_prec_max: int | float = 4.0,
        grid_size: int = 100,
        link_approx: str = "mean_field",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool | None = None,
        log_prior_prec_base: int | float = 10.0,
    ) -> None:
        """Tune the prior precision, by marginal likelihood or by a grid search on validation data.

        In regression `sigma_noise` is tuned with it as long as it was not given: by the marginal likelihood, or to the
        best value on the validation data for each prior (with "nn": for the plain network); a `loss` of your own leaves
        it. To tune a noise that was given, set it to None.

        The arguments are laplace-torch's. The grid search scores every prior by the mean negative log-likelihood of the
        validation data (in regression Gaussian, of function variance plus observation noise, per output), computes
        Jacobians once where memory allows, draws the same numbers for every prior, and skips values that are not
        finite. It sets the best prior and keeps its results in `prior_search`.

        Args:
            pred_type: predictive that the grid search scores: "glm" or "nn".
            method: "marglik" or "gridsearch".
            n_steps: of Adam on the log prior precision ("marglik").
            lr: its learning rate.
            init_prior_prec: its start; a tensor keeps its structure.
            prior_structure: "scalar", "layerwise" or "diag", which the bases of a Kronecker posterior or complement
                cannot hold: where the complement was not named, the same samples are fitted again with "diagonal". The
                grid is of scalars.
            val_loader: validation data of the grid search, seen by neither training nor `fit`.
            loss: None for the negative log-likelihood; or a torchmetrics metric, or a function of (predictions,
                targets), in regression of (means, covariances of the function without noise, targets).
            log_prior_prec_min: exponent of the grid's lower end.
            log_prior_prec_max: exponent of the grid's upper end.
            grid_size: points of the grid.
            link_approx: of the scored predictive; take the one that predictions will be made with.
            n_samples: draws of "mc" and of "nn".
            verbose: print the result.
            progress_bar: show progress; None: if it takes longer than some seconds.
            log_prior_prec_base: base of the exponents.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is unknown, a prior for every parameter meets a Kronecker basis, there are no
                validation data, or no grid point gives a finite loss; the prior stays as it was.

        Warns:
            UserWarning: if the best prior is at an edge of the grid, or still predicts the validation data worse than
                the plain network (MAP), or the loss does not depend on the prior; if the marginal likelihood leaves the
                training data predicted clearly worse than by the plain network; if an argument has no effect.

        References:
            Daxberger et al. (2021), arXiv 2106.14806, section 3 (cross-validating the prior precision).
        """
        self._check_H_init()
        method, structure = name_of(method), name_of(prior_structure)
        if method not in ("marglik", "gridsearch"):
            raise ValueError(f"method must be 'marglik' or 'gridsearch'; got {method!r}.")
        one_of(structure, prior_tuning.PriorStructure, "prior_structure")
        boolean(verbose, "verbose")
        if progress_bar is not None:
            boolean(progress_bar, "progress_bar")
        scoring = prior_tuning.Scoring(name_of(pred_type), name_of(link_approx), n_samples, loss)
        noise_is_open, before = self._noise_is_open, dict(self.__dict__)
        try:
            with torch.inference_mode(False), full_precision(), self._processes.together():
                if method == "marglik":
                    rate = number(lr, "the learning rate lr", low=0, is_open=True)
                    n_steps = integer(n_steps, "n_steps", minimum=0)
                    ascent = prior_tuning.Ascent(n_steps, rate, init_prior_prec, structure)
                    cautions = self._maximize_marginal_likelihood(ascent, scoring, progress_bar)
                else:
                    lower, upper, base = (
                        number(log_prior_prec_min, "log_prior_prec_min"),
                        number(log_prior_prec_max, "log_prior_prec_max"),
                        number(log_prior_prec_base, "log_prior_prec_base", low=1, is_open=True),
                    )
                    grid = prior_tuning.prior_grid(lower, upper, grid_size, base)
                    self._prior_search = prior_tuning.search_grid(
                        self,
                        grid,
                        val_loader,
                        scoring,
                        with_noise=noise_is_open and loss is None,
                        progress_bar=progress_bar,
                    )
                    cautions = self._prior_search.cautions
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        # what was tuned may be tuned again
        self._noise_is_open = noise_is_open
        if verbose:
            with_noise = f", sigma_noise {self._shown_noise}" if noise_is_open else ""
            print(f"Optimized prior precision is {self.prior_precision}{with_noise}.")
        for caution in [*prior_tuning.without_effect(method, structure, val_loader), *cautions]:
            warnings.warn(caution, stacklevel=3)

    def _maximize_marginal_likelihood(
        self, ascent: prior_tuning.Ascent, scoring: prior_tuning.Scoring, progress_bar: bool | None
    ) -> list[str]:
        """Tune without validation data; return warnings of harm done to the training data."""
        if self._is_in_basis and ascent.of_parameters(self.selection):
            self._leave_basis(self.prior_precision_diag)
        prior_tuning.maximize_marginal_likelihood(
            self, ascent, with_noise=self._noise_is_open, progress_bar=progress_bar
        )
        self._prior_search = None
        return list(prior_tuning.harm_without_validation(self, replace(scoring, loss=None)))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, strings and numbers from which `load_state_dict` restores the posterior."""
        fit = self.fit_result
        hyper_parameters = {name: getattr(self, name) for name in checkpoint.HYPER_PARAMETERS}
        head = {
            "cls_name": type(self).__name__,
            "likelihood": self.likelihood + shown_class_weights(self._spec.likelihood),
            "curvature": self._spec.backend.kind,
            "open_options": " ".join(sorted({*self._spec.request.open, *(("sigma_noise",) * self._noise_is_open)})),
        }
        return checkpoint.to_state(fit, {**head, **hyper_parameters})

    def load_state_dict(self, state_dict: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
        """Become the posterior that `state_dict` describes.

        Args:
            state_dict: a state; or the shards of one (`shard_directions`), in any order, as a list or an iterable that
                loads one after the other. Their number need not be that of the processes.

        Raises:
            ValueError: if it belongs to another kind of posterior, likelihood, set of parameters, dtype or trained
                weights, or is damaged (a checksum is in it); the posterior stays as it was.
        """
        expected = {
            "cls_name": type(self).__name__,
            "likelihood": self.likelihood + shown_class_weights(self._spec.likelihood),
            "curvature": self._spec.backend.kind,
        }
        processes = self._processes
        if not (self._spec.request.options.shard_directions and processes.several):
            self._load(state_dict, expected, None)
            return
        shard = Shard.of(processes, self.selection.sizes)
        with processes.together():
            self._load(state_dict, expected, shard)

    def _load(
        self, state_dict: dict[str, Any] | Iterable[dict[str, Any]], expected: Mapping[str, str], shard: Shard | None
    ) -> None:
        """Become the posterior of a state, or of the shards of one; hold the directions of all parameters, or some."""
        if shard is not None or isinstance(state_dict, list | tuple | Iterator):
            states = [state_dict] if isinstance(state_dict, dict) else state_dict
            state = checkpoint.of_shards(states, self.selection, shard)
        else:
            state = state_dict  # type: ignore[assignment]
        device = self._spec.request.options.directions_device
        fit = checkpoint.from_state(state, self.model, self._selection, expected, device, shard)
        before = dict(self.__dict__)
        try:
            with torch.inference_mode(False), full_precision():
                self._become(fit, state)
                # last, since the other checks say what is wrong
                checkpoint.check_integrity(state)
        except Exception as error:
            self.__dict__.clear()
            self.__dict__.update(before)
            if isinstance(error, ValueError | ProcessError):
                raise
            raise ValueError(f"The state is damaged: {type(error).__name__}: {error}") from error

    def _become(self, fit: FitResult, state: dict[str, Any]) -> None:
        """Take over a fit and the hyper-parameters of a state."""
        opened = frozenset(state["open_options"].split())
        request = Request(fit.options, opened - {"sigma_noise"})
        self._spec = replace(self._spec, request=request, split=replace(self._spec.split, seed=fit.options.seed))
        # without a fit while the noise comes, whose ratios are the state's
        self._fit, self._selection, self._precision = None, fit.selection, None
        for name in checkpoint.HYPER_PARAMETERS:
            value = state[name]
            setattr(self, name, value.detach().clone().to(fit.mean) if isinstance(value, Tensor) else value)
        self._noise_is_open = "sigma_noise" in opened
        self._adopt(fit)
        self.posterior_precision.log_det  # noqa: B018  a precision that cannot be used is found out here


def _identified(inputs: Inputs) -> str:
    """Return a short text that differs for other inputs."""
    return identified(Batch(inputs, torch.zeros(n_samples_of(inputs))))


def _digest(values: Tensor | None) -> str:
    """Return a short text that differs for other numbers."""
    if values is None:
        return "none"
    numbers = values.detach().double().cpu().flatten()
    return str(numbers.tolist()) if len(numbers) < 4 else sha256(numbers.numpy().tobytes()).hexdigest()[:16]


def _check_rounding(ratio: float) -> None:
    """Warn if rounded directions leave much of the prior's variance along a direction.

    Args:
        ratio: largest precision that the data add along a direction, relative to that of the rest.
    """
    # of a unit vector whose entries are rounded to 8 bits, this share lies outside the rounded one
    outside = 2.0**-18 / 3
    if ratio * outside > 0.02:
        warnings.warn(
            f"The data outweigh the prior {ratio:.1e} times along a direction: rounded to bfloat16, directions make "
            f"variances along it about {ratio * outside:.0%} too large. Expected directions_dtype='model', or a larger "
            "prior precision.",
            stacklevel=3,
        )
