"""JSON documents of reports: writing, reading with checks of all types, and their JSON Schema."""

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json as parse_json

from debiased_laplace.calibration.contents import SCHEMA_VERSION, ReportContents
from debiased_laplace.checks import shown

BOM = "\ufeff"  # some editors put it before the first character of a file

Contents = TypeVar("Contents", bound=ReportContents)

with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))(ReportContents)  # and the types of its fields


def to_json(contents: ReportContents) -> str:
    """Return the report as indented JSON text, the same bytes for the same report; all numbers must be finite."""
    plain = TypeAdapter(type(contents)).dump_python(contents, mode="json")
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(cls: type[Contents], source: str | os.PathLike[str]) -> Contents:
    """Read a report, as `CalibrationReport.from_json`, into `ReportContents` or a subclass without further fields."""
    text, name = _read_text(source)
    _check_version(text, name)
    try:
        contents = TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        deepest = max(error.errors(), key=lambda e: len(e["loc"]))  # inside the member of a union that was meant
        place = ".".join(map(str, deepest["loc"])) or "its top level"
        raise ValueError(f"{name} is not a report: at {place}: {message_of(deepest)}.") from error
    compared = {m for c in contents.comparisons for m in (c.method, c.baseline)}
    detected = {d.method for one in contents.ood.values() for d in one.detections}
    metrics = {metric for result in contents.methods.values() for metric in result.metrics}
    for what, needed, known in (  # pages and tables look these up
        ("method", {contents.baseline, *compared, *detected}, contents.methods),
        ("metric with a definition", metrics, contents.definitions),
        ("setting", {"confidence_level"}, contents.settings),
    ):
        if unknown := sorted(needed - set(known)):
            raise ValueError(f"{name} is not a report: it has no {what} {unknown[0]!r}, only {list(known)}.")
    return contents


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the documents that `to_json` writes."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(ReportContents).json_schema()}


def message_of(error: Any) -> str:
    """Return the words of one error of a `ValidationError`, without their prefix and full stop."""
    return str(error["msg"]).removeprefix("Value error, ").rstrip(".")


def _read_text(source: str | os.PathLike[str]) -> tuple[bytes, str]:
    """Return the text, and its name for messages."""
    if isinstance(source, str) and source.removeprefix(BOM).lstrip().startswith(("{", "[")):
        return source.removeprefix(BOM).encode("utf-8", "backslashreplace"), "The JSON text"
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"Expected the JSON of a report or its path; got {shown(source)}.")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"Expected the JSON of a report or its path; there is no file {str(source)[:80]!r}.")
    return path.read_bytes().removeprefix(BOM.encode()), str(path)


def _check_version(text: bytes, name: str) -> None:
    """Refuse text that is not a JSON object, and versions that this package does not read."""
    try:
        document = parse_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}.") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, str) or not re.fullmatch("[0-9]{1,4}[.][0-9]{1,4}", version):
        raise ValueError(f"{name} is not a report: at schema_version: expected {SCHEMA_VERSION!r}; got {version!r}.")
    found, known = ([int(n) for n in v.split(".")] for v in (version, SCHEMA_VERSION))
    if found > known:
        raise ValueError(f"{name} has the newer schema_version {version}; update debiased-laplace to read it.")
    if found[0] < known[0]:
        raise ValueError(f"{name} has the older schema_version {version}; make the report again.")
