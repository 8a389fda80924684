"""The demo's posteriors, and how far they are from the full batch."""

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
    """The biased one, the debiased one, and the full-batch reference; equal but for the samples and their use."""

    def fitted(
        magnitudes: Literal["held_out", "same_batch"],
        samples: Subset[tuple[Tensor, ...]] | TensorDataset,
        complement: Literal["none", "diagonal"],
    ) -> DebiasedParametricLaplace:
        la = DebiasedLaplace(
            model,
            "classification",
            magnitudes=magnitudes,
            complement=complement,
            prior_precision=PRIOR_PRECISION,
            seed=seed,
        )
        la.fit(DataLoader(samples, batch_size=64), n_data=N_TRAIN, progress_bar=True)
        return la

    # the full batch first: the report compares held-out KLs with the first posterior
    return {
        "full batch": fitted("same_batch", data.train, "none"),
        "same_batch": fitted("same_batch", data.curvature, "diagonal"),
        "debiased": fitted("held_out", data.curvature, "diagonal"),
    }


def predict(model: nn.Module, posteriors: dict[str, DebiasedParametricLaplace], inputs: Tensor) -> dict[str, Tensor]:
    """Class probabilities of the network itself and of each posterior."""
    with torch.no_grad():
        predictions = {"MAP": model(inputs).softmax(-1)}
    for name, la in tqdm(posteriors.items(), desc="[Predicting]", leave=False):
        predicted = la(inputs)
        assert isinstance(predicted, Tensor)  # for the type checker
        predictions[name] = predicted
    return predictions


@dataclass(frozen=True)
class Distance:
    """How far a posterior is from the full batch, over the parameters, in nats.

    Attributes:
        estimated: from held-out samples; None for the full batch itself.
        true: the KL divergence.
    """

    estimated: HeldOutDifference | None
    true: float


def distances(
    posteriors: dict[str, DebiasedParametricLaplace], summaries: Mapping[str, PosteriorSummary]
) -> dict[str, Distance]:
    """KL to the full batch, as the held-out samples tell and as it is."""
    full = posteriors["full batch"].posterior_precision
    return {
        name: Distance(summaries[name].held_out, float(kl_divergence(la.posterior_precision, full)))
        for name, la in posteriors.items()
    }


def total_variations(predictions: dict[str, Tensor]) -> dict[str, float]:
    """Mean total variation between each method's class probabilities and the full batch's."""
    full = predictions["full batch"]
    return {name: float((p - full).abs().sum(1).mean()) / 2 for name, p in predictions.items()}


def inflation(la: DebiasedParametricLaplace, full: DebiasedParametricLaplace) -> Tensor:
    """The curvature that a posterior uses along its directions, over the full batch's along the same ones, (k,)."""
    overlap = (full.directions.T @ la.directions).double().square()
    truth = full.directional_curvatures.double() @ overlap
    return la.directional_curvatures.double() / truth
