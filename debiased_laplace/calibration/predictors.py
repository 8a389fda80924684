"""Predictors of a batch: a network, a Laplace posterior of either library, or a callable."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Shaped
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn

from debiased_laplace.calibration.contents import Task
from debiased_laplace.calibration.inputs import as_tensor, check_whole_number
from debiased_laplace.calibration.probabilities import read_probabilities, uncertainty_scores
from debiased_laplace.curvature.contexts import evaluating
from debiased_laplace.curvature.parameters import takes_keywords
from debiased_laplace.data.inputs import Inputs, n_samples_of
from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior.fitted import FittedPosterior
from debiased_laplace.posterior.laplace_torch import plain_model
from debiased_laplace.posterior.predictions import Link, PredictiveInterface
from debiased_laplace.predictive.mean_field import GaussianLogits

PredictionType = Literal["glm", "nn"]

MOST_JOINT_OUTPUTS = 32
"""Covariances (n, d, d) between more outputs are not kept: they would outgrow everything else."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class PredictionOptions:
    """Options of the predictions of Laplace posteriors, as of `evaluate`; a link of None becomes its default."""

    task: Task
    pred_type: PredictionType = "glm"
    link: Link | None = None
    n_samples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.link is None:
            object.__setattr__(self, "link", "mc" if self.pred_type == "nn" else "mean_field")
        choices = {"task": (self.task, Task), "pred_type": (self.pred_type, PredictionType)}
        for name, (value, type_) in (choices | {"link_approx": (self.link, Link)}).items():
            if value not in get_args(type_):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(type_)))}; got {value!r}.")
        if self.pred_type == "nn" and self.link != "mc":
            raise ValueError(
                f"pred_type='nn' averages over drawn networks: expected link_approx='mc', got {self.link!r}."
            )
        check_whole_number("n_samples", self.n_samples, 2)
        check_whole_number("seed", self.seed, 0)


@dataclass(frozen=True, eq=False)
class BatchPrediction:
    """Predictions for the n samples of a batch, or of all batches; None where a method has none.

    Attributes:
        probabilities: (n, C), as the logits.
        mutual_information: between label and parameters, (n,), in nats.
        logit_variance: trace of the covariance of the centred logits, (n,).
        mean: (n,) or (n, d), as the standard deviation.
        standard_deviation: of the targets, observation noise included.
        function_variance: without the noise, as the mean, or covariances (n, d, d).
        n_samples: posterior samples behind each prediction.
    """

    probabilities: Tensor | None = None
    mutual_information: Tensor | None = None
    logit_variance: Tensor | None = None
    logits: Tensor | None = None
    mean: Tensor | None = None
    standard_deviation: Tensor | None = None
    function_variance: Tensor | None = None
    n_samples: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are present, except for `n_samples`."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def compact(self) -> "BatchPrediction":
        """Return a copy on the CPU in its own dtype, without graph or covariances between too many outputs."""
        kept = self.tensors()
        covariance = kept.get("function_variance")
        if covariance is not None and covariance.ndim == 3 and not 1 < covariance.shape[-1] <= MOST_JOINT_OUTPUTS:
            kept["function_variance"] = covariance.diagonal(dim1=-2, dim2=-1)
        changes: dict[str, Any] = {name: values.detach().to("cpu", copy=True) for name, values in kept.items()}
        return replace(self, **changes)


