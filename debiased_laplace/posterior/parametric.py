"""What all debiased posteriors share: hyper-parameters, fit, the precision operator, the held-out KL, the state."""

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Float
from laplace.baselaplace import BaseLaplace, ParametricLaplace
from torch import Tensor, nn

from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch
from debiased_laplace.debiasing.held_out_kl import HeldOutKL
from debiased_laplace.errors import NotBuiltError, NotFittedError
from debiased_laplace.linalg.low_rank_plus_diagonal import (
    LowRankPlusDiagonal,
    differentiable_log_det,
)
from debiased_laplace.posterior import checkpoint, judging, prior_tuning
from debiased_laplace.posterior.fitting import Fit, SplitOptions, fit_curvature
from debiased_laplace.posterior.hyperparameters import (
    estimator_options,
    finite,
    name_of,
    one_positive,
    positive,
    sample_amounts,
)
from debiased_laplace.posterior.predictions import PredictiveInterface


class DebiasedParametricLaplace(PredictiveInterface):
    """A Laplace posterior whose curvature is estimated on split samples.

    The arguments are those of `DebiasedLaplace`; the estimator's come first, laplace-torch's own after them.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        rank: int | None = None,
        magnitudes: str = "held_out",
        direction_samples: int | float = 0.5,
        magnitude_samples: int | float | None = None,
        complement: str = "none",
        solver: str = "auto",
        seed: int = 0,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        backend_kwargs: dict[str, Any] | None = None,
    ):
        likelihood = name_of(likelihood)
        self._likelihood = likelihood_named(likelihood)
        self._options = estimator_options(
            rank=rank, magnitudes=magnitudes, complement=complement, solver=solver, seed=seed
        )
        self._split_options = SplitOptions(*sample_amounts(direction_samples, magnitude_samples), seed)
        if backend is not None or backend_kwargs:
            raise NotBuiltError(
                "backend must be None, which computes curvature with torch.func; laplace-torch's "
                "backends are not available yet."
            )
        self._selection = ParameterSelection.all_weights(model)
        self._fit: Fit | None = None
        self._precision: LowRankPlusDiagonal | None = None
        super().__init__(
            model,
            likelihood,
            sigma_noise=one_positive(sigma_noise, "sigma_noise"),
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
        )

    H: tuple[Tensor, ...] | None

    def _init_H(self) -> None:
        self.H = None

    def _check_H_init(self) -> None:
        if self._fit is None:
            raise NotFittedError(f"This {type(self).__name__} is not fitted; call fit() first.")

    def __repr__(self) -> str:
        options = f"magnitudes={self._options.magnitudes!r}, complement={self._options.complement!r}"
        head = f"{type(self).__name__}({self.likelihood}, {self.n_params:,} parameters, {options}"
        if self._fit is None:
            return f"{head}, not fitted)"
        split = self._fit.split
        used = (
            f"{split.n_samples}" if split.shared else f"{len(split.direction_indices)} + {len(split.magnitude_indices)}"
        )
        return f"{head}, rank={self.rank}, fitted on {used} of {split.n_data} samples)"

    # --- hyper-parameters: laplace-torch's properties, with values checked and the decomposition forgotten ---

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision: a tensor of one entry, one per parameter tensor, or one per parameter."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        BaseLaplace.prior_precision.fset(self, positive(value, "prior_precision"))
        self._precision = None

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise, in units of the targets; 1 in classification."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        value = one_positive(value, "sigma_noise")
        if self.likelihood != "regression" and value != 1:
            raise ValueError(f"sigma_noise is of regression only; expected 1 in {self.likelihood}, got {float(value)}.")
        BaseLaplace.sigma_noise.fset(self, value)
        self._precision = None

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean: a tensor of one entry, or one per parameter."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        BaseLaplace.prior_mean.fset(self, finite(value, "prior_mean"))

    @property
    def temperature(self) -> float:
        """Temperature T of the likelihood: the posterior of N / T samples."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = float(one_positive(value, "temperature"))
        self._precision = None

    # --- fit and what it found ---

    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        n_data: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Estimate the curvature of the full batch from the samples of a loader.

        Args:
            train_loader: a `DataLoader` over a map-style data set, or a list of (inputs, targets) batches. Samples are
                split by their position before any is loaded; order, shuffling and augmentation do not matter.
            override: must be True; adding data to a fit is not available yet.
            progress_bar: show progress.
            n_data: size N of the data set that the likelihood stands for, the loader's samples being part of it;
                default: the samples that the loader yields.
            tolerance: not available yet.

        Raises:
            ValueError: if loader, samples, weights or options cannot be used; model and posterior stay as they were.
        """
        if not override:
            raise NotBuiltError("override must be True; adding data to a fit is not available yet.")
        if tolerance is not None:
            raise NotBuiltError("tolerance must be None; stopping early is not available yet.")
        if n_data is not None and (isinstance(n_data, bool) or not isinstance(n_data, int)):
            raise ValueError(f"n_data must be an integer or None; got {n_data!r}.")
        fit = fit_curvature(
            self._selection,
            self._likelihood,
            train_loader,
            split_options=self._split_options,
            options=self._options,
            n_data=n_data,
            progress_bar=progress_bar,
        )
        self._adopt(fit, self._selection.vector(), self._selection.fingerprint())

    def _adopt(self, fit: Fit, mean: Tensor, fingerprint: str) -> None:
        """Become the posterior of this fit."""
        self._fit, self.mean, self._fingerprint = fit, mean, fingerprint
        self._precision = None
        self.loss, self.n_data, self.n_outputs = fit.loss, fit.split.n_data, fit.n_outputs
        curvature = fit.estimate.curvature
        self.H = (curvature.diagonal, curvature.directions, curvature.weights)

    @property
    def fitted(self) -> Fit:
        """The fit.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_H_init()
        assert self._fit is not None  # for the type checker
        return self._fit

    @property
    def rank(self) -> int | None:
        """Number of directions: as fitted, or as asked for."""
        if self._fit is None:
            return self._options.rank
        return self._fit.estimate.curvature.directions.shape[1]

    @property
    def split(self) -> Any:
        """The `SubBatches` that were fitted: index sets, N."""
        return self.fitted.split

    @property
    def directions(self) -> Float[Tensor, "P k"]:
        """Orthonormal directions."""
        return self.fitted.estimate.curvature.directions

    @property
    def directional_curvatures(self) -> Float[Tensor, " k"]:
        """The magnitudes used: estimates of the full batch's mean curvature along the directions."""
        return self.fitted.estimate.magnitudes.values

    @property
    def in_sample_curvatures(self) -> Float[Tensor, " k"]:
        """What the direction samples themselves say: biased."""
        return self.fitted.estimate.magnitudes.in_sample

    @property
    def standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the magnitudes."""
        return self.fitted.estimate.magnitudes.standard_errors

    @property
    def curvature_source(self) -> str:
        """Who computed the curvature along the directions."""
        return self.fitted.estimate.source

    @property
    def weights_fingerprint(self) -> str:
        """A hash of the weights and buffers that the posterior was fitted at."""
        self._check_H_init()
        return self._fingerprint

    @property
    def fitted_seed(self) -> int:
        """The seed of the fit, which also fixes what a random loader loads later."""
        return self._options.seed

    # --- the precision operator and what the marginal likelihood needs of it ---

    def _diagonal_and_weights(self) -> tuple[Tensor, Tensor]:
        """D and m of the posterior precision D + U diag(m) U', attached to the hyper-parameters."""
        curvature = self.fitted.estimate.curvature
        scale = self.n_data * self._H_factor
        scalar = self.prior_precision.numel() == 1
        prior = self.prior_precision.reshape(()) if scalar else self.prior_precision_diag
        return scale * curvature.diagonal + prior, scale * curvature.weights

    @property
    def posterior_precision(self) -> LowRankPlusDiagonal:
        """The precision N τ H + P0 as an operator (`to_dense()` gives the matrix)."""
        self._check_H_init()
        if self._precision is None:
            diagonal, weights = (t.detach() for t in self._diagonal_and_weights())
            self._precision = LowRankPlusDiagonal(diagonal, self.directions, weights)
        return self._precision

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of the posterior precision, differentiable in prior precision and noise."""
        operator = self.posterior_precision
        diagonal, weights = self._diagonal_and_weights()
        if diagonal.requires_grad or weights.requires_grad:
            return differentiable_log_det(diagonal, weights, operator)
        return operator.log_det

    def square_norm(self, value: Tensor) -> Tensor:
        """Squared distance of parameters (…, P) from the mean, in the metric of the posterior precision."""
        operator = self.posterior_precision
        if value.ndim == 0 or value.shape[-1] != self.n_params:
            raise ValueError(f"Expected parameters of shape (…, {self.n_params}); got {tuple(value.shape)}.")
        return operator.quadratic(value - self.mean)

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of N samples at the mean, in nats; differentiable in the noise."""
        self._check_H_init()
        return BaseLaplace.log_likelihood.fget(self)

    @property
    def scatter(self) -> Tensor:
        """Squared distance of the mean to the prior mean, in the metric of the prior precision."""
        self._check_H_init()
        return ParametricLaplace.scatter.fget(self)

    def network_for(self, inputs: Tensor) -> Network:
        """The network at the posterior's mean; a loaded posterior meets it at its first inputs."""
        fit = self.fitted
        if fit.network is not None:
            return fit.network
        return checkpoint.remembered_network(self, inputs)

    def check_targets(self, batch: Batch) -> None:
        """Refuse targets that do not fit the likelihood.

        Raises:
            ValueError: if they do not.
        """
        self._likelihood.check(self.mean.new_zeros(len(batch), self.n_outputs), batch.targets)

    # --- prior, fidelity, state ---

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Callable[..., Any] | None = None,
        log_prior_prec_min: float = -4.0,
        log_prior_prec_max: float = 4.0,
        grid_size: int = 100,
        link_approx: str = "probit",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
    ) -> None:
        """Tune the prior precision, by marginal likelihood or by a grid search on validation data.

        The arguments are laplace-torch's. The grid search computes Jacobians once, starts a fresh metric at every grid
        point, passes over values that are not finite, and scores regression by its Gaussian negative log-likelihood.

        Args:
            pred_type: predictive that the grid search scores.
            method: "marglik" or "gridsearch".
            n_steps: of Adam on the log prior precision.
            lr: its learning rate.
            init_prior_prec: where it starts; a tensor keeps its structure.
            prior_structure: "scalar", "layerwise" or "diag".
            val_loader: validation data of the grid search.
            loss: a torchmetrics metric, or a function of (predictions, targets) or (means, variances, targets).
            log_prior_prec_min: exponent of the grid's lower end.
            log_prior_prec_max: exponent of the grid's upper end.
            grid_size: points of the grid.
            link_approx: of the scored predictive.
            n_samples: draws of "mc" and of "nn".
            verbose: print the result.
            progress_bar: show progress.
            log_prior_prec_base: base of the exponents.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is unknown, or no grid point gives a finite loss; the prior stays as it was.
        """
        self._check_H_init()
        method = name_of(method)
        if method == "marglik":
            prior_tuning.by_marginal_likelihood(
                self,
                prior_tuning.Ascent(n_steps, lr, init_prior_prec, name_of(prior_structure)),
                progress_bar=progress_bar,
            )
        elif method == "gridsearch":
            grid = prior_tuning.prior_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
            scoring = prior_tuning.Scoring(name_of(pred_type), name_of(link_approx), n_samples, loss)
            prior_tuning.by_grid_search(self, grid, val_loader, scoring, progress_bar=progress_bar)
        else:
            raise ValueError(f"method must be 'marglik' or 'gridsearch'; got {method!r}.")
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    def held_out_kl(self, loader: Iterable[Any] | None, fitted_loader: Iterable[Any] | None = None) -> HeldOutKL:
        """Distance to the full-batch posterior in nats, up to a constant that posteriors of this model share.

        Args:
            loader: training samples left out of the fit; None only where all `n_data` samples were fitted.
            fitted_loader: the fitted samples, whose share is then exact.

        Returns:
            The estimate, with its standard error; differences of two are paired by sample.

        Raises:
            OverlapError: if a sample of the loader was fitted.
            ValueError: if `fitted_loader` does not yield the fitted samples.

        Warns:
            UserWarning: if the fitted samples' share is above a tenth and missing.
        """
        return judging.held_out_kl(self, loader, fitted_loader)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, strings and numbers that `load_state_dict` restores the posterior from, beside the same weights."""
        return checkpoint.state_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Become the posterior that `state_dict` describes.

        Raises:
            ValueError: if it belongs to another kind of posterior, likelihood, set of parameters or trained weights.
        """
        checkpoint.restore(self, state_dict)
