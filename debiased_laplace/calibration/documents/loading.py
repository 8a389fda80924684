"""A stored report read back, so that it can be rendered, checked and compared without the predictions."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from debiased_laplace.calibration.contents import ClassificationCurves, ReportContents
from debiased_laplace.calibration.documents.reading import DocumentError, Reader, join, show
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.rendering.json_document import DERIVED_OF_METRICS, DERIVED_OF_REPORT, SCHEMA_VERSION

Contents = TypeVar("Contents", bound=ReportContents)

READER = Reader({ReportContents: DERIVED_OF_REPORT, Estimate: DERIVED_OF_METRICS})
NEEDED_METRICS = {"regression": ("nll", "z_scale"), "classification": ("nll", "ece", "confidence_gap")}


def load_report(cls: type[Contents], source: str | os.PathLike[str]) -> Contents:
    """A report from its JSON.

    Args:
        cls: `ReportContents` or a subclass without further fields.
        source: the text, or the path of a file that holds it.

    Raises:
        ValueError: if it is no JSON, no report, or of a newer version; the message says where.
        OSError: if there is no such file.
    """
    text, name = _read_text(source)
    document = _parse(text, name)
    try:
        _check_version(document)
        contents = READER.read_dataclass(cls, document)
        _check_references(contents)
    except DocumentError as error:
        raise ValueError(f"{name} is no report that can be read: {error}") from error
    return contents


def _read_text(source: str | os.PathLike[str]) -> tuple[str, str]:
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        return source, "The JSON text"
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no JSON: it is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        if isinstance(source, str) and not path.exists():
            message = f"Expected the JSON text of a report or the path of a file; there is no file {source[:80]!r}."
            raise FileNotFoundError(message) from error
        raise


def _parse(text: str, name: str) -> Any:
    def refuse_constant(constant: str) -> Any:
        raise ValueError(f"{name} is no JSON: {constant} is no JSON number.")

    def refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{name}: the key {twice!r} stands twice in an object.")
        return members

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{name} is no report: it is nested too deeply.") from error


def _check_version(document: Any) -> None:
    if not isinstance(document, Mapping):
        raise DocumentError("", f"expected an object; got {show(document)}.")
    version = document.get("schema_version")
    numbers = version.split(".") if isinstance(version, str) else []
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers):
        raise DocumentError("/schema_version", f"expected a version such as {SCHEMA_VERSION!r}; got {show(version)}.")
    if tuple(map(int, numbers)) > tuple(map(int, SCHEMA_VERSION.split("."))):
        message = f"version {version} is newer than {SCHEMA_VERSION}, which this debiased-laplace reads: update it."
        raise DocumentError("/schema_version", message)


def _check_references(contents: ReportContents) -> None:
    """Names that the renderers look up are there.

    Raises:
        DocumentError: for one that is not.
    """
    methods = list(contents.methods)
    if contents.baseline not in methods:
        raise DocumentError("/baseline", f"expected one of the methods {methods}; got {contents.baseline!r}.")
    if not isinstance(contents.settings.get("confidence_level"), float):
        raise DocumentError("/settings/confidence_level", "expected a number between 0 and 1.")
    definitions = define_metrics(contents.task)
    is_regression = contents.task == "regression"
    needed = NEEDED_METRICS["regression" if is_regression else "classification"]
    for method, result in contents.methods.items():
        where = join("/methods", method)
        if isinstance(result.curves, ClassificationCurves) == is_regression:
            raise DocumentError(f"{where}/curves", f"these are not the curves of a {contents.task} task.")
        unknown = [name for name in result.metrics if name not in definitions]
        if unknown:
            raise DocumentError(join(f"{where}/metrics", unknown[0]), f"no such metric of a {contents.task} task.")
        missing = [name for name in needed if name not in result.metrics]
        if missing:
            raise DocumentError(f"{where}/metrics", f"expected a metric {missing[0]!r}; there is none.")
    for i, comparison in enumerate(contents.comparisons):
        for name in (comparison.method, comparison.baseline):
            if name not in methods:
                raise DocumentError(f"/comparisons/{i}", f"expected names of methods out of {methods}; got {name!r}.")
