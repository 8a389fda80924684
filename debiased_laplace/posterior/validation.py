"""Predictions on validation data under one prior after another, and their scores."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.likelihood import by_output
from debiased_laplace.curvature.likelihoods import in_columns
from debiased_laplace.curvature.memory import CHUNK_BYTES, available_memory
from debiased_laplace.curvature.positions import PositionWise
from debiased_laplace.data.batches import Batch, as_unweighted_batch
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.sharing import digest, identified, loader_of_all
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.shifted import ProjectedRows, Shifted
from debiased_laplace.predictive.mean_field import averaged_loss
from debiased_laplace.predictive.predictive import probabilities_of
from debiased_laplace.processes import ALONE, Processes

Posterior = Any
"""A fitted `DebiasedParametricLaplace`, whose module imports this one."""

Prediction = Tensor | tuple[Tensor, Tensor]
"""Class probabilities (n, C); or means (n, C) and function variances, (n, C) or (n, C, C)."""

Predicted = tuple[Prediction, Tensor]
"""Predictions of a batch, and its targets."""

_MANY_OUTPUTS = 100  # above, no more Jacobians are held than one chunk
_PATIENCE = 5.0  # seconds without a progress bar, where none was asked for
_SEED = 0  # of every pass, so that two priors differ by their predictions and not by their draws


@dataclass(frozen=True)
class Scoring:
    """Predictive and loss by which priors are scored.

    Attributes:
        pred_type: "glm" or "nn".
        link_approx: of "glm"; "nn" has only "mc".
        n_samples: draws of "mc".
        loss: the user's own; None for the negative log-likelihood.

    Raises:
        ValueError: if the loss cannot be called.
    """

    pred_type: str
    link_approx: str
    n_samples: int
    loss: Callable[..., Any] | None

    def __post_init__(self) -> None:
        if self.loss is not None and not callable(self.loss):
            raise ValueError(
                "loss must be a torchmetrics metric, or a function of (predictions, targets) or of (means, variances, "
                f"targets); got {self.loss!r}."
            )

    @property
    def link(self) -> str:
        """Link of the predictive."""
        return "mc" if self.pred_type == "nn" else self.link_approx

    @property
    def name(self) -> str:
        """Name of the loss."""
        if self.loss is None:
            return "negative log-likelihood"
        return str(getattr(self.loss, "__name__", type(self.loss).__name__))


@dataclass(frozen=True, eq=False)
class Spreads:
    """Function variances of Jacobians under one scalar prior after another.

    Attributes:
        posterior: whose prior and noise are the present ones.
        shifted: decomposition of its precision without the prior; None where every prior needs its own.
        likelihood_weight: of the decomposition.
    """

    posterior: Posterior
    shifted: Shifted | None
    likelihood_weight: float

    @classmethod
    def of(cls, la: Posterior, *, n_rows: int, n_priors: int) -> "Spreads":
        """Return them for as many rows and priors."""
        curvature, weight = la.fit_result.estimate.curvature, _likelihood_weight(la)
        shifted = None
        # the correction of the inverse depends on the prior
        if n_priors and curvature.error_variances is None:
            diagonal, weights = curvature.diagonal_and_weights(weight, curvature.weights.new_zeros(()))
            shifted = Shifted.of(diagonal, curvature.factor, weights, curvature.basis, n_rows=n_rows, n_shifts=n_priors)
        return cls(la, shifted, weight)

    @property
    def element_size(self) -> int:
        """Bytes of a held number."""
        kept = self.posterior.mean_subnet if self.shifted is None else self.shifted.values
        return int(kept.element_size())

    def held(self, J: Float[Tensor, "n C P"]) -> Tensor | ProjectedRows:
        """Return what is kept of Jacobians for all priors."""
        return J if self.shifted is None else self.shifted.project(J)

    def of_outputs(self, held: Tensor | ProjectedRows, *, alone: bool) -> Tensor:
        """Return covariances (n, C, C) of the function under the present prior, or variances (n, C)."""
        if self.shifted is None or isinstance(held, Tensor):
            precision = self.posterior.posterior_precision
            spread: Tensor = precision.variances(held) if alone else precision.variance(held)
            return spread
        # with another noise A is r A
        r = _likelihood_weight(self.posterior) / self.likelihood_weight
        spread_of = self.shifted.variances if alone else self.shifted.variance
        return spread_of(held, float(self.posterior.prior_precision) / r) / r


def _likelihood_weight(la: Posterior) -> float:
    return float(la.n_data * torch.as_tensor(la._H_factor).detach())


@dataclass(frozen=True, eq=False)
class ValidationBatch:
    """Validation batch with everything that does not depend on the prior.

    Attributes:
        batch: as loaded.
        outputs: of the plain network.
        rows: of the Jacobians, in chunks of samples; None where they are computed anew for every prior, or by another
            process.
        spreads: of these rows.
        number: of the batch.
    """

    batch: Batch
    outputs: Float[Tensor, "n C"]
    rows: tuple[Tensor | ProjectedRows, ...] | None
    spreads: Spreads
    number: int = 0


def read_validation(
    la: Posterior, loader: Iterable[Any], scoring: Scoring, *, n_priors: int = 0, progress_bar: bool | None = False
) -> list[ValidationBatch]:
    """Load validation data once, and compute everything that does not depend on the prior.

    Jacobians are kept as long as they fit into the available memory, batch by batch, and the outputs are not
    too many: in the coordinates of one decomposition for all scalar priors, where that pays.

    Args:
        la: a fitted posterior.
        loader: validation data; one pass is enough.
        scoring: predictive and loss.
        n_priors: number of scalar priors to come; 0: the present prior only, of any structure.
        progress_bar: show progress; None: after some seconds.

    Returns:
        The batches that have samples.

    Raises:
        ValueError: if there are none, or they, the predictive or (with the default loss) the targets cannot be used.
    """
    processes = la._processes
    loader = loader_of_all(loader, processes, la.fit_result.options.seed)
    with undisturbed_randomness(la.fit_result.options.seed):
        batches = [as_unweighted_batch(loaded, MappingKeys(la.dict_key_x, la.dict_key_y)) for loaded in loader]
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        raise ValueError("val_loader yields no batches with samples; expected validation data.")
    if processes.several:
        known = digest([identified(batch) for batch in batches])
        processes.check_same(val_loader=known, prior=la.prior_precision.tolist())
    for batch in batches:
        batch.check_finite()
    # one public call, which checks options and inputs
    _predict_anew(la, batches[0].first(1), scoring, _generator(la))
    has_positions = la.fit_result.layout is not None
    if scoring.loss is None and not has_positions:
        for batch in batches:
            _check_targets(la, batch)
    left = 0
    # with positions, covariances are of each position alone
    if scoring.pred_type == "glm" and not has_positions and not la.is_sharded:
        left = CHUNK_BYTES if la.n_outputs > _MANY_OUTPUTS else available_memory(la.mean_subnet.device, la.memory)
    n_rows = la.n_outputs * sum(len(batch) for batch in batches)
    spreads = Spreads.of(la, n_rows=n_rows, n_priors=n_priors if left else 0)
    kept: dict[int, tuple[Tensor | ProjectedRows, ...]] = {}

    def outputs_of(number: int) -> Tensor:
        nonlocal left
        batch = batches[number]
        n_bytes = len(batch) * la.n_outputs * la.selection.n_parameters * spreads.element_size
        if n_bytes > left:
            outputs: Tensor = la.backend.outputs(batch.inputs)
            if scoring.loss is None and has_positions:
                _check_targets(la, batch, outputs)
            return outputs
        jacobians, parts = zip(*la.backend.chunks(batch.inputs), strict=True)
        kept[number] = tuple(spreads.held(J) for J in jacobians)
        left -= n_bytes
        return torch.cat(parts)

    numbers = progress(range(len(batches)), progress_bar, "[Validation data]")
    every = _sharing(la).shared_out(numbers, outputs_of, la.mean_subnet.device)
    return [
        ValidationBatch(batch, outputs, kept.get(number), spreads, number)
        for number, (batch, outputs) in enumerate(zip(batches, every, strict=True))
    ]


def _sharing(la: Posterior) -> Processes:
    """Return the processes of which each predicts some batches; where each holds some directions, all do together."""
    return ALONE if la.is_sharded else la._processes


def progress(items: Sequence[Any], shown: bool | None, description: str) -> tqdm:
    """Return the items with a progress bar: shown, hidden, or (None) shown after some seconds."""
    return tqdm(items, disable=shown is False, delay=_PATIENCE if shown is None else 0, desc=description)


def predictions(la: Posterior, data: Sequence[ValidationBatch], scoring: Scoring) -> Iterator[Predicted]:
    """Yield predictions under the present prior by batch, with the same draws at every call."""

    def predicted(held: ValidationBatch) -> Prediction:
        # the same networks for every batch
        generator = _generator(la, 0 if scoring.pred_type == "nn" else held.number)
        if held.rows is None:
            return _predict_anew(la, held.batch, scoring, generator)
        return _predict(la, held.outputs, held.rows, held.spreads, scoring, generator)

    device = la.mean_subnet.device
    for held, out in zip(data, _sharing(la).shared_out(data, predicted, device), strict=True):
        yield out, in_columns(held.batch.targets, la.n_outputs).to(device)


def plain_predictions(la: Posterior, data: Sequence[ValidationBatch]) -> Iterator[Predicted]:
    """Yield the predictions of the network without a posterior (MAP): no function variance, only noise."""
    for held in data:
        f = held.outputs
        kind = la._likelihood
        out = kind.probabilities(f) if kind.gives_probabilities else (f, torch.zeros_like(f))
        yield out, in_columns(held.batch.targets, la.n_outputs).to(f.device)


def negative_log_likelihoods(la: Posterior, pairs: Iterable[Predicted]) -> Float[Tensor, " n"]:
    """Return each sample's negative log-likelihood in nats; in regression per output, with observation noise.

    A probability that underflows counts as the smallest normal number of its type.
    """
    kind = la._likelihood
    if not isinstance(kind, PositionWise):
        return torch.cat([_losses(la, out, y) for out, y in pairs])
    parts = []
    for out, y in pairs:
        rows, own, factors = _of_positions(kind, out, y)
        losses = _losses(la, rows, own)
        parts.append((losses.view(factors.shape) * factors.to(losses)).sum(1))
    return torch.cat(parts)


def _of_positions(kind: PositionWise, out: Prediction, y: Tensor) -> tuple[Prediction, Tensor, Float[Tensor, "n T"]]:
    """Return predictions and targets with a row for each position, and the factors of the positions."""
    by_position = tuple(kind.by_position_of(values) for values in (out if isinstance(out, tuple) else (out,)))
    n, T = by_position[0].shape[:2]
    like = by_position[0].new_empty(n, T * kind.layout.n_classes)
    rows = tuple(values.flatten(0, 1) for values in by_position)
    own = in_columns(kind.counted_targets(like, y).flatten(0, 1), kind.layout.n_classes)
    found: Prediction = (rows[0], rows[1]) if isinstance(out, tuple) else rows[0]
    return found, own, kind.factors(like, y)


def _losses(la: Posterior, out: Prediction, y: Tensor) -> Float[Tensor, " n"]:
    """Return the negative log-likelihood of each target."""
    if isinstance(out, tuple) and la.likelihood == "regression":
        return _gaussian(*out, y, la.sigma_noise.detach())
    if isinstance(out, tuple):
        return averaged_loss(la._spec.likelihood, *out, y)
    exact = accumulation_dtype(out)
    log_p = out.clamp_min(torch.finfo(out.dtype).tiny).to(exact).log()
    if la.likelihood == "binary":
        # 1 - p of a label that is all but certain is its rounding
        log_q = (1 - out).clamp_min(torch.finfo(out.dtype).eps).to(exact).log()
        labels = by_output(y, log_p)
        return -(labels * log_p + (1 - labels) * log_q).sum(-1)
    if y.is_floating_point():
        return -(y.to(exact) * log_p).sum(-1)
    return -log_p.gather(1, y.long()[:, None])[:, 0]


def best_scale(la: Posterior, pairs: Sequence[Predicted]) -> float:
    """Return the factor on noise and function deviation together that gives the highest Gaussian likelihood.

    Raises:
        ValueError: if the residuals are all zero, or not finite.
    """
    parts, kind = [], la._likelihood
    for out, y in pairs:
        if isinstance(kind, PositionWise):
            out, y, _ = _of_positions(kind, out, y)
        assert isinstance(out, tuple)  # of a regression; for the type checker
        mean, total = _mean_and_variance(*out, la.sigma_noise.detach())
        parts.append((y.to(mean.dtype) - mean).square() / total)
    scale = float(torch.cat(parts).mean().sqrt())
    if not 0 < scale < math.inf:
        raise ValueError(f"Expected residuals of the validation data to tune sigma_noise; their size is {scale}.")
    return scale


def score(la: Posterior, data: Sequence[ValidationBatch], scoring: Scoring) -> tuple[float, Float[Tensor, " n"] | None]:
    """Return the loss under the present prior; a metric is reset first.

    Returns:
        The loss, and the loss of each sample where it is their mean.

    Raises:
        ValueError: if the user's loss is not a single number.
    """
    pairs = predictions(la, data, scoring)
    if scoring.loss is None:
        nlls = negative_log_likelihoods(la, pairs)
        return float(nlls.mean()), nlls
    if isinstance(scoring.loss, torchmetrics.Metric):
        metric = copy.deepcopy(scoring.loss).to(la.mean_subnet.device)
        metric.reset()
        for out, targets in pairs:
            _update(metric, out, targets)
        # a metric may give one number for each output, as laplace-torch takes it
        return float(metric.compute().sum()), None
    found = scoring.loss(*_joined(list(pairs)))
    try:
        return float(found), None
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"loss must return one number; {scoring.name} returned {found!r}.") from error


def fit_the_likelihood(la: Posterior, data: Sequence[ValidationBatch]) -> bool:
    """Return whether the targets fit the likelihood; those of a user's own loss need not."""
    try:
        for held in data:
            _check_targets(la, held.batch, held.outputs)
    except ValueError:
        return False
    return True


