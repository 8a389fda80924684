"""The predictive interface of laplace-torch, with its generator used and the user's model left alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.network import Network
from debiased_laplace.data.inputs import Inputs, moved, n_samples_of, on_each, shape_of, tensors_of
from debiased_laplace.posterior.fitted import FittedPosterior
from debiased_laplace.posterior.hyperparameters import name_of, one_of
from debiased_laplace.predictive import linearized, links, sampling
from debiased_laplace.predictive.mean_field import GaussianLogits

PredictiveKind = Literal["glm", "nn"]
Link = Literal["mean_field", "probit", "mc", "bridge", "bridge_norm"]


class PredictiveInterface(FittedPosterior):
    """Everything that predicts, in terms of a network and a precision operator."""

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
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The posterior predictive, as laplace-torch's.

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
        inputs, pred_type = self._checked(x, pred_type, n_samples, generator)
        regression = not self.predicts_classes and not (fitting and self.likelihood == "reward_modeling")
        if pred_type == "nn":
            if link_approx != "mc":
                raise ValueError(
                    f"pred_type='nn' averages over drawn networks: expected link_approx='mc', got {link_approx!r}."
                )
            if regression and n_samples < 2:
                raise ValueError(f"A variance over drawn networks needs n_samples of at least 2; got {n_samples}.")
            draws = self._nn_functional_samples(inputs, n_samples, generator, **model_kwargs)
            if regression:
                return draws.mean(0), draws.var(0)
            return torch.softmax(draws, dim=-1).mean(0)
        joint = joint and regression
        if regression:
            return self._glm_predictive_distribution(inputs, joint=joint, diagonal_output=diagonal_output)
        if link_approx == "mean_field" and not diagonal_output:
            return self._gaussian_logits(inputs).probabilities()
        alone = link_approx == "probit" or (link_approx in ("mean_field", "mc") and diagonal_output)
        mean, spread = self._glm_predictive_distribution(inputs, diagonal_output=alone)
        return self.link(mean, spread, link_approx, n_samples, generator)

    @property
    def predicts_classes(self) -> bool:
        """Whether predictions are class probabilities; a reward model predicts rewards."""
        return self.likelihood == "classification"

    def link(
        self, mean: Tensor, spread: Tensor, link_approx: str, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Class probabilities (n, C) from a Gaussian over logits: covariances (n, C, C), or variances (n, C) alone."""
        alone = spread.ndim == 2
        if link_approx == "mean_field":
            of_spread = GaussianLogits.of_variances if alone else GaussianLogits.of_covariance
            return of_spread(mean, spread).probabilities()
        if link_approx == "probit":
            return links.probit(mean, spread if alone else spread.diagonal(dim1=-2, dim2=-1))
        if link_approx == "mc":
            draw = links.independent_draws if alone else links.gaussian_draws
            return torch.softmax(draw(mean, spread, n_samples=n_samples, generator=generator), dim=-1).mean(0)
        return links.bridge(mean, spread, normalized=link_approx == "bridge_norm")

    def gaussian_logits(self, x: Tensor | Mapping[str, Tensor]) -> GaussianLogits:
        """Gaussian over the logits of each input, as the mean-field link takes it.

        It gives class probabilities, the mutual information of label and parameters, and the total variance of the
        centred logits (`total_variance`). Of more than 128 classes no C x C matrix is formed, but with
        `enable_backprop`.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if outputs are no logits, as in regression.
        """
        self._check_H_init()
        if self.likelihood == "regression" or self.n_outputs < 2:
            raise ValueError(
                f"Expected a posterior of at least two logits; got the likelihood {self.likelihood!r} and "
                f"{self.n_outputs} outputs. A regression has la(x), mean and variance."
            )
        return self._gaussian_logits(self._checked(x, "glm", 1, None)[0])

    def _gaussian_logits(self, X: Inputs) -> GaussianLogits:
        with self._looking(X) as (network, inputs):
            return linearized.predict_logits(
                network, self.posterior_precision, inputs, create_graph=self.enable_backprop
            )

    def functional_samples(
        self,
        x: Tensor | Mapping[str, Tensor],
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
        inputs, pred_type = self._checked(x, pred_type, n_samples, generator)
        if pred_type == "nn":
            return self._nn_functional_samples(inputs, n_samples, generator)
        if diagonal_output:
            mean, variance = self._glm_predictive_distribution(inputs, diagonal_output=True)
            return links.independent_draws(mean, variance, n_samples=n_samples, generator=generator)
        deviations = self.posterior_precision.root(self._noise(n_samples, generator))
        with self._looking(inputs) as (network, inputs):
            return linearized.draw_functions(network, inputs, deviations, create_graph=self.enable_backprop)

    def predictive_samples(
        self,
        x: Tensor | Mapping[str, Tensor],
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `functional_samples`, passed through the softmax in classification."""
        draws = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return torch.softmax(draws, dim=-1) if self.predicts_classes else draws

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the parameters, (n_samples, P).

        Of a subnetwork posterior they are draws of all trainable parameters, those outside it at their trained values,
        as laplace-torch's are.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_H_init()
        self._check_draws(n_samples, generator)
        return self.embedded(self._center + self.posterior_precision.root(self._noise(n_samples, generator)))

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Output covariances (n, C, C) for Jacobians (n, C, P)."""
        self._check_jacobian_width(Js)
        return self.posterior_precision.variance(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Covariance (nC, nC) of all outputs together, for Jacobians (n, C, P) or (nC, P)."""
        self._check_jacobian_width(Js)
        return self.posterior_precision.variance(Js.flatten(0, -2))

    def _glm_predictive_distribution(
        self, X: Inputs, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        predict = linearized.predict
        if joint:
            predict = linearized.predict_jointly
        elif diagonal_output:
            predict = linearized.predict_variances
        with self._looking(X) as (network, inputs):
            return predict(network, self.posterior_precision, inputs, create_graph=self.enable_backprop)

    def _nn_functional_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        self._check_draws(n_samples, generator)
        weights = self._center + self.posterior_precision.root(self._noise(n_samples, generator))
        with self._looking(X) as (network, inputs):
            return sampling.network_draws(network, inputs, weights, model_kwargs, create_graph=self.enable_backprop)

    def _noise(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal draws of the parameters' shape, dtype and device."""
        return torch.randn(
            n_samples,
            len(self._center),
            generator=generator,
            dtype=self._center.dtype,
            device=self._center.device,
        )

    def _check_jacobian_width(self, Js: Tensor) -> None:
        self._check_H_init()
        if Js.ndim < 2 or Js.shape[-1] != len(self._center):
            raise ValueError(f"Expected Jacobians of shape (…, {len(self._center)}); got {tuple(Js.shape)}.")

    @contextmanager
    def _looking(self, x: Inputs) -> Iterator[tuple[Network, Inputs]]:
        """The network and the inputs on its device, in evaluation mode while the block runs.

        Inference mode is left: nothing can be differentiated in it, and what is kept from here on would be spoilt.
        """
        self._check_H_init()
        with torch.inference_mode(False), evaluating(self.model), differentiable_kernels(self.model):
            inputs = on_each(moved(x, self._center.device), lambda t: t.clone() if t.is_inference() else t)
            network = self.network_for(inputs)
            network.check_inputs(inputs)
            yield network, inputs

    def _checked(self, x: Any, pred_type: str, n_samples: int, generator: torch.Generator | None) -> tuple[Inputs, str]:
        """The inputs and the kind of predictive as a plain string, after a look at what every call shares."""
        self._check_H_init()
        pred_type = name_of(pred_type)
        one_of(pred_type, PredictiveKind, "pred_type")
        if isinstance(x, Mapping):
            x = self._problem.keys.inputs(x)
        elif not isinstance(x, Tensor):
            raise ValueError(f"Expected inputs as a tensor, or a mapping of tensors; got {type(x).__name__}.")
        for name, values in tensors_of(x).items():
            if values.ndim == 0 or len(values) == 0:
                raise ValueError(f"Expected at least one sample of {name}; got shape {tuple(values.shape)}.")
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise ValueError(f"Expected finite {name}; some are NaN or infinite.")
        lengths = {len(values) for values in tensors_of(x).values()}
        if lengths != {n_samples_of(x)}:
            raise ValueError(f"Expected as many samples in every tensor of a mapping; got shapes {shape_of(x)}.")
        self._check_draws(n_samples, generator)
        return x, pred_type

    def _check_draws(self, n_samples: int, generator: torch.Generator | None) -> None:
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1; got {n_samples!r}.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"Expected a torch.Generator; got {type(generator).__name__}.")
        if generator is not None and generator.device.type != self._center.device.type:
            raise ValueError(f"Expected a generator on {self._center.device}; got one on {generator.device}.")
