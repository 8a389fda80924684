"""What can predict: a network, a Laplace posterior of any library, a callable. Each maps a batch to tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn

from debiased_laplace.calibration.predicting.pieces import Piece, piece_of_output, reduce_samples
from debiased_laplace.calibration.predicting.untouched import untouched
from debiased_laplace.calibration.predictions.arrays import Task
from debiased_laplace.curvature.parameters import takes_keywords
from debiased_laplace.data.inputs import Inputs, n_samples_of
from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior.fitted import FittedPosterior
from debiased_laplace.posterior.predictions import Link, PredictiveInterface
from debiased_laplace.predictive.mean_field import GaussianLogits

PredictionType = Literal["glm", "nn"]
LinkApproximation = Link


@dataclass(frozen=True)
class PredictionOptions:
    """How Laplace posteriors predict.

    Attributes:
        task: what is predicted.
        pred_type: linearized ("glm") or the network at drawn weights ("nn").
        link: from a Gaussian over logits to probabilities.
        n_samples: draws, where there are any.
        seed: of the draws.
    """

    task: Task
    pred_type: PredictionType
    link: LinkApproximation
    n_samples: int
    seed: int

    @property
    def sampled(self) -> bool:
        """Whether Laplace posteriors predict by drawing."""
        return self.pred_type == "nn" or (self.link == "mc" and self.task != "regression")


@dataclass(frozen=True, eq=False)
class NetworkPredictor:
    """The network itself (MAP): softmax of its logits, or its outputs as means."""

    name: str
    model: nn.Module
    task: Task
    keeps_logits: bool = False
    kind: str = "network"

    @property
    def device(self) -> torch.device | None:
        """That of its first parameter."""
        return _device_of(self.model)

    def predict(self, inputs: Inputs) -> Piece:
        """Probabilities, with logits where they are kept, or means."""
        with untouched(self.model), torch.no_grad():
            if isinstance(inputs, dict) and takes_keywords(self.model, inputs):
                returned = self.model(**inputs)
            else:
                returned = self.model(inputs)
        outputs = getattr(returned, "logits", returned)
        n = n_samples_of(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != n:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"{self.name!r}: expected a tensor of outputs for {n} inputs, or an output with logits; got {got}."
            )
        outputs = outputs.detach()
        if self.task == "regression":
            return {"mean": outputs}
        if self.task == "binary" and (outputs.ndim == 1 or outputs.shape[1:] == (1,)):
            z = outputs.reshape(-1)
            outputs = torch.stack([torch.zeros_like(z), z], dim=1)
        if outputs.ndim < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"{self.name!r}: expected logits (n, C) of at least 2 classes; got {tuple(outputs.shape)}."
            )
        self._refuse_probabilities(outputs)
        full = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
        kept = {"logits": full} if self.keeps_logits and full.ndim == 2 else {}
        return {"probabilities": full.softmax(1), **kept}

    def _refuse_probabilities(self, outputs: Tensor) -> None:
        """A network that ends in a softmax would get a second one."""
        sums = outputs.double().sum(1)
        if bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all()):
            raise ValueError(
                f"The outputs of the network {self.name!r} are probabilities (every row is nonnegative and sums to 1); "
                "expected logits. Give a callable, `lambda x: model(x)`, whose probabilities are taken as they are."
            )


@dataclass(frozen=True, eq=False)
class LaplacePredictor:
    """A posterior of this package or of laplace-torch."""

    name: str
    la: BaseLaplace
    options: PredictionOptions
    kind: str = "Laplace posterior"

    def __post_init__(self) -> None:
        name, likelihood = f"{self.name!r}", str(getattr(self.la.likelihood, "value", self.la.likelihood))
        if likelihood == "reward_modeling":
            raise ValueError(
                f"{name} is a reward model: it predicts rewards, for which there are no targets to compare with. Give "
                "a callable that returns the probabilities of which of a pair is preferred, la(pairs, fitting=True)."
            )
        if (likelihood == "regression") != (self.options.task == "regression"):
            raise ValueError(f"{name} has the likelihood {likelihood!r}; got task={self.options.task!r}.")
        check = getattr(self.la, "_check_H_init", None) or getattr(self.la, "_check_fitted", None)
        # laplace-torch's diagonal and full posteriors predict from the prior alone before they are fitted
        if not getattr(self.la, "n_data", True):
            raise NotFittedError(f"{name} is not fitted; call fit() first.")
        if check is not None:
            check()
        if isinstance(self.la, FittedPosterior):
            # it would predict with the weights that were fitted, and MAP beside it with those of now
            self.la.check_weights()

    @property
    def model(self) -> nn.Module | None:
        """The network under the posterior, where it has one."""
        return getattr(self.la, "model", None)

    @property
    def device(self) -> torch.device | None:
        """Where the posterior is."""
        known = getattr(self.la, "_device", None)
        return known if known is not None else None if self.model is None else _device_of(self.model)

    def predict(self, inputs: Inputs) -> Piece:
        """Probabilities, with scores of the posterior unless the link has none; or mean and function covariance."""
        o = self.options
        x = inputs if isinstance(inputs, Tensor) else MovableMapping(inputs)
        with untouched(self.model, plain=isinstance(self.la, FittedPosterior)), torch.enable_grad():
            if o.sampled:
                generator = torch.Generator(device=self.device or "cpu").manual_seed(o.seed)
                samples = self.la.predictive_samples(
                    x, pred_type=o.pred_type, n_samples=o.n_samples, generator=generator
                ).detach()
                return reduce_samples(self.name, samples, o.task)
            if o.task != "regression" and o.link == "mean_field":
                return _reduce_logits(_gaussian_logits(self.la, x))
            if o.task != "regression":
                return {"probabilities": self.la(x, pred_type=o.pred_type, link_approx=o.link).detach()}
            mean, variance = (t.detach() for t in self.la(x, pred_type=o.pred_type))
        return {"mean": mean, "function_variance": variance}


@dataclass(frozen=True, eq=False)
class CallablePredictor:
    """Anything that maps a batch of inputs to predictions."""

    name: str
    function: Callable[[Any], Any]
    task: Task
    kind: str = "callable"
    device: None = None

    def predict(self, inputs: Inputs) -> Piece:
        """Whatever it returns, samples reduced."""
        return piece_of_output(self.name, self.function(inputs), self.task, n=n_samples_of(inputs))


Predictor = NetworkPredictor | LaplacePredictor | CallablePredictor


class MovableMapping(dict[str, Tensor]):
    """A mapping of tensors with the one method that laplace-torch asks of it."""

    def to(self, device: torch.device) -> "MovableMapping":
        """The mapping on a device."""
        return MovableMapping({key: value.to(device) for key, value in self.items()})


def _gaussian_logits(la: BaseLaplace, x: Any) -> GaussianLogits:
    """The Gaussian that a posterior of either library has over the logits."""
    if isinstance(la, PredictiveInterface):
        return la.gaussian_logits(x)
    return GaussianLogits.of_covariance(*la._glm_predictive_distribution(x))


def _reduce_logits(logits: GaussianLogits) -> Piece:
    probabilities, information = logits.probabilities_and_information()
    piece = {
        "probabilities": probabilities,
        "mutual_information": information,
        "logit_variance": logits.total_variance,
    }
    return {name: values.detach() for name, values in piece.items()}


def _device_of(model: nn.Module) -> torch.device | None:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else None
