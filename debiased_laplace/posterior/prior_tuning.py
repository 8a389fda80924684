"""Tuning of the prior precision: ascent on the marginal likelihood, or a grid search on validation data."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from laplace.utils.utils import fix_prior_prec_structure
from torch import Tensor

from debiased_laplace.checks import integer, positive
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.posterior.validation import (
    Posterior,
    Scoring,
    ValidationBatch,
    best_scale,
    fit_the_likelihood,
    negative_log_likelihoods,
    plain_predictions,
    predictions,
    progress,
    read_validation,
    score,
)

Edge = Literal["lower", "upper"]

PriorStructure = Literal["scalar", "layerwise", "diag"]

_HARM = 0.03  # nats a training sample by which a posterior may be worse than the network: some it always is
_FEWEST, _MOST, _MOST_ROWS = 16, 256, 2560  # training samples for that, and rows of Jacobians
_FLAT = 1e-6  # relative range of losses that is rounding in single precision


@dataclass(frozen=True)
class AgainstMap:
    """Negative log-likelihoods of posterior and network on the same validation samples, in nats per sample.

    In regression they are also per output.

    Attributes:
        map_loss: of the plain network; in regression with the observation noise, the best for it if that was tuned.
        laplace_loss: of the posterior predictive under the chosen prior.
        difference: the posterior's minus the network's; 0 where it is rounding.
        standard_error: of the difference, paired by sample; NaN from a single sample.
    """

    map_loss: float
    laplace_loss: float
    difference: float
    standard_error: float

    @property
    def worse(self) -> bool:
        """Whether the posterior predicts detectably worse than the plain network."""
        return self.difference > 0 and not self.doubtful

    @property
    def doubtful(self) -> bool:
        """Whether the difference is below two standard errors, or its standard error is unknown."""
        return not abs(self.difference) >= 2 * self.standard_error

    def __str__(self) -> str:
        verdict = "worse than" if self.worse else "better than"
        verdict = "not detectably different from" if self.doubtful else verdict
        return (
            f"{verdict} the plain network (MAP): negative log-likelihood {self.laplace_loss:.4g} against "
            f"{self.map_loss:.4g}, a paired difference of {self.difference:+.2g} ± {self.standard_error:.1g}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class PriorSearch:
    """Result of a grid search over the prior precision.

    Attributes:
        grid: increasing.
        losses: on the validation data; NaN or infinite where a prior could not be scored.
        standard_errors: of the losses, from their spread over samples; None for the user's own loss.
        chosen: prior precision with the lowest finite loss. As the best of many on the same data, its loss is
            optimistic.
        against_map: comparison with the plain network; None where the targets are not those of the likelihood.
        loss_name: name of the minimised loss.
        n: number of validation samples.
        sigma_noise: the observation noise that was tuned with the prior; None where it was given. The grid is then of
            the priors that were scored, each with its best noise.
    """

    grid: Float[Tensor, " g"]
    losses: Float[Tensor, " g"]
    standard_errors: Float[Tensor, " g"] | None
    chosen: float
    against_map: AgainstMap | None
    loss_name: str
    n: int
    sigma_noise: Tensor | None = None

    @property
    def map_loss(self) -> float | None:
        """Negative log-likelihood of the plain network; None where it is unknown."""
        return None if self.against_map is None else self.against_map.map_loss

    @property
    def worse_than_map(self) -> bool | None:
        """Whether the best prior predicts detectably worse than the plain network; None where that is unknown."""
        known = self.against_map is not None and not math.isnan(self.against_map.standard_error)
        return self.against_map.worse if known else None  # type: ignore[union-attr]

    @property
    def at_edge(self) -> Edge | None:
        """Edge of the grid at which the chosen prior lies; None inside, and for a grid of one."""
        if len(self.grid) == 1:
            return None
        return {0: "lower", len(self.grid) - 1: "upper"}.get(self._position)  # type: ignore[return-value]

    @property
    def flat(self) -> bool:
        """Whether the loss is the same for all priors up to rounding."""
        usable = self.losses[self.losses.isfinite()]
        spread = float(usable.max() - usable.min())
        return len(self.grid) > 1 and spread <= _FLAT * max(1.0, abs(float(usable.min())))

    @property
    def cautions(self) -> list[str]:
        """Warnings: a flat loss or an edge of the grid, and predictions worse than the plain network's."""
        found = []
        if self.flat:
            found.append(
                f"The loss ({self.loss_name}) is the same for every prior precision {self._range}, up to rounding: "
                f"{self.chosen:.3g} was not chosen by the data. Expected a loss that depends on the variance; the "
                "squared error of the mean does not."
            )
        elif self.at_edge is not None:
            way, end = {"lower": ("Lower", "min"), "upper": ("Raise", "max")}[self.at_edge]
            found.append(
                f"The best prior precision, {self.chosen:.3g}, is at the {self.at_edge} edge of the grid "
                f"{self._range}: a better one may lie beyond. {way} log_prior_prec_{end} to find out."
            )
        if self.against_map is not None and self.against_map.worse:
            found.append(
                f"Even the best prior precision, {self.chosen:.3g} {self._range}, predicts the validation data "
                f"{self.against_map} ({self.n} samples). It is set nevertheless. Try a larger "
                "log_prior_prec_max, another link_approx or (regression) another sigma_noise; otherwise keep the plain "
                "network's predictions."
            )
        return found

    def __repr__(self) -> str:
        i = self._position
        error = "" if self.standard_errors is None else f" ± {float(self.standard_errors[i]):.2g}"
        lines = [
            f"prior precision {self.chosen:.4g}, the best {self._range}, on {self.n} validation samples",
            f"  {self.loss_name} {float(self.losses[i]):.4g}{error}",
        ]
        if self.sigma_noise is not None:
            shown = ", ".join(f"{value:.4g}" for value in self.sigma_noise.reshape(-1).tolist())
            lines.append(f"  with sigma_noise {shown}, tuned with it")
        if self.against_map is None:
            lines.append("  not compared with the plain network: the targets are not those of the likelihood")
        else:
            lines.append(f"  {self.against_map}")
        if self.at_edge is not None:
            lines.append(f"  at the {self.at_edge} edge of the grid")
        failed = int((~self.losses.isfinite()).sum())
        if failed:
            lines.append(f"  {failed} of the grid's priors have no finite loss")
        return "\n".join(lines)

    @property
    def _position(self) -> int:
        return best_of(self.losses)

    @property
    def _range(self) -> str:
        return f"of {len(self.grid)} from {float(self.grid[0]):.3g} to {float(self.grid[-1]):.3g}"


