"""The demo's posteriors, and how far they are from the full batch."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from debiased_laplace.debiasing.held_out_kl import KLDifference
from debiased_laplace.demo.digits import N_TRAIN, Digits
from debiased_laplace.linalg.low_rank_plus_diagonal import kl_divergence
from debiased_laplace.posterior.factory import DebiasedLaplace
from debiased_laplace.posterior.parametric import DebiasedParametricLaplace

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

    return {
        "same_batch": fitted("same_batch", data.curvature, "diagonal"),
        "debiased": fitted("held_out", data.curvature, "diagonal"),
        "full batch": fitted("same_batch", data.train, "none"),
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
    """How far a posterior is from the full batch, over the parameters, in nats."""

    estimated: KLDifference
    true: float


def distances(posteriors: dict[str, DebiasedParametricLaplace], data: Digits) -> dict[str, Distance]:
    """KL to the full batch, as the held-out samples tell and as it is.

    Held-out KLs are up to a constant; the full batch's own value is subtracted, so that 0 is the full batch.
    """
    full = posteriors["full batch"]
    zero = full.held_out_kl(None, DataLoader(data.train, batch_size=64))
    held_out, fitted = (DataLoader(d, batch_size=64) for d in (data.held_out, data.curvature))
    found = {}
    for name, la in posteriors.items():
        value = zero if la is full else la.held_out_kl(held_out, fitted)
        true = float(kl_divergence(la.posterior_precision, full.posterior_precision))
        found[name] = Distance(value - zero, true)
    return found


def total_variations(predictions: dict[str, Tensor]) -> dict[str, float]:
    """Mean total variation between each method's class probabilities and the full batch's."""
    full = predictions["full batch"]
    return {name: float((p - full).abs().sum(1).mean()) / 2 for name, p in predictions.items()}


def inflation(la: DebiasedParametricLaplace, full: DebiasedParametricLaplace) -> Tensor:
    """The curvature that a posterior uses along its directions, over the full batch's along the same ones, (k,)."""
    overlap = (full.directions.T @ la.directions).double().square()
    truth = full.directional_curvatures.double() @ overlap
    return la.directional_curvatures.double() / truth
