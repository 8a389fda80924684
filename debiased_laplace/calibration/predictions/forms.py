"""The forms in which regression predictions are stated, and what each says about observation noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from debiased_laplace.calibration.predictions.arrays import as_tensor

_WHY_NOISE = (
    "says nothing of the observation noise: the spread of a function over the posterior leaves it out. Give "
    "observation_noise= (a standard deviation in the unit of the targets, as la.sigma_noise), or say "
    "noise_included=True in Samples(...) or Gaussian(...)"
)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian predictions: a mean with a standard deviation or a covariance per test sample.

    A standard deviation holds the observation noise already unless `observation_noise` is given. A covariance needs a
    word on it, since the covariance that `la(x)` of laplace-torch returns is that of the function alone.

    Attributes:
        mean: (n,) or (n, outputs), in the unit of the targets.
        standard_deviation: as the mean, positive.
        covariance: (n, outputs, outputs), symmetric and positive definite.
        observation_noise: standard deviation of the noise to add, in the unit of the targets: a number, (outputs,) or
            (n, outputs). The report then also says how much of the spread is the function's and how much is noise.
        noise_included: True if the covariance holds the noise already.

    Raises:
        ValueError: for both or neither of deviation and covariance, or noise that is included and to be added.
    """

    mean: Any
    standard_deviation: Any = None
    covariance: Any = None
    observation_noise: Any = None
    noise_included: bool = False

    def __post_init__(self) -> None:
        if (self.standard_deviation is None) == (self.covariance is None):
            raise ValueError("Gaussian takes a standard_deviation or a covariance; got both or neither.")
        refuse_contradiction(self.observation_noise, self.noise_included)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of the prediction: of the function, observation noise to be added, or of the targets themselves.

    With `observation_noise` the prediction is the mixture of a Gaussian around every sample. With `noise_included` it
    is known through its samples only, which are then taken for equally likely, as the target is.

    Attributes:
        values: (samples, n) or (samples, n, outputs), in the unit of the targets.
        observation_noise: standard deviation of the noise to add: a number, (outputs,) or (n, outputs).
        noise_included: True if every value was drawn with its noise.

    Raises:
        ValueError: for noise that is included and to be added.
    """

    values: Any
    observation_noise: Any = None
    noise_included: bool = False

    def __post_init__(self) -> None:
        refuse_contradiction(self.observation_noise, self.noise_included)


def refuse_contradiction(observation_noise: Any, noise_included: bool) -> None:
    """Noise is either in the numbers or to be added.

    Raises:
        ValueError: for both.
    """
    if observation_noise is not None and noise_included:
        raise ValueError(
            "observation_noise would be added to predictions that hold it (noise_included=True): drop one."
        )


def as_form(prediction: Any, where: str) -> Gaussian | Samples:
    """The predictions as one of the two stated forms."""
    if isinstance(prediction, (Gaussian, Samples)):
        return prediction
    if isinstance(prediction, (tuple, list)):
        if len(prediction) != 2:
            raise ValueError(
                f"{where}: regression takes a pair (mean, standard deviation); got "
                f"{type(prediction).__name__} of length {len(prediction)}."
            )
        mean, spread = prediction
        is_covariance = as_tensor(spread, f"{where}, standard deviation").ndim == 3
        return Gaussian(mean, covariance=spread) if is_covariance else Gaussian(mean, standard_deviation=spread)
    if getattr(prediction, "ndim", 0) in (2, 3):
        return Samples(prediction)
    raise ValueError(
        f"{where}: regression takes a pair (mean, standard deviation), a pair (mean, covariance), samples (samples, n) "
        f"or (samples, n, outputs), Gaussian(...) or Samples(...); got {type(prediction).__name__}"
        + (f" of shape {tuple(prediction.shape)}." if hasattr(prediction, "shape") else ".")
    )


def state_noise(form: Gaussian | Samples, observation_noise: Any, where: str) -> Gaussian | Samples:
    """The form with the noise that was stated beside it, refused where nothing is said of it."""
    if observation_noise is not None:
        if form.observation_noise is not None or form.noise_included:
            raise ValueError(f"{where}: observation_noise= is given for predictions that state their noise themselves.")
        return replace(form, observation_noise=observation_noise)
    if isinstance(form, Gaussian) and form.standard_deviation is not None:
        return form
    if form.observation_noise is None and not form.noise_included:
        what = "an array of samples" if isinstance(form, Samples) else "a covariance"
        raise ValueError(f"{where}: {what} {_WHY_NOISE}.")
    return form


def noise_of_method(observation_noise: Any, method: str, prediction: Any, methods: Sequence[str]) -> Any:
    """The noise that a report's `observation_noise` states for one method; None where it states none.

    Args:
        observation_noise: one standard deviation for every form that lacks noise, or a mapping from methods to theirs.
        method: the method.
        prediction: its predictions.
        methods: names of all methods.

    Raises:
        ValueError: for an unknown method in the mapping, or one number for all where a pair (mean, standard deviation)
            leaves open whether it is meant.
    """
    if observation_noise is None:
        return None
    if isinstance(observation_noise, Mapping):
        unknown = [str(name) for name in observation_noise if name not in methods]
        if unknown:
            raise ValueError(
                f"observation_noise names {', '.join(map(repr, unknown))}; the methods are "
                f"{', '.join(map(repr, methods))}."
            )
        return observation_noise.get(method)
    form = as_form(prediction, f"Predictions of {method!r}")
    if form.noise_included or form.observation_noise is not None:
        return None
    if isinstance(form, Gaussian) and form.standard_deviation is not None:
        raise ValueError(
            f"observation_noise={observation_noise!r} is given for all methods, but the pair (mean, standard "
            f"deviation) of {method!r} holds its noise by definition. Name the methods that lack it: "
            f"observation_noise={{{method!r}: ...}} adds noise there, leaving a method out does not."
        )
    return observation_noise
