"""What all debiased posteriors share: hyper-parameters, fit, the precision operator, the held-out KL, the state."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.likelihoods import likelihood_named
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.subsets import SubsetOfWeights, WeightSubset
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.debiasing.choice import Weighting
from debiased_laplace.debiasing.directions import SUPPORTED
from debiased_laplace.debiasing.held_out_kl import HeldOutKL
from debiased_laplace.debiasing.options import Structure
from debiased_laplace.posterior import checkpoint, judging
from debiased_laplace.posterior.backends import BackendChoice
from debiased_laplace.posterior.fitting import Fit, Problem, SplitOptions, Task
from debiased_laplace.posterior.growing import fit_samples
from debiased_laplace.posterior.hyperparameters import (
    integer,
    name_of,
    one_positive,
    requested,
    sample_amounts,
    warn_of_no_effect,
)
from debiased_laplace.posterior.prior_tuning import PriorTuning


class DebiasedParametricLaplace(PriorTuning):
    """A Laplace posterior whose curvature is estimated on split samples.

    The arguments are those of `DebiasedLaplace`; the estimator's come first, laplace-torch's own after them. Subclasses
    say which weights they are over and what structure the curvature has, and nothing else.
    """

    _subset: SubsetOfWeights
    _structure: Structure

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        rank: int | str | None = None,
        magnitudes: str = "cross_fitted",
        direction_samples: int | float | str = 0.5,
        magnitude_samples: int | float | None = None,
        n_folds: int = 8,
        complement: str = "kron",
        metric: str = "euclidean",
        inverse_correction: str = "none",
        solver: str = "auto",
        seed: int = 0,
        kron_basis: str = "row_matrices",
        kron_magnitudes: str = "exact",
        kfac_approx: str = "expand",
        sigma_noise: int | float | Tensor = 1.0,
        prior_precision: int | float | Tensor = 1.0,
        prior_mean: int | float | Tensor = 0.0,
        temperature: int | float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        last_layer_name: str | None = None,
        subnetwork_indices: Tensor | None = None,
    ):
        likelihood = name_of(likelihood)
        self._request, directions = requested(
            self._structure,
            direction_samples,
            {
                "rank": rank,
                "magnitudes": magnitudes,
                "complement": complement,
                "metric": metric,
                "inverse_correction": inverse_correction,
                "solver": solver,
                "seed": seed,
                "n_folds": n_folds,
                "kron_basis": kron_basis,
                "kron_magnitudes": kron_magnitudes,
                "kfac_approx": kfac_approx,
            },
        )
        amounts = sample_amounts(directions, magnitude_samples)
        warn_of_no_effect(*amounts, self._request)
        self._split_options = SplitOptions(*amounts, self._request.options.seed)
        self._problem = Problem(
            model,
            likelihood_named(likelihood),
            WeightSubset(self._subset, last_layer_name, subnetwork_indices),
            BackendChoice.of(backend, backend_kwargs),
            MappingKeys(dict_key_x, dict_key_y),
        )
        self._selection = self._problem.subset.select(model)
        self._fit: Fit | None = None
        super().__init__(
            model,
            likelihood,
            sigma_noise=one_positive(sigma_noise, "sigma_noise"),
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
        )
        if self._selection is not None:
            self._take(self._selection)
        else:
            # as laplace-torch: not known before the first forward pass
            self.__dict__.update(n_params=None, n_layers=None, mean=None)

    @property
    def _prior_of_blocks(self) -> bool:
        in_basis = self._options.complement == "kron" if self._fit is None else self._fit.estimate.curvature.basis
        return self._structure == "kron" or bool(in_basis)

    def _init_H(self) -> None:
        self.H = None

    def __repr__(self) -> str:
        open_to_choice = self._request.open if self._fit is None else frozenset()
        names = ["magnitudes", "complement"] if self._structure == "lowrank" else ["magnitudes"]
        shown = {name: "auto" if name in open_to_choice else getattr(self._options, name) for name in names}
        options = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        if self._problem.backend.kind != "GGN" or self._problem.backend.backend is not None:
            options += f", {self._problem.backend.kind}"
        over = "last layer" if self._selection is None else f"{self._selection.n_parameters:,} parameters"
        if self._selection is not None and self._selection.last_layer is not None:
            over = f"{over} of {self._selection.subset}"
        head = f"{type(self).__name__}({self.likelihood}, {over}, {options}"
        if self._fit is None:
            return f"{head}, not fitted)"
        split = self._fit.split
        used = (
            f"{split.n_samples}" if split.shared else f"{len(split.direction_indices)} + {len(split.magnitude_indices)}"
        )
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"{head}{rank}, fitted on {used} of {split.n_data} samples)"

    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        n_data: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Estimate the curvature of the full batch from the samples of a loader.

        Args:
            train_loader: a `DataLoader` over a map-style data set, or a list of batches; a batch is (inputs, targets)
                or a mapping of tensors. Samples are split by their position before any is loaded; order, shuffling and
                augmentation do not matter.
            override: forget earlier fits. False: go on from the fitted samples with those of the loader that were not
                fitted yet; the posterior is the one that a single fit of all of them gives, and costs as much.
            progress_bar: show progress.
            n_data: size N of the data set that the likelihood stands for, the samples given being part of it; default:
                as it was given before (`override=False`), or else all samples that loaders have yielded.
            tolerance: nats of held-out KL; double the samples, in an order that the seed fixes, until that gains less,
                by over two standard errors, or all are used. `stopping` says what was gained; a fit with
                `override=False` goes on from there. None: use all samples at once.

        Raises:
            ValueError: if loader, samples, weights or options cannot be used, with `override=False` also if no sample
                is new, the weights have changed, or the fitted samples are not known any more (after loading a
                state); model and posterior stay as they were.
        """
        if not isinstance(override, bool):
            raise ValueError(f"override must be True or False; got {override!r}.")
        n_data = None if n_data is None else integer(n_data, "n_data")
        if isinstance(tolerance, bool):
            raise ValueError(f"tolerance is in nats of held-out KL, or None; got {tolerance!r}.")
        tolerance = None if tolerance is None else float(one_positive(tolerance, "tolerance (nats)"))
        task = Task(self._problem, self._split_options, self._request, self._weighting)
        earlier = None if override else self._earlier_samples
        selection, fit = fit_samples(
            task, train_loader, earlier, n_data=n_data, tolerance=tolerance, progress_bar=progress_bar
        )
        self.adopt(selection, fit, selection.vector(), selection.fingerprint())
        self._warn_of_dropped_directions()

    def _weighting(self, selection: ParameterSelection, n_data: int) -> Weighting:
        """By what an estimate becomes this posterior; the prior may not have been told its parameters before."""
        known, self._selection = self._selection, selection
        try:
            prior = self.prior_precision_diag.detach()
        finally:
            self._selection = known
        weight = n_data / (float(torch.as_tensor(self.sigma_noise).detach()) ** 2 * self.temperature)
        of_blocks = self.prior_precision.numel() in (1, len(selection.names))
        return Weighting(weight, prior, of_blocks)

    def _warn_of_dropped_directions(self) -> None:
        """The threshold of `rank=None` is relative to the largest curvature; the posterior's is the prior."""
        # laplace-torch's training by marginal likelihood gives hyper-parameters that carry a graph
        dropped = self.n_data * float(torch.as_tensor(self._H_factor).detach()) * self.fitted.estimate.dropped
        prior = float(self.prior_precision.detach().min())
        alone = self._structure == "lowrank" and self._options.complement == "none"
        if alone and self._options.rank is None and dropped > prior:
            warnings.warn(
                f"rank=None left out directions below {SUPPORTED:g} of the largest curvature, in which the data still "
                f"say up to {dropped / prior:.3g} times as much as the prior: the posterior is too wide there. Inputs "
                "of very different scales do that: standardize them, ask for more by rank, or take a complement.",
                stacklevel=3,
            )

    def held_out_kl(
        self, loader: Iterable[Any] | None, fitted_loader: Iterable[Any] | None = None, *, progress_bar: bool = False
    ) -> HeldOutKL:
        """Distance to the full-batch posterior in nats, up to a constant that posteriors of this model share.

        `debiased_laplace.held_out_kl` is the same for these and for laplace-torch's own posteriors.

        Args:
            loader: training samples left out of the fit; None only where all `n_data` samples were fitted.
            fitted_loader: the fitted samples, whose share is then exact.
            progress_bar: show progress.

        Returns:
            The estimate, with its standard error; differences of two are paired by sample.

        Raises:
            OverlapError: if a sample of the loader was fitted.
            ValueError: if `fitted_loader` does not yield the fitted samples, or the model's weights have changed.

        Warns:
            UserWarning: if the fitted samples' share is above a tenth and missing.
        """
        with torch.inference_mode(False):
            return judging.judged(judging.debiased_candidate(self), loader, fitted_loader, progress_bar=progress_bar)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, strings and numbers that `load_state_dict` restores the posterior from, beside the same weights."""
        return checkpoint.state_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Become the posterior that `state_dict` describes.

        Raises:
            ValueError: if it belongs to another kind of posterior, likelihood, set of parameters or trained weights.
        """
        checkpoint.restore(self, state_dict)
