"""Predictions of several methods in one pass over a loader, with the same inputs and the same random numbers."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Shaped
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace.calibration.contents import Task
from debiased_laplace.calibration.distributions import Gaussian
from debiased_laplace.calibration.inputs import as_tensor, check_whole_number
from debiased_laplace.calibration.probabilities import PosteriorPredictive, read_probabilities, uncertainty_scores
from debiased_laplace.checks import name_of, one_of, shown
from debiased_laplace.curvature.as_found import modules_reached
from debiased_laplace.curvature.classification import LOGITS_NEEDED, are_probabilities
from debiased_laplace.curvature.contexts import keeping_buffers
from debiased_laplace.curvature.parameters import call_with, logits_of
from debiased_laplace.curvature.positions import OutputLayout, that_count
from debiased_laplace.data.batches import Batch, as_unweighted_batch
from debiased_laplace.data.inputs import DEFAULT_KEYS, Inputs, MappingKeys, n_samples_of, on_each
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace
from debiased_laplace.posterior.laplace_torch import preserve_state
from debiased_laplace.predictive.mean_field import GaussianLogits
from debiased_laplace.predictive.predictive import Link

Method = Any
"""A Laplace posterior (`BaseLaplace`), a network (`nn.Module`), or a callable from inputs to predictions."""
PredictionType = Literal["glm", "nn"]
MAP = "map"
MOST_JOINT_OUTPUTS = 32  # covariances (n, d, d) between more outputs would outgrow everything else


@dataclass(frozen=True)
class PredictionOptions:
    """Options of the predictions, as of `evaluate`; a link of None becomes its default.

    `two_outputs` says of a network whether it gives means and log variances of the targets, `layout` which positions
    outputs have: each of them is a row of the predictions.
    """

    task: Task
    pred_type: PredictionType = "glm"
    link: Link | None = None
    n_samples: int = 100
    seed: int = 0
    keys: MappingKeys = DEFAULT_KEYS
    progress_bar: bool = False
    two_outputs: Callable[[nn.Module], bool] = lambda _: False
    layout: OutputLayout | None = None

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


def read_methods(methods: Any, baseline: str | None, include_map: bool | None) -> dict[str, Method]:
    """Return methods by name in the caller's order, after the network of the first posterior if MAP is to be added.

    With `include_map` None it is added where no network is given, and no baseline but MAP.
    """
    if isinstance(methods, BaseLaplace):
        methods = {"laplace": methods}
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"posteriors must map at least one name to a method; got {methods!r:.60}.")
    wrong = {
        name: type(m).__name__ for name, m in methods.items() if not isinstance(m, BaseLaplace) and not callable(m)
    }
    if wrong:
        raise ValueError(
            f"Expected Laplace posteriors, networks, or callables from inputs to predictions; got {wrong}."
        )
    given = any(isinstance(m, nn.Module) or str(name).lower() == MAP for name, m in methods.items())
    by_default = baseline is None or (isinstance(baseline, str) and baseline == MAP)
    wanted = not given and by_default if include_map is None else include_map
    networks = [net for m in methods.values() if isinstance(m, BaseLaplace) and (net := network_of(m)) is not None]
    if wanted and networks and MAP not in methods:
        return {MAP: networks[0], **methods}
    if include_map:
        why = f"{MAP!r} is there already" if MAP in methods else "none of the posteriors has a network"
        raise ValueError(f"include_map=True adds the network of the first Laplace posterior as {MAP!r}; {why}.")
    return dict(methods)


def in_training_mode(methods: Mapping[str, Method]) -> list[str]:
    """Return a warning for each callable that has predicted with a network in training mode."""
    # Monte-Carlo dropout sets its dropout layers to training mode, not the network
    return [
        f"{name!r} evaluates a {type(module).__name__} in training mode, as it seems: dropout is random then, and "
        "batch normalization takes the statistics of each batch. Expected evaluation mode: call .eval() before; for "
        "Monte-Carlo dropout, set only the dropout layers to training mode."
        for name, method in methods.items()
        if not isinstance(method, BaseLaplace | nn.Module)
        for module in [m for m in modules_reached(method, skip=BaseLaplace) if m.training][:1]
    ]


def check_loader(loader: Any, name: str) -> None:
    """Check that batches can be read.

    Raises:
        ValueError: if it is no iterable of batches.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes | Mapping | Tensor | np.ndarray):
        raise ValueError(f"{name} must be an iterable of batches, such as a DataLoader; got {shown(loader)}.")