def best_of(losses: Float[Tensor, " g"]) -> int:
    """Return the position of the lowest finite loss, the first among equals.

    Raises:
        ValueError: if none is finite.
    """
    if not bool(losses.isfinite().any()):
        raise ValueError(f"Expected a finite loss; all {len(losses)} are NaN or infinite.")
    return int(torch.where(losses.isfinite(), losses, torch.inf).argmin())


def against_map(laplace: Float[Tensor, " n"], plain: Float[Tensor, " n"], rounding: float) -> AgainstMap:
    """Compare negative log-likelihoods, paired by sample.

    Args:
        laplace: of the posterior predictive.
        plain: of the network.
        rounding: relative error of a prediction; smaller differences count as 0.

    Returns:
        Means, their difference and its standard error.
    """
    excess = laplace - plain
    mean, plain_mean = float(excess.mean()), float(plain.mean())
    return AgainstMap(
        map_loss=plain_mean,
        laplace_loss=float(laplace.mean()),
        difference=0.0 if abs(mean) <= rounding * max(1.0, abs(plain_mean)) else mean,
        standard_error=standard_error_of_mean(excess),
    )


def standard_error_of_mean(values: Float[Tensor, " n"]) -> float:
    """Return the standard error of the mean of some values; NaN for a single one."""
    n = len(values)
    return float(values.std(correction=1)) / n**0.5 if n > 1 else float("nan")


