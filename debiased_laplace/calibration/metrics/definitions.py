"""Definitions of the metrics: meaning, good direction and reference, read from definitions.toml."""

from importlib.resources import files

from debiased_laplace.calibration.contents import MetricDefinition
from debiased_laplace.calibration.inputs import parse_toml

_TEXT = files(__package__).joinpath("definitions.toml").read_text(encoding="utf-8")
CLASSIFICATION, REGRESSION, DETECTION = (
    {name: MetricDefinition(**entry) for name, entry in table.items()} for table in parse_toml(_TEXT).values()
)