@contextmanager
def preserve_state(model: nn.Module | None, plain: bool = True) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards restore modes, attributes, hooks, parameters and gradients.

    laplace-torch's sampling writes every draw into the parameters and leaves views of its mean there, or, after an
    exception, the last draw; its backends may clear gradients, and extend modules with hooks. With `plain` the model is
    without what these backends have left on it and need themselves.
    """
    if model is None:
        yield
        return
    # by identity: a parameter holds other memory while a draw is written into it, and gets its own back
    before = [(p, p.data, p.grad) for p in model.parameters()]
    hooks = [(getattr(m, name), dict(getattr(m, name))) for m in model.modules() for name in HOOKS]
    try:
        with evaluating(model), plain_model(model) if plain else nullcontext():
            for p, _, _ in before:
                p.grad = None
            yield
    finally:
        for p, data, grad in before:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            p.grad = grad
        for present, kept in hooks:
            if list(present) != list(kept):
                present.clear()
                present.update(kept)


@dataclass(frozen=True, eq=False)
class NetworkPredictor:
    """Predict with the network itself (MAP): the softmax of its logits, or its outputs as means.

    With `keeps_logits` it returns the logits too, since probabilities may be rounded to 0 and 1.
    """

    kind: ClassVar[str] = "network"
    name: str
    model: nn.Module
    task: Task
    keeps_logits: bool = False

    @property
    def device(self) -> torch.device | None:
        """Device of the first parameter."""
        return _device_of(self.model)

    def predict(self, inputs: Inputs) -> BatchPrediction:
        """Predict a batch; outputs that are neither logits nor, in regression, means are refused."""
        outputs = self._evaluate(inputs)
        if self.task == "regression":
            return BatchPrediction(mean=outputs)
        if self.task == "binary" and (outputs.ndim == 1 or outputs.shape[1:] == (1,)):
            z = outputs.reshape(-1)
            outputs = torch.stack([torch.zeros_like(z), z], dim=1)
        if outputs.ndim < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"{self.name!r}: expected logits (n, C) of at least 2 classes; got {tuple(outputs.shape)}."
            )
        if bool((outputs >= 0).all()) and bool(((outputs.double().sum(1) - 1).abs() < 1e-4).all()):
            raise ValueError(
                f"The outputs of the network {self.name!r} are probabilities (every row is nonnegative and sums to 1); "
                "expected logits. Give a callable, `lambda x: model(x)`, whose probabilities are taken as they are."
            )
        logits = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
        kept = logits if self.keeps_logits and logits.ndim == 2 else None
        return BatchPrediction(probabilities=logits.softmax(1), logits=kept)

    def _evaluate(self, inputs: Inputs) -> Tensor:
        with preserve_state(self.model), torch.no_grad():
            if isinstance(inputs, dict) and takes_keywords(self.model, inputs):
                returned = self.model(**inputs)
            else:
                returned = self.model(inputs)
        outputs, n = getattr(returned, "logits", returned), n_samples_of(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != n:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"{self.name!r}: expected a tensor of outputs for {n} inputs, or an output with logits; got {got}."
            )
        return outputs.detach()


@dataclass(frozen=True, eq=False)
class LaplacePredictor:
    """Predict with a fitted posterior of this package or of laplace-torch, whose task and weights are checked."""

    kind: ClassVar[str] = "Laplace posterior"
    name: str
    la: BaseLaplace
    options: PredictionOptions

    def __post_init__(self) -> None:
        name, likelihood = f"{self.name!r}", str(getattr(self.la.likelihood, "value", self.la.likelihood))
        if likelihood == "reward_modeling":
            raise ValueError(
                f"{name} is a reward model: it predicts rewards, for which there are no targets to compare with. Give "
                "a callable that returns the probabilities of which of a pair is preferred, la(pairs, fitting=True)."
            )
        if (likelihood == "regression") != (self.options.task == "regression"):
            raise ValueError(f"{name} has the likelihood {likelihood!r}; got task={self.options.task!r}.")
        # laplace-torch's diagonal and full posteriors predict from the prior alone before they are fitted
        if not getattr(self.la, "n_data", True):
            raise NotFittedError(f"{name} is not fitted; call fit() first.")
        check = getattr(self.la, "_check_H_init", None) or getattr(self.la, "_check_fitted", None)
        if check is not None:
            check()
        if isinstance(self.la, FittedPosterior):
            # it would predict with the weights that were fitted, and MAP beside it with the present ones
            self.la.check_weights()

    @property
    def model(self) -> nn.Module | None:
        """The network of the posterior, where it has one."""
        return getattr(self.la, "model", None)

    @property
    def device(self) -> torch.device | None:
        """Device of the posterior."""
        known: torch.device | None = getattr(self.la, "_device", None)
        return known if known is not None or self.model is None else _device_of(self.model)

    def predict(self, inputs: Inputs) -> BatchPrediction:
        """Predict a batch: probabilities, with mutual information where the link knows it, or a function's moments."""
        o, is_regression = self.options, self.options.task == "regression"
        x = inputs if isinstance(inputs, Tensor) else _MovableMapping(inputs)
        with preserve_state(self.model, plain=isinstance(self.la, FittedPosterior)), torch.enable_grad():
            if o.pred_type == "nn" or (o.link == "mc" and not is_regression):
                generator = torch.Generator(device=self.device or "cpu").manual_seed(o.seed)
                samples = self.la.predictive_samples(
                    x, pred_type=o.pred_type, n_samples=o.n_samples, generator=generator
                )
                return reduce_samples(self.name, samples.detach(), o.task)
            if is_regression:
                mean, variance = self.la(x, pred_type=o.pred_type)
                return BatchPrediction(mean=mean, function_variance=variance)
            if o.link != "mean_field":
                return BatchPrediction(self.la(x, pred_type=o.pred_type, link_approx=o.link))
            if isinstance(self.la, PredictiveInterface):
                logits = self.la.gaussian_logits(x)
            else:
                logits = GaussianLogits.of_covariance(*self.la._glm_predictive_distribution(x))
            return BatchPrediction(*logits.probabilities_and_information(), logits.total_variance)


