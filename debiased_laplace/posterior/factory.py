"""`DebiasedLaplace`: the front door."""

from typing import Any, Literal

from torch import Tensor, nn

from debiased_laplace.errors import NotBuiltError
from debiased_laplace.posterior.lowrank import DebiasedLowRankLaplace
from debiased_laplace.posterior.parametric import DebiasedParametricLaplace

_BUILT = {("all", "lowrank"): DebiasedLowRankLaplace}
_PLANNED_SUBSETS = ("all", "last_layer", "subnetwork")
_PLANNED_STRUCTURES = ("lowrank", "kron", "full")


def DebiasedLaplace(
    model: nn.Module,
    likelihood: str,
    subset_of_weights: str = "all",
    hessian_structure: str = "lowrank",
    *,
    rank: int | None = None,
    magnitudes: Literal["held_out", "same_batch"] = "held_out",
    direction_samples: int | float = 0.5,
    magnitude_samples: int | float | None = None,
    complement: Literal["none", "isotropic", "diagonal"] = "none",
    solver: Literal["auto", "gram", "lanczos"] = "auto",
    seed: int = 0,
    sigma_noise: float | Tensor = 1.0,
    prior_precision: float | Tensor = 1.0,
    prior_mean: float | Tensor = 0.0,
    temperature: float = 1.0,
    enable_backprop: bool = False,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    backend: type | None = None,
    backend_kwargs: dict[str, Any] | None = None,
) -> DebiasedParametricLaplace:
    """A Laplace posterior of a trained network, with curvature that is not biased by the samples it was measured on.

    What it returns is a `laplace.ParametricLaplace`: everything that laplace-torch's posteriors can do, it can.

    Args:
        model: a trained network, inputs (n, …) to outputs (n, C). It is never written to.
        likelihood: "classification" (outputs are logits) or "regression".
        subset_of_weights: "all": every parameter with `requires_grad`.
        hessian_structure: "lowrank": low rank plus diagonal.
        rank: number of directions; None: every one that the direction samples support, within memory.
        magnitudes: "held_out": curvature along the directions from other samples than the directions. "same_batch":
            both from the same samples, the biased way, for comparison.
        direction_samples: samples for the directions, a number or a share of those given to `fit`.
        magnitude_samples: samples for the magnitudes; None: all the rest.
        complement: curvature outside the directions: "none" (the prior alone), "isotropic" (their mean) or "diagonal".
        solver: "gram" (all rows at once), "lanczos" (products only) or "auto".
        seed: of the split and of any start vector.
        sigma_noise: standard deviation of the observation noise (regression), in units of the targets.
        prior_precision: one number, one per parameter tensor, or one per parameter.
        prior_mean: one number, or one per parameter.
        temperature: of the likelihood.
        enable_backprop: keep the graph of predictions, for gradients with respect to the inputs.
        dict_key_x: of mappings as inputs; mappings are not available yet.
        dict_key_y: of mappings as inputs; mappings are not available yet.
        backend: None: torch.func.
        backend_kwargs: of the backend.

    Returns:
        The posterior, not fitted yet.

    Raises:
        NotBuiltError: if an option is not available yet.
        ValueError: if an option is out of its range.

    References:
        Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325; Daxberger et al. (2021), arXiv 2106.14806.
    """
    key = tuple(str(getattr(v, "value", v)) for v in (subset_of_weights, hessian_structure))
    if key not in _BUILT:
        known = key[0] in _PLANNED_SUBSETS and key[1] in _PLANNED_STRUCTURES
        error = NotBuiltError if known else ValueError
        built = " and ".join(f"{subset!r} with {structure!r}" for subset, structure in _BUILT)
        raise error(
            f"subset_of_weights={key[0]!r} with hessian_structure={key[1]!r} is not available"
            f"{' yet' if known else ''}; available: {built}."
        )
    return _BUILT[key](
        model,
        likelihood,
        rank=rank,
        magnitudes=magnitudes,
        direction_samples=direction_samples,
        magnitude_samples=magnitude_samples,
        complement=complement,
        solver=solver,
        seed=seed,
        sigma_noise=sigma_noise,
        prior_precision=prior_precision,
        prior_mean=prior_mean,
        temperature=temperature,
        enable_backprop=enable_backprop,
        dict_key_x=dict_key_x,
        dict_key_y=dict_key_y,
        backend=backend,
        backend_kwargs=backend_kwargs,
    )