@dataclass(frozen=True)
class Ascent:
    """Adam on the log prior precision."""

    n_steps: int
    lr: int | float
    start: int | float | Tensor
    structure: str

    def of_parameters(self, selection: ParameterSelection) -> bool:
        """Return whether there is a prior precision for every parameter, more than one to a parameter tensor."""
        n, P = torch.as_tensor(positive(self.start, "init_prior_prec")).numel(), selection.n_parameters
        return len(selection.names) < P and (n == P or (n == 1 and self.structure == "diag"))


def maximize_marginal_likelihood(la: Posterior, ascent: Ascent, *, with_noise: bool, progress_bar: bool | None) -> None:
    """Set the prior precision by gradient ascent on the log marginal likelihood.

    Args:
        la: a fitted posterior.
        ascent: steps, learning rate, start and structure.
        with_noise: whether to tune the observation noise too, from the size of the residuals on.
        progress_bar: show progress; None: after some seconds.

    Raises:
        ValueError: if an option is out of range, or the marginal likelihood is not finite; the prior and the noise are
            then those that were tried last.
    """
    structure = ascent.structure
    if ascent.n_steps < 0:
        raise ValueError(f"n_steps must not be negative; got {ascent.n_steps}.")
    start = torch.as_tensor(positive(ascent.start, "init_prior_prec"))
    la.prior_precision = start.detach()
    if la.prior_precision.numel() == 1 and structure != "scalar":
        la.prior_precision = fix_prior_prec_structure(
            la.prior_precision.item(),
            structure,
            len(la.selection.names),
            la.selection.n_parameters,
            la.mean_subnet.device,
            la.mean_subnet.dtype,
        )
    log_prior = la.prior_precision.detach().log().requires_grad_()
    log_noise = la.residual_noise.log().requires_grad_() if with_noise else None
    optimizer = torch.optim.Adam([p for p in (log_prior, log_noise) if p is not None], lr=ascent.lr)
    bar = progress(range(ascent.n_steps), progress_bar, "[Tuning the prior]")
    for _ in bar:
        optimizer.zero_grad()
        with torch.enable_grad():
            objective = -_log_marginal_likelihood(la, log_prior, log_noise)
        if not bool(objective.isfinite()):
            raise ValueError("The log marginal likelihood is not finite; the prior is unchanged.")
        objective.backward()
        optimizer.step()
        bar.set_postfix(log_marginal_likelihood=f"{-objective.item():.4g}", refresh=False)
    la.prior_precision = log_prior.detach().exp()
    if log_noise is not None:
        la.sigma_noise = la.sigma_noise.detach() / la.noise_scale.detach() * log_noise.detach().exp()


def _log_marginal_likelihood(
    la: Posterior, log_prior: Float[Tensor, " _"], log_noise: Float[Tensor, ""] | None
) -> Float[Tensor, ""]:
    """Return what is maximised; with open noise the normalizer is tempered as the squared residuals are."""
    if log_noise is None:
        found: Tensor = la.log_marginal_likelihood(prior_precision=log_prior.exp())
        return found
    # as in laplace-torch the temperature divides the residuals alone; the best noise would shrink with it
    normalizers = (1 - 1 / la.temperature) * la.n_data * la.n_outputs * log_noise
    ratios = (la.sigma_noise / la.noise_scale).detach()
    noise = log_noise.exp() * ratios
    return la.log_marginal_likelihood(prior_precision=log_prior.exp(), sigma_noise=noise) + normalizers