@dataclass(frozen=True, eq=False)
class CallablePredictor:
    """Predict with any function from a batch of inputs to predictions.

    These are probabilities (n, C), samples (S, n, C), or in regression (mean, standard deviation) or samples of the
    function.
    """

    kind: ClassVar[str] = "callable"
    device: ClassVar[None] = None
    name: str
    function: Callable[[Any], Any]
    task: Task

    def predict(self, inputs: Inputs) -> BatchPrediction:
        """Predict a batch; samples are reduced to what a report needs of them."""
        output, n, where = self.function(inputs), n_samples_of(inputs), f"Predictions of {self.name!r}"
        if self.task == "regression" and isinstance(output, tuple | list) and len(output) == 2:
            mean, deviation = (as_tensor(part, where) for part in output)
            if len(mean) == len(deviation) == n:
                return BatchPrediction(mean=mean, standard_deviation=deviation)
            raise ValueError(
                f"{self.name!r}: expected mean and standard deviation of {n} inputs; got shapes {tuple(mean.shape)} "
                f"and {tuple(deviation.shape)}."
            )
        values = as_tensor(output, where)
        sampled = values.ndim == 3 or (self.task == "regression" and values.ndim == 2)
        if sampled and values.shape[1] == n:
            return reduce_samples(self.name, values, self.task)
        if not sampled and self.task != "regression" and values.ndim > 0 and len(values) == n:
            return BatchPrediction(values)
        expected = "(mean, standard deviation), or samples (S, n, outputs)"
        if self.task != "regression":
            expected = "probabilities (n, C), or samples (S, n, C)"
        raise ValueError(f"{self.name!r}: expected {expected} for n = {n} inputs; got shape {tuple(values.shape)}.")


Predictor = NetworkPredictor | LaplacePredictor | CallablePredictor


def reduce_samples(name: str, samples: Shaped[Tensor, "S n ..."], task: Task) -> BatchPrediction:
    """Reduce posterior samples, (S, n, C) or of a function (S, n) or (S, n, d), to their mean and their spread."""
    if task != "regression":
        information = uncertainty_scores(read_probabilities(name, samples, task=task))["mutual_information"]
        return BatchPrediction(samples.mean(0), information, n_samples=len(samples))
    if len(samples) < 2:
        raise ValueError(f"{name!r}: a variance over draws needs at least 2 samples; got {len(samples)}.")
    return BatchPrediction(mean=samples.mean(0), function_variance=samples.var(0), n_samples=len(samples))


class _MovableMapping(dict[str, Tensor]):
    """A mapping of tensors with the one method that laplace-torch asks of it."""

    def to(self, device: torch.device) -> "_MovableMapping":
        """Move the mapping to a device."""
        return _MovableMapping({key: value.to(device) for key, value in self.items()})


def _device_of(model: nn.Module) -> torch.device | None:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else None
