"""Predictions of a batch as named tensors, and of all batches in the form that a report reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from debiased_laplace.calibration.predictions.arrays import Task, as_tensor
from debiased_laplace.calibration.predictions.forms import Gaussian
from debiased_laplace.calibration.predictions.probabilities import PosteriorPredictive, read_probabilities
from debiased_laplace.calibration.predictions.uncertainty import measure_uncertainty

Piece = dict[str, Tensor]
"""By name: "probabilities", "mutual_information", "logit_variance", "logits"; "mean", "standard_deviation",
"function_variance"."""

MOST_JOINT_OUTPUTS = 32
"""Above it, covariances (n, d, d) between outputs are not kept: they would outgrow everything else."""


def reduce_samples(name: str, samples: Shaped[Tensor, "S n ..."], task: Task) -> Piece:
    """What a report needs of samples of a batch.

    Args:
        name: of the method, for messages.
        samples: probabilities (S, n, C), or values of the function (S, n) or (S, n, d).
        task: what is predicted.

    Raises:
        ValueError: for probabilities that are none, or too few samples for a variance.
    """
    if task != "regression":
        read = read_probabilities(name, samples, task=task)
        between = measure_uncertainty(read).mutual_information
        assert between is not None  # for the type checker
        return {"probabilities": samples.mean(0), "mutual_information": between}
    if len(samples) < 2:
        raise ValueError(f"{name!r}: a variance over draws needs at least 2 samples; got {len(samples)}.")
    return {"mean": samples.mean(0), "function_variance": samples.var(0)}


def piece_of_output(name: str, output: Any, task: Task, *, n: int) -> Piece:
    """What a callable has returned for a batch of n inputs.

    Raises:
        ValueError: if it is neither probabilities, nor a pair (mean, standard deviation), nor samples, of n inputs.
    """
    if task == "regression" and isinstance(output, tuple | list) and len(output) == 2:
        mean, deviation = (as_tensor(part, f"Predictions of {name!r}") for part in output)
        if len(mean) == len(deviation) == n:
            return {"mean": mean, "standard_deviation": deviation}
        raise ValueError(
            f"{name!r}: expected mean and standard deviation of {n} inputs; got shapes {tuple(mean.shape)} and "
            f"{tuple(deviation.shape)}."
        )
    values = as_tensor(output, f"Predictions of {name!r}")
    sampled = values.ndim == 3 or (task == "regression" and values.ndim == 2)
    if sampled and values.shape[1] == n:
        piece = reduce_samples(name, values, task)
        return piece | {"n_samples": torch.tensor([len(values)])}
    if not sampled and task != "regression" and values.ndim > 0 and len(values) == n:
        return {"probabilities": values}
    expected = "(mean, standard deviation), or samples (S, n, outputs)"
    if task != "regression":
        expected = "probabilities (n, C), or samples (S, n, C)"
    raise ValueError(f"{name!r}: expected {expected} for n = {n} inputs; got shape {tuple(values.shape)}.")


def compact(piece: Piece) -> Piece:
    """What is kept of a batch: on the CPU, in its own dtype, without covariances between too many outputs."""
    kept = {}
    for key, values in piece.items():
        if key == "function_variance" and values.ndim == 3 and not 1 < values.shape[-1] <= MOST_JOINT_OUTPUTS:
            values = values.diagonal(dim1=-2, dim2=-1)
        kept[key] = values.detach().to("cpu", copy=True)
    return kept


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Batches one after another."""
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def as_prediction(name: str, piece: Mapping[str, Tensor], sigma_noise: Any) -> Any:
    """In a form that `calibration_report` reads; the observation noise enters here and nowhere else.

    Args:
        name: of the method, for messages.
        piece: of all batches.
        sigma_noise: standard deviation of the observation noise, where the piece does not hold it.

    Raises:
        ValueError: if a regression needs the noise and it is not known.
    """
    if "probabilities" in piece:
        if "mutual_information" in piece:
            return PosteriorPredictive(piece["probabilities"], piece["mutual_information"], piece.get("logit_variance"))
        return piece["probabilities"]
    mean = piece["mean"]
    if "standard_deviation" in piece:
        return mean, piece["standard_deviation"]
    if sigma_noise is None:
        raise ValueError(
            f"{name!r} says nothing of the observation noise: expected sigma_noise, the standard deviation of the "
            "targets around the function."
        )
    if "function_variance" not in piece:
        sigma = torch.as_tensor(sigma_noise, dtype=mean.dtype, device=mean.device)
        return mean, sigma.expand_as(mean).clone()
    variance = piece["function_variance"]
    if variance.ndim == 3:
        return Gaussian(mean, covariance=variance, observation_noise=sigma_noise)
    # rounding leaves tiny negative variances where the function is certain
    return Gaussian(mean, standard_deviation=variance.clamp_min(0).sqrt(), observation_noise=sigma_noise)