def prior_grid(lower: int | float, upper: int | float, n_points: int, base: int | float) -> Float[Tensor, " g"]:
    """Return prior precisions between two powers of a base, equally spaced in the exponent.

    Args:
        lower: exponent of the smallest.
        upper: exponent of the largest.
        n_points: number of priors, at least 1; a single one is the smallest.
        base: above 1.

    Returns:
        The grid, increasing.

    Raises:
        ValueError: if there is no point, the exponents or the base are out of order, or a prior is not positive and
            finite.
    """
    n_points = integer(n_points, "grid_size")
    if n_points < 1:
        raise ValueError(f"grid_size must be an integer of at least 1; got {n_points!r}.")
    if lower > upper:
        raise ValueError(f"log_prior_prec_min must not be above log_prior_prec_max; got {lower:g} and {upper:g}.")
    if not base > 1:
        raise ValueError(f"log_prior_prec_base must be above 1; got {base}.")
    grid = torch.logspace(lower, upper, n_points, base=base, dtype=torch.float64)
    positive(grid, "every prior_precision of the grid")
    return grid


def search_grid(
    la: Posterior,
    grid: Float[Tensor, " g"],
    loader: Iterable[Any] | None,
    scoring: Scoring,
    *,
    with_noise: bool = False,
    progress_bar: bool | None,
) -> PriorSearch:
    """Set the scalar prior precision with the best predictions of validation data.

    Args:
        la: a fitted posterior.
        grid: prior precisions to try, increasing.
        loader: validation data.
        scoring: predictive and loss.
        with_noise: whether to set the observation noise too, to the best one for each prior.
        progress_bar: show progress; None: after some seconds.

    Returns:
        All losses, and the comparison of the best prior with the plain network.

    Raises:
        ValueError: if there are no validation data, or no grid point scores finitely; prior and noise are then those
            that were tried last.
    """
    if not isinstance(loader, Iterable):
        raise ValueError(f"method='gridsearch' needs val_loader, a DataLoader of validation data; got {loader!r}.")
    positive(grid.to(la.mean_subnet.dtype), f"every prior_precision of the grid, in {la.mean_subnet.dtype},")
    data = read_validation(la, loader, scoring, n_priors=len(grid), progress_bar=progress_bar)
    if with_noise:
        la.sigma_noise = la.sigma_noise * best_scale(la, list(plain_predictions(la, data)))
    plain = None
    if scoring.loss is None or fit_the_likelihood(la, data):
        plain = negative_log_likelihoods(la, plain_predictions(la, data))
    points = _score_points(la, grid, data, scoring, with_noise=with_noise, progress_bar=progress_bar)
    losses = torch.tensor([point.loss for point in points], dtype=torch.float64)
    if not bool(losses.isfinite().any()):
        raise ValueError(
            f"No prior precision between {float(grid[0]):.3g} and {float(grid[-1]):.3g} gives a finite "
            f"loss on the validation data (the first one: {float(losses[0])}); the prior is unchanged."
        )
    best = points[best_of(losses)]
    la.prior_precision, la.sigma_noise = best.prior, best.noise
    comparison = None
    if plain is not None:
        own = negative_log_likelihoods(la, predictions(la, data, scoring))
        comparison = against_map(own, plain, torch.finfo(la.mean_subnet.dtype).eps)
    errors = [point.standard_error for point in points]
    return PriorSearch(
        grid=torch.tensor([point.prior for point in points], dtype=torch.float64),
        losses=losses,
        standard_errors=torch.tensor(errors, dtype=torch.float64) if scoring.loss is None else None,
        chosen=best.prior,
        against_map=comparison,
        loss_name=scoring.name,
        n=sum(len(held.batch) for held in data),
        sigma_noise=best.noise if with_noise else None,
    )


@dataclass(frozen=True, eq=False)
class _Point:
    """Prior precision and noise with their loss, and its standard error, NaN where it is unknown."""

    prior: float
    noise: Tensor
    loss: float
    standard_error: float


