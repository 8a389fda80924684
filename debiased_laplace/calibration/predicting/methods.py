"""From what a user hands over to predictors, with MAP among them."""

from collections.abc import Mapping
from typing import Any, get_args

from laplace.baselaplace import BaseLaplace
from torch import nn

from debiased_laplace.calibration.predicting.predictors import (
    CallablePredictor,
    LaplacePredictor,
    LinkApproximation,
    NetworkPredictor,
    PredictionOptions,
    PredictionType,
    Predictor,
)
from debiased_laplace.calibration.predictions.arrays import Task

Method = Any
"""A Laplace posterior (`BaseLaplace`), a network (`nn.Module`), or a callable from inputs to predictions."""
MAP = "map"


def choose_prediction(
    task: Task, pred_type: PredictionType, link_approx: LinkApproximation | None, n_samples: int, seed: int
) -> PredictionOptions:
    """The options of predictions, checked; "nn" averages over drawn networks, so that its link is "mc".

    Raises:
        ValueError: for a value or a combination that does not exist.
    """
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(map(repr, get_args(Task)))}; got {task!r}.")
    if pred_type not in get_args(PredictionType):
        raise ValueError(f"pred_type must be 'glm' or 'nn'; got {pred_type!r}.")
    if link_approx is None:
        link_approx = "mc" if pred_type == "nn" else "mean_field"
    if link_approx not in get_args(LinkApproximation):
        raise ValueError(
            f"link_approx must be one of {', '.join(map(repr, get_args(LinkApproximation)))}; got {link_approx!r}."
        )
    if pred_type == "nn" and link_approx != "mc":
        raise ValueError(
            f"pred_type='nn' averages over drawn networks: expected link_approx='mc', got {link_approx!r}."
        )
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 2:
        raise ValueError(f"n_samples must be a whole number of at least 2; got {n_samples!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number of at least 0 and below 2**63; got {seed!r}.")
    return PredictionOptions(task, pred_type, link_approx, n_samples, seed)


def read_methods(methods: Any, baseline: str | None, include_map: bool | None) -> dict[str, Method]:
    """Methods by name, in the caller's order, the network of the first posterior before them where MAP is missing.

    Args:
        methods: a mapping, or one Laplace posterior.
        baseline: name of the method to compare with; where one is given, nothing is added unless it is "map".
        include_map: whether to add it whatever else there is; None: where no network is given.

    Raises:
        ValueError: for anything that cannot predict, or a MAP that cannot be added.
    """
    if isinstance(methods, BaseLaplace):
        methods = {"laplace": methods}
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            "posteriors must map names to methods, at least one; got "
            f"{'an empty mapping' if isinstance(methods, Mapping) else type(methods).__name__}."
        )
    for name, method in methods.items():
        if not isinstance(method, BaseLaplace | nn.Module) and not callable(method):
            raise ValueError(
                f"{name!r} must be a Laplace posterior, a network, or a callable that maps inputs to predictions; got "
                f"{type(method).__name__}."
            )
    found: dict[str, Method] = dict(methods)
    given = any(isinstance(m, nn.Module) for m in found.values()) or any(str(n).lower() == MAP for n in found)
    wanted = not given and baseline in (None, MAP) if include_map is None else include_map
    if not wanted:
        return found
    owners = [
        m for m in found.values() if isinstance(m, BaseLaplace) and isinstance(getattr(m, "model", None), nn.Module)
    ]
    if MAP in found or not owners:
        if include_map:
            raise ValueError(
                f"include_map=True adds the network of the first Laplace posterior as {MAP!r}; "
                + (f"{MAP!r} is there already." if MAP in found else "none of the posteriors has a network.")
            )
        return found
    return {MAP: owners[0].model, **found}


def make_predictor(name: str, method: Method, options: PredictionOptions, *, keeps_logits: bool = False) -> Predictor:
    """How a method predicts; a network may keep its logits beside its probabilities."""
    if isinstance(method, BaseLaplace):
        return LaplacePredictor(name, method, options)
    if isinstance(method, nn.Module):
        return NetworkPredictor(name, method, options.task, keeps_logits)
    return CallablePredictor(name, method, options.task)


def find_noise(methods: Mapping[str, Method], given: Any) -> Any:
    """Observation noise of the methods that do not know their own: as given, or that of the first posterior."""
    if given is not None:
        return given
    for method in methods.values():
        if isinstance(method, BaseLaplace):
            return method.sigma_noise.detach()
    return None
