"""Tuning the prior precision: gradient ascent on the marginal likelihood, or a grid search on validation data."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchmetrics
from laplace.utils.metrics import RunningNLLMetric
from laplace.utils.utils import fix_prior_prec_structure
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.contexts import differentiable_kernels, evaluating
from debiased_laplace.curvature.memory import CHUNK_BYTES, free_memory
from debiased_laplace.data.batches import Batch, as_batch
from debiased_laplace.data.inputs import moved
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.posterior.hyperparameters import one_of, positive
from debiased_laplace.posterior.predictions import PredictiveInterface

Structure = Literal["scalar", "layerwise", "diag"]

_MANY_OUTPUTS = 100  # above, no more Jacobians are held than one chunk


@dataclass(frozen=True)
class Ascent:
    """Adam on the log prior precision."""

    n_steps: int
    lr: float
    start: float | Tensor
    structure: str


@dataclass(frozen=True)
class Scoring:
    """What a grid point is scored by."""

    pred_type: str
    link_approx: str
    n_samples: int
    loss: Callable[..., Any] | None


def by_marginal_likelihood(la: PredictiveInterface, ascent: Ascent, *, progress_bar: bool) -> None:
    """Set the prior precision that ascent on the log marginal likelihood ends at.

    Args:
        la: a fitted posterior.
        ascent: steps, learning rate, start and structure.
        progress_bar: show progress.

    Raises:
        ValueError: if the structure is unknown, or the marginal likelihood is not finite; the prior stays as it was.
    """
    structure = ascent.structure
    one_of(structure, Structure, "prior_structure")
    if ascent.n_steps < 0:
        raise ValueError(f"n_steps must not be negative; got {ascent.n_steps}.")
    start = torch.as_tensor(positive(ascent.start, "init_prior_prec"))
    before = la.prior_precision
    try:
        la.prior_precision = start.detach()
        if la.prior_precision.numel() == 1 and structure != "scalar":
            la.prior_precision = fix_prior_prec_structure(
                la.prior_precision.item(),
                structure,
                len(la.selection.names),
                la.selection.n_parameters,
                la._device,
                la._dtype,
            )
        log_prior = la.prior_precision.detach().log().requires_grad_()
        optimizer = torch.optim.Adam([log_prior], lr=ascent.lr)
        bar = tqdm(range(ascent.n_steps), disable=not progress_bar, desc="[Tuning the prior]")
        for _ in bar:
            optimizer.zero_grad()
            with torch.enable_grad():
                objective = -la.log_marginal_likelihood(prior_precision=log_prior.exp())
            if not bool(objective.isfinite()):
                raise ValueError("The log marginal likelihood is not finite; the prior is unchanged.")
            objective.backward()
            optimizer.step()
            bar.set_postfix(log_marginal_likelihood=f"{-objective.item():.4g}")
        la.prior_precision = log_prior.detach().exp()
    except BaseException:
        la.prior_precision = before
        raise


def prior_grid(lower: float, upper: float, n_points: int, base: float) -> Tensor:
    """Prior precisions between two powers of the base.

    Raises:
        ValueError: if there is none, or they are not positive and finite.
    """
    if isinstance(n_points, bool) or not isinstance(n_points, int) or n_points < 1:
        raise ValueError(f"grid_size must be an integer of at least 1; got {n_points!r}.")
    grid = torch.logspace(lower, upper, n_points, base=base, dtype=torch.float64)
    positive(grid, "every prior_precision of the grid")
    return grid


def by_grid_search(
    la: PredictiveInterface,
    grid: Tensor,
    loader: Iterable[Any] | None,
    scoring: Scoring,
    *,
    progress_bar: bool,
) -> None:
    """Set the scalar prior precision whose predictions on validation data score best.

    Args:
        la: a fitted posterior.
        grid: prior precisions to try, increasing.
        loader: validation data.
        scoring: predictive and loss.
        progress_bar: show progress.

    Raises:
        ValueError: if there are no validation data, or no grid point scores finitely; the prior stays as it was.

    Warns:
        UserWarning: if the best point is at the edge of the grid.
    """
    if not isinstance(loader, Iterable):
        raise ValueError(f"method='gridsearch' needs val_loader, a DataLoader of validation data; got {loader!r}.")
    before = la.prior_precision
    scores: list[float] = []
    try:
        predict = _predictor(la, loader, scoring)
        bar = tqdm(grid, disable=not progress_bar, desc="[Grid search]")
        for prior in bar:
            la.prior_precision = prior
            scores.append(_score(la, predict(), scoring.loss))
            bar.set_postfix(prior_precision=f"{float(prior):.3g}", loss=f"{scores[-1]:.4g}")
        usable = [s if math.isfinite(s) else math.inf for s in scores]
        best = min(range(len(usable)), key=usable.__getitem__)
        if usable[best] == math.inf:
            raise ValueError(
                f"No prior precision between {float(grid[0]):.3g} and {float(grid[-1]):.3g} gives a finite "
                "loss on the validation data; the prior is unchanged."
            )
    except BaseException:
        la.prior_precision = before
        raise
    la.prior_precision = grid[best]
    if len(grid) > 1 and best in (0, len(grid) - 1):
        warnings.warn(
            f"The best prior precision, {float(grid[best]):.3g}, is at the edge of the grid; a wider grid "
            "may hold a better one.",
            stacklevel=3,
        )


Prediction = tuple[Tensor | tuple[Tensor, Tensor], Tensor]


def _predictor(la: PredictiveInterface, loader: Iterable[Any], scoring: Scoring) -> Callable[[], Iterable[Prediction]]:
    """Predictions on the validation data under the current prior, as often as asked.

    Jacobians do not depend on the prior: they are computed once where they fit into a quarter of the free memory and
    the outputs are not too many. Draws use the same numbers at every grid point.
    """
    with undisturbed_randomness(la.fitted_seed):
        batches = [as_batch(loaded, la._problem.keys) for loaded in loader]
    if not batches:
        raise ValueError("val_loader yields no batches.")
    for batch in batches:
        batch.check_finite()
        if scoring.loss is None:
            la.check_targets(batch)
    n = sum(len(batch) for batch in batches)
    size = n * la.n_outputs * la.selection.n_parameters * la._center.element_size()
    link = "mc" if scoring.pred_type == "nn" else scoring.link_approx
    # a reward model is validated on pairs, as it was fitted
    pairs = la.likelihood == "reward_modeling"

    def generator() -> torch.Generator:
        return torch.Generator(device=la._center.device).manual_seed(0)

    def anew() -> Iterable[Prediction]:
        for batch in batches:
            out = la(
                batch.inputs,
                pred_type=scoring.pred_type,
                link_approx=link,
                n_samples=scoring.n_samples,
                generator=generator(),
                fitting=pairs,
            )
            yield out, batch.targets.to(la._center.device)

    affordable = CHUNK_BYTES if la.n_outputs > _MANY_OUTPUTS else free_memory(la._center.device) // 4
    if scoring.pred_type != "glm" or size > affordable:
        return anew
    # one call through the front door, so that options and inputs are checked as anywhere else
    la(batches[0].first(1).inputs, pred_type="glm", link_approx=link, n_samples=scoring.n_samples, fitting=pairs)
    jacobians = _jacobians(la, batches)

    def cached() -> Iterable[Prediction]:
        for (J, mean), batch in zip(jacobians, batches, strict=True):
            out: Tensor | tuple[Tensor, Tensor]
            if la.likelihood == "regression":
                out = (mean, la.posterior_precision.variance(J))
            else:
                alone = link == "probit"
                spread = la.posterior_precision.variances(J) if alone else la.posterior_precision.variance(J)
                out = la.link(mean, spread, link, scoring.n_samples, generator())
            yield out, batch.targets.to(la._center.device)

    return cached


def _jacobians(la: PredictiveInterface, batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
    found = []
    with evaluating(la.model), differentiable_kernels(la.model):
        for batch in batches:
            inputs = moved(batch.inputs, la._center.device)
            chunks = list(la.network_for(inputs).jacobians(inputs))
            found.append((torch.cat([J for J, _ in chunks]), torch.cat([f for _, f in chunks])))
    return found


def _score(
    la: PredictiveInterface,
    predictions: Iterable[Prediction],
    loss: Callable[..., Any] | None,
) -> float:
    """The loss of predictions; a metric starts empty."""
    if loss is None:
        loss = _default_loss(la)
    if isinstance(loss, torchmetrics.Metric):
        metric = copy.deepcopy(loss).to(la._center.device)
        metric.reset()
        for out, targets in predictions:
            _update(metric, out, targets)
        return float(metric.compute().sum())
    pairs = list(predictions)
    y = torch.cat([target for _, target in pairs])
    regression = [out for out, _ in pairs if isinstance(out, tuple)]
    if regression:
        means = torch.cat([mean for mean, _ in regression])
        return float(loss(means, torch.cat([variance for _, variance in regression]), y))
    return float(loss(torch.cat([out for out, _ in pairs if isinstance(out, Tensor)]), y))


def _update(metric: torchmetrics.Metric, out: Tensor | tuple[Tensor, Tensor], y: Tensor) -> None:
    """Metrics of a regression take (mean, variance, target), or only (mean, target)."""
    if not isinstance(out, tuple):
        metric.update(out, y)
        return
    try:
        metric.update(*out, y)
    except TypeError:
        metric.update(out[0], y)


def _default_loss(la: PredictiveInterface) -> Callable[..., Any]:
    """The negative log-likelihood; laplace-torch's squared error does not depend on the prior at all."""
    return _gaussian_nll(la) if la.likelihood == "regression" else RunningNLLMetric()


def _gaussian_nll(la: PredictiveInterface) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Mean negative log-likelihood of targets under function variance plus observation noise."""

    def nll(mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        variance = covariance if covariance.ndim == 2 else covariance.diagonal(dim1=-2, dim2=-1)
        total = variance + la.sigma_noise.square()
        return 0.5 * (total.log() + (y - mean).square() / total + math.log(2 * math.pi)).mean()

    return nll
