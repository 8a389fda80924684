"""Archives of predictions: .npz files with the arrays of `LAYOUT`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from debiased_laplace.calibration import Counts, Gaussian, Samples

LAYOUT = """\
targets                          labels (n,), or regression targets (n,) or (n, outputs)
METHOD/probs                     probabilities (n, C), or P(class 1) (n,)
METHOD/logits                    in addition, for temperature scaling if probabilities are rounded to 0
METHOD/mean with METHOD/std      regression, observation noise included
METHOD/mean with METHOD/covariance, or METHOD/samples, with METHOD/observation_noise or --noise-included
METHOD/rates                     expected counts at draws of a network, (samples, n) or (samples, n, outputs)
ood/SET/METHOD/...               predictions out of distribution, of every method
clusters                         id of the cluster of each sample; samples of one cluster may be dependent
validation/targets               with validation/probs, /logits, or /mean and /std: the baseline on validation data"""

FORMS = ("probs", "mean", "std", "covariance", "samples", "rates", "observation_noise", "logits")
RESERVED = ("ood", "validation")


@dataclass(frozen=True, eq=False)
class PredictionArchive:
    """Contents of an archive, as arguments of `calibration_report`.

    Attributes:
        predictions: predictions by method.
        targets: targets of the test set.
        kind: kind of the task.
        logits: logits by method.
        ood: out-of-distribution predictions by set and method.
        clusters: cluster ids of the samples, or None.
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
        """Task of the report: "binary" for two classes."""
        if self.kind == "regression":
            return "regression"
        shapes = [np.shape(p) for p in self.predictions.values()]
        return "binary" if all(len(s) == 1 or (len(s) == 2 and s[1] == 2) for s in shapes) else "multiclass"


def read_archive(path: Path, *, noise_included: bool = False) -> PredictionArchive:
    """Read predictions from an .npz file, without executing code from it (`allow_pickle=False`).

    Args:
        path: the file.
        noise_included: whether covariances and samples include observation noise.

    Returns:
        The contents.

    Raises:
        ValueError: if the file is not an archive, is damaged or pickled, or arrays are missing or unknown.
        OSError: if the file cannot be read.
    """
    try:
        return _interpret(_load(path), noise_included)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}. Expected an archive of predictions:\n{LAYOUT}") from error


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("expected an .npz file; got a single array")
            return {name: archive[name] for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # a damaged header raises nearly anything: MemoryError, OverflowError, TokenError, …
        if "pickle" in str(error).lower():
            raise ValueError(
                "expected an .npz file of numbers and text; got pickled objects or another format"
            ) from error
        raise ValueError(f"it cannot be read: {str(error) or type(error).__name__}") from error


def _interpret(arrays: Mapping[str, Any], noise_included: bool) -> PredictionArchive:
    if "targets" not in arrays:
        raise ValueError(f"expected an array 'targets'; got {_list(arrays)}")
    owners = _by_owner(arrays)
    validation = owners.pop("validation", None)
    methods = {owner: forms for owner, forms in owners.items() if not owner.startswith("ood/")}
    if not methods:
        raise ValueError(f"expected predictions; got {_list(arrays)}")
    kinds = {method: "classification" if "probs" in forms else "regression" for method, forms in methods.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"expected predictions of one kind from all methods; got {kinds}")
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


def _by_owner(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group the arrays OWNER/FORM by owner and form.

    Raises:
        ValueError: if a name is unknown.
    """
    owners: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        if name in ("targets", "clusters"):
            continue
        owner, _, form = name.rpartition("/")
        head, *rest = owner.split("/")
        is_method = (owner and head not in RESERVED) or (head == "ood" and len(rest) >= 2) or owner == "validation"
        if not (is_method and form in FORMS) and name != "validation/targets":
            raise ValueError(f"unknown array {name!r}")
        owners.setdefault(owner, {})[form] = array
    return owners


def _combine(where: str, forms: Mapping[str, Any], noise_included: bool) -> Any:
    """Return predictions in a form that `calibration_report` accepts.

    Raises:
        ValueError: if the arrays do not form a prediction.
    """
    given = set(forms) - {"logits", "observation_noise"}
    noise = forms.get("observation_noise")
    noise = noise.item() if noise is not None and noise.ndim == 0 else noise
    if given == {"probs"} and noise is None:
        return forms["probs"]
    if given == {"mean", "std"}:
        return Gaussian(forms["mean"], forms["std"], observation_noise=noise)
    if given == {"mean", "covariance"}:
        return Gaussian(forms["mean"], None, forms["covariance"], noise, noise_included)
    if given == {"rates"} and noise is None:
        return Counts(forms["rates"])
    if given == {"samples"}:
        return Samples(forms["samples"], noise, noise_included)
    raise ValueError(f"the arrays {_list(forms)} of {where!r} do not form a prediction")


def _read_validation(forms: Mapping[str, Any], noise_included: bool) -> tuple[Any, Any]:
    if "targets" not in forms:
        raise ValueError(f"expected an array 'targets' in validation/; got {_list(forms)}")
    others = {name: array for name, array in forms.items() if name != "targets"}
    predictions = others["logits"] if set(others) == {"logits"} else _combine("validation", others, noise_included)
    return predictions, forms["targets"]


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