def _score_points(
    la: Posterior,
    grid: Tensor,
    data: Sequence[ValidationBatch],
    scoring: Scoring,
    *,
    with_noise: bool,
    progress_bar: bool | None,
) -> list[_Point]:
    """Score every prior, with the best noise for it if that is open."""
    points = []
    noise = la.sigma_noise
    bar = progress(grid.tolist(), progress_bar, "[Grid search]")
    for prior in bar:
        la.prior_precision, la.sigma_noise = prior, noise
        try:
            # drawn networks are not those of another noise: theirs is the plain network's
            if with_noise and scoring.pred_type == "glm":
                point = _score_with_best_noise(la, prior, data, scoring)
            else:
                loss, of_samples = score(la, data, scoring)
                error = float("nan") if of_samples is None else standard_error_of_mean(of_samples)
                point = _Point(prior, noise, loss, error)
        except torch.linalg.LinAlgError:
            # as in laplace-torch: another prior may be usable
            point = _Point(prior, noise, float("nan"), float("nan"))
        points.append(point)
        bar.set_postfix(prior_precision=f"{point.prior:.3g}", loss=f"{point.loss:.4g}", refresh=False)
    return points


def _score_with_best_noise(la: Posterior, prior: float, data: Sequence[ValidationBatch], scoring: Scoring) -> _Point:
    r"""Score the best noise and its prior on the curve along which $\sigma^2 P_0$ is that of the present ones.

    Along it the function variance is proportional to $\sigma^2$, so that no other posterior is needed.
    """
    found = list(predictions(la, data, scoring))
    scale = best_scale(la, found)
    la.prior_precision, la.sigma_noise = prior / scale**2, la.sigma_noise * scale
    scaled = (((mean, variance * scale**2), y) for (mean, variance), y in found)  # type: ignore[misc]
    losses = negative_log_likelihoods(la, scaled)
    return _Point(prior / scale**2, la.sigma_noise, float(losses.mean()), standard_error_of_mean(losses))


def harm_without_validation(la: Posterior, scoring: Scoring) -> Iterator[str]:
    """Yield a warning if the posterior predicts its own training data clearly worse than the plain network.

    It is asked of some of the fitted samples, or of those that rows were drawn from, as far as they are known: not in a
    loaded posterior. In regression it says nothing: the excess on training data is at most half the mean ratio of
    function variance to noise variance there, which is what the fit has taken from the noise.

    Args:
        la: a posterior whose prior was tuned without validation data.
        scoring: predictive.
    """
    fit = la.fit_result
    pool, drawn = fit.pool, fit.drawn
    if (pool is None and drawn is None) or la.likelihood == "regression":
        return
    n = max(_FEWEST, min(_MOST, _MOST_ROWS // fit.n_outputs))
    samples: Iterable[Batch]
    if drawn is not None:
        samples = [batch.to(fit.mean.device) for batch in drawn.sampler.random_samples(n)]
    elif pool is not None:
        order = torch.randperm(len(pool.read), generator=torch.Generator().manual_seed(fit.options.seed))
        some = pool.read[order[:n].sort().values]
        samples = SubBatch(pool.source, some, fit.mean.device, fit.options.seed)
    data = read_validation(la, ((batch.inputs, batch.targets) for batch in samples), scoring)
    own, plain = (
        negative_log_likelihoods(la, pairs) for pairs in (predictions(la, data, scoring), plain_predictions(la, data))
    )
    found = against_map(own, plain, torch.finfo(fit.mean.dtype).eps)
    if found.difference - 2 * found.standard_error > _HARM:
        yield (
            f"The prior was tuned without validation data, and the posterior predicts {len(own)} of its own training "
            f"samples {found}. New data may be predicted worse too: where predictions matter, tune by "
            "method='gridsearch' with val_loader. The prior is set nevertheless."
        )


def without_effect(method: str, structure: str, val_loader: object) -> Iterator[str]:
    """Yield warnings of arguments that have no effect with the method."""
    if method == "marglik" and val_loader is not None:
        yield "val_loader has no effect with method='marglik'. Expected method='gridsearch', or no val_loader."
    if method == "gridsearch" and structure != "scalar":
        yield (
            f"prior_structure={structure!r} has no effect with method='gridsearch', whose grid is of one number for "
            "all parameters. Expected method='marglik', or prior_structure='scalar'."
        )
