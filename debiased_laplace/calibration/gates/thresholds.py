"""Thresholds as they are written down: in TOML, or as the mappings that TOML becomes."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, get_args

from debiased_laplace.calibration.gates.outcomes import Judge

LIMITS = ("min", "max")
CHANGES = ("min_change", "max_change")
RELATIVE_CHANGES = ("min_relative_change", "max_relative_change")


@dataclass(frozen=True)
class Threshold:
    """What a metric must keep to.

    Attributes:
        metric: name of the metric.
        method: name of the method; None for all of them, in changes all but the one that they are compared with.
        min: smallest value allowed.
        max: largest value allowed.
        relative_to: method that changes are compared with; None for the report's baseline.
        min_change: smallest difference to that method allowed, in the unit of the metric.
        max_change: largest difference allowed.
        min_relative_change: smallest difference allowed, as a share of the other method's value.
        max_relative_change: largest such share.
        judge: "bound": the end of the confidence interval must keep the limit; "estimate": the value alone.
        min_samples: with fewer test samples the outcome is inconclusive.

    Raises:
        ValueError: for no limit, limits that exclude each other, or a reference without a change.
    """

    metric: str
    method: str | None = None
    min: float | None = None
    max: float | None = None
    relative_to: str | None = None
    min_change: float | None = None
    max_change: float | None = None
    min_relative_change: float | None = None
    max_relative_change: float | None = None
    judge: Judge = "bound"
    min_samples: int = 0

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in (*LIMITS, *CHANGES, *RELATIVE_CHANGES)}
        if all(limit is None for limit in limits.values()):
            raise ValueError(f"a threshold needs one of {', '.join(limits)}; got none.")
        for low, high in (LIMITS, CHANGES, RELATIVE_CHANGES):
            if limits[low] is not None and limits[high] is not None and limits[low] > limits[high]:
                raise ValueError(f"{low} must not be above {high}; got {limits[low]:g} and {limits[high]:g}.")
        if self.relative_to is not None and all(limits[name] is None for name in (*CHANGES, *RELATIVE_CHANGES)):
            raise ValueError(f"relative_to needs one of {', '.join((*CHANGES, *RELATIVE_CHANGES))}; got none.")


KEYS = tuple(f.name for f in fields(Threshold))
DEFAULT = "default"
DEFAULT_THRESHOLDS = (
    Threshold("nll", max_change=0.0),
    Threshold("accuracy", min_change=-0.005),
)
"""No method may lose likelihood against the baseline, nor more than half a point of accuracy (classification only)."""

ThresholdSource = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]


def read_thresholds(source: ThresholdSource, task: str) -> tuple[Threshold, ...]:
    """Thresholds from a TOML file, from what it would hold, or the default ones.

    Args:
        source: path of a TOML file with tables `[[threshold]]`; or a mapping with "threshold", a sequence of mappings;
            or a sequence of mappings or `Threshold`; or "default".
        task: of the report, which decides the default ones.

    Raises:
        ValueError: for unknown keys, wrong values or no threshold; the message names the threshold and what there is.
        OSError: if there is no such file.
    """
    if isinstance(source, str) and source == DEFAULT:
        return DEFAULT_THRESHOLDS[:1] if task == "regression" else DEFAULT_THRESHOLDS
    where = "thresholds"
    if isinstance(source, (str, os.PathLike)):
        where = str(Path(source))
        source = _read_toml(Path(source))
    if isinstance(source, Mapping):
        unknown = [key for key in source if key != "threshold"]
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; expected tables [[threshold]] and nothing else.")
        source = source.get("threshold", ())
    if isinstance(source, (str, Mapping)) or not isinstance(source, Sequence) or not source:
        raise ValueError(f"{where}: expected at least one table [[threshold]]; got {source!r}.")
    return tuple(_read_threshold(item, f"{where}, threshold {i}") for i, item in enumerate(source, 1))


def _read_threshold(item: Any, where: str) -> Threshold:
    if isinstance(item, Threshold):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: expected a table; got {item!r}.")
    unknown = [key for key in item if key not in KEYS]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}.")
    if "metric" not in item:
        raise ValueError(f"{where}: it names no metric.")
    try:
        return Threshold(**{key: _read_member(key, value) for key, value in item.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_member(key: str, value: Any) -> Any:
    """The value of a key, limits as floats.

    Raises:
        ValueError: if it is of another kind.
    """
    if key == "judge":
        if value not in get_args(Judge):
            raise ValueError(f"judge must be 'bound' or 'estimate'; got {value!r}.")
    elif key == "min_samples":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"min_samples must be a whole number from 0 on; got {value!r}.")
    elif key in ("metric", "method", "relative_to"):
        if not isinstance(value, str):
            raise ValueError(f"{key} must be text; got {value!r}.")
    elif not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{key} must be a finite number; got {value!r}.")
    else:
        return float(value)
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
