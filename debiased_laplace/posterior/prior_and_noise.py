"""Prior, noise and temperature: laplace-torch's properties, with values checked and the decomposition forgotten."""

import torch
from laplace.baselaplace import BaseLaplace, ParametricLaplace
from torch import Tensor

from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.posterior.hyperparameters import finite, one_positive, positive


class PriorAndNoise(ParametricLaplace):
    """The hyper-parameters of a posterior; changing one takes effect at once."""

    # which parameters the posterior is over; None while only a forward pass can tell (the last layer)
    _selection: ParameterSelection | None = None
    # the posterior precision under the present hyper-parameters, once it was asked for
    _precision: LowRankPlusDiagonal | None = None

    @property
    def _prior_of_blocks(self) -> bool:
        """Whether the prior has to be the same for all entries of a parameter."""
        return False

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision: a tensor of one entry, one per parameter tensor, or one per parameter."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: int | float | Tensor) -> None:
        # a number goes to the model's precision directly: through torch's default dtype it would lose half its digits
        prior = torch.as_tensor(positive(value, "prior_precision"), dtype=self._dtype, device=self._device)
        self._prior_precision = self._checked_prior(prior.reshape(1) if prior.ndim == 0 else prior)
        self._precision = None

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every parameter that the posterior is over, (P,)."""
        prior, sizes = self._prior_precision, torch.tensor(self.selection.sizes, device=self._device)
        if len(prior) == 1:
            return prior.expand(self.selection.n_parameters)
        if len(prior) == self.selection.n_parameters:
            return prior
        return prior.repeat_interleave(sizes)

    @property
    def selection(self) -> ParameterSelection:
        """The parameters that the posterior is over.

        Raises:
            NotFittedError: where only `fit` can find the last layer.
        """
        if self._selection is None:
            self._check_H_init()
        assert self._selection is not None  # for the type checker
        return self._selection

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise, in units of the targets; 1 in classification."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: int | float | Tensor) -> None:
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
    def prior_mean(self, value: int | float | Tensor) -> None:
        finite(value, "prior_mean")
        mean = torch.as_tensor(value, dtype=self._dtype, device=self._device)
        if mean.ndim > 1:
            raise ValueError(f"prior_mean must be one number or one per parameter; got shape {tuple(mean.shape)}.")
        if self._selection is not None and mean.numel() not in (1, self._selection.n_parameters):
            raise ValueError(
                f"prior_mean must be one number or one per parameter ({self._selection.n_parameters}); "
                f"got {mean.numel()}."
            )
        self._prior_mean = mean

    @property
    def temperature(self) -> float:
        """Temperature T of the likelihood: the posterior of N / T samples."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: int | float) -> None:
        self._temperature = float(one_positive(value, "temperature"))
        self._precision = None

    def _checked_prior(self, prior: Tensor) -> Tensor:
        """A prior precision of a length that fits; which lengths do may only be known after `fit`."""
        prior = prior.to(self._dtype)
        if prior.ndim != 1:
            raise ValueError(f"prior_precision must be one number or one-dimensional; got shape {tuple(prior.shape)}.")
        if self._selection is None or len(prior) == 1:
            return prior
        P, n_tensors = self._selection.n_parameters, len(self._selection.names)
        if len(prior) == n_tensors:
            return prior
        if self._prior_of_blocks:
            raise ValueError(
                f"A Kronecker posterior or complement takes one prior_precision, or one per parameter tensor "
                f"({n_tensors}), because its basis mixes the entries of a tensor; got {len(prior)}. For one per "
                "parameter, take hessian_structure='lowrank' with complement='diagonal' or 'none'."
            )
        if len(prior) != P:
            raise ValueError(
                f"prior_precision must be one number, one per parameter tensor ({n_tensors}) or one per parameter "
                f"({P}); got {len(prior)}."
            )
        return prior
