"""What a fit found: its attributes, and the precision operator that everything else is computed from."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from laplace.baselaplace import BaseLaplace
from torch import Tensor

from debiased_laplace.curvature.derivatives import find_capabilities
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs
from debiased_laplace.data.pool import Pool
from debiased_laplace.data.splitting import SubBatches
from debiased_laplace.debiasing.choice import Choice
from debiased_laplace.debiasing.intervals import confidence_intervals
from debiased_laplace.debiasing.options import EstimatorOptions, Request
from debiased_laplace.debiasing.stopping import Stopping
from debiased_laplace.errors import NotFittedError
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal, differentiable_log_det
from debiased_laplace.posterior.fitting import Fit, Problem, SplitOptions
from debiased_laplace.posterior.prior_and_noise import PriorAndNoise


class FittedPosterior(PriorAndNoise):
    """A Gaussian over the parameters, read off a fit and the present hyper-parameters."""

    mean: Tensor
    H: tuple[Tensor, ...] | None
    _problem: Problem
    _request: Request
    _split_options: SplitOptions
    _fit: Fit | None
    # the trained values of the parameters that the posterior is over
    _center: Tensor
    _fingerprint: str

    def _check_H_init(self) -> None:
        if self._fit is None:
            raise NotFittedError(f"This {type(self).__name__} is not fitted; call fit() first.")

    @property
    def _options(self) -> EstimatorOptions:
        """The estimator's options: as asked for, and once fitted as chosen."""
        return self._request.options if self._fit is None else self._fit.options

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
        """Number of directions: as fitted, or as asked for; None where there are none (Kronecker)."""
        if self._fit is None or self._options.structure == "kron":
            return self._options.rank
        return self._fit.estimate.curvature.directions.shape[1]

    @property
    def choice(self) -> Choice | None:
        """What "auto" has chosen, and what the others would have cost in nats; None where nothing was left open."""
        return self.fitted.choice

    @property
    def stopping(self) -> Stopping | None:
        """How many samples were enough for `fit(tolerance=...)`, and why; None where that was not asked."""
        return self.fitted.stopping

    @property
    def split(self) -> SubBatches:
        """The `SubBatches` that were fitted: index sets, N."""
        return self.fitted.split

    @property
    def directions(self) -> Float[Tensor, "P k"]:
        """Orthonormal directions; with `metric="kron"` unit vectors that are orthogonal in that metric.

        Raises:
            ValueError: for a Kronecker posterior, whose P directions are products of small bases.
        """
        curvature = self.fitted.estimate.curvature
        if self._options.structure == "kron":
            raise ValueError(
                "A Kronecker posterior holds no matrix of directions; expected hessian_structure='lowrank' or 'full'. "
                "`posterior_precision.basis` maps vectors to its coordinates, in which `directional_curvatures` stand."
            )
        U, basis = curvature.directions, curvature.basis
        return U if basis is None else basis.vectors(U.T).T

    @property
    def directional_curvatures(self) -> Float[Tensor, " k"]:
        """The magnitudes used: estimates of the full batch's mean curvature along the directions.

        Of a Kronecker posterior, along its P basis vectors.
        """
        return self.fitted.estimate.magnitudes.values

    @property
    def in_sample_curvatures(self) -> Float[Tensor, " k"]:
        """What the direction samples themselves say: biased."""
        return self.fitted.estimate.magnitudes.in_sample

    @property
    def standard_errors(self) -> Float[Tensor, " k"]:
        """Standard errors of the magnitudes.

        Raises:
            ValueError: for `kron_magnitudes="kronecker"`, which looks at no sample on its own.
        """
        errors = self.fitted.estimate.magnitudes.standard_errors
        if errors is None:
            raise ValueError(
                "kron_magnitudes='kronecker' has no standard errors, because it looks at no sample on its own; "
                "expected kron_magnitudes='exact'."
            )
        return errors

    def confidence_intervals(self, *, level: float = 0.95) -> Float[Tensor, "k 2"]:
        """Lower and upper ends for the full batch's mean curvature along the directions.

        They allow for the skewness of the curvature over samples and, of cross-fitted values, for directions that
        change from fold to fold. Those of `magnitudes="same_batch"` know nothing of its bias: they are around values
        that are themselves too large, or too small.

        Args:
            level: nominal coverage, between 0 and 1.

        Returns:
            0 <= lower <= estimate <= upper; both the estimate where all data were used.

        Raises:
            ValueError: for another level, and for `kron_magnitudes="kronecker"`, which has no standard errors.
        """
        errors, magnitudes = self.standard_errors, self.fitted.estimate.magnitudes
        assert magnitudes.error_shape is not None  # for the type checker
        return confidence_intervals(magnitudes.values, errors, magnitudes.error_shape, level=level)

    @property
    def curvature_source(self) -> str:
        """Who computed the curvature along the directions."""
        return self.fitted.estimate.source

    @property
    def _earlier_samples(self) -> Pool | None:
        """The samples that the next ones join; None before any fit.

        Raises:
            ValueError: if they are not known any more, or the weights have changed.
        """
        if self._fit is None:
            return None
        if self._fit.pool is None:
            raise ValueError(
                "override=False goes on from the fitted samples, which are not in a state or a pickle: expected a fit "
                "in this session. Fit to one loader of all samples."
            )
        self.check_weights()
        return self._fit.pool

    def check_weights(self) -> None:
        """Refuse other weights than those that were fitted.

        Raises:
            ValueError: if they, or buffers, have changed.
        """
        if self.selection.fingerprint() != self.weights_fingerprint:
            raise ValueError(
                "The model's weights or buffers have changed since the fit; expected them as they were fitted. Restore "
                "them, or fit again."
            )

    @property
    def weights_fingerprint(self) -> str:
        """A hash of the weights and buffers that the posterior was fitted at."""
        self._check_H_init()
        return self._fingerprint

    @property
    def fitted_seed(self) -> int:
        """The seed of the fit, which also fixes what a random loader loads later."""
        return self._options.seed

    def _diagonal_and_weights(self) -> tuple[Tensor, Tensor]:
        """D and m of the posterior precision D + U diag(m) U', attached to the hyper-parameters."""
        curvature = self.fitted.estimate.curvature
        scale = self.n_data * self._H_factor
        scalar = self.prior_precision.numel() == 1
        prior = self.prior_precision.reshape(()) if scalar else self.prior_precision_diag
        return curvature.diagonal_and_weights(scale, prior)

    @property
    def posterior_precision(self) -> LowRankPlusDiagonal:
        """The precision N τ H + P0 as an operator (`to_dense()` gives the matrix)."""
        self._check_H_init()
        if self._precision is None:
            curvature = self.fitted.estimate.curvature
            with torch.inference_mode(False):
                diagonal, weights = (t.detach() for t in self._diagonal_and_weights())
            self._precision = LowRankPlusDiagonal(diagonal, curvature.factor, weights, curvature.basis)
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
        P = len(self._center)
        if value.ndim == 0 or value.shape[-1] != P:
            raise ValueError(f"Expected parameters of shape (…, {P}); got {tuple(value.shape)}.")
        return operator.quadratic(value - self._center)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Log density of parameters (…, P) under the posterior, in nats; without its constant if not normalized."""
        exponent = -self.square_norm(value) / 2
        if not normalized:
            return exponent
        return exponent + self.log_det_posterior_precision / 2 - len(self._center) / 2 * math.log(2 * math.pi)

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of N samples at the mean, in nats; differentiable in the noise."""
        self._check_H_init()
        return BaseLaplace.log_likelihood.fget(self)

    @property
    def scatter(self) -> Tensor:
        """Squared distance of the mean to the prior mean, in the metric of the prior precision."""
        self._check_H_init()
        delta = self._center - self.prior_mean
        return (self.prior_precision_diag * delta.square()).sum()

    def embedded(self, draws: Float[Tensor, "S P"]) -> Float[Tensor, "S _"]:
        """Draws as laplace-torch shows them: of a subnetwork, among the trained values of all parameters."""
        if self._problem.subset.kind != "subnetwork":
            return draws
        trained = ParameterSelection.all_weights(self.model)
        full = trained.vector().repeat(len(draws), 1)
        full[:, self.selection.indices.to(full.device)] = draws
        return full

    @property
    def mean_subnet(self) -> Float[Tensor, " P"]:
        """The trained values of the parameters that the posterior is over."""
        self._check_H_init()
        return self._center

    def adopt(self, selection: ParameterSelection, fit: Fit, center: Float[Tensor, " P"], fingerprint: str) -> None:
        """Become the posterior of this fit.

        Raises:
            ValueError: if prior precision or prior mean do not fit the parameters.
        """
        self._take(selection)
        self._fit, self._center, self._fingerprint = fit, center, fingerprint
        self.mean = self.embedded(center[None])[0]
        self._precision = None
        self.loss, self.n_data, self.n_outputs = fit.loss, fit.split.n_data, fit.n_outputs
        curvature = fit.estimate.curvature
        self.H = (curvature.diagonal, curvature.factor, curvature.weights)

    def _take(self, selection: ParameterSelection) -> None:
        """Be over these parameters; a prior that was set before they were known is checked now."""
        known, self._selection = self._selection, selection
        try:
            self.prior_precision, self.prior_mean = self._prior_precision, self._prior_mean
        except ValueError:
            self._selection = known
            raise
        subnetwork = self._problem.subset.kind == "subnetwork"
        self.n_layers = len(selection.names)
        self.n_params = sum(p.numel() for p in self.params) if subnetwork else selection.n_parameters
        if subnetwork:
            self.n_params_subnet = selection.n_parameters

    def network_for(self, inputs: Inputs) -> Network:
        """The network at the posterior's mean; a loaded posterior meets it at its first inputs, and keeps it."""
        fit = self.fitted
        if fit.network is not None:
            return fit.network
        selection = self.selection
        parameters = {k: v.clone() for k, v in selection.unflatten(self._center).items()}
        capabilities = find_capabilities(selection, parameters, inputs)
        network = Network(selection, parameters, self._problem.likelihood, self.n_outputs, capabilities)
        self._fit = replace(fit, network=network)
        return network

    def check_targets(self, batch: Batch) -> None:
        """Refuse targets that do not fit the likelihood.

        Raises:
            ValueError: if they do not.
        """
        zeros = torch.zeros(len(batch), self.n_outputs, dtype=self._center.dtype, device=batch.targets.device)
        self._problem.likelihood.check(zeros, batch.targets)
