"""A grid search over the prior precision on validation data, with the plain network as what must be beaten."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.posterior.hyperparameters import integer, positive
from debiased_laplace.posterior.predictions import PredictiveInterface
from debiased_laplace.posterior.prior_search import PriorSearch, against_map, best_of, standard_error_of_mean
from debiased_laplace.posterior.validation import (
    Scoring,
    ValidationBatch,
    fit_the_likelihood,
    negative_log_likelihoods,
    plain_predictions,
    predictions,
    read_validation,
    score,
)


def prior_grid(lower: int | float, upper: int | float, n_points: int, base: int | float) -> Float[Tensor, " g"]:
    """Prior precisions between two powers of a base, equally far apart in the exponent.

    Args:
        lower: exponent of the smallest.
        upper: exponent of the largest.
        n_points: how many, at least 1; one alone is the smallest.
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
        raise ValueError(f"log_prior_prec_min must not be above log_prior_prec_max; got {lower} and {upper}.")
    if not base > 1:
        raise ValueError(f"log_prior_prec_base must be above 1; got {base}.")
    grid = torch.logspace(lower, upper, n_points, base=base, dtype=torch.float64)
    positive(grid, "every prior_precision of the grid")
    return grid


def by_grid_search(
    la: PredictiveInterface,
    grid: Float[Tensor, " g"],
    loader: Iterable[Any] | None,
    scoring: Scoring,
    *,
    progress_bar: bool,
) -> PriorSearch:
    """Set the scalar prior precision whose predictions on validation data score best.

    Args:
        la: a fitted posterior.
        grid: prior precisions to try, increasing.
        loader: validation data.
        scoring: predictive and loss.
        progress_bar: show progress.

    Returns:
        All losses, and how the best prior compares with the plain network.

    Raises:
        ValueError: if there are no validation data, or no grid point scores finitely; the prior stays as it was.
    """
    if not isinstance(loader, Iterable):
        raise ValueError(f"method='gridsearch' needs val_loader, a DataLoader of validation data; got {loader!r}.")
    positive(grid.to(la._center.dtype), f"every prior_precision of the grid, in {la._center.dtype},")
    before = la.prior_precision
    try:
        data = read_validation(la, loader, scoring)
        losses, errors = _scores(la, grid, data, scoring, progress_bar=progress_bar)
        if not bool(losses.isfinite().any()):
            raise ValueError(
                f"No prior precision between {float(grid[0]):.3g} and {float(grid[-1]):.3g} gives a finite "
                f"loss on the validation data (the first one: {float(losses[0])}); the prior is unchanged."
            )
        best = grid[best_of(losses)]
        la.prior_precision = best
        comparison = None
        if scoring.loss is None or fit_the_likelihood(la, data):
            own = negative_log_likelihoods(la, predictions(la, data, scoring))
            plain = negative_log_likelihoods(la, plain_predictions(la, data))
            comparison = against_map(own, plain, torch.finfo(la._center.dtype).eps)
    except BaseException:
        la.prior_precision = before
        raise
    return PriorSearch(
        grid=grid.clone(),
        losses=losses,
        standard_errors=errors,
        chosen=float(best),
        against_map=comparison,
        loss_name=scoring.name,
        n=sum(len(held.batch) for held in data),
    )


def _scores(
    la: PredictiveInterface,
    grid: Tensor,
    data: Sequence[ValidationBatch],
    scoring: Scoring,
    *,
    progress_bar: bool,
) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"] | None]:
    """The loss of every prior, and where it is a mean over samples its standard error."""
    losses, errors = [], []
    bar = tqdm(grid, disable=not progress_bar, desc="[Grid search]")
    for prior in bar:
        la.prior_precision = prior
        try:
            loss, of_samples = score(la, data, scoring)
        except torch.linalg.LinAlgError:
            # as laplace-torch: this prior cannot be used, another may
            loss, of_samples = float("nan"), None
        losses.append(loss)
        errors.append(float("nan") if of_samples is None else standard_error_of_mean(of_samples))
        bar.set_postfix(prior_precision=f"{float(prior):.3g}", loss=f"{loss:.4g}")
    exact = torch.tensor(losses, dtype=torch.float64)
    return exact, torch.tensor(errors, dtype=torch.float64) if scoring.loss is None else None
