"""Posteriors of the demo, and their distances from the full-batch posterior."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from debiased_laplace.calibration.contents import HeldOutDifference, PosteriorSummary
from debiased_laplace.demo.digits import N_TRAIN, Digits
from debiased_laplace.linalg.low_rank_plus_diagonal import kl_divergence
from debiased_laplace.posterior.factory import DebiasedLaplace
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace

PRIOR_PRECISION = 40.0


def fit_posteriors(model: nn.Module, data: Digits, seed: int) -> dict[str, DebiasedParametricLaplace]:
    """Fit the biased, the debiased and the full-batch posterior, which differ in their samples and magnitudes only."""

    def fit(
        magnitudes: Literal["held_out", "same_batch"],
        samples: Subset[tuple[Tensor, ...]] | TensorDataset,
        complement: Literal["none", "diagonal"],
    ) -> DebiasedParametricLaplace:
        la = DebiasedLaplace(
            model,
            "classification",
            magnitudes=magnitudes,
            complement=complement,
            sampling="uniform",
            prior_precision=PRIOR_PRECISION,
            seed=seed,
        )
        la.fit(DataLoader(samples, batch_size=64), n_data=N_TRAIN, progress_bar=sys.stderr.isatty())
        return la

    # the full batch is first, as the report compares held-out KLs with those of the first posterior
    return {
        "full batch": fit("same_batch", data.train, "none"),
        "same_batch": fit("same_batch", data.curvature, "diagonal"),
        "debiased": fit("held_out", data.curvature, "diagonal"),
    }


def predict(model: nn.Module, posteriors: dict[str, DebiasedParametricLaplace], inputs: Tensor) -> dict[str, Tensor]:
    """Return the class probabilities of the network and of each posterior."""
    with torch.no_grad():
        predictions = {"MAP": model(inputs).softmax(-1)}
    for name, la in tqdm(posteriors.items(), desc="[Predicting]", leave=False, disable=None):
        predicted = la(inputs)
        assert isinstance(predicted, Tensor)  # for the type checker
        predictions[name] = predicted
    return predictions


@dataclass(frozen=True)
class Distance:
    """KL divergence of a posterior over the parameters from the full-batch posterior, in nats.

    Attributes:
        estimated: estimate from held-out samples; None for the full batch itself.
        true: exact value.
    """

    estimated: HeldOutDifference | None
    true: float


def distances(
    posteriors: dict[str, DebiasedParametricLaplace], summaries: Mapping[str, PosteriorSummary]
) -> dict[str, Distance]:
    """Return the estimated and exact KL divergence of each posterior from the full batch."""
    full = posteriors["full batch"].posterior_precision
    return {
        name: Distance(summaries[name].held_out, float(kl_divergence(la.posterior_precision, full)))
        for name, la in posteriors.items()
    }


def total_variations(predictions: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean total variation between the class probabilities of each method and of the full batch."""
    full = predictions["full batch"]
    return {name: float((p - full).abs().sum(1).mean()) / 2 for name, p in predictions.items()}


def inflation(la: DebiasedParametricLaplace, full: DebiasedParametricLaplace) -> Tensor:
    """Return the ratio (k,) of a posterior's curvatures along its directions to the full-batch curvatures there."""
    overlap = (full.directions.T @ la.directions).double().square()
    truth = full.directional_curvatures.double() @ overlap
    return la.directional_curvatures.double() / truth