def _check_targets(la: Posterior, batch: Batch, outputs: Tensor | None = None) -> None:
    """Refuse targets that do not fit the likelihood; with positions, of which there may be any number, the outputs."""
    if outputs is None:
        outputs = la.mean_subnet.new_zeros(len(batch), la.n_outputs)
    la._likelihood.check(outputs.to(batch.targets.device), batch.targets)


def _generator(la: Posterior, number: int = 0) -> torch.Generator:
    return torch.Generator(device=la.mean_subnet.device).manual_seed(_SEED + number)


def _predict_anew(la: Posterior, batch: Batch, scoring: Scoring, generator: torch.Generator) -> Prediction:
    out = la(
        batch.inputs,
        pred_type=scoring.pred_type,
        link_approx=scoring.link,
        n_samples=scoring.n_samples,
        diagonal_output=_outputs_alone(la, scoring),
        generator=generator,
        # a reward model is validated on pairs, as it was fitted
        fitting=la.likelihood == "reward_modeling",
    )
    return (out[0].detach(), out[1].detach()) if isinstance(out, tuple) else out.detach()


def _predict(
    la: Posterior,
    mean: Tensor,
    rows: Sequence[Tensor | ProjectedRows],
    spreads: Spreads,
    scoring: Scoring,
    generator: torch.Generator,
) -> Prediction:
    kind = la._spec.likelihood
    alone = _outputs_alone(la, scoring) or (kind.gives_probabilities and scoring.link == "probit")
    spread = torch.cat([spreads.of_outputs(held, alone=alone) for held in rows])
    if not kind.gives_probabilities:
        return mean, spread.to(mean.dtype)
    if scoring.link == "mc":
        # the draws of the posterior itself
        spread = spread.to(mean.dtype)
    p = probabilities_of(kind, mean.to(spread.dtype), spread, scoring.link, scoring.n_samples, generator)
    return p.to(mean.dtype)


