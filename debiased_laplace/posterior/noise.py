"""Observation noise of a regression: one number, or one per output, whose ratio the curvature knows."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

_NEAR_ONE = (0.8, 1.25)
"""Root mean squares of residuals that agree with a noise of 1."""

Noise = Float[Tensor, ""] | Float[Tensor, " C"]


def as_noise(noise: Tensor, likelihood: str) -> Noise:
    """Return positive numbers as the noise of a likelihood.

    Raises:
        ValueError: if they have another shape, or are not 1 in classification.
    """
    if noise.ndim > 1:
        raise ValueError(f"sigma_noise must be one number or one per output; got shape {tuple(noise.shape)}.")
    noise = noise.reshape(()) if noise.numel() == 1 else noise
    if likelihood != "regression" and bool((noise != 1).any()):
        raise ValueError(f"sigma_noise is of regression only; expected 1 in {likelihood}, got {noise.tolist()}.")
    return noise


def scale_of(noise: Noise) -> Float[Tensor, ""]:
    """Return the geometric mean over outputs."""
    return noise if noise.ndim == 0 else noise.log().mean().exp()


def ratios_of(noise: Noise) -> tuple[float, ...] | None:
    """Return the noise of each output relative to its scale; None for one number."""
    return None if noise.ndim == 0 else tuple((noise / scale_of(noise)).detach().tolist())


def check_ratios(noise: Noise, known: tuple[float, ...] | None) -> None:
    """Check that the outputs have the ratio of noise that their curvature was estimated with.

    Raises:
        ValueError: if they do not.
    """
    relative = ratios_of(noise)
    if known is None and relative is None:
        return
    if known is None or relative is None or not _close(relative, known):
        was = "one noise for all outputs" if known is None else f"noise in the ratio {known}"
        raise ValueError(
            f"The curvature was fitted with {was}; expected sigma_noise in that ratio, got {noise.tolist()}. Build "
            "a new posterior with it."
        )


def shown_noise(noise: Noise) -> str:
    """Return the noise as text."""
    values = [f"{value:.3g}" for value in noise.detach().reshape(-1).tolist()]
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"


def warn_of_unit_noise(residual: float, *, stacklevel: int) -> None:
    """Warn where a noise of 1 that nobody gave does not agree with the root mean square of the residuals."""
    if not _NEAR_ONE[0] < residual < _NEAR_ONE[1]:
        warnings.warn(
            f"sigma_noise was not given and is 1, but the residuals of the fitted samples have a root mean square "
            f"of {residual:.3g}. Expected the standard deviation of the observation noise: give it, or call "
            "optimize_prior_precision, which tunes it with the prior.",
            stacklevel=stacklevel,
        )


def _close(relative: tuple[float, ...], known: tuple[float, ...]) -> bool:
    return len(relative) == len(known) and torch.allclose(torch.tensor(relative), torch.tensor(known), rtol=1e-4)
