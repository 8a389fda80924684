"""Predictions in an .npz file: which arrays there may be, and what they mean."""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from debiased_laplace.calibration import Gaussian, Samples

LAYOUT = """\
targets                          labels (n,), or regression targets (n,) or (n, outputs)
METHOD/probs                     probabilities (n, C), or P(class 1) (n,)
METHOD/logits                    beside them, for temperatures where probabilities are rounded to 0
METHOD/mean with METHOD/std      regression, observation noise included
METHOD/mean with METHOD/covariance, or METHOD/samples, with METHOD/observation_noise or --noise-included
ood/SET/METHOD/...               predictions out of distribution, of every method
groups/NAME                      the group of every sample
clusters                         samples of one id may depend on each other
validation/targets               with validation/probs, /logits, or /mean and /std: the baseline on other samples"""

FORMS = ("probs", "mean", "std", "covariance", "samples", "observation_noise", "logits")
RESERVED = ("ood", "groups", "validation")
Kind = Literal["classification", "regression"]


@dataclass(frozen=True, eq=False)
class PredictionArchive:
    """What an archive holds, as arguments of `calibration_report`.

    Attributes:
        predictions: method to predictions.
        targets: of the test set.
        kind: of the task.
        logits: method to logits.
        ood: set to method to predictions.
        groups: name to the group of every sample.
        clusters: of the samples, or None.
        validation: predictions and targets, or None.
    """

    predictions: Mapping[str, Any]
    targets: Any
    kind: Kind
    logits: Mapping[str, Any]
    ood: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Any]
    clusters: Any
    validation: tuple[Any, Any] | None

    @property
    def task(self) -> Literal["binary", "multiclass", "regression"]:
        """Binary where there are two classes."""
        if self.kind == "regression":
            return "regression"
        shapes = [np.shape(p) for p in self.predictions.values()]
        return "binary" if all(len(s) == 1 or (len(s) == 2 and s[1] == 2) for s in shapes) else "multiclass"


def read_archive(path: Path, *, noise_included: bool = False) -> PredictionArchive:
    """Predictions from an .npz file; nothing in it is executed (`allow_pickle=False`).

    Args:
        path: the file.
        noise_included: covariances and samples hold the observation noise already.

    Raises:
        ValueError: if it is no archive, damaged, pickled, or holds too little or unknown arrays.
        OSError: if there is no such file.
    """
    arrays = _load(path)
    if "targets" not in arrays:
        raise ValueError(_say(path, f"there is no array 'targets'; there are {_list(arrays)}"))
    with _located(path):
        groups, ood, validation, methods = _sort(arrays)
        if not methods:
            raise ValueError(f"there are no predictions; there are {_list(arrays)}")
        kinds = {method: _kind(method, forms) for method, forms in methods.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"all methods must be of one kind; got {kinds}")
        kind = next(iter(kinds.values()))
        return PredictionArchive(
            predictions={m: _combine(m, forms, noise_included) for m, forms in methods.items()},
            targets=arrays["targets"],
            kind=kind,
            logits={m: forms["logits"] for m, forms in methods.items() if "logits" in forms},
            ood={
                name: {m: _combine(f"ood/{name}/{m}", forms, noise_included) for m, forms in of_methods.items()}
                for name, of_methods in ood.items()
            },
            groups=groups,
            clusters=arrays.get("clusters"),
            validation=_read_validation(validation, noise_included),
        )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = str(error).rstrip(".")
        if "pickle" in reason.lower():
            reason = "it holds pickled objects or is no .npz file; only plain arrays of numbers or text are read"
        raise ValueError(_say(path, f"it cannot be read: {reason}")) from error


def _sort(
    arrays: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]], dict[str, Any], dict[str, dict[str, Any]]]:
    """Groups, sets out of distribution, validation data and methods."""
    groups: dict[str, Any] = {}
    ood: dict[str, dict[str, dict[str, Any]]] = {}
    validation: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        head, _, rest = name.partition("/")
        owner, _, form = name.rpartition("/")
        if name in ("targets", "clusters"):
            continue
        if head == "groups" and rest:
            groups[rest] = array
        elif head == "validation" and rest in (*FORMS, "targets"):
            validation[rest] = array
        elif head == "ood" and form in FORMS and owner.count("/") >= 2:
            _, set_name, method = owner.split("/", 2)
            ood.setdefault(set_name, {}).setdefault(method, {})[form] = array
        elif head not in RESERVED and owner and form in FORMS:
            methods.setdefault(owner, {})[form] = array
        else:
            raise ValueError(f"nothing is known of an array {name!r}")
    return groups, ood, validation, methods


def _kind(method: str, forms: Mapping[str, Any]) -> Kind:
    classification = "probs" in forms
    if classification == ("mean" in forms or "samples" in forms):
        raise ValueError(f"{method!r} needs either probs, or mean, or samples; got {_list(forms)}")
    return "classification" if classification else "regression"


def _combine(where: str, forms: Mapping[str, Any], noise_included: bool) -> Any:
    """Predictions in the form in which `calibration_report` takes them."""
    given = set(forms) - {"logits", "observation_noise"}
    noise = forms.get("observation_noise")
    noise = noise.item() if noise is not None and noise.ndim == 0 else noise
    if given == {"probs"} and noise is None:
        return forms["probs"]
    if given == {"mean", "std"}:
        pair = (forms["mean"], forms["std"])
        return pair if noise is None else Gaussian(*pair, observation_noise=noise)
    if given == {"mean", "covariance"}:
        mean, covariance = forms["mean"], forms["covariance"]
        if noise is None and not noise_included:
            return mean, covariance
        return Gaussian(mean, None, covariance, observation_noise=noise, noise_included=noise_included)
    if given == {"samples"}:
        if noise is None and not noise_included:
            return forms["samples"]
        return Samples(forms["samples"], observation_noise=noise, noise_included=noise_included)
    raise ValueError(f"the arrays {_list(forms)} of {where!r} do not go together")


def _read_validation(forms: Mapping[str, Any], noise_included: bool) -> tuple[Any, Any] | None:
    if not forms:
        return None
    if "targets" not in forms:
        raise ValueError(f"validation/ has no targets; it has {_list(forms)}")
    others = {name: array for name, array in forms.items() if name != "targets"}
    if set(others) == {"logits"}:
        return others["logits"], forms["targets"]
    return _combine("validation", others, noise_included), forms["targets"]


@contextmanager
def _located(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(_say(path, str(error).rstrip("."))) from error


def _say(path: Path, what: str) -> str:
    return f"{path}: {what}. An archive of predictions holds\n{LAYOUT}"


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
