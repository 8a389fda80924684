"""The predictive interface of laplace-torch, with its generator used and the user's model left alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.network import Network
from debiased_laplace.posterior.fitted import FittedPosterior
from debiased_laplace.posterior.hyperparameters import name_of, one_of
from debiased_laplace.predictive import linearized, links, sampling

PredictiveKind = Literal["glm", "nn"]
Link = Literal["probit", "mc", "bridge", "bridge_norm"]


class PredictiveInterface(FittedPosterior):
    """Everything that predicts, in terms of a network and a precision operator."""

    def __call__(
        self,
        x: Tensor,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,  # noqa: ARG002  laplace-torch's signature; only reward models use it
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The posterior predictive, as laplace-torch's.

        Args:
            x: inputs (n, …).
            pred_type: "glm" (linearized network) or "nn" (network at drawn weights).
            joint: regression with "glm" only: the covariance of all outputs of the batch together.
            link_approx: "probit", "mc", "bridge" or "bridge_norm"; "nn" has only "mc".
            n_samples: draws of "mc".
            diagonal_output: ignore covariances between outputs.
            generator: of the draws, on the model's device.
            fitting: unused.
            **model_kwargs: passed to the model by "nn".

        Returns:
            Classification: probabilities (n, C). Regression: mean (n, C) and variance, (n, C, C) for "glm" ((n, C) with
            `diagonal_output`), (n, C) for "nn"; jointly (nC,) and (nC, nC). The variance is that of the function,
            without observation noise.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is none of the above.
        """
        link_approx = name_of(link_approx)
        one_of(link_approx, Link, "link_approx")
        pred_type = self._checked(x, pred_type, n_samples, generator)
        if pred_type == "nn":
            if link_approx != "mc":
                raise ValueError(
                    f"pred_type='nn' averages over drawn networks: expected link_approx='mc', got {link_approx!r}."
                )
            if self.likelihood == "regression" and n_samples < 2:
                raise ValueError(f"A variance over drawn networks needs n_samples of at least 2; got {n_samples}.")
            draws = self._nn_predictive_samples(x, n_samples, generator, **model_kwargs)
            if self.likelihood == "regression":
                return draws.mean(0), draws.var(0)
            return draws.mean(0)
        regression = self.likelihood == "regression"
        mean, covariance = self._glm_predictive_distribution(x, joint=joint and regression)
        if regression:
            if diagonal_output and not joint:
                covariance = covariance.diagonal(dim1=-2, dim2=-1)
            return mean, covariance
        return self.link(mean, covariance, link_approx, n_samples, diagonal_output, generator)

    def link(
        self,
        mean: Tensor,
        covariance: Tensor,
        link_approx: str,
        n_samples: int,
        diagonal: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Class probabilities (n, C) from a Gaussian over logits."""
        if link_approx == "probit":
            return links.probit(mean, covariance)
        if link_approx == "mc":
            return links.monte_carlo(mean, covariance, n_samples=n_samples, diagonal=diagonal, generator=generator)
        return links.bridge(mean, covariance, normalized=link_approx == "bridge_norm")

    def functional_samples(
        self,
        x: Tensor,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws of the function at x, (n_samples, n, C); each draw is one function at all inputs.

        With `diagonal_output` ("glm" only) every output is drawn on its own instead.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is not known.
        """
        pred_type = self._checked(x, pred_type, n_samples, generator)
        if pred_type == "nn":
            return self._nn_functional_samples(x, n_samples, generator)
        if diagonal_output:
            mean, covariance = self._glm_predictive_distribution(x)
            return links.gaussian_draws(mean, covariance, n_samples=n_samples, diagonal=True, generator=generator)
        deviations = self.posterior_precision.root(self._noise(n_samples, generator))
        with self._looking(x) as (network, inputs):
            return linearized.draw_functions(network, inputs, deviations, create_graph=self.enable_backprop)

    def predictive_samples(
        self,
        x: Tensor,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `functional_samples`, passed through the softmax in classification."""
        draws = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return draws if self.likelihood == "regression" else torch.softmax(draws, dim=-1)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the parameters, (n_samples, P).

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_H_init()
        self._check_draws(n_samples, generator)
        return self.mean + self.posterior_precision.root(self._noise(n_samples, generator))

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Output covariances (n, C, C) for Jacobians (n, C, P)."""
        self._check_jacobian_width(Js)
        return self.posterior_precision.variance(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Covariance (nC, nC) of all outputs together, for Jacobians (n, C, P) or (nC, P)."""
        self._check_jacobian_width(Js)
        return self.posterior_precision.variance(Js.flatten(0, -2))

    def _glm_predictive_distribution(
        self, X: Tensor, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        predict = linearized.predict_jointly if joint else linearized.predict
        with self._looking(X) as (network, inputs):
            mean, covariance = predict(network, self.posterior_precision, inputs, create_graph=self.enable_backprop)
        if diagonal_output and not joint:
            covariance = covariance.diagonal(dim1=-2, dim2=-1)
        return mean, covariance

    def _nn_functional_samples(
        self,
        X: Tensor,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        weights = self.sample(n_samples, generator)
        with self._looking(X) as (network, inputs):
            return sampling.network_draws(network, inputs, weights, model_kwargs, create_graph=self.enable_backprop)

    def _noise(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal draws of the parameters' shape, dtype and device."""
        return torch.randn(
            n_samples,
            self.n_params,
            generator=generator,
            dtype=self.mean.dtype,
            device=self.mean.device,
        )

    def _check_jacobian_width(self, Js: Tensor) -> None:
        self._check_H_init()
        if Js.ndim < 2 or Js.shape[-1] != self.n_params:
            raise ValueError(f"Expected Jacobians of shape (…, {self.n_params}); got {tuple(Js.shape)}.")

    @contextmanager
    def _looking(self, x: Tensor) -> Iterator[tuple[Network, Tensor]]:
        """The network and the inputs on its device, in evaluation mode while the block runs."""
        self._check_H_init()
        with evaluating(self.model), differentiable_kernels(self.model):
            inputs = x.to(self.mean.device)
            network = self.network_for(inputs)
            network.check_inputs(inputs)
            yield network, inputs

    def _checked(self, x: Tensor, pred_type: str, n_samples: int, generator: torch.Generator | None) -> str:
        """The kind of predictive as a plain string, after a look at what every call shares."""
        self._check_H_init()
        pred_type = name_of(pred_type)
        one_of(pred_type, PredictiveKind, "pred_type")
        if not isinstance(x, Tensor):
            raise ValueError(f"Expected inputs as a tensor; got {type(x).__name__}.")
        if x.ndim == 0 or len(x) == 0:
            raise ValueError(f"Expected at least one sample of inputs; got shape {tuple(x.shape)}.")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError("Expected finite inputs; some are NaN or infinite.")
        self._check_draws(n_samples, generator)
        return pred_type

    def _check_draws(self, n_samples: int, generator: torch.Generator | None) -> None:
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1; got {n_samples!r}.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"Expected a torch.Generator; got {type(generator).__name__}.")
        if generator is not None and generator.device.type != self.mean.device.type:
            raise ValueError(f"Expected a generator on {self.mean.device}; got one on {generator.device}.")
