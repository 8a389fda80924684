"""What each metric means, which way is better, and where it comes from: read from definitions.toml."""

from importlib.resources import files

from debiased_laplace.calibration.contents import MetricDefinition
from debiased_laplace.calibration.inputs import parse_toml

_TABLES = {
    kind: {name: MetricDefinition(**entry) for name, entry in table.items()}
    for kind, table in parse_toml(files(__package__).joinpath("definitions.toml").read_text(encoding="utf-8")).items()
}
CLASSIFICATION, REGRESSION, DETECTION = (_TABLES[kind] for kind in ("classification", "regression", "detection"))
