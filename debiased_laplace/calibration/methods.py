"""Methods that `evaluate` compares (posteriors, networks, callables), and what each predicts for a batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn

from debiased_laplace.calibration.contents import Task
from debiased_laplace.calibration.inputs import as_tensor, check_whole_number
from debiased_laplace.calibration.probabilities import read_probabilities, uncertainty_scores
from debiased_laplace.checks import name_of, one_of
from debiased_laplace.curvature.as_found import modules_reached
from debiased_laplace.curvature.classification import LOGITS_NEEDED, are_probabilities
from debiased_laplace.curvature.contexts import keeping_buffers
from debiased_laplace.curvature.parameters import call_with, logits_of
from debiased_laplace.curvature.positions import OutputLayout
from debiased_laplace.data.inputs import DEFAULT_KEYS, Inputs, MappingKeys, n_samples_of, on_each
from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace
from debiased_laplace.posterior.laplace_torch import preserve_state
from debiased_laplace.predictive.mean_field import GaussianLogits
from debiased_laplace.predictive.predictive import Link

Method = Any
"""A Laplace posterior (`BaseLaplace`), a network (`nn.Module`), or a callable from inputs to predictions."""
PredictionType = Literal["glm", "nn"]
MOST_JOINT_OUTPUTS = 32  # covariances (n, d, d) between more outputs would outgrow everything else
TASKS: dict[str, Task] = {
    "classification": "multiclass",
    "binary": "binary",
    "regression": "regression",
    "heteroscedastic": "regression",
    "poisson": "regression",
}
"""Task of each likelihood; classifications of two classes may be "binary" too."""


@dataclass(frozen=True)
class PredictionOptions:
    """Options of the predictions, as of `evaluate`; a link of None becomes its default.

    `likelihood_of` says how the outputs of a network are read, `layout` which positions they have, and `n_labels` how
    many binary labels: each label of each position is a row of the predictions.
    """

    task: Task
    pred_type: PredictionType = "glm"
    link: Link | None = None
    n_samples: int = 100
    seed: int = 0
    keys: MappingKeys = DEFAULT_KEYS
    progress_bar: bool = False
    likelihood_of: Callable[[nn.Module | None], str] = lambda _: ""
    layout: OutputLayout | None = None
    n_labels: int = 1

    def __post_init__(self) -> None:
        if self.link is None:
            nn_link = isinstance(self.pred_type, str) and self.pred_type == "nn"
            object.__setattr__(self, "link", "mc" if nn_link else "mean_field")
        choices = {"task": (self.task, Task), "pred_type": (self.pred_type, PredictionType)}
        for name, (value, kind) in (choices | {"link_approx": (self.link, Link)}).items():
            one_of(value, kind, name)
        if self.pred_type == "nn" and self.link != "mc":
            raise ValueError(f"pred_type='nn' averages drawn networks: expected link_approx='mc', got {self.link!r}.")
        object.__setattr__(self, "n_samples", check_whole_number("n_samples", self.n_samples, 2))
        check_whole_number("seed", self.seed, 0)

    def rows_of(self, values: Tensor, n_lead: int = 0, *, of_labels: bool = False) -> Tensor:
        """Return outputs (*lead, n, C), or with positions, as rows (*lead, rows, C).

        Args:
            values: outputs, or what has their shape.
            n_lead: number of leading dimensions.
            of_labels: whether the outputs are those of binary labels, of which each is a row then, with C = 1.
        """
        rows = values if self.layout is None else self.layout.rows_of(values, n_lead=n_lead)
        return rows.flatten(n_lead, n_lead + 1)[..., None] if of_labels else rows


@dataclass(frozen=True, eq=False)
class BatchPrediction:
    """Predictions for the n samples of a batch, or of all batches; None where a method has none.

    Attributes:
        probabilities: (n, C), as the logits, which are kept of networks: probabilities may be rounded to 0.
        mutual_information: between label and parameters, (n,), in nats.
        logit_variance: trace of the covariance of the centred logits, (n,).
        mean: (n,) or (n, d), as the standard deviation.
        standard_deviation: of the targets, observation noise included.
        function_variance: without the noise, as the mean, or covariances (n, d, d).
        noise: standard deviation of targets around the mean, where it depends on the input.
        draws: means at S draws of the function, (n, S, d), of counts the rates; then `noise`, if any, is of each.
        n_samples: posterior samples behind each prediction.
        seconds: wall time of the predictions.
        peak_bytes: peak of GPU memory during the predictions.
    """

    probabilities: Tensor | None = None
    mutual_information: Tensor | None = None
    logit_variance: Tensor | None = None
    logits: Tensor | None = None
    mean: Tensor | None = None
    standard_deviation: Tensor | None = None
    function_variance: Tensor | None = None
    noise: Tensor | None = None
    draws: Tensor | None = None
    n_samples: int | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by field."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def at(self, chosen: Tensor, name: str = "") -> "BatchPrediction":
        """Return some of the rows.

        Raises:
            ValueError: if a mask says so of another number of them.
        """
        n = {len(values) for values in self.tensors().values()}
        if chosen.dtype == torch.bool and n != {len(chosen)}:
            raise ValueError(
                f"{name!r}: expected a target for each of {max(n)} positions of a batch's outputs; got {len(chosen)}."
            )
        changes: dict[str, Any] = {key: values[chosen] for key, values in self.tensors().items()}
        return replace(self, **changes)

    def compact(self) -> "BatchPrediction":
        """Return a copy on the CPU in its own dtype, without graph or covariances between too many outputs."""
        kept = self.tensors()
        covariance = kept.get("function_variance")
        if covariance is not None and covariance.ndim == 3 and not 1 < covariance.shape[-1] <= MOST_JOINT_OUTPUTS:
            kept["function_variance"] = covariance.diagonal(dim1=-2, dim2=-1)
        changes: dict[str, Any] = {name: values.detach().to("cpu", copy=True) for name, values in kept.items()}
        return replace(self, **changes)


def network_of(method: Method) -> nn.Module | None:
    """Return the network of a method; None for callables, and for posteriors that have none."""
    model = getattr(method, "model", None) if isinstance(method, BaseLaplace) else method
    return model if isinstance(model, nn.Module) else None


def predict_batch(name: str, method: Method, inputs: Inputs, options: PredictionOptions) -> BatchPrediction:
    """Predict a batch with one method on the device of its network, and measure time and GPU memory.

    The method gets a copy of the inputs, so that it may write into them.
    """
    device = _device_of(method)
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    x = on_each(inputs, lambda t: t.to(device or t.device, copy=True))
    if isinstance(method, BaseLaplace):
        found = _predict_with_posterior(name, method, x, options)
    elif isinstance(method, nn.Module):
        found = _predict_with_network(name, method, x, options)
    else:
        found = _predict_with_callable(name, method, x, options)
    if on_gpu:
        torch.cuda.synchronize(device)
        found = replace(found, peak_bytes=torch.cuda.max_memory_allocated(device))
    return replace(found, seconds=time.perf_counter() - started).compact()


def check_posterior(name: str, la: BaseLaplace, task: Task) -> None:
    """Check that a posterior can predict the targets of a task.

    Raises:
        NotFittedError: before `fit`.
        ValueError: for a likelihood without reports, or of another task.
    """
    likelihood = name_of(la.likelihood)
    if likelihood == "reward_modeling":
        how = "give a callable that returns the probabilities of the preferences, la(pairs, fitting=True)"
        raise ValueError(f"{name!r} is a reward model, whose rewards have no targets to compare with: {how}.")
    if likelihood not in TASKS:
        raise ValueError(
            f"{name!r} has the likelihood {likelihood!r}; reports are of {sorted(TASKS)}. Its targets have "
            "la.predict(x)."
        )
    if (TASKS[likelihood] == "regression") != (task == "regression") or (likelihood, task) == ("binary", "multiclass"):
        raise ValueError(f"{name!r} has the likelihood {likelihood!r}; got task={task!r}.")
    # laplace-torch's diagonal and full posteriors predict from the prior alone before they are fitted
    if not getattr(la, "n_data", True):
        raise NotFittedError(f"{name!r} is not fitted; call fit() first.")
    if isinstance(la, DebiasedParametricLaplace):
        # it would predict with the weights that were fitted, and MAP beside it with the present ones
        la._check_weights()


def _predict_with_posterior(name: str, la: BaseLaplace, inputs: Inputs, options: PredictionOptions) -> BatchPrediction:
    """Predict probabilities, with mutual information where the link knows it, moments, or drawn rates."""
    x = inputs if isinstance(inputs, Tensor) else _MovableMapping(inputs)
    ours = isinstance(la, DebiasedParametricLaplace)
    with preserve_state(network_of(la), plain=ours), torch.enable_grad():
        if options.task == "regression":
            return _predict_targets(la, x, options)
        # laplace-torch fits a network that ends in a softmax, and takes the softmax of its outputs once more
        if not ours and (model := network_of(la)) is not None:
            _check_logits(name, _outputs_of(name, model, inputs))
        return _predict_classes(name, la, x, options)


def _predict_targets(la: Any, x: Any, options: PredictionOptions) -> BatchPrediction:
    """Predict the moments of targets, or draw rates of counts."""
    rows, likelihood = options.rows_of, name_of(la.likelihood)
    if likelihood != "regression" or options.pred_type == "nn":
        generator = torch.Generator(_device_of(la) or "cpu").manual_seed(options.seed)
        # outputs, also of laplace-torch's regressions
        samples = la.predictive_samples(x, options.pred_type, options.n_samples, generator=generator)
        draws = rows(samples.detach(), 1)
        if likelihood == "regression":
            return _reduce_samples("", draws, "regression")
        return replace(_of_outputs(draws.movedim(0, 1), likelihood), n_samples=len(draws))
    alone = {} if options.layout is None else {"diagonal_output": True}
    mean, variance = la(x, pred_type=options.pred_type, **alone)
    return BatchPrediction(mean=rows(mean), function_variance=rows(variance))


def _of_outputs(outputs: Shaped[Tensor, "n S C"], likelihood: str) -> BatchPrediction:
    """Return the means and the noise, or the rates, that outputs say."""
    if likelihood == "poisson":
        return BatchPrediction(draws=outputs.exp())
    mean, log_variance = outputs.chunk(2, dim=-1)
    return BatchPrediction(draws=mean, noise=(log_variance / 2).exp())


def _predict_classes(name: str, la: Any, x: Any, options: PredictionOptions) -> BatchPrediction:
    """Predict probabilities, with mutual information where the link knows it."""
    is_label = name_of(la.likelihood) == "binary"

    def rows(values: Tensor, n_lead: int = 0) -> Tensor:
        found = options.rows_of(values, n_lead, of_labels=is_label)
        return torch.cat([1 - found, found], dim=-1) if is_label else found

    if options.pred_type == "nn" or options.link == "mc":
        generator = torch.Generator(_device_of(la) or "cpu").manual_seed(options.seed)
        samples = la.predictive_samples(x, options.pred_type, options.n_samples, generator=generator).detach()
        return _reduce_samples(name, rows(samples, 1), options.task)
    if options.layout is not None or options.link != "mean_field":
        return BatchPrediction(rows(la(x, pred_type=options.pred_type, link_approx=options.link)))
    if isinstance(la, DebiasedParametricLaplace):
        logits = la.gaussian_logits(x)
    else:
        logits = GaussianLogits.of_covariance(*la._glm_predictive_distribution(x))
    return BatchPrediction(*logits.probabilities_and_information(), logits.total_variance)


def _predict_with_network(name: str, model: nn.Module, inputs: Inputs, options: PredictionOptions) -> BatchPrediction:
    """Predict the softmax of the logits of a network (MAP), or the mean, noise or rate that its outputs are."""
    with preserve_state(model):
        outputs, n = _outputs_of(name, model, inputs), n_samples_of(inputs)
    if outputs.ndim == 0 or len(outputs) != n:
        raise ValueError(f"{name!r}: expected a tensor of outputs for {n} inputs; got shape {tuple(outputs.shape)}.")
    likelihood = options.likelihood_of(model)
    if options.task == "regression":
        outputs = options.rows_of(outputs)
        if likelihood in ("heteroscedastic", "poisson"):
            return _of_outputs(outputs[:, None], likelihood)
        return BatchPrediction(mean=outputs)
    is_label = likelihood == "binary" or (options.task == "binary" and outputs[0].numel() == 1)
    outputs = options.rows_of(outputs[:, None] if outputs.ndim == 1 else outputs, of_labels=is_label)
    if is_label:
        outputs = torch.cat([torch.zeros_like(outputs), outputs], dim=1)
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise ValueError(f"{name!r}: expected logits (n, C) of at least 2 classes; got {tuple(outputs.shape)}.")
    _check_logits(name, outputs)
    logits = outputs if outputs.is_floating_point() else outputs.float()
    return BatchPrediction(probabilities=logits.softmax(1), logits=logits)


@torch.no_grad()
def _outputs_of(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    returned = call_with(model, inputs, model)
    try:
        return logits_of(returned)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


def _check_logits(name: str, outputs: Tensor) -> None:
    if outputs.ndim > 1 and are_probabilities(outputs):
        raise ValueError(f"The outputs of the network of {name!r} are probabilities; {LOGITS_NEEDED}.")


def _predict_with_callable(
    name: str, function: Callable[[Any], Any], inputs: Inputs, options: PredictionOptions
) -> BatchPrediction:
    """Predict probabilities (n, C), samples (S, n, C), in regression (mean, standard deviation) or function samples.

    With positions or several labels, probabilities are in the shape of the network's outputs; of counts, samples are
    rates.
    """
    with keeping_buffers(modules_reached(function)):
        output = function(inputs)
    n, where, task, layout = n_samples_of(inputs), f"Predictions of {name!r}", options.task, options.layout
    if layout is not None or options.n_labels > 1:
        values, n_dimensions = as_tensor(output, where), layout.n_dimensions if layout is not None else 0
        if task == "regression" or values.ndim != 2 + n_dimensions:
            what = "positions" if layout is not None else "several labels"
            raise ValueError(f"{name!r}: with {what}, expected probabilities as the network's outputs are.")
        rows = options.rows_of(values, of_labels=task == "binary")
        return BatchPrediction(torch.cat([1 - rows, rows], dim=-1) if task == "binary" else rows)
    if task == "regression" and isinstance(output, tuple | list) and len(output) == 2:
        mean, deviation = (as_tensor(part, where) for part in output)
        if len(mean) == len(deviation) == n:
            return BatchPrediction(mean=mean, standard_deviation=deviation)
        raise ValueError(f"{name!r}: expected {n} means and standard deviations; got {len(mean)} and {len(deviation)}.")
    values = as_tensor(output, where)
    sampled = values.ndim == 3 or (task == "regression" and values.ndim == 2)
    if sampled and values.shape[1] == n and options.likelihood_of(None) == "poisson":
        return BatchPrediction(draws=values.movedim(0, 1))
    if sampled and values.shape[1] == n:
        return _reduce_samples(name, values, task)
    if not sampled and task != "regression" and values.ndim > 0 and len(values) == n:
        return BatchPrediction(values)
    form = "(mean, standard deviation)" if task == "regression" else "probabilities (n, C)"
    raise ValueError(
        f"{name!r}: expected {form} or samples (S, n, ...) for n = {n} inputs; got shape {tuple(values.shape)}."
    )


def _reduce_samples(name: str, samples: Shaped[Tensor, "S n ..."], task: Task) -> BatchPrediction:
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


def _device_of(method: Method) -> torch.device | None:
    model = network_of(method)
    tensors = () if model is None else (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else None