_TASKS: dict[str, Task] = {
    "classification": "multiclass",
    "binary": "binary",
    "regression": "regression",
    "heteroscedastic": "regression",
}
"""Task of each likelihood; classifications of two classes may be "binary" too."""


def infer_task(posteriors: Mapping[str, BaseLaplace]) -> Task:
    """Return the task of the first Laplace posterior.

    Raises:
        ValueError: if there is none.
    """
    for posterior in posteriors.values():
        return _TASKS.get(name_of(posterior.likelihood), "multiclass")
    raise ValueError(f"Expected task as one of {list(get_args(Task))}, since there is no Laplace posterior; got None.")


def network_of(method: Method) -> nn.Module | None:
    """Return the network of a method; None for callables, and for posteriors that have none."""
    model = getattr(method, "model", None) if isinstance(method, BaseLaplace) else method
    return model if isinstance(model, nn.Module) else None


def collect(
    methods: Mapping[str, Method],
    loader: Iterable[Any],
    options: PredictionOptions,
    title: str,
    *,
    labelled: bool = True,
) -> tuple[dict[str, BatchPrediction], Tensor | None, Tensor | None]:
    """Predict with every method, batch by batch, in one pass.

    The global generators are seeded for the pass, and anew for each method and batch, so that what one method draws
    changes neither the loader's augmentation nor another method's draws; afterwards they are as they were.

    Returns:
        Predictions by method, and the targets if `labelled`, on the CPU. Else batches may be inputs alone. With
        positions, those that count are the rows of both, and the numbers of their samples come third.
    """
    for name, method in methods.items():
        if isinstance(method, BaseLaplace):
            _check_posterior(name, method, options.task)
    kept: dict[str, list[BatchPrediction]] = {name: [] for name in methods}
    targets, owners, n_before = [], [], 0
    with torch.inference_mode(False), undisturbed_randomness(options.seed):
        for loaded in tqdm(loader, desc=f"[Predicting {title}]", disable=not options.progress_bar):
            batch = _read_batch(loaded, options.keys, labelled=labelled)
            if len(batch) == 0:
                continue
            batch.check_finite()
            y = batch.targets.detach().to("cpu", copy=True)
            counts: Tensor | None = None
            if options.layout is not None and labelled:
                samples = torch.arange(n_before, n_before + len(batch))
                y, samples, counts = _targets_of_positions(y, samples, options.layout)
                owners.append(samples)
            n_before += len(batch)
            # one label for each sample may be a column
            targets.append(y.reshape(-1) if options.task == "binary" and y.shape[1:] == (1,) else y)
            for name, method in methods.items():
                with undisturbed_randomness(options.seed):
                    found = predict_batch(name, method, batch.inputs, options)
                kept[name].append(found if counts is None else found.at(counts, name))
    if not targets:
        raise ValueError(f"The loader yields no samples to predict; got {type(loader).__name__}.")
    # each method's batches are released before the next one's are joined
    joined = {name: _join_batches(name, kept.pop(name)) for name in methods}
    return joined, torch.cat(targets) if labelled else None, torch.cat(owners) if owners else None