def _outputs_alone(la: Posterior, scoring: Scoring) -> bool:
    """Return whether variances are enough: the default loss of regression, and labels, use no covariances."""
    return (la.likelihood == "regression" and scoring.loss is None) or la.likelihood == "binary"


def _gaussian(mean: Tensor, variance: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    """Return Gaussian losses under function variance plus observation noise, averaged over outputs."""
    mean, total = _mean_and_variance(mean, variance, sigma)
    squared = (y.to(mean.dtype) - mean).square()
    return 0.5 * (total.log() + squared / total + math.log(2 * math.pi)).mean(-1)


def _mean_and_variance(mean: Tensor, variance: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return means (n, C), and variances with the noise, in the precision in which they are summed."""
    exact = accumulation_dtype(mean)
    of_outputs = variance if variance.ndim == 2 else variance.diagonal(dim1=-2, dim2=-1)
    return mean.to(exact), of_outputs.to(exact) + sigma.to(exact).square()


def _update(metric: torchmetrics.Metric, out: Prediction, y: Tensor) -> None:
    """Update a metric; those of regression take (mean, variance, target), or only (mean, target)."""
    if not isinstance(out, tuple):
        metric.update(out, y)
        return
    try:
        metric.update(*out, y)
    except TypeError:
        metric.update(out[0], y)


def _joined(pairs: Sequence[Predicted]) -> tuple[Tensor, ...]:
    """Return all batches as one: (predictions, targets), or (means, variances, targets)."""
    parts = [(*out, y) if isinstance(out, tuple) else (out, y) for out, y in pairs]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
