"""Tuning the prior precision: gradient ascent on the marginal likelihood, or a grid search on validation data."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from laplace.utils.utils import fix_prior_prec_structure
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.posterior.fitting import Fit
from debiased_laplace.posterior.grid_search import by_grid_search, prior_grid
from debiased_laplace.posterior.hyperparameters import name_of, one_of, positive
from debiased_laplace.posterior.predictions import PredictiveInterface
from debiased_laplace.posterior.prior_search import PriorSearch
from debiased_laplace.posterior.validation import Scoring

Structure = Literal["scalar", "layerwise", "diag"]


@dataclass(frozen=True)
class Ascent:
    """Adam on the log prior precision."""

    n_steps: int
    lr: int | float
    start: int | float | Tensor
    structure: str


def by_marginal_likelihood(la: PredictiveInterface, ascent: Ascent, *, progress_bar: bool) -> None:
    """Set the prior precision that ascent on the log marginal likelihood ends at.

    Args:
        la: a fitted posterior.
        ascent: steps, learning rate, start and structure.
        progress_bar: show progress.

    Raises:
        ValueError: if an option is out of range, or the marginal likelihood is not finite; the prior stays as it was.
    """
    structure = ascent.structure
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


class PriorTuning(PredictiveInterface):
    """A posterior whose prior precision can be tuned, and that remembers what a grid search found."""

    _prior_search: PriorSearch | None = None

    @property
    def prior_search(self) -> PriorSearch | None:
        """What the last grid search found; None before it, after `fit` or "marglik", and in a loaded posterior."""
        return self._prior_search

    def adopt(self, selection: ParameterSelection, fit: Fit, center: Float[Tensor, " P"], fingerprint: str) -> None:
        """Become the posterior of this fit, for which no prior was searched yet.

        Raises:
            ValueError: if prior precision or prior mean do not fit the parameters.
        """
        super().adopt(selection, fit, center, fingerprint)
        self._prior_search = None

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: int | float = 1e-1,
        init_prior_prec: int | float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Callable[..., Any] | None = None,
        log_prior_prec_min: int | float = -4.0,
        log_prior_prec_max: int | float = 4.0,
        grid_size: int = 100,
        link_approx: str = "mean_field",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: int | float = 10.0,
    ) -> None:
        """Tune the prior precision, by marginal likelihood or by a grid search on validation data.

        The arguments are laplace-torch's. The grid search scores every prior by the mean negative log-likelihood of the
        validation data (in regression Gaussian, of function variance plus observation noise, per output), computes
        Jacobians once where memory allows, draws the same numbers for every prior, and passes over values that are not
        finite. It sets the best prior and leaves what it found in `prior_search`.

        Args:
            pred_type: predictive that the grid search scores: "glm" or "nn".
            method: "marglik" or "gridsearch".
            n_steps: of Adam on the log prior precision ("marglik").
            lr: its learning rate.
            init_prior_prec: where it starts; a tensor keeps its structure.
            prior_structure: "scalar", "layerwise" or, without a Kronecker basis, "diag"; the grid is of scalars.
            val_loader: validation data of the grid search, which neither training nor `fit` has seen.
            loss: None for the negative log-likelihood; or a torchmetrics metric, or a function of (predictions,
                targets), in regression of (means, covariances of the function without noise, targets).
            log_prior_prec_min: exponent of the grid's lower end.
            log_prior_prec_max: exponent of the grid's upper end.
            grid_size: points of the grid.
            link_approx: of the scored predictive; the one that predictions are going to be made with.
            n_samples: draws of "mc" and of "nn".
            verbose: print the result.
            progress_bar: show progress.
            log_prior_prec_base: base of the exponents.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if an option is unknown, a prior for every parameter meets a Kronecker basis, there are no
                validation data, or no grid point gives a finite loss; the prior stays as it was.

        Warns:
            UserWarning: if the best prior is at an edge of the grid, or still predicts the validation data worse than
                the plain network (MAP), or the loss does not depend on the prior; if an argument has no effect.

        References:
            Daxberger et al. (2021), arXiv 2106.14806, section 3 (cross-validating the prior precision).
        """
        self._check_H_init()
        method, structure = name_of(method), name_of(prior_structure)
        if method not in ("marglik", "gridsearch"):
            raise ValueError(f"method must be 'marglik' or 'gridsearch'; got {method!r}.")
        one_of(structure, Structure, "prior_structure")
        with torch.inference_mode(False):
            if method == "marglik":
                ascent = Ascent(n_steps, lr, init_prior_prec, structure)
                by_marginal_likelihood(self, ascent, progress_bar=progress_bar)
                self._prior_search = None
            else:
                grid = prior_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
                scoring = Scoring(name_of(pred_type), name_of(link_approx), n_samples, loss)
                self._prior_search = by_grid_search(self, grid, val_loader, scoring, progress_bar=progress_bar)
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")
        cautions = [] if self._prior_search is None else self._prior_search.cautions
        for caution in [*_without_effect(method, structure, val_loader), *cautions]:
            warnings.warn(caution, stacklevel=2)


def _without_effect(method: str, structure: str, val_loader: object) -> Iterator[str]:
    """Arguments of the other method, which the user may have meant."""
    if method == "marglik" and val_loader is not None:
        yield "val_loader has no effect with method='marglik'. Expected method='gridsearch', or no val_loader."
    if method == "gridsearch" and structure != "scalar":
        yield (
            f"prior_structure={structure!r} has no effect with method='gridsearch', whose grid is of one number for "
            "all parameters. Expected method='marglik', or prior_structure='scalar'."
        )
