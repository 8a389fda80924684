"""Predictions in an .npz file: which arrays there may be, and what they mean."""

import zipfile
import zlib
from collections.abc import Iterable, Mapping
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
clusters                         samples of one id may depend on each other
validation/targets               with validation/probs, /logits, or /mean and /std: the baseline on other samples"""

FORMS = ("probs", "mean", "std", "covariance", "samples", "observation_noise", "logits")
RESERVED = ("ood", "validation")


@dataclass(frozen=True, eq=False)
class PredictionArchive:
    """What an archive holds, as arguments of `calibration_report`.

    Attributes:
        predictions: method to predictions.
        targets: of the test set.
        kind: of the task.
        logits: method to logits.
        ood: set to method to predictions.
        clusters: of the samples, or None.
        validation: predictions and targets, or None.
    """

    predictions: Mapping[str, Any]
    targets: Any
    kind: Literal["classification", "regression"]
    logits: Mapping[str, Any]
    ood: Mapping[str, Mapping[str, Any]]
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
    """Read predictions from an .npz file; nothing in it is executed (`allow_pickle=False`).

    Args:
        path: the file.
        noise_included: covariances and samples hold the observation noise already.

    Raises:
        ValueError: if it is no archive, damaged, pickled, or holds too little or unknown arrays.
        OSError: if there is no such file.
    """
    try:
        return _interpret(_load(path), noise_included)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}. An archive of predictions holds\n{LAYOUT}") from error


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
        if "pickle" in str(error).lower():
            raise ValueError("it holds pickled objects or is no .npz file; only numbers and text are read") from error
        raise ValueError(f"it cannot be read: {error}") from error


def _interpret(arrays: Mapping[str, Any], noise_included: bool) -> PredictionArchive:
    if "targets" not in arrays:
        raise ValueError(f"there is no array 'targets'; there are {_list(arrays)}")
    owners = _sort(arrays)
    validation = owners.pop("validation", None)
    methods = {owner: forms for owner, forms in owners.items() if not owner.startswith("ood/")}
    if not methods:
        raise ValueError(f"there are no predictions; there are {_list(arrays)}")
    kinds = {method: "classification" if "probs" in forms else "regression" for method, forms in methods.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"all methods must be of one kind; got {kinds}")
    combined = {owner: _combine(owner, forms, noise_included) for owner, forms in owners.items()}
    ood: dict[str, dict[str, Any]] = {}
    for owner in owners:
        if owner not in methods:
            _, name, method = owner.split("/", 2)
            ood.setdefault(name, {})[method] = combined[owner]
    return PredictionArchive(
        predictions={method: combined[method] for method in methods},
        targets=arrays["targets"],
        kind="classification" if "classification" in kinds.values() else "regression",
        logits={method: forms["logits"] for method, forms in methods.items() if "logits" in forms},
        ood=ood,
        clusters=arrays.get("clusters"),
        validation=None if validation is None else _read_validation(validation, noise_included),
    )


def _sort(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What stands before the last slash, to form, to array."""
    owners: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        if name in ("targets", "clusters"):
            continue
        owner, _, form = name.rpartition("/")
        head, *rest = owner.split("/")
        is_method = (owner and head not in RESERVED) or (head == "ood" and len(rest) >= 2) or owner == "validation"
        if not (is_method and form in FORMS) and name != "validation/targets":
            raise ValueError(f"nothing is known of an array {name!r}")
        owners.setdefault(owner, {})[form] = array
    return owners


def _combine(where: str, forms: Mapping[str, Any], noise_included: bool) -> Any:
    """Predictions in the form in which `calibration_report` takes them."""
    given = set(forms) - {"logits", "observation_noise"}
    noise = forms.get("observation_noise")
    noise = noise.item() if noise is not None and noise.ndim == 0 else noise
    if given == {"probs"} and noise is None:
        return forms["probs"]
    if given == {"mean", "std"}:
        return Gaussian(forms["mean"], forms["std"], observation_noise=noise)
    if given == {"mean", "covariance"}:
        return Gaussian(forms["mean"], None, forms["covariance"], noise, noise_included)
    if given == {"samples"}:
        return Samples(forms["samples"], noise, noise_included)
    raise ValueError(f"the arrays {_list(forms)} of {where!r} do not go together")


def _read_validation(forms: Mapping[str, Any], noise_included: bool) -> tuple[Any, Any]:
    if "targets" not in forms:
        raise ValueError(f"validation/ has no targets; it has {_list(forms)}")
    others = {name: array for name, array in forms.items() if name != "targets"}
    predictions = others["logits"] if set(others) == {"logits"} else _combine("validation", others, noise_included)
    return predictions, forms["targets"]


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