def _targets_of_positions(y: Tensor, samples: Tensor, layout: OutputLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets and samples of the positions that count, and which ones these are."""
    n_last = y.ndim - 1 - layout.n_dimensions
    if n_last < 0:
        raise ValueError(f"Expected a target for each position of the outputs; got shape {tuple(y.shape)}.")
    rows = layout.rows_of(y, n_last)
    counts = that_count(rows, n_lead=1)
    owners = samples.repeat_interleave(len(rows) // max(1, len(samples)))
    return rows[counts], owners[counts], counts


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


def as_prediction(
    name: str, predicted: BatchPrediction, sigma_noise: Any
) -> Tensor | PosteriorPredictive | Gaussian | tuple[Tensor, Tensor]:
    """Return predictions in a form that `calibration_report` reads; observation noise is added here only."""
    if predicted.probabilities is not None:
        if predicted.mutual_information is None:
            return predicted.probabilities
        return PosteriorPredictive(predicted.probabilities, predicted.mutual_information, predicted.logit_variance)
    mean, variance = predicted.mean, predicted.function_variance
    assert mean is not None  # for the type checker
    if predicted.standard_deviation is not None:
        return mean, predicted.standard_deviation
    if sigma_noise is None:
        raise ValueError(f"{name!r} has no observation noise; pass sigma_noise, its standard deviation.")
    if variance is not None and variance.ndim == 3:
        return Gaussian(mean, covariance=variance, observation_noise=sigma_noise)
    # rounding leaves tiny negative variances where the function is certain
    deviation = torch.zeros_like(mean) if variance is None else variance.clamp_min(0).sqrt()
    return Gaussian(mean, standard_deviation=deviation, observation_noise=sigma_noise)


def _check_posterior(name: str, la: BaseLaplace, task: Task) -> None:
    likelihood = name_of(la.likelihood)
    if likelihood == "reward_modeling":
        how = "give a callable that returns the probabilities of the preferences, la(pairs, fitting=True)"
        raise ValueError(f"{name!r} is a reward model, whose rewards have no targets to compare with: {how}.")
    if likelihood not in _TASKS:
        raise ValueError(
            f"{name!r} has the likelihood {likelihood!r}; reports are of {sorted(_TASKS)}. Its targets have "
            "la.predict(x)."
        )
    if (_TASKS[likelihood] == "regression") != (task == "regression") or (likelihood, task) == ("binary", "multiclass"):
        raise ValueError(f"{name!r} has the likelihood {likelihood!r}; got task={task!r}.")
    layout = la.fit_result.layout if isinstance(la, DebiasedParametricLaplace) else None
    n_labels = la.n_outputs if layout is None else layout.n_classes
    if likelihood == "binary" and n_labels > 1:
        raise ValueError(
            f"{name!r} has {n_labels} labels; a report is of one. Expected calibration_report of la(x)[:, c] and "
            "the targets of label c, task='binary', for each of them."
        )
    # laplace-torch's diagonal and full posteriors predict from the prior alone before they are fitted
    if not getattr(la, "n_data", True):
        raise NotFittedError(f"{name!r} is not fitted; call fit() first.")
    if isinstance(la, DebiasedParametricLaplace):
        # it would predict with the weights that were fitted, and MAP beside it with the present ones
        la._check_weights()


def _read_batch(loaded: Any, keys: MappingKeys, *, labelled: bool) -> Batch:
    """Return a loader's item as a batch; targets that are not asked for are zeros."""
    if labelled:
        return as_unweighted_batch(loaded, keys)
    inputs = loaded[0] if isinstance(loaded, tuple | list) and len(loaded) in (1, 2, 3) else loaded
    if isinstance(inputs, Mapping):
        inputs = keys.inputs(inputs)
    elif not isinstance(inputs, Tensor) or inputs.ndim == 0:
        raise ValueError(f"Expected inputs as tensors or mappings of tensors; got {type(loaded).__name__}.")
    return Batch(inputs, torch.zeros(n_samples_of(inputs)))


def _predict_with_posterior(name: str, la: BaseLaplace, inputs: Inputs, options: PredictionOptions) -> BatchPrediction:
    """Predict probabilities, with mutual information where the link knows it, or moments of the function."""
    is_regression, likelihood = options.task == "regression", name_of(la.likelihood)
    is_label, layout = likelihood == "binary", options.layout

    def rows(values: Tensor, n_lead: int = 0) -> Tensor:
        return values if layout is None else layout.rows_of(values, n_lead=n_lead)

    x = inputs if isinstance(inputs, Tensor) else _MovableMapping(inputs)
    ours = isinstance(la, DebiasedParametricLaplace)
    with preserve_state(network_of(la), plain=ours), torch.enable_grad():
        # laplace-torch fits a network that ends in a softmax, and takes the softmax of its outputs once more
        if not ours and not is_regression and (model := network_of(la)) is not None:
            _check_logits(name, _outputs_of(name, model, inputs))
        of_draws = options.pred_type == "nn" and likelihood != "heteroscedastic"
        if of_draws or (options.link == "mc" and not is_regression):
            generator = torch.Generator(_device_of(la) or "cpu").manual_seed(options.seed)
            samples = la.predictive_samples(x, options.pred_type, options.n_samples, generator=generator).detach()
            samples = rows(samples, 1)
            return _reduce_samples(name, _of_both(samples) if is_label else samples, options.task)
        if likelihood == "heteroscedastic":
            prediction = la.predict(x, options.pred_type, n_samples=options.n_samples)
            return BatchPrediction(mean=rows(prediction.mean), standard_deviation=rows(prediction.std))
        if is_regression:
            alone = {} if layout is None else {"diagonal_output": True}
            mean, variance = la(x, pred_type=options.pred_type, **alone)
            return BatchPrediction(mean=rows(mean), function_variance=rows(variance))
        if layout is not None or options.link != "mean_field":
            found = rows(la(x, pred_type=options.pred_type, link_approx=options.link))
            return BatchPrediction(_of_both(found) if is_label else found)
        if isinstance(la, DebiasedParametricLaplace):
            logits = la.gaussian_logits(x)
        else:
            logits = GaussianLogits.of_covariance(*la._glm_predictive_distribution(x))
        return BatchPrediction(*logits.probabilities_and_information(), logits.total_variance)


def _of_both(p: Shaped[Tensor, "*n 1"]) -> Shaped[Tensor, "*n 2"]:
    """Return the probabilities of 0 and 1 from those of 1."""
    return torch.cat([1 - p, p], dim=-1)


def _predict_with_network(name: str, model: nn.Module, inputs: Inputs, options: PredictionOptions) -> BatchPrediction:
    """Predict the softmax of the logits of a network (MAP), or its outputs as means."""
    with preserve_state(model):
        outputs, n = _outputs_of(name, model, inputs), n_samples_of(inputs)
    if outputs.ndim == 0 or len(outputs) != n:
        raise ValueError(f"{name!r}: expected a tensor of outputs for {n} inputs; got shape {tuple(outputs.shape)}.")
    if options.layout is not None:
        outputs = options.layout.rows_of(outputs)
    if options.task == "regression" and options.two_outputs(model):
        mean, log_variance = outputs.chunk(2, dim=-1)
        return BatchPrediction(mean=mean, standard_deviation=(log_variance / 2).exp())
    if options.task == "regression":
        return BatchPrediction(mean=outputs)
    if options.task == "binary" and (outputs.ndim == 1 or outputs.shape[1:] == (1,)):
        z = outputs.reshape(-1)
        outputs = torch.stack([torch.zeros_like(z), z], dim=1)
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
    """Predict probabilities (n, C), samples (S, n, C), in regression (mean, standard deviation) or function samples."""
    with keeping_buffers(modules_reached(function)):
        output = function(inputs)
    n, where, task, layout = n_samples_of(inputs), f"Predictions of {name!r}", options.task, options.layout
    if layout is not None:
        values = as_tensor(output, where)
        if task == "regression" or values.ndim != 2 + layout.n_dimensions:
            raise ValueError(f"{name!r}: with positions, expected probabilities as the network's outputs are.")
        return BatchPrediction(layout.rows_of(values))
    if task == "regression" and isinstance(output, tuple | list) and len(output) == 2:
        mean, deviation = (as_tensor(part, where) for part in output)
        if len(mean) == len(deviation) == n:
            return BatchPrediction(mean=mean, standard_deviation=deviation)
        raise ValueError(f"{name!r}: expected {n} means and standard deviations; got {len(mean)} and {len(deviation)}.")
    values = as_tensor(output, where)
    sampled = values.ndim == 3 or (task == "regression" and values.ndim == 2)
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


def _join_batches(name: str, batches: Sequence[BatchPrediction]) -> BatchPrediction:
    """Concatenate the predictions of one method for several batches, which must be of the same form."""
    forms = {tuple(batch.tensors()) for batch in batches}
    if len(forms) > 1:
        shown = " and ".join(sorted(", ".join(form) for form in forms))
        raise ValueError(f"{name!r}: expected predictions of the same form for every batch; got {shown}.")
    joined: dict[str, Any] = {key: torch.cat([getattr(batch, key) for batch in batches]) for key in next(iter(forms))}
    return BatchPrediction(
        **joined,
        n_samples=min((b.n_samples for b in batches if b.n_samples is not None), default=None),
        seconds=sum(b.seconds for b in batches),
        peak_bytes=max((b.peak_bytes for b in batches if b.peak_bytes is not None), default=None),
    )


class _MovableMapping(dict[str, Tensor]):
    """A mapping of tensors with the one method that laplace-torch asks of it."""

    def to(self, device: torch.device) -> "_MovableMapping":
        """Move the mapping to a device."""
        return _MovableMapping({key: value.to(device) for key, value in self.items()})


def _device_of(method: Method) -> torch.device | None:
    model = network_of(method)
    tensors = () if model is None else (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else None
