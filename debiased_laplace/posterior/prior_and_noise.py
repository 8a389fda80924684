"""Prior, noise and temperature: laplace-torch's properties, with values checked and the decomposition forgotten."""

from laplace.baselaplace import BaseLaplace, ParametricLaplace
from torch import Tensor

from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.posterior.hyperparameters import finite, one_positive, positive


class PriorAndNoise(ParametricLaplace):
    """The hyper-parameters of a posterior; changing one takes effect at once."""

    # the posterior precision under the present hyper-parameters, once it was asked for
    _precision: LowRankPlusDiagonal | None = None

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
